//! Networks of guests on this host: bridges, VLANs, NAT, addresses, names and policy by the host's kernel, and
//! user mode for those without rights.
//!
//! Deliberately does not know: how a guest is run, how its device moves frames (`alveole-net-link` opens what
//! this makes), how people ask (`alveole-cli`). It is never linked into the VMM.

mod attach;
mod error;
mod file;
pub mod guest_config;
mod here;
mod host;
mod kernel;
mod lease;
mod networks;
mod plan;
#[expect(unsafe_code, reason = "what runs between fork and exec")]
mod programs;
mod resolver;
mod rules;
mod spec;
mod state;
#[expect(unsafe_code, reason = "the ioctls of taps")]
mod tap;
pub mod user;
mod words;

pub use alveole_egress_rules::{Action, Destination, Egress, Ports, Protocol, Rule, WordError};
pub use attach::{Attach, Attachment, Plug};
pub use error::Error;
pub use file::{NetworkFile, read_file};
pub use here::Here;
pub use kernel::OUR_GROUP;
pub use lease::{Lease, Port, Process};
pub use networks::{Networks, Report, Watch};
pub use plan::{Desired, Link, Observed, Plan, Route, Step, plan};
pub use resolver::{Answers, Running, answers};
pub use rules::{Ruleset, TABLE, ruleset};
pub use spec::{Mode, NetworkRequest, NetworkSpec};
pub use state::{Folders, NetworkState, SettingsBefore};
pub use words::{InterfaceName, Mac, NetworkName, VmName};

/// FNV-1a over words: the same for ever, as names and addresses are made of it. Nothing secret depends on it.
pub(crate) fn hash(words: &[&str]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.bytes().chain([0]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // FNV leaves its last bytes' traces in the low bits only.
    (hash ^ hash >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ hash >> 29
}
