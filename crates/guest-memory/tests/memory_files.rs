//! Guest RAM into memory files and back: full, in chains, with hostile files.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use alveole_guest_memory::{
    GuestRam, HostPages, MAX_MAPPINGS, MapError, MemoryMap, MemoryPlan, PAGE_SIZE, PageKind,
    PageRun, PageSet, SaveError, read_ahead,
};
use proptest::prelude::*;

const PAGE: usize = PAGE_SIZE as usize;

fn plan(pages: u64) -> MemoryPlan {
    MemoryPlan::around_hole(pages * PAGE_SIZE).unwrap()
}

/// A page that no other number gives.
fn page_of(number: u64) -> Vec<u8> {
    let words = (1..=PAGE_SIZE / 8).map(|i| (number << 32 | i).to_le_bytes());
    words.flatten().collect()
}

fn content(ram: &GuestRam) -> Vec<u8> {
    let mut all = vec![0; ram.size_bytes() as usize];
    ram.read(0, &mut all).unwrap();
    all
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut all = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut all, 0).unwrap();
    all
}

fn saved(ram: &GuestRam, pages: &PageSet) -> (File, MemoryMap) {
    let file = tempfile::tempfile().unwrap();
    let map = ram.save_pages(pages, &file).unwrap();
    (file, map)
}

