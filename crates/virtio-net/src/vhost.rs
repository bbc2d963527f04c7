//! A pair of queues that the host's kernel serves (vhost-net): set up, interrupted for, and taken back here. Frames do
//! not come by.
//!
//! The kernel has a ring while the link is up and the pair is in use. It interrupts the driver itself where the
//! transport has a line for that; else it wakes the worker, which interrupts, as a register has to say what for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_interrupts::IrqLine;
use alveole_net_link::{Received, Ring, RingPlan, VhostNet};
use alveole_virtio::{BrokenRing, Chain, LiveQueue, Progress, QueueWorker, RingParts};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::FRAMES_PER_TURN;
use crate::lane::Lane;
use crate::shared::{Shared, lock};
use crate::worker::{MOST_STALE, set_up_link};

/// Of each ring, from its number times `TOKENS` on.
const CALL: u32 = 0;
const ERROR: u32 = 1;
const TIMER: u32 = 2;
const BELL: u32 = 3;
const TOKENS: u32 = 4;

fn token(ring: Ring, what: u32) -> Token {
    let first = if ring == Ring::Rx { 0 } else { TOKENS };
    Token(first.saturating_add(what))
}

/// What the kernel serves a pair with, and by what it speaks. Belongs to the device, lent to its worker.
pub(crate) struct Vhost {
    net: VhostNet,
    rx: Events,
    tx: Events,
}

struct Events {
    /// Written for an interrupt that takes more than an edge.
    call: EventFd,
    /// Written when the kernel gives the ring up.
    error: EventFd,
    /// The descriptor that the kernel was given last for interrupts.
    calls: Option<RawFd>,
}

impl Events {
    fn new() -> io::Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Self {
            call: eventfd()?,
            error: eventfd()?,
            calls: None,
        })
    }
}

impl Vhost {
    pub(crate) fn new(net: VhostNet) -> io::Result<Self> {
        Ok(Self {
            net,
            rx: Events::new()?,
            tx: Events::new()?,
        })
    }

    fn events(&self, ring: Ring) -> &Events {
        match ring {
            Ring::Rx => &self.rx,
            Ring::Tx => &self.tx,
        }
    }

    fn events_mut(&mut self, ring: Ring) -> &mut Events {
        match ring {
            Ring::Rx => &mut self.rx,
            Ring::Tx => &mut self.tx,
        }
    }

    fn start(&mut self, ring: Ring, queue: &LiveQueue, features: u64) -> io::Result<()> {
        let RingParts {
            size,
            descriptors_addr,
            available_addr,
            used_addr,
            next_avail,
        } = queue.parts();
        let line = queue.direct();
        let Self { net, rx, tx } = self;
        let events = match ring {
            Ring::Rx => rx,
            Ring::Tx => tx,
        };
        let call = line.as_ref().map_or(&events.call, IrqLine::event_fd);
        events.calls = Some(call.as_raw_fd());
        let plan = RingPlan {
            size,
            descriptors_addr,
            available_addr,
            used_addr,
            next_avail,
            kick: queue.doorbell().event_fd(),
            call,
            error: &events.error,
        };
        net.start(ring, &plan, features, queue.ram())?;
        // What came while nobody listened.
        queue.doorbell().ring();
        Ok(())
    }

    /// The driver has changed how it wants to be interrupted.
    fn set_line(&mut self, ring: Ring, line: Option<&IrqLine>) -> io::Result<()> {
        if !self.net.is_running(ring) {
            return Ok(());
        }
        let events = self.events(ring);
        let call = line.map_or(&events.call, IrqLine::event_fd);
        let fd = call.as_raw_fd();
        if events.calls == Some(fd) {
            return Ok(());
        }
        self.net.set_call(ring, call)?;
        self.events_mut(ring).calls = Some(fd);
        Ok(())
    }

    /// Takes both rings back, before the driver is told that it uses fewer pairs. Its worker finds out.
    pub(crate) fn stop(&mut self) -> io::Result<()> {
        self.net.stop(Ring::Rx)?;
        self.net.stop(Ring::Tx)
    }
}

/// One queue of the pair.
struct Half {
    ring: Ring,
    queue: LiveQueue,
    /// The kernel has it, or had when we looked last.
    is_lent: bool,
}

/// The worker of one such pair, or of the half of it that the driver has enabled.
pub(crate) struct VhostWorker {
    pair: u16,
    features: u64,
    halves: Vec<Half>,
    lane: Arc<Mutex<Lane>>,
    /// All pairs', for who sets the link up for a new driver.
    lanes: Vec<Arc<Mutex<Lane>>>,
    shared: Arc<Shared>,
    link_was_up: bool,
    is_broken: bool,
}

