//! Does the jobs of one column: ping, iperf3 and sockets on the host against a guest, and what they report.
//!
//! Knows the lines of `resources/guest/bench-net` and what the tools print; does not know how results are shown.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::table::Column;
use super::tap::{GUEST, GUEST_MAC, PREFIX, Tap};
use super::{request, vsock};
use crate::machine::{Device, Machine};
use crate::run::{Run, cpu_seconds};
use crate::vmm::Kind;

/// One way of using a network.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: &'static str,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Ping,
    /// A byte there and a byte back by TCP, without a pause: what netperf calls TCP_RR.
    TcpRequest,
    Tcp {
        streams: u32,
        from_guest: bool,
    },
    Udp {
        from_guest: bool,
    },
    Vsock {
        streams: u32,
        from_guest: bool,
    },
    VsockPing {
        streams: u32,
    },
}

impl What {
    /// Whether the VMM must make a unix socket of vsock.
    fn is_vsock(self) -> bool {
        matches!(self, Self::Vsock { .. } | Self::VsockPing { .. })
    }
}

const fn job(name: &'static str, what: What) -> Job {
    Job { name, what }
}

const fn tcp(name: &'static str, streams: u32, from_guest: bool) -> Job {
    job(
        name,
        What::Tcp {
            streams,
            from_guest,
        },
    )
}

const fn sockets(name: &'static str, streams: u32, from_guest: bool) -> Job {
    job(
        name,
        What::Vsock {
            streams,
            from_guest,
        },
    )
}

pub(super) const JOBS: [Job; 14] = [
    job("ping", What::Ping),
    job("tcp-rr", What::TcpRequest),
    tcp("tcp1-to-guest", 1, false),
    tcp("tcp1-from-guest", 1, true),
    tcp("tcp8-to-guest", 8, false),
    tcp("tcp8-from-guest", 8, true),
    job("udp64-to-guest", What::Udp { from_guest: false }),
    job("udp64-from-guest", What::Udp { from_guest: true }),
    job("vsock1-ping", What::VsockPing { streams: 1 }),
    job("vsock8-ping", What::VsockPing { streams: 8 }),
    sockets("vsock1-to-guest", 1, false),
    sockets("vsock1-from-guest", 1, true),
    sockets("vsock8-to-guest", 8, false),
    sockets("vsock8-from-guest", 8, true),
];

/// What is read off a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    Median,
    Slowest,
    GigaBits,
    Retransmits,
    KiloPackets,
    Cpu,
}

pub(super) type Samples = Vec<((usize, Measure), f64)>;

/// What `--jobs` may name.
pub(super) fn names() -> Vec<&'static str> {
    JOBS.iter().map(|job| job.name).collect()
}

/// The jobs of these names, by number, in their order; all where there is no name.
pub(super) fn chosen(names: &[String]) -> Vec<usize> {
    let all = JOBS.iter().enumerate();
    all.filter(|(_, job)| names.is_empty() || names.iter().any(|name| name == job.name))
        .map(|(at, _)| at)
        .collect()
}

/// What the guest's lines begin with.
const PREFIX_OF_LINES: &str = "net-bench: ";

/// How a run of all jobs is done.
pub(super) struct Plan {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) memory_mib: u64,
    pub(super) cpus: u32,
    pub(super) arguments: String,
    pub(super) seconds: u32,
    /// Which of [`JOBS`] are done.
    pub(super) jobs: Vec<usize>,
    /// What a boot may take.
    pub(super) patience: Duration,
    pub(super) scratch: PathBuf,
}

impl Plan {
    /// All jobs once, in one guest. What was measured before something went wrong goes to `samples`.
    ///
    /// # Errors
    /// What went wrong, in one sentence.
    pub(super) fn run(
        &self,
        tap: &Tap,
        column: &Column,
        samples: &mut Samples,
    ) -> Result<(), String> {
        let said = |e: anyhow::Error| format!("{e:#}");
        let machine = Machine {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            line: format!(
                "{} alveole.do=run:/bench-net bench_address={GUEST}/{PREFIX}",
                self.arguments
            ),
            device: Device::Tap {
                name: tap.name.clone(),
                mac: GUEST_MAC.to_owned(),
                vhost: column.vhost,
                vsock: self.vsock_path(),
            },
        };
        // A VMM that was killed leaves its own.
        let _ = fs::remove_file(self.vsock_path());
        let mut words = machine
            .arguments(&column.vmm, &self.scratch)
            .map_err(said)?;
        words.extend(column.words.iter().map(Into::into));
        let stderr = self.scratch.join("stderr");
        let time = Duration::from_secs(u64::from(self.seconds) + 5) * self.jobs.len() as u32;
        let mut run = Run::start(
            column.vmm.path.as_os_str(),
            &words,
            &stderr,
            self.patience + time * 2,
        )
        .map_err(said)?;
        loop {
            let line = run.line()?;
            match line.split_once(PREFIX_OF_LINES) {
                Some((_, "ready")) => break,
                Some((_, other)) => return Err(run.failure(other)),
                None => {}
            }
        }
        // The first packet waits for the neighbour's address.
        ping(3).map_err(|e| run.failure(&e))?;
        let mut failed = Ok(());
        let has_vsock = column.vmm.kind != Kind::Qemu;
        for &at in &self.jobs {
            if JOBS[at].what.is_vsock() && !has_vsock {
                continue;
            }
            match self.job(at, run.id()) {
                Ok(found) => samples.extend(found),
                Err(e) => failed = failed.and(Err(run.failure(&e))),
            }
        }
        failed
    }

