//! Where blocks really are: files, block devices, RAM.
//!
//! A [`BlockStore`] is opened once, with everything that it will ever need, because the process enters a
//! sandbox afterwards. Each queue of a device gets a [`StoreQueue`] of its own: it takes requests whose
//! buffers are checked ranges of guest RAM, hands them to the host in batches and gives them back when
//! they are done.
//!
//! Deliberately does not know: virtio, what a queue of a guest looks like, who waits for the
//! descriptors, how a guest is run.

#![expect(
    unsafe_code,
    reason = "guest RAM is handed to the kernel, and block devices have calls of their own"
)]

mod bounce;
mod carrier;
mod chain;
mod copy;
mod error;
mod file_queue;
mod gate;
mod host_file;
mod inherited;
mod lock;
mod open;
mod options;
mod piece;
mod qcow2_store;
mod ram;
mod raw;
mod request;
mod store;
mod sync;
mod sys;
pub mod tools;
mod uring;

pub use error::{OpenError, StoreError};
pub use host_file::{holder_of, identity_at};
pub use lock::lock_alone;
pub(crate) use open::engine_name;
pub use open::{look, open};
pub use options::{Backing, Cache, Engine, Format, OpenOptions};
pub use ram::RamStore;
pub use store::{BlockStore, Completion, Geometry, Operation, Request, SECTOR_BYTES, StoreQueue};
pub use uring::io_uring_available;
