//! Guest RAM into a memory file: pages of zeroes stay holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use crate::{GuestRam, MemoryMap, PAGE_SIZE, PageSet};

/// Pages looked at and written at once: a quarter of a megabyte is still in the processor's cache when it is
/// copied after it was compared.
const PIECE_PAGES: u64 = 64;
/// Bytes after which the host is told to begin writing to the device, so that a sync in the end finds little left.
const EARLY_WRITE_BYTES: u64 = 32 << 20;

/// Why RAM could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The file is not fresh: what is in it would show where holes should be.
    #[error(
        "the memory file has {size_bytes} bytes already: memory is saved into a new, empty file only"
    )]
    NotEmpty {
        /// Its size.
        size_bytes: u64,
    },
    /// The set is of another RAM.
    #[error("pages of a memory of {set_pages} pages, the guest has {ram_pages}")]
    OtherRam {
        /// Pages the set is of.
        set_pages: u64,
        /// Pages there are.
        ram_pages: u64,
    },
    /// The file cannot be made as long as RAM.
    #[error(
        "cannot make the memory file {size_bytes} bytes long: {source}; may files of this file system and user (ulimit -f) be that large?"
    )]
    Size {
        /// How long it is to be.
        size_bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// Writing failed, as on a full disk.
    #[error("cannot write guest memory at offset {offset} of the memory file: {source}")]
    Write {
        /// Offset in the file.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
}

impl GuestRam {
    /// Writes `pages` to `into`, a new and empty file, page `n` at offset `n * 4096`, and says what the file holds.
    /// Pages of zeroes become holes. The file is then as long as RAM; it is not synced, but the host has begun
    /// to write it.
    ///
    /// The guest stands still and no device works meanwhile; [`GuestRam::capture_in_child`] saves a running one.
    ///
    /// One thread does it: file systems let one writer at a time into a file, and a second gained nothing.
    ///
    /// # Errors
    /// The file is not empty or cannot be written, or `pages` are of another RAM. What was written stays.
    pub fn save_pages(&self, pages: &PageSet, into: &File) -> Result<MemoryMap, SaveError> {
        self.check_set(pages)?;
        self.make_room(into)?;
        let job = WriteJob::new(self, into.as_raw_fd(), PageSet::none(self.pages()));
        let mut data = PageSet::none(self.pages());
        job.run(pages, |run| {
            data.insert(run);
            Ok(())
        })?;
        Ok(MemoryMap::of_sets(pages, &data))
    }

    pub(crate) fn check_set(&self, pages: &PageSet) -> Result<(), SaveError> {
        if pages.ram_pages() == self.pages() {
            return Ok(());
        }
        Err(SaveError::OtherRam {
            set_pages: pages.ram_pages(),
            ram_pages: self.pages(),
        })
    }

    /// Makes an empty file as long as RAM.
    pub(crate) fn make_room(&self, into: &File) -> Result<(), SaveError> {
        let size_bytes = self.size_bytes();
        let failed = |source| SaveError::Size { size_bytes, source };
        match into.metadata().map_err(failed)?.len() {
            0 => into.set_len(size_bytes).map_err(failed),
            size_bytes => Err(SaveError::NotEmpty { size_bytes }),
        }
    }
}

/// What writing stopped at. Plain numbers: a forked child hands them over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriteFailed {
    pub(crate) offset: u64,
    pub(crate) errno: i32,
}

impl From<WriteFailed> for SaveError {
    fn from(failed: WriteFailed) -> Self {
        Self::Write {
            offset: failed.offset,
            source: io::Error::from_raw_os_error(failed.errno),
        }
    }
}

/// Pages in a row, and where they are mapped.
#[derive(Debug, Clone)]
struct Mapped {
    pages: Range<u64>,
    host_addr: usize,
}

