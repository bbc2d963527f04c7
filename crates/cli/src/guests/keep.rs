//! `alveole keep NAME`: the process that keeps a VM. `alveole run` and `start` start it; it is no command for people.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use alveole_agent_protocol::{Mount, Setup, Source};
use alveole_guest_kernel::Kernel;
use alveole_host::{in_lab, programs};
use alveole_instance::{
    Beginning, Content, Machine, Placed, Purpose, Record, Told, Vm, keep, reached, stages_file,
};
use alveole_vm_config::{
    BootSource, CacheType, CpuConfigSource, Drive, Entropy, LogLevel, Logger, MachineConfig,
    VmConfig, Vsock,
};
use anyhow::Context;
use clap::Parser;

use super::limits::describe;
use super::restore::{OVERLAY, restored};
use super::{empty_disk, ports, volumes};
use crate::interfaces::{NetworkArgs, Plugged, keep_over_exec};
use crate::places::Places;
use crate::run::hand_over;

/// Nothing but what goes wrong is on the console. A reset ends the machine at once; a panic resets without waiting.
const CMDLINE: &str = "console=ttyS0 quiet reboot=k panic=-1";
/// Serial numbers of a guest's disks.
const ROOT: &str = "root";
pub(super) const CHANGES: &str = "changes";
const MODULES: &str = "modules";
/// A guest's own address among sockets of its monitor; each has a monitor of its own.
const GUEST_CID: u64 = 3;

/// A guest whose process has not begun by now is worth a word.
const SLOW: Duration = Duration::from_secs(15);
const SLOW_WORDS: &str = "the guest has not come up yet: its console is in the VM's folder, and alveole doctor --probe-kvm says whether this \
                          machine's KVM can run it (if not: alveole run --lab)";

/// What a line begins with that is for people, and no word about how far it is.
pub(super) const NOTE: &str = "note: ";

#[derive(clap::Args)]
pub(crate) struct KeepArgs {
    /// The VM
    name: String,
    /// Its process begins when somebody is attached
    #[arg(long)]
    with_client: bool,
    /// No process begins: its agent alone serves, until the standard input ends
    #[arg(long, conflicts_with = "with_client")]
    serve: bool,
    /// It is on no network, whatever it has else
    #[arg(long)]
    offline: bool,
    /// It goes on from the snapshot in this folder; a further start boots
    #[arg(long, conflicts_with = "serve")]
    from: Option<PathBuf>,
    /// How long programs of a guest that goes on may take; 0: they do not run
    #[arg(long, requires = "from")]
    hooks_ms: Option<u64>,
    /// What it changes of its memory is noted from its beginning
    #[arg(long, requires = "from")]
    track_changes: bool,
    /// Its monitor is a copy of the process that is asked at this socket
    #[arg(long, requires = "from")]
    template: Option<PathBuf>,
}

/// The words about networks, as `alveole run` has them.
#[derive(Parser)]
struct Words {
    #[command(flatten)]
    network: NetworkArgs,
}

pub(crate) fn keep_vm(args: &KeepArgs) -> anyhow::Result<ExitCode> {
    // Signals of the terminal where it was started are not for it.
    let _ = rustix::process::setsid();
    let places = Places::usual();
    let vm = match places.vms().find(&args.name) {
        Ok(vm) => vm,
        Err(e) => return say_and_fail(&e.to_string()),
    };
    let lock = match vm.lock() {
        Ok(lock) => lock,
        Err(e) => return say_and_fail(&e.to_string()),
    };
    let over = Arc::new(AtomicBool::new(false));
    if args.serve {
        let over = Arc::clone(&over);
        std::thread::spawn(move || {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            over.store(true, Ordering::Relaxed);
        });
    }
    let is_over = || over.load(Ordering::Relaxed);
    // Whoever started it reads what this says.
    let client = match args.with_client {
        true => Some(
            rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)
                .context("cannot keep standard output")?,
        ),
        false => None,
    };
    let purpose = match args.serve {
        true => Purpose::Serve(&is_over),
        false => Purpose::Run {
            client: client.as_ref(),
        },
    };
    let runs = Arc::new(AtomicBool::new(false));
    // The lab's KVM can, and is slow.
    if !args.serve && !in_lab() {
        let runs = Arc::clone(&runs);
        std::thread::spawn(move || {
            std::thread::sleep(SLOW);
            if !runs.load(Ordering::Relaxed) {
                say(&format!("{NOTE}{SLOW_WORDS}"));
            }
        });
    }
    let hooks = args.hooks_ms.filter(|ms| *ms > 0);
    let hooks = hooks.map(Duration::from_millis);
    let mut from = args.from.as_deref();
    let mut told_all = false;
    let kept = keep(
        &vm,
        &lock,
        purpose,
        |vm| {
            let machine = match from.take() {
                Some(from) => restored(
                    &places,
                    vm,
                    from,
                    hooks,
                    args.template.as_deref(),
                    args.track_changes,
                ),
                None => machine(&places, vm, args.offline),
            };
            machine.map_err(|e| format!("{e:#}"))
        },
        |told| match told {
            Told::Serves => say("serves"),
            Told::Runs => {
                told_all = true;
                runs.store(true, Ordering::Relaxed);
                say("runs");
                // Who waits for more waits for the end of this.
                close_output();
            }
            Told::Failed(why) if !told_all => {
                // Nobody reads what further starts have to say, and a pipe that is full is waited for.
                told_all = true;
                runs.store(true, Ordering::Relaxed);
                say(&one_line(why));
                close_output();
            }
            Told::Failed(_) => {}
        },
    );
    let ended = match kept {
        Ok(ended) => ended,
        Err(e) => return say_and_fail(&e.to_string()),
    };
    if vm.record.remove {
        vm.remove(&lock)?;
    }
    Ok(ExitCode::from(ended.status))
}

