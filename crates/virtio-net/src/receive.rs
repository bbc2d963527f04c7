//! The receiving half of a pair: frames from the link into the guest's buffers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestBuffers, MAX_IOVECS};
use alveole_net_link::{HEADER_BYTES, MAX_FRAME_BYTES, Received};
use alveole_virtio::{BrokenRing, Chain, LiveQueue, Progress};

use crate::config_space::{MRG_RXBUF, MTU};
use crate::extra_weight;
use crate::lane::Lane;
use crate::shared::Shared;

/// Where `num_buffers` lies in the header.
const NUM_BUFFERS_OFFSET: u64 = 10;
/// Ethernet header and one VLAN tag: what comes on top of an MTU.
const ETHERNET_BYTES: u64 = 18;
/// Buffers for at least so much are held ready, however small the MTU is.
const LEAST_ROOM: u64 = 2048;
/// How long a frame waits for a guest that has buffers, but not enough for it. Abused by a guest whose whole ring has
/// no room for one frame.
const PATIENCE: Duration = Duration::from_millis(100);
/// The longest frame and its header.
const MOST_ROOM: u64 = (HEADER_BYTES + MAX_FRAME_BYTES) as u64;

/// Why no more frames are received for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RxPause {
    /// The link has none.
    Idle,
    /// The guest has no buffers.
    Starved,
    /// Until the limiter grants the frame that is there.
    Until(Duration),
    /// Until the guest has enough buffers for the frame that is there, or it has waited long enough.
    Waits(Duration),
    /// The link is down or gone, or the pair is not in use.
    Off,
    /// The other direction first.
    Budget,
}

/// A chain that was taken, in order.
#[derive(Debug, Clone, Copy)]
struct Held {
    head: u16,
    len: u64,
}

/// One receive queue that is being served.
pub(crate) struct Rx {
    pub(crate) queue: LiveQueue,
    is_mergeable: bool,
    /// Longest frame that is not to be cut, with its Ethernet header; none: not agreed upon.
    longest_uncut: Option<u64>,
    /// Chains taken from the ring and not used yet; their memory is `buffers`.
    held: VecDeque<Held>,
    buffers: GuestBuffers,
    chain: Chain,
    used: Vec<(u16, u32)>,
    /// A frame of so many bytes lies in the first buffers and waits for the limiter.
    ungranted: Option<u64>,
    kept_since: Option<Instant>,
    is_gone: bool,
}

impl Rx {
    pub(crate) fn new(queue: LiveQueue, features: u64, mtu: Option<u16>) -> Self {
        Self {
            buffers: GuestBuffers::new(queue.ram()),
            queue,
            is_mergeable: features & MRG_RXBUF != 0,
            longest_uncut: mtu
                .filter(|_| features & MTU != 0)
                .map(|mtu| u64::from(mtu).saturating_add(ETHERNET_BYTES)),
            held: VecDeque::new(),
            chain: Chain::new(),
            used: Vec::new(),
            ungranted: None,
            kept_since: None,
            is_gone: false,
        }
    }

    /// Receives until something is in the way, or `budget` frames were.
    pub(crate) fn work(
        &mut self,
        pair: u16,
        lane: &mut Lane,
        shared: &Shared,
        budget: &mut u32,
    ) -> Result<RxPause, BrokenRing> {
        let room = Self::room(shared);
        loop {
            if let Some(len) = self.ungranted {
                if let Err(wait) = shared.rx_limit.take(payload(len)) {
                    shared.counters.rx_throttled.inc();
                    return Ok(RxPause::Until(wait));
                }
                self.give(len, shared)?;
            }
            let Some(left) = budget.checked_sub(1) else {
                return Ok(RxPause::Budget);
            };
            // Taken also while nothing is received: a driver that breaks its ring is to know.
            let is_enough = self.gather(room)?;
            if self.is_gone || !shared.link_is_up() || !shared.is_active(pair) {
                return Ok(RxPause::Off);
            }
            if self.held.is_empty() {
                shared.counters.rx_starved.inc();
                return Ok(RxPause::Starved);
            }
            let received = if let Some(frame) = lane.kept.frame() {
                if !self.takes(frame.len() as u64) {
                    let now = Instant::now();
                    let since = *self.kept_since.get_or_insert(now);
                    let waited = now.saturating_duration_since(since);
                    if let Some(wait) = PATIENCE.checked_sub(waited)
                        && self.is_mergeable
                    {
                        return Ok(RxPause::Waits(wait));
                    }
                    shared.counters.rx_too_long.inc();
                    self.kept_since = None;
                    lane.kept.clear();
                    continue;
                }
                self.buffers.copy_from(0, frame);
                let len = frame.len() as u64;
                self.kept_since = None;
                lane.kept.clear();
                Ok(Received::Frame(len))
            } else if is_enough {
                lane.link.receive(&self.buffers)
            } else {
                // A longer frame than fits would be lost: it goes where there is room for every one.
                match lane.link.receive_kept(lane.kept.room()) {
                    Ok(Received::Frame(len)) => {
                        shared.counters.rx_kept.inc();
                        lane.kept.fill(len);
                        continue;
                    }
                    other => other,
                }
            };
            match received {
                Ok(Received::Frame(len)) => {
                    *budget = left.saturating_sub(extra_weight(len));
                    self.deliver(len, shared)?;
                }
                Ok(Received::TooLong) => {
                    *budget = left;
                    shared.counters.rx_too_long.inc();
                }
                Ok(Received::WouldBlock) => return Ok(RxPause::Idle),
                Ok(Received::Closed) => {
                    self.is_gone = true;
                    log::warn!(
                        "{}: the other side of the link is gone; the guest is told that its link is down",
                        shared.name()
                    );
                    shared.set_link(false);
                    return Ok(RxPause::Off);
                }
                Err(e) => {
                    shared.counters.rx_errors.inc();
                    shared.say("the link cannot be read", &e);
                    return Ok(RxPause::Idle);
                }
            }
        }
    }

