//! Limits log lines that a guest can cause.

use std::time::{Duration, Instant};

/// At most one line per cause and period. Abused by a guest that floods a console on a full disk.
const LOG_PERIOD: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    last: Option<Instant>,
}

impl LogLimit {
    /// Whether a line may be written now.
    pub(crate) fn allows(&mut self) -> bool {
        let now = Instant::now();
        let due = self
            .last
            .is_none_or(|t| now.duration_since(t) >= LOG_PERIOD);
        if due {
            self.last = Some(now);
        }
        due
    }
}
