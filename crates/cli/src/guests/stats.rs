//! `alveole stats`: what VMs use, as this host and as they themselves see it.

use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::Guest;
use alveole_agent_protocol::Metrics;
use alveole_instance::{State, Vm, Vms};
use anyhow::Context;
use serde_json::json;

use super::{Format, table};
use crate::size::human;
use crate::{hint, print};

/// Between two samples, of which one line is made.
const INTERVAL: Duration = Duration::from_secs(1);
/// An agent that does not answer so soon has no figures this time; the host's own are shown.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);
/// The unit of `/proc/PID/stat` (USER_HZ), the same on all Linux of this processor.
const TICKS_PER_S: f64 = 100.0;
/// Clears a terminal and goes to its beginning (ECMA-48, ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// What one VM has used so far.
struct Sample {
    at: Instant,
    /// Processor time of its vCPUs in the guest, and of all else of its monitor, in seconds.
    guest_s: f64,
    monitor_s: f64,
    /// The monitor's share of memory: what is shared with others counts in parts.
    pss_bytes: Option<u64>,
    /// What the guest says of itself. None: its agent does not answer.
    inside: Option<Metrics>,
}

/// A line: what was used between two samples.
struct Line {
    name: String,
    cpu_guest_percent: f64,
    cpu_monitor_percent: f64,
    pss_bytes: Option<u64>,
    /// Used and all, as the guest sees it.
    memory_bytes: Option<(u64, u64)>,
    /// Read and written, in bytes a second.
    disk: Option<(f64, f64)>,
    /// Received and sent, in bytes a second.
    network: Option<(f64, f64)>,
    processes: Option<u32>,
}

pub(crate) fn stats(
    vms: &Vms,
    names: &[String],
    once: bool,
    format: Format,
) -> anyhow::Result<ExitCode> {
    let mut before = Vec::new();
    loop {
        let now = samples(vms, names)?;
        if !before.is_empty() || now.is_empty() {
            let lines: Vec<Line> = now
                .iter()
                .filter_map(|(vm, sample)| {
                    let (_, first) = before
                        .iter()
                        .find(|(other, _): &&(Vm, Sample)| other.record.id == vm.record.id)?;
                    Some(line(vm, first, sample))
                })
                .collect();
            let text = match format {
                Format::Json => as_json(&lines)?,
                Format::Text => as_text(&lines),
            };
            let begin = if once || format == Format::Json {
                ""
            } else {
                CLEAR
            };
            print(&format!("{begin}{text}"))?;
            if once {
                return Ok(ExitCode::SUCCESS);
            }
        }
        before = now;
        thread::sleep(INTERVAL);
    }
}

/// All that run, or those that were named.
fn samples(vms: &Vms, names: &[String]) -> anyhow::Result<Vec<(Vm, Sample)>> {
    let wanted = if names.is_empty() {
        vms.list()?
    } else {
        names
            .iter()
            .map(|name| vms.find(name))
            .collect::<Result<_, _>>()?
    };
    let running = wanted.into_iter().filter_map(|vm| match vm.state() {
        Ok(State::Kept(phase)) => Some((vm, phase.monitor_pid?)),
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
            .map(|(vm, pid)| scope.spawn(move || sample(&vm, pid).map(|sample| (vm, sample))))
            .collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().ok().flatten())
            .collect()
    }))
}

fn sample(vm: &Vm, pid: u32) -> Option<Sample> {
    let inside = Guest::new(&vm.socket("vsock"), AGENT_PATIENCE)
        .metrics()
        .ok();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (guest_s, monitor_s) = processor_time(&stat)?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    Some(Sample {
        at: Instant::now(),
        guest_s,
        monitor_s,
        pss_bytes: kib(&rollup, "Pss:").map(|kib| kib.saturating_mul(1024)),
        inside,
    })
}

