//! Saved states: the form that all of them have, and the core's own. Not used by logic.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::RestoreError;

/// The state of a device or a transport as bytes that name their kind and version. May come from a hostile
/// file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// What this is a state of.
    pub kind: String,
    /// Version of its form.
    pub version: u32,
    /// The state itself.
    pub bytes: Vec<u8>,
}

impl SavedState {
    /// A state of this kind and version. `state` is a plain structure of numbers, texts and lists.
    #[must_use]
    pub fn pack(kind: &str, version: u32, state: &impl Serialize) -> Self {
        Self {
            kind: kind.to_owned(),
            version,
            // Such structures have nothing that could fail; no bytes at all would be refused by unpack.
            bytes: serde_json::to_vec(state).unwrap_or_default(),
        }
    }

    /// What was packed.
    ///
    /// # Errors
    /// It is of another kind or version, or no such structure.
    pub fn unpack<T: DeserializeOwned>(&self, kind: &str, version: u32) -> Result<T, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::Kind {
                wanted: kind.to_owned(),
                found: self.kind.clone(),
            });
        }
        if self.version != version {
            return Err(RestoreError::Version {
                kind: kind.to_owned(),
                found: self.version,
                known: version,
            });
        }
        serde_json::from_slice(&self.bytes).map_err(|e| RestoreError::Invalid {
            kind: kind.to_owned(),
            why: e.to_string(),
        })
    }
}

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
