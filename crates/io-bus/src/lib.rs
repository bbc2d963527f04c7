//! Routes one port or MMIO access to one device.
//!
//! A [`Bus`] is built once from ranges that do not overlap and is then frozen: a look-up is a binary
//! search in a sorted table and takes no lock. Each device sits behind a lock of its own, held for one
//! access. Knows nothing of ports or memory as such: the same type serves both address spaces.
//!
//! Deliberately does not know: which devices exist, what an exit is, who asks.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(test)]
mod tests;

/// A device that answers accesses to its range. Offsets count from the start of that range.
pub trait BusDevice: Send {
    /// Fills `into` (1, 2, 4 or 8 bytes, little endian) with the register at `offset`.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome;
    /// Takes `from` (1, 2, 4 or 8 bytes, little endian) into the register at `offset`.
    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome;
}

/// What came of one access.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The access was carried out.
    Done,
    /// The device has no such register, or not in this width. A refused read gives all ones.
    Refused,
    /// The access was carried out, and the guest asks something of the machine by it.
    Asks(MachineRequest),
}

/// What a guest may ask of the machine by touching a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineRequest {
    /// Switch the machine off.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// The guest's kernel says that it has panicked and will not go on.
    Panicked,
    /// The guest says that its init runs.
    Booted,
}

/// A device as the bus shares it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or runs past the end of the address space.
    #[error(
        "range {start:#x}+{size:#x} for {name} is empty or passes the end of the address space"
    )]
    BadRange {
        /// First address.
        start: u64,
        /// Length in addresses.
        size: u64,
        /// Name of the device to be placed.
        name: &'static str,
    },
    /// Another device is there already.
    #[error("range {start:#x}+{size:#x} for {name} overlaps {other} at {other_start:#x}")]
    Overlap {
        /// First address.
        start: u64,
        /// Length in addresses.
        size: u64,
        /// Name of the device to be placed.
        name: &'static str,
        /// Name of the device that is there.
        other: &'static str,
        /// Its first address.
        other_start: u64,
    },
}

struct Entry {
    start: u64,
    last: u64,
    name: &'static str,
    device: SharedDevice,
}

/// Collects ranges; [`BusBuilder::freeze`] makes the bus.
#[derive(Default)]
pub struct BusBuilder {
    entries: Vec<Entry>,
}

impl BusBuilder {
    /// An empty builder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `start..start + size`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps one that is placed already.
    pub fn place(
        &mut self,
        name: &'static str,
        start: u64,
        size: u64,
        device: SharedDevice,
    ) -> Result<(), BusError> {
        let last = size
            .checked_sub(1)
            .and_then(|span| start.checked_add(span))
            .ok_or(BusError::BadRange { start, size, name })?;
        let at = self.entries.partition_point(|e| e.last < start);
        if let Some(other) = self.entries.get(at).filter(|e| e.start <= last) {
            return Err(BusError::Overlap {
                start,
                size,
                name,
                other: other.name,
                other_start: other.start,
            });
        }
        self.entries.insert(
            at,
            Entry {
                start,
                last,
                name,
                device,
            },
        );
        Ok(())
    }

    /// Ends building: from here on the table is only read.
    #[must_use]
    pub fn freeze(self) -> Bus {
        Bus {
            entries: self.entries.into(),
        }
    }
}

/// A frozen table of ranges. Cloning shares it.
#[derive(Clone)]
pub struct Bus {
    entries: Arc<[Entry]>,
}

impl Bus {
    /// Reads at `addr`. Where nobody answers, or the device refuses, `into` becomes all ones, as an
    /// undriven bus reads.
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Outcome {
        let outcome = match self.find(addr, into.len()) {
            // A device that panicked under its lock is only a broken device: the guest keeps the rest.
            Some(e) => e
                .device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(addr - e.start, into),
            None => Outcome::Refused,
        };
        if outcome == Outcome::Refused {
            into.fill(0xff);
        }
        outcome
    }

    /// Writes at `addr`. Where nobody answers, the write is lost.
    pub fn write(&self, addr: u64, from: &[u8]) -> Outcome {
        match self.find(addr, from.len()) {
            Some(e) => e
                .device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(addr - e.start, from),
            None => Outcome::Refused,
        }
    }

    /// The name of the device at `addr`, for people: counters and messages.
    #[must_use]
    pub fn name_at(&self, addr: u64) -> Option<&'static str> {
        self.find(addr, 1).map(|e| e.name)
    }

    /// All placed ranges in order: name, first address, last address.
    pub fn ranges(&self) -> impl Iterator<Item = (&'static str, u64, u64)> + '_ {
        self.entries.iter().map(|e| (e.name, e.start, e.last))
    }

    fn find(&self, addr: u64, len: usize) -> Option<&Entry> {
        let span = u64::try_from(len).ok()?.checked_sub(1)?;
        let last = addr.checked_add(span)?;
        let at = self.entries.partition_point(|e| e.last < addr);
        self.entries
            .get(at)
            .filter(|e| e.start <= addr && last <= e.last)
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.ranges().map(|(n, s, l)| format!("{s:#x}-{l:#x} {n}")))
            .finish()
    }
}
