//! The virtio transport over memory-mapped registers, version 2 (virtio 1.3, section 4.2).
//!
//! [`MmioTransport`] is the registers of one device on an [`alveole_io_bus::Bus`]: [`SIZE_BYTES`] of them.
//! Everything they mean is [`alveole_virtio::TransportCore`]'s business. One interrupt line serves all
//! queues and the configuration; what it was for stands in a register that the driver reads and
//! acknowledges, which costs it two exits an interrupt.
//!
//! Doorbells: the owner makes one for each queue, rung by a 32-bit write of the queue's number to
//! [`NOTIFY_OFFSET`]. A notification that comes as an exit all the same is passed on.
//!
//! Deliberately does not know: its address, its interrupt number, which device it carries, how it is
//! announced.

#![cfg_attr(
    not(any(test, feature = "testing")),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod registers;
mod state;
#[cfg(feature = "testing")]
#[expect(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test driver that cannot go on says where"
)]
pub mod testing;

pub use registers::{MmioTransport, MmioWires};

/// Length of the register block, in bytes: the registers, and a configuration space as long as any.
pub const SIZE_BYTES: u64 = 0x1000;
/// Where in the block a driver writes a queue's number to ring its doorbell (QueueNotify).
pub const NOTIFY_OFFSET: u64 = 0x50;
