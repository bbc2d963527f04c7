//! Snapshots of the real program: taken of a guest that runs, loaded by the command line, and what is wrong with either.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod api_client;
#[expect(dead_code, reason = "tests/bad_input.rs uses the rest")]
mod tiny_guest;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use alveole_process_template::{Copy, HowEnded};
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

// Templates ---------------------------------------------------------------------------------------

/// Starts a template of `load.json`, whose standard input is ours to close.
fn template(bench: &Bench) -> Running<'_> {
    let mut command = bench.command(&["--template", "t", "--load-snapshot", "load.json"]);
    command.stdin(Stdio::piped());
    let mut running = bench.start_command(command);
    assert!(
        running.wait_until(|| bench.file("t").exists()),
        "{}",
        running.said()
    );
    running
}

/// A copy of the template with a console of its own, and what it says on standard error in a file.
fn copy(bench: &Bench, words: &[&str], name: &str) -> Copy {
    let console = format!("file:{name}");
    let words = [&["--console", &console], words].concat();
    let words: Vec<_> = words.into_iter().map(OsStr::new).collect();
    let nothing = File::open("/dev/null").unwrap();
    let said = File::create(bench.file(&format!("{name}.said"))).unwrap();
    let descriptors = [(0, nothing.as_fd()), (1, said.as_fd()), (2, said.as_fd())];
    Copy::ask(&bench.file("t"), &words, &descriptors).unwrap()
}

fn within(mut holds: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() && Instant::now() < until {
        thread::sleep(Duration::from_millis(5));
    }
    holds()
}

#[test]
fn guests_of_a_template_are_each_their_own() {
    if no_kvm("guests_of_a_template_are_each_their_own") {
        return;
    }
    let bench = Bench::new(&filling(64));
    let (running, mut client) = ticking_guest(&bench, 64);
    assert_eq!(client.ask("PUT", "/snapshot/create", &create()).status, 200);
    kill(running);
    write_load(&bench, &load(true));
    let mut template = template(&bench);
    let mut copies = Vec::new();
    for name in ["one", "two", "three"] {
        // A disk of its own, as the other one is locked; the snapshot and its memory are the template's.
        fs::copy(bench.file("d"), bench.file(&format!("{name}.disk"))).unwrap();
        let mut own = load(true);
        own["drive_overrides"][0]["path_on_host"] = json!(format!("{name}.disk"));
        let file = format!("{name}.json");
        bench.write(&file, own.to_string().as_bytes());
        let words = ["--load-snapshot", &file, "--api-sock", name, "--id", name];
        let console = format!("{name}.console");
        copies.push((name, copy(&bench, &words, &console)));
    }
    for (name, copy) in &mut copies {
        let console = format!("{name}.console");
        let said = || fs::read_to_string(bench.file(&format!("{console}.said"))).unwrap();
        assert!(
            within(|| has_printed(&bench, &console)),
            "{name}: {}",
            said()
        );
        let mut client = Client::at(&bench.file(name));
        assert_eq!(client.get("/")["id"], **name);
        let disk = client.get("/vm/config")["drives"][0]["path_on_host"].clone();
        assert_eq!(disk, format!("{name}.disk"));
        assert_eq!(copy.try_wait(), None);
        // Each is sandboxed as any other: main thread and processor have a filter.
        let tasks = fs::read_dir(format!("/proc/{}/task", copy.pid())).unwrap();
        for task in tasks {
            let path = task.unwrap().path();
            let named = fs::read_to_string(path.join("comm")).unwrap();
            let status = fs::read_to_string(path.join("status")).unwrap();
            let kernels = named.starts_with("kvm-") || named.starts_with("vhost-");
            assert!(
                kernels || status.contains("Seccomp:\t2"),
                "{named}: {status}"
            );
        }
    }
    // One of them is asked to end, one killed, and one left alone by who asked for it.
    let signal = |copy: &Copy, signal| {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(copy.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    };
    signal(&copies[0].1, SIGTERM);
    assert_eq!(copies[0].1.wait(), HowEnded::Signal(SIGTERM as i32));
    copies[1].1.kill();
    assert_eq!(copies[1].1.wait(), HowEnded::Signal(SIGKILL as i32));
    let last = copies[2].1.pid();
    drop(template.child.stdin.take());
    assert!(within(|| !bench.file("t").exists()));
    assert!(
        template.child.try_wait().unwrap().is_none(),
        "a copy is left"
    );
    drop(copies);
    assert!(within(|| !Path::new(&format!("/proc/{last}")).exists()));
    assert_eq!(template.end().code(), Some(0));
}

#[test]
fn what_is_wrong_with_a_template_or_its_copies_is_said_by_them() {
    if no_kvm("what_is_wrong_with_a_template_or_its_copies_is_said_by_them") {
        return;
    }
    let bench = Bench::new(&ticking());
    let (running, mut client) = ticking_guest(&bench, 64);
    assert_eq!(client.ask("PUT", "/snapshot/create", &create()).status, 200);
    kill(running);
    let refused = |load: &Value, words: &[&str]| {
        write_load(&bench, load);
        let arguments = ["--template", "t", "--load-snapshot", "load.json"];
        bench.run_with(&arguments).assert(CONFIG, words);
        assert!(!bench.file("t").exists());
    };
    let mut nowhere = load(true);
    nowhere["snapshot_path"] = json!("nowhere");
    refused(&nowhere, &["cannot open the snapshot", "nowhere"]);
    let mut other = load(true);
    other["mem_backend"]["backend_path"] = json!("d");
    refused(&other, &["is not the memory that belongs"]);

    write_load(&bench, &load(true));
    bench.write("t", b"");
    let arguments = ["--template", "t", "--load-snapshot", "load.json"];
    let taken = bench.run_with(&arguments);
    taken.assert(1, &["cannot listen at \"t\"", "remove what is there"]);
    fs::remove_file(bench.file("t")).unwrap();
    let mut template = template(&bench);
    let mut same = load(true);
    same["mem_backend"]["backend_path"] = json!("m2");
    bench.write("other.json", same.to_string().as_bytes());
    for (name, words, code, why) in [
        ("word", &["--nope"][..], USAGE, "--nope"),
        ("nothing", &["--no-api"], USAGE, "--no-api"),
        ("boots", &["--api-sock", "x"], USAGE, "loads the snapshot"),
        (
            "another",
            &["--load-snapshot", "other.json", "--no-api"],
            CONFIG,
            "mem_backend differs",
        ),
    ] {
        let mut copy = copy(&bench, words, name);
        let ended = copy.wait();
        let said = fs::read_to_string(bench.file(&format!("{name}.said"))).unwrap();
        assert_eq!(ended, HowEnded::Code(code), "{name}: {said}");
        assert!(said.contains(why), "{name}: {said}");
    }
    // It goes on, for those who come with what can be.
    let words = ["--load-snapshot", "load.json", "--no-api"];
    let copy = copy(&bench, &words, "well");
    assert!(within(|| has_printed(&bench, "well")));
    template.signal(SIGTERM);
    template.child.wait().unwrap();
    assert!(fs::read_dir(format!("/proc/{}/task", copy.pid())).is_ok());
}
