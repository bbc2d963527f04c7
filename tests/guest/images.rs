//! `alveole run IMAGE` and the commands about what it started, as people type them.

#[path = "watched.rs"]
mod watched;

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use tempfile::TempDir;

use crate::harness::images::{path, root_files, tool};
use crate::harness::{NOBODY, Vm, is_root, kvm_is_open_to_all, patience, skip};

/// A user's home with a kernel and a root disk.
pub(crate) struct Home {
    pub(crate) dir: TempDir,
    pub(crate) root: PathBuf,
    pub(crate) files: PathBuf,
    programs: PathBuf,
    /// The user has no rights.
    by_nobody: bool,
}

impl Home {
    #[track_caller]
    pub(crate) fn new() -> Option<Self> {
        let vm = Vm::any()?;
        let dir = TempDir::new().unwrap();
        let files = root_files(dir.path(), "");
        fs::create_dir_all(files.join("etc")).unwrap();
        fs::write(
            files.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nweb:x:33:44::/:/bin/sh\n",
        )
        .unwrap();
        let root = dir.path().join("root.erofs");
        if !tool(
            "mkfs.erofs",
            &["-Enoinline_data", path(&root), path(&files)],
        ) {
            return None;
        }
        let monitor = Path::new(env!("CARGO_BIN_EXE_alveole-vmm"));
        let home = Self {
            dir,
            root,
            files,
            programs: monitor.parent().unwrap().into(),
            by_nobody: false,
        };
        let kernel = vm.kernel_path();
        let tree = fs::read_dir(kernel.with_file_name("lib/modules"));
        let tree = tree.into_iter().flatten().flatten().next();
        let mut words = vec!["kernel", "add", "--name", "test", path(kernel)];
        let tree = tree.map(|entry| entry.path());
        if let Some(tree) = &tree {
            words.extend(["--modules", path(tree)]);
        }
        home.does(&words);
        Some(home)
    }

    /// The same, of a user without rights; nothing, with the skip told, where such a one has no guests.
    #[track_caller]
    pub(crate) fn of_nobody() -> Option<Self> {
        if !kvm_is_open_to_all() {
            skip("/dev/kvm is not open to an unprivileged user here");
            return None;
        }
        let mut home = Self::new()?;
        if !is_root() {
            return Some(home);
        }
        home.copy_programs();
        assert!(tool("chown", &["-R", "65534:65534", path(home.dir.path())]));
        home.by_nobody = true;
        Some(home)
    }

    /// Has programs of its own, which its user can reach. They are copied by a process of its own: a program that is open for writing
    /// cannot be run.
    fn copy_programs(&mut self) {
        let programs = self.dir.path().join("programs");
        fs::create_dir(&programs).unwrap();
        for name in ["alveole", "alveole-vmm", "alveole-agent"] {
            assert!(tool(
                "cp",
                &[path(&self.programs.join(name)), path(&programs)]
            ));
        }
        self.programs = programs;
    }

