//! Where frames really go: a tap, a macvtap, a unix socket, a pair in memory.
//!
//! A [`LinkSpec`] is opened once, before the sandbox is entered ([`open`]); what comes out, a [`NetLink`], says
//! what it can do ([`LinkFacts`]) and has a [`LinkQueue`] for each pair of queues. Frames go straight from guest
//! memory to the link and back, each behind a `virtio_net_hdr_v1`, in which the two sides leave work to each other.
//!
//! Deliberately does not know: virtqueues, devices, who watches descriptors.

mod error;
mod link;
mod spec;

pub use error::LinkError;
pub use link::{Frame, LinkFacts, LinkQueue, NetLink, Offloads, Received, Sent};
pub use spec::LinkSpec;

/// Length of `virtio_net_hdr_v1` (virtio 1.3, section 5.1.6), in bytes.
pub const HEADER_BYTES: usize = 12;
/// Most bytes of [`Frame::start`]: the header and an Ethernet header.
pub const FRAME_START_BYTES: usize = HEADER_BYTES + 14;
/// Longest frame in bytes, without the header.
pub const MAX_FRAME_BYTES: usize = 65_562;

/// Opens a link with `pairs` queues, and everything that its use will ever need.
///
/// # Errors
/// What is wrong with it, and what to do.
pub fn open(spec: LinkSpec, pairs: u16) -> Result<NetLink, LinkError> {
    let _ = (spec, pairs);
    Err(LinkError::Skeleton)
}
