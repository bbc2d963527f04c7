//! Holds a file system still.

use std::os::fd::{AsFd, OwnedFd};

use rustix::ioctl::{Opcode, Updater, opcode};

/// `FIFREEZE` and `FITHAW` (linux/fs.h): their argument means nothing.
const FREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
const THAW: Opcode = opcode::read_write::<i32>(b'X', 120);

/// A file system that nobody writes to: all was written out, and whoever wants to write waits until this is dropped.
pub(crate) struct Frozen(OwnedFd);

impl Frozen {
    /// Freezes the file system that this file is on.
    pub(crate) fn new(on: OwnedFd) -> std::io::Result<Self> {
        let mut unused = 0;
        // SAFETY: the call reads and writes no more than an `i32`, which `unused` is.
        unsafe { rustix::ioctl::ioctl(on.as_fd(), Updater::<FREEZE, i32>::new(&mut unused))? };
        Ok(Self(on))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let mut unused = 0;
        // SAFETY: as above.
        let thawed =
            unsafe { rustix::ioctl::ioctl(self.0.as_fd(), Updater::<THAW, i32>::new(&mut unused)) };
        if let Err(e) = thawed {
            eprintln!("alveole-agent: a file system cannot be thawed: {e}");
        }
    }
}
