//! `alveole stats`: what VMs use, as this host and as they themselves see it.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use alveole_instance::{Vm, Vms};
use anyhow::Context;
use serde_json::json;

use super::sample::{UNKNOWN, Usage, samples, used_between};
use super::{Format, table};
use crate::print;
use crate::size::human;

/// Between two samples, of which one line is made.
const INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal and goes to its beginning (ECMA-48, ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";

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
            let lines = used_between(&before, &now);
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

fn as_text(lines: &[(Vm, Usage)]) -> String {
    let rows = lines.iter().map(|(vm, usage)| {
        vec![
            vm.name.clone(),
            format!("{:.1}", usage.cpu_guest_percent),
            format!("{:.1}", usage.cpu_monitor_percent),
            usage.pss_bytes.map_or(UNKNOWN.into(), human),
            usage.memory_bytes.map_or(UNKNOWN.into(), |(used, all)| {
                format!("{} / {}", human(used), human(all))
            }),
            pair(usage.disk),
            pair(usage.network),
            usage.tasks.map_or(UNKNOWN.into(), |n| n.to_string()),
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

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates in bytes"
)]
fn pair(pair: Option<(f64, f64)>) -> String {
    pair.map_or(UNKNOWN.into(), |(a, b)| {
        format!("{} / {}", human(a as u64), human(b as u64))
    })
}

fn as_json(lines: &[(Vm, Usage)]) -> anyhow::Result<String> {
    let lines: Vec<_> = lines
        .iter()
        .map(|(vm, usage)| {
            let mut line = usage.as_json();
            line["name"] = json!(vm.name);
            line
        })
        .collect();
    // A line each time: whoever follows reads one after the other.
    let json = serde_json::to_string(&lines).context("cannot write JSON")?;
    Ok(format!("{json}\n"))
}
