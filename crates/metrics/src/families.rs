//! Which family of metrics a counter belongs to, by the conventions of Prometheus: a unit in the name, `_total` behind what
//! only grows, one family for what can be added up.

/// A family: what its name says after the program's, what people are told of it, and what tells its members apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Family {
    /// Without the program's name in front and `_total` behind.
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    /// A label and its value, beside that of the component.
    pub(crate) label: Option<(&'static str, &'static str)>,
}

type Row = (
    &'static str,
    &'static str,
    &'static str,
    Option<(&'static str, &'static str)>,
);

const fn dir(value: &'static str) -> Option<(&'static str, &'static str)> {
    Some(("direction", value))
}

const fn reason(value: &'static str) -> Option<(&'static str, &'static str)> {
    Some(("reason", value))
}

const fn operation(value: &'static str) -> Option<(&'static str, &'static str)> {
    Some(("operation", value))
}

/// Kind of component, counter, family, label.
const ROWS: &[Row] = &[
    ("drive", "reads", "drive_requests", operation("read")),
    ("drive", "writes", "drive_requests", operation("write")),
    ("drive", "flushes", "drive_requests", operation("flush")),
    ("drive", "ranges", "drive_requests", operation("discard")),
    ("drive", "bytes_read", "drive_bytes", operation("read")),
    ("drive", "bytes_written", "drive_bytes", operation("write")),
    ("drive", "errors", "drive_errors", None),
    ("drive", "unsupported", "drive_unsupported_requests", None),
    ("drive", "throttled", "drive_throttled", None),
    ("drive", "batches", "drive_batches", None),
    ("drive", "found", "drive_polled_batches", None),
    ("drive", "gathered", "drive_gathered_completions", None),
    ("net", "rx_frames", "net_frames", dir("receive")),
    ("net", "tx_frames", "net_frames", dir("transmit")),
    ("net", "rx_bytes", "net_bytes", dir("receive")),
    ("net", "tx_bytes", "net_bytes", dir("transmit")),
    (
        "net",
        "rx_too_long",
        "net_receive_dropped_frames",
        reason("too_long"),
    ),
    (
        "net",
        "rx_link_down",
        "net_receive_dropped_frames",
        reason("link_down"),
    ),
    (
        "net",
        "tx_malformed",
        "net_transmit_dropped_frames",
        reason("malformed"),
    ),
    (
        "net",
        "tx_spoofed",
        "net_transmit_dropped_frames",
        reason("spoofed"),
    ),
    (
        "net",
        "tx_link_down",
        "net_transmit_dropped_frames",
        reason("link_down"),
    ),
    (
        "net",
        "tx_errors",
        "net_transmit_dropped_frames",
        reason("error"),
    ),
    ("net", "rx_errors", "net_receive_errors", None),
    ("net", "rx_starved", "net_receive_starved", None),
    ("net", "rx_kept", "net_receive_copied_frames", None),
    ("net", "tx_blocked", "net_transmit_blocked", None),
    ("net", "rx_throttled", "net_throttled", dir("receive")),
    ("net", "tx_throttled", "net_throttled", dir("transmit")),
    ("net", "batches", "net_batches", None),
    ("net", "found", "net_polled_batches", None),
    ("net", "vhost_starts", "net_vhost_starts", None),
    ("net", "vhost_interrupts", "net_vhost_interrupts", None),
    ("net", "commands", "net_commands", None),
    ("net", "commands_refused", "net_refused_commands", None),
    ("serial", "bytes_out", "serial_bytes", dir("out")),
    ("serial", "bytes_in", "serial_bytes", dir("in")),
    (
        "serial",
        "bytes_dropped",
        "serial_dropped_bytes",
        dir("out"),
    ),
    ("serial", "input_dropped", "serial_dropped_bytes", dir("in")),
    ("serial", "wakeups", "serial_wakeups", None),
    ("serial", "stalls", "serial_stalls", None),
    ("vcpu", "exits_port_read", "vcpu_exits", reason("port_read")),
    (
        "vcpu",
        "exits_port_write",
        "vcpu_exits",
        reason("port_write"),
    ),
    ("vcpu", "exits_mmio_read", "vcpu_exits", reason("mmio_read")),
    (
        "vcpu",
        "exits_mmio_write",
        "vcpu_exits",
        reason("mmio_write"),
    ),
    (
        "vcpu",
        "exits_interrupted",
        "vcpu_exits",
        reason("interrupted"),
    ),
    ("rng", "requests", "entropy_requests", None),
    ("rng", "bytes", "entropy_bytes", None),
    ("rng", "throttled", "entropy_throttled", None),
    ("rng", "errors", "entropy_errors", None),
    (
        "vsock",
        "from_guest",
        "vsock_connections",
        Some(("origin", "guest")),
    ),
    (
        "vsock",
        "from_host",
        "vsock_connections",
        Some(("origin", "host")),
    ),
    ("vsock", "ended", "vsock_ended_connections", None),
    (
        "vsock",
        "refused",
        "vsock_failed_connections",
        reason("refused"),
    ),
    (
        "vsock",
        "turned_away",
        "vsock_failed_connections",
        reason("too_many"),
    ),
    (
        "vsock",
        "timeouts",
        "vsock_failed_connections",
        reason("timeout"),
    ),
    (
        "vsock",
        "packets_from_guest",
        "vsock_packets",
        dir("from_guest"),
    ),
    (
        "vsock",
        "packets_to_guest",
        "vsock_packets",
        dir("to_guest"),
    ),
    (
        "vsock",
        "bytes_from_guest",
        "vsock_bytes",
        dir("from_guest"),
    ),
    ("vsock", "bytes_to_guest", "vsock_bytes", dir("to_guest")),
    ("vsock", "bad_packets", "vsock_malformed_packets", None),
    ("vsock", "resets", "vsock_resets", None),
    ("vsock", "bytes_kept", "vsock_kept_bytes", None),
    ("vsock", "no_buffer", "vsock_starved", None),
    ("vsock", "no_credit", "vsock_without_credit", None),
    (
        "egress",
        "denied",
        "egress_refused_frames",
        reason("denied"),
    ),
    (
        "egress",
        "malformed",
        "egress_refused_frames",
        reason("malformed"),
    ),
    (
        "egress",
        "fragments",
        "egress_refused_frames",
        reason("fragment"),
    ),
    (
        "egress",
        "unreadable",
        "egress_refused_frames",
        reason("unreadable"),
    ),
    ("egress", "answers", "egress_answers", None),
    ("egress", "peers_forgotten", "egress_forgotten_peers", None),
    ("mmds", "rx_frames", "mmds_frames", dir("receive")),
    ("mmds", "tx_frames", "mmds_frames", dir("transmit")),
    ("mmds", "rx_too_long", "mmds_dropped_frames", None),
    ("mmds", "connections_created", "mmds_connections", None),
    (
        "mmds",
        "connections_evicted",
        "mmds_evicted_connections",
        None,
    ),
    (
        "mmds",
        "requests_served",
        "mmds_requests",
        Some(("outcome", "served")),
    ),
    (
        "mmds",
        "requests_refused",
        "mmds_requests",
        Some(("outcome", "refused")),
    ),
    (
        "mmds",
        "rx_no_token",
        "mmds_unauthorized_requests",
        reason("no_token"),
    ),
    (
        "mmds",
        "rx_invalid_token",
        "mmds_unauthorized_requests",
        reason("invalid_token"),
    ),
    ("mmds", "tokens_created", "mmds_tokens", None),
];

