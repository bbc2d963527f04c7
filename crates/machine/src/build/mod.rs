//! Builds a machine in typed steps, each of which consumes the one before, so that the compiler keeps the
//! order: memory → partition → devices → boot → processors → sealed.

mod boot;
mod devices;
mod memory;
mod processors;
mod seal;

use std::sync::Arc;

use alveole_counters::CounterSet;
use alveole_event_loop::{EventLoopError, Worker};
use alveole_guest_memory::{MapError, ServeError};
use alveole_hypervisor::{MsrRefusal, Partition, PartitionError};
use alveole_io_bus::BusError;
use alveole_saved_state::{FormatError, RestoreError};
use alveole_serial::Console;
use alveole_vcpu::cpuid::Missing;
use alveole_vcpu::template::NoSuchLeaf;

pub use alveole_boot_loader::Placement;
pub(crate) use memory::map_memory;

use crate::catalog::interface_name;
use crate::lifecycle::Lifecycle;
use crate::snapshot::{LoadError, MemorySource, ServerWatch, WorkingSet};
use crate::validate::NotForHost;
use crate::{HostResources, Machine, Mailbox, Snapshot, ValidConfig};

/// What a machine is to do beyond its description.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Give the guest the boot timer.
    pub boot_timer: bool,
    /// End the machine when the console's terminal vanishes.
    pub end_with_terminal: bool,
    /// How kernel and initrd get into guest memory; none: as suits the hypervisor.
    pub placement: Option<Placement>,
    /// Which threads serve disks.
    pub disk_threads: DiskThreads,
    /// What carries virtio devices.
    pub transport: Transport,
    /// What the first SIGTERM does.
    pub on_sigterm: OnSigterm,
}

/// What the first SIGTERM does; a second one always ends the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnSigterm {
    /// It ends the machine, as any other signal does.
    #[default]
    End,
    /// It asks the guest to power off.
    PressPowerButton,
}

/// What carries virtio devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// Register blocks in memory, an interrupt line each.
    #[default]
    Mmio,
    /// A PCI bus, a message for each queue.
    Pci,
}

