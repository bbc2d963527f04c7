//! Packets of the guest.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::Instant;

use alveole_event_loop::Ops;
use alveole_guest_memory::GuestBuffers;

use super::Board;
use crate::connection::{BOTH, Connection, Key, Phase, ToSay};
use crate::credit::Incoming;
use crate::host::Dialled;
use crate::packet::{Header, NO_RECEIVE, NO_SEND, STREAM, op};
use crate::{HOST_CID, MAX_CONNECTIONS};

impl Board {
    /// Takes a packet whose data is in `data`.
    pub(crate) fn packet(&mut self, header: &Header, data: &GuestBuffers, ops: &mut Ops<'_>) {
        self.counters.packets_from_guest.inc();
        // Section 5.10.6.4: the guest speaks for itself. There is nobody but the host to speak to.
        let is_ours = header.dst_cid == HOST_CID && header.src_cid == u64::from(self.guest_cid);
        if !is_ours || header.kind != STREAM || !self.streams {
            return self.refuse(header);
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        match self.table.find(key) {
            Some(at) => self.packet_of(at, header, data, ops),
            None if header.op == op::REQUEST => self.request(key, header, ops),
            None => self.refuse(header),
        }
    }

    /// Takes a packet whose data is not where it says.
    pub(crate) fn bad_packet(&mut self, header: &Header, ops: &mut Ops<'_>) {
        self.counters.packets_from_guest.inc();
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        match self.table.find(key) {
            Some(at) => {
                self.counters.bad_packets.inc();
                self.abort(at, ops);
            }
            None => self.refuse(header),
        }
    }

    /// Answers what belongs to no connection. A reset is never answered: the two would go on for ever.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.counters.bad_packets.inc();
            self.resets.push_back(header.reset());
            self.counters.resets.inc();
        }
    }

    fn packet_of(&mut self, at: usize, header: &Header, data: &GuestBuffers, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        connection.outgoing.hear(header.buf_alloc, header.fwd_cnt);
        if connection.outgoing.free() > 0 {
            connection.asked_for_credit = false;
        }
        let talks = matches!(connection.phase, Phase::Open | Phase::Closing);
        let is_fine = match header.op {
            op::RST => {
                self.remove(at, ops);
                return;
            }
            op::RESPONSE if matches!(connection.phase, Phase::Asked) => {
                connection.phase = Phase::Open;
                connection.deadline = None;
                self.answered(at, ops);
                true
            }
            op::RW if talks => self.data(at, data, ops),
            op::SHUTDOWN if talks => {
                self.guest_ends(at, header.flags, ops);
                true
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST if talks => {
                connection.to_say.credit = true;
                true
            }
            _ => false,
        };
        if is_fine {
            self.queue(at);
        } else {
            self.counters.bad_packets.inc();
            self.abort(at, ops);
        }
    }

    /// The guest begins a connection.
    fn request(&mut self, key: Key, header: &Header, ops: &mut Ops<'_>) {
        if self.connections() >= MAX_CONNECTIONS {
            self.say(&format_args!(
                "a connection of the guest to port {} is refused: there are {MAX_CONNECTIONS}",
                key.host_port
            ));
            return self.decline(header);
        }
        let dialled = match self.host.dial(key.host_port) {
            Ok(dialled) => dialled,
            Err(e) => {
                log::debug!(
                    "vsock: nobody of the host takes port {}: {e}",
                    key.host_port
                );
                return self.decline(header);
            }
        };
        let phase = Phase::Dialling {
            socket: None,
            until: Instant::now(),
        };
        let mut connection = Connection::new(phase, None);
        connection.key = Some(key);
        connection.incoming = Incoming::new(self.pool.give());
        connection.outgoing.hear(header.buf_alloc, header.fwd_cnt);
        let credit = connection.incoming.credit();
        let Ok(at) = self.table.add(connection) else {
            self.pool.take_back(credit);
            return self.decline(header);
        };
        self.dialled(at, dialled, ops);
    }

    fn decline(&mut self, header: &Header) {
        self.counters.refused.inc();
        self.counters.resets.inc();
        self.resets.push_back(header.reset());
    }

    fn dialled(&mut self, at: usize, dialled: Dialled, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        match dialled {
            Dialled::Connected(stream) => {
                connection.phase = Phase::Open;
                connection.deadline = None;
                connection.stream = Some(stream);
                connection.to_say.response = true;
                self.counters.from_guest.inc();
                self.watch(at, ops);
                self.queue(at);
            }
            Dialled::Full(full) => {
                if let Phase::Dialling { socket, .. } = &mut connection.phase {
                    *socket = Some(full);
                }
                if connection.deadline.is_none() {
                    self.set_deadline(at);
                }
            }
        }
    }

    /// Tries a full queue of connections again.
    pub(super) fn dial_again(&mut self, at: usize, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        let (Phase::Dialling { socket, .. }, Some(key)) = (&mut connection.phase, connection.key)
        else {
            return;
        };
        let Some(socket) = socket.take() else {
            return;
        };
        match self.host.dial_with(socket, key.host_port) {
            Ok(dialled) => self.dialled(at, dialled, ops),
            Err(_) => {
                self.counters.refused.inc();
                self.abort(at, ops);
            }
        }
    }

    /// Passes data on to the host. False where the guest may not send it.
    fn data(&mut self, at: usize, data: &GuestBuffers, ops: &mut Ops<'_>) -> bool {
        let Some(connection) = self.table.get_mut(at) else {
            return true;
        };
        let Ok(len) = u32::try_from(data.len_bytes()) else {
            return false;
        };
        if connection.guest_ended & NO_SEND != 0 || !connection.incoming.take(len) {
            return false;
        }
        if len == 0 {
            return true;
        }
        self.counters.bytes_from_guest.add(len.into());
        let stream = connection
            .stream
            .as_ref()
            .filter(|_| connection.host_ended & NO_RECEIVE == 0);
        let taken = match stream {
            // Nobody wants it. The guest has been told, or will be.
            None => Some(len.into()),
            Some(_) if !connection.backlog.is_empty() => Some(0),
            Some(stream) => match data.send_to(stream.as_fd()) {
                Ok(taken) => Some(taken),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Some(0),
                Err(_) => None,
            },
        };
        let Some(taken) = taken else {
            connection.incoming.forward(len);
            self.host_reads_no_more(at, ops);
            return true;
        };
        connection
            .incoming
            .forward(u32::try_from(taken).unwrap_or(len));
        if taken < u64::from(len) {
            connection.backlog.add(data, taken);
            self.counters
                .bytes_kept
                .add(u64::from(len).saturating_sub(taken));
        }
        connection.to_say.credit |= connection.incoming.is_worth_telling();
        self.watch_for_room(at, ops);
        true
    }

    /// The guest sends, or receives, no more.
    fn guest_ends(&mut self, at: usize, flags: u32, ops: &mut Ops<'_>) {
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        // Section 5.10.6.5: what was said once holds.
        connection.guest_ended |= flags & BOTH;
        if connection.guest_ended == BOTH {
            return self.guest_has_gone(at, ops);
        }
        if let Some(stream) = &connection.stream {
            // Fails only where the peer has gone, which is noticed in another way.
            if connection.guest_ended & NO_RECEIVE != 0 {
                let _ = stream.shutdown(Shutdown::Read);
            } else if connection.guest_ended & NO_SEND != 0 && connection.backlog.is_empty() {
                let _ = stream.shutdown(Shutdown::Write);
            }
        }
    }

    /// The guest has closed the connection, and gets the reset that it waits for. What it has sent reaches the
    /// host all the same.
    fn guest_has_gone(&mut self, at: usize, ops: &mut Ops<'_>) {
        self.reset(at);
        self.table.forget_name(at);
        let Some(connection) = self.table.get_mut(at) else {
            return;
        };
        connection.to_say = ToSay::default();
        connection.host_end_told = connection.host_ended;
        if connection.backlog.is_empty() || connection.stream.is_none() {
            return self.remove(at, ops);
        }
        connection.phase = Phase::Lingering;
        self.set_deadline(at);
    }
}
