//! What a network device counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of one device.
#[derive(Debug, Default)]
pub struct NetCounters {
    name: String,
    /// Frames given to the guest.
    pub rx_frames: Counter,
}

impl CounterSet for NetCounters {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        f("rx_frames", self.rx_frames.get());
    }
}
