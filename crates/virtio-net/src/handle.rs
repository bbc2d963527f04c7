//! The device, and its owner's handle on it.

use std::sync::Arc;

use alveole_net_link::NetLink;
use alveole_rate_limiter::Limits;

use crate::{NetConfig, NetCounters, NetError};

/// The network device.
pub struct VirtioNet {
    counters: Arc<NetCounters>,
}

/// The owner's handle on a network device that a machine has. Clones share it.
#[derive(Clone)]
pub struct NetHandle {
    counters: Arc<NetCounters>,
}

impl VirtioNet {
    /// A device over `link`, with as many pairs of queues as that has.
    ///
    /// # Errors
    /// The configuration is not possible with this link, or the host is out of what a queue needs.
    pub fn new(config: &NetConfig, link: NetLink) -> Result<Self, NetError> {
        let _ = (config, link);
        Ok(Self {
            counters: Arc::default(),
        })
    }

    /// A handle for the owner, to be taken before the device is given to a transport.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            counters: self.counters.clone(),
        }
    }
}

impl NetHandle {
    /// What the device counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.counters
    }

    /// Bounds what the guest receives anew. What is not named stays.
    pub fn change_rx_limits(&self, limits: Limits) {
        let _ = limits;
    }

    /// Bounds what the guest sends anew. What is not named stays.
    pub fn change_tx_limits(&self, limits: Limits) {
        let _ = limits;
    }

    /// Plugs the cable in or out.
    pub fn set_link(&self, up: bool) {
        let _ = up;
    }

    /// Whether the cable is in.
    #[must_use]
    pub fn link_is_up(&self) -> bool {
        true
    }

    /// Asks the guest to tell its neighbours where it is now. False: its driver cannot.
    pub fn announce(&self) -> bool {
        false
    }

    /// The guest's address.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        [0; 6]
    }
}
