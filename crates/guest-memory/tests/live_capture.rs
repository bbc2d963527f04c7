//! RAM that is saved while others write it is what it was at one instant.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use alveole_guest_memory::{CaptureError, GuestRam, MemoryPlan, PAGE_SIZE, PageKind, PageSet};

const PAGES: u64 = 8192;

fn ram() -> (MemoryPlan, GuestRam) {
    let plan = MemoryPlan::around_hole(PAGES * PAGE_SIZE).unwrap();
    let ram = GuestRam::map(&plan).unwrap();
    (plan, ram)
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut all = vec![0; ram.size_bytes() as usize];
    ram.read(0, &mut all).unwrap();
    all
}

/// Threads that write as fast as they can but stand still when told to, as processors of a guest do.
#[derive(Default)]
struct Writers {
    stop: AtomicBool,
    end: AtomicBool,
    stopped: AtomicUsize,
}

impl Writers {
    fn write(&self, ram: &GuestRam, seed: u64) {
        let mut random = seed;
        while !self.end.load(Ordering::Relaxed) {
            if self.stop.load(Ordering::Acquire) {
                self.stopped.fetch_add(1, Ordering::AcqRel);
                while self.stop.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                self.stopped.fetch_sub(1, Ordering::AcqRel);
            }
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(seed | 1);
            let addr = (random >> 20) % (PAGES * PAGE_SIZE / 8) * 8;
            // Whole pages become zero at times.
            if random >> 60 == 0 {
                let page = addr / PAGE_SIZE * PAGE_SIZE;
                ram.write(page, &[0; PAGE_SIZE as usize]).unwrap();
            }
            ram.write_plain(addr, &random).unwrap();
        }
    }

    fn stand_still<T>(&self, writers: usize, act: impl FnOnce() -> T) -> T {
        self.stop.store(true, Ordering::Release);
        while self.stopped.load(Ordering::Acquire) < writers {
            std::thread::yield_now();
        }
        let result = act();
        self.stop.store(false, Ordering::Release);
        while self.stopped.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        result
    }
}

#[test]
fn a_capture_is_the_memory_of_one_instant_however_fast_it_is_written() {
    let (plan, ram) = ram();
    let writers = Writers::default();
    std::thread::scope(|scope| {
        for seed in [3, 4] {
            let (writers, ram) = (&writers, &ram);
            scope.spawn(move || writers.write(ram, seed));
        }
        for _ in 0..4 {
            let file = tempfile::tempfile().unwrap();
            let prepared = ram.prepare_capture(&file).unwrap();
            let (capture, want) = writers.stand_still(2, || {
                let want = content(&ram);
                (prepared.start(&PageSet::all(PAGES)).unwrap(), want)
            });
            let map = capture.wait().unwrap();
            let back = GuestRam::map_snapshot(&plan, &[(&file, &map)]).unwrap();
            assert!(content(&back) == want);
            assert!(content(&ram) != want, "the writers stood still");
        }
        writers.end.store(true, Ordering::Relaxed);
    });
}

