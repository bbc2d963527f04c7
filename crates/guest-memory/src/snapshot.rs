//! Memory files back into guest RAM: mapped copy-on-write, so that all guests of one snapshot share them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::memory_map::{LayerRun, newest_of_layers};
use crate::{
    AccessError, GuestRam, HostPages, MapError, MemoryMap, MemoryPlan, PAGE_SIZE, PageKind,
    PageRun, PageSet,
};

/// Most mappings that one guest's RAM is made of. Linux gives a process 65530 (vm.max_map_count); what goes beyond is copied.
pub const MAX_MAPPINGS: usize = 8192;
/// Runs of zeroes from this length on become fresh memory; shorter ones stay holes of the file around them.
const LONG_ZERO_PAGES: u64 = 512;
/// Runs below this length are copied at first sight: a mapping costs the host as much memory.
const SHORT_PAGES: u64 = 4;

/// What to do for pages in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Leave the fresh memory that is there.
    Fresh,
    /// Map a layer's file, whose holes are zeroes.
    Map(usize),
    /// Copy from a layer's file.
    Copy(usize),
    /// Write zeroes.
    Zero,
}

/// A step and the pages it is for.
type Part = (Range<u64>, Step);

impl GuestRam {
    /// Maps the RAM of a snapshot: the files of `layers`, oldest first, each with its map, show through copy-on-write.
    /// Nothing is read before it is touched, and what nobody writes is in the host's page cache once, for all guests
    /// of the same files. A newer layer lies over older ones: mapped where its runs are long, copied where they are
    /// short or [`MAX_MAPPINGS`] would be passed. The files may be closed, but neither be shortened nor
    /// overwritten while the guest runs.
    ///
    /// # Errors
    /// As [`GuestRam::map`]; a file that is shorter than RAM or no plain file; maps that do not make up this RAM.
    pub fn map_snapshot(
        plan: &MemoryPlan,
        layers: &[(&File, &MemoryMap)],
    ) -> Result<Self, MapError> {
        let runs = checked(plan, layers)?;
        let ram = Self::map(plan)?;
        let (maps, copies) = plan_steps(&runs, &ram.page_ranges());
        for (pages, step) in maps {
            if let Step::Map(layer) = step {
                ram.map_file_pages(layers[layer].0, &pages)
                    .map_err(|source| placed(layer, &pages, source))?;
            }
        }
        for (pages, step) in copies {
            match step {
                Step::Copy(layer) => ram.copy_pages(layers[layer].0, layer, &pages)?,
                Step::Zero => ram.zero_pages(&pages),
                Step::Fresh | Step::Map(_) => {}
            }
        }
        Ok(ram)
    }

    /// As [`GuestRam::map_snapshot`], but reads all data into fresh memory, with huge pages where the host gives them: slower to
    /// start, as fast as any guest from then on, and independent of the files. `pages`: which pages of the host it is made of.
    ///
    /// # Errors
    /// As there and in [`GuestRam::map_of`], and what reading the files says.
    pub fn copy_snapshot(
        plan: &MemoryPlan,
        layers: &[(&File, &MemoryMap)],
        pages: HostPages,
    ) -> Result<Self, MapError> {
        let runs = checked(plan, layers)?;
        let ram = Self::map_of(plan, pages)?;
        for LayerRun { layer, run } in runs {
            if run.kind == PageKind::Data {
                let pages = run.first_page..run.first_page + run.pages;
                ram.copy_pages(layers[layer].0, layer, &pages)?;
            }
        }
        Ok(ram)
    }

    /// Makes pages that show a file zero.
    fn zero_pages(&self, pages: &Range<u64>) {
        for (pages, host_addr) in self.host_pieces(pages) {
            let len = (pages.end - pages.start) * PAGE_SIZE;
            // SAFETY: the pages are mapped; no guest runs yet, and nobody has a reference into RAM.
            unsafe { std::ptr::write_bytes(host_addr as *mut u8, 0, len as usize) };
        }
    }

    /// Reads pages from a layer's file.
    fn copy_pages(&self, file: &File, layer: usize, pages: &Range<u64>) -> Result<(), MapError> {
        for (pages, guest_addr) in self.guest_pieces(pages) {
            let len = (pages.end - pages.start) * PAGE_SIZE;
            self.copy_file(file, pages.start * PAGE_SIZE, guest_addr, len)
                .map_err(|e| match e {
                    AccessError::File { source, .. } => placed(layer, &pages, source),
                    AccessError::Outside { .. } => placed(layer, &pages, io::Error::other(e)),
                })?;
        }
        Ok(())
    }
}

