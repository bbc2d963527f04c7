//! What may be asked, and what is answered.

use std::fmt;

use alveole_vm_config::{
    BootSource, CpuConfig, Drive, DriveUpdate, Entropy, Logger, MachineConfig, MachineConfigUpdate,
    Metrics, MmdsConfig, NetworkInterface, NetworkInterfaceUpdate, Serial, SnapshotCreate,
    SnapshotLoad, VmConfig, Vsock,
};
use serde::Serialize;
use serde_json::Value;

use crate::State;

/// What may be asked of a machine: each request of the API that concerns what exists here.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// What runs here, and its state.
    GetInstance,
    /// Which version of the API is spoken.
    GetVersion,
    /// The whole description.
    GetConfig,
    /// Processors and memory.
    GetMachineConfig,
    /// The data of the metadata service.
    GetMetadata,
    /// Counters and what else is measured, as text for Prometheus.
    GetMetrics {
        /// In the form of OpenMetrics, instead of the older one that everybody reads.
        open_metrics: bool,
    },

    /// Sets what the guest boots.
    PutBootSource(BootSource),
    /// Sets processors and memory.
    PutMachineConfig(MachineConfig),
    /// Changes what it names of processors and memory.
    PatchMachineConfig(MachineConfigUpdate),
    /// Sets what the processors say of themselves.
    PutCpuConfig(CpuConfig),
    /// Adds a disk, or sets one of this name anew.
    PutDrive(Box<Drive>),
    /// Adds a network interface, or sets one of this name anew.
    PutNetworkInterface(Box<NetworkInterface>),
    /// Sets the socket device.
    PutVsock(Vsock),
    /// Sets the entropy device.
    PutEntropy(Entropy),
    /// Sets where the serial console writes.
    PutSerial(Serial),
    /// Sets where log lines go, and which.
    PutLogger(Logger),
    /// Sets where counters are written.
    PutMetrics(Metrics),
    /// Sets up the metadata service.
    PutMetadataConfig(MmdsConfig),
    /// Sets the data of the metadata service.
    PutMetadata(Value),
    /// Merges this into the data of the metadata service (RFC 7396).
    PatchMetadata(Value),

    /// Builds the machine and lets the guest run.
    Start,
    /// Lets the processors and then the devices stand still.
    Pause,
    /// Lets the devices and then the processors go on.
    Resume,
    /// Asks the guest to shut down.
    SendCtrlAltDel,
    /// Writes the counters out now.
    FlushMetrics,
    /// Changes a disk of a running guest.
    PatchDrive(DriveUpdate),
    /// Plugs the cable of a network interface of a running guest in or out.
    SetLink {
        /// Its name.
        iface_id: String,
        /// In.
        up: bool,
    },
    /// Changes a network interface of a running guest.
    PatchNetworkInterface(NetworkInterfaceUpdate),

    /// Takes a snapshot of the guest.
    CreateSnapshot(SnapshotCreate),
    /// Builds the machine that a snapshot is of, in its state.
    LoadSnapshot(Box<SnapshotLoad>),
}

impl fmt::Display for Command {
    /// The act, as it stands after "cannot".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let act = match self {
            Self::GetInstance => "tell what runs here",
            Self::GetVersion => "tell the version",
            Self::GetConfig => "tell the description of the machine",
            Self::GetMachineConfig => "tell processors and memory",
            Self::GetMetadata => "tell the metadata",
            Self::GetMetrics { .. } => "tell the counters",
            Self::PutBootSource(_) => "set the boot source",
            Self::PutMachineConfig(_) => "set processors and memory",
            Self::PatchMachineConfig(_) => "change processors and memory",
            Self::PutCpuConfig(_) => "set what the processors say of themselves",
            Self::PutDrive(drive) => return write!(f, "add drive {:?}", drive.drive_id),
            Self::PutNetworkInterface(interface) => {
                return write!(f, "add network interface {:?}", interface.iface_id);
            }
            Self::PutVsock(_) => "set the socket device",
            Self::PutEntropy(_) => "set the entropy device",
            Self::PutSerial(_) => "set the serial console",
            Self::PutLogger(_) => "set the log",
            Self::PutMetrics(_) => "set where counters are written",
            Self::PutMetadataConfig(_) => "set up the metadata service",
            Self::PutMetadata(_) => "set the metadata",
            Self::PatchMetadata(_) => "change the metadata",
            Self::Start => "start the guest",
            Self::Pause => "pause the guest",
            Self::Resume => "resume the guest",
            Self::SendCtrlAltDel => "ask the guest to shut down",
            Self::FlushMetrics => "write the counters out",
            Self::PatchDrive(update) => return write!(f, "change drive {:?}", update.drive_id),
            Self::SetLink { iface_id, .. } => {
                return write!(f, "change the link of network interface {iface_id:?}");
            }
            Self::PatchNetworkInterface(update) => {
                return write!(f, "change network interface {:?}", update.iface_id);
            }
            Self::CreateSnapshot(create) => {
                return write!(f, "take snapshot {:?}", create.snapshot_path);
            }
            Self::LoadSnapshot(load) => {
                return write!(f, "load snapshot {:?}", load.snapshot_path);
            }
        };
        f.write_str(act)
    }
}

/// What is answered to a command that was carried out.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It is done; there is nothing to tell.
    Done,
    /// What runs here.
    Instance(InstanceInfo),
    /// Version of the API that is spoken.
    Version(String),
    /// The whole description.
    Config(Box<VmConfig>),
    /// Processors and memory.
    MachineConfig(MachineConfig),
    /// The data of the metadata service.
    Metadata(Value),
    /// A snapshot was taken while the guest went on.
    Snapshot(SnapshotTaken),
    /// Text that is no JSON.
    Text {
        /// What it is: a media type.
        content_type: &'static str,
        /// The text.
        text: String,
    },
}

/// What came of a live snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotTaken {
    /// How long the guest stood still, in microseconds.
    pub stood_still_us: u64,
    /// Of it, how long images of disks were copied.
    pub disks_us: u64,
    /// Bytes of guest memory that are in the memory file; pages of zeros are not.
    pub memory_bytes: u64,
    /// The ids of the memory files that it is made of, the oldest first, its own last: of a full one, that alone.
    pub memory_ids: Vec<String>,
}

/// What runs here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceInfo {
    /// Name of this machine.
    pub id: String,
    /// Its state.
    pub state: State,
    /// Version of this program.
    pub vmm_version: String,
    /// Name of this program.
    pub app_name: String,
}

/// Why a command was not carried out: what failed, why, and what to do. Clients read the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not in this state.
    #[error("cannot {act}: {why}")]
    State {
        /// The act.
        act: String,
        /// What keeps it from being done, and what to do.
        why: &'static str,
    },
    /// What it needs does not exist in this program.
    #[error("{0} not built yet in this program: leave it out")]
    NotBuilt(&'static str),
    /// The request is larger than is taken.
    #[error("{0}")]
    TooLarge(String),
    /// It was tried and failed, or makes no sense.
    #[error("{0}")]
    Failed(String),
}
