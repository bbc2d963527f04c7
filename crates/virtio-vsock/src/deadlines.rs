//! When to look at the clock next.

use std::io;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// One timer for all deadlines of a device: it wakes at the earliest.
pub(crate) struct Deadlines {
    timer: TimerFd,
    armed: Option<Instant>,
}

impl Deadlines {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: TimerFd::new()?,
            armed: None,
        })
    }

    pub(crate) fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Wakes at `at`, or earlier.
    pub(crate) fn arm(&mut self, at: Instant) {
        if self.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        let wait = at.saturating_duration_since(Instant::now());
        // Zero would disarm it. It fails for impossible times only.
        if self
            .timer
            .reset(wait.max(Duration::from_nanos(1)), None)
            .is_ok()
        {
            self.armed = Some(at);
        }
    }

    /// It has woken, or nobody wants it any more.
    pub(crate) fn disarm(&mut self) {
        self.armed = None;
        let _ = self.timer.clear();
    }
}
