//! The configuration space (section 5.2.4) and the features that say which of it counts (5.2.3).

use alveole_block_store::{Geometry, SECTOR_BYTES};

use crate::{MAX_RANGE_SECTORS, MAX_RANGES, MAX_SEGMENT_BYTES, MAX_SEGMENTS};

pub(crate) const SIZE_MAX: u64 = 1 << 1;
pub(crate) const SEG_MAX: u64 = 1 << 2;
pub(crate) const RO: u64 = 1 << 5;
pub(crate) const BLK_SIZE: u64 = 1 << 6;
pub(crate) const FLUSH: u64 = 1 << 9;
pub(crate) const TOPOLOGY: u64 = 1 << 10;
pub(crate) const CONFIG_WCE: u64 = 1 << 11;
pub(crate) const MQ: u64 = 1 << 12;
pub(crate) const DISCARD: u64 = 1 << 13;
pub(crate) const WRITE_ZEROES: u64 = 1 << 14;

/// Up to the fields of secure erase, which is not offered.
pub(crate) const LEN: u32 = 60;
/// Where the write-back byte is, the only one a driver may write.
pub(crate) const WRITEBACK_OFFSET: u32 = 32;

/// What is offered for a store like this. `honours_flush`: a flush means something.
pub(crate) fn features(geometry: &Geometry, queues: usize, honours_flush: bool) -> u64 {
    let mut features = SIZE_MAX | SEG_MAX | BLK_SIZE | TOPOLOGY;
    if queues > 1 {
        features |= MQ;
    }
    if geometry.read_only {
        return features | RO;
    }
    if honours_flush {
        features |= FLUSH | CONFIG_WCE;
    }
    if geometry.discard {
        features |= DISCARD;
    }
    // Offered also where the host must write them out: that is still cheaper than zeroes from the guest.
    features | WRITE_ZEROES
}

/// All of it, as it is now.
pub(crate) fn bytes(geometry: &Geometry, queues: u16, writeback: bool) -> [u8; LEN as usize] {
    let block = geometry.block_size_bytes.max(1);
    let physical = geometry.physical_block_size_bytes.checked_div(block);
    let exponent = physical.and_then(u32::checked_ilog2).unwrap_or(0);
    let optimal = geometry.optimal_io_bytes.checked_div(block).unwrap_or(0);
    let sectors = |bytes: u64| bytes.checked_div(SECTOR_BYTES).unwrap_or(0);
    let align = sectors(u64::from(geometry.discard_granularity_bytes)).max(1);

    let mut space = Writer {
        bytes: [0; LEN as usize],
        at: 0,
    };
    space.put(&sectors(geometry.size_bytes).to_le_bytes());
    space.put(&MAX_SEGMENT_BYTES.to_le_bytes());
    space.put(&MAX_SEGMENTS.to_le_bytes());
    // Cylinders, heads, sectors: not offered.
    space.put(&[0; 4]);
    space.put(&block.to_le_bytes());
    space.put(&[u8::try_from(exponent).unwrap_or(0)]);
    // Alignment offset, smallest I/O in blocks.
    space.put(&[0]);
    space.put(&1u16.to_le_bytes());
    space.put(&optimal.to_le_bytes());
    space.put(&[u8::from(writeback), 0]);
    space.put(&queues.to_le_bytes());
    space.put(&MAX_RANGE_SECTORS.to_le_bytes());
    space.put(&MAX_RANGES.to_le_bytes());
    space.put(&u32::try_from(align).unwrap_or(1).to_le_bytes());
    space.put(&MAX_RANGE_SECTORS.to_le_bytes());
    space.put(&MAX_RANGES.to_le_bytes());
    // Write zeroes may give space back.
    space.put(&[u8::from(geometry.discard), 0, 0, 0]);
    space.bytes
}

struct Writer {
    bytes: [u8; LEN as usize],
    at: usize,
}

impl Writer {
    fn put(&mut self, value: &[u8]) {
        let end = self.at.saturating_add(value.len());
        if let Some(place) = self.bytes.get_mut(self.at..end) {
            place.copy_from_slice(value);
        }
        self.at = end;
    }
}
