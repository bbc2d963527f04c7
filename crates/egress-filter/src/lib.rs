//! What a guest may send by one interface: a decoration of its link.
//!
//! [`Policy`] is rules in the words of `egress-rules` with what `host`, `guests` and `resolvers` stand for. [`filter`] puts it in
//! front of a link: the headers of each frame are copied out of guest memory, judged, and sent as they were judged; the rest
//! goes by reference and is not looked at. Answers to what came from outside pass: what came is noted as the link has it, not as the
//! guest's memory has.
//!
//! Deliberately does not know: devices, descriptions of machines, where addresses come from.

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
mod frame;
mod heard;
mod link;
mod policy;
mod refusal;

pub use counters::EgressCounters;
pub use link::filter;
pub use policy::Policy;

/// What is copied and looked at of a frame, in bytes: an Ethernet header, an IPv6 header, some extension headers and a TCP header.
/// What has its ports further behind is refused.
pub const HEAD_BYTES: usize = 128;
/// Most extension headers of an IPv6 packet that are passed over. A guest could make a chain of empty ones; real packets have one.
pub const MAX_EXTENSION_HEADERS: usize = 4;
/// Most peers that are remembered because they began to talk to the guest. Abused from outside, by beginning under ever new
/// addresses: those that have not been answered for the longest time are forgotten.
pub const MAX_PEERS: usize = 16_384;
/// For how long the guest may answer a datagram, in seconds. A guest could keep what a peer once sent as a licence to talk to it.
pub const ANSWER_SECONDS: u64 = 180;
/// Most refusals that wait for the guest to read them. Abused by a guest that asks and gives no buffers.
pub const MAX_WAITING_REFUSALS: usize = 32;
/// Most lines about frames of one interface that were refused. Abused by a guest that tries for ever: further ones are counted.
pub const MAX_LOG_LINES: u64 = 32;

/// What fuzz targets call: bytes as a frame in either direction, which must neither panic nor be judged by what lies behind its
/// headers.
#[cfg(any(test, feature = "testing"))]
pub fn fuzz(bytes: &[u8]) {
    link::fuzz(bytes);
}
