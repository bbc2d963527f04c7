//! What outlives a stop of one queue: its way to the store, its timer, and memory that is used again.

use std::time::Instant;

use alveole_block_store::{Completion, StoreQueue};
use alveole_guest_memory::GuestBuffers;
use alveole_virtio::Chain;
use vmm_sys_util::timerfd::TimerFd;

use crate::request::Range;

/// One queue's share of the device, lent to its worker.
pub(crate) struct Lane {
    pub(crate) store: Box<dyn StoreQueue>,
    /// Takes its place as soon as nothing is in flight.
    pub(crate) next_store: Option<Box<dyn StoreQueue>>,
    /// A worker serves it: only that one may change the store.
    pub(crate) served: bool,
    /// When the rate limiter grants the next request.
    pub(crate) timer: TimerFd,
    /// The worker waits for that.
    pub(crate) throttled: bool,
    pub(crate) flights: Flights,
    pub(crate) scratch: Scratch,
}

/// Memory for one round of work.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) chain: Chain,
    pub(crate) ranges: Vec<Range>,
    pub(crate) done: Vec<Completion>,
    pub(crate) spare: Vec<GuestBuffers>,
}

/// A request that the host works on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flight {
    pub(crate) head: u16,
    pub(crate) status_addr: u64,
    pub(crate) kind: crate::Kind,
    pub(crate) len: u64,
    /// When the round began in which it was taken.
    pub(crate) since: Instant,
    /// Parts of it that the host has not given back.
    pub(crate) parts: u32,
    pub(crate) failed: bool,
}

/// Requests in flight by tag.
#[derive(Default)]
pub(crate) struct Flights {
    table: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl Flights {
    /// Keeps a request and names it.
    pub(crate) fn add(&mut self, flight: Flight) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.table.push(None);
            self.table.len().saturating_sub(1)
        });
        if let Some(place) = self.table.get_mut(at) {
            *place = Some(flight);
        }
        at as u64
    }

    /// One part of `tag` is done; the request, when it was the last.
    pub(crate) fn part_done(&mut self, tag: u64, failed: bool) -> Option<Flight> {
        let at = usize::try_from(tag).ok()?;
        let place = self.table.get_mut(at)?;
        let flight = place.as_mut()?;
        flight.failed |= failed;
        flight.parts = flight.parts.saturating_sub(1);
        if flight.parts > 0 {
            return None;
        }
        self.free.push(at);
        place.take()
    }
}
