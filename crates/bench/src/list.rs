//! How long `alveole ps -a` takes over many VMs: folders on a disk, half of them kept by this process, which holds their locks.
//!
//! Knows how VMs are written down (`alveole-instance`), and of `alveole` its command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use alveole_agent_protocol::Process;
use alveole_instance::{KeeperLock, Limits, Phase, Record, Restart, Vm, Vms};
use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use crate::stats::{cell, summarize};
use crate::target_dir;

/// What a listing of this many may take.
const AIM_VMS: u32 = 500;
const AIM_MS: f64 = 100.0;

#[derive(Debug, Args)]
pub(crate) struct List {
    /// How many VMs there are
    #[arg(long, value_name = "N", default_value_t = AIM_VMS, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    vms: u32,
    /// How often they are listed [51; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: Option<u32>,
    /// Where the folders are, on a real file system [target/bench]
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// The program that lists [the one of a release build; that of a debug build in a smoke run]
    #[arg(long, value_name = "FILE")]
    alveole: Option<PathBuf>,
    /// Once, and see that all are listed
    #[arg(long)]
    smoke: bool,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn list(args: &List) -> anyhow::Result<ExitCode> {
    let profile = if args.smoke { "debug" } else { "release" };
    let built = target_dir().join(format!("x86_64-unknown-linux-gnu/{profile}/alveole"));
    let program = args.alveole.clone().unwrap_or(built);
    let dir = args.dir.clone().unwrap_or(target_dir().join("bench"));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let home = tempfile::Builder::new().prefix("list.").tempdir_in(&dir)?;
    let vms = Vms::new(&home.path().join("state/vms"), &home.path().join("run/vm"));
    let mut kept = Vec::new();
    for number in 0..args.vms {
        let vm = vms.create(&format!("vm-{number}"), &record(number)?)?;
        if number % 2 == 0 {
            kept.push(keep(&vm)?);
        }
    }
    let rounds = if args.smoke {
        1
    } else {
        args.rounds.unwrap_or(51)
    };
    let rows = [
        ("start of the program alone", &["--version"][..], None),
        ("ps", &["ps"], Some(kept.len() + 1)),
        ("ps -a", &["ps", "-a"], Some(args.vms as usize + 1)),
        (
            "ps -a --format json",
            &["ps", "-a", "--format", "json"],
            None,
        ),
    ];
    let mut samples = vec![Vec::new(); rows.len()];
    // The first round finds nothing in the page cache, and is thrown away.
    for round in 0..=rounds {
        for ((name, words, lines), samples) in rows.iter().zip(&mut samples) {
            let (ms, counted) = once(&program, home.path(), words)?;
            if lines.is_some_and(|lines| lines != counted) {
                bail!("{name} showed {counted} lines of {} VMs", args.vms);
            }
            if round > 0 {
                samples.push(ms);
            }
        }
    }
    println!(
        "{} VMs, {} of them kept; ms of the whole process, median [range] of {rounds}\n",
        args.vms,
        kept.len()
    );
    println!("| | ms |\n|---|---|");
    for ((name, ..), samples) in rows.iter().zip(&samples) {
        let summary = summarize(samples).context("nothing was measured")?;
        println!("| {name} | {} |", cell(summary, None));
    }
    if let Some(file) = &args.json {
        let rows: Vec<_> = rows
            .iter()
            .zip(&samples)
            .map(|((name, ..), samples)| json!({"name": name, "ms": samples}))
            .collect();
        fs::write(
            file,
            format!("{:#}\n", json!({"vms": args.vms, "rows": rows})),
        )
        .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let median = summarize(&samples[2]).map_or(f64::MAX, |summary| summary.median);
    if !args.smoke && args.vms == AIM_VMS && median > AIM_MS {
        eprintln!("alveole-bench: {median} ms are more than the {AIM_MS} that are aimed at");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// How long the program takes, and how many lines it shows.
fn once(program: &Path, home: &Path, words: &[&str]) -> anyhow::Result<(f64, usize)> {
    let begun = Instant::now();
    let output = Command::new(program)
        .args(words)
        .env("ALVEOLE_HOME", home)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let ms = begun.elapsed().as_secs_f64() * 1000.0;
    if !output.status.success() {
        bail!(
            "{words:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok((ms, output.stdout.iter().filter(|b| **b == b'\n').count()))
}

fn keep(vm: &Vm) -> anyhow::Result<KeeperLock> {
    let phase = Phase {
        phase: "running".into(),
        started_ms: 1_700_000_000_000,
        restarts: 0,
        monitor_pid: Some(1),
        keeper_pid: std::process::id(),
        cpus: 1,
        memory_mib: 256,
        main_pid: None,
        network: Vec::new(),
    };
    fs::write(vm.at("phase.json"), serde_json::to_vec_pretty(&phase)?)?;
    Ok(vm.lock()?)
}

/// As `alveole run` writes it, with what images of a usual size say.
fn record(number: u32) -> anyhow::Result<Record> {
    let variable = |n: u32| {
        (
            format!("VARIABLE_{n}"),
            format!("value of {number} and {n}"),
        )
    };
    Ok(Record {
        version: Record::VERSION,
        id: Record::new_id()?,
        image: "docker.io/library/debian:12".into(),
        image_id: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef".into(),
        created_ms: 1_700_000_000_000 + u64::from(number),
        root_disk: "/var/lib/alveole/images/roots/0123456789abcdef.erofs".into(),
        kernel: "linux-6.1".into(),
        cpus: 1,
        memory_mib: 256,
        disk_bytes: Some(10 << 30),
        read_only: false,
        hostname: format!("vm-{number}"),
        network: vec!["--net=user".into(), format!("--name=vm-{number}")],
        process: Process {
            args: vec!["/bin/sh".into(), "-c".into(), "exec serve".into()],
            env: (0..10).map(variable).collect(),
            ..Process::default()
        },
        stop_signal: 15,
        labels: [("tier".to_owned(), "front".to_owned())].into(),
        restart: Restart::No,
        remove: false,
        shm_bytes: None,
        cpu_config: None,
        published_free: Vec::new(),
        volumes: Vec::new(),
        limits: Limits::default(),
    })
}
