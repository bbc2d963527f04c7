//! The device: start, reset, save, restore.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use alveole_net_link::{LinkFacts, NetLink};
use alveole_rate_limiter::Limits;
use alveole_virtio::{
    ConfigIrq, Identity, LiveQueue, QueueWorker, RestoreError, SavedState, StartError, StartKit,
    VirtioDevice,
};
use vmm_sys_util::timerfd::TimerFd;

use crate::config::{mac_fault, mac_text};
use crate::config_space::{self, Abilities, CTRL_VQ, GUEST_OFFLOADS, MQ};
use crate::control_worker::ControlWorker;
use crate::lane::{Kept, Lane};
use crate::receive::Rx;
use crate::shared::{Shared, lock};
use crate::state::{KIND, NetStateV1, VERSION};
use crate::transmit::Tx;
use crate::vhost::{Vhost, VhostWorker};
use crate::worker::PairWorker;
use crate::{MAX_PAIRS, NetConfig, NetCounters, NetError, NetHandle};

/// Type of a network device (section 5).
const DEVICE_ID: u16 = 1;
/// Least MTU (section 5.1.4.1).
const LEAST_MTU: u16 = 68;

/// The network device. See the crate's head.
pub struct VirtioNet {
    shared: Arc<Shared>,
    lanes: Vec<Arc<Mutex<Lane>>>,
    rx_queue_size: u16,
    queue_size: u16,
    /// The link, or the owner's filter, passes no other address.
    mac_is_fixed: bool,
}

impl VirtioNet {
    /// A device over `link`, with as many pairs of queues as that has.
    ///
    /// # Errors
    /// The configuration is not possible with this link, or the host is out of what a queue needs.
    pub fn new(config: &NetConfig, link: NetLink) -> Result<Self, NetError> {
        let NetConfig {
            name,
            mac,
            mtu,
            rx_queue_size,
            queue_size,
            rx_limits,
            tx_limits,
            source_mac_filter,
        } = config;
        let NetLink {
            facts,
            queues,
            vhost,
        } = link;
        let pairs = u16::try_from(queues.len()).unwrap_or(u16::MAX);
        let sizes = [*rx_queue_size, *queue_size];
        let wrong = sizes.into_iter().find(|size| {
            *size < 2 || !size.is_power_of_two() || *size > alveole_virtio::MAX_QUEUE_SIZE
        });
        if pairs == 0 || pairs > MAX_PAIRS || wrong.is_some() {
            return Err(NetError::Queues {
                name: name.clone(),
                pairs: queues.len(),
                size: wrong.unwrap_or(*queue_size),
            });
        }
        let mac_is_fixed = facts.mac.is_some() || *source_mac_filter && mac.is_some();
        let mac = choose_mac(name, *mac, &facts)?;
        let mtu = mtu.or(facts.mtu);
        if let Some(mtu) = mtu.filter(|mtu| *mtu < LEAST_MTU) {
            return Err(NetError::Mtu {
                name: name.clone(),
                mtu,
            });
        }
        if !vhost.is_empty() {
            check_vhost(config, &facts)?;
        }
        let mut vhost = vhost.into_iter();
        let lanes = queues
            .into_iter()
            .map(|link| {
                let failed = |source| NetError::Timer {
                    name: name.clone(),
                    source,
                };
                let timer = || TimerFd::new().map_err(|e| failed(e.into()));
                Ok(Arc::new(Mutex::new(Lane {
                    link,
                    rx_timer: timer()?,
                    tx_timer: timer()?,
                    kept: Kept::default(),
                    vhost: vhost.next().map(Vhost::new).transpose().map_err(failed)?,
                })))
            })
            .collect::<Result<Vec<_>, NetError>>()?;
        let abilities = Abilities {
            offloads: facts.offloads,
            pairs,
            mtu,
            can_change_mac: !source_mac_filter && facts.mac.is_none(),
        };
        let limits = [*rx_limits, *tx_limits];
        let counters = NetCounters::new(name.clone());
        Ok(Self {
            shared: Arc::new(Shared::new(
                abilities,
                mac,
                *source_mac_filter,
                limits,
                counters,
            )),
            lanes,
            rx_queue_size: *rx_queue_size,
            queue_size: *queue_size,
            mac_is_fixed,
        })
    }

