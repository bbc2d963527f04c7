//! The loop itself.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use alveole_counters::Counter;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};

use crate::mailbox::{Mailbox, Order};
use crate::worker::{Watched, event_of};
use crate::{EventLoopError, LoopHandle, Ops, Worker, WorkerId};

/// Log lines about descriptors that the loop stopped watching. A worker with such a bug would write
/// one per connection of its peer.
const MAX_HANGUP_LINES: u64 = 10;

/// What the loop has done. `rounds` and `events` that grow without traffic point at a worker that
/// leaves a descriptor ready.
#[derive(Debug, Default)]
pub struct LoopCounters {
    /// Times the thread came back from epoll.
    pub rounds: Counter,
    /// Descriptors found ready.
    pub events: Counter,
    /// Descriptors that the loop stopped watching because their hang-up was ignored.
    pub hangups_cut: Counter,
}

/// One epoll instance and the workers on it.
pub struct EventLoop {
    manager: EventManager<Hosted>,
    workers: Vec<SubscriberId>,
    mailbox: Arc<Mailbox>,
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn new() -> Result<Self, EventLoopError> {
        let mailbox = Mailbox::new().map_err(|e| EventLoopError::Create(e.to_string()))?;
        let mailbox = Arc::new(mailbox);
        let mut manager = EventManager::new().map_err(|e| EventLoopError::Create(e.to_string()))?;
        let bell = manager.add_subscriber(Hosted::Bell(mailbox.clone(), Ok(())));
        if let Ok(Hosted::Bell(_, Err(e))) = manager.subscriber_mut(bell) {
            return Err(EventLoopError::Create(e.to_string()));
        }
        Ok(Self {
            manager,
            workers: Vec::new(),
            mailbox,
        })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> LoopHandle {
        LoopHandle(self.mailbox.clone())
    }

    /// Moves a worker in, while the loop does not run.
    ///
    /// # Errors
    /// The worker's own [`Worker::start`] failed; the worker is dropped.
    pub fn attach(&mut self, worker: Box<dyn Worker>) -> Result<WorkerId, EventLoopError> {
        let id = self.manager.add_subscriber(Hosted::Worker(Slot {
            name: worker.name(),
            worker,
            watched: Watched::default(),
            leave: false,
            start_error: None,
            mailbox: self.mailbox.clone(),
        }));
        self.workers.push(id);
        let error = match self.manager.subscriber_mut(id) {
            Ok(Hosted::Worker(slot)) => slot.start_error.take(),
            _ => None,
        };
        match error {
            None => Ok(WorkerId(id)),
            Some(e) => {
                drop(self.detach(WorkerId(id)));
                Err(e)
            }
        }
    }

    /// Takes a worker out, while the loop does not run.
    ///
    /// # Errors
    /// There is no such worker.
    pub fn detach(&mut self, id: WorkerId) -> Result<Box<dyn Worker>, EventLoopError> {
        let at = self.workers.iter().position(|&w| w == id.0);
        let at = at.ok_or(EventLoopError::UnknownWorker(id))?;
        self.workers.swap_remove(at);
        match self.manager.remove_subscriber(id.0) {
            Ok(Hosted::Worker(slot)) => Ok(slot.worker),
            _ => Err(EventLoopError::UnknownWorker(id)),
        }
    }

    /// Serves events and orders on this thread until [`LoopHandle::stop`]. A loop that has stopped
    /// takes no more orders; its workers stay inside and can be taken out with
    /// [`EventLoop::detach`].
    ///
    /// # Errors
    /// epoll itself failed.
    pub fn run(&mut self) -> Result<(), EventLoopError> {
        self.mailbox.hosted_by_this_thread();
        let result = self.serve();
        self.mailbox.close();
        result
    }

    fn serve(&mut self) -> Result<(), EventLoopError> {
        loop {
            let (orders, stop) = self.mailbox.take();
            for order in orders {
                self.obey(order);
            }
            if stop {
                return Ok(());
            }
            let events = self
                .manager
                .run()
                .map_err(|e| EventLoopError::Wait(e.to_string()))?;
            self.mailbox.counters.rounds.inc();
            self.mailbox.counters.events.add(events as u64);
            self.see_off();
        }
    }

    fn obey(&mut self, order: Order) {
        // An answer that nobody waits for any more goes nowhere; a detached worker is dropped with it.
        match order {
            Order::Attach(worker, answer) => {
                let _ = answer.send(self.attach(worker));
            }
            Order::Detach(id, answer) => {
                let _ = answer.send(self.detach(id));
            }
        }
    }

    /// Drops the workers that asked to leave in the last round.
    fn see_off(&mut self) {
        let mut at = 0;
        while let Some(&id) = self.workers.get(at) {
            match self.manager.subscriber_mut(id) {
                Ok(Hosted::Worker(slot)) if slot.leave => drop(self.detach(WorkerId(id))),
                _ => at += 1,
            }
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

/// What event-manager hosts for us.
enum Hosted {
    /// The eventfd that interrupts the wait when orders come.
    Bell(Arc<Mailbox>, Result<(), event_manager::Error>),
    Worker(Slot),
}

struct Slot {
    name: &'static str,
    worker: Box<dyn Worker>,
    watched: Watched,
    leave: bool,
    start_error: Option<EventLoopError>,
    mailbox: Arc<Mailbox>,
}

impl MutEventSubscriber for Hosted {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        match self {
            Self::Bell(mailbox, result) => {
                let fd = mailbox.wake_fd().as_raw_fd();
                *result = ops.add(Events::new_raw(fd, EventSet::IN));
            }
            Self::Worker(slot) => {
                let mut ops = Ops::new(slot.name, ops, &mut slot.watched, &mut slot.leave);
                slot.start_error = slot.worker.start(&mut ops).err();
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Bell(mailbox, _) => {
                let _ = mailbox.wake_fd().read();
            }
            Self::Worker(slot) => slot.process(events, ops),
        }
    }
}

impl Slot {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let event = event_of(events);
        let mut ops = Ops::new(self.name, ops, &mut self.watched, &mut self.leave);
        self.worker.on_event(event, &mut ops);
        let gone = event.ready.hung_up() || event.ready.error();
        if gone && ops.hangup_is_ignored(event.token) {
            let cut = &self.mailbox.counters.hangups_cut;
            cut.inc();
            if cut.get() <= MAX_HANGUP_LINES {
                log::warn!(
                    "worker {} ignores the hang-up of its descriptor {:?}: no longer watched; this \
                     is a bug of the monitor, please report it",
                    self.name,
                    event.token
                );
            }
            // Fails only when the worker closed the descriptor while it was watched.
            let _ = ops.unwatch(event.token);
        }
    }
}

#[cfg(test)]
mod tests;
