//! Saved states. Not used by logic.

use serde::{Deserialize, Serialize};

/// Which kind of device a state is of.
pub(crate) const KIND: &str = "virtio-vsock";
/// The newest version of [`VsockStateV1`]'s kind.
pub(crate) const VERSION: u32 = 1;

/// What the device keeps beside what every device keeps. Connections are not among it: their other ends are
/// programs of a host that go on without the guest, and the guest is told that they are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VsockStateV1 {
    /// The context of the guest that was saved.
    pub(crate) guest_cid: u32,
}
