//! The columns, and how they are shown: one table each for standing still, restoring and copies; failures; and as JSON.
//!
//! Does not know how anything was measured.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::Samples;
use crate::attempts::Attempts;
use crate::stats::{Summary, cell, summarize};
use crate::vmm::{Kind, Vmm};

/// After so many failures of a case in a row it is left alone.
const MOST_FAILURES: u32 = 2;

/// Where snapshots were, or what else was done with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Memory,
    Disk,
    /// A guest that goes on.
    Live,
    Clones,
    /// Copies whose VMM is a copy of a process that has the snapshot prepared.
    Templated,
    /// The same two, of a guest with a network, over a tap for each.
    Networked,
    NetworkedTemplated,
    /// Memory that is touched after a restore: of a file in the page cache, and of one that is on the disk only.
    Warm,
    Cold,
}

/// What was measured how large: `number` is MiB, or how many copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Case {
    pub(super) place: Place,
    pub(super) number: u64,
}

impl Case {
    fn title(self) -> String {
        let number = self.number;
        match self.place {
            Place::Memory | Place::Live => format!("{number} MiB"),
            Place::Warm => format!("{number} MiB, page cache"),
            Place::Cold => format!("{number} MiB, disk, cold"),
            Place::Disk => format!("{number} MiB, disk"),
            Place::Clones => format!("{number}"),
            Place::Templated => format!("{number}, of a template"),
            Place::Networked => format!("{number}, with a network"),
            Place::NetworkedTemplated => format!("{number}, with a network, of a template"),
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    First,
    Second,
    SecondCreate,
    Live,
    LiveWritten,
    Diff,
    DiffMib,
    LiveFull,
    LiveFullWritten,
    LiveDiff,
    LiveDiffWritten,
    Load,
    Answered,
    Beat,
    LoadInstruction,
    StartInstruction,
    ExecutedInstruction,
    CopyInstruction,
    LaterInstruction,
    ExecutedAnswered,
    CopyAnswered,
    CopyBeat,
    FirstTouch,
    AheadTouch,
    SecondTouch,
    Unique,
    GuestsOwn,
    VmmsOwn,
    Pss,
    Cpu,
    HostCpu,
    Running,
    AllAnswered,
    AllBeaten,
}

/// The tables: a title, and the rows.
const TABLES: [(&str, &[Row]); 5] = [
    (
        "The guest stands still, ms",
        &[
            Row::First,
            Row::Second,
            Row::SecondCreate,
            Row::Live,
            Row::LiveWritten,
            Row::Diff,
            Row::DiffMib,
        ],
    ),
    (
        "The guest goes on while its memory is written, ms",
        &[
            Row::LiveFull,
            Row::LiveFullWritten,
            Row::LiveDiff,
            Row::LiveDiffWritten,
        ],
    ),
    (
        "Restore, ms",
        &[
            Row::Load,
            Row::Answered,
            Row::Beat,
            Row::LoadInstruction,
            Row::StartInstruction,
            Row::ExecutedInstruction,
            Row::CopyInstruction,
            Row::LaterInstruction,
            Row::ExecutedAnswered,
            Row::CopyAnswered,
            Row::CopyBeat,
        ],
    ),
    (
        "Memory after a restore",
        &[Row::FirstTouch, Row::AheadTouch, Row::SecondTouch],
    ),
    (
        "Copies of one snapshot",
        &[
            Row::Unique,
            Row::GuestsOwn,
            Row::VmmsOwn,
            Row::Pss,
            Row::Cpu,
            Row::HostCpu,
            Row::Running,
            Row::AllAnswered,
            Row::AllBeaten,
        ],
    ),
];

impl Row {
    /// The name in JSON, and the title in the table.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::First => ("full_first_ms", "full, the first: pause, create, resume"),
            Self::Second => ("full_second_ms", "full, the second"),
            Self::SecondCreate => (
                "full_second_create_ms",
                "full, the second: PUT /snapshot/create",
            ),
            Self::Live => ("live_still_ms", "live: stood still"),
            Self::LiveWritten => (
                "live_written_ms",
                "live: PUT /snapshot/create, the guest goes on",
            ),
            Self::Diff => ("diff_ms", "diff: pause, create, resume"),
            Self::DiffMib => ("diff_mib", "diff: MiB in the file"),
            Self::LiveFull => ("live_full_still_ms", "full: stood still"),
            Self::LiveFullWritten => ("live_full_written_ms", "full: until written"),
            Self::LiveDiff => ("live_diff_still_ms", "diff: stood still"),
            Self::LiveDiffWritten => ("live_diff_written_ms", "diff: until written"),
            Self::FirstTouch => ("first_touch_us", "a page is written for the first time, us"),
            Self::AheadTouch => (
                "ahead_touch_us",
                "the same, with a working set that is read ahead, us",
            ),
            Self::SecondTouch => ("second_touch_us", "a page is written again, us"),
            Self::Load => ("load_ms", "PUT /snapshot/load with resume_vm"),
            Self::Answered => ("answered_ms", "process start → load answered"),
            Self::Beat => ("beat_ms", "process start → first byte of the guest"),
            Self::LoadInstruction => (
                "load_instruction_ms",
                "PUT /snapshot/load is sent → first guest instruction",
            ),
            Self::StartInstruction => (
                "start_instruction_ms",
                "process start, PUT /snapshot/load → first guest instruction",
            ),
            Self::ExecutedInstruction => (
                "executed_instruction_ms",
                "process start with --load-snapshot → first guest instruction",
            ),
            Self::CopyInstruction => (
                "copy_instruction_ms",
                "a fresh template is asked → first guest instruction",
            ),
            Self::LaterInstruction => (
                "later_instruction_ms",
                "a template is asked again → first guest instruction",
            ),
            Self::ExecutedAnswered => (
                "executed_answered_ms",
                "process start with --load-snapshot → the machine answers",
            ),
            Self::CopyAnswered => (
                "copy_answered_ms",
                "a template is asked → the machine answers",
            ),
            Self::CopyBeat => (
                "copy_beat_ms",
                "a template is asked → first byte of the guest",
            ),
            Self::Unique => ("unique_mib", "memory of its own, each, MiB (USS)"),
            Self::GuestsOwn => (
                "guests_own_mib",
                "what the guest has written, each, MiB (Anonymous)",
            ),
            Self::VmmsOwn => (
                "vmms_own_mib",
                "what the VMM has written, each, MiB (Anonymous)",
            ),
            Self::Pss => ("pss_mib", "PSS, each, MiB"),
            Self::Cpu => ("cpu_ms", "CPU until load answered, each, ms"),
            Self::HostCpu => (
                "host_cpu_ms",
                "CPU of the host until all loads are answered, ms",
            ),
            Self::Running => ("running_cpu_ms_s", "CPU of a copy that runs, each, ms/s"),
            Self::AllAnswered => ("all_answered_ms", "until all loads are answered, ms"),
            Self::AllBeaten => ("all_beaten_ms", "until all guests have beaten, ms"),
        }
    }
}

