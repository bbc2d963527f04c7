//! Snapshots of the real program: taken of a guest that runs, loaded by the command line, and what is wrong with either.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod api_client;
#[expect(dead_code, reason = "tests/bad_input.rs uses the rest")]
mod tiny_guest;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use api_client::Client;
use nix::sys::signal::Signal::{SIGKILL, SIGTERM};
use serde_json::{Value, json};
use tiny_guest::{Bench, Running, no_kvm, out, skipped};

/// The description, or the snapshot, is wrong.
const CONFIG: i32 = 152;
/// The command line is wrong.
const USAGE: i32 = 153;
/// Of SIGTERM.
const TERMINATED: i32 = 143;

/// A guest that prints an x now and then, for ever.
fn ticking() -> Vec<u8> {
    let mut code = out(0x3f8, b'x');
    // mov ecx, 0x20_0000; loop to itself
    code.extend([0xb9, 0x00, 0x00, 0x20, 0x00, 0xe2, 0xfe]);
    let back = i8::try_from(code.len() + 2).unwrap().wrapping_neg();
    code.extend([0xeb, back.cast_unsigned()]);
    code
}

/// The same, once it has written to so many pages of its memory, from 2 MiB on.
fn filling(pages: u32) -> Vec<u8> {
    // mov edi, 0x20_0000; mov ecx, pages
    let mut code = vec![0xbf, 0x00, 0x00, 0x20, 0x00, 0xb9];
    code.extend(pages.to_le_bytes());
    // mov byte [rdi], 1; add rdi, 0x1000; dec ecx; jnz to the first
    code.extend([0xc6, 0x07, 0x01, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]);
    code.extend([0xff, 0xc9, 0x75, 0xf2]);
    code.extend(ticking());
    code
}

/// Starts the program with its console in this file.
fn start<'a>(bench: &'a Bench, console: &str, more: &[&str]) -> Running<'a> {
    let console = format!("file:{console}");
    let arguments = [&["--console", &console], more].concat();
    bench.start_command(bench.command(&arguments))
}

fn has_printed(bench: &Bench, console: &str) -> bool {
    fs::read(bench.file(console)).is_ok_and(|bytes| bytes.contains(&b'x'))
}

fn socket(bench: &Bench) -> PathBuf {
    bench.file("api")
}

/// A guest with a disk, that ticks, behind the API.
fn ticking_guest(bench: &Bench, mib: u32) -> (Running<'_>, Client) {
    fs::write(bench.file("disk"), vec![7; 1 << 20]).unwrap();
    // What another one has printed says nothing of this one.
    let _ = fs::remove_file(bench.file("first"));
    let mut running = start(bench, "first", &["--api-sock", "api"]);
    let mut client = Client::at(&socket(bench));
    let source = json!({"kernel_image_path": "kernel"});
    client.done("PUT", "/boot-source", source);
    let machine = json!({"vcpu_count": 1, "mem_size_mib": mib});
    client.done("PUT", "/machine-config", machine);
    let drive = json!({"drive_id": "a", "path_on_host": "disk", "is_root_device": false});
    client.done("PUT", "/drives/a", drive);
    client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    assert!(running.wait_until(|| has_printed(bench, "first")));
    (running, client)
}

fn create() -> Value {
    json!({"snapshot_path": "s", "mem_file_path": "m", "live": true, "sync": false,
        "drives": [{"drive_id": "a", "path_on_host": "d"}]})
}

/// What a load says, with this resumed or not.
fn load(resume: bool) -> Value {
    json!({"snapshot_path": "s", "resume_vm": resume, "mem_backend": {"backend_type": "File", "backend_path": "m"},
        "drive_overrides": [{"drive_id": "a", "path_on_host": "d"}]})
}

fn write_load(bench: &Bench, load: &Value) {
    bench.write("load.json", load.to_string().as_bytes());
}

fn kill(mut running: Running<'_>) {
    running.signal(SIGKILL);
    running.child.wait().unwrap();
}

