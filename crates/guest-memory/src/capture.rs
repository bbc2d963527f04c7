//! Saves the RAM of a running guest: a forked child has a copy-on-write image of it and writes that to a file.
//!
//! The guest stands still for as long as fork(2) takes to copy the page tables; no privilege is needed. Where that is too
//! long, as with gigabytes of small pages, most of RAM is written before, while the guest runs, and the child inherits only
//! what has changed since.
//!
//! What the child does allocates nothing, takes no lock and makes plain system calls only, because other threads may have held any lock
//! at that moment.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::save::{WriteFailed, WriteJob, errno};
use crate::{GuestRam, MemoryMap, PAGE_SIZE, PageSet, SaveError};

/// What the child inherits of RAM is cut at these pages, as huge pages are: to cut one would split it.
const EXTENT_PAGES: u64 = 512;
/// Most pieces of RAM that the child inherits; more are joined, with what lies between. Each takes the host a call
/// while the guest stands still.
const MAX_EXTENTS: usize = 512;

/// Why a running guest's RAM was not saved. The guest goes on as if nothing had happened.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The file.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Somebody else does it.
    #[error("guest memory is being captured already: wait for the other snapshot to end")]
    Busy,
    /// No memory for what the child reports.
    #[error(
        "cannot map {size_bytes} bytes for the report of the process that saves guest memory: {source}"
    )]
    Report {
        /// How much.
        size_bytes: usize,
        /// What the host said.
        source: io::Error,
    },
    /// No child.
    #[error(
        "cannot fork the process that saves guest memory: {0}; is the limit on processes (ulimit -u, pids.max) reached, or memory not to be promised twice (vm.overcommit_memory=2)?"
    )]
    Fork(#[source] io::Error),
    /// Nobody knows how it ended.
    #[error("cannot wait for the process that saves guest memory: {0}")]
    Wait(#[source] io::Error),
    /// It ended before it was done.
    #[error(
        "the process that saves guest memory was ended by {0} before it was done; was the host out of memory, or a file that guest memory is mapped from made shorter?"
    )]
    Died(Death),
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// By this signal.
    Signal(i32),
    /// With this status.
    Status(i32),
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::Status(status) => write!(f, "status {status}"),
        }
    }
}

/// All that a capture needs, made while the guest still runs.
#[derive(Debug)]
pub struct PreparedCapture {
    inheritance: Inheritance,
    file: File,
    report: Report,
    /// What the file holds already.
    held: PageSet,
    /// Of that, what are bytes in the file.
    data: PageSet,
}

/// A capture under way. Dropped before it is done, it is called off.
#[derive(Debug)]
pub struct Capture {
    pidfd: OwnedFd,
    /// Nobody has waited for the child yet.
    is_waited_for: bool,
    report: Report,
    held: PageSet,
    data: PageSet,
    /// The child shares our descriptors: this one must stay open.
    _file: File,
    _inheritance: Inheritance,
}

impl GuestRam {
    /// Makes what [`PreparedCapture::start`] needs: `into`, a new and empty file, becomes as long as RAM. The guest
    /// may run.
    ///
    /// # Errors
    /// The file is not empty or cannot be written, or the host has no memory for the report.
    pub fn prepare_capture(&self, into: &File) -> Result<PreparedCapture, CaptureError> {
        self.make_room(into)?;
        let size = || self.size_bytes();
        let file = into.try_clone().map_err(|source| SaveError::Size {
            size_bytes: size(),
            source,
        })?;
        Ok(PreparedCapture {
            report: Report::map(self.pages())?,
            inheritance: Inheritance::take(self)?,
            file,
            held: PageSet::none(self.pages()),
            data: PageSet::none(self.pages()),
        })
    }

    /// Saves `pages` as they are now into `into`, as [`GuestRam::save_pages`] does, while the guest goes on:
    /// [`GuestRam::prepare_capture`] and [`PreparedCapture::start`] in one.
    ///
    /// # Errors
    /// As these.
    pub fn capture_in_child(&self, pages: PageSet, into: &File) -> Result<Capture, CaptureError> {
        self.prepare_capture(into)?.start(pages)
    }
}

impl PreparedCapture {
    /// Writes `pages` as they are, while the guest runs and changes them: what changes from the call on must be written
    /// again, by another call or by [`PreparedCapture::start`]. So whoever calls this takes and clears the hypervisor's log of
    /// what the guest writes before each call. What devices write is known for sure only when none works
    /// ([`GuestRam::take_written`]): it is tracked from such a moment before the first call on, and taken once, for
    /// [`PreparedCapture::start`].
    ///
    /// # Errors
    /// Writing failed, or `pages` are of another RAM.
    pub fn write_ahead(&mut self, pages: &PageSet) -> Result<(), CaptureError> {
        let ram = &self.inheritance.ram;
        ram.check_set(pages)?;
        let job = WriteJob::new(ram, self.file.as_raw_fd(), self.data.clone());
        let data = &mut self.data;
        job.run(pages, |run| {
            data.insert(run);
            Ok(())
        })
        .map_err(SaveError::from)?;
        self.held.union(pages);
        self.inheritance.disinherit();
        Ok(())
    }

