//! What memory a snapshot has, page for page: that of one instant, whichever way it was taken, of a guest that writes as fast as it can.
//!
//! `resources/guest/snapshot-witness.rs` (`stamps`) writes: each thread its own pages, in order, round and round, each word of a page with
//! the number of the write; then it adds one to a number that all share. So at any instant the pages of a thread hold its last writes
//! without a gap, at most one of them is half written, in order, and the shared number is that of all writes, of which each thread may
//! not have counted its last. A page that is older or newer than the others, torn, or of another guest, breaks one of that.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Running, Vm, in_the_lab, patience};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
const MEMORY_MIB: u64 = 96;
const MEMORY: usize = (MEMORY_MIB as usize) << 20;
const THREADS: usize = 3;
/// First words of pages that a thread writes, and of the page that counts.
const STAMPED: u64 = 0x5374_616d_7065_6421;
const COUNTED: u64 = 0x436f_756e_7465_6421;

/// How much is written: where processors are software, it takes as long.
fn stamped_mib() -> usize {
    if in_the_lab() { 9 } else { 48 }
}

fn words(page: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    page.chunks_exact(8).map(word).collect()
}

/// How many writes memory is the memory of, if it is that of one instant, or why it is not.
fn one_instant(ram: &[u8]) -> Result<u64, String> {
    let each = stamped_mib() * 256 / THREADS;
    let mut stamped: Vec<Vec<Option<Vec<u64>>>> = vec![vec![None; each]; THREADS];
    let mut counted = Vec::new();
    for page in ram.chunks_exact(PAGE) {
        match u64::from_le_bytes(page[..8].try_into().unwrap()) {
            STAMPED => {
                let page = words(page);
                let (thread, at) = ((page[1] >> 32) as usize, page[1] as u32 as usize);
                let place = stamped.get_mut(thread).and_then(|pages| pages.get_mut(at));
                let place = place.ok_or(format!("there is no page {at} of {thread}"))?;
                if place.replace(page).is_some() {
                    return Err(format!("page {at} of {thread} is there twice"));
                }
            }
            COUNTED => counted.push(words(page)[2]),
            _ => {}
        }
    }
    let [counted] = counted[..] else {
        return Err(format!("not one page that counts: {counted:?}"));
    };
    let mut complete = 0;
    for (thread, pages) in stamped.into_iter().enumerate() {
        let all: Option<Vec<_>> = pages.into_iter().collect();
        let pages = all.ok_or(format!("not all pages of {thread} are there"))?;
        complete += writes_of(&pages).map_err(|why| format!("thread {thread}: {why}"))?;
    }
    if !(complete - THREADS as u64..=complete).contains(&counted) {
        return Err(format!("{complete} writes were done, {counted} counted"));
    }
    Ok(counted)
}

/// How many writes of one thread are done.
fn writes_of(pages: &[Vec<u64>]) -> Result<u64, String> {
    let each = pages.len() as u64;
    let newest = pages.iter().map(|page| page[2]).max().unwrap_or_default();
    if newest < each {
        return Err(format!("{newest} writes, not one for each page"));
    }
    let half = ((newest - 1) % each) as usize;
    let stamps = &pages[half][2..];
    let whole = stamps.iter().take_while(|word| **word == newest).count();
    if stamps[whole..].iter().any(|word| *word != newest - each) {
        return Err(format!(
            "page {half} is torn otherwise than by write {newest}: {stamps:?}"
        ));
    }
    let done = newest - u64::from(whole < WORDS - 2);
    for (at, page) in (0..each).zip(pages).filter(|(at, _)| *at != half as u64) {
        // The latest of those done that went to this page.
        let (round, last) = ((done - 1) / each, (done - 1) % each);
        let round = if at <= last { round } else { round - 1 };
        let number = round * each + at + 1;
        if page[2..].iter().any(|word| *word != number) {
            return Err(format!(
                "page {at} is not of write {number}, when {done} were done, but of {} to {}",
                page[2],
                page[WORDS - 1]
            ));
        }
    }
    Ok(done)
}

#[track_caller]
fn assert_one_instant(ram: &[u8], what: &str) -> u64 {
    one_instant(ram).unwrap_or_else(|why| panic!("{what}: {why}"))
}

