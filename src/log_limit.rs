//! How many log lines one place of the program may write: a guest that makes a device complain for ever must not fill its host's disk.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Most lines of one place in [`WINDOW`].
pub(crate) const MOST_LINES: u32 = 10;
/// From the first line of a place on.
pub(crate) const WINDOW: Duration = Duration::from_secs(5);

/// What was written from where.
pub(crate) struct LogLimit {
    places: BTreeMap<(&'static str, u32), Place>,
}

struct Place {
    since: Instant,
    lines: u32,
    left_out: u64,
}

impl LogLimit {
    pub(crate) const fn new() -> Self {
        Self {
            places: BTreeMap::new(),
        }
    }

    /// Whether this place (a file and a line of it) may write a line now, and then how many of its lines were left out before.
    pub(crate) fn ask(&mut self, place: (&'static str, u32), now: Instant) -> Option<u64> {
        let place = self.places.entry(place).or_insert(Place {
            since: now,
            lines: 0,
            left_out: 0,
        });
        if now.saturating_duration_since(place.since) >= WINDOW {
            place.since = now;
            place.lines = 0;
        }
        if place.lines >= MOST_LINES {
            place.left_out += 1;
            return None;
        }
        place.lines += 1;
        Some(std::mem::take(&mut place.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_place_has_its_lines_and_tells_what_was_left_out() {
        let mut limit = LogLimit::new();
        let start = Instant::now();
        let (one, other) = (("a.rs", 1), ("a.rs", 2));
        for _ in 0..MOST_LINES {
            assert_eq!(limit.ask(one, start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(limit.ask(one, start + WINDOW / 2), None);
        }
        assert_eq!(limit.ask(other, start + WINDOW / 2), Some(0));
        assert_eq!(limit.ask(one, start + WINDOW), Some(1000));
        assert_eq!(limit.ask(one, start + WINDOW), Some(0));
    }
}
