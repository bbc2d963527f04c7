//! The files that say who the guest is: written as it is set up, changed as it becomes somebody else.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use alveole_agent_protocol::Setup;
use alveole_network::guest_config::{Change, DeviceConfig};

use crate::mount;

const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";
const RESOLVERS: &str = "/etc/resolv.conf";
const MACHINE_ID: &str = "/etc/machine-id";
const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";

/// The longest name that the kernel takes (`__NEW_UTS_LEN`).
const MAX_NAME_BYTES: usize = 64;

/// What the files say, as far as this program has written it.
#[derive(Default)]
pub(crate) struct Names {
    hostname: String,
    hosts: Vec<(IpAddr, String)>,
    devices: Vec<DeviceConfig>,
    /// Where volumes are: what they say to be there is not changed.
    volumes: Vec<String>,
    /// The root is one that is only read, once all is in its place.
    sealed: bool,
}

impl Names {
    pub(crate) fn of(setup: &Setup, devices: Vec<DeviceConfig>) -> Self {
        let volumes = setup.volumes.iter();
        Self {
            hostname: setup.hostname.clone(),
            hosts: setup.hosts.clone(),
            devices,
            volumes: volumes.map(|v| v.mount.target.clone()).collect(),
            sealed: mount::is_sealed(setup),
        }
    }

    /// Writes all of them, into a root that is not sealed yet.
    pub(crate) fn write(&self) -> Result<(), String> {
        if !self.hostname.is_empty() {
            set_hostname(&self.hostname)?;
        }
        self.write_file(HOSTNAME, &format!("{}\n", self.hostname))?;
        self.write_file(HOSTS, &self.hosts_file())?;
        self.write_file(RESOLVERS, &self.resolvers_file())
    }

    /// Gives the guest another name.
    pub(crate) fn rename(&mut self, hostname: &str) -> Result<(), String> {
        let good = |c: u8| c.is_ascii_alphanumeric() || b"-.".contains(&c);
        if hostname.is_empty() || hostname.len() > MAX_NAME_BYTES || !hostname.bytes().all(good) {
            return Err(format!(
                "the host name {hostname:?} is not 1 to {MAX_NAME_BYTES} letters, digits, - and ."
            ));
        }
        self.learn();
        set_hostname(hostname)?;
        let before = self.own_line();
        self.hostname = hostname.into();
        self.unsealed(|names| {
            names.write_file(HOSTNAME, &format!("{hostname}\n"))?;
            names.change_hosts(&before)
        })
    }

    /// Writes what the guest's networks are from now on. Gives what was left alone, if there is something.
    pub(crate) fn move_to(&mut self, changes: &[Change]) -> Result<Option<String>, String> {
        self.learn();
        let (own_before, resolvers_before) = (self.own_line(), self.resolvers_file());
        // All are found before one of them has an address that another one had.
        let at = |mac| self.devices.iter().position(|device| device.mac == mac);
        let places: Vec<_> = changes
            .iter()
            .map(|change| {
                let by_mac = change.mac().and_then(at);
                by_mac.or_else(|| at(change.becomes.mac))
            })
            .collect();
        for (place, change) in places.into_iter().zip(changes) {
            match place {
                Some(place) => self.devices[place] = change.becomes.clone(),
                None => self.devices.push(change.becomes.clone()),
            }
        }
        self.unsealed(|names| {
            names.change_hosts(&own_before)?;
            let resolvers = names.resolvers_file();
            // Who has written another one there wants that.
            let now = fs::read_to_string(RESOLVERS).unwrap_or_default();
            if resolvers == resolvers_before || now == resolvers {
                return Ok(None);
            }
            if !now.is_empty() && now != resolvers_before {
                return Ok(Some(format!(
                    "'{RESOLVERS}' is not as it was written by the agent, and is left alone"
                )));
            }
            names.write_file(RESOLVERS, &resolvers).map(|()| None)
        })
    }

    /// The name of a guest that was not given one by this program.
    fn learn(&mut self) {
        if self.hostname.is_empty() {
            let known = rustix::system::uname();
            self.hostname = known.nodename().to_string_lossy().into_owned();
        }
    }

