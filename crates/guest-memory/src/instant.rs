//! RAM as it is at one instant, made while the guest stands still: what a forked child inherits of it, and what is copied.
//!
//! Forking copies the page tables of what is inherited, 512 entries for two megabytes in small pages. Where only a few
//! of these pages are wanted, copying them is faster. So the time that it takes depends on how much is wanted, not on how large RAM is.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::{CaptureError, GuestRam, HostPages, MemoryPlan, PAGE_SIZE, PageSet};

/// What a child inherits of RAM is cut at these pages, as huge pages are: to cut one would split it.
const EXTENT_PAGES: u64 = 512;
/// Most pieces of RAM that a child inherits; more are joined, with what lies between. Each takes the host a call.
const MAX_EXTENTS: usize = 512;
/// Wanted pages of an extent up to which they are copied. To copy a page takes about as long as sixteen entries of a page table.
const FEW_PAGES: u64 = 32;
/// Most pages that are copied: some milliseconds, and as much memory for a while.
const MAX_COPIED_PAGES: u64 = 4096;

/// One of a RAM at a time. Until it is dropped, a child inherits of RAM what [`Instant::take`] says.
#[derive(Debug)]
pub(crate) struct Instant {
    ram: GuestRam,
    /// Where pages are copied to.
    copies: GuestRam,
    copied: PageSet,
    inherited: PageSet,
    /// Pages that the child gets neither way.
    left: PageSet,
}

