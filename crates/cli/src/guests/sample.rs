//! What VMs use: asked of this host's kernel, of the monitor and of the guest's agent. Each of these is there or not for itself.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::Guest;
use alveole_agent_protocol::{DeviceMetrics, Metrics, NetworkMetrics};
use alveole_instance::{MonitorApi, Phase, State, Vm, Vms};
use serde_json::{Value, json};

use crate::hint;

/// An agent that does not answer so soon has no figures this time; the host's own are shown.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);
/// A monitor answers at once, unless it is stopped.
const MONITOR_PATIENCE: Duration = Duration::from_secs(1);
/// The unit of `/proc/PID/stat` (USER_HZ), the same on all Linux of this processor.
const TICKS_PER_S: f64 = 100.0;
/// What stands for a figure that nobody has.
pub(super) const UNKNOWN: &str = "-";

/// What this host's kernel says of a VM's monitor.
#[derive(Clone, Debug)]
pub(super) struct OfHost {
    pub(super) at: Instant,
    /// Processor time of its vCPUs in the guest, and of all else of its monitor, in seconds.
    guest_s: f64,
    monitor_s: f64,
    /// The monitor's share of memory: what is shared with others counts in parts.
    pss_bytes: Option<u64>,
}

/// What the monitor counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Returns of vCPUs to the monitor.
    exits: u64,
    /// Bytes read and written.
    disk: (u64, u64),
    /// Bytes received and sent, but for queues that the host's kernel serves.
    network: (u64, u64),
}

/// What the monitor says.
#[derive(Clone, Debug)]
pub(super) struct OfMonitor {
    pub(super) at: Instant,
    counts: Counts,
}

/// What the guest says of itself.
#[derive(Clone, Debug)]
pub(super) struct OfGuest {
    pub(super) at: Instant,
    metrics: Metrics,
}

/// What one VM has used so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub(super) host: Option<OfHost>,
    pub(super) monitor: Option<OfMonitor>,
    pub(super) guest: Option<OfGuest>,
}

/// What was used between two samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Usage {
    pub(super) cpu_guest_percent: f64,
    pub(super) cpu_monitor_percent: f64,
    pub(super) pss_bytes: Option<u64>,
    /// Used and all, as the guest sees it.
    pub(super) memory_bytes: Option<(u64, u64)>,
    /// Read and written, in bytes a second.
    pub(super) disk: Option<(f64, f64)>,
    /// Received and sent, in bytes a second.
    pub(super) network: Option<(f64, f64)>,
    pub(super) exits_per_s: Option<f64>,
    pub(super) tasks: Option<u32>,
}

impl OfHost {
    /// That of a VM that is kept so. None: its monitor is gone, or not there yet.
    pub(super) fn ask(phase: &Phase) -> Option<Self> {
        let pid = phase.monitor_pid?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The keeper lives, so that its number is its own; a process of the monitor's number that is not its child is another one.
        if field(&stat, 4)? != f64::from(phase.keeper_pid) {
            return None;
        }
        let (guest_s, monitor_s) = processor_time(&stat)?;
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        Some(Self {
            at: Instant::now(),
            guest_s,
            monitor_s,
            pss_bytes: kib(&rollup, "Pss:").map(|kib| kib.saturating_mul(1024)),
        })
    }
}

impl OfMonitor {
    pub(super) fn ask(vm: &Vm) -> Option<Self> {
        let text = MonitorApi::new(vm, MONITOR_PATIENCE).get("/metrics").ok()?;
        Some(Self {
            at: Instant::now(),
            counts: counts(&text),
        })
    }
}

impl OfGuest {
    pub(super) fn ask(vm: &Vm) -> Option<Self> {
        let guest = Guest::new(&vm.socket("vsock"), AGENT_PATIENCE);
        Some(Self {
            metrics: guest.metrics().ok()?,
            at: Instant::now(),
        })
    }
}

/// All that run, or those that were named.
pub(super) fn samples(vms: &Vms, names: &[String]) -> anyhow::Result<Vec<(Vm, Sample)>> {
    let wanted = if names.is_empty() {
        vms.list()?
    } else {
        names
            .iter()
            .map(|name| vms.find(name))
            .collect::<Result<_, _>>()?
    };
    let running = wanted.into_iter().filter_map(|vm| match vm.state() {
        Ok(State::Kept(phase)) => Some((vm, phase)),
        Ok(_) if !names.is_empty() => {
            hint(&format!("the VM '{}' does not run", vm.name));
            None
        }
        _ => None,
    });
    let running: Vec<_> = running.collect();
    // At once: one that does not answer holds up no other.
    Ok(thread::scope(|scope| {
        let threads: Vec<_> = running
            .into_iter()
            .map(|(vm, phase)| {
                scope.spawn(move || {
                    let host = Some(OfHost::ask(&phase)?);
                    let sample = Sample {
                        host,
                        monitor: OfMonitor::ask(&vm),
                        guest: OfGuest::ask(&vm),
                    };
                    Some((vm, sample))
                })
            })
            .collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().ok().flatten())
            .collect()
    }))
}

