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
mod end;
mod layout;
mod lifecycle;
mod resources;
mod validate;

pub use alveole_virtio_blk::BlkHandle;
pub use build::{BuildError, DiskThreads, Options, Placement, Transport, build};
pub use control::{Event, Machine, Mailbox, Milestones};
pub use end::End;
pub use lifecycle::{Command, Lifecycle, permit};
pub use resources::{HostResources, ResourceError};
pub use validate::{
    Invalid, MAX_CPUS, MAX_DRIVES, MAX_QUEUES, MIN_MEMORY_MIB, ValidConfig, validate,
};
