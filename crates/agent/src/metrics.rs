//! How the guest does, as its kernel's `/proc` says (proc(5)). What a kernel does not have stays zero.

use std::fs;

use alveole_agent_protocol::{
    DeviceMetrics, FileSystemMetrics, MemoryMetrics, Metrics, NetworkMetrics, Pressure,
    ProcessMetrics,
};

/// The unit of `/proc/diskstats`, whatever the disk's own is.
const SECTOR_BYTES: u64 = 512;
/// The unit of `/proc/stat` (USER_HZ), the same on all Linux of this processor.
const TICKS_PER_S: f64 = 100.0;

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Looks at everything.
pub(crate) fn gather() -> Metrics {
    let stat = read("/proc/stat");
    let load = read("/proc/loadavg");
    let mut metrics = Metrics {
        uptime_s: numbers(&read("/proc/uptime")).next().unwrap_or_default(),
        cpus: count(
            stat.lines()
                .filter(|l| l.starts_with("cpu"))
                .count()
                .saturating_sub(1),
        ),
        memory: memory(&read("/proc/meminfo")),
        disks: disks(&read("/proc/diskstats")),
        networks: networks(&read("/proc/net/dev")),
        file_systems: file_systems(&read("/proc/self/mounts")),
        processes: processes(&stat, &load),
        ..Metrics::default()
    };
    for (into, value) in metrics.load.iter_mut().zip(numbers(&load)) {
        *into = value;
    }
    let all = stat.lines().next().unwrap_or_default();
    let ticks = all.split_whitespace().skip(1);
    for (into, text) in metrics.cpu_s.iter_mut().zip(ticks) {
        *into = text.parse::<f64>().unwrap_or_default() / TICKS_PER_S;
    }
    for what in ["cpu", "memory", "io"] {
        let text = read(&format!("/proc/pressure/{what}"));
        if !text.is_empty() {
            metrics.pressure.insert(what.into(), pressure(&text));
        }
    }
    metrics
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn numbers(text: &str) -> impl Iterator<Item = f64> {
    text.split_whitespace().map_while(|word| word.parse().ok())
}

fn memory(meminfo: &str) -> MemoryMetrics {
    let bytes = |name: &str| {
        let line = meminfo
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
        let kib: u64 = line
            .and_then(|l| l.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        kib.saturating_mul(1024)
    };
    MemoryMetrics {
        total_bytes: bytes("MemTotal"),
        free_bytes: bytes("MemFree"),
        available_bytes: bytes("MemAvailable"),
        cached_bytes: bytes("Cached"),
    }
}

fn pressure(text: &str) -> Pressure {
    let value = |line: &str, key: &str| -> f64 {
        let line = text
            .lines()
            .find(|l| l.starts_with(line))
            .unwrap_or_default();
        let word = line
            .split(' ')
            .find_map(|w| w.strip_prefix(key)?.strip_prefix('='));
        word.and_then(|w| w.parse().ok()).unwrap_or_default()
    };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count of microseconds"
    )]
    let total = |line: &str| value(line, "total") as u64;
    Pressure {
        some_avg10: value("some", "avg10"),
        some_us: total("some"),
        full_avg10: value("full", "avg10"),
        full_us: total("full"),
    }
}

fn disks(diskstats: &str) -> Vec<DeviceMetrics> {
    let disk = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |at: usize| -> Option<u64> { words.get(at)?.parse().ok() };
        let name = (*words.get(2)?).to_owned();
        // Partitions are not disks, and loops and RAM disks have been counted where they lie.
        let whole = fs::exists(format!("/sys/block/{name}/device")).unwrap_or(false);
        whole.then_some(DeviceMetrics {
            reads: number(3)?,
            read_bytes: number(5)?.saturating_mul(SECTOR_BYTES),
            writes: number(7)?,
            written_bytes: number(9)?.saturating_mul(SECTOR_BYTES),
            name,
        })
    };
    diskstats.lines().filter_map(disk).collect()
}

fn networks(dev: &str) -> Vec<NetworkMetrics> {
    let device = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map_while(|w| w.parse().ok())
            .collect();
        let name = name.trim().to_owned();
        (name != "lo").then_some(NetworkMetrics {
            name,
            received_bytes: *numbers.first()?,
            received_frames: *numbers.get(1)?,
            sent_bytes: *numbers.get(8)?,
            sent_frames: *numbers.get(9)?,
        })
    };
    dev.lines().filter_map(device).collect()
}

fn file_systems(mounts: &str) -> Vec<FileSystemMetrics> {
    let system = |line: &str| {
        let mut words = line.split(' ');
        let (source, target, kind) = (words.next()?, words.next()?, words.next()?);
        if !source.starts_with("/dev/") && kind != "overlay" {
            return None;
        }
        let target = target.replace("\\040", " ");
        let facts = rustix::fs::statvfs(&target).ok()?;
        Some(FileSystemMetrics {
            target,
            kind: kind.to_owned(),
            total_bytes: facts.f_blocks.saturating_mul(facts.f_frsize),
            available_bytes: facts.f_bavail.saturating_mul(facts.f_frsize),
        })
    };
    mounts.lines().filter_map(system).collect()
}

fn processes(stat: &str, load: &str) -> ProcessMetrics {
    let value = |name: &str| -> u64 {
        let line = stat
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|l| l.trim().parse().ok()).unwrap_or_default()
    };
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let all = load
        .split_whitespace()
        .nth(3)
        .and_then(|w| w.split('/').nth(1)?.parse().ok());
    ProcessMetrics {
        all: all.unwrap_or_default(),
        running: small(value("procs_running")),
        blocked: small(value("procs_blocked")),
        started: value("processes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a_kernel() {
        let memory = memory(
            "MemTotal:  2000 kB\nMemFree: 1000 kB\nMemAvailable: 1500 kB\nBuffers: 1 kB\nCached: 300 kB\nSwapCached: 9 kB\n",
        );
        assert_eq!(memory.total_bytes, 2_048_000);
        assert_eq!(memory.cached_bytes, 307_200);
        let pressure = pressure(
            "some avg10=1.50 avg60=0.00 avg300=0.00 total=12345\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=99\n",
        );
        assert_eq!((pressure.some_us, pressure.full_us), (12345, 99));
        assert!((pressure.some_avg10 - 1.5).abs() < 1e-9);
        let networks = networks(
            "Inter-|   Receive\n face |bytes    packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 0 0 0 0 0 0 30 4 0 0 0 0 0 0\n",
        );
        assert_eq!(networks.len(), 1);
        assert_eq!(
            (networks[0].received_bytes, networks[0].sent_frames),
            (10, 4)
        );
        let processes = processes(
            "processes 77\nprocs_running 2\nprocs_blocked 1\n",
            "0.1 0.2 0.3 2/154 900",
        );
        assert_eq!(
            (
                processes.all,
                processes.running,
                processes.blocked,
                processes.started
            ),
            (154, 2, 1, 77)
        );
    }

    #[test]
    fn this_machine_has_something_of_each() {
        let metrics = gather();
        assert!(metrics.uptime_s > 0.0 && metrics.cpus > 0 && metrics.memory.total_bytes > 0);
        assert!(metrics.cpu_s.iter().sum::<f64>() > 0.0);
        assert!(metrics.processes.all > 0);
    }
}
