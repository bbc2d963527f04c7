//! Networks: what a frame costs without a guest.
//!
//! This file reads the command line and puts the parts together.

mod bare;
mod cell;
mod ring;

use std::process::{Command, ExitCode};

use anyhow::Context;
pub(crate) use cell::{Cell, run as run_cell};
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::{host, run};

#[derive(Debug, Args)]
pub(crate) struct Net {
    /// How often everything is measured [5; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How long each sample takes [1000; 200 in a smoke run]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=100_000))]
    milliseconds: Option<u64>,
    /// Only rows in whose title one of these stands
    #[arg(long, value_name = "TITLES", value_delimiter = ',')]
    columns: Vec<String>,
    /// Without a guest; there is no other part yet
    #[arg(long, value_enum, default_value = "bare")]
    part: Part,
    /// Once, and short
    #[arg(long)]
    smoke: bool,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Bare,
}

pub(crate) fn net(args: &Net) -> anyhow::Result<ExitCode> {
    let Part::Bare = args.part;
    let rounds = args.rounds.unwrap_or(if args.smoke { 1 } else { 5 });
    let milliseconds = args
        .milliseconds
        .unwrap_or(if args.smoke { 200 } else { 1000 });
    let strace = Command::new("strace").arg("-V").output().is_ok();
    if !strace {
        eprintln!("alveole-bench: strace IS MISSING: system calls are not counted");
    }
    let scratch = tempfile::Builder::new().prefix("net.").tempdir()?;
    run::end_on_signals(scratch.path().to_owned())?;
    let conditions = host::Conditions::now(&[]);
    let rows = bare::measure(scratch.path(), rounds, milliseconds, strace, &args.columns);
    let mut text = String::from("# Bench: net\n\n");
    let mut lines = conditions.lines();
    lines.retain(|line| !line.starts_with("Guest kernel"));
    lines.push(format!(
        "n = {rounds}, rounds in turn, {milliseconds} ms each"
    ));
    for line in lines {
        text += &format!("- {line}\n");
    }
    text += &bare::markdown(&rows);
    print!("{text}");
    if let Some(path) = &args.json {
        let all = json!({
            "bench": "net", "conditions": conditions.json(), "bare": bare::json(&rows),
        });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if bare::failed(&rows) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
