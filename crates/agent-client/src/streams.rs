//! A process's streams, from its start to its end.

use std::io::{self, Read, Write};
use std::thread;

use alveole_agent_protocol::{Answer, Control, MAX_DATA_BYTES, Stream, WindowSize, from_json};

use crate::AgentError;
use crate::duplex::{Duplex, Sender};
use crate::session::Session;

/// The caller's ends of a process's streams.
#[derive(Default)]
pub struct Streams {
    /// What the process reads. It is read in a thread that outlives the process if it waits for bytes just then: there is no way
    /// to call it back.
    pub input: Option<Box<dyn Read + Send>>,
    /// What the process writes.
    pub output: Option<Box<dyn Write + Send>>,
    /// What it writes beside.
    pub errors: Option<Box<dyn Write + Send>>,
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams")
            .field("input", &self.input.is_some())
            .field("output", &self.output.is_some())
            .field("errors", &self.errors.is_some())
            .finish()
    }
}

/// What can be done to a process while it runs. After its end nothing is done.
#[derive(Clone, Debug)]
pub struct Controls(Sender);

impl Controls {
    /// Sends it a signal.
    pub fn signal(&self, signal: u8) {
        let _ = self.0.message(&Control::Signal(signal));
    }

    /// Tells its terminal another size.
    pub fn resize(&self, size: WindowSize) {
        let _ = self.0.message(&Control::Resize(size));
    }
}

/// Carries the streams of what was asked for, and gives the last answer.
pub(crate) fn carry(
    mut session: Session,
    streams: Streams,
    begun: impl FnOnce(Controls, u32),
) -> Result<Answer, AgentError> {
    let pid = match session.answer()? {
        Answer::Started { pid } => pid,
        _ => {
            return Err(AgentError::Unexpected {
                what: "an answer before the start",
            });
        }
    };
    let mut duplex = Duplex::begin(session)?;
    let sender = duplex.sender();
    duplex.take(Stream::Output, streams.output)?;
    duplex.take(Stream::Errors, streams.errors)?;
    let theirs = sender.clone();
    match streams.input {
        Some(input) => {
            thread::Builder::new()
                .name("input".into())
                .spawn(move || send_input(input, &theirs))?;
        }
        // Whoever is gone is seen below.
        None => drop(theirs.end(Stream::Input)),
    }
    begun(Controls(sender), pid);
    let answer = duplex
        .message()
        .and_then(|json| Ok(from_json(&json, "answer")?));
    let written = duplex.finish();
    let answer = answer?;
    written?;
    match answer {
        Answer::Refused(refusal) => Err(AgentError::Refused(refusal)),
        answer => Ok(answer),
    }
}

fn send_input(mut input: Box<dyn Read + Send>, sender: &Sender) {
    let mut buffer = vec![0; MAX_DATA_BYTES];
    loop {
        // Read only what can be sent: what is read and not sent is lost to whoever reads the same input next.
        let Ok(most) = sender.wait(Stream::Input) else {
            return;
        };
        let most = most.min(buffer.len());
        let count = match input.read(&mut buffer[..most]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            // An input that cannot be read has ended, for whoever reads it there.
            Err(_) | Ok(0) => {
                let _ = sender.end(Stream::Input);
                return;
            }
            Ok(count) => count,
        };
        if sender
            .spend_and_send(Stream::Input, &buffer[..count])
            .is_err()
        {
            return;
        }
    }
}