/// One VMM.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) vmm: Vmm,
    samples: BTreeMap<(Row, Case), Vec<f64>>,
    pub(super) attempts: Attempts,
    /// Failures in a row of what is done at once.
    failed: BTreeMap<Case, u32>,
}

impl Column {
    pub(super) fn new(vmm: Vmm) -> Self {
        Self {
            vmm,
            samples: BTreeMap::new(),
            attempts: Attempts::new(u32::MAX),
            failed: BTreeMap::new(),
        }
    }

    /// Measures one case, unless it has failed too often.
    pub(super) fn measure(
        &mut self,
        case: Case,
        life: impl FnOnce(&Vmm, &mut dyn FnMut(Row, f64)) -> anyhow::Result<()>,
    ) {
        self.measure_many(case, |vmm, samples| {
            life(vmm, &mut |row, value| samples.push((case, row, value)))
        });
    }

    /// Measures what says its cases itself, all of which stand or fall with `case`.
    pub(super) fn measure_many(
        &mut self,
        case: Case,
        life: impl FnOnce(&Vmm, &mut Samples) -> anyhow::Result<()>,
    ) {
        let failed = self.failed.entry(case).or_default();
        if *failed >= MOST_FAILURES {
            return;
        }
        let mut samples = Vec::new();
        let outcome = life(&self.vmm, &mut samples);
        *failed = if outcome.is_err() { *failed + 1 } else { 0 };
        if let Err(error) = &outcome {
            let (name, title) = (&self.vmm.name, case.title());
            eprintln!("alveole-bench: {name}, {title}: FAILED: {error:#}");
        }
        for (case, row, value) in samples {
            self.samples.entry((row, case)).or_default().push(value);
        }
        self.attempts
            .note(outcome.map_err(|error| format!("{}: {error:#}", case.title())));
    }

    fn summary(&self, key: (Row, Case)) -> Option<Summary> {
        summarize(self.samples.get(&key)?)
    }
}

