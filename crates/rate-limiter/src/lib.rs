//! Token buckets that bound how much a device does in a time.
//!
//! A [`RateLimiter`] has two [`TokenBucket`]s: bytes and operations. Both start full; a bucket may hold a
//! burst besides that is spent once and never refilled. A request that is larger than the whole bucket is
//! let through when the bucket is full, and the next ones wait for what it took too much: so every request
//! is served in the end, and the rate holds.
//!
//! Time is handed in, so that a test needs no clock.
//!
//! Deliberately does not know: what is limited, who waits, timers.

use std::time::{Duration, Instant};

/// How much in how long. The words are those of Firecracker's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Tokens the bucket holds; it refills evenly.
    pub size: u64,
    /// Tokens besides, spent first and never refilled.
    pub one_time_burst: u64,
    /// How long an empty bucket takes to be full.
    pub refill_time: Duration,
}

/// What one limiter bounds; none: no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Bytes.
    pub bandwidth: Option<Bucket>,
    /// Operations.
    pub ops: Option<Bucket>,
}

/// One bucket and its level.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    bucket: Bucket,
    burst: u64,
    /// Negative after a request that was larger than the bucket.
    level: i128,
    /// The part of a token that has grown since, in tokens times nanoseconds of refill time.
    fraction: u128,
    since: Instant,
}

impl TokenBucket {
    /// A full bucket. None where it would bound nothing: no size or no refill time, as Firecracker has it.
    #[must_use]
    pub fn new(bucket: Bucket, now: Instant) -> Option<Self> {
        if bucket.size == 0 || bucket.refill_time.is_zero() {
            return None;
        }
        Some(Self {
            bucket,
            burst: bucket.one_time_burst,
            level: i128::from(bucket.size),
            fraction: 0,
            since: now,
        })
    }

