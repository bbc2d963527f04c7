//! What a disk counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of one disk.
#[derive(Debug, Default)]
pub struct BlkCounters {
    name: String,
    /// Reads done.
    pub reads: Counter,
    /// Writes done.
    pub writes: Counter,
    /// Flushes done.
    pub flushes: Counter,
    /// Ranges discarded or zeroed.
    pub ranges: Counter,
    /// Bytes read.
    pub bytes_read: Counter,
    /// Bytes written.
    pub bytes_written: Counter,
    /// Requests answered with an I/O error.
    pub errors: Counter,
    /// Requests answered as not supported.
    pub unsupported: Counter,
    /// Times the rate limiter held a request back.
    pub throttled: Counter,
    /// Batches handed to the host.
    pub batches: Counter,
    /// Times the next request was found by looking for it, without a doorbell.
    pub found: Counter,
    /// Times the next request came before the driver was told of the last one.
    pub gathered: Counter,
}

impl BlkCounters {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }
}

impl CounterSet for BlkCounters {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            name: _,
            reads,
            writes,
            flushes,
            ranges,
            bytes_read,
            bytes_written,
            errors,
            unsupported,
            throttled,
            batches,
            found,
            gathered,
        } = self;
        f("reads", reads.get());
        f("writes", writes.get());
        f("flushes", flushes.get());
        f("ranges", ranges.get());
        f("bytes_read", bytes_read.get());
        f("bytes_written", bytes_written.get());
        f("errors", errors.get());
        f("unsupported", unsupported.get());
        f("throttled", throttled.get());
        f("batches", batches.get());
        f("found", found.get());
        f("gathered", gathered.get());
    }
}
