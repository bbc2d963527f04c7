//! All connections, by place and by ports, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;

use crate::connection::{Connection, Key};
use crate::{MAX_CONNECTIONS, MAX_GREETINGS};

/// First port of the host for connections that the host begins, as Firecracker has it.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// Connections. Each has a place, which is its name until it goes.
#[derive(Debug)]
pub(crate) struct Table {
    places: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_key: HashMap<Key, usize>,
    /// Places that have something for the guest, in the order of their turns. A place, not a connection, stands
    /// here, and each once: those that come and go cannot make it longer.
    turns: VecDeque<usize>,
    in_turns: Vec<bool>,
    next_port: u32,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            turns: VecDeque::new(),
            in_turns: Vec::new(),
            next_port: FIRST_PORT,
        }
    }

    /// How many places are taken.
    pub(crate) fn len(&self) -> usize {
        self.places.len().saturating_sub(self.free.len())
    }

    /// Gives a connection a place; hands it back where there is none.
    pub(crate) fn add(&mut self, connection: Connection) -> Result<usize, Box<Connection>> {
        let at = match self.free.pop() {
            Some(at) => at,
            None if self.places.len() < MAX_CONNECTIONS.saturating_add(MAX_GREETINGS) => {
                self.places.push(None);
                self.in_turns.push(false);
                self.places.len().saturating_sub(1)
            }
            None => return Err(Box::new(connection)),
        };
        if let Some(key) = connection.key {
            self.by_key.insert(key, at);
        }
        if let Some(place) = self.places.get_mut(at) {
            *place = Some(connection);
        }
        Ok(at)
    }

    pub(crate) fn get_mut(&mut self, at: usize) -> Option<&mut Connection> {
        self.places.get_mut(at)?.as_mut()
    }

    pub(crate) fn find(&self, key: Key) -> Option<usize> {
        self.by_key.get(&key).copied()
    }

    /// Takes a connection out.
    pub(crate) fn remove(&mut self, at: usize) -> Option<Connection> {
        let connection = self.places.get_mut(at)?.take()?;
        self.free.push(at);
        if let Some(key) = connection.key {
            self.by_key.remove(&key);
        }
        Some(connection)
    }

    /// Gives a client its ports.
    pub(crate) fn name(&mut self, at: usize, key: Key) {
        if let Some(connection) = self.get_mut(at) {
            connection.key = Some(key);
            self.by_key.insert(key, at);
        }
    }

    /// The guest has forgotten this connection, and may use its ports again.
    pub(crate) fn forget_name(&mut self, at: usize) {
        if let Some(key) = self.get_mut(at).and_then(|c| c.key.take()) {
            self.by_key.remove(&key);
        }
    }

    /// A port of the host that no connection to `guest_port` has. Used ports come up again only after all others.
    pub(crate) fn free_port(&mut self, guest_port: u32) -> u32 {
        // There are more ports than places.
        loop {
            let host_port = self.next_port;
            self.next_port = match host_port {
                LAST_PORT => FIRST_PORT,
                port => port.saturating_add(1),
            };
            let key = Key {
                host_port,
                guest_port,
            };
            if !self.by_key.contains_key(&key) {
                return host_port;
            }
        }
    }

    /// Has the next ports begin somewhere else, by chance: a guest that goes on elsewhere has not closed the connections of before yet, and
    /// takes a new one of the same ports for one of those.
    pub(crate) fn move_ports(&mut self) {
        let chance = BuildHasher::hash_one(self.by_key.hasher(), self.next_port);
        // The low half.
        let by = chance as u32 % FIRST_PORT;
        self.next_port = FIRST_PORT.saturating_add(by);
    }

    /// Puts a place at the end of the line, unless it stands there or has nothing for the guest.
    pub(crate) fn queue(&mut self, at: usize) {
        if !self.get_mut(at).is_some_and(|c| c.has_output()) {
            return;
        }
        if let Some(in_turns) = self.in_turns.get_mut(at)
            && !std::mem::replace(in_turns, true)
        {
            self.turns.push_back(at);
        }
    }

    /// Whether somebody stands in the line.
    pub(crate) fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Whose turn it is. It has to queue again.
    pub(crate) fn next_turn(&mut self) -> Option<usize> {
        let at = self.turns.pop_front()?;
        if let Some(in_turns) = self.in_turns.get_mut(at) {
            *in_turns = false;
        }
        Some(at)
    }

    /// All places that are taken.
    pub(crate) fn all(&self) -> Vec<usize> {
        (0..)
            .zip(&self.places)
            .filter_map(|(at, place)| place.is_some().then_some(at))
            .collect()
    }

    /// All connections with their places.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Connection)> {
        (0..)
            .zip(&self.places)
            .filter_map(|(at, place)| place.as_ref().map(|c| (at, c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Phase;

    fn with_something() -> Connection {
        let mut connection = Connection::new(Phase::Open, None);
        connection.to_say.response = true;
        connection
    }

    #[test]
    fn turns_go_round_and_do_not_pile_up() {
        let mut table = Table::new();
        let [a, b] = [0; 2].map(|_| table.add(with_something()).unwrap());
        // As often as a guest makes a connection and aborts it, without giving a buffer.
        for _ in 0..1000 {
            table.queue(a);
            table.queue(b);
            table.remove(a).unwrap();
            assert_eq!(table.add(with_something()).unwrap(), a);
        }
        assert_eq!(table.turns, [a, b]);
        assert_eq!(table.next_turn(), Some(a));
        table.queue(a);
        assert_eq!((table.next_turn(), table.next_turn()), (Some(b), Some(a)));
        assert_eq!((table.next_turn(), table.len()), (None, 2));
        table.get_mut(a).unwrap().to_say.response = false;
        table.queue(a);
        assert!(!table.has_turns(), "who has nothing to say has no turn");
    }

    #[test]
    fn ports_are_given_out_once() {
        let mut table = Table::new();
        table.next_port = LAST_PORT;
        for host_port in [LAST_PORT, FIRST_PORT, FIRST_PORT + 1] {
            let got = table.free_port(7);
            assert_eq!(got, host_port);
            let at = table.add(with_something()).unwrap();
            table.name(
                at,
                Key {
                    host_port,
                    guest_port: 7,
                },
            );
        }
        table.next_port = LAST_PORT;
        assert_eq!(
            table.free_port(8),
            LAST_PORT,
            "of another port of the guest"
        );
        table.next_port = LAST_PORT;
        assert_eq!(table.free_port(7), FIRST_PORT + 2);
        let key = Key {
            host_port: FIRST_PORT,
            guest_port: 7,
        };
        let at = table.find(key).unwrap();
        table.forget_name(at);
        assert_eq!(table.find(key), None);
        assert!(table.get_mut(at).is_some());
    }

    #[test]
    fn places_are_bounded() {
        let mut table = Table::new();
        for _ in 0..MAX_CONNECTIONS + MAX_GREETINGS {
            table.add(with_something()).unwrap();
        }
        table.add(with_something()).unwrap_err();
        table.remove(5).unwrap();
        assert_eq!(table.add(with_something()).unwrap(), 5);
    }
}
