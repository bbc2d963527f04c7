//! A network namespace for each test, and more of them standing in for guests.
//!
//! A test runs again, by itself, in a namespace of network, processes and mounts, so that nothing of it reaches this
//! machine and nothing outlives it. A guest is a namespace at the other end of a veth.

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use alveole_network::{Attach, Attachment, InterfaceName, NetworkName, Networks, Plug};

const INSIDE: &str = "ALVEOLE_TEST_NAMESPACE";
/// What a process of this program is to do instead of testing.
pub(crate) const ROLE: &str = "ALVEOLE_TEST_ROLE";
/// How long a connection that is dropped on its way is waited for.
fn dropped() -> Duration {
    let lab = std::env::var_os("ALVEOLE_LAB").is_some_and(|v| v == "1");
    Duration::from_millis(if lab { 8000 } else { 3000 })
}

/// Says that a test cannot run here.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .expect("the file that ALVEOLE_SKIP_LOG names takes a line");
    }
}

/// Runs a test in namespaces of its own; needs root and the programs that networks are made with.
pub(crate) fn alone(test: &str, body: impl FnOnce(&Path)) {
    if std::env::var_os(INSIDE).is_some() {
        ok("ip", "link set lo up");
        let folder = tempfile::tempdir().unwrap();
        // Helpers run as nobody.
        fs::set_permissions(
            folder.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        body(folder.path());
        return;
    }
    for (program, package) in [
        ("ip", "iproute2"),
        ("nft", "nftables"),
        ("dnsmasq", "dnsmasq-base"),
        ("unshare", "util-linux"),
    ] {
        if !["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
            .iter()
            .any(|f| Path::new(f).join(program).exists())
        {
            return skip(test, &format!("there is no {program}: install {package}"));
        }
    }
    let separate = [
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ];
    if !Command::new("unshare")
        .args(separate)
        .arg("true")
        .status()
        .unwrap()
        .success()
    {
        return skip(test, "only root can make network namespaces");
    }
    let done = Command::new("unshare")
        .args(separate)
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    print!("{said}");
    assert!(
        done.status.success() && said.contains("1 passed"),
        "{test} in its namespace: {said}"
    );
}

/// This program again, as another process with a role.
pub(crate) fn role(words: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["plays_a_role", "--exact", "--nocapture"])
        .env(ROLE, words);
    command
}

pub(crate) fn run(program: &str, words: &str) -> (bool, String) {
    let done = Command::new(program)
        .args(words.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    (done.status.success(), said.into_owned())
}

pub(crate) fn ok(program: &str, words: &str) -> String {
    let (good, said) = run(program, words);
    assert!(good, "{program} {words}: {said}");
    said
}

/// All that networks may change of a host.
pub(crate) fn trace() -> String {
    let mut trace = ok("ip", "-o link");
    trace += &ok("ip", "-o addr");
    trace += &ok("ip", "route");
    trace += &ok("ip", "-6 route");
    trace += &ok("nft", "list ruleset");
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        trace += &fs::read_to_string(Path::new("/proc/sys").join(key)).unwrap();
    }
    let processes = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| fs::read_to_string(e.ok()?.path().join("cmdline")).ok());
    trace += &processes
        .filter(|c| c.contains("dnsmasq") || c.contains("passt"))
        .collect::<String>();
    // What the kernel tells of its own accord: times, and addresses that are not settled yet.
    trace
        .lines()
        .map(|l| {
            l.split(" valid_lft")
                .next()
                .unwrap_or(l)
                .replace(" tentative", "")
                + "\n"
        })
        .collect()
}

/// Asserts that a host is as it was; interfaces take a moment to be really gone.
pub(crate) fn same_as(before: &str) {
    let began = Instant::now();
    while trace() != before && began.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(50));
    }
    let after = trace();
    let lines = |text: &str, than: &str| -> Vec<String> {
        text.lines()
            .filter(|l| !than.lines().any(|o| o == *l))
            .map(str::to_owned)
            .collect()
    };
    assert!(
        after == before,
        "too much: {:#?}, too little: {:#?}",
        lines(&after, before),
        lines(before, &after)
    );
}