/// What those used that are in both.
pub(super) fn used_between(before: &[(Vm, Sample)], now: &[(Vm, Sample)]) -> Vec<(Vm, Usage)> {
    now.iter()
        .filter_map(|(vm, sample)| {
            let (_, first) = before
                .iter()
                .find(|(other, _)| other.record.id == vm.record.id)?;
            Some((vm.clone(), Usage::between(first, sample)))
        })
        .collect()
}

/// A field of a process's `stat`, by its number (proc_pid_stat(5)).
fn field(stat: &str, number: usize) -> Option<f64> {
    // Fields are numbered from 1, and two stand before the state.
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    fields.nth(number.checked_sub(3)?)?.parse().ok()
}

/// Processor time in the guest and outside of it, in seconds.
fn processor_time(stat: &str) -> Option<(f64, f64)> {
    let (user, system, guest) = (field(stat, 14)?, field(stat, 15)?, field(stat, 43)?);
    Some((
        guest / TICKS_PER_S,
        (user + system - guest).max(0.0) / TICKS_PER_S,
    ))
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Sums of what the monitor tells Prometheus, over all vCPUs and devices.
fn counts(text: &str) -> Counts {
    let mut counts = Counts::default();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let has = |label: &str| labels.contains(label);
        let sum = match name {
            "alveole_vcpu_exits_total" => &mut counts.exits,
            "alveole_drive_bytes_total" if has("operation=\"read\"") => &mut counts.disk.0,
            "alveole_drive_bytes_total" if has("operation=\"write\"") => &mut counts.disk.1,
            "alveole_net_bytes_total" if has("direction=\"receive\"") => &mut counts.network.0,
            "alveole_net_bytes_total" if has("direction=\"transmit\"") => &mut counts.network.1,
            _ => continue,
        };
        *sum = sum.saturating_add(value.parse().unwrap_or_default());
    }
    counts
}

/// What was counted in a second. Who was started anew counts from nothing.
fn rate(before: u64, now: u64, seconds: f64) -> f64 {
    now.saturating_sub(before) as f64 / seconds
}

fn rates(before: (u64, u64), now: (u64, u64), seconds: f64) -> (f64, f64) {
    (
        rate(before.0, now.0, seconds),
        rate(before.1, now.1, seconds),
    )
}

fn seconds(before: Instant, now: Instant) -> f64 {
    now.saturating_duration_since(before)
        .as_secs_f64()
        .max(0.001)
}

/// Bytes that the guest's disks and interfaces carried, as it says.
fn carried(metrics: &Metrics) -> [(u64, u64); 2] {
    let disk =
        |of: fn(&DeviceMetrics) -> u64| metrics.disks.iter().map(of).fold(0, u64::saturating_add);
    let network = |of: fn(&NetworkMetrics) -> u64| {
        metrics.networks.iter().map(of).fold(0, u64::saturating_add)
    };
    [
        (disk(|d| d.read_bytes), disk(|d| d.written_bytes)),
        (network(|n| n.received_bytes), network(|n| n.sent_bytes)),
    ]
}

impl Usage {
    pub(super) fn between(before: &Sample, now: &Sample) -> Self {
        let mut usage = Self::default();
        if let Some(host) = &now.host {
            usage.pss_bytes = host.pss_bytes;
            if let Some(before) = &before.host {
                let percent =
                    |before: f64, now: f64, seconds: f64| 100.0 * (now - before).max(0.0) / seconds;
                let seconds = seconds(before.at, host.at);
                usage.cpu_guest_percent = percent(before.guest_s, host.guest_s, seconds);
                usage.cpu_monitor_percent = percent(before.monitor_s, host.monitor_s, seconds);
            }
        }
        if let Some((before, now)) = before.monitor.as_ref().zip(now.monitor.as_ref()) {
            let seconds = seconds(before.at, now.at);
            let (before, now) = (&before.counts, &now.counts);
            usage.exits_per_s = Some(rate(before.exits, now.exits, seconds));
            usage.disk = Some(rates(before.disk, now.disk, seconds));
            usage.network = Some(rates(before.network, now.network, seconds));
        }
        if let Some(guest) = &now.guest {
            let memory = &guest.metrics.memory;
            let used = memory.total_bytes.saturating_sub(memory.available_bytes);
            usage.memory_bytes = Some((used, memory.total_bytes));
            usage.tasks = Some(guest.metrics.processes.all);
        }
        // The guest counts what vhost carries, too: its word is taken where there is one.
        if let Some((before, now)) = before.guest.as_ref().zip(now.guest.as_ref()) {
            let seconds = seconds(before.at, now.at);
            let [disk, network] = carried(&before.metrics);
            let [disk_now, network_now] = carried(&now.metrics);
            usage.disk = Some(rates(disk, disk_now, seconds));
            usage.network = Some(rates(network, network_now, seconds));
        }
        usage
    }

