//! Moves bytes between sockets and conversations, commands out and answers back.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_vm_control::{Answer, Command, Refusal, Reply, Request};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::conversation::Conversation;
use crate::{ApiSocket, MAX_CONNECTIONS};

/// Where requests go. Called on the API's thread; must not block.
pub type SendRequest = Box<dyn Fn(Request) + Send>;

const LISTENER: Token = Token(0);
const BELL: Token = Token(1);
const TIMER: Token = Token(2);
const FIRST_CONNECTION: u32 = 3;

/// Bytes that are read in one go: one page, and more than most requests have.
const READ_BYTES: usize = 4 << 10;
/// Clients that are taken in one go. Abused by a program that connects in a loop: those who are connected get their
/// turn in between.
const ACCEPTS_PER_EVENT: usize = 8;

/// How long no client is taken when the host could not give one a descriptor: it stays in the queue of the socket, which
/// would be reported all the time.
const DEAF: Duration = Duration::from_millis(100);

/// An answer, and the number of the connection that it is for.
type Answered = (u64, Result<Answer, Refusal>);

/// Serves the API on an event loop.
pub(crate) struct Server {
    socket: ApiSocket,
    max_body_bytes: usize,
    send: SendRequest,
    connections: Vec<Option<Connection>>,
    /// Numbers of connections so far: a slot is used again, a number is not.
    numbers: u64,
    /// Counts what clients do, to know who has been silent for the longest time.
    moments: u64,
    answers: Receiver<Answered>,
    to_answers: Sender<Answered>,
    /// Rung when there are answers.
    bell: Arc<EventFd>,
    /// Fires when clients are taken again.
    timer: TimerFd,
    scratch: Vec<u8>,
}

struct Connection {
    number: u64,
    stream: UnixStream,
    talk: Conversation,
    /// None: it is not watched.
    watched: Option<Interest>,
    /// When the client has last sent or taken something.
    last_moment: u64,
}

impl Server {
    /// A server that speaks on `socket`, takes bodies of `max_body_bytes` and hands requests to `send`.
    pub(crate) fn new(
        socket: ApiSocket,
        max_body_bytes: usize,
        send: SendRequest,
    ) -> io::Result<Self> {
        let (to_answers, answers) = mpsc::channel();
        Ok(Self {
            socket,
            max_body_bytes,
            send,
            connections: (0..MAX_CONNECTIONS).map(|_| None).collect(),
            numbers: 0,
            moments: 0,
            answers,
            to_answers,
            bell: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            timer: TimerFd::new()?,
            scratch: vec![0; READ_BYTES],
        })
    }

    /// Writes the answers that are there and that clients take at once. The machine has ended, and the loop too.
    pub(crate) fn finish(mut self) {
        while let Ok((number, outcome)) = self.answers.try_recv() {
            let mut open = self.connections.iter_mut().flatten();
            if let Some(connection) = open.find(|c| c.number == number) {
                connection.talk.answer(&outcome);
                connection.write();
            }
        }
    }