    /// Throws away what came while the link was down: a cable keeps nothing.
    pub(crate) fn discard(&mut self, lane: &mut Lane, shared: &Shared, most: u32) {
        lane.kept.clear();
        self.kept_since = None;
        for _ in 0..most {
            match lane.link.receive_kept(lane.kept.room()) {
                Ok(Received::Frame(_) | Received::TooLong) => shared.counters.rx_link_down.inc(),
                _ => return,
            }
        }
    }

    /// How much memory a frame may need.
    fn room(shared: &Shared) -> u64 {
        if shared.guest_offloads().has_long_frames() {
            return MOST_ROOM;
        }
        shared.abilities.mtu.map_or(MOST_ROOM, |mtu| {
            u64::from(mtu)
                .saturating_add(ETHERNET_BYTES)
                .saturating_add(HEADER_BYTES as u64)
                .clamp(LEAST_ROOM, MOST_ROOM)
        })
    }

    /// Takes chains until they have `room`; whether any frame can be tried: it fits, or more would not help.
    fn gather(&mut self, room: u64) -> Result<bool, BrokenRing> {
        loop {
            if !self.held.is_empty()
                && (!self.is_mergeable
                    || self.buffers.len_bytes() >= room
                    // With one for the link's own use; more than one call does not take.
                    || self.buffers.iovecs().len().saturating_add(1) >= MAX_IOVECS)
            {
                return Ok(true);
            }
            if !self.queue.pop(&mut self.chain)? {
                return Ok(false);
            }
            let head = self.chain.head();
            let broken = |why| BrokenRing::NoRequest { head, why };
            if !self.chain.readable().is_empty() {
                return Err(broken("it is no empty buffer for frames"));
            }
            let len = self.chain.writable_bytes();
            if len < HEADER_BYTES as u64 {
                return Err(broken("it has no room for a header"));
            }
            for segment in self.chain.writable() {
                self.buffers
                    .push(segment.addr, u64::from(segment.len))
                    .map_err(|_| broken("its buffer is not in guest memory"))?;
            }
            self.held.push_back(Held { head, len });
        }
    }

    /// Whether a frame of so many bytes, header included, fits into what is held.
    fn takes(&self, len: u64) -> bool {
        self.buffers.len_bytes() >= len
    }

    /// A frame lies in the first buffers: gives it to the driver, now or when the limiter grants it.
    fn deliver(&mut self, len: u64, shared: &Shared) -> Result<(), BrokenRing> {
        if self.is_over_mtu(len) {
            shared.counters.rx_too_long.inc();
            return Ok(());
        }
        if !shared.guest_offloads().csum {
            // Section 5.1.6.4.1: such a driver finds no flags, not even that the checksum is fine.
            self.buffers.copy_from(0, &[0]);
        }
        match shared.rx_limit.take(payload(len)) {
            Ok(()) => self.give(len, shared),
            Err(_) => {
                // Asked for again, and counted, at the next look.
                self.ungranted = Some(len);
                Ok(())
            }
        }
    }

    /// Section 5.1.4.1: what is not to be cut is not longer than the MTU agreed upon.
    fn is_over_mtu(&self, len: u64) -> bool {
        let is_long = self.longest_uncut.is_some_and(|most| payload(len) > most);
        if !is_long {
            return false;
        }
        let mut header = [0; 2];
        self.buffers.copy_to(0, &mut header);
        let [_, gso] = header;
        gso & 0x7f == 0
    }

    fn give(&mut self, len: u64, shared: &Shared) -> Result<(), BrokenRing> {
        self.ungranted = None;
        self.used.clear();
        let (mut left, mut memory) = (len, 0u64);
        while left > 0
            && let Some(held) = self.held.pop_front()
        {
            let here = left.min(held.len);
            left = left.saturating_sub(here);
            memory = memory.saturating_add(held.len);
            self.used
                .push((held.head, u32::try_from(here).unwrap_or(u32::MAX)));
        }
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        self.buffers
            .copy_from(NUM_BUFFERS_OFFSET, &count.to_le_bytes());
        self.buffers.drop_front(memory);
        shared.counters.rx_frames.inc();
        shared.counters.rx_bytes.add(payload(len));
        self.queue.complete_together(&self.used)
    }

    /// What was not used goes back; what waits for the limiter does not wait any longer.
    pub(crate) fn stop(mut self, shared: &Shared) -> Progress {
        if !self.queue.is_broken() {
            let last = match self.ungranted {
                Some(len) => self.give(len, shared),
                None => Ok(()),
            };
            if let Err(why) = last.and_then(|()| self.queue.notify()) {
                self.queue.fail(why);
            }
        }
        let unused = u16::try_from(self.held.len()).unwrap_or(u16::MAX);
        self.queue.put_back_many(unused);
        self.queue.stop()
    }
}

/// Length without the header.
fn payload(len: u64) -> u64 {
    len.saturating_sub(HEADER_BYTES as u64)
}