/// Writes pages of RAM to a file. All it needs is made beforehand: running it allocates nothing, takes no lock
/// and makes plain system calls only, so that a forked child of a process with threads can do it.
#[derive(Debug)]
pub(crate) struct WriteJob {
    ranges: Vec<Mapped>,
    /// Pages that show a file, or are served by another process, where they were never touched: untouched does not mean zero.
    filed: PageSet,
    /// What asks whether a page was ever touched can be believed: pages are never swapped out.
    no_swap: bool,
    /// Pages for which the file has bytes already: zeroes are written over them.
    filled: PageSet,
    fd: RawFd,
}

impl WriteJob {
    pub(crate) fn new(ram: &GuestRam, fd: RawFd, filled: PageSet) -> Self {
        let mut first = 0;
        let ranges = ram.mapped_ranges().map(|(range, host_addr)| {
            let pages = first..first + range.size_bytes / PAGE_SIZE;
            first = pages.end;
            Mapped {
                pages,
                // A 64-bit host: addresses are sizes.
                host_addr: host_addr as usize,
            }
        });
        Self {
            ranges: ranges.collect(),
            filed: ram.filed_pages(),
            no_swap: host_has_no_swap(),
            filled,
            fd,
        }
    }

    /// What was in the file before it ran.
    pub(crate) fn into_filled(self) -> PageSet {
        self.filled
    }

    /// Writes `pages` and calls `written` with each run that went into the file; the others are zeroes.
    pub(crate) fn run(
        &self,
        pages: &PageSet,
        mut written: impl FnMut(Range<u64>) -> Result<(), WriteFailed>,
    ) -> Result<(), WriteFailed> {
        let mut early = Early {
            fd: self.fd,
            start: 0,
            end: 0,
        };
        for run in pages.runs() {
            for range in &self.ranges {
                let (mut at, end) = (
                    run.start.max(range.pages.start),
                    run.end.min(range.pages.end),
                );
                while at < end {
                    let stop = ((at / PIECE_PAGES + 1) * PIECE_PAGES).min(end);
                    let host_addr = range.host_addr + bytes(at - range.pages.start);
                    self.write_piece(at..stop, host_addr, &mut |run: Range<u64>| {
                        early.add(&run);
                        written(run)
                    })?;
                    at = stop;
                }
            }
        }
        Ok(())
    }

    /// As [`Self::run`], of pages that were copied one behind the other to `copies_addr`.
    pub(crate) fn run_copied(
        &self,
        pages: &PageSet,
        copies_addr: usize,
        mut written: impl FnMut(Range<u64>) -> Result<(), WriteFailed>,
    ) -> Result<(), WriteFailed> {
        let mut addr = copies_addr;
        for run in pages.runs() {
            let mut at = run.start;
            while at < run.end {
                let stop = (at + PIECE_PAGES).min(run.end);
                self.write_piece(at..stop, addr, &mut written)?;
                addr += bytes(stop - at);
                at = stop;
            }
        }
        Ok(())
    }

    fn write_piece(
        &self,
        pages: Range<u64>,
        host_addr: usize,
        written: &mut impl FnMut(Range<u64>) -> Result<(), WriteFailed>,
    ) -> Result<(), WriteFailed> {
        let untouched = self.untouched(&pages, host_addr);
        // Data not written yet.
        let mut data = pages.start..pages.start;
        for page in pages.clone() {
            let at = page - pages.start;
            let addr = host_addr + bytes(at);
            let is_zero = untouched >> at & 1 == 1 || is_zero(addr);
            if !is_zero || self.filled.contains(page) {
                if data.is_empty() {
                    data.start = page;
                }
                data.end = page + 1;
                continue;
            }
            self.flush(&mut data, &pages, host_addr, written)?;
        }
        self.flush(&mut data, &pages, host_addr, written)
    }

    fn flush(
        &self,
        data: &mut Range<u64>,
        pages: &Range<u64>,
        host_addr: usize,
        written: &mut impl FnMut(Range<u64>) -> Result<(), WriteFailed>,
    ) -> Result<(), WriteFailed> {
        if data.is_empty() {
            return Ok(());
        }
        let addr = host_addr + bytes(data.start - pages.start);
        write_all(
            self.fd,
            addr,
            bytes(data.end - data.start),
            data.start * PAGE_SIZE,
        )?;
        written(data.clone())?;
        *data = pages.end..pages.end;
        Ok(())
    }

