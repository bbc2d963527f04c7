//! Snapshots at bad moments: while the guest boots, while another one is being written, where there is no room, with clients that are
//! half-way through a request. They are whole or refused, and the guest notices nothing.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api_client::{Client, Response, read_response};
use crate::harness::images::{path, tool};
use crate::harness::{Running, Vm, is_root, skip};

const MEMORY_MIB: u64 = 128;

fn body(dir: &Path, name: &str, is_live: bool) -> Value {
    json!({
        "snapshot_path": dir.join(format!("{name}.state")),
        "mem_file_path": dir.join(format!("{name}.memory")),
        "live": is_live,
    })
}

fn take(client: &mut Client, dir: &Path, name: &str, is_live: bool) -> Response {
    client.ask("PUT", "/snapshot/create", &body(dir, name, is_live))
}

fn load(dir: &Path, name: &str) -> Vm {
    let state = dir.join(format!("{name}.state"));
    let body = json!({"snapshot_path": state, "resume_vm": true});
    Vm::any().unwrap().loads(body)
}

/// A guest that takes commands and keeps something in memory.
fn asked() -> Option<Running> {
    let vm = Vm::any()?.memory_mib(MEMORY_MIB);
    let mut guest = vm.takes_commands().by_api().boot();
    guest.wait_for_commands();
    assert_eq!(
        guest
            .ask("dd if=/dev/urandom of=/kept bs=1M count=24 2>/dev/null")
            .0,
        0
    );
    Some(guest)
}

/// What its memory has, told by itself.
fn sum(guest: &mut Running) -> String {
    let (status, sum) = guest.ask("sha256sum </kept");
    assert_eq!(status, 0, "{sum}");
    sum
}

/// Whatever the kernel was about to do, it does it in every one of them.
#[test]
fn a_guest_that_boots_can_be_taken_at_any_moment() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let mut guest = vm.memory_mib(MEMORY_MIB).cpus(2).by_api().boot();
    let mut client = guest.client();
    let mut taken = Vec::new();
    while !guest.has_shown("alveole-guest: ready") && taken.len() < 4 {
        let name = format!("boot{}", taken.len());
        let answer = take(&mut client, dir.path(), &name, true);
        // It may be over by now.
        if answer.status != 200 {
            break;
        }
        println!(
            "{name}: {} us, {} characters shown",
            answer.body["stood_still_us"],
            guest.shown()
        );
        taken.push(name);
        thread::sleep(Duration::from_millis(10));
    }
    guest.wait_for("alveole-guest: ready");
    guest.wait().assert_code(0);
    assert!(!taken.is_empty());
    for name in taken {
        let end = load(dir.path(), &name).boot().wait();
        end.assert_code(0);
        assert!(
            end.console.contains("ready") || end.console.is_empty(),
            "{name}: {end}"
        );
    }
}

#[test]
fn a_second_one_at_the_same_time_is_refused() {
    let Some(mut guest) = asked() else { return };
    let dir = TempDir::new().unwrap();
    let before = sum(&mut guest);
    let (mut one, mut other) = (guest.client(), guest.client());
    let answers = thread::scope(|scope| {
        let first = scope.spawn(|| take(&mut one, dir.path(), "one", true));
        let second = scope.spawn(|| take(&mut other, dir.path(), "other", true));
        [first.join().unwrap(), second.join().unwrap()]
    });
    let whole: Vec<_> = answers.iter().map(|answer| answer.status == 200).collect();
    println!("{answers:?}");
    for (answer, name) in answers.iter().zip(["one", "other"]) {
        if answer.status == 200 {
            let mut loaded = load(dir.path(), name).boot();
            assert_eq!(sum(&mut loaded), before);
            loaded.leave().assert_code(0);
        } else {
            assert!(
                answer.fault().contains("another one is being written"),
                "{answer:?}"
            );
            assert!(!dir.path().join(format!("{name}.state")).exists());
        }
    }
    assert!(whole.contains(&true), "{answers:?}");
    assert_eq!(sum(&mut guest), before);
    guest.leave().assert_code(0);
}

/// The disk is full when half of it is written: nothing is left, what was there stays, and the guest goes on.
#[test]
fn a_full_disk_costs_the_snapshot_and_nothing_else() {
    if !is_root() {
        return skip("file systems are mounted by root");
    }
    let dir = TempDir::new().unwrap();
    // Seen by this thread and what it starts alone.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    if !tool("mount", &["--make-rprivate", "/"])
        || !tool(
            "mount",
            &["-t", "tmpfs", "-o", "size=16m", "small", path(dir.path())],
        )
    {
        return;
    }
    let Some(mut guest) = asked() else { return };
    let before = sum(&mut guest);
    let mut client = guest.client();
    fs::write(dir.path().join("full.state"), "what was there").unwrap();
    for is_live in [true, false] {
        if !is_live {
            client.done("PATCH", "/vm", json!({"state": "Paused"}));
        }
        let told = client.refused("PUT", "/snapshot/create", body(dir.path(), "full", is_live));
        println!("{told}");
        assert!(
            told.contains("full.memory") && told.contains("No space left"),
            "{told}"
        );
        if !is_live {
            client.done("PATCH", "/vm", json!({"state": "Resumed"}));
        }
        let left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["full.state"], "live: {is_live}");
        assert_eq!(
            fs::read_to_string(dir.path().join("full.state")).unwrap(),
            "what was there"
        );
        assert_eq!(sum(&mut guest), before);
    }
    // Elsewhere there is room.
    let elsewhere = TempDir::new().unwrap();
    assert_eq!(
        take(&mut client, elsewhere.path(), "whole", true).status,
        200
    );
    let mut loaded = load(elsewhere.path(), "whole").boot();
    assert_eq!(sum(&mut loaded), before);
    loaded.leave().assert_code(0);
    guest.leave().assert_code(0);
}

/// Who has said half a request says the other half afterwards, and gets its answer.
#[test]
fn a_client_that_is_half_way_through_a_request_is_heard_after_it() {
    let Some(guest) = asked() else { return };
    let dir = TempDir::new().unwrap();
    let request =
        "PATCH /vm HTTP/1.1\r\nHost: l\r\nContent-Length: 20\r\n\r\n{\"state\": \"Resumed\"}";
    let mut half = UnixStream::connect(guest.file("api")).unwrap();
    let (begin, rest) = request.split_at(request.len() - 9);
    half.write_all(begin.as_bytes()).unwrap();
    let mut client = guest.client();
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    let answer = take(&mut client, dir.path(), "half", false);
    assert!(matches!(answer.status, 200 | 204), "{answer:?}");
    half.write_all(rest.as_bytes()).unwrap();
    assert_eq!(read_response(&mut half).status, 204);
    assert_eq!(client.get("/")["state"], "Running");
    guest.leave().assert_code(0);
    load(dir.path(), "half").boot().leave().assert_code(0);
}