/// The guest's memory as its monitor has it: what it sees itself.
fn memory_of(guest: &Running) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", guest.pid())).unwrap();
    // RAM is several mappings side by side, told from all others by not being reserved and
    // a wish about huge pages, or by the file of a snapshot.
    let (mut at, mut start) = (None, None);
    for line in maps.lines() {
        let range = line.split_once('-').and_then(|(from, rest)| {
            let (_, rights) = rest.split_once(' ')?;
            let from = u64::from_str_radix(from, 16).ok()?;
            Some(rights.starts_with("rw-p").then_some(from))
        });
        at = range.unwrap_or(at);
        let flags = line.strip_prefix("VmFlags:").unwrap_or_default();
        let has = |flag| flags.split_whitespace().any(|f| f == flag);
        let is_ram = has("nr") && (has("hg") || has("nh"));
        if is_ram || range.is_some() && line.ends_with(".memory") {
            start = start.or(at);
        }
    }
    let start = start.expect("RAM is mapped");
    let mut bytes = vec![0; MEMORY];
    let memory = fs::File::open(format!("/proc/{}/mem", guest.pid())).unwrap();
    memory.read_exact_at(&mut bytes, start).unwrap();
    bytes
}

/// Pages that differ.
fn different(one: &[u8], other: &[u8]) -> Vec<usize> {
    let pages = one.chunks_exact(PAGE).zip(other.chunks_exact(PAGE));
    let different = pages.enumerate().filter(|(_, (one, other))| one != other);
    different.map(|(page, _)| page).collect()
}

fn files(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    let file = |what| dir.join(format!("{name}.{what}"));
    (file("state"), file("memory"))
}

#[track_caller]
fn take(guest: &Running, dir: &Path, name: &str, more: &Value) -> Value {
    let (state, memory) = files(dir, name);
    let mut body = json!({"snapshot_path": state, "mem_file_path": memory});
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    let response = guest.client().ask("PUT", "/snapshot/create", &body);
    assert!(matches!(response.status, 200 | 204), "{response:?}");
    response.body
}

#[track_caller]
fn set(guest: &Running, state: &str) {
    guest.client().done("PATCH", "/vm", json!({"state": state}));
}

/// Memory that a file has all of.
fn memory_in(dir: &Path, name: &str) -> Vec<u8> {
    let file = fs::File::open(files(dir, name).1).unwrap();
    let mut ram = vec![0; MEMORY];
    file.read_exact_at(&mut ram, 0).unwrap();
    ram
}

/// A guest of a snapshot, which stands still.
fn load(dir: &Path, name: &str) -> Running {
    let (state, memory) = files(dir, name);
    let backend = json!({"backend_type": "File", "backend_path": memory});
    let body = json!({"snapshot_path": state, "mem_backend": backend, "track_dirty_pages": true});
    Vm::any().unwrap().loads(body).boot()
}

/// A guest that writes.
fn writing(pause_us: u32, tracks: bool) -> Option<Running> {
    let vm = Vm::any()?.memory_mib(MEMORY_MIB).cpus(2);
    // Pages stay where they are: one that was moved would be found twice.
    let vm = vm.cmdline("transparent_hugepage=never");
    let vm = if tracks { vm.tracks_dirty_pages() } else { vm };
    let mut guest = vm.takes_commands().by_api().boot();
    guest.wait_for_commands();
    guest.type_in(&format!(
        "snapshot-witness stamps {} {THREADS} {pause_us} &\n",
        stamped_mib()
    ));
    for thread in 0..THREADS {
        guest.wait_for_anywhere(&format!("stamped by {thread}"));
    }
    Some(guest)
}

/// A live snapshot, with `kind`, is one instant, later than `since`; so is a paused one behind it, and that has what the monitor has.
/// When each was: how many writes were done.
#[track_caller]
fn takes_instants(guest: &Running, dir: &Path, name: &str, kind: &str, since: u64) -> u64 {
    let body = json!({"live": true, "snapshot_type": kind});
    let taken = take(guest, dir, name, &body);
    let loaded = memory_of(&load(dir, name));
    let live = assert_one_instant(&loaded, name);
    if kind == "Full" {
        assert_one_instant(&memory_in(dir, name), name);
    }
    set(guest, "Paused");
    let full = format!("{name}-full");
    take(guest, dir, &full, &json!({}));
    let ram = memory_in(dir, &full);
    assert_eq!(different(&ram, &memory_of(guest)), [0; 0], "{full}");
    set(guest, "Resumed");
    let paused = assert_one_instant(&ram, &full);
    // A single page of another instant would be seen.
    let mut mixed = ram;
    let is_newer = |at: &usize| {
        loaded[*at..][..8] == STAMPED.to_le_bytes() && loaded[*at..][..PAGE] != mixed[*at..][..PAGE]
    };
    let other = (0..MEMORY)
        .step_by(PAGE)
        .rfind(is_newer)
        .expect("nothing was written");
    mixed[other..][..PAGE].copy_from_slice(&loaded[other..][..PAGE]);
    assert!(
        one_instant(&mixed).is_err(),
        "a page of {name} in {full} is not seen"
    );
    println!(
        "{name}: {} us, {} MiB; {since} writes before, {live} in it, {paused} when paused",
        taken["stood_still_us"],
        taken["memory_bytes"].as_u64().unwrap() >> 20
    );
    assert!(since <= live && live <= paused, "{since} {live} {paused}");
    assert!(paused > since, "nobody writes");
    paused
}