    /// Forks the child that saves `pages` as they are now. The guest and its devices stand still until this returns, then
    /// they may go on. After [`PreparedCapture::write_ahead`], `pages` are those that have changed since.
    ///
    /// The child is under the calling thread's seccomp filter and needs `pwrite64`, `mincore`, `sync_file_range`,
    /// `getppid`, `exit_group`; the caller `clone`, `rt_sigprocmask`, then `waitid` and `pidfd_send_signal`. It shares the
    /// descriptors of this process, so that what is closed here is closed, takes no signal but SIGKILL, and ends soon
    /// after this process.
    ///
    /// # Errors
    /// `pages` are of another RAM, or the host gives no process.
    pub fn start(self, pages: PageSet) -> Result<Capture, CaptureError> {
        let Self {
            mut inheritance,
            file,
            report,
            mut held,
            data,
        } = self;
        inheritance.ram.check_set(&pages)?;
        inheritance.leave(&pages);
        let job = WriteJob::new(&inheritance.ram, file.as_raw_fd(), data);
        let pidfd = fork(|parent| write_in_child(&job, &pages, &report, parent))
            .map_err(CaptureError::Fork)?;
        held.union(&pages);
        Ok(Capture {
            pidfd,
            is_waited_for: false,
            report,
            held,
            data: job.into_filled(),
            _file: file,
            _inheritance: inheritance,
        })
    }
}

impl Capture {
    /// How many pages were written so far; pages of zeroes do not count.
    #[must_use]
    pub fn written_pages(&self) -> u64 {
        self.report.head().written_pages.load(Ordering::Relaxed)
    }

    /// Waits until the child is done and says what the file holds. [`AsFd`] gives a descriptor that becomes readable then
    /// (poll(2) of a pidfd), after which this does not wait.
    ///
    /// # Errors
    /// Writing failed, as on a full disk, or the child was killed.
    pub fn wait(mut self) -> Result<MemoryMap, CaptureError> {
        let death = wait_for(self.pidfd.as_fd()).map_err(CaptureError::Wait)?;
        self.is_waited_for = true;
        let head = self.report.head();
        match head.state.load(Ordering::Acquire) {
            DONE => {}
            FAILED => {
                return Err(SaveError::from(WriteFailed {
                    offset: head.offset.load(Ordering::Relaxed),
                    errno: head.errno.load(Ordering::Relaxed),
                })
                .into());
            }
            _ => return Err(CaptureError::Died(death)),
        }
        let words: Vec<u64> = self
            .report
            .words()
            .iter()
            .map(|w| w.load(Ordering::Relaxed))
            .collect();
        let pages = self.data.ram_pages();
        self.data.insert_words(0, pages, &words);
        Ok(MemoryMap::of_sets(&self.held, &self.data))
    }
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.is_waited_for {
            return;
        }
        // SAFETY: plain numbers and no details of the signal; the descriptor names our child, which nobody has waited for.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        // A child that cannot be waited for stays a zombie until this process ends; there is nobody to tell.
        let _ = wait_for(self.pidfd.as_fd());
    }
}

/// What a child inherits of RAM: all of it again when this is dropped. One of a RAM at a time.
#[derive(Debug)]
struct Inheritance {
    ram: GuestRam,
    is_partial: bool,
}

impl Inheritance {
    fn take(ram: &GuestRam) -> Result<Self, CaptureError> {
        if ram.is_captured().swap(true, Ordering::AcqRel) {
            return Err(CaptureError::Busy);
        }
        Ok(Self {
            ram: ram.clone(),
            is_partial: false,
        })
    }

    /// Has a child inherit nothing.
    fn disinherit(&mut self) {
        if !self.is_partial {
            self.is_partial = true;
            self.advise(0..self.ram.pages(), libc::MADV_DONTFORK);
        }
    }

    /// Has a child inherit `pages` at least.
    fn leave(&mut self, pages: &PageSet) {
        if self.is_partial {
            for extent in extents(pages) {
                self.advise(extent, libc::MADV_DOFORK);
            }
        }
    }

    /// What the host does not take (it takes what is whole pages of a mapping) costs time at the next fork, no data:
    /// a page that a child should have and has not ends it.
    fn advise(&self, pages: Range<u64>, advice: i32) {
        for (pages, host_addr) in self.ram.host_pieces(&pages) {
            let len = ((pages.end - pages.start) * PAGE_SIZE) as usize;
            // SAFETY: the range is mapped, and neither advice changes what is in it here.
            unsafe { libc::madvise(host_addr as *mut _, len, advice) };
        }
    }
}

