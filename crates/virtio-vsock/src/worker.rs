//! Serves the queues of the device.
//!
//! All three queues and all connections are one piece of work, and usually one worker does it. But queues can be
//! reset, and come back, one by one, and then several workers share them. One of these is the host: it
//! watches the sockets and does all the work. The others wake it when their queue's doorbell rings; when the host
//! is stopped, the next one that is called takes its place.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_guest_memory::{GuestBuffers, GuestRam};
use alveole_virtio::{BrokenRing, Chain, LiveQueue, Progress, QueueWorker};
use vmm_sys_util::eventfd::EventFd;

use crate::board::{self, Board, Output};
use crate::packet::{BadPacket, push_all, read_packet};
use crate::{HEADER_BYTES, PACKETS_PER_TURN};

/// Numbers of the queues (section 5.10.2).
pub(crate) const RX: usize = 0;
pub(crate) const TX: usize = 1;
pub(crate) const EVENT: usize = 2;
pub(crate) const QUEUES: usize = 3;

/// The doorbell of the receive queue.
const RX_BELL: Token = Token(RX as u32);
/// What wakes the host when another worker's doorbell has rung. Tokens below are doorbells.
const WAKE: Token = Token(QUEUES as u32);

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How long a guest has for what it does when it is told that its connections are gone. Drivers that do not say when they have done it
/// get what is for them after that.
const SETTLE_PATIENCE: Duration = Duration::from_millis(100);
/// Between two looks at whether it has.
const SETTLE_LOOK: Duration = Duration::from_micros(300);

/// A guest that was told that its connections are gone. Linux ends all that it has when it comes to that, also one that has begun since
/// (net/vmw_vsock/virtio_transport.c, `virtio_vsock_event_handle`), and then offers the event's buffer again. Until then it is given nothing.
struct Settling {
    until: Instant,
    /// What it had offered for events before.
    offered: u16,
}

/// What outlives a stop, and the queues while they are served.
pub(crate) struct Hub {
    pub(crate) board: Board,
    pub(crate) rings: [Option<LiveQueue>; QUEUES],
    /// The guest has to be told that its connections are gone.
    pub(crate) transport_was_reset: bool,
    settling: Option<Settling>,
    wake: EventFd,
    /// Which worker is the host.
    host: Option<u64>,
    next_worker: u64,
}

/// Which queue a driver has broken, and how.
type Broken = (usize, BrokenRing);

impl Hub {
    pub(crate) fn new(board: Board, wake: EventFd) -> Self {
        Self {
            board,
            rings: [const { None }; QUEUES],
            transport_was_reset: false,
            settling: None,
            wake,
            host: None,
            next_worker: 0,
        }
    }

    fn is_broken(&self) -> bool {
        self.rings.iter().flatten().any(LiveQueue::is_broken)
    }