const HELP: &[(&str, &str)] = &[
    ("drive_requests", "Requests of the guest that were done."),
    ("drive_bytes", "Bytes that the guest has read and written."),
    ("drive_errors", "Requests answered with an error."),
    (
        "drive_unsupported_requests",
        "Requests of a kind that the device has not.",
    ),
    (
        "drive_throttled",
        "Times the rate limiter held a request back.",
    ),
    ("drive_batches", "Rounds in which requests were taken."),
    (
        "drive_polled_batches",
        "Rounds that looking brought, without a doorbell.",
    ),
    (
        "drive_gathered_completions",
        "Completions that waited for others to share an interrupt.",
    ),
    ("net_frames", "Frames given to the guest and taken from it."),
    (
        "net_bytes",
        "Bytes of frames given to the guest and taken from it.",
    ),
    (
        "net_receive_dropped_frames",
        "Frames for the guest that were dropped.",
    ),
    (
        "net_transmit_dropped_frames",
        "Frames of the guest that were dropped.",
    ),
    ("net_receive_errors", "Times the link could not be read."),
    (
        "net_receive_starved",
        "Times frames waited because the guest had no buffers.",
    ),
    (
        "net_receive_copied_frames",
        "Frames copied because the guest had too few buffers.",
    ),
    (
        "net_transmit_blocked",
        "Times the link took no frame for now.",
    ),
    ("net_throttled", "Times the rate limiter held a frame back."),
    ("net_batches", "Rounds in which frames moved."),
    (
        "net_polled_batches",
        "Rounds that looking brought, without a doorbell.",
    ),
    (
        "net_vhost_starts",
        "Times the host's kernel took a queue over, to count what it moves itself.",
    ),
    (
        "net_vhost_interrupts",
        "Interrupts of the host's kernel that went by way of the device's thread.",
    ),
    (
        "net_commands",
        "Control commands of the guest that were done.",
    ),
    (
        "net_refused_commands",
        "Control commands of the guest that were refused.",
    ),
    ("serial_bytes", "Bytes of the console."),
    (
        "serial_dropped_bytes",
        "Bytes of the console that nobody took.",
    ),
    (
        "serial_wakeups",
        "Times the console's output woke its writer.",
    ),
    (
        "serial_stalls",
        "Times the console's output waited for its reader.",
    ),
    ("vcpu_exits", "Exits of a virtual CPU to this program."),
    (
        "entropy_requests",
        "Requests for entropy that were answered.",
    ),
    ("entropy_bytes", "Random bytes given to the guest."),
    (
        "entropy_throttled",
        "Times the rate limiter held a request for entropy back.",
    ),
    ("entropy_errors", "Requests for entropy that failed."),
    ("vsock_connections", "Connections that were made."),
    ("vsock_ended_connections", "Connections that have ended."),
    (
        "vsock_failed_connections",
        "Connections that were not made.",
    ),
    ("vsock_packets", "Packets of the socket device."),
    ("vsock_bytes", "Bytes of streams."),
    (
        "vsock_malformed_packets",
        "Packets of the guest that are none.",
    ),
    ("vsock_resets", "Connections that were reset."),
    (
        "vsock_kept_bytes",
        "Bytes that were kept for a program that did not read.",
    ),
    (
        "vsock_starved",
        "Times a packet waited because the guest had no buffer.",
    ),
    (
        "vsock_without_credit",
        "Times a stream waited for the guest's credit.",
    ),
    (
        "egress_refused_frames",
        "Frames of the guest that rules for what it sends keep back.",
    ),
    (
        "egress_answers",
        "Frames that pass those rules because they answer somebody.",
    ),
    (
        "egress_forgotten_peers",
        "Times that half of those who may be answered were forgotten.",
    ),
    ("mmds_frames", "Frames of the metadata service."),
    (
        "mmds_dropped_frames",
        "Frames to the metadata service that were too long.",
    ),
    ("mmds_connections", "Connections to the metadata service."),
    (
        "mmds_evicted_connections",
        "Connections to the metadata service cut to make room.",
    ),
    ("mmds_requests", "Requests to the metadata service."),
    (
        "mmds_unauthorized_requests",
        "Reads of metadata without a token that is good.",
    ),
    ("mmds_tokens", "Tokens that the metadata service gave out."),
];

