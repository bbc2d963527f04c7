//! What the filter counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of the filter of one interface.
#[derive(Debug, Default)]
pub struct EgressCounters {
    name: String,
    /// Frames that no rule allows.
    pub denied: Counter,
    /// Frames whose headers contradict each other or their length.
    pub malformed: Counter,
    /// Parts of packets, which have no ports to be judged by.
    pub fragments: Counter,
    /// Frames of which it cannot be told where they go: neither ARP nor IP, with a VLAN tag, with a route of their own, with too many
    /// headers.
    pub unreadable: Counter,
    /// Frames that pass as answers only.
    pub answers: Counter,
    /// Times that half of the remembered peers were forgotten.
    pub peers_forgotten: Counter,
}

impl EgressCounters {
    /// Those of the interface with this name.
    #[must_use]
    pub fn new(interface: &str) -> Self {
        Self {
            name: format!("egress {interface}"),
            ..Self::default()
        }
    }
}

impl CounterSet for EgressCounters {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            name: _,
            denied,
            malformed,
            fragments,
            unreadable,
            answers,
            peers_forgotten,
        } = self;
        for (name, counter) in [
            ("denied", denied),
            ("malformed", malformed),
            ("fragments", fragments),
            ("unreadable", unreadable),
            ("answers", answers),
            ("peers_forgotten", peers_forgotten),
        ] {
            f(name, counter.get());
        }
    }
}
