//! Saved states. Not used by logic.

use serde::{Deserialize, Serialize};

/// Which kind of device a state is of.
pub(crate) const KIND: &str = "virtio-blk";
/// The newest version of [`BlkStateV1`]'s kind.
pub(crate) const VERSION: u32 = 1;

/// What a disk keeps beside what every device keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BlkStateV1 {
    /// The write-back byte of the configuration space.
    pub(crate) writeback: bool,
    /// Size of the disk that the guest knows, in bytes.
    pub(crate) size_bytes: u64,
}