/// Has the host begin to read `pages` of a snapshot of these layers into its page cache (readahead(2)): it waits for nothing and maps
/// nothing, so that it costs a guest no memory. Pages that are zeroes are in no file and left out. It ends early when `goes_on` says no.
///
/// # Errors
/// Maps that do not make up this RAM ([`MapError::Maps`]), or what the host says.
pub fn read_ahead(
    layers: &[(&File, &MemoryMap)],
    pages: &PageSet,
    mut goes_on: impl FnMut() -> bool,
) -> Result<(), MapError> {
    let maps: Vec<_> = layers.iter().map(|(_, map)| *map).collect();
    for LayerRun { layer, run } in newest_of_layers(pages.ram_pages(), &maps)? {
        let of_run = run.first_page..run.first_page + run.pages;
        if run.kind != PageKind::Data {
            continue;
        }
        for wanted in pages.runs_in(&of_run) {
            if !goes_on() {
                return Ok(());
            }
            let (offset, len) = (
                wanted.start * PAGE_SIZE,
                (wanted.end - wanted.start) * PAGE_SIZE,
            );
            let fd = layers[layer].0.as_raw_fd();
            // SAFETY: takes no pointer.
            let got = unsafe { libc::readahead(fd, offset.cast_signed(), len as usize) };
            if got < 0 {
                return Err(placed(layer, &wanted, io::Error::last_os_error()));
            }
        }
    }
    Ok(())
}

fn placed(layer: usize, pages: &Range<u64>, source: io::Error) -> MapError {
    MapError::Layer {
        layer,
        offset: pages.start * PAGE_SIZE,
        len: (pages.end - pages.start) * PAGE_SIZE,
        source,
    }
}

/// Checks files and maps, and finds the newest layer for each page.
fn checked(plan: &MemoryPlan, layers: &[(&File, &MemoryMap)]) -> Result<Vec<LayerRun>, MapError> {
    let size_bytes = plan.size_bytes();
    let maps: Vec<_> = layers.iter().map(|(_, map)| *map).collect();
    let runs = newest_of_layers(size_bytes / PAGE_SIZE, &maps)?;
    for (layer, (file, _)) in layers.iter().enumerate() {
        let facts = file.metadata().map_err(|source| MapError::Layer {
            layer,
            offset: 0,
            len: size_bytes,
            source,
        })?;
        if !facts.is_file() {
            return Err(MapError::NoPlainFile { layer });
        }
        if facts.len() < size_bytes {
            return Err(MapError::ShortFile {
                layer,
                file_bytes: facts.len(),
                size_bytes,
            });
        }
    }
    Ok(runs)
}

/// What to map and, when all is mapped, what to copy over it. `ranges` are the pages of each range of RAM.
fn plan_steps(runs: &[LayerRun], ranges: &[Range<u64>]) -> (Vec<Part>, Vec<Part>) {
    let parts: Vec<_> = ranges.iter().map(|range| joined(runs, range)).collect();
    let mut short = SHORT_PAGES;
    loop {
        let (mut maps, mut copies) = (Vec::new(), Vec::new());
        for parts in &parts {
            without_short(parts, short, &mut maps, &mut copies);
        }
        // Ends at the latest when all of a range is shorter, and so one mapping.
        if maps.len() <= MAX_MAPPINGS {
            return (maps, copies);
        }
        short *= 2;
    }
}

/// The runs within one range of RAM, as few as the files allow: short zeroes behind data of the same file are its holes.
fn joined(runs: &[LayerRun], range: &Range<u64>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let first = runs.partition_point(|l| l.run.first_page + l.run.pages <= range.start);
    for LayerRun { layer, run } in &runs[first..] {
        let PageRun {
            first_page,
            pages,
            kind,
        } = *run;
        if first_page >= range.end {
            break;
        }
        let pages = first_page.max(range.start)..(first_page + pages).min(range.end);
        let before = parts.last().map(|(_, step)| *step);
        let step = match kind {
            PageKind::Data => Step::Map(*layer),
            PageKind::Zero
                if before == Some(Step::Map(*layer))
                    && pages.end - pages.start < LONG_ZERO_PAGES =>
            {
                Step::Map(*layer)
            }
            PageKind::Zero => Step::Fresh,
        };
        push(&mut parts, pages, step);
    }
    parts
}

/// Has what is shorter than `short` pages copied over what is mapped before it. Not over long zeroes, unless mappings run out: they are fresh memory,
/// of which a host with huge pages would give, and clear, a whole one for each copy.
fn without_short(parts: &[Part], short: u64, maps: &mut Vec<Part>, copies: &mut Vec<Part>) {
    let mut kept: Vec<Part> = Vec::new();
    for (pages, step) in parts {
        let is_in_zeroes = matches!(kept.last(), Some((before, Step::Fresh)) if before.end - before.start >= LONG_ZERO_PAGES);
        let stays = short == SHORT_PAGES && is_in_zeroes && matches!(step, Step::Map(_));
        if pages.end - pages.start >= short || stays {
            push(&mut kept, pages.clone(), *step);
            continue;
        }
        let below = kept.last().map_or(Step::Fresh, |(_, step)| *step);
        push(&mut kept, pages.clone(), below);
        match (below, *step) {
            (below, step) if below == step => {}
            (_, Step::Map(layer)) => copies.push((pages.clone(), Step::Copy(layer))),
            _ => copies.push((pages.clone(), Step::Zero)),
        }
    }
    maps.append(&mut kept);
}

