//! What cannot be is refused with words, and leaves nothing behind: neither folders nor cgroups nor processes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod cgroups;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cgroups::controller;
use tempfile::TempDir;

/// The jailer stands in for the program as well: it is static, and it ends at once when it is started in a jail, since
/// its own command line is another one.
const JAILER: &str = env!("CARGO_BIN_EXE_alveole-jailer");
/// What it says then.
const STARTED: &str = "unknown option --start-time-us";
const NOBODY: u32 = 65534;
/// Nothing here takes longer, even in the lab.
const PATIENCE: Duration = Duration::from_secs(60);

/// Says that `test` is skipped, where people and tools look.
fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().append(true).create(true).open(path);
        log.unwrap().write_all(line.as_bytes()).unwrap();
    }
}

fn no_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "jails are made by root");
    }
    !root
}

/// A folder for jails.
struct Bench {
    base: TempDir,
}

/// How the jailer ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    said: String,
}

impl Bench {
    fn new() -> Self {
        Self {
            // Not /tmp, where many hosts allow no devices.
            base: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.base.path().join(path)
    }

    /// A jail's root.
    fn root(&self, id: &str) -> PathBuf {
        self.at("alveole-jailer").join(id).join("root")
    }

    fn words(&self, more: &[&str]) -> Vec<String> {
        let base = self.base.path().to_str().unwrap();
        let mut words = vec!["--chroot-base-dir", base];
        for (name, value) in [
            ("--id", "vm"),
            ("--exec-file", JAILER),
            ("--uid", "7"),
            ("--gid", "7"),
        ] {
            if !more.contains(&name) {
                words.extend([name, value]);
            }
        }
        words.extend(more);
        words.into_iter().map(str::to_owned).collect()
    }

    fn run(&self, more: &[&str]) -> Ended {
        run(Command::new(JAILER).args(self.words(more)))
    }

    /// Everything below the folder.
    fn listing(&self) -> BTreeSet<PathBuf> {
        let mut all = BTreeSet::new();
        let mut folders = vec![self.base.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                }
                all.insert(entry.path());
            }
        }
        all
    }

    /// That it is refused with these words, and that nothing is left.
    #[track_caller]
    fn refuses(&self, more: &[&str], words: &[&str]) {
        let before = self.listing();
        let ended = self.run(more);
        ended.assert_refused(words);
        assert_eq!(
            self.listing(),
            before,
            "{more:?}: something is left: {ended:?}"
        );
    }
}

impl Ended {
    #[track_caller]
    fn assert_refused(&self, words: &[&str]) {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert!(!self.said.contains(STARTED), "{self:?}");
        assert_eq!(self.said.lines().count(), 1, "{self:?}");
        for word in words {
            assert!(self.said.contains(word), "does not say {word:?}: {self:?}");
        }
    }
}

/// Runs a command to its end, within patience.
#[track_caller]
fn run(command: &mut Command) -> Ended {
    let errors = tempfile::NamedTempFile::new().unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors.reopen().unwrap())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > until {
            child.kill().unwrap();
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ended {
        code: child.wait().unwrap().code(),
        said: fs::read_to_string(errors.path()).unwrap(),
    }
}

