//! What a virtio device is.

use std::time::Duration;

use alveole_event_loop::Worker;
use alveole_guest_memory::GuestRam;

use crate::{ConfigIrq, LiveQueue, Progress, RestoreError, SavedState};

/// What a driver learns of a device before it talks to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name for people.
    pub name: &'static str,
    /// Device type (section 5).
    pub device_id: u16,
    /// Offered features beyond those of every device ([`crate::features::OF_EVERY_DEVICE`]).
    pub features: u64,
    /// Largest size of each queue; powers of two, at most [`crate::MAX_QUEUE_SIZE`].
    pub queue_sizes: Vec<u16>,
    /// Length of the configuration space in bytes.
    pub config_len: u32,
}

/// A virtio device, whatever carries it.
///
/// Two lifetimes, never mixed: what must outlive a stop (the file behind a disk, the level of a rate
/// limiter) belongs to the device and is lent to its workers; what dies with it (watched descriptors,
/// requests in flight) belongs to the worker. All calls come from one thread at a time.
pub trait VirtioDevice: Send {
    /// What the device is. The same every time, but for features and sizes that a live change of the back
    /// end has altered; a driver sees those after its next reset.
    fn identity(&self) -> Identity;

    /// Gets what tells the driver of changes in the configuration space. Called once, before anything else.
    fn connect(&mut self, config_irq: ConfigIrq) {
        let _ = config_irq;
    }

    /// Copies the configuration space from byte `at` on into `into`. The core asks only for what lies
    /// within [`Identity::config_len`].
    fn read_config(&self, at: u32, into: &mut [u8]);

    /// Takes a write to the configuration space, within its length. Fields that a driver may not write
    /// ignore it.
    fn write_config(&mut self, at: u32, from: &[u8]);

    /// Serves some of the queues, all of which are stopped. The workers that come back share them out;
    /// each is hosted by an event loop, which the device does not choose.
    ///
    /// Called at DRIVER_OK with all enabled queues, again for a single one after its reset, and at resume
    /// and restore with the queues at the positions where they stopped.
    ///
    /// # Errors
    /// Whatever keeps the device from working; the driver sees NEEDS_RESET.
    fn start(&mut self, kit: StartKit) -> Result<Vec<Box<dyn QueueWorker>>, StartError>;

    /// Forgets what the driver has set up. All queues are stopped. What belongs to the host (the back
    /// end, limits) stays.
    fn reset(&mut self);

    /// The device's own state, apart from what the core keeps. All queues are stopped.
    fn save(&self) -> SavedState;

    /// Takes a state over. All queues are stopped.
    ///
    /// # Errors
    /// The state is of another kind or version, or no state of such a device.
    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError>;
}

/// Serves queues on an event loop. See [`alveole_event_loop::Worker`] for what it may and may not do.
pub trait QueueWorker: Worker {
    /// Finishes what is in flight and tells how far each of its queues came. Nothing is watched any more.
    /// Runs on the thread that stops the device.
    fn stop(self: Box<Self>) -> Vec<Progress>;

    /// The queues it serves, by number.
    fn queues(&self) -> Vec<u16>;

    /// Which of the device's loops it wants, where each worker can have one of its own; workers of one seat share a
    /// loop. The number of its first queue, where a queue is a worker.
    fn seat(&self) -> u16 {
        self.queues().first().copied().unwrap_or(0)
    }
}

/// What a device gets to serve its queues with. A stopped device has none of it.
pub struct StartKit {
    /// Guest memory.
    pub ram: GuestRam,
    /// The features agreed upon.
    pub features: u64,
    /// The queues to serve.
    pub queues: Vec<LiveQueue>,
    /// How long a worker may look for its next request before it sleeps: nobody else is on its loop. Zero
    /// where others are.
    pub longest_look: Duration,
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The driver said DRIVER_OK with a queue that cannot be used.
    #[error("queue {queue}: {why}")]
    BadQueue {
        /// Its number.
        queue: u16,
        /// What is wrong.
        why: String,
    },
    /// The device itself.
    #[error("{0}")]
    Device(String),
    /// The event loop.
    #[error(transparent)]
    Loop(#[from] alveole_event_loop::EventLoopError),
}
