//! The API of a machine: HTTP/1.1 on a unix socket, spoken as Firecracker's contract says.
//!
//! A thread of its own, in a sandbox from its first act, turns requests into [`Command`]s and answers into
//! responses. It never waits but for its descriptors: a command goes out with a reply, and other clients are
//! served until the answer comes back. On one connection requests are carried out one after the other.
//!
//! - `http.rs` reads the head of a request, `conversation.rs` is what is said on one connection: both pure.
//! - `routes.rs` is the table of what is served.
//! - `server.rs` moves bytes between sockets and conversations, `thread.rs` runs it, `socket.rs` makes the socket.
//!
//! Deliberately does not know: the machine, how a command is carried out, when it may be.
//!
//! [`Command`]: alveole_vm_control::Command

mod conversation;
mod http;
mod routes;
mod server;
mod socket;
mod thread;

#[doc(hidden)]
pub mod fuzz;

pub use server::SendRequest;
pub use socket::{ApiSocket, SocketError};
pub use thread::{ApiThread, StartError};

/// Version of the contract that is spoken: what `GET /version` tells.
pub const API_VERSION: &str = "1.17.0";

/// Largest body that is taken unless it is said otherwise, in bytes; Firecracker's.
pub const DEFAULT_MAX_BODY_BYTES: usize = 51_200;

/// Longest request line and headers together, in bytes. Abused by a client that sends headers for ever.
pub const MAX_HEAD_BYTES: usize = 8 << 10;

/// Most headers of a request. Abused by a client that sends many small ones.
pub const MAX_HEADERS: usize = 64;

/// Most connections at the same time. Abused by a client that opens them and says nothing: the one that has been
/// silent for the longest time makes room for a new one.
pub const MAX_CONNECTIONS: usize = 32;

/// Longest path of a unix socket, in bytes: `sun_path` of unix(7) without the zero at its end.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