/// Nothing is ever a page too old, too new or torn, of a guest that writes as fast as it can.
#[test]
fn live_snapshots_are_one_instant_of_a_guest_that_writes() {
    let dir = TempDir::new().unwrap();
    let Some(guest) = writing(0, true) else {
        return;
    };
    let mut since = 0;
    let all = [("one", "Full"), ("two", "Diff"), ("three", "Diff")];
    let count = if in_the_lab() { 2 } else { 3 };
    for (name, kind) in all.into_iter().take(count) {
        since = takes_instants(&guest, dir.path(), name, kind, since);
    }
}

/// Nor of one that writes so slowly that most is written while it runs, and only little is left for the end.
#[test]
fn live_snapshots_are_one_instant_of_a_guest_that_writes_little() {
    let dir = TempDir::new().unwrap();
    let Some(guest) = writing(100, false) else {
        return;
    };
    takes_instants(&guest, dir.path(), "little", "Full", 0);
    // Loaded, it goes on from there.
    let (state, _) = files(dir.path(), "little");
    let vm = Vm::any().unwrap();
    let loaded = vm.loads(json!({"snapshot_path": state, "resume_vm": true}));
    let loaded = loaded.boot();
    let ram = memory_in(dir.path(), "little");
    let before = assert_one_instant(&ram, "little");
    let until = Instant::now() + patience(30);
    loop {
        set(&loaded, "Paused");
        if assert_one_instant(&memory_of(&loaded), "little, loaded") > before {
            return;
        }
        assert!(Instant::now() < until, "it does not go on");
        set(&loaded, "Resumed");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Whichever way the memory of a guest that stands still is written and loaded, every page is the same. A loaded guest is told that
/// it is one, by its generation id and its VMClock, and gets the time anew in the two pages of kvm-clock.
#[test]
fn every_way_of_one_instant_has_the_same_pages() {
    let dir = TempDir::new().unwrap();
    let dir = dir.path();
    let Some(guest) = writing(20, true) else {
        return;
    };
    take(&guest, dir, "base", &json!({"live": true}));
    take(
        &guest,
        dir,
        "chain1",
        &json!({"live": true, "snapshot_type": "Diff"}),
    );
    set(&guest, "Paused");
    let truth = memory_of(&guest);
    assert_one_instant(&truth, "truth");
    take(&guest, dir, "chain2", &json!({"snapshot_type": "Diff"}));
    take(&guest, dir, "full", &json!({}));
    take(&guest, dir, "live", &json!({"live": true}));
    // Nobody has written since.
    take(&guest, dir, "chain3", &json!({"snapshot_type": "Diff"}));
    let allocated = fs::metadata(files(dir, "chain3").1).unwrap().blocks() * 512;
    assert!(allocated < 1 << 20, "{allocated} bytes of nothing");
    assert_eq!(
        different(&truth, &memory_of(&guest)),
        [0; 0],
        "the guest's own"
    );
    for name in ["full", "live"] {
        assert_eq!(different(&truth, &memory_in(dir, name)), [0; 0], "{name}");
    }
    for name in ["full", "live", "chain2", "chain3"] {
        let loaded = load(dir, name);
        let ram = memory_of(&loaded);
        let told = different(&truth, &ram);
        let bytes = |page: &usize| {
            let bytes = page * PAGE..(page + 1) * PAGE;
            let pairs = truth[bytes.clone()].iter().zip(&ram[bytes]);
            pairs.filter(|(one, other)| one != other).count()
        };
        let bytes: usize = told.iter().map(bytes).sum();
        println!("{name}: {bytes} bytes in pages {told:x?} say that it is loaded");
        assert!(
            told.len() <= 4 && bytes <= 128,
            "{name}: {told:x?}, {bytes} bytes"
        );
        // And written again by who has it of a chain, all in one file.
        take(&loaded, dir, "flat", &json!({}));
        assert_eq!(different(&ram, &memory_in(dir, "flat")), [0; 0], "{name}");
    }
}
