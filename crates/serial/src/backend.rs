//! Where the console is: one module per kind, behind one set of calls. No call waits.
//!
//! Descriptors are only named here (see `watches`), and only the worker watches them: `flush` drives a
//! back end from another thread, which must not close what the loop watches. So a descriptor that is
//! done with is put aside and closed by `reap`, which the worker calls once nothing watches it.

mod log_file;
pub(crate) mod raw_mode;
mod socket;
mod stdio;
mod terminal;

use std::io;
use std::os::fd::RawFd;

use alveole_event_loop::{Interest, Ready};

use crate::{ConsoleEvent, ConsoleTarget, SerialError};

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrote {
    /// This many bytes were taken.
    Taken(usize),
    /// This many bytes went nowhere.
    Dropped(usize),
    /// It would have waited.
    Blocked,
    /// Nobody will ever read this console again.
    Lost,
}

/// What came of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Got {
    /// This many bytes for the guest; may be none when a key was for us.
    Bytes(usize),
    /// Nothing for now.
    Nothing,
}

/// Descriptors of a back end by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Input, or both ways.
    Input = 0,
    /// Output only.
    Output = 1,
    /// A listening socket.
    Listener = 2,
}

/// How many roles there are.
pub(crate) const ROLES: usize = 3;

/// What to watch, by role.
pub(crate) type Watches = [Option<(RawFd, Interest)>; ROLES];

pub(crate) enum Backend {
    Terminal(terminal::Terminal),
    File(log_file::LogFile),
    Socket(socket::SocketConsole),
    None,
}

impl Backend {
    pub(crate) fn open(target: &ConsoleTarget) -> Result<Self, SerialError> {
        Ok(match target {
            ConsoleTarget::Terminal => Self::Terminal(terminal::Terminal::open()?),
            ConsoleTarget::File {
                path,
                start,
                limit_bytes,
            } => Self::File(log_file::LogFile::open(path, *start, *limit_bytes)?),
            ConsoleTarget::Socket(path) => Self::Socket(socket::SocketConsole::open(path)?),
            ConsoleTarget::None => Self::None,
        })
    }

    /// Looks whether a console in a file could be opened; others are not looked at.
    pub(crate) fn try_file(target: &ConsoleTarget) -> Result<(), SerialError> {
        match target {
            ConsoleTarget::File { path, .. } => log_file::LogFile::try_open(path),
            _ => Ok(()),
        }
    }

    /// Writes what the back end has to say by itself (help text, scrollback); false when it would
    /// wait.
    pub(crate) fn write_own(&mut self) -> bool {
        match self {
            Self::Terminal(t) => t.write_own(),
            Self::Socket(s) => s.write_own(),
            Self::File(_) | Self::None => true,
        }
    }

    /// Writes output of the guest.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Wrote {
        match self {
            Self::Terminal(t) => t.write(bytes),
            Self::File(f) => f.write(bytes),
            Self::Socket(s) => s.write(bytes),
            Self::None => Wrote::Dropped(bytes.len()),
        }
    }

    /// Reads input for the guest.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Got {
        match self {
            Self::Terminal(t) => t.read(into),
            Self::Socket(s) => s.read(into),
            Self::File(_) | Self::None => Got::Nothing,
        }
    }

    /// Whether input must be read even when the guest has no room for it.
    pub(crate) fn must_read(&self) -> bool {
        matches!(self, Self::Terminal(t) if t.has_keys_for_us())
    }

    /// What to watch when there is room for input (`want_input`) and output would wait (`blocked`).
    pub(crate) fn watches(&self, want_input: bool, blocked: bool) -> Watches {
        match self {
            Self::Terminal(t) => t.watches(want_input, blocked),
            Self::File(f) => f.watches(blocked),
            Self::Socket(s) => s.watches(want_input, blocked),
            Self::None => [None; ROLES],
        }
    }

    /// A watched descriptor is ready.
    pub(crate) fn on_ready(&mut self, role: Role, ready: Ready) {
        match self {
            Self::Terminal(t) => t.on_ready(role, ready),
            Self::Socket(s) => s.on_ready(role, ready),
            Self::File(_) | Self::None => {}
        }
    }

    /// The event loop cannot watch the descriptor: it is of a kind that is always ready.
    pub(crate) fn on_always_ready(&mut self, role: Role) {
        if let (Self::Terminal(t), Role::Input) = (self, role) {
            t.on_always_ready();
        }
    }

    /// Something for the owner.
    pub(crate) fn take_event(&mut self) -> Option<ConsoleEvent> {
        match self {
            Self::Terminal(t) => t.take_event(),
            Self::File(_) | Self::Socket(_) | Self::None => None,
        }
    }

    /// Closes what is done with. Nothing that `watches` no longer names is watched now.
    pub(crate) fn reap(&mut self) {
        if let Self::Socket(s) = self {
            s.reap();
        }
    }

    /// Gives back what is not ours: the terminal's settings, the socket's path.
    pub(crate) fn close(&mut self) {
        match self {
            Self::Terminal(t) => t.close(),
            Self::Socket(s) => s.close(),
            Self::File(_) | Self::None => {}
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.close();
    }
}

/// Whether a write failed for want of room: it may work again later.
fn is_full(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG)
    )
}

/// Repeats a call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
