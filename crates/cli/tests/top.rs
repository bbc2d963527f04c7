//! `alveole top`, `ps`, `events` and `update` on VMs that are folders with locks, some with monitors and agents that never answer; the live view
//! on a terminal of its own (`script`).

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use alveole_instance::{KeeperLock, Limits, Phase, Record, Restart, Vm, Vms};
use tempfile::TempDir;

/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

struct Home {
    dir: TempDir,
    /// What stands for monitors.
    children: Vec<Child>,
    locks: Vec<KeeperLock>,
    /// Who takes connections and says nothing.
    silent: Vec<UnixListener>,
}

impl Home {
    fn new() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            children: Vec::new(),
            locks: Vec::new(),
            silent: Vec::new(),
        }
    }

    fn vms(&self) -> Vms {
        let home = self.dir.path();
        Vms::new(&home.join("state/vms"), &home.join("run/vm"))
    }

    fn made(&self, name: &str, image: &str) -> Vm {
        let record = Record {
            version: Record::VERSION,
            id: Record::new_id().unwrap(),
            image: image.into(),
            image_id: String::new(),
            created_ms: 1,
            root_disk: "/x".into(),
            kernel: "k".into(),
            cpus: 1,
            memory_mib: 64,
            disk_bytes: None,
            read_only: true,
            hostname: name.into(),
            network: Vec::new(),
            process: alveole_agent_protocol::Process {
                args: vec!["true".into()],
                ..Default::default()
            },
            stop_signal: 15,
            labels: [("tier".to_owned(), format!("of-{name}"))].into(),
            restart: Restart::No,
            remove: false,
            shm_bytes: None,
            cpu_config: None,
            published_free: Vec::new(),
            volumes: Vec::new(),
            limits: Limits::default(),
        };
        self.vms().create(name, &record).unwrap()
    }

    /// A VM that this process keeps, whose monitor is a program that burns time, or sleeps, and whose agent and monitor hang.
    fn kept(&mut self, name: &str, image: &str, script: &str) -> Vm {
        let vm = self.made(name, image);
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let phase = Phase {
            phase: "running".into(),
            started_ms: 1,
            restarts: 0,
            monitor_pid: Some(child.id()),
            keeper_pid: std::process::id(),
            cpus: 1,
            memory_mib: 64,
            main_pid: None,
            network: Vec::new(),
        };
        fs::write(vm.at("phase.json"), serde_json::to_vec(&phase).unwrap()).unwrap();
        fs::create_dir_all(vm.run_folder()).unwrap();
        for socket in ["api", "vsock", "keeper"] {
            self.silent
                .push(UnixListener::bind(vm.socket(socket)).unwrap());
        }
        self.children.push(child);
        self.locks.push(vm.lock().unwrap());
        vm
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_alveole"));
        command
            .args(words)
            .env("ALVEOLE_HOME", self.dir.path())
            .stdin(Stdio::null());
        command
    }

    fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    #[track_caller]
    fn does(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refuses(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(!output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn one_view_has_figures_of_those_whose_agents_and_monitors_hang() {
    let mut home = Home::new();
    home.kept("busy", "debian:12", "while :; do :; done");
    home.kept("idle", "nginx", "exec sleep 1000");
    home.made("stopped", "nginx");
    let begun = Instant::now();
    let text = home.does(&["top", "-d", "0.5", "--sort", "name"]);
    // Three seconds of patience, twice.
    assert!(begun.elapsed() < Duration::from_secs(20));
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].contains("2 VMs"), "{text}");
    assert!(lines[1].starts_with("NAME"), "{text}");
    assert!(
        lines[2].starts_with("busy") && lines[2].contains("no answer"),
        "{text}"
    );
    assert!(lines[3].starts_with("idle") && lines[3].contains("nginx"));
    let objects = json(&home.does(&[
        "top",
        "-d",
        "0.5",
        "--format",
        "json",
        "--filter",
        "TIER=of-busy",
    ]));
    assert_eq!(objects.as_array().unwrap().len(), 1, "{objects}");
    let busy = &objects[0];
    assert_eq!(busy["name"], "busy");
    assert!(
        busy["cpu_monitor_percent"].as_f64().unwrap() > 5.0,
        "{busy}"
    );
    assert_eq!(busy["cpu_guest_percent"], 0.0);
    assert!(busy["pss_bytes"].as_u64().unwrap() > 4096);
    assert!(busy["guest_memory_bytes"].is_null() && busy["exits_per_s"].is_null());
    // A process of that number which is not the keeper's child is not looked at.
    let vm = home.vms().find("busy").unwrap();
    let phase = fs::read_to_string(vm.at("phase.json")).unwrap();
    let other = phase.replace(&format!(":{}", std::process::id()), ":1");
    assert_ne!(phase, other);
    fs::write(vm.at("phase.json"), other).unwrap();
    assert!(!home.does(&["top", "--once", "-d", "0.1"]).contains("busy"));
    for (words, why) in [
        (&["top", "-d", "0"][..], "from 0.1 to 3600"),
        (&["top", "--sort", "colour"], "guest-memory"),
    ] {
        assert!(home.refuses(words).contains(why));
    }
}

/// A live view on a terminal of 120 columns and 20 lines, until `end`; gives what came to the terminal.
struct Live {
    script: Child,
    shown: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Live {
    fn begin(home: &Home, words: &str) -> Option<Self> {
        let there = Command::new("script")
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if there.is_err() {
            skip("there is no `script`, which gives programs a terminal");
            return None;
        }
        let line = format!(
            "set -m; stty rows 20 columns 120; stty -g >before; {} top {words}; s=$?; \
             while [ $s = 147 ]; do echo put aside; fg >/dev/null; s=$?; done; echo status $s; stty -g >after",
            env!("CARGO_BIN_EXE_alveole")
        );
        let mut script = Command::new("script")
            .args(["-qfec", &line, "/dev/null"])
            .current_dir(home.dir.path())
            .env("ALVEOLE_HOME", home.dir.path())
            .env("TERM", "xterm")
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = script.stdout.take().unwrap();
        let (sender, shown) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Some(Self {
            script,
            shown,
            text: String::new(),
        })
    }

    fn press(&mut self, keys: &str) {
        let input = self.script.stdin.as_mut().unwrap();
        input.write_all(keys.as_bytes()).unwrap();
        input.flush().unwrap();
    }

    /// Waits until this comes to the terminal, behind what was waited for before.
    #[track_caller]
    fn wait_for(&mut self, what: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(what) {
                self.text.drain(..at + what.len());
                return;
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(e) => panic!("no {what:?}: {e}; {:?}", self.text),
            }
        }
    }

    /// What is given back: the screen, the cursor, the settings.
    #[track_caller]
    fn ends(mut self, home: &Home, status: &str) {
        self.wait_for("\x1b[?1049l");
        self.wait_for("\x1b[?25h");
        self.wait_for(&format!("status {status}"));
        drop(self.script.stdin.take());
        self.script.wait().unwrap();
        let setting = |name| fs::read_to_string(home.dir.path().join(name)).unwrap();
        assert_eq!(setting("before"), setting("after"));
    }
}

fn skip(reason: &str) {
    let name = thread::current().name().unwrap_or_default().to_owned();
    let line = format!("SKIPPED {name}: {reason}");
    eprintln!("{line}");
    if let Some(log) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut log = fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .unwrap();
        writeln!(log, "{line}").unwrap();
    }
}

