//! A guest, by the unix socket of its monitor's vsock device.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use alveole_agent_protocol::{
    AGENT_PORT, Answer, Exit, MAX_HOOKS_MS, Metrics, Process, Renewal, Renewed, Request, Shutdown,
};

use crate::AgentError;
use crate::session::Session;
use crate::streams::{Controls, Streams};

/// So often a clock is read, until an answer was quick enough: a host that starts many guests at once lets each of them wait.
const CLOCK_TRIES: u32 = 16;
/// Between a question and its answer.
const CLOCK_WANTED_NS: i128 = 4_000_000;

/// The longest line that a monitor says when it connects: `OK` and a port.
const MAX_LINE_BYTES: usize = 64;

/// A guest whose agent can be asked.
#[derive(Clone, Debug)]
pub struct Guest {
    socket: PathBuf,
    patience: Duration,
    /// The socket is the agent's own, not a monitor's.
    direct: bool,
}

impl Guest {
    /// The guest whose monitor has its vsock device at this unix socket. Its agent has `patience` for each answer.
    #[must_use]
    pub fn new(socket: &Path, patience: Duration) -> Self {
        Self {
            socket: socket.into(),
            patience,
            direct: false,
        }
    }

    /// What is served by an agent at a unix socket of this host (`alveole-agent serve`).
    #[must_use]
    pub fn direct(socket: &Path, patience: Duration) -> Self {
        Self {
            direct: true,
            ..Self::new(socket, patience)
        }
    }

    /// Begins a session.
    ///
    /// # Errors
    ///
    /// There is no monitor, no agent, or it does not answer.
    pub fn session(&self) -> Result<Session, AgentError> {
        let mut connection =
            UnixStream::connect(&self.socket).map_err(|source| AgentError::Connect {
                socket: self.socket.clone(),
                source,
            })?;
        if !self.direct {
            self.pass_through(&mut connection)?;
        }
        Session::begin(connection, self.patience)
    }

