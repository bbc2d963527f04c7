//! A process's streams. Each has a thread, so that whoever does not read one keeps no other waiting, and none an exit status.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use alveole_agent_protocol::{
    Answer, Control, Credit, Decoder, Frame, MAX_DATA_BYTES, Stream, Window, WindowSize, from_json,
    to_json,
};

use crate::AgentError;
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
pub struct Controls(Arc<Sending>);

impl Controls {
    /// Sends it a signal.
    pub fn signal(&self, signal: u8) {
        self.say(&Control::Signal(signal));
    }

    /// Tells its terminal another size.
    pub fn resize(&self, size: WindowSize) {
        self.say(&Control::Resize(size));
    }

    fn say(&self, control: &Control) {
        if let Ok(json) = to_json(control) {
            let _ = self.0.send(&Frame::Message(json));
        }
    }
}

/// The connection, as all threads write to it: whole frames, one after the other.
#[derive(Debug)]
struct Sending {
    connection: Mutex<UnixStream>,
    /// For the input. None: it is over.
    credit: Mutex<Option<Credit>>,
    credited: Condvar,
}

impl Sending {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        lock(&self.connection).write_all(&bytes)
    }

    fn over(&self) {
        *lock(&self.credit) = None;
        self.credited.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    let Session {
        connection,
        decoder,
        ..
    } = session;
    // From here on it takes what it takes.
    connection.set_read_timeout(None)?;
    connection.set_write_timeout(None::<Duration>)?;
    let sending = Arc::new(Sending {
        connection: Mutex::new(connection.try_clone()?),
        credit: Mutex::new(Some(Credit::default())),
        credited: Condvar::new(),
    });
    match streams.input {
        Some(input) => {
            let sending = Arc::clone(&sending);
            thread::Builder::new()
                .name("input".into())
                .spawn(move || send_input(input, &sending))?;
        }
        None => sending.send(&Frame::End(Stream::Input))?,
    }
    let mut incoming = [
        Incoming::begin(Stream::Output, streams.output, &sending)?,
        Incoming::begin(Stream::Errors, streams.errors, &sending)?,
    ];
    begun(Controls(Arc::clone(&sending)), pid);
    let answer = receive(&connection, decoder, &mut incoming, &sending);
    sending.over();
    let written = incoming.into_iter().map(Incoming::finish);
    let written = written.collect::<Result<Vec<()>, _>>();
    // The agent waits until its last words are taken.
    let _ = connection.shutdown(Shutdown::Both);
    let answer = answer?;
    written?;
    match answer {
        Answer::Refused(refusal) => Err(AgentError::Refused(refusal)),
        answer => Ok(answer),
    }
}

fn send_input(mut input: Box<dyn Read + Send>, sending: &Sending) {
    let mut buffer = vec![0; MAX_DATA_BYTES];
    loop {
        let most = {
            let credit = lock(&sending.credit);
            let waits =
                |credit: &mut Option<Credit>| credit.as_ref().is_some_and(|c| c.bytes() == 0);
            let credit = sending
                .credited
                .wait_while(credit, waits)
                .unwrap_or_else(PoisonError::into_inner);
            match credit.as_ref() {
                Some(credit) => credit.bytes().min(buffer.len()),
                None => return,
            }
        };
        let count = match input.read(&mut buffer[..most]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            // An input that cannot be read has ended, for whoever reads it there.
            Err(_) | Ok(0) => {
                let _ = sending.send(&Frame::End(Stream::Input));
                return;
            }
            Ok(count) => count,
        };
        match lock(&sending.credit).as_mut() {
            Some(credit) => credit.spend(count),
            None => return,
        }
        let frame = Frame::Data(Stream::Input, buffer[..count].to_vec());
        if sending.send(&frame).is_err() {
            return;
        }
    }
}

/// A stream from the guest.
struct Incoming {
    stream: Stream,
    window: Arc<Mutex<Window>>,
    /// To the thread that writes it. At most a window of bytes is in it.
    bytes: Option<Sender<Vec<u8>>>,
    thread: JoinHandle<io::Result<()>>,
}

impl Incoming {
    fn begin(
        stream: Stream,
        to: Option<Box<dyn Write + Send>>,
        sending: &Arc<Sending>,
    ) -> io::Result<Self> {
        let (bytes, come) = mpsc::channel();
        let window = Arc::new(Mutex::new(Window::default()));
        let theirs = Arc::clone(&window);
        let sending = Arc::clone(sending);
        let thread = thread::Builder::new()
            .name("output".into())
            .spawn(move || write(stream, to, &come, &theirs, &sending))?;
        Ok(Self {
            stream,
            window,
            bytes: Some(bytes),
            thread,
        })
    }

    /// Waits until all is written.
    fn finish(mut self) -> Result<(), AgentError> {
        self.bytes = None;
        let stream = match self.stream {
            Stream::Errors => "errors",
            _ => "output",
        };
        match self.thread.join() {
            Ok(written) => written.map_err(|source| AgentError::Stream { stream, source }),
            Err(_) => Err(AgentError::Unexpected {
                what: "what ended a thread",
            }),
        }
    }
}

fn write(
    stream: Stream,
    mut to: Option<Box<dyn Write + Send>>,
    come: &Receiver<Vec<u8>>,
    window: &Mutex<Window>,
    sending: &Sending,
) -> io::Result<()> {
    let mut result = Ok(());
    for bytes in come {
        if let Some(writer) = &mut to {
            let written = writer.write_all(&bytes).and_then(|()| writer.flush());
            if written.is_err() {
                // The rest is thrown away, so that the guest's process goes on or ends.
                result = written;
                to = None;
            }
        }
        if let Some(credit) = lock(window).passed(bytes.len()) {
            // The reader sees it if the connection has ended.
            let _ = sending.send(&Frame::Credit(stream, credit));
        }
    }
    result
}

fn receive(
    mut connection: &UnixStream,
    mut decoder: Decoder,
    incoming: &mut [Incoming; 2],
    sending: &Sending,
) -> Result<Answer, AgentError> {
    let mut buffer = vec![0; 2 * MAX_DATA_BYTES];
    loop {
        while let Some(frame) = decoder.next()? {
            match frame {
                Frame::Message(json) => return Ok(from_json(&json, "answer")?),
                Frame::Credit(Stream::Input, bytes) => {
                    if let Some(credit) = lock(&sending.credit).as_mut() {
                        credit.add(bytes)?;
                    }
                    sending.credited.notify_all();
                }
                Frame::Data(stream, bytes) => {
                    let into = of(incoming, stream)?;
                    lock(&into.window).came(bytes.len())?;
                    // Empty ones have no window that bounds them.
                    if let Some(thread) = into.bytes.as_ref().filter(|_| !bytes.is_empty()) {
                        let _ = thread.send(bytes);
                    }
                }
                Frame::End(stream) => of(incoming, stream)?.bytes = None,
                Frame::Credit(..) => {
                    return Err(AgentError::Unexpected {
                        what: "credit for its own stream",
                    });
                }
            }
        }
        match connection.read(&mut buffer) {
            Ok(0) => return Err(AgentError::Ended),
            Ok(count) => decoder.push(&buffer[..count]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(AgentError::Ended),
            Err(e) => return Err(e.into()),
        }
    }
}

fn of(incoming: &mut [Incoming; 2], stream: Stream) -> Result<&mut Incoming, AgentError> {
    let found = incoming.iter_mut().find(|one| one.stream == stream);
    found.ok_or(AgentError::Unexpected {
        what: "bytes of the process's input",
    })
}
