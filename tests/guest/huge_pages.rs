//! Guests whose memory is made of pages of hugetlbfs: they run, go through snapshots of every kind, and take no page more than was reserved.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use alveole_guest_memory::test_huge_pages::MorePages;
use alveole_guest_memory::test_server::{TestServer, may_serve};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Running, Vm};

const MEMORY_MIB: u64 = 128;
const HUGE_PAGE: u64 = 2 << 20;
/// What the guest works on while it goes through snapshots.
const FILLED: &str = "dd if=/dev/urandom of=/filled bs=1M count=24 2>/dev/null; sha256sum </filled";

/// As many more as one guest needs.
fn more(test: &str) -> Option<MorePages> {
    MorePages::make(test, (MEMORY_MIB << 20) / HUGE_PAGE)
}

/// MiB of huge pages that the monitor has.
fn huge_mib(guest: &Running) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    let of_all = maps
        .lines()
        .filter_map(|line| line.strip_prefix("Private_Hugetlb:"));
    let kib = of_all.map(|kib| {
        let kib = kib.trim().strip_suffix(" kB").unwrap();
        kib.parse::<u64>().unwrap()
    });
    kib.sum::<u64>() >> 10
}

fn save(guest: &Running, dir: &Path, name: &str, more: &Value) {
    let mut body = json!({
        "snapshot_path": dir.join(format!("{name}.state")),
        "mem_file_path": dir.join(format!("{name}.memory")),
    });
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    let answer = guest.client().ask("PUT", "/snapshot/create", &body);
    assert!(matches!(answer.status, 200 | 204), "{answer:?}");
    println!("{name}: {:?}", answer.body);
}

fn load(dir: &Path, name: &str) -> Value {
    let backend =
        json!({"backend_type": "File", "backend_path": dir.join(format!("{name}.memory"))});
    json!({"snapshot_path": dir.join(format!("{name}.state")), "mem_backend": backend, "resume_vm": true})
}

fn set(guest: &Running, state: &str) {
    guest.client().done("PATCH", "/vm", json!({"state": state}));
}

/// Asserts that the guest of `body` has what the snapshot's had, and its memory in so many MiB of huge pages at least and at most.
#[track_caller]
fn goes_on(body: Value, sum: &str, least: u64, most: u64) {
    let mut guest = Vm::any().unwrap().loads(body).boot();
    assert_eq!(guest.ask("sha256sum </filled"), (0, sum.to_owned()));
    let mib = huge_mib(&guest);
    assert!((least..=most).contains(&mib), "{mib} MiB of huge pages");
    guest.leave().assert_code(0);
}

#[test]
fn a_guest_in_huge_pages_goes_on_from_full_diff_and_live_snapshots() {
    let Some(vm) = Vm::any() else {
        return;
    };
    let test = "huge_pages::a_guest_in_huge_pages_goes_on_from_full_diff_and_live_snapshots";
    let Some(_more) = more(test) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let dir = dir.path();
    let vm = vm.memory_mib(MEMORY_MIB).cpus(2).huge_pages("2M");
    let mut guest = vm.tracks_dirty_pages().takes_commands().by_api().boot();
    guest.wait_for_commands();
    let (status, first) = guest.ask(FILLED);
    assert_eq!(status, 0, "{first}");
    let mib = huge_mib(&guest);
    assert!((24..=MEMORY_MIB).contains(&mib), "{mib} MiB of huge pages");
    // Live, while it writes; there is no huge page left that a child could have.
    let (status, told) = guest
        .ask("(while :; do dd if=/dev/urandom of=/other bs=1M count=8 2>/dev/null; done) >/dev/null 2>&1 &");
    assert_eq!(status, 0, "{told}");
    save(&guest, dir, "live", &json!({"live": true}));
    save(
        &guest,
        dir,
        "live-diff",
        &json!({"live": true, "snapshot_type": "Diff"}),
    );
    let (status, second) = guest.ask(FILLED);
    assert_eq!(status, 0, "{second}");
    assert_ne!(first, second);
    set(&guest, "Paused");
    save(&guest, dir, "diff", &json!({"snapshot_type": "Diff"}));
    save(&guest, dir, "full", &json!({}));
    drop(guest);
    let before = fs::read(dir.join("full.memory")).unwrap();
    for (name, sum) in [
        ("live", &first),
        ("live-diff", &first),
        ("diff", &second),
        ("full", &second),
    ] {
        // As the snapshot's guest had it.
        goes_on(load(dir, name), sum, 24, MEMORY_MIB);
    }
    // Without huge pages, and back.
    let mut small = load(dir, "full");
    small["huge_pages"] = json!("None");
    goes_on(small, &second, 0, 0);
    assert!(fs::read(dir.join("full.memory")).unwrap() == before);
}

#[test]
fn a_guest_of_small_pages_goes_on_in_huge_ones_that_another_process_serves() {
    let test =
        "huge_pages::a_guest_of_small_pages_goes_on_in_huge_ones_that_another_process_serves";
    let Some(vm) = Vm::any() else {
        return;
    };
    if !may_serve(test) {
        return;
    }
    let Some(_more) = more(test) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let dir = dir.path();
    let vm = vm.memory_mib(MEMORY_MIB).cpus(2).takes_commands();
    let mut guest = vm.by_api().boot();
    guest.wait_for_commands();
    let (status, sum) = guest.ask(FILLED);
    assert_eq!(status, 0, "{sum}");
    assert_eq!(huge_mib(&guest), 0);
    set(&guest, "Paused");
    save(&guest, dir, "s", &json!({}));
    drop(guest);
    let mut body = load(dir, "s");
    body["huge_pages"] = json!("2M");
    goes_on(body.clone(), &sum, 24, MEMORY_MIB);
    let file = File::open(dir.join("s.memory")).unwrap();
    let server = TestServer::start(&dir.join("u"), move |number| {
        let mut bytes = vec![0; HUGE_PAGE as usize];
        file.read_exact_at(&mut bytes, number * HUGE_PAGE).unwrap();
        Some(bytes)
    });
    let server = server.unwrap();
    body["mem_backend"] = json!({"backend_type": "Uffd", "backend_path": dir.join("u")});
    goes_on(body, &sum, 24, MEMORY_MIB);
    let served = server.served();
    assert!(
        (12..=MEMORY_MIB / 2).contains(&served),
        "{served} huge pages were put in"
    );
}

#[test]
fn a_guest_for_which_the_host_has_too_few_huge_pages_does_not_start() {
    let Some(vm) = Vm::any() else {
        return;
    };
    let free = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.unwrap().trim().parse().unwrap();
    let mib = (free + 512) * 2;
    let end = vm.memory_mib(mib).huge_pages("2M").boot().wait();
    end.assert_code(1);
    let line = end.line();
    assert!(
        line.contains(&format!("{} huge pages", mib / 2)) && line.contains("vm.nr_hugepages="),
        "{end}"
    );
}
