//! Where RAM lies in the guest's physical address space: one range below the 32-bit hole, the rest from
//! 4 GiB upwards. Pure arithmetic; maps nothing.

use crate::PAGE_SIZE;

/// First address of the hole that is kept free for 32-bit devices, interrupt controllers and firmware
/// addresses (the local APICs at 0xfee0_0000, the I/O APIC at 0xfec0_0000).
pub const HOLE_START: u64 = 0xc000_0000;
/// First address behind the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Largest guest, in bytes: 16 TiB keeps every address within the 46 bits that all 64-bit processors
/// of the last ten years translate.
pub const MAX_SIZE_BYTES: u64 = 16 << 40;

/// One range of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes, a multiple of the page size.
    pub size_bytes: u64,
}

/// Why a size cannot be laid out.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// No memory at all.
    #[error("guest memory of 0 bytes: a guest needs some; give at least 64 MiB")]
    Zero,
    /// Not a whole number of pages.
    #[error("guest memory of {0} bytes is not a multiple of the 4096-byte page size")]
    NotPages(u64),
    /// Not a whole number of huge pages.
    #[error(
        "guest memory of {0} bytes is not a multiple of 2 MiB, the size of the huge pages it is to be made of"
    )]
    NotHugePages(u64),
    /// Past what processors address.
    #[error(
        "guest memory of {0} bytes is larger than 16 TiB, the most this machine model lays out"
    )]
    TooLarge(u64),
}

/// The ranges of RAM of one guest, in order of address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    ranges: Vec<RamRange>,
}

impl MemoryPlan {
    /// Lays out `size_bytes` of RAM around the 32-bit hole.
    ///
    /// # Errors
    /// The size is zero, not a multiple of 4096, or over 16 TiB.
    pub fn around_hole(size_bytes: u64) -> Result<Self, PlanError> {
        if size_bytes == 0 {
            return Err(PlanError::Zero);
        }
        if !size_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(PlanError::NotPages(size_bytes));
        }
        if size_bytes > MAX_SIZE_BYTES {
            return Err(PlanError::TooLarge(size_bytes));
        }
        let low = size_bytes.min(HOLE_START);
        let mut ranges = vec![RamRange {
            start: 0,
            size_bytes: low,
        }];
        if size_bytes > low {
            ranges.push(RamRange {
                start: HOLE_END,
                size_bytes: size_bytes - low,
            });
        }
        Ok(Self { ranges })
    }

    /// The ranges, lowest first.
    #[must_use]
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Sum of all ranges, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.size_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bad_sizes_are_named() {
        assert_eq!(MemoryPlan::around_hole(0), Err(PlanError::Zero));
        assert_eq!(
            MemoryPlan::around_hole(4097),
            Err(PlanError::NotPages(4097))
        );
        assert!(matches!(
            MemoryPlan::around_hole(1 << 50),
            Err(PlanError::TooLarge(_))
        ));
    }

    #[test]
    fn ram_stops_at_the_hole_and_goes_on_behind_it() {
        let plan = MemoryPlan::around_hole(5 << 30).unwrap();
        assert_eq!(
            plan.ranges(),
            [
                RamRange {
                    start: 0,
                    size_bytes: 3 << 30
                },
                RamRange {
                    start: 4 << 30,
                    size_bytes: 2 << 30
                }
            ]
        );
        assert_eq!(
            MemoryPlan::around_hole(HOLE_START).unwrap().ranges().len(),
            1
        );
    }

    proptest! {
        #[test]
        fn nothing_lies_in_the_hole_and_nothing_is_lost(pages in 1u64..(1 << 32)) {
            let plan = MemoryPlan::around_hole(pages * PAGE_SIZE).unwrap();
            prop_assert_eq!(plan.size_bytes(), pages * PAGE_SIZE);
            for r in plan.ranges() {
                prop_assert!(r.size_bytes > 0);
                let end = r.start + r.size_bytes;
                prop_assert!(end <= HOLE_START || r.start >= HOLE_END);
            }
        }
    }
}
