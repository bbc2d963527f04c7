//! Serves one queue of the device.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use alveole_block_store::{Operation, Request};
use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_guest_memory::GuestBuffers;
use alveole_virtio::{BrokenRing, BusyWait, LiveQueue, Progress, QueueWorker};

use crate::device::Shared;
use crate::gather::{self, Gather};
use crate::lane::{Flight, Lane};
use crate::request::{BadRequest, Kind, ParsedRequest, Range};

const DOORBELL: Token = Token(0);
const STORE: Token = Token(1);
const TIMER: Token = Token(2);

/// VIRTIO_BLK_S_OK and its like (section 5.2.6).
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// How much longer a worker looks for what the host has in flight than for the driver's next request: a disk
/// answers within so much, or takes so long that a sleep makes no difference.
const HOST_LOOK: u32 = 4;

/// Most requests taken from one queue before other workers of the same loop have their turn. Abused by a
/// guest that keeps one disk busy on a shared loop.
const REQUESTS_PER_TURN: u32 = 1024;

/// The worker of one queue.
pub(crate) struct BlkWorker {
    queue: LiveQueue,
    lane: Arc<Mutex<Lane>>,
    shared: Arc<Shared>,
    /// A write is complete only when it is on the medium: the driver has taken no flush.
    write_through: bool,
    /// The store's own descriptor is watched.
    watches_store: bool,
    /// Looking for the driver's next request.
    driver_wait: BusyWait,
    /// Looking for that too, and for what the host has in flight.
    host_wait: BusyWait,
    gather: Gather,
    /// When this round of taking requests began: the clock is read for many at once.
    taken: Instant,
}

/// Why a round ended.
enum Pause {
    /// Nothing is available; the driver rings for the next request.
    Idle,
    /// The queue's depth is in flight, or the medium is being changed: completions come first.
    Full,
    /// The limiter grants the next request at this time from now.
    Throttled(Duration),
    /// Others first.
    Yield,
}

impl BlkWorker {
    pub(crate) fn new(
        queue: LiveQueue,
        lane: Arc<Mutex<Lane>>,
        shared: Arc<Shared>,
        write_through: bool,
        longest_look: Duration,
    ) -> Self {
        Self {
            queue,
            lane,
            shared,
            write_through,
            watches_store: false,
            driver_wait: BusyWait::new(longest_look),
            host_wait: BusyWait::new(longest_look.saturating_mul(HOST_LOOK)),
            gather: Gather::new(),
            taken: Instant::now(),
        }
    }

    /// Does all there is to do, whatever the reason for waking up was.
    fn turn(&mut self, lane: &mut Lane, ops: &mut Ops<'_>) -> Result<(), BrokenRing> {
        lane.store.stop_event();
        let mut budget = REQUESTS_PER_TURN;
        loop {
            self.work(lane, ops, &mut budget)?;
            // What completes from here on wakes us; what did before does not.
            if !lane.store.want_event() {
                return Ok(());
            }
            if budget == 0 {
                self.queue.doorbell().ring();
                return Ok(());
            }
            lane.store.stop_event();
        }
    }

    /// Works until something has to be waited for.
    fn work(
        &mut self,
        lane: &mut Lane,
        ops: &mut Ops<'_>,
        budget: &mut u32,
    ) -> Result<(), BrokenRing> {
        self.change_medium(lane, ops);
        loop {
            let pause = self.take_requests(lane, budget)?;
            self.hand_over(lane)?;
            match pause {
                Pause::Idle => {
                    if self.waits_for_more(lane) {
                        continue;
                    }
                    self.queue.notify()?;
                    if self.look_for_more(lane) {
                        continue;
                    }
                    if !self.queue.want_doorbell()? {
                        self.sleeps(lane);
                        return Ok(());
                    }
                }
                Pause::Full => {
                    self.queue.notify()?;
                    if lane.next_store.is_some() && lane.store.in_flight() == 0 {
                        self.change_medium(lane, ops);
                        continue;
                    }
                    if !self.is_full(lane) || self.look_for_more(lane) {
                        continue;
                    }
                    // The store's descriptor wakes us.
                    self.sleeps(lane);
                    return Ok(());
                }
                Pause::Throttled(wait) => {
                    self.queue.notify()?;
                    self.shared.counters.throttled.inc();
                    lane.throttled = true;
                    // A limiter that says "now" for a time too short for a timer still gets one.
                    if lane
                        .timer
                        .reset(wait.max(Duration::from_nanos(1)), None)
                        .is_err()
                    {
                        self.queue.doorbell().ring();
                    }
                    return Ok(());
                }
                Pause::Yield => {
                    self.queue.notify()?;
                    self.queue.doorbell().ring();
                    return Ok(());
                }
            }
        }
    }

