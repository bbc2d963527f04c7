//! Saved states of the core. Not used by logic.

use alveole_saved_state::SavedState;
use serde::{Deserialize, Serialize};

/// What the core keeps of a device, and the device's own state. A part of a transport's state, which has the
/// version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportStateV1 {
    /// The device status.
    pub status: u8,
    /// Whether NEEDS_RESET is set.
    pub needs_reset: bool,
    /// The features the driver has taken.
    pub driver_features: u64,
    /// Which half of the offered features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is written.
    pub driver_feature_select: u32,
    /// Which queue the queue registers belong to.
    pub queue_select: u16,
    /// The generation of the configuration space.
    pub config_generation: u32,
    /// Every queue.
    pub queues: Vec<QueueStateV1>,
    /// The device's own state.
    pub device: SavedState,
}

/// One queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueStateV1 {
    /// Size in descriptors.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
    /// Guest address of the descriptor table.
    pub descriptors_addr: u64,
    /// Guest address of the available ring.
    pub available_addr: u64,
    /// Guest address of the used ring.
    pub used_addr: u64,
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}
