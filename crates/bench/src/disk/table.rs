//! Shows what was measured in guests: one table for each measure, the aims, failures; and as JSON.
//!
//! Does not know how anything was measured.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::columns::{Cache, Column, Measure, Who};
use super::jobs::JOBS;
use crate::stats::{Summary, cell, figure, summarize};

/// Most failures that are told in full.
const MOST_FAILURES: usize = 10;

impl Column {
    fn summary(&self, job: usize, measure: Measure) -> Option<Summary> {
        summarize(self.samples.get(&(job, measure))?)
    }

    fn median(&self, job: usize, measure: Measure) -> Option<f64> {
        self.summary(job, measure).map(|summary| summary.median)
    }
}

/// Our plain column of this cache, which others are compared with.
fn ours(columns: &[Column], cache: Cache) -> Option<&Column> {
    let mut plain = columns.iter().filter(|c| c.is_ours() && !c.overlay);
    plain.find(|column| column.cache == cache)
}

/// The best of the peers, by name.
fn best(columns: &[Column], cache: Cache, job: usize, measure: Measure) -> Option<(&str, f64)> {
    let peers = columns.iter().filter(|c| c.is_peer() && c.cache == cache);
    let all = peers.filter_map(|c| Some((c.name.as_str(), c.median(job, measure)?)));
    if measure.is_cost() {
        all.min_by(|a, b| a.1.total_cmp(&b.1))
    } else {
        all.max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

/// In Markdown.
pub(super) fn markdown(columns: &[Column]) -> String {
    let mut text = String::from(
        "\n## In a guest: fio, libaio, direct=1\n\nCells: median [range] (ratio to ours of the same cache: \
         buffered to writeback, direct to direct). Sequential jobs have QD8.\n",
    );
    let names: Vec<_> = columns.iter().map(|column| column.name.as_str()).collect();
    for measure in Measure::ALL {
        let _ = writeln!(text, "\n**{}**\n", measure.names().1);
        let _ = writeln!(text, "| job | {} |", names.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(names.len()));
        for (at, job) in JOBS.iter().enumerate() {
            let cells = columns.iter().map(|column| {
                let plain = ours(columns, column.cache).filter(|plain| plain.name != column.name);
                let reference = plain.and_then(|plain| plain.median(at, measure));
                let summary = column.summary(at, measure);
                summary.map_or("–".to_owned(), |summary| cell(summary, reference))
            });
            let cells: Vec<_> = cells.collect();
            let _ = writeln!(text, "| {} | {} |", job.name, cells.join(" | "));
        }
    }
    text.push('\n');
    for column in columns {
        let _ = writeln!(
            text,
            "- {}: n = {}, {} of {} runs failed",
            column.name,
            column.attempts.count as usize - column.attempts.failures.len(),
            column.attempts.failures.len(),
            column.attempts.count
        );
    }
    aims(&mut text, columns);
    failures(&mut text, columns);
    text
}

fn job(name: &str) -> usize {
    JOBS.iter().position(|job| job.name == name).unwrap_or(0)
}

fn aims(text: &mut String, columns: &[Column]) {
    text.push_str("\n## Aims\n\n");
    let Some(buffered) = ours(columns, Cache::Buffered) else {
        text.push_str("Not judged: ours was not measured.\n");
        return;
    };
    let mut aim = |what: &str, value: Option<f64>, other: Option<(&str, f64)>, factor: f64| {
        let most = factor_is_most(what);
        let verdict = match (value, other) {
            (Some(value), Some((name, other))) => {
                let met = if most {
                    value <= factor * other
                } else {
                    value >= factor * other
                };
                format!(
                    "{}: {} against {} of {name} ({:.2}x)",
                    if met { "**met**" } else { "**missed**" },
                    figure(value),
                    figure(other),
                    value / other
                )
            }
            _ => "not measured".to_owned(),
        };
        let bound = if most { "at most" } else { "at least" };
        let _ = writeln!(text, "- {what}, {bound} {factor} x: {verdict}");
    };
    let (qd1, qd32) = (job("randread-qd1"), job("randread-qd32"));
    let peer = |cache, job, measure| best(columns, cache, job, measure);
    aim(
        "latency of buffered reads at QD1 (p50), of the best peer's",
        buffered.median(qd1, Measure::Median),
        peer(Cache::Buffered, qd1, Measure::Median),
        0.89,
    );
    aim(
        "buffered random reads at QD32, of the best peer's",
        buffered.median(qd32, Measure::KiloIops),
        peer(Cache::Buffered, qd32, Measure::KiloIops),
        1.2,
    );
    for (what, at) in [
        ("reads", job("seqread-128k")),
        ("writes", job("seqwrite-128k")),
    ] {
        aim(
            &format!("buffered sequential {what} in a fresh guest, of the best peer's"),
            buffered.median(at, Measure::MegaBytes),
            peer(Cache::Buffered, at, Measure::MegaBytes),
            1.5,
        );
    }
    for (at, of) in JOBS.iter().enumerate() {
        aim(
            &format!("CPU of buffered {}, of the best peer's", of.name),
            buffered.median(at, Measure::Cpu),
            peer(Cache::Buffered, at, Measure::Cpu),
            0.7,
        );
    }
    let host = columns
        .iter()
        .find(|c| matches!(c.who, Who::Host) && c.cache == Cache::Direct);
    let direct = ours(columns, Cache::Direct);
    for (what, at) in [("QD1", qd1), ("QD32", qd32)] {
        aim(
            &format!("direct random reads at {what}, of the host's"),
            direct.and_then(|column| column.median(at, Measure::KiloIops)),
            host.and_then(|c| Some((c.name.as_str(), c.median(at, Measure::KiloIops)?))),
            0.95,
        );
    }
    let overlay = columns.iter().find(|c| c.is_ours() && c.overlay);
    for (at, of) in JOBS.iter().enumerate() {
        aim(
            &format!("qcow2 overlay, {}, of raw", of.name),
            overlay.and_then(|column| column.median(at, Measure::KiloIops)),
            buffered.median(at, Measure::KiloIops).map(|v| ("raw", v)),
            0.9,
        );
    }
}

/// Costs have a ceiling, rates a floor.
fn factor_is_most(what: &str) -> bool {
    what.starts_with("CPU") || what.starts_with("latency")
}

fn failures(text: &mut String, columns: &[Column]) {
    let all: Vec<_> = columns
        .iter()
        .flat_map(|column| {
            column
                .attempts
                .failures
                .iter()
                .map(|what| (&column.name, what))
        })
        .collect();
    if all.is_empty() {
        return;
    }
    text.push_str("\n## Failed runs\n\n");
    for (name, what) in all.iter().take(MOST_FAILURES) {
        let _ = writeln!(text, "- {name}: {what}");
    }
    if all.len() > MOST_FAILURES {
        let _ = writeln!(text, "- and {} more", all.len() - MOST_FAILURES);
    }
    for column in columns.iter().filter(|column| column.attempts.given_up()) {
        let _ = writeln!(text, "- **{} was given up after these**", column.name);
    }
}

/// Every sample.
pub(super) fn json(columns: &[Column]) -> Value {
    let all: Map<_, _> = columns
        .iter()
        .map(|column| {
            let mut samples = Map::new();
            for ((at, measure), values) in &column.samples {
                let job = JOBS.get(*at).map_or("?", |job| job.name);
                let of_job = samples.entry(job).or_insert_with(|| json!({}));
                of_job[measure.names().0] = json!(values);
            }
            let version = match &column.who {
                Who::Host => None,
                Who::Guest(vmm) => Some(&vmm.version),
            };
            let value = json!({
                "version": version, "samples": samples, "attempts": column.attempts.count,
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
    use crate::disk::columns::columns;
    use crate::vmm::{Kind, Vmm};

    #[test]
    fn ratios_are_to_ours_of_the_same_cache() {
        let vmm = |kind: Kind| Vmm {
            name: kind.name().into(),
            kind,
            path: "/x".into(),
            version: "1".into(),
            without_arch_capabilities: false,
        };
        let vmms = vec![vmm(Kind::Alveole), vmm(Kind::Qemu)];
        let mut all = columns(vmms, &[], &[], true, false).unwrap();
        for (name, kiops) in [
            ("alveole-pci writeback", 300.0),
            ("alveole-pci direct", 80.0),
            ("alveole-pci qcow2 overlay", 270.0),
            ("qemu writeback", 150.0),
            ("host direct", 100.0),
        ] {
            let column = all.iter_mut().find(|c| c.name == name).unwrap();
            let of = (job("randread-qd32"), Measure::KiloIops);
            column
                .samples
                .insert(of, vec![kiops, kiops + 2.0, kiops - 2.0]);
            column.attempts.note(Ok(()));
        }
        all.last_mut()
            .unwrap()
            .attempts
            .note(Err("it broke".into()));
        let text = markdown(&all);
        for want in [
            "| randread-qd32 | 300 [298-302] | 80 [78-82] | 270 [268-272] (0.90x) | – | – | – | 150 [148-152] (0.50x) |",
            "at QD32, of the best peer's, at least 1.2 x: **met**: 300 against 150 of qemu writeback (2.00x)",
            "of the host's, at least 0.95 x: **missed**: 80 against 100 of host direct (0.80x)",
            "qcow2 overlay, randread-qd32, of raw, at least 0.9 x: **met**",
            "host direct: it broke",
        ] {
            assert!(text.contains(want), "{want}\n{text}");
        }
        let json = json(&all);
        assert_eq!(
            json["host direct"]["samples"]["randread-qd32"]["kiops"][0],
            100.0
        );
    }
}
