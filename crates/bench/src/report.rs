//! Shows results: the table, the aims with what became of them, our exits, failures; and as JSON.
//!
//! Does not know how anything was measured.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::host::Conditions;
use crate::results::{Column, Measure, best_peer};
use crate::stats::{cell, figure, summarize};
use crate::vmm::Kind;

/// Most rows in the table of exits.
const MOST_EXITS: usize = 20;
/// Most failures that are told in full.
const MOST_FAILURES: usize = 10;

/// Everything that is shown.
pub(crate) struct Report<'a> {
    pub(crate) conditions: &'a Conditions,
    /// More about what was done, a line each.
    pub(crate) notes: &'a [String],
    /// What could not be done, a line each.
    pub(crate) missing: &'a [String],
    pub(crate) columns: &'a [Column],
    /// External packages in our dependency tree, if they could be counted.
    pub(crate) packages: Result<usize, String>,
}

impl Report<'_> {
    /// For people, in Markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from("# Bench: boot\n\n");
        for line in self.conditions.lines().iter().chain(self.notes) {
            let _ = writeln!(text, "- {line}");
        }
        for column in self.columns {
            let vmm = &column.vmm;
            let _ = writeln!(text, "- {}: {}", vmm.name, vmm.version);
        }
        for line in self.missing {
            let _ = writeln!(text, "- **{line}**");
        }
        text += "\nCells: median [range] (ratio to the best peer).\n\n";
        self.table(&mut text);
        self.aims(&mut text);
        self.exits(&mut text);
        self.failures(&mut text);
        text
    }

    fn table(&self, text: &mut String) {
        let names: Vec<_> = self
            .columns
            .iter()
            .map(|column| column.vmm.name.as_str())
            .collect();
        let _ = writeln!(text, "| | {} |", names.join(" | "));
        let _ = writeln!(text, "|---|{}", "---:|".repeat(names.len()));
        for measure in Measure::ALL {
            if !self
                .columns
                .iter()
                .any(|column| column.samples.contains_key(&measure))
            {
                continue;
            }
            let best = best_peer(self.columns, measure).filter(|_| measure.is_cost());
            let cells = self.columns.iter().map(|column| {
                column.summary(measure).map_or("–".to_owned(), |summary| {
                    cell(summary, best.map(|(_, value)| value))
                })
            });
            row(text, measure.names().1, cells);
        }
        let failed = |column: &Column| {
            format!(
                "{} of {}",
                column.attempts.failures.len(),
                column.attempts.count
            )
        };
        row(text, "failed runs", self.columns.iter().map(failed));
    }

    fn aims(&self, text: &mut String) {
        text.push_str("\n## Aims\n\n");
        let Some(ours) = self.columns.iter().find(|column| column.is_ours()) else {
            text.push_str("Not judged: ours was not measured.\n");
            return;
        };
        let firecracker = |measure| {
            let column = self
                .columns
                .iter()
                .find(|column| column.vmm.kind == Kind::Firecracker)?;
            Some((column.vmm.name.as_str(), column.summary(measure)?.median))
        };
        let our = |measure| ours.summary(measure).map(|summary| summary.median);
        let best = |measure| best_peer(self.columns, measure);
        for (measure, peer, factor) in [
            (Measure::FirstRun, firecracker(Measure::FirstRun), 0.25),
            (Measure::InitFast, best(Measure::InitFast), 0.8),
            (Measure::ExitFast, best(Measure::ExitFast), 0.8),
            (Measure::InitGiven, best(Measure::InitGiven), 0.8),
            (Measure::ExitGiven, best(Measure::ExitGiven), 0.8),
        ] {
            let title = measure.names().1;
            let verdict = match (our(measure), peer) {
                (Some(value), Some((name, peer))) => format!(
                    "{}: {} against {} of {name} ({:.2}x)",
                    judged(value <= factor * peer),
                    figure(value),
                    figure(peer),
                    value / peer
                ),
                (None, _) => "not measured: no sample of ours".into(),
                (_, None) => "not measured: no sample of a peer".into(),
            };
            let whose = if measure == Measure::FirstRun {
                "Firecracker's"
            } else {
                "the best peer's"
            };
            let _ = writeln!(text, "- {title}, at most {factor} x {whose}: {verdict}");
        }
        for (measure, most) in [(Measure::Pss, 2.0), (Measure::Binary, 4.0)] {
            let verdict = our(measure).map_or("not measured".to_owned(), |value| {
                format!("{}: {}", judged(value <= most), figure(value))
            });
            let _ = writeln!(text, "- {}, at most {most}: {verdict}", measure.names().1);
        }
        let verdict = match &self.packages {
            Ok(count) => format!("{}: {count}", judged(*count <= 60)),
            Err(why) => format!("not measured: {why}"),
        };
        let _ = writeln!(
            text,
            "- external packages in the VMM's tree, at most 60: {verdict}"
        );
    }

    fn exits(&self, text: &mut String) {
        for column in self
            .columns
            .iter()
            .filter(|column| !column.exits.is_empty())
        {
            let mut all: Vec<_> = column
                .exits
                .iter()
                .filter_map(|(name, counts)| Some((summarize(counts)?, name)))
                .collect();
            all.sort_by(|a, b| b.0.median.total_cmp(&a.0.median));
            let total: f64 = all.iter().map(|(summary, _)| summary.median).sum();
            let _ = writeln!(
                text,
                "\n## Exits of a booting kernel under {}: {} in all, the {} most frequent of {}\n",
                column.vmm.name,
                figure(total),
                all.len().min(MOST_EXITS),
                all.len()
            );
            text.push_str("| exit | count |\n|---|---:|\n");
            for (summary, name) in all.into_iter().take(MOST_EXITS) {
                row(text, name, [cell(summary, None)].into_iter());
            }
        }
    }

    fn failures(&self, text: &mut String) {
        let all: Vec<_> = self
            .columns
            .iter()
            .flat_map(|column| {
                column
                    .attempts
                    .failures
                    .iter()
                    .map(|what| (&column.vmm.name, what))
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
        for column in self
            .columns
            .iter()
            .filter(|column| column.attempts.given_up())
        {
            let _ = writeln!(text, "- **{} was given up after these**", column.vmm.name);
        }
    }

    /// For programs: every sample.
    pub(crate) fn json(&self) -> Value {
        let vmms: Map<_, _> = self
            .columns
            .iter()
            .map(|column| {
                let samples: Map<_, _> = column
                    .samples
                    .iter()
                    .map(|(measure, all)| (measure.names().0.to_owned(), json!(all)))
                    .collect();
                let vmm = json!({
                    "version": column.vmm.version, "samples": samples, "exits": column.exits,
                    "attempts": column.attempts.count, "failures": column.attempts.failures,
                });
                (column.vmm.name.clone(), vmm)
            })
            .collect();
        json!({
            "bench": "boot", "conditions": self.conditions.json(), "notes": self.notes,
            "missing": self.missing, "external_packages": self.packages.as_ref().ok(), "vmms": vmms,
        })
    }
}

fn judged(met: bool) -> &'static str {
    if met { "**met**" } else { "**missed**" }
}

