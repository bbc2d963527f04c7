//! On which event loops the workers of a device run.

use std::time::Duration;

use alveole_event_loop::{Event, EventLoopError, LoopHandle, Ops, Worker, WorkerId};

use crate::{Progress, QueueWorker};

/// The loops that host a device: one that it shares with others, one of its own, or one for each worker.
#[derive(Clone)]
pub struct Hosting {
    loops: Vec<LoopHandle>,
    longest_look: Duration,
}

impl Hosting {
    /// On these loops, in turn; others are on them too.
    #[must_use]
    pub fn on(loops: Vec<LoopHandle>) -> Self {
        Self {
            loops,
            longest_look: Duration::ZERO,
        }
    }

    /// On these loops, in turn, which nobody else uses: a worker may keep its thread busy for so long
    /// before it sleeps.
    #[must_use]
    pub fn alone_on(loops: Vec<LoopHandle>, longest_look: Duration) -> Self {
        Self {
            loops,
            longest_look,
        }
    }

    pub(crate) fn longest_look(&self) -> Duration {
        self.longest_look
    }

    /// Moves a worker to the loop of its seat.
    pub(crate) fn attach(&self, worker: Box<dyn QueueWorker>) -> Result<Hosted, EventLoopError> {
        let at = usize::from(worker.seat())
            .checked_rem(self.loops.len())
            .unwrap_or_default();
        let Some(on) = self.loops.get(at) else {
            return Err(EventLoopError::Stopped);
        };
        let queues = worker.queues();
        let id = on.attach(Box::new(Guest(worker)))?;
        Ok(Hosted {
            on: on.clone(),
            id,
            queues,
        })
    }
}

/// A worker on its loop.
pub(crate) struct Hosted {
    on: LoopHandle,
    id: WorkerId,
    pub(crate) queues: Vec<u16>,
}

impl Hosted {
    /// Takes the worker back and stops it. Nothing comes of a worker whose loop has ended: the machine is
    /// about to.
    pub(crate) fn stop(self) -> Vec<Progress> {
        match self.on.detach(self.id).map(<dyn Worker>::downcast::<Guest>) {
            Ok(Ok(guest)) => guest.0.stop(),
            Ok(Err(other)) => {
                log::error!("the loop gave back {} for a queue worker", other.name());
                Vec::new()
            }
            Err(e) => {
                log::debug!("a queue worker could not be taken back: {e}");
                Vec::new()
            }
        }
    }
}

/// A queue worker as the loop sees it.
struct Guest(Box<dyn QueueWorker>);

impl Worker for Guest {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        self.0.start(ops)
    }

    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        self.0.on_event(event, ops);
    }
}
