//! Groups and names of Firecracker's metrics file, for those who read it already.
//!
//! A line tells what has changed since the line before; what that program counts and this one has not is 0. Our own counters, which stand in the
//! same line under names of their own, are totals.

use std::collections::HashMap;

use alveole_counters::Gathered;
use serde_json::{Map, Value};

/// Kind of component, its counters added up, group, name. A group whose name ends in `_` is one for each component.
type Row = (
    &'static str,
    &'static [&'static str],
    &'static str,
    &'static str,
);

const ROWS: &[Row] = &[
    ("drive", &["reads"], "block_", "read_count"),
    ("drive", &["writes"], "block_", "write_count"),
    ("drive", &["bytes_read"], "block_", "read_bytes"),
    ("drive", &["bytes_written"], "block_", "write_bytes"),
    ("drive", &["flushes"], "block_", "flush_count"),
    ("drive", &["errors"], "block_", "execute_fails"),
    ("drive", &["unsupported"], "block_", "invalid_reqs_count"),
    (
        "drive",
        &["throttled"],
        "block_",
        "rate_limiter_throttled_events",
    ),
    ("drive", &["batches"], "block_", "queue_event_count"),
    ("net", &["rx_frames"], "net_", "rx_packets_count"),
    ("net", &["rx_frames"], "net_", "rx_count"),
    ("net", &["rx_bytes"], "net_", "rx_bytes_count"),
    ("net", &["rx_too_long", "rx_errors"], "net_", "rx_fails"),
    ("net", &["rx_errors"], "net_", "tap_read_fails"),
    ("net", &["rx_starved"], "net_", "no_rx_avail_buffer"),
    (
        "net",
        &["rx_throttled"],
        "net_",
        "rx_rate_limiter_throttled",
    ),
    ("net", &["tx_frames"], "net_", "tx_packets_count"),
    ("net", &["tx_frames"], "net_", "tx_count"),
    ("net", &["tx_bytes"], "net_", "tx_bytes_count"),
    ("net", &["tx_malformed", "tx_errors"], "net_", "tx_fails"),
    ("net", &["tx_malformed"], "net_", "tx_malformed_frames"),
    ("net", &["tx_errors"], "net_", "tap_write_fails"),
    ("net", &["tx_spoofed"], "net_", "tx_spoofed_mac_count"),
    (
        "net",
        &["tx_throttled"],
        "net_",
        "tx_rate_limiter_throttled",
    ),
    ("serial", &["bytes_out"], "uart", "write_count"),
    ("serial", &["bytes_in"], "uart", "read_count"),
    ("serial", &["bytes_dropped"], "uart", "missed_write_count"),
    ("serial", &["input_dropped"], "uart", "missed_read_count"),
    ("vcpu", &["exits_port_read"], "vcpu", "exit_io_in"),
    ("vcpu", &["exits_port_write"], "vcpu", "exit_io_out"),
    ("vcpu", &["exits_mmio_read"], "vcpu", "exit_mmio_read"),
    ("vcpu", &["exits_mmio_write"], "vcpu", "exit_mmio_write"),
    ("rng", &["requests"], "entropy", "entropy_event_count"),
    ("rng", &["bytes"], "entropy", "entropy_bytes"),
    ("rng", &["errors"], "entropy", "host_rng_fails"),
    (
        "rng",
        &["throttled"],
        "entropy",
        "entropy_rate_limiter_throttled",
    ),
    ("vsock", &["packets_to_guest"], "vsock", "rx_packets_count"),
    (
        "vsock",
        &["packets_from_guest"],
        "vsock",
        "tx_packets_count",
    ),
    ("vsock", &["bytes_to_guest"], "vsock", "rx_bytes_count"),
    ("vsock", &["bytes_from_guest"], "vsock", "tx_bytes_count"),
    (
        "vsock",
        &["from_guest", "from_host"],
        "vsock",
        "conns_added",
    ),
    ("vsock", &["ended"], "vsock", "conns_removed"),
    ("vsock", &["resets"], "vsock", "conns_killed"),
    ("logger", &["lost"], "logger", "missed_log_count"),
    ("logger", &["left_out"], "logger", "rate_limited_log_count"),
    ("mmds", &["rx_frames"], "mmds", "rx_count"),
    ("mmds", &["rx_frames"], "mmds", "rx_accepted"),
    ("mmds", &["rx_no_token"], "mmds", "rx_no_token"),
    ("mmds", &["rx_invalid_token"], "mmds", "rx_invalid_token"),
    ("mmds", &["tx_frames"], "mmds", "tx_frames"),
    ("mmds", &["tx_frames"], "mmds", "tx_count"),
    (
        "mmds",
        &["connections_created"],
        "mmds",
        "connections_created",
    ),
];

