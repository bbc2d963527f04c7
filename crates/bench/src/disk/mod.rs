//! Disks: what a request costs without a guest, and fio in a guest under every VMM, in turn.
//!
//! This file reads the command line and puts the parts together. `tools/bench` builds what is measured,
//! finds the guest kernel and makes an initramfs with fio in it.

mod bare;
mod cell;
mod columns;
mod jobs;
mod rings;
mod table;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
pub(crate) use cell::{Cell, run as run_cell};
use clap::{Args, ValueEnum};
use columns::{Column, Who};
use serde_json::json;

use crate::attempts::in_turn;
use crate::{host, run, vmm};

/// The command line of every guest; the jobs are added.
const ARGUMENTS: &str = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable";
/// Beside the jobs, natively and in the lab.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(300));

#[derive(Debug, Args)]
pub(crate) struct Disk {
    /// How often everything is measured [3; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How long each job takes in each round [3; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: Option<u32>,
    /// The guest kernel, an ELF file [$ALVEOLE_NATIVE_KERNEL, or Debian's stock kernel]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's initramfs, with fio and resources/guest/bench-disk in it
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Guest memory
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(256..=1 << 20))]
    memory: u64,
    /// Guest processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Size of the image [1024; 128 in a smoke run]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    size: Option<u64>,
    /// A directory for the image, on a real file system
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// A VMM and where it is; names begin with alveole, firecracker, cloud-hypervisor or qemu; a peer whose
    /// name ends in -pci gets its disk by PCI
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Measure these only: VMMs, or `host`
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// One more word for the command line of ours
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    alveole_option: Vec<String>,
    /// More columns of ours, with these words as well: `pci=--enable-pci`
    #[arg(long, value_name = "NAME=WORDS", allow_hyphen_values = true)]
    variant: Vec<String>,
    /// Of the columns with a guest, and of the host, only those in whose title one of these stands
    #[arg(long, value_name = "TITLES", value_delimiter = ',')]
    columns: Vec<String>,
    /// These jobs only
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = jobs::job_names())]
    jobs: Vec<String>,
    /// Without a guest, in a guest, or both
    #[arg(long, value_enum, default_value = "both")]
    part: Part,
    /// Ours only, buffered only, once and short, on a small image
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

