//! The API: from the start of the process to the first answer, what a request takes, and from `InstanceStart` to the guest's
//! first instruction; of ours and of Firecracker, in turn, on one connection each.
//!
//! The guest is a kernel of a dozen bytes, whose first instructions write a byte to the serial port. Knows
//! Firecracker's API.

#[path = "../../../tests/tiny_guest/code.rs"]
pub(crate) mod code;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use rustix::fs::inotify;
use serde_json::json;

use crate::attempts::{Attempts, in_turn};
use crate::client::Client;
use crate::stats::{Summary, cell, figure, summarize};
use crate::vmm::{Kind, Vmm, utf8};
use crate::{host, run, vmm};

/// Devices of the machine whose counters are read: drives.
const DEVICES: usize = 8;
/// What the guest writes first: no program's log has it.
const MARKER: u8 = 0x07;
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(20);
/// A run that failed so often in a row is not tried again.
const MOST_FAILURES: u32 = 3;

#[derive(Debug, Args)]
pub(crate) struct Api {
    /// How often everything is measured [11; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How often each request is made in each round; its sample is the median
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// A VMM and where it is; names begin with alveole or firecracker
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Measure these only
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Ours only, once
    #[arg(long)]
    smoke: bool,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is measured. Times of requests are of the whole exchange, as a client waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Row {
    Ready,
    GetInstance,
    GetConfig,
    PutMachine,
    PatchMachine,
    PutDrive,
    Start,
    GetRunning,
    PatchDrive,
    Pause,
    Resume,
    Flush,
    Scrape,
}

impl Row {
    const ALL: [Self; 13] = [
        Self::Ready,
        Self::GetInstance,
        Self::GetConfig,
        Self::PutMachine,
        Self::PatchMachine,
        Self::PutDrive,
        Self::Start,
        Self::GetRunning,
        Self::PatchDrive,
        Self::Pause,
        Self::Resume,
        Self::Flush,
        Self::Scrape,
    ];

    /// The name in JSON, and the title in the table.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Ready => ("ready_us", "process start → first answer"),
            Self::GetInstance => ("get_instance_us", "GET /"),
            Self::GetConfig => ("get_config_us", "GET /vm/config, 8 drives"),
            Self::PutMachine => ("put_machine_us", "PUT /machine-config"),
            Self::PatchMachine => ("patch_machine_us", "PATCH /machine-config"),
            Self::PutDrive => ("put_drive_us", "PUT /drives/{id}, each of 8 once"),
            Self::Start => ("start_us", "InstanceStart → first guest instruction"),
            Self::GetRunning => ("get_running_us", "GET / of a running guest"),
            Self::PatchDrive => ("patch_drive_us", "PATCH /drives/{id}, limits, running"),
            Self::Pause => ("pause_us", "PATCH /vm Paused"),
            Self::Resume => ("resume_us", "PATCH /vm Resumed"),
            Self::Flush => ("flush_us", "FlushMetrics, 8 drives"),
            Self::Scrape => ("scrape_us", "GET /metrics, 8 drives"),
        }
    }

    /// What ours may take, as a part of what the best peer takes.
    fn aim(self) -> Option<f64> {
        match self {
            Self::Ready => Some(0.5),
            // Peers have none.
            Self::Scrape => None,
            _ => Some(1.0),
        }
    }
}

struct Column {
    vmm: Vmm,
    /// In microseconds, one of each round.
    samples: BTreeMap<Row, Vec<f64>>,
    attempts: Attempts,
}

impl Column {
    fn summary(&self, row: Row) -> Option<Summary> {
        summarize(self.samples.get(&row)?)
    }
}

