//! A split virtqueue that is being served (section 2.7).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use alveole_guest_memory::GuestRam;
use alveole_guest_memory::vm_memory::{Bytes, GuestAddress};
use alveole_interrupts::{Doorbell, IrqLine};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::{Chain, RouteWatch, Signals};

/// What a driver did to its ring that no driver may do. The device goes quiet until it is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BrokenRing {
    /// The available index is further ahead than the queue is long (section 2.7.13.3).
    #[error("the available index is more than the queue's size ahead")]
    IndexJump,
    /// A chain without end: a descriptor that leads nowhere, in a circle, or outside memory.
    #[error(
        "the chain at descriptor {head} has no proper end: it leaves its table or memory, goes in a circle, \
         or is longer than 2^32 bytes"
    )]
    EndlessChain {
        /// Its first descriptor.
        head: u16,
    },
    /// Too many descriptors in a chain.
    #[error(
        "the chain at descriptor {head} has more than {} descriptors",
        crate::MAX_CHAIN_SEGMENTS
    )]
    LongChain {
        /// Its first descriptor.
        head: u16,
    },
    /// A descriptor to be read behind one to be written.
    #[error("the chain at descriptor {head} has a buffer to be read behind one to be written")]
    MixedChain {
        /// Its first descriptor.
        head: u16,
    },
    /// A chain that is too short or odd for any request of the device.
    #[error("the chain at descriptor {head} is no request: {why}")]
    NoRequest {
        /// Its first descriptor.
        head: u16,
        /// What is wrong.
        why: &'static str,
    },
    /// The rings cannot be accessed.
    #[error("the ring itself is not in guest memory")]
    NoMemory,
    /// Who serves the ring in our place has given it up, and does not say why.
    #[error(
        "the host's kernel, which serves it, gave it up: the driver broke the ring, or the link is gone"
    )]
    GivenUp,
}

/// Where a queue lies in guest memory and how far it came, for who is to serve it in our place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingParts {
    /// Number of descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors_addr: u64,
    /// Guest address of the available ring.
    pub available_addr: u64,
    /// Guest address of the used ring.
    pub used_addr: u64,
    /// Next entry of the available ring.
    pub next_avail: u16,
}

/// How far a queue came: what a stop gives back and a start takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The queue's number.
    pub queue: u16,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}

/// A queue in the hands of a worker.
pub struct LiveQueue {
    index: u16,
    queue: Queue,
    ram: GuestRam,
    doorbell: Doorbell,
    signals: Arc<Signals>,
    name: &'static str,
    broken: bool,
    /// How many requests were completed that the driver has not been told of.
    untold: u32,
}

impl LiveQueue {
    pub(crate) fn new(
        index: u16,
        queue: Queue,
        ram: GuestRam,
        doorbell: Doorbell,
        signals: Arc<Signals>,
        name: &'static str,
    ) -> Self {
        Self {
            index,
            queue,
            ram,
            doorbell,
            signals,
            name,
            broken: false,
            untold: 0,
        }
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its size in descriptors, as the driver has set it.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// What the driver rings when it has made buffers available.
    #[must_use]
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Looks whether the available index can be one, as [`LiveQueue::pop`] does, and takes nothing.
    ///
    /// # Errors
    /// As there.
    pub fn check_index(&mut self) -> Result<(), BrokenRing> {
        let available = self.queue.iter(self.ram.as_vm_memory());
        available.map(|_| ()).map_err(|e| no_index(&e))
    }

    /// What somebody else needs to serve the queue; [`LiveQueue::served_up_to`] takes it back.
    #[must_use]
    pub fn parts(&self) -> RingParts {
        RingParts {
            size: self.queue.size(),
            descriptors_addr: self.queue.desc_table(),
            available_addr: self.queue.avail_ring(),
            used_addr: self.queue.used_ring(),
            next_avail: self.queue.next_avail(),
        }
    }

    /// Somebody else has served the queue up to entry `next_avail` of the available ring; how far it used entries stands in
    /// the used ring.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn served_up_to(&mut self, next_avail: u16) -> Result<(), BrokenRing> {
        // Section 2.7.8: the index lies behind the flags.
        let index_addr = GuestAddress(self.queue.used_ring().saturating_add(2));
        let used: u16 = self
            .ram
            .as_vm_memory()
            .load(index_addr, Ordering::Acquire)
            .map_err(|_| BrokenRing::NoMemory)?;
        self.queue.set_next_avail(next_avail);
        self.queue.set_next_used(u16::from_le(used));
        Ok(())
    }

