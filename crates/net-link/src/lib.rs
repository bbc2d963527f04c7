//! Where frames really go: a tap, a macvtap, a unix socket.
//!
//! A [`LinkSpec`] is opened once, before the sandbox is entered ([`open`]); what comes out, a [`NetLink`], says
//! what it can do ([`LinkFacts`]) and has a [`LinkQueue`] for each pair of queues. Frames go straight from guest
//! memory to the link and back, each behind a `virtio_net_hdr_v1`, in which the two sides leave work to each other.
//!
//! Deliberately does not know: virtqueues, devices, who watches descriptors.

// The kernel reads and writes guest memory here, and tap interfaces are set up by ioctl.
#![expect(
    unsafe_code,
    reason = "system calls on guest memory; see SAFETY at each"
)]

mod error;
mod inherited;
mod iovecs;
mod link;
mod message;
mod socket;
mod spec;
mod stream;
mod tap;
#[cfg(feature = "testing")]
#[expect(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test that cannot go on says where"
)]
pub mod testing;
mod vhost;

pub use error::LinkError;
pub use link::{Frame, LinkFacts, LinkQueue, NetLink, Offloads, Received, Sent};
pub use spec::LinkSpec;
pub use vhost::{Ring, RingPlan, VhostNet, VhostSpec};

/// Length of `virtio_net_hdr_v1` (virtio 1.3, section 5.1.6), in bytes.
pub const HEADER_BYTES: usize = 12;
/// Longest frame in bytes, without the header: the longest IP packet and an Ethernet header with some tags.
pub const MAX_FRAME_BYTES: usize = 65_562;

/// Opens a link with `pairs` pairs of queues (0 is taken for 1), and everything that its use will ever need.
///
/// # Errors
/// What is wrong with it, and what to do.
pub fn open(spec: LinkSpec, pairs: u16) -> Result<NetLink, LinkError> {
    let pairs = pairs.max(1);
    let link = match spec {
        LinkSpec::Tap { name } => tap::open_tap(&name, pairs)?,
        LinkSpec::TapFds(fds) => tap::take_tap(fds, pairs)?,
        LinkSpec::Macvtap { interface } => tap::open_macvtap(&interface, pairs)?,
        LinkSpec::Stream { path } => socket::open_stream(&path)?,
        LinkSpec::StreamFd(fd) => socket::take_stream(fd)?,
        LinkSpec::Datagram { local, remote } => socket::open_datagram(&local, &remote)?,
        LinkSpec::DatagramFd(fd) => socket::take_datagram(fd)?,
    };
    if link.queues.len() != usize::from(pairs) {
        return Err(LinkError::Pairs {
            has: link.queues.len(),
            link: link.facts.name,
            pairs,
        });
    }
    Ok(link)
}

/// As [`open`], for queues that the host's kernel is to serve (vhost-net): that of taps and macvtaps.
///
/// # Errors
/// As [`open`]; or the host has no vhost-net, it is another process's, or the link is of another kind.
pub fn open_with_vhost(spec: LinkSpec, pairs: u16, vhost: VhostSpec) -> Result<NetLink, LinkError> {
    let is_a_tap = matches!(
        spec,
        LinkSpec::Tap { .. } | LinkSpec::TapFds(_) | LinkSpec::Macvtap { .. }
    );
    let mut link = open(spec, pairs)?;
    if !is_a_tap {
        return Err(LinkError::NoVhost {
            link: link.facts.name,
        });
    }
    link.vhost = vhost::open(vhost, &link.facts.name, &link.queues)?;
    Ok(link)
}