    /// Gives the guest another machine-id (machine-id(5)).
    pub(crate) fn set_machine_id(&self, id: &str) -> Result<(), String> {
        let good = id.len() == 32
            && id.bytes().all(|c| c.is_ascii_hexdigit())
            && id.bytes().any(|c| c != b'0');
        if !good {
            return Err(format!(
                "the machine-id {id:?} is not 32 hexadecimal digits, not all of them zero"
            ));
        }
        let text = format!("{}\n", id.to_ascii_lowercase());
        self.unsealed(|names| {
            names.write_file(MACHINE_ID, &text)?;
            // Mostly it is a link to the other one, or not there.
            match fs::symlink_metadata(DBUS_MACHINE_ID) {
                Ok(file) if file.is_file() => names.write_file(DBUS_MACHINE_ID, &text),
                _ => Ok(()),
            }
        })
    }

    fn unsealed<T>(&self, act: impl FnOnce(&Self) -> Result<T, String>) -> Result<T, String> {
        if !self.sealed {
            return act(self);
        }
        mount::unseal_root()?;
        let done = act(self);
        mount::seal_root().and(done)
    }

    fn write_file(&self, path: &str, text: &str) -> Result<(), String> {
        // What is said to be there is not changed.
        let mut volumes = self.volumes.iter();
        if volumes.any(|target| Path::new(path).starts_with(target)) {
            return Ok(());
        }
        write_whole(path, text).map_err(|e| format!("cannot write '{path}': {e}"))
    }

    /// The guest's own line in `/etc/hosts`.
    fn own_line(&self) -> String {
        match self.devices.iter().flat_map(|d| &d.addresses).next() {
            Some(address) => format!("{}\t{}", address.addr(), self.hostname),
            None => format!("127.0.1.1\t{}", self.hostname),
        }
    }

    fn hosts_file(&self) -> String {
        let mut text =
            String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        let _ = writeln!(text, "{}", self.own_line());
        for (address, name) in &self.hosts {
            let _ = writeln!(text, "{address}\t{name}");
        }
        text
    }

    /// Puts the guest's own line in the place of the one that was its own before; what others have added stays.
    fn change_hosts(&self, before: &str) -> Result<(), String> {
        let text = match fs::read_to_string(HOSTS) {
            Ok(text) => with_line(&text, before, &self.own_line()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.hosts_file(),
            Err(e) => return Err(format!("cannot read '{HOSTS}': {e}")),
        };
        self.write_file(HOSTS, &text)
    }

    fn resolvers_file(&self) -> String {
        let mut text = String::new();
        for resolver in self.devices.iter().flat_map(|d| &d.dns) {
            let _ = writeln!(text, "nameserver {resolver}");
        }
        let domains = self.devices.iter().filter_map(|d| d.search.as_deref());
        let domains: Vec<_> = domains.collect();
        if !domains.is_empty() {
            let _ = writeln!(text, "search {}", domains.join(" "));
        }
        text
    }
}

fn set_hostname(hostname: &str) -> Result<(), String> {
    rustix::system::sethostname(hostname.as_bytes()).map_err(|e| {
        let e = io::Error::from(e);
        format!("cannot set the host name '{hostname}': {e}")
    })
}

/// `text` with `after` in the place of the line `before`, or at its end if it has neither.
fn with_line(text: &str, before: &str, after: &str) -> String {
    let mut lines: Vec<&str> = text.lines().collect();
    match lines.iter().position(|line| *line == before) {
        Some(at) => lines[at] = after,
        None if lines.contains(&after) => {}
        None => lines.push(after),
    }
    lines.join("\n") + "\n"
}

/// Writes a file that may be a link to nowhere in the image, as `/etc/resolv.conf` often is.
fn write_whole(path: &str, text: &str) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) {
        fs::remove_file(path)?;
    }
    if let Some(folder) = Path::new(path).parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_line_changes_and_others_stay() {
        let text = "127.0.0.1\tlocalhost\n10.0.0.2\tweb\n10.0.0.2\tweb2\n# mine\n";
        let line = |before, after| with_line(text, before, after);
        assert_eq!(
            line("10.0.0.2\tweb", "10.0.0.9\tw9"),
            "127.0.0.1\tlocalhost\n10.0.0.9\tw9\n10.0.0.2\tweb2\n# mine\n"
        );
        assert_eq!(line("10.0.0.3\tx", "10.0.0.2\tweb"), text);
        assert_eq!(
            line("10.0.0.3\tx", "10.0.0.9\tw9"),
            format!("{text}10.0.0.9\tw9\n")
        );
        assert_eq!(with_line("", "a", "b"), "b\n");
    }
}
