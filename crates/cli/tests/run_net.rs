//! `alveole run --net` as people type it, well and badly, with a script in place of the VMM and the lab.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use alveole_vm_config::{EgressDefault, LinkKind, VmConfig};

use support::{in_namespaces, skip};

const ALVEOLE: &str = env!("CARGO_BIN_EXE_alveole");

/// How a start of the program ended.
struct Run {
    status: Option<i32>,
    stderr: String,
    /// What the VMM was told; none if it was not started.
    config: Option<VmConfig>,
    /// The descriptors that it had.
    descriptors: String,
}

impl Run {
    fn new(words: &[&str]) -> Self {
        Self::of(Command::new(ALVEOLE), words)
    }

    /// In namespaces of network and mounts, after `script`; nothing where that is not allowed.
    fn alone(test: &str, script: &str, words: &[&str]) -> Option<Self> {
        let unshare = |script: &str| {
            let mut command = Command::new("unshare");
            command.args(["--net", "--mount", "sh", "-c", script, "sh", ALVEOLE]);
            command
        };
        if !unshare("true").output().is_ok_and(|o| o.status.success()) {
            skip(test, "only root can make network namespaces");
            return None;
        }
        let command = unshare(&format!("{script}; exec \"$@\""));
        Some(Self::of(command, words))
    }