    /// Guests have an agent without what helps who looks for faults in it, as one that is installed: it is most of a small guest's memory.
    /// False, with the skip told, where there is no `strip`.
    #[track_caller]
    pub(crate) fn strip_agent(&mut self) -> bool {
        if !self.programs.starts_with(self.dir.path()) {
            self.copy_programs();
        }
        tool("strip", &[path(&self.programs.join("alveole-agent"))])
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("alveole"));
        command
            .args(words)
            .env("ALVEOLE_HOME", self.dir.path().join("home"));
        if self.by_nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What a command that succeeds prints.
    #[track_caller]
    pub(crate) fn does(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout)
            .unwrap()
            .trim_end()
            .to_owned()
    }

    /// Words of a run of this root without network.
    pub(crate) fn run<'a>(&'a self, before: &[&'a str], after: &[&'a str]) -> Vec<&'a str> {
        let mut words = vec!["run", "--net", "none"];
        words.extend(before);
        words.push(path(&self.root));
        words.extend(after);
        words
    }

    /// Imports the home's files as a docker archive with one layer; `config`: what it says of its process.
    #[track_caller]
    pub(crate) fn import_as_docker(&self, name: &str, config: &serde_json::Value) {
        let made = self.dir.path().join("made");
        fs::create_dir(&made).unwrap();
        let layer = made.join("layer.tar");
        let (files, to) = (path(&self.files), path(&layer));
        assert!(tool(
            "tar",
            &["--owner=0", "--group=0", "-C", files, "-cf", to, "."]
        ));
        let digest = crate::harness::images::sum(&layer);
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
            "config": config,
        });
        fs::write(made.join("config.json"), config.to_string()).unwrap();
        let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
        fs::write(made.join("manifest.json"), manifest.to_string()).unwrap();
        let archive = self.dir.path().join("made.tar");
        let members = ["manifest.json", "config.json", "layer.tar"];
        let words = [&["-C", path(&made), "-cf", path(&archive)], &members[..]].concat();
        assert!(tool("tar", &words));
        self.does(&["image", "import", path(&archive)]);
    }

    #[track_caller]
    pub(crate) fn wait_until(&self, seconds: u64, what: &str, mut so: impl FnMut() -> bool) {
        let until = Instant::now() + patience(seconds);
        while !so() {
            assert!(
                Instant::now() < until,
                "no {what}; ps: {}",
                self.does(&["ps", "-a"])
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    pub(crate) fn state(&self, name: &str) -> String {
        let json: serde_json::Value = serde_json::from_str(&self.does(&["inspect", name])).unwrap();
        json[0]["state"].as_str().unwrap().to_owned()
    }
}

/// Whatever a test leaves running ends with it.
impl Drop for Home {
    fn drop(&mut self) {
        let left = self.output(&["ps", "-aq"]).stdout;
        let left = String::from_utf8(left).unwrap_or_default();
        let ids: Vec<_> = left.split_whitespace().collect();
        if !ids.is_empty() {
            self.output(&[&["rm", "-f"], ids.as_slice()].concat());
        }
    }
}

#[test]
fn exit_statuses_and_streams_are_the_processes_own() {
    let Some(home) = Home::new() else { return };
    let run = |before: &[&str], after: &[&str]| {
        let before = [&["--rm"], before].concat();
        let output = home.output(&home.run(&before, after));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    assert_eq!(
        run(&[], &["echo", "hello"]),
        (0, "hello\n".into(), String::new())
    );
    let script = "echo out; echo err >&2; exit 7";
    assert_eq!(
        run(&[], &["sh", "-c", script]),
        (7, "out\n".into(), "err\n".into())
    );
    assert_eq!(run(&[], &["sh", "-c", "kill -9 $$"]).0, 137);
    let (status, _, errors) = run(&[], &["no-such-program"]);
    assert!(
        status == 127 && errors.contains("no-such-program"),
        "{status} {errors}"
    );
    let (status, _, errors) = run(&[], &["/etc/passwd"]);
    assert!(
        status == 126 && errors.contains("/etc/passwd"),
        "{status} {errors}"
    );
    let words = [
        "-e",
        "A=1 2",
        "-w",
        "/made/here",
        "-u",
        "web",
        "--hostname",
        "web1",
    ];
    let (status, output, errors) = run(&words, &["sh", "-c", "echo $A; pwd; id -u; hostname"]);
    assert_eq!(
        (status, &*output),
        (0, "1 2\n/made/here\n33\nweb1\n"),
        "{errors}"
    );
    let (status, _, errors) = run(&["--read-only"], &["sh", "-c", "echo x >/x"]);
    assert!(status != 0 && errors.contains("Read-only"), "{errors}");
    // Nothing of all these is left.
    assert_eq!(home.does(&["ps", "-aq"]), "");
}

/// An image as its maker describes it, imported and run by a user without rights.
#[test]
fn an_image_is_run_as_it_says() {
    let Some(home) = Home::of_nobody() else {
        return;
    };
    let config = serde_json::json!({
        "Entrypoint": ["/bin/sh", "-c", "trap 'echo told; exit 4' USR1; echo $0 $1 $A; pwd; id -u; while test \"$1\" = wait; do sleep 0.05; done"],
        "Cmd": ["zero", "one"], "Env": ["A=image", "PATH=/bin"], "User": "web", "WorkingDir": "/mnt",
        "StopSignal": "SIGUSR1",
    });
    home.import_as_docker("web:1", &config);
    let run = |before: &[&str], after: &[&str]| {
        let words = [&["run", "--rm", "--net", "none"], before, &["web:1"], after].concat();
        home.does(&words)
    };
    assert_eq!(run(&[], &[]), "zero one image\n/mnt\n33");
    assert_eq!(
        run(&["-e", "A=mine"], &["null", "eins"]),
        "null eins mine\n/mnt\n33"
    );
    assert_eq!(
        run(&["--entrypoint", "/bin/echo", "-u", "0"], &["all", "else"]),
        "all else"
    );
    // Its own signal asks it to end, and its disk stays as long as a VM is there.
    let id = home.does(&["run", "-d", "--net", "none", "web:1", "x", "wait"]);
    home.wait_until(20, "output", || home.does(&["logs", &id]).contains("33"));
    home.does(&["stop", &id]);
    assert_eq!(home.does(&["wait", &id]), "4");
    home.does(&["image", "rm", "web:1"]);
    home.does(&["image", "prune"]);
    home.does(&["start", &id]);
    assert!(
        home.does(&["exec", &id, "cat", "/etc/passwd"])
            .contains("web")
    );
    let gone = home.output(&["run", "--rm", "localhost:1/web:1"]);
    assert_eq!(gone.status.code(), Some(125));
    home.does(&["rm", "-f", &id]);
}

#[test]
fn input_reaches_its_process_whole() {
    let Some(home) = Home::new() else { return };
    let content = "0123456789abcdef".repeat(100_000);
    let file = home.dir.path().join("input");
    fs::write(&file, &content).unwrap();
    let output = home
        .command(&home.run(&["--rm", "-i"], &["cat"]))
        .stdin(fs::File::open(&file).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        output.stdout == content.as_bytes(),
        "{} bytes",
        output.stdout.len()
    );
}

#[test]
fn a_vm_is_looked_after() {
    let Some(home) = Home::new() else { return };
    let script = "trap 'echo asked; exit 3' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done";
    let id = home.does(&home.run(
        &["-d", "--name", "web", "--label", "a=b"],
        &["sh", "-c", script],
    ));
    assert_eq!(home.state("web"), "running");
    assert!(home.does(&["ps"]).contains(&id));
    // Names and ids.
    let taken = home.output(&home.run(&["-d", "--name", "web"], &["true"]));
    assert_eq!(taken.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&taken.stderr).contains("already"));
    assert_eq!(home.does(&["exec", &id[..6], "hostname"]), "web");
    let refused = home.output(&["rm", "web"]);
    assert!(
        !refused.status.success()
            && String::from_utf8_lossy(&refused.stderr).contains("alveole stop web")
    );
    // A further process has what the first has.
    assert_eq!(
        home.output(&["exec", "web", "sh", "-c", "exit 5"])
            .status
            .code(),
        Some(5)
    );
    let echoed = home
        .command(&["exec", "-i", "web", "cat"])
        .stdin(fs::File::open(&home.root).unwrap())
        .output()
        .unwrap();
    assert!(
        echoed.stdout == fs::read(&home.root).unwrap(),
        "{} bytes",
        echoed.stdout.len()
    );
    home.does(&["exec", "web", "sh", "-c", "echo kept >/kept"]);
    home.wait_until(20, "line", || {
        home.does(&["logs", "web"]).contains("line 3\n")
    });
    let timed = home.does(&["logs", "--timestamps", "web"]);
    assert!(
        timed.lines().next().unwrap().ends_with("Z line 0"),
        "{timed}"
    );
    assert_eq!(
        home.does(&["logs", "--since", "2100-01-01T00:00:00Z", "web"]),
        ""
    );
    let stats = home.does(&["stats", "--no-stream", "--format", "json", "web"]);
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    let line = &stats[0];
    let number = |name: &str| {
        line[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {line}"))
    };
    assert_eq!(line["name"], "web");
    assert!(
        number("guest_memory_bytes") > f64::from(100 << 20),
        "{line}"
    );
    assert!(number("guest_memory_used_bytes") < number("guest_memory_bytes"));
    assert!(
        number("pss_bytes") > f64::from(1 << 20) && number("tasks") > 2.0,
        "{line}"
    );
    assert!(
        number("cpu_guest_percent") + number("cpu_monitor_percent") < 200.0,
        "{line}"
    );
    assert!(home.does(&["stats", "--no-stream"]).contains("web "));
    // It is asked, and its own status is what remains.
    assert_eq!(home.does(&["stop", "web"]), "web");
    assert_eq!(home.does(&["wait", "web"]), "3");
    assert!(home.does(&["logs", "web"]).ends_with("asked"));
    assert_eq!(home.does(&["ps", "-q"]), "");
    let stopped = home.output(&["exec", "web", "true"]);
    assert!(String::from_utf8_lossy(&stopped.stderr).contains("alveole start web"));
    // What it wrote is there again.
    home.does(&["start", "web"]);
    assert_eq!(home.does(&["exec", "web", "cat", "/kept"]), "kept");
    home.does(&["kill", "web"]);
    assert_eq!(home.does(&["wait", "web"]), "137");
    let taken = home.does(&["system", "df", "--format", "json"]);
    let taken: serde_json::Value = serde_json::from_str(&taken).unwrap();
    let vms = taken
        .as_array()
        .unwrap()
        .iter()
        .find(|k| k["kind"] == "VMs")
        .unwrap();
    assert!(
        vms["count"] == 1 && vms["unused_bytes"].as_u64().unwrap() > 1 << 16,
        "{taken}"
    );
    home.does(&["rename", "web", "other"]);
    assert!(!home.output(&["inspect", "web"]).status.success());
    assert!(home.does(&["system", "prune"]).contains("removed VM other"));
    assert_eq!(home.does(&["ps", "-aq"]), "");
}

#[test]
fn files_are_copied_in_and_out() {
    let Some(home) = Home::new() else { return };
    home.does(&home.run(&["-d", "--name", "box"], &["sleep", "1000"]));
    let at = |name: &str| home.dir.path().join(name).display().to_string();
    let tree = at("tree");
    fs::create_dir_all(format!("{tree}/sub")).unwrap();
    fs::write(format!("{tree}/sub/file"), "content").unwrap();
    std::os::unix::fs::symlink("sub/file", format!("{tree}/link")).unwrap();
    let sparse = fs::File::create(format!("{tree}/sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    home.does(&["cp", &tree, "box:/mnt"]);
    assert_eq!(
        home.does(&["exec", "box", "cat", "/mnt/tree/sub/file"]),
        "content"
    );
    // Another name, where there is no such folder, and what is in a folder.
    home.does(&["cp", &tree, "box:/mnt/other"]);
    home.does(&["cp", &format!("{tree}/."), "box:/tmp"]);
    let listed = home.does(&[
        "exec",
        "box",
        "sh",
        "-c",
        "cat /mnt/other/link; ls /tmp | tr '\\n' ' '; stat -c %u /tmp/link",
    ]);
    assert_eq!(listed, "contentlink sparse sub 0");
    home.does(&["exec", "box", "sh", "-c", "chmod 6755 /mnt/other/sub/file"]);
    home.does(&["cp", "box:/mnt/other", &at("back")]);
    let back = fs::metadata(at("back/sub/file")).unwrap();
    assert_eq!(fs::read_to_string(at("back/link")).unwrap(), "content");
    let mode = std::os::unix::fs::PermissionsExt::mode(&back.permissions());
    assert_eq!(mode & 0o7777, 0o755, "a guest gives no rights here");
    let sparse = fs::metadata(at("back/sparse")).unwrap();
    assert_eq!(sparse.len(), 1 << 30);
    assert!(std::os::unix::fs::MetadataExt::blocks(&sparse) < 1000);
    home.does(&["cp", "-L", "box:/mnt/other/link", &at("one")]);
    assert_eq!(fs::read_to_string(at("one")).unwrap(), "content");
    for (words, said) in [
        ([&at("nothing"), "box:/mnt"], "nothing"),
        ([&tree, "box:/no/such/place"], "/no/such"),
        (["box:/no/such", &at("x")], "/no/such"),
        (["box:/mnt/other", &at("no/folder/x")], "no/folder"),
        ([&tree, &at("x")], "VM:/PATH"),
    ] {
        let output = home.output(&[&["cp"], &words[..]].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains(said),
            "{words:?}: {errors}"
        );
    }
    let left: Vec<_> = fs::read_dir(home.dir.path()).unwrap().flatten().collect();
    assert!(
        left.iter()
            .all(|e| !e.file_name().to_string_lossy().starts_with(".alveole")),
        "{left:?}"
    );
}

/// Of whatever is killed, the next command makes sense.
#[test]
fn killed_processes_leave_what_the_next_command_understands() {
    let Some(home) = Home::new() else { return };
    let pids = |name: &str| -> (i32, i32) {
        let json: serde_json::Value = serde_json::from_str(&home.does(&["inspect", name])).unwrap();
        let pid =
            |what: &str| i32::try_from(json[0]["details"]["kept"][what].as_i64().unwrap()).unwrap();
        (pid("keeper_pid"), pid("monitor_pid"))
    };
    let kill = |pid: i32| {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
    };
    let gone = |pid: i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    home.does(&home.run(&["-d", "--name", "a"], &["sleep", "1000"]));
    let (keeper, monitor) = pids("a");
    kill(keeper);
    home.wait_until(20, "end of the monitor", || gone(monitor));
    home.wait_until(20, "lost VM", || home.state("a") == "lost");
    assert_eq!(home.does(&["ps", "-q"]), "");
    home.does(&["start", "a"]);
    assert_eq!(home.does(&["exec", "a", "echo", "again"]), "again");
    // The monitor alone: its keeper tells why.
    let (_, monitor) = pids("a");
    kill(monitor);
    home.wait_until(20, "ended VM", || home.state("a") == "exited");
    let facts = home.does(&["inspect", "a"]);
    assert!(facts.contains("signal 9"), "{facts}");
    home.does(&["rm", "a"]);
    // One that is started again by itself.
    home.does(&home.run(
        &["-d", "--name", "b", "--restart", "always"],
        &["sleep", "1000"],
    ));
    let (_, monitor) = pids("b");
    kill(monitor);
    home.wait_until(60, "restart", || {
        home.state("b") == "running" && pids("b").1 != monitor
    });
    home.does(&["stop", "-t", "0", "b"]);
    assert_eq!(home.state("b"), "exited");
}

/// What is wrong is said before anything is made.
#[test]
fn what_cannot_be_run_leaves_nothing() {
    let Some(home) = Home::new() else { return };
    let text = home.dir.path().join("text");
    fs::write(&text, "no file system\n".repeat(4096)).unwrap();
    let root = path(&home.root).to_owned();
    for (words, said) in [
        (vec!["run", "no-such-image"], "no-such-image"),
        (vec!["run", "./no/such/file"], "./no/such/file"),
        (vec!["run", "--kernel", "other", &root], "alveole kernel ls"),
        (vec!["run", "--name", "Not A Name", &root], "Not A Name"),
        (vec!["run", "--disk", "much", &root], "--disk much"),
        (vec!["run", "--initrd", "x", &root], "--initrd"),
        (vec!["run", "--restart", "maybe", &root], "on-failure"),
        (vec!["run", "--rm", "--net", "none", path(&text)], "erofs"),
    ] {
        let output = home.output(&words);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && errors.contains(said),
            "{words:?}: {errors}"
        );
    }
    assert_eq!(home.does(&["ps", "-aq"]), "");
}
