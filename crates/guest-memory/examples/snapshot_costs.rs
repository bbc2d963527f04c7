//! What saving and mapping guest RAM costs, by size and by kind of page. Run by hand, on a quiet machine:
//! `cargo run --release -p alveole-guest-memory --example snapshot_costs -- FOLDER [MIB...]`
//!
//! `fork`: how long a live capture has the guest stand still. `again`: the next one, when the first has split huge pages.
//! `uffd`: the same by userfaultfd write-protection of all pages, which needs rights where a kernel is to take the faults.

#![expect(unsafe_code, reason = "asks for small pages and for userfaultfd")]
#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot go on says where"
)]

use std::error::Error;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestRam, HostPages, MemoryMap, MemoryPlan, PAGE_SIZE, PageSet};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("name a folder for memory files")?;
    let sizes: Result<Vec<u64>, _> = args.map(|mib| mib.parse()).collect();
    let sizes = match sizes? {
        none if none.is_empty() => vec![256, 1024, 4096, 8192],
        sizes => sizes,
    };
    for mib in sizes {
        for is_huge in [true, false] {
            let plan = MemoryPlan::around_hole(mib << 20)?;
            standing(&plan, mib, is_huge)?;
            writing(&plan, mib, is_huge, &folder)?;
        }
    }
    Ok(())
}

fn ram_of(plan: &MemoryPlan, is_huge: bool) -> Result<GuestRam, Box<dyn Error>> {
    let ram = GuestRam::map(plan)?;
    if !is_huge {
        for (range, host_addr) in ram.mapped_ranges() {
            let len = range.size_bytes as usize;
            // SAFETY: the range is mapped; the advice changes nothing in it.
            unsafe { libc::madvise(host_addr as *mut _, len, libc::MADV_NOHUGEPAGE) };
        }
    }
    touch(&ram);
    Ok(ram)
}

fn touch(ram: &GuestRam) {
    for (range, _) in ram.mapped_ranges() {
        for addr in (range.start..range.start + range.size_bytes).step_by(PAGE_SIZE as usize) {
            ram.write_plain(addr, &(addr | 1)).unwrap();
        }
    }
}

fn standing(plan: &MemoryPlan, mib: u64, is_huge: bool) -> Result<(), Box<dyn Error>> {
    let ram = ram_of(plan, is_huge)?;
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(fork(&ram)?);
    }
    let first = times[0];
    times.sort();
    let median = times[2];
    // Every page is written while a child shares it, as by a busy guest.
    let prepared = ram.prepare_capture(&tempfile::tempfile()?)?;
    let capture = prepared.start(&PageSet::all(ram.pages()))?;
    for (range, _) in ram.mapped_ranges() {
        for addr in (range.start..range.start + range.size_bytes / 4).step_by(1 << 16) {
            ram.write_plain(addr, &addr)?;
        }
    }
    drop(capture);
    let again = fork(&ram)?;
    let mut ahead = Vec::new();
    for changed_mib in [1, 8, 16, 64] {
        // All else counts as written before.
        let prepared = ram.prepare_capture(&tempfile::tempfile()?)?;
        let step = ram.pages() / (changed_mib * 256);
        // Half of them here and there, half in a row.
        let alone = (0..changed_mib * 128).map(|i| i * step..i * step + 1);
        let runs = alone.chain(std::iter::once(0..changed_mib * 128));
        let changed = PageSet::from_runs(ram.pages(), runs)?;
        let start = Instant::now();
        let capture = prepared.start(&changed)?;
        ahead.push(start.elapsed());
        capture.wait()?;
    }
    let uffd = protect(&ram);
    println!(
        "{mib} MiB {}: fork {first:?} (median {median:?}), again {again:?}, uffd {uffd:?}, with all written ahead but 1, 8, 16, 64 MiB {ahead:?}",
        if is_huge { "huge" } else { "small" },
    );
    Ok(())
}

fn fork(ram: &GuestRam) -> Result<Duration, Box<dyn Error>> {
    let prepared = ram.prepare_capture(&tempfile::tempfile()?)?;
    let all = PageSet::all(ram.pages());
    let start = Instant::now();
    let capture = prepared.start(&all)?;
    let took = start.elapsed();
    drop(capture);
    Ok(took)
}

