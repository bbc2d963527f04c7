//! What is interrupted or killed while a VM is made, starts, runs and ends, at any moment: what is left, the next command understands.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::images::Home;
use crate::harness::images::path;
use crate::harness::patience;

/// The processes of a home, by what their environment says, and what they are.
pub(super) fn processes(home: &Home) -> Vec<(i32, String)> {
    let mark = format!("ALVEOLE_HOME={}", path(&home.dir.path().join("home")));
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let read = |what: &str| fs::read(entry.path().join(what)).unwrap_or_default();
        if read("environ")
            .split(|b| *b == 0)
            .any(|word| word == mark.as_bytes())
        {
            let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            found.push((pid, line));
        }
    }
    found
}

fn spawn(home: &Home, words: &[&str]) -> Child {
    home.command(words)
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Names of VMs' folders; those that are about to go are none, nor is what happened to VMs (`.events`).
pub(super) fn folders(home: &Home) -> Vec<String> {
    let entries = fs::read_dir(home.dir.path().join("home/state/vms"));
    let names = entries.into_iter().flatten().flatten();
    let names = names.map(|e| e.file_name().into_string().unwrap());
    names.filter(|n| !n.starts_with('.')).collect()
}

/// How long a run takes here from its first moment to its last.
fn whole_run(home: &Home) -> Duration {
    let begun = Instant::now();
    home.does(&home.run(&["--rm"], &["true"]));
    begun.elapsed()
}

#[test]
fn ctrl_c_at_any_moment_leaves_nothing() {
    const MOMENTS: u32 = 12;
    let Some(home) = Home::new() else { return };
    let whole = whole_run(&home);
    for moment in 0..MOMENTS {
        let mut run = spawn(&home, &home.run(&["--rm"], &["sleep", "1000"]));
        std::thread::sleep(whole * moment / (MOMENTS - 2));
        killpg(Pid::from_raw(run.id().cast_signed()), Signal::SIGINT).unwrap();
        let until = Instant::now() + patience(20);
        while run.try_wait().unwrap().is_none() {
            assert!(
                Instant::now() < until,
                "{moment} of {MOMENTS}: it goes on: {:?}",
                processes(&home)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        home.wait_until(20, "end of all of it", || {
            folders(&home).is_empty() && processes(&home).is_empty()
        });
        assert_eq!(home.does(&["ps", "-aq"]), "", "{moment} of {MOMENTS}");
    }
}

#[test]
fn whatever_is_killed_can_be_cleared_away() {
    const ROUNDS: u32 = 10;
    let Some(home) = Home::new() else { return };
    let whole = whole_run(&home);
    // The same each time: a linear congruential generator.
    let mut state = 0x5eed_u64;
    let mut random = |below: u32| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 33).unwrap() % below
    };
    for round in 0..ROUNDS {
        let name = format!("vm{round}");
        let words = ["--name", name.as_str()];
        let mut run = spawn(&home, &home.run(&words, &["sleep", "1000"]));
        std::thread::sleep(whole * random(120) / 100);
        let all = processes(&home);
        if !all.is_empty() {
            let (pid, _) = all[random(u32::try_from(all.len()).unwrap()) as usize];
            // It may be gone by now.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if random(2) == 0 {
            let _ = run.kill();
        }
        // Whatever goes on can be ended by its name, whatever does not is cleared away.
        home.output(&["rm", "-f", &name]);
        let _ = run.kill();
        run.wait().unwrap();
        home.wait_until(40, "end of its processes", || {
            home.output(&["rm", "-f", &name]);
            processes(&home).is_empty()
        });
        home.does(&["system", "prune"]);
        let left = home.does(&["ps", "-a"]);
        let made: Vec<_> = left
            .lines()
            .skip(1)
            .filter(|l| !l.contains("created"))
            .collect();
        assert!(made.is_empty(), "{round}: {left}");
        home.output(&["rm", "-f", &name]);
        assert_eq!(folders(&home), Vec::<String>::new(), "{round}");
    }
}
