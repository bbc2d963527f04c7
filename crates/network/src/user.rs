//! User mode: a guest's network without any right, by one `passt` for each VM (passt(1)).
//!
//! `passt` has no TCP stack of its own: it translates between frames and this host's sockets, so that the guest's
//! connections are its user's. It shuts itself into namespaces of its own and a seccomp filter, and speaks the
//! protocol of QEMU's `-netdev stream` (each frame after its length, four bytes, most significant first) on a unix socket.
//! A frame and its length are to be sent by one call: versions of 2023 lose their place in the stream when they read the
//! length alone. We
//! hand it one end of a pair, so that there is no name for anybody else to connect to; it ends with the other
//! end, which is the VMM's, and is killed with the thread that started it: versions of 2023 can be led into a loop in which they
//! see no end (a guest that ends its half of a connection from outside while more is coming). It hands out by DHCP, DHCPv6 and router advertisements what
//! [`UserNetwork::guest`] says.
//!
//! Names are asked of this host's own resolvers, whose addresses the guest is told. Where this host's is on its
//! loopback (systemd-resolved), the guest is told an address that `passt` takes there, by UDP alone; `passt` of
//! 2023 does not hand that one out by DHCP.
//!
//! `passt` filters nothing: a guest in user mode may talk to whatever its user may, unless its monitor is told rules.

use std::fmt;
use std::fs;
use std::io::{self, PipeReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rustix::fs::{OFlags, fcntl_setfl};

use crate::Error;
use crate::guest_config::DeviceConfig;
use crate::programs;
use crate::words::{Mac, VmName};

/// Most ports that one VM publishes: each is a socket that `passt` watches.
pub const MOST_PUBLISHED: usize = 256;
/// The guest's addresses, the same for each VM as nobody else sees them.
const GUEST4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Where the guest asks for names that `passt` takes to a resolver on this host's loopback.
const DNS4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const LENGTH4: u8 = 24;
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 2, 0, 0, 0, 15);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Most resolvers that are used (MAXNS of resolv.conf(5)).
const MOST_RESOLVERS: usize = 3;
const LENGTH6: u8 = 64;
/// The user `nobody` and its group, as `passt` has them.
const NOBODY: u32 = 65_534;
/// Ports below it are bound by root alone, if nobody has changed that.
const FIRST_FREE_PORT: u16 = 1024;
/// How long `passt` may take to be ready.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked at meanwhile: all of it takes some 15 ms.
const POLL: Duration = Duration::from_millis(1);
/// Most that is shown of what it said, in bytes.
const MOST_SAID: usize = 4096;

/// What a published port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of this host that leads to one of the guest: `127.0.0.1:8080:80`, `[::1]:8080:80/tcp`, `5353:53/udp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// Where this host listens. Without an address: on 127.0.0.1, as what listens everywhere is to be said.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
    /// What it speaks.
    pub transport: Transport,
}

impl FromStr for Published {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        const WHAT: &str = "published port";
        let wrong = |why: &str| Error::word(WHAT, text, why);
        const FORM: &str = "write [ADDRESS:]PORT:GUESTPORT[/tcp|/udp], for instance 127.0.0.1:8080:80 or [::1]:8080:80";
        let (ports, transport) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            Some((ports, "tcp")) => (ports, Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some(_) => return Err(wrong("it is /tcp or /udp")),
        };
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            digits
                .parse::<u16>()
                .ok()
                .filter(|n| plain && *n != 0)
                .ok_or_else(|| wrong("ports are 1 to 65535"))
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(|| wrong(FORM))?;
        let (address, port) = rest
            .rsplit_once(':')
            .map_or((None, rest), |(a, p)| (Some(a), p));
        let address = match address {
            None => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(a) => match a.strip_prefix('[').and_then(|a| a.strip_suffix(']')) {
                Some(v6) => IpAddr::V6(v6.parse().map_err(|_| wrong(FORM))?),
                None => IpAddr::V4(a.parse().map_err(|_| wrong(FORM))?),
            },
        };
        Ok(Self {
            host: SocketAddr::new(address, number(port)?),
            guest_port: number(guest)?,
            transport,
        })
    }
}