pub(super) fn markdown(lines: &[String], missing: &[String], columns: &[Column]) -> String {
    let mut text = String::from("# Bench: snapshot\n\n");
    for line in lines {
        let _ = writeln!(text, "- {line}");
    }
    for line in missing {
        let _ = writeln!(text, "- **{line}**");
    }
    for column in columns {
        let _ = writeln!(text, "- {}: {}", column.vmm.name, column.vmm.version);
    }
    for (title, rows) in TABLES {
        let cases = |row: Row| {
            let keys = columns.iter().flat_map(|column| column.samples.keys());
            let cases = keys.filter(move |(of, _)| *of == row);
            let cases: std::collections::BTreeSet<_> = cases.map(|(_, case)| *case).collect();
            cases
        };
        if rows.iter().all(|&row| cases(row).is_empty()) {
            continue;
        }
        let _ = write!(text, "\n## {title}\n\n| | |");
        for column in columns {
            let _ = write!(text, " {} |", column.vmm.name);
        }
        let _ = writeln!(text, "\n|---|---|{}", "---|".repeat(columns.len()));
        for &row in rows {
            for case in cases(row) {
                let _ = write!(text, "| {} | {} |", row.names().1, case.title());
                let ours = columns.iter().find(|c| c.vmm.kind == Kind::Alveole);
                let ours = ours.and_then(|column| column.summary((row, case)));
                for (index, column) in columns.iter().enumerate() {
                    let reference = ours.filter(|_| index > 0).map(|ours| ours.median);
                    let of = |summary| cell(summary, reference);
                    let shown = column.summary((row, case)).map_or("–".into(), of);
                    let _ = write!(text, " {shown} |");
                }
                text += "\n";
            }
        }
    }
    text += "\nMedians with the range; in brackets behind it: times ours.\n";
    for column in columns {
        for failure in &column.attempts.failures {
            let _ = writeln!(text, "- {} failed: {failure}", column.vmm.name);
        }
    }
    text
}

pub(super) fn json(columns: &[Column]) -> Value {
    let column = |column: &Column| {
        let mut samples: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
        for ((row, case), values) in &column.samples {
            let name = match case.place {
                Place::Clones => format!("{} copies", case.number),
                Place::Templated => format!("{} copies of a template", case.number),
                Place::Networked => format!("{} copies with a network", case.number),
                Place::NetworkedTemplated => {
                    format!("{} copies of a template with a network", case.number)
                }
                Place::Live => format!("{} MiB, live", case.number),
                _ => case.title(),
            };
            let of = samples.entry(name).or_default();
            of.insert(row.names().0.into(), json!(values));
        }
        json!({
            "name": column.vmm.name, "version": column.vmm.version, "samples": samples,
            "failures": column.attempts.failures,
        })
    };
    columns.iter().map(column).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn column(name: &str, still: f64) -> Column {
        let named = format!("{name}=/bin/true");
        let (mut vmms, _) =
            crate::vmm::find(Path::new("/x"), &[named], &[name.to_owned()]).unwrap();
        let mut column = Column::new(vmms.remove(0));
        for (place, number) in [(Place::Memory, 256), (Place::Disk, 1024)] {
            column.measure(Case { place, number }, |_, add| {
                add(Row::First, still);
                Ok(())
            });
        }
        column
    }

    #[test]
    fn tables_and_failures() {
        let mut ours = column("alveole", 50.0);
        let case = Case {
            place: Place::Clones,
            number: 7,
        };
        ours.measure_many(case, |_, samples| {
            samples.push((case, Row::Pss, 3.0));
            Ok(())
        });
        let mut peer = column("firecracker", 100.0);
        let mut tries = 0;
        for _ in 0..4 {
            peer.measure_many(case, |_, _| {
                tries += 1;
                anyhow::bail!("it says no")
            });
        }
        assert_eq!(tries, MOST_FAILURES);
        let columns = [ours, peer];
        let text = markdown(&["n = 1".into()], &[], &columns);
        for want in [
            "| full, the first: pause, create, resume | 256 MiB | 50 | 100 (2.00x) |",
            "| full, the first: pause, create, resume | 1024 MiB, disk | 50 | 100 (2.00x) |",
            "| PSS, each, MiB | 7 | 3 | – |",
            "- firecracker failed: 7: it says no",
        ] {
            assert!(text.contains(want), "{want}\n{text}");
        }
        assert!(!text.contains("## Restore"), "{text}");
        let all = json(&columns);
        assert_eq!(all[0]["samples"]["7 copies"]["pss_mib"], json!([3.0]));
        assert_eq!(
            all[1]["samples"]["256 MiB"]["full_first_ms"],
            json!([100.0])
        );
    }
}
