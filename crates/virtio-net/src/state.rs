//! Saved states. Not used by logic.

use serde::{Deserialize, Serialize};

/// Which kind of device a state is of.
pub(crate) const KIND: &str = "virtio-net";
/// The newest version of [`NetStateV1`]'s kind.
pub(crate) const VERSION: u32 = 1;

/// What a network device keeps beside what every device keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NetStateV1 {
    /// The address that the driver knows.
    pub(crate) mac: [u8; 6],
    /// Pairs of queues that frames may be spread over.
    pub(crate) pairs: u16,
    /// The driver was asked to announce itself, and has not answered.
    pub(crate) is_announcing: bool,
    /// The offloads that the driver has set by command, as feature bits.
    pub(crate) guest_offloads: Option<u64>,
    /// The MTU that the driver may have read.
    pub(crate) mtu: Option<u16>,
    /// The cable is out. Not told of one that is in, so that programs which did not know of it read such states.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) cable_is_out: bool,
}
