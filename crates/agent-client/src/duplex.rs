//! A connection with streams in both directions. Each stream from the other side has a thread that writes it, so that whoever does
//! not take one keeps no other waiting, and no message.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use alveole_agent_protocol::{Credit, Decoder, Frame, MAX_DATA_BYTES, Stream, Window, to_json};
use serde::Serialize;

use crate::AgentError;
use crate::session::Session;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sending half, which any thread may use. Whole frames go, one after the other.
#[derive(Clone, Debug)]
pub struct Sender(Arc<Sending>);

#[derive(Debug)]
struct Sending {
    connection: Mutex<UnixStream>,
    credits: Mutex<Credits>,
    credited: Condvar,
}

#[derive(Debug)]
struct Credits {
    of: [(Stream, Credit); 3],
    over: bool,
}

/// The other side is not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl Credits {
    fn of(&mut self, stream: Stream) -> &mut Credit {
        let at = match stream {
            Stream::Input => 0,
            Stream::Output => 1,
            Stream::Errors => 2,
        };
        &mut self.of[at].1
    }
}

impl Sender {
    fn frame(&self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        lock(&self.0.connection).write_all(&bytes)
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// The other side is gone, or the message is too long to be one.
    pub fn message(&self, message: &impl Serialize) -> Result<(), Gone> {
        let json = to_json(message).map_err(|_| Gone)?;
        self.frame(&Frame::Message(json)).map_err(|_| Gone)
    }

    /// Sends bytes of a stream, waiting for credit.
    ///
    /// # Errors
    ///
    /// The other side is gone.
    pub fn data(&self, stream: Stream, mut bytes: &[u8]) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let most = self.wait(stream)?.min(MAX_DATA_BYTES).min(bytes.len());
            let (now, later) = bytes.split_at(most);
            self.spend_and_send(stream, now)?;
            bytes = later;
        }
        Ok(())
    }

    /// Sends bytes of a stream if there is credit for all of them; says whether.
    ///
    /// # Errors
    ///
    /// The other side is gone.
    pub fn try_data(&self, stream: Stream, bytes: &[u8]) -> Result<bool, Gone> {
        if lock(&self.0.credits).of(stream).bytes() < bytes.len() {
            return Ok(false);
        }
        for piece in bytes.chunks(MAX_DATA_BYTES) {
            self.spend_and_send(stream, piece)?;
        }
        Ok(true)
    }

    /// Ends a stream.
    ///
    /// # Errors
    ///
    /// The other side is gone.
    pub fn end(&self, stream: Stream) -> Result<(), Gone> {
        self.frame(&Frame::End(stream)).map_err(|_| Gone)
    }

    /// Nobody waits for credit any more.
    pub fn over(&self) {
        lock(&self.0.credits).over = true;
        self.0.credited.notify_all();
        // What waits for room in the socket, too.
        let _ = lock_if_free(&self.0.connection).map(|c| c.shutdown(Shutdown::Both));
    }

    /// How many bytes may go, at least one.
    pub(crate) fn wait(&self, stream: Stream) -> Result<usize, Gone> {
        let credits = lock(&self.0.credits);
        let mut credits = self
            .0
            .credited
            .wait_while(credits, |c| !c.over && c.of(stream).bytes() == 0)
            .unwrap_or_else(PoisonError::into_inner);
        if credits.over {
            return Err(Gone);
        }
        Ok(credits.of(stream).bytes())
    }

    /// One thread sends a stream's bytes, so that the credit which was waited for is still there.
    pub(crate) fn spend_and_send(&self, stream: Stream, bytes: &[u8]) -> Result<(), Gone> {
        lock(&self.0.credits).of(stream).spend(bytes.len());
        let mut frame = Vec::with_capacity(bytes.len() + alveole_agent_protocol::HEADER_BYTES);
        Frame::encode_data(stream, bytes, &mut frame);
        lock(&self.0.connection).write_all(&frame).map_err(|_| Gone)
    }
}

fn lock_if_free<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    mutex.try_lock().ok()
}

/// A stream from the other side.
struct Sink {
    stream: Stream,
    window: Arc<Mutex<Window>>,
    /// To the thread that writes it. At most a window of bytes is in it.
    bytes: mpsc::Sender<Vec<u8>>,
}

/// The receiving half.
pub struct Duplex {
    connection: UnixStream,
    decoder: Decoder,
    sender: Sender,
    sinks: Vec<Sink>,
    threads: Vec<(Stream, JoinHandle<io::Result<()>>)>,
}

impl std::fmt::Debug for Duplex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Duplex").finish_non_exhaustive()
    }
}