    /// Which of at most 64 pages were never touched and so are zeroes, without touching them (mincore(2)). A page of
    /// anonymous memory that was never touched is not there; but one that was swapped out is not, either, so that
    /// on a host with swap, or when in doubt, all are said to be touched: reading them costs time, no data.
    fn untouched(&self, pages: &Range<u64>, host_addr: usize) -> u64 {
        if !self.no_swap || self.filed.touches(pages) {
            return 0;
        }
        let mut there = [1u8; PIECE_PAGES as usize];
        // SAFETY: the pages are mapped, and the array has a byte for each of the at most 64 of them.
        let got = unsafe {
            libc::mincore(
                host_addr as *mut libc::c_void,
                bytes(pages.end - pages.start),
                there.as_mut_ptr(),
            )
        };
        if got != 0 {
            return 0;
        }
        let each = there.iter().enumerate();
        each.fold(0, |untouched, (at, there)| {
            untouched | u64::from(there & 1 == 0) << at
        })
    }
}

/// Tells the host early to write what is in its page cache.
struct Early {
    fd: RawFd,
    start: u64,
    end: u64,
}

impl Early {
    fn add(&mut self, run: &Range<u64>) {
        self.end = run.end * PAGE_SIZE;
        if self.end - self.start < EARLY_WRITE_BYTES {
            return;
        }
        // SAFETY: plain numbers. It is an offer: where the file system does not take it, the sync does it all.
        unsafe {
            libc::sync_file_range(
                self.fd,
                self.start as i64,
                (self.end - self.start) as i64,
                libc::SYNC_FILE_RANGE_WRITE,
            )
        };
        self.start = self.end;
    }
}

/// Pages of one mapping in bytes: they are mapped, so that the number fits.
fn bytes(pages: u64) -> usize {
    (pages * PAGE_SIZE) as usize
}

/// Whether the mapped page at `addr` is all zeroes. Somebody may write there meanwhile; each word is read once.
fn is_zero(addr: usize) -> bool {
    const BLOCK_WORDS: usize = 32;
    let mut word = addr as *const u64;
    for _ in 0..PAGE_SIZE as usize / size_of::<u64>() / BLOCK_WORDS {
        let mut all = 0;
        for _ in 0..BLOCK_WORDS {
            // SAFETY: within a page that is mapped, aligned as it is; any value is one.
            all |= unsafe { word.read_volatile() };
            word = word.wrapping_add(1);
        }
        if all != 0 {
            return false;
        }
    }
    true
}

/// pwrite(2) until all is written.
fn write_all(fd: RawFd, addr: usize, len: usize, offset: u64) -> Result<(), WriteFailed> {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        // SAFETY: the range is mapped; the kernel only reads it. Offsets are below 2^44.
        let got = unsafe {
            libc::pwrite64(
                fd,
                (addr + done) as *const libc::c_void,
                len - done,
                at as i64,
            )
        };
        match usize::try_from(got) {
            Ok(0) => {
                return Err(WriteFailed {
                    offset: at,
                    errno: libc::ENOSPC,
                });
            }
            Ok(n) => done += n,
            Err(_) => {
                let errno = errno();
                if errno != libc::EINTR {
                    return Err(WriteFailed { offset: at, errno });
                }
            }
        }
    }
    Ok(())
}

/// The calling thread's errno, without the locks and allocations that an `io::Error` might need.
pub(crate) fn errno() -> i32 {
    // SAFETY: always points to the calling thread's own.
    unsafe { *libc::__errno_location() }
}

/// Whether pages cannot be swapped out (sysinfo(2)). Swap that is switched on later is found by whoever asks then.
fn host_has_no_swap() -> bool {
    // SAFETY: sysinfo is plain numbers, for which all zeroes is a value; the call fills it.
    unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        libc::sysinfo(&raw mut info) == 0 && info.totalswap == 0
    }
}
