//! `alveole run --net`: guests in user mode and on networks of this host reach whom they may, by name, and nobody else;
//! what was made for them goes with them.
//!
//! Each test has a network namespace of its own, so that nothing that it makes is left behind.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::images::Home;
use crate::harness::images::{output, path};
use crate::harness::{Running, Vm, is_root, patience, skip};

/// This host's address that others know.
const HOST: &str = "192.0.2.2";
/// Somebody out in the world.
const WORLD: &str = "192.0.2.1";
const NOBODY: u32 = 65534;

fn ip(words: &str) -> String {
    let words: Vec<_> = words.split_whitespace().collect();
    output("ip", &words)
}

/// Enters a network namespace with a way out, `eth0`, to a world with servers. None, and said so, where
/// that is not allowed or a program is missing.
#[track_caller]
pub(super) fn host(programs: &[(&str, &str)]) -> Option<Machine> {
    if !is_root() {
        skip("network namespaces are made by root");
        return None;
    }
    for (program, package) in programs {
        let there = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|f| Path::new(f).join(program));
        if !there.iter().any(|file| file.exists()) {
            skip(&format!("there is no {program}: install {package}"));
            return None;
        }
    }
    // With mounts of its own: tests change who is asked for names.
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    output("mount", &["--make-rprivate", "/"]);
    ip("link set dev lo up");
    let world = Machine::new();
    ip(&format!(
        "link add eth0 type veth peer name eth0 netns {}",
        world.0.id()
    ));
    ip(&format!("addr add {HOST}/24 dev eth0"));
    ip("addr add 2001:db8::2/64 dev eth0 nodad");
    ip("link set eth0 up");
    world.does(&format!("ip link set lo up; ip addr add {WORLD}/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad; ip link set eth0 up"));
    ip(&format!("route add default via {WORLD}"));
    ip("route add default via 2001:db8::1");
    Some(world)
}

/// A network namespace that stands in for another machine.
pub(super) struct Machine(Child);

impl Machine {
    fn new() -> Self {
        let child = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo here; exec sleep infinity"])
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.unwrap();
        let mut said = [0; 5];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut said)
            .unwrap();
        Self(child)
    }

    fn run(&self, script: &str) -> bool {
        let pid = self.0.id().to_string();
        let done = Command::new("nsenter")
            .args(["--net", "-t", &pid, "sh", "-c", script])
            .output();
        done.unwrap().status.success()
    }

    #[track_caller]
    fn does(&self, script: &str) {
        assert!(self.run(script), "{script}");
    }

    /// Whether it can talk to a server of ours.
    fn reaches(&self, address: &str, port: u16) -> bool {
        self.run(&format!(
            "timeout {} busybox wget -q -O /dev/null http://{address}:{port}/",
            patience(3).as_secs()
        ))
    }

    /// Serves a page on each port until the test ends.
    fn serves(&self, dir: &Path, ports: &[u16]) {
        let www = dir.join("www");
        fs::create_dir_all(&www).unwrap();
        fs::write(www.join("index.html"), "page-of-the-world\n").unwrap();
        for port in ports {
            self.does(&format!("busybox httpd -p {port} -h {}", www.display()));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its servers are daemons: they end with the namespace's last interface being of no use to anybody, but as
        // processes they would stay.
        let pids = format!(
            "for p in /proc/[0-9]*; do [ \"$(readlink $p/ns/net)\" != \"$(readlink /proc/{}/ns/net)\" ] || echo ${{p#/proc/}}; done",
            self.0.id()
        );
        let pids = Command::new("sh").args(["-c", &pids]).output().unwrap();
        for pid in String::from_utf8_lossy(&pids.stdout).split_whitespace() {
            let _ = Command::new("kill").args(["-9", pid]).output();
        }
        let _ = self.0.wait();
    }
}

/// `alveole net ...` on networks kept in `state`; what it said.
#[track_caller]
pub(super) fn net(state: &Path, words: &str) -> String {
    let (good, said) = try_net(state, words);
    assert!(good, "alveole net {words}: {said}");
    said
}

