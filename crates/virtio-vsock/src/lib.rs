//! The virtio socket device (virtio 1.3, section 5.10) over unix sockets of the host.
//!
//! Stream connections between ports of the guest and unix sockets of the host, by the convention of
//! Firecracker (its docs/vsock.md): the device listens at a path, where a program of the host connects,
//! writes `CONNECT <port>\n`, reads `OK <port>\n` and then speaks with the guest's port; a connection that
//! the guest begins goes to the unix socket `<path>_<port>`, where a program of the host listens.
//!
//! Bytes go between socket and guest memory without a copy in between; only what a socket does not take at once is
//! kept, and no more of it than the guest has credit for. Connections have their turns one after the other,
//! so that none holds up another.
//!
//! [`VirtioVsock`] is the device, [`VsockHandle`] is for the owner. The socket is bound when the device is
//! made; sockets of connections are made, by the thread that hosts the device, while the guest runs.
//!
//! Deliberately does not know: which transport carries the device, which thread serves it, what is said.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod backlog;
mod board;
mod connection;
mod counters;
mod credit;
mod deadlines;
mod device;
mod greeting;
mod host;
mod packet;
mod state;
mod table;
mod worker;

use std::time::Duration;

pub use counters::VsockCounters;
pub use device::{VirtioVsock, VsockConfig, VsockHandle};
pub use host::VsockError;
pub use packet::{BadPacket, HEADER_BYTES, Header, fuzz_parse, op, read_packet};

/// Context of the host (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// Least context of a guest; those below are reserved, as is `u32::MAX` (section 5.10.4).
pub const MIN_GUEST_CID: u32 = 3;
/// Greatest context of a guest.
pub const MAX_GUEST_CID: u32 = u32::MAX - 1;
/// Longest path of the device's socket: `sun_path` with its final zero is 108 bytes (unix(7)), of which the
/// longest suffix, `_4294967295`, takes eleven.
pub const MAX_PATH_BYTES: usize = 107 - 11;

/// Size of each queue.
pub const QUEUE_SIZE: u16 = 256;
/// Most connections at a time, of both sides together. Abused by a guest, or by a program of the host, that
/// opens and never closes: each costs a descriptor and memory of ours. What is over is refused.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most clients of the host that have not said where they want to go. Abused by a program of the host that
/// connects and says nothing. The one that has waited longest makes room for the next.
pub const MAX_GREETINGS: usize = 128;
/// Longest first line of a client, with its end. `CONNECT 4294967295\r\n` is twenty.
pub const MAX_GREETING_BYTES: usize = 32;
/// How long a client may take to say it. For people who type; see [`MAX_GREETINGS`] for those who do not.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a guest may take to answer a connection of the host. Abused by a guest that never does.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection of the guest waits for a program of the host whose queue of connections is full.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a guest may take to acknowledge the end of a connection (section 5.10.6.5).
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a program of the host may take to read the rest of a connection that the guest has ended.
/// Abused by one that never does.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Most bytes kept for a host that does not read, in one connection: the credit a guest gets
/// (section 5.10.6.3). Abused by a guest that writes to a program that does not read.
pub const MAX_CREDIT_BYTES: u32 = 512 << 10;
/// Least credit, where there are many connections.
pub const MIN_CREDIT_BYTES: u32 = 16 << 10;
/// Most bytes kept for hosts that do not read, in all connections. Abused by a guest that opens as many as
/// it can and writes to programs that do not read.
pub const MAX_TOTAL_CREDIT_BYTES: u64 = 64 << 20;
/// Most bytes that one connection gives the guest before the next one has its turn: how long a fast one may
/// keep the others waiting.
pub const MAX_TURN_BYTES: u64 = 64 << 10;
/// Most answers kept for a guest that gives no buffers for them. Abused by a guest that sends nonsense and
/// takes no answer: from here on none of its packets is read (section 5.10.6.1).
pub const MAX_PENDING_RESETS: usize = 256;
/// Most packets before the loop looks for news again: of connections that were silent until now, and of other workers.
/// Abused by a guest that sends without end, or by a program of the host that does.
pub const PACKETS_PER_TURN: u32 = 64;
/// Most log lines about clients and connections. Abused by whoever can repeat a mistake.
pub const MAX_LOG_LINES: u32 = 10;