    /// Keys are only ever added.
    pub(super) fn as_json(&self) -> Value {
        json!({
            "cpu_guest_percent": self.cpu_guest_percent,
            "cpu_monitor_percent": self.cpu_monitor_percent,
            "pss_bytes": self.pss_bytes,
            "guest_memory_used_bytes": self.memory_bytes.map(|m| m.0),
            "guest_memory_bytes": self.memory_bytes.map(|m| m.1),
            "disk_read_bytes_per_s": self.disk.map(|d| d.0),
            "disk_written_bytes_per_s": self.disk.map(|d| d.1),
            "network_received_bytes_per_s": self.network.map(|n| n.0),
            "network_sent_bytes_per_s": self.network.map(|n| n.1),
            "exits_per_s": self.exits_per_s,
            "tasks": self.tasks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_the_guest_is_told_apart() {
        let mut fields = vec!["0"; 50];
        // State is field 3.
        fields[4 - 3] = "77";
        fields[14 - 3] = "700";
        fields[15 - 3] = "100";
        fields[43 - 3] = "600";
        let stat = format!("12 (a ) b) {}", fields.join(" "));
        assert_eq!(processor_time(&stat), Some((6.0, 2.0)));
        assert_eq!(field(&stat, 4), Some(77.0));
        assert_eq!(processor_time("12 (a) S 1"), None);
        assert_eq!(
            kib("Rss: 9 kB\nPss:   1234 kB\nPss_Dirty: 1 kB\n", "Pss:"),
            Some(1234)
        );
    }

    #[test]
    fn the_monitors_counters_are_summed_over_its_devices() {
        let text = "# HELP alveole_vcpu_exits_total x\n\
            alveole_vcpu_exits_total{vcpu=\"0\",reason=\"mmio_read\"} 3\n\
            alveole_vcpu_exits_total{vcpu=\"1\",reason=\"interrupted\"} 4\n\
            alveole_drive_bytes_total{drive=\"root\",operation=\"read\"} 10\n\
            alveole_drive_bytes_total{drive=\"changes\",operation=\"read\"} 5\n\
            alveole_drive_bytes_total{drive=\"changes\",operation=\"write\"} 7\n\
            alveole_net_bytes_total{interface=\"net0\",direction=\"receive\"} 11\n\
            alveole_net_bytes_total{interface=\"net0\",direction=\"transmit\"} 12\n\
            nonsense\nalveole_net_bytes_total{direction=\"receive\"} many\n";
        let expected = Counts {
            exits: 7,
            disk: (15, 7),
            network: (11, 12),
        };
        assert_eq!(counts(text), expected);
    }

    #[test]
    fn who_does_not_answer_has_no_figures_and_spoils_no_others() {
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let host = |s, guest_s, monitor_s| OfHost {
            at: at(s),
            guest_s,
            monitor_s,
            pss_bytes: Some(5),
        };
        let monitor = |s, exits| OfMonitor {
            at: at(s),
            counts: Counts {
                exits,
                disk: (exits, 0),
                network: (0, exits),
            },
        };
        let before = Sample {
            host: Some(host(0, 1.0, 1.0)),
            monitor: Some(monitor(0, 10)),
            guest: None,
        };
        let now = Sample {
            host: Some(host(2, 2.0, 1.5)),
            monitor: Some(monitor(4, 50)),
            guest: None,
        };
        let expected = Usage {
            cpu_guest_percent: 50.0,
            cpu_monitor_percent: 25.0,
            pss_bytes: Some(5),
            memory_bytes: None,
            disk: Some((10.0, 0.0)),
            network: Some((0.0, 10.0)),
            exits_per_s: Some(10.0),
            tasks: None,
        };
        assert_eq!(Usage::between(&before, &now), expected);
        let silent = Sample {
            monitor: None,
            ..now.clone()
        };
        let usage = Usage::between(&before, &silent);
        assert_eq!((usage.exits_per_s, usage.disk), (None, None));
        // Started anew meanwhile.
        let usage = Usage::between(&now, &before);
        assert_eq!(usage.exits_per_s, Some(0.0));
        assert!(
            usage.cpu_guest_percent == 0.0
                && Usage::default() == Usage::between(&now, &Sample::default())
        );
    }
}