pub(crate) fn api(args: &Api) -> anyhow::Result<ExitCode> {
    let ours = crate::target_dir().join("x86_64-unknown-linux-gnu/release/alveole-vmm");
    let only = match (args.smoke, args.only.is_empty()) {
        (true, true) => vec!["alveole".into()],
        (false, true) => vec!["alveole".into(), "firecracker".into()],
        _ => args.only.clone(),
    };
    let (mut vmms, missing) = vmm::find(&ours, &args.vmm, &only)?;
    vmms.retain(|vmm| matches!(vmm.kind, Kind::Alveole | Kind::Firecracker));
    for line in &missing {
        eprintln!("alveole-bench: {line}");
    }
    if vmms.is_empty() {
        bail!("there is nothing to measure");
    }
    let scratch = tempfile::Builder::new().prefix("alveole-api.").tempdir()?;
    let scratch = fs::canonicalize(scratch.path()).map(|path| (path, scratch))?;
    run::end_on_signals(vec![scratch.0.clone()])?;
    let kernel = code::tiny_kernel(&guest());
    fs::write(scratch.0.join("kernel"), &kernel)?;
    for drive in 0..DEVICES {
        File::create(scratch.0.join(format!("drive{drive}")))?.set_len(1 << 20)?;
    }
    let conditions = host::Conditions::now(&kernel);

    let rounds = args.rounds.unwrap_or(if args.smoke { 1 } else { 11 });
    let mut columns: Vec<_> = vmms
        .into_iter()
        .map(|vmm| Column {
            vmm,
            samples: BTreeMap::new(),
            attempts: Attempts::new(MOST_FAILURES),
        })
        .collect();
    // The first round finds neither programs nor files in memory, and does not count.
    let warm_up = u32::from(!args.smoke);
    for (round, index) in in_turn(rounds + warm_up, columns.len()) {
        let column = &mut columns[index];
        if !column.attempts.given_up() {
            measure(column, args.requests, &scratch.0, round >= warm_up);
        }
    }

    let mut lines = conditions.lines();
    lines.retain(|line| !line.starts_with("Guest kernel"));
    lines.push(format!(
        "n = {rounds}, rounds in turn; microseconds; a request's sample is the median of {} on one connection",
        args.requests
    ));
    print!("{}", markdown(&lines, &missing, &columns));
    if let Some(file) = &args.json {
        let all = json!({
            "bench": "api", "conditions": conditions.json(), "notes": lines, "missing": missing,
            "columns": columns.iter().map(|column| {
                let samples: serde_json::Map<_, _> = column.samples.iter()
                    .map(|(row, samples)| (row.names().0.into(), json!(samples)))
                    .collect();
                json!({"name": column.vmm.name, "version": column.vmm.version, "samples": samples, "failures": column.attempts.failures})
            }).collect::<Vec<_>>(),
        });
        fs::write(file, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    // Peers may fail as they like; ours may not.
    let failed =
        |column: &Column| column.vmm.kind == Kind::Alveole && !column.attempts.failures.is_empty();
    Ok(if columns.iter().any(failed) {
        eprintln!("alveole-bench: our own API failed");
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Writes the marker to the serial port, then sleeps.
fn guest() -> Vec<u8> {
    // mov dx, 0x3f8; mov al, MARKER; out dx, al; hlt; jmp to it
    vec![0x66, 0xba, 0xf8, 0x03, 0xb0, MARKER, 0xee, 0xf4, 0xeb, 0xfd]
}

fn measure(column: &mut Column, requests: u32, scratch: &Path, counts: bool) {
    let mut samples = Vec::new();
    let outcome = one_life(&column.vmm, requests, scratch, &mut samples);
    if let Err(error) = &outcome {
        eprintln!("alveole-bench: {} FAILED: {error:#}", column.vmm.name);
    }
    column
        .attempts
        .note(outcome.map_err(|error| format!("{error:#}")));
    if counts {
        for (row, time) in samples {
            column.samples.entry(row).or_default().push(micros(time));
        }
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// One process from its start to its end by a signal.
fn one_life(
    vmm: &Vmm,
    requests: u32,
    scratch: &Path,
    samples: &mut Vec<(Row, Duration)>,
) -> anyhow::Result<()> {
    let folder = scratch.join("socket");
    fs::create_dir_all(&folder)?;
    let socket = folder.join("api");
    let _ = fs::remove_file(&socket);
    let mut words = vec!["--api-sock", utf8(&socket)?, "--level", "Error"];
    if vmm.kind == Kind::Alveole {
        words.extend(["--console", "stdio"]);
    }
    let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
    let arrival = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&arrival, &folder, inotify::WatchFlags::CREATE)?;
    let stderr = scratch.join("stderr");
    let start = Instant::now();
    let mut run = run::Run::start(vmm.path.as_os_str(), &words, &stderr, PATIENCE)?;
    let mut client = Client::connect(&socket, &arrival, PATIENCE)?;
    client.ask("GET", "/", "")?;
    samples.push((Row::Ready, start.elapsed()));

    let mut many = |client: &mut Client, row: Row, method: &str, path: &str, body: &str| {
        let times: anyhow::Result<Vec<_>> = (0..requests)
            .map(|_| client.ask(method, path, body))
            .collect();
        times.map(|times| samples.push((row, median(times))))
    };
    many(&mut client, Row::GetInstance, "GET", "/", "")?;
    let machine = r#"{"vcpu_count": 1, "mem_size_mib": 128}"#;
    many(
        &mut client,
        Row::PutMachine,
        "PUT",
        "/machine-config",
        machine,
    )?;
    let memory = r#"{"mem_size_mib": 128}"#;
    many(
        &mut client,
        Row::PatchMachine,
        "PATCH",
        "/machine-config",
        memory,
    )?;
    let kernel = json!({"kernel_image_path": utf8(&scratch.join("kernel"))?});
    client.ask("PUT", "/boot-source", &kernel.to_string())?;
    let metrics = scratch.join("metrics");
    let _ = fs::remove_file(&metrics);
    File::create(&metrics)?;
    let to = json!({"metrics_path": utf8(&metrics)?}).to_string();
    client.ask("PUT", "/metrics", &to)?;
    let mut drives = Vec::new();
    for drive in 0..DEVICES {
        let path = scratch.join(format!("drive{drive}"));
        let body = json!({"drive_id": format!("d{drive}"), "path_on_host": utf8(&path)?, "is_root_device": false});
        drives.push(client.ask("PUT", &format!("/drives/d{drive}"), &body.to_string())?);
    }
    many(&mut client, Row::GetConfig, "GET", "/vm/config", "")?;

    let sent = Instant::now();
    client.send("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#)?;
    run.wait_for(MARKER).map_err(anyhow::Error::msg)?;
    let started = sent.elapsed();
    client.receive()?;
    many(&mut client, Row::GetRunning, "GET", "/", "")?;
    let bucket = r#"{"size": 1000000, "refill_time": 100}"#;
    let limits = format!(r#"{{"drive_id": "d0", "rate_limiter": {{"ops": {bucket}}}}}"#);
    many(&mut client, Row::PatchDrive, "PATCH", "/drives/d0", &limits)?;
    let flush = r#"{"action_type": "FlushMetrics"}"#;
    many(&mut client, Row::Flush, "PUT", "/actions", flush)?;
    if vmm.kind == Kind::Alveole {
        many(&mut client, Row::Scrape, "GET", "/metrics", "")?;
    }
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..requests {
        pauses.push(client.ask("PATCH", "/vm", r#"{"state": "Paused"}"#)?);
        resumes.push(client.ask("PATCH", "/vm", r#"{"state": "Resumed"}"#)?);
    }
    samples.extend([
        (Row::PutDrive, median(drives)),
        (Row::Start, started),
        (Row::Pause, median(pauses)),
        (Row::Resume, median(resumes)),
    ]);
    // Dropped, its group is killed.
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn markdown(lines: &[String], missing: &[String], columns: &[Column]) -> String {
    let mut text = String::from("# Bench: api\n\n");
    for line in lines {
        text += &format!("- {line}\n");
    }
    for line in missing {
        text += &format!("- **{line}**\n");
    }
    for column in columns {
        text += &format!("- {}: {}\n", column.vmm.name, column.vmm.version);
    }
    text += "\n| µs |";
    for column in columns {
        text += &format!(" {} |", column.vmm.name);
    }
    text += &format!("\n|---|{}\n", "---|".repeat(columns.len()));
    for row in Row::ALL {
        let ours = columns
            .iter()
            .find(|column| column.vmm.kind == Kind::Alveole)
            .and_then(|column| column.summary(row));
        text += &format!("| {} |", row.names().1);
        for column in columns {
            let reference = ours.filter(|_| column.vmm.kind != Kind::Alveole);
            let of = |summary| cell(summary, reference.map(|ours| ours.median));
            text += &format!(" {} |", column.summary(row).map_or("–".into(), of));
        }
        text += "\n";
    }
    text += "\nIn brackets behind a range: times ours.\n\n";
    text += &aims(columns);
    for column in columns {
        for failure in &column.attempts.failures {
            text += &format!("- {} failed: {failure}\n", column.vmm.name);
        }
    }
    text
}

fn aims(columns: &[Column]) -> String {
    let mut text = String::new();
    let is_ours = |column: &&Column| column.vmm.kind == Kind::Alveole;
    for row in Row::ALL {
        let Some(aim) = row.aim() else { continue };
        let ours = columns.iter().find(is_ours).and_then(|c| c.summary(row));
        let peers = columns.iter().filter(|column| !is_ours(column));
        let peers = peers.filter_map(|column| Some((column.summary(row)?.median, column)));
        let best = peers.min_by(|a, b| a.0.total_cmp(&b.0));
        if let (Some(ours), Some((peer, column))) = (ours, best) {
            let met = if ours.median <= aim * peer {
                "met"
            } else {
                "**missed**"
            };
            text += &format!(
                "- {}, at most {aim} x: {met}: {} against {} of {} ({:.2}x)\n",
                row.names().1,
                figure(ours.median),
                figure(peer),
                column.vmm.name,
                ours.median / peer
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aims_are_judged() {
        let column = |name: &str, ready: f64| {
            let named = format!("{name}=/bin/true");
            let (mut vmms, _) = vmm::find(Path::new("/x"), &[named], &[name.into()]).unwrap();
            Column {
                vmm: vmms.remove(0),
                samples: BTreeMap::from([
                    (Row::Ready, vec![ready]),
                    (Row::GetInstance, vec![10.0]),
                ]),
                attempts: Attempts::new(MOST_FAILURES),
            }
        };
        let text = markdown(
            &[],
            &[],
            &[column("alveole", 60.0), column("firecracker", 100.0)],
        );
        for want in [
            "| process start → first answer | 60 | 100 (1.67x) |",
            "process start → first answer, at most 0.5 x: **missed**: 60 against 100 of firecracker (0.60x)",
            "GET /, at most 1 x: met: 10 against 10 of firecracker (1.00x)",
            "| GET /metrics, 8 drives | – | – |",
        ] {
            assert!(text.contains(want), "{want}\n{text}");
        }
    }
}
