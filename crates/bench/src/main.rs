//! Our speed beside the peers', in one run: boots the same guest under every VMM in turn.
//!
//! This file reads the command line and puts the parts together. `tools/bench` builds what is
//! measured and finds the guest kernel. It does not know how either is done.

mod api;
mod attempts;
mod cells;
mod client;
mod cpio;
mod disk;
mod guest;
mod host;
mod images;
mod list;
mod machine;
mod measure;
mod metrics;
mod net;
mod report;
mod results;
mod run;
mod smaps;
mod snapshot;
mod stats;
mod trace;
mod vmm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use measure::Plan;
use results::{Column, Measure};
use vmm::{Arguments, Guest, Then};

/// Where this crate's workspace is: the program is run out of the tree that it was built from.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
/// How long a run may take, natively and in the lab.
const TIMEOUT_S: (u64, u64) = (20, 90);

#[derive(Debug, Parser)]
#[command(
    name = "tools/bench",
    about = "Measures our VMM beside its peers",
    version
)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Start-up, memory, size and exits of every VMM that is found
    Boot(Boot),
    /// Disks: what a request costs without a guest, and fio in a guest under every VMM that is found
    Disk(disk::Disk),
    /// Networks: iperf3 and ping between the host and a guest under every VMM that is found
    Net(net::Net),
    /// The API: ready after the start of the process, what requests take, and when the guest runs
    Api(api::Api),
    /// Container images: where the time of `alveole run IMAGE` goes, `exec`, and imports
    Run(images::Images),
    /// How long `alveole ps` takes over many VMs
    List(list::List),
    /// Snapshots: how long the guest stands still, how soon a copy runs, and what many copies take
    Snapshot(snapshot::Snapshot),
    /// One cell of `disk` without a guest, in a process of its own
    #[command(hide = true)]
    DiskCell(disk::Cell),
    /// One cell of `net`, in a process of its own
    #[command(hide = true)]
    NetCell(net::Cell),
    /// Compile the guests' inits, so that `boot` and `snapshot` find them ready
    #[command(hide = true)]
    Prepare,
}

#[derive(Debug, Args)]
struct Boot {
    /// How often everything is measured; 1 is a smoke run: one set of arguments, no warm-up, no system calls
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// The guest kernel, an ELF file [$ALVEOLE_NATIVE_KERNEL, or Debian's stock kernel]
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Guest memory (of the memory measure it is 256 MiB always)
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    memory: u64,
    /// Guest processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// A VMM and where it is; names begin with alveole, firecracker, cloud-hypervisor or qemu, so that
    /// `alveole-before=PATH` adds a column
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Measure these VMMs only
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Which sets of kernel arguments to boot with [both; fast in a smoke run]
    #[arg(long, value_enum)]
    arguments: Option<Sets>,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How long a run may take [20; 90 in the lab]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Sets {
    Fast,
    Given,
    Both,
}

fn main() -> ExitCode {
    let done = match Cli::parse().what {
        What::Boot(args) => boot(&args),
        What::Disk(args) => disk::disk(&args),
        What::Net(args) => net::net(&args),
        What::Api(args) => api::api(&args),
        What::Run(args) => images::images(&args),
        What::List(args) => list::list(&args),
        What::Snapshot(args) => snapshot::snapshot(&args),
        What::DiskCell(cell) => disk::run_cell(&cell).map(|()| ExitCode::SUCCESS),
        What::NetCell(cell) => net::run_cell(&cell).map(|()| ExitCode::SUCCESS),
        What::Prepare => guest::compile_init(guest::BOOT_INIT, &init_path())
            .and_then(|()| guest::compile_init(guest::SNAPSHOT_INIT, &snapshot::init_path()))
            .map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("alveole-bench: {error:#}");
        ExitCode::FAILURE
    })
}

