//! The saved state of the function. Not used by logic.

use alveole_pci::{ConfigSpaceStateV1, MsixStateV1};
use alveole_virtio::TransportStateV1;
use serde::{Deserialize, Serialize};

/// Which kind of transport a state is of.
pub(crate) const KIND: &str = "virtio-pci";
/// The newest version of [`PciStateV1`]'s kind.
pub(crate) const VERSION: u32 = 1;

/// A device as a PCI function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PciStateV1 {
    /// Device, queues and selectors.
    pub(crate) core: TransportStateV1,
    /// The configuration space: command, BARs, message control, the configuration access window.
    pub(crate) space: ConfigSpaceStateV1,
    /// The MSI-X table.
    pub(crate) msix: MsixStateV1,
    /// The ISR status.
    pub(crate) isr: u8,
    /// The vector of configuration changes.
    pub(crate) config_vector: u16,
    /// The vector of each queue.
    pub(crate) queue_vectors: Vec<u16>,
    /// The generation of the configuration space as drivers see it.
    pub(crate) shown_generation: u8,
    /// The core's generation when that was last looked at.
    pub(crate) seen_generation: u32,
}
