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
        self.is_tracking().store(true, Ordering::SeqCst);
    }

    /// Forgets about writes again.
    pub fn stop_tracking_writes(&self) {
        self.is_tracking().store(false, Ordering::SeqCst);
        for region in self.regions() {
            region.log.is_on.store(false, Ordering::SeqCst);
        }
    }

    /// Counts all of RAM as written, if somebody tracks: for who let others write there, and does not know where.
    pub fn mark_all_written(&self) {
        for region in self.regions() {
            region.log.mark(0, (region.pages * PAGE_SIZE) as usize);
        }
    }

    /// Marks what is written past the mapping's own functions: `len` bytes where they are mapped, in one range.
    #[inline]
    pub(crate) fn mark_written(&self, host_addr: u64, len: u64) {
        if self.is_tracking().load(Ordering::Relaxed) {
            self.mark_at(host_addr, len);
        }
    }

    #[cold]
    fn mark_at(&self, host_addr: u64, len: u64) {
        for region in self.regions() {
            let offset = host_addr.wrapping_sub(region.host_addr);
            if offset < region.pages * PAGE_SIZE {
                region.log.mark(offset as usize, len as usize);
            }
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::{GuestBuffers, MemoryPlan};

    const PAGES: u64 = 256;

    fn ram() -> GuestRam {
        GuestRam::map(&MemoryPlan::around_hole(PAGES * PAGE_SIZE).unwrap()).unwrap()
    }

    fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4 * PAGE_SIZE as usize]).unwrap();
        file
    }

    /// Bytes at 0x2ff0 to 0x3010, and 16 at 0x9000: pages 2, 3, 9.
    fn buffers(ram: &GuestRam) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(ram);
        buffers.push(0x2ff0, 0x20).unwrap();
        buffers.push(0x9000, 0x10).unwrap();
        buffers
    }

    #[test]
    fn every_way_to_write_is_seen() {
        type Way = (&'static str, fn(&GuestRam), &'static [u64]);
        let ways: &[Way] = &[
            ("write", |ram| ram.write(0x1fff, b"ab").unwrap(), &[1, 2]),
            (
                "write_plain",
                |ram| ram.write_plain(0x5000, &7u64).unwrap(),
                &[5],
            ),
            (
                "place_file",
                |ram| ram.place_file(&file(), 0, 0x6000, 0x2001).unwrap(),
                &[6, 7, 8],
            ),
            (
                "copy_file",
                |ram| ram.copy_file(&file(), 1, 0x6800, 0x1000).unwrap(),
                &[6, 7],
            ),
            // How virtio-queue writes.
            (
                "store",
                |ram| {
                    let memory = ram.as_vm_memory();
                    memory
                        .store(7u16, GuestAddress(0xa002), Ordering::Release)
                        .unwrap();
                },
                &[10],
            ),
            (
                "write_obj",
                |ram| {
                    ram.as_vm_memory()
                        .write_obj(7u64, GuestAddress(0xb000))
                        .unwrap();
                },
                &[11],
            ),
            (
                "slice",
                |ram| {
                    let memory = ram.as_vm_memory();
                    let slice = memory.get_slice(GuestAddress(0xc800), 0x1000).unwrap();
                    slice.subslice(0x800, 4).unwrap().copy_from(b"part");
                },
                &[13],
            ),
            ("copy_from", |ram| buffers(ram).copy_from(0x20, b"x"), &[9]),
            ("zero", |ram| buffers(ram).zero(0, 0x20), &[2, 3]),
            (
                "read_from_file",
                |ram| buffers(ram).read_from_file(&file(), 0).unwrap(),
                &[2, 3, 9],
            ),
            (
                "receive_from",
                |ram| {
                    let (ours, mut theirs) = UnixStream::pair().unwrap();
                    theirs.write_all(b"x").unwrap();
                    buffers(ram).receive_from(ours.as_fd()).unwrap();
                },
                &[2, 3, 9],
            ),
            (
                "iovecs_to_fill",
                |ram| assert_eq!(buffers(ram).iovecs_to_fill().len(), 2),
                &[2, 3, 9],
            ),
            (
                "set_rest",
                |ram| {
                    let mut rest = GuestBuffers::new(ram);
                    rest.set_rest(&buffers(ram), 0x20);
                    assert_eq!(rest.part(0, 1).iovecs_to_fill().len(), 1);
                },
                &[9],
            ),
        ];
        for (name, way, pages) in ways {
            let ram = ram();
            way(&ram);
            assert!(ram.take_written().is_empty(), "{name}: nobody tracked");
            ram.track_writes();
            way(&ram);
            let seen: Vec<u64> = ram.take_written().runs().flatten().collect();
            assert_eq!(seen, *pages, "{name}");
            assert!(ram.take_written().is_empty(), "{name}: taken twice");
            way(&ram);
            ram.track_writes();
            assert!(ram.take_written().is_empty(), "{name}: begins anew");
            ram.stop_tracking_writes();
            way(&ram);
            assert!(
                ram.take_written().is_empty(),
                "{name}: nobody tracks any more"
            );
        }
    }

    #[test]
    fn who_only_reads_marks_nothing() {
        let ram = ram();
        ram.track_writes();
        ram.read(0, &mut [0; 5000]).unwrap();
        assert_eq!(buffers(&ram).iovecs().len(), 2);
        buffers(&ram).copy_to(0, &mut [0; 4]);
        buffers(&ram)
            .write_to_file(&tempfile::tempfile().unwrap(), 0)
            .unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        buffers(&ram).send_to(ours.as_fd()).unwrap();
        assert!(ram.take_written().is_empty());
        ram.mark_all_written();
        assert_eq!(ram.take_written(), PageSet::all(PAGES));
    }

    #[test]
    fn pages_behind_the_hole_follow_those_below_it() {
        let plan = MemoryPlan::around_hole((3 << 30) + (8 << 20)).unwrap();
        let ram = GuestRam::map(&plan).unwrap();
        ram.track_writes();
        ram.write((4 << 30) + 0x5000, b"high").unwrap();
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push((4 << 30) + 0x7fff, 2).unwrap();
        buffers.zero(0, 2);
        let below = (3 << 30) / PAGE_SIZE;
        let seen: Vec<u64> = ram.take_written().runs().flatten().collect();
        assert_eq!(seen, [below + 5, below + 7, below + 8]);
    }

    #[test]
    fn threads_lose_none_of_each_others_marks() {
        let ram = ram();
        ram.track_writes();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let ram = &ram;
                scope.spawn(move || {
                    for page in (thread..PAGES).step_by(4) {
                        ram.write(page * PAGE_SIZE, b"x").unwrap();
                    }
                });
            }
        });
        assert_eq!(ram.take_written(), PageSet::all(PAGES));
    }
}
