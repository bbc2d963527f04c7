//! What the device counts.

use alveole_counters::{Counter, CounterSet};

/// Counters of the socket device.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Connections that the guest began and a program of the host took.
    pub from_guest: Counter,
    /// Connections that the host began and the guest took.
    pub from_host: Counter,
    /// Connections that ended, whatever the reason.
    pub ended: Counter,
    /// Connections of the guest that nobody of the host took, or for which there was no room.
    pub refused: Counter,
    /// Clients of the host that were turned away: nonsense, too slow, no room.
    pub turned_away: Counter,
    /// Connections that somebody let wait for too long.
    pub timeouts: Counter,
    /// Packets from the guest.
    pub packets_from_guest: Counter,
    /// Packets to the guest.
    pub packets_to_guest: Counter,
    /// Packets that no driver should send: lies, nonsense, more than there was credit for.
    pub bad_packets: Counter,
    /// Resets sent to the guest.
    pub resets: Counter,
    /// Bytes from the guest.
    pub bytes_from_guest: Counter,
    /// Bytes to the guest.
    pub bytes_to_guest: Counter,
    /// Bytes that were kept because a socket of the host did not take them at once.
    pub bytes_kept: Counter,
    /// Times the guest had no buffer for what waited.
    pub no_buffer: Counter,
    /// Times the guest's credit was used up and more waited.
    pub no_credit: Counter,
}

impl CounterSet for VsockCounters {
    fn name(&self) -> &str {
        "vsock"
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            from_guest,
            from_host,
            ended,
            refused,
            turned_away,
            timeouts,
            packets_from_guest,
            packets_to_guest,
            bad_packets,
            resets,
            bytes_from_guest,
            bytes_to_guest,
            bytes_kept,
            no_buffer,
            no_credit,
        } = self;
        f("from_guest", from_guest.get());
        f("from_host", from_host.get());
        f("ended", ended.get());
        f("refused", refused.get());
        f("turned_away", turned_away.get());
        f("timeouts", timeouts.get());
        f("packets_from_guest", packets_from_guest.get());
        f("packets_to_guest", packets_to_guest.get());
        f("bad_packets", bad_packets.get());
        f("resets", resets.get());
        f("bytes_from_guest", bytes_from_guest.get());
        f("bytes_to_guest", bytes_to_guest.get());
        f("bytes_kept", bytes_kept.get());
        f("no_buffer", no_buffer.get());
        f("no_credit", no_credit.get());
    }
}
