//! What a disk counts.

use std::time::Duration;

use alveole_counters::{Counter, CounterSet, Histogram, Observed};

use crate::Kind;

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
    /// How long reads took, from the round in which they were taken to that in which they were found complete.
    pub read_latency: Histogram,
    /// The same of writes.
    pub write_latency: Histogram,
    /// The same of flushes.
    pub flush_latency: Histogram,
}

impl BlkCounters {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }

    /// A request that the host has worked on took so long.
    pub(crate) fn took(&self, kind: Kind, time: Duration) {
        match kind {
            Kind::Read => self.read_latency.observe(time),
            Kind::Write => self.write_latency.observe(time),
            Kind::Flush => self.flush_latency.observe(time),
            Kind::Discard | Kind::WriteZeroes | Kind::GetId => {}
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
            read_latency: _,
            write_latency: _,
            flush_latency: _,
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

    fn visit_histograms(&self, f: &mut dyn FnMut(&str, Observed)) {
        f("read", self.read_latency.observed());
        f("write", self.write_latency.observed());
        f("flush", self.flush_latency.observed());
    }
}