fn try_net(state: &Path, words: &str) -> (bool, String) {
    let alveole = PathBuf::from(env!("CARGO_BIN_EXE_alveole-vmm")).with_file_name("alveole");
    let mut command = Command::new(alveole);
    command
        .arg("net")
        .args(words.split_whitespace())
        .arg("--state-dir")
        .arg(state);
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    (done.status.success(), said.into_owned())
}

/// Networks that are gone with the test, whatever becomes of it: their resolvers are processes.
pub(super) struct State(TempDir);

impl State {
    pub(super) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        // Resolvers run as nobody.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// A guest on networks, booted.
    #[track_caller]
    fn guest(&self, name: &str, words: &str) -> Option<Running> {
        let state = self.path().to_str().unwrap();
        let mut all = vec!["--name", name, "--state-dir", state];
        all.extend(words.split_whitespace());
        // Linux uses no more queues than it has processors.
        let cpus = if words.contains("queues=") { 2 } else { 1 };
        let mut guest = Vm::any()?
            .memory_mib(128)
            .cpus(cpus)
            .by_alveole(&all)
            .takes_commands()
            .boot();
        guest.wait_for_commands();
        Some(guest)
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let listed = try_net(self.path(), "ls --format json").1;
        let Ok(serde_json::Value::Array(networks)) = serde_json::from_str(&listed) else {
            return;
        };
        for name in networks.iter().filter_map(|n| n["name"].as_str()) {
            try_net(self.path(), &format!("rm --force {name}"));
        }
    }
}

/// All that networks may change of a host.
fn trace() -> String {
    let mut trace = ip("-o link") + &ip("-o addr") + &ip("route") + &ip("-6 route");
    trace += &output("nft", &["list", "ruleset"]);
    for key in [
        "net.ipv4.ip_forward",
        "net.ipv6.conf.all.forwarding",
        "net.ipv6.conf.eth0.accept_ra",
    ] {
        trace += &output("sysctl", &[key]);
    }
    // What the kernel tells of its own accord: times, and addresses that are not settled yet.
    let lines = trace.lines().filter(|l| !l.contains("fe80::"));
    lines
        .map(|l| {
            l.split(" valid_lft")
                .next()
                .unwrap_or(l)
                .replace(" tentative", "")
                + "\n"
        })
        .collect()
}

