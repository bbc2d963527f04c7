//! What the guest is told, and given.

use std::io;
use std::os::fd::AsFd;

use alveole_event_loop::Ops;
use alveole_guest_memory::GuestBuffers;

use super::Board;
use crate::packet::{Header, op};
use crate::{HEADER_BYTES, MAX_TURN_BYTES};

/// Most receive buffers of the guest that one read fills: sixteen of Linux, which are a page each.
const MAX_REACH: usize = 16;

/// The next packet for the guest.
#[derive(Debug)]
pub(crate) enum Output {
    /// Without data.
    Control(Header),
    /// Data of the connection at this place.
    Data(usize),
}

impl Board {
    /// Whether the guest's buffers are wanted.
    pub(crate) fn has_output(&self) -> bool {
        !self.resets.is_empty() || self.table.has_turns()
    }

    /// Whose turn it is, and what with.
    pub(crate) fn next_output(&mut self) -> Option<Output> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Output::Control(reset));
        }
        while let Some(at) = self.table.next_turn() {
            let guest_cid = self.guest_cid.into();
            let Some(connection) = self.table.get_mut(at) else {
                continue;
            };
            if let Some(header) = connection.next_control(guest_cid) {
                self.queue(at);
                return Some(Output::Control(header));
            }
            if connection.may_give_data() {
                return Some(Output::Data(at));
            }
        }
        None
    }

    /// How many bytes a connection may give the guest now, and in how many of its buffers.
    pub(crate) fn turn_of(&mut self, at: usize) -> (u64, usize) {
        self.table.get_mut(at).map_or((0, 0), |connection| {
            let free = u64::from(connection.outgoing.free());
            (free.min(MAX_TURN_BYTES), connection.reach)
        })
    }

    /// Fills `data` with what a socket has. How many bytes that were; they have to be given to the guest.
    pub(crate) fn receive(&mut self, at: usize, data: &GuestBuffers, ops: &mut Ops<'_>) -> u64 {
        let Some(connection) = self.table.get_mut(at) else {
            return 0;
        };
        let Some(stream) = connection.stream.as_ref().filter(|_| !data.is_empty()) else {
            return 0;
        };
        match data.receive_from(stream.as_fd()) {
            Ok(0) => self.host_sends_no_more(at, ops),
            Ok(len) => {
                connection.reach = if len == data.len_bytes() {
                    connection.reach.saturating_mul(2).min(MAX_REACH)
                } else {
                    1
                };
                connection
                    .outgoing
                    .count(u32::try_from(len).unwrap_or(u32::MAX));
                self.counters.bytes_to_guest.add(len);
                return len;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => connection.readable = false,
            // The program of the host has gone without reading what the guest has sent.
            Err(_) => {
                self.abort(at, ops);
                return 0;
            }
        }
        self.queue(at);
        0
    }

    /// The header of `len` bytes of data.
    pub(crate) fn data_header(&mut self, at: usize, len: u64) -> [u8; HEADER_BYTES] {
        let guest_cid = self.guest_cid.into();
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.table.get_mut(at).map_or([0; HEADER_BYTES], |c| {
            c.header(guest_cid, op::RW, 0, len).to_bytes()
        })
    }

    /// A connection has had its turn.
    pub(crate) fn turn_is_over(&mut self, at: usize) {
        self.queue(at);
    }
}
