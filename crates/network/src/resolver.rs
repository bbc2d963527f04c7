//! Names and DHCP on a network: one `dnsmasq` for each, run by this host on its bridge.
//!
//! `dnsmasq` because it answers DNS, DHCP, DHCPv6 and router solicitations from one source, so that guests that
//! are told their addresses and guests that ask for them have the same; it is small, well kept and everywhere. A
//! hosts file handed to guests would be old as soon as the next guest starts.
//!
//! It runs under another user, in an empty capability bounding set but for what it needs, without the right
//! to gain others; it only answers on its bridge, and has a file for nothing.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use crate::Error;
use crate::programs;
use crate::spec::Mode;
use crate::state::{NetworkState, replace_file};
use crate::words::NetworkName;

/// How long it may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a resolver is to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answers {
    /// Its configuration; a change restarts it.
    pub config: String,
    /// Names and addresses, as a hosts file; a change is read while it runs.
    pub hosts: String,
    /// Hardware addresses and addresses, for DHCP; a change is read while it runs.
    pub reservations: String,
}

impl Answers {
    /// Whether a resolver that says this can be told to say that while it runs. Guests that go take a new one:
    /// it would keep their names until their leases end.
    #[must_use]
    pub fn can_become(&self, new: &Self) -> bool {
        let stays = |line: &str| new.reservations.lines().any(|other| other == line);
        self.config == new.config && self.reservations.lines().all(stays)
    }
}

/// What a network's resolver is to say; none if it has none.
#[must_use]
pub fn answers<'a>(
    network: &NetworkState,
    all: impl Iterator<Item = &'a NetworkState>,
    run: &Path,
) -> Option<Answers> {
    let spec = &network.spec;
    if !spec.has_resolver() {
        return None;
    }
    let folder = folder(run, &spec.name);
    let domain = spec.domain();
    let mut config = String::new();
    let mut say = |line: String| {
        config.push_str(&line);
        config.push('\n');
    };
    say(format!("interface={}", spec.name));
    for line in [
        "except-interface=lo",
        "bind-interfaces",
        "no-hosts",
        "no-poll",
        "domain-needed",
        "bogus-priv",
    ] {
        say(line.into());
    }
    // No guest chooses its name. All can ask again and again: nothing is logged of that, nothing kept.
    for line in [
        "dhcp-ignore-names",
        "quiet-dhcp",
        "quiet-dhcp6",
        "quiet-ra",
        "leasefile-ro",
        "no-ping",
        "dhcp-authoritative",
        "dhcp-ignore=tag:!known",
    ] {
        say(line.into());
    }
    say(format!("pid-file={}", folder.join("pid").display()));
    say(format!("addn-hosts={}", folder.join("hosts").display()));
    say(format!(
        "dhcp-hostsfile={}",
        folder.join("reservations").display()
    ));
    say(format!("domain={domain}"));
    say(format!("local=/{domain}/"));
    if spec.mode != Mode::Nat {
        say("no-resolv".into());
    }
    // Names of the networks that its guests may talk to.
    for other in
        all.filter(|other| other.spec.has_resolver() && talks_to(network, &other.spec.name))
    {
        let address = other
            .spec
            .gateway4()
            .map(IpAddr::V4)
            .or(other.spec.gateway6().map(IpAddr::V6));
        if let Some(address) = address {
            say(format!("server=/{}/{address}", other.spec.domain()));
        }
    }
    if let Some(net) = spec.v4 {
        say(format!(
            "dhcp-range={},static,{},1h",
            net.network(),
            net.netmask()
        ));
        say(format!("dhcp-option=option:mtu,{}", spec.mtu));
        say(format!("dhcp-option=option:domain-search,{domain}"));
        if !spec.routes() {
            say("dhcp-option=option:router".into());
        }
    }
    if let Some(net) = spec.v6 {
        say("enable-ra".into());
        say(format!(
            "dhcp-range={},static,{},1h",
            net.network(),
            net.prefix_len()
        ));
        // Every 10 minutes; a lifetime of 0 says that there is no way out here (RFC 4861, section 4.2).
        let lifetime = if spec.routes() { 1800 } else { 0 };
        say(format!(
            "ra-param={},mtu:{},600,{lifetime}",
            spec.name, spec.mtu
        ));
        say(format!("dhcp-option=option6:domain-search,{domain}"));
    }
    let (mut hosts, mut reservations) = (String::new(), String::new());
    let mut leases: Vec<_> = network.leases.iter().filter(|l| l.port.is_some()).collect();
    leases.sort_by(|a, b| a.vm.cmp(&b.vm));
    for lease in leases {
        let vm = &lease.vm;
        let mut reservation = lease.mac.to_string();
        if let Some(address) = lease.v4 {
            let _ = writeln!(hosts, "{address} {vm}.{domain} {vm}");
            let _ = write!(reservation, ",{address}");
        }
        if let Some(address) = lease.v6 {
            let _ = writeln!(hosts, "{address} {vm}.{domain} {vm}");
            let _ = write!(reservation, ",[{address}]");
        }
        let _ = writeln!(reservations, "{reservation},{vm}");
    }
    Some(Answers {
        config,
        hosts,
        reservations,
    })
}