/// What was written ahead is written again where it has changed, also where it has become zero.
#[test]
fn what_is_written_ahead_and_then_changed_is_the_memory_of_one_instant_too() {
    let (plan, ram) = ram();
    let writers = Writers::default();
    std::thread::scope(|scope| {
        for seed in [5, 6] {
            let (writers, ram) = (&writers, &ram);
            scope.spawn(move || writers.write(ram, seed));
        }
        for _ in 0..4 {
            let file = tempfile::tempfile().unwrap();
            let mut prepared = ram.prepare_capture(&file).unwrap();
            // A log must begin while nobody is in the middle of a write.
            writers.stand_still(2, || ram.track_writes());
            prepared.write_ahead(&PageSet::all(PAGES)).unwrap();
            let changed = writers.stand_still(2, || ram.take_written());
            prepared.write_ahead(&changed).unwrap();
            let (capture, want) = writers.stand_still(2, || {
                let want = content(&ram);
                (prepared.start(&ram.take_written()).unwrap(), want)
            });
            let map = capture.wait().unwrap();
            let back = GuestRam::map_snapshot(&plan, &[(&file, &map)]).unwrap();
            assert!(content(&back) == want);
        }
        writers.end.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_child_inherits_what_has_changed_and_all_again_afterwards() {
    let (plan, ram) = ram();
    for page in 0..PAGES {
        ram.write_plain(page * PAGE_SIZE, &(page | 1)).unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let mut prepared = ram.prepare_capture(&file).unwrap();
    prepared.write_ahead(&PageSet::all(PAGES)).unwrap();
    ram.write(7 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).unwrap();
    ram.write(4000 * PAGE_SIZE, b"changed").unwrap();
    let kept_from_children = || {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let flags = maps.lines().filter(|l| l.starts_with("VmFlags:"));
        flags.filter(|l| l.contains(" dc ")).count()
    };
    assert!(kept_from_children() > 0);
    let busy = ram.prepare_capture(&tempfile::tempfile().unwrap());
    assert!(matches!(busy, Err(CaptureError::Busy)));
    let changed = PageSet::from_runs(PAGES, [7..8, 4000..4001]).unwrap();
    let map = prepared.start(&changed).unwrap().wait().unwrap();
    assert_eq!(map.pages_of(PageKind::Data), PAGES, "zeroes over data");
    let back = GuestRam::map_snapshot(&plan, &[(&file, &map)]).unwrap();
    assert!(content(&back) == content(&ram));
    let again = tempfile::tempfile().unwrap();
    let map = ram.capture_in_child(&PageSet::all(PAGES), &again).unwrap();
    let map = map.wait().unwrap();
    let back = GuestRam::map_snapshot(&plan, &[(&again, &map)]).unwrap();
    assert!(content(&back) == content(&ram));
}

#[test]
fn captures_make_up_a_chain_with_pages_that_become_zero() {
    let (plan, ram) = ram();
    ram.write(0, &vec![7; 100 * PAGE_SIZE as usize]).unwrap();
    let base = tempfile::tempfile().unwrap();
    let base_map = ram
        .capture_in_child(&PageSet::all(PAGES), &base)
        .unwrap()
        .wait()
        .unwrap();
    assert_eq!(base_map.pages_of(PageKind::Data), 100);
    ram.write(50 * PAGE_SIZE, &vec![0; 2 * PAGE_SIZE as usize])
        .unwrap();
    ram.write(5000 * PAGE_SIZE, b"new").unwrap();
    let changed = PageSet::from_runs(PAGES, [50..52, 5000..5001]).unwrap();
    let newer = tempfile::tempfile().unwrap();
    let newer_map = ram
        .capture_in_child(&changed, &newer)
        .unwrap()
        .wait()
        .unwrap();
    assert_eq!(
        (
            newer_map.pages_of(PageKind::Data),
            newer_map.pages_of(PageKind::Zero)
        ),
        (1, 2)
    );
    let back = GuestRam::map_snapshot(&plan, &[(&base, &base_map), (&newer, &newer_map)]).unwrap();
    assert!(content(&back) == content(&ram));
}

#[test]
fn the_descriptor_says_when_it_is_done() {
    let (_, ram) = ram();
    ram.write(0, &vec![7; PAGE_SIZE as usize * 4096]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let capture = ram.capture_in_child(&PageSet::all(PAGES), &file).unwrap();
    let mut wait = [rustix::event::PollFd::from_borrowed_fd(
        capture.as_fd(),
        rustix::event::PollFlags::IN,
    )];
    assert_eq!(rustix::event::poll(&mut wait, None).unwrap(), 1);
    let start = Instant::now();
    assert_eq!(capture.written_pages(), 4096);
    capture.wait().unwrap();
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_failed_write_is_told_with_its_place() {
    let (_, ram) = ram();
    ram.write(5 * PAGE_SIZE, &[7; PAGE_SIZE as usize]).unwrap();
    let name = "capture";
    let file = File::from(memfd_create(name, MemfdFlags::ALLOW_SEALING).unwrap());
    let prepared = ram.prepare_capture(&file).unwrap();
    // From now on nobody can write.
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let capture = prepared.start(&PageSet::all(PAGES)).unwrap();
    let e = capture.wait().unwrap_err().to_string();
    assert!(
        e.contains("at offset 20480 of the memory file: Operation not permitted"),
        "{e}"
    );
}

#[test]
fn a_capture_that_nobody_wants_any_more_ends_at_once() {
    let (_, ram) = ram();
    ram.write(0, &vec![7; PAGE_SIZE as usize * PAGES as usize])
        .unwrap();
    let file = tempfile::tempfile().unwrap();
    let children = || std::fs::read_to_string("/proc/thread-self/children").unwrap();
    let capture = ram.capture_in_child(&PageSet::all(PAGES), &file).unwrap();
    assert_eq!(children().split_whitespace().count(), 1);
    drop(capture);
    assert_eq!(children(), "", "no child, no zombie");
    let fresh = tempfile::tempfile().unwrap();
    let e = ram.capture_in_child(&PageSet::all(1), &fresh).unwrap_err();
    assert!(matches!(e, CaptureError::Save(_)), "{e}");
}

/// A refused call would end the whole test program.
#[test]
fn the_role_that_captures_may_do_all_it_takes() {
    let (plan, ram) = ram();
    ram.write(0, &vec![7; 200 * PAGE_SIZE as usize]).unwrap();
    let files = [(); 3].map(|()| tempfile::tempfile().unwrap());
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            alveole_thread_sandbox::enter(alveole_thread_sandbox::Role::Files, "files").unwrap();
            let mut prepared = ram.prepare_capture(&files[0]).unwrap();
            prepared.write_ahead(&PageSet::all(PAGES)).unwrap();
            let few = PageSet::from_runs(PAGES, std::iter::once(3..5)).unwrap();
            let map = prepared.start(&few).unwrap().wait().unwrap();
            let saved = ram.save_pages(&PageSet::all(PAGES), &files[1]).unwrap();
            drop(ram.capture_in_child(&PageSet::all(PAGES), &files[2]));
            [map, saved]
        });
        for (map, file) in worker.join().unwrap().iter().zip(&files) {
            let back = GuestRam::map_snapshot(&plan, &[(file, map)]).unwrap();
            assert!(content(&back) == content(&ram));
        }
    });
}