    fn vsock_path(&self) -> PathBuf {
        self.scratch.join("vsock")
    }

    fn job(&self, at: usize, monitor: u32) -> Result<Samples, String> {
        let before = cpu_seconds(monitor)?;
        let mut samples = match JOBS[at].what {
            What::Ping => {
                // A hundred a second.
                return Ok(percentiles(at, &ping(self.seconds * 100)?));
            }
            What::TcpRequest => {
                return Ok(percentiles(at, &request::round_trips(GUEST, self.seconds)?));
            }
            What::VsockPing { streams } => {
                let times = vsock::round_trips(&self.vsock_path(), self.seconds, streams)?;
                return Ok(percentiles(at, &times));
            }
            What::Vsock {
                streams,
                from_guest,
            } => {
                let path = self.vsock_path();
                let rate = vsock::throughput(&path, self.seconds, streams, from_guest)?;
                let busy = cpu_seconds(monitor)? - before;
                let bytes = rate * f64::from(self.seconds);
                vec![
                    ((at, Measure::GigaBits), rate * 8.0 / 1e9),
                    ((at, Measure::Cpu), busy / (bytes / 1e9)),
                ]
            }
            What::Tcp {
                streams,
                from_guest,
            } => {
                let streams = format!("-P {streams}");
                let report = self.iperf(&streams, from_guest)?;
                let bits = number(&report, "/end/sum_received/bits_per_second")?;
                let bytes = number(&report, "/end/sum_received/bytes")?;
                let busy = cpu_seconds(monitor)? - before;
                vec![
                    ((at, Measure::GigaBits), bits / 1e9),
                    (
                        (at, Measure::Retransmits),
                        number(&report, "/end/sum_sent/retransmits")?,
                    ),
                    ((at, Measure::Cpu), busy / (bytes / 1e9)),
                ]
            }
            What::Udp { from_guest } => {
                let report = self.iperf("-u -b 0 -l 64", from_guest)?;
                let packets = number(&report, "/end/sum/packets")?;
                let lost = number(&report, "/end/sum/lost_packets")?;
                let seconds = number(&report, "/end/sum/seconds")?;
                vec![((at, Measure::KiloPackets), (packets - lost) / seconds / 1e3)]
            }
        };
        if samples.iter().any(|(_, value)| !value.is_finite()) {
            samples.clear();
        }
        if samples.is_empty() {
            return Err(format!("{}: nothing came through", JOBS[at].name));
        }
        Ok(samples)
    }

    fn iperf(&self, words: &str, from_guest: bool) -> Result<Value, String> {
        let mut command = Command::new("iperf3");
        command
            .args(["-c", GUEST, "-J", "--connect-timeout", "5000"])
            .args(["-t", &self.seconds.to_string()])
            .args(words.split_whitespace());
        if from_guest {
            command.arg("-R");
        }
        let said = command
            .output()
            .map_err(|e| format!("cannot run iperf3 (package iperf3): {e}"))?;
        let text = String::from_utf8_lossy(&said.stdout);
        let report: Value =
            serde_json::from_str(&text).map_err(|e| format!("iperf3's report: {e}"))?;
        match report.get("error").and_then(Value::as_str) {
            Some(error) => Err(format!("iperf3 {words}: {error}")),
            None => Ok(report),
        }
    }
}

/// Of times in order of length.
fn percentiles(at: usize, times: &[f64]) -> Samples {
    let of = |part: f64| {
        let index = (times.len() as f64 * part) as usize;
        times.get(index.min(times.len().saturating_sub(1))).copied()
    };
    let all = [(Measure::Median, of(0.5)), (Measure::Slowest, of(0.99))];
    let all = all.into_iter();
    all.filter_map(|(measure, time)| Some(((at, measure), time?)))
        .collect()
}

fn number(report: &Value, at: &str) -> Result<f64, String> {
    let found = report.pointer(at).and_then(Value::as_f64);
    found.ok_or_else(|| format!("iperf3's report has no {at}"))
}

/// Round-trip times in microseconds, in order of length.
fn ping(count: u32) -> Result<Vec<f64>, String> {
    let said = Command::new("ping")
        .args([
            "-n",
            "-i",
            "0.01",
            "-W",
            "2",
            "-c",
            &count.to_string(),
            GUEST,
        ])
        .output()
        .map_err(|e| format!("cannot run ping (package iputils-ping): {e}"))?;
    let times = round_trips(&String::from_utf8_lossy(&said.stdout));
    if times.is_empty() {
        return Err("the guest does not answer ping".to_owned());
    }
    Ok(times)
}

fn round_trips(text: &str) -> Vec<f64> {
    let mut times: Vec<f64> = text
        .split("time=")
        .skip(1)
        .filter_map(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
        .map(|milliseconds| milliseconds * 1000.0)
        .collect();
    times.sort_by(f64::total_cmp);
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_of_ping() {
        let text = "64 bytes from 172.31.77.2: icmp_seq=1 ttl=64 time=0.417 ms\n\
                    64 bytes from 172.31.77.2: icmp_seq=2 ttl=64 time=0.300 ms\n";
        assert_eq!(round_trips(text), [300.0, 417.0]);
        assert!(round_trips("100% packet loss").is_empty());
    }

    #[test]
    fn guest_and_host_agree_on_the_lines() {
        let script = include_str!("../../../../resources/guest/bench-net");
        for want in ["echo \"net-bench: $*\"", "say ready", "bench_address="] {
            assert!(script.contains(want), "{want}");
        }
    }
}
