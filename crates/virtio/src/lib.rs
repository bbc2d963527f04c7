//! Virtio 1.3: the device trait, split virtqueues, and the core that every transport shares.
//!
//! A device's queues are *started and stopped*. [`TransportCore`] owns everything between a transport's
//! registers and a device: the walk of the device status (section 3.1), feature negotiation (2.2), queue
//! set-up and reset (2.6), the configuration generation (2.5) and the positions of stopped queues. The
//! only way to serve a queue is [`VirtioDevice::start`], and [`QueueWorker::stop`] gives back how far it
//! came: DRIVER_OK, reset of the device or of a queue, pause and restore are all made of these two.
//!
//! A ring that breaks the rules ends in NEEDS_RESET ([`LiveQueue::fail`]): the worker goes quiet, the guest
//! is told, and its reset heals the device. It costs the host a bounded number of log lines.
//!
//! Deliberately does not know: which transport carries a device (a transport supplies [`Wires`] and
//! doorbells), which devices exist, which thread a worker runs on (it is handed [`Hosting`]).

#![cfg_attr(
    not(any(test, feature = "testing")),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod busy_wait;
mod chain;
mod device;
mod hosting;
mod queue;
mod signals;
mod state;
#[cfg(feature = "testing")]
#[expect(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test driver that cannot go on says where"
)]
pub mod testing;
mod transport_core;

pub use alveole_saved_state::{RestoreError, SavedState};
pub use busy_wait::BusyWait;
pub use chain::{Chain, MAX_CHAIN_SEGMENTS, Segment};
pub use device::{Identity, QueueWorker, StartError, StartKit, VirtioDevice};
pub use hosting::Hosting;
pub use queue::{BrokenRing, LiveQueue, Progress, RingParts};
pub use signals::{ConfigIrq, MAX_TROUBLE_LINES, RouteWatch, Signals, Wires};
pub use state::{QueueStateV1, TransportStateV1};
pub use transport_core::{QueuePart, TransportControl, TransportCore};

/// Largest queue, in descriptors (section 2.7: a power of two, at most 32768). Abused by nobody, but every
/// request in flight holds memory of ours.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Feature bits that every device of this house has in common (section 6).
pub mod features {
    /// The driver may use one descriptor that refers to a table of others.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Either side says from which entry on it wants to be told.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows version 1 of the standard. There is no other device here.
    pub const VERSION_1: u64 = 1 << 32;
    /// Single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// What the core offers for every device.
    pub const OF_EVERY_DEVICE: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

/// Bits of the device status (section 2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready; queues are served.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device met an error it cannot recover from without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}
