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
mod worker;

pub use config::{NetConfig, NetError};
pub use control::{Command, fuzz_control};
pub use counters::NetCounters;
pub use device::VirtioNet;
pub use frame::{BadFrame, FrameRules, ParsedFrame, fuzz_frame};
pub use handle::NetHandle;

/// Default size of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most pairs of queues: as many as a machine has processors.
pub const MAX_PAIRS: u16 = 64;
/// Most frames in one direction before a pair looks at the other direction and tells the driver. Abused by a guest, or
/// its network, that keeps one direction busy.
pub const FRAMES_PER_BURST: u32 = 32;
/// Most frames of one pair before other workers of the same loop have their turn. Abused by a guest that keeps one
/// pair busy on a shared loop.
pub const FRAMES_PER_TURN: u32 = 1024;