/// Time to write-protect all of RAM by userfaultfd.
fn protect(ram: &GuestRam) -> Result<Duration, std::io::Error> {
    const API: u64 = 0xc018_aa3f;
    const REGISTER: u64 = 0xc020_aa00;
    const WRITE_PROTECT: u64 = 0xc018_aa06;
    // SAFETY: structures of plain numbers as the requests have them (Linux include/uapi/linux/userfaultfd.h); nobody
    // writes to RAM until the descriptor is closed, which takes the protection away.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) as i32;
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let mut api = [0xaau64, 1, 0];
        libc::ioctl(fd, API as _, api.as_mut_ptr());
        let mut took = Ok(Duration::ZERO);
        for (range, host_addr) in ram.mapped_ranges() {
            let mut register = [host_addr, range.size_bytes, 2, 0];
            let mut protect = [host_addr, range.size_bytes, 1];
            let registered = libc::ioctl(fd, REGISTER as _, register.as_mut_ptr());
            let start = Instant::now();
            if registered < 0 || libc::ioctl(fd, WRITE_PROTECT as _, protect.as_mut_ptr()) < 0 {
                took = Err(std::io::Error::last_os_error());
                break;
            }
            took = took.map(|t| t + start.elapsed());
        }
        libc::close(fd);
        took
    }
}

/// What a capture and a plain save cost, how a writer fares meanwhile, and what the way back takes.
fn writing(plan: &MemoryPlan, mib: u64, is_huge: bool, folder: &str) -> Result<(), Box<dyn Error>> {
    if mib > 2048 {
        return Ok(());
    }
    let ram = ram_of(plan, is_huge)?;
    let end = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    std::thread::scope(|scope| -> Result<(), Box<dyn Error>> {
        let writer = || {
            let mut random = 1u64;
            let bytes = ram.size_bytes();
            while !end.load(Ordering::Relaxed) {
                for _ in 0..64 {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let addr = (random >> 16) % (bytes / 8) * 8;
                    ram.write_plain(addr, &random).unwrap();
                }
                writes.fetch_add(64, Ordering::Relaxed);
            }
        };
        scope.spawn(writer);
        let rate = |during: Duration, count: u64| count as f64 / during.as_secs_f64() / 1e6;
        let count = || writes.load(Ordering::Relaxed);
        let (start, before) = (Instant::now(), count());
        std::thread::sleep(Duration::from_millis(300));
        let alone = rate(start.elapsed(), count() - before);
        let file = tempfile::tempfile_in(folder)?;
        let (start, before) = (Instant::now(), count());
        let capture = ram.capture_in_child(&PageSet::all(ram.pages()), &file)?;
        capture.wait()?;
        let took = start.elapsed();
        let meanwhile = rate(took, count() - before);
        let start = Instant::now();
        file.sync_all()?;
        println!(
            "  captured in {took:?}, synced in {:?}; a thread that writes at random: {alone:.1} M writes/s alone, {meanwhile:.1} M/s meanwhile",
            start.elapsed()
        );
        end.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    let file = tempfile::tempfile_in(folder)?;
    let start = Instant::now();
    let map = ram.save_pages(&PageSet::all(ram.pages()), &file)?;
    let saved = start.elapsed();
    let start = Instant::now();
    file.sync_all()?;
    let synced = start.elapsed();
    println!("  saved in {saved:?}, synced in {synced:?}");
    drop(ram);
    back(plan, &file, &map)
}

fn back(plan: &MemoryPlan, file: &File, map: &MemoryMap) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let ram = GuestRam::map_snapshot(plan, &[(file, map)])?;
    let mapped = start.elapsed();
    let start = Instant::now();
    let some = PageSet::from_runs(ram.pages(), (0..64).map(|i| i * 256..i * 256 + 128))?;
    ram.prefetch(&some)?;
    let prefetched = start.elapsed();
    let start = Instant::now();
    let copied = GuestRam::copy_snapshot(plan, &[(file, map)], HostPages::Anonymous)?;
    println!(
        "  mapped in {mapped:?}, 32 MiB prefetched in {prefetched:?}, copied in {:?}",
        start.elapsed()
    );
    drop(copied);
    let empty = tempfile::tempfile()?;
    let fresh = GuestRam::map(plan)?;
    let start = Instant::now();
    fresh.save_pages(&PageSet::all(fresh.pages()), &empty)?;
    println!(
        "  a memory that nobody touched saved in {:?}",
        start.elapsed()
    );
    Ok(())
}
