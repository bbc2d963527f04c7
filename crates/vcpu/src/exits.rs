//! Counts of a processor's exits, by kind and address. Written by one thread, read by any, no lock.

use std::sync::atomic::{AtomicU64, Ordering};

use alveole_counters::{Counter, CounterSet};

/// How many different addresses are told apart. A guest that touches more ends in `others`: it must not
/// be able to grow the table.
pub const ACCESS_SLOTS: usize = 128;

/// What kind of access an exit was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessKind {
    /// `in`.
    PortRead,
    /// `out`.
    PortWrite,
    /// A load from memory that is not RAM.
    MmioRead,
    /// A store to memory that is not RAM.
    MmioWrite,
}

impl AccessKind {
    const ALL: [Self; 4] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MmioRead,
        Self::MmioWrite,
    ];

    /// As counters spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port_read",
            Self::PortWrite => "port_write",
            Self::MmioRead => "mmio_read",
            Self::MmioWrite => "mmio_write",
        }
    }
}

/// How often one address was touched in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The way.
    pub kind: AccessKind,
    /// The address.
    pub addr: u64,
    /// The count.
    pub count: u64,
}

/// The exits of one processor.
pub struct ExitCounts {
    name: String,
    slots: Box<[Slot]>,
    /// Accesses to addresses that found no slot.
    others: Counter,
    interrupted: Counter,
}

#[derive(Default)]
struct Slot {
    /// 0 while free, else `(addr << 2 | kind) + 1`.
    key: AtomicU64,
    count: AtomicU64,
}

impl ExitCounts {
    /// Zeroes, under the name `vcpu {index}`.
    #[must_use]
    pub fn new(index: u32) -> Self {
        Self {
            name: format!("vcpu {index}"),
            slots: (0..ACCESS_SLOTS).map(|_| Slot::default()).collect(),
            others: Counter::new(),
            interrupted: Counter::new(),
        }
    }

    /// Counts one access. Called by the thread that runs the processor, and by no other.
    pub(crate) fn access(&self, kind: AccessKind, addr: u64) {
        let key = (addr << 2 | kind as u64).wrapping_add(1).max(1);
        // Fibonacci hashing spreads neighbouring registers; a probe length of a whole table is rare and
        // bounded.
        let start = (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57) as usize;
        for slot in self.slots.iter().cycle().skip(start).take(ACCESS_SLOTS) {
            let held = slot.key.load(Ordering::Relaxed);
            if held == 0 {
                slot.key.store(key, Ordering::Relaxed);
            }
            if held == 0 || held == key {
                // One writer: load and store are enough, and cheaper than a locked add.
                let count = slot.count.load(Ordering::Relaxed);
                slot.count.store(count.wrapping_add(1), Ordering::Relaxed);
                return;
            }
        }
        self.others.inc();
    }

    pub(crate) fn interrupted(&self) {
        self.interrupted.inc();
    }

    /// Every address touched so far, most often touched first.
    #[must_use]
    pub fn accesses(&self) -> Vec<Access> {
        let mut all: Vec<_> = self
            .slots
            .iter()
            .filter_map(|slot| {
                let key = slot.key.load(Ordering::Relaxed).checked_sub(1)?;
                let kind = AccessKind::ALL[(key & 3) as usize];
                let count = slot.count.load(Ordering::Relaxed);
                Some(Access {
                    kind,
                    addr: key >> 2,
                    count,
                })
            })
            .collect();
        all.sort_by_key(|a| (std::cmp::Reverse(a.count), a.addr, a.kind));
        all
    }

    /// All exits to this program so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        let accesses: u64 = self.accesses().iter().map(|a| a.count).sum();
        accesses + self.others.get() + self.interrupted.get()
    }
}

impl CounterSet for ExitCounts {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let all = self.accesses();
        for kind in AccessKind::ALL {
            let sum = all.iter().filter(|a| a.kind == kind).map(|a| a.count).sum();
            f(&format!("exits_{}", kind.name()), sum);
        }
        f("exits_interrupted", self.interrupted.get());
        f("exits_at_other_addresses", self.others.get());
        for a in all {
            f(&format!("exits_{}_{:#x}", a.kind.name(), a.addr), a.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_address_in_two_ways_is_two_counts() {
        let c = ExitCounts::new(0);
        for _ in 0..3 {
            c.access(AccessKind::PortWrite, 0x3f8);
        }
        c.access(AccessKind::PortRead, 0x3f8);
        c.access(AccessKind::MmioRead, 0xfee0_0000);
        c.interrupted();
        assert_eq!(
            c.accesses()[0],
            Access {
                kind: AccessKind::PortWrite,
                addr: 0x3f8,
                count: 3
            }
        );
        assert_eq!(c.accesses().len(), 3);
        assert_eq!(c.total(), 6);
    }

    #[test]
    fn a_guest_that_touches_everything_fills_no_memory() {
        let c = ExitCounts::new(0);
        for port in 0..5000 {
            c.access(AccessKind::PortRead, port);
        }
        assert_eq!(c.accesses().len(), ACCESS_SLOTS);
        assert_eq!(c.total(), 5000);
        let mut sum = 0;
        c.visit(&mut |name, n| {
            if name == "exits_at_other_addresses" {
                sum = n;
            }
        });
        assert_eq!(sum, 5000 - ACCESS_SLOTS as u64);
    }
}
