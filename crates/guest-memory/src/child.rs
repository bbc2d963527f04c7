//! A forked child of a process that has other threads, and what it reports through memory that it shares with us.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

use crate::save::errno;
use crate::{CaptureError, Death};

/// State of a report: all is written.
pub(crate) const DONE: u32 = 1;
/// State of a report: `errno` and `offset` say why not.
pub(crate) const FAILED: u32 = 2;

/// First page of the report.
#[repr(C)]
pub(crate) struct Head {
    pub(crate) state: AtomicU32,
    pub(crate) errno: AtomicI32,
    pub(crate) offset: AtomicU64,
    pub(crate) written_pages: AtomicU64,
}

/// Memory that the child shares with us: a [`Head`], then a bit for each page that is in the file.
#[derive(Debug)]
pub(crate) struct Report {
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

    pub(crate) fn map(pages: u64) -> Result<Self, CaptureError> {
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

    pub(crate) fn head(&self) -> &Head {
        // SAFETY: the mapping is as long as this value lives, aligned to a page, and begins with a head; zeroes are one.
        unsafe { self.addr.cast().as_ref() }
    }

    pub(crate) fn words(&self) -> &[AtomicU64] {
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

/// Runs `child` in a copy of this process that has this thread only, shares descriptors with us, takes no signal and
/// ends when `child` returns. The descriptor is a pidfd. `child` is given the number of this process.
pub(crate) fn fork(child: impl FnOnce(i32)) -> io::Result<OwnedFd> {
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
pub(crate) fn wait_for(pidfd: BorrowedFd<'_>) -> io::Result<Death> {
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
