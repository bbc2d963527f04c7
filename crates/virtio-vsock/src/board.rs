//! All connections of a device: who they are, what is watched, when somebody has waited for too long. Knows sockets
//! and packets, no rings.

mod from_guest;
mod from_host;
mod to_guest;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use alveole_event_loop::{Interest, Ops, Token};

use crate::connection::{Connection, Phase};
use crate::counters::VsockCounters;
use crate::credit::Pool;
use crate::deadlines::Deadlines;
use crate::host::HostSocket;
use crate::packet::{Header, op};
use crate::table::Table;
use crate::{MAX_LOG_LINES, MAX_PENDING_RESETS};

pub(crate) use to_guest::Output;

/// Tokens of what a board watches. Smaller ones are the worker's.
pub(crate) const LISTENER: Token = Token(8);
pub(crate) const TIMER: Token = Token(9);
/// Of the connection at place 0.
const FIRST_SOCKET: u32 = 16;

/// How long before a full queue of connections is tried again.
const DIAL_RETRY: Duration = Duration::from_millis(20);
/// How long nobody is taken when the host is out of descriptors.
const LISTEN_RETRY: Duration = Duration::from_millis(100);

/// The connections of one device.
pub(crate) struct Board {
    guest_cid: u32,
    host: Arc<HostSocket>,
    counters: Arc<VsockCounters>,
    table: Table,
    pool: Pool,
    /// How many places of the table are clients that have not said where they want to go.
    greetings: usize,
    /// Answers to packets of no connection, and last words of connections.
    resets: VecDeque<Header>,
    deadlines: Deadlines,
    /// The listener is watched.
    listening: bool,
    /// When to watch it again.
    listen_again: Option<Instant>,
    /// The driver and we agree on stream sockets.
    streams: bool,
    log_lines: u32,
}

