//! The virtio block device (virtio 1.3, section 5.2).
//!
//! Turns descriptor chains into requests to a [`alveole_block_store::BlockStore`], as many at a time as the
//! queue has, in batches: what the guest made available since the last look goes to the host by one system
//! call, and one interrupt tells of all that is complete. Each queue has a worker of its own, which an event
//! loop hosts.
//!
//! [`VirtioBlk`] is the device; [`BlkHandle`] is for the owner: counters, live change of limits, size and
//! medium. Nothing is opened after the device was made.
//!
//! Deliberately does not know: how blocks are stored, which transport carries the device, which thread
//! serves it.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod config_space;
mod counters;
mod device;
mod gather;
mod lane;
mod request;
mod state;
mod worker;

pub use counters::BlkCounters;
pub use device::{BlkConfig, BlkError, BlkHandle, Medium, VirtioBlk};
pub use request::{BadRequest, Kind, ParsedRequest, Range, fuzz_parse};

/// Most data segments of a request (`seg_max`): with header and status byte a chain of 256, which drivers
/// put into one indirect table.
pub const MAX_SEGMENTS: u32 = 254;
/// Longest data segment (`size_max`), in bytes. What is longer is served all the same; this is for drivers
/// that must split somewhere.
pub const MAX_SEGMENT_BYTES: u32 = 16 << 20;
/// Default size of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most ranges in one discard or write-zeroes request. Abused by a guest that makes one descriptor into
/// thousands of requests to the host.
pub const MAX_RANGES: u32 = 32;
/// Most sectors in one of those ranges: 1 GiB. Abused by a guest that keeps the host busy writing zeroes
/// with one descriptor.
pub const MAX_RANGE_SECTORS: u32 = 1 << 21;
/// Length of a disk's identity, in bytes (section 5.2.6).
pub const ID_BYTES: usize = 20;
