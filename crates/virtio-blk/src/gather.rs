//! Gathers completed requests under one interrupt while the driver makes more requests available.
//!
//! A store that answers at once would interrupt the driver for each request, in the midst of making the next
//! one: an interrupt costs a guest more than the rest of a request. But a driver that waits for this very
//! request must not wait longer. Which of the two it is, is learnt from what came: how many requests were
//! completed until no more came is how many the driver has, and after three quarters of them it is told, so that
//! it still has something to do when it is.

use std::time::Duration;

/// How long the next request is waited for before the driver is told of what is complete: longer than a driver
/// with more to do needs for a request, an interrupt included.
pub(crate) const WINDOW: Duration = Duration::from_micros(15);
/// Most requests under one interrupt. Abused by a guest with a long queue, to keep itself waiting.
const MOST: u32 = 64;
/// After a driver turned out to have one request only, so many interrupts pass until it is tried again: at
/// first, and at most. What a try costs, one [`WINDOW`], is nothing beside so many requests.
const FIRST_REST: u32 = 4;
const LONGEST_REST: u32 = 256;

/// How many requests one interrupt is for.
#[derive(Debug)]
pub(crate) struct Gather {
    limit: u32,
    /// Interrupts since the limit has changed.
    steady: u32,
    rest: u32,
    next_rest: u32,
}

impl Gather {
    pub(crate) fn new() -> Self {
        Self {
            limit: 1,
            steady: 0,
            rest: 0,
            next_rest: FIRST_REST,
        }
    }

    /// Whether the driver is to be told of so many requests although more may come.
    pub(crate) fn is_enough(&self, completed: u32) -> bool {
        completed >= self.limit
    }

    /// The driver is told because it is enough: perhaps it has more.
    pub(crate) fn was_enough(&mut self) {
        if self.limit > 1 {
            self.next_rest = FIRST_REST;
        } else if self.rest > 0 {
            self.rest = self.rest.saturating_sub(1);
            return;
        }
        // The larger the limit, the more is lost by a window in vain, in which the guest goes to sleep.
        self.steady = self.steady.saturating_add(1);
        if self.steady.saturating_mul(4) >= self.limit {
            self.steady = 0;
            self.limit = self.limit.saturating_add(1).min(MOST);
        }
    }

    /// The driver is told because nothing more came.
    pub(crate) fn ran_dry(&mut self, completed: u32) {
        self.steady = 0;
        let part = completed.saturating_mul(3).checked_div(4);
        self.limit = part.unwrap_or_default().clamp(1, MOST);
        if completed <= 1 {
            self.rest = self.next_rest;
            self.next_rest = self.next_rest.saturating_mul(2).min(LONGEST_REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that keeps `depth` requests in the queue; how many of them each interrupt was for, and how many
    /// windows passed in vain.
    fn play(gather: &mut Gather, depth: u32, interrupts: u32) -> (f64, u32) {
        let (mut all, mut vain) = (0, 0);
        for _ in 0..interrupts {
            let mut completed = 1;
            while !gather.is_enough(completed) && completed < depth {
                completed += 1;
            }
            if gather.is_enough(completed) {
                gather.was_enough();
            } else {
                gather.ran_dry(completed);
                vain += 1;
            }
            all += completed;
        }
        (f64::from(all) / f64::from(interrupts), vain)
    }

    #[test]
    fn a_deep_queue_is_told_of_a_part_of_it_at_a_time() {
        let mut gather = Gather::new();
        play(&mut gather, 32, 200);
        let (each, vain) = play(&mut gather, 32, 1000);
        assert!((24.0..32.0).contains(&each), "{each}");
        assert!(vain < 40, "{vain}");
    }

    #[test]
    fn a_single_request_is_told_at_once() {
        let mut gather = Gather::new();
        play(&mut gather, 1, 1000);
        let (each, vain) = play(&mut gather, 1, 1000);
        assert!(each == 1.0 && vain <= 8, "{each} {vain}");
        // And a driver that comes to have more is found out.
        play(&mut gather, 32, 2 * LONGEST_REST);
        let (each, _) = play(&mut gather, 32, 100);
        assert!(each >= 16.0, "{each}");
        play(&mut gather, 1, 100);
        let (_, vain) = play(&mut gather, 1, 1000);
        assert!(vain <= 8, "{vain}");
    }

    #[test]
    fn a_long_queue_is_bounded() {
        let mut gather = Gather::new();
        let (each, _) = play(&mut gather, 10_000, 1000);
        assert!(each <= f64::from(MOST), "{each}");
    }
}