/// Which threads serve the queues of disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskThreads {
    /// The one that serves all devices.
    Shared,
    /// One for each disk.
    #[default]
    PerDisk,
    /// One for each queue, as far as the host has processors.
    PerQueue,
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// Guest memory that another process serves.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The tables could not be written to guest memory.
    #[error("cannot write the machine's tables: {0}")]
    Tables(#[from] alveole_guest_memory::AccessError),
    /// The guest's generation id.
    #[error(transparent)]
    Generation(#[from] alveole_board_devices::GenerationError),
    /// The machine's own description to the guest.
    #[error(transparent)]
    Acpi(#[from] alveole_acpi::AcpiError),
    /// Nothing to boot was opened: a mistake in this program.
    #[error("there is nothing to boot: this is a bug of the monitor, please report it")]
    NothingToBoot,
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] alveole_boot_loader::LoadError),
    /// The hypervisor.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// Fewer processors are possible here than asked for.
    #[error("vcpu_count is {asked}: the hypervisor of this host gives a guest at most {most}")]
    TooManyCpus {
        /// What was asked.
        asked: u32,
        /// What is possible.
        most: u32,
    },
    /// A CPU template of another processor than the host's.
    #[error(transparent)]
    CpuTemplate(#[from] NotForHost),
    /// What the processors are to say of themselves cannot be had here.
    #[error(
        "cpu-config cannot be had on this host: {}; take out what it names, or run the guest on a host that has it",
        listed(.0)
    )]
    CpuConfig(Vec<CpuProblem>),
    /// Two devices in one place: a mistake in this program.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// There is no interrupt left for a device.
    #[error(
        "there are more virtio devices than interrupts for them: give the guest fewer disks or network interfaces"
    )]
    TooManyDevices,
    /// A device cannot be a PCI function: a mistake in this program.
    #[error(transparent)]
    Pci(#[from] alveole_virtio_pci::PciTransportError),
    /// The devices loop.
    #[error(transparent)]
    Loop(#[from] EventLoopError),
    /// A processor's thread.
    #[error(transparent)]
    Vcpu(#[from] alveole_vcpu::VcpuError),
    /// A snapshot that is prepared.
    #[error(transparent)]
    Load(LoadError),
    /// The memory of a snapshot is not what its description says.
    #[error("the snapshot's memory is not laid out as its description says: it is damaged")]
    OtherMemory,
    /// A snapshot lacks a part, or has one too many.
    #[error("the snapshot cannot be loaded: {0}")]
    Snapshot(#[from] FormatError),
    /// A part of a snapshot cannot be what a part of this machine is.
    #[error("the snapshot cannot be loaded: {0}: {1}")]
    Restore(String, #[source] RestoreError),
    /// The guest has been told of what this host does not have.
    #[error(
        "the snapshot cannot be loaded on this host, which lacks what its guest was told of: {}; load it on a host like the one where \
         it was taken, or take it of a guest with a CPU template that both have",
        listed(.0)
    )]
    Lacking(Vec<Missing>),
    /// The devices thread.
    #[error("cannot start the devices thread: {0}; is the limit on processes (ulimit -u) reached?")]
    Thread(std::io::Error),
}

/// Something of `cpu-config` that this host cannot give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuProblem {
    /// A capability that the hypervisor lacks.
    #[error("the hypervisor lacks capability {0}, which kvm_capabilities ask for")]
    Capability(u32),
    /// An answer that the hypervisor does not give.
    #[error(transparent)]
    Leaf(#[from] NoSuchLeaf),
    /// A register that cannot be changed.
    #[error(transparent)]
    Msr(#[from] MsrRefusal),
}

/// Problems that are told; of more, only their number is.
const MAX_TOLD: usize = 32;

fn listed(problems: &[impl ToString]) -> String {
    let told = problems.iter().take(MAX_TOLD).map(ToString::to_string);
    let mut text = told.collect::<Vec<_>>().join("; ");
    if let more @ 1.. = problems.len().saturating_sub(MAX_TOLD) {
        text.push_str(&format!("; and {more} more"));
    }
    text
}

impl BuildError {
    /// Whether another description would help, and not another host.
    #[must_use]
    pub fn blames_description(&self) -> bool {
        match self {
            Self::Memory(
                MapError::MoreThanHost { .. }
                | MapError::Maps(_)
                | MapError::NoPlainFile { .. }
                | MapError::ShortFile { .. },
            )
            | Self::Boot(_)
            | Self::TooManyCpus { .. }
            | Self::CpuTemplate(_)
            | Self::CpuConfig(_)
            | Self::Load(_)
            | Self::OtherMemory
            | Self::Snapshot(_)
            | Self::Restore(..)
            | Self::Lacking(_)
            | Self::TooManyDevices => true,
            Self::Serve(_)
            | Self::Memory(
                MapError::Refused { .. }
                | MapError::NoRoom { .. }
                | MapError::Ranges(_)
                | MapError::Layer { .. },
            )
            | Self::Tables(_)
            | Self::Generation(_)
            | Self::Acpi(_)
            | Self::Partition(_)
            | Self::Bus(_)
            | Self::Pci(_)
            | Self::Loop(_)
            | Self::Vcpu(_)
            | Self::NothingToBoot
            | Self::Thread(_) => false,
        }
    }
}

/// Builds the machine that `config` describes on `partition`. `workers` run on its devices loop; its threads report
/// to `mailbox`, whose other end [`Machine::run`] reads.
///
/// # Errors
/// Anything the host, the hypervisor or the files cannot give; nothing is left behind.
pub fn build(
    config: &ValidConfig,
    resources: HostResources,
    console: Console,
    partition: Box<dyn Partition>,
    workers: Vec<Box<dyn Worker>>,
    mailbox: &Mailbox,
    options: Options,
) -> Result<Machine, BuildError> {
    let (boot, virtio) = resources.into_parts()?;
    memory::plan_memory(config)?
        .create_partition(config, partition)?
        .place_devices(console, virtio, options)?
        .load_boot(config, boot, options)?
        .create_processors(config, mailbox)?
        .seal(config, workers, mailbox, options, Lifecycle::Built)
}

/// Builds the machine that `snapshot` is of, in its state: paused. `config` is its description, and `resources` were opened by
/// [`HostResources::open_devices`]; the rest as for [`build`].
///
/// # Errors
/// As [`build`]; or the state does not fit this host or the machine; nothing is left behind.
#[expect(clippy::too_many_arguments, reason = "one more than build has")]
pub fn restore(
    config: &ValidConfig,
    resources: HostResources,
    console: Console,
    partition: Box<dyn Partition>,
    workers: Vec<Box<dyn Worker>>,
    mailbox: &Mailbox,
    options: Options,
    mut snapshot: Snapshot,
) -> Result<Machine, BuildError> {
    let options = snapshot.options(options);
    let memory = memory::map_snapshot(config, &mut snapshot)?;
    let ram = memory.ram().clone();
    let Snapshot {
        state,
        clock,
        resume,
        layers,
        memory: source,
        cables,
        working_set,
        ..
    } = snapshot;
    let (files, server) = match source {
        MemorySource::Files(files) => (files, None),
        MemorySource::Server(server) => (Vec::new(), Some(Arc::new(server))),
    };
    // Before all else: what is to be read is needed soon.
    let working_set = working_set.map(|plan| {
        WorkingSet::start(plan, files, layers.clone(), ram.clone()).map_err(BuildError::Thread)
    });
    let working_set = working_set.transpose()?;
    let watch = server
        .clone()
        .map(|server| Box::new(ServerWatch::new(server, mailbox)) as Box<dyn Worker>);
    let restored = || {
        memory
            .create_partition(config, partition)?
            .place_devices(console, resources.into_devices(), options)?
            .alone(watch)?
            .restore(config, mailbox, state, clock)?
            .seal(config, workers, mailbox, options, Lifecycle::Paused)
    };
    let mut machine = match &server {
        None => restored()?,
        // Some of the state is in memory, so that the server may be needed for it.
        Some(server) => server.watch_while(&ram, restored)??,
    };
    for (id, is_in) in cables {
        let name = interface_name(&id);
        let mut all = machine.interfaces.iter();
        if let Some(interface) = all.find(|i| i.counters().name() == name) {
            interface.set_link(is_in);
        }
    }
    machine.working_set = working_set;
    machine.tracking.layers = layers;
    machine.goes_on = resume;
    machine.may_hang = server.is_some();
    Ok(machine)
}
