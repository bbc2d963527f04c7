//! Which pages of RAM this process has written, kept by the mapping itself: whoever writes through it marks.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::{GuestRam, PAGE_SIZE, PageSet};

/// Pages of one range of RAM that were written. While nobody tracks, marking is a load and a branch, and there
/// is no bitmap.
#[derive(Debug, Default)]
pub struct WriteLog {
    is_on: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl WriteLog {
    /// Marks the pages of `len` bytes from `offset` on, if somebody tracks.
    #[inline]
    fn mark(&self, offset: usize, len: usize) {
        if self.is_on.load(Ordering::Relaxed) {
            self.mark_pages(offset, len);
        }
    }

    #[cold]
    fn mark_pages(&self, offset: usize, len: usize) {
        let (Some(words), 1..) = (self.words.get(), len) else {
            return;
        };
        let page = PAGE_SIZE as usize;
        for page in offset / page..=offset.saturating_add(len - 1) / page {
            let Some(word) = words.get(page / 64) else {
                return;
            };
            let bit = 1 << (page % 64);
            // Rings are written over and over: a look spares most of the writes that other cores would feel.
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Tracks from now on, beginning with nothing.
    fn start(&self, pages: u64) {
        let words = self.words.get_or_init(|| {
            let words = 0..pages.div_ceil(64);
            words.map(|_| AtomicU64::new(0)).collect()
        });
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        self.is_on.store(true, Ordering::SeqCst);
    }
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_SIZE as usize;
        let word = self.words.get().and_then(|words| words.get(page / 64));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % 64) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> WriteLogSlice<'_> {
        WriteLogSlice { log: self, offset }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = WriteLogSlice<'a>;
}

/// The log, seen from an offset on.
#[derive(Debug, Clone, Copy)]
pub struct WriteLogSlice<'a> {
    log: &'a WriteLog,
    offset: usize,
}

impl BitmapSlice for WriteLogSlice<'_> {}

impl WithBitmapSlice<'_> for WriteLogSlice<'_> {
    type S = Self;
}

impl Bitmap for WriteLogSlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.offset.wrapping_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.offset.wrapping_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log,
            offset: self.offset.wrapping_add(offset),
        }
    }
}

impl GuestRam {
    /// Remembers from now on which pages this process writes, beginning with none. What the guest's processors
    /// write is the hypervisor's to tell, and what the host's kernel writes by itself (vhost) its own.
    ///
    /// Called while no device works: a write that is under way need not be seen.
    pub fn track_writes(&self) {
        for region in self.regions() {
            region.log.start(region.pages);
        }
    }

    /// Forgets about writes again.
    pub fn stop_tracking_writes(&self) {
        for region in self.regions() {
            region.log.is_on.store(false, Ordering::SeqCst);
        }
    }

    /// Which pages this process has written since [`GuestRam::track_writes`] or the last call; none if nobody
    /// tracks. Buffers that were handed to the host to be filled count from then on ([`crate::GuestBuffers::iovecs_to_fill`]),
    /// so it is called while no device works, when all are filled.
    #[must_use]
    pub fn take_written(&self) -> PageSet {
        let mut set = PageSet::none(self.pages());
        let mut first = 0;
        for region in self.regions() {
            if let Some(words) = region.log.words.get() {
                let taken: Vec<u64> = words.iter().map(|w| w.swap(0, Ordering::SeqCst)).collect();
                set.insert_words(first, region.pages, &taken);
            }
            first += region.pages;
        }
        set
    }
}