/// Processor time in the guest and outside of it, in seconds, of a process's `stat` (proc_pid_stat(5)).
fn processor_time(stat: &str) -> Option<(f64, f64)> {
    let fields: Vec<_> = stat.rsplit(')').next()?.split_whitespace().collect();
    // Fields are numbered from 1, and two stand before the state.
    let ticks = |field: usize| -> Option<f64> { fields.get(field - 3)?.parse().ok() };
    let (user, system, guest) = (ticks(14)?, ticks(15)?, ticks(43)?);
    Some((
        guest / TICKS_PER_S,
        (user + system - guest).max(0.0) / TICKS_PER_S,
    ))
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn line(vm: &Vm, before: &Sample, now: &Sample) -> Line {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    // A monitor that was started anew counts from nothing.
    let rate = |before: f64, now: f64| (now - before).max(0.0) / seconds;
    let both = before.inside.as_ref().zip(now.inside.as_ref());
    let between = |of: fn(&Metrics) -> (u64, u64)| {
        both.map(|(before, now)| {
            let (before, now) = (of(before), of(now));
            let rate = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
            (rate(before.0, now.0), rate(before.1, now.1))
        })
    };
    Line {
        name: vm.name.clone(),
        cpu_guest_percent: 100.0 * rate(before.guest_s, now.guest_s),
        cpu_monitor_percent: 100.0 * rate(before.monitor_s, now.monitor_s),
        pss_bytes: now.pss_bytes,
        memory_bytes: now.inside.as_ref().map(|inside| {
            let memory = &inside.memory;
            let used = memory.total_bytes.saturating_sub(memory.available_bytes);
            (used, memory.total_bytes)
        }),
        disk: between(|metrics| {
            let sum = |of: fn(&alveole_agent_protocol::DeviceMetrics) -> u64| {
                metrics.disks.iter().map(of).fold(0, u64::saturating_add)
            };
            (sum(|d| d.read_bytes), sum(|d| d.written_bytes))
        }),
        network: between(|metrics| {
            let sum = |of: fn(&alveole_agent_protocol::NetworkMetrics) -> u64| {
                metrics.networks.iter().map(of).fold(0, u64::saturating_add)
            };
            (sum(|n| n.received_bytes), sum(|n| n.sent_bytes))
        }),
        processes: now.inside.as_ref().map(|inside| inside.processes.all),
    }
}

fn as_text(lines: &[Line]) -> String {
    const UNKNOWN: &str = "-";
    let bytes = |bytes: Option<u64>| bytes.map_or(UNKNOWN.into(), human);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates in bytes"
    )]
    let pair = |pair: Option<(f64, f64)>| {
        pair.map_or(UNKNOWN.into(), |(a, b)| {
            format!("{} / {}", human(a as u64), human(b as u64))
        })
    };
    let rows = lines.iter().map(|line| {
        vec![
            line.name.clone(),
            format!("{:.1}", line.cpu_guest_percent),
            format!("{:.1}", line.cpu_monitor_percent),
            bytes(line.pss_bytes),
            line.memory_bytes.map_or(UNKNOWN.into(), |(used, all)| {
                format!("{} / {}", human(used), human(all))
            }),
            pair(line.disk),
            pair(line.network),
            line.processes.map_or(UNKNOWN.into(), |n| n.to_string()),
        ]
    });
    table(
        &[
            "NAME",
            "GUEST CPU %",
            "MONITOR CPU %",
            "PSS",
            "GUEST MEMORY",
            "DISK R / W, /s",
            "NET IN / OUT, /s",
            "TASKS",
        ],
        rows.collect(),
    )
}

fn as_json(lines: &[Line]) -> anyhow::Result<String> {
    let lines: Vec<_> = lines
        .iter()
        .map(|line| {
            json!({
                "name": line.name,
                "cpu_guest_percent": line.cpu_guest_percent,
                "cpu_monitor_percent": line.cpu_monitor_percent,
                "pss_bytes": line.pss_bytes,
                "guest_memory_used_bytes": line.memory_bytes.map(|m| m.0),
                "guest_memory_bytes": line.memory_bytes.map(|m| m.1),
                "disk_read_bytes_per_s": line.disk.map(|d| d.0),
                "disk_written_bytes_per_s": line.disk.map(|d| d.1),
                "network_received_bytes_per_s": line.network.map(|n| n.0),
                "network_sent_bytes_per_s": line.network.map(|n| n.1),
                "tasks": line.processes,
            })
        })
        .collect();
    // A line each time: whoever follows reads one after the other.
    let json = serde_json::to_string(&lines).context("cannot write JSON")?;
    Ok(format!("{json}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_the_guest_is_told_apart() {
        let mut fields = vec!["0"; 50];
        // State is field 3.
        fields[14 - 3] = "700";
        fields[15 - 3] = "100";
        fields[43 - 3] = "600";
        let stat = format!("12 (a ) b) {}", fields.join(" "));
        assert_eq!(processor_time(&stat), Some((6.0, 2.0)));
        assert_eq!(processor_time("12 (a) S 1"), None);
        assert_eq!(
            kib("Rss: 9 kB\nPss:   1234 kB\nPss_Dirty: 1 kB\n", "Pss:"),
            Some(1234)
        );
    }
}
