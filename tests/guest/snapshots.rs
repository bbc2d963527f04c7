//! Real guests that go on in another process from where a snapshot was taken.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::images::{path, root_files, tool};
use crate::harness::{End, Running, Vm, patience};

/// A guest that `script` runs in, from a small read-only root; `/dev/vdb` is a disk of 16 MiB. Pages that it writes are noted.
#[track_caller]
fn start(vm: Vm, dir: &Path, script: &str) -> Option<Running> {
    let root = root_files(dir, script);
    let image = dir.join("root.squashfs");
    if !tool(
        "mksquashfs",
        &[path(&root), path(&image), "-quiet", "-noappend"],
    ) {
        return None;
    }
    let disk = dir.join("disk");
    fs::write(&disk, vec![0; 16 << 20]).unwrap();
    let vm = vm.disk(
        &image,
        json!({"is_root_device": true, "is_read_only": true}),
    );
    Some(vm.disk(&disk, json!({})).by_api().boot())
}

fn files(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (
        dir.join(format!("{name}.state")),
        dir.join(format!("{name}.memory")),
    )
}

/// Takes a snapshot of this kind and lets the guest go on, or the monitor end.
fn take(guest: &Running, dir: &Path, name: &str, more: &Value) -> Value {
    let (state, memory) = files(dir, name);
    let mut body = json!({"snapshot_path": state, "mem_file_path": memory});
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let response = guest.client().ask("PUT", "/snapshot/create", &body);
    assert!(matches!(response.status, 200 | 204), "{response:?}");
    response.body
}

fn loads(vm: Vm, dir: &Path, name: &str) -> Vm {
    let (state, memory) = files(dir, name);
    let backend = json!({"backend_type": "File", "backend_path": memory});
    vm.loads(json!({"snapshot_path": state, "mem_backend": backend, "resume_vm": true}))
}

