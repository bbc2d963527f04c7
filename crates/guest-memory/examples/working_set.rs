//! Measures what bringing in a working set is worth: a thread that stands for the guest touches pages of a snapshot in random order,
//! while another brings them in, or does not; with a cold page cache and a warm one.
//!
//! `cargo run --release -p alveole-guest-memory --example working_set [FOLDER]`

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot go on says where"
)]

use std::fs::File;
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestRam, MemoryMap, MemoryPlan, PAGE_SIZE, PageSet, read_ahead};

const RAM_BYTES: u64 = 512 << 20;
const ROUNDS: usize = 5;

#[derive(Clone, Copy, Debug)]
enum Way {
    Nothing,
    Read,
    Map,
    ReadThenMap,
}

fn main() {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    let path = std::path::Path::new(&folder).join(format!(".working-set.{}", std::process::id()));
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path);
    let file = file.unwrap();
    std::fs::remove_file(&path).unwrap();
    let plan = MemoryPlan::around_hole(RAM_BYTES).unwrap();
    let mut random = 7u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let block: Vec<u8> = (0..1 << 20)
        .map(|at: u32| (at * 7 % 251) as u8 + 1)
        .collect();
    let all = PageSet::all(RAM_BYTES / PAGE_SIZE);
    let ram = GuestRam::map(&plan).unwrap();
    for at in (0..RAM_BYTES).step_by(block.len()) {
        ram.write(at, &block).unwrap();
    }
    let map = ram.save_pages(&all, &file).unwrap();
    drop(ram);
    file.sync_all().unwrap();
    // A tenth of memory, in runs of up to 32 pages.
    let pages = RAM_BYTES / PAGE_SIZE;
    let mut set = PageSet::none(pages);
    while set.count() < pages / 10 {
        let first = next(pages - 32);
        set.insert(first..first + 1 + next(32));
    }
    let mut order: Vec<u64> = set.runs().flatten().collect();
    for at in (1..order.len()).rev() {
        order.swap(at, next(at as u64 + 1) as usize);
    }
    println!(
        "working set: {} of {} MiB, in {} runs",
        set.count() >> 8,
        pages >> 8,
        set.runs().count()
    );
    for warm in [false, true] {
        for way in [Way::Nothing, Way::Read, Way::Map, Way::ReadThenMap] {
            let mut all = Vec::new();
            for _ in 0..ROUNDS {
                if !warm {
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                }
                let ram = GuestRam::map_snapshot(&plan, &[(&file, &map)]).unwrap();
                all.push(measure(&ram, (&file, &map), &set, &order, way));
            }
            all.sort();
            let (touched, helped) = all[ROUNDS / 2];
            println!(
                "{} cache, {way:?}: touched within {touched:?}, brought in within {helped:?}",
                if warm { "warm" } else { "cold" }
            );
        }
    }
}

/// How long it takes to touch all, and to bring all in.
fn measure(
    ram: &GuestRam,
    layer: (&File, &MemoryMap),
    set: &PageSet,
    order: &[u64],
    way: Way,
) -> (Duration, Duration) {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let helper = scope.spawn(|| {
            if matches!(way, Way::Read | Way::ReadThenMap) {
                read_ahead(&[layer], set, || true).unwrap();
            }
            if matches!(way, Way::Map | Way::ReadThenMap) {
                ram.prefetch(set).unwrap();
            }
            start.elapsed()
        });
        for page in order {
            let byte: u8 = ram.read_plain(page * PAGE_SIZE).unwrap();
            assert_ne!(byte, 0);
        }
        (start.elapsed(), helper.join().unwrap())
    })
}
