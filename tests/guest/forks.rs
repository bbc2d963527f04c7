//! `alveole snapshot`, `restore`, `fork` and `pool`: copies of guests of images that go on from a moment of theirs, each a VM of its own.

use std::collections::HashSet;
use std::io::Read;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::images::Home;
use super::interrupted::processes;
use super::networks::{State, host, net};
use crate::harness::images::{path, tool};
use crate::harness::{patience, skip};

/// Words of a run, with what processors of this machine's own kernel need to be restored.
fn run<'a>(cpu_config: Option<&'a str>, words: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["run"];
    if let Some(file) = cpu_config {
        all.extend(["--cpu-config", file]);
    }
    all.extend(words);
    all
}

fn cpu_config() -> Option<String> {
    std::env::var("ALVEOLE_NATIVE_CPU_CONFIG").ok()
}

pub(super) fn exec(home: &Home, name: &str, script: &str) -> String {
    home.does(&["exec", name, "sh", "-c", script])
}

/// What a VM's main process has counted to.
pub(super) fn ticks(home: &Home, name: &str) -> Vec<u64> {
    let logs = home.does(&["logs", name]);
    let ticks = logs.lines().filter_map(|l| l.strip_prefix("tick "));
    ticks.map(|n| n.parse().unwrap()).collect()
}

/// Counts for ever, on a disk and aloud, and ends as it is told to.
const COUNT: &str = "trap 'echo asked; exit 7' TERM; n=0; \
    while :; do n=$((n+1)); echo $n >/count; echo tick $n; sleep 0.05; done";

/// Starts a VM that counts, and waits until it does.
pub(super) fn counts(home: &Home, name: &str, more: &[&str]) {
    let config = cpu_config();
    let mut words = vec!["-d", "--net", "none", "--name", name];
    words.extend(more);
    words.extend([path(&home.root), "sh", "-c", COUNT]);
    home.does(&run(config.as_deref(), &words));
    home.wait_until(60, "ticks", || ticks(home, name).len() > 3);
}

