//! A small machine on the scripted hypervisor, run in a thread of its own: `Machine::run` confines its
//! thread to the control role for life.

#[path = "../../../../tests/tiny_guest/code.rs"]
pub(crate) mod code;

use std::fs;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use alveole_hypervisor::fake::FakePartition;
use alveole_machine::{
    BuildError, End, Event, HostResources, Machine, Mailbox, Milestones, OnSigterm, Options, build,
    validate,
};
use alveole_mmds::Metadata;
use alveole_serial::{Console, ConsoleTarget, FileStart};
use alveole_vm_config::VmConfig;
use code::tiny_kernel;
use tempfile::TempDir;

/// Nothing here takes longer; what does hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What a machine came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) end: End,
    pub(crate) milestones: Milestones,
    /// What the guest printed.
    pub(crate) console: String,
    /// How often the owner was called.
    pub(crate) ticks: usize,
}

/// Builds a machine of `cpus` processors on `partition`, in `dir`.
pub(crate) fn machine(
    dir: &TempDir,
    cpus: u8,
    partition: FakePartition,
    mailbox: &Mailbox,
) -> Result<Machine, BuildError> {
    let same = |_: &mut VmConfig| ();
    machine_with(dir, cpus, partition, mailbox, same)
}

/// The same, of another description.
pub(crate) fn machine_with(
    dir: &TempDir,
    cpus: u8,
    partition: FakePartition,
    mailbox: &Mailbox,
    change: impl FnOnce(&mut VmConfig),
) -> Result<Machine, BuildError> {
    let options = Options {
        boot_timer: true,
        end_with_terminal: true,
        on_sigterm: OnSigterm::PressPowerButton,
        ..Options::default()
    };
    machine_of(dir, cpus, partition, mailbox, options, change)
}

/// The same, with other options.
pub(crate) fn machine_of(
    dir: &TempDir,
    cpus: u8,
    partition: FakePartition,
    mailbox: &Mailbox,
    options: Options,
    change: impl FnOnce(&mut VmConfig),
) -> Result<Machine, BuildError> {
    let kernel = dir.path().join("kernel");
    if !kernel.exists() {
        fs::write(&kernel, tiny_kernel(&[0xf4])).unwrap();
    }
    let mut config = VmConfig::default();
    config.machine_config.vcpu_count = cpus;
    config.machine_config.mem_size_mib = 64;
    config.boot_source.kernel_image_path = kernel;
    change(&mut config);
    let valid = validate(&config).unwrap();
    let resources = HostResources::open(&valid, &Arc::new(Metadata::new(0))).unwrap();
    let path = dir.path().join("console");
    let target = ConsoleTarget::File {
        path,
        start: FileStart::Append,
        limit_bytes: None,
    };
    let console = Console::open(&target, Box::new(|_| ())).unwrap();
    build(
        &valid,
        resources,
        console,
        Box::new(partition),
        Vec::new(),
        mailbox,
        options,
    )
}

/// Builds a machine on `partition`, sends it `sent` and runs it to its end.
pub(crate) fn run_on(cpus: u8, partition: FakePartition, sent: Vec<Event>) -> Outcome {
    let dir = TempDir::new().unwrap();
    let (tell, told) = mpsc::channel();
    let path = dir.path().join("console");
    let thread = std::thread::spawn(move || {
        let (mailbox, events) = Mailbox::new();
        let mut machine = machine(&dir, cpus, partition, &mailbox).unwrap();
        for event in sent {
            mailbox.send(event);
        }
        let mut ticks = 0;
        let end = machine.run(&events, PATIENCE, &mut |_| {
            ticks += 1;
            Ok(())
        });
        let milestones = machine.milestones();
        drop(machine);
        tell.send((end, milestones, ticks, dir)).unwrap();
    });
    let (end, milestones, ticks, _dir) = told
        .recv_timeout(PATIENCE)
        .expect("the machine does not end");
    thread.join().unwrap();
    Outcome {
        end,
        milestones,
        ticks,
        console: String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned(),
    }
}