fn talks_to(network: &NetworkState, other: &NetworkName) -> bool {
    use alveole_egress_rules::{Action, Destination};
    let own = network.leases.iter().flat_map(|l| &l.rules);
    network.spec.rules.iter().chain(own).any(|rule| {
        rule.action == Action::Allow
            && matches!(&rule.to, Destination::Network(name) if name == other)
    })
}

/// Where the files of a network's resolver are.
pub(crate) fn folder(run: &Path, name: &NetworkName) -> PathBuf {
    run.join(name.as_str())
}

/// A resolver as it is: what it says, if it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// What it was told last.
    pub answers: Answers,
}

/// The resolvers that run, or have left files.
pub(crate) fn observe(run: &Path) -> Vec<(NetworkName, Option<Running>)> {
    let Ok(entries) = fs::read_dir(run) else {
        return Vec::new();
    };
    let names = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<NetworkName>().ok());
    names
        .map(|name| {
            let folder = folder(run, &name);
            let read = |file: &str| fs::read_to_string(folder.join(file)).unwrap_or_default();
            let running = pid(&folder).map(|_| Running {
                answers: Answers {
                    config: read("config"),
                    hosts: read("hosts"),
                    reservations: read("reservations"),
                },
            });
            (name, running)
        })
        .collect()
}

