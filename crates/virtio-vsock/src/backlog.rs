//! What a socket of the host has not taken yet. The guest's credit bounds it.

use std::os::fd::{AsRawFd, BorrowedFd};

use alveole_guest_memory::GuestBuffers;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};

/// Bytes in order.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    bytes: Vec<u8>,
    /// How many of them, from the first on, were sent.
    sent: usize,
}

impl Backlog {
    pub(crate) fn is_empty(&self) -> bool {
        self.sent >= self.bytes.len()
    }

    /// Adds what lies in `data` from byte `from` on.
    pub(crate) fn add(&mut self, data: &GuestBuffers, from: u64) {
        let more = usize::try_from(data.len_bytes().saturating_sub(from)).unwrap_or(0);
        // What was sent goes before memory grows: no more is held than was not sent.
        if self.sent > 0 {
            self.bytes.drain(..self.sent.min(self.bytes.len()));
            self.sent = 0;
        }
        let start = self.bytes.len();
        self.bytes.resize(start.saturating_add(more), 0);
        if let Some(place) = self.bytes.get_mut(start..) {
            data.copy_to(from, place);
        }
    }

    /// Sends what the socket takes, and says how much that was.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        let mut total: usize = 0;
        while let Some(rest) = self.bytes.get(self.sent..)
            && !rest.is_empty()
        {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(socket.as_raw_fd(), rest, flags) {
                Ok(len) => {
                    self.sent = self.sent.saturating_add(len);
                    total = total.saturating_add(len);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(e) => return Err(e),
            }
        }
        if self.is_empty() {
            self.clear();
        }
        Ok(total)
    }

    /// Forgets everything and gives the memory back.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}