#[track_caller]
fn same_as(before: &str) {
    let until = Instant::now() + patience(5);
    while trace() != before && Instant::now() < until {
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(trace(), before);
}

/// Has a guest serve a page with its name on each port.
fn serve(guest: &mut Running, name: &str, ports: &[u16]) {
    let page = format!("mkdir -p /www; echo page-of-{name} >/www/index.html");
    assert_eq!(guest.ask(&page).0, 0);
    for port in ports {
        let (status, said) = guest.ask(&format!("httpd -p {port} -h /www"));
        assert_eq!(status, 0, "{said}");
    }
}

/// Asserts whom a guest reaches: servers by name or address, and whose page is there; none: nobody may answer.
#[track_caller]
fn reaches(guest: &mut Running, whom: &[(&str, Option<&str>)]) {
    let wait = patience(3).as_secs();
    for (server, page) in whom {
        let url = match server.split_once(".internal") {
            Some((name, port)) => format!("{}{port}", address(guest, &format!("{name}.internal"))),
            None => (*server).to_owned(),
        };
        let (status, said) = guest.ask(&format!("timeout {wait} wget -q -O - http://{url}/"));
        match page {
            Some(page) => assert!(
                status == 0 && said.ends_with(&format!("page-of-{page}")),
                "{server}: {status}, {said}"
            ),
            None => assert!(
                status != 0 && !said.contains("page-of"),
                "{server}: {status}, {said}"
            ),
        }
    }
}

/// The IPv4 address that a guest's C library finds for a name. The wget of a static busybox cannot take a name that has addresses
/// of both families, and its nslookup asks no second resolver if the first one refuses.
#[track_caller]
fn address(guest: &mut Running, name: &str) -> String {
    let ask = format!("ping -4 -c 1 -W 1 {name} | sed -n 's/^PING [^(]*(\\([^)]*\\)).*/\\1/p'");
    let (_, said) = guest.ask(&ask);
    assert!(
        said.parse::<std::net::Ipv4Addr>().is_ok(),
        "{name}: {said:?}"
    );
    said
}

/// Processes `passt` of the user in this test's network namespace: other tests have their own.
fn passts(user: u32) -> Vec<String> {
    let done = Command::new("ps")
        .args(["-o", "pid=,stat=,comm=", "-u", &user.to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).ok();
    let here = namespace("thread-self");
    let is_here = |line: &str| line.split_whitespace().next().and_then(namespace) == here;
    // One whose parent has not asked for its end is no process any more.
    let lines = said
        .lines()
        .filter(|l| l.contains("passt") && !l.contains(" Z") && is_here(l));
    lines.map(str::to_owned).collect()
}

/// A process that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A resolver of this host at `address`, which knows `web.test`.
fn resolver(address: &str, file: &Path) -> Server {
    fs::write(file, format!("nameserver {address}\n")).unwrap();
    output(
        "mount",
        &["--bind", file.to_str().unwrap(), "/etc/resolv.conf"],
    );
    let listen = format!("--listen-address={address}");
    let web = format!("--address=/web.test/{HOST}");
    let server = Command::new("dnsmasq")
        .args([
            "-k",
            "-C",
            "/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--bind-interfaces",
            "--pid-file=",
        ])
        .args([listen, web])
        .spawn();
    Server(server.unwrap())
}

/// Without any right: out by name, in by a published port, over IPv4; long transfers arrive whole.
fn user_mode(nameserver: &str) {
    let Some(world) = host(&[
        ("passt", "passt"),
        ("dnsmasq", "dnsmasq-base"),
        ("busybox", "busybox-static"),
    ]) else {
        return;
    };
    let kvm = fs::metadata("/dev/kvm")
        .map(|m| m.permissions().mode())
        .unwrap_or(0);
    if kvm & 0o006 != 0o006 {
        return skip("only root may open /dev/kvm here");
    }
    let before = passts(NOBODY);
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    world.serves(dir.path(), &[80]);
    let _resolver = resolver(nameserver, &dir.path().join("resolv.conf"));
    let web = TcpListener::bind((HOST, 8000)).unwrap();
    let pages = thread::spawn(move || {
        let (mut client, _) = web.accept().unwrap();
        let mut request = [0; 1024];
        assert!(client.read(&mut request).unwrap() > 0);
        let page = "page-of-the-host\n".repeat(1 << 16);
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", page.len());
        client.write_all(head.as_bytes()).unwrap();
        client.write_all(page.as_bytes()).unwrap();
    });
    let Some(vm) = Vm::any() else {
        return;
    };
    let words = [
        "--net",
        "user",
        "-p",
        "127.0.0.1:8080:80",
        "-p",
        "8081:81/tcp",
        "--hostname",
        "guest-of-nobody",
    ];
    let mut guest = vm
        .run_by_nobody()
        .by_alveole(&words)
        .takes_commands()
        .boot();
    guest.wait_for_commands();
    assert_eq!(passts(NOBODY).len(), before.len() + 1);
    assert_eq!(guest.ask("hostname").1, "guest-of-nobody");
    let (status, said) = guest.ask("wget -q -O - http://web.test:8000/ | sort | uniq -c");
    assert!(
        status == 0 && said.ends_with("65536 page-of-the-host"),
        "{said}"
    );
    pages.join().unwrap();
    // Who asks by DHCP is told the same.
    let told = guest.ask("cat /proc/cmdline").1;
    let script = "echo '#!/bin/sh' >/told; echo 'echo told $1 $ip/$mask gw=$router dns=$dns mtu=$mtu search=$search$domain' >>/told; chmod 755 /told";
    guest.ask(script);
    let (status, said) = guest.ask("udhcpc -n -q -f -i eth0 -O mtu -O search -s /told");
    assert_eq!(status, 0, "{said}");
    // A resolver on this host's loopback is told by DHCP by newer versions of passt only.
    let dns = if nameserver == HOST {
        format!("dns={HOST} ")
    } else {
        String::new()
    };
    let said = said.replace("dns=10.0.2.3 ", "");
    let by_dhcp = format!("told bound 10.0.2.15/24 gw=10.0.2.2 {dns}mtu=9000 search=");
    assert!(
        said.lines().any(|l| l.replace("dns= ", "") == by_dhcp),
        "{said}"
    );
    let dns = if nameserver == HOST { HOST } else { "10.0.2.3" };
    for part in [
        ",ip=10.0.2.15/24,",
        ",gw=10.0.2.2,",
        &format!(",dns={dns},"),
        ",mtu=9000 ",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    // Out over both families.
    reaches(
        &mut guest,
        &[
            (WORLD, Some("the-world")),
            ("[2001:db8::1]", Some("the-world")),
        ],
    );
    // And in, a megabyte each way.
    serve(&mut guest, "the-guest", &[80]);
    let mut client = connect("127.0.0.1:8080");
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    client.read_to_string(&mut page).unwrap();
    assert!(page.contains("page-of-the-guest"), "{page}");
    // Who comes before the guest listens is let in by passt, and then not.
    guest.ask("(sleep 1000 | nc -l -p 81 >/got) & sleep 1");
    let mut client = connect("127.0.0.1:8081");
    client
        .write_all("0123456789abcdef\n".repeat(1 << 16).as_bytes())
        .unwrap();
    drop(client);
    let (_, said) =
        guest.ask("until ! pidof nc; do sleep 0.1; done >/dev/null; sort /got | uniq -c");
    assert_eq!(said, "65536 0123456789abcdef");
    let end = guest.leave();
    end.assert_code(0);
    assert_eq!(end.stderr.lines().count(), 1, "{end}");
    let until = Instant::now() + patience(5);
    while passts(NOBODY).len() > before.len() {
        assert!(
            Instant::now() < until,
            "passt outlives its guest: {:?}",
            passts(NOBODY)
        );
        thread::sleep(Duration::from_millis(20));
    }
    assert!(
        TcpStream::connect("127.0.0.1:8080").is_err(),
        "its port is still there"
    );
}

/// Connects as soon as somebody listens.
fn connect(address: &str) -> TcpStream {
    let until = Instant::now() + patience(10);
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < until, "{address}: {e}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The guest's address on its first interface.
fn address4(guest: &mut Running) -> String {
    guest
        .ask("ip addr show eth0 | sed -n 's/.*inet \\([^/]*\\).*/\\1/p'")
        .1
}

/// The same of the world's sort.
fn address6(guest: &mut Running) -> String {
    guest
        .ask("ip -6 addr show eth0 scope global | sed -n 's/.*inet6 \\([^/]*\\).*/\\1/p'")
        .1
}

/// Answers datagrams at `address` until the test ends.
fn echoes(address: &str) {
    let socket = UdpSocket::bind(address).unwrap();
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..len], from);
        }
    });
}

