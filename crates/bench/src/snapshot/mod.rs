//! Snapshots: how long a guest stands still for one, how soon a copy of it runs, and what many copies of one snapshot take; of ours
//! and of Firecracker, in turn.
//!
//! This file reads the command line and puts the parts together. `tools/bench` builds what is measured and finds the guest kernel.

mod clones;
mod first;
mod life;
mod live;
mod networked;
mod table;
mod template;
mod touches;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;
use table::{Case, Column, Row};

use crate::attempts::in_turn;
use crate::vmm::{Kind, Vmm};
use crate::{guest, host, run, vmm};

/// A file with the body of a `PUT /cpu-config` for every guest that is booted, which the kernel of `ALVEOLE_NATIVE_KERNEL` may need.
const CPU_CONFIG: &str = "ALVEOLE_NATIVE_CPU_CONFIG";
/// How long anything may take, natively and in the lab.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(180));
/// What the guests change for ever, so that there is always something to write again.
const WINDOW_MIB: u64 = 64;
/// Most copies with a network: the largest number of copies that is not above it is measured with one as well.
const MOST_NETWORKED: u64 = 100;
/// Most copies: they take a gigabyte or two of the host, and five threads each.
const MOST_CLONES: u64 = 1000;

#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// How often everything is measured [5; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// The guest kernel, an ELF file
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initramfs of copies with a network; without, there are none
    #[arg(long, value_name = "FILE")]
    net_initrd: Option<PathBuf>,
    /// Memory of the guests that stand still and are restored, half of it filled [256,512,1024; 128 in a smoke run]
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    sizes: Vec<u64>,
    /// Memory of the guests that go on while a snapshot is taken; 0 for none [256,1024,4096; 128 in a smoke run]
    #[arg(long, value_name = "MIB,...", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(0..=1 << 20))]
    live: Vec<u64>,
    /// How many copies are made of one snapshot; 0 for none [1,10,100; 1,2 in a smoke run]
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(0..=MOST_CLONES))]
    clones: Vec<u64>,
    /// Memory of the guest that is copied
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    memory: u64,
    /// Guest processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Where snapshots are, in memory
    #[arg(long, value_name = "PATH", default_value = "/dev/shm")]
    dir: PathBuf,
    /// Measure standing still and restoring with the snapshots here as well, on a disk, and first touches of a file that is cold
    #[arg(long, value_name = "PATH")]
    disk: Option<PathBuf>,
    /// A VMM and where it is; names begin with alveole or firecracker
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Measure these only
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Ours only, once and small
    #[arg(long)]
    smoke: bool,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is the same for all guests.
struct Plan {
    kernel: PathBuf,
    initrd: PathBuf,
    /// Of guests with a network.
    net_initrd: Option<PathBuf>,
    cpus: u32,
    cpu_config: Option<String>,
    patience: Duration,
    /// For sockets and what programs say.
    scratch: PathBuf,
}

pub(crate) fn init_path() -> PathBuf {
    crate::target_dir().join("bench/snapshot-init")
}

