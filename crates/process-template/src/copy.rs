//! Who asks for a copy, and has it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::wire::{self, MAX_DESCRIPTORS, MAX_REQUEST_BYTES};

/// How long a template may take for a copy; most of that is the host's.
const PATIENCE_MS: u16 = 10_000;
/// How long it may take to say how a copy ended, once that has.
const LAST_WORD_MS: u16 = 1000;
/// Of what it says.
const MAX_ANSWER_BYTES: usize = 4096;

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is there.
    #[error("cannot connect to the template at {path:?}: {source}; is it still there?")]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// What it is to be given is not there.
    #[error("a copy of a template cannot be given its input: {source}")]
    Descriptor {
        /// What the host said.
        source: io::Error,
    },
    /// More than a packet can have.
    #[error(
        "a template takes {MAX_REQUEST_BYTES} bytes of words and descriptors 0 to {}, this is more: execute the program instead",
        MAX_DESCRIPTORS - 1
    )]
    TooMuch,
    /// The connection broke, or it took too long.
    #[error("the template at {path:?} does not answer: {source}")]
    Silent {
        /// Its socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It will not.
    #[error("the template at {path:?} makes no copy: {why}")]
    Refused {
        /// Its socket.
        path: PathBuf,
        /// Its words.
        why: String,
    },
}

/// How a copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HowEnded {
    /// By itself, with this exit status.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It has, and nobody is left who knows how: the template had gone.
    Unknown,
}

/// A copy of a template, which the kernel kills when this is dropped.
#[derive(Debug)]
pub struct Copy {
    pid: u32,
    pidfd: OwnedFd,
    connection: OwnedFd,
    ended: Option<HowEnded>,
}

impl Copy {
    /// Asks the template at `path` for a copy with these words, the name of the program not among them, and descriptors, each with the number
    /// that it is to have.
    ///
    /// # Errors
    /// Nobody is there, or it refuses, or there are too many of them.
    pub fn ask(
        path: &Path,
        words: &[&OsStr],
        descriptors: &[(RawFd, BorrowedFd<'_>)],
    ) -> Result<Self, AskError> {
        let numbers: Vec<RawFd> = descriptors.iter().map(|(number, _)| *number).collect();
        let request = wire::pack(&numbers, words);
        let fits = |number: &RawFd| (0..MAX_DESCRIPTORS).contains(number);
        if request.len() > MAX_REQUEST_BYTES || !numbers.iter().all(fits) {
            return Err(AskError::TooMuch);
        }
        let connection = connected(path).map_err(|source| AskError::Connect {
            path: path.to_owned(),
            source: source.into(),
        })?;
        let silent = |source: Errno| AskError::Silent {
            path: path.to_owned(),
            source: source.into(),
        };
        let with: Vec<_> = descriptors.iter().map(|(_, fd)| *fd).collect();
        wire::send(&connection, &request, &with).map_err(silent)?;
        if !is_ready(&connection, PATIENCE_MS) {
            return Err(silent(Errno::ETIMEDOUT));
        }
        let answer = wire::receive(&connection, MAX_ANSWER_BYTES);
        let answer = answer
            .map_err(silent)?
            .ok_or_else(|| silent(Errno::ECONNRESET))?;
        let said = String::from_utf8_lossy(&answer.bytes);
        match (said.split_once(' '), answer.descriptors.into_iter().next()) {
            (Some(("pid", pid)), Some(pidfd)) => Ok(Self {
                pid: pid.parse().map_err(|_| silent(Errno::EPROTO))?,
                pidfd,
                connection,
                ended: None,
            }),
            (Some(("refused", why)), _) => Err(AskError::Refused {
                path: path.to_owned(),
                why: why.to_owned(),
            }),
            _ => Err(silent(Errno::EPROTO)),
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its process, by a descriptor: readable once it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<HowEnded> {
        if self.ended.is_none() && is_ready(&self.pidfd, 0) {
            self.ended = Some(self.last_word());
        }
        self.ended
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> HowEnded {
        loop {
            if let Some(ended) = self.try_wait() {
                return ended;
            }
            is_ready(&self.pidfd, PATIENCE_MS);
        }
    }

    /// Kills it, if it has not ended.
    pub fn kill(&self) {
        // SAFETY: a pidfd that is ours, and no more about the signal than its number. It fails only for a process that has ended.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }

    fn last_word(&self) -> HowEnded {
        if !is_ready(&self.connection, LAST_WORD_MS) {
            return HowEnded::Unknown;
        }
        let said = wire::receive(&self.connection, MAX_ANSWER_BYTES);
        let Ok(Some(said)) = said else {
            return HowEnded::Unknown;
        };
        let said = String::from_utf8_lossy(&said.bytes);
        let number = |text: &str| text.parse().ok();
        match said.split_once(' ') {
            Some(("code", code)) => number(code).map(HowEnded::Code),
            Some(("signal", signal)) => number(signal).map(HowEnded::Signal),
            _ => None,
        }
        .unwrap_or(HowEnded::Unknown)
    }
}

fn connected(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let ours = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(ours.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(ours)
}

/// Whether there is something to read, or an end, within this time.
fn is_ready(fd: &impl AsFd, ms: u16) -> bool {
    let mut all = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut all, PollTimeout::from(ms)) {
            Err(Errno::EINTR) => {}
            ready => return matches!(ready, Ok(1..)),
        }
    }
}