/// Whether a datagram to a published port is answered with itself.
fn is_echoed(address: &str) -> bool {
    // Not from the loopback: passt of 2023 takes no answer to what came from there.
    let here = if address.starts_with('[') {
        "[2001:db8::2]:0"
    } else {
        "192.0.2.2:0"
    };
    let socket = UdpSocket::bind(here).unwrap();
    socket.set_read_timeout(Some(patience(1))).unwrap();
    socket.connect(address).unwrap();
    let mut answer = [0; 64];
    (0..10).any(|_| {
        // Before the guest listens, or while it looks for its neighbour, datagrams are lost.
        let _ = socket.send(b"knock");
        socket
            .recv(&mut answer)
            .is_ok_and(|len| answer[..len] == *b"knock")
    })
}

#[test]
fn rules_are_kept_for_a_user_without_rights() {
    let Some(world) = host(&[
        ("passt", "passt"),
        ("dnsmasq", "dnsmasq-base"),
        ("busybox", "busybox-static"),
    ]) else {
        return;
    };
    let kvm = fs::metadata("/dev/kvm")
        .map(|m| m.permissions().mode())
        .unwrap_or(0);
    if kvm & 0o006 != 0o006 {
        return skip("only root may open /dev/kvm here");
    }
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    world.serves(dir.path(), &[80, 81]);
    let _resolver = resolver(HOST, &dir.path().join("resolv.conf"));
    for address in [
        "192.0.2.2:7001",
        "192.0.2.2:7002",
        "[2001:db8::2]:7001",
        "[2001:db8::2]:7002",
    ] {
        echoes(address);
    }
    let page = TcpListener::bind((HOST, 8000)).unwrap();
    let Some(vm) = Vm::any() else {
        return;
    };
    let words = "--net user -p 8080:80 -p [::1]:8081:80 -p 192.0.2.2:7000:7000/udp -p [2001:db8::2]:7003:7000/udp --egress closed \
                 --deny to=192.0.2.1,protocol=tcp,port=81 --allow to=192.0.2.0/24,protocol=tcp \
                 --allow to=2001:db8::1,protocol=tcp,port=81 --allow to=host,protocol=udp,port=7001";
    let words: Vec<&str> = words.split_whitespace().collect();
    let mut guest = vm
        .run_by_nobody()
        .by_alveole(&words)
        .takes_commands()
        .boot();
    guest.wait_for_commands();
    // Out where a rule opens it, over both families, and nowhere else.
    reaches(
        &mut guest,
        &[
            (WORLD, Some("the-world")),
            ("[2001:db8::1]:81", Some("the-world")),
            ("192.0.2.1:81", None),
            ("[2001:db8::1]", None),
            // This host is opened by its own word only, although it has an address of those.
            ("192.0.2.2:8000", None),
        ],
    );
    page.set_nonblocking(true).unwrap();
    assert!(page.accept().is_err(), "a refused connection was made");
    // Who is refused learns it at once.
    let (_, said) = guest.ask("timeout 60 wget -q -O - http://192.0.2.1:81/");
    assert!(said.contains("No route to host"), "{said}");
    for (to, passes) in [
        ("192.0.2.2:7001", true),
        ("192.0.2.2:7002", false),
        ("[2001:db8::2]:7001", true),
        ("[2001:db8::2]:7002", false),
    ] {
        let (status, said) = guest.ask(&format!("vsock-peer udp-ask {to} knock"));
        assert_eq!(status == 0, passes, "{to}: {said}");
        assert_eq!(said.ends_with("answered knock"), passes, "{to}: {said}");
    }
    // Names and addresses are found in any case.
    assert_eq!(address(&mut guest, "web.test"), HOST);
    let (status, said) = guest.ask("udhcpc -n -q -f -i eth0 -s /bin/true");
    assert_eq!(status, 0, "{said}");
    // In by published ports, whose answers no rule names.
    serve(&mut guest, "the-guest", &[80]);
    for port in ["127.0.0.1:8080", "[::1]:8081"] {
        let mut client = connect(port);
        client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut page = String::new();
        client.read_to_string(&mut page).unwrap();
        assert!(page.contains("page-of-the-guest"), "{port}: {page}");
    }
    guest.ask("vsock-peer udp-echo 7000 >/dev/null 2>&1 & sleep 1");
    for port in ["192.0.2.2:7000", "[2001:db8::2]:7003"] {
        assert!(is_echoed(port), "{port}");
    }
    guest.leave().assert_code(0);
}