    /// Interrupts the driver for what somebody else has completed, who has looked whether it wants to be.
    pub fn interrupt(&self) {
        self.signals.queue(self.index);
    }

    /// A line by which somebody else can interrupt the driver ([`crate::Wires::direct`]).
    #[must_use]
    pub fn direct(&self) -> Option<IrqLine> {
        self.signals.direct(self.index)
    }

    /// Has `watch` called with what [`LiveQueue::direct`] would say, on the thread that writes registers, until the queue
    /// stops.
    pub fn watch_route(&self, watch: RouteWatch) {
        self.signals.watch_route(self.index, watch);
    }

    /// Whether [`LiveQueue::fail`] was called.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Takes the next request into `chain`; false when there is none.
    ///
    /// # Errors
    /// The driver has broken the ring; hand it to [`LiveQueue::fail`].
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, BrokenRing> {
        let ram = self.ram.as_vm_memory();
        let mut available = self.queue.iter(ram).map_err(|e| no_index(&e))?;
        match available.next() {
            Some(descriptors) => chain.fill(descriptors).map(|()| true),
            None => Ok(false),
        }
    }

    /// Whether [`LiveQueue::pop`] has something to say, without taking it.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.queue
            .avail_idx(self.ram.as_vm_memory(), Ordering::Acquire)
            .is_ok_and(|idx| idx.0 != self.queue.next_avail())
    }

    /// Puts the request that [`LiveQueue::pop`] gave last back: it will be the next one again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Puts the last `count` requests that [`LiveQueue::pop`] gave back: they will be the next ones again.
    pub fn put_back_many(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Gives the request `head` back to the driver with `written` bytes filled in.
    ///
    /// # Errors
    /// The ring is not in memory, or `head` is none of its descriptors.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), BrokenRing> {
        // Looked at here, because the queue would log it each time.
        if head >= self.queue.size() {
            return Err(BrokenRing::NoRequest {
                head,
                why: "it is outside the table",
            });
        }
        self.untold = self.untold.saturating_add(1);
        self.queue
            .add_used(self.ram.as_vm_memory(), head, written)
            .map_err(|_| BrokenRing::NoMemory)
    }

    /// Gives several requests back at once: the driver sees all of them or none. For what is spread over several
    /// (section 5.1.6.4.1).
    ///
    /// # Errors
    /// As [`Self::complete`].
    pub fn complete_together(&mut self, used: &[(u16, u32)]) -> Result<(), BrokenRing> {
        let Some(((last, written), others)) = used.split_last() else {
            return Ok(());
        };
        let next_used = self.queue.next_used();
        let mut at = next_used;
        for (head, written) in others {
            // Section 2.7.8: flags and index, then entries of eight bytes.
            let place = u64::from(at)
                .checked_rem(u64::from(self.queue.size()))
                .unwrap_or_default();
            let addr = self
                .queue
                .used_ring()
                .saturating_add(4)
                .saturating_add(place.saturating_mul(8));
            let entry = u64::from(*head) | u64::from(*written) << 32;
            self.ram
                .write(addr, &entry.to_le_bytes())
                .map_err(|_| BrokenRing::NoMemory)?;
            at = at.wrapping_add(1);
            self.untold = self.untold.saturating_add(1);
        }
        // The index, and with it all of them, becomes visible with the last.
        self.queue.set_next_used(at);
        self.complete(*last, *written)
    }

    /// How many requests were completed since the last [`LiveQueue::notify`].
    #[must_use]
    pub fn untold(&self) -> u32 {
        self.untold
    }

    /// Interrupts the driver for what was completed since the last call, if it wants to be.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn notify(&mut self) -> Result<(), BrokenRing> {
        let completed = std::mem::take(&mut self.untold);
        if completed == 0 {
            return Ok(());
        }
        // The used index is visible before the driver's wish is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            self.passed_used_event(completed)?
        } else {
            !self.asks_for_silence()?
        };
        if wanted {
            self.signals.queue(self.index);
        }
        Ok(())
    }

    /// Whether the entry at which the driver wants to be told (section 2.7.7.2) is among the last `completed`. Asked
    /// here, because `virtio-queue` does not count what is completed together.
    fn passed_used_event(&self, completed: u32) -> Result<bool, BrokenRing> {
        let event_addr = u64::from(self.queue.size())
            .saturating_mul(2)
            .saturating_add(self.queue.avail_ring())
            .saturating_add(4);
        let event: u16 = self
            .ram
            .as_vm_memory()
            .load(GuestAddress(event_addr), Ordering::Relaxed)
            .map_err(|_| BrokenRing::NoMemory)?;
        let behind = self
            .queue
            .next_used()
            .wrapping_sub(u16::from_le(event))
            .wrapping_sub(1);
        Ok(u32::from(behind) < completed)
    }

    /// VIRTQ_AVAIL_F_NO_INTERRUPT (section 2.7.7), which `virtio-queue` leaves to us.
    fn asks_for_silence(&self) -> Result<bool, BrokenRing> {
        const NO_INTERRUPT: u16 = 1;
        let flags: u16 = self
            .ram
            .as_vm_memory()
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| BrokenRing::NoMemory)?;
        Ok(u16::from_le(flags) & NO_INTERRUPT != 0)
    }

    /// Asks the driver not to ring: the worker is looking anyway.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn stop_doorbell(&mut self) -> Result<(), BrokenRing> {
        self.queue
            .disable_notification(self.ram.as_vm_memory())
            .map_err(|_| BrokenRing::NoMemory)
    }

    /// How many requests the driver has offered in all, modulo 2^16 (section 2.7.6, `idx` of the available ring): it grows by what
    /// the driver offers, whether or not that is taken.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn offered(&self) -> Result<u16, BrokenRing> {
        let index = self
            .queue
            .avail_idx(self.ram.as_vm_memory(), Ordering::Acquire)
            .map_err(|_| BrokenRing::NoMemory)?;
        Ok(index.0)
    }

    /// Asks the driver to ring for the next request. True when there is one already, for which it will
    /// not.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn want_doorbell(&mut self) -> Result<bool, BrokenRing> {
        self.queue
            .enable_notification(self.ram.as_vm_memory())
            .map_err(|_| BrokenRing::NoMemory)
    }

    /// Gives the device up until the driver resets it: sets NEEDS_RESET, tells the driver and the log. The
    /// worker should unwatch everything and wait to be stopped.
    pub fn fail(&mut self, why: BrokenRing) {
        self.broken = true;
        self.signals
            .say(self.name, &format_args!("queue {}: {why}", self.index));
        self.signals.need_reset();
    }

    /// Ends service.
    #[must_use]
    pub fn stop(self) -> Progress {
        self.signals.forget_route(self.index);
        Progress {
            queue: self.index,
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }
}

