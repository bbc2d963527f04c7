//! What a load finds where things are not as they were when the snapshot was taken: somebody else has the disk or the tap, files
//! were moved, exchanged or cut, memory comes from a process that dies, lies or says nothing. And what a guest is told of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alveole_guest_memory::test_server::{TestServer, may_serve};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::network::{MAC, ip, tap};
use crate::api_client::Response;
use crate::harness::images::{path, tool};
use crate::harness::{Running, Vm, patience, skip};

const MEMORY_MIB: u64 = 128;

fn at(dir: &Path, name: &str) -> PathBuf {
    dir.join(name)
}

/// A guest that takes commands, of which a snapshot was taken, and which stands still.
fn saved(dir: &Path, change: impl FnOnce(Vm) -> Vm) -> Option<Running> {
    let vm = change(Vm::any()?.memory_mib(MEMORY_MIB));
    let mut guest = vm.takes_commands().by_api().boot();
    guest.wait_for_commands();
    assert_eq!(guest.ask("echo kept >/kept").0, 0);
    guest
        .client()
        .done("PATCH", "/vm", json!({"state": "Paused"}));
    save(&guest, dir, "memory");
    Some(guest)
}

fn save(guest: &Running, dir: &Path, memory: &str) {
    let body = json!({"snapshot_path": at(dir, "state"), "mem_file_path": at(dir, memory)});
    guest.client().done("PUT", "/snapshot/create", body);
}

fn load_body(dir: &Path) -> Value {
    let backend = json!({"backend_type": "File", "backend_path": at(dir, "memory")});
    json!({"snapshot_path": at(dir, "state"), "mem_backend": backend, "resume_vm": true})
}

/// What a monitor that cannot load it says. It ends: it has nothing else to do.
#[track_caller]
fn refuses(body: Value) -> String {
    let vm = Vm::any().unwrap().nothing_yet().boot();
    let told = vm.client().refused("PUT", "/snapshot/load", body);
    println!("{told}");
    told
}

#[track_caller]
fn goes_on(body: Value) -> Running {
    let mut guest = Vm::any().unwrap().loads(body).boot();
    assert_eq!(guest.ask("cat /kept"), (0, "kept".into()));
    guest
}

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

/// Two guests that write to one image would destroy it: the second is told, and gets a copy.
#[test]
fn a_disk_that_another_guest_writes_is_refused() {
    let dir = TempDir::new().unwrap();
    let disk = at(dir.path(), "disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let Some(first) = saved(dir.path(), |vm| vm.disk(&disk, json!({}))) else {
        return;
    };
    let body = load_body(dir.path());
    // The one that it was taken of is there still, paused.
    let told = refuses(body.clone());
    assert!(
        told.contains(path(&disk)) && told.contains("has it open to write"),
        "{told}"
    );
    drop(first);
    let second = goes_on(body.clone());
    let told = refuses(body.clone());
    assert!(told.contains(path(&disk)), "{told}");
    let copy = at(dir.path(), "copy");
    fs::copy(&disk, &copy).unwrap();
    let anew = json!([{"drive_id": "disk0", "path_on_host": copy}]);
    let third = goes_on(with(body, "drive_overrides", anew));
    for mut guest in [second, third] {
        assert_eq!(
            guest
                .ask("echo written | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null")
                .0,
            0
        );
        guest.leave().assert_code(0);
    }
}

#[test]
fn a_tap_that_another_guest_has_is_refused() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let Some(first) = saved(dir.path(), |vm| vm.tap("tap0", json!({"guest_mac": MAC}))) else {
        return;
    };
    let body = load_body(dir.path());
    let told = refuses(body.clone());
    assert!(told.contains("tap0"), "{told}");
    let none = json!([{"iface_id": "net0", "host_dev_name": "tap9"}]);
    let told = refuses(with(body.clone(), "network_overrides", none));
    assert!(told.contains("tap9"), "{told}");
    ip("tuntap add dev tap1 mode tap vnet_hdr");
    let other = json!([{"iface_id": "net0", "host_dev_name": "tap1"}]);
    goes_on(with(body.clone(), "network_overrides", other))
        .leave()
        .assert_code(0);
    drop(first);
    goes_on(body).leave().assert_code(0);
}