/// Adds a part; it becomes one with the part before it where both want the same.
fn push(parts: &mut Vec<Part>, pages: Range<u64>, step: Step) {
    match parts.last_mut() {
        Some((before, same)) if *same == step && before.end == pages.start => {
            before.end = pages.end;
        }
        _ => parts.push((pages, step)),
    }
}

impl GuestRam {
    /// Has the host bring `pages` in, so that touching them is no fault later: those of a file from its page
    /// cache or device, for reading. For the pages that a guest of the same snapshot has touched before
    /// ([`GuestRam::touched`]). Any thread may do it while the guest runs.
    ///
    /// # Errors
    /// What the host says (madvise(2)), as when the file is damaged; the pages before are in.
    pub fn prefetch(&self, pages: &PageSet) -> io::Result<()> {
        for run in pages.runs() {
            for (pages, host_addr) in self.host_pieces(&run) {
                let advise = |advice| {
                    let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
                    // SAFETY: the range is mapped; neither advice changes what is in it.
                    match unsafe { libc::madvise(host_addr as *mut _, len, advice) } {
                        0 => Ok(()),
                        _ => Err(io::Error::last_os_error()),
                    }
                };
                match advise(libc::MADV_POPULATE_READ) {
                    // Linux before 5.14.
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                        advise(libc::MADV_WILLNEED)?;
                    }
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Which pages somebody has touched since RAM was mapped, as `pagemap` says, which is `/proc/self/pagemap` of this
    /// process (Linux Documentation/admin-guide/mm/pagemap.rst: present or swapped). What lies around a touched page of a file
    /// counts, too: the host brings in up to 16 at once.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn touched(&self, pagemap: &File) -> io::Result<PageSet> {
        const ENTRY_BYTES: u64 = 8;
        const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
        const PIECE: u64 = 8192;
        let mut set = PageSet::none(self.pages());
        let mut entries = vec![0; (PIECE * ENTRY_BYTES) as usize];
        for (pages, host_addr) in self.host_pieces(&(0..self.pages())) {
            let mut at = pages.start;
            while at < pages.end {
                let count = PIECE.min(pages.end - at);
                let into = &mut entries[..(count * ENTRY_BYTES) as usize];
                let virtual_page = host_addr / PAGE_SIZE + (at - pages.start);
                pagemap.read_exact_at(into, virtual_page * ENTRY_BYTES)?;
                for (page, entry) in (at..).zip(into.as_chunks().0) {
                    if u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0 {
                        set.insert(page..page + 1);
                    }
                }
                at += count;
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    fn run(first_page: u64, pages: u64, kind: PageKind) -> LayerRun {
        let run = PageRun {
            first_page,
            pages,
            kind,
        };
        LayerRun { layer: 0, run }
    }

    #[test]
    fn a_page_among_long_zeroes_is_mapped_and_one_among_data_is_copied() {
        let runs = [
            run(0, 600, PageKind::Data),
            run(600, 600, PageKind::Zero),
            run(1200, 1, PageKind::Data),
            run(1201, 600, PageKind::Zero),
        ];
        let (maps, copies) = plan_steps(&runs, slice::from_ref(&(0..1801)));
        let want = [
            (0..600, Step::Map(0)),
            (600..1200, Step::Fresh),
            (1200..1201, Step::Map(0)),
            (1201..1801, Step::Fresh),
        ];
        assert_eq!(maps, want);
        assert_eq!(copies, []);

        let newer = LayerRun {
            layer: 1,
            run: run(600, 1, PageKind::Data).run,
        };
        let runs = [
            run(0, 600, PageKind::Data),
            newer,
            run(601, 600, PageKind::Data),
        ];
        let (maps, copies) = plan_steps(&runs, slice::from_ref(&(0..1201)));
        assert_eq!(maps, [(0..1201, Step::Map(0))]);
        assert_eq!(copies, [(600..601, Step::Copy(1))]);
    }

    #[test]
    fn where_mappings_run_out_pages_among_long_zeroes_are_copied() {
        let mut runs = Vec::new();
        let count = MAX_MAPPINGS as u64;
        for block in 0..count {
            runs.push(run(block * 601, 600, PageKind::Zero));
            runs.push(run(block * 601 + 600, 1, PageKind::Data));
        }
        let (maps, copies) = plan_steps(&runs, slice::from_ref(&(0..count * 601)));
        assert!(maps.len() <= MAX_MAPPINGS, "{}", maps.len());
        assert_eq!(copies.len(), MAX_MAPPINGS);
    }
}