#[test]
fn a_user_without_rights_has_a_network() {
    user_mode(HOST);
}

#[test]
fn a_resolver_on_the_loopback_of_the_host_answers_guests_in_user_mode() {
    user_mode("127.0.0.53");
}

#[test]
fn two_guests_on_one_network_know_each_other_and_cannot_pretend() {
    let Some(world) = host(&[
        ("nft", "nftables"),
        ("dnsmasq", "dnsmasq-base"),
        ("busybox", "busybox-static"),
    ]) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    world.serves(dir.path(), &[80, 81]);
    let state = State::new();
    thread::sleep(Duration::from_millis(200));
    let before = trace();
    net(
        state.path(),
        "create web --subnet 10.7.0.0/24 --subnet fd07::/64",
    );
    let Some(mut one) = state.guest("one", "--net web,queues=2") else {
        return;
    };
    let Some(mut two) = state.guest(
        "two",
        "--net web --deny to=192.0.2.0/24,protocol=tcp,port=81",
    ) else {
        return;
    };
    serve(&mut one, "one", &[80]);
    serve(&mut two, "two", &[80]);
    for (guest, other) in [(&mut one, "two"), (&mut two, "one")] {
        for command in [
            format!("ping -c 1 -W 10 {other}"),
            format!("ping -c 1 -W 10 {other}.web.internal"),
            format!("ping6 -c 1 -W 10 {other}"),
        ] {
            let (status, said) = guest.ask(&command);
            assert_eq!(status, 0, "{command}: {said}");
        }
        reaches(guest, &[(&format!("{other}.web.internal"), Some(other))]);
    }
    assert_eq!(one.ask("hostname").1, "one");
    assert_eq!(
        one.ask("ls -d /sys/class/net/eth0/queues/rx-* | wc -l").1,
        "2"
    );
    // Out through this host; the second one's own rule holds for it alone.
    let world_80 = ("192.0.2.1", Some("the-world"));
    reaches(
        &mut one,
        &[
            world_80,
            ("192.0.2.1:81", Some("the-world")),
            ("[2001:db8::1]", Some("the-world")),
        ],
    );
    reaches(
        &mut two,
        &[
            world_80,
            ("192.0.2.1:81", None),
            ("[2001:db8::1]:81", Some("the-world")),
        ],
    );
    // It cannot be somebody else: by address, then by hardware address.
    let one_address = address(&mut two, "one.web.internal");
    assert!(one_address.starts_with("10.7.0."), "{one_address}");
    for other in ["10.7.0.250", &one_address] {
        let (status, said) = two.ask(&format!(
            "ip addr add {other}/24 dev eth0; ping -c 1 -W 2 -I {other} 10.7.0.1; s=$?; ip addr del {other}/24 dev eth0; (exit $s)"
        ));
        assert_ne!(status, 0, "as {other}: {said}");
    }
    let (status, said) = two.ask("m=$(cat /sys/class/net/eth0/address); ip link set eth0 address 02:00:00:00:00:99; ping -c 1 -W 2 10.7.0.1; s=$?; ip link set eth0 address $m; (exit $s)");
    assert_ne!(status, 0, "with another hardware address: {said}");
    let (status, said) = two.ask("ping -c 1 -W 10 10.7.0.1");
    assert_eq!(status, 0, "as itself: {said}");
    // Who asks by DHCP is told the same.
    two.ask("echo '#!/bin/sh' >/told; echo 'echo told $1 $ip/$mask gw=$router dns=$dns mtu=$mtu search=$search' >>/told; chmod 755 /told");
    let (status, said) = two.ask("udhcpc -n -q -f -i eth0 -O mtu -O search -s /told");
    let own = address(&mut one, "two.web.internal");
    assert_eq!(status, 0, "{said}");
    let by_dhcp =
        format!("told bound {own}/24 gw=10.7.0.1 dns=10.7.0.1 mtu=1500 search=web.internal");
    assert!(said.lines().any(|l| l == by_dhcp), "{by_dhcp}: {said}");
    // The name is its own while it runs; killed, it is free, and its address stays.
    let shown = net(state.path(), "inspect web");
    assert!(
        shown.contains("deny,to=192.0.2.0/24,protocol=tcp,port=81")
            && !shown.contains("not running"),
        "{shown}"
    );
    assert!(net(state.path(), "ls").contains("up"));
    let twice = Vm::any().unwrap().by_alveole(&[
        "--name",
        "two",
        "--net",
        "web",
        "--state-dir",
        state.path().to_str().unwrap(),
    ]);
    let end = twice.boot().wait();
    end.assert_code(1);
    assert!(end.stderr.contains("'two' is on it already"), "{end}");
    two.signal(Signal::SIGKILL);
    assert_eq!(two.wait().signal, Some(9));
    let shown = net(state.path(), "inspect web");
    assert!(
        shown.contains("two") && shown.contains("not running"),
        "{shown}"
    );
    let Some(mut two) = state.guest("two", "--net web") else {
        return;
    };
    assert_eq!(address(&mut one, "two.web.internal"), own);
    reaches(
        &mut two,
        &[
            ("one.web.internal", Some("one")),
            ("192.0.2.1:81", Some("the-world")),
        ],
    );
    let refused = try_net(state.path(), "rm web");
    assert!(
        !refused.0 && refused.1.contains("one, two"),
        "{}",
        refused.1
    );
    one.leave().assert_code(0);
    two.leave().assert_code(0);
    net(state.path(), "rm web");
    same_as(&before);
}