    /// Whether the driver makes more requests available before it is told of what is complete. Where the host
    /// still works on some, it is told at once: the host gives them back one by one, and slowly.
    fn waits_for_more(&mut self, lane: &Lane) -> bool {
        let completed = self.queue.untold();
        if completed == 0 || lane.store.in_flight() > 0 || !self.driver_wait.may_look() {
            return false;
        }
        if self.gather.is_enough(completed) {
            self.gather.was_enough();
            return false;
        }
        let queue = &self.queue;
        let found = self
            .driver_wait
            .look_for(gather::WINDOW, || queue.has_more());
        if found {
            self.shared.counters.gathered.inc();
        } else {
            self.gather.ran_dry(completed);
        }
        found
    }

    /// Looks for the next request, or completion, instead of sleeping, where that is worth it.
    fn look_for_more(&mut self, lane: &mut Lane) -> bool {
        let (queue, store) = (&self.queue, &mut lane.store);
        let in_flight = store.in_flight();
        let may_take = lane.next_store.is_none() && in_flight < usize::from(queue.size());
        let wait = if in_flight > 0 {
            &mut self.host_wait
        } else {
            &mut self.driver_wait
        };
        let found = wait.look(|| may_take && queue.has_more() || store.has_news());
        if found {
            self.shared.counters.found.inc();
        }
        found
    }

    fn sleeps(&mut self, lane: &Lane) {
        if lane.store.in_flight() > 0 {
            self.host_wait.sleeps();
        } else {
            self.driver_wait.sleeps();
        }
    }

    fn is_full(&self, lane: &Lane) -> bool {
        lane.next_store.is_some() || lane.store.in_flight() >= usize::from(self.queue.size())
    }

    /// Takes what is available, as long as it may.
    fn take_requests(&mut self, lane: &mut Lane, budget: &mut u32) -> Result<Pause, BrokenRing> {
        self.queue.stop_doorbell()?;
        self.taken = Instant::now();
        loop {
            if self.is_full(lane) {
                return Ok(Pause::Full);
            }
            let Some(left) = budget.checked_sub(1) else {
                return Ok(Pause::Yield);
            };
            if !self.queue.pop(&mut lane.scratch.chain)? {
                return Ok(Pause::Idle);
            }
            *budget = left;
            let mut buffers = lane
                .scratch
                .spare
                .pop()
                .unwrap_or_else(|| GuestBuffers::new(self.queue.ram()));
            let read = ParsedRequest::read(
                &lane.scratch.chain,
                self.queue.ram(),
                self.shared.size_bytes(),
                &mut buffers,
                &mut lane.scratch.ranges,
            );
            match read {
                Ok(request) => {
                    if let Err(wait) = self.grant(&request) {
                        lane.scratch.spare.push(buffers);
                        self.queue.put_back();
                        return Ok(Pause::Throttled(wait));
                    }
                    self.submit(lane, request, buffers)?;
                }
                Err(bad) => {
                    lane.scratch.spare.push(buffers);
                    self.refuse(lane.scratch.chain.head(), bad)?;
                }
            }
        }
    }

    /// Asks the rate limiter. Names cost nothing, flushes no bytes.
    fn grant(&self, request: &ParsedRequest) -> Result<(), Duration> {
        if request.kind == Kind::GetId {
            return Ok(());
        }
        let bytes = match request.kind {
            Kind::Read | Kind::Write => request.len,
            _ => 0,
        };
        self.shared.limit(bytes, Instant::now)
    }

