//! Looks for the next request for a moment before a worker goes to sleep.
//!
//! A driver that has one request in flight rings again soon after it was told, and a fast disk, or the other side of
//! a network, answers soon: the exit that rings, and waking a thread, take longer than all the rest. How long to look is learnt from how
//! long the sleeps were, so that an idle device costs nothing and a slow guest little. Where somebody else wants
//! the processor there is no looking: each look would keep a guest from running.

use std::time::{Duration, Instant};

/// Pauses of the processor between two looks: what is looked at lies where the guest writes, and each look
/// makes its next write slower.
const LOOKS_APART: u32 = 64;

/// What looking starts with once it seems worth it.
const FIRST: Duration = Duration::from_micros(8);

/// A look that stood still for so long was interrupted by somebody who wants the processor.
const PREEMPTED: Duration = Duration::from_micros(500);
/// So many sleeps pass after that until looking may seem worth it again.
const REST: u32 = 100;

/// How long one worker looks.
pub struct BusyWait {
    most: Duration,
    now: Duration,
    rest: u32,
    asleep_since: Option<Instant>,
}

impl BusyWait {
    /// `most`: never look longer; zero: never look.
    #[must_use]
    pub fn new(most: Duration) -> Self {
        Self {
            most,
            now: Duration::ZERO,
            rest: 0,
            asleep_since: None,
        }
    }

    /// Whether there may be any looking.
    #[must_use]
    pub fn may_look(&self) -> bool {
        !self.now.is_zero()
    }

    /// Looks until `found` or the time is over; whether it was found.
    pub fn look(&mut self, found: impl FnMut() -> bool) -> bool {
        self.look_for(self.now, found)
    }

    /// Looks until `found`, for at most `time` and not where there may be no looking; whether it was found.
    pub fn look_for(&mut self, time: Duration, mut found: impl FnMut() -> bool) -> bool {
        if !self.may_look() {
            return false;
        }
        let start = Instant::now();
        let mut last = start;
        loop {
            for _ in 0..LOOKS_APART {
                std::hint::spin_loop();
            }
            // Whom this thread has just woken may have been put on its processor, and would wait there for the rest
            // of its slice.
            std::thread::yield_now();
            if found() {
                return true;
            }
            let now = Instant::now();
            if now.duration_since(last) > PREEMPTED {
                self.now = Duration::ZERO;
                self.rest = REST;
                return false;
            }
            if now.duration_since(start) >= time {
                return false;
            }
            last = now;
        }
    }

    /// The worker goes to sleep.
    pub fn sleeps(&mut self) {
        if !self.most.is_zero() {
            self.asleep_since = Some(Instant::now());
        }
    }

    /// The worker was woken.
    pub fn wakes(&mut self) {
        if let Some(since) = self.asleep_since.take() {
            self.learn(since.elapsed());
        }
    }

    /// A sleep that was shorter than the longest look should not have been; one that was much longer was
    /// not worth any.
    fn learn(&mut self, slept: Duration) {
        if let Some(rest) = self.rest.checked_sub(1) {
            self.rest = rest;
            return;
        }
        self.now = if slept < self.most {
            self.now.saturating_mul(2).max(FIRST).min(self.most)
        } else {
            self.now
                .checked_div(2)
                .filter(|t| *t >= FIRST)
                .unwrap_or_default()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    #[test]
    fn short_sleeps_make_it_look_and_long_ones_stop_it() {
        let mut wait = BusyWait::new(MOST);
        assert!(!wait.look(|| true), "nothing is known yet");
        for _ in 0..10 {
            wait.learn(Duration::from_micros(20));
            assert!(wait.now <= MOST && wait.now >= FIRST);
        }
        assert_eq!(wait.now, MOST);
        assert!(wait.look(|| true));
        for _ in 0..10 {
            wait.learn(Duration::from_millis(1));
        }
        assert!(wait.now.is_zero());
    }

    #[test]
    fn without_leave_it_never_looks() {
        let mut wait = BusyWait::new(Duration::ZERO);
        wait.sleeps();
        wait.wakes();
        wait.learn(Duration::ZERO);
        assert!(!wait.look(|| true));
    }

    #[test]
    fn looking_ends() {
        let mut wait = BusyWait::new(MOST);
        wait.learn(Duration::ZERO);
        let mut looks = 0u64;
        assert!(!wait.look(|| {
            looks += 1;
            false
        }));
        assert!(looks > 0);
    }

    #[test]
    fn who_is_interrupted_does_not_look_for_a_while() {
        let mut wait = BusyWait::new(MOST);
        wait.learn(Duration::ZERO);
        let mut looks = 0;
        assert!(!wait.look(|| {
            looks += 1;
            std::thread::sleep(2 * PREEMPTED);
            false
        }));
        assert_eq!(looks, 1);
        for _ in 0..REST {
            assert!(!wait.may_look());
            wait.learn(Duration::ZERO);
        }
        wait.learn(Duration::ZERO);
        assert!(wait.may_look());
    }
}
