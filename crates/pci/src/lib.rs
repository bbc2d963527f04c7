//! One PCI Express segment with one root bus (PCI Local Bus 3.0, PCI Express Base 5.0).
//!
//! [`ConfigSpace`] is the type 0 configuration space of one function: header, BARs, capability list, a
//! write mask for each byte. [`RootBus`] holds up to 32 functions behind the memory-mapped configuration
//! window (ECAM) and has a host bridge at 00:00.0. [`MsixTable`] is message-signalled interrupts: the table
//! and the pending bits as a function shows them, [`MsixSender`] as its workers use them.
//!
//! BARs stay where the machine has put them: see [`ConfigSpace`].
//!
//! Deliberately does not know: virtio, KVM, ACPI, where the window is, what its functions do.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod config_space;
mod msix;
mod root_bus;
mod state;

pub use config_space::{CONFIG_BYTES, ConfigSpace, Ids, PciError, PciRestoreError};
pub use msix::{MAX_VECTORS, MsixSender, MsixTable};
pub use root_bus::{DEVICES, ECAM_BYTES, Function, RootBus, SharedFunction};
pub use state::{ConfigSpaceStateV1, MsixEntryStateV1, MsixStateV1};