#[test]
fn memory_that_was_exchanged_or_cut_is_refused() {
    let dir = TempDir::new().unwrap();
    let Some(guest) = saved(dir.path(), |vm| vm) else {
        return;
    };
    let body = load_body(dir.path());
    let state = fs::read(at(dir.path(), "state")).unwrap();
    let memory = at(dir.path(), "memory");
    // A later one, over its memory: the state of the first belongs to none any more.
    save(&guest, dir.path(), "memory");
    drop(guest);
    let later = fs::read(at(dir.path(), "state")).unwrap();
    fs::write(at(dir.path(), "state"), state).unwrap();
    let told = refuses(body.clone());
    assert!(
        told.contains(path(&memory)) && told.contains("taken anew"),
        "{told}"
    );
    fs::write(at(dir.path(), "state"), later).unwrap();
    goes_on(body.clone()).leave().assert_code(0);
    File::options()
        .write(true)
        .open(&memory)
        .unwrap()
        .set_len(MEMORY_MIB << 20)
        .unwrap();
    let told = refuses(body.clone());
    assert!(
        told.contains(path(&memory)) && told.contains("it was cut"),
        "{told}"
    );
    fs::remove_file(&memory).unwrap();
    let told = refuses(body);
    assert!(
        told.contains(path(&memory)) && told.contains("is the path right?"),
        "{told}"
    );
}

#[test]
fn a_disk_whose_base_was_moved_is_refused() {
    let dir = TempDir::new().unwrap();
    let [base, moved, disk] =
        ["base.img", "moved.img", "disk.qcow2"].map(|name| at(dir.path(), name));
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        path(&base),
        "-F",
        "raw",
        path(&disk),
    ];
    if !tool("qemu-img", &words) {
        return;
    }
    let Some(guest) = saved(dir.path(), |vm| vm.disk(&disk, json!({"format": "qcow2"}))) else {
        return;
    };
    drop(guest);
    let body = load_body(dir.path());
    fs::rename(&base, &moved).unwrap();
    let told = refuses(body.clone());
    assert!(
        told.contains(path(&base)) && told.contains(path(&disk)),
        "{told}"
    );
    fs::rename(&moved, &base).unwrap();
    goes_on(body).leave().assert_code(0);
}

/// A guest knows the size of its disk.
#[test]
fn a_disk_that_was_cut_is_refused() {
    let dir = TempDir::new().unwrap();
    let disk = at(dir.path(), "disk");
    fs::write(&disk, vec![7; 2 << 20]).unwrap();
    let Some(guest) = saved(dir.path(), |vm| vm.disk(&disk, json!({}))) else {
        return;
    };
    drop(guest);
    File::options()
        .write(true)
        .open(&disk)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let told = refuses(load_body(dir.path()));
    assert!(
        told.contains("its disk had 2097152 bytes, this one has 1048576"),
        "{told}"
    );
}

// Memory that another process serves -----------------------------------------------------------

/// A snapshot whose memory is served, by what `page` says of each page of its file.
fn served(
    test: &str,
    dir: &Path,
    page: impl Fn(u64, Vec<u8>) -> Option<Vec<u8>> + Send + 'static,
) -> Option<(Value, TestServer)> {
    if !may_serve(test) {
        return None;
    }
    let disk = at(dir, "disk");
    fs::write(&disk, vec![7; 16 << 20]).unwrap();
    drop(saved(dir, |vm| vm.cpus(2).disk(&disk, json!({})))?);
    let file = File::open(at(dir, "memory")).unwrap();
    let socket = at(dir, "memory.sock");
    let server = TestServer::start(&socket, move |number| {
        let mut bytes = vec![0; 4096];
        file.read_exact_at(&mut bytes, number * 4096).unwrap();
        page(number, bytes)
    });
    let backend = json!({"backend_type": "Uffd", "backend_path": socket});
    Some((
        with(load_body(dir), "mem_backend", backend),
        server.unwrap(),
    ))
}

#[test]
fn a_guest_goes_on_with_memory_that_another_process_serves() {
    let dir = TempDir::new().unwrap();
    let Some((body, server)) = served(
        "loads::a_guest_goes_on_with_memory_that_another_process_serves",
        dir.path(),
        |_, page| Some(page),
    ) else {
        return;
    };
    let mut guest = goes_on(body);
    let first = server.served();
    // Memory that nobody has touched, of the file and beside it.
    let (status, sum) =
        guest.ask("dd if=/dev/zero of=/filled bs=1M count=40 2>/dev/null; sha256sum </filled");
    assert_eq!(status, 0, "{sum}");
    let last = server.served();
    println!(
        "{first} pages until it answered, {last} at the end, of {}",
        MEMORY_MIB << 8
    );
    assert!(first > 0 && last > first + (40 << 8) / 2 && last <= MEMORY_MIB << 8);
    // A snapshot of it has what nobody has asked for.
    guest
        .client()
        .done("PATCH", "/vm", json!({"state": "Paused"}));
    let again = TempDir::new().unwrap();
    save(&guest, again.path(), "memory");
    drop(guest);
    drop(server);
    let mut guest = goes_on(load_body(again.path()));
    assert_eq!(guest.ask("sha256sum </filled"), (0, sum));
    guest.leave().assert_code(0);
}

