//! One connection, and one client that is not connected yet.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::backlog::Backlog;
use crate::credit::{Incoming, Outgoing};
use crate::packet::{Header, NO_RECEIVE, NO_SEND, STREAM, op};
use crate::{
    ANSWER_TIMEOUT, CLOSE_TIMEOUT, DIAL_TIMEOUT, GREETING_TIMEOUT, HOST_CID, LINGER_TIMEOUT,
};

/// Both sides have ended.
pub(crate) const BOTH: u32 = NO_RECEIVE | NO_SEND;

/// The two ports of a connection; the contexts are always the same two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Of the host.
    pub(crate) host_port: u32,
    /// Of the guest.
    pub(crate) guest_port: u32,
}

/// How far a connection has come.
#[derive(Debug)]
pub(crate) enum Phase {
    /// A client of the host that has not said where it wants to go.
    Greeting,
    /// The guest wants to a program whose queue of connections is full.
    Dialling {
        socket: Option<OwnedFd>,
        until: Instant,
    },
    /// The guest was asked and has not answered.
    Asked,
    /// Data may go both ways.
    Open,
    /// The host has gone; the guest has to acknowledge it.
    Closing,
    /// The guest has gone; the host still reads what it left.
    Lingering,
}

impl Phase {
    /// How long it may last.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        match self {
            Self::Greeting => Some(GREETING_TIMEOUT),
            Self::Dialling { .. } => Some(DIAL_TIMEOUT),
            Self::Asked => Some(ANSWER_TIMEOUT),
            Self::Open => None,
            Self::Closing => Some(CLOSE_TIMEOUT),
            Self::Lingering => Some(LINGER_TIMEOUT),
        }
    }
}

/// What is to be said to the guest, beside data. Each is said once, however often there was reason to: this is
/// what bounds a connection's share of a receive queue that the guest does not fill.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ToSay {
    pub(crate) request: bool,
    pub(crate) response: bool,
    pub(crate) credit: bool,
    pub(crate) credit_request: bool,
}

/// One connection. It owns no place in any queue; see [`crate::table`].
#[derive(Debug)]
pub(crate) struct Connection {
    /// None of a client that has not said where it wants to go, nor of one whom the guest has forgotten.
    pub(crate) key: Option<Key>,
    pub(crate) phase: Phase,
    pub(crate) stream: Option<UnixStream>,
    /// The socket is watched by the loop.
    pub(crate) watched: bool,
    /// ... for room, too.
    pub(crate) watched_for_room: bool,
    pub(crate) deadline: Option<Instant>,
    pub(crate) to_say: ToSay,
    /// The socket may have bytes, or its end, for the guest.
    pub(crate) readable: bool,
    pub(crate) outgoing: Outgoing,
    pub(crate) incoming: Incoming,
    pub(crate) backlog: Backlog,
    /// The guest has been asked for credit, and said nothing since.
    pub(crate) asked_for_credit: bool,
    /// SHUTDOWN bits that the guest has sent.
    pub(crate) guest_ended: u32,
    /// SHUTDOWN bits that hold for the host.
    pub(crate) host_ended: u32,
    /// ... and which of them the guest was told.
    pub(crate) host_end_told: u32,
    /// How many receive buffers of the guest one read fills at most: grows while reads fill all of them.
    pub(crate) reach: usize,
}

impl Connection {
    pub(crate) fn new(phase: Phase, stream: Option<UnixStream>) -> Self {
        Self {
            key: None,
            phase,
            stream,
            watched: false,
            watched_for_room: false,
            deadline: None,
            to_say: ToSay::default(),
            readable: false,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            backlog: Backlog::default(),
            asked_for_credit: false,
            guest_ended: 0,
            host_ended: 0,
            host_end_told: 0,
            reach: 1,
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// Whether the socket may have something that the guest may get now.
    pub(crate) fn may_give_data(&self) -> bool {
        self.is_open()
            && self.readable
            && self.host_ended & NO_SEND == 0
            && self.guest_ended & NO_RECEIVE == 0
            && self.outgoing.free() > 0
    }

    /// Whether the socket may have something for which the guest has no room.
    pub(crate) fn lacks_credit(&self) -> bool {
        self.is_open()
            && self.readable
            && self.host_ended & NO_SEND == 0
            && self.guest_ended & NO_RECEIVE == 0
            && self.outgoing.free() == 0
    }

    /// Drops what the host has not taken; the guest gets its credit back.
    pub(crate) fn discard_backlog(&mut self) {
        self.backlog.clear();
        self.incoming.forward(self.incoming.kept());
    }

    /// Whether there is anything for the guest.
    pub(crate) fn has_output(&self) -> bool {
        let ToSay {
            request,
            response,
            credit,
            credit_request,
        } = self.to_say;
        request || response || credit || credit_request || self.has_end() || self.may_give_data()
    }

    /// Whether the guest is to be told of an end. What comes before it goes first; often that is the other end,
    /// and one packet tells of both.
    fn has_end(&self) -> bool {
        self.host_ended != self.host_end_told && (self.host_ended == BOTH || !self.may_give_data())
    }

    /// The next packet beside data.
    pub(crate) fn next_control(&mut self, guest_cid: u64) -> Option<Header> {
        let has_end = self.has_end();
        let to_say = &mut self.to_say;
        let op = if std::mem::take(&mut to_say.request) {
            op::REQUEST
        } else if std::mem::take(&mut to_say.response) {
            op::RESPONSE
        } else if std::mem::take(&mut to_say.credit) {
            op::CREDIT_UPDATE
        } else if has_end {
            self.host_end_told = self.host_ended;
            op::SHUTDOWN
        } else if std::mem::take(&mut to_say.credit_request) {
            op::CREDIT_REQUEST
        } else {
            return None;
        };
        let flags = if op == op::SHUTDOWN {
            self.host_ended
        } else {
            0
        };
        Some(self.header(guest_cid, op, flags, 0))
    }

    /// A packet of this connection; it tells the guest of its credit, as every packet does.
    pub(crate) fn header(&mut self, guest_cid: u64, op: u16, flags: u32, len: u32) -> Header {
        let key = self.key.unwrap_or(Key {
            host_port: 0,
            guest_port: 0,
        });
        let (buf_alloc, fwd_cnt) = self.incoming.tell();
        self.to_say.credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len,
            kind: STREAM,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}