#[test]
fn a_copy_goes_on_from_a_moment_and_is_a_vm_of_its_own() {
    let Some(home) = Home::of_nobody() else {
        return;
    };
    counts(&home, "web", &["--label", "tier=front", "-v", "/own"]);
    exec(
        &home,
        "web",
        "echo before >/own/file; echo before >/file; cat /proc/sys/kernel/random/boot_id",
    );
    let output = home.output(&["snapshot", "create", "web"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.contains("stood still for"),
        "{output:?}"
    );
    assert_eq!(output.stdout, b"web-1\n");
    // It goes on, and what it does from here on is its own.
    exec(&home, "web", "echo after >/file");
    let at = *ticks(&home, "web").last().unwrap();
    home.wait_until(30, "more ticks", || {
        *ticks(&home, "web").last().unwrap() > at + 2
    });
    assert_eq!(home.does(&["snapshot", "verify", "web-1"]), "web-1: whole");

    assert_eq!(home.does(&["restore", "web-1", "--name", "copy"]), "copy");
    assert_eq!(home.state("copy"), "running");
    home.wait_until(30, "ticks of the copy", || ticks(&home, "copy").len() > 3);
    let (of_web, of_copy) = (ticks(&home, "web"), ticks(&home, "copy"));
    for counted in [&of_web, &of_copy] {
        let in_order = counted.windows(2).all(|two| two[1] == two[0] + 1);
        assert!(in_order, "lost or repeated: {counted:?}");
    }
    assert!(of_copy[0] > 1 && of_copy[0] <= at + 1, "{of_copy:?} {at}");
    assert_eq!(exec(&home, "copy", "cat /file /own/file"), "before\nbefore");
    exec(&home, "copy", "echo the copy >/file");
    assert_eq!(exec(&home, "web", "cat /file"), "after");
    let who = "hostname; cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1";
    exec(&home, "web", "echo none >/etc/machine-id");
    let (web, copy) = (exec(&home, "web", who), exec(&home, "copy", who));
    for (of_web, of_copy) in web.lines().zip(copy.lines()) {
        assert_ne!(of_web, of_copy, "{web} {copy}");
    }
    assert!(
        web.starts_with("web\n") && copy.starts_with("copy\n"),
        "{web} {copy}"
    );
    let events = home.does(&["events"]);
    assert!(
        events.contains("stood_still_us=") && events.contains("from=web"),
        "{events}"
    );
    let inspected = home.does(&["inspect", "copy"]);
    assert!(inspected.contains("tier"), "{inspected}");

    // Without the snapshot it goes on, as does a copy of the copy; with its end it is one like any other.
    assert_eq!(home.does(&["snapshot", "rm", "web-1"]), "web-1");
    assert_eq!(
        home.does(&["snapshot", "create", "copy", "of-copy"]),
        "of-copy"
    );
    let disks = || {
        let folder = std::fs::read_dir(home.dir.path().join("home/state/snapshots/of-copy"));
        let names = folder
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut disks: Vec<_> = names
            .filter(|n| n.starts_with("base") || n.starts_with("changes"))
            .collect();
        disks.sort();
        disks
    };
    assert_eq!(disks(), ["base-1", "changes.qcow2"]);
    home.does(&["snapshot", "flatten", "of-copy"]);
    assert_eq!(disks(), ["changes.qcow2"]);
    assert_eq!(
        home.does(&["snapshot", "verify", "of-copy"]),
        "of-copy: whole"
    );
    assert_eq!(
        home.does(&["fork", "of-copy", "--name", "flat", "--rm"]),
        "flat"
    );
    assert_eq!(
        exec(&home, "flat", "cat /file /own/file"),
        "the copy\nbefore"
    );
    home.does(&["rm", "-f", "flat"]);
    assert_eq!(home.does(&["fork", "copy", "--name", "second"]), "second");
    home.does(&["rm", "-f", "web"]);
    assert_eq!(exec(&home, "second", "cat /file"), "the copy");
    home.does(&["stop", "copy"]);
    assert_eq!(home.does(&["wait", "copy"]), "7");
    assert!(home.does(&["logs", "copy"]).ends_with("asked"));
    home.does(&["start", "copy"]);
    home.wait_until(60, "ticks after a boot", || {
        ticks(&home, "copy").last() < Some(&20)
    });
    assert_eq!(
        exec(&home, "copy", "cat /file /own/file"),
        "the copy\nbefore"
    );
    home.does(&["stop", "second", "copy"]);
    home.does(&["start", "second"]);
    assert_eq!(exec(&home, "second", "cat /file"), "the copy");
    home.does(&["rm", "-f", "second", "copy"]);
    assert_eq!(home.does(&["ps", "-aq"]), "");
}

#[test]
fn what_cannot_be_copied_says_why_and_leaves_nothing() {
    let Some(home) = Home::new() else { return };
    let refused = |words: &[&str]| {
        let output = home.output(words);
        assert!(!output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    counts(&home, "web", &["-v", "data:/data"]);
    let said = refused(&["snapshot", "create", "web"]);
    assert!(said.contains("'data'") && said.contains(":ro"), "{said}");
    home.does(&["rm", "-f", "web"]);
    counts(&home, "web", &[]);
    for (words, expected) in [
        (
            &["fork", "nobody"][..],
            "neither a VM nor a snapshot 'nobody'",
        ),
        (&["restore", "nothing"], "no snapshot 'nothing'"),
        (&["snapshot", "create", "nobody"], "no VM 'nobody'"),
        (&["snapshot", "create", "web", "No Name"], "'No Name'"),
        (&["fork", "web", "-n", "0"], "0"),
        (
            &["fork", "web", "--name", "web"],
            "there is a VM 'web' already",
        ),
        (&["snapshot", "rm", "nothing"], "no snapshot 'nothing'"),
        (&["pool", "take", "nothing"], "no pool 'nothing'"),
    ] {
        let said = refused(words);
        assert!(said.contains(expected), "{words:?}: {said}");
    }
    assert_eq!(home.does(&["snapshot", "create", "web", "one"]), "one");
    let said = refused(&["snapshot", "create", "web", "one"]);
    assert!(said.contains("already"), "{said}");
    // Carried away and back, it is the same; something else is refused.
    let archive = home.dir.path().join("one.tar");
    home.does(&["snapshot", "export", "one", "-o", path(&archive)]);
    assert_eq!(
        home.does(&["snapshot", "import", path(&archive), "two"]),
        "two"
    );
    home.does(&["restore", "two", "--name", "carried", "--rm"]);
    home.wait_until(30, "ticks", || ticks(&home, "carried").len() > 2);
    home.does(&["rm", "-f", "carried"]);
    assert!(home.does(&["snapshot", "ls", "-q"]) == "one\ntwo");
    let files = path(&home.files);
    let other = home.dir.path().join("other.tar");
    assert!(tool("tar", &["-C", files, "-cf", path(&other), "."]));
    let said = refused(&["snapshot", "import", path(&other), "three"]);
    assert!(said.contains("is no file"), "{said}");
    // A memory that is not what was taken.
    let memory = home.dir.path().join("home/state/snapshots/one/memory");
    let file = std::fs::File::options().write(true).open(&memory).unwrap();
    file.set_len(4096).unwrap();
    for words in [&["snapshot", "verify", "one"][..], &["restore", "one"]] {
        let said = refused(words);
        assert!(said.contains("memory"), "{words:?}: {said}");
    }
    // Hooks that fail keep a copy from being handed out.
    exec(
        &home,
        "web",
        "mkdir -p /etc/alveole/renew.d; printf '#!/bin/sh\\necho not today; exit 3\\n' >/etc/alveole/renew.d/no; chmod 755 /etc/alveole/renew.d/no",
    );
    let said = refused(&["fork", "web"]);
    assert!(said.contains("not today"), "{said}");
    let without = home.does(&["fork", "web", "--hooks", "0s", "--name", "calm"]);
    assert_eq!(without, "calm");
    let listed = home.does(&["ps", "-a", "--format", "json"]);
    let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
    let mut names: Vec<_> = listed
        .iter()
        .map(|vm| vm["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["calm", "web"], "something was left");
    home.does(&["stop", "-t", "0", "web"]);
    let said = refused(&["fork", "web"]);
    assert!(said.contains("does not run"), "{said}");
}

#[test]
fn a_pool_has_copies_ready() {
    let Some(home) = Home::of_nobody() else {
        return;
    };
    counts(&home, "web", &[]);
    home.does(&["snapshot", "create", "web", "warm"]);
    home.does(&["rm", "-f", "web"]);
    home.does(&["pool", "create", "ready", "warm", "-n", "2"]);
    let ready = || {
        let listed = home.does(&["pool", "ls", "--format", "json"]);
        let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
        listed[0]["ready"].as_u64().unwrap()
    };
    assert_eq!(ready(), 2);
    let mut names = HashSet::new();
    for _ in 0..3 {
        let name = home.does(&["pool", "take", "ready"]);
        assert_eq!(exec(&home, &name, "hostname"), name);
        assert!(names.insert(name), "one was taken twice: {names:?}");
    }
    home.wait_until(60, "full pool", || ready() == 2);
    let output = home.output(&["snapshot", "rm", "warm"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("pool 'ready'"),
        "{said}"
    );
    home.does(&["pool", "rm", "ready"]);
    // Those that were taken are nobody's but their takers'.
    let left: HashSet<_> = home
        .does(&["ps", "-a", "--format", "json"])
        .lines()
        .collect::<String>()
        .split('"')
        .filter(|word| names.contains(*word))
        .map(str::to_owned)
        .collect();
    assert_eq!(left, names);
    home.does(&["snapshot", "rm", "warm"]);
}

#[test]
fn a_fork_that_is_killed_leaves_its_guest_alone() {
    let Some(home) = Home::new() else { return };
    counts(&home, "web", &[]);
    let begun = std::time::Instant::now();
    home.does(&["fork", "web", "--name", "whole", "--rm"]);
    let whole = begun.elapsed();
    home.does(&["rm", "-f", "whole"]);
    for round in 0..8 {
        let name = format!("copy{round}");
        let mut fork = home
            .command(&["fork", "web", "-n", "2", "--name", &name])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole * round / 7);
        fork.kill().unwrap();
        fork.wait().unwrap();
        let at = *ticks(&home, "web").last().unwrap();
        home.wait_until(30, "ticks after a kill", || {
            *ticks(&home, "web").last().unwrap() > at + 1
        });
    }
    // Whatever has begun is a VM of its own by and by, or has ended with a reason.
    home.wait_until(60, "end of beginnings", || {
        let listed = home.does(&["ps", "-a", "--format", "json"]);
        let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).unwrap();
        listed.iter().all(|vm| vm["state"] != "starting")
    });
    home.does(&["fork", "web", "--name", "after"]);
    let left = home.does(&["ps", "-aq"]);
    let ids: Vec<_> = left.split_whitespace().collect();
    home.does(&[&["rm", "-f"], &ids[..]].concat());
    assert_eq!(processes(&home), [], "something was left");
}

/// How many copies of a Python guest are made.
const COPIES: usize = 20;

/// Says to each that asks which host it is, and a random number.
const SERVER: &str = "import os, socket
s = socket.socket()
s.bind(('', 8000))
s.listen(64)
print('warm', flush=True)
while True:
    c, _ = s.accept()
    c.sendall(f'{socket.gethostname()} {os.urandom(8).hex()}'.encode())
    c.close()";

/// A handshake of TLS with itself, by the certificate in `/tls`, which its clock has to agree with.
const HANDSHAKE: &str = "import socket, ssl, threading
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain('/tls/certificate', '/tls/key')
l = socket.create_server(('127.0.0.1', 0))
def serve():
    try:
        server.wrap_socket(l.accept()[0], server_side=True).sendall(b'agreed')
    except ssl.SSLError:
        pass
threading.Thread(target=serve, daemon=True).start()
client = ssl.create_default_context(cafile='/tls/certificate')
try:
    s = client.wrap_socket(socket.create_connection(l.getsockname()), server_hostname='copy.test')
    print(s.version(), s.recv(10).decode())
except ssl.SSLCertVerificationError as e:
    print(e.verify_message)";

/// What a server at this address says.
const ASK: &str = "import socket, sys
s = socket.create_connection((sys.argv[1], 8000), 60)
print(s.recv(100).decode())";

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

#[test]
fn copies_of_a_warm_python_guest_answer_as_themselves() {
    let Some(root) = std::env::var_os("ALVEOLE_TEST_PODMAN").map(PathBuf::from) else {
        skip("ALVEOLE_TEST_PODMAN is not set");
        return;
    };
    let copies = std::env::var("ALVEOLE_TEST_COPIES");
    let copies = copies.map_or(COPIES, |n| n.parse().unwrap());
    let Some(_world) = host(&[("nft", "nftables"), ("dnsmasq", "dnsmasq-base")]) else {
        return;
    };
    let Some(home) = Home::new() else { return };
    let state = State::new();
    net(state.path(), "create front --subnet 10.7.0.0/23");
    let state_dir = format!("--state-dir={}", path(state.path()));
    let config = cpu_config();
    let words = [
        "-d",
        "--name",
        "snake",
        "--memory",
        "192M",
        "--net",
        "front",
        &state_dir,
        path(&root),
        "python3",
        "-c",
        SERVER,
    ];
    home.does(&run(config.as_deref(), &words));
    home.wait_until(120, "warm guest", || {
        assert!(
            home.state("snake") != "exited",
            "{}",
            home.does(&["logs", "snake"])
        );
        home.does(&["logs", "snake"]).contains("warm")
    });
    // The source has all that copies could have of it.
    exec(
        &home,
        "snake",
        "echo none >/etc/machine-id; cat /proc/sys/kernel/random/boot_id",
    );
    let number = copies.to_string();
    let made = home.does(&["fork", "snake", "-n", &number, "--name", "copy", "--rm"]);
    let mut names: Vec<_> = made.lines().collect();
    assert_eq!(names.len(), copies, "{made}");
    names.push("snake");
    let who = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address; \
        hostname -I; head -c 16 /dev/urandom | od -An -tx1; date +%s.%N";
    let mut seen: Vec<HashSet<String>> = vec![HashSet::new(); 6];
    let mut worst = (Duration::ZERO, String::new());
    for name in &names {
        let before = now();
        let said = exec(&home, name, who);
        let after = now();
        let facts: Vec<_> = said.lines().collect();
        assert_eq!(facts[0], *name, "{said}");
        for (seen, fact) in seen.iter_mut().zip(&facts) {
            assert!(
                seen.insert((*fact).to_owned()),
                "{name} has {fact} of another"
            );
        }
        let clock = Duration::from_secs_f64(facts[6].parse().unwrap());
        // An exec takes longer than a clock may be off: it is between before and after.
        let off = before
            .saturating_sub(clock)
            .max(clock.saturating_sub(after));
        if off > worst.0 {
            worst = (
                off,
                format!("{name}: {clock:?} between {before:?} and {after:?}"),
            );
        }
        // The main process, which was warm, over the copy's own address.
        let mut stream = TcpStream::connect((facts[4].trim(), 8000)).unwrap();
        stream.set_read_timeout(Some(patience(20))).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(&format!("{name} ")), "{name}: {answer}");
    }
    assert!(
        worst.0 < Duration::from_millis(10),
        "a clock is {worst:?} off"
    );
    // A certificate that is younger than the snapshot: a guest that had the snapshot's time would not take it.
    let made = home.dir.path().join("tls");
    std::fs::create_dir(&made).unwrap();
    let (key, certificate) = (made.join("key"), made.join("certificate"));
    let subject = [
        "-subj",
        "/CN=copy.test",
        "-addext",
        "subjectAltName=DNS:copy.test",
        "-days",
        "2",
    ];
    let curve = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    let out = ["-keyout", path(&key), "-out", path(&certificate)];
    if tool(
        "openssl",
        &[&["req", "-x509"], &curve[..], &subject, &out].concat(),
    ) {
        home.does(&["cp", path(&made), &format!("{}:/", names[0])]);
        let handshake = || home.does(&["exec", names[0], "python3", "-c", HANDSHAKE]);
        assert_eq!(handshake(), "TLSv1.3 agreed");
        exec(&home, names[0], "date -s @$(($(date +%s) - 3600))");
        assert_eq!(handshake(), "certificate is not yet valid");
    }
    // They find each other by name.
    if let [one, two, ..] = names[..] {
        let said = home.does(&["exec", one, "python3", "-c", ASK, two]);
        assert!(said.contains(two), "{said}");
    }
}