fn boot(args: &Boot) -> anyhow::Result<ExitCode> {
    let target = target_dir();
    let ours = target.join("x86_64-unknown-linux-gnu/release/alveole-vmm");
    let (vmms, mut missing) = vmm::find(&ours, &args.vmm, &args.only)?;
    if vmms.is_empty() {
        bail!("there is nothing to measure: {}", missing.join("; "));
    }
    if let Err(error) = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        bail!("cannot open /dev/kvm ({error}): run the bench in the lab, with --in-lab");
    }
    let strace = Command::new("strace").arg("-V").output().is_ok();
    if !strace {
        missing.push("strace IS MISSING: no first KVM_RUN and no system calls are measured".into());
    }
    for vmm in &vmms {
        if let Some(id) = host::running(&vmm.path) {
            missing.push(format!(
                "{} RUNS ALREADY (process {id}): pages shared with it make the PSS look smaller",
                vmm.name
            ));
        }
    }
    for line in &missing {
        eprintln!("alveole-bench: {line}");
    }

    let scratch = tempfile::Builder::new()
        .prefix("alveole-bench.")
        .tempdir()?;
    run::end_on_signals(vec![scratch.path().to_path_buf()])?;
    guest::compile_init(guest::BOOT_INIT, &init_path())?;
    let initrd = scratch.path().join("initrd");
    guest::write_initramfs(&init_path(), &initrd)?;
    let kernel = host::warm(&args.kernel)?;
    let conditions = host::Conditions::now(&kernel);
    drop(kernel);

    let timeout_s = if conditions.in_lab {
        TIMEOUT_S.1
    } else {
        TIMEOUT_S.0
    };
    let smoke = args.runs == 1;
    let guest = Guest {
        kernel: fs::canonicalize(&args.kernel)?,
        initrd,
        memory_mib: args.memory,
        cpus: args.cpus,
        arguments: Arguments::Fast,
        then: Then::End,
    };
    let sets = match args.arguments {
        Some(Sets::Fast) => vec![Arguments::Fast],
        Some(Sets::Given) => vec![Arguments::Given],
        Some(Sets::Both) => vec![Arguments::Fast, Arguments::Given],
        None if smoke => vec![Arguments::Fast],
        None => vec![Arguments::Fast, Arguments::Given],
    };
    let mut notes = vec![format!(
        "Guests: {} CPUs, {} MiB; n = {}, rounds in turn",
        args.cpus, args.memory, args.runs
    )];
    notes.extend(
        sets.iter()
            .map(|set| format!("*{}*: `{}`", set.name(), set.text())),
    );
    let plan = Plan {
        guest,
        sets,
        rounds: args.runs,
        smoke,
        strace,
        timeout: Duration::from_secs(args.timeout.unwrap_or(timeout_s)),
        started: Instant::now(),
        scratch: scratch.path().to_path_buf(),
    };
    let mut columns: Vec<_> = vmms.into_iter().map(Column::new).collect();
    plan.run(&mut columns);
    for column in columns
        .iter()
        .filter(|column| column.vmm.without_arch_capabilities)
    {
        notes.push(format!(
            "{} ran with `-arch-capabilities`, which this KVM refuses",
            column.vmm.name
        ));
    }

    let report = report::Report {
        conditions: &conditions,
        notes: &notes,
        missing: &missing,
        columns: &columns,
        packages: external_packages(),
    };
    print!("{}", report.markdown());
    if let Some(file) = &args.json {
        fs::write(file, format!("{:#}\n", report.json()))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    // Peers may fail as they like; ours may not.
    let boots = |column: &Column| {
        [Measure::InitFast, Measure::InitGiven]
            .iter()
            .any(|m| column.samples.contains_key(m))
    };
    let ours_failed = columns
        .iter()
        .any(|column| column.is_ours() && !boots(column));
    if ours_failed {
        eprintln!("alveole-bench: our own VMM never booted the guest");
    }
    Ok(if ours_failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// How many packages that are not ours the VMM links.
fn external_packages() -> Result<usize, String> {
    let said = Command::new("cargo")
        .args(["tree", "--offline", "--locked", "--package", "alveole-vmm"])
        .args(["--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .current_dir(ROOT)
        .output()
        .map_err(|e| format!("cannot run cargo tree: {e}"))?;
    if !said.status.success() {
        let errors = String::from_utf8_lossy(&said.stderr);
        return Err(format!(
            "cargo tree: {}",
            errors.lines().next().unwrap_or_default()
        ));
    }
    Ok(count_external(&String::from_utf8_lossy(&said.stdout)))
}

/// Ours are shown with their path; a package that was shown before ends in a star.
fn count_external(tree: &str) -> usize {
    let lines = tree.lines().map(|line| line.trim_end_matches(" (*)"));
    let lines = lines.filter(|line| !line.is_empty() && !line.contains("(/"));
    lines.collect::<std::collections::BTreeSet<_>>().len()
}

fn init_path() -> PathBuf {
    target_dir().join("bench/init")
}

fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(ROOT).join("target"), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let parse = |line: &str| Cli::try_parse_from(line.split_whitespace());
        assert!(parse("bench boot --kernel k --only qemu,alveole --vmm a=b --vmm c=d").is_ok());
        assert!(
            parse("bench disk --smoke --variant pci=--enable-pci --alveole-option --x").is_ok()
        );
        assert!(parse("bench api --smoke --requests 10").is_ok());
        assert!(parse("bench run --kernel k --smoke").is_ok());
        assert!(parse("bench list --smoke --vms 5").is_ok());
        assert!(parse("bench snapshot --kernel k --sizes 256,512 --clones 1,10 --disk d").is_ok());
        assert!(parse("bench snapshot --kernel k --sizes 32").is_err());
        assert!(parse("bench boot").is_err());
        assert!(parse("bench boot --kernel k --runs 0").is_err());
    }

    #[test]
    fn external_packages_are_counted_once() {
        let tree = "alveole-vmm v0.1.0 (/src/x)\nlibc v0.2.1\nalveole-acpi v0.1.0 (/src/x/crates/acpi)\n\
                    serde_derive v1.0.0 (proc-macro)\nlibc v0.2.1 (*)\n";
        assert_eq!(count_external(tree), 2);
    }
}
