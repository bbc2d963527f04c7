//! What can be done with the files of a snapshot without a machine: to look whether they are whole, and to make one of a chain.

use std::fs::File;
use std::path::{Path, PathBuf};

use alveole_guest_memory::{GuestRam, MemoryMap, PageKind, PageSet, newest_of_layers};
use alveole_hypervisor::{CpuState, PartitionState};
use alveole_saved_state::{Header, SavedState, StateFile};
use alveole_vm_config::{Drive, MemoryBackend, MemoryBackendType, SnapshotLoad, VmConfig};

use crate::snapshot::load::{
    LoadError, check_mark, described, find, find_layer, open_memory, part, read_bounded,
};
use crate::snapshot::state::{
    self, DriveCopyV1, LayerV1, MachineStateV1, MemoryStateV1, TransportV1,
};
use crate::snapshot::write::{Flat, write_flat};
use crate::snapshot::{LAYOUT, MemorySource};
use crate::{resources, validate};

const PAGE_BYTES: u64 = 4096;
const MIB_SHIFT: u32 = 20;

/// What a snapshot was found to be.
#[derive(Debug, Clone, Default)]
pub struct Verified {
    /// What there is, a line each.
    pub found: Vec<String>,
    /// What is wrong; nothing: the snapshot is whole.
    pub wrong: Vec<String>,
}

impl Verified {
    fn note<T>(&mut self, outcome: Result<T, impl ToString>) -> Option<T> {
        outcome.map_err(|e| self.wrong.push(e.to_string())).ok()
    }
}

/// Reads the whole state at `path`, opens the chain of memory files (the newest at `memory`, if that is given), and looks whether all belongs together and
/// what it names is there. Whether a host can carry on with it only a load says; of what is in memory nothing can be said.
#[must_use]
pub fn verify(path: &Path, memory: Option<&Path>) -> Verified {
    let mut verified = Verified::default();
    let Some(bytes) = verified.note(read_bounded(path)) else {
        return verified;
    };
    let format = |source| LoadError::Format {
        path: path.to_owned(),
        source,
    };
    if let Ok(Header { format, writer, .. }) = Header::read(&bytes) {
        let len = bytes.len();
        verified.found.push(format!(
            "state {}: form {format}, of {writer}, {len} bytes",
            path.display()
        ));
    }
    let Some(mut state) = verified.note(StateFile::read(&bytes).map_err(format)) else {
        return verified;
    };
    for SavedState {
        kind,
        version,
        bytes,
    } in state.sections()
    {
        let len = bytes.len();
        verified
            .found
            .push(format!("section {kind:?}: version {version}, {len} bytes"));
    }
    let config = description(path, &mut state, &mut verified);
    machine(path, &mut state, &mut verified);
    processors(path, &mut state, config.as_ref(), &mut verified);
    memory_files(path, memory, &mut state, config.as_ref(), &mut verified);
    let copies: Vec<DriveCopyV1> = match state.take_if_any(state::DRIVES) {
        Some(saved) => verified
            .note(part(path, &saved, state::DRIVES, state::DRIVES_VERSION))
            .unwrap_or_default(),
        None => Vec::new(),
    };
    for drive in config.iter().flat_map(|config| &config.drives) {
        drive_files(path, drive, &copies, &mut verified);
    }
    verified
}

/// The part of this kind, if it is there and whole.
fn taken<T: serde::de::DeserializeOwned>(
    path: &Path,
    state: &mut StateFile,
    kind: &str,
    version: u32,
    verified: &mut Verified,
) -> Option<T> {
    let saved = state.take(kind).map_err(|source| LoadError::Format {
        path: path.to_owned(),
        source,
    });
    let saved = verified.note(saved)?;
    verified.note(part(path, &saved, kind, version))
}