/// What a counter that is in no table is told of.
const UNKNOWN: &str = "A counter of this component.";

/// The label that names a component of this kind.
pub(crate) fn component_label(kind: &str) -> &'static str {
    match kind {
        "drive" => "drive",
        "net" => "interface",
        "vcpu" => "vcpu",
        _ => "id",
    }
}

/// The family of a counter. None: it is in no table.
pub(crate) fn family(kind: &str, counter: &str) -> Option<Family> {
    let (_, _, name, label) = ROWS
        .iter()
        .find(|(k, c, _, _)| *k == kind && *c == counter)?;
    let help = HELP
        .iter()
        .find(|(family, _)| family == name)
        .map_or(UNKNOWN, |(_, help)| help);
    Some(Family {
        name,
        help,
        label: *label,
    })
}

/// Counters of single addresses, one for each that a guest touches, are for people who look for exits: too many for a
/// time series each.
pub(crate) fn is_left_out(kind: &str, counter: &str) -> bool {
    kind == "vcpu" && (counter.contains("_0x") || counter == "exits_at_other_addresses")
}

/// Whether a counter of a component of this name has a family of its own, or is left out on purpose. For the tests of who counts.
#[must_use]
pub fn is_known(component: &str, counter: &str) -> bool {
    let kind = component.split(' ').next().unwrap_or("");
    is_left_out(kind, counter) || family(kind, counter).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_is_explained_once_and_each_row_is_its_own() {
        for (at, (kind, counter, name, label)) in ROWS.iter().enumerate() {
            assert!(HELP.iter().any(|(family, _)| family == name), "{name}");
            for (k, c, n, l) in &ROWS[..at] {
                assert!((k, c) != (kind, counter), "{kind} {counter} twice");
                assert!((n, l) != (name, label), "{name} {label:?} twice");
                assert!(n != name || k == kind, "{name} is of two kinds");
            }
        }
        for (at, (name, help)) in HELP.iter().enumerate() {
            assert!(ROWS.iter().any(|row| row.2 == *name), "{name}");
            assert!(HELP[..at].iter().all(|(n, _)| n != name), "{name} twice");
            assert!(help.ends_with('.'), "{help}");
        }
    }
}