    /// The monitor's part: `CONNECT port`, `OK port`.
    fn pass_through(&self, connection: &mut UnixStream) -> Result<(), AgentError> {
        connection.set_read_timeout(Some(self.patience))?;
        // A monitor that does not take it says no by ending the connection: that is read below.
        let _ = connection.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes());
        let mut line = Vec::new();
        // A byte at a time: what follows the line is the agent's.
        while line.last() != Some(&b'\n') && line.len() < MAX_LINE_BYTES {
            let mut byte = [0];
            match connection.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                Ok(_) => break,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(AgentError::Silent {
                        within: self.patience,
                    });
                }
                Err(_) => break,
            }
        }
        if line.starts_with(b"OK ") && line.ends_with(b"\n") {
            return Ok(());
        }
        Err(AgentError::NoAgent {
            socket: self.socket.clone(),
            said: String::from_utf8_lossy(&line).trim_end().to_owned(),
        })
    }

    /// Runs a process and carries its streams until it has ended. `begun` is given what signals it and changes the size of
    /// its terminal, and its number in the guest.
    ///
    /// # Errors
    ///
    /// It could not be started, the guest is gone, or the caller's end of a stream fails.
    pub fn run(
        &self,
        process: &Process,
        streams: Streams,
        begun: impl FnOnce(Controls, u32),
    ) -> Result<Exit, AgentError> {
        self.carry(&Request::Run(Box::new(process.clone())), streams, begun)
    }

    /// Goes on with a process that outlived its session, by the number that it had there, as [`Guest::run`] does.
    ///
    /// # Errors
    ///
    /// As of [`Guest::run`]; none waits by that number.
    pub fn rejoin(
        &self,
        pid: u32,
        streams: Streams,
        begun: impl FnOnce(Controls, u32),
    ) -> Result<Exit, AgentError> {
        self.carry(&Request::Rejoin { pid }, streams, begun)
    }

    fn carry(
        &self,
        request: &Request,
        streams: Streams,
        begun: impl FnOnce(Controls, u32),
    ) -> Result<Exit, AgentError> {
        match self.session()?.converse(request, streams, begun)? {
            Answer::Exited(exit) => Ok(exit),
            _ => Err(AgentError::Unexpected {
                what: "another answer than an exit",
            }),
        }
    }

    /// Copies an archive: into the guest from `streams.input`, or out of it to `streams.output`.
    ///
    /// # Errors
    ///
    /// It could not be done, the guest is gone, or the caller's end of a stream fails.
    pub fn copy(&self, request: &Request, streams: Streams) -> Result<(), AgentError> {
        match self.session()?.converse(request, streams, |_, _| {})? {
            Answer::Done => Ok(()),
            _ => Err(AgentError::Unexpected {
                what: "another answer than the end of a copy",
            }),
        }
    }

    /// How the guest says it does. None of it is proved.
    ///
    /// # Errors
    ///
    /// The agent does not answer, or answers something else.
    pub fn metrics(&self) -> Result<Metrics, AgentError> {
        match self.session()?.ask(&Request::Metrics)? {
            Answer::Metrics(metrics) => Ok(*metrics),
            _ => Err(AgentError::Unexpected {
                what: "another answer than metrics",
            }),
        }
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    ///
    /// The agent does not answer, or cannot.
    pub fn set_clock(&self, unix_ns: u64) -> Result<(), AgentError> {
        self.done(&Request::SetClock { unix_ns })
    }

    /// Corrects the guest's clock by steps, which are right however long they are under way, and gives how far it may be off after
    /// that: half of the time of the quickest answer. An agent that is busy is asked again, some times.
    ///
    /// # Errors
    ///
    /// The agent does not answer, cannot, or is too old to know what this is ([`Refusal::UNKNOWN_REQUEST`]).
    ///
    /// [`Refusal::UNKNOWN_REQUEST`]: alveole_agent_protocol::Refusal::UNKNOWN_REQUEST
    pub fn correct_clock(&self) -> Result<Duration, AgentError> {
        // How far the guest is ahead: at least, at most.
        let (mut least, mut most) = (i128::MIN, i128::MAX);
        for _ in 0..CLOCK_TRIES {
            let session = self.session()?;
            let before = now_ns();
            let guest = i128::from(step(session, 0)?);
            let after = now_ns();
            // It was read some time in between.
            least = least.max(guest - after);
            most = most.min(guest - before);
            if most - least <= CLOCK_WANTED_NS {
                break;
            }
        }
        let ahead = least.midpoint(most);
        let by_ns = i64::try_from(-ahead).unwrap_or(if ahead > 0 { i64::MIN } else { i64::MAX });
        step(self.session()?, by_ns)?;
        let off = u64::try_from((most - least) / 2).unwrap_or(u64::MAX);
        Ok(Duration::from_nanos(off))
    }

    /// Makes the guest somebody else, and says what became of it, part by part; none of it is proved. Its hooks have their time besides the
    /// patience for the agent. To `unix_ns`, which is the time of the call, what it takes to reach the agent is added.
    ///
    /// # Errors
    ///
    /// The agent does not answer, or is too old to know what this is ([`Refusal::UNKNOWN_REQUEST`]).
    ///
    /// [`Refusal::UNKNOWN_REQUEST`]: alveole_agent_protocol::Refusal::UNKNOWN_REQUEST
    pub fn renew(&self, renewal: &Renewal) -> Result<Renewed, AgentError> {
        let hooks = renewal.hooks_ms.unwrap_or(0).min(MAX_HOOKS_MS);
        let patient = Self {
            patience: self.patience + Duration::from_millis(hooks.into()),
            ..self.clone()
        };
        let begun = Instant::now();
        let session = patient.session()?;
        let mut renewal = renewal.clone();
        // A guest that has just been restored may take a while to its first answer.
        let passed_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        renewal.unix_ns = renewal.unix_ns.map(|ns| ns.saturating_add(passed_ns));
        match session.ask(&Request::Renew(Box::new(renewal)))? {
            Answer::Renewed(renewed) => Ok(*renewed),
            _ => Err(AgentError::Unexpected {
                what: "another answer than what became of a renewal",
            }),
        }
    }

    /// Sends a signal to a process that a session runs.
    ///
    /// # Errors
    ///
    /// There is no such process, or the agent does not answer.
    pub fn signal(&self, pid: u32, signal: u8) -> Result<(), AgentError> {
        self.done(&Request::Signal { pid, signal })
    }

    /// Begins the guest's end; the monitor's end says that it is done.
    ///
    /// # Errors
    ///
    /// The agent does not answer.
    pub fn shut_down(&self, how: Shutdown) -> Result<(), AgentError> {
        self.done(&Request::Shutdown(how))
    }

    fn done(&self, request: &Request) -> Result<(), AgentError> {
        match self.session()?.ask(request)? {
            Answer::Done => Ok(()),
            _ => Err(AgentError::Unexpected {
                what: "another answer than that it is done",
            }),
        }
    }
}

fn step(session: Session, by_ns: i64) -> Result<u64, AgentError> {
    match session.ask(&Request::StepClock { by_ns })? {
        Answer::Clock { unix_ns } => Ok(unix_ns),
        _ => Err(AgentError::Unexpected {
            what: "another answer than a time",
        }),
    }
}

/// Nanoseconds since 1970.
fn now_ns() -> i128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| i128::try_from(now.as_nanos()).unwrap_or(i128::MAX))
}
