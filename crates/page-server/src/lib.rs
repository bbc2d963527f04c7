//! Memory files of snapshots: packed into chunks of zstd, unpacked, and served page by page to monitors by userfaultfd(2).
//!
//! The packed form is the seekable format of zstd (facebook/zstd, contrib/seekable_format, version 0.1.0), so that `zstd -d` unpacks it.
//! The protocol is Firecracker's (its docs/snapshotting/handling-page-faults-on-snapshot-resume.md): whoever speaks it is served.
//!
//! Files may come from elsewhere and monitors run guests: nothing that either says is trusted. Deliberately does not know: what a page means, how a
//! machine is built of it, who takes and keeps snapshots.

#![expect(unsafe_code, reason = "pages are put in by ioctls of userfaultfd")]

mod client;
mod fuzz;
mod mark;
mod memory;
mod message;
mod pack;
mod packed;
mod seek_table;
mod serve;
mod uffd;
mod zeroes;

pub use fuzz::{fuzz_message, fuzz_packed};
pub use mark::{Layer, MarkError, SavedMemory};
pub use memory::Memory;
pub use pack::{Sizes, pack};
pub use packed::{PackedError, PackedMemory, is_packed};
pub use serve::{ServeError, Serving, serve};
pub use uffd::may_be_served;

/// Size of the pages that are served; a memory file has no other.
pub const PAGE_BYTES: u64 = 4096;