#[test]
fn three_tiers_talk_as_their_file_says() {
    let Some(world) = host(&[
        ("nft", "nftables"),
        ("dnsmasq", "dnsmasq-base"),
        ("busybox", "busybox-static"),
    ]) else {
        return;
    };
    // The other end of the trunk is another host of the first tier.
    ip(&format!(
        "link add trunk type veth peer name trunk netns {}",
        world.0.id()
    ));
    ip("link set trunk up");
    if !world.run("ip link add link trunk name front type vlan id 10") {
        return skip("this kernel has no VLANs");
    }
    world.does("ip link set trunk up; ip addr add 10.31.10.200/24 dev front; ip link set front up");
    world.does(&format!(
        "ip route add 10.31.20.0/24 via {HOST}; ip route add 10.31.30.0/24 via {HOST}"
    ));
    let dir = TempDir::new().unwrap();
    world.serves(dir.path(), &[80, 8080]);
    let state = State::new();
    thread::sleep(Duration::from_millis(200));
    let before = trace();
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/resources/machines/three-tier/network.toml"
    );
    net(state.path(), &format!("up {file}"));
    let (Some(mut web), Some(mut app), Some(mut data), Some(mut admin)) = (
        state.guest("web", "--net front"),
        state.guest("app", "--net middle"),
        state.guest("data", "--net back"),
        state.guest("admin", "--net front --net back"),
    ) else {
        return;
    };
    serve(&mut web, "web", &[80, 8080]);
    serve(&mut app, "app", &[80, 8080]);
    serve(&mut data, "data", &[5432, 6379, 8080]);
    let (app6, data6) = (address6(&mut app), address6(&mut data));
    let (app4, web4, data4) = (address4(&mut app), address4(&mut web), address4(&mut data));
    assert!(
        app4.starts_with("10.31.20.")
            && web4.starts_with("10.31.10.")
            && data4.starts_with("10.31.30.")
    );
    let at = |address: &str, port: u16| {
        if address.contains(':') {
            format!("[{address}]:{port}")
        } else {
            format!("{address}:{port}")
        }
    };
    let (app6_8080, app6_80, data6_5432) = (at(&app6, 8080), at(&app6, 80), at(&data6, 5432));
    let (app4_80, data4_5432, web4_80, app4_8080) = (
        at(&app4, 80),
        at(&data4, 5432),
        at(&web4, 80),
        at(&app4, 8080),
    );
    let world_80 = "192.0.2.1:80";
    // Front: the middle's service and the world's pages.
    reaches(
        &mut web,
        &[
            ("app.middle.internal:8080", Some("app")),
            (&app6_8080, Some("app")),
            (&app4_80, None),
            (&app6_80, None),
            (&data4_5432, None),
            (&data6_5432, None),
            (world_80, Some("the-world")),
            ("192.0.2.1:8080", None),
        ],
    );
    assert_ne!(web.ask(&format!("ping -c 1 -W 3 {app4}")).0, 0);
    // Middle: the back's services, and ping.
    reaches(
        &mut app,
        &[
            ("data.back.internal:5432", Some("data")),
            ("data.back.internal:6379", Some("data")),
            (&data6_5432, Some("data")),
            (&at(&data4, 8080), None),
            (&web4_80, None),
            (world_80, None),
        ],
    );
    assert_eq!(app.ask(&format!("ping -c 1 -W 10 {data4}")).0, 0);
    // Back: nobody.
    reaches(
        &mut data,
        &[(&web4_80, None), (&app4_8080, None), (world_80, None)],
    );
    // On two: neighbours of both, and the front's rules for the rest.
    reaches(
        &mut admin,
        &[
            ("web.front.internal", Some("web")),
            ("data.back.internal:5432", Some("data")),
            ("data.back.internal:8080", Some("data")),
            ("app.middle.internal:8080", Some("app")),
            (&app4_80, None),
        ],
    );
    for name in ["web", "data", "app.middle.internal"] {
        assert!(address(&mut admin, name).starts_with("10.31."));
    }
    // The world is the front's neighbour, and comes no further.
    assert!(world.reaches(&web4, 80));
    assert!(!world.reaches(&app4, 8080) && !world.reaches(&data4, 5432));
    let shown = net(state.path(), "ls");
    assert_eq!(
        shown.lines().filter(|l| l.contains(" up ")).count(),
        3,
        "{shown}"
    );
    let refused = try_net(state.path(), &format!("down {file}"));
    assert!(!refused.0 && refused.1.contains("--force"), "{}", refused.1);
    for guest in [web, app, data, admin] {
        guest.leave().assert_code(0);
    }
    net(state.path(), &format!("down {file}"));
    same_as(&before);
}