#[test]
fn a_snapshot_is_loaded_by_the_command_line() {
    if no_kvm("a_snapshot_is_loaded_by_the_command_line") {
        return;
    }
    let bench = Bench::new(&ticking());
    let (running, mut client) = ticking_guest(&bench, 64);
    let mut elsewhere = create();
    elsewhere["drives"][0]["path_on_host"] = json!("disk");
    let why = client.refused("PUT", "/snapshot/create", elsewhere);
    assert!(
        why.contains("\"disk\" is an image in use: process"),
        "{why}"
    );
    let taken = client.ask("PUT", "/snapshot/create", &create());
    assert_eq!(taken.status, 200, "{taken:?}");
    for field in ["stood_still_us", "disks_us", "memory_bytes"] {
        assert!(taken.body[field].as_u64().unwrap() > 0, "{taken:?}");
    }
    kill(running);
    assert!(fs::read(bench.file("d")).unwrap() == vec![7; 1 << 20]);

    for (console, recorded) in [("second", false), ("once more", true)] {
        let mut load = load(true);
        load["working_set_path"] = json!("w");
        write_load(&bench, &load);
        assert_eq!(bench.file("w").exists(), recorded);
        let arguments = ["--load-snapshot", "load.json", "--no-api"];
        let mut running = start(&bench, console, &arguments);
        assert!(running.wait_until(|| has_printed(&bench, console)));
        running.signal(SIGTERM);
        assert_eq!(running.end().code(), Some(TERMINATED));
    }

    write_load(&bench, &load(false));
    fs::remove_file(socket(&bench)).unwrap();
    let arguments = ["--load-snapshot", "load.json", "--api-sock", "api"];
    let mut running = start(&bench, "third", &arguments);
    let mut client = Client::at(&socket(&bench));
    assert_eq!(client.get("/")["state"], "Paused");
    assert_eq!(client.get("/vm/config")["drives"][0]["path_on_host"], "d");
    assert!(!has_printed(&bench, "third"));
    client.done("PATCH", "/vm", json!({"state": "Resumed"}));
    assert!(running.wait_until(|| has_printed(&bench, "third")));
    // It goes on in the middle of what it was: a snapshot of it can be taken, too.
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    let again = json!({"snapshot_path": "s2", "mem_file_path": "m2"});
    client.done("PUT", "/snapshot/create", again);
    kill(running);

    // It is verified, and made one of a chain (here of one).
    let verify = |more: &[&str]| bench.run_with(&[&["--verify-snapshot", "s"], more].concat());
    assert_eq!(verify(&[]).code(), Some(0));
    verify(&["--memory", "m2"]).assert(CONFIG, &["\"m2\" is not the memory that belongs"]);
    let into = [
        "--flatten-snapshot",
        "s",
        "--into-state",
        "f",
        "--into-memory",
        "fm",
    ];
    assert_eq!(bench.run_with(&into).code(), Some(0));
    fs::remove_file(bench.file("m")).unwrap();
    verify(&[]).assert(CONFIG, &["cannot open the memory file"]);
    let mut flat = load(true);
    flat["snapshot_path"] = json!("f");
    flat["mem_backend"]["backend_path"] = json!("fm");
    write_load(&bench, &flat);
    let arguments = ["--load-snapshot", "load.json", "--no-api"];
    let mut running = start(&bench, "flat", &arguments);
    assert!(running.wait_until(|| has_printed(&bench, "flat")));
    kill(running);
}

