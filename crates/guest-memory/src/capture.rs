//! Saves the RAM of a running guest: a forked child has a copy-on-write image of it and writes that to a file.
//!
//! The guest stands still for as long as fork(2) takes to copy the page tables; no privilege is needed. Where that is too
//! long, as with gigabytes of small pages, most of RAM is written before, while the guest runs, and the child gets only
//! what has changed since (`instant.rs`).
//!
//! What the child does allocates nothing, takes no lock and makes plain system calls only, because other threads may have held any lock
//! at that moment.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use crate::child::{DONE, FAILED, Report, fork, wait_for};
use crate::instant::Instant;
use crate::save::{WriteFailed, WriteJob};
use crate::{GuestRam, MemoryMap, PageSet, SaveError};

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
    /// No memory for pages that are copied.
    #[error("cannot map {copied_bytes} bytes for copies of guest memory: {source}")]
    Copies {
        /// How much.
        copied_bytes: u64,
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
    instant: Instant,
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
    _instant: Instant,
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
            instant: Instant::prepare(self)?,
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
    pub fn capture_in_child(&self, pages: &PageSet, into: &File) -> Result<Capture, CaptureError> {
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
        let ram = self.instant.ram();
        ram.check_set(pages)?;
        write_here(ram, &self.file, pages, &mut self.data)?;
        self.held.union(pages);
        Ok(())
    }

    /// Forks the child that saves `pages` as they are now. The guest and its devices stand still until this returns, then
    /// they may go on. After [`PreparedCapture::write_ahead`], `pages` are those that have changed since. Of RAM that another
    /// process serves, it waits for the pages that are not there yet: what was written ahead is. Of RAM in pages of hugetlbfs, which no
    /// child inherits, it copies 16 MiB and writes what goes beyond before it returns.
    ///
    /// The child is under the calling thread's seccomp filter and needs `pwrite64`, `mincore`, `sync_file_range`,
    /// `getppid`, `exit_group`; the caller `clone`, `rt_sigprocmask`, `sysinfo`, then `waitid` and `pidfd_send_signal` (the
    /// role `files` has them). It shares the
    /// descriptors of this process, so that what is closed here is closed, takes no signal but SIGKILL, and ends soon
    /// after this process.
    ///
    /// # Errors
    /// `pages` are of another RAM, or the host gives no process.
    pub fn start(self, pages: &PageSet) -> Result<Capture, CaptureError> {
        let Self {
            mut instant,
            file,
            report,
            mut held,
            mut data,
        } = self;
        instant.ram().check_set(pages)?;
        instant.ram().bring_in(pages);
        instant.take(pages)?;
        if instant.left().count() > 0 {
            write_here(instant.ram(), &file, instant.left(), &mut data)?;
        }
        let job = WriteJob::new(instant.ram(), file.as_raw_fd(), data);
        let pidfd = fork(|parent| write_in_child(&job, &instant, &report, parent))
            .map_err(CaptureError::Fork)?;
        held.union(pages);
        Ok(Capture {
            pidfd,
            is_waited_for: false,
            report,
            held,
            data: job.into_filled(),
            _file: file,
            _instant: instant,
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

/// Writes pages in this process, and adds to `data` what was not zero.
fn write_here(
    ram: &GuestRam,
    file: &File,
    pages: &PageSet,
    data: &mut PageSet,
) -> Result<(), SaveError> {
    let job = WriteJob::new(ram, file.as_raw_fd(), data.clone());
    job.run(pages, |run| {
        data.insert(run);
        Ok(())
    })?;
    Ok(())
}

/// What the child does.
fn write_in_child(job: &WriteJob, instant: &Instant, report: &Report, parent: i32) {
    let head = report.head();
    let words = report.words();
    let mut written = |run: Range<u64>| {
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
    };
    let result = job
        .run_copied(instant.copied(), instant.copies_addr(), &mut written)
        .and_then(|()| job.run(instant.inherited(), &mut written));
    if let Err(failed) = result {
        head.errno.store(failed.errno, Ordering::Relaxed);
        head.offset.store(failed.offset, Ordering::Relaxed);
        head.state.store(FAILED, Ordering::Release);
    } else {
        head.state.store(DONE, Ordering::Release);
    }
}
