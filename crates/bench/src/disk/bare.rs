//! The table without a guest: which cells there are, and what each costs.
//!
//! Every sample is a process of its own ([`super::cell`]), run in turn; one more run of each, under
//! `strace`, counts system calls. Does not know how a cell is driven.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde_json::{Value, json};

use crate::cells::{calls_cells, count_calls, output};
use crate::stats::{Summary, cell, summarize};

/// Requests while system calls are counted: each call stops the device.
const TRACED_REQUESTS: u64 = 20_000;
/// The same in a smoke run.
const FEW_TRACED_REQUESTS: u64 = 2_000;

/// One row.
#[derive(Debug, Default)]
pub(super) struct Row {
    store: &'static str,
    queues: u16,
    depth: u16,
    thread_per_queue: bool,
    samples: BTreeMap<&'static str, Vec<f64>>,
    /// System calls of the device's threads for each request, by name.
    calls: Option<BTreeMap<String, f64>>,
    failure: Option<String>,
}

const WALL: &str = "ns";
const CPU: &str = "cpu_ns";
const DRIVER: &str = "driver_ns";

fn rows(smoke: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    let stores: &[&str] = if smoke {
        &["ram", "uring"]
    } else {
        &["ram", "uring", "sync", "uring-direct"]
    };
    for &store in stores {
        for depth in [1, 32] {
            for (queues, thread_per_queue) in [(1, false), (4, false), (4, true)] {
                if smoke && (thread_per_queue || queues > 1 && depth == 1) {
                    continue;
                }
                rows.push(Row {
                    store,
                    queues,
                    depth,
                    thread_per_queue,
                    ..Row::default()
                });
            }
        }
    }
    rows
}

impl Row {
    fn words(&self, image: &Path) -> Vec<String> {
        let mut words = vec!["disk-cell".to_owned(), "--store".into(), self.store.into()];
        words.extend(["--image".into(), image.display().to_string()]);
        words.extend(["--queues".into(), self.queues.to_string()]);
        words.extend(["--depth".into(), self.depth.to_string()]);
        if self.thread_per_queue {
            words.push("--thread-per-queue".into());
        }
        words
    }

    fn sample(&mut self, image: &Path, milliseconds: u64) -> anyhow::Result<()> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(self.words(image));
        command.args(["--milliseconds", &milliseconds.to_string()]);
        let said = output(&mut command)?;
        let said: Value = serde_json::from_str(&said)?;
        for name in [WALL, CPU, DRIVER] {
            let value = said[name].as_f64().with_context(|| format!("no {name}"))?;
            self.samples.entry(name).or_default().push(value);
        }
        Ok(())
    }

    fn trace(&mut self, image: &Path, scratch: &Path, requests: u64) -> anyhow::Result<()> {
        let file = scratch.join("strace-cell");
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o"]).arg(&file);
        command
            .arg(std::env::current_exe()?)
            .args(self.words(image));
        command.args(["--requests", &requests.to_string()]);
        output(&mut command)?;
        let text = std::fs::read_to_string(&file)?;
        let calls = count_calls(&text, |thread, driver| thread != driver)?;
        let each = |(name, count): (String, u64)| (name, count as f64 / requests as f64);
        self.calls = Some(calls.into_iter().map(each).collect());
        Ok(())
    }

    fn summary(&self, name: &str) -> Option<Summary> {
        summarize(self.samples.get(name)?)
    }

    fn title(&self) -> String {
        let threads = match (self.queues, self.thread_per_queue) {
            (1, _) => "1 queue".to_owned(),
            (n, false) => format!("{n} queues, one thread"),
            (n, true) => format!("{n} queues, a thread each"),
        };
        format!("{}, {threads}, QD{}", self.store, self.depth)
    }
}

/// Takes all samples.
pub(super) fn measure(
    image: &Path,
    scratch: &Path,
    rounds: u32,
    milliseconds: u64,
    smoke: bool,
    strace: bool,
) -> Vec<Row> {
    let mut rows = rows(smoke);
    for round in 1..=rounds {
        eprintln!("alveole-bench: without a guest, round {round} of {rounds}");
        for row in &mut rows {
            if row.failure.is_none()
                && let Err(e) = row.sample(image, milliseconds)
            {
                eprintln!("alveole-bench: {}: FAILED: {e:#}", row.title());
                row.failure = Some(format!("{e:#}"));
            }
        }
    }
    if strace {
        eprintln!("alveole-bench: without a guest, counting system calls");
        let requests = if smoke {
            FEW_TRACED_REQUESTS
        } else {
            TRACED_REQUESTS
        };
        for row in rows.iter_mut().filter(|row| row.failure.is_none()) {
            if let Err(e) = row.trace(image, scratch, requests) {
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
        "\n## Without a guest: random reads of 4 KiB\n\n\
         ns/request: of the clock (one driver thread keeps QD requests in each queue and looks at the rings \
         without sleeping), and of the processor in all other threads; beside it what the driver costs alone. \
         System calls of the device's threads for each request, in a run of their own under strace, which \
         slows the device and so makes batches larger.\n\n\
         | | ns | device CPU ns | driver alone ns | system calls | which |\n|---|---:|---:|---:|---:|---|\n",
    );
    for row in rows {
        if let Some(what) = &row.failure {
            let _ = writeln!(text, "| {} | failed: {what} |||||", row.title());
            continue;
        }
        let show = |name| {
            row.summary(name)
                .map_or("–".to_owned(), |summary| cell(summary, None))
        };
        let (calls, which) = calls_cells(row.calls.as_ref());
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {calls} | {which} |",
            row.title(),
            show(WALL),
            show(CPU),
            show(DRIVER)
        );
    }
    text
}

pub(super) fn json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        json!({
            "store": row.store, "queues": row.queues, "depth": row.depth,
            "thread_per_queue": row.thread_per_queue, "samples": row.samples,
            "system_calls": row.calls, "failure": row.failure,
        })
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_titles() {
        let titles: Vec<_> = rows(false).iter().map(Row::title).collect();
        assert!(
            titles.contains(&"ram, 1 queue, QD1".to_owned()),
            "{titles:?}"
        );
        assert!(titles.contains(&"sync, 4 queues, a thread each, QD32".to_owned()));
        assert!(rows(true).len() < titles.len());
    }
}
