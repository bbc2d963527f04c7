//! What a host and the agent in its guest say to each other: frames over a stream, messages in them, and windows
//! that keep one stream from holding up another.
//!
//! Deliberately does not know: what the stream is (a socket of vsock, a unix socket), how a process is started, what
//! people type. Either side takes the other for hostile: all is bounded, and nothing here panics on what it reads.
//!
//! # A session
//!
//! One connection carries one session. Both sides first send a [`Hello`]. Then the host sends one [`Request`], and the agent
//! answers with [`Answer`]s; the last one ends the session. A request with streams (a process, a copy) has up to three:
//! [`Stream::Input`] to the guest, [`Stream::Output`] and [`Stream::Errors`] from it. Whoever sends bytes of a stream
//! needs credit for them: [`WINDOW_BYTES`] to begin with, more by each [`Frame::Credit`] as the receiver has
//! passed bytes on. So a receiver never holds more than a window of each stream, and a stream that nobody reads never
//! keeps a signal, an exit status or another stream waiting.

mod credit;
mod frame;
mod message;

pub use credit::{Credit, OverWindow, Window};
pub use frame::{
    Decoder, Frame, FrameError, HEADER_BYTES, MAX_DATA_BYTES, MAX_MESSAGE_BYTES, Stream,
};
pub use message::{
    Answer, Changes, Control, CopyIn, CopyOut, DeviceMetrics, Exit, FileSystemMetrics, Hello,
    HookRun, MAX_ENTROPY_BYTES, MAX_HOOKS_MS, MemoryMetrics, MessageError, Metrics, Mount,
    NetworkMetrics, Pressure, Process, ProcessMetrics, Refusal, Renewal, Renewed, RenewedInterface,
    RenewedPart, Request, Setup, Shutdown, ShutdownHow, Source, Volume, WindowSize, from_json,
    to_json,
};

/// The version of this protocol. It grows when a session of the version before would misunderstand one of this; new
/// requests, fields and answers do not count, as both sides pass over what they do not know (a request is
/// refused).
pub const PROTOCOL: u32 = 1;

/// The port of vsock where the agent serves sessions.
pub const AGENT_PORT: u32 = 1024;

/// The port of the host (context 2) that the agent connects to when it has started: the first session goes over that connection,
/// so that a host need not ask again and again whether the guest is there. The host's request on it is [`Request::Setup`].
pub const READY_PORT: u32 = 1025;

/// How many bytes of a stream may be under way before its receiver has passed some on.
///
/// It is what a receiver keeps in memory for each stream of each session.
pub const WINDOW_BYTES: u32 = 256 << 10;
