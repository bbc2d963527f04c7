//! The guest's clock.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

/// Sets the clock.
pub(crate) fn set_clock(unix_ns: u64) -> Result<(), String> {
    let act =
        |e: &dyn std::fmt::Display| format!("cannot set the clock to {unix_ns} ns since 1970: {e}");
    let time = Timespec {
        tv_sec: i64::try_from(unix_ns / 1_000_000_000).map_err(|e| act(&e))?,
        #[expect(clippy::cast_possible_wrap, reason = "less than a second")]
        tv_nsec: (unix_ns % 1_000_000_000) as i64,
    };
    clock_settime(ClockId::Realtime, time).map_err(|e| act(&e))
}

/// Steps the clock, and gives what it is then. By nothing, it is only read.
pub(crate) fn step_clock(by_ns: i64) -> Result<u64, String> {
    if by_ns != 0 {
        let to = u64::try_from(now_ns() + i128::from(by_ns)).map_err(|_| {
            format!("cannot step the clock by {by_ns} ns: that is before 1970, or too late")
        })?;
        set_clock(to)?;
    }
    u64::try_from(now_ns()).map_err(|_| "the clock is before 1970".into())
}

/// Nanoseconds since 1970, as this guest has it.
pub(crate) fn now_ns() -> i128 {
    let now = clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}
