use std::io;
use std::path::PathBuf;
use std::time::Duration;

use alveole_agent_protocol::{FrameError, MessageError, OverWindow, Refusal};

/// Why something was not done by the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// There is no monitor at the socket.
    #[error("cannot connect to the guest at '{}': {source}; is it still running?", socket.display())]
    Connect {
        /// The monitor's unix socket of vsock.
        socket: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The monitor is there, and nobody in the guest listens.
    #[error("the agent in the guest does not take the connection (the monitor at '{}' said {said:?}): has the guest started, and is its agent alive?", socket.display())]
    NoAgent {
        /// The monitor's unix socket of vsock.
        socket: PathBuf,
        /// What it said instead of `OK`.
        said: String,
    },
    /// It does not answer.
    #[error("the agent in the guest does not answer within {} s: is the guest paused, hung, or very busy?", within.as_secs_f32())]
    Silent {
        /// How long it had.
        within: Duration,
    },
    /// The connection ended early.
    #[error("the connection to the agent in the guest ended: has the guest, or its agent, ended?")]
    Ended,
    /// It could not be used.
    #[error("the connection to the agent in the guest: {0}")]
    Connection(#[from] io::Error),
    /// What came is not of the protocol.
    #[error("what the guest sent is not the agent's protocol: {0}")]
    Frame(#[from] FrameError),
    /// What came is not of the protocol.
    #[error("what the guest sent is not the agent's protocol: {0}")]
    Window(#[from] OverWindow),
    /// A message cannot be sent, or what came is none.
    #[error("{0}")]
    Message(#[from] MessageError),
    /// What came has no place here.
    #[error("the agent in the guest sent {what} where it has no place")]
    Unexpected {
        /// What came.
        what: &'static str,
    },
    /// The agent says no.
    #[error("{}", .0.shown())]
    Refused(Refusal),
    /// The caller's own end of a stream.
    #[error("cannot write the guest's {stream}: {source}")]
    Stream {
        /// Which one.
        stream: &'static str,
        /// Why not.
        source: io::Error,
    },
}
