//! Lists of memory for one system call: ours and the guest's.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use alveole_guest_memory::{GuestBuffers, MAX_IOVECS};

/// A list that is filled, used by one call, and forgotten; kept only for its allocation.
#[derive(Default)]
pub(crate) struct Iovecs(Vec<libc::iovec>);

// SAFETY: between two calls of its owner the list is never read: each use fills it anew.
unsafe impl Send for Iovecs {}

impl Iovecs {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Bytes of ours that the call reads. The call must be over before `bytes` is gone.
    pub(crate) fn push_source(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.0.push(libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            });
        }
    }

    /// Memory of ours that the call writes. The call must be over before `bytes` is gone.
    pub(crate) fn push_target(&mut self, bytes: &mut [u8]) {
        if !bytes.is_empty() {
            self.0.push(libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: bytes.len(),
            });
        }
    }

    /// The guest's memory without its first `skip` bytes and beyond `len`, as far as one call takes it with one more
    /// part behind; how many bytes that is. For a call that only reads it.
    pub(crate) fn push_guest(&mut self, buffers: &GuestBuffers, skip: usize, len: usize) -> usize {
        self.push_ranges(buffers.iovecs(), skip, len)
    }

    /// As [`Self::push_guest`], for a call that fills it.
    pub(crate) fn push_guest_to_fill(
        &mut self,
        buffers: &GuestBuffers,
        skip: usize,
        len: usize,
    ) -> usize {
        self.push_ranges(buffers.iovecs_to_fill(), skip, len)
    }

    fn push_ranges(&mut self, ranges: &[libc::iovec], skip: usize, len: usize) -> usize {
        let (mut skip, mut left) = (skip, len);
        for part in ranges {
            if left == 0 || self.0.len() + 1 >= MAX_IOVECS {
                break;
            }
            if skip >= part.iov_len {
                skip -= part.iov_len;
                continue;
            }
            let now = (part.iov_len - skip).min(left);
            self.0.push(libc::iovec {
                iov_base: part.iov_base.cast::<u8>().wrapping_add(skip).cast(),
                iov_len: now,
            });
            left -= now;
            skip = 0;
        }
        len - left
    }

    /// Whether all of `buffers` fits into one call behind one part of ours.
    pub(crate) fn takes(buffers: &GuestBuffers) -> bool {
        buffers.iovecs().len() + 2 <= MAX_IOVECS
    }

    fn count(&self) -> usize {
        self.0.len()
    }

    /// writev(2); none: it would have to wait.
    pub(crate) fn write(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        // SAFETY: every part is memory of ours that the caller holds, or guest RAM that its buffers keep mapped; the
        // kernel only reads it.
        result(|| unsafe { libc::writev(fd.as_raw_fd(), self.0.as_ptr(), self.count() as i32) })
    }

    /// readv(2); none: it would have to wait.
    pub(crate) fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        // SAFETY: every part is memory of ours that the caller holds mutably, or guest RAM that its buffers keep
        // mapped and that anybody may write.
        result(|| unsafe { libc::readv(fd.as_raw_fd(), self.0.as_ptr(), self.count() as i32) })
    }

    /// sendmsg(2); none: it would have to wait.
    pub(crate) fn send(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: as for `write`; the message names nothing but these parts.
        result(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
    }

    /// recvmsg(2), with the length of the whole message; none: it would have to wait.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        let mut message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        // SAFETY: as for `read`; the message names nothing but these parts.
        result(|| unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) })
    }

    /// recvmsg(2) from a stream; none: it would have to wait.
    pub(crate) fn receive_stream(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        let mut message = self.message();
        // SAFETY: as for `read`; the message names nothing but these parts.
        result(|| unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: all zeroes is a message without address, parts and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.0.as_mut_ptr();
        message.msg_iovlen = self.0.len() as _;
        message
    }
}

fn result(mut call: impl FnMut() -> isize) -> io::Result<Option<usize>> {
    loop {
        if let Ok(n) = usize::try_from(call()) {
            return Ok(Some(n));
        }
        let e = io::Error::last_os_error();
        match e.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(e),
        }
    }
}
