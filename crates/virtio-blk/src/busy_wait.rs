//! Looks for the next request for a moment before a worker goes to sleep.
//!
//! A driver that has one request in flight rings again soon after it was told: the exit that rings, and
//! waking a thread, take longer than all the rest. How long to look is learnt from how long the sleeps were,
//! so that an idle disk costs nothing and a slow guest little.

use std::time::{Duration, Instant};

/// What looking starts with once it seems worth it.
const FIRST: Duration = Duration::from_micros(8);

/// How long one worker looks.
pub(crate) struct BusyWait {
    most: Duration,
    now: Duration,
    asleep_since: Option<Instant>,
}

impl BusyWait {
    /// `most`: never look longer; zero: never look.
    pub(crate) fn new(most: Duration) -> Self {
        Self {
            most,
            now: Duration::ZERO,
            asleep_since: None,
        }
    }

    /// Looks until `found` or the time is over; whether it was found.
    pub(crate) fn look(&self, mut found: impl FnMut() -> bool) -> bool {
        if self.now.is_zero() {
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < self.now {
            if found() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// The worker goes to sleep.
    pub(crate) fn sleeps(&mut self) {
        if !self.most.is_zero() {
            self.asleep_since = Some(Instant::now());
        }
    }

    /// The worker was woken.
    pub(crate) fn wakes(&mut self) {
        if let Some(since) = self.asleep_since.take() {
            self.learn(since.elapsed());
        }
    }

    /// A sleep that was shorter than the longest look should not have been; one that was much longer was
    /// not worth any.
    fn learn(&mut self, slept: Duration) {
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
}