/// The process below `of` that is a program of this name.
fn below(of: u32, name: &str) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let child: u32 = child.parse().ok()?;
        let comm = fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
        if comm.trim() == name {
            return Some(child);
        }
        below(child, name)
    })
}

#[test]
fn the_live_view_lives_while_agents_hang_and_gives_the_terminal_back() {
    let mut home = Home::new();
    home.kept("busy", "debian:12", "while :; do :; done");
    home.kept("idle", "nginx", "exec sleep 1000");
    let Some(mut live) = Live::begin(&home, "-d 0.2") else {
        return;
    };
    live.wait_for("\x1b[?1049h");
    // Both are there at once, though nobody answers.
    live.wait_for("sorted by cpu");
    live.wait_for("busy");
    live.wait_for("idle");
    live.press("m");
    live.wait_for("memory");
    live.press("/ngi");
    live.wait_for("Enter keeps it");
    live.wait_for("of 2 by");
    live.press("\r");
    // One that is made meanwhile is there with the next look.
    home.kept("another", "nginx", "exec sleep 1000");
    live.wait_for("another");
    let begun = Instant::now();
    live.press("q");
    live.ends(&home, "0");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

/// By a shell that has jobs, as people do it.
#[test]
fn the_live_view_is_put_aside_and_comes_back() {
    let mut home = Home::new();
    home.kept("idle", "nginx", "exec sleep 1000");
    let Some(mut live) = Live::begin(&home, "-d 0.2") else {
        return;
    };
    live.wait_for("idle");
    live.press("\x1a");
    live.wait_for("\x1b[?1049l");
    // The shell is told of it, has the terminal, and goes on with it.
    live.wait_for("put aside");
    live.wait_for("\x1b[?1049h");
    live.wait_for("idle");
    live.press("q");
    live.ends(&home, "0");
}

#[test]
fn whatever_ends_the_live_view_the_terminal_is_given_back() {
    let mut home = Home::new();
    home.kept("idle", "nginx", "exec sleep 1000");
    // Ctrl-C is a key, the others come from outside.
    for (signal, status) in [("", "0"), ("TERM", "143"), ("HUP", "129"), ("QUIT", "131")] {
        let Some(mut live) = Live::begin(&home, "-d 0.2") else {
            return;
        };
        live.wait_for("idle");
        if signal.is_empty() {
            live.press("\x03");
        } else {
            let pid = below(live.script.id(), "alveole").unwrap();
            let sent = Command::new("kill")
                .args([&format!("-{signal}"), &pid.to_string()])
                .status();
            assert!(sent.unwrap().success());
        }
        live.ends(&home, status);
    }
}

#[test]
fn many_are_listed_each_in_its_state() {
    let home = Home::new();
    let all: Vec<Vm> = (0..500)
        .map(|n| home.made(&format!("vm-{n}"), "x"))
        .collect();
    let _held: Vec<KeeperLock> = all.iter().step_by(5).map(|vm| vm.lock().unwrap()).collect();
    let listed = json(&home.does(&["ps", "-a", "--format", "json"]));
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 500);
    let starting = listed.iter().filter(|vm| vm["state"] == "starting");
    assert_eq!(starting.count(), 100);
    assert_eq!(home.does(&["ps", "-q"]).lines().count(), 100);
    assert_eq!(home.does(&["ps", "-a"]).lines().count(), 501);
    assert_eq!(
        home.does(&["events", "--filter", "event=created"])
            .lines()
            .count(),
        500
    );
}

