//! Serves one pair of queues: both directions of one way to the link.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_virtio::{BrokenRing, BusyWait, LiveQueue, Progress, QueueWorker};
use vmm_sys_util::timerfd::TimerFd;

use crate::lane::Lane;
use crate::receive::{Rx, RxPause};
use crate::shared::{Shared, lock};
use crate::transmit::{Tx, TxPause};
use crate::{FRAMES_PER_TURN, RX_FRAMES_PER_BURST, TX_FRAMES_PER_BURST};

const RX_BELL: Token = Token(0);
const TX_BELL: Token = Token(1);
const RX_TIMER: Token = Token(2);
const TX_TIMER: Token = Token(3);
const READABLE: Token = Token(4);
const WRITABLE: Token = Token(5);

/// Most frames thrown away when a link goes up: more than a tap's queue holds.
pub(crate) const MOST_STALE: u32 = 4096;

/// The worker of one pair, or of the half of it that the driver has enabled. Each descriptor belongs to one half, so
/// that two workers may serve a pair after one of its queues was reset.
pub(crate) struct PairWorker {
    pair: u16,
    rx: Option<Rx>,
    tx: Option<Tx>,
    lane: Arc<Mutex<Lane>>,
    /// All pairs', for who sets the link up for a new driver.
    lanes: Vec<Arc<Mutex<Lane>>>,
    shared: Arc<Shared>,
    wait: BusyWait,
    watches_writable: bool,
    link_was_up: bool,
    is_broken: bool,
}

impl PairWorker {
    pub(crate) fn new(
        pair: u16,
        halves: (Option<Rx>, Option<Tx>),
        lane: Arc<Mutex<Lane>>,
        lanes: Vec<Arc<Mutex<Lane>>>,
        shared: Arc<Shared>,
        longest_look: Duration,
    ) -> Self {
        let (rx, tx) = halves;
        Self {
            pair,
            rx,
            tx,
            lane,
            lanes,
            link_was_up: shared.link_is_up(),
            shared,
            wait: BusyWait::new(longest_look),
            watches_writable: false,
            is_broken: false,
        }
    }

    /// Does all there is to do, whatever the reason for waking up was.
    fn turn(&mut self, lane: &mut Lane, ops: &mut Ops<'_>) -> Result<(), Broken> {
        self.see_link(lane);
        for queue in self.queues_mut() {
            unless_broken(queue, LiveQueue::stop_doorbell)?;
        }
        let mut left = FRAMES_PER_TURN;
        loop {
            let Round { rx, tx, moved } = self.round(lane)?;
            left = left.saturating_sub(moved);
            if moved > 0 {
                self.shared.counters.batches.inc();
            }
            if left == 0 {
                self.come_back();
                return Ok(());
            }
            if rx == Some(RxPause::Budget) || tx == Some(TxPause::Budget) {
                continue;
            }
            if self.look_for_more(lane, rx, tx)? {
                self.shared.counters.found.inc();
                continue;
            }
            if self.want_doorbells(rx, tx)? {
                continue;
            }
            if let Some(RxPause::Until(wait) | RxPause::Waits(wait)) = rx {
                self.set_timer(&mut lane.rx_timer, wait);
            }
            if let Some(TxPause::Until(wait)) = tx {
                self.set_timer(&mut lane.tx_timer, wait);
            }
            self.watch_writable(tx == Some(TxPause::Blocked), lane, ops);
            self.wait.sleeps();
            return Ok(());
        }
    }

    /// A burst in each direction, and what the driver is told of it.
    fn round(&mut self, lane: &mut Lane) -> Result<Round, Broken> {
        let (mut rx_budget, mut tx_budget) = (RX_FRAMES_PER_BURST, TX_FRAMES_PER_BURST);
        let mut round = Round {
            rx: None,
            tx: None,
            moved: 0,
        };
        if let Some(half) = &mut self.tx {
            let pause = half.work(lane, &self.shared, &mut tx_budget);
            round.tx = Some(told(&mut half.queue, pause)?);
        }
        if let Some(half) = &mut self.rx {
            let pause = half.work(self.pair, lane, &self.shared, &mut rx_budget);
            round.rx = Some(told(&mut half.queue, pause)?);
        }
        round.moved = RX_FRAMES_PER_BURST
            .saturating_add(TX_FRAMES_PER_BURST)
            .saturating_sub(rx_budget)
            .saturating_sub(tx_budget);
        Ok(round)
    }