/// Counts, works with memory, and writes and reads a disk round the caches; what is wrong it says. It says `ticks` at the end.
const WORK: &str = "
    dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null
    sum=$(sha256sum </tmp/data)
    n=0
    while [ $n -lt 400 ]; do
        n=$((n + 1))
        echo tick $n
        [ \"$(sha256sum </tmp/data)\" = \"$sum\" ] || echo wrong in memory at $n
        if [ $((n % 20)) = 0 ]; then
            dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            [ \"$(dd if=/dev/vdb bs=64k count=32 2>/dev/null | sha256sum)\" = \"$sum\" ] || echo wrong on disk at $n
        fi
    done
    echo ticks $n
";

/// Asserts that what consoles showed one after the other is one run of [`WORK`]: nothing lost, nothing repeated.
#[track_caller]
fn assert_one_run(consoles: &[&str]) {
    let whole: String = consoles.concat().replace('\r', "");
    let lines: Vec<&str> = whole.lines().collect();
    let wrong: Vec<_> = lines.iter().filter(|l| l.starts_with("wrong")).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let ticks: Vec<u32> = lines
        .iter()
        .filter_map(|l| l.strip_prefix("tick ")?.parse().ok())
        .collect();
    let all: Vec<u32> = (1..=400).collect();
    assert_eq!(ticks, all, "{whole}");
    assert!(lines.contains(&"ticks 400"), "{whole}");
}

fn ended(guest: Running) -> End {
    guest.signal(Signal::SIGINT);
    guest.wait()
}

#[track_caller]
fn goes_on(vm: fn() -> Option<Vm>, options: &[&str]) {
    let Some(first) = vm() else { return };
    let with = |mut vm: Vm| {
        for option in options {
            vm = vm.option(option);
        }
        vm.cpus(2)
    };
    let dir = TempDir::new().unwrap();
    let Some(mut guest) = start(with(first), dir.path(), WORK) else {
        return;
    };
    let mut consoles = Vec::new();
    for (round, until) in ["tick 31", "tick 93", "tick 180", "tick 261"]
        .into_iter()
        .enumerate()
    {
        guest.wait_for(until);
        guest
            .client()
            .done("PATCH", "/vm", json!({"state": "Paused"}));
        let name = format!("round{round}");
        take(&guest, dir.path(), &name, &json!({}));
        consoles.push(ended(guest).console);
        guest = loads(with(vm().unwrap()), dir.path(), &name).boot();
        assert_eq!(guest.client().get("/")["state"], "Running");
    }
    let end = guest.wait();
    end.assert_code(0);
    consoles.push(end.console.clone());
    let consoles: Vec<&str> = consoles.iter().map(|c| &**c).collect();
    assert_one_run(&consoles);
}

#[test]
fn a_guest_goes_on_in_another_process() {
    goes_on(Vm::any, &[]);
}

#[test]
fn so_does_one_whose_devices_are_on_pci() {
    goes_on(Vm::any, &["--enable-pci"]);
}

#[test]
fn a_live_snapshot_leaves_the_guest_running() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let Some(mut guest) = start(vm, dir.path(), WORK) else {
        return;
    };
    guest.wait_for("tick 50");
    let taken = take(&guest, dir.path(), "live", &json!({"live": true}));
    let stood_still_us = taken["stood_still_us"].as_u64().unwrap();
    println!("stood still for {stood_still_us} us: {taken}");
    assert!(taken["memory_bytes"].as_u64().unwrap() > 1 << 20, "{taken}");
    // Nobody paused it, and nothing of it was lost.
    let first = guest.wait();
    first.assert_code(0);
    assert_one_run(&[&first.console]);
    // And what was captured is one moment of it. Its disk has gone on: a copy of the one it had is not at hand here.
    let vm = Vm::any().unwrap();
    let mut again = loads(vm, dir.path(), "live").boot();
    again.wait_for("tick ");
    let until = std::time::Instant::now() + patience(60);
    while !again.has_shown("ticks 400") {
        assert!(std::time::Instant::now() < until, "it does not go on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let end = again.wait();
    end.assert_code(0);
    assert!(!end.console.contains("wrong in memory"), "{end}");
}

#[test]
fn diff_snapshots_hold_what_was_written_and_need_those_before() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let Some(mut guest) = start(vm.tracks_dirty_pages(), dir.path(), WORK) else {
        return;
    };
    let mut sizes = Vec::new();
    for (name, kind, until) in [
        ("full", "Full", "tick 20"),
        ("one", "Diff", "tick 40"),
        ("two", "Diff", "tick 60"),
    ] {
        guest.wait_for(until);
        guest
            .client()
            .done("PATCH", "/vm", json!({"state": "Paused"}));
        take(&guest, dir.path(), name, &json!({"snapshot_type": kind}));
        let (_, memory) = files(dir.path(), name);
        sizes.push(std::os::unix::fs::MetadataExt::blocks(&fs::metadata(memory).unwrap()) * 512);
        guest
            .client()
            .done("PATCH", "/vm", json!({"state": "Resumed"}));
    }
    println!("bytes on disk: {sizes:?}");
    assert!(sizes[1] < sizes[0] && sizes[2] < sizes[0], "{sizes:?}");
    let end = guest.wait();
    end.assert_code(0);
    assert_one_run(&[&end.console]);
    let mut again = loads(Vm::any().unwrap(), dir.path(), "two").boot();
    again.wait_for("tick ");
    let end = again.wait();
    end.assert_code(0);
    assert!(!end.console.contains("wrong in memory"), "{end}");
    // Without the first, the chain is not whole, and that is told.
    fs::remove_file(files(dir.path(), "full").1).unwrap();
    let (state, _) = files(dir.path(), "two");
    let third = Vm::any().unwrap().nothing_yet().boot();
    let told = third
        .client()
        .refused("PUT", "/snapshot/load", json!({"snapshot_path": state}));
    assert!(
        told.contains("full.memory") && told.contains("is the path right?"),
        "{told}"
    );
}
