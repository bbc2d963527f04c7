//! What a link is.

use std::io;
use std::os::fd::BorrowedFd;

use alveole_guest_memory::GuestBuffers;

use crate::{HEADER_BYTES, MAX_FRAME_BYTES, VhostNet};

/// Work on frames that one side leaves to the other. A link with a header on each frame can hand it on in both
/// directions; a link without cannot at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksums of TCP and UDP.
    pub csum: bool,
    /// Cutting TCP over IPv4 into segments.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// The same for segments with ECN.
    pub ecn: bool,
    /// Cutting UDP over IPv4 into datagrams.
    pub uso4: bool,
    /// The same over IPv6.
    pub uso6: bool,
}

impl Offloads {
    /// None at all.
    pub const NONE: Self = Self {
        csum: false,
        tso4: false,
        tso6: false,
        ecn: false,
        uso4: false,
        uso6: false,
    };
    /// Each of them.
    pub const ALL: Self = Self {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        uso4: true,
        uso6: true,
    };

    /// Whether a frame may be longer than the MTU: the other side cuts it.
    #[must_use]
    pub fn has_long_frames(self) -> bool {
        self.tso4 || self.tso6 || self.uso4 || self.uso6
    }
}

/// What is known of a link once it is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkFacts {
    /// What it is, for people: `tap tap0`.
    pub name: String,
    /// What the link takes from the guest, and can give it.
    pub offloads: Offloads,
    /// Largest payload of a frame that the host's side takes, in bytes, where that is known.
    pub mtu: Option<u16>,
    /// The address that the guest must have, where the link takes no other (macvtap).
    pub mac: Option<[u8; 6]>,
}

/// An open link. Everything that its use will ever need is open: the caller may enter a sandbox.
pub struct NetLink {
    /// What is known of it.
    pub facts: LinkFacts,
    /// One for each pair of queues. All but the first are inactive where the host spreads frames over active ones.
    pub queues: Vec<Box<dyn LinkQueue>>,
    /// One for each pair of queues where the host's kernel is to serve them ([`crate::open_with_vhost`]); else none.
    pub vhost: Vec<VhostNet>,
}

/// A frame for the link.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// A `virtio_net_hdr_v1` (virtio 1.3, section 5.1.6) and how the frame begins, copied out of guest memory:
    /// what was checked is what is sent. At least [`HEADER_BYTES`].
    pub start: &'a [u8],
    /// The rest of the frame, in guest memory.
    pub rest: &'a GuestBuffers,
}

impl Frame<'_> {
    /// Length without the header, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.rest
            .len_bytes()
            .saturating_add(self.start.len().saturating_sub(HEADER_BYTES) as u64)
    }
}

/// What became of a frame that was to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The link has it; the guest's buffers are free.
    Done,
    /// The link takes nothing now; [`LinkQueue::writable_fd`] tells when to try again.
    WouldBlock,
}

/// What came of a look for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// So many bytes were written, at least [`HEADER_BYTES`]: a header, whose last field (`num_buffers`) the link leaves
    /// alone, and the frame.
    Frame(u64),
    /// There was a frame longer than the buffers. It is lost.
    TooLong,
    /// There is none now; [`LinkQueue::readable_fd`] tells when.
    WouldBlock,
    /// The other side is gone, and will not come back.
    Closed,
}

/// How a link that has frames of its own, beside those of the link behind it, hands them out.
impl Received {
    /// Writes a frame behind a header that says nothing, into guest memory.
    #[must_use]
    pub fn own(frame: &[u8], into: &GuestBuffers) -> Self {
        let len = (HEADER_BYTES as u64).saturating_add(frame.len() as u64);
        if into.len_bytes() < len {
            return Self::TooLong;
        }
        // All but `num_buffers`, which is the device's.
        into.copy_from(0, &[0; HEADER_BYTES - 2]);
        into.copy_from(HEADER_BYTES as u64, frame);
        Self::Frame(len)
    }

    /// The same, into memory of this process.
    #[must_use]
    pub fn own_kept(frame: &[u8], into: &mut [u8]) -> Self {
        let len = HEADER_BYTES.saturating_add(frame.len());
        let Some(into) = into.get_mut(..len) else {
            return Self::TooLong;
        };
        let (header, room) = into.split_at_mut(HEADER_BYTES);
        header.fill(0);
        room.copy_from_slice(frame);
        Self::Frame(len as u64)
    }
}

/// One pair of queues of a link: frames in both directions. Never waits.
pub trait LinkQueue: Send {
    /// Sends one frame straight from guest memory.
    ///
    /// # Errors
    /// The host refuses this frame, or the link is out of order. The frame is lost; the next may pass.
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent>;

    /// Hands over what the link may have kept of small frames to send them together. False: not all of it, and
    /// [`Self::writable_fd`] tells when to try again.
    ///
    /// # Errors
    /// The link is out of order.
    fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }

    /// Receives one frame straight into guest memory, of which it uses no more than the first
    /// [`alveole_guest_memory::MAX_IOVECS`] ranges. Without any memory, the next frame is thrown away.
    ///
    /// # Errors
    /// The link is out of order, perhaps only for now.
    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received>;

    /// Receives one frame into memory of ours, for a guest that has not enough of its own at the moment.
    ///
    /// # Errors
    /// As [`Self::receive`].
    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received>;

    /// As [`Self::receive`], and gives `head` the beginning of what was received, header included, as far as it goes. It is copied
    /// from where the guest cannot have changed it, as it can what has come into its memory.
    ///
    /// # Errors
    /// As [`Self::receive`].
    fn receive_seen(&mut self, head: &mut [u8], into: &GuestBuffers) -> io::Result<Received> {
        let room = usize::try_from(into.len_bytes()).unwrap_or(usize::MAX);
        let mut whole = vec![0; room.min(HEADER_BYTES + MAX_FRAME_BYTES)];
        let received = self.receive_kept(&mut whole)?;
        if let Received::Frame(len) = received {
            whole.truncate(usize::try_from(len).unwrap_or(usize::MAX));
            give(&whole, head, into);
        }
        Ok(received)
    }

    /// Readable when [`Self::receive`] may have a frame.
    fn readable_fd(&self) -> BorrowedFd<'_>;

    /// Writable when [`Self::send`] may take a frame: another descriptor than [`Self::readable_fd`], so that both
    /// can be watched by one loop.
    fn writable_fd(&self) -> BorrowedFd<'_>;

    /// Tells the link what the guest can take (VIRTIO_NET_F_GUEST_*). Of the whole link, on any of its queues.
    ///
    /// # Errors
    /// The link cannot do it.
    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Lets the host spread frames to this queue, or no longer. Frames in an inactive one are lost.
    ///
    /// # Errors
    /// The host refuses.
    fn set_active(&mut self, active: bool) -> io::Result<()>;
}

/// Gives the guest what was received into memory of ours, without the header's last field, and `head` its beginning.
pub(crate) fn give(start: &[u8], head: &mut [u8], into: &GuestBuffers) {
    const NUM_BUFFERS: usize = HEADER_BYTES - 2;
    let known = start.len().min(head.len());
    head[..known].copy_from_slice(&start[..known]);
    into.copy_from(0, &start[..start.len().min(NUM_BUFFERS)]);
    if let Some(frame) = start.get(HEADER_BYTES..) {
        into.copy_from(HEADER_BYTES as u64, frame);
    }
}
