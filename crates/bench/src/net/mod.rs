//! Networks: what a frame costs without a guest; then ping and iperf3 between the host and a guest over one tap, and
//! sockets by vsock, under every VMM in turn.
//!
//! This file reads the command line and puts the parts together. `tools/bench` builds what is measured, finds the
//! guest kernel and makes an initramfs with iperf3 in it.

mod bare;
mod cell;
mod jobs;
mod request;
mod ring;
mod table;
mod tap;
mod vsock;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
pub(crate) use cell::{Cell, run as run_cell};
use clap::{Args, ValueEnum};
use serde_json::json;
use table::Column;

use crate::attempts::in_turn;
use crate::vmm::Kind;
use crate::{host, run, vmm};

/// The command line of every guest.
const ARGUMENTS: &str = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable";
/// How long a guest may take until it listens, natively and in the lab.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(180));

#[derive(Debug, Args)]
pub(crate) struct Net {
    /// How often everything is measured [3; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How long each sample without a guest takes [1000; 200 in a smoke run]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=100_000))]
    milliseconds: Option<u64>,
    /// How long each job in a guest takes in each round [3; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: Option<u32>,
    /// The guest kernel, an ELF file
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's initramfs, with iperf3 and resources/guest/bench-net in it
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Guest memory
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(256..=1 << 20))]
    memory: u64,
    /// Guest processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// A VMM and where it is; names begin with alveole, firecracker, cloud-hypervisor or qemu; one whose name
    /// ends in -pci gets its interface by PCI
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Measure these only
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// One more word for the command line of ours
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    alveole_option: Vec<String>,
    /// Only rows without a guest, and columns with one, in whose title one of these stands
    #[arg(long, value_name = "TITLES", value_delimiter = ',')]
    columns: Vec<String>,
    /// These jobs only
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = jobs::names())]
    jobs: Vec<String>,
    /// Without a guest, in a guest, or both
    #[arg(long, value_enum, default_value = "both")]
    part: Part,
    /// Ours only, once and short
    #[arg(long)]
    smoke: bool,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Bare,
    Guest,
    Both,
}