impl VhostWorker {
    pub(crate) fn new(
        pair: u16,
        features: u64,
        (rx, tx): (Option<LiveQueue>, Option<LiveQueue>),
        lane: Arc<Mutex<Lane>>,
        lanes: Vec<Arc<Mutex<Lane>>>,
        shared: Arc<Shared>,
    ) -> Self {
        let half = |ring| {
            move |queue| Half {
                ring,
                queue,
                is_lent: false,
            }
        };
        let rx = rx.map(half(Ring::Rx)).into_iter();
        Self {
            pair,
            features,
            halves: rx.chain(tx.map(half(Ring::Tx))).collect(),
            lane,
            lanes,
            link_was_up: shared.link_is_up(),
            shared,
            is_broken: false,
        }
    }

    /// Lends the queues to the kernel or takes them back, as link and driver want it now.
    fn settle(&mut self, lane: &mut Lane) {
        let is_up = self.shared.link_is_up();
        let wanted = is_up && self.shared.is_active(self.pair);
        let came_up = is_up && !self.link_was_up;
        self.link_was_up = is_up;
        if self.is_broken {
            return;
        }
        if came_up && self.halves.iter().any(|half| half.ring == Ring::Rx) {
            discard(lane, &self.shared);
        }
        for at in 0..self.halves.len() {
            let done = self.settle_half(at, wanted, is_up, lane);
            if let Err(why) = done {
                self.give_up(at, why, lane);
                return;
            }
        }
    }

    fn settle_half(
        &mut self,
        at: usize,
        wanted: bool,
        is_up: bool,
        lane: &mut Lane,
    ) -> Result<(), BrokenRing> {
        let (Some(half), Some(vhost)) = (self.halves.get_mut(at), lane.vhost.as_mut()) else {
            return Ok(());
        };
        let failed = |e: io::Error| {
            self.shared
                .say("the host's kernel does not serve a queue (vhost)", &e);
            BrokenRing::GivenUp
        };
        if half.is_lent && !wanted {
            vhost.net.stop(half.ring).map_err(failed)?;
        }
        // Also what was taken back behind our back.
        if half.is_lent && !vhost.net.is_running(half.ring) {
            half.is_lent = false;
            half.take_over(vhost)?;
        }
        if !half.is_lent && wanted {
            // The kernel would say nothing of it before a frame comes.
            half.queue.check_index()?;
            vhost
                .start(half.ring, &half.queue, self.features)
                .map_err(failed)?;
            half.is_lent = true;
            self.shared.counters.vhost_starts.inc();
        }
        if half.ring == Ring::Tx && !is_up {
            drop_sent(&mut half.queue, &self.shared)?;
        }
        Ok(())
    }

    /// A ring is broken: the kernel gets neither again before a reset.
    fn give_up(&mut self, at: usize, why: BrokenRing, lane: &mut Lane) {
        self.is_broken = true;
        if let Some(half) = self.halves.get_mut(at) {
            half.queue.fail(why);
        }
        self.take_back(lane);
    }

    fn take_back(&mut self, lane: &mut Lane) {
        let Some(vhost) = &mut lane.vhost else {
            return;
        };
        for half in &mut self.halves {
            if let Err(e) = vhost.net.stop(half.ring) {
                self.shared.say("vhost does not give a queue back", &e);
            }
            if std::mem::take(&mut half.is_lent)
                && let Err(why) = half.take_over(vhost)
                && !half.queue.is_broken()
            {
                half.queue.fail(why);
            }
        }
    }

    fn watch(half: &Half, lane: &Lane, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        let Some(vhost) = &lane.vhost else {
            return Ok(());
        };
        let events = vhost.events(half.ring);
        let edge = Interest::READABLE | Interest::EDGE;
        ops.watch(&events.call, token(half.ring, CALL), edge)?;
        ops.watch(&events.error, token(half.ring, ERROR), edge)?;
        match half.ring {
            Ring::Rx => ops.watch(&lane.rx_timer, token(Ring::Rx, TIMER), edge),
            Ring::Tx => ops.watch(&lane.tx_timer, token(Ring::Tx, TIMER), edge),
        }
    }

    /// The bell of what is sent is the kernel's while it serves, and ours while frames are dropped.
    fn listen(&self, was_lent: bool, ops: &mut Ops<'_>) {
        let Some(half) = self.halves.iter().find(|half| half.ring == Ring::Tx) else {
            return;
        };
        let bell = token(Ring::Tx, BELL);
        let changed = match (was_lent, half.is_lent) {
            (true, false) => ops.watch(
                half.queue.doorbell().event_fd(),
                bell,
                Interest::READABLE | Interest::EDGE,
            ),
            (false, true) => ops.unwatch(bell),
            _ => Ok(()),
        };
        if let Err(e) = changed {
            log::error!("{}: {e}", self.shared.name());
        }
    }

