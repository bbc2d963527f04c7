//! A stream socket with each frame behind its length: 32 bits, big-endian, then the frame without a header of ours
//! (QEMU's `-netdev stream`, passt(1)).
//!
//! Large frames go straight between guest and socket. Small ones are copied: several of them share a system call, which
//! costs more than the copy. What the socket gives or takes only in part is kept here, so that guest memory is never
//! bound to a frame that is under way.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use alveole_guest_memory::GuestBuffers;

use crate::iovecs::Iovecs;
use crate::message::gathered;
use crate::{Frame, HEADER_BYTES, LinkQueue, MAX_FRAME_BYTES, Offloads, Received, Sent};

const LENGTH_BYTES: usize = 4;
/// How much is read behind the frame at hand: the length of the next one, or all of many small ones.
const AHEAD_BYTES: usize = 4096;
/// Longest frame that is copied, to be sent with others.
const SMALL_BYTES: usize = 1600;
/// Most bytes of small frames that are sent with one call.
const OUTBOX_BYTES: usize = 16 * 1024;
const NO_OFFLOADS: [u8; HEADER_BYTES - 2] = [0; HEADER_BYTES - 2];

/// The one queue of a stream.
pub(crate) struct StreamQueue {
    fd: OwnedFd,
    writable_fd: OwnedFd,
    iovecs: Iovecs,
    /// What was read and not yet given to the guest: at most one frame in part, or small ones.
    inbox: Bytes,
    ahead: Box<[u8]>,
    /// What the socket has not taken yet.
    outbox: Bytes,
    is_closed: bool,
}

/// A first-in, first-out of bytes in one piece.
#[derive(Default)]
struct Bytes {
    bytes: Vec<u8>,
    start: usize,
}

impl Bytes {
    fn get(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    fn drop_front(&mut self, count: usize) {
        self.start += count;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    fn push(&mut self, more: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(more);
    }
}

/// What the inbox begins with.
enum Front {
    /// A whole frame of so many bytes.
    Whole(usize),
    /// The beginning of a frame of so many bytes.
    Part(usize),
    /// Less than a length.
    Nothing,
}

impl StreamQueue {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            writable_fd: fd.try_clone()?,
            fd,
            iovecs: Iovecs::default(),
            inbox: Bytes::default(),
            ahead: vec![0; AHEAD_BYTES].into(),
            outbox: Bytes::default(),
            is_closed: false,
        })
    }

    fn front(&mut self) -> io::Result<Front> {
        let Some((length, rest)) = self.inbox.get().split_first_chunk::<LENGTH_BYTES>() else {
            return Ok(Front::Nothing);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_FRAME_BYTES {
            // Whatever comes after it cannot be told apart any more.
            self.is_closed = true;
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a frame of {length} bytes on the stream; {MAX_FRAME_BYTES} are the most"),
            ));
        }
        Ok(if rest.len() >= length {
            Front::Whole(length)
        } else {
            Front::Part(length)
        })
    }

    /// Reads into the inbox, up to `length` bytes of a frame and some ahead; what came of it, if it ends the look for
    /// a frame.
    fn read_ahead(&mut self) -> io::Result<Option<Received>> {
        self.iovecs.clear();
        self.iovecs.push_target(&mut self.ahead);
        match self.iovecs.receive_stream(self.fd.as_fd())? {
            None => Ok(Some(Received::WouldBlock)),
            Some(0) => {
                self.is_closed = true;
                Ok(Some(Received::Closed))
            }
            Some(n) => {
                self.inbox.push(&self.ahead[..n]);
                Ok(None)
            }
        }
    }

    /// Reads the rest of the frame at hand into guest memory; whether it is all there.
    fn read_rest(
        &mut self,
        head: &mut [u8],
        into: &GuestBuffers,
        length: usize,
    ) -> io::Result<Option<Received>> {
        let have = self.inbox.len() - LENGTH_BYTES;
        let missing = length - have;
        self.iovecs.clear();
        self.iovecs
            .push_guest_to_fill(into, HEADER_BYTES + have, missing);
        self.iovecs.push_target(&mut self.ahead);
        let n = match self.iovecs.receive_stream(self.fd.as_fd())? {
            None => return Ok(Some(Received::WouldBlock)),
            Some(0) => {
                self.is_closed = true;
                return Ok(Some(Received::Closed));
            }
            Some(n) => n,
        };
        if n < missing {
            let mut part = vec![0; n];
            into.copy_to((HEADER_BYTES + have) as u64, &mut part);
            self.inbox.push(&part);
            return Ok(None);
        }
        into.copy_from(0, &NO_OFFLOADS);
        into.copy_from(HEADER_BYTES as u64, &self.inbox.get()[LENGTH_BYTES..]);
        show(&self.inbox.get()[LENGTH_BYTES..], head);
        self.inbox.drop_front(LENGTH_BYTES + have);
        self.inbox.push(&self.ahead[..n - missing]);
        Ok(Some(Received::Frame((HEADER_BYTES + length) as u64)))
    }
}