impl Drop for Inheritance {
    fn drop(&mut self) {
        if self.is_partial {
            self.advise(0..self.ram.pages(), libc::MADV_DOFORK);
        }
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

const DONE: u32 = 1;
const FAILED: u32 = 2;

/// First page of the report.
#[repr(C)]
struct Head {
    state: AtomicU32,
    errno: AtomicI32,
    offset: AtomicU64,
    written_pages: AtomicU64,
}

/// Memory that the child shares with us: a [`Head`], then a bit for each page that is in the file.
#[derive(Debug)]
struct Report {
    addr: NonNull<u8>,
    size_bytes: usize,
    words: usize,
}

// SAFETY: a mapping that belongs to no thread, used through atomics only.
unsafe impl Send for Report {}
// SAFETY: as above.
unsafe impl Sync for Report {}

impl Report {
    const HEAD_BYTES: usize = size_of::<Head>();

    fn map(pages: u64) -> Result<Self, CaptureError> {
        // Pages of RAM that is mapped: a bit for each of them fits.
        let words = pages.div_ceil(64) as usize;
        let size_bytes = Self::HEAD_BYTES + words * size_of::<u64>();
        // SAFETY: a fresh mapping where the host likes. Populated, so that the child finds its part of it.
        let got = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        match NonNull::new(got.cast()) {
            Some(addr) if got != libc::MAP_FAILED => Ok(Self {
                addr,
                size_bytes,
                words,
            }),
            _ => Err(CaptureError::Report {
                size_bytes,
                source: io::Error::last_os_error(),
            }),
        }
    }

    fn head(&self) -> &Head {
        // SAFETY: the mapping is as long as this value lives, aligned to a page, and begins with a head; zeroes are one.
        unsafe { self.addr.cast().as_ref() }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: behind the head, whose size is a multiple of eight, the mapping has so many words.
        unsafe {
            std::slice::from_raw_parts(self.addr.as_ptr().add(Self::HEAD_BYTES).cast(), self.words)
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; all references into it have ended.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.size_bytes) };
    }
}

/// What the child does.
fn write_in_child(job: &WriteJob, pages: &PageSet, report: &Report, parent: i32) {
    let head = report.head();
    let words = report.words();
    let result = job.run(pages, |run| {
        let mut at = run.start;
        while at < run.end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let count = (64 - bit).min(run.end - at);
            if let Some(word) = words.get(word) {
                word.fetch_or((u64::MAX >> (64 - count)) << bit, Ordering::Relaxed);
            }
            at += count;
        }
        head.written_pages
            .fetch_add(run.end - run.start, Ordering::Relaxed);
        // SAFETY: no argument, never fails. Nobody wants the file any more when the parent is gone.
        if unsafe { libc::getppid() } != parent {
            return Err(WriteFailed {
                offset: 0,
                errno: libc::ESRCH,
            });
        }
        Ok(())
    });
    if let Err(failed) = result {
        head.errno.store(failed.errno, Ordering::Relaxed);
        head.offset.store(failed.offset, Ordering::Relaxed);
        head.state.store(FAILED, Ordering::Release);
    } else {
        head.state.store(DONE, Ordering::Release);
    }
}

/// Runs `child` in a copy of this process that has this thread only, shares descriptors with us, takes no signal and
/// ends when `child` returns. The descriptor is a pidfd. `child` is given the number of this process.
fn fork(child: impl FnOnce(i32)) -> io::Result<OwnedFd> {
    // SAFETY: no argument, never fails.
    let parent = unsafe { libc::getpid() };
    let mut pidfd: libc::c_int = -1;
    let signals = Blocked::all();
    // No signal tells the end: whoever waits for other children is not disturbed.
    let flags = libc::CLONE_PIDFD | libc::CLONE_FILES;
    // SAFETY: without a stack of its own the child goes on here, on its copy of ours, as after fork(2). It does what the
    // caller promised (no allocation, no lock) and then ends without unwinding or running a destructor.
    let got = unsafe { libc::syscall(libc::SYS_clone, flags, 0, &raw mut pidfd, 0, 0) };
    if got == 0 {
        let _never_return = Leave;
        child(parent);
        drop(_never_return);
    }
    let failed = errno();
    drop(signals);
    if got < 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Ends the process, also when a panic unwinds through: the child must never go on in what its parent was doing.
struct Leave;

impl Drop for Leave {
    fn drop(&mut self) {
        // SAFETY: ends the process, without what was registered for its end.
        unsafe { libc::_exit(0) }
    }
}

/// All signals of this thread blocked for a while: the handlers are made for the parent.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> Self {
        // SAFETY: signal sets are plain bits; both calls are given sets of ours.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set is what the thread had before.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}

/// Waits for a child (waitid(2)).
fn wait_for(pidfd: BorrowedFd<'_>) -> io::Result<Death> {
    loop {
        // SAFETY: the structure is plain numbers, for which zeroes are a value; the call fills it.
        let (got, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let id = pidfd.as_raw_fd().unsigned_abs();
            // Also children that end without a signal.
            let got = libc::waitid(
                libc::P_PIDFD,
                id,
                &raw mut info,
                libc::WEXITED | libc::__WALL,
            );
            (got, info)
        };
        if got == 0 {
            // SAFETY: after a successful call the fields of a child's end are set.
            let status = unsafe { info.si_status() };
            return Ok(match info.si_code {
                libc::CLD_EXITED => Death::Status(status),
                _ => Death::Signal(status),
            });
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