pub(crate) fn net(args: &Net) -> anyhow::Result<ExitCode> {
    let rounds = args.rounds.unwrap_or(if args.smoke { 1 } else { 3 });
    let (mut columns, mut missing) = if args.part == Part::Bare {
        (Vec::new(), Vec::new())
    } else {
        find_columns(args)?
    };
    let strace = Command::new("strace").arg("-V").output().is_ok();
    if !strace && args.part != Part::Guest {
        missing.push("strace IS MISSING: system calls are not counted".into());
    }
    for line in &missing {
        eprintln!("alveole-bench: {line}");
    }
    let scratch = tempfile::Builder::new().prefix("alveole-net.").tempdir()?;
    let scratch_path = fs::canonicalize(scratch.path())?;
    run::end_on_signals(vec![scratch_path.clone()])?;
    let kernel_bytes = match &args.kernel {
        Some(kernel) => host::warm(kernel)?,
        None => Vec::new(),
    };
    let conditions = host::Conditions::now(&kernel_bytes);
    drop(kernel_bytes);
    let mut lines = conditions.lines();
    lines.retain(|line| args.part != Part::Bare || !line.starts_with("Guest kernel"));
    lines.push(format!("n = {rounds}, rounds in turn"));

    let mut rows = Vec::new();
    if args.part != Part::Guest {
        let milliseconds = args
            .milliseconds
            .unwrap_or(if args.smoke { 200 } else { 1000 });
        lines.push(format!("Without a guest: {milliseconds} ms each"));
        rows = bare::measure(&scratch_path, rounds, milliseconds, strace, &args.columns);
    }
    if args.part != Part::Bare {
        let plan = plan(args, &scratch_path, conditions.in_lab)?;
        lines.push(format!(
            "Guests: {} CPUs, {} MiB; `{ARGUMENTS}`; each job {} s; one tap, one pair of queues; iperf3's server in the guest; vsock by the VMM's unix socket",
            plan.cpus, plan.memory_mib, plan.seconds
        ));
        run_rounds(&plan, &mut columns, rounds)?;
    }

    let mut text = String::from("# Bench: net\n\n");
    for line in &lines {
        text += &format!("- {line}\n");
    }
    for line in &missing {
        text += &format!("- **{line}**\n");
    }
    if args.part != Part::Guest {
        text += &bare::markdown(&rows);
    }
    if args.part != Part::Bare {
        text += &table::markdown(&columns);
    }
    print!("{text}");
    if let Some(file) = &args.json {
        let all = json!({
            "bench": "net", "conditions": conditions.json(), "notes": lines, "missing": missing,
            "bare": bare::json(&rows), "guest": table::json(&columns),
        });
        fs::write(file, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    // Peers may fail as they like; ours may not.
    let failed = bare::failed(&rows)
        || columns
            .iter()
            .any(|column| column.vmm.kind == Kind::Alveole && column.samples.is_empty());
    if failed {
        eprintln!("alveole-bench: our own network failed");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn find_columns(args: &Net) -> anyhow::Result<(Vec<Column>, Vec<String>)> {
    let ours = crate::target_dir().join("x86_64-unknown-linux-gnu/release/alveole-vmm");
    let mut only = args.only.clone();
    if args.smoke && only.is_empty() {
        only.push("alveole".into());
    }
    let (vmms, mut missing) = vmm::find(&ours, &args.vmm, &only)?;
    let vhost = fs::metadata("/dev/vhost-net").is_ok();
    if !vhost {
        missing.push("no /dev/vhost-net: NOBODY IS MEASURED WITH IT".to_owned());
    }
    let mut columns = table::columns(vmms, &args.alveole_option, vhost, args.smoke);
    columns.retain(|column| {
        args.columns.is_empty() || args.columns.iter().any(|part| column.name.contains(part))
    });
    if columns.is_empty() {
        bail!("there is nothing to measure in a guest");
    }
    Ok((columns, missing))
}

fn plan(args: &Net, scratch: &Path, in_lab: bool) -> anyhow::Result<jobs::Plan> {
    let path = |path: &Option<PathBuf>, name: &str| -> anyhow::Result<PathBuf> {
        let path = path
            .as_deref()
            .with_context(|| format!("--{name} is missing"))?;
        fs::canonicalize(path).with_context(|| format!("--{name} {}", path.display()))
    };
    Ok(jobs::Plan {
        kernel: path(&args.kernel, "kernel")?,
        initrd: path(&args.initrd, "initrd")?,
        memory_mib: args.memory,
        cpus: args.cpus,
        arguments: ARGUMENTS.to_owned(),
        seconds: args.seconds.unwrap_or(if args.smoke { 1 } else { 3 }),
        jobs: jobs::chosen(&args.jobs),
        patience: if in_lab { PATIENCE.1 } else { PATIENCE.0 },
        scratch: scratch.to_owned(),
    })
}

fn run_rounds(plan: &jobs::Plan, columns: &mut [Column], rounds: u32) -> anyhow::Result<()> {
    let started = Instant::now();
    let tap = tap::Tap::make()?;
    for (round, index) in in_turn(rounds, columns.len()) {
        let column = &mut columns[index];
        if column.attempts.given_up() {
            continue;
        }
        eprintln!(
            "alveole-bench: {} s: round {} of {rounds}: {}",
            started.elapsed().as_secs(),
            round + 1,
            column.name
        );
        measure(plan, &tap, column);
    }
    Ok(())
}

fn measure(plan: &jobs::Plan, tap: &tap::Tap, column: &mut Column) {
    let mut samples = Vec::new();
    let mut outcome = plan.run(tap, column, &mut samples);
    if let Err(what) = &outcome
        && column.vmm.learn(what)
    {
        outcome = plan.run(tap, column, &mut samples);
    }
    if let Err(what) = &outcome {
        eprintln!("alveole-bench: {} FAILED: {what}", column.name);
    }
    for (row, value) in samples {
        column.samples.entry(row).or_default().push(value);
    }
    column.attempts.note(outcome);
}