    fn submit(
        &mut self,
        lane: &mut Lane,
        request: ParsedRequest,
        buffers: GuestBuffers,
    ) -> Result<(), BrokenRing> {
        let head = lane.scratch.chain.head();
        let flight = Flight {
            head,
            status_addr: request.status_addr,
            kind: request.kind,
            len: request.len,
            since: self.taken,
            parts: 1,
            failed: false,
        };
        let read_only = self.shared.is_read_only();
        let operation = match request.kind {
            Kind::GetId => {
                let id = self.shared.id();
                let len = usize::try_from(request.len)
                    .unwrap_or(usize::MAX)
                    .min(id.len());
                buffers.copy_from(0, id.get(..len).unwrap_or(&[]));
                lane.scratch.spare.push(buffers);
                return self.finish(&flight);
            }
            // Section 5.2.6.2: nothing but reads, names and flushes on a read-only disk.
            Kind::Write | Kind::Discard | Kind::WriteZeroes if read_only => {
                lane.scratch.spare.push(buffers);
                return self.refuse(head, BadRequest::IoError(request.status_addr));
            }
            Kind::Discard | Kind::WriteZeroes => {
                lane.scratch.spare.push(buffers);
                return self.submit_ranges(lane, flight);
            }
            Kind::Read => Operation::Read,
            Kind::Write => Operation::Write {
                durable: self.write_through || !self.shared.is_writeback(),
            },
            Kind::Flush => Operation::Flush,
        };
        if request.len == 0 && request.kind != Kind::Flush {
            lane.scratch.spare.push(buffers);
            return self.finish(&flight);
        }
        let tag = lane.flights.add(flight);
        lane.store.submit(Request {
            tag,
            operation,
            offset: request.offset,
            len: request.len,
            buffers,
        });
        Ok(())
    }

    /// Every range is a request of its own to the store; the last one to come back completes the guest's.
    fn submit_ranges(&mut self, lane: &mut Lane, flight: Flight) -> Result<(), BrokenRing> {
        let parts = u32::try_from(lane.scratch.ranges.len()).unwrap_or(u32::MAX);
        if parts == 0 {
            return self.finish(&flight);
        }
        let tag = lane.flights.add(Flight { parts, ..flight });
        for Range {
            offset,
            len,
            may_unmap,
        } in lane.scratch.ranges.drain(..)
        {
            let operation = match flight.kind {
                Kind::Discard => Operation::Discard,
                _ => Operation::WriteZeroes { may_unmap },
            };
            let mut buffers = lane
                .scratch
                .spare
                .pop()
                .unwrap_or_else(|| GuestBuffers::new(self.queue.ram()));
            buffers.clear();
            lane.store.submit(Request {
                tag,
                operation,
                offset,
                len,
                buffers,
            });
        }
        Ok(())
    }

    /// Gives the host what was taken, and the guest what is complete.
    fn hand_over(&mut self, lane: &mut Lane) -> Result<(), BrokenRing> {
        let Lane { store, scratch, .. } = lane;
        if store.in_flight() > 0 {
            self.shared.counters.batches.inc();
            store.kick(&mut scratch.done);
        }
        self.finish_done(lane)
    }

    fn finish_done(&mut self, lane: &mut Lane) -> Result<(), BrokenRing> {
        let Lane {
            flights, scratch, ..
        } = lane;
        if scratch.done.is_empty() {
            return Ok(());
        }
        let done = Instant::now();
        for completion in scratch.done.drain(..) {
            if let Err(e) = &completion.result {
                self.shared.say(e);
            }
            scratch.spare.push(completion.buffers);
            let failed = completion.result.is_err();
            if let Some(flight) = flights.part_done(completion.tag, failed) {
                let took = done.saturating_duration_since(flight.since);
                self.shared.counters.took(flight.kind, took);
                self.finish(&flight)?;
            }
        }
        Ok(())
    }