impl Published {
    /// Ports of 127.0.0.1 that are free by now and lead to these of the guest. The host's kernel chooses them, no port twice.
    ///
    /// # Errors
    ///
    /// [`Error::Word`] if they are too many, [`Error::PortTaken`] if the host has no port left.
    pub fn on_free_ports(guest: &[(u16, Transport)]) -> Result<Vec<Self>, Error> {
        if guest.len() > MOST_PUBLISHED {
            return Err(too_many(guest.len()));
        }
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        // Held until all are chosen.
        let (mut tcp, mut udp) = (Vec::new(), Vec::new());
        let mut all = Vec::new();
        for (guest_port, transport) in guest {
            let bound = match transport {
                Transport::Tcp => TcpListener::bind(any).and_then(|socket| {
                    let host = socket.local_addr();
                    tcp.push(socket);
                    host
                }),
                Transport::Udp => UdpSocket::bind(any).and_then(|socket| {
                    let host = socket.local_addr();
                    udp.push(socket);
                    host
                }),
            };
            let host = bound.map_err(|source| Error::PortTaken {
                address: any,
                protocol: transport.to_string(),
                source,
            })?;
            all.push(Self {
                host,
                guest_port: *guest_port,
                transport: *transport,
            });
        }
        Ok(all)
    }

    /// Whether nobody listens on this host's port by now.
    #[must_use]
    pub fn is_free(&self) -> bool {
        check_free(self).is_ok()
    }
}

fn too_many(count: usize) -> Error {
    Error::word(
        "number of published ports",
        &count.to_string(),
        format!("{MOST_PUBLISHED} are the most"),
    )
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.guest_port, self.transport)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A VM's network in user mode, as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRequest {
    /// Its ports on this host.
    pub published: Vec<Published>,
    /// Its MTU, in bytes.
    pub mtu: u32,
    /// Its hardware address; else one is made of the name.
    pub mac: Option<Mac>,
}

/// Largest MTU in user mode.
pub const LARGEST_MTU: u32 = 65_520;
/// Usual MTU in user mode. With more `passt` of 2023 waits for two seconds whenever the guest's window is smaller than a
/// segment: into a guest went 3 Gbit/s with 9000 bytes and 0.1 with 65520 (out of it 6.5 and 10), and with
/// 16384 every other transfer of a megabyte stood still once.
pub const USUAL_MTU: u32 = 9000;

/// A running `passt`. Dropping this ends it, too; so does the end of whoever holds the other end of the socket.
#[derive(Debug)]
pub struct UserNetwork {
    /// None once it goes on alone.
    child: Option<Child>,
    socket: Option<OwnedFd>,
    guest: DeviceConfig,
    /// What it says.
    log: PipeReader,
    vm: VmName,
}

