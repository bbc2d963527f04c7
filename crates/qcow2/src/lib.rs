//! A focused qcow2 engine, versions 2 and 3: where the bytes of a guest's disk lie in an image file, and
//! how new ones get a place (QEMU docs/interop/qcow2.txt).
//!
//! Look-ups are cheap and shared; data in place are read and written by the caller, who may be as
//! asynchronous as he likes. Everything that changes tables goes through here, synchronously.
//!
//! An image is hostile: whatever is in it is checked where it is used, and nothing it says decides how
//! much memory is taken beyond named limits.
//!
//! # What is on the disk when
//!
//! A process may be killed at any point, and then the page cache has all of its writes, in order. A host
//! may crash at any point, and then any of the writes since the last sync may be lost, whichever came
//! first. The rules that make both harmless:
//!
//! 1. **Tables are written at once.** An L2 entry is in the file when the write that needed it completes,
//!    so a killed process loses nothing that was completed. The cache never holds more than the file.
//! 2. **Data before the entry that shows them.** A new cluster is filled and synced, then its L2 entry is
//!    written. The sync is left out where the cluster reads as zeroes on the disk already and the guest
//!    read zeroes, too: then any mixture of old and new that a crash leaves is one that a plain disk may
//!    leave. (A cluster at the end of the file is known to be zero: the file gets its length, durably,
//!    before the cluster is given out.) New L2 tables follow the same rule with their L1 entry.
//! 3. **Counts.** Version 3 marks the image dirty, durably, before the first allocation, and then writes
//!    counts when it likes; they are right after a clean close. A dirty image gets its counts rebuilt from
//!    the tables when it is opened for writing, so whatever an entry on the disk points to is in use.
//!    Version 2 cannot say "dirty": there, counts are durable before a cluster is given out, some at a
//!    time, and a crash leaks the rest.
//! 4. **Nothing is given away twice.** A cluster that lost its last reference becomes free when the table
//!    without that reference is durable: after the next sync. If a sync fails, it never does.
//! 5. **Guest offsets keep their place.** See `zero`: a discarded cluster stays allocated, so a write
//!    in place that is on its way cannot land in somebody else's data.
//!
//! Deliberately does not know: what a guest or a virtual device is, where backing files are and whether
//! one may open them, io_uring, threads, file locks, encryption, external data files.

#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unreachable,
        clippy::cast_possible_truncation
    )
)]

mod bytes;
mod cache;
mod check;
mod compressed;
mod create;
mod durable;
mod entry;
mod error;
mod file;
mod fuzz;
mod geometry;
mod header;
mod image;
mod recount;
mod refcounts;
mod resize;
mod scan;
mod writer;
mod zero;

pub use check::{CheckError, Report, check};
pub use create::{CreateOptions, create};
pub use error::{ImageError, OpenError};
pub use file::{BackingRead, ImageFile, NoBacking};
pub use fuzz::fuzz_open_and_read;
pub use header::{Backing, Compression};
pub use image::{Access, Extent, Image, Info, WriteExtent};
pub use recount::Repair;