/// Files in the making, by their names.
fn hidden(bench: &Bench) -> Vec<String> {
    let entries = fs::read_dir(bench.path()).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[test]
fn what_a_monitor_leaves_that_is_killed_while_it_writes_is_removed_by_the_next() {
    if no_kvm("what_a_monitor_leaves_that_is_killed_while_it_writes_is_removed_by_the_next") {
        return;
    }
    const PAGES: u32 = 100_000;
    let bench = Bench::new(&filling(PAGES));
    for name in ["s", "m", "d"] {
        bench.write(name, b"an older one");
    }
    let (running, mut client) = ticking_guest(&bench, 512);
    let asking = std::thread::spawn(move || {
        // It never answers.
        let ask = || client.ask("PUT", "/snapshot/create", &create());
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(ask)).is_err()
    });
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while hidden(&bench).len() < 3 {
        assert!(std::time::Instant::now() < until, "nothing is written");
        std::thread::yield_now();
    }
    kill(running);
    assert!(asking.join().unwrap(), "it was done before it was killed");
    let left = hidden(&bench);
    assert_eq!(left.len(), 3, "{left:?}");
    for name in ["s", "m", "d"] {
        assert_eq!(fs::read(bench.file(name)).unwrap(), b"an older one");
    }
    // What somebody is writing still is not touched, nor what has another name.
    let theirs = fs::File::create(bench.file(".m.1")).unwrap();
    assert!(alveole_block_store::lock_alone(&theirs).unwrap());
    bench.write(".m.1x", b"");
    bench.write(".mm.1", b"");
    fs::remove_file(socket(&bench)).unwrap();
    let (running, mut client) = ticking_guest(&bench, 512);
    let taken = client.ask("PUT", "/snapshot/create", &create());
    assert_eq!(taken.status, 200, "{taken:?}");
    assert!(taken.body["memory_bytes"].as_u64().unwrap() >= u64::from(PAGES) * 4096);
    let mut left = hidden(&bench);
    left.sort();
    assert_eq!(left, [".m.1", ".m.1x", ".mm.1"]);
    assert!(fs::read(bench.file("d")).unwrap() == vec![7; 1 << 20]);
    kill(running);
}

/// A small file system in RAM, taken away at the end.
struct Small(PathBuf);

