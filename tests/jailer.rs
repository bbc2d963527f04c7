//! The real `alveole-jailer` around the real `alveole-vmm`: what is seen of the jail from outside, and guests that
//! boot in it. How it refuses what cannot be is in `crates/jailer/tests`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod api_client;
#[path = "../crates/jailer/tests/cgroups/mod.rs"]
mod cgroups;
#[path = "tiny_guest/code.rs"]
mod code;
#[expect(dead_code, unused_imports, reason = "tests/guest.rs uses the rest")]
mod harness;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cgroups::controller;
use harness::images::{ext4, output, root_files};
use harness::{Vm, is_root, patience, skip};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

/// Whose rights the monitor has in these jails. Nobody is called so.
const UID: u32 = 12_345;
const GID: u32 = 12_346;
/// Longest time for anything but a guest's boot, before patience.
const SECONDS: u64 = 30;
const BOOT_SECONDS: u64 = 90;

/// A jail in the making, with what the monitor needs in it; or in use.
struct Jail {
    base: TempDir,
    id: String,
    words: Vec<String>,
    vmm_words: Vec<String>,
    cgroups: Vec<PathBuf>,
    child: Option<Child>,
}

impl Jail {
    /// A jail with `vm.json` in it. None, with the skip told, where there can be no jail or no machine.
    #[track_caller]
    fn new() -> Option<Self> {
        if !is_root() {
            skip("jails are made by root");
            return None;
        }
        if !Path::new("/dev/kvm").exists() {
            skip("no /dev/kvm on this machine");
            return None;
        }
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let jail = Self {
            // Not /tmp, where many hosts allow no devices.
            base: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
            id: format!("test-{}-{number}", std::process::id()),
            words: Vec::new(),
            vmm_words: Vec::new(),
            cgroups: Vec::new(),
            child: None,
        };
        fs::create_dir_all(jail.root()).unwrap();
        Some(jail)
    }

