//! How other threads speak to the loop: a queue of orders and an eventfd that wakes the loop.
//!
//! Not event-manager's remote endpoint: a caller of that one waits for ever when the loop has stopped
//! between its look and its call. Here stopping closes the queue under the queue's lock.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{EventLoopError, LoopCounters, Worker, WorkerId};

/// The answer to an attach: the id, or the error and the worker that could not work.
pub(crate) type Attached = Result<WorkerId, EventLoopError>;
pub(crate) type Detached = Result<Box<dyn Worker>, EventLoopError>;

pub(crate) enum Order {
    Attach(Box<dyn Worker>, Sender<Attached>),
    Detach(WorkerId, Sender<Detached>),
}

#[derive(Default)]
struct Queue {
    orders: Vec<Order>,
    stop: bool,
    closed: bool,
}

pub(crate) struct Mailbox {
    queue: Mutex<Queue>,
    wake: EventFd,
    host_thread: OnceLock<ThreadId>,
    pub(crate) counters: LoopCounters,
}

impl Mailbox {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            queue: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            host_thread: OnceLock::new(),
            counters: LoopCounters::default(),
        })
    }

    pub(crate) fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    pub(crate) fn hosted_by_this_thread(&self) {
        let _ = self.host_thread.set(thread::current().id());
    }

    /// Takes the orders that have come, and whether to stop.
    pub(crate) fn take(&self) -> (Vec<Order>, bool) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut queue.orders), queue.stop)
    }

    /// Refuses orders from here on. Those that wait are dropped, and so their callers are answered.
    pub(crate) fn close(&self) {
        let orders = {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.closed = true;
            std::mem::take(&mut queue.orders)
        };
        drop(orders);
    }

    fn post(&self, order: Order) -> Result<(), EventLoopError> {
        if self.host_thread.get() == Some(&thread::current().id()) {
            return Err(EventLoopError::WouldDeadlock);
        }
        {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.closed {
                return Err(EventLoopError::Stopped);
            }
            queue.orders.push(order);
        }
        self.ring();
        Ok(())
    }

    fn ring(&self) {
        // Fails only with the counter at its maximum: the loop has been woken already.
        let _ = self.wake.write(1);
    }
}

/// Speaks to a loop from any thread.
#[derive(Clone)]
pub struct LoopHandle(pub(crate) Arc<Mailbox>);

impl LoopHandle {
    /// Moves a worker into the loop and waits until its descriptors are watched. Before
    /// [`EventLoop::run`](crate::EventLoop::run) has begun this waits for it to begin.
    ///
    /// # Errors
    /// The worker's own [`Worker::start`] failed (the worker is dropped), the loop has stopped, or the
    /// caller is a worker on this very loop.
    pub fn attach(&self, worker: Box<dyn Worker>) -> Result<WorkerId, EventLoopError> {
        let (answer, answered) = channel();
        self.0.post(Order::Attach(worker, answer))?;
        answered.recv().unwrap_or(Err(EventLoopError::Stopped))
    }

    /// Takes a worker out of the loop: when this returns, none of its descriptors is watched and it is
    /// not being called.
    ///
    /// # Errors
    /// The worker has left by itself, the loop has stopped, or the caller is a worker on this very
    /// loop.
    pub fn detach(&self, id: WorkerId) -> Result<Box<dyn Worker>, EventLoopError> {
        let (answer, answered) = channel();
        self.0.post(Order::Detach(id, answer))?;
        answered.recv().unwrap_or(Err(EventLoopError::Stopped))
    }

    /// Makes the loop return from [`EventLoop::run`](crate::EventLoop::run) after the round at hand.
    /// Does not wait; may be called by a worker, and before the loop runs.
    pub fn stop(&self) {
        self.0
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stop = true;
        self.0.ring();
    }

    /// Gives up on a loop whose thread does not come back from a worker: whoever waits for it is answered that it has stopped, and so is
    /// everybody from now on. The loop keeps its workers; should its thread come back, it serves them until [`Self::stop`].
    pub fn abandon(&self) {
        self.0.close();
    }

    /// What the loop has done so far.
    #[must_use]
    pub fn counters(&self) -> &LoopCounters {
        &self.0.counters
    }
}
