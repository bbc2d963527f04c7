//! Links on which each read and write is one frame: tap and macvtap by readv and writev, datagram sockets by
//! recvmsg and sendmsg.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use alveole_guest_memory::GuestBuffers;

use crate::iovecs::Iovecs;
use crate::link::give;
use crate::tap::TapQueue;
use crate::{Frame, HEADER_BYTES, LinkQueue, Offloads, Received, Sent};

/// How much of a frame that is too long is read behind the guest's memory. Enough for a tap to see room for its header
/// where the guest has none.
const SPILL_BYTES: usize = 64;
/// A header without offloads; its `num_buffers` is the receiver's to write.
const NO_OFFLOADS: [u8; HEADER_BYTES - 2] = [0; HEADER_BYTES - 2];

/// What carries the messages.
pub(crate) enum Carrier {
    /// A queue of a tap or macvtap.
    Tap(TapQueue),
    /// A socket of datagrams.
    Datagrams,
}

/// One queue of such a link.
pub(crate) struct MessageQueue {
    fd: OwnedFd,
    writable_fd: OwnedFd,
    carrier: Carrier,
    has_header: bool,
    iovecs: Iovecs,
    spill: Box<[u8]>,
}

impl MessageQueue {
    /// `has_header`: a `virtio_net_hdr_v1` goes before each frame.
    pub(crate) fn new(fd: OwnedFd, carrier: Carrier, has_header: bool) -> io::Result<Self> {
        Ok(Self {
            writable_fd: fd.try_clone()?,
            fd,
            carrier,
            has_header,
            iovecs: Iovecs::default(),
            spill: vec![0; SPILL_BYTES].into(),
        })
    }

    /// Takes the parts that were collected; the length of the message.
    fn take(&mut self) -> io::Result<Option<usize>> {
        match self.carrier {
            Carrier::Tap(_) => self.iovecs.read(self.fd.as_fd()),
            Carrier::Datagrams => self.iovecs.receive(self.fd.as_fd()),
        }
    }

    /// What came of a read into `room` bytes and the spill.
    fn judge(&self, read: Option<usize>, room: usize) -> Received {
        match read {
            None => Received::WouldBlock,
            // A socket whose other side sends an empty datagram.
            Some(0) => Received::TooLong,
            Some(n) if n > room => Received::TooLong,
            Some(n) if self.has_header && n < HEADER_BYTES => Received::TooLong,
            Some(n) if self.has_header => Received::Frame(n as u64),
            Some(n) => Received::Frame((n + HEADER_BYTES) as u64),
        }
    }
}

impl LinkQueue for MessageQueue {
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent> {
        let start = if self.has_header {
            frame.start
        } else {
            frame.start.get(HEADER_BYTES..).unwrap_or(&[])
        };
        self.iovecs.clear();
        let whole;
        if Iovecs::takes(frame.rest) {
            self.iovecs.push_source(start);
            let len = usize::try_from(frame.rest.len_bytes()).unwrap_or(usize::MAX);
            self.iovecs.push_guest(frame.rest, 0, len);
        } else {
            // More parts than one call takes: a frame of crumbs, which no driver makes.
            whole = gathered(start, frame.rest);
            self.iovecs.push_source(&whole);
        }
        let sent = match self.carrier {
            Carrier::Tap(_) => self.iovecs.write(self.fd.as_fd()),
            Carrier::Datagrams => self.iovecs.send(self.fd.as_fd()),
        };
        match sent {
            Ok(Some(_)) => Ok(Sent::Done),
            Ok(None) => Ok(Sent::WouldBlock),
            // unix(7): the other side's queue is full, too.
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(Sent::WouldBlock),
            Err(e) => Err(e),
        }
    }

    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received> {
        let skip = if self.has_header { 0 } else { HEADER_BYTES };
        let len = usize::try_from(into.len_bytes()).unwrap_or(usize::MAX);
        self.iovecs.clear();
        let room = self
            .iovecs
            .push_guest_to_fill(into, skip, len.saturating_sub(skip));
        self.iovecs.push_target(&mut self.spill);
        let read = self.take()?;
        let received = self.judge(read, room);
        if !self.has_header && matches!(received, Received::Frame(_)) {
            into.copy_from(0, &NO_OFFLOADS);
        }
        Ok(received)
    }

    fn receive_seen(&mut self, head: &mut [u8], into: &GuestBuffers) -> io::Result<Received> {
        let skip = if self.has_header { 0 } else { HEADER_BYTES };
        let len = usize::try_from(into.len_bytes()).unwrap_or(usize::MAX);
        let known = head.len().min(len);
        if known < HEADER_BYTES {
            return self.receive(into);
        }
        head[..skip].fill(0);
        self.iovecs.clear();
        self.iovecs.push_target(&mut head[skip..known]);
        let room = known - skip + self.iovecs.push_guest_to_fill(into, known, len - known);
        self.iovecs.push_target(&mut self.spill);
        let read = self.take()?;
        let received = self.judge(read, room);
        if let Received::Frame(len) = received {
            let known = known.min(usize::try_from(len).unwrap_or(known));
            give(&head[..known], &mut [], into);
        }
        Ok(received)
    }

    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received> {
        let skip = if self.has_header { 0 } else { HEADER_BYTES };
        if into.len() < HEADER_BYTES {
            return Ok(Received::TooLong);
        }
        let (header, frame) = into.split_at_mut(skip);
        for byte in header {
            *byte = 0;
        }
        self.iovecs.clear();
        self.iovecs.push_target(frame);
        self.iovecs.push_target(&mut self.spill);
        let read = self.take()?;
        Ok(self.judge(read, frame.len()))
    }

    fn readable_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn writable_fd(&self) -> BorrowedFd<'_> {
        self.writable_fd.as_fd()
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        match &mut self.carrier {
            Carrier::Tap(tap) if self.has_header => tap.set_offloads(self.fd.as_fd(), offloads),
            _ => Ok(()),
        }
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        match &mut self.carrier {
            Carrier::Tap(tap) => tap.set_active(self.fd.as_fd(), active),
            Carrier::Datagrams => Ok(()),
        }
    }
}

/// All bytes of a frame in one piece.
pub(crate) fn gathered(start: &[u8], rest: &GuestBuffers) -> Vec<u8> {
    let len = usize::try_from(rest.len_bytes()).unwrap_or(0);
    let mut whole = start.to_vec();
    let from = whole.len();
    whole.resize(from + len, 0);
    rest.copy_to(0, &mut whole[from..]);
    whole
}