/// The beginning of a frame behind a header without offloads, as far as there is room for it.
fn show(frame: &[u8], head: &mut [u8]) {
    if let Some((header, room)) = head.split_at_mut_checked(HEADER_BYTES) {
        header.fill(0);
        let known = room.len().min(frame.len());
        room[..known].copy_from_slice(&frame[..known]);
    }
}

impl LinkQueue for StreamQueue {
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent> {
        let start = frame.start.get(HEADER_BYTES..).unwrap_or(&[]);
        let rest = usize::try_from(frame.rest.len_bytes()).unwrap_or(usize::MAX);
        let length = start.len().saturating_add(rest);
        if length > MAX_FRAME_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a frame of {length} bytes; {MAX_FRAME_BYTES} are the most"),
            ));
        }
        let prefix = (length as u32).to_be_bytes();
        if length <= SMALL_BYTES {
            let full = self.outbox.len() + LENGTH_BYTES + length > OUTBOX_BYTES;
            if full && !self.flush()? {
                return Ok(Sent::WouldBlock);
            }
            self.outbox.push(&prefix);
            self.outbox.push(&gathered(start, frame.rest));
            return Ok(Sent::Done);
        }
        let pending = self.outbox.len();
        let whole;
        self.iovecs.clear();
        self.iovecs.push_source(self.outbox.get());
        self.iovecs.push_source(&prefix);
        // Room for the outbox, the length and the start before it.
        if frame.rest.iovecs().len() + 4 <= alveole_guest_memory::MAX_IOVECS {
            self.iovecs.push_source(start);
            self.iovecs.push_guest(frame.rest, 0, rest);
        } else {
            whole = gathered(start, frame.rest);
            self.iovecs.push_source(&whole);
        }
        let Some(n) = self.iovecs.send(self.fd.as_fd())? else {
            return Ok(Sent::WouldBlock);
        };
        if n <= pending {
            self.outbox.drop_front(n);
            return Ok(Sent::WouldBlock);
        }
        self.outbox.drop_front(pending);
        let begun = n - pending;
        if begun < LENGTH_BYTES + length {
            // The frame is under way: what is left of it goes first when the socket takes more.
            let mut whole = prefix.to_vec();
            whole.extend(gathered(start, frame.rest));
            self.outbox.push(&whole[begun..]);
        }
        Ok(Sent::Done)
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.outbox.len() > 0 {
            self.iovecs.clear();
            self.iovecs.push_source(self.outbox.get());
            match self.iovecs.send(self.fd.as_fd()) {
                Ok(Some(n)) => self.outbox.drop_front(n),
                Ok(None) => return Ok(false),
                Err(e) => {
                    // Nobody will ever take it.
                    self.outbox = Bytes::default();
                    return Err(e);
                }
            }
        }
        Ok(true)
    }

    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received> {
        self.receive_seen(&mut [], into)
    }

    fn receive_seen(&mut self, head: &mut [u8], into: &GuestBuffers) -> io::Result<Received> {
        if self.is_closed {
            return Ok(Received::Closed);
        }
        let room = usize::try_from(into.len_bytes()).unwrap_or(usize::MAX);
        loop {
            match self.front()? {
                Front::Whole(length) => {
                    let fits = HEADER_BYTES + length <= room;
                    if fits {
                        into.copy_from(0, &NO_OFFLOADS);
                        let frame = &self.inbox.get()[LENGTH_BYTES..LENGTH_BYTES + length];
                        into.copy_from(HEADER_BYTES as u64, frame);
                        show(frame, head);
                    }
                    self.inbox.drop_front(LENGTH_BYTES + length);
                    return Ok(if fits {
                        Received::Frame((HEADER_BYTES + length) as u64)
                    } else {
                        Received::TooLong
                    });
                }
                // What is looked at must be here before the rest goes to the guest.
                Front::Part(length)
                    if HEADER_BYTES + length <= room
                        && Iovecs::takes(into)
                        && self.inbox.len() + HEADER_BYTES
                            >= LENGTH_BYTES + head.len().min(HEADER_BYTES + length) =>
                {
                    if let Some(end) = self.read_rest(head, into, length)? {
                        return Ok(end);
                    }
                }
                Front::Part(_) | Front::Nothing => {
                    if let Some(end) = self.read_ahead()? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received> {
        if self.is_closed {
            return Ok(Received::Closed);
        }
        loop {
            if let Front::Whole(length) = self.front()? {
                let fits = into
                    .get_mut(..HEADER_BYTES + length)
                    .and_then(|into| into.split_at_mut_checked(HEADER_BYTES));
                let received = match fits {
                    Some((header, frame)) => {
                        header.fill(0);
                        frame.copy_from_slice(
                            &self.inbox.get()[LENGTH_BYTES..LENGTH_BYTES + length],
                        );
                        Received::Frame((HEADER_BYTES + length) as u64)
                    }
                    None => Received::TooLong,
                };
                self.inbox.drop_front(LENGTH_BYTES + length);
                return Ok(received);
            }
            if let Some(end) = self.read_ahead()? {
                return Ok(end);
            }
        }
    }

    fn readable_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn writable_fd(&self) -> BorrowedFd<'_> {
        self.writable_fd.as_fd()
    }

    fn set_guest_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }
}