    /// Asked for last: what came before is seen here, what comes after rings. True: there is more already.
    fn want_doorbells(&mut self, rx: Option<RxPause>, tx: Option<TxPause>) -> Result<bool, Broken> {
        let mut more = false;
        if matches!(rx, Some(RxPause::Starved | RxPause::Waits(_)))
            && let Some(half) = &mut self.rx
        {
            more |= unless_broken(&mut half.queue, LiveQueue::want_doorbell)?;
        }
        if tx == Some(TxPause::Idle)
            && let Some(half) = &mut self.tx
        {
            more |= unless_broken(&mut half.queue, LiveQueue::want_doorbell)?;
        }
        Ok(more)
    }

    /// Looks for the next frame of either side, or for buffers where the guest has none, instead of sleeping, where
    /// that is worth it.
    fn look_for_more(
        &mut self,
        lane: &mut Lane,
        rx_pause: Option<RxPause>,
        tx_pause: Option<TxPause>,
    ) -> Result<bool, Broken> {
        let Self {
            pair,
            rx,
            tx,
            shared,
            wait,
            ..
        } = self;
        let is_starved = matches!(rx_pause, Some(RxPause::Starved | RxPause::Waits(_)));
        let mut rx = rx
            .as_mut()
            .filter(|_| is_starved || rx_pause == Some(RxPause::Idle));
        let tx = tx.as_ref().filter(|_| tx_pause == Some(TxPause::Idle));
        if !wait.may_look() || rx.is_none() && tx.is_none() {
            return Ok(false);
        }
        let mut result = Ok(());
        let found = wait.look(|| {
            if tx.is_some_and(|half| half.queue.has_more()) {
                return true;
            }
            let Some(half) = rx.as_mut() else {
                return false;
            };
            if is_starved {
                return half.queue.has_more();
            }
            let mut one = 1;
            let pause = half.work(*pair, lane, shared, &mut one);
            // The driver does not wait for the next look.
            match told(&mut half.queue, pause) {
                Ok(pause) => pause != RxPause::Idle || one == 0,
                Err(broken) => {
                    result = Err(broken);
                    true
                }
            }
        });
        result.map(|()| found)
    }

    /// A link that goes up begins with new frames.
    fn see_link(&mut self, lane: &mut Lane) {
        let is_up = self.shared.link_is_up();
        if is_up
            && !self.link_was_up
            && let Some(rx) = &mut self.rx
        {
            rx.discard(lane, &self.shared, MOST_STALE);
        }
        self.link_was_up = is_up;
    }

    fn queues_mut(&mut self) -> impl Iterator<Item = &mut LiveQueue> {
        let rx = self.rx.as_mut().map(|half| &mut half.queue);
        let tx = self.tx.as_mut().map(|half| &mut half.queue);
        rx.into_iter().chain(tx)
    }

    /// Others first, then this worker again.
    fn come_back(&mut self) {
        for queue in self.queues_mut() {
            queue.doorbell().ring();
        }
    }

    fn set_timer(&mut self, timer: &mut TimerFd, wait: Duration) {
        // A limiter that says "now" for a time too short for a timer still gets one.
        let wait = wait.max(Duration::from_nanos(1));
        if timer.reset(wait, None).is_err() {
            self.come_back();
        }
    }