    /// A handle for the owner, to be taken before the device is given to a transport.
    #[must_use]
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            shared: self.shared.clone(),
            lanes: self.lanes.clone(),
        }
    }

    /// The number of the control queue: behind all pairs that the driver knows of (section 5.1.2).
    fn control_queue(&self, features: u64) -> Option<u16> {
        let known = if features & MQ != 0 {
            self.shared.abilities.pairs
        } else {
            1
        };
        (features & CTRL_VQ != 0).then_some(known.saturating_mul(2))
    }
}

/// What the device does with each frame, the host's kernel does not.
fn check_vhost(config: &NetConfig, facts: &LinkFacts) -> Result<(), NetError> {
    let is_bound = [config.rx_limits, config.tx_limits] != [Limits::default(); 2];
    for (asked, what) in [
        (is_bound, "rate limiting"),
        (config.source_mac_filter, "filtering by address"),
    ] {
        if asked {
            return Err(NetError::Vhost {
                name: config.name.clone(),
                what,
            });
        }
    }
    // Section 5.1.4.1: what is not to be cut is not longer than what the driver was told.
    match (config.mtu, facts.mtu) {
        (Some(mtu), Some(link_mtu)) if mtu < link_mtu => Err(NetError::VhostMtu {
            name: config.name.clone(),
            mtu,
            link: facts.name.clone(),
            link_mtu,
        }),
        _ => Ok(()),
    }
}

fn choose_mac(name: &str, wanted: Option<[u8; 6]>, facts: &LinkFacts) -> Result<[u8; 6], NetError> {
    let mac = match (wanted, facts.mac) {
        (Some(wanted), Some(has)) if wanted != has => {
            return Err(NetError::OtherMac {
                name: name.to_owned(),
                link: facts.name.clone(),
                has,
                wanted,
            });
        }
        (Some(mac), _) | (None, Some(mac)) => mac,
        (None, None) => {
            let mut bytes = [0; 6];
            getrandom::fill(&mut bytes).map_err(|e| NetError::Random {
                name: name.to_owned(),
                why: e.to_string(),
            })?;
            let [first, ..] = &mut bytes;
            // Of one interface, administered here (IEEE 802, section 8.2).
            *first = (*first & 0xfc) | 2;
            bytes
        }
    };
    match mac_fault(mac) {
        None => Ok(mac),
        Some(why) => Err(NetError::Mac {
            name: name.to_owned(),
            mac,
            why,
        }),
    }
}

/// The queues of one pair that are to be served.
#[derive(Default)]
struct Halves {
    rx: Option<LiveQueue>,
    tx: Option<LiveQueue>,
}

impl VirtioDevice for VirtioNet {
    fn identity(&self) -> Identity {
        let pair = [self.rx_queue_size, self.queue_size];
        let pairs = self.lanes.iter().flat_map(|_| pair);
        Identity {
            name: "virtio-net",
            device_id: DEVICE_ID,
            features: self.shared.abilities.features(),
            queue_sizes: pairs.chain([self.queue_size]).collect(),
            config_len: config_space::LEN,
        }
    }

    fn connect(&mut self, config_irq: ConfigIrq) {
        self.shared.connect(config_irq);
    }

    fn read_config(&self, at: u32, into: &mut [u8]) {
        let bytes = self.shared.config_bytes();
        let from = bytes.iter().skip(usize::try_from(at).unwrap_or(usize::MAX));
        for (place, byte) in into.iter_mut().zip(from) {
            *place = *byte;
        }
    }