    fn sends_lent(&self) -> bool {
        let mut sends = self.halves.iter().filter(|half| half.ring == Ring::Tx);
        sends.all(|half| half.is_lent)
    }

    fn turn(&mut self, lane: &mut Lane, ops: &mut Ops<'_>) {
        let was_lent = self.sends_lent();
        self.settle(lane);
        self.listen(was_lent, ops);
    }

    /// Has the transport say when the driver wants its interrupts another way.
    fn follow_routes(&self) {
        for half in &self.halves {
            // Weak: what is told of belongs to what tells.
            let (lane, shared) = (Arc::downgrade(&self.lane), Arc::downgrade(&self.shared));
            let ring = half.ring;
            half.queue.watch_route(Arc::new(move |line| {
                let (Some(lane), Some(shared)) = (lane.upgrade(), shared.upgrade()) else {
                    return;
                };
                if let Some(vhost) = &mut lock(&lane).vhost
                    && let Err(e) = vhost.set_line(ring, line.as_ref())
                {
                    shared.say("vhost cannot be told how to interrupt", &e);
                }
            }));
        }
    }
}

impl Half {
    /// The kernel does not serve the queue any more: goes on where it stopped.
    fn take_over(&mut self, vhost: &Vhost) -> Result<(), BrokenRing> {
        self.queue.served_up_to(vhost.net.position(self.ring))?;
        // One may be on its way to the worker, which is about to go. One too many does no harm.
        let events = vhost.events(self.ring);
        if events.calls == Some(events.call.as_raw_fd()) {
            self.queue.interrupt();
        }
        Ok(())
    }
}

/// A cable that is out loses what is sent.
fn drop_sent(queue: &mut LiveQueue, shared: &Shared) -> Result<(), BrokenRing> {
    let mut chain = Chain::new();
    let mut budget = FRAMES_PER_TURN;
    loop {
        while queue.pop(&mut chain)? {
            let Some(left) = budget.checked_sub(1) else {
                queue.put_back();
                queue.notify()?;
                queue.doorbell().ring();
                return Ok(());
            };
            budget = left;
            shared.counters.tx_link_down.inc();
            queue.complete(chain.head(), 0)?;
        }
        queue.notify()?;
        if !queue.want_doorbell()? {
            return Ok(());
        }
    }
}

/// Throws away what came while the link was down, before the kernel takes it for new.
fn discard(lane: &mut Lane, shared: &Shared) {
    for _ in 0..MOST_STALE {
        match lane.link.receive_kept(lane.kept.room()) {
            Ok(Received::Frame(_) | Received::TooLong) => shared.counters.rx_link_down.inc(),
            _ => return,
        }
    }
}

impl Worker for VhostWorker {
    fn name(&self) -> &'static str {
        "virtio-net vhost"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        let lane = self.lane.clone();
        let mut lane = lock(&lane);
        if self.pair == 0 {
            set_up_link(&mut lane, &self.lanes, &self.shared);
        }
        for half in &self.halves {
            // From an earlier driver.
            if let Some(vhost) = &lane.vhost {
                let _ = vhost.events(half.ring).call.read();
                let _ = vhost.events(half.ring).error.read();
            }
            Self::watch(half, &lane, ops)?;
        }
        self.follow_routes();
        // As if it had been lent: whoever has the bell now, it is not us yet.
        self.settle(&mut lane);
        self.listen(true, ops);
        Ok(())
    }

    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        if self.is_broken {
            return;
        }
        for at in 0..self.halves.len() {
            let Some(half) = self.halves.get(at) else {
                continue;
            };
            if event.token == token(half.ring, CALL) {
                self.shared.counters.vhost_interrupts.inc();
                half.queue.interrupt();
                return;
            }
            if event.token == token(half.ring, ERROR) {
                let lane = self.lane.clone();
                let mut lane = lock(&lane);
                let was_lent = self.sends_lent();
                self.give_up(at, BrokenRing::GivenUp, &mut lane);
                self.listen(was_lent, ops);
                return;
            }
        }
        let lane = self.lane.clone();
        let mut lane = lock(&lane);
        self.turn(&mut lane, ops);
    }
}

impl QueueWorker for VhostWorker {
    fn stop(mut self: Box<Self>) -> Vec<Progress> {
        let lane = self.lane.clone();
        let mut lane = lock(&lane);
        self.take_back(&mut lane);
        let _ = lane.rx_timer.clear();
        let _ = lane.tx_timer.clear();
        let halves = self.halves.drain(..);
        halves.map(|half| half.queue.stop()).collect()
    }

    fn queues(&self) -> Vec<u16> {
        self.halves.iter().map(|half| half.queue.index()).collect()
    }

    fn seat(&self) -> u16 {
        self.pair
    }
}