impl Board {
    pub(crate) fn new(
        guest_cid: u32,
        host: Arc<HostSocket>,
        counters: Arc<VsockCounters>,
    ) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            host,
            counters,
            table: Table::new(),
            pool: Pool::default(),
            greetings: 0,
            resets: VecDeque::new(),
            deadlines: Deadlines::new()?,
            listening: false,
            listen_again: None,
            streams: true,
            log_lines: 0,
        })
    }

    pub(crate) fn counters(&self) -> &VsockCounters {
        &self.counters
    }

    pub(crate) fn agree_on_streams(&mut self, streams: bool) {
        self.streams = streams;
    }

    /// Which connection a token of the loop means.
    pub(crate) fn place_of(token: Token) -> Option<usize> {
        usize::try_from(token.0.checked_sub(FIRST_SOCKET)?).ok()
    }

    fn token_of(at: usize) -> Token {
        let at = u32::try_from(at).unwrap_or(u32::MAX);
        Token(at.saturating_add(FIRST_SOCKET))
    }

    /// Whether no more packets of the guest may be read: it takes no answers.
    pub(crate) fn is_clogged(&self) -> bool {
        self.resets.len() >= MAX_PENDING_RESETS
    }

    // Life with a loop -------------------------------------------------------------------------

    /// Watches everything, on the loop that hosts the device from here on. Who waited for somebody while nobody
    /// was hosted gets his time again.
    pub(crate) fn hosted(&mut self, ops: &mut Ops<'_>) {
        if let Err(e) = ops.watch(
            self.deadlines.timer(),
            TIMER,
            Interest::READABLE | Interest::EDGE,
        ) {
            self.say(&format_args!("no timeouts: {e}"));
        }
        self.start_listening(ops);
        for at in self.table.all() {
            self.watch(at, ops);
            self.set_deadline(at);
            // What came meanwhile has had its event.
            if let Some(connection) = self.table.get_mut(at) {
                connection.readable = true;
            }
            self.queue(at);
        }
    }

    /// No loop hosts the device any more; nothing is watched.
    pub(crate) fn unhosted(&mut self) {
        self.listening = false;
        self.listen_again = None;
        self.deadlines.disarm();
        for at in self.table.all() {
            if let Some(connection) = self.table.get_mut(at) {
                connection.watched = false;
                connection.watched_for_room = false;
            }
        }
    }

    /// The guest goes on from where another device has served it.
    pub(crate) fn moved(&mut self) {
        self.clear();
        self.table.move_ports();
    }

    /// Forgets all connections, as a guest does that resets the device. Nothing is watched.
    pub(crate) fn clear(&mut self) {
        // Exhaustive, so that a new field has to decide what a reset does to it.
        let Self {
            guest_cid: _,
            host: _,
            counters,
            table,
            pool,
            greetings,
            resets,
            deadlines,
            listening: _,
            listen_again,
            streams,
            log_lines: _,
        } = self;
        counters
            .ended
            .add(table.len().saturating_sub(*greetings) as u64);
        *table = Table::new();
        *pool = Pool::default();
        *greetings = 0;
        resets.clear();
        deadlines.disarm();
        *listen_again = None;
        *streams = true;
    }

    fn start_listening(&mut self, ops: &mut Ops<'_>) {
        self.listen_again = None;
        if self.listening {
            return;
        }
        match ops.watch(self.host.listener(), LISTENER, Interest::READABLE) {
            Ok(()) => self.listening = true,
            Err(e) => self.say(&format_args!("no clients of the host are taken: {e}")),
        }
    }

    /// Takes no clients; they wait.
    pub(crate) fn stop_listening(&mut self, ops: &mut Ops<'_>) {
        if std::mem::take(&mut self.listening) {
            // Fails only for what is not watched.
            let _ = ops.unwatch(LISTENER);
        }
    }

    fn watch(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let Some(stream) = &connection.stream else {
            return;
        };
        if connection.watched {
            return;
        }
        let for_room = !connection.backlog.is_empty();
        match ops.watch(stream, Self::token_of(at), interest(for_room)) {
            Ok(()) => {
                connection.watched = true;
                connection.watched_for_room = for_room;
            }
            Err(e) => {
                self.say(&format_args!("a connection is given up: {e}"));
                self.abort(at, ops);
            }
        }
    }

    /// Watches for room in the socket exactly as long as something waits for it: an unread socket of the host
    /// would wake us with each byte that is read from it.
    fn watch_for_room(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let for_room = !connection.backlog.is_empty();
        if !connection.watched || connection.watched_for_room == for_room {
            return;
        }
        connection.watched_for_room = for_room;
        if let Err(e) = ops.rewatch(Self::token_of(at), interest(for_room)) {
            self.say(&format_args!("a connection is given up: {e}"));
            self.abort(at, ops);
        }
    }

    // Beginning and end of a connection --------------------------------------------------------

    fn connections(&self) -> usize {
        self.table.len().saturating_sub(self.greetings)
    }

    /// Puts a connection in the line if there is anything to tell the guest, or to ask it.
    fn queue(&mut self, at: usize) {
        if let Some(connection) = self.table.get_mut(at)
            && connection.lacks_credit()
            && !std::mem::replace(&mut connection.asked_for_credit, true)
        {
            connection.to_say.credit_request = true;
            self.counters.no_credit.inc();
        }
        self.table.queue(at);
    }

    fn remove(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.remove(at) else {
            return;
        };
        if connection.watched {
            // Fails only for what is not watched.
            let _ = ops.unwatch(Self::token_of(at));
        }
        if matches!(connection.phase, Phase::Greeting) {
            self.greetings = self.greetings.saturating_sub(1);
        } else {
            self.pool.take_back(connection.incoming.credit());
            self.counters.ended.inc();
        }
    }

    /// Ends a connection at once; the guest is told.
    fn abort(&mut self, at: usize, ops: &mut Ops<'_>) {
        self.reset(at);
        self.remove(at, ops);
    }

    /// Tells the guest that a connection is no more, if it has heard of it.
    fn reset(&mut self, at: usize) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        if connection.key.is_none() || connection.to_say.request {
            return;
        }
        let last = connection.header(self.guest_cid.into(), op::RST, 0, 0);
        self.resets.push_back(last);
        self.counters.resets.inc();
    }

    /// The host has gone for good; the guest has to say that it knows.
    fn close(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        connection.phase = Phase::Closing;
        if std::mem::take(&mut connection.watched) {
            // Fails only for what is not watched.
            let _ = ops.unwatch(Self::token_of(at));
        }
        connection.stream = None;
        connection.discard_backlog();
        self.set_deadline(at);
    }

    // Time --------------------------------------------------------------------------------------

    fn set_deadline(&mut self, at: usize) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let now = Instant::now();
        let after = |wait| now.checked_add(wait);
        connection.deadline = match &mut connection.phase {
            Phase::Dialling { until, .. } => {
                *until = after(crate::DIAL_TIMEOUT).unwrap_or(now);
                after(DIAL_RETRY)
            }
            phase => phase.timeout().and_then(after),
        };
        if let Some(at) = connection.deadline {
            self.deadlines.arm(at);
        }
    }

    /// Looks who has waited for too long.
    pub(crate) fn tick(&mut self, ops: &mut Ops<'_>) {
        self.deadlines.disarm();
        let now = Instant::now();
        let is_due = |(_, connection): &(usize, &Connection)| {
            connection.deadline.is_some_and(|deadline| deadline <= now)
        };
        let due: Vec<_> = self.table.iter().filter(is_due).map(|(at, _)| at).collect();
        for at in due {
            self.expire(at, now, ops);
        }
        if self.listen_again.is_some_and(|again| again <= now) {
            self.start_listening(ops);
        }
        let next = self.table.iter().filter_map(|(_, c)| c.deadline);
        if let Some(next) = next.chain(self.listen_again).min() {
            self.deadlines.arm(next);
        }
    }

    /// Wakes at `at`, or earlier, for what is not the board's.
    pub(crate) fn look_at(&mut self, at: Instant) {
        self.deadlines.arm(at);
    }

    fn expire(&mut self, at: usize, now: Instant, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        match &mut connection.phase {
            Phase::Open => connection.deadline = None,
            Phase::Dialling { until, .. } if now < *until => {
                connection.deadline = now.checked_add(DIAL_RETRY);
                self.dial_again(at, ops);
            }
            Phase::Greeting => {
                self.counters.timeouts.inc();
                self.turn_away(at, ops);
            }
            Phase::Dialling { .. } => {
                self.counters.timeouts.inc();
                self.counters.refused.inc();
                self.abort(at, ops);
            }
            Phase::Asked | Phase::Closing => {
                self.counters.timeouts.inc();
                self.abort(at, ops);
            }
            Phase::Lingering => {
                self.counters.timeouts.inc();
                self.remove(at, ops);
            }
        }
    }

    fn say(&mut self, what: &dyn fmt::Display) {
        if self.log_lines < MAX_LOG_LINES {
            self.log_lines = self.log_lines.saturating_add(1);
            log::warn!("vsock: {what}");
            if self.log_lines == MAX_LOG_LINES {
                log::warn!("vsock: no more is said about clients and connections");
            }
        }
    }
}