impl UserNetwork {
    /// Starts `passt` for one VM; it ends at the latest with the calling thread. Whatever it cannot do, [`UserNetwork::wait_until_ready`] says.
    ///
    /// # Errors
    ///
    /// [`Error::PortTaken`] naming the port; [`Error::NoProgram`] naming the package; [`Error::Program`] if it cannot
    /// be started; [`Error::Word`] for an MTU or too many ports.
    pub fn start(vm: &VmName, request: &UserRequest) -> Result<Self, Error> {
        if !(1280..=LARGEST_MTU).contains(&request.mtu) {
            let why = format!("in user mode it is 1280 to {LARGEST_MTU}");
            return Err(Error::word("MTU", &request.mtu.to_string(), why));
        }
        if request.published.len() > MOST_PUBLISHED {
            return Err(too_many(request.published.len()));
        }
        for (at, port) in request.published.iter().enumerate() {
            let same = |p: &&Published| p.host == port.host && p.transport == port.transport;
            if request.published[..at].iter().any(|p| same(&p)) {
                return Err(Error::word(
                    "published port",
                    &port.to_string(),
                    "it is published twice",
                ));
            }
            check_free(port)?;
        }
        let has6 = has_global_ipv6();
        if let Some(port) = request.published.iter().find(|p| p.host.is_ipv6() && !has6) {
            let why = "this host has no IPv6 route to the world, and so guests in user mode have no IPv6: publish it on an IPv4 address";
            return Err(Error::word("published port", &port.to_string(), why));
        }
        let program = programs::find("passt").ok_or(Error::NoProgram {
            program: "passt",
            package: "passt",
        })?;
        let failed = |e: io::Error| Error::Program {
            program: "passt",
            act: format!("be started for VM '{vm}'"),
            said: e.to_string(),
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let resolvers = Resolvers::of_this_host(has6);
        // What it says is kept by a pipe, whose reading end it has itself: a guest that makes it say more than fits
        // neither fills the host nor stops it.
        let (log, said) = io::pipe().map_err(failed)?;
        for end in [log.as_fd(), said.as_fd()] {
            fcntl_setfl(end, OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        }
        let mut command = Command::new(program);
        command
            .args(arguments(request, has6, &resolvers))
            .arg("--fd")
            .arg(theirs.as_raw_fd().to_string())
            .stdin(log.try_clone().map_err(failed)?)
            .stdout(Stdio::null())
            .stderr(said)
            // What a terminal sends is for the VMM.
            .process_group(0)
            .current_dir("/");
        programs::inherit(&mut command, theirs.as_raw_fd());
        programs::end_with_parent(&mut command);
        // It would give up root's rights by itself, but with them the end with its parent.
        let low = request
            .published
            .iter()
            .any(|p| p.host.port() < FIRST_FREE_PORT);
        if rustix::process::geteuid().is_root() && programs::helper_user() == "nobody" && !low {
            command.gid(NOBODY).uid(NOBODY);
        }
        let child = command.spawn().map_err(failed)?;
        drop(theirs);
        let mac = request
            .mac
            .unwrap_or_else(|| Mac::of("user", vm.as_str(), 0));
        Ok(Self {
            child: Some(child),
            socket: Some(ours.into()),
            guest: guest(mac, request.mtu, has6, &resolvers),
            log,
            vm: vm.clone(),
        })
    }

    /// What the guest is to set up; `passt` hands out the same by DHCP.
    #[must_use]
    pub fn guest(&self) -> &DeviceConfig {
        &self.guest
    }

    /// The VMM's end of the socket. `passt` ends when it is closed.
    pub fn take_socket(&mut self) -> Option<OwnedFd> {
        self.socket.take()
    }

    /// The process, for who watches it.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Lets it go on without this process, ending with the socket alone: for who becomes the VMM.
    pub fn release(mut self) -> Option<OwnedFd> {
        self.child = None;
        self.socket.take()
    }

    /// Waits until it listens on published ports and has shut itself in.
    ///
    /// # Errors
    ///
    /// [`Error::Program`] with what it said, if it ends instead or takes too long.
    pub fn wait_until_ready(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        while let Some(child) = &mut self.child {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(self.failed("serve", format!("it ended ({status}): ")));
            }
            let status =
                fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
            // Its filter is the last thing that it sets up.
            if status
                .lines()
                .any(|l| l.starts_with("Seccomp:") && l.ends_with('2'))
            {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                let why = format!("it took longer than {} s: ", PATIENCE.as_secs());
                return Err(self.failed("get ready for", why));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    fn failed(&mut self, act: &str, why: String) -> Error {
        Error::Program {
            program: "passt",
            act: format!("{act} VM '{}'", self.vm),
            said: why + &said(&mut self.log),
        }
    }
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn said(log: &mut PipeReader) -> String {
    let mut bytes = vec![0; MOST_SAID];
    // Nothing is not an end here, but an error.
    let length = log.read(&mut bytes).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
    // It complains about root, whose rights it drops, and where no system log is.
    let noise = |l: &&str| {
        l.is_empty() || l.starts_with("Don't run as root") || l.ends_with("bytes to syslog")
    };
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !noise(l)).collect();
    let nowhere = lines
        .iter()
        .any(|l| l.contains("No external routable interface"));
    let hint = if nowhere {
        " (this host has no default route, and so nowhere to take a guest's packets)"
    } else {
        ""
    };
    lines.join("; ") + hint
}

/// Who answers a guest's questions for names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Resolvers {
    /// Those that the guest asks itself.
    direct: Vec<IpAddr>,
    /// Whether this host's is on its loopback, where only `passt` can ask it.
    on_loopback: bool,
}

impl Resolvers {
    fn of_this_host(has6: bool) -> Self {
        Self::read(
            &fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            has6,
        )
    }

    fn read(text: &str, has6: bool) -> Self {
        let all: Vec<IpAddr> = text
            .lines()
            .filter_map(|l| {
                let mut words = l.split_whitespace();
                words.next().filter(|w| *w == "nameserver")?;
                words.next()?.parse().ok()
            })
            .collect();
        let of_this_host = |a: &IpAddr| a.is_loopback() || a.is_unspecified();
        let direct: Vec<IpAddr> = all
            .iter()
            .filter(|a| !of_this_host(a) && (a.is_ipv4() || has6))
            .take(MOST_RESOLVERS)
            .copied()
            .collect();
        Self {
            on_loopback: direct.is_empty() && all.iter().any(|a| a.is_ipv4() && of_this_host(a)),
            direct,
        }
    }

    fn for_guest(&self) -> Vec<IpAddr> {
        if self.on_loopback {
            vec![DNS4.into()]
        } else {
            self.direct.clone()
        }
    }
}

/// Asks for the port and gives it back: `passt` would only say that it could not have some port.
fn check_free(port: &Published) -> Result<(), Error> {
    let bound = match port.transport {
        Transport::Tcp => TcpListener::bind(port.host).map(drop),
        Transport::Udp => UdpSocket::bind(port.host).map(drop),
    };
    bound.map_err(|source| Error::PortTaken {
        address: port.host,
        protocol: port.transport.to_string(),
        source,
    })
}

/// Whether this host has an IPv6 address that leads out; without one `passt` has nothing to speak IPv6 with.
fn has_global_ipv6() -> bool {
    // One line each: address, index, length, scope (0 is global), flags, name.
    let text = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    let address = text
        .lines()
        .any(|l| l.split_whitespace().nth(3) == Some("00"));
    let routes = fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
    // A default route that is not the one to nowhere (over lo).
    let default = routes.lines().any(|l| {
        l.starts_with(&"0".repeat(32)) && l[32..].starts_with(" 00 ") && !l.ends_with(" lo")
    });
    address && default
}

fn guest(mac: Mac, mtu: u32, has6: bool, resolvers: &Resolvers) -> DeviceConfig {
    let mut guest = DeviceConfig {
        mac,
        addresses: vec![IpNet::V4(Ipv4Net::new_assert(GUEST4, LENGTH4))],
        gateways: vec![GATEWAY4.into()],
        dns: resolvers.for_guest(),
        search: None,
        mtu: Some(mtu),
    };
    if has6 {
        guest
            .addresses
            .push(IpNet::V6(Ipv6Net::new_assert(GUEST6, LENGTH6)));
        guest.gateways.push(GATEWAY6.into());
    }
    guest
}

fn arguments(request: &UserRequest, has6: bool, resolvers: &Resolvers) -> Vec<String> {
    let mut words: Vec<String> = ["--foreground", "--quiet", "--stderr", "--one-off"]
        .map(String::from)
        .to_vec();
    let mut say = |option: &str, value: String| words.extend([option.to_owned(), value]);
    say("--mtu", request.mtu.to_string());
    say("--address", GUEST4.to_string());
    say("--netmask", LENGTH4.to_string());
    say("--gateway", GATEWAY4.to_string());
    if has6 {
        say("--address", GUEST6.to_string());
        say("--gateway", GATEWAY6.to_string());
    }
    for resolver in &resolvers.direct {
        say("--dns", resolver.to_string());
    }
    if resolvers.on_loopback {
        say("--dns-forward", DNS4.to_string());
    }
    // By DHCP the guest is to learn what it is told, which has no search list.
    say("--search", "none".into());
    for port in &request.published {
        let option = match port.transport {
            Transport::Tcp => "--tcp-ports",
            Transport::Udp => "--udp-ports",
        };
        say(
            option,
            format!(
                "{}/{}:{}",
                port.host.ip(),
                port.host.port(),
                port.guest_port
            ),
        );
    }
    if !has6 {
        words.push("--ipv4-only".into());
    }
    // The gateway's address would be this host's loopback: what listens there did not ask for guests.
    words.push("--no-map-gw".into());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        for (text, host, guest_port, transport) in [
            ("127.0.0.1:8080:80", "127.0.0.1:8080", 80, Transport::Tcp),
            ("8080:80", "127.0.0.1:8080", 80, Transport::Tcp),
            ("0.0.0.0:5353:53/udp", "0.0.0.0:5353", 53, Transport::Udp),
            ("[::1]:8080:80/tcp", "[::1]:8080", 80, Transport::Tcp),
        ] {
            let host = host.parse().unwrap();
            assert_eq!(
                text.parse::<Published>().unwrap(),
                Published {
                    host,
                    guest_port,
                    transport
                }
            );
        }
        for (text, word) in [
            ("", "[ADDRESS:]PORT"),
            ("80", "[ADDRESS:]PORT"),
            ("0:80", "1 to 65535"),
            ("80:65536", "1 to 65535"),
            ("80:+1", "1 to 65535"),
            ("80:80/sctp", "/tcp or /udp"),
            ("localhost:80:80", "[ADDRESS:]PORT"),
            ("::1:80:80", "[ADDRESS:]PORT"),
            ("1.2.3:80:80", "[ADDRESS:]PORT"),
        ] {
            let said = text.parse::<Published>().unwrap_err().to_string();
            assert!(said.contains(word), "{text}: {said}");
        }
    }

    #[test]
    fn a_taken_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = taken.local_addr().unwrap();
        let port = Published {
            host,
            guest_port: 80,
            transport: Transport::Tcp,
        };
        let request = UserRequest {
            published: vec![port.clone()],
            mtu: USUAL_MTU,
            mac: None,
        };
        let vm = "vm".parse().unwrap();
        let said = UserNetwork::start(&vm, &request).unwrap_err().to_string();
        assert!(said.contains(&host.to_string()), "{said}");
        drop(taken);
        let twice = UserRequest {
            published: vec![port.clone(), port],
            ..request
        };
        let said = UserNetwork::start(&vm, &twice).unwrap_err().to_string();
        assert!(said.contains("twice"), "{said}");
    }

    #[test]
    fn resolvers_are_asked_by_whoever_reaches_them() {
        let read = |text: &str| Resolvers::read(text, false);
        let far =
            read("# dns\nnameserver 192.0.2.53\nnameserver 127.0.0.53\nnameserver fd00::53\n");
        let addresses: [IpAddr; 1] = ["192.0.2.53".parse().unwrap()];
        assert_eq!(
            (far.for_guest(), far.on_loopback),
            (addresses.to_vec(), false)
        );
        let both = Resolvers::read("nameserver fd00::53\nnameserver 192.0.2.53", true);
        assert_eq!(both.for_guest().len(), 2);
        for near in ["nameserver 127.0.0.53\noptions edns0", "nameserver 0.0.0.0"] {
            assert_eq!(read(near).for_guest(), [IpAddr::V4(DNS4)], "{near}");
        }
        assert_eq!(read("").for_guest(), [] as [IpAddr; 0]);
        assert_eq!(
            read(&"nameserver 192.0.2.1\n".repeat(9)).direct.len(),
            MOST_RESOLVERS
        );
    }
}
