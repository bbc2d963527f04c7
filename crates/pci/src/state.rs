//! Saved states of the parts of a function. Not used by logic.

use serde::{Deserialize, Serialize};

/// A configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigSpaceStateV1 {
    /// All of it, as the guest reads it.
    pub bytes: Vec<u8>,
}

/// An MSI-X table with its pending bits. Whether messages are enabled or masked as a whole stands in the
/// configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixStateV1 {
    /// Every entry.
    pub entries: Vec<MsixEntryStateV1>,
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixEntryStateV1 {
    /// Where its message goes.
    pub address: u64,
    /// What is written there.
    pub data: u32,
    /// Its own mask.
    pub masked: bool,
    /// A message waits to be sent.
    pub pending: bool,
}