/// It ends with words, and its guest does nothing with zeroes for pages.
#[test]
fn a_guest_whose_memory_is_served_ends_when_the_server_dies() {
    let dir = TempDir::new().unwrap();
    let Some((body, server)) = served(
        "loads::a_guest_whose_memory_is_served_ends_when_the_server_dies",
        dir.path(),
        |_, page| Some(page),
    ) else {
        return;
    };
    let mut guest = goes_on(body);
    // Processors touch memory, and so does the disk.
    guest.type_in(
        "read_all() { while :; do dd if=/dev/vda of=/dev/shm/$1 bs=1M iflag=direct 2>/dev/null; done; }; read_all a & read_all b & \
         while :; do dd if=/dev/zero of=/filled bs=1M count=20 2>/dev/null; done\n",
    );
    std::thread::sleep(Duration::from_millis(50));
    server.stop();
    let end = guest.wait();
    end.assert_code(1);
    assert!(
        end.line().contains("that serves guest memory") && end.line().contains("is gone"),
        "{end}"
    );
    assert!(
        !end.console.contains("BUG") && !end.console.contains("Oops"),
        "{end}"
    );
}

/// A monitor that was asked to load this, and what it answered: it may need pages for that, or not.
fn asked_to_load(body: &Value, server: &TestServer) -> (Running, Response) {
    let vm = Vm::any().unwrap().nothing_yet().boot();
    let answer = vm.client().ask("PUT", "/snapshot/load", body);
    println!(
        "{answer:?}; {} of {} pages",
        server.served(),
        server.asked()
    );
    (vm, answer)
}

/// Pages that never come keep nobody from ending it.
#[test]
fn a_guest_whose_pages_never_come_can_be_ended() {
    let dir = TempDir::new().unwrap();
    let withheld = |number: u64, page| (number % 16 != 5).then_some(page);
    let Some((body, server)) = served(
        "loads::a_guest_whose_pages_never_come_can_be_ended",
        dir.path(),
        withheld,
    ) else {
        return;
    };
    let (vm, answer) = asked_to_load(&body, &server);
    if answer.status == 204 {
        let until = Instant::now() + patience(30);
        while server.asked() == server.served() {
            assert!(Instant::now() < until, "it asks for nothing");
            std::thread::sleep(Duration::from_millis(10));
        }
        vm.signal(Signal::SIGINT);
        let end = vm.wait();
        assert!(matches!(end.code, Some(0 | 130)), "{end}");
    } else {
        assert!(answer.fault().contains("serves guest memory"), "{answer:?}");
    }
}

/// A server that puts in what it likes has the guest in its hand, and nobody else.
#[test]
fn a_guest_whose_memory_is_a_lie_ends_by_itself() {
    let dir = TempDir::new().unwrap();
    let lies =
        |number: u64, page: Vec<u8>| Some(page.iter().map(|byte| byte ^ number as u8).collect());
    let Some((body, server)) = served(
        "loads::a_guest_whose_memory_is_a_lie_ends_by_itself",
        dir.path(),
        lies,
    ) else {
        return;
    };
    let (vm, answer) = asked_to_load(&body, &server);
    if answer.status == 204 {
        // It may crash, or run in circles.
        std::thread::sleep(Duration::from_secs(1));
        vm.signal(Signal::SIGINT);
        let end = vm.wait();
        println!("{end}");
        assert!(matches!(end.code, Some(0 | 1 | 4 | 5 | 6 | 130)), "{end}");
    }
}

// What the guest is told -------------------------------------------------------------------------

#[test]
fn the_kernel_of_a_loaded_guest_seeds_its_random_numbers_anew() {
    const SAID: &str = "dmesg | grep -c 'crng reseeded due to virtual machine fork'";
    let dir = TempDir::new().unwrap();
    let Some(vm) = Vm::any() else { return };
    let mut guest = vm.memory_mib(MEMORY_MIB).takes_commands().by_api().boot();
    guest.wait_for_commands();
    if guest.ask("ls -d /sys/bus/*/drivers/vmgenid").0 != 0 {
        return skip("the guest's kernel has no driver of generation ids");
    }
    assert_eq!(guest.ask(SAID).1, "0");
    assert_eq!(guest.ask("echo kept >/kept").0, 0);
    // A file of its own for each, and random numbers for all.
    guest
        .client()
        .done("PATCH", "/vm", json!({"state": "Paused"}));
    save(&guest, dir.path(), "memory");
    guest
        .client()
        .done("PATCH", "/vm", json!({"state": "Resumed"}));
    let random = "head -c 16 /dev/urandom | sha256sum";
    let mut all = vec![guest.ask(random).1];
    assert_eq!(guest.ask(SAID).1, "0", "nobody has loaded this one");
    for _ in 0..3 {
        let mut clone = goes_on(load_body(dir.path()));
        assert_eq!(clone.ask(SAID).1, "1");
        all.push(clone.ask(random).1);
        clone.leave().assert_code(0);
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 4, "{all:?}");
}
