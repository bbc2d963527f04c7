//! Groups and names of Firecracker's metrics file, for those who read it already.
//!
//! A line tells what has changed since the line before; what that program counts and this one has not is 0. Our own counters, which stand in the
//! same line under names of their own, are totals.

use std::collections::BTreeMap;

use alveole_counters::Gathered;
use serde_json::{Map, Value};

/// Kind of component, its group, and what stands there: counters added up, under which name. A group whose name ends in `_` is one
/// for each component.
type Kind = (
    &'static str,
    &'static str,
    &'static [(&'static [&'static str], &'static str)],
);

const KINDS: &[Kind] = &[
    (
        "drive",
        "block_",
        &[
            (&["reads"], "read_count"),
            (&["writes"], "write_count"),
            (&["bytes_read"], "read_bytes"),
            (&["bytes_written"], "write_bytes"),
            (&["flushes"], "flush_count"),
            (&["errors"], "execute_fails"),
            (&["unsupported"], "invalid_reqs_count"),
            (&["throttled"], "rate_limiter_throttled_events"),
            (&["batches"], "queue_event_count"),
        ],
    ),
    (
        "net",
        "net_",
        &[
            (&["rx_frames"], "rx_packets_count"),
            (&["rx_frames"], "rx_count"),
            (&["rx_bytes"], "rx_bytes_count"),
            (&["rx_too_long", "rx_errors"], "rx_fails"),
            (&["rx_errors"], "tap_read_fails"),
            (&["rx_starved"], "no_rx_avail_buffer"),
            (&["rx_throttled"], "rx_rate_limiter_throttled"),
            (&["tx_frames"], "tx_packets_count"),
            (&["tx_frames"], "tx_count"),
            (&["tx_bytes"], "tx_bytes_count"),
            (&["tx_malformed", "tx_errors"], "tx_fails"),
            (&["tx_malformed"], "tx_malformed_frames"),
            (&["tx_errors"], "tap_write_fails"),
            (&["tx_spoofed"], "tx_spoofed_mac_count"),
            (&["tx_throttled"], "tx_rate_limiter_throttled"),
        ],
    ),
    (
        "serial",
        "uart",
        &[
            (&["bytes_out"], "write_count"),
            (&["bytes_in"], "read_count"),
            (&["bytes_dropped"], "missed_write_count"),
            (&["input_dropped"], "missed_read_count"),
        ],
    ),
    (
        "vcpu",
        "vcpu",
        &[
            (&["exits_port_read"], "exit_io_in"),
            (&["exits_port_write"], "exit_io_out"),
            (&["exits_mmio_read"], "exit_mmio_read"),
            (&["exits_mmio_write"], "exit_mmio_write"),
        ],
    ),
    (
        "rng",
        "entropy",
        &[
            (&["requests"], "entropy_event_count"),
            (&["bytes"], "entropy_bytes"),
            (&["errors"], "host_rng_fails"),
            (&["throttled"], "entropy_rate_limiter_throttled"),
        ],
    ),
    (
        "vsock",
        "vsock",
        &[
            (&["packets_to_guest"], "rx_packets_count"),
            (&["packets_from_guest"], "tx_packets_count"),
            (&["bytes_to_guest"], "rx_bytes_count"),
            (&["bytes_from_guest"], "tx_bytes_count"),
            (&["from_guest", "from_host"], "conns_added"),
            (&["ended"], "conns_removed"),
            (&["resets"], "conns_killed"),
        ],
    ),
    (
        "logger",
        "logger",
        &[
            (&["lost"], "missed_log_count"),
            (&["left_out"], "rate_limited_log_count"),
        ],
    ),
    (
        "mmds",
        "mmds",
        &[
            (&["rx_frames"], "rx_count"),
            (&["rx_frames"], "rx_accepted"),
            (&["rx_no_token"], "rx_no_token"),
            (&["rx_invalid_token"], "rx_invalid_token"),
            (&["tx_frames"], "tx_frames"),
            (&["tx_frames"], "tx_count"),
            (&["connections_created"], "connections_created"),
        ],
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

/// Counts by group and name.
type Sums = BTreeMap<String, BTreeMap<&'static str, u64>>;

/// What was told so far.
#[derive(Debug, Default)]
pub struct FirecrackerLines {
    told: Sums,
}

impl FirecrackerLines {
    /// The groups of the next line: what has changed since the last one. A group of a component is beside that which is the
    /// sum of all of its kind (`block_root` and `block`).
    pub fn next(&mut self, counters: &[Gathered]) -> Map<String, Value> {
        let mut sums = Sums::new();
        for (component, counts) in counters {
            let (kind, id) = component.split_once(' ').unwrap_or((component, ""));
            let Some((_, group, fields)) = KINDS.iter().find(|(k, ..)| *k == kind) else {
                continue;
            };
            let groups = match group.strip_suffix('_') {
                Some(kind) => vec![format!("{group}{id}"), kind.to_owned()],
                None => vec![(*group).to_owned()],
            };
            for group in groups {
                let sums = sums.entry(group).or_default();
                for (names, field) in *fields {
                    let sum = sums.entry(field).or_default();
                    for (_, count) in counts.iter().filter(|(n, _)| names.contains(&n.as_str())) {
                        *sum = sum.saturating_add(*count);
                    }
                }
            }
        }
        let mut line = Map::new();
        for (group, fields) in GROUPS {
            let zeroes = fields.iter().map(|field| ((*field).to_owned(), 0.into()));
            line.insert((*group).to_owned(), Value::Object(zeroes.collect()));
        }
        for (group, sums) in &sums {
            let told = self.told.get(group);
            let fields = line.entry(group).or_insert_with(|| Map::new().into());
            if let Value::Object(fields) = fields {
                fields.extend(sums.iter().map(|(field, sum)| {
                    let told = told.and_then(|told| told.get(field)).unwrap_or(&0);
                    ((*field).to_owned(), sum.saturating_sub(*told).into())
                }));
            }
        }
        // One that is not there any more, and comes again, counts from where it was.
        self.told.extend(sums);
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
    fn each_kind_has_a_group_of_its_own_and_each_name_in_it_stands_once() {
        for (at, (kind, group, fields)) in KINDS.iter().enumerate() {
            for (k, g, _) in &KINDS[..at] {
                assert!(k != kind && g != group, "{kind} {group} twice");
            }
            for (at, (_, field)) in fields.iter().enumerate() {
                let again = fields[..at].iter().any(|(_, f)| f == field);
                assert!(!again, "{group} {field} twice");
            }
        }
    }
}
