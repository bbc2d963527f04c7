//! The columns of the table, and how they are shown: one table for each measure, the aims, failures; and as JSON.
//!
//! Does not know how anything was measured.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::jobs::{JOBS, Measure};
use crate::attempts::Attempts;
use crate::stats::{Summary, cell, figure, summarize};
use crate::vmm::{Kind, Vmm};

/// After so many failures in a row a column is left alone.
const MOST_FAILURES_IN_A_ROW: u32 = 2;

impl Measure {
    const ALL: [Self; 6] = [
        Self::Median,
        Self::Slowest,
        Self::GigaBits,
        Self::Retransmits,
        Self::KiloPackets,
        Self::Cpu,
    ];

    /// The name in JSON, and the title.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Median => ("p50_us", "Round trip, p50, µs"),
            Self::Slowest => ("p99_us", "Round trip, p99, µs"),
            Self::GigaBits => ("gbit_s", "TCP and vsock, Gbit/s"),
            Self::Retransmits => ("retransmits", "TCP segments sent again"),
            Self::KiloPackets => ("kpps", "UDP of 64 bytes, thousand packets/s received"),
            Self::Cpu => (
                "cpu_s_per_gb",
                "CPU seconds of the process for a GB (TCP, vsock)",
            ),
        }
    }

    fn is_cost(self) -> bool {
        !matches!(self, Self::GigaBits | Self::KiloPackets)
    }
}

/// One VMM in one way.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) vmm: Vmm,
    pub(super) vhost: bool,
    /// More words for the command line.
    pub(super) words: Vec<String>,
    pub(super) samples: BTreeMap<(usize, Measure), Vec<f64>>,
    pub(super) attempts: Attempts,
}

/// All columns: ours by PCI and by MMIO, ours and QEMU with vhost as well where the host has it, others as they are. In a
/// smoke run ours alone, by PCI.
pub(super) fn columns(vmms: Vec<Vmm>, options: &[String], vhost: bool, smoke: bool) -> Vec<Column> {
    let mut columns = Vec::new();
    for vmm in vmms {
        let mut add = |title: &str, words: &[&str], vhost| {
            columns.push(Column {
                name: format!("{}{title}", vmm.name),
                vmm: vmm.clone(),
                vhost,
                words: words.iter().map(|word| (*word).to_owned()).collect(),
                samples: BTreeMap::new(),
                attempts: Attempts::new(MOST_FAILURES_IN_A_ROW),
            });
        };
        match vmm.kind {
            Kind::Alveole => {
                add("-pci", &["--enable-pci"], false);
                if !smoke {
                    add("-mmio", &[], false);
                }
                if !smoke && vhost {
                    add("-pci vhost", &["--enable-pci"], true);
                    add("-mmio vhost", &[], true);
                }
            }
            Kind::Qemu if vhost => {
                add("", &[], false);
                add(" vhost", &[], true);
            }
            _ => add("", &[], false),
        }
    }
    for column in columns.iter_mut().filter(|c| c.vmm.kind == Kind::Alveole) {
        column.words.extend(options.iter().cloned());
    }
    columns
}

impl Column {
    fn summary(&self, of: (usize, Measure)) -> Option<Summary> {
        summarize(self.samples.get(&of)?)
    }
}

/// In Markdown.
pub(super) fn markdown(columns: &[Column]) -> String {
    let mut text = String::from("\nCells: median [range] (ratio to our first column).\n");
    let ours = columns.iter().find(|c| c.vmm.kind == Kind::Alveole);
    let names: Vec<_> = columns.iter().map(|column| column.name.as_str()).collect();
    for measure in Measure::ALL {
        let rows: Vec<_> = (0..JOBS.len())
            .filter(|at| {
                columns
                    .iter()
                    .any(|c| c.samples.contains_key(&(*at, measure)))
            })
            .collect();
        if rows.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n**{}**\n", measure.names().1);
        let _ = writeln!(text, "| job | {} |", names.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(names.len()));
        for at in rows {
            let of = (at, measure);
            let cells: Vec<_> = columns
                .iter()
                .map(|column| {
                    let reference = ours
                        .filter(|ours| ours.name != column.name)
                        .and_then(|ours| ours.summary(of))
                        .map(|summary| summary.median);
                    let summary = column.summary(of);
                    summary.map_or("–".to_owned(), |summary| cell(summary, reference))
                })
                .collect();
            let _ = writeln!(text, "| {} | {} |", JOBS[at].name, cells.join(" | "));
        }
    }
    text.push('\n');
    for column in columns {
        let _ = writeln!(
            text,
            "- {}: {}; {} of {} runs failed",
            column.name,
            column.vmm.version,
            column.attempts.failures.len(),
            column.attempts.count
        );
        for what in column.attempts.failures.iter().take(2) {
            let _ = writeln!(text, "  - {what}");
        }
    }
    aims(&mut text, columns, ours);
    text
}