pub(crate) fn snapshot(args: &Snapshot) -> anyhow::Result<ExitCode> {
    let smoke = args.smoke;
    let rounds = args.rounds.unwrap_or(if smoke { 1 } else { 5 });
    let sizes = or_default(&args.sizes, if smoke { &[128] } else { &[256, 512, 1024] });
    let mut counts = or_default(&args.clones, if smoke { &[1, 2] } else { &[1, 10, 100] });
    counts.retain(|&count| count != 0);
    let mut lives = or_default(&args.live, if smoke { &[128] } else { &[256, 1024, 4096] });
    lives.retain(|&mib| mib != 0);
    raise_descriptor_limit()?;
    let (vmms, missing) = find(args)?;
    for line in &missing {
        eprintln!("alveole-bench: {line}");
    }

    // Sockets in memory, too, as in /run: on a disk each takes the tenth of a millisecond.
    let scratch = place(&args.dir)?;
    let scratch_path = fs::canonicalize(scratch.path())?;
    let memory = place(&args.dir)?;
    let disk = args.disk.as_deref().map(place).transpose()?;
    let mut folders = vec![scratch_path.clone(), memory.path().to_path_buf()];
    folders.extend(disk.iter().map(|disk| disk.path().to_path_buf()));
    run::end_on_signals(folders)?;
    let kernel = host::warm(&args.kernel)?;
    let conditions = host::Conditions::now(&kernel);
    drop(kernel);
    guest::compile_init(guest::SNAPSHOT_INIT, &init_path())?;
    let initrd = scratch_path.join("initrd");
    guest::write_initramfs(&init_path(), &initrd)?;
    let plan = Plan {
        kernel: fs::canonicalize(&args.kernel)?,
        initrd,
        net_initrd: args.net_initrd.as_ref().map(fs::canonicalize).transpose()?,
        cpus: args.cpus,
        cpu_config: cpu_config()?,
        patience: if conditions.in_lab {
            PATIENCE.1
        } else {
            PATIENCE.0
        },
        scratch: scratch_path,
    };

    // With as many taps as there are copies, and one for the guest that they are copies of.
    let networked = counts
        .iter()
        .copied()
        .filter(|&count| count <= MOST_NETWORKED);
    let taps = match (networked.max(), &plan.net_initrd) {
        (Some(count), Some(_)) => Some(networked::Taps::make(count)?),
        _ => None,
    };
    let mut columns: Vec<_> = vmms.into_iter().map(Column::new).collect();
    let started = Instant::now();
    let mut places = vec![(table::Place::Memory, memory.path())];
    places.extend(disk.iter().map(|disk| (table::Place::Disk, disk.path())));
    for (round, index) in in_turn(rounds, columns.len()) {
        let column = &mut columns[index];
        eprintln!(
            "alveole-bench: {} s: round {} of {rounds}: {}",
            started.elapsed().as_secs(),
            round + 1,
            column.vmm.name
        );
        for &(place, folder) in &places {
            for &mib in &sizes {
                let case = Case { place, number: mib };
                column.measure(case, |vmm, samples| {
                    life::measure(&plan, vmm, mib, WINDOW_MIB, folder, samples)
                });
            }
        }
        let case = Case {
            place: table::Place::Memory,
            number: args.memory,
        };
        column.measure(case, |vmm, add| {
            first::measure(&plan, vmm, args.memory, memory.path(), add)
        });
        // Peers know no such thing.
        let is_ours = column.vmm.kind == Kind::Alveole;
        for &mib in lives.iter().filter(|_| is_ours) {
            let place = table::Place::Live;
            column.measure(Case { place, number: mib }, |vmm, add| {
                live::measure(&plan, vmm, mib, WINDOW_MIB, memory.path(), add)
            });
        }
        for &(place, folder) in &places {
            let is_disk = place == table::Place::Disk;
            let place = match is_disk {
                true => table::Place::Cold,
                false => table::Place::Warm,
            };
            let number = args.memory;
            column.measure_many(Case { place, number }, |vmm, samples| {
                touches::measure(&plan, vmm, number, folder, is_disk, samples)
            });
        }
        if counts.is_empty() {
            continue;
        }
        let case = Case {
            place: table::Place::Clones,
            number: counts[0],
        };
        column.measure_many(case, |vmm, samples| {
            clones::measure(&plan, vmm, args.memory, &counts, memory.path(), samples)
        });
        if let Some(taps) = &taps {
            let case = Case {
                place: table::Place::Networked,
                number: taps.count(),
            };
            column.measure_many(case, |vmm, samples| {
                clones::measure_networked(&plan, vmm, args.memory, taps, memory.path(), samples)
            });
        }
    }

    let mut lines = conditions.lines();
    lines.push(format!(
        "Guests: {} CPUs, half of memory filled, {WINDOW_MIB} MiB of it written again and again; `{}`; n = {rounds}, rounds in turn",
        args.cpus,
        life::ARGUMENTS
    ));
    lines.push(format!(
        "Snapshots in {}{}; copies, and first instructions, of an idle guest of {} MiB",
        args.dir.display(),
        args.disk
            .as_ref()
            .map_or(String::new(), |disk| format!(" and {}", disk.display())),
        args.memory
    ));
    print!("{}", table::markdown(&lines, &missing, &columns));
    if let Some(file) = &args.json {
        let all = json!({
            "bench": "snapshot", "conditions": conditions.json(), "notes": lines, "missing": missing,
            "columns": table::json(&columns),
        });
        fs::write(file, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    // Peers may fail as they like; ours may not.
    let failed =
        |column: &Column| column.vmm.kind == Kind::Alveole && !column.attempts.failures.is_empty();
    Ok(if columns.iter().any(failed) {
        eprintln!("alveole-bench: our own snapshots failed");
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn or_default(given: &[u64], default: &[u64]) -> Vec<u64> {
    if given.is_empty() { default } else { given }.to_vec()
}

fn find(args: &Snapshot) -> anyhow::Result<(Vec<Vmm>, Vec<String>)> {
    let ours = crate::target_dir().join("x86_64-unknown-linux-gnu/release/alveole-vmm");
    let mut only = args.only.clone();
    if only.is_empty() {
        only.push("alveole".into());
        if !args.smoke {
            only.push("firecracker".into());
        }
        // Columns that are named are wanted.
        only.extend(
            args.vmm
                .iter()
                .filter_map(|text| Some(text.split_once('=')?.0.to_owned())),
        );
    }
    let (mut vmms, missing) = vmm::find(&ours, &args.vmm, &only)?;
    vmms.retain(|vmm| matches!(vmm.kind, Kind::Alveole | Kind::Firecracker));
    if vmms.is_empty() {
        bail!("there is nothing to measure: {}", missing.join("; "));
    }
    Ok((vmms, missing))
}

/// Each copy takes four descriptors.
fn raise_descriptor_limit() -> anyhow::Result<()> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context("cannot raise the limit on open files")
}

/// A folder of its own for snapshots.
fn place(dir: &Path) -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("alveole-snapshot.")
        .tempdir_in(dir)
        .with_context(|| format!("cannot write to {}", dir.display()))
}

fn cpu_config() -> anyhow::Result<Option<String>> {
    let Some(file) = std::env::var_os(CPU_CONFIG) else {
        return Ok(None);
    };
    let text = fs::read_to_string(&file).with_context(|| {
        format!(
            "cannot read {}, which {CPU_CONFIG} names",
            Path::new(&file).display()
        )
    })?;
    Ok(Some(text))
}

/// Samples of one life.
type Samples = Vec<(Case, Row, f64)>;

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
