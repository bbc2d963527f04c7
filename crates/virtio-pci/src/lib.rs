//! The virtio transport over PCI, without legacy interface (virtio 1.3, section 4.1).
//!
//! [`PciTransport`] is one device as a PCI function: its configuration space for an
//! [`alveole_pci::RootBus`], and [`BAR_BYTES`] of registers for an [`alveole_io_bus::Bus`], at the address
//! it was made with. Everything the registers mean is [`alveole_virtio::TransportCore`]'s business.
//!
//! Interrupts are messages (MSI-X): the owner gives one vector for each queue and one for the
//! configuration, or fewer, which the driver then shares. There is no interrupt pin: a driver without MSI-X
//! can only poll.
//!
//! Doorbells: the owner makes one for each queue, rung by any write to the BAR's address plus
//! [`notify_offset`]. A notification that comes as an exit all the same is passed on.
//!
//! Deliberately does not know: its place on the bus, which device it carries, how the bus is announced.

#![cfg_attr(
    not(any(test, feature = "testing")),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod common;
mod function;
mod layout;
mod routes;
mod state;
#[cfg(feature = "testing")]
#[expect(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test driver that cannot go on says where"
)]
pub mod testing;

pub use function::{PciTransport, PciTransportError};
pub use layout::{BAR_BYTES, MAX_QUEUES, MAX_VECTORS, notify_offset};
pub use routes::NO_VECTOR;