fn description(path: &Path, state: &mut StateFile, verified: &mut Verified) -> Option<VmConfig> {
    let saved = state
        .take(state::DESCRIPTION)
        .map_err(|source| LoadError::Format {
            path: path.to_owned(),
            source,
        });
    let saved = verified.note(saved)?;
    let config = verified.note(described(path, &saved))?;
    if let Err(broken) = validate(&config) {
        let broken = broken.iter().map(|rule| format!("{path:?}: {rule}"));
        verified.wrong.extend(broken);
    }
    let machine = &config.machine_config;
    verified.found.push(format!(
        "machine: {} processors, {} MiB, {} drives, {} network interfaces",
        machine.vcpu_count,
        machine.mem_size_mib,
        config.drives.len(),
        config.network_interfaces.len()
    ));
    Some(config)
}

fn machine(path: &Path, state: &mut StateFile, verified: &mut Verified) {
    let (kind, version) = (state::MACHINE, state::MACHINE_VERSION);
    let Some(machine) = taken::<MachineStateV1>(path, state, kind, version, verified) else {
        return;
    };
    if machine.layout != LAYOUT {
        let found = machine.layout;
        let path = path.to_owned();
        verified
            .wrong
            .push(LoadError::Layout { path, found }.to_string());
    }
    verified.found.push(format!(
        "taken {} s after the beginning of 1970, of devices on {}",
        machine.saved_at_ns / 1_000_000_000,
        match machine.transport {
            TransportV1::Mmio => "virtio-mmio",
            TransportV1::Pci => "PCI",
        }
    ));
}

fn processors(
    path: &Path,
    state: &mut StateFile,
    config: Option<&VmConfig>,
    verified: &mut Verified,
) {
    let (kind, version) = (state::PARTITION, state::PARTITION_VERSION);
    taken::<PartitionState>(path, state, kind, version, verified);
    let cpus = config.map_or(0, |config| config.machine_config.vcpu_count);
    for index in 0..usize::from(cpus) {
        let kind = state::cpu(index);
        taken::<CpuState>(path, state, &kind, state::CPU_VERSION, verified);
    }
    let mut index = 0;
    while let Some(saved) = state.take_if_any(&state::device(index)) {
        let device = part::<SavedState>(path, &saved, &state::device(index), state::DEVICE_VERSION);
        verified.note(device);
        index += 1;
    }
}

fn memory_files(
    path: &Path,
    newest: Option<&Path>,
    state: &mut StateFile,
    config: Option<&VmConfig>,
    verified: &mut Verified,
) {
    let (kind, version) = (state::MEMORY, state::MEMORY_VERSION);
    let Some(memory) = taken::<MemoryStateV1>(path, state, kind, version, verified) else {
        return;
    };
    let size = memory.size_bytes();
    if let Some(config) = config
        && config.machine_config.mem_size_mib != size >> MIB_SHIFT
    {
        verified.wrong.push(format!(
            "{path:?}: its memory has {} MiB, its description says {}",
            size >> MIB_SHIFT,
            config.machine_config.mem_size_mib
        ));
    }
    let pages = size / PAGE_BYTES;
    let maps: Vec<&MemoryMap> = memory.layers.iter().map(|layer| &layer.map).collect();
    if let Err(e) = newest_of_layers(pages, &maps) {
        verified.wrong.push(format!("{path:?}: {e}"));
    }
    let last = memory.layers.len().saturating_sub(1);
    for (index, layer) in memory.layers.iter().enumerate() {
        let file = match newest.filter(|_| index == last) {
            Some(file) => file.to_owned(),
            None => find_layer(layer, path, newest),
        };
        let checked = resources::open("memory file", &file)
            .map_err(LoadError::from)
            .and_then(|open| check_mark(&open, &file, size, layer));
        if verified.note(checked).is_some() {
            verified.found.push(format!(
                "memory {}: {}, {} of {pages} pages have data",
                file.display(),
                if index == 0 { "full" } else { "diff" },
                layer.map.pages_of(PageKind::Data)
            ));
        }
    }
}

