//! What a VM's keeper is asked, over frames of the agent's protocol at a socket in the VM's folder.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use alveole_agent_client::{AgentError, Controls, Session, Streams};
use alveole_agent_protocol::{Answer, Exit};
use serde::{Deserialize, Serialize};

use crate::{InstanceError, Vm};

/// A keeper answers at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// A guest that just starts needs its time, as the keeper bounds it.
const START_PATIENCE: Duration = Duration::from_secs(300);

/// What a keeper is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// To be attached to the main process. Answers as of a process that is run.
    Attach(Attach),
    /// To stop it: ask, wait, kill. Answered when that has begun.
    Stop {
        /// Instead of the image's own signal.
        signal: Option<u8>,
        /// How long the process has.
        grace_ms: u32,
    },
    /// To send the main process a signal.
    Signal(u8),
    /// To end the machine as it is.
    Kill,
}

/// How to be attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attach {
    /// What is typed goes to the process.
    pub input: bool,
    /// It is the one that the VM was started for: the process begins when it is there, waits for what it has not taken, and has the end of
    /// its input. Others are let go of when they take too little.
    pub first: bool,
    /// What was said last comes first.
    pub history: bool,
}

fn session(vm: &Vm, patience: Duration) -> Result<Session, InstanceError> {
    let path = vm.socket("keeper");
    let connection =
        UnixStream::connect(&path).map_err(|_| InstanceError::DoesNotRun(vm.name.clone()))?;
    Ok(Session::begin(connection, patience)?)
}

/// Asks a VM's keeper.
///
/// # Errors
///
/// The VM does not run, or its keeper does not answer.
pub fn ask(vm: &Vm, what: &Ask) -> Result<(), InstanceError> {
    match session(vm, PATIENCE)?.ask(what)? {
        Answer::Done => Ok(()),
        _ => Err(AgentError::Unexpected {
            what: "another answer than that it is done",
        }
        .into()),
    }
}

/// Attaches to a VM's main process until it ends, or until the caller's input says otherwise by ending the connection.
///
/// # Errors
///
/// The VM does not run, or does not start, or the caller's end of a stream fails.
pub fn attach(
    vm: &Vm,
    how: Attach,
    streams: Streams,
    begun: impl FnOnce(Controls, u32),
) -> Result<Exit, InstanceError> {
    match session(vm, START_PATIENCE)?.converse(&Ask::Attach(how), streams, begun)? {
        Answer::Exited(exit) => Ok(exit),
        _ => Err(AgentError::Unexpected {
            what: "another answer than an exit",
        }
        .into()),
    }
}
