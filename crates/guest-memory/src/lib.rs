//! Maps guest RAM and copies in and out of it.
//!
//! The only crate that maps guest RAM. What it hands out are copies, never references: the guest may
//! change any byte at any time, so a value is read once, into an owned buffer, and checked there. Bulk data
//! goes between files and RAM without a copy, by [`GuestBuffers`].
//!
//! Deliberately does not know: what lies in RAM, which hypervisor sees it, which devices read it.

#![expect(unsafe_code, reason = "mapping RAM is this crate's job")]

mod buffers;
mod capture;
mod child;
mod hugetlb;
mod instant;
mod mapping;
mod memory_map;
mod page_set;
mod plan;
mod ram;
mod save;
mod served;
mod snapshot;
mod sockets;
#[cfg(any(test, feature = "test-server"))]
pub mod test_huge_pages;
#[cfg(any(test, feature = "test-server"))]
pub mod test_server;
mod written;

pub use buffers::{GuestBuffers, MAX_IOVECS};
pub use capture::{Capture, CaptureError, Death, PreparedCapture};
pub use hugetlb::{HostPages, HugePagePool};
pub use memory_map::{
    LayerRun, MAX_LAYERS, MemoryMap, MemoryMapError, PageKind, PageRun, newest_of_layers,
};
pub use page_set::{PageSet, PageSetError};
pub use plan::{HOLE_END, HOLE_START, MAX_SIZE_BYTES, MemoryPlan, PlanError, RamRange};
pub use ram::{AccessError, GuestRam, MapError, VmMemory};
pub use save::SaveError;
pub use served::{PageServer, ServeError};
pub use snapshot::{MAX_MAPPINGS, read_ahead};
pub use vm_memory;
pub use vm_memory::{ByteValued, GuestAddress};
pub use written::{WriteLog, WriteLogSlice};

/// Size of the smallest page of guest and host, in bytes.
pub const PAGE_SIZE: u64 = 4096;
