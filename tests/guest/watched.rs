//! VMs that are watched and changed while they run: `alveole top`, `events`, `update`.

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use super::Home;
use crate::api_client::Client;

/// Runs until it is asked to end.
const WAITS: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
/// More than any guest here has.
const EATS_MEMORY: &str = "tail /dev/zero";

impl Home {
    fn facts(&self, name: &str) -> Value {
        let all: Value = serde_json::from_str(&self.does(&["inspect", name])).unwrap();
        all[0].clone()
    }

    /// The words of what happened to a VM, with what belongs to them where `show` wants it.
    fn events(&self, name: &str, show: &str) -> Vec<String> {
        let filter = format!("vm={name}");
        let lines = self.does(&["events", "--format", "json", "--filter", &filter]);
        let word = |line: &str| {
            let event: Value = serde_json::from_str(line).unwrap();
            let word = event["event"].as_str().unwrap().to_owned();
            match &event[show] {
                Value::Null => word,
                more => format!("{word} {more}"),
            }
        };
        lines.lines().map(word).collect()
    }

    fn top(&self) -> Vec<Value> {
        let words = ["top", "--format", "json", "--sort", "name"];
        serde_json::from_str(&self.does(&words)).unwrap()
    }
}

#[test]
fn what_happens_to_a_vm_is_told_afterwards() {
    let Some(home) = Home::new() else { return };
    home.does(&home.run(&["-d", "--name", "web"], &["sh", "-c", WAITS]));
    home.does(&["exec", "web", "true", "secret"]);
    home.does(&["kill", "--signal", "WINCH", "web"]);
    home.does(&["stop", "web"]);
    home.does(&["start", "web"]);
    home.does(&["kill", "--machine", "web"]);
    assert_eq!(
        home.events("web", "status"),
        [
            "created",
            "started",
            "exec",
            "signalled",
            "stopping",
            "ended 3",
            "started",
            "stopping",
            "ended 125"
        ]
    );
    let all = home.does(&["events", "--format", "json"]);
    assert!(
        all.contains("\"program\":\"true\"") && !all.contains("secret"),
        "{all}"
    );
    home.does(&["rm", "web"]);
    assert_eq!(home.events("web", "status").last().unwrap(), "removed");
    // Out of memory: the kernel ends the program, and what the shell makes of that ends the VM.
    let script = format!("{EATS_MEMORY}; exit 5");
    let before = [
        "--name",
        "oom",
        "--memory",
        "160M",
        "--restart",
        "on-failure:1",
    ];
    let output = home.output(&home.run(&before, &["sh", "-c", &script]));
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let events = home.events("oom", "process");
    assert!(
        events
            .iter()
            .any(|e| e.starts_with("oom ") && e.contains("(tail)")),
        "{events:?}"
    );
    let words = home.events("oom", "restarts");
    let words: Vec<_> = words.iter().filter(|word| *word != "oom").collect();
    assert_eq!(
        words,
        [
            "created",
            "started 0",
            "ended",
            "restarting 1",
            "started 1",
            "ended"
        ]
    );
    // The same, of a kernel that panics for it.
    let script = format!("echo 1 >/proc/sys/vm/panic_on_oom; {EATS_MEMORY}");
    let before = ["--name", "panic", "--memory", "160M"];
    let output = home.output(&home.run(&before, &["sh", "-c", &script]));
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert_eq!(
        home.events("panic", "status"),
        ["created", "started", "panicked", "ended 125"]
    );
    // A keeper that is killed tells nothing; who finds it does.
    home.does(&home.run(&["-d", "--name", "lost"], &["sh", "-c", WAITS]));
    let keeper = home.facts("lost")["details"]["kept"]["keeper_pid"].to_string();
    assert!(crate::harness::images::tool("kill", &["-9", &keeper]));
    home.wait_until(20, "end", || home.state("lost") == "lost");
    home.does(&["start", "lost"]);
    assert_eq!(
        home.events("lost", "restarts"),
        ["created", "started 0", "lost", "started 0"]
    );
}

