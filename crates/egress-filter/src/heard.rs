//! Who has begun to talk to the guest, and may be answered.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::{ANSWER_SECONDS, MAX_PEERS};

/// What a peer began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Speech {
    /// A connection.
    Tcp,
    Udp,
    /// An echo request; the port of the guest is its identifier.
    Echo,
    /// A question for a neighbour's address, or the answer to one.
    Neighbour,
}

/// A peer, and what of the guest it talks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Peer {
    pub(crate) speech: Speech,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) guest_port: u16,
}

/// Peers in two generations, and when each was heard last: when the younger one is full, the older one is forgotten. Who is answered
/// becomes young. Hashed with a random key: peers choose their addresses.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    young: HashMap<Peer, Instant>,
    old: HashMap<Peer, Instant>,
}

impl Heard {
    /// True: others were forgotten for it.
    pub(crate) fn note(&mut self, peer: Peer, now: Instant) -> bool {
        self.old.remove(&peer);
        if let Some(heard) = self.young.get_mut(&peer) {
            *heard = now;
            return false;
        }
        self.insert(peer, now)
    }

    fn insert(&mut self, peer: Peer, heard: Instant) -> bool {
        let is_full = self.young.len() >= MAX_PEERS / 2;
        let mut forgets = false;
        if is_full {
            forgets = !self.old.is_empty();
            // What is allocated stays for the next ones.
            self.old.clear();
            std::mem::swap(&mut self.young, &mut self.old);
        }
        self.young.insert(peer, heard);
        forgets
    }

    /// Whether `peer` may be answered: it was heard, and but for connections not long ago.
    pub(crate) fn may_answer(&mut self, peer: Peer, now: Instant) -> bool {
        let is_fresh = |heard: Instant| {
            peer.speech == Speech::Tcp
                || now.saturating_duration_since(heard) <= Duration::from_secs(ANSWER_SECONDS)
        };
        if let Some(heard) = self.young.get(&peer) {
            return is_fresh(*heard);
        }
        let Some(heard) = self.old.remove(&peer) else {
            return false;
        };
        let is_fresh = is_fresh(heard);
        if is_fresh {
            self.insert(peer, heard);
        }
        is_fresh
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn peer(number: u32, speech: Speech) -> Peer {
        Peer {
            speech,
            address: Ipv4Addr::from(number).into(),
            port: 1,
            guest_port: 2,
        }
    }

    #[test]
    fn datagrams_are_answered_for_a_time_and_connections_always() {
        let mut heard = Heard::default();
        let now = Instant::now();
        for speech in [Speech::Udp, Speech::Echo, Speech::Neighbour, Speech::Tcp] {
            assert!(!heard.may_answer(peer(1, speech), now));
            heard.note(peer(1, speech), now);
            assert!(heard.may_answer(peer(1, speech), now));
            assert!(!heard.may_answer(peer(2, speech), now));
            let late = now + Duration::from_secs(ANSWER_SECONDS + 1);
            assert_eq!(
                heard.may_answer(peer(1, speech), late),
                speech == Speech::Tcp
            );
            // To answer is not to be heard again; to be heard again is.
            heard.note(peer(1, speech), late);
            assert!(heard.may_answer(peer(1, speech), late));
        }
    }

    #[test]
    fn peers_are_bounded_and_who_is_answered_stays() {
        let mut heard = Heard::default();
        let now = Instant::now();
        heard.note(peer(0, Speech::Tcp), now);
        for number in 1..4 * MAX_PEERS as u32 {
            heard.note(peer(number, Speech::Tcp), now);
            assert!(heard.young.len() + heard.old.len() <= MAX_PEERS);
            assert!(heard.may_answer(peer(0, Speech::Tcp), now), "{number}");
        }
        assert!(!heard.may_answer(peer(1, Speech::Tcp), now));
        assert!(heard.may_answer(peer(4 * MAX_PEERS as u32 - 1, Speech::Tcp), now));
    }
}
