//! Container images as microVMs: what `alveole run IMAGE true` takes and where that goes, what `exec` takes, and how fast an image
//! is imported; beside podman where it works, and beside Firecracker with the same kernel and initramfs until the agent is there.
//!
//! Everything is done as people do it, by the programs, with a store of its own. Where the time goes is read from the file
//! that `ALVEOLE_STAGES` names. Does not know how images or VMs are kept.

mod copies;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use alveole_agent_client::{Guest, Streams};
use alveole_agent_protocol::{Exit, Process, READY_PORT};
use alveole_instance::Vms;
use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use crate::stats::{cell, figure, summarize};
use crate::vmm::{Kind, Vmm, utf8};
use crate::{host, run, vmm};

/// Names in the store of this bench, and of its VM.
const NAME: &str = "bench";
/// How long a guest's start may take, in the lab.
const PATIENCE: Duration = Duration::from_secs(120);
/// What the guests' line of the kernel is, as `alveole run IMAGE` has it.
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1";
/// What is linked to busybox in the image.
const APPLETS: [&str; 5] = ["sh", "true", "sleep", "dmesg", "cat"];
/// All but the guest's kernel, in milliseconds; of hardware KVM.
const OUTSIDE_AIM_MS: f64 = 25.0;
const EXEC_AIM_MS: f64 = 3.0;

#[derive(Debug, Args)]
pub(crate) struct Images {
    /// How often each image is run [11; 1 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// How often `true` is executed in a VM that runs [50; 3 in a smoke run]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    execs: Option<u32>,
    /// How large the archive is that is imported [256; 8 in a smoke run]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 16))]
    size: Option<u64>,
    /// The guest kernel; its modules are those in `lib/modules` beside it
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// A static busybox, of which the image is made
    #[arg(long, value_name = "FILE", default_value = "/bin/busybox")]
    busybox: PathBuf,
    /// Where store, VMs and archives are, on a real file system [target/bench]
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    /// Guest memory
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    memory: u64,
    /// Guest processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Firecracker and where it is
    #[arg(long, value_name = "NAME=PATH")]
    vmm: Vec<String>,
    /// Ours only, once
    #[arg(long)]
    smoke: bool,
    /// Write every sample to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const OURS: &str = "alveole";
const PODMAN: &str = "podman";
const DISK: &str = "cp";

/// Rows of the table in their order: milliseconds, but for the last.
const STAGES: [&str; 9] = [
    "state: folder and keeper",
    "kernel and initramfs found",
    "disk layer",
    "network (none)",
    "VMM start, to the first instruction",
    "kernel, to the agent's start",
    "agent, to the command's start",
    "command",
    "teardown",
];
const RUN: &str = "**`run --rm IMAGE true`**";
const OUTSIDE: &str = "**all but the kernel**";
const TO_AGENT: &str = "VMM's process to the agent's first word";
const EXEC: &str = "`exec VM true`, the program";
const EXEC_VSOCK: &str = "`true` by the agent over vsock";
const IMPORT: &str = "import, MB/s";

/// Samples by row and column.
#[derive(Default)]
struct Table(BTreeMap<(&'static str, &'static str), Vec<f64>>);

impl Table {
    fn add(&mut self, row: &'static str, column: &'static str, value: f64) {
        self.0.entry((row, column)).or_default().push(value);
    }