#[test]
fn limits_and_more_are_changed_while_a_vm_runs() {
    let Some(home) = Home::new() else { return };
    let before = ["-d", "--name", "web", "--disk-iops", "5000"];
    home.does(&home.run(&before, &["sh", "-c", WAITS]));
    let limits = || -> Vec<Value> {
        let sockets = home.facts("web")["sockets"].as_str().unwrap().to_owned();
        let api = std::path::Path::new(&sockets).join("api");
        let config = Client::at(&api).get("/vm/config");
        let drives = config["drives"].as_array().unwrap();
        // The root, its changes, and the modules of a kernel that has some.
        assert!((2..=3).contains(&drives.len()), "{config}");
        drives.iter().map(|d| d["rate_limiter"].clone()).collect()
    };
    for limiter in limits() {
        assert_eq!(limiter["ops"]["size"], 5000, "{limiter}");
    }
    // 3 MiB, of which a second's worth is let through at once.
    let written = || {
        let script = "dd if=/dev/zero of=/file bs=64k count=48 conv=fsync 2>/dev/null";
        let begun = Instant::now();
        home.does(&["exec", "web", "sh", "-c", script]);
        begun.elapsed().as_secs_f64()
    };
    assert_eq!(
        home.does(&["update", "--disk-bandwidth", "1M", "web"]),
        "web"
    );
    for limiter in limits() {
        assert_eq!(limiter["ops"]["size"], 5000, "{limiter}");
        assert_eq!(limiter["bandwidth"]["size"], 1 << 20, "{limiter}");
    }
    let slow = written();
    assert!(slow > 1.5, "3 MiB at 1 MiB/s took {slow} s");
    home.does(&["update", "--disk-bandwidth", "0", "--disk-iops", "0", "web"]);
    for limiter in limits() {
        for bucket in ["bandwidth", "ops"] {
            let size = limiter[bucket]["size"].as_u64();
            assert_eq!(size.unwrap_or(0), 0, "{limiter}");
        }
    }
    written();
    let facts = home.facts("web");
    assert_eq!(facts["limits"]["disk_bytes_per_s"], Value::Null);
    // Processors are the next machine's, whoever starts it.
    let refused = home.output(&["update", "--cpus", "2", "web"]);
    assert!(!refused.status.success());
    let words = ["update", "--cpus", "2", "--next-start", "--memory", "200M"];
    home.does(
        &[
            &words[..],
            &["--restart", "on-failure:1", "--disk-iops", "700", "web"],
        ]
        .concat(),
    );
    let processors = || {
        let script = "grep -c ^processor /proc/cpuinfo";
        home.does(&["exec", "web", "sh", "-c", script])
    };
    assert_eq!(processors(), "1");
    let facts = home.facts("web");
    assert_eq!(
        (&facts["cpus"], &facts["details"]["kept"]["cpus"]),
        (&json!(2), &json!(1))
    );
    home.does(&["kill", "--signal", "HUP", "web"]);
    home.wait_until(30, "next start", || {
        let kept = &home.facts("web")["details"]["kept"];
        kept["restarts"] == 1 && kept["phase"] == "running" && kept["cpus"] == 2
    });
    home.wait_until(30, "second processor", || {
        home.output(&["exec", "web", "true"]).status.success() && processors() == "2"
    });
    for limiter in limits() {
        assert_eq!(limiter["ops"]["size"], 700, "{limiter}");
    }
    // What was said last counts when it ends.
    home.does(&["update", "--restart", "no", "web"]);
    home.does(&["kill", "--signal", "HUP", "web"]);
    assert_eq!(home.does(&["wait", "web"]), "129");
}

#[test]
fn a_hung_monitor_costs_its_own_figures_alone() {
    let Some(home) = Home::new() else { return };
    let busy = "while :; do :; done";
    home.does(&home.run(&["-d", "--name", "busy"], &["sh", "-c", busy]));
    // Each character that the console is written leaves the guest.
    let speaks = "while :; do echo line >/dev/console; sleep 0.1; done";
    home.does(&home.run(
        &["-d", "--name", "idle", "--label", "a=b"],
        &["sh", "-c", speaks],
    ));
    let vms = home.top();
    let number =
        |vm: &Value, name: &str| vm[name].as_f64().unwrap_or_else(|| panic!("{name}: {vm}"));
    assert_eq!(vms.len(), 2, "{vms:?}");
    let (busy, idle) = (&vms[0], &vms[1]);
    assert_eq!(
        (&busy["name"], &busy["state"]),
        (&json!("busy"), &json!("running"))
    );
    assert!(
        number(busy, "cpu_guest_percent") > number(idle, "cpu_guest_percent"),
        "{vms:?}"
    );
    assert!(number(idle, "exits_per_s") > 10.0, "{idle}");
    assert!(
        number(busy, "exits_per_s") < number(idle, "exits_per_s"),
        "{vms:?}"
    );
    for vm in &vms {
        assert!(number(vm, "guest_memory_used_bytes") > 1e6, "{vm}");
        assert!(number(vm, "pss_bytes") > 1e6, "{vm}");
        assert!(number(vm, "disk_written_bytes_per_s") >= 0.0, "{vm}");
    }
    let text = home.does(&["top", "--filter", "a=b"]);
    assert!(
        text.contains("1 VMs of 2 by 'a=b'") && !text.contains("busy"),
        "{text}"
    );
    let monitor = home.facts("busy")["details"]["kept"]["monitor_pid"].to_string();
    let stat = fs::read_to_string(format!("/proc/{monitor}/stat")).unwrap();
    assert!(stat.contains("(alveole-vmm)"), "{stat}");
    assert!(crate::harness::images::tool("kill", &["-STOP", &monitor]));
    let begun = Instant::now();
    let vms = home.top();
    assert!(begun.elapsed() < crate::harness::patience(20));
    assert_eq!(vms[0]["state"], "no answer");
    assert!(vms[0]["exits_per_s"].is_null() && vms[0]["guest_memory_bytes"].is_null());
    assert!(number(&vms[0], "pss_bytes") > 1e6);
    assert!(number(&vms[1], "exits_per_s") >= 0.0);
    assert!(crate::harness::images::tool("kill", &["-CONT", &monitor]));
    home.wait_until(20, "answer of a monitor that goes on", || {
        home.top()[0]["state"] == "running"
    });
}
