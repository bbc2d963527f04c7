//! The virtio network device (virtio 1.3, section 5.1).
//!
//! Moves frames between a guest's queues and a [`alveole_net_link::NetLink`], straight between guest memory and the
//! link: one system call for each frame, however many segments the other side will cut it into, and none for
//! notifications while there is more to do. Each pair of queues has a worker of its own, and so has the control queue.
//!
//! [`VirtioNet`] is the device; [`NetHandle`] is for the owner: counters, live change of limits and of the link's
//! state, the request to announce the guest after a move. Nothing is opened after the device was made.
//!
//! Deliberately does not know: where frames go, which transport carries the device, which thread serves it.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod config;
mod config_space;
mod control;
mod control_worker;
mod counters;
mod device;
mod frame;
mod handle;
mod lane;
mod receive;
mod shared;
mod state;
mod transmit;
mod vhost;
mod worker;

pub use config::{NetConfig, NetError};
pub use control::{Command, fuzz_control};
pub use counters::NetCounters;
pub use device::VirtioNet;
pub use frame::{BadFrame, FrameRules, ParsedFrame, fuzz_frame};
pub use handle::NetHandle;

/// Default size of the queues that send, and of the control queue.
pub const QUEUE_SIZE: u16 = 256;
/// Default size of the queues that receive. A long frame takes 17 buffers of the size that Linux gives, so that 256
/// of them hold no more than 15 frames, and the link waits for the guest again and again.
pub const RX_QUEUE_SIZE: u16 = 512;
/// Most pairs of queues: as many as a machine has processors.
pub const MAX_PAIRS: u16 = 64;
/// Most frames of the guest before a pair looks at the other direction and tells the driver. Abused by a guest that
/// keeps one direction busy. A long frame counts for several: what it answers must not wait for as many
/// of them as of short ones.
pub const TX_FRAMES_PER_BURST: u32 = 32;
/// The same for frames to the guest, abused by its network. More, as an interrupt for few of them leaves a guest that
/// goes to sleep in between.
pub const RX_FRAMES_PER_BURST: u32 = 128;
/// Most frames of one pair before other workers of the same loop have their turn, counted alike. Abused by a guest that
/// keeps one pair busy on a shared loop.
pub const FRAMES_PER_TURN: u32 = 1024;

/// A frame counts for one, and for one more for each so many bytes: what the kernel needs for a short one is what it
/// needs to copy so many.
const BYTES_PER_FRAME: u64 = 8192;

/// For how many a frame of so many bytes counts, beside itself.
fn extra_weight(len_bytes: u64) -> u32 {
    let extra = len_bytes.checked_div(BYTES_PER_FRAME).unwrap_or_default();
    u32::try_from(extra).unwrap_or(u32::MAX)
}
