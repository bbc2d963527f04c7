//! The owner's handle on the device.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use alveole_rate_limiter::Limits;

use crate::NetCounters;
use crate::config_space::GUEST_ANNOUNCE;
use crate::lane::Lane;
use crate::shared::{Limit, Shared, lock};

/// The owner's handle on a network device that a machine has. Clones share it.
#[derive(Clone)]
pub struct NetHandle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) lanes: Vec<Arc<Mutex<Lane>>>,
}

impl NetHandle {
    /// What the device counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<NetCounters> {
        &self.shared.counters
    }

    /// Bounds what the guest receives anew. What is not named stays; a frame that waits is looked at again. False: the
    /// host's kernel serves the queues, and bounds nothing.
    pub fn change_rx_limits(&self, limits: Limits) -> bool {
        self.change(&self.shared.rx_limit, limits)
    }

    /// Bounds what the guest sends anew, otherwise as [`Self::change_rx_limits`].
    pub fn change_tx_limits(&self, limits: Limits) -> bool {
        self.change(&self.shared.tx_limit, limits)
    }

    fn change(&self, limit: &Limit, limits: Limits) -> bool {
        if self.is_served_by_host() {
            return false;
        }
        limit.change(limits);
        self.wake();
        true
    }

    /// Whether the host's kernel serves the queues (vhost).
    #[must_use]
    pub fn is_served_by_host(&self) -> bool {
        self.lanes.iter().any(|lane| lock(lane).vhost.is_some())
    }

    /// Plugs the cable in or out: the guest is told, and frames of either side are lost while it is out.
    pub fn set_link(&self, up: bool) {
        if !self.shared.set_link(up) {
            return;
        }
        if !up {
            // No frame passes any more when this returns; the workers see why.
            for lane in &self.lanes {
                if let Some(vhost) = &mut lock(lane).vhost
                    && let Err(e) = vhost.stop()
                {
                    self.shared.say("vhost does not give a queue back", &e);
                }
            }
        }
        self.wake();
    }

    /// Whether the cable is in. It is out, too, once the other side of a stream is gone.
    #[must_use]
    pub fn link_is_up(&self) -> bool {
        self.shared.link_is_up()
    }

    /// Asks the guest to tell its neighbours where it is now, after it has moved (section 5.1.6.5.4). False: its driver
    /// cannot, or is not there.
    pub fn announce(&self) -> bool {
        let can = self.shared.has(GUEST_ANNOUNCE);
        if can {
            self.shared.set_announcing(true);
        }
        can
    }

    /// Whether the guest was asked to announce itself and has not answered.
    #[must_use]
    pub fn is_announcing(&self) -> bool {
        self.shared.is_announcing()
    }

    /// The guest's address, which its driver may have changed.
    #[must_use]
    pub fn mac(&self) -> [u8; 6] {
        self.shared.mac()
    }

    /// How many pairs of queues the driver uses.
    #[must_use]
    pub fn active_pairs(&self) -> u16 {
        self.shared.pairs()
    }

    /// Makes every worker look again.
    fn wake(&self) {
        for lane in &self.lanes {
            let mut lane = lock(lane);
            let now = Duration::from_nanos(1);
            let Lane {
                rx_timer, tx_timer, ..
            } = &mut *lane;
            for timer in [rx_timer, tx_timer] {
                if let Err(e) = timer.reset(now, None) {
                    log::warn!("{}: cannot wake a queue: {e}", self.shared.name());
                }
            }
        }
    }
}