fn aims(text: &mut String, columns: &[Column], ours: Option<&Column>) {
    text.push_str("\n## Aims\n\n");
    let Some(ours) = ours else {
        text.push_str("Not judged: ours was not measured.\n");
        return;
    };
    for (at, job) in JOBS.iter().enumerate() {
        let (measure, factor) = match job.name {
            // There is no aim yet.
            name if name.starts_with("vsock") => continue,
            "ping" | "tcp-rr" => (Measure::Median, 0.8),
            name if name.starts_with("udp") => (Measure::KiloPackets, 1.5),
            name if name.ends_with("-to-guest") => (Measure::GigaBits, 1.5),
            _ => (Measure::GigaBits, 1.2),
        };
        let of = (at, measure);
        let peers = columns.iter().filter(|c| c.vmm.kind != Kind::Alveole);
        let all = peers.filter_map(|c| Some((c.name.as_str(), c.summary(of)?.median)));
        let best = if measure.is_cost() {
            all.min_by(|a, b| a.1.total_cmp(&b.1))
        } else {
            all.max_by(|a, b| a.1.total_cmp(&b.1))
        };
        let (Some(own), Some((name, other))) = (ours.summary(of), best) else {
            continue;
        };
        let met = if measure.is_cost() {
            own.median <= factor * other
        } else {
            own.median >= factor * other
        };
        let _ = writeln!(
            text,
            "- {}, {} {factor} x the best peer's: {}: {} against {} of {name} ({:.2}x)",
            job.name,
            if measure.is_cost() {
                "at most"
            } else {
                "at least"
            },
            if met { "**met**" } else { "**missed**" },
            figure(own.median),
            figure(other),
            own.median / other
        );
    }
}

/// Every sample.
pub(super) fn json(columns: &[Column]) -> Value {
    let all: Map<_, _> = columns
        .iter()
        .map(|column| {
            let mut samples = Map::new();
            for ((at, measure), values) in &column.samples {
                let of_job = samples.entry(JOBS[*at].name).or_insert_with(|| json!({}));
                of_job[measure.names().0] = json!(values);
            }
            let value = json!({
                "version": column.vmm.version, "samples": samples, "attempts": column.attempts.count,
                "failures": column.attempts.failures,
            });
            (column.name.clone(), value)
        })
        .collect();
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aims_are_judged_against_the_best_peer() {
        let vmm = |kind: Kind| Vmm {
            name: kind.name().into(),
            kind,
            path: "/x".into(),
            version: "1".into(),
            without_arch_capabilities: false,
        };
        let vmms = vec![
            vmm(Kind::Alveole),
            vmm(Kind::Firecracker),
            vmm(Kind::CloudHypervisor),
            vmm(Kind::Qemu),
        ];
        let mut all = columns(vmms, &["--x".into()], true, false);
        assert_eq!(all.len(), 4 + 1 + 1 + 2);
        assert_eq!(all[0].words, ["--enable-pci", "--x"]);
        for (name, ping, tcp) in [
            ("alveole-pci", 200.0, 20.0),
            ("firecracker", 300.0, 12.0),
            ("qemu vhost", 240.0, 14.0),
        ] {
            let column = all.iter_mut().find(|c| c.name == name).unwrap();
            column.samples.insert((0, Measure::Median), vec![ping]);
            let stream = JOBS.iter().position(|j| j.name == "tcp1-to-guest").unwrap();
            column
                .samples
                .insert((stream, Measure::GigaBits), vec![tcp]);
            column.attempts.note(Ok(()));
        }
        all[4].attempts.note(Err("it broke".into()));
        let text = markdown(&all);
        for want in [
            "| ping | 200 | – | – | – | 300 (1.50x) | – | – | 240 (1.20x) |",
            "ping, at most 0.8 x the best peer's: **missed**: 200 against 240 of qemu vhost (0.83x)",
            "tcp1-to-guest, at least 1.5 x the best peer's: **missed**: 20 against 14 of qemu vhost (1.43x)",
            "  - it broke",
        ] {
            assert!(text.contains(want), "{want}\n{text}");
        }
        assert_eq!(
            json(&all)["firecracker"]["samples"]["ping"]["p50_us"][0],
            300.0
        );
    }
}