    /// Watched only while a frame waits for the link: it would be told of each frame that the other side takes.
    fn watch_writable(&mut self, wanted: bool, lane: &Lane, ops: &mut Ops<'_>) {
        if self.watches_writable == wanted {
            return;
        }
        let changed = if wanted {
            // Adding it tells at once of a link that takes frames again by now.
            ops.watch(
                &lane.link.writable_fd(),
                WRITABLE,
                Interest::WRITABLE | Interest::EDGE,
            )
        } else {
            ops.unwatch(WRITABLE)
        };
        match changed {
            Ok(()) => self.watches_writable = wanted,
            Err(e) => log::error!("{}: {e}", self.shared.name()),
        }
    }
}

/// What the link must know of the driver, which may be another one than before. On the first pair's behalf; `lane` is its.
pub(crate) fn set_up_link(lane: &mut Lane, lanes: &[Arc<Mutex<Lane>>], shared: &Shared) {
    if let Err(e) = lane.link.set_guest_offloads(shared.guest_offloads()) {
        shared.say("the link cannot be told what the guest can do", &e);
    }
    // The first pair is always active.
    for (pair, other) in (1u16..).zip(lanes.iter().skip(1)) {
        let active = shared.is_active(pair);
        if let Err(e) = lock(other).link.set_active(active) {
            shared.say("a queue of the link cannot be switched", &e);
        }
    }
}

/// What became of one round.
struct Round {
    rx: Option<RxPause>,
    tx: Option<TxPause>,
    moved: u32,
}

/// A ring was broken; its queue has said so.
struct Broken;

fn unless_broken<T>(
    queue: &mut LiveQueue,
    act: impl FnOnce(&mut LiveQueue) -> Result<T, BrokenRing>,
) -> Result<T, Broken> {
    act(queue).map_err(|why| {
        queue.fail(why);
        Broken
    })
}

/// The driver is told of what was completed, also before its ring was found broken.
fn told<P>(queue: &mut LiveQueue, pause: Result<P, BrokenRing>) -> Result<P, Broken> {
    unless_broken(queue, |queue| {
        queue.notify()?;
        pause
    })
}

fn edge(
    ops: &mut Ops<'_>,
    fd: &impl std::os::fd::AsRawFd,
    token: Token,
) -> Result<(), EventLoopError> {
    ops.watch(fd, token, Interest::READABLE | Interest::EDGE)
}

impl Worker for PairWorker {
    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        let lane = self.lane.clone();
        let mut lane = lock(&lane);
        if self.pair == 0 {
            set_up_link(&mut lane, &self.lanes, &self.shared);
        }
        if let Some(rx) = &self.rx {
            edge(ops, rx.queue.doorbell().event_fd(), RX_BELL)?;
            edge(ops, &lane.rx_timer, RX_TIMER)?;
            let readable: BorrowedFd<'_> = lane.link.readable_fd();
            edge(ops, &readable, READABLE)?;
        }
        if let Some(tx) = &self.tx {
            edge(ops, tx.queue.doorbell().event_fd(), TX_BELL)?;
            edge(ops, &lane.tx_timer, TX_TIMER)?;
        }
        Ok(())
    }

    fn on_event(&mut self, _: Event, ops: &mut Ops<'_>) {
        if self.is_broken {
            return;
        }
        let lane = self.lane.clone();
        let mut lane = lock(&lane);
        self.wait.wakes();
        self.is_broken = self.turn(&mut lane, ops).is_err();
    }
}

impl QueueWorker for PairWorker {
    fn stop(self: Box<Self>) -> Vec<Progress> {
        let Self {
            rx,
            tx,
            lane,
            shared,
            ..
        } = *self;
        let mut lane = lock(&lane);
        let mut progress = Vec::new();
        if let Some(rx) = rx {
            let _ = lane.rx_timer.clear();
            progress.push(rx.stop(&shared));
        }
        if let Some(tx) = tx {
            let _ = lane.tx_timer.clear();
            progress.push(tx.queue.stop());
        }
        progress
    }

    fn queues(&self) -> Vec<u16> {
        let rx = self.rx.as_ref().map(|half| half.queue.index());
        let tx = self.tx.as_ref().map(|half| half.queue.index());
        rx.into_iter().chain(tx).collect()
    }

    fn seat(&self) -> u16 {
        self.pair
    }
}