/// Why a ring cannot be looked into.
fn no_index(why: &virtio_queue::Error) -> BrokenRing {
    match why {
        virtio_queue::Error::InvalidAvailRingIndex => BrokenRing::IndexJump,
        _ => BrokenRing::NoMemory,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};

    use alveole_guest_memory::MemoryPlan;

    use super::*;
    use crate::Wires;

    const SIZE: u16 = 16;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;

    struct Count(Arc<AtomicU32>);

    impl Wires for Count {
        fn queue(&self, _: u16) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn config(&self) {}
        fn clear(&self) {}
    }

    /// A queue with event indices, its memory, and how often its driver was interrupted.
    fn queue() -> (LiveQueue, GuestRam, Arc<AtomicU32>) {
        let ram = GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(0x1000), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        let told = Arc::new(AtomicU32::new(0));
        let signals = Signals::new(Box::new(Count(told.clone())));
        let bell = Doorbell::new().unwrap();
        let queue = LiveQueue::new(0, queue, ram.clone(), bell, signals, "test");
        (queue, ram, told)
    }

    fn used_index(ram: &GuestRam) -> u16 {
        ram.as_vm_memory()
            .load(GuestAddress(USED + 2), Ordering::Acquire)
            .unwrap()
    }

    fn entry(ram: &GuestRam, at: u64) -> (u32, u32) {
        let mut bytes = [0; 8];
        ram.read(USED + 4 + 8 * (at % u64::from(SIZE)), &mut bytes)
            .unwrap();
        let [a, b, c, d, e, f, g, h] = bytes;
        (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        )
    }

    /// A snapshot must hold what a device has written into its rings.
    #[test]
    fn pages_of_rings_that_are_written_are_known() {
        let (mut queue, ram, _) = queue();
        let writes: [fn(&mut LiveQueue); 4] = [
            |queue| queue.complete(1, 0).unwrap(),
            |queue| queue.complete_together(&[(1, 0), (2, 0)]).unwrap(),
            |queue| queue.stop_doorbell().unwrap(),
            |queue| assert!(!queue.want_doorbell().unwrap()),
        ];
        for (number, write) in writes.into_iter().enumerate() {
            let before = used_ring(&ram);
            ram.track_writes();
            write(&mut queue);
            let written = ram.take_written();
            if used_ring(&ram) != before {
                assert_eq!(
                    (written.count(), written.contains(3)),
                    (1, true),
                    "{number}"
                );
            }
        }
    }

    fn used_ring(ram: &GuestRam) -> [u8; 256] {
        let mut bytes = [0; 256];
        ram.read(USED, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_is_completed_together_is_seen_together() {
        let (mut queue, ram, _) = queue();
        let over = AtomicBool::new(false);
        let rounds = 2000u64;
        std::thread::scope(|scope| {
            let seen = scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    let index = used_index(&ram);
                    assert_eq!(index % 5, 0, "a part of five");
                }
            });
            for round in 0..rounds {
                let used = [(1, 10), (3, 30), (15, 150), (0, 0), (7, u32::MAX)];
                queue.complete_together(&used).unwrap();
                for (at, (head, len)) in (5 * round..).zip(used) {
                    assert_eq!(entry(&ram, at), (u32::from(head), len));
                }
            }
            over.store(true, Ordering::SeqCst);
            seen.join().unwrap();
        });
        assert_eq!(u64::from(used_index(&ram)), 5 * rounds);
        queue.complete_together(&[]).unwrap();
        assert_eq!(u64::from(used_index(&ram)), 5 * rounds);
    }

    #[test]
    fn a_driver_that_wants_to_be_told_in_the_middle_of_them_is() {
        for (event, wanted) in [(65_535, 0), (0, 1), (1, 1), (2, 1), (3, 0), (900, 0)] {
            let (mut queue, ram, told) = queue();
            let event: u16 = event;
            let event_addr = AVAILABLE + 4 + 2 * u64::from(SIZE);
            ram.write(event_addr, &event.to_le_bytes()).unwrap();
            queue.complete_together(&[(4, 1), (9, 2), (2, 3)]).unwrap();
            queue.notify().unwrap();
            assert_eq!(told.load(Ordering::SeqCst), wanted, "used_event {event}");
            // Nothing new, nothing told.
            queue.notify().unwrap();
            assert_eq!(told.load(Ordering::SeqCst), wanted);
        }
    }

    #[test]
    fn what_another_has_served_is_taken_over() {
        let (mut queue, ram, _) = queue();
        for at in 0..4u64 {
            ram.write(AVAILABLE + 4 + 2 * at, &(at as u16).to_le_bytes())
                .unwrap();
            ram.write(0x1000 + 16 * at + 8, &[1]).unwrap();
        }
        ram.write(AVAILABLE + 2, &4u16.to_le_bytes()).unwrap();
        let parts = queue.parts();
        assert_eq!((parts.size, parts.next_avail), (SIZE, 0));
        assert_eq!((parts.available_addr, parts.used_addr), (AVAILABLE, USED));
        // Three were used elsewhere.
        ram.write(USED + 2, &3u16.to_le_bytes()).unwrap();
        queue.served_up_to(3).unwrap();
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!(chain.head(), 3);
        queue.complete(3, 77).unwrap();
        assert_eq!(entry(&ram, 3), (3, 77));
        assert_eq!(used_index(&ram), 4);
        let progress = queue.stop();
        assert_eq!((progress.next_avail, progress.next_used), (4, 4));
    }

    #[test]
    fn who_watches_a_route_hears_of_it_until_the_queue_stops() {
        let (queue, _, _) = queue();
        let heard = Arc::new(AtomicU32::new(0));
        let count = heard.clone();
        queue.watch_route(Arc::new(move |line| {
            assert!(line.is_none(), "these wires have no direct line");
            count.fetch_add(1, Ordering::SeqCst);
        }));
        let signals = queue.signals.clone();
        signals.routes_changed();
        assert_eq!(heard.load(Ordering::SeqCst), 1);
        let _ = queue.stop();
        signals.routes_changed();
        assert_eq!(heard.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn requests_that_are_put_back_come_again() {
        let (mut queue, ram, _) = queue();
        for at in 0..4u64 {
            ram.write(AVAILABLE + 4 + 2 * at, &(at as u16).to_le_bytes())
                .unwrap();
            ram.write(0x1000 + 16 * at + 8, &[1]).unwrap();
        }
        ram.write(AVAILABLE + 2, &4u16.to_le_bytes()).unwrap();
        let mut chain = Chain::new();
        for _ in 0..3 {
            assert!(queue.pop(&mut chain).unwrap());
        }
        queue.put_back_many(2);
        let mut again = Vec::new();
        while queue.pop(&mut chain).unwrap() {
            again.push(chain.head());
        }
        assert_eq!(again, [1, 2, 3]);
    }
}