fn interest(for_room: bool) -> Interest {
    let read = Interest::READABLE | Interest::EDGE;
    if for_room {
        read | Interest::WRITABLE
    } else {
        read
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use alveole_event_loop::{Event, EventLoop, EventLoopError, Worker};
    use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan};

    use super::*;
    use crate::HOST_CID;

    /// Does something where a worker is started.
    struct Once<F>(Option<F>);

    impl<F: FnOnce(&mut Ops<'_>) + Send + 'static> Worker for Once<F> {
        fn name(&self) -> &'static str {
            "once"
        }

        fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
            self.0.take().unwrap()(ops);
            Ok(())
        }

        fn on_event(&mut self, _: Event, _: &mut Ops<'_>) {}
    }

    fn on_a_loop(act: impl FnOnce(&mut Ops<'_>) + Send + 'static) {
        let mut event_loop = EventLoop::new().unwrap();
        event_loop.attach(Box::new(Once(Some(act)))).unwrap();
    }

    fn board(dir: &tempfile::TempDir) -> Board {
        let host = HostSocket::listen(&dir.path().join("v.sock")).unwrap();
        Board::new(3, Arc::new(host), Arc::default()).unwrap()
    }

    fn make_late(board: &mut Board) {
        let past = Instant::now().checked_sub(Duration::from_millis(1));
        for at in board.table.all() {
            board.table.get_mut(at).unwrap().deadline = past;
        }
    }

    #[test]
    fn silent_clients_are_given_up_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = board(&dir);
        let path = dir.path().join("v.sock");
        on_a_loop(move |ops| {
            board.hosted(ops);
            let mut silent = UnixStream::connect(&path).unwrap();
            let mut slow = UnixStream::connect(&path).unwrap();
            slow.write_all(b"CONN").unwrap();
            board.accept(ops);
            assert_eq!((board.greetings, board.connections()), (2, 0));
            board.tick(ops);
            assert_eq!(board.greetings, 2, "not yet");
            make_late(&mut board);
            board.tick(ops);
            assert_eq!((board.greetings, board.table.len()), (0, 0));
            assert_eq!(board.counters.timeouts.get(), 2);
            assert_eq!(board.counters.turned_away.get(), 2);
            assert_eq!(board.counters.ended.get(), 0, "they were no connections");
            // What the device has not read is lost, and the client told so.
            assert_eq!(silent.read(&mut [0]).unwrap_or(0), 0);
            assert_eq!(slow.read(&mut [0]).unwrap_or(0), 0);
            assert!(board.resets.is_empty());
        });
    }

    #[test]
    fn what_a_guest_left_behind_is_not_kept_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let mut board = board(&dir);
        let listener = UnixListener::bind(dir.path().join("v.sock_80")).unwrap();
        on_a_loop(move |ops| {
            board.hosted(ops);
            let ram = GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap();
            let mut data = GuestBuffers::new(&ram);
            data.push(0, 1 << 18).unwrap();
            let packet = |op, flags, len| Header {
                src_cid: 3,
                dst_cid: HOST_CID,
                src_port: 1,
                dst_port: 80,
                kind: 1,
                op,
                flags,
                len,
                ..Header::default()
            };
            board.packet(&packet(op::REQUEST, 0, 0), &GuestBuffers::new(&ram), ops);
            let (mut unread, _) = listener.accept().unwrap();
            for _ in 0..2 {
                board.packet(&packet(op::RW, 0, 1 << 18), &data, ops);
            }
            let kept = board.counters.bytes_kept.get();
            assert!(kept > 0, "more than a socket takes");
            board.packet(&packet(op::SHUTDOWN, 3, 0), &data, ops);
            assert_eq!(board.resets.len(), 1, "the guest is done with it");
            assert_eq!(board.connections(), 1);
            make_late(&mut board);
            board.tick(ops);
            assert_eq!((board.connections(), board.resets.len()), (0, 1));
            assert_eq!(board.counters.timeouts.get(), 1);
            let mut all = Vec::new();
            unread.read_to_end(&mut all).unwrap();
            assert_eq!(all.len() as u64, (1 << 19) - kept);
            assert_eq!(
                board.pool.give(),
                crate::MAX_CREDIT_BYTES,
                "its credit is back"
            );
        });
    }
}