#[test]
fn it_starts_what_stands_in_for_a_program() {
    if no_root("it_starts_what_stands_in_for_a_program") {
        return;
    }
    let bench = Bench::new();
    let ended = bench.run(&[]);
    assert!(ended.said.contains(STARTED), "{ended:?}");
    assert!(bench.root("vm").join("dev/kvm").exists());
    // Whoever waits for the jailer alone is told that it was started, and not what came of it.
    for (id, word) in [("a", "--daemonize"), ("b", "--new-pid-ns")] {
        let ended = bench.run(&["--id", id, word]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(bench.root(id).join("alveole-jailer.pid").exists());
    }
}

/// As where a container's program is started by its host: the session's leader has no number in there.
#[test]
fn its_session_began_outside_of_its_process_namespace() {
    if no_root("its_session_began_outside_of_its_process_namespace") {
        return;
    }
    let bench = Bench::new();
    let ended = run(Command::new("unshare")
        .args(["--pid", "--fork", JAILER])
        .args(bench.words(&["--new-pid-ns"])));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(bench.root("vm").join("alveole-jailer.pid").exists());
}

#[test]
fn names_that_lead_elsewhere() {
    let bench = Bench::new();
    let long = "a".repeat(300);
    bench.refuses(&["--id", &long], &[&long, "1 to 64 letters"]);
    for id in ["../../../etc", "..", ".", "", "a/b", "a\n", "-/"] {
        bench.refuses(
            &[&format!("--id={id}")],
            &["--id", "letters, digits and hyphens"],
        );
    }
    for parent in ["../up", "/top", "a/../../b", ""] {
        bench.refuses(
            &[&format!("--parent-cgroup={parent}")],
            &["--parent-cgroup", "below the hierarchy's root"],
        );
    }
}

#[test]
fn programs_that_cannot_be_jailed() {
    let bench = Bench::new();
    let programs = Bench::new();
    let at = |name: &str| programs.at(name).to_str().unwrap().to_owned();
    symlink("nowhere", at("dangling")).unwrap();
    symlink("turning", at("turning")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    Command::new("mkfifo").arg(at("fifo")).status().unwrap();
    fs::write(at("script"), "#!/bin/sh\n").unwrap();
    fs::write(at("text"), "nothing").unwrap();
    for name in ["script", "text"] {
        fs::set_permissions(at(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(at("data"), "nothing").unwrap();
    for (name, words) in [
        ("missing", &["No such file", "is the path right?"][..]),
        ("dangling", &["No such file"]),
        ("turning", &["symbolic links"]),
        ("folder", &["it is not a file"]),
        ("fifo", &["it is not a file"]),
        ("data", &["chmod u+x"]),
        ("text", &["no ELF program", "such as alveole-vmm"]),
    ] {
        bench.refuses(&["--exec-file", &at(name)], words);
        bench.refuses(&["--exec-file", &at(name)], &[&at(name)]);
    }
    bench.refuses(
        &["--exec-file", ""],
        &["--exec-file \"\"", "expected a path"],
    );
    bench.refuses(&["--exec-file", "/dev/null"], &["it is not a file"]);
    if no_root("programs_that_cannot_be_jailed") {
        return;
    }
    let words = [
        "\"/bin/sh\", which is not in the jail",
        "give a static program",
    ];
    bench.refuses(&["--exec-file", &at("script")], &words);
}

/// What is found out by starting it, when there are no rights left.
#[test]
fn a_program_that_does_not_start() {
    if no_root("a_program_that_does_not_start") {
        return;
    }
    let bench = Bench::new();
    let programs = Bench::new();
    let script = programs.at("script");
    fs::write(&script, "#!/interpreter\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let root = bench.at("script/vm/root");
    fs::create_dir_all(&root).unwrap();
    // It is there, but nobody may execute it.
    fs::write(root.join("interpreter"), "").unwrap();
    let words = ["--exec-file", script.to_str().unwrap()];
    for more in [
        &["--daemonize"][..],
        &["--new-pid-ns"],
        &["--daemonize", "--new-pid-ns"],
    ] {
        // There is another process, which still may.
        let said = ["start \"/script\"", "Permission denied"];
        bench.refuses(&[&words[..], more].concat(), &said);
    }
    // What is in the jail's own folders it still may remove.
    bench.refuses(&words, &["start \"/script\"", "Permission denied"]);
    let Some((version, root)) = controller("pids") else {
        return;
    };
    let parent = format!("alveole-test-start-{}", std::process::id());
    let version = version.to_string();
    let cgroup = [
        "--cgroup-version",
        &version,
        "--parent-cgroup",
        &parent,
        "--cgroup",
        "pids.max=9",
    ];
    let ended = bench.run(&[&words[..], &cgroup].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let dir = root.join(parent);
    for word in [
        "start \"/script\"",
        "remove it by hand",
        dir.to_str().unwrap(),
    ] {
        assert!(ended.said.contains(word), "{ended:?}");
    }
    assert_eq!(ended.said.lines().count(), 2, "{ended:?}");
    fs::remove_dir(dir.join("vm")).unwrap();
    fs::remove_dir(dir).unwrap();
}

/// The jail is called after what a link leads to, as with Firecracker's.
#[test]
fn a_link_to_a_program() {
    if no_root("a_link_to_a_program") {
        return;
    }
    let bench = Bench::new();
    let link = bench.at("link");
    symlink(JAILER, &link).unwrap();
    let ended = bench.run(&["--exec-file", link.to_str().unwrap()]);
    assert!(ended.said.contains(STARTED), "{ended:?}");
    let copy = fs::symlink_metadata(bench.root("vm").join("alveole-jailer")).unwrap();
    assert!(copy.is_file());
    assert_eq!(copy.len(), fs::metadata(JAILER).unwrap().len());
}

#[test]
fn places_where_no_jail_can_be() {
    let bench = Bench::new();
    fs::write(bench.at("file"), "").unwrap();
    let at = |name: &str| bench.at(name).to_str().unwrap().to_owned();
    let run = |base: &str| {
        let words = [
            "--id",
            "vm",
            "--exec-file",
            JAILER,
            "--uid",
            "7",
            "--gid",
            "7",
        ];
        run(Command::new(JAILER)
            .args(words)
            .args(["--chroot-base-dir", base]))
    };
    let missing = at("missing");
    let cure = format!("mkdir -p {missing}");
    run(&missing).assert_refused(&[&missing, "No such file", &cure]);
    run(&at("file")).assert_refused(&["it is not a folder"]);
    if no_root("places_where_no_jail_can_be") {
        return;
    }
    // A folder where devices are dead, in mounts of its own.
    fs::create_dir(bench.at("mounted")).unwrap();
    for flag in ["nodev", "noexec"] {
        let script = format!("mount -t tmpfs -o {flag} none \"$1\" && shift && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &script, "sh", &at("mounted"), JAILER]);
        command.args(["--chroot-base-dir", &at("mounted"), "--id", "vm"]);
        command.args(["--exec-file", JAILER, "--uid", "7", "--gid", "7"]);
        let ended = self::run(&mut command);
        ended.assert_refused(&[&format!("is mounted {flag}"), "another --chroot-base-dir"]);
    }
}

#[test]
fn jails_that_are_there_already() {
    if no_root("jails_that_are_there_already") {
        return;
    }
    let bench = Bench::new();
    let ended = bench.run(&[]);
    assert!(ended.said.contains(STARTED), "{ended:?}");
    let used = bench.at("alveole-jailer/vm");
    bench.refuses(
        &[],
        &[
            "used before, or is in use",
            "alveole-jailer, alveole-jailer.pid, dev/kvm, dev/net/tun",
            "another --id",
            used.to_str().unwrap(),
        ],
    );
    // What somebody has prepared stays, whatever comes of the start.
    fs::create_dir_all(bench.root("prepared").join("dev")).unwrap();
    fs::write(bench.root("prepared").join("kernel"), "").unwrap();
    bench.refuses(&["--id", "prepared", "--pass-fd", "99"], &[]);
    bench.refuses(
        &[
            "--id",
            "prepared",
            "--resource-limit",
            "no-file=18446744073709551615",
        ],
        &[],
    );
    assert!(bench.run(&["--id", "prepared"]).said.contains(STARTED));
    assert!(bench.root("prepared").join("kernel").exists());

    // A link anywhere on the way would have root write where somebody else says.
    let elsewhere = Bench::new();
    let target = elsewhere.base.path();
    symlink(target, bench.at("alveole-jailer/link")).unwrap();
    bench.refuses(&["--id", "link"], &["it exists, and is a link or a file"]);
    fs::create_dir(bench.at("alveole-jailer/link2")).unwrap();
    symlink(target, bench.root("link2")).unwrap();
    bench.refuses(&["--id", "link2"], &["it exists, and is a link or a file"]);
    for (id, name) in [("l3", "dev"), ("l4", "run"), ("l5", "dev/net")] {
        fs::create_dir_all(bench.root(id).join(name).parent().unwrap()).unwrap();
        symlink(target, bench.root(id).join(name)).unwrap();
        bench.refuses(&["--id", id], &["is a link or a file"]);
    }
    for (id, name) in [("l6", "alveole-jailer"), ("l7", "alveole-jailer.pid")] {
        fs::create_dir_all(bench.root(id)).unwrap();
        symlink(target.join("file"), bench.root(id).join(name)).unwrap();
        bench.refuses(&["--id", id], &["it has been used before", name]);
    }
    fs::write(bench.at("alveole-jailer/file"), "").unwrap();
    bench.refuses(&["--id", "file"], &["it exists, and is a link or a file"]);
    assert_eq!(fs::read_dir(target).unwrap().count(), 0);
}

/// Whoever loses takes nothing from who wins.
#[test]
fn one_of_many_gets_a_jail() {
    if no_root("one_of_many_gets_a_jail") {
        return;
    }
    let bench = Bench::new();
    for round in 0..5 {
        let id = format!("round-{round}");
        let ended: Vec<_> = std::thread::scope(|scope| {
            let start = |_| scope.spawn(|| bench.run(&["--id", &id, "--daemonize"]));
            let started: Vec<_> = (0..8).map(start).collect();
            started.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let won = ended.iter().filter(|e| e.code == Some(0)).count();
        assert_eq!(won, 1, "{ended:?}");
        for lost in ended.iter().filter(|e| e.code != Some(0)) {
            lost.assert_refused(&["cannot", bench.root(&id).to_str().unwrap()]);
        }
        for name in ["alveole-jailer", "alveole-jailer.pid", "dev/kvm", "run"] {
            assert!(bench.root(&id).join(name).exists(), "{name}");
        }
    }
}

#[test]
fn namespaces_that_are_none() {
    let bench = Bench::new();
    let others = Bench::new();
    let fifo = others.at("fifo");
    Command::new("mkfifo").arg(&fifo).status().unwrap();
    for (path, words) in [
        (
            "/run/netns/nobody-has-made-it",
            &["No such file", "ip netns add"][..],
        ),
        ("/etc/passwd", &["Invalid argument", "/run/netns/NAME"]),
        (fifo.to_str().unwrap(), &["Invalid argument"]),
        ("/proc/self/ns/uts", &[]),
        ("/proc/self/ns", &[]),
    ] {
        bench.refuses(&["--netns", path], words);
        bench.refuses(&["--netns", path], &["--netns", path]);
    }
}

#[test]
fn numbers_beyond_their_edges() {
    let bench = Bench::new();
    bench.refuses(
        &["--uid", "4294967295"],
        &["--uid 4294967295", "stands for no user"],
    );
    bench.refuses(&["--gid", "4294967296"], &["--gid \"4294967296\""]);
    bench.refuses(
        &["--resource-limit", "no-file=18446744073709551616"],
        &["no-file"],
    );
    bench.refuses(
        &["--pass-fd", "99"],
        &["descriptor 99", "start the jailer with it", "99<>FILE"],
    );
    bench.refuses(&["--pass-fd", "2147483647"], &["descriptor 2147483647"]);
    bench.refuses(&["--cgroup-version", "3"], &["expected 1 or 2"]);
    if no_root("numbers_beyond_their_edges") {
        return;
    }
    // The last step but one, in whatever process that is.
    for words in [
        &["--resource-limit", "no-file=18446744073709551615"][..],
        &["--resource-limit", "no-file=18446744073709551614"],
    ] {
        for more in [
            &[][..],
            &["--daemonize"],
            &["--new-pid-ns"],
            &["--daemonize", "--new-pid-ns"],
        ] {
            bench.refuses(
                &[words, more].concat(),
                &["no-file=", "/proc/sys/fs/nr_open"],
            );
        }
    }
    // The smallest are for the program to complain of.
    for (id, limit) in [
        ("f0", "no-file=0"),
        ("f3", "no-file=3"),
        ("s0", "fsize=0"),
        ("s", "fsize=18446744073709551615"),
    ] {
        let ended = bench.run(&["--id", id, "--resource-limit", limit, "--daemonize"]);
        assert_eq!(ended.code, Some(0), "{limit}: {ended:?}");
        assert!(
            !fs::read_to_string(bench.root(id).join("alveole-jailer.pid"))
                .unwrap()
                .is_empty()
        );
    }
}

#[test]
fn cgroups_that_cannot_be() {
    let bench = Bench::new();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let words = ["\"frobnicator\" is missing", "--cgroup frobnicator.max=1"];
    bench.refuses(&["--cgroup", "frobnicator.max=1"], &words);
    if mounts
        .lines()
        .any(|l| l.split(' ').nth(2) == Some("cgroup2"))
    {
        bench.refuses(
            &["--cgroup-version", "2", "--cgroup", "frobnicator.max=1"],
            &words,
        );
    }
    let Some((version, root)) = controller("pids") else {
        return skip(
            "cgroups_that_cannot_be",
            "this host has no cgroup controller pids",
        );
    };
    if no_root("cgroups_that_cannot_be") {
        return;
    }
    let version = version.to_string();
    let parent = format!("alveole-test-{}/a", std::process::id());
    let dir = root.join(&parent);
    let top = dir.parent().unwrap();
    let common = [
        "--cgroup-version",
        &version,
        "--parent-cgroup",
        &parent,
        "--cgroup",
    ];
    let with = |more: &[&'static str]| [&common[..], more].concat();
    // The file is not there; it does not take that; the last steps fail, in whatever process.
    bench.refuses(
        &with(&["pids.most=5"]),
        &["pids.most", "check the file's name"],
    );
    assert!(!top.exists(), "a cgroup is left");
    bench.refuses(&with(&["pids.max=many"]), &["\"many\"", "pids.max"]);
    assert!(!top.exists(), "a cgroup is left");
    for more in [
        &[][..],
        &["--daemonize"],
        &["--new-pid-ns"],
        &["--daemonize", "--new-pid-ns"],
    ] {
        let limit = [
            "pids.max=50",
            "--resource-limit",
            "no-file=18446744073709551615",
        ];
        bench.refuses(&[&with(&limit)[..], more].concat(), &["no-file"]);
        assert!(!top.exists(), "a cgroup is left after {more:?}");
    }
    // One that was there before stays.
    fs::create_dir(top).unwrap();
    bench.refuses(&with(&["pids.max=many"]), &[]);
    assert!(top.exists() && !dir.exists());
    fs::remove_dir(top).unwrap();
}

/// Version 2 has no processes where it gives controllers to cgroups below.
#[test]
fn a_cgroup_that_takes_no_process() {
    let test = "a_cgroup_that_takes_no_process";
    let Some((2, root)) = controller("memory") else {
        return skip(test, "memory is not controlled by cgroup version 2 here");
    };
    if no_root(test) {
        return;
    }
    let bench = Bench::new();
    let parent = format!("alveole-test-full-{}", std::process::id());
    let dir = root.join(&parent);
    fs::create_dir(&dir).unwrap();
    for folder in [&root, &dir] {
        fs::write(folder.join("cgroup.subtree_control"), "+memory").unwrap();
    }
    let words = ["--cgroup-version", "2", "--parent-cgroup", &parent];
    bench.refuses(
        &words,
        &["move into cgroup", &parent, "busy", "give --cgroup"],
    );
    fs::remove_dir(dir).unwrap();
}

#[test]
fn without_roots_rights() {
    if no_root("without_roots_rights") {
        return;
    }
    // Somewhere that others can reach, and write to.
    let base = tempfile::tempdir().unwrap();
    let programs = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(programs.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let jailer = programs.path().join("jailer");
    // Not by this process: a descriptor for writing that another test's child has would keep it from being started.
    let copied = Command::new("cp").arg(JAILER).arg(&jailer).status();
    assert!(copied.unwrap().success());
    fs::set_permissions(&jailer, fs::Permissions::from_mode(0o755)).unwrap();
    for more in [&[][..], &["--daemonize"], &["--netns", "/proc/self/ns/net"]] {
        let mut command = Command::new(&jailer);
        command
            .arg("--chroot-base-dir")
            .arg(base.path())
            .arg("--exec-file")
            .arg(&jailer);
        command
            .args(["--id", "vm", "--uid", "7", "--gid", "7"])
            .args(more);
        run(command.uid(NOBODY).gid(NOBODY)).assert_refused(&["as root"]);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }
}