    /// Does all there is to do, whatever the reason for waking up was.
    fn turn(&mut self, scratch: &mut Scratch, ops: &mut Ops<'_>) -> Result<(), Broken> {
        let mut budget = PACKETS_PER_TURN;
        self.tell_of_reset(scratch)?;
        loop {
            self.take(scratch, &mut budget, ops)?;
            self.give(scratch, &mut budget, ops)?;
            let [rx, tx, _] = &mut self.rings;
            for (index, ring) in [(TX, &mut *tx), (RX, &mut *rx)] {
                if let Some(ring) = ring {
                    ring.notify().map_err(|why| (index, why))?;
                }
            }
            if budget == 0 {
                // Others first.
                let _ = self.wake.write(1);
                return Ok(());
            }
            // A guest that takes no answers, or gives no buffers, is heard again when it does.
            let mut more = false;
            if let Some(tx) = tx
                && !self.board.is_clogged()
            {
                more |= tx.want_doorbell().map_err(|why| (TX, why))?;
            }
            if let Some(rx) = rx
                && self.settling.is_none()
                && self.board.has_output()
            {
                more |= rx.want_doorbell().map_err(|why| (RX, why))?;
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// Looks whether the guest gives proper buffers, though nobody may want one now: it learns of its mistake when
    /// it makes it.
    fn look_at_rooms(&mut self, scratch: &mut Scratch) -> Result<(), Broken> {
        let [Some(rx), _, _] = &mut self.rings else {
            return Ok(());
        };
        if rx.pop(&mut scratch.chain).map_err(|why| (RX, why))? {
            rx.put_back();
        }
        Ok(())
    }

    fn tell_of_reset(&mut self, scratch: &mut Scratch) -> Result<(), Broken> {
        let [_, _, Some(ring)] = &mut self.rings else {
            return Ok(());
        };
        let broken = |why| (EVENT, why);
        if self.transport_was_reset {
            let offered = ring.offered().map_err(broken)?;
            let told = scratch.tell_of_reset(ring).map_err(broken)?;
            self.transport_was_reset = !told;
            let until = Instant::now().checked_add(SETTLE_PATIENCE);
            self.settling = until
                .filter(|_| told)
                .map(|until| Settling { until, offered });
        }
        let Some(settling) = &self.settling else {
            return Ok(());
        };
        let now = Instant::now();
        if now >= settling.until || ring.offered().map_err(broken)? != settling.offered {
            self.settling = None;
        } else if let Some(look) = now.checked_add(SETTLE_LOOK) {
            self.board.look_at(look);
        }
        Ok(())
    }

    /// Forgets what guests are told that go on elsewhere, as the driver begins anew.
    pub(crate) fn clear(&mut self) {
        self.board.clear();
        self.transport_was_reset = false;
        self.settling = None;
    }

    /// Takes packets that the guest sends.
    fn take(
        &mut self,
        scratch: &mut Scratch,
        budget: &mut u32,
        ops: &mut Ops<'_>,
    ) -> Result<(), Broken> {
        let [_, Some(tx), _] = &mut self.rings else {
            return Ok(());
        };
        let board = &mut self.board;
        scratch
            .take(tx, board, budget, ops)
            .map_err(|why| (TX, why))
    }

    /// Gives the guest what there is for it.
    fn give(
        &mut self,
        scratch: &mut Scratch,
        budget: &mut u32,
        ops: &mut Ops<'_>,
    ) -> Result<(), Broken> {
        let [Some(rx), _, _] = &mut self.rings else {
            return Ok(());
        };
        if self.settling.is_some() {
            return Ok(());
        }
        let board = &mut self.board;
        scratch
            .give(rx, board, budget, ops)
            .map_err(|why| (RX, why))
    }
}

/// Memory for one round of work.
struct Scratch {
    chain: Chain,
    /// Data of a packet.
    data: GuestBuffers,
    /// Where headers of packets to the guest go, one behind the other.
    headers: GuestBuffers,
    /// The chains they are in, and how much data each takes.
    chains: Vec<(u16, u64)>,
}

impl Scratch {
    fn new(ram: &GuestRam) -> Self {
        Self {
            chain: Chain::new(),
            data: GuestBuffers::new(ram),
            headers: GuestBuffers::new(ram),
            chains: Vec::new(),
        }
    }

    /// Whether there was a buffer for it.
    fn tell_of_reset(&mut self, ring: &mut LiveQueue) -> Result<bool, BrokenRing> {
        if !ring.pop(&mut self.chain)? {
            ring.want_doorbell()?;
            // One that came in between rings for itself no more.
            if !ring.pop(&mut self.chain)? {
                return Ok(false);
            }
        }
        let head = self.chain.head();
        self.data.clear();
        let room = self.chain.writable();
        push_all(&mut self.data, room, 0, TRANSPORT_RESET.len() as u64).ok_or(
            BrokenRing::NoRequest {
                head,
                why: "it has no room for an event",
            },
        )?;
        self.data.copy_from(0, &TRANSPORT_RESET);
        ring.complete(head, TRANSPORT_RESET.len() as u32)?;
        ring.notify()?;
        Ok(true)
    }

    fn take(
        &mut self,
        tx: &mut LiveQueue,
        board: &mut Board,
        budget: &mut u32,
        ops: &mut Ops<'_>,
    ) -> Result<(), BrokenRing> {
        tx.stop_doorbell()?;
        // Section 5.10.6.1: as long as there is room for what has to be answered.
        while !board.is_clogged() {
            let Some(left) = budget.checked_sub(1) else {
                return Ok(());
            };
            if !tx.pop(&mut self.chain)? {
                return Ok(());
            }
            *budget = left;
            let head = self.chain.head();
            match read_packet(&self.chain, tx.ram(), &mut self.data) {
                Ok(header) => board.packet(&header, &self.data, ops),
                Err(BadPacket::NoData(header)) => board.bad_packet(&header, ops),
                Err(BadPacket::NoHeader(why)) => return Err(BrokenRing::NoRequest { head, why }),
            }
            tx.complete(head, 0)?;
        }
        Ok(())
    }

    fn give(
        &mut self,
        rx: &mut LiveQueue,
        board: &mut Board,
        budget: &mut u32,
        ops: &mut Ops<'_>,
    ) -> Result<(), BrokenRing> {
        rx.stop_doorbell()?;
        while board.has_output() {
            let Some(left) = budget.checked_sub(1) else {
                return Ok(());
            };
            self.headers.clear();
            self.data.clear();
            self.chains.clear();
            if !self.take_room(rx)? {
                board.counters().no_buffer.inc();
                return Ok(());
            }
            *budget = left;
            match board.next_output() {
                None => rx.put_back(),
                Some(Output::Control(header)) => {
                    self.headers.copy_from(0, &header.to_bytes());
                    rx.complete(self.chain.head(), HEADER_BYTES as u32)?;
                    board.counters().packets_to_guest.inc();
                }
                Some(Output::Data(at)) => {
                    self.take_rooms(rx, board.turn_of(at))?;
                    let len = board.receive(at, &self.data, ops);
                    let used = self.finish(rx, board, at, len)?;
                    *budget = budget.saturating_sub(used.saturating_sub(1));
                }
            }
        }
        Ok(())
    }

    /// Takes one buffer of the guest, for a header and perhaps data.
    fn take_room(&mut self, rx: &mut LiveQueue) -> Result<bool, BrokenRing> {
        if !rx.pop(&mut self.chain)? {
            return Ok(false);
        }
        let no_room = |why| BrokenRing::NoRequest {
            head: self.chain.head(),
            why,
        };
        let header = HEADER_BYTES as u64;
        if !self.chain.readable().is_empty() || self.chain.writable_bytes() <= header {
            return Err(no_room("it has no room for a packet"));
        }
        push_all(&mut self.headers, self.chain.writable(), 0, header)
            .ok_or_else(|| no_room("its buffer is not in guest memory"))?;
        Ok(true)
    }

    /// Takes room for so many bytes in at most so many buffers, of which the first is taken.
    fn take_rooms(
        &mut self,
        rx: &mut LiveQueue,
        (bytes, buffers): (u64, usize),
    ) -> Result<(), BrokenRing> {
        let mut left = bytes;
        loop {
            let header = HEADER_BYTES as u64;
            let len = self.chain.writable_bytes().saturating_sub(header).min(left);
            let head = self.chain.head();
            push_all(&mut self.data, self.chain.writable(), header, len).ok_or(
                BrokenRing::NoRequest {
                    head,
                    why: "its buffer is not in guest memory",
                },
            )?;
            self.chains.push((head, len));
            left = left.saturating_sub(len);
            if left == 0 || self.chains.len() >= buffers || !self.take_room(rx)? {
                return Ok(());
            }
        }
    }

    /// Gives the guest `len` bytes that lie in its buffers, and keeps the buffers that are left. How many packets it
    /// took.
    fn finish(
        &mut self,
        rx: &mut LiveQueue,
        board: &mut Board,
        at: usize,
        len: u64,
    ) -> Result<u32, BrokenRing> {
        let (mut left, mut offset, mut used) = (len, 0u64, 0u32);
        for (head, room) in self.chains.drain(..) {
            let now = room.min(left);
            if now == 0 {
                rx.put_back();
                continue;
            }
            self.headers.copy_from(offset, &board.data_header(at, now));
            let written = now.saturating_add(HEADER_BYTES as u64);
            rx.complete(head, u32::try_from(written).unwrap_or(u32::MAX))?;
            board.counters().packets_to_guest.inc();
            used = used.saturating_add(1);
            left = left.saturating_sub(now);
            offset = offset.saturating_add(HEADER_BYTES as u64);
        }
        if len > 0 {
            board.turn_is_over(at);
        }
        Ok(used)
    }
}

/// Serves some of the queues.
pub(crate) struct VsockWorker {
    hub: Arc<Mutex<Hub>>,
    id: u64,
    queues: Vec<u16>,
    scratch: Scratch,
}

pub(crate) fn lock(hub: &Mutex<Hub>) -> MutexGuard<'_, Hub> {
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VsockWorker {
    /// Gives the queues to the hub, and makes a worker for them.
    pub(crate) fn new(hub: &Arc<Mutex<Hub>>, ram: &GuestRam, queues: Vec<LiveQueue>) -> Self {
        let mut locked = lock(hub);
        let id = locked.next_worker;
        locked.next_worker = id.wrapping_add(1);
        let numbers = queues.iter().map(LiveQueue::index).collect();
        for queue in queues {
            if let Some(place) = locked.rings.get_mut(usize::from(queue.index())) {
                *place = Some(queue);
            }
        }
        drop(locked);
        Self {
            hub: hub.clone(),
            id,
            queues: numbers,
            scratch: Scratch::new(ram),
        }
    }

    /// Becomes the host, if nobody is. False if somebody else is.
    fn is_host(&self, hub: &mut Hub, ops: &mut Ops<'_>) -> bool {
        if hub.host.is_none() {
            hub.host = Some(self.id);
            let woken = Interest::READABLE | Interest::EDGE;
            if let Err(e) = ops.watch(&hub.wake, WAKE, woken) {
                log::error!("vsock: workers cannot wake each other: {e}");
            }
            hub.board.hosted(ops);
        }
        hub.host == Some(self.id)
    }
}

impl Worker for VsockWorker {
    fn name(&self) -> &'static str {
        "virtio-vsock"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        let hub = self.hub.clone();
        let mut hub = lock(&hub);
        for queue in &self.queues {
            if let Some(Some(ring)) = hub.rings.get(usize::from(*queue)) {
                let bell = ring.doorbell().event_fd();
                let token = Token(u32::from(*queue));
                ops.watch(bell, token, Interest::READABLE | Interest::EDGE)?;
            }
        }
        if self.is_host(&mut hub, ops) && hub.transport_was_reset {
            // It is told at once, before anybody connects.
            let _ = hub.wake.write(1);
        }
        Ok(())
    }

    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        let hub = self.hub.clone();
        let mut hub = lock(&hub);
        let hub = &mut *hub;
        if !self.is_host(hub, ops) {
            let _ = hub.wake.write(1);
            return;
        }
        if hub.is_broken() {
            // Clients wait until the driver has reset the device.
            hub.board.stop_listening(ops);
            return;
        }
        let mut seen = Ok(());
        match event.token {
            board::LISTENER => hub.board.accept(ops),
            board::TIMER => hub.board.tick(ops),
            RX_BELL => seen = hub.look_at_rooms(&mut self.scratch),
            token => {
                if let Some(at) = Board::place_of(token) {
                    hub.board.socket_event(at, event.ready, ops);
                }
            }
        }
        let turn = seen.and_then(|()| hub.turn(&mut self.scratch, ops));
        if let Err((queue, why)) = turn {
            hub.board.stop_listening(ops);
            if let Some(Some(ring)) = hub.rings.get_mut(queue) {
                ring.fail(why);
            }
        }
    }
}

impl QueueWorker for VsockWorker {
    fn stop(self: Box<Self>) -> Vec<Progress> {
        let mut hub = lock(&self.hub);
        if hub.host == Some(self.id) {
            hub.host = None;
            hub.board.unhosted();
        }
        self.queues
            .iter()
            .filter_map(|queue| hub.rings.get_mut(usize::from(*queue))?.take())
            .map(LiveQueue::stop)
            .collect()
    }

    fn queues(&self) -> Vec<u16> {
        self.queues.clone()
    }
}
