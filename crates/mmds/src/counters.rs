//! What the service counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of the service, all interfaces together.
#[derive(Debug, Default)]
pub struct MetadataCounters {
    /// Frames of the guest that were for the service.
    pub rx_frames: Counter,
    /// Frames to the guest.
    pub tx_frames: Counter,
    /// Frames of the guest that were longer than any that the service reads.
    pub rx_too_long: Counter,
    /// Connections that the guest began.
    pub connections_created: Counter,
    /// Connections that were cut to make room for others.
    pub connections_evicted: Counter,
    /// Requests answered with what they asked for.
    pub requests_served: Counter,
    /// Requests answered with an error.
    pub requests_refused: Counter,
    /// Reads without a token.
    pub rx_no_token: Counter,
    /// Reads with a token that is not good.
    pub rx_invalid_token: Counter,
    /// Tokens given out.
    pub tokens_created: Counter,
}

impl CounterSet for MetadataCounters {
    fn name(&self) -> &'static str {
        "mmds"
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            rx_frames,
            tx_frames,
            rx_too_long,
            connections_created,
            connections_evicted,
            requests_served,
            requests_refused,
            rx_no_token,
            rx_invalid_token,
            tokens_created,
        } = self;
        for (name, counter) in [
            ("rx_frames", rx_frames),
            ("tx_frames", tx_frames),
            ("rx_too_long", rx_too_long),
            ("connections_created", connections_created),
            ("connections_evicted", connections_evicted),
            ("requests_served", requests_served),
            ("requests_refused", requests_refused),
            ("rx_no_token", rx_no_token),
            ("rx_invalid_token", rx_invalid_token),
            ("tokens_created", tokens_created),
        ] {
            f(name, counter.get());
        }
    }
}