impl Instant {
    /// Makes all that takes time. The guest may run.
    pub(crate) fn prepare(ram: &GuestRam) -> Result<Self, CaptureError> {
        let copied_bytes = ram.pages().min(MAX_COPIED_PAGES) * PAGE_SIZE;
        // RAM has a page, and copies are no more than it has.
        let plan = MemoryPlan::around_hole(copied_bytes).map_err(io::Error::other);
        let copies = plan.and_then(|plan| GuestRam::map(&plan).map_err(io::Error::other));
        let copies = copies.map_err(|source| CaptureError::Copies {
            copied_bytes,
            source,
        })?;
        for page in 0..copies.pages() {
            // Taken from the host now, not while the guest stands still.
            let _ = copies.write_plain(page * PAGE_SIZE, &1u64);
        }
        if ram.is_captured().swap(true, Ordering::AcqRel) {
            return Err(CaptureError::Busy);
        }
        let this = Self {
            ram: ram.clone(),
            copies,
            copied: PageSet::none(ram.pages()),
            inherited: PageSet::none(ram.pages()),
            left: PageSet::none(ram.pages()),
        };
        this.advise(0..ram.pages(), libc::MADV_DONTFORK)?;
        Ok(this)
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Copies some of `pages` and has the next child inherit the others, unless RAM is made of pages that no child inherits
    /// ([`HostPages::Huge2M`]): then all are copied for which there is room, and the others are left. The guest stands still, from before this call until
    /// the child is there.
    pub(crate) fn take(&mut self, pages: &PageSet) -> Result<(), CaptureError> {
        let mut left = MAX_COPIED_PAGES;
        let can_inherit = self.ram.host_pages() == HostPages::Anonymous;
        let few = if can_inherit { FEW_PAGES } else { EXTENT_PAGES };
        for start in (0..pages.ram_pages()).step_by(EXTENT_PAGES as usize) {
            let extent = start..start + EXTENT_PAGES;
            let wanted = pages.count_in(&extent);
            if wanted <= few.min(left) {
                left -= wanted;
                self.copied.insert_of(pages, &extent);
            } else if can_inherit {
                self.inherited.insert_of(pages, &extent);
            } else {
                self.left.insert_of(pages, &extent);
            }
        }
        let mut into = self.copies_addr();
        for run in self.copied.runs() {
            for (piece, host_addr) in self.ram.host_pieces(&run) {
                let len = ((piece.end - piece.start) * PAGE_SIZE) as usize;
                // SAFETY: both are mapped; of the copies there are as many as pages were counted above. Nobody writes
                // either: the guest stands still.
                unsafe {
                    std::ptr::copy_nonoverlapping(host_addr as *const u8, into as *mut u8, len);
                }
                into += len;
            }
        }
        for extent in extents(&self.inherited) {
            self.advise(extent, libc::MADV_DOFORK)?;
        }
        Ok(())
    }

    /// Pages that the child finds in RAM.
    pub(crate) fn inherited(&self) -> &PageSet {
        &self.inherited
    }

    /// Pages that were copied, one behind the other at [`Instant::copies_addr`].
    pub(crate) fn copied(&self) -> &PageSet {
        &self.copied
    }

    /// Pages that somebody else has to write while the guest stands still.
    pub(crate) fn left(&self) -> &PageSet {
        &self.left
    }

    /// Where the copies are mapped.
    pub(crate) fn copies_addr(&self) -> usize {
        let first = self.copies.mapped_ranges().next();
        first.map_or(0, |(_, host_addr)| host_addr as usize)
    }

    fn advise(&self, pages: Range<u64>, advice: i32) -> Result<(), CaptureError> {
        if self.ram.host_pages() == HostPages::Huge2M {
            return Ok(());
        }
        for (pages, host_addr) in self.ram.host_pieces(&pages) {
            let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
            // SAFETY: the range is mapped, and neither advice changes what is in it here.
            if unsafe { libc::madvise(host_addr as *mut _, len, advice) } != 0 {
                return Err(CaptureError::Fork(io::Error::last_os_error()));
            }
        }
        Ok(())
    }
}

impl Drop for Instant {
    fn drop(&mut self) {
        // Joins what the host has cut. Where it does not, a later capture says so.
        let _ = self.advise(0..self.ram.pages(), libc::MADV_DOFORK);
        self.ram.is_captured().store(false, Ordering::Release);
    }
}

/// `pages` in at most [`MAX_EXTENTS`] pieces that hold others, too, and begin and end at multiples of [`EXTENT_PAGES`].
fn extents(pages: &PageSet) -> Vec<Range<u64>> {
    let mut unit = EXTENT_PAGES;
    loop {
        let mut extents: Vec<Range<u64>> = Vec::new();
        for run in pages.runs() {
            let start = run.start / unit * unit;
            let end = run.end.next_multiple_of(unit).min(pages.ram_pages());
            match extents.last_mut() {
                Some(last) if last.end >= start => last.end = end,
                _ => extents.push(start..end),
            }
        }
        // Ends at the latest when one unit is all of RAM.
        if extents.len() <= MAX_EXTENTS {
            return extents;
        }
        unit *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extents_hold_all_pages_and_are_few(
            runs in proptest::collection::vec((0u64..2_000_000, 1u64..3000), 0..2000),
        ) {
            let ram_pages = 2_000_100;
            let runs = runs.into_iter().map(|(first, count)| first..(first + count).min(ram_pages));
            let pages = PageSet::from_runs(ram_pages, runs).unwrap();
            let extents = extents(&pages);
            prop_assert!(extents.len() <= MAX_EXTENTS);
            let held = PageSet::from_runs(ram_pages, extents.iter().cloned()).unwrap();
            let mut both = held.clone();
            both.union(&pages);
            prop_assert_eq!(both, held);
            for extent in extents {
                prop_assert!(extent.start % EXTENT_PAGES == 0);
                prop_assert!(extent.end % EXTENT_PAGES == 0 || extent.end == ram_pages);
            }
        }
    }

    #[test]
    fn few_pages_are_copied_and_many_inherited() {
        let plan = MemoryPlan::around_hole(64 << 20).unwrap();
        let ram = GuestRam::map(&plan).unwrap();
        let pages = ram.pages();
        let mut instant = Instant::prepare(&ram).unwrap();
        let runs = [0..1, 511..544, 1024..1056, 5000..5600];
        let wanted = PageSet::from_runs(pages, runs).unwrap();
        instant.take(&wanted).unwrap();
        // 511 lies in an extent with one other, 512 to 543 are 32 of one.
        let copied: Vec<_> = instant.copied().runs().collect();
        assert_eq!(copied, [0..1, 511..544, 1024..1056]);
        assert!(instant.inherited().runs().eq(std::iter::once(5000..5600)));
    }

    #[test]
    fn no_more_is_copied_than_there_is_room() {
        let plan = MemoryPlan::around_hole(512 << 20).unwrap();
        let ram = GuestRam::map(&plan).unwrap();
        let mut instant = Instant::prepare(&ram).unwrap();
        let runs = (0..ram.pages() / EXTENT_PAGES).map(|i| i * EXTENT_PAGES..i * EXTENT_PAGES + 31);
        let wanted = PageSet::from_runs(ram.pages(), runs).unwrap();
        instant.take(&wanted).unwrap();
        assert!(instant.copied().count() <= MAX_COPIED_PAGES);
        assert!(instant.copied().count() > MAX_COPIED_PAGES - 31);
        let mut both = instant.copied().clone();
        both.union(instant.inherited());
        assert_eq!(both, wanted);
        assert_eq!(
            both.count(),
            instant.copied().count() + instant.inherited().count()
        );
    }
}
