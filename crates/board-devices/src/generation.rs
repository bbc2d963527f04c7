//! Tells the guest that it goes on as another machine: a copy, or one that was put back to an earlier moment.
//!
//! Specification: Microsoft, "Virtual Machine Generation ID" (2012): sixteen random bytes in memory that the guest
//! does not use for anything else, at an address that is a multiple of 8, never the same for two machines; after a
//! change, `Notify` 0x80 of the ACPI device that names the address (`ADDR`). Linux (drivers/virt/vmgenid.c) seeds its
//! random numbers anew then, so that two copies do not draw the same ones. Programs see it by another page
//! (`vm_clock`), whose ACPI device is notified as well.
//!
//! The notifications come by the generic event device (ACPI 6.5: 5.6.9), as the power button's.

use alveole_guest_memory::{AccessError, GuestRam};
use alveole_interrupts::IrqLine;

use crate::vm_clock;

/// Length of a generation id.
pub const GENERATION_ID_BYTES: u64 = 16;

/// What says which machine a guest is. It has no state of its own: all of it lies in guest memory, and is saved with it.
#[derive(Debug, Clone)]
pub struct Generation {
    line: IrqLine,
    id_addr: u64,
    clock_addr: u64,
}

/// Why a guest got no new generation id.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The host has no random bytes.
    #[error("cannot make a generation id for the guest: the host gives no random bytes: {0}")]
    Random(getrandom::Error),
    /// There is no memory where it is to lie: a mistake of the wiring.
    #[error("cannot write the guest's generation id: {0}")]
    Memory(#[from] AccessError),
}

impl Generation {
    /// A generation id at `id_addr` and a VMClock at `clock_addr`, where the guest must have [`GENERATION_ID_BYTES`] and
    /// [`VM_CLOCK_BYTES`](crate::VM_CLOCK_BYTES) of memory that it leaves alone. `line` must be the edge-triggered one that the event device
    /// names.
    #[must_use]
    pub fn new(line: IrqLine, id_addr: u64, clock_addr: u64) -> Self {
        Self {
            line,
            id_addr,
            clock_addr,
        }
    }

    /// Writes a new id, and new markers into the VMClock. For a guest whose processors stand still: they could read half of the id.
    ///
    /// # Errors
    /// The host has no random bytes, or the guest no memory at the addresses.
    pub fn renew(&self, ram: &GuestRam) -> Result<(), GenerationError> {
        let mut id = [0; GENERATION_ID_BYTES as usize];
        let mut marker = [0; 8];
        getrandom::fill(&mut id).map_err(GenerationError::Random)?;
        getrandom::fill(&mut marker).map_err(GenerationError::Random)?;
        ram.write(self.id_addr, &id)?;
        vm_clock::renew(ram, self.clock_addr, u64::from_le_bytes(marker))?;
        Ok(())
    }

    /// Tells the guest that it is another machine. Does not wait for the guest: where its processors stand still, it
    /// hears of it as soon as they run.
    pub fn announce(&self) {
        self.line.pulse();
    }
}
