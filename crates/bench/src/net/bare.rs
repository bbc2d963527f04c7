//! The table without a guest: which cells there are, and what each costs.
//!
//! Every sample is a process of its own ([`super::cell`]), run in turn, with a network namespace of its own; one more run of
//! each, under `strace`, counts system calls. Does not know how a cell is driven.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use crate::cells::{calls_cells, count_calls, output};
use crate::stats::{cell, summarize};

/// Frames while system calls are counted: each call stops the device.
const TRACED_FRAMES: u64 = 5000;
const WALL: &str = "ns";
const CPU: &str = "cpu_ns";

/// One row.
#[derive(Debug, Default)]
pub(super) struct Row {
    link: &'static str,
    direction: &'static str,
    bytes: usize,
    samples: BTreeMap<&'static str, Vec<f64>>,
    /// System calls of the device's thread for each frame, by name.
    calls: Option<BTreeMap<String, f64>>,
    failure: Option<String>,
}

impl Row {
    fn title(&self) -> String {
        let way = match self.direction {
            "tx" => "from the guest",
            _ => "to the guest",
        };
        format!("{}, {way}, {} B", self.link, self.bytes)
    }

    fn words(&self) -> anyhow::Result<Vec<String>> {
        let exe = std::env::current_exe()?.display().to_string();
        let bytes = self.bytes.to_string();
        let words = [
            exe.as_str(),
            "net-cell",
            "--link",
            self.link,
            "--direction",
            self.direction,
            "--bytes",
            &bytes,
        ];
        Ok(words.map(str::to_owned).to_vec())
    }

    fn sample(&mut self, milliseconds: u64) -> anyhow::Result<()> {
        let mut command = Command::new("unshare");
        command.arg("-n").args(self.words()?);
        command.args(["--milliseconds", &milliseconds.to_string()]);
        let said: Value = serde_json::from_str(&output(&mut command)?)?;
        for name in [WALL, CPU] {
            let value = said[name].as_f64().with_context(|| format!("no {name}"))?;
            self.samples.entry(name).or_default().push(value);
        }
        Ok(())
    }

    fn trace(&mut self, scratch: &Path) -> anyhow::Result<()> {
        let file = scratch.join("strace-cell");
        let mut command = Command::new("unshare");
        command.args(["-n", "strace", "-f", "-qq", "-o"]).arg(&file);
        command.args(self.words()?);
        command.args(["--frames", &TRACED_FRAMES.to_string()]);
        let said: Value = serde_json::from_str(&output(&mut command)?)?;
        let device = said["thread"].as_str().context("no thread")?;
        let frames = said["frames"].as_f64().context("no frames")?;
        let text = std::fs::read_to_string(&file)?;
        let calls = count_calls(&text, |thread, _| thread == device)?.into_iter();
        self.calls = Some(calls.map(|(name, n)| (name, n as f64 / frames)).collect());
        Ok(())
    }
}

fn rows(only: &[String]) -> Vec<Row> {
    let mut rows = Vec::new();
    for link in ["pair", "stream", "tap"] {
        for direction in ["tx", "rx"] {
            // The last: the longest that a tap's MTU lets the host send.
            for bytes in [64, 1514, 65_000] {
                rows.push(Row {
                    link,
                    direction,
                    bytes,
                    ..Row::default()
                });
            }
        }
    }
    rows.retain(|row| only.is_empty() || only.iter().any(|part| row.title().contains(part)));
    rows
}

/// Takes all samples.
pub(super) fn measure(
    scratch: &Path,
    rounds: u32,
    milliseconds: u64,
    strace: bool,
    only: &[String],
) -> Vec<Row> {
    let mut rows = rows(only);
    for round in 1..=rounds {
        eprintln!("alveole-bench: without a guest, round {round} of {rounds}");
        for row in rows.iter_mut().filter(|row| row.failure.is_none()) {
            if let Err(e) = row.sample(milliseconds) {
                eprintln!("alveole-bench: {}: FAILED: {e:#}", row.title());
                row.failure = Some(format!("{e:#}"));
            }
        }
    }
    if strace {
        eprintln!("alveole-bench: without a guest, counting system calls");
        for row in rows.iter_mut().filter(|row| row.failure.is_none()) {
            if let Err(e) = row.trace(scratch) {
                eprintln!("alveole-bench: {}: under strace: {e:#}", row.title());
            }
        }
    }
    rows
}

/// Whether something could not be measured.
pub(super) fn failed(rows: &[Row]) -> bool {
    rows.iter().any(|row| row.failure.is_some())
}

/// In Markdown.
pub(super) fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "\n## Without a guest: frames by one pair of queues\n\n\
         ns/frame: of the clock (a driver's thread keeps the queue full, another thread or the host is the other side), \
         and of the processor in the device's thread. System calls of that thread for each frame, in a run of their \
         own under strace, which slows the device and so makes batches larger.\n\n\
         | | ns | device CPU ns | system calls | which |\n|---|---:|---:|---:|---|\n",
    );
    for row in rows {
        if let Some(what) = &row.failure {
            let _ = writeln!(text, "| {} | failed: {what} ||||", row.title());
            continue;
        }
        let show = |name| {
            let samples = row.samples.get(name).and_then(|all| summarize(all));
            samples.map_or("–".to_owned(), |summary| cell(summary, None))
        };
        let (calls, which) = calls_cells(row.calls.as_ref());
        let _ = writeln!(
            text,
            "| {} | {} | {} | {calls} | {which} |",
            row.title(),
            show(WALL),
            show(CPU)
        );
    }
    text
}

pub(super) fn json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        json!({
            "link": row.link, "direction": row.direction, "bytes": row.bytes,
            "samples": row.samples, "system_calls": row.calls, "failure": row.failure,
        })
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_titles() {
        assert_eq!(rows(&[]).len(), 18);
        let some = rows(&["tap, to the guest".into()]);
        assert_eq!(some[0].title(), "tap, to the guest, 64 B");
        assert_eq!(some.len(), 3);
    }
}
