//! Which link is wanted.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// What names a link. Opened by [`crate::open`].
#[derive(Debug)]
pub enum LinkSpec {
    /// A tap interface of the host, by its name.
    Tap {
        /// At most 15 bytes.
        name: String,
    },
    /// Descriptors of a tap interface that somebody else opened, with IFF_NO_PI: one for each pair of queues.
    TapFds(Vec<OwnedFd>),
    /// A macvtap interface of the host, by its name.
    Macvtap {
        /// At most 15 bytes.
        interface: String,
    },
    /// A unix stream socket, connected to: each frame behind its length as 32 bits, big-endian (passt, QEMU's
    /// `-netdev stream`).
    Stream {
        /// Where somebody listens.
        path: PathBuf,
    },
    /// The same over a connected socket.
    StreamFd(OwnedFd),
    /// A unix datagram socket, one frame in each datagram (QEMU's `-netdev dgram`).
    Datagram {
        /// Where ours is bound; must not exist.
        local: PathBuf,
        /// Where the other side's is bound.
        remote: PathBuf,
    },
    /// The same over a connected socket.
    DatagramFd(OwnedFd),
}