/// What an image exposes is reached by free ports of this host, which are shown while the VM runs.
#[test]
fn all_ports_of_an_image_are_published() {
    let Some(_world) = host(&[("passt", "passt")]) else {
        return;
    };
    let Some(home) = Home::new() else { return };
    home.does(&["image", "import", path(&home.files), "base"]);
    let context = home.dir.path().join("context");
    fs::create_dir(&context).unwrap();
    let recipe = "FROM base\nEXPOSE 80 81 53/udp\nCMD [\"sh\", \"-c\", \"while :; do echo of-the-guest | nc -l -p 80; done\"]\n";
    fs::write(context.join("Dockerfile"), recipe).unwrap();
    home.does(&["image", "build", "-t", "web", path(&context)]);
    home.does(&["run", "-d", "-P", "-p", "18081:81", "--name", "web", "web"]);
    let ports = |what: &[&str]| -> serde_json::Value {
        let all: serde_json::Value = serde_json::from_str(&home.does(what)).unwrap();
        all[0]["ports"].clone()
    };
    let shown = ports(&["ps", "--format", "json"]);
    assert_eq!(ports(&["inspect", "web"]), shown);
    let of = |at: usize| {
        let port = &shown[at];
        assert_eq!(port["host_address"], "127.0.0.1", "{shown}");
        let number = port["host_port"].as_u64().unwrap();
        (
            port["guest_port"].as_u64().unwrap(),
            port["protocol"].as_str().unwrap(),
            number,
        )
    };
    assert_eq!(shown.as_array().unwrap().len(), 3, "{shown}");
    assert_eq!((of(0).0, of(0).1), (53, "udp"));
    assert_eq!((of(1).0, of(1).1), (80, "tcp"));
    assert_eq!(of(2), (81, "tcp", 18081));
    let at = format!("127.0.0.1:{}", of(1).2);
    let line = home.does(&["ps"]);
    assert!(
        line.contains("PORTS") && line.contains(&format!("{at}->80/tcp, 127.0.0.1:18081->81/tcp")),
        "{line}"
    );
    home.wait_until(20, "answer", || {
        let ask = || -> std::io::Result<String> {
            let mut client = TcpStream::connect(&at)?;
            // The guest's nc waits for our end, too.
            client.shutdown(std::net::Shutdown::Write)?;
            client.set_read_timeout(Some(Duration::from_secs(2)))?;
            let mut said = String::new();
            client.read_to_string(&mut said)?;
            Ok(said)
        };
        ask().is_ok_and(|said| said == "of-the-guest\n")
    });
    // Who does not run has none; a port that is somebody's by the next start gives way to another one.
    home.does(&["kill", "web"]);
    assert_eq!(ports(&["inspect", "web"]), serde_json::json!([]));
    let taken = TcpListener::bind(&at).unwrap();
    home.does(&["start", "web"]);
    let again = ports(&["inspect", "web"]);
    assert_ne!(again[1]["host_port"], shown[1]["host_port"], "{again}");
    assert_eq!(again[0], shown[0]);
    assert_eq!(again[2], shown[2]);
    drop(taken);
}