fn row(text: &mut String, title: &str, cells: impl Iterator<Item = String>) {
    let cells: Vec<_> = cells.collect();
    let _ = writeln!(text, "| {title} | {} |", cells.join(" | "));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::column;

    fn report(columns: &[Column]) -> (String, Value) {
        let conditions = Conditions::now(b"Linux version 6.1");
        let missing = ["qemu IS NOT MEASURED: x".to_owned()];
        let packages = Ok(61);
        let report = Report {
            conditions: &conditions,
            notes: &[],
            missing: &missing,
            columns,
            packages,
        };
        (report.markdown(), report.json())
    }

    #[test]
    fn a_table_with_aims() {
        let mut ours = column(
            Kind::Alveole,
            &[
                (Measure::FirstRun, &[5.0, 4.0, 6.0]),
                (Measure::InitFast, &[90.0]),
                (Measure::Pss, &[2.0]),
            ],
        );
        for name in ["port read 0x3fd", "port write 0x3f8"] {
            ours.exits.insert(name.into(), vec![name.len() as f64]);
        }
        let mut peer = column(
            Kind::Firecracker,
            &[(Measure::FirstRun, &[20.0]), (Measure::InitFast, &[100.0])],
        );
        peer.attempts.note(Err("Times(Fast): time-out".into()));
        let (text, json) = report(&[ours, peer]);
        for want in [
            "| | alveole | firecracker |",
            "| start → first KVM_RUN, ms (under strace) | 5 [4-6] (0.25x) | 20 (1.00x) |",
            "at most 0.25 x Firecracker's: **met**: 5 against 20 of firecracker (0.25x)",
            "start → init, *fast*, ms, at most 0.8 x the best peer's: **missed**: 90 against 100",
            "start → init, *given*, ms, at most 0.8 x the best peer's: not measured",
            "MiB, at most 2: **met**: 2",
            "at most 60: **missed**: 61",
            "31 in all, the 2 most frequent of 2",
            "| port write 0x3f8 | 16 |",
            "| failed runs | 0 of 0 | 1 of 1 |",
            "**qemu IS NOT MEASURED",
            "- firecracker: Times(Fast): time-out",
        ] {
            assert!(text.contains(want), "{want}\n{text}");
        }
        assert_eq!(
            json["vmms"]["alveole"]["samples"]["first_run_ms"],
            json!([5.0, 4.0, 6.0])
        );
        assert_eq!(json["external_packages"], json!(61));
    }

    #[test]
    fn without_ours_nothing_is_judged() {
        let (text, _) = report(&[column(Kind::Qemu, &[(Measure::Pss, &[47.0])])]);
        assert!(
            text.contains("ours was not measured") && !text.contains("met**"),
            "{text}"
        );
    }
}