    fn of(mut command: Command, words: &[&str]) -> Self {
        let report = tempfile::tempdir().unwrap();
        let output = command
            .args(["run", "--no-probe", "--kernel", "k"])
            .args(words)
            .env("ALVEOLE_VMM", stand_in())
            .env("ALVEOLE_LAB_TOOL", stand_in())
            .env_remove("ALVEOLE_LAB")
            .env("FAKE_REPORT", report.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let read = |name: &str| fs::read_to_string(report.path().join(name)).ok();
        Self {
            status: output.status.code(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            config: read("config").map(|json| VmConfig::from_json(&json, "config").unwrap()),
            descriptors: read("descriptors").unwrap_or_default(),
        }
    }

    /// One line that says `word`, and no VMM.
    #[track_caller]
    fn refused(&self, word: &str) {
        assert_eq!(self.status, Some(1), "{}", self.stderr);
        assert!(
            self.stderr.starts_with("alveole: ") && self.stderr.contains(word),
            "{word} is not in: {}",
            self.stderr
        );
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(
            self.config.is_none(),
            "the VMM was started: {}",
            self.stderr
        );
    }
}

fn stand_in() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake-program")
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().unwrap().stdout == b"0\n"
}

/// Whether `passt` is installed.
fn has_passt(test: &str) -> bool {
    let there = Path::new("/usr/bin/passt").exists();
    if !there {
        skip(test, "there is no passt: install passt");
    }
    there
}

#[test]
fn words_that_cannot_be_meant_are_refused() {
    for (words, expected) in [
        (&["--net", ""][..], "names no network"),
        (&["--net", "tap=a-name-of-16-by."], "15 bytes"),
        (&["--net", "macvtap=a/b"], "no interface can be called so"),
        (&["--net", "abcdefghijklmnop"], "16 bytes"),
        (&["--net", "Web"], "'W'"),
        (&["--net", "wifi=x"], "no kind of network"),
        (&["--net", "user,queues=2"], "one queue"),
        (&["--net", "web,queues=0"], "1 to 64"),
        (&["--net", "web,mtu=1500"], "alveole net create --mtu"),
        (&["--net", "tap=t,mtu=67"], "68 to 65535"),
        (&["--net", "user,mac=03:00:00:00:00:01"], "multicast"),
        (&["--net", "user,ip=10.0.0.1"], "no option of a network"),
        (&["--net", "none,mac=02:00:00:00:00:01"], "nothing to set"),
        (&["-p", "80"], "[ADDRESS:]PORT:GUESTPORT"),
        (&["-p", "8080:80/sctp"], "/tcp or /udp"),
        (&["--name", "A"], "'A'"),
        (&["--hostname", "a.b"], "'.'"),
        (&["--allow", "port=80"], "only tcp and udp"),
        (&["--deny", "allow,to=any"], "'allow'"),
        (&["--egress", "ajar"], "open or closed"),
    ] {
        let run = Run::new(words);
        assert_eq!(run.status, Some(2), "{words:?}: {}", run.stderr);
        assert!(run.stderr.contains(expected), "{words:?}: {}", run.stderr);
        assert!(run.config.is_none());
    }
}

#[test]
fn contradictions_are_refused_with_what_to_do() {
    for (words, expected) in [
        (
            &["--net", "user", "--net", "user"][..],
            "--net user is given twice",
        ),
        (
            &["--net", "web", "--net", "user", "--net", "web,queues=2"],
            "--net web is given twice",
        ),
        (
            &["--net", "tap=t", "--net", "tap=t"],
            "--net tap=t is given twice",
        ),
        (&["--net", "none", "--net", "web"], "contradict each other"),
        (
            &["--net", "web", "-p", "8080:80"],
            "alveole net inspect web",
        ),
        (&["--net", "none", "-p", "8080:80"], "add --net user"),
        (
            &["--net", "user", "--deny", "to=back"],
            "write its addresses",
        ),
        (&["--net", "none", "--egress", "closed"], "it sends nothing"),
        (
            &["--net", "web", "--net", "tap=t,vhost", "--egress", "closed"],
            "--net tap=t,vhost",
        ),
        (&["--lab", "--net", "user"], "no way to the world"),
        (&["--lab", "-p", "8080:80"], "nobody outside of the lab"),
        (&["--lab", "--net", "tap=t"], "not in the lab"),
    ] {
        Run::new(words).refused(expected);
    }
}

#[test]
fn interfaces_of_the_host_are_handed_on_by_name() {
    let run = Run::new(&[
        "--net",
        "tap=tap7,mac=02:00:00:00:00:07,mtu=1400,queues=2",
        "--net",
        "macvtap=eth7",
        "--hostname",
        "h",
        "--append",
        "quiet",
    ]);
    let config = run.config.unwrap();
    let [tap, macvtap] = &config.network_interfaces[..] else {
        panic!("{:?}", config.network_interfaces);
    };
    assert_eq!(
        (tap.iface_id.as_str(), tap.host_dev_name.as_str()),
        ("net0", "tap7")
    );
    assert_eq!(
        (tap.link, tap.mtu, tap.num_queue_pairs),
        (LinkKind::Tap, Some(1400), Some(2))
    );
    assert_eq!(tap.guest_mac.as_deref(), Some("02:00:00:00:00:07"));
    assert_eq!(
        (macvtap.iface_id.as_str(), macvtap.host_dev_name.as_str()),
        ("net1", "eth7")
    );
    assert_eq!(
        (macvtap.link, macvtap.guest_mac.as_deref()),
        (LinkKind::Macvtap, None)
    );
    let line = config.boot_source.boot_args.unwrap();
    assert!(
        line.ends_with("quiet alveole.hostname=h") && !line.contains("alveole.net="),
        "{line}"
    );
}

#[test]
fn rules_are_handed_on_where_no_network_keeps_them() {
    let run = Run::new(&[
        "--net",
        "tap=tap7",
        "--deny",
        "to=10.0.0.0/8",
        "--allow",
        "to=any,protocol=tcp,port=443",
        "--egress",
        "closed",
    ]);
    let config = run.config.unwrap();
    let egress = config.network_interfaces[0].egress.as_ref().unwrap();
    assert_eq!(
        egress.rules,
        ["deny,to=10.0.0.0/8", "allow,to=any,protocol=tcp,port=443"]
    );
    assert_eq!(egress.default, EgressDefault::Closed);
    assert!(
        egress.host.contains(&"127.0.0.0/8".to_owned()),
        "{egress:?}"
    );
    assert!(egress.resolvers.is_empty());
    let config = Run::new(&["--net", "tap=tap7"]).config.unwrap();
    assert_eq!(config.network_interfaces[0].egress, None);
}

#[test]
fn none_is_none() {
    let run = Run::new(&["--net", "none"]);
    assert_eq!((run.status, run.stderr.as_str()), (Some(0), ""));
    let config = run.config.unwrap();
    assert!(config.network_interfaces.is_empty());
    let line = config.boot_source.boot_args.unwrap();
    assert_eq!(line, "console=ttyS0 reboot=k panic=-1");
}

/// A way out, as far as `passt` looks.
const WAY_OUT: &str = "ip link set lo up; ip link add eth0 type veth peer name far; ip link set far up; \
    ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.1";

#[test]
fn user_mode_is_what_a_guest_has_if_nothing_is_said() {
    const TEST: &str = "user_mode_is_what_a_guest_has_if_nothing_is_said";
    if !has_passt(TEST) {
        return;
    }
    let Some(run) = Run::alone(TEST, WAY_OUT, &["-p", "127.0.0.1:8080:80"]) else {
        return;
    };
    assert_eq!((run.status, run.stderr.as_str()), (Some(0), ""));
    let config = run.config.unwrap();
    let [interface] = &config.network_interfaces[..] else {
        panic!("{:?}", config.network_interfaces);
    };
    assert_eq!((interface.link, interface.mtu), (LinkKind::Fd, Some(9000)));
    let line = config.boot_source.boot_args.unwrap();
    let word = format!(
        "alveole.net={},ip=10.0.2.15/24,gw=10.0.2.2",
        interface.guest_mac.as_ref().unwrap()
    );
    assert!(line.contains(&word) && !line.contains("hostname"), "{line}");
    let inherited = format!(" {} -> socket:", interface.host_dev_name);
    assert!(
        run.descriptors.contains(&inherited),
        "{inherited}: {}",
        run.descriptors
    );
}

#[test]
fn a_host_that_cannot_give_user_mode_says_why_and_goes_on_without() {
    const TEST: &str = "a_host_that_cannot_give_user_mode_says_why_and_goes_on_without";
    if !has_passt(TEST) {
        return;
    }
    for (script, word) in [
        (
            "mount --bind /dev/null /usr/bin/passt",
            "install the package passt",
        ),
        ("ip link set lo up", "no default route"),
    ] {
        let Some(run) = Run::alone(TEST, script, &[]) else {
            return;
        };
        assert_eq!(run.status, Some(0), "{}", run.stderr);
        assert!(
            run.stderr.contains(word) && run.stderr.contains("--net none"),
            "{}",
            run.stderr
        );
        assert_eq!(run.stderr.lines().count(), 1, "{}", run.stderr);
        let config = run.config.unwrap();
        assert!(config.network_interfaces.is_empty());
        // Who asks for it gets it, or no guest.
        for words in [&["--net", "user"][..], &["-p", "8080:80"]] {
            Run::alone(TEST, script, words).unwrap().refused(word);
        }
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    Run::new(&["-p", &format!("{port}:80")]).refused(&format!("127.0.0.1:{port}/tcp"));
    Run::new(&["-p", "0.0.0.0:18080:80", "-p", "0.0.0.0:18080:81"]).refused("published twice");
    // Only an address of this host can be listened on.
    Run::new(&["-p", "198.51.100.1:18080:80"]).refused("198.51.100.1:18080/tcp");
}

#[test]
fn an_unknown_network_is_named_with_where_to_look() {
    let folder = tempfile::tempdir().unwrap();
    let run = Run::new(&[
        "--net",
        "nowhere",
        "--state-dir",
        folder.path().to_str().unwrap(),
    ]);
    if is_root() {
        run.refused("no network 'nowhere': `alveole net ls`");
    } else {
        run.refused("CAP_NET_ADMIN");
    }
}

/// From a network that is made to one that is removed, with a sleeping process for each VM.
#[test]
fn a_vm_has_its_place_on_a_network_as_long_as_it_runs() {
    const TEST: &str = "a_vm_has_its_place_on_a_network_as_long_as_it_runs";
    let Some(mut separate) = in_namespaces(TEST) else {
        return;
    };
    if !["/usr/sbin/nft", "/usr/sbin/dnsmasq", "/dev/net/tun"]
        .iter()
        .all(|file| Path::new(file).exists())
    {
        return skip(
            TEST,
            "there is no nft, dnsmasq or /dev/net/tun: install nftables and dnsmasq-base, modprobe tun",
        );
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let script = r#"
        net() { word=$1; shift; "$ALVEOLE" net "$word" "$@" --state-dir "$STATE"; }
        run() { "$ALVEOLE" run --no-probe --kernel k --state-dir "$STATE" "$@" 2>&1; }
        ip link set lo up
        net create lan --mode bridge --subnet 10.7.0.0/24
        net create other --mode bridge --subnet 10.8.0.0/24
        FAKE_REPORT=$STATE/a FAKE_SLEEP=100 run --name a --net lan,mac=02:00:00:00:00:07,queues=2 --net other \
            --allow to=10.9.0.0/24,protocol=tcp --deny to=any --egress open &
        for try in $(seq 200); do [ -s "$STATE/a/descriptors" ] && break; sleep 0.05; done
        cat "$STATE/a/config" "$STATE/a/descriptors"
        net inspect lan
        echo "same MAC: $(run --name b --net lan,mac=02:00:00:00:00:07)"
        echo "same name: $(run --name a --net lan)"
        echo "half way: $(run --name c --net other --net lan,mac=02:00:00:00:00:07)"
        echo "unknown: $(run --name d --net lan --allow to=nowhere)"
        echo "foreign: $(run --name d --net lan --allow to=any,vm=a)"
        echo "own: $(run --name d --net lan --allow to=lan)"
        net inspect other
        ip -o link | grep -c 'vm[0-9a-f]*:' | sed 's/^/taps: /'
        kill -9 "$(cat "$STATE/a/pid")"
        wait
        net inspect lan
        net repair
        ip -o link | grep -c 'vm[0-9a-f]*:' | sed 's/^/taps: /'
        FAKE_REPORT=$STATE/b run --name a --net lan
        grep -o 'alveole.net=.*hostname=[a-z]*' "$STATE/b/config"
        net rm lan other
        echo all done"#;
    for sub in ["a", "b"] {
        fs::create_dir(folder.path().join(sub)).unwrap();
    }
    let done = separate
        .args(["bash", "-c", script])
        .env("ALVEOLE", ALVEOLE)
        .env("ALVEOLE_VMM", stand_in())
        .env("STATE", folder.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    for word in [
        "\"guest_mac\":\"02:00:00:00:00:07\"",
        "\"num_queue_pairs\":2",
        "-> /dev/net/tun",
        "allow,to=10.9.0.0/24,protocol=tcp\n          deny,to=any\n          egress open",
        "same MAC: alveole: MAC address '02:00:00:00:00:07': VM 'a' has it on network 'lan'",
        "same name: alveole: network 'lan': a VM called 'a' is on it already",
        "half way: alveole: MAC address '02:00:00:00:00:07'",
        "unknown: alveole: rule 'allow,to=nowhere': there is no network 'nowhere'",
        "foreign: alveole: rule 'allow,to=any,vm=a': it is of VM 'd' anyway",
        "own: alveole: rule 'allow,to=lan': guests of one network see each other",
        "VM        c ",
        "taps: 2",
        "VM        a 02:00:00:00:00:07",
        "not running",
        "taps: 0",
        "alveole.net=02:00:00:00:00:07,ip=10.7.0.",
        "alveole.hostname=a",
        "all done",
    ] {
        assert!(said.contains(word), "'{word}' is missing: {said}");
    }
}
