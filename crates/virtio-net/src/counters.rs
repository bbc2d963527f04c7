//! What a network device counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of one device, all its queues together.
#[derive(Debug, Default)]
pub struct NetCounters {
    name: String,
    /// Frames given to the guest.
    pub rx_frames: Counter,
    /// Their bytes, headers of virtio left out.
    pub rx_bytes: Counter,
    /// Frames for the guest that were longer than its buffers, or than its MTU.
    pub rx_too_long: Counter,
    /// Frames for the guest that came while its link was down.
    pub rx_link_down: Counter,
    /// Times frames may have waited because the guest had no buffers for them.
    pub rx_starved: Counter,
    /// Times a frame went through memory of ours because the guest had too few buffers for a longer one.
    pub rx_kept: Counter,
    /// Times the rate limiter held a frame for the guest back.
    pub rx_throttled: Counter,
    /// Times the link could not be read.
    pub rx_errors: Counter,
    /// Frames the link took from the guest.
    pub tx_frames: Counter,
    /// Their bytes, headers of virtio left out.
    pub tx_bytes: Counter,
    /// Frames of the guest that are none: too short, too long, with a header that lies, or not in its memory.
    pub tx_malformed: Counter,
    /// Frames of the guest from an address that is not its own.
    pub tx_spoofed: Counter,
    /// Frames of the guest that came while its link was down.
    pub tx_link_down: Counter,
    /// Times the rate limiter held a frame of the guest back.
    pub tx_throttled: Counter,
    /// Times the link took no frame for now.
    pub tx_blocked: Counter,
    /// Frames of the guest that the host refused.
    pub tx_errors: Counter,
    /// Rounds in which frames moved.
    pub batches: Counter,
    /// Times there was more to do when it was looked for, without a doorbell.
    pub found: Counter,
    /// Times the host's kernel took a queue over. What it moves is counted by the host's interface alone.
    pub vhost_starts: Counter,
    /// Its interrupts that went by way of the device's thread.
    pub vhost_interrupts: Counter,
    /// Control commands done.
    pub commands: Counter,
    /// Control commands answered with an error.
    pub commands_refused: Counter,
}

impl NetCounters {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            ..Self::default()
        }
    }
}

impl CounterSet for NetCounters {
    fn name(&self) -> &str {
        &self.name
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            name: _,
            rx_frames,
            rx_bytes,
            rx_too_long,
            rx_link_down,
            rx_starved,
            rx_kept,
            rx_throttled,
            rx_errors,
            tx_frames,
            tx_bytes,
            tx_malformed,
            tx_spoofed,
            tx_link_down,
            tx_throttled,
            tx_blocked,
            tx_errors,
            batches,
            found,
            vhost_starts,
            vhost_interrupts,
            commands,
            commands_refused,
        } = self;
        f("rx_frames", rx_frames.get());
        f("rx_bytes", rx_bytes.get());
        f("rx_too_long", rx_too_long.get());
        f("rx_link_down", rx_link_down.get());
        f("rx_starved", rx_starved.get());
        f("rx_kept", rx_kept.get());
        f("rx_throttled", rx_throttled.get());
        f("rx_errors", rx_errors.get());
        f("tx_frames", tx_frames.get());
        f("tx_bytes", tx_bytes.get());
        f("tx_malformed", tx_malformed.get());
        f("tx_spoofed", tx_spoofed.get());
        f("tx_link_down", tx_link_down.get());
        f("tx_throttled", tx_throttled.get());
        f("tx_blocked", tx_blocked.get());
        f("tx_errors", tx_errors.get());
        f("batches", batches.get());
        f("found", found.get());
        f("vhost_starts", vhost_starts.get());
        f("vhost_interrupts", vhost_interrupts.get());
        f("commands", commands.get());
        f("commands_refused", commands_refused.get());
    }
}