/// A namespace that stands in for a machine: a guest, or somebody in the world.
pub(crate) struct Machine {
    init: Child,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let init = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .spawn()
            .unwrap();
        let machine = Self { init };
        let other = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        while other(machine.init.id()) == other(std::process::id()) {
            thread::sleep(Duration::from_millis(2));
        }
        machine.ok("ip link set lo up");
        machine
    }

    pub(crate) fn pid(&self) -> u32 {
        self.init.id()
    }

    fn inside(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid().to_string(), "-n"]);
        command
    }

    pub(crate) fn run(&self, words: &str) -> (bool, String) {
        let done = self
            .inside()
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
        (done.status.success(), said.into_owned())
    }

    pub(crate) fn ok(&self, words: &str) -> String {
        let (good, said) = self.run(words);
        assert!(good, "{words}: {said}");
        said
    }

    fn as_role(&self, words: &str) -> Command {
        let mut command = self.inside();
        command
            .arg(std::env::current_exe().unwrap())
            .args(["plays_a_role", "--exact", "--nocapture"])
            .env(ROLE, words);
        command
    }

    /// Answers on these TCP ports with the address that asks, until it is dropped.
    pub(crate) fn serve(&self, ports: &[u16]) -> Serving {
        let words: Vec<String> = ports.iter().map(u16::to_string).collect();
        let child = self
            .as_role(&format!("serve {}", words.join(" ")))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        let listening = |port: &u16| self.run("ss -Hltn").1.contains(&format!("*:{port} "));
        while !ports.iter().all(listening) {
            assert!(began.elapsed() < Duration::from_secs(20), "nobody listens");
            thread::sleep(Duration::from_millis(10));
        }
        Serving(child)
    }

    /// As whom each of these sees us; none where nothing comes back.
    pub(crate) fn connect(&self, to: &[SocketAddr]) -> Vec<Option<IpAddr>> {
        let words: Vec<String> = to.iter().map(ToString::to_string).collect();
        let done = self
            .as_role(&format!("connect {}", words.join(" ")))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let seen: Vec<_> = said
            .lines()
            .filter_map(|l| l.strip_prefix("seen "))
            .map(|l| l.parse().ok())
            .collect();
        assert_eq!(seen.len(), to.len(), "{said}");
        seen
    }

    /// What a resolver answers, in hexadecimal; empty if it knows nothing.
    pub(crate) fn resolve(&self, server: IpAddr, name: &str, kind: u8) -> String {
        let done = self
            .as_role(&format!("resolve {server} {name} {kind}"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let answer = said
            .lines()
            .find_map(|l| l.strip_prefix("answer "))
            .unwrap_or_else(|| panic!("{said}"));
        answer.chars().filter(char::is_ascii_hexdigit).collect()
    }

    pub(crate) fn pings(&self, to: impl Into<IpAddr>) -> bool {
        self.run(&format!("ping -n -c 1 -W 1 {}", to.into())).0
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

pub(crate) struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest on networks, set up as its command line would tell a real one.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) on: Vec<Attachment>,
}

impl Guest {
    pub(crate) fn start(networks: &Networks, name: &str, on: &[&str]) -> Self {
        Self::with(networks, name, on, |_| ())
    }

    pub(crate) fn with(
        networks: &Networks,
        name: &str,
        on: &[&str],
        change: impl Fn(&mut Attach<'_>),
    ) -> Self {
        let machine = Machine::new();
        let mut guest = Self {
            machine,
            on: Vec::new(),
        };
        for (n, network) in on.iter().enumerate() {
            let port: InterfaceName = format!("p-{name}{n}").parse().unwrap();
            ok(
                "ip",
                &format!(
                    "link add {port} type veth peer name eth{n} netns {}",
                    guest.machine.pid()
                ),
            );
            let mut attach = Attach {
                plug: Plug::Interface(&port),
                mac: None,
                process: Some(guest.machine.pid()),
                rules: Vec::new(),
                egress: None,
            };
            change(&mut attach);
            let network: NetworkName = network.parse().unwrap();
            let attachment = networks
                .attach(&network, &name.parse().unwrap(), &attach)
                .unwrap();
            guest.set_up(n, &attachment);
            guest.on.push(attachment);
        }
        guest
    }

    fn set_up(&self, n: usize, to: &Attachment) {
        let device = format!("eth{n}");
        // It is told, and need not be advertised to.
        self.machine
            .ok(&format!("sysctl -qw net.ipv6.conf.{device}.accept_ra=0"));
        self.machine.ok(&format!(
            "ip link set {device} address {} mtu {} up",
            to.mac, to.mtu
        ));
        for address in &to.addresses {
            let nodad = if address.addr().is_ipv6() {
                "nodad"
            } else {
                ""
            };
            self.machine
                .ok(&format!("ip addr add {address} dev {device} {nodad}"));
        }
        if n == 0 {
            for gateway in &to.gateways {
                self.machine
                    .ok(&format!("ip route add default via {gateway} dev {device}"));
            }
        }
    }

    pub(crate) fn v4(&self) -> IpAddr {
        self.on[0]
            .addresses
            .iter()
            .map(ipnet::IpNet::addr)
            .find(IpAddr::is_ipv4)
            .unwrap()
    }

    pub(crate) fn v6(&self) -> IpAddr {
        self.on[0]
            .addresses
            .iter()
            .map(ipnet::IpNet::addr)
            .find(IpAddr::is_ipv6)
            .unwrap()
    }

    /// Ends it as `alveole` does, and takes its veths away.
    pub(crate) fn stop(self, networks: &Networks) {
        for on in &self.on {
            networks.detach(&on.network, &on.hostname).unwrap();
            ok("ip", &format!("link del {}", on.interface));
        }
    }
}

/// What another process of this program does.
pub(crate) fn play(words: &str) {
    let mut words = words.split_whitespace();
    match words.next() {
        Some("serve") => {
            let servers: Vec<_> = words.map(|port| serve(port.parse().unwrap())).collect();
            for server in servers {
                server.join().unwrap();
            }
        }
        Some("resolve") => {
            let mut next = || words.next().unwrap();
            let (server, name, kind) = (next().parse().unwrap(), next(), next().parse().unwrap());
            let answer = resolve(server, name, kind).unwrap_or_default();
            println!("\nanswer {answer:02x?}");
        }
        Some("connect") => {
            // All at once: those that are dropped take their time.
            let tries: Vec<_> = words
                .map(|to| to.parse().unwrap())
                .map(|to| thread::spawn(move || ask(&to)))
                .collect();
            for answer in tries {
                println!(
                    "\nseen {}",
                    answer.join().unwrap().unwrap_or_else(|| "-".into())
                );
            }
        }
        other => panic!("no role {other:?}"),
    }
}

fn serve(port: u16) -> thread::JoinHandle<()> {
    let listener = TcpListener::bind(("::", port)).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            let _ = write!(stream, "{peer}");
        }
    })
}

fn ask(to: &SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(to, dropped()).ok()?;
    let mut text = String::new();
    stream.set_read_timeout(Some(dropped())).unwrap();
    std::io::Read::read_to_string(&mut stream, &mut text).ok()?;
    Some(text)
}

/// The addresses of a name, asked for by one packet as a guest does (RFC 1035, section 4): `A` is type 1, `AAAA` 28.
pub(crate) fn question(name: &str, kind: u8) -> Vec<u8> {
    let mut packet = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        packet.push(u8::try_from(label.len()).unwrap());
        packet.extend(label.bytes());
    }
    packet.extend([0, 0, kind, 0, 1]);
    packet
}

/// Asks a resolver from this namespace; the last bytes of its answer, if it has one.
pub(crate) fn resolve(server: IpAddr, name: &str, kind: u8) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind(if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    })
    .unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    socket.send_to(&question(name, kind), (server, 53)).unwrap();
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).ok()?;
    let count = u16::from_be_bytes([answer[6], answer[7]]);
    (count > 0).then(|| answer[..length].to_vec())
}
