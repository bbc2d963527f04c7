//! What the serial port counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of one serial port.
#[derive(Debug, Default)]
pub struct SerialCounters {
    /// Bytes the guest wrote that were taken.
    pub bytes_out: Counter,
    /// Bytes given to the guest.
    pub bytes_in: Counter,
    /// Bytes the guest wrote that went nowhere: queue full, disk full, terminal gone.
    pub bytes_dropped: Counter,
    /// Bytes typed at a terminal for which the guest had no room.
    pub input_dropped: Counter,
    /// Times a vCPU woke the event loop.
    pub wakeups: Counter,
    /// Times a vCPU waited for room in the output queue.
    pub stalls: Counter,
}

impl CounterSet for SerialCounters {
    fn name(&self) -> &str {
        "serial"
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            bytes_out,
            bytes_in,
            bytes_dropped,
            input_dropped,
            wakeups,
            stalls,
        } = self;
        f("bytes_out", bytes_out.get());
        f("bytes_in", bytes_in.get());
        f("bytes_dropped", bytes_dropped.get());
        f("input_dropped", input_dropped.get());
        f("wakeups", wakeups.get());
        f("stalls", stalls.get());
    }
}
