//! How a network device is to be.

use std::io;

use alveole_rate_limiter::Limits;

use crate::QUEUE_SIZE;

/// How a network device is to be.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Name for people and counters.
    pub name: String,
    /// The guest's address; none: the link's, or one made up.
    pub mac: Option<[u8; 6]>,
    /// What the guest is told about the largest payload of a frame, in bytes; none: the link's.
    pub mtu: Option<u16>,
    /// Size of each queue; a power of two.
    pub queue_size: u16,
    /// Bounds on what the guest receives.
    pub rx_limits: Limits,
    /// Bounds on what the guest sends.
    pub tx_limits: Limits,
    /// Frames that the guest sends from another address than its own are dropped.
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
        "network {name}: cannot make a timer: {source}; raise the limit on open files (ulimit -n)"
    )]
    Timer {
        /// Which device.
        name: String,
        /// What the host said.
        source: io::Error,
    },
}