/// Both ways back give the same memory.
fn assert_restores(plan: &MemoryPlan, layers: &[(File, MemoryMap)], want: &[u8]) {
    let layers: Vec<_> = layers.iter().map(|(file, map)| (file, map)).collect();
    let before: Vec<_> = layers.iter().map(|(file, _)| bytes_of(file)).collect();
    let mapped = GuestRam::map_snapshot(plan, &layers).unwrap();
    assert!(content(&mapped) == want, "mapped");
    let copied = GuestRam::copy_snapshot(plan, &layers, HostPages::Anonymous).unwrap();
    assert!(content(&copied) == want, "copied");
    for ram in [&mapped, &copied] {
        for page in 0..ram.pages() {
            ram.write(page * PAGE_SIZE, b"written by a clone").unwrap();
        }
    }
    let again = GuestRam::map_snapshot(plan, &layers).unwrap();
    assert!(
        content(&again) == want,
        "a clone sees what another one wrote"
    );
    for ((file, _), before) in layers.iter().zip(before) {
        assert!(bytes_of(file) == before, "a clone wrote into the file");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// What changes between snapshots: page numbers, in each round, and whether a page becomes zero.
    #[test]
    fn a_chain_of_diffs_is_the_memory(
        rounds in proptest::collection::vec(
            proptest::collection::vec((0u64..700, 1u64..40, any::<bool>()), 0..30),
            1..5,
        ),
    ) {
        let plan = plan(700);
        let ram = GuestRam::map(&plan).unwrap();
        let mut layers = Vec::new();
        for (round, changes) in rounds.iter().enumerate() {
            let mut changed = PageSet::none(ram.pages());
            for (first, count, zero) in changes {
                for page in *first..(first + count).min(700) {
                    let new = if *zero { vec![0; PAGE] } else { page_of(page + 10_000 * round as u64) };
                    ram.write(page * PAGE_SIZE, &new).unwrap();
                    changed.insert(page..page + 1);
                }
            }
            let pages = if round == 0 { PageSet::all(ram.pages()) } else { changed };
            let (file, map) = saved(&ram, &pages);
            prop_assert_eq!(map.pages_of(PageKind::Data) + map.pages_of(PageKind::Zero), pages.count());
            layers.push((file, map));
        }
        assert_restores(&plan, &layers, &content(&ram));
    }
}

#[test]
fn pages_of_zeroes_are_holes_and_untouched_ones_stay_untouched() {
    let plan = plan(4096);
    let ram = GuestRam::map(&plan).unwrap();
    ram.write(100 * PAGE_SIZE, &page_of(1)).unwrap();
    // Touched, and zero.
    ram.write(2000 * PAGE_SIZE, &[0; 2 * PAGE]).unwrap();
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let touched = ram.touched(&pagemap).unwrap();
    assert!(touched.contains(100) && touched.contains(2001) && !touched.contains(4000));
    let (file, map) = saved(&ram, &PageSet::all(4096));
    if File::open("/proc/swaps").is_ok_and(|f| io::read_to_string(f).unwrap().lines().count() < 2) {
        assert_eq!(
            ram.touched(&pagemap).unwrap(),
            touched,
            "saving touches nothing"
        );
    }
    assert_eq!(file.metadata().unwrap().len(), 4096 * PAGE_SIZE);
    let on_disk_bytes = file.metadata().unwrap().blocks() * 512;
    assert!(
        on_disk_bytes <= 8 * PAGE_SIZE,
        "{on_disk_bytes} bytes for one page"
    );
    let data = PageRun {
        first_page: 100,
        pages: 1,
        kind: PageKind::Data,
    };
    assert_eq!(map.runs()[1], data);
    assert_eq!(map.pages_of(PageKind::Zero), 4095);
    assert_restores(&plan, &[(file, map)], &content(&ram));
}

#[test]
fn ranges_lie_one_behind_the_other_in_the_file() {
    let plan = MemoryPlan::around_hole((3 << 30) + (8 << 20)).unwrap();
    let ram = GuestRam::map(&plan).unwrap();
    let edge = (3u64 << 30) / PAGE_SIZE;
    let at = |page: u64| {
        let addr = page * PAGE_SIZE;
        if page < edge { addr } else { addr + (1 << 30) }
    };
    let pages = [0, 1, edge - 2, edge - 1, edge, edge + 1, edge + 2047];
    for page in pages {
        ram.write(at(page), &page_of(page)).unwrap();
    }
    let (file, map) = saved(&ram, &PageSet::all(ram.pages()));
    let mut back = vec![0; PAGE];
    for page in pages {
        file.read_exact_at(&mut back, page * PAGE_SIZE).unwrap();
        assert!(back == page_of(page), "page {page}");
    }
    assert_eq!(map.pages_of(PageKind::Data), pages.len() as u64);
    // Zeroes over data, data over zeroes, and data across the hole.
    ram.write(at(1), &[0; PAGE]).unwrap();
    ram.write(at(2), &page_of(7)).unwrap();
    let changed = PageSet::from_runs(ram.pages(), [1..3, edge - 2..edge + 2]).unwrap();
    let (newer, newer_map) = saved(&ram, &changed);
    let layers = [(&file, &map), (&newer, &newer_map)];
    for ram in [
        GuestRam::map_snapshot(&plan, &layers).unwrap(),
        GuestRam::copy_snapshot(&plan, &layers, HostPages::Anonymous).unwrap(),
    ] {
        for (page, want) in [
            (0, page_of(0)),
            (1, vec![0; PAGE]),
            (2, page_of(7)),
            (3, vec![0; PAGE]),
            (edge - 2, page_of(edge - 2)),
            (edge - 1, page_of(edge - 1)),
            (edge, page_of(edge)),
            (edge + 1, page_of(edge + 1)),
            (edge + 2, vec![0; PAGE]),
            (edge + 2047, page_of(edge + 2047)),
        ] {
            ram.read(at(page), &mut back).unwrap();
            assert!(back == want, "page {page}");
        }
    }
}

#[test]
fn a_snapshot_of_a_clone_holds_what_it_never_touched() {
    let plan = plan(1024);
    let ram = GuestRam::map(&plan).unwrap();
    for page in 0..1024 {
        ram.write(page * PAGE_SIZE, &page_of(page)).unwrap();
    }
    let (file, map) = saved(&ram, &PageSet::all(1024));
    let clone = GuestRam::map_snapshot(&plan, &[(&file, &map)]).unwrap();
    let layer = saved(&clone, &PageSet::all(1024));
    assert_restores(&plan, &[layer], &content(&ram));
}

#[test]
fn the_number_of_mappings_is_bounded_whatever_the_maps_say() {
    let pages = 6 * MAX_MAPPINGS as u64 * 2;
    let plan = plan(pages);
    let ram = GuestRam::map(&plan).unwrap();
    ram.write(0, &page_of(1)).unwrap();
    let base = saved(&ram, &PageSet::all(pages));
    // Every second run of six pages changes: each long enough to be mapped, all together too many.
    let runs = (0..pages / 12).map(|i| i * 12..i * 12 + 6);
    let changed = PageSet::from_runs(pages, runs).unwrap();
    for run in changed.runs() {
        ram.write(run.start * PAGE_SIZE, &page_of(run.start))
            .unwrap();
    }
    let newer = saved(&ram, &changed);
    let mappings = || {
        io::read_to_string(File::open("/proc/self/maps").unwrap())
            .unwrap()
            .lines()
            .count()
    };
    let before = mappings();
    let clone = GuestRam::map_snapshot(&plan, &[(&base.0, &base.1), (&newer.0, &newer.1)]).unwrap();
    let made = mappings() - before;
    // Other tests map at the same time.
    assert!(made <= MAX_MAPPINGS + 2000, "{made} mappings");
    assert!(content(&clone) == content(&ram));
}

#[test]
fn files_that_hold_no_such_memory_are_refused_in_words() {
    let plan = plan(16);
    let ram = GuestRam::map(&plan).unwrap();
    let (file, map) = saved(&ram, &PageSet::all(16));
    let refusal = |layers: &[(&File, &MemoryMap)]| {
        let copied = GuestRam::copy_snapshot(&plan, layers, HostPages::Anonymous).unwrap_err();
        let mapped = GuestRam::map_snapshot(&plan, layers).unwrap_err();
        assert_eq!(copied.to_string(), mapped.to_string());
        mapped
    };
    let part = MemoryMap::try_from(vec![PageRun {
        first_page: 3,
        pages: 2,
        kind: PageKind::Data,
    }])
    .unwrap();
    let e = refusal(&[(&file, &part)]);
    assert!(matches!(e, MapError::Maps(_)), "{e}");
    assert!(e.to_string().contains("holds page 0"), "{e}");
    let larger = MemoryMap::try_from(vec![PageRun {
        first_page: 0,
        pages: 17,
        kind: PageKind::Zero,
    }])
    .unwrap();
    let e = refusal(&[(&file, &larger)]);
    assert!(e.to_string().contains("names page 16"), "{e}");
    let null = File::open("/dev/null").unwrap();
    let e = refusal(&[(&file, &map), (&null, &map)]);
    assert!(
        e.to_string()
            .contains("memory file 1 of the snapshot is no plain file"),
        "{e}"
    );
    file.set_len(16 * PAGE_SIZE - 1).unwrap();
    let e = refusal(&[(&file, &map)]);
    assert!(
        e.to_string()
            .contains("has 65535 bytes, guest memory is 65536"),
        "{e}"
    );
}

#[test]
fn what_cannot_be_saved_is_told_with_its_place() {
    let ram = GuestRam::map(&plan(64)).unwrap();
    for page in 0..64 {
        ram.write(page * PAGE_SIZE, &page_of(page)).unwrap();
    }
    let all = PageSet::all(64);
    let used = tempfile::tempfile().unwrap();
    used.set_len(3).unwrap();
    let e = ram.save_pages(&all, &used).unwrap_err();
    assert!(e.to_string().contains("has 3 bytes already"), "{e}");
    let e = ram
        .save_pages(&PageSet::all(65), &tempfile::tempfile().unwrap())
        .unwrap_err();
    assert!(matches!(e, SaveError::OtherRam { .. }), "{e}");
    let path = tempfile::NamedTempFile::new().unwrap();
    let reader = File::open(path.path()).unwrap();
    let e = ram.save_pages(&all, &reader).unwrap_err();
    assert!(matches!(e, SaveError::Size { .. }), "{e}");
}

#[test]
fn prefetched_pages_are_there_and_others_are_not() {
    let plan = plan(4096);
    let ram = GuestRam::map(&plan).unwrap();
    for page in 0..4096 {
        ram.write(page * PAGE_SIZE, &page_of(page)).unwrap();
    }
    let (file, map) = saved(&ram, &PageSet::all(4096));
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let clone = GuestRam::map_snapshot(&plan, &[(&file, &map)]).unwrap();
    assert!(clone.touched(&pagemap).unwrap().is_empty());
    let wanted = PageSet::from_runs(4096, [10..20, 2000..2600]).unwrap();
    // Read ahead is into the page cache, and nothing is mapped.
    let layers = [(&file, &map)];
    let mut asked = 0;
    read_ahead(&layers, &wanted, || {
        asked += 1;
        true
    })
    .unwrap();
    assert_eq!(asked, 2, "once for each run");
    let other = PageSet::all(5000);
    assert!(read_ahead(&layers, &other, || true).is_err());
    assert!(clone.touched(&pagemap).unwrap().is_empty());
    clone.prefetch(&wanted).unwrap();
    let there = clone.touched(&pagemap).unwrap();
    for page in wanted.runs().flatten() {
        assert!(there.contains(page), "page {page}");
    }
    assert!(there.count() < 1000, "{} pages", there.count());
    assert!(content(&clone) == content(&ram));
}
