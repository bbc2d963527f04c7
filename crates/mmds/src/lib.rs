//! The metadata service: what its owner stores, a guest reads by HTTP at 169.254.169.254.
//!
//! [`Metadata`] is the store, shared by the owner and the interfaces. [`detour`] puts the service in front of a link:
//! frames that the guest sends to the service's address are answered by a TCP stack (`smoltcp`) inside this process, and never
//! reach the link; all others pass. The protocol is that of Firecracker's MMDS, versions 1 and 2 (sessions with a
//! token), with its IMDS form.
//!
//! Deliberately does not know: which interfaces it is configured for, how the owner speaks to it, what the data mean.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod counters;
mod data;
mod http;
mod link;
mod service;
mod stack;
mod token;

pub use counters::MetadataCounters;
pub use data::{DataError, Form};
pub use link::detour;
pub use service::{Metadata, MetadataConfig, Version};

/// Where a guest finds the service unless its owner says otherwise.
pub const DEFAULT_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);
/// The hardware address that answers for it: locally administered, and never seen outside of the guest.
pub const HARDWARE_ADDRESS: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
/// Most bytes of the data, as JSON, unless the owner says otherwise.
pub const DEFAULT_LIMIT_BYTES: usize = 51_200;
/// Most connections of one interface at once. Abused by a guest that opens them and says nothing: the one that has been
/// silent for the longest time makes room.
pub const MAX_CONNECTIONS: usize = 16;
/// Most bytes of a request, its head and body. Abused by a guest that sends a head without end.
pub const MAX_REQUEST_BYTES: usize = 4096;
/// Most tokens that are good at the same time. Abused by a guest that asks for tokens without end: the one that ends first goes.
pub const MAX_TOKENS: usize = 1024;
/// Most frames that wait for the guest to take them. Abused by a guest that asks and gives no buffers.
pub const MAX_WAITING_FRAMES: usize = 32;

/// What fuzz targets call: frames of a guest, each after its length in two bytes.
#[cfg(any(test, feature = "testing"))]
pub fn fuzz_frames(bytes: &[u8]) {
    stack::fuzz(bytes);
}

/// What fuzz targets call: one request.
#[cfg(any(test, feature = "testing"))]
pub fn fuzz_request(bytes: &[u8]) {
    service::fuzz(bytes);
}
