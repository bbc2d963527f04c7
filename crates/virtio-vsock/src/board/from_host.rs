//! Clients and sockets of the host.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use alveole_event_loop::{Ops, Ready};

use super::{Board, LISTEN_RETRY};
use crate::connection::{BOTH, Connection, Key, Phase};
use crate::credit::Incoming;
use crate::greeting::{self, Greeting};
use crate::host;
use crate::packet::{NO_RECEIVE, NO_SEND};
use crate::{MAX_CONNECTIONS, MAX_GREETING_BYTES, MAX_GREETINGS};

/// Clients taken in one go. Abused by a program of the host that connects in a loop: connections and others on
/// the event loop get their turn in between.
const ACCEPTS_PER_EVENT: usize = 16;

impl Board {
    /// Takes clients that wait.
    pub(crate) fn accept(&mut self, ops: &mut Ops<'_>) {
        for _ in 0..ACCEPTS_PER_EVENT {
            match self.host.listener().accept() {
                Ok((stream, _)) => self.welcome(stream, ops),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(e) => {
                    self.say(&format_args!(
                        "a client of the host cannot be taken for now: {e}; raise the limit on open files (ulimit -n)"
                    ));
                    // It would be told of again at once, and for ever.
                    self.stop_listening(ops);
                    self.listen_again = Instant::now().checked_add(LISTEN_RETRY);
                    if let Some(again) = self.listen_again {
                        self.deadlines.arm(again);
                    }
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream, ops: &mut Ops<'_>) {
        if self.greetings >= MAX_GREETINGS {
            let waiting = self
                .table
                .iter()
                .filter(|(_, c)| matches!(c.phase, Phase::Greeting));
            if let Some((oldest, _)) = waiting.min_by_key(|(_, c)| c.deadline) {
                self.turn_away(oldest, ops);
            }
        }
        let client = Connection::new(Phase::Greeting, Some(stream));
        let Ok(at) = self.table.add(client) else {
            self.counters.turned_away.inc();
            return;
        };
        self.greetings = self.greetings.saturating_add(1);
        self.set_deadline(at);
        self.watch(at, ops);
        // Most have said it by now, and the event that tells so finds nothing to do.
        self.greet(at, ops);
    }

    /// Lets a client go that is no connection.
    pub(super) fn turn_away(&mut self, at: usize, ops: &mut Ops<'_>) {
        self.counters.turned_away.inc();
        self.remove(at, ops);
    }

    /// Looks at what a client has said. Its line is taken, what follows it is the guest's.
    fn greet(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(stream) = self.table.get_mut(at).and_then(|c| c.stream.as_ref()) else {
            return;
        };
        let mut bytes = [0; MAX_GREETING_BYTES];
        let Some(said) = host::peek(stream, &mut bytes) else {
            return self.turn_away(at, ops);
        };
        match greeting::read(said) {
            Greeting::Unfinished => {
                if host::reads_no_more(stream) {
                    self.turn_away(at, ops);
                }
            }
            Greeting::Port(port, len) => {
                let line = bytes.get_mut(..len).unwrap_or(&mut []);
                if host::skip(stream, line) {
                    self.ask(at, port, ops);
                } else {
                    self.turn_away(at, ops);
                }
            }
            Greeting::Nonsense => {
                self.say(&format_args!(
                    "a client of the host is turned away: its first line is not \"CONNECT <port>\""
                ));
                self.turn_away(at, ops);
            }
        }
    }

    /// Asks the guest whether it takes a connection to `guest_port`.
    fn ask(&mut self, at: usize, guest_port: u32, ops: &mut Ops<'_>) {
        if self.connections() >= MAX_CONNECTIONS {
            self.say(&format_args!(
                "a client of the host is turned away: there are {MAX_CONNECTIONS} connections"
            ));
            return self.turn_away(at, ops);
        }
        let host_port = self.table.free_port(guest_port);
        let credit = self.pool.give();
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        connection.phase = Phase::Asked;
        connection.incoming = Incoming::new(credit);
        connection.to_say.request = true;
        // There may be more behind the line.
        connection.readable = true;
        self.greetings = self.greetings.saturating_sub(1);
        let key = Key {
            host_port,
            guest_port,
        };
        self.table.name(at, key);
        self.set_deadline(at);
        self.queue(at);
    }

    /// The guest has taken a client's connection.
    pub(super) fn answered(&mut self, at: usize, ops: &mut Ops<'_>) {
        self.counters.from_host.inc();
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let (Some(stream), Some(key)) = (&connection.stream, connection.key) else {
            return;
        };
        if !host::say(stream, &format!("OK {}\n", key.host_port)) {
            self.host_reads_no_more(at, ops);
        }
    }

    /// The socket of a connection has news. What it says is only a hint: it may be of an earlier connection in
    /// the same place.
    pub(crate) fn socket_event(&mut self, at: usize, ready: Ready, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let Some(stream) = &connection.stream else {
            return;
        };
        let gone = (ready.hung_up() || ready.error()) && host::reads_no_more(stream);
        connection.readable |= ready.readable() || ready.hung_up() || ready.error();
        match connection.phase {
            Phase::Greeting => self.greet(at, ops),
            Phase::Asked if gone => self.abort(at, ops),
            Phase::Open => {
                if ready.writable() {
                    self.flush(at, ops);
                }
                if gone {
                    self.host_reads_no_more(at, ops);
                }
                self.queue(at);
            }
            Phase::Lingering => self.flush(at, ops),
            Phase::Asked | Phase::Dialling { .. } | Phase::Closing => {}
        }
    }

    /// Sends what the socket did not take before.
    fn flush(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let Some(stream) = &connection.stream else {
            return;
        };
        let is_lingering = matches!(connection.phase, Phase::Lingering);
        match connection.backlog.flush(stream.as_fd()) {
            Ok(len) => {
                connection
                    .incoming
                    .forward(u32::try_from(len).unwrap_or(u32::MAX));
                connection.to_say.credit |= connection.incoming.is_worth_telling();
                if connection.backlog.is_empty() {
                    if is_lingering {
                        return self.remove(at, ops);
                    }
                    if connection.guest_ended & NO_SEND != 0 {
                        // Fails only where the peer has gone, which is noticed in another way.
                        let _ = stream.shutdown(Shutdown::Write);
                        if connection.host_ended & NO_SEND != 0 {
                            return self.host_reads_no_more(at, ops);
                        }
                    }
                }
                self.watch_for_room(at, ops);
            }
            Err(_) if is_lingering => self.remove(at, ops),
            Err(_) => self.host_reads_no_more(at, ops),
        }
    }

    /// Whatever the guest sends from here on, nobody wants it.
    pub(super) fn host_reads_no_more(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        connection.discard_backlog();
        connection.host_ended |= NO_RECEIVE;
        // A guest that receives nothing, and a host that does not either, have nothing to say to each other.
        if connection.guest_ended & NO_RECEIVE != 0 {
            connection.host_ended = BOTH;
        }
        if connection.host_ended == BOTH {
            self.close(at, ops);
        } else {
            self.watch_for_room(at, ops);
        }
    }

    /// The host sends no more.
    pub(super) fn host_sends_no_more(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        connection.host_ended |= NO_SEND;
        connection.readable = false;
        // Where the guest sends no more our own side of the socket is shut, and an empty message says nothing
        // of the host's. Neither does it matter: once all is delivered, nobody has anything to say any more.
        let guest_is_done = connection.guest_ended & NO_SEND != 0;
        let gone = if guest_is_done {
            connection.backlog.is_empty()
        } else {
            connection.stream.as_ref().is_none_or(host::reads_no_more)
        };
        if gone {
            self.host_reads_no_more(at, ops);
        }
    }
}