    fn median(&self, row: &'static str, column: &'static str) -> Option<f64> {
        Some(summarize(self.0.get(&(row, column))?)?.median)
    }
}

struct Bench {
    programs: PathBuf,
    home: PathBuf,
    scratch: PathBuf,
    cpus: String,
    memory: String,
    table: Table,
}

pub(crate) fn images(args: &Images) -> anyhow::Result<ExitCode> {
    let smoke = args.smoke;
    let rounds = args.rounds.unwrap_or(if smoke { 1 } else { 11 });
    let execs = args.execs.unwrap_or(if smoke { 3 } else { 50 });
    let mib = args.size.unwrap_or(if smoke { 8 } else { 256 });
    let programs = crate::target_dir().join("x86_64-unknown-linux-gnu/release");
    let dir = args
        .dir
        .clone()
        .unwrap_or_else(|| crate::target_dir().join("bench"));
    fs::create_dir_all(&dir)?;
    let scratch = tempfile::Builder::new()
        .prefix("alveole-run.")
        .tempdir_in(dir)?;
    run::end_on_signals(vec![scratch.path().to_path_buf()])?;
    let scratch_path = fs::canonicalize(scratch.path())?;
    let mut bench = Bench {
        programs,
        home: scratch_path.join("home"),
        scratch: scratch_path,
        cpus: args.cpus.to_string(),
        memory: format!("{}M", args.memory),
        table: Table::default(),
    };
    let mut missing = Vec::new();
    let kernel = host::warm(&args.kernel)?;
    let conditions = host::Conditions::now(&kernel);
    drop(kernel);
    let tree = bench.prepare(args)?;

    let podman = if smoke {
        None
    } else {
        match bench.podman(&tree) {
            Ok(podman) => Some(podman),
            Err(e) => {
                missing.push(format!("podman IS NOT MEASURED: {e:#}"));
                None
            }
        }
    };
    let firecracker = if smoke {
        None
    } else {
        let (found, lacks) = vmm::find(Path::new(""), &args.vmm, &["firecracker".into()])?;
        missing.extend(lacks);
        found.into_iter().find(|v| v.kind == Kind::Firecracker)
    };
    for line in &missing {
        eprintln!("alveole-bench: {line}");
    }

    let agent_ms = bench.agent_part()?;
    if agent_ms.is_none() {
        missing.push("the guest's log does not tell when its first process began: that of the agent counts as the kernel's".into());
    }
    // The first round finds nothing in memory, and does not count.
    let warm_up = u32::from(!smoke);
    for round in 0..rounds + warm_up {
        eprintln!("alveole-bench: round {round} of {rounds}");
        let counts = round >= warm_up;
        bench.run_ours(agent_ms.unwrap_or(0.0), counts)?;
        if let Some(podman) = &podman {
            let time = podman.run(&["--rm"], &["true"])?;
            if counts {
                bench.table.add(RUN, PODMAN, time);
            }
        }
        if let Some(firecracker) = &firecracker {
            match bench.until_agent(firecracker, args) {
                Ok(time) if counts => bench.table.add(TO_AGENT, "firecracker", time),
                Ok(_) => {}
                Err(e) => missing.push(format!("firecracker failed: {e:#}")),
            }
        }
    }
    bench.execs(execs, podman.as_ref())?;
    bench.copies((!smoke).then_some(rounds))?;
    bench.imports(mib, if smoke { 1 } else { 3 }, podman.as_ref())?;

    let mut lines = conditions.lines();
    lines.push(format!(
        "Guests: {} CPUs, {} MiB, `{CMDLINE}`; n = {rounds} runs and {execs} executions; an archive of {mib} MiB without a pattern; milliseconds unless said",
        args.cpus, args.memory
    ));
    lines.extend(
        firecracker
            .iter()
            .map(|vmm| format!("firecracker: {}", vmm.version)),
    );
    lines.extend(podman.iter().map(|p| p.version.clone()));
    print!("{}", bench.markdown(&lines, &missing));
    if let Some(file) = &args.json {
        let samples: Vec<_> = bench.table.0.iter().map(|((row, column), samples)| json!({"row": row, "column": column, "samples": samples})).collect();
        let all = json!({"bench": "run", "conditions": conditions.json(), "notes": lines, "missing": missing, "samples": samples});
        fs::write(file, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What a program said, if it succeeded.
fn succeed(what: &str, output: &Output) -> anyhow::Result<String> {
    if !output.status.success() {
        bail!(
            "{what}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Bench {
    fn alveole(&self) -> Command {
        let mut command = Command::new(self.programs.join("alveole"));
        command.env("ALVEOLE_HOME", &self.home);
        command
    }

    fn does(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = self
            .alveole()
            .args(words)
            .output()
            .with_context(|| format!("cannot run {}/alveole", self.programs.display()))?;
        succeed(&format!("alveole {}", words.join(" ")), &output)
    }

    /// The words of a run, before and behind what is between.
    fn run_words<'a>(&'a self, middle: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        let sizes = ["--cpus", &self.cpus, "--memory", &self.memory];
        let mut words = vec!["run", "--net", "none"];
        words.extend(sizes);
        words.extend(middle);
        words.push(NAME);
        words.extend(command);
        words
    }

    /// A store with an image and a kernel; the folder with the image's files.
    fn prepare(&self, args: &Images) -> anyhow::Result<PathBuf> {
        let tree = self.scratch.join("tree");
        fs::create_dir_all(tree.join("bin"))?;
        fs::copy(&args.busybox, tree.join("bin/busybox"))
            .with_context(|| format!("cannot use --busybox {}", args.busybox.display()))?;
        for name in APPLETS {
            symlink("busybox", tree.join("bin").join(name))?;
        }
        self.does(&["image", "import", utf8(&tree)?, NAME])?;
        let kernel = fs::canonicalize(&args.kernel)?;
        let modules = fs::read_dir(kernel.with_file_name("lib/modules"));
        let modules = modules.into_iter().flatten().flatten().next();
        let modules = modules.map(|entry| entry.path());
        let mut words = vec!["kernel", "add", "--name", NAME, utf8(&kernel)?];
        if let Some(modules) = &modules {
            words.extend(["--modules", utf8(modules)?]);
        }
        self.does(&words)?;
        Ok(tree)
    }

    /// How long the agent takes from its start to its first word to the host, by the guest's own log.
    fn agent_part(&self) -> anyhow::Result<Option<f64>> {
        let log = self.does(&self.run_words(&["--rm"], &["dmesg"]))?;
        Ok(agent_part(&log))
    }

    fn run_ours(&mut self, agent_ms: f64, counts: bool) -> anyhow::Result<()> {
        let stages = self.scratch.join("stages");
        let monitor = self.scratch.join("stages.monitor");
        for old in [&stages, &monitor] {
            let _ = fs::remove_file(old);
        }
        File::create(&monitor)?;
        let begun = now_ns();
        let output = self
            .alveole()
            .env("ALVEOLE_STAGES", &stages)
            .args(self.run_words(&["--rm"], &["/bin/true"]))
            .output()?;
        let ended = now_ns();
        succeed("alveole run", &output)?;
        if !counts {
            return Ok(());
        }
        let told = fs::read_to_string(&stages).context("alveole run told no stages")?;
        let log = fs::read_to_string(&monitor)?;
        let times = stage_times(begun, ended, &told, &log)
            .with_context(|| format!("alveole run did not tell all of its stages: {told}"))?;
        let mut outside = 0.0;
        for (row, mut time) in STAGES.into_iter().zip(times) {
            match row {
                "kernel, to the agent's start" => time -= agent_ms,
                "agent, to the command's start" => time += agent_ms,
                _ => {}
            }
            if row != "kernel, to the agent's start" {
                outside += time;
            }
            self.table.add(row, OURS, time);
        }
        let total = (ended - begun) as f64 / 1e6;
        self.table.add(RUN, OURS, total);
        self.table.add(OUTSIDE, OURS, outside);
        // The guest's own start, as far as peers can be asked for it.
        self.table.add(TO_AGENT, OURS, times[4] + times[5]);
        Ok(())
    }

    /// Firecracker with the same kernel, initramfs and disk, from before its process to the agent's connection.
    fn until_agent(&self, firecracker: &Vmm, args: &Images) -> anyhow::Result<f64> {
        let socket = self.scratch.join("fc.vsock");
        let ready = self.scratch.join(format!("fc.vsock_{READY_PORT}"));
        for old in [&socket, &ready] {
            let _ = fs::remove_file(old);
        }
        let listener = UnixListener::bind(&ready)?;
        let folder = self.home.join("data/kernels").join(NAME);
        let one = |folder: &Path, fits: &dyn Fn(&str) -> bool| -> anyhow::Result<PathBuf> {
            let entries = fs::read_dir(folder)?.flatten();
            let mut fitting = entries.filter(|entry| entry.file_name().to_str().is_some_and(fits));
            let found = fitting.next().map(|entry| entry.path());
            found.with_context(|| format!("{} has not what is looked for", folder.display()))
        };
        let initramfs = one(&folder, &|name| name.starts_with("initramfs-"))?;
        let disk = one(&self.home.join("data/images/disks"), &|name| {
            Path::new(name).extension().is_some_and(|e| e == "erofs")
        })?;
        let config = json!({
            "boot-source": {"kernel_image_path": utf8(&args.kernel)?, "initrd_path": utf8(&initramfs)?, "boot_args": CMDLINE},
            "drives": [{"drive_id": "root", "path_on_host": utf8(&disk)?, "is_root_device": false, "is_read_only": true}],
            "machine-config": {"vcpu_count": args.cpus, "mem_size_mib": args.memory},
            "vsock": {"guest_cid": 3, "uds_path": utf8(&socket)?},
            "entropy": {},
        });
        let file = self.scratch.join("fc.json");
        fs::write(&file, config.to_string())?;
        let words: Vec<OsString> = ["--no-api", "--enable-pci", "--config-file", utf8(&file)?]
            .into_iter()
            .map(Into::into)
            .collect();
        let start = Instant::now();
        let mut run = run::Run::start(
            firecracker.path.as_os_str(),
            &words,
            &self.scratch.join("fc.stderr"),
            PATIENCE,
        )?;
        run.wait_for_other(&listener, "its guest's agent was there")
            .map_err(anyhow::Error::msg)?;
        Ok(milliseconds(start.elapsed()))
    }

    fn execs(&mut self, execs: u32, podman: Option<&Podman>) -> anyhow::Result<()> {
        self.does(&self.run_words(&["-d", "--name", NAME], &["/bin/sleep", "100000"]))?;
        let measured = self.execs_in_vm(execs);
        self.does(&["rm", "-f", NAME])?;
        measured?;
        if let Some(podman) = podman {
            podman.run(&["-d", "--name", "vm"], &["sleep", "100000"])?;
            for _ in 0..execs.min(20) {
                let time = podman.timed(&["exec", "vm", "true"])?;
                self.table.add(EXEC, PODMAN, time);
            }
            podman.timed(&["rm", "-f", "-t", "0", "vm"])?;
        }
        Ok(())
    }

    fn execs_in_vm(&mut self, execs: u32) -> anyhow::Result<()> {
        let vms = Vms::new(&self.home.join("state/vms"), &self.home.join("run/vm"));
        let vm = vms.find(NAME)?;
        let guest = Guest::new(&vm.socket("vsock"), PATIENCE);
        let process = Process {
            args: vec!["/bin/true".into()],
            ..Process::default()
        };
        for _ in 0..execs {
            let start = Instant::now();
            self.does(&["exec", NAME, "/bin/true"])?;
            self.table.add(EXEC, OURS, milliseconds(start.elapsed()));
            let start = Instant::now();
            let exit = guest.run(&process, Streams::default(), |_, _| {})?;
            self.table
                .add(EXEC_VSOCK, OURS, milliseconds(start.elapsed()));
            if exit != Exit::Code(0) {
                bail!("true: {exit:?}");
            }
        }
        Ok(())
    }

    /// An archive of files without a pattern; what `cp` and `sync` take of it is the disk's speed.
    fn imports(&mut self, mib: u64, times: u32, podman: Option<&Podman>) -> anyhow::Result<()> {
        let tree = self.scratch.join("large");
        fs::create_dir_all(&tree)?;
        let mut entropy = File::open("/dev/urandom")?;
        for at in 0..mib {
            let mut file = File::create(tree.join(at.to_string()))?;
            std::io::copy(&mut std::io::Read::take(&mut entropy, 1 << 20), &mut file)?;
        }
        let archive = self.scratch.join("large.tar");
        let tar = Command::new("tar")
            .args(["-C", utf8(&tree)?, "-cf", utf8(&archive)?, "."])
            .output()?;
        succeed("tar", &tar)?;
        fs::remove_dir_all(&tree)?;
        let size = fs::metadata(&archive)?.len() as f64 / 1e6;
        for _ in 0..times {
            let copy = self.scratch.join("copy");
            let start = Instant::now();
            let cp = Command::new("cp")
                .args(["--reflink=never", utf8(&archive)?, utf8(&copy)?])
                .output()?;
            succeed("cp", &cp)?;
            File::open(&copy)?.sync_all()?;
            self.table
                .add(IMPORT, DISK, size / start.elapsed().as_secs_f64());
            fs::remove_file(&copy)?;

            let start = Instant::now();
            self.does(&["image", "import", utf8(&archive)?, "large"])?;
            self.table
                .add(IMPORT, OURS, size / start.elapsed().as_secs_f64());
            self.does(&["image", "rm", "large"])?;
            if let Some(podman) = podman {
                let time = podman.timed(&["import", "-q", utf8(&archive)?, "large"])?;
                self.table.add(IMPORT, PODMAN, size / (time / 1e3));
                podman.timed(&["rmi", "-f", "large"])?;
            }
        }
        Ok(())
    }

    /// podman with a store of its own and the same image, if it can run it here.
    fn podman(&self, tree: &Path) -> anyhow::Result<Podman> {
        let version = Command::new(PODMAN)
            .arg("--version")
            .output()
            .context("there is no podman in PATH")?;
        let mut podman = Podman {
            root: self.scratch.join("podman"),
            // It takes no long path for this.
            run: tempfile::Builder::new().prefix("ap.").tempdir()?,
            version: succeed("podman", &version)?.trim().to_owned(),
            runtime: None,
        };
        let archive = self.scratch.join("tree.tar");
        let tar = Command::new("tar")
            .args(["-C", utf8(tree)?, "-cf", utf8(&archive)?, "."])
            .output()?;
        succeed("tar", &tar)?;
        podman.timed(&["import", "-q", utf8(&archive)?, NAME])?;
        if let Err(e) = podman.run(&["--rm"], &["true"]) {
            // Its usual runtime, crun, refuses hosts with both versions of cgroups.
            podman.runtime = Some("runc");
            podman.version.push_str(" with runc");
            podman.run(&["--rm"], &["true"]).map_err(|_| e)?;
        }
        Ok(podman)
    }

    fn markdown(&self, lines: &[String], missing: &[String]) -> String {
        let mut text = String::from("# Bench: run\n\n");
        for line in lines {
            text += &format!("- {line}\n");
        }
        for line in missing {
            text += &format!("- **{line}**\n");
        }
        let columns = [OURS, "firecracker", PODMAN, DISK];
        let columns: Vec<_> = columns
            .into_iter()
            .filter(|column| self.table.0.keys().any(|(_, c)| c == column))
            .collect();
        text += &format!(
            "\n| ms | {} |\n|---|{}\n",
            columns.join(" | "),
            "---:|".repeat(columns.len())
        );
        let rows = [RUN, OUTSIDE, TO_AGENT, EXEC, EXEC_VSOCK];
        let copied = [
            copies::SNAPSHOT,
            copies::RESTORE,
            copies::RESTORED_EXEC,
            copies::FORK,
            IMPORT,
        ];
        let rows = rows.into_iter().chain(copied);
        for row in STAGES.into_iter().chain(rows) {
            text += &format!("| {row} |");
            let ours = self.table.median(row, OURS);
            for column in &columns {
                let samples = self.table.0.get(&(row, *column));
                let reference = ours.filter(|_| *column != OURS);
                let shown = samples.and_then(|s| summarize(s));
                text += &format!(" {} |", shown.map_or("–".into(), |s| cell(s, reference)));
            }
            text += "\n";
        }
        text += "\nIn brackets behind a range: times ours.\n\n## Aims\n\n";
        let mut aim = |what: &str, found: Option<f64>, most: f64| {
            if let Some(found) = found {
                let met = if found <= most { "met" } else { "**missed**" };
                text += &format!(
                    "- {what}, at most {most} ms on hardware KVM: {met} here: {}\n",
                    figure(found)
                );
            }
        };
        let of = |row| self.table.median(row, OURS);
        aim("all but the kernel", of(OUTSIDE), OUTSIDE_AIM_MS);
        aim("`true` over vsock", of(EXEC_VSOCK), EXEC_AIM_MS);
        if let (Some(ours), Some(disk)) = (of(IMPORT), self.table.median(IMPORT, DISK)) {
            let met = if ours >= disk { "met" } else { "**missed**" };
            text += &format!(
                "- import at disk speed: {met}: {} against {} MB/s of cp and sync ({:.2}x)\n",
                figure(ours),
                figure(disk),
                ours / disk
            );
        }
        text
    }
}

/// podman, with a store of its own.
struct Podman {
    root: PathBuf,
    run: tempfile::TempDir,
    version: String,
    /// Another one than its usual.
    runtime: Option<&'static str>,
}

impl Podman {
    /// Milliseconds of a container of the image.
    fn run(&self, options: &[&str], command: &[&str]) -> anyhow::Result<f64> {
        // By itself it asks for more than a host without CAP_SYS_RESOURCE gives.
        let limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"];
        let words = [&["run", "--network", "none"][..], &limits];
        self.timed(&[&words.concat(), options, &[NAME], command].concat())
    }

    /// Milliseconds of a command that succeeds.
    fn timed(&self, words: &[&str]) -> anyhow::Result<f64> {
        let start = Instant::now();
        let output = Command::new(PODMAN)
            .arg("--root")
            .arg(&self.root)
            .arg("--runroot")
            .arg(self.run.path())
            .args(self.runtime.map(|name| format!("--runtime={name}")))
            .args(words)
            .output()?;
        succeed(&format!("podman {}", words.join(" ")), &output)?;
        Ok(milliseconds(start.elapsed()))
    }
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// Milliseconds of each of [`STAGES`], from what was told of them and from the monitor's log.
fn stage_times(begun: u64, ended: u64, told: &str, log: &str) -> Option<[f64; STAGES.len()]> {
    let at = |stage: &str| -> Option<u64> {
        let line = told.lines().find(|l| l.split(' ').next() == Some(stage))?;
        line.split(' ').nth(1)?.parse().ok()
    };
    let runs = log.lines().find(|l| l.ends_with("] the guest runs"))?;
    let runs = at_midnight(begun)? + since_midnight(runs.split(' ').next()?)?;
    let moments = [
        begun,
        at("kept")?,
        at("kernel")?,
        at("disk")?,
        at("network")?,
        runs,
        at("agent")?,
        at("started")?,
        at("exited")?,
        ended,
    ];
    let mut times = [0.0; STAGES.len()];
    for (time, pair) in times.iter_mut().zip(moments.windows(2)) {
        *time = (i128::from(pair[1]) - i128::from(pair[0])) as f64 / 1e6;
    }
    Some(times)
}

const DAY_NS: u64 = 86_400_000_000_000;

fn at_midnight(ns: u64) -> Option<u64> {
    ns.checked_sub(ns % DAY_NS)
}

/// Nanoseconds of `2026-01-31T12:00:00.123456789` since its day began.
fn since_midnight(timestamp: &str) -> Option<u64> {
    let (_, time) = timestamp.split_once('T')?;
    let (clock, fraction) = time.split_once('.')?;
    let mut seconds = 0;
    for part in clock.split(':') {
        seconds = seconds * 60 + part.parse::<u64>().ok()?;
    }
    Some(seconds * 1_000_000_000 + fraction.parse::<u64>().ok()?)
}

/// Milliseconds between the start of the guest's first process and the agent's first word, by the kernel's log.
fn agent_part(log: &str) -> Option<f64> {
    let at = |what: &str| -> Option<f64> {
        let line = log.lines().find(|line| line.contains(what))?;
        line.split(']')
            .next()?
            .split('[')
            .nth(1)?
            .trim()
            .parse()
            .ok()
    };
    let from = at("] Run /init as init process")?;
    Some((at("alveole-agent: the host is there")? - from) * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_read() {
        let day = 20_000 * DAY_NS;
        let told = format!(
            "created {}\nkept {}\nkernel {}\ndisk {}\nnetwork {}\nmonitor {}\nagent {}\nstarted {}\nexited {}\noff {}\n",
            day + 1_500_000,
            day + 2_000_000,
            day + 3_000_000,
            day + 4_000_000,
            day + 5_000_000,
            day + 6_000_000,
            day + 20_000_000,
            day + 22_000_000,
            day + 25_000_000,
            day + 30_000_000
        );
        let log = "2024-10-04T00:00:00.005000001 [x:main] other\n\
                   2024-10-04T00:00:00.009000000 [x:control] the guest runs\n";
        let times = stage_times(day + 1_000_000, day + 31_000_000, &told, log).unwrap();
        assert_eq!(times, [1.0, 1.0, 1.0, 1.0, 4.0, 11.0, 2.0, 3.0, 6.0]);
        assert_eq!(stage_times(day, day, &told, "nothing"), None);
    }

    #[test]
    fn the_guests_log_tells_the_agents_part() {
        let log = "[    0.100000] Linux version\n[    0.250000] Run /init as init process\n\
                   [    0.262500] alveole-agent: the host is there\n";
        assert!((agent_part(log).unwrap() - 12.5).abs() < 1e-6);
        assert_eq!(agent_part("[    0.1] Linux"), None);
        let agent = include_str!("../../agent/src/init.rs");
        assert!(agent.contains("alveole-agent: the host is there"));
        let monitor = include_str!("../../machine/src/control.rs");
        assert!(monitor.contains("\"the guest runs\""));
    }
}