    /// Takes `tokens`, or says how long to wait.
    ///
    /// # Errors
    /// The time until they would be granted, unless others take them first.
    pub fn take(&mut self, tokens: u64, now: Instant) -> Result<(), Duration> {
        let wait = self.wait(tokens, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.level -= i128::from(tokens - from_burst);
        Ok(())
    }

    /// How long until `tokens` would be granted.
    fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        self.refill(now);
        // A request larger than the bucket waits for a full one and takes more than there is.
        let needed = i128::from((tokens.saturating_sub(self.burst)).min(self.bucket.size));
        let Ok(missing) = u128::try_from(needed - self.level) else {
            return Duration::ZERO;
        };
        if missing == 0 {
            return Duration::ZERO;
        }
        let time = self.bucket.refill_time.as_nanos();
        let nanos = (missing * time - self.fraction).div_ceil(u128::from(self.bucket.size));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn refill(&mut self, now: Instant) {
        let size = u128::from(self.bucket.size);
        let time = self.bucket.refill_time.as_nanos();
        let passed = now.saturating_duration_since(self.since).as_nanos();
        self.since = self.since.max(now);
        // Less than 2^64 each, so that the product cannot pass 2^128.
        let grown = size * passed.min(u128::from(u64::MAX)) + self.fraction;
        let full = i128::from(self.bucket.size);
        let level = self.level + i128::try_from(grown / time).unwrap_or(i128::MAX / 2);
        if level >= full {
            self.level = full;
            self.fraction = 0;
        } else {
            self.level = level;
            self.fraction = grown % time;
        }
    }
}

/// Bounds bytes and operations together.
#[derive(Debug, Clone, Default)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// With full buckets.
    #[must_use]
    pub fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |bucket: Option<Bucket>| bucket.and_then(|b| TokenBucket::new(b, now));
        Self {
            bandwidth: bucket(limits.bandwidth),
            ops: bucket(limits.ops),
        }
    }

    /// Changes what is named, with full buckets, and leaves the rest as it is.
    pub fn change(&mut self, limits: Limits, now: Instant) {
        if let Some(bucket) = limits.bandwidth {
            self.bandwidth = TokenBucket::new(bucket, now);
        }
        if let Some(bucket) = limits.ops {
            self.ops = TokenBucket::new(bucket, now);
        }
    }

    /// Whether nothing is bounded.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.ops.is_none()
    }

    /// Takes one operation of `bytes` from both buckets, or from none.
    ///
    /// # Errors
    /// The time until it would be granted, unless others take it first.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let Self { bandwidth, ops } = self;
        let wait_of = |bucket: &mut Option<TokenBucket>, tokens| {
            bucket
                .as_mut()
                .map_or(Duration::ZERO, |b| b.wait(tokens, now))
        };
        let wait = wait_of(bandwidth, bytes).max(wait_of(ops, 1));
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, tokens) in [(bandwidth, bytes), (ops, 1)] {
            if let Some(bucket) = bucket {
                // Granted just above.
                let _ = bucket.take(tokens, now);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, burst: u64, ms: u64) -> Bucket {
        Bucket {
            size,
            one_time_burst: burst,
            refill_time: Duration::from_millis(ms),
        }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_bucket_is_full_then_refills_evenly() {
        let start = Instant::now();
        let mut b = TokenBucket::new(bucket(100, 0, 1000), start).unwrap();
        b.take(100, start).unwrap();
        assert_eq!(b.take(1, start), Err(10 * MS));
        assert_eq!(b.take(10, start + 50 * MS), Err(50 * MS));
        b.take(10, start + 100 * MS).unwrap();
        // It never holds more than its size.
        b.take(100, start + 100_000 * MS).unwrap();
        assert_eq!(b.take(1, start + 100_000 * MS), Err(10 * MS));
    }

    #[test]
    fn a_burst_is_spent_first_and_once() {
        let start = Instant::now();
        let mut b = TokenBucket::new(bucket(100, 50, 1000), start).unwrap();
        b.take(50, start).unwrap();
        b.take(100, start).unwrap();
        assert_eq!(b.take(100, start), Err(1000 * MS));
        b.take(100, start + 1000 * MS).unwrap();
        assert_eq!(b.take(1, start + 1000 * MS), Err(10 * MS));
    }

    #[test]
    fn a_request_larger_than_the_bucket_is_served_and_paid_for_later() {
        let start = Instant::now();
        let mut b = TokenBucket::new(bucket(100, 0, 1000), start).unwrap();
        b.take(1, start).unwrap();
        assert_eq!(b.take(300, start), Err(10 * MS));
        b.take(300, start + 10 * MS).unwrap();
        assert_eq!(b.take(1, start + 10 * MS), Err(2010 * MS));
        b.take(1, start + 2020 * MS).unwrap();
    }

    #[test]
    fn no_size_or_no_time_is_no_bound() {
        let now = Instant::now();
        assert!(TokenBucket::new(bucket(0, 5, 100), now).is_none());
        assert!(TokenBucket::new(bucket(5, 5, 0), now).is_none());
        assert!(RateLimiter::default().is_unlimited());
    }

    #[test]
    fn both_buckets_are_asked_and_none_pays_for_a_refusal() {
        let start = Instant::now();
        let limits = Limits {
            bandwidth: Some(bucket(1000, 0, 1000)),
            ops: Some(bucket(2, 0, 1000)),
        };
        let mut l = RateLimiter::new(limits, start);
        l.take(10, start).unwrap();
        l.take(10, start).unwrap();
        assert_eq!(l.take(980, start), Err(500 * MS));
        // The bytes of the refused one are still there.
        l.take(980, start + 500 * MS).unwrap();
        l.change(
            Limits {
                ops: Some(bucket(0, 0, 0)),
                bandwidth: None,
            },
            start + 500 * MS,
        );
        assert!(l.take(1000, start + 500 * MS).is_err());
        l.take(5, start + 505 * MS).unwrap();
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_and_takes_nothing() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut b = TokenBucket::new(bucket(10, 0, 1000), start).unwrap();
        b.take(10, start).unwrap();
        assert!(b.take(1, start - Duration::from_secs(5)).is_err());
        assert_eq!(b.take(1, start), Err(100 * MS));
    }

    proptest! {
        /// Whatever is asked whenever, no more than size + burst + rate × time + one request is granted,
        /// and waiting as told is enough.
        #[test]
        fn the_rate_holds(
            size in 1u64..1_000_000, burst in 0u64..1000, ms in 1u64..10_000,
            asks in proptest::collection::vec((0u64..2_000_000, 0u64..1_000_000_000), 1..50),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut b = TokenBucket::new(bucket(size, burst, ms), start).unwrap();
            let (mut granted, mut largest) = (0u128, 0);
            for (tokens, pause) in asks {
                now += Duration::from_nanos(pause);
                if let Err(wait) = b.take(tokens, now) {
                    now += wait;
                    prop_assert_eq!(b.take(tokens, now), Ok(()));
                }
                granted += u128::from(tokens);
                largest = largest.max(tokens);
                let grown = u128::from(size) * (now - start).as_nanos() / u128::from(ms * 1_000_000);
                prop_assert!(granted <= u128::from(size + burst + largest) + grown + 1);
            }
        }

        #[test]
        fn no_value_panics(size: u64, burst: u64, ns: u64, asks: [(u64, u64); 4]) {
            let now = Instant::now();
            let bucket = Bucket { size, one_time_burst: burst, refill_time: Duration::from_nanos(ns) };
            if let Some(mut b) = TokenBucket::new(bucket, now) {
                for (tokens, pause) in asks {
                    let _ = b.take(tokens, now.checked_add(Duration::from_nanos(pause)).unwrap_or(now));
                }
            }
        }
    }
}
