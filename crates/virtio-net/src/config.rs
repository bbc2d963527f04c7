//! How a network device is to be.

use std::io;

use alveole_rate_limiter::Limits;

use crate::{MAX_PAIRS, QUEUE_SIZE, RX_QUEUE_SIZE};

/// How a network device is to be.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Name for people and counters.
    pub name: String,
    /// The guest's address; none: the link's, or one made up.
    pub mac: Option<[u8; 6]>,
    /// What the guest is told about the largest payload of a frame, in bytes; none: the link's.
    pub mtu: Option<u16>,
    /// Size of each queue that receives; a power of two.
    pub rx_queue_size: u16,
    /// Size of each other queue; a power of two.
    pub queue_size: u16,
    /// Bounds on what the guest receives.
    pub rx_limits: Limits,
    /// Bounds on what the guest sends.
    pub tx_limits: Limits,
    /// Frames that the guest sends from another address than its own are dropped, and it cannot change its address.
    pub source_mac_filter: bool,
}

impl NetConfig {
    /// An address made up, without bounds.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            mac: None,
            mtu: None,
            rx_queue_size: RX_QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
            source_mac_filter: false,
        }
    }
}

/// Why there is no network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The host.
    #[error(
        "network {name}: cannot make a timer or an event: {source}; raise the limit on open files (ulimit -n)"
    )]
    Timer {
        /// Which device.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// The queues.
    #[error(
        "network {name}: {pairs} pairs of queues of {size}: give it 1 to {MAX_PAIRS}, each a power of two from 2 to {}",
        alveole_virtio::MAX_QUEUE_SIZE
    )]
    Queues {
        /// Which device.
        name: String,
        /// How many the link has.
        pairs: usize,
        /// Of which size.
        size: u16,
    },
    /// An address that no interface can have.
    #[error(
        "network {name}: the address {} cannot be a guest's: {why}; choose one whose first byte is even, such as 02:...",
        mac_text(*mac)
    )]
    Mac {
        /// Which device.
        name: String,
        /// The address.
        mac: [u8; 6],
        /// What is wrong with it.
        why: &'static str,
    },
    /// A link that takes no address but its own.
    #[error(
        "network {name}: {link} passes frames for {} only, and the guest was to have {}; leave the address out, or give \
         the interface that one: ip link set dev NAME address {}",
        mac_text(*has),
        mac_text(*wanted),
        mac_text(*wanted)
    )]
    OtherMac {
        /// Which device.
        name: String,
        /// The link.
        link: String,
        /// Its address.
        has: [u8; 6],
        /// What was asked for.
        wanted: [u8; 6],
    },
    /// Frames of a size that does not work.
    #[error("network {name}: an MTU of {mtu} bytes: IPv4 needs 68, IPv6 1280; 1500 is usual")]
    Mtu {
        /// Which device.
        name: String,
        /// What was asked for.
        mtu: u16,
    },
    /// What the host's kernel does not do.
    #[error(
        "network {name}: the host's kernel serves its queues (vhost), and does not do {what}; leave that or vhost out"
    )]
    Vhost {
        /// Which device.
        name: String,
        /// What was asked for.
        what: &'static str,
    },
    /// Frames may come that the guest does not expect.
    #[error(
        "network {name}: an MTU of {mtu} bytes, and the host's kernel, which serves its queues (vhost), passes all that \
         {link} has: {link_mtu}; give the link the same (ip link set dev NAME mtu {mtu}), or leave vhost out"
    )]
    VhostMtu {
        /// Which device.
        name: String,
        /// What was asked for.
        mtu: u16,
        /// The link.
        link: String,
        /// What it has.
        link_mtu: u16,
    },
    /// No address could be made up.
    #[error("network {name}: cannot make up an address: {why}; give it one")]
    Random {
        /// Which device.
        name: String,
        /// What the host said.
        why: String,
    },
}

/// An address as people write it.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    let parts = mac.map(|byte| format!("{byte:02x}"));
    parts.join(":")
}

/// What is wrong with an address as that of one interface.
pub(crate) fn mac_fault(mac: [u8; 6]) -> Option<&'static str> {
    let [first, ..] = mac;
    if first & 1 != 0 {
        Some("it is a group's")
    } else if mac == [0; 6] {
        Some("it is zero")
    } else {
        None
    }
}
