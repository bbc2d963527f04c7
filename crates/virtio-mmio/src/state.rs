//! The saved state of the register block. Not used by logic.

use alveole_virtio::TransportStateV1;
use serde::{Deserialize, Serialize};

/// Which kind of transport a state is of.
pub(crate) const KIND: &str = "virtio-mmio";
/// The newest version of [`MmioStateV1`]'s kind.
pub(crate) const STATE_VERSION: u32 = 1;

/// A device by virtio-mmio.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MmioStateV1 {
    /// Device, queues and selectors.
    pub(crate) core: TransportStateV1,
    /// The causes that the driver has not acknowledged.
    pub(crate) interrupt_status: u32,
}
