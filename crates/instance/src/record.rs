//! What is written down about a VM.

use std::collections::BTreeMap;
use std::path::PathBuf;

use alveole_agent_protocol::Process;
use serde::{Deserialize, Serialize};

/// What a VM is: written when it is made, and when it is changed (`Vm::change`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The version of this file.
    pub version: u32,
    /// Twelve hexadecimal digits, never another VM's.
    pub id: String,
    /// The image as it was asked for.
    pub image: String,
    /// The image's own id.
    pub image_id: String,
    /// When it was made: milliseconds since 1970.
    pub created_ms: u64,
    /// The disk with the image's root, which is only read.
    pub root_disk: PathBuf,
    /// The kernel, by its name among those of `alveole kernel`, or its file.
    pub kernel: String,
    /// Number of processors.
    pub cpus: u8,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// What the processors are to say of themselves: a file as the API's `PUT /cpu-config` has it.
    #[serde(default)]
    pub cpu_config: Option<PathBuf>,
    /// The size of the disk that takes the root's changes; none: they stay in memory.
    pub disk_bytes: Option<u64>,
    /// The root is not to be changed at all.
    pub read_only: bool,
    /// What the guest calls itself.
    pub hostname: String,
    /// The words of the command line about networks.
    pub network: Vec<String>,
    /// Ports of the image on free ports of this host, in those words; when one is taken by the next start, another one is chosen.
    #[serde(default)]
    pub published_free: Vec<String>,
    /// The main process.
    pub process: Process,
    /// The signal that asks it to end.
    pub stop_signal: u8,
    /// Words for people and programs.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What happens after its end.
    pub restart: Restart,
    /// It is removed after its end.
    pub remove: bool,
    /// What its disks and interfaces may carry.
    #[serde(default)]
    pub limits: Limits,
    /// What lies in its root and is no part of it, each after those it lies in.
    #[serde(default)]
    pub volumes: Vec<Placed>,
    /// The size of `/dev/shm`.
    #[serde(default)]
    pub shm_bytes: Option<u64>,
}

/// What each of a VM's disks and network interfaces may carry; none: as much as it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes a second that a disk reads and writes.
    pub disk_bytes_per_s: Option<u64>,
    /// Requests a second of a disk.
    pub disk_operations_per_s: Option<u64>,
    /// Bytes a second of an interface, each way.
    pub network_bytes_per_s: Option<u64>,
}

/// Something at a place of a guest's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// Where it is in the guest.
    pub target: String,
    /// What it is.
    pub what: Content,
    /// The guest cannot change it.
    #[serde(default)]
    pub read_only: bool,
    /// While it is empty, it gets what the image has at its place.
    #[serde(default)]
    pub fill: bool,
}

/// What lies at a place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// A folder or file of this host, copied at each start.
    Host(PathBuf),
    /// The volume of this name.
    Volume(String),
    /// The VM's own, removed with it.
    Own,
    /// Memory, with these options of tmpfs.
    Memory(String),
}

/// The version of [`Record`] that this program writes.
pub(crate) const VERSION: u32 = 1;

/// What happens after the main process's end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Nothing.
    #[default]
    No,
    /// It is started again if it failed, at most so often.
    OnFailure(Option<u32>),
    /// It is started again unless somebody stopped it.
    Always,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The exit status as shells say it.
    pub status: u8,
    /// When: milliseconds since 1970.
    pub at_ms: u64,
    /// What else there is to say: why it did not start, or how the machine broke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// What a keeper writes down while it keeps a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// `starting`, `running` or `stopping`.
    pub phase: String,
    /// Since when the machine runs: milliseconds since 1970.
    pub started_ms: u64,
    /// How often it was started again by itself.
    pub restarts: u32,
    /// The monitor's process, for people to look at. Whoever wants something of the VM asks its keeper.
    pub monitor_pid: Option<u32>,
    /// The keeper's process.
    pub keeper_pid: u32,
    /// Processors of the machine that runs: what the record says is for the next one.
    #[serde(default)]
    pub cpus: u8,
    /// Its memory, in MiB.
    #[serde(default)]
    pub memory_mib: u64,
    /// The main process's number in the guest, once it runs.
    #[serde(default)]
    pub main_pid: Option<u32>,
    /// The words about networks that the guest was set up by, or became somebody else by: what a copy of it is told apart by.
    #[serde(default)]
    pub network: Vec<String>,
}

/// What a VM does, as its folder says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was made and never started.
    Created,
    /// Somebody keeps it.
    Kept(Phase),
    /// It has ended.
    Ended(Ended),
    /// Its keeper was killed, or the host went down: nobody wrote down how it ended.
    Lost,
}