/// A disk that is copied can be had, wherever the one is with which the guest went on. Files that were moved together are found.
fn drive_files(state: &Path, drive: &Drive, copies: &[DriveCopyV1], verified: &mut Verified) {
    let copy = copies.iter().find(|copy| copy.drive_id == drive.drive_id);
    let path = copy.map_or(&drive.path_on_host, |copy| &copy.path);
    let path = &find(path, state, None);
    let of = if copy.is_some() { "its copy " } else { "" };
    match std::fs::metadata(path) {
        Ok(_) => verified
            .found
            .push(format!("drive {}: {of}{}", drive.drive_id, path.display())),
        Err(e) => verified.wrong.push(format!(
            "drive {:?}: {of}{path:?}: {e}; a load has to name it anew",
            drive.drive_id
        )),
    }
}

/// What becomes one snapshot, and where that goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flatten {
    /// The state of the chain's newest snapshot.
    pub state: PathBuf,
    /// Its memory file; none: where the state says.
    pub memory: Option<PathBuf>,
    /// Where the new state goes. It may be the old one.
    pub into_state: PathBuf,
    /// Where all of memory goes.
    pub into_memory: PathBuf,
}

/// A chain that became one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flattened {
    /// Bytes of memory that it has.
    pub memory_bytes: u64,
    /// The id of its memory file.
    pub memory_id: String,
}

/// Makes one full snapshot of a chain: the files of the chain are not needed by it. Pages of zeroes are left out.
///
/// # Errors
/// The chain is not whole, or larger than this host's memory; or the files cannot be written. Then nothing is changed.
pub fn flatten(flatten: &Flatten) -> Result<Flattened, String> {
    let path = &flatten.state;
    let told = |e: LoadError| e.to_string();
    let format = |source| LoadError::Format {
        path: path.clone(),
        source,
    };
    let bytes = read_bounded(path).map_err(told)?;
    let mut state = StateFile::read(&bytes).map_err(format).map_err(told)?;
    let saved = state.take(state::MEMORY).map_err(format).map_err(told)?;
    let memory: MemoryStateV1 =
        part(path, &saved, state::MEMORY, state::MEMORY_VERSION).map_err(told)?;
    let saved = state
        .take(state::DESCRIPTION)
        .map_err(format)
        .map_err(told)?;
    let config = described(path, &saved).map_err(told)?;
    state.add(saved);
    let plan = validate(&config)
        .map_err(|broken| {
            let all: Vec<_> = broken.iter().map(ToString::to_string).collect();
            format!("{path:?}: {}", all.join("; "))
        })?
        .memory;
    let load = SnapshotLoad {
        snapshot_path: path.clone(),
        mem_backend: flatten.memory.clone().map(|backend_path| MemoryBackend {
            backend_type: MemoryBackendType::File,
            backend_path,
        }),
        ..SnapshotLoad::default()
    };
    let source = open_memory(&load, &memory).map_err(told)?;
    let MemorySource::Files(files) = source else {
        return Err(String::from("no file has its memory"));
    };
    let ram = mapped(&plan, &files, &memory.layers).map_err(|e| format!("{path:?}: {e}"))?;
    if !memory.is_laid_out_as(&ram) {
        return Err(format!(
            "{path:?}: its memory is not laid out as its description says: it is damaged"
        ));
    }
    write_flat(Flat {
        state,
        ram: &ram,
        pages: PageSet::all(ram.pages()),
        chain: &memory.layers,
        into_state: &flatten.into_state,
        into_memory: &flatten.into_memory,
    })
}

fn mapped(
    plan: &alveole_guest_memory::MemoryPlan,
    files: &[File],
    layers: &[LayerV1],
) -> Result<GuestRam, alveole_guest_memory::MapError> {
    let layers: Vec<_> = files.iter().zip(layers.iter().map(|l| &l.map)).collect();
    GuestRam::map_snapshot(plan, &layers)
}