impl Duplex {
    /// Goes on with a session whose streams begin. From here on there is no patience: it takes what it takes.
    ///
    /// # Errors
    ///
    /// The connection cannot be used.
    pub fn begin(session: Session) -> Result<Self, AgentError> {
        let Session {
            connection,
            decoder,
            ..
        } = session;
        connection.set_read_timeout(None::<Duration>)?;
        connection.set_write_timeout(None::<Duration>)?;
        let credits = Credits {
            of: [Stream::Input, Stream::Output, Stream::Errors].map(|s| (s, Credit::default())),
            over: false,
        };
        let sending = Sending {
            connection: Mutex::new(connection.try_clone()?),
            credits: Mutex::new(credits),
            credited: Condvar::new(),
        };
        Ok(Self {
            connection,
            decoder,
            sender: Sender(Arc::new(sending)),
            sinks: Vec::new(),
            threads: Vec::new(),
        })
    }

    /// The sending half.
    #[must_use]
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Takes a stream from the other side; without a writer its bytes are thrown away. A stream that is not taken may not come.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn take(
        &mut self,
        stream: Stream,
        to: Option<Box<dyn Write + Send>>,
    ) -> Result<(), AgentError> {
        let (bytes, come) = mpsc::channel();
        let window = Arc::new(Mutex::new(Window::default()));
        let (theirs, sender) = (Arc::clone(&window), self.sender());
        let thread = thread::Builder::new()
            .name("stream".into())
            .spawn(move || write(stream, to, &come, &theirs, &sender))?;
        self.threads.push((stream, thread));
        self.sinks.push(Sink {
            stream,
            window,
            bytes,
        });
        Ok(())
    }

    /// The next message; streams go their ways meanwhile.
    ///
    /// # Errors
    ///
    /// The other side is gone, or what it sends is not the protocol.
    pub fn message(&mut self) -> Result<Vec<u8>, AgentError> {
        let mut buffer = vec![0; 2 * MAX_DATA_BYTES];
        loop {
            while let Some(frame) = self.decoder.next()? {
                match frame {
                    Frame::Message(json) => return Ok(json),
                    Frame::Credit(stream, bytes) => {
                        lock(&self.sender.0.credits).of(stream).add(bytes)?;
                        self.sender.0.credited.notify_all();
                    }
                    Frame::Data(stream, bytes) => {
                        let sink = self.sinks.iter().find(|sink| sink.stream == stream);
                        let sink = sink.ok_or(AgentError::Unexpected {
                            what: "bytes of a stream that does not come from there, or has ended",
                        })?;
                        lock(&sink.window).came(bytes.len())?;
                        // Empty ones have no window that bounds them.
                        if !bytes.is_empty() {
                            let _ = sink.bytes.send(bytes);
                        }
                    }
                    Frame::End(stream) => self.sinks.retain(|sink| sink.stream != stream),
                }
            }
            match (&self.connection).read(&mut buffer) {
                Ok(0) => return Err(AgentError::Ended),
                Ok(count) => self.decoder.push(&buffer[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(AgentError::Ended);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Ends the connection and waits until all that came is written.
    ///
    /// # Errors
    ///
    /// A stream could not be written.
    pub fn finish(mut self) -> Result<(), AgentError> {
        self.sinks.clear();
        lock(&self.sender.0.credits).over = true;
        self.sender.0.credited.notify_all();
        let mut result = Ok(());
        for (stream, thread) in self.threads.drain(..) {
            let written = thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the thread that writes it has ended")));
            let named = written.map_err(|source| AgentError::Stream {
                stream: match stream {
                    Stream::Input => "input",
                    Stream::Output => "output",
                    Stream::Errors => "errors",
                },
                source,
            });
            result = result.and(named);
        }
        // The other side waits until its last words are taken.
        let _ = self.connection.shutdown(Shutdown::Both);
        result
    }
}

fn write(
    stream: Stream,
    mut to: Option<Box<dyn Write + Send>>,
    come: &Receiver<Vec<u8>>,
    window: &Mutex<Window>,
    sender: &Sender,
) -> io::Result<()> {
    let mut result = Ok(());
    for bytes in come {
        if let Some(writer) = &mut to {
            let written = writer.write_all(&bytes).and_then(|()| writer.flush());
            if written.is_err() {
                // The rest is thrown away, so that the other side goes on or ends.
                result = written;
                to = None;
            }
        }
        if let Some(credit) = lock(window).passed(bytes.len()) {
            // The reader sees it if the connection has ended.
            let _ = sender.frame(&Frame::Credit(stream, credit));
        }
    }
    result
}
