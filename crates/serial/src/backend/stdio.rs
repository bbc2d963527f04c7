//! An inherited stream (standard input, standard output), used without ever waiting on it.
//!
//! `O_NONBLOCK` is a property of the open file, which the shell and its other children share: setting
//! it on what we inherited would break them. So a terminal or FIFO is opened once more by its name
//! under `/proc/self/fd`, which makes an open file of our own; where that is not allowed (a terminal of
//! another user, under sudo) poll is asked before each call.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use super::retry;
use crate::sys;

/// Device number of `/dev/ptmx` (Linux Documentation/admin-guide/devices.txt). Opening the master side
/// of a pseudo-terminal by name makes a new pair instead.
const PTMX: u64 = (5 << 8) | 2;
/// Bytes that a pipe takes without waiting when poll calls it writable (pipe(7): PIPE_BUF).
const POLLED_PIPE_BYTES: usize = 4096;
/// The same for a terminal: poll promises room for something only.
const POLLED_TERMINAL_BYTES: usize = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Ours alone and non-blocking, or of a kind that never waits (a regular file).
    Direct,
    /// Shared: ask poll, then at most this many bytes.
    AskFirst(usize),
    /// A socket has a flag per call.
    Socket,
}

#[derive(Debug)]
pub(crate) struct Stdio {
    file: File,
    manner: Manner,
    terminal: bool,
}

impl Stdio {
    pub(crate) fn open(inherited: BorrowedFd<'_>, to_write: bool) -> io::Result<Self> {
        let file = File::from(inherited.try_clone_to_owned()?);
        let meta = file.metadata()?;
        let kind = meta.file_type();
        let terminal = file.is_terminal();
        let asks = |bytes| (None, Manner::AskFirst(bytes));
        let (own, manner) = if kind.is_socket() {
            (None, Manner::Socket)
        } else if terminal || kind.is_fifo() {
            let polled = if terminal {
                POLLED_TERMINAL_BYTES
            } else {
                POLLED_PIPE_BYTES
            };
            if terminal && meta.rdev() == PTMX {
                asks(polled)
            } else {
                match open_again(&file, to_write) {
                    Ok(own) => (Some(own), Manner::Direct),
                    Err(_) => asks(polled),
                }
            }
        } else {
            (None, Manner::Direct)
        };
        Ok(Self {
            file: own.unwrap_or(file),
            manner,
            terminal,
        })
    }

    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Reads what is there; `WouldBlock` when there is nothing.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.manner {
            Manner::Direct => retry(|| self.file.read(into)),
            Manner::Socket => retry(|| sys::recv_now(self.file.as_fd(), into)),
            Manner::AskFirst(_) if sys::is_ready(self.file.as_fd(), false) => {
                retry(|| self.file.read(into))
            }
            Manner::AskFirst(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Writes what there is room for; `WouldBlock` when there is none.
    pub(crate) fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self.manner {
            Manner::Direct => retry(|| self.file.write(from)),
            Manner::Socket => retry(|| sys::send_now(self.file.as_fd(), from)),
            Manner::AskFirst(bytes) if sys::is_ready(self.file.as_fd(), true) => {
                let some = from.get(..bytes).unwrap_or(from);
                retry(|| self.file.write(some))
            }
            Manner::AskFirst(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl AsFd for Stdio {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Stdio {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open_again(file: &File, to_write: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(!to_write)
        .write(to_write)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn would_block(result: io::Result<usize>) -> bool {
        result.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
    }

    fn fills_and_empties(mut reads: Stdio, mut writes: Stdio) {
        let mut buf = [0; 4096];
        assert!(would_block(reads.read(&mut buf)));
        while !would_block(writes.write(&buf)) {}
        for _ in 0..4096 {
            if reads.read(&mut buf).is_err() {
                break;
            }
        }
        assert!(writes.write(&buf).unwrap() > 0);
    }

    #[test]
    fn a_pipe_neither_waits_nor_changes_for_others() {
        let (reads, writes) = io::pipe().unwrap();
        let ours = Stdio::open(writes.as_fd(), true).unwrap();
        assert_eq!(ours.manner, Manner::Direct);
        fills_and_empties(Stdio::open(reads.as_fd(), false).unwrap(), ours);
        let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", writes.as_raw_fd()));
        let flags = flags.unwrap();
        let flags = flags
            .lines()
            .find_map(|l| l.strip_prefix("flags:"))
            .unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }

    #[test]
    fn a_shared_pipe_does_not_wait() {
        let (reads, writes) = io::pipe().unwrap();
        let mut reads = Stdio::open(reads.as_fd(), false).unwrap();
        let mut writes = Stdio::open(writes.as_fd(), true).unwrap();
        reads.manner = Manner::AskFirst(POLLED_PIPE_BYTES);
        writes.manner = Manner::AskFirst(POLLED_PIPE_BYTES);
        fills_and_empties(reads, writes);
    }

    #[test]
    fn a_socket_does_not_wait() {
        let (reads, writes) = UnixStream::pair().unwrap();
        let reads = Stdio::open(reads.as_fd(), false).unwrap();
        fills_and_empties(reads, Stdio::open(writes.as_fd(), true).unwrap());
    }

    #[test]
    fn a_regular_file_keeps_its_place() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before ").unwrap();
        let mut ours = Stdio::open(file.as_fd(), true).unwrap();
        ours.write(b"ours ").unwrap();
        file.write_all(b"after").unwrap();
        assert_eq!(
            file.metadata().unwrap().len(),
            "before ours after".len() as u64
        );
    }
}