/// Groups that stand in each line also where there is no such component.
const GROUPS: &[(&str, &[&str])] = &[
    (
        "block",
        &[
            "read_count",
            "write_count",
            "read_bytes",
            "write_bytes",
            "flush_count",
            "execute_fails",
        ],
    ),
    (
        "net",
        &[
            "rx_packets_count",
            "rx_bytes_count",
            "tx_packets_count",
            "tx_bytes_count",
            "rx_fails",
            "tx_fails",
        ],
    ),
    (
        "uart",
        &[
            "error_count",
            "flush_count",
            "missed_read_count",
            "missed_write_count",
            "read_count",
            "write_count",
        ],
    ),
    (
        "vcpu",
        &[
            "exit_io_in",
            "exit_io_out",
            "exit_mmio_read",
            "exit_mmio_write",
            "failures",
        ],
    ),
    (
        "entropy",
        &[
            "activate_fails",
            "entropy_event_fails",
            "entropy_event_count",
            "entropy_bytes",
            "host_rng_fails",
        ],
    ),
    (
        "vsock",
        &[
            "activate_fails",
            "rx_bytes_count",
            "tx_bytes_count",
            "conns_added",
            "conns_killed",
            "conns_removed",
        ],
    ),
    (
        "mmds",
        &[
            "rx_count",
            "rx_accepted",
            "rx_no_token",
            "rx_invalid_token",
            "tx_frames",
            "tx_count",
            "connections_created",
        ],
    ),
    (
        "i8042",
        &[
            "error_count",
            "missed_read_count",
            "missed_write_count",
            "read_count",
            "reset_count",
            "write_count",
        ],
    ),
    ("seccomp", &["num_faults"]),
    (
        "logger",
        &[
            "missed_metrics_count",
            "metrics_fails",
            "missed_log_count",
            "rate_limited_log_count",
        ],
    ),
    ("vmm", &["panic_count"]),
    (
        "signals",
        &[
            "sigbus", "sigsegv", "sigxfsz", "sigxcpu", "sigpipe", "sighup", "sigill",
        ],
    ),
];

/// What was told so far.
#[derive(Debug, Default)]
pub struct FirecrackerLines {
    told: HashMap<(String, &'static str), u64>,
}

impl FirecrackerLines {
    /// The groups of the next line: what has changed since the last one. A group of a component is beside that which is the
    /// sum of all of its kind (`block_root` and `block`).
    pub fn next(&mut self, counters: &[Gathered]) -> Map<String, Value> {
        let mut sums: HashMap<(String, &'static str), u64> = HashMap::new();
        for (component, counts) in counters {
            let (kind, id) = component.split_once(' ').unwrap_or((component, ""));
            for (_, names, group, field) in ROWS.iter().filter(|(k, ..)| *k == kind) {
                let count = names.iter().fold(0u64, |sum, name| {
                    let found = counts.iter().find(|(n, _)| n == name);
                    sum.saturating_add(found.map_or(0, |(_, count)| *count))
                });
                let mut add = |group: String| {
                    let sum = sums.entry((group, field)).or_default();
                    *sum = sum.saturating_add(count);
                };
                if let Some(kind) = group.strip_suffix('_') {
                    add(format!("{group}{id}"));
                    add(kind.to_owned());
                } else {
                    add((*group).to_owned());
                }
            }
        }
        let mut line = Map::new();
        for (group, fields) in GROUPS {
            let zeroes = fields.iter().map(|field| ((*field).to_owned(), 0.into()));
            line.insert((*group).to_owned(), Value::Object(zeroes.collect()));
        }
        for ((group, field), sum) in sums {
            let told = self.told.insert((group.clone(), field), sum).unwrap_or(0);
            let fields = line.entry(group).or_insert_with(|| Map::new().into());
            if let Value::Object(fields) = fields {
                fields.insert(field.to_owned(), sum.saturating_sub(told).into());
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, counts: &[(&str, u64)]) -> Gathered {
        let counts = counts.iter().map(|(n, c)| ((*n).to_owned(), *c));
        (name.to_owned(), counts.collect())
    }

    #[test]
    fn a_line_tells_what_has_changed() {
        let mut lines = FirecrackerLines::default();
        let first = lines.next(&[
            set("drive root", &[("reads", 3), ("bytes_read", 4096)]),
            set("drive data", &[("reads", 4)]),
            set("vcpu 0", &[("exits_port_write", 5)]),
            set("vcpu 1", &[("exits_port_write", 6)]),
            set("net eth0", &[("rx_too_long", 1), ("rx_errors", 2)]),
        ]);
        assert_eq!(first["block_root"]["read_count"], 3);
        assert_eq!(first["block_data"]["read_count"], 4);
        assert_eq!(first["block"]["read_count"], 7);
        assert_eq!(first["block"]["read_bytes"], 4096);
        assert_eq!(first["vcpu"]["exit_io_out"], 11);
        assert_eq!(first["net_eth0"]["rx_fails"], 3);
        assert_eq!(first["vsock"]["conns_added"], 0);
        let second = lines.next(&[
            set("drive root", &[("reads", 13)]),
            set("drive data", &[("reads", 4)]),
        ]);
        assert_eq!(second["block_root"]["read_count"], 10);
        assert_eq!(second["block_data"]["read_count"], 0);
        assert_eq!(second["block"]["read_count"], 10);
    }

    #[test]
    fn each_name_of_a_group_stands_once() {
        for (at, (kind, _, group, field)) in ROWS.iter().enumerate() {
            for (k, _, g, f) in &ROWS[..at] {
                assert!((g, f) != (group, field), "{group} {field} twice");
                assert!(g != group || k == kind, "{group} is of two kinds");
            }
        }
    }
}