    /// Answers the guest.
    fn finish(&mut self, flight: &Flight) -> Result<(), BrokenRing> {
        let counters = &self.shared.counters;
        let status = if flight.failed {
            counters.errors.inc();
            IO_ERROR
        } else {
            match flight.kind {
                Kind::Read => {
                    counters.reads.inc();
                    counters.bytes_read.add(flight.len);
                }
                Kind::Write => {
                    counters.writes.inc();
                    counters.bytes_written.add(flight.len);
                }
                Kind::Flush => counters.flushes.inc(),
                Kind::Discard | Kind::WriteZeroes => counters.ranges.inc(),
                Kind::GetId => {}
            }
            OK
        };
        // The status byte is the last that is written, whatever came before it.
        let written = match flight.kind {
            Kind::Read | Kind::GetId => flight.len.saturating_add(1),
            _ => 1,
        };
        self.answer(flight.head, flight.status_addr, status, written)
    }

    fn refuse(&mut self, head: u16, bad: BadRequest) -> Result<(), BrokenRing> {
        match bad {
            BadRequest::NoAnswer(why) => Err(BrokenRing::NoRequest { head, why }),
            BadRequest::IoError(addr) => {
                self.shared.counters.errors.inc();
                self.answer(head, addr, IO_ERROR, 1)
            }
            BadRequest::Unsupported(addr) => {
                self.shared.counters.unsupported.inc();
                self.answer(head, addr, UNSUPPORTED, 1)
            }
        }
    }

    fn answer(&mut self, head: u16, addr: u64, status: u8, written: u64) -> Result<(), BrokenRing> {
        self.queue
            .ram()
            .write(addr, &[status])
            .map_err(|_| BrokenRing::NoMemory)?;
        self.queue
            .complete(head, u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Takes over a new way to the store, once nothing is in flight on the old one.
    fn change_medium(&mut self, lane: &mut Lane, ops: &mut Ops<'_>) {
        if lane.store.in_flight() > 0 {
            return;
        }
        let Some(next) = lane.next_store.take() else {
            return;
        };
        if self.watches_store {
            self.watches_store = false;
            // Fails only for what is not watched.
            let _ = ops.unwatch(STORE);
        }
        lane.store = next;
        if let Err(e) = self.watch_store(lane, ops) {
            log::error!(
                "{}: the new medium cannot be watched: {e}",
                self.shared.counters_name()
            );
        }
    }

    fn watch_store(&mut self, lane: &Lane, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        if let Some(fd) = lane.store.event_fd() {
            ops.watch(&fd, STORE, Interest::READABLE | Interest::EDGE)?;
            self.watches_store = true;
        }
        Ok(())
    }
}

impl Worker for BlkWorker {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        let lane = self.lane.clone();
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        ops.watch(
            self.queue.doorbell().event_fd(),
            DOORBELL,
            Interest::READABLE | Interest::EDGE,
        )?;
        ops.watch(&lane.timer, TIMER, Interest::READABLE | Interest::EDGE)?;
        lane.served = true;
        self.watch_store(&lane, ops)
    }

    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        let lane = self.lane.clone();
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = &mut *lane;
        lane.throttled = false;
        self.driver_wait.wakes();
        self.host_wait.wakes();
        if event.token == STORE {
            lane.store.collect(&mut lane.scratch.done);
        }
        if self.queue.is_broken() {
            // What the host still gives back is nobody's any more.
            lane.scratch.done.clear();
            return;
        }
        let turn = match self.finish_done(lane) {
            Ok(()) => self.turn(lane, ops),
            broken => broken,
        };
        if let Err(why) = turn {
            self.queue.fail(why);
        }
    }
}

impl QueueWorker for BlkWorker {
    fn stop(mut self: Box<Self>) -> Vec<Progress> {
        let lane = self.lane.clone();
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        let lane = &mut *lane;
        let Lane { store, scratch, .. } = lane;
        store.drain(&mut scratch.done);
        if !self.queue.is_broken() {
            let told = self.finish_done(lane).and_then(|()| self.queue.notify());
            if let Err(why) = told {
                self.queue.fail(why);
            }
        }
        lane.scratch.done.clear();
        lane.flights = Default::default();
        lane.scratch.spare.clear();
        lane.served = false;
        if let Some(next) = lane.next_store.take() {
            lane.store = next;
        }
        let _ = lane.timer.clear();
        lane.throttled = false;
        vec![self.queue.stop()]
    }

    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }
}