impl Small {
    /// None: this user may not mount.
    fn mount(at: PathBuf) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=512k", "none"])
            .arg(&at);
        let mounted = mount.output().is_ok_and(|o| o.status.success());
        mounted.then_some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_disk_that_is_full_half_way_leaves_the_guest_and_older_files_as_they_were() {
    const TEST: &str = "a_disk_that_is_full_half_way_leaves_the_guest_and_older_files_as_they_were";
    if no_kvm(TEST) {
        return;
    }
    let bench = Bench::new(&filling(1000));
    let Some(small) = Small::mount(bench.file("small")) else {
        return skipped(TEST, "this user may not mount a tmpfs");
    };
    for name in ["s", "m", "d"] {
        fs::write(small.0.join(name), "an older one").unwrap();
    }
    let (mut running, mut client) = ticking_guest(&bench, 64);
    // Memory does not fit, the image of the disk does not, neither does.
    for (live, memory, disk) in [
        (true, "small/m", "d"),
        (true, "m", "small/d"),
        (false, "small/m", "d"),
        (false, "m", "small/d"),
        (false, "small/m", "small/d"),
    ] {
        let mut create = create();
        create["live"] = json!(live);
        create["snapshot_path"] = json!("small/s");
        create["mem_file_path"] = json!(memory);
        create["drives"][0]["path_on_host"] = json!(disk);
        let state = |state: &str| json!({ "state": state });
        if !live {
            client.done("PATCH", "/vm", state("Paused"));
        }
        let why = client.refused("PUT", "/snapshot/create", create);
        assert!(why.contains("No space left"), "{why}");
        if !live {
            client.done("PATCH", "/vm", state("Resumed"));
        }
        for name in ["s", "m", "d"] {
            assert_eq!(fs::read(small.0.join(name)).unwrap(), b"an older one");
        }
        assert_eq!(fs::read_dir(&small.0).unwrap().count(), 3);
        assert_eq!(hidden(&bench), Vec::<String>::new());
        assert!(!bench.file("m").exists() && !bench.file("d").exists());
        // The guest goes on.
        fs::write(bench.file("first"), "").unwrap();
        assert!(running.wait_until(|| has_printed(&bench, "first")));
    }
    let taken = client.ask("PUT", "/snapshot/create", &create());
    assert_eq!(taken.status, 200, "{taken:?}");
    kill(running);
}

#[test]
fn a_guest_goes_on_from_its_first_moments() {
    if no_kvm("a_guest_goes_on_from_its_first_moments") {
        return;
    }
    const PAGES: u32 = 10_000;
    let bench = Bench::new(&filling(PAGES));
    for round in 0..8u64 {
        let running = start(&bench, "first", &["--api-sock", "api"]);
        let mut client = Client::at(&socket(&bench));
        let source = json!({"kernel_image_path": "kernel"});
        client.done("PUT", "/boot-source", source);
        client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
        std::thread::sleep(std::time::Duration::from_millis(round));
        let mut create = create();
        create["drives"] = json!([]);
        let taken = client.ask("PUT", "/snapshot/create", &create);
        assert_eq!(taken.status, 200, "{taken:?}");
        kill(running);
        fs::remove_file(socket(&bench)).unwrap();
        let mut load = load(true);
        load["drive_overrides"] = json!([]);
        write_load(&bench, &load);
        // It prints only when all pages are written; then a snapshot has them.
        let console = format!("round {round}");
        let arguments = ["--load-snapshot", "load.json", "--api-sock", "api"];
        let mut running = start(&bench, &console, &arguments);
        assert!(running.wait_until(|| has_printed(&bench, &console)));
        let mut client = Client::at(&socket(&bench));
        let taken = client.ask("PUT", "/snapshot/create", &create);
        let bytes = taken.body["memory_bytes"].as_u64().unwrap();
        assert!(bytes >= u64::from(PAGES) * 4096, "{taken:?}");
        kill(running);
        fs::remove_file(socket(&bench)).unwrap();
    }
}

#[test]
fn a_client_half_way_through_a_request_waits_for_nobody_and_is_answered() {
    if no_kvm("a_client_half_way_through_a_request_waits_for_nobody_and_is_answered") {
        return;
    }
    let bench = Bench::new(&ticking());
    let (running, mut client) = ticking_guest(&bench, 64);
    let body = json!({"state": "Paused"}).to_string();
    let request = format!(
        "PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let (first, second) = request.split_at(request.len() - 5);
    let mut slow = UnixStream::connect(socket(&bench)).unwrap();
    slow.write_all(first.as_bytes()).unwrap();
    let taken = client.ask("PUT", "/snapshot/create", &create());
    assert_eq!(taken.status, 200, "{taken:?}");
    assert_eq!(client.get("/")["state"], "Running");
    slow.write_all(second.as_bytes()).unwrap();
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 204");
    assert_eq!(client.get("/")["state"], "Paused");
    kill(running);
}

#[test]
fn what_cannot_be_loaded_at_the_start_is_told() {
    let bench = Bench::new(&ticking());
    let run = |more: &[&str]| {
        let load = ["--console", "none", "--load-snapshot", "load.json"];
        bench.run_with(&[&load[..], more].concat())
    };
    run(&["--no-api"]).assert(CONFIG, &["load.json", "is the path right?"]);
    bench.write("load.json", b"{}");
    run(&["--no-api"]).assert(CONFIG, &["\"snapshot_path\": this field is required"]);
    write_load(&bench, &load(false));
    run(&["--no-api"]).assert(CONFIG, &["nobody could let its guest go on"]);
    run(&["--config-file", "vm.json"]).assert(
        USAGE,
        &["--config-file and --load-snapshot exclude each other"],
    );
    write_load(&bench, &load(true));
    run(&["--no-api"]).assert(CONFIG, &["cannot open the snapshot \"s\""]);
    bench.write("s", b"no snapshot");
    run(&["--no-api"]).assert(CONFIG, &["\"s\": "]);
}
