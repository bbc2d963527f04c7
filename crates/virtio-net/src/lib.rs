//! The virtio network device (virtio 1.3, section 5.1).
//!
//! Deliberately does not know: where frames go, which transport carries the device, which thread serves it.

mod config;
mod counters;
mod handle;

pub use config::{NetConfig, NetError};
pub use counters::NetCounters;
pub use handle::{NetHandle, VirtioNet};

/// Default size of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most pairs of queues.
pub const MAX_PAIRS: u16 = 64;