    fn accept(&mut self, ops: &mut Ops<'_>) {
        for _ in 0..ACCEPTS_PER_EVENT {
            let stream = match self.socket.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    log::debug!("the API cannot take a client now: {e}");
                    if self.timer.reset(DEAF, None).is_ok() {
                        // Fails only for what is not watched.
                        let _ = ops.unwatch(LISTENER);
                    }
                    return;
                }
            };
            if let Err(e) = stream.set_nonblocking(true) {
                log::warn!("the API cannot take a client: {e}");
                continue;
            }
            self.numbers += 1;
            self.moments += 1;
            let mut connection = Connection {
                number: self.numbers,
                stream,
                talk: Conversation::new(self.max_body_bytes),
                watched: None,
                last_moment: self.moments,
            };
            match self.slot(ops) {
                Some(slot) => {
                    if let Some(place) = self.connections.get_mut(slot) {
                        *place = Some(connection);
                    }
                    self.watch(slot, ops);
                }
                None => {
                    connection.talk.turn_away(&format!(
                        "{MAX_CONNECTIONS} requests are being carried out already; try again later"
                    ));
                    connection.write();
                }
            }
        }
    }

    /// A slot for a new connection: a free one, or that of who has been silent for the longest time and waits for
    /// nothing.
    fn slot(&mut self, ops: &mut Ops<'_>) -> Option<usize> {
        if let Some(free) = self.connections.iter().position(Option::is_none) {
            return Some(free);
        }
        let open = self.connections.iter().enumerate();
        let open = open.filter_map(|(slot, connection)| Some((slot, connection.as_ref()?)));
        let idle = open.filter(|(_, connection)| !connection.talk.is_waiting());
        let (slot, _) = idle.min_by_key(|(_, connection)| connection.last_moment)?;
        log::info!("the API closes the connection that has been silent for the longest time");
        self.close(slot, ops);
        Some(slot)
    }

    fn close(&mut self, slot: usize, ops: &mut Ops<'_>) {
        if let Some(connection) = self.connections.get_mut(slot).and_then(Option::take)
            && connection.watched.is_some()
        {
            // Fails only for what is not watched.
            let _ = ops.unwatch(token(slot));
        }
    }

    /// Goes on with the connection as far as it gets without waiting.
    fn go_on(&mut self, slot: usize, ops: &mut Ops<'_>) {
        let Self {
            connections,
            to_answers,
            bell,
            send,
            ..
        } = self;
        let Some(connection) = connections.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        loop {
            if let Some(command) = connection.talk.next_command() {
                send(request(command, connection.number, to_answers, bell));
            }
            if connection.talk.output().is_empty() {
                break;
            }
            if !connection.write() {
                self.close(slot, ops);
                return;
            }
            if !connection.talk.output().is_empty() {
                break;
            }
        }
        if connection.talk.is_over() {
            self.close(slot, ops);
        } else {
            self.watch(slot, ops);
        }
    }

    /// Watches the connection for what can be done on it now.
    fn watch(&mut self, slot: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        let wanted = if !connection.talk.output().is_empty() {
            Interest::WRITABLE
        } else if connection.talk.room() > 0 {
            Interest::READABLE
        } else {
            // Its request is being carried out. It stays watched until there is something to report: most clients wait
            // for their answer, and are spared two system calls.
            return;
        };
        let done = match connection.watched {
            None => ops.watch(&connection.stream, token(slot), wanted),
            Some(watched) if watched != wanted => ops.rewatch(token(slot), wanted),
            Some(_) => Ok(()),
        };
        match done {
            Ok(()) => connection.watched = Some(wanted),
            Err(e) => {
                log::warn!("the API cannot watch a connection: {e}");
                self.close(slot, ops);
            }
        }
    }

    fn on_connection(&mut self, slot: usize, event: Event, ops: &mut Ops<'_>) {
        self.moments += 1;
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        connection.last_moment = self.moments;
        if event.ready.error() {
            self.close(slot, ops);
            return;
        }
        if connection.talk.is_waiting() {
            // It has sent more, or hung up, while its request is carried out. Until then that would be reported all the
            // time.
            if connection.watched.take().is_some() {
                let _ = ops.unwatch(token(slot));
            }
            return;
        }
        // Who has hung up may have sent something before; there is an end to read in any case.
        let readable = event.ready.readable() || event.ready.hung_up();
        if readable && !connection.read(&mut self.scratch) {
            self.close(slot, ops);
            return;
        }
        self.go_on(slot, ops);
    }

    fn on_answers(&mut self, ops: &mut Ops<'_>) {
        while let Ok((number, outcome)) = self.answers.try_recv() {
            let is_it = |c: &Option<Connection>| c.as_ref().is_some_and(|c| c.number == number);
            let Some(slot) = self.connections.iter().position(is_it) else {
                continue;
            };
            if let Some(Some(connection)) = self.connections.get_mut(slot) {
                connection.talk.answer(&outcome);
            }
            self.go_on(slot, ops);
        }
    }
}

fn request(
    command: Command,
    number: u64,
    to_answers: &Sender<Answered>,
    bell: &Arc<EventFd>,
) -> Request {
    let (to_answers, bell) = (to_answers.clone(), bell.clone());
    Request {
        command,
        reply: Reply::new(move |outcome| {
            // A server that is gone wants no answers.
            let _ = to_answers.send((number, outcome));
            // Fails only with the counter at its maximum, after some 10^19 answers.
            let _ = bell.write(1);
        }),
    }
}

fn token(slot: usize) -> Token {
    Token(FIRST_CONNECTION + u32::try_from(slot).unwrap_or(u32::MAX - FIRST_CONNECTION))
}

impl Connection {
    /// Reads once. False: the connection is broken.
    fn read(&mut self, scratch: &mut [u8]) -> bool {
        let room = self.talk.room().min(scratch.len());
        let Some(into) = scratch.get_mut(..room).filter(|into| !into.is_empty()) else {
            return true;
        };
        match self.stream.read(into) {
            Ok(0) => self.talk.end_of_input(),
            Ok(len) => self.talk.take(into.get(..len).unwrap_or_default()),
            Err(e) if would_block(&e) => {}
            Err(_) => return false,
        }
        true
    }

    /// Writes as much as the client takes. False: the connection is broken.
    fn write(&mut self) -> bool {
        while !self.talk.output().is_empty() {
            match self.stream.write(self.talk.output()) {
                Ok(0) => return false,
                Ok(len) => self.talk.wrote(len),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if would_block(&e) => return true,
                Err(_) => return false,
            }
        }
        true
    }
}

fn would_block(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

impl Worker for Server {
    fn name(&self) -> &'static str {
        "api"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        ops.watch(&self.socket.listener, LISTENER, Interest::READABLE)?;
        ops.watch(&self.timer, TIMER, Interest::READABLE | Interest::EDGE)?;
        // Each ring is reported, whatever the count: it is never read.
        let rings = Interest::READABLE | Interest::EDGE;
        ops.watch(self.bell.as_ref(), BELL, rings)
    }

    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>) {
        match event.token {
            LISTENER => self.accept(ops),
            BELL => self.on_answers(ops),
            TIMER => {
                let listener = &self.socket.listener;
                if let Err(e) = ops.watch(listener, LISTENER, Interest::READABLE) {
                    log::error!("the API takes no more clients: {e}");
                }
            }
            Token(other) => {
                let slot = usize::try_from(other.saturating_sub(FIRST_CONNECTION));
                self.on_connection(slot.unwrap_or(usize::MAX), event, ops);
            }
        }
    }
}
