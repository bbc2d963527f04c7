//! Saves the RAM of a running guest: a forked child has a copy-on-write image of it and writes that to a file.
//!
//! The guest stands still for as long as fork(2) takes to copy the page tables; no privilege is needed.
//! What the child does allocates nothing, takes no lock and makes plain system calls only, because other threads may have held any lock
//! at that moment.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::save::{WriteFailed, WriteJob, errno};
use crate::{GuestRam, MemoryMap, PageSet, SaveError};

/// Why a running guest's RAM was not saved. The guest goes on as if nothing had happened.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The file.
    #[error(transparent)]
    Save(#[from] SaveError),
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
    ram: GuestRam,
    file: File,
    report: Report,
}

/// A capture under way. Dropped before it is done, it is called off.
#[derive(Debug)]
pub struct Capture {
    pidfd: OwnedFd,
    /// Nobody has waited for the child yet.
    is_waited_for: bool,
    report: Report,
    pages: PageSet,
    /// The child shares our descriptors: this one must stay open.
    _file: File,
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
            ram: self.clone(),
            file,
            report: Report::map(self.pages())?,
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
    /// Forks the child that saves `pages` as they are now. The guest and its devices stand still until this returns, then
    /// they may go on.
    ///
    /// The child is under the calling thread's seccomp filter and needs `pwrite64`, `mincore`, `sync_file_range`, `sysinfo`,
    /// `getppid`, `exit_group`; the caller `clone`, then `waitid` and `pidfd_send_signal`. It shares the descriptors of this process, so that
    /// what is closed here is closed, takes no signal but SIGKILL, and ends soon after this process.
    ///
    /// # Errors
    /// `pages` are of another RAM, or the host gives no process.
    pub fn start(self, pages: PageSet) -> Result<Capture, CaptureError> {
        let Self { ram, file, report } = self;
        ram.check_set(&pages)?;
        let job = WriteJob::new(&ram, file.as_raw_fd());
        let pidfd = fork(|parent| write_in_child(&job, &pages, &report, parent))
            .map_err(CaptureError::Fork)?;
        Ok(Capture {
            pidfd,
            is_waited_for: false,
            report,
            pages,
            _file: file,
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
        let mut data = PageSet::none(self.pages.ram_pages());
        let words: Vec<u64> = self
            .report
            .words()
            .iter()
            .map(|w| w.load(Ordering::Relaxed))
            .collect();
        data.insert_words(0, self.pages.ram_pages(), &words);
        Ok(MemoryMap::of_sets(&self.pages, &data))
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