pub(crate) fn disk(args: &Disk) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let rounds = args.rounds.unwrap_or(if args.smoke { 1 } else { 3 });
    let seconds = args.seconds.unwrap_or(if args.smoke { 1 } else { 3 });
    let size_mib = args.size.unwrap_or(if args.smoke { 128 } else { 1024 });
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

    let dir = args
        .dir
        .clone()
        .unwrap_or_else(|| crate::target_dir().join("bench"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let scratch = tempfile::Builder::new()
        .prefix("disk.")
        .tempdir_in(&dir)
        .with_context(|| format!("cannot write to {}", dir.display()))?;
    let scratch_path = fs::canonicalize(scratch.path())?;
    run::end_on_signals(vec![scratch_path.clone()])?;
    let image = scratch_path.join("image");
    fill(&image, size_mib)?;

    let (kernel, kernel_bytes) = match &args.kernel {
        Some(kernel) => (fs::canonicalize(kernel)?, host::warm(kernel)?),
        None => (PathBuf::new(), Vec::new()),
    };
    let conditions = host::Conditions::now(&kernel_bytes);
    drop(kernel_bytes);
    let mut notes = vec![format!(
        "Image: {size_mib} MiB, written fully; n = {rounds}, rounds in turn"
    )];
    if args.part != Part::Bare {
        notes.push(format!(
            "Guests: {} CPUs, {} MiB, each job {seconds} s; `{ARGUMENTS}`",
            args.cpus, args.memory
        ));
    }

    let rows = if args.part == Part::Guest {
        Vec::new()
    } else {
        let milliseconds = if args.smoke { 100 } else { 500 };
        bare::measure(
            &image,
            &scratch_path,
            rounds,
            milliseconds,
            args.smoke,
            strace,
        )
    };
    if args.part != Part::Bare {
        let patience = if conditions.in_lab {
            PATIENCE.1
        } else {
            PATIENCE.0
        };
        let plan = jobs::Plan {
            kernel,
            initrd: args
                .initrd
                .as_deref()
                .map(fs::canonicalize)
                .context("--initrd is missing")??,
            image,
            memory_mib: args.memory,
            cpus: args.cpus,
            arguments: ARGUMENTS.to_owned(),
            seconds,
            jobs: jobs::chosen(&args.jobs),
            patience,
            scratch: scratch_path,
        };
        run_rounds(&plan, &mut columns, rounds, started);
    }

    let mut text = String::from("# Bench: disk\n\n");
    let mut lines = conditions.lines();
    lines.retain(|line| args.part != Part::Bare || !line.starts_with("Guest kernel"));
    for line in lines.iter().chain(&notes) {
        text += &format!("- {line}\n");
    }
    let mut versions = Vec::new();
    for column in &columns {
        if let Who::Guest(vmm) = &column.who {
            let without = if vmm.without_arch_capabilities {
                " (with `-arch-capabilities`, which this KVM refuses)"
            } else {
                ""
            };
            versions.push(format!("- {}: {}{without}\n", vmm.name, vmm.version));
        }
    }
    versions.dedup();
    text += &versions.concat();
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
            "bench": "disk", "conditions": conditions.json(), "notes": notes, "missing": missing,
            "bare": bare::json(&rows), "guest": table::json(&columns),
        });
        fs::write(file, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    // Peers may fail as they like; ours may not.
    let failed = bare::failed(&rows)
        || columns
            .iter()
            .any(|column| column.is_ours() && column.samples.is_empty());
    if failed {
        eprintln!("alveole-bench: our own disk failed");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn find_columns(args: &Disk) -> anyhow::Result<(Vec<Column>, Vec<String>)> {
    let ours = crate::target_dir().join("x86_64-unknown-linux-gnu/release/alveole-vmm");
    let mut only = args.only.clone();
    let mut host = only.is_empty() && !args.smoke;
    only.retain(|name| {
        host |= name == "host";
        name != "host"
    });
    if args.smoke && only.is_empty() {
        only.push("alveole".into());
    }
    let (vmms, missing) = if only.is_empty() && !args.only.is_empty() {
        (Vec::new(), Vec::new())
    } else {
        vmm::find(&ours, &args.vmm, &only)?
    };
    let mut columns =
        columns::columns(vmms, &args.alveole_option, &args.variant, host, args.smoke)?;
    if !args.columns.is_empty() {
        columns.retain(|column| args.columns.iter().any(|part| column.name.contains(part)));
        if columns.is_empty() {
            bail!(
                "--columns {}: no column has such a title",
                args.columns.join(",")
            );
        }
    }
    if columns
        .iter()
        .any(|column| matches!(column.who, Who::Guest(_)))
    {
        if args.kernel.is_none() {
            bail!("--kernel is missing");
        }
        if let Err(error) = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
        {
            bail!(
                "cannot open /dev/kvm ({error}): run the bench in the lab, with --in-lab, or --part bare"
            );
        }
    }
    Ok((columns, missing))
}

fn run_rounds(plan: &jobs::Plan, columns: &mut [Column], rounds: u32, started: Instant) {
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
        let mut outcome = plan.run(column);
        if let Err(what) = &outcome
            && let Who::Guest(vmm) = &mut column.who
            && vmm.learn(what)
        {
            outcome = plan.run(column);
        }
        if let Err(what) = &outcome {
            eprintln!("alveole-bench: {} FAILED: {what}", column.name);
        }
        let outcome = outcome.map(|samples| {
            for (of, value) in samples {
                column.samples.entry(of).or_default().push(value);
            }
        });
        column.attempts.note(outcome);
    }
}

/// An image of which every block was written, with bytes that are not all the same.
fn fill(image: &Path, size_mib: u64) -> anyhow::Result<()> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut piece = vec![0; 1 << 20];
    let mut write = || {
        let mut file = fs::File::create(image)?;
        for _ in 0..size_mib {
            for word in piece.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&piece)?;
        }
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", image.display()))
}
