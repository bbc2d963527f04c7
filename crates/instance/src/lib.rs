//! Guests that run images on this host: a folder for each, a process that keeps it, what it said.
//!
//! There is no daemon. A VM is a folder, and while it runs, a keeper: an ordinary process that holds the folder's lock, has the
//! monitor as its child, carries the guest's main process's streams into the log and to who is attached, and writes down how it ended. Whoever
//! wants something of a VM looks at its folder and asks its keeper by a socket there; nobody is found by a number that might be
//! another's by now.
//!
//! Deliberately does not know: images, networks, what people type, how the machine is described.

mod api;
mod ask;
mod beginning;
mod error;
mod events;
mod folder;
mod identity;
mod keeper;
mod log;
#[expect(unsafe_code, reason = "what runs between fork and exec")]
mod monitor;
mod record;
mod snapshots;
mod stages;
mod streams;
mod volumes;

pub use api::MonitorApi;
pub use ask::{Ask, Attach, ask, attach};
pub use beginning::{Beginning, Restored};
pub use error::InstanceError;
pub use events::{Event, EventReader, Happened};
pub use folder::{KeeperLock, Vm, Vms};
pub use identity::{Identity, renew};
pub use keeper::{Machine, Purpose, Told, keep};
pub use log::{LogEntry, LogReader};
pub use monitor::MonitorTemplate;
pub use record::{Content, Ended, Limits, Phase, Placed, Record, Restart, State};
pub use snapshots::{
    Loading, MEMORY, PACKED, PassingSnapshot, Snapshot, SnapshotRecord, Snapshots, memory_before,
};
pub use stages::{reached, stages_file};
pub use volumes::{Use, Volume, VolumeRecord, Volumes};