/// The process, if it is the one that was started with this folder's configuration: an id can be another's by now.
fn pid(folder: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(folder.join("pid"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let wanted = config_argument(folder);
    command
        .split(|b| *b == 0)
        .any(|word| word == wanted.as_bytes())
        .then_some(())?;
    Pid::from_raw(pid)
}

fn config_argument(folder: &Path) -> String {
    format!("--conf-file={}", folder.join("config").display())
}

fn write_names(folder: &Path, answers: &Answers) -> Result<(), Error> {
    for (file, text) in [
        ("hosts", &answers.hosts),
        ("reservations", &answers.reservations),
    ] {
        let path = folder.join(file);
        replace_file(&path, text.as_bytes(), 0o644).map_err(|e| Error::file("write", path, e))?;
    }
    Ok(())
}

/// Starts it; one that runs is ended before.
pub(crate) fn start(run: &Path, name: &NetworkName, answers: &Answers) -> Result<(), Error> {
    let program = programs::find("dnsmasq").ok_or(Error::NoProgram {
        program: "dnsmasq",
        package: "dnsmasq-base (or say --no-dns: guests then have their addresses from `alveole run` alone)",
    })?;
    stop(run, name)?;
    let folder = folder(run, name);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&folder)
        .map_err(|e| Error::file("make the folder", &folder, e))?;
    write_names(&folder, answers)?;
    let config = folder.join("config");
    replace_file(&config, answers.config.as_bytes(), 0o644)
        .map_err(|e| Error::file("write", &config, e))?;
    let failed = |said: String| Error::Program {
        program: "dnsmasq",
        act: format!("serve names and addresses on network '{name}'"),
        said,
    };
    let mut command = Command::new(program);
    command
        .arg(config_argument(&folder))
        .arg(format!("--user={}", programs::helper_user()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .current_dir("/")
        .process_group(0);
    programs::confine(&mut command, &programs::NETWORK_SERVICE);
    // It says what is wrong before it goes to the background.
    let child = command.spawn().map_err(|e| failed(e.to_string()))?;
    let done = child
        .wait_with_output()
        .map_err(|e| failed(e.to_string()))?;
    if !done.status.success() {
        return Err(failed(
            String::from_utf8_lossy(&done.stderr).trim().to_owned(),
        ));
    }
    Ok(())
}

/// Tells it new names and addresses.
pub(crate) fn reload(run: &Path, name: &NetworkName, answers: &Answers) -> Result<(), Error> {
    let folder = folder(run, name);
    write_names(&folder, answers)?;
    match pid(&folder) {
        Some(pid) => kill_process(pid, Signal::HUP).map_err(|e| Error::Program {
            program: "dnsmasq",
            act: format!("be told of new guests on network '{name}'"),
            said: io::Error::from(e).to_string(),
        }),
        None => start(run, name, answers),
    }
}

/// Ends it and removes its files. When this returns, its ports are free: a process lets go of its memory, and is
/// no longer to be known by its command line, before it closes its sockets.
pub(crate) fn stop(run: &Path, name: &NetworkName) -> Result<(), Error> {
    let folder = folder(run, name);
    if let Some(pid) = pid(&folder) {
        end(&folder, pid).map_err(|said| Error::Program {
            program: "dnsmasq",
            act: format!("end (process {})", pid.as_raw_nonzero()),
            said,
        })?;
    }
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove the folder", &folder, e))
        }
        _ => Ok(()),
    }
}

fn end(folder: &Path, process: Pid) -> Result<(), String> {
    let handle = match pidfd_open(process, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(()),
        opened => opened.map_err(|e| e.to_string())?,
    };
    // Now that its number cannot become another's: is it still the one?
    if pid(folder) != Some(process) {
        return Ok(());
    }
    for signal in [Signal::TERM, Signal::KILL] {
        match pidfd_send_signal(&handle, signal) {
            Err(Errno::SRCH) => return Ok(()),
            sent => sent.map_err(|e| e.to_string())?,
        }
        let began = Instant::now();
        while let Some(left) = PATIENCE.checked_sub(began.elapsed()) {
            let left = Timespec::try_from(left).map_err(|e| e.to_string())?;
            match poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.to_string()),
            }
        }
    }
    Err("it is still there".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Port, take};
    use crate::spec::NetworkRequest;

    fn network(name: &str, mode: &str) -> NetworkState {
        let request = NetworkRequest {
            mode: Some(mode.into()),
            subnet: vec!["10.0.1.0/24".into(), "fd00:1::/64".into()],
            ..NetworkRequest::default()
        };
        NetworkState::new(request.check(&name.parse().unwrap()).unwrap())
    }

    #[test]
    fn dhcp_and_names_say_the_same() {
        let mut a = network("a", "nat");
        let lease = take(&a.spec, &mut a.leases, &"web".parse().unwrap(), None).unwrap();
        lease.port = Some(Port {
            interface: "tap0".parse().unwrap(),
            ours: true,
            process: None,
        });
        take(&a.spec, &mut a.leases, &"idle".parse().unwrap(), None).unwrap();
        let said = answers(&a, std::iter::empty(), Path::new("/run/x")).unwrap();
        let (v4, v6, mac) = (
            a.leases[0].v4.unwrap(),
            a.leases[0].v6.unwrap(),
            a.leases[0].mac,
        );
        assert_eq!(said.reservations, format!("{mac},{v4},[{v6}],web\n"));
        assert_eq!(
            said.hosts,
            format!("{v4} web.a.internal web\n{v6} web.a.internal web\n")
        );
        assert!(said.config.contains("addn-hosts=/run/x/a/hosts\n"));
        assert!(!said.config.contains("no-resolv"));
    }

    #[test]
    fn no_way_out_is_said_to_guests_too() {
        let said = answers(
            &network("a", "isolated"),
            std::iter::empty(),
            Path::new("/run"),
        )
        .unwrap();
        assert!(said.config.contains("no-resolv\n"));
        assert!(said.config.contains("dhcp-option=option:router\n"));
        assert!(said.config.contains("ra-param=a,mtu:1500,600,0\n"));
    }

    #[test]
    fn names_of_other_networks_only_where_they_may_be_reached() {
        let (mut a, b, c) = (
            network("a", "bridge"),
            network("b", "bridge"),
            network("c", "bridge"),
        );
        a.spec.rules = vec!["allow,to=b".parse().unwrap()];
        let said = answers(&a, [&b, &c].into_iter(), Path::new("/run")).unwrap();
        assert!(said.config.contains("server=/b.internal/10.0.1.1\n"));
        assert!(!said.config.contains("c.internal"));
    }
}
