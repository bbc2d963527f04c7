//! The table without a guest: which cells there are, and what each costs.
//!
//! Every sample is a process of its own ([`super::cell`]), run in turn, with a network namespace of its own; one more run of
//! each, under `strace`, counts system calls. Does not know how a cell is driven.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::disk::MARK;
use crate::stats::{cell, figure, summarize};

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
        let said = output(&mut command)?;
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
        let said = output(&mut command)?;
        let thread = said["thread"].as_str().context("no thread")?;
        let frames = said["frames"].as_f64().context("no frames")?;
        let text = std::fs::read_to_string(&file)?;
        let calls = count_calls(&text, thread)?.into_iter();
        self.calls = Some(calls.map(|(name, n)| (name, n as f64 / frames)).collect());
        Ok(())
    }
}

fn output(command: &mut Command) -> anyhow::Result<Value> {
    let said = command.output().context("cannot start a cell")?;
    if !said.status.success() {
        let errors = String::from_utf8_lossy(&said.stderr);
        let last = errors.trim().lines().last().unwrap_or_default();
        bail!("{}: {last}", said.status);
    }
    Ok(serde_json::from_slice(&said.stdout)?)
}

/// Calls of one thread between the two marks in the output of `strace -f`.
fn count_calls(trace: &str, thread: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    let is_mark = |line: &&str| line.contains(MARK);
    trace.lines().find(is_mark).context("strace saw no mark")?;
    let mut calls = BTreeMap::new();
    let lines = trace.lines().skip_while(|line| !is_mark(line)).skip(1);
    for line in lines.take_while(|line| !is_mark(line)) {
        let Some((id, call)) = line.split_once(' ') else {
            continue;
        };
        let Some((name, _)) = call.trim_start().split_once('(') else {
            continue;
        };
        // Neither the second half of a call nor a signal.
        if id == thread && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            *calls.entry(name.to_owned()).or_default() += 1;
        }
    }
    Ok(calls)
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
        let (calls, which) = match &row.calls {
            Some(calls) => {
                let each = calls.iter().filter(|(_, count)| **count >= 0.005);
                let each: Vec<_> = each.map(|(name, n)| format!("{name} {n:.2}")).collect();
                (figure(calls.values().sum()), each.join(", "))
            }
            None => ("–".to_owned(), String::new()),
        };
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
    fn only_the_devices_calls_between_the_marks_count() {
        let trace = format!(
            "10 writev(3) = 8\n9 statx(AT_FDCWD, \"{MARK}\") = -1\n10  readv(4) = 8\n11 writev(3) = 8\n\
             10 epoll_wait(5 <unfinished ...>\n10 <... epoll_wait resumed>) = 1\n10 --- SIGCHLD (x) ---\n\
             9 statx(AT_FDCWD, \"{MARK}\") = -1\n10 close(3) = 0\n"
        );
        let want = [("epoll_wait".to_owned(), 1), ("readv".to_owned(), 1)];
        assert_eq!(count_calls(&trace, "10").unwrap(), BTreeMap::from(want));
        assert!(count_calls("10 write(3)", "10").is_err());
    }

    #[test]
    fn rows_have_titles() {
        assert_eq!(rows(&[]).len(), 18);
        let some = rows(&["tap, to the guest".into()]);
        assert_eq!(some[0].title(), "tap, to the guest, 64 B");
        assert_eq!(some.len(), 3);
    }
}
