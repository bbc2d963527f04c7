//! The memory map that the kernel is told: what PCs call e820 (Linux Documentation/arch/x86/zero-page.rst,
//! ACPI 6.5 chapter 15), in both of its forms.

use alveole_guest_memory::{GuestRam, PAGE_SIZE};
use linux_loader::bootparam::E820_MAX_ENTRIES_ZEROPAGE;

use crate::{LoadError, layout};

/// Usable memory, and memory that is not; numbered alike in e820 and in PVH.
pub(crate) const RAM: u32 = 1;
pub(crate) const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) addr: u64,
    pub(crate) size: u64,
    pub(crate) kind: u32,
}

/// The whole map, in order of address.
#[derive(Debug)]
pub(crate) struct MemoryMap {
    pub(crate) entries: Vec<Entry>,
    /// Where the RAM ends that starts at address 0.
    pub(crate) low_end: u64,
}

impl MemoryMap {
    pub(crate) fn of(ram: &GuestRam) -> Result<Self, LoadError> {
        let mut ranges = ram.mapped_ranges().map(|(range, _)| range);
        let low = ranges
            .next()
            .filter(|low| low.start == 0)
            .ok_or(LoadError::NoLowMemory)?;
        let low_end = low.size_bytes;
        if low_end < layout::HIGH_RAM_START + PAGE_SIZE {
            return Err(LoadError::NoLowMemory);
        }
        let entry = |addr, end: u64, kind| Entry {
            addr,
            size: end.saturating_sub(addr),
            kind,
        };
        let mut entries = vec![
            entry(0, layout::RESERVED_START, RAM),
            entry(layout::RESERVED_START, layout::HIGH_RAM_START, RESERVED),
            entry(layout::HIGH_RAM_START, low_end, RAM),
        ];
        entries.extend(ranges.map(|r| Entry {
            addr: r.start,
            size: r.size_bytes,
            kind: RAM,
        }));
        if entries.len() > E820_MAX_ENTRIES_ZEROPAGE {
            let (ranges, limit) = (entries.len(), E820_MAX_ENTRIES_ZEROPAGE);
            return Err(LoadError::MemoryRanges { ranges, limit });
        }
        Ok(Self { entries, low_end })
    }
}