    /// A driver of this version of the standard writes nothing here.
    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn start(&mut self, kit: StartKit) -> Result<Vec<Box<dyn QueueWorker>>, StartError> {
        let shared = &self.shared;
        shared.set_features(kit.features);
        let control = self.control_queue(kit.features);
        let mut workers: Vec<Box<dyn QueueWorker>> = Vec::new();
        let mut pairs: Vec<Halves> = Vec::new();
        pairs.resize_with(self.lanes.len(), Halves::default);
        for queue in kit.queues {
            let index = queue.index();
            if control == Some(index) {
                workers.push(Box::new(ControlWorker::new(
                    queue,
                    self.lanes.clone(),
                    shared.clone(),
                )));
                continue;
            }
            // Queues that a driver without MQ has no use for are left alone.
            let known = control.is_none_or(|control| index < control);
            let pair = pairs.get_mut(usize::from(index / 2)).filter(|_| known);
            match pair {
                Some(halves) if index.is_multiple_of(2) => halves.rx = Some(queue),
                Some(halves) => halves.tx = Some(queue),
                None => {}
            }
        }
        // With several pairs, one that looks may keep another one waiting.
        let look = if self.lanes.len() == 1 {
            kit.longest_look
        } else {
            Duration::ZERO
        };
        let source = shared.source_mac_filter.then(|| shared.mac());
        for ((pair, halves), lane) in (0u16..).zip(pairs).zip(&self.lanes) {
            if halves.rx.is_none() && halves.tx.is_none() {
                continue;
            }
            if lock(lane).vhost.is_some() {
                workers.push(Box::new(VhostWorker::new(
                    pair,
                    kit.features,
                    (halves.rx, halves.tx),
                    lane.clone(),
                    self.lanes.clone(),
                    shared.clone(),
                )));
                continue;
            }
            let mtu = shared.abilities.mtu;
            let rx = halves.rx.map(|queue| Rx::new(queue, kit.features, mtu));
            let tx = halves.tx.map(|queue| Tx::new(queue, kit.features, source));
            workers.push(Box::new(PairWorker::new(
                pair,
                (rx, tx),
                lane.clone(),
                self.lanes.clone(),
                shared.clone(),
                look,
            )));
        }
        Ok(workers)
    }

    fn reset(&mut self) {
        let Self {
            shared,
            lanes,
            rx_queue_size: _,
            queue_size: _,
            mac_is_fixed: _,
        } = self;
        shared.reset();
        for lane in lanes {
            lock(lane).kept.clear();
        }
    }

    fn save(&self) -> SavedState {
        let shared = &self.shared;
        let state = NetStateV1 {
            mac: shared.mac(),
            pairs: shared.pairs(),
            is_announcing: shared.is_announcing(),
            guest_offloads: shared.offload_bits(),
            mtu: shared.abilities.mtu,
            cable_is_out: !shared.link_is_up(),
        };
        SavedState::pack(KIND, VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let NetStateV1 {
            mac,
            pairs,
            is_announcing,
            guest_offloads,
            mtu,
            cable_is_out,
        } = saved.unpack(KIND, VERSION)?;
        let invalid = |why: String| RestoreError::Invalid {
            kind: KIND.into(),
            why,
        };
        let shared = &self.shared;
        let abilities = &shared.abilities;
        if let Some(why) = mac_fault(mac) {
            return Err(invalid(format!("the address {}: {why}", mac_text(mac))));
        }
        if self.mac_is_fixed && mac != shared.mac() {
            return Err(invalid(format!(
                "the address {}, where only {} passes",
                mac_text(mac),
                mac_text(shared.mac())
            )));
        }
        if pairs == 0 || pairs > abilities.pairs {
            return Err(invalid(format!(
                "{pairs} pairs of queues in use, this device has {}",
                abilities.pairs
            )));
        }
        let foreign = guest_offloads.unwrap_or(0) & !(abilities.features() & GUEST_OFFLOADS);
        if foreign != 0 {
            return Err(invalid(format!(
                "offloads {foreign:#x} that the link does not have"
            )));
        }
        if mtu != abilities.mtu {
            return Err(invalid(format!(
                "its MTU was {mtu:?}, this device's is {:?}; give both links the same",
                abilities.mtu
            )));
        }
        shared.set_mac(mac);
        shared.set_pairs(pairs);
        shared.set_announcing(is_announcing);
        shared.set_offload_bits(guest_offloads);
        shared.restore_link(!cable_is_out);
        Ok(())
    }
}
