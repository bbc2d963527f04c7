//! Bytes between guest RAM and stream sockets, without a copy in between and without waiting.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{GuestBuffers, MAX_IOVECS};

impl GuestBuffers {
    /// Fills the ranges, from the first byte on, with what has come in on `socket` (recvmsg(2)). How many
    /// bytes that were; 0 where the peer sends no more, and where there is no range.
    ///
    /// # Errors
    /// What the host says; [`io::ErrorKind::WouldBlock`] where nothing has come in.
    pub fn receive_from(&self, socket: BorrowedFd<'_>) -> io::Result<u64> {
        self.exchange(self.iovecs_to_fill(), |message| {
            // SAFETY: the header and its ranges live until the call returns, and every range is mapped for as
            // long as `self` lives; the kernel may write there.
            unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends the ranges, from the first byte on, over `socket` (sendmsg(2)). How many bytes it took.
    ///
    /// # Errors
    /// What the host says; [`io::ErrorKind::WouldBlock`] where it takes nothing for now,
    /// [`io::ErrorKind::BrokenPipe`], and no signal, where the peer reads no more.
    pub fn send_to(&self, socket: BorrowedFd<'_>) -> io::Result<u64> {
        self.exchange(self.iovecs(), |message| {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the header and its ranges live until the call returns, and every range is mapped for as
            // long as `self` lives; the kernel only reads there.
            unsafe { libc::sendmsg(socket.as_raw_fd(), message, flags) }
        })
    }

    fn exchange(
        &self,
        ranges: &[libc::iovec],
        mut call: impl FnMut(&mut libc::msghdr) -> isize,
    ) -> io::Result<u64> {
        // SAFETY: a message header of zeroes is valid: no name, no range, no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = ranges.as_ptr().cast_mut();
        message.msg_iovlen = ranges.len().min(MAX_IOVECS);
        loop {
            match u64::try_from(call(&mut message)) {
                Ok(moved) => return Ok(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::{GuestRam, MemoryPlan};

    #[test]
    fn bytes_cross_ranges_both_ways_and_nobody_waits() {
        let ram = GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap();
        let mut buffers = GuestBuffers::new(&ram);
        // More ranges than one call takes.
        for i in 0..2 * MAX_IOVECS as u64 {
            buffers.push(i * 16, 3).unwrap();
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let nothing = buffers.receive_from(ours.as_fd()).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        theirs.write_all(b"seven b").unwrap();
        assert_eq!(buffers.receive_from(ours.as_fd()).unwrap(), 7);
        let mut seen = [0; 7];
        buffers.copy_to(0, &mut seen);
        assert_eq!(&seen, b"seven b");
        let sent = buffers.send_to(ours.as_fd()).unwrap();
        assert_eq!(sent, 3 * MAX_IOVECS as u64);
        let mut back = vec![0; 3 * MAX_IOVECS];
        theirs.read_exact(&mut back).unwrap();
        assert_eq!(&back[..7], b"seven b");
        let full = loop {
            if let Err(e) = buffers.send_to(ours.as_fd()) {
                break e;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(buffers.receive_from(ours.as_fd()).unwrap(), 0);
        drop(theirs);
        let gone = buffers.send_to(ours.as_fd()).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::BrokenPipe);
    }
}
