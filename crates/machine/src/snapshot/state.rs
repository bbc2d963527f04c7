//! Forms of sections that are not a device's. Not used by logic.

use std::path::PathBuf;

use alveole_guest_memory::{GuestRam, MemoryMap, RamRange};
use serde::{Deserialize, Serialize};

/// What `--snapshot-version` says: the version of the form of files, and of what a machine is made of.
pub const SNAPSHOT_VERSION: &str = "1.0.0";
/// Where things lie in the guest ([`crate::layout`]). Changes when one of them moves.
pub(crate) const LAYOUT: u32 = 1;

/// The description, as the API tells it.
pub(crate) const DESCRIPTION: &str = "description";
pub(crate) const DESCRIPTION_VERSION: u32 = 1;

pub(crate) const MACHINE: &str = "machine";
pub(crate) const MACHINE_VERSION: u32 = 1;

/// What the description does not say of a machine, and a guest can see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineStateV1 {
    /// [`LAYOUT`].
    pub(crate) layout: u32,
    /// What carries virtio devices.
    pub(crate) transport: TransportV1,
    /// Whether there is a boot timer.
    pub(crate) boot_timer: bool,
    /// When it was saved: the host's wall time, in ns since 1970.
    pub(crate) saved_at_ns: u64,
}

/// What carries virtio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TransportV1 {
    Mmio,
    Pci,
}

pub(crate) const MEMORY: &str = "memory";
pub(crate) const MEMORY_VERSION: u32 = 1;

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryStateV1 {
    /// Its ranges.
    pub(crate) ranges: Vec<RangeV1>,
    /// Files that have it, the oldest first. What a later one has counts.
    pub(crate) layers: Vec<LayerV1>,
}

impl MemoryStateV1 {
    /// Bytes of all ranges.
    pub(crate) fn size_bytes(&self) -> u64 {
        let sizes = self.ranges.iter().map(|range| range.size_bytes);
        sizes.fold(0, u64::saturating_add)
    }

    /// Whether `ram` has these ranges.
    pub(crate) fn is_laid_out_as(&self, ram: &GuestRam) -> bool {
        let ranges = ram.mapped_ranges().map(|(range, _)| RangeV1::from(range));
        ranges.eq(self.ranges.iter().copied())
    }
}

/// A range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RangeV1 {
    /// First guest-physical address.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) size_bytes: u64,
}

impl From<RamRange> for RangeV1 {
    fn from(range: RamRange) -> Self {
        let RamRange { start, size_bytes } = range;
        Self { start, size_bytes }
    }
}

/// A file with pages of guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayerV1 {
    /// Where it was written: an absolute path.
    pub(crate) path: PathBuf,
    /// What its mark says, in hexadecimal digits.
    pub(crate) id: String,
    /// Which pages it has.
    pub(crate) map: MemoryMap,
}

/// The mark that follows the pages in a memory file: this, then [`LayerV1::id`].
pub(crate) const MARK: &[u8; 24] = b"ALVEOLE guest memory 1\0\n";
/// Bytes of an id, which has two digits for each.
pub(crate) const ID_BYTES: usize = 16;
/// Length of the mark.
pub(crate) const MARK_BYTES: usize = MARK.len() + 2 * ID_BYTES;

/// Optional: absent where no image was copied.
pub(crate) const DRIVES: &str = "drives";
pub(crate) const DRIVES_VERSION: u32 = 1;

/// A disk whose image was copied at the instant of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DriveCopyV1 {
    /// Its name in the description, which says where the image was that the guest went on with.
    pub(crate) drive_id: String,
    /// Where the copy was put: an absolute path.
    pub(crate) path: PathBuf,
}

pub(crate) const PARTITION: &str = "partition";
pub(crate) const PARTITION_VERSION: u32 = 1;
pub(crate) const CPU_VERSION: u32 = 1;

/// The section of a processor.
pub(crate) fn cpu(index: usize) -> String {
    format!("cpu {index}")
}

/// The section of a virtio device behind its transport, by its place.
pub(crate) fn device(index: usize) -> String {
    format!("device {index}")
}

pub(crate) const DEVICE_VERSION: u32 = 1;