#[test]
fn events_are_filtered_followed_and_end() {
    let home = Home::new();
    home.made("web", "debian:12");
    home.made("db", "postgres");
    home.does(&["rename", "web", "front"]);
    let text = home.does(&["events", "--filter", "vm=front"]);
    assert!(
        text.contains(" renamed front ") && text.contains("from=web"),
        "{text}"
    );
    let objects = home.does(&[
        "events",
        "--format",
        "json",
        "--filter",
        "label=tier=of-web",
    ]);
    let objects: Vec<_> = objects.lines().map(json).collect();
    assert_eq!(objects.len(), 2, "{objects:?}");
    assert!(objects[1]["event"] == "renamed" && objects[1]["from"] == "web");
    assert_eq!(
        home.does(&["events", "--since", "2100-01-01T00:00:00Z"]),
        ""
    );
    assert_eq!(home.does(&["events", "--until", "1h"]), "");
    let mut follower = home
        .command(&["events", "-f", "--filter", "event=removed"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(100));
    home.does(&["rm", "db"]);
    let mut first = [0; 512];
    let count = follower.stdout.take().unwrap().read(&mut first).unwrap();
    assert!(String::from_utf8_lossy(&first[..count]).contains(" removed db "));
    // Nobody reads any more: it ends with the next.
    home.does(&["rm", "front"]);
    assert!(follower.wait().unwrap().success());
    // It ends at the time that was said.
    let until = humantime(Duration::from_secs(1));
    assert_eq!(
        home.does(&["events", "-f", "--since", "0s", "--until", &until]),
        ""
    );
}

/// So long from now.
fn humantime(later: Duration) -> String {
    let time = std::time::SystemTime::now() + later;
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%SZ", "-d"])
        .arg(format!(
            "@{}",
            time.duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_secs()
        ))
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_vm_that_does_not_run_is_changed_at_once_and_one_that_runs_as_far_as_that_goes() {
    let mut home = Home::new();
    home.made("web", "debian:12");
    let words = [
        "update",
        "--cpus",
        "2",
        "--memory",
        "1G",
        "--disk-iops",
        "100",
        "--restart",
        "on-failure:3",
        "--label",
        "a=b",
        "--label-rm",
        "tier",
        "web",
    ];
    assert_eq!(home.does(&words), "web\n");
    let facts = &json(&home.does(&["inspect", "web"]))[0];
    assert_eq!(
        (&facts["cpus"], &facts["memory_mib"]),
        (&2.into(), &1024.into())
    );
    assert_eq!(facts["limits"]["disk_operations_per_s"], 100);
    assert_eq!(facts["labels"], serde_json::json!({"a": "b"}));
    let event = home.does(&["events", "--filter", "event=updated"]);
    assert!(
        event.contains("cpus=2, memory=1024M, disk-iops=100, restart=on-failure:3"),
        "{event}"
    );
    for (words, why) in [
        (
            &["update", "web"][..],
            "nothing is to be changed: give --cpus",
        ),
        (&["update", "--cpus", "2", "none"], "there is no VM 'none'"),
        (&["update", "--label-rm", "x", "web"], "has no label 'x'"),
        (&["update", "--cpus", "0", "web"], "--cpus"),
        (&["update", "--disk-bandwidth", "fast", "web"], "number"),
    ] {
        let said = home.refuses(words);
        assert!(said.contains(why), "{said}");
    }
    // One that runs, of a sort: its monitor takes no request.
    home.kept("front", "nginx", "exec sleep 1000");
    let said = home.refuses(&["update", "--cpus", "2", "front"]);
    assert!(
        said.contains("--next-start") && said.contains("alveole stop front"),
        "{said}"
    );
    let later = home.output(&["update", "--cpus", "2", "--next-start", "front"]);
    let said = String::from_utf8(later.stderr).unwrap();
    assert!(
        later.status.success() && said.contains("from its next start on"),
        "{said}"
    );
    let said = home.refuses(&["update", "--disk-iops", "5", "--label", "b=c", "front"]);
    assert!(said.contains("no answer within 10 s"), "{said}");
    let facts = &json(&home.does(&["inspect", "front"]))[0];
    assert_eq!(facts["cpus"], 2);
    assert!(
        facts["limits"]["disk_operations_per_s"].is_null(),
        "{facts}"
    );
    assert!(facts["labels"]["b"].is_null(), "{facts}");
    assert_eq!(facts["details"]["kept"]["cpus"], 1);
    assert!(Path::new(facts["folder"].as_str().unwrap()).is_dir());
}
