//! Validates, builds and drives exactly one VM.
//!
//! `validate` turns a wire description into a checked one; `build` goes through typed steps, each of which
//! consumes the one before; `Machine::run` is the control thread: it owns every change of state until the
//! guest has ended. `catalog.rs` is the only place that names devices, `layout.rs` the only one that says
//! where things lie in the guest.
//!
//! Deliberately does not know: command lines, exit codes, how a description was read.

mod build;
mod catalog;
mod control;
mod desk;
mod end;
mod files;
mod layout;
mod lifecycle;
mod resources;
mod snapshot;
mod validate;

pub use alveole_virtio_blk::BlkHandle;
pub use build::{
    BuildError, DiskThreads, OnSigterm, Options, Placement, Transport, build, restore,
};
pub use control::{Event, Machine, Mailbox, Milestones, Tick};
pub use desk::{Bulletin, Desk, Identity};
pub use end::End;
pub use files::{Files, FilesError, Opened};
pub use lifecycle::{Change, Lifecycle, next};
pub use resources::{HostResources, ResourceError};
pub use snapshot::{
    Flatten, Flattened, LoadError, Prepared, SNAPSHOT_VERSION, Snapshot, Taken, Verified, flatten,
    verify,
};
pub use validate::{
    Invalid, MAX_CPUS, MAX_DRIVES, MAX_QUEUES, MIN_MEMORY_MIB, NotForHost, SERIAL_BYTES,
    ValidConfig, validate,
};
