//! One connection, from the hello to the answer.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use alveole_agent_protocol::{Answer, Decoder, Frame, Hello, MAX_DATA_BYTES, from_json, to_json};

use crate::AgentError;
use crate::streams::{self, Controls, Streams};

/// A session that has not asked for anything yet.
#[derive(Debug)]
pub struct Session {
    pub(crate) connection: UnixStream,
    pub(crate) decoder: Decoder,
    patience: Duration,
    agent: Hello,
}

impl Session {
    /// Begins a session over a connection that the agent has taken, or has made. It has `patience` for each answer.
    ///
    /// # Errors
    ///
    /// The other side is silent, gone, or no agent that this host can speak with.
    pub fn begin(connection: UnixStream, patience: Duration) -> Result<Self, AgentError> {
        let mut session = Self {
            connection,
            decoder: Decoder::default(),
            patience,
            agent: Hello::ours(),
        };
        session.say(&Hello::ours())?;
        let json = session.message()?;
        session.agent = from_json(&json, "hello")?;
        session.agent.agree()?;
        Ok(session)
    }

    /// What the agent said of itself. Its text is the guest's.
    #[must_use]
    pub fn agent(&self) -> &Hello {
        &self.agent
    }

    /// Asks for something that has streams, and carries them to its end. `begun` is given what controls it, and the number that the
    /// start has. The request may be another protocol's that shares this one's frames.
    ///
    /// # Errors
    ///
    /// It is refused, the other side is gone, or the caller's end of a stream fails.
    pub fn converse(
        mut self,
        request: &impl serde::Serialize,
        streams: Streams,
        begun: impl FnOnce(Controls, u32),
    ) -> Result<Answer, AgentError> {
        self.say(request)?;
        streams::carry(self, streams, begun)
    }

    /// The first message of the other side, where it asks.
    ///
    /// # Errors
    ///
    /// It is silent, gone, or says something else.
    pub fn request<R: serde::de::DeserializeOwned>(&mut self) -> Result<R, AgentError> {
        Ok(from_json(&self.message()?, "request")?)
    }

    /// Answers, where the other side has asked.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn answer_with(&mut self, answer: &impl serde::Serialize) -> Result<(), AgentError> {
        self.say(answer)
    }

    /// Asks, and gives the one answer.
    ///
    /// # Errors
    ///
    /// The agent refuses, is silent, or answers something else.
    pub fn ask(mut self, request: &impl serde::Serialize) -> Result<Answer, AgentError> {
        self.say(request)?;
        self.answer()
    }

    pub(crate) fn say(&mut self, message: &impl serde::Serialize) -> Result<(), AgentError> {
        let mut bytes = Vec::new();
        Frame::Message(to_json(message)?).encode(&mut bytes);
        self.connection.set_write_timeout(Some(self.patience))?;
        self.connection
            .write_all(&bytes)
            .map_err(|e| self.because(e))
    }

    pub(crate) fn answer(&mut self) -> Result<Answer, AgentError> {
        match from_json(&self.message()?, "answer")? {
            Answer::Refused(refusal) => Err(AgentError::Refused(refusal)),
            other => Ok(other),
        }
    }

    fn message(&mut self) -> Result<Vec<u8>, AgentError> {
        let until = Instant::now() + self.patience;
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            match self.decoder.next()? {
                Some(Frame::Message(json)) => return Ok(json),
                Some(_) => {
                    return Err(AgentError::Unexpected {
                        what: "bytes of a stream",
                    });
                }
                None => {}
            }
            // One patience for the whole of it, however slowly it comes.
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.silent());
            }
            self.connection.set_read_timeout(Some(left))?;
            match self.connection.read(&mut buffer) {
                Ok(0) => return Err(AgentError::Ended),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.because(e)),
            }
        }
    }

    fn silent(&self) -> AgentError {
        AgentError::Silent {
            within: self.patience,
        }
    }

    fn because(&self, error: io::Error) -> AgentError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.silent(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => AgentError::Ended,
            _ => AgentError::Connection(error),
        }
    }
}
