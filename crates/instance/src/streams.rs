//! The main process's streams: into the log, and to who is attached.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use alveole_agent_client::Sender;
use alveole_agent_protocol::{Answer, Stream};

use crate::log::{Lines, LogWriter};

/// What was said last, for who attaches later.
const HISTORY_BYTES: usize = 64 << 10;
/// More at once are refused.
const MAX_CLIENTS: usize = 64;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who is attached, and what was said.
pub(crate) struct Hub {
    state: Mutex<HubState>,
    changed: Condvar,
    log: Mutex<LogWriter>,
}

#[derive(Default)]
struct HubState {
    clients: Vec<Client>,
    next: u64,
    history: VecDeque<u8>,
    /// The client that the process begins with has come, or has come and gone.
    had_first: bool,
    /// The process has begun: its number in the guest.
    running: Option<u32>,
    /// What the last answer is, once it is known.
    last: Option<Answer>,
}

struct Client {
    number: u64,
    sender: Sender,
    first: bool,
}

impl Hub {
    pub(crate) fn new(log: LogWriter) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            log: Mutex::new(log),
        })
    }

    /// Waits until the client is there that the process is to begin with; false: it did not come, or has gone.
    pub(crate) fn wait_for_first(&self, patience: Duration) -> bool {
        let state = lock(&self.state);
        let (state, _timeout) = self
            .changed
            .wait_timeout_while(state, patience, |s| !s.had_first)
            .unwrap_or_else(PoisonError::into_inner);
        state.clients.iter().any(|c| c.first)
    }

    /// Adds a client. It gets what is said from now on; nothing is between that and the history.
    pub(crate) fn add(&self, sender: Sender, first: bool, history: bool) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.clients.len() >= MAX_CLIENTS {
            return None;
        }
        state.next += 1;
        let number = state.next;
        if history {
            let said: Vec<u8> = state.history.iter().copied().collect();
            // Less than a window.
            let _ = sender.try_data(Stream::Output, &said);
        }
        if let Some(last) = &state.last {
            let _ = sender.message(last);
        }
        state.had_first |= first;
        state.clients.push(Client {
            number,
            sender,
            first,
        });
        drop(state);
        self.changed.notify_all();
        Some(number)
    }

    pub(crate) fn remove(&self, number: u64) {
        let mut state = lock(&self.state);
        state.clients.retain(|c| c.number != number);
    }

    /// The process's number, when it has begun; none if it never does.
    pub(crate) fn wait_for_start(&self) -> Result<u32, Answer> {
        let state = lock(&self.state);
        let state = self
            .changed
            .wait_while(state, |s| s.running.is_none() && s.last.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match (&state.running, &state.last) {
            (Some(pid), _) => Ok(*pid),
            (None, Some(answer)) => Err(answer.clone()),
            (None, None) => Err(Answer::Done),
        }
    }

    pub(crate) fn begun(&self, pid: u32) {
        lock(&self.state).running = Some(pid);
        self.changed.notify_all();
    }

    /// The process begins anew.
    pub(crate) fn again(&self) {
        lock(&self.state).running = None;
    }

    /// Tells all how it ended.
    pub(crate) fn end(&self, answer: &Answer) {
        let mut state = lock(&self.state);
        state.last = Some(answer.clone());
        for client in &state.clients {
            let _ = client.sender.message(answer);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until all clients have gone, as they do when they know the end.
    pub(crate) fn wait_for_none(&self, patience: Duration) {
        let until = std::time::Instant::now() + patience;
        while !lock(&self.state).clients.is_empty() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn say(&self, stream: Stream, bytes: &[u8]) {
        let mut state = lock(&self.state);
        state.history.extend(bytes);
        let over = state.history.len().saturating_sub(HISTORY_BYTES);
        state.history.drain(..over);
        let mut first = Vec::new();
        state.clients.retain(|client| {
            if client.first {
                first.push(client.sender.clone());
                return true;
            }
            // Who takes too little is let go of: nothing waits for it.
            let sent = client.sender.try_data(stream, bytes) == Ok(true);
            if !sent {
                client.sender.over();
            }
            sent
        });
        drop(state);
        for sender in first {
            // When it is gone its own thread sees it.
            let _ = sender.data(stream, bytes);
        }
    }
}

/// A stream of the main process.
pub(crate) struct Fanout {
    hub: Arc<Hub>,
    stream: Stream,
    lines: Lines,
}

impl Fanout {
    pub(crate) fn new(hub: &Arc<Hub>, stream: Stream) -> Self {
        let name = match stream {
            Stream::Errors => "stderr",
            _ => "stdout",
        };
        Self {
            hub: Arc::clone(hub),
            stream,
            lines: Lines::new(name),
        }
    }
}

impl Write for Fanout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lines.add(bytes, &mut lock(&self.hub.log));
        self.hub.say(self.stream, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Fanout {
    fn drop(&mut self) {
        self.lines.end(&mut lock(&self.hub.log));
    }
}

/// The main process's input: a pipe, into which everybody may write who is attached with input.
#[derive(Clone)]
pub(crate) struct Input(Arc<Mutex<Option<Arc<File>>>>);

impl Input {
    pub(crate) fn new(pipe: File) -> Self {
        Self(Arc::new(Mutex::new(Some(Arc::new(pipe)))))
    }

    /// Nothing more comes.
    pub(crate) fn end(&self) {
        *lock(&self.0) = None;
    }

    /// One client's way in.
    pub(crate) fn writer(&self, ends_it: bool) -> Box<dyn Write + Send> {
        Box::new(InputWriter {
            input: self.clone(),
            ends_it,
        })
    }
}

struct InputWriter {
    input: Input,
    /// The end of this client's input is that of the process's.
    ends_it: bool,
}

impl Write for InputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let pipe = lock(&self.input.0).clone();
        match pipe {
            Some(pipe) => (&*pipe).write(bytes),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for InputWriter {
    fn drop(&mut self) {
        if self.ends_it {
            self.input.end();
        }
    }
}