/// One line to who started it. Who does not listen any more knows how it goes.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

fn say_and_fail(why: &str) -> anyhow::Result<ExitCode> {
    say(why);
    Ok(ExitCode::FAILURE)
}

fn close_output() {
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// The machine of a VM, ready to be started.
fn machine(places: &Places, vm: &Vm, offline: bool) -> anyhow::Result<Machine> {
    let record = &vm.record;
    let kernel = places.kernels().get(Some(&record.kernel))?;
    let initramfs = kernel.initramfs(&programs::agent()?)?;
    reached("kernel");
    let disks = Disks::made(places, vm, &kernel)?;
    if !disks.left_out.is_empty() {
        let what = disks.left_out.join("; ");
        say(&format!(
            "{NOTE}left out of the copies: {}",
            one_line(&what)
        ));
    }
    let plugged = plug(vm, offline)?;
    let mut description = VmConfig {
        boot_source: boot_source(&kernel, initramfs),
        machine_config: MachineConfig {
            vcpu_count: record.cpus,
            mem_size_mib: record.memory_mib,
            ..MachineConfig::default()
        },
        drives: disks.drives,
        network_interfaces: plugged.interfaces.clone(),
        vsock: Some(Vsock {
            guest_cid: GUEST_CID,
            uds_path: vm.socket("vsock"),
            vsock_id: None,
        }),
        entropy: Some(Entropy::default()),
        cpu_config: record.cpu_config.clone().map(CpuConfigSource::File),
        logger: stages_file().map(monitor_log),
        ..VmConfig::default()
    };
    describe(&record.limits, &mut description);
    let description = hand_over(&description)?;
    let mut monitor = Command::new(programs::vmm()?);
    monitor
        .arg("--config-file")
        .arg(crate::run::path_of(&description))
        .arg("--api-sock")
        .arg(vm.socket("api"))
        .args(["--id", &record.id])
        .arg("--enable-pci");
    keep_over_exec(&plugged.descriptors)?;
    let setup = Setup {
        root: Some(mount(ROOT, "erofs", true)),
        changes: disks.changes.then(|| mount(CHANGES, "ext4", false)),
        read_only: record.read_only,
        volumes: disks.mounts,
        modules: disks.modules.then(|| mount(MODULES, "erofs", true)),
        shm_bytes: record.shm_bytes,
        hostname: record.hostname.clone(),
        network: device_words(&plugged),
        ..Setup::default()
    };
    let mut held = disks.held;
    held.push(Box::new(description));
    held.push(Box::new(plugged.descriptors));
    Ok(Machine {
        monitor,
        template: None,
        begin: Beginning::Boot(Box::new(setup)),
        held,
        discarded: discarded(record),
    })
}

/// Plugs a VM into its networks.
pub(super) fn plug(vm: &Vm, offline: bool) -> anyhow::Result<Plugged> {
    let mut words = vec!["words".to_owned()];
    if offline {
        words.push("--net=none".into());
    } else {
        words.extend_from_slice(&vm.record.network);
        let free = ports::still_free(vm)?;
        words.extend(free.iter().map(|port| format!("--publish={port}")));
    }
    let words =
        Words::try_parse_from(words).context("cannot understand the VM's words about networks")?;
    let plugged = words.network.begin(!in_lab())?.finish()?;
    reached("network");
    Ok(plugged)
}

/// The words for the guest that are about its network devices.
pub(super) fn device_words(plugged: &Plugged) -> Vec<String> {
    let words = plugged.words.split(' ');
    let devices = words.filter(|word| word.starts_with("alveole.net="));
    devices.map(str::to_owned).collect()
}

/// Whether nothing is left of what a VM writes.
pub(super) fn discarded(record: &Record) -> bool {
    record.remove && !outlived(record)
}

/// A VM's disks.
pub(super) struct Disks {
    pub(super) drives: Vec<Drive>,
    /// There is one that takes the root's changes.
    changes: bool,
    /// There is one with the kernel's modules.
    modules: bool,
    mounts: Vec<alveole_agent_protocol::Volume>,
    /// What lives as long as the machine does.
    pub(super) held: Vec<Box<dyn Send>>,
    left_out: Vec<String>,
}

impl Disks {
    /// Those for a boot: what is not there is made, and folders are copied.
    fn made(places: &Places, vm: &Vm, kernel: &Kernel) -> anyhow::Result<Self> {
        let changes = changes(places, vm)?;
        reached("disk");
        let volumes = volumes::prepare(places, vm, volumes::Copies::New)?;
        Ok(Self::of(vm, kernel, changes.as_deref(), volumes))
    }

    /// Those that are there.
    pub(super) fn kept(places: &Places, vm: &Vm) -> anyhow::Result<Self> {
        let kernel = places.kernels().get(Some(&vm.record.kernel))?;
        let volumes = volumes::prepare(places, vm, volumes::Copies::Kept)?;
        let overlay = vm.at(OVERLAY);
        let changes = vm.record.disk_bytes.map(|_| overlay.as_path());
        Ok(Self::of(vm, &kernel, changes, volumes))
    }

    fn of(vm: &Vm, kernel: &Kernel, changes: Option<&Path>, volumes: volumes::Prepared) -> Self {
        let modules = kernel.modules_disk();
        let own = drives(&vm.record.root_disk, changes, modules.as_deref());
        Self {
            drives: own.into_iter().chain(volumes.drives).collect(),
            changes: changes.is_some(),
            modules: modules.is_some(),
            mounts: volumes.mounts,
            held: volumes.held,
            left_out: volumes.left_out,
        }
    }
}

/// Whether something that the guest can write is there after it.
fn outlived(record: &Record) -> bool {
    let kept = |placed: &Placed| !placed.read_only && matches!(placed.what, Content::Volume(_));
    record.volumes.iter().any(kept)
}

/// Where the monitor says that the guest runs: beside the other stages.
fn monitor_log(mut stages: PathBuf) -> Logger {
    stages.as_mut_os_string().push(".monitor");
    Logger {
        log_path: Some(stages),
        level: Some(LogLevel::Info),
        ..Logger::default()
    }
}

fn boot_source(kernel: &Kernel, initramfs: PathBuf) -> BootSource {
    BootSource {
        kernel_image_path: kernel.kernel(),
        initrd_path: Some(initramfs),
        boot_args: Some(CMDLINE.into()),
    }
}

fn mount(serial: &str, kind: &str, read_only: bool) -> Mount {
    Mount {
        source: Source::Disk(serial.into()),
        kind: kind.into(),
        target: "/".into(),
        read_only,
        options: String::new(),
    }
}

fn drives(root: &Path, changes: Option<&Path>, modules: Option<&Path>) -> Vec<Drive> {
    let drive = |serial: &str, path: &Path| Drive {
        drive_id: serial.into(),
        serial: Some(serial.into()),
        path_on_host: path.into(),
        cache_type: CacheType::Writeback,
        ..Drive::default()
    };
    let only_read = |serial, path| Drive {
        is_read_only: true,
        ..drive(serial, path)
    };
    let changes = changes.map(|path| drive(CHANGES, path));
    let modules = modules.map(|path| only_read(MODULES, path));
    let root = only_read(ROOT, root);
    [root].into_iter().chain(changes).chain(modules).collect()
}

/// The disk that takes the changes, made with the first start.
fn changes(places: &Places, vm: &Vm) -> anyhow::Result<Option<PathBuf>> {
    let Some(bytes) = vm.record.disk_bytes else {
        return Ok(None);
    };
    let overlay = vm.at(OVERLAY);
    if overlay.exists() {
        return Ok(Some(overlay));
    }
    let path = vm.at(CHANGES);
    if !path.exists() {
        // Renamed when it is whole, so that a start that was killed leaves none that is not.
        let new = vm.at("changes.new");
        let _ = std::fs::remove_file(&new);
        empty_disk::make(&places.empty_disks(), bytes, &new)?;
        std::fs::rename(&new, &path).context("cannot put the VM's disk in its place")?;
    }
    Ok(Some(path))
}