    /// A machine that sleeps for ever.
    #[track_caller]
    fn sleeping() -> Option<Self> {
        let mut jail = Self::new()?;
        fs::write(
            jail.root().join("kernel"),
            code::tiny_kernel(b"\xf4\xeb\xfd"),
        )
        .unwrap();
        jail.describe(&json!({
            "boot-source": { "kernel_image_path": "/kernel" },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 64 },
        }));
        Some(jail.vmm(&["--console", "none"]))
    }

    /// Runs the machine without an API.
    fn describe(&mut self, machine: &serde_json::Value) {
        fs::write(self.root().join("vm.json"), machine.to_string()).unwrap();
        let words = ["--config-file", "/vm.json", "--no-api"];
        self.vmm_words.extend(words.map(str::to_owned));
    }

    fn root(&self) -> PathBuf {
        self.base
            .path()
            .join("alveole-vmm")
            .join(&self.id)
            .join("root")
    }

    fn with(mut self, words: &[&str]) -> Self {
        self.words.extend(words.iter().map(|w| (*w).to_owned()));
        self
    }

    fn vmm(mut self, words: &[&str]) -> Self {
        self.vmm_words.extend(words.iter().map(|w| (*w).to_owned()));
        self
    }

    /// A cgroup of this name, below that hierarchy, which goes with the jail.
    fn cgroup(&mut self, hierarchy: &Path, path: &str) -> PathBuf {
        let mut dir = hierarchy.to_owned();
        for name in path.split('/') {
            dir.push(name);
            self.cgroups.push(dir.clone());
        }
        dir
    }

    /// The jailer, started through `sh` with `redirections`.
    fn command(&self, redirections: &str) -> Command {
        let vmm = Path::new(env!("CARGO_BIN_EXE_alveole-vmm"));
        let jailer = vmm.with_file_name("alveole-jailer");
        assert!(jailer.exists(), "build it: cargo build -p alveole-jailer");
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("exec \"$0\" \"$@\" {redirections}")])
            .arg(jailer)
            .args(["--id", &self.id])
            .arg("--exec-file")
            .arg(vmm)
            .args(["--uid", &UID.to_string(), "--gid", &GID.to_string()])
            .arg("--chroot-base-dir")
            .arg(self.base.path())
            .args(&self.words)
            .arg("--")
            .args(&self.vmm_words)
            .env("ALVEOLE_TEST_SECRET", "1")
            .stdin(Stdio::null())
            .stdout(File::create(self.said_path()).unwrap())
            .stderr(
                File::options()
                    .append(true)
                    .create(true)
                    .open(self.errors_path())
                    .unwrap(),
            );
        command
    }

    fn said_path(&self) -> PathBuf {
        self.base.path().join("stdout")
    }

    fn errors_path(&self) -> PathBuf {
        self.base.path().join("stderr")
    }

    fn said(&self) -> String {
        let read = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        read(self.said_path()) + &read(self.errors_path())
    }

    #[track_caller]
    fn wait_until(&self, seconds: u64, what: &str, mut so: impl FnMut() -> bool) {
        let until = Instant::now() + patience(seconds);
        while !so() {
            assert!(
                Instant::now() < until,
                "no {what}; it said: {}",
                self.said()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts it, and waits until the machine runs; gives the monitor's process.
    #[track_caller]
    fn start(&mut self, redirections: &str) -> u32 {
        let detached = self
            .words
            .iter()
            .any(|w| w == "--daemonize" || w == "--new-pid-ns");
        let mut child = self.command(redirections).spawn().unwrap();
        if detached {
            let status = child.wait().unwrap();
            assert!(status.success(), "{status}: {}", self.said());
        }
        self.child = Some(child);
        let pid = self.pid();
        self.wait_until(SECONDS, "running machine", || {
            // The last filter is entered when everything is there.
            let threads = fs::read_dir(format!("/proc/{pid}/task"));
            let threads = threads.unwrap_or_else(|e| panic!("{e}; it said: {}", self.said()));
            let confined = threads.flatten().filter(|thread| {
                let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                fact(&status, "Seccomp") == ["2"]
            });
            confined.count() >= 3
        });
        pid
    }

    /// The monitor's process, as the jail's file says.
    #[track_caller]
    fn pid(&self) -> u32 {
        let file = self.root().join("alveole-vmm.pid");
        let read = || fs::read_to_string(&file).ok()?.parse().ok();
        self.wait_until(SECONDS, "process number", || read().is_some());
        read().unwrap()
    }
}

/// The monitor ends with its test, and with it its cgroups.
impl Drop for Jail {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.root().join("alveole-vmm.pid"));
        if let Some(pid) = pid.ok().and_then(|p| p.parse().ok())
            && fs::read_link(format!("/proc/{pid}/exe"))
                .is_ok_and(|exe| exe.ends_with("alveole-vmm"))
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let until = Instant::now() + patience(SECONDS);
            while Path::new(&format!("/proc/{pid}/exe")).exists() && Instant::now() < until {
                if let Some(child) = &mut self.child {
                    let _ = child.try_wait();
                }
                thread::sleep(Duration::from_millis(2));
            }
        }
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        for dir in self.cgroups.iter().rev() {
            // The process is gone from /proc a moment before it is gone from here.
            for _ in 0..200 {
                match fs::remove_dir(dir) {
                    Err(e) if e.raw_os_error() == Some(16) => {
                        thread::sleep(Duration::from_millis(5));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// The words of one line of a process's status.
fn fact<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().split_whitespace().collect()
}

fn proc(pid: u32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap()
}

/// Soft and hard limit.
fn limit(pid: u32, name: &str) -> (String, String) {
    let limits = proc(pid, "limits");
    let line = limits.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    let mut words = line.split_whitespace().map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}

fn namespace(pid: &str, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap()
}

/// That this process has nothing but the jail, and no right.
#[track_caller]
fn assert_jailed(jail: &Jail, pid: u32) {
    let status = proc(pid, "status");
    let four = |n: u32| vec![n.to_string(); 4];
    assert_eq!(fact(&status, "Uid"), four(UID));
    assert_eq!(fact(&status, "Gid"), four(GID));
    assert_eq!(fact(&status, "Groups"), Vec::<&str>::new());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(fact(&status, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(fact(&status, "NoNewPrivs"), ["1"]);
    assert_eq!(proc(pid, "environ"), "");

    // Its root is the jail's, and nothing else is mounted that it could see.
    let inside = fs::metadata(format!("/proc/{pid}/root/")).unwrap();
    let outside = fs::metadata(jail.root()).unwrap();
    assert_eq!((inside.dev(), inside.ino()), (outside.dev(), outside.ino()));
    let cwd = fs::metadata(format!("/proc/{pid}/cwd/")).unwrap();
    assert_eq!(cwd.ino(), outside.ino());
    assert_eq!(
        proc(pid, "mountinfo").lines().count(),
        1,
        "{}",
        proc(pid, "mountinfo")
    );
    assert_ne!(namespace(&pid.to_string(), "mnt"), namespace("self", "mnt"));

    // Whose everything is, and who may do what: as Firecracker's jailer leaves it.
    let mut names = BTreeSet::new();
    for (name, mode, kind) in [
        ("", 0o700, 0o040_000),
        ("alveole-vmm", 0o755, 0o100_000),
        ("dev", 0o700, 0o040_000),
        ("dev/kvm", 0o600, 0o020_000),
        ("dev/net", 0o700, 0o040_000),
        ("dev/net/tun", 0o600, 0o020_000),
        ("dev/urandom", 0o600, 0o020_000),
        ("run", 0o700, 0o040_000),
    ] {
        let facts = fs::symlink_metadata(jail.root().join(name)).unwrap();
        assert_eq!((facts.uid(), facts.gid()), (UID, GID), "{name}");
        assert_eq!(facts.mode(), kind | mode, "{name}");
        names.insert(name.split('/').next().unwrap());
    }
    let there = fs::read_dir(jail.root()).unwrap();
    let there: BTreeSet<_> = there
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.remove("");
    names.extend(["alveole-vmm.pid", "kernel", "vm.json"]);
    assert_eq!(there, names.into_iter().map(str::to_owned).collect());
    let misc = fs::read_to_string("/proc/misc").unwrap();
    let userfaultfd = misc.lines().any(|l| l.ends_with(" userfaultfd"));
    assert_eq!(jail.root().join("dev/userfaultfd").exists(), userfaultfd);
}

/// What the descriptors of a process stand for, by number.
fn descriptors(pid: u32) -> Vec<(u32, String)> {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut all: Vec<_> = all
        .map(|e| {
            let path = e.unwrap().path();
            let number = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            (number, fs::read_link(path).unwrap().display().to_string())
        })
        .collect();
    all.sort();
    all
}

#[test]
fn in_the_jail_there_is_nothing_else() {
    let Some(mut jail) = Jail::sleeping() else {
        return;
    };
    let secret = jail.base.path().join("secret");
    let given = jail.base.path().join("given");
    for path in [&secret, &given] {
        fs::write(path, "").unwrap();
    }
    jail = jail.with(&["--pass-fd", "9"]);
    let redirections = format!("7<{0} 8<{0} 9<>{1}", secret.display(), given.display());
    let pid = jail.start(&redirections);
    assert_eq!(
        Some(pid),
        jail.child.as_ref().map(Child::id),
        "the jailer becomes the monitor"
    );
    assert_jailed(&jail, pid);
    let open = descriptors(pid);
    assert!(
        open.iter()
            .any(|(n, what)| *n == 9 && what.ends_with("/given")),
        "{open:?}"
    );
    let leaked = |what: &str| {
        what.ends_with("/secret")
            || what.contains("cgroup")
            || what == "/"
            || what.contains("/proc")
    };
    assert!(!open.iter().any(|(_, what)| leaked(what)), "{open:?}");
    // Whatever else is a file is the machine's.
    let files = open
        .iter()
        .filter(|(_, what)| what.starts_with('/') && !what.starts_with("/dev/"));
    let files: Vec<_> = files
        .map(|(_, what)| what.rsplit('/').next().unwrap())
        .collect();
    assert!(
        files
            .iter()
            .all(|f| ["stdout", "stderr", "given", "kernel"].contains(f)),
        "{open:?}"
    );

    let same = |n: &str| (n.to_owned(), n.to_owned());
    assert_eq!(limit(pid, "Max open files"), same("2048"));
    assert_eq!(limit(pid, "Max file size"), same("unlimited"));
    let words = proc(pid, "cmdline");
    let words: Vec<_> = words.split('\0').collect();
    assert_eq!(words[..3], ["/alveole-vmm", "--id", &jail.id]);
    let names: Vec<_> = words.iter().filter(|w| w.starts_with("--")).collect();
    let want = [
        "--id",
        "--start-time-us",
        "--start-time-cpu-us",
        "--parent-cpu-time-us",
        "--config-file",
        "--no-api",
        "--console",
    ];
    assert_eq!(names, want.iter().collect::<Vec<_>>());
    let number = |name: &str| -> u64 {
        let at = words.iter().position(|w| *w == name).unwrap();
        words[at + 1].parse().unwrap()
    };
    // In one process, all that it has used is the jailer's.
    assert_eq!(
        number("--start-time-cpu-us"),
        number("--parent-cpu-time-us")
    );
    assert!(number("--start-time-us") > 0);
}

#[test]
fn detached_and_in_namespaces() {
    for words in [
        &["--daemonize"][..],
        &["--new-pid-ns"],
        &["--daemonize", "--new-pid-ns"],
    ] {
        let Some(jail) = Jail::sleeping() else { return };
        let network = Namespace::new();
        let path = network.path();
        let mut jail = jail.with(words).with(&[
            "--netns",
            &path,
            "--resource-limit",
            "no-file=200",
            "--resource-limit",
            "fsize=1000000",
        ]);
        let pid = jail.start("");
        assert_jailed(&jail, pid);
        let own = pid.to_string();
        let status = proc(pid, "status");
        let numbers = fact(&status, "NStgid");
        if words.contains(&"--new-pid-ns") {
            assert_eq!(numbers, [own.as_str(), "1"], "{words:?}");
            assert_ne!(namespace(&own, "pid"), namespace("self", "pid"));
        } else {
            assert_eq!(numbers, [own.as_str()]);
        }
        let standard: Vec<_> = descriptors(pid)
            .into_iter()
            .take(3)
            .map(|(_, what)| what)
            .collect();
        let stat = proc(pid, "stat");
        let session: u32 = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .nth(3)
            .unwrap()
            .parse()
            .unwrap();
        if words.contains(&"--daemonize") {
            assert_eq!(standard, ["/dev/null"; 3]);
            let ours = nix::unistd::getsid(None).unwrap();
            assert_ne!(session, ours.as_raw().cast_unsigned());
            assert_ne!(session, pid, "a leader could get a terminal");
        } else {
            assert!(standard[1].ends_with("/stdout"), "{standard:?}");
        }
        assert_eq!(
            fs::metadata(format!("/proc/{pid}/ns/net")).unwrap().ino(),
            fs::metadata(&path).unwrap().ino()
        );
        let same = |n: &str| (n.to_owned(), n.to_owned());
        assert_eq!(limit(pid, "Max open files"), same("200"));
        assert_eq!(limit(pid, "Max file size"), same("1000000"));
    }
}

/// A network namespace with a name, which goes with its owner.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("alveole-{}-{number}", std::process::id());
        output("ip", &["netns", "add", &name]);
        Self(name)
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    fn ip(&self, words: &str) {
        let words: Vec<_> = ["-n", &self.0]
            .into_iter()
            .chain(words.split(' '))
            .collect();
        output("ip", &words);
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status();
    }
}

#[test]
fn in_a_cgroup_of_its_own() {
    let Some(mut jail) = Jail::sleeping() else {
        return;
    };
    let (Some((version, pids)), Some((_, cpuset)), Some((_, memory))) = (
        controller("pids"),
        controller("cpuset"),
        controller("memory"),
    ) else {
        {
            skip("this host has no cgroups of pids, memory and cpuset");
            return;
        }
    };
    let parent = format!("alveole-test/{}", jail.id);
    let version_word = version.to_string();
    let most = if version == 1 {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    };
    let memory_word = format!("{most}=536870912");
    jail = jail.with(&[
        "--cgroup-version",
        &version_word,
        "--parent-cgroup",
        &parent,
        "--cgroup",
        "pids.max=50",
        "--cgroup",
        &memory_word,
        "--cgroup",
        "cpuset.cpus=0",
    ]);
    let path = format!("{parent}/{}", jail.id);
    let dirs = [&pids, &cpuset, &memory].map(|hierarchy| jail.cgroup(hierarchy, &path));
    let pid = jail.start("");
    for dir in &dirs {
        let inside = fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        // Beside it, workers of KVM for this machine, which run in the kernel only.
        let mut inside = inside.lines();
        assert!(inside.any(|line| line == pid.to_string()), "{dir:?}");
    }
    for (dir, file, value) in [
        (&dirs[0], "pids.max", "50"),
        (&dirs[1], "cpuset.cpus", "0"),
        (&dirs[2], most, "536870912"),
    ] {
        assert_eq!(fs::read_to_string(dir.join(file)).unwrap().trim(), value);
    }
    let status = proc(pid, "status");
    assert_eq!(fact(&status, "Cpus_allowed_list"), ["0"]);
    let memberships = proc(pid, "cgroup");
    assert!(memberships.contains(&path), "{memberships}");
}

/// Without --cgroup nothing is made, but version 2 goes into what somebody else has made.
#[test]
fn in_a_cgroup_of_somebody_elses() {
    let Some(jail) = Jail::sleeping() else { return };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let v2 = mounts
        .lines()
        .map(|l| l.split(' ').collect::<Vec<_>>())
        .find(|l| l[2] == "cgroup2");
    let Some(root) = v2.map(|line| PathBuf::from(line[1])) else {
        {
            skip("no cgroup2 is mounted");
            return;
        }
    };
    let name = format!("alveole-test-{}", jail.id);
    for there in [true, false] {
        let mut jail = Jail::sleeping().unwrap();
        jail = jail.with(&[
            "--cgroup-version",
            "2",
            "--parent-cgroup",
            &name,
            "--daemonize",
        ]);
        let dir = jail.cgroup(&root, &name);
        if there {
            fs::create_dir(&dir).unwrap();
        }
        let pid = jail.start("");
        assert_eq!(proc(pid, "cgroup").contains(&name), there);
        assert_eq!(dir.exists(), there);
    }
}

/// A machine that is described, started and changed through the API in the jail, with disks by their descriptors.
#[test]
fn the_api_is_in_the_jail() {
    let Some(jail) = Jail::new() else { return };
    fs::write(
        jail.root().join("kernel"),
        code::tiny_kernel(b"\xf4\xeb\xfd"),
    )
    .unwrap();
    let image = |name: &str, size: u64| {
        let path = jail.base.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path.display().to_string()
    };
    let metrics = jail.root().join("metrics");
    File::create(&metrics).unwrap();
    std::os::unix::fs::chown(&metrics, Some(UID), None).unwrap();
    let redirections = format!("7<>{} 8<>{}", image("one", 1 << 20), image("two", 2 << 20));
    let jail = jail
        .with(&["--daemonize", "--pass-fd", "7", "--pass-fd", "8"])
        .vmm(&["--console", "none"]);
    let status = jail.command(&redirections).status().unwrap();
    assert!(status.success(), "{}", jail.said());
    let pid = jail.pid();
    // As the jail sees it: from outside, its path may be longer than a socket's can be.
    let socket = PathBuf::from(format!("/proc/{pid}/root/run/firecracker.socket"));
    let mut client = api_client::Client::at(&socket);
    assert_eq!(fs::metadata(&socket).unwrap().uid(), UID);
    client.done(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": "/kernel"}),
    );
    let drive =
        |path: &str| json!({"drive_id": "a", "path_on_host": path, "is_root_device": false});
    client.done("PUT", "/drives/a", drive("/dev/fd/7"));
    client.done("PUT", "/metrics", json!({"metrics_path": "/metrics"}));
    client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    client.done("PUT", "/actions", json!({"action_type": "FlushMetrics"}));
    // The other one, the same again, one that is none, and back.
    let change = |path: &str| json!({"drive_id": "a", "path_on_host": path});
    client.done("PATCH", "/drives/a", change("/dev/fd/8"));
    client.done("PATCH", "/drives/a", change("/proc/self/fd/8"));
    let told = client.refused("PATCH", "/drives/a", change("/dev/fd/999"));
    assert!(told.contains("descriptor 999 is not open"), "{told}");
    let told = client.refused("PATCH", "/drives/a", change("/dev/vda"));
    assert!(told.contains("/dev/vda"), "{told}");
    client.done("PATCH", "/drives/a", change("/dev/fd/7"));
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    client.done("PATCH", "/vm", json!({"state": "Resumed"}));
    assert_eq!(client.get("/")["state"], "Running");
    // From the jailer's first instruction on.
    let lines = fs::read_to_string(&metrics).unwrap();
    let line: serde_json::Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    for name in ["process_startup_time_us", "process_startup_time_cpu_us"] {
        let us = line["api_server"][name].as_u64().unwrap();
        assert!((1..60_000_000).contains(&us), "{name}: {us}");
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    for thread in threads.map(|t| t.unwrap().path()) {
        let status = fs::read_to_string(thread.join("status")).unwrap();
        let confined = fact(&status, "Seccomp") == ["2"];
        let of_kvm = fact(&status, "Name").concat().starts_with("kvm-");
        assert!(confined || of_kvm, "{status}");
    }
}

/// What the guests here look for.
const LOOK: &str = "dmesg -n 1; ip link set eth0 up; ip addr add 10.77.0.2/24 dev eth0; \
    ping -c 1 -w 20 10.77.0.1 >/dev/null && echo network works; \
    dd if=/dev/vda bs=512 count=1 2>/dev/null | md5sum; echo root works";

/// A jail with a kernel and all it needs, but for disk and network.
#[track_caller]
fn guest() -> Option<(Jail, serde_json::Value)> {
    let jail = Jail::new()?;
    let vm = Vm::any()?;
    for (from, name) in [(vm.kernel_path(), "kernel"), (vm.initrd_path(), "initrd")] {
        fs::copy(from, jail.root().join(name)).unwrap();
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o444);
        fs::set_permissions(jail.root().join(name), all).unwrap();
    }
    let machine = json!({
        "boot-source": {
            "kernel_image_path": "/kernel",
            "initrd_path": "/initrd",
            "boot_args": vm.kernel_words(),
        },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 256 },
    });
    Some((jail, machine))
}

/// A disk to be the guest's root, which nobody but root may read, and which has no name any more once it is opened.
fn disk(jail: &Jail) -> Option<PathBuf> {
    let files = root_files(jail.base.path(), LOOK);
    let image = jail.base.path().join("root.ext4");
    if !ext4(&image, &files, 16) {
        return None;
    }
    let mine = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(&image, mine).unwrap();
    Some(image)
}

#[track_caller]
fn assert_boots(jail: &Jail) {
    let words = [
        "alveole-guest: ready",
        "network works",
        "root works",
        "powered off",
    ];
    jail.wait_until(
        BOOT_SECONDS,
        "guest that is ready, has a network and ends",
        || {
            let said = jail.said();
            words.iter().all(|word| said.contains(word))
        },
    );
}

/// In all namespaces and a cgroup, with a tap of the namespace by its name and a disk by its descriptor.
#[test]
fn a_guest_runs_in_the_jail() {
    let Some((mut jail, mut machine)) = guest() else {
        return;
    };
    let Some(image) = disk(&jail) else { return };
    let network = Namespace::new();
    network.ip(&format!(
        "tuntap add dev tap0 mode tap vnet_hdr user {UID} group {GID}"
    ));
    network.ip("addr add 10.77.0.1/24 dev tap0");
    network.ip("link set dev tap0 up");
    machine["drives"] = json!([{
        "drive_id": "root", "path_on_host": "/dev/fd/7", "is_root_device": true, "is_read_only": true,
    }]);
    machine["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "tap0" }]);
    jail.describe(&machine);
    jail = jail.with(&["--netns", &network.path(), "--new-pid-ns", "--pass-fd", "7"]);
    if let Some((version, pids)) = controller("pids") {
        let parent = format!("alveole-test-{}", jail.id);
        jail.cgroup(&pids, &format!("{parent}/{}", jail.id));
        jail = jail.with(&[
            "--cgroup-version",
            &version.to_string(),
            "--cgroup",
            "pids.max=40",
            "--parent-cgroup",
            &parent,
        ]);
    }
    let status = jail
        .command(&format!("7<>{}", image.display()))
        .status()
        .unwrap();
    assert!(status.success(), "{}", jail.said());
    fs::remove_file(&image).unwrap();
    assert_boots(&jail);
}

/// A block device over a file, which goes with its owner.
struct LoopDevice(String);

impl LoopDevice {
    /// None, with the skip told, on hosts that have no more of them.
    #[track_caller]
    fn new(file: &Path) -> Option<Self> {
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .unwrap();
        let name = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        if !made.status.success() {
            skip(&format!(
                "losetup: {}",
                String::from_utf8_lossy(&made.stderr)
            ));
            return None;
        }
        Some(Self(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// In the jailer's own process, with a block device and a tap by their descriptors: no node of a disk is in the jail, and
/// nothing of the network.
#[test]
fn a_guest_runs_on_descriptors_alone() {
    let Some((mut jail, mut machine)) = guest() else {
        return;
    };
    let Some(image) = disk(&jail) else { return };
    let Some(device) = LoopDevice::new(&image) else {
        return;
    };
    machine["drives"] = json!([{
        "drive_id": "root", "path_on_host": "/dev/fd/7", "is_root_device": true, "is_read_only": false,
    }]);
    machine["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": "8", "link": "fd" }]);
    jail.describe(&machine);
    jail = jail.with(&["--pass-fd", "7", "--pass-fd", "8"]);
    // Perl is in every Debian: an ioctl that no shell has. TUNSETIFF: a tap with virtio headers.
    let make_tap = "$^F = 20; open(T, '+<', '/dev/net/tun') or die; \
        $r = pack('Z16sx22', 'tap0', 0x5002); ioctl(T, 0x400454ca, $r) or die $!; \
        system('ip addr add 10.77.0.1/24 dev tap0; ip link set dev tap0 up') == 0 or die; \
        require POSIX; POSIX::dup2(fileno(T), 8); exec @ARGV";
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let jailer = jail.command(&format!("7<>{}", device.0));
    let mut command = Command::new("perl");
    command
        .args(["-e", make_tap])
        .arg(jailer.get_program())
        .args(jailer.get_args())
        .stdin(Stdio::null())
        .stdout(File::create(jail.said_path()).unwrap())
        .stderr(File::create(jail.errors_path()).unwrap());
    let mut child = command.spawn().unwrap();
    let mut code = None;
    jail.wait_until(BOOT_SECONDS, "end", || {
        code = child.try_wait().unwrap().map(|status| status.code());
        code.is_some()
    });
    assert_eq!(code.unwrap(), Some(0), "{}", jail.said());
    assert_boots(&jail);
}
