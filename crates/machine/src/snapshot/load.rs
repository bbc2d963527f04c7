//! A snapshot's files, opened and read before anything is built of them.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use alveole_guest_memory::{GuestRam, PageServer, ServeError};
use alveole_hypervisor::RestoredClock;
use alveole_saved_state::{
    FormatError, Header, MAX_FILE_BYTES, RestoreError, SavedState, StateFile,
};
use alveole_vm_config::{
    ConfigError, HugePages, MemoryBackendType, SnapshotLoad, VmConfig, WORKING_SET_MS,
};

use crate::build::{BuildError, Options, Transport, map_memory};
use crate::resources::{self, ResourceError};
use crate::snapshot::LAYOUT;
use crate::snapshot::state::{
    self, DriveCopyV1, LayerV1, MARK, MARK_BYTES, MachineStateV1, MemoryStateV1, RangeV1,
    TransportV1,
};
use crate::snapshot::working_set::WorkingSetPlan;
use crate::validate;

/// Why a snapshot cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened.
    #[error(transparent)]
    Open(#[from] ResourceError),
    /// A file cannot be read.
    #[error("cannot read {path:?}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The state is no state.
    #[error("{path:?}: {source}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// A part of the state is none.
    #[error("{path:?}: {source}")]
    Part {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: RestoreError,
    },
    /// The description in it is none.
    #[error("{path:?}: the description of the machine in it is none: {source}")]
    Description {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ConfigError,
    },
    /// The description in it is of no machine that can be.
    #[error("{path:?}: the machine that it describes cannot be built: {why}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong.
        why: String,
    },
    /// What is named anew is not there.
    #[error("{path:?}: {what}; the snapshot has {known}")]
    Override {
        /// The file.
        path: PathBuf,
        /// What was to be named anew.
        what: String,
        /// What there is.
        known: String,
    },
    /// It is of a machine whose parts lie elsewhere.
    #[error(
        "{path:?}: it is of a machine of layout {found}, this program builds layout {LAYOUT}: load it with the version that wrote it"
    )]
    Layout {
        /// The file.
        path: PathBuf,
        /// Of the snapshot.
        found: u32,
    },
    /// A memory file is not the one that belongs to the state.
    #[error("{path:?} is not the memory that belongs to the snapshot: {why}")]
    Memory {
        /// The memory file.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// The process that is to serve memory is not there.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The working set cannot be used.
    #[error("{0}")]
    WorkingSet(String),
    /// Something else was prepared.
    #[error(
        "{what} differs from what this process has prepared: load that, or in a process of its own"
    )]
    NotPrepared {
        /// What.
        what: &'static str,
    },
    /// What cannot be prepared.
    #[error(
        "memory that a process serves cannot be prepared, as each guest has pages of its own there: name a memory file, or load it in a process of its own"
    )]
    PreparedServer,
    /// What copies of a process do not get.
    #[error(
        "memory in huge pages of 2 MiB (hugetlbfs) cannot be prepared, as copies of a process do not inherit them: say huge_pages \"Transparent\" or \"None\", or load it in a process of its own"
    )]
    PreparedHugePages,
}

impl LoadError {
    /// Whether another snapshot, or one that is loaded otherwise, would help, and not another host.
    #[must_use]
    pub fn blames_snapshot(&self) -> bool {
        match self {
            Self::Serve(e) => matches!(e, ServeError::Connect { .. }),
            _ => true,
        }
    }
}

/// A snapshot whose files are open and whose state has been read, before anything is named anew: a process that has this, and is copied, need
/// not do so again.
pub struct Prepared {
    load: SnapshotLoad,
    config: VmConfig,
    machine: MachineStateV1,
    memory: MemoryStateV1,
    copies: Vec<DriveCopyV1>,
    source: MemorySource,
    state: StateFile,
    ram: Option<GuestRam>,
}

/// A snapshot whose files are open: what the machine is, and what is put into it.
pub struct Snapshot {
    config: VmConfig,
    machine: MachineStateV1,
    pub(crate) ranges: Vec<RangeV1>,
    /// The memory files that it is of, the oldest first.
    pub(crate) layers: Vec<LayerV1>,
    pub(crate) memory: MemorySource,
    /// The memory, if that has been mapped already.
    pub(crate) ram: Option<GuestRam>,
    pub(crate) state: StateFile,
    pub(crate) clock: RestoredClock,
    pub(crate) resume: bool,
    /// Interfaces that are named anew, and whether their cables are in.
    pub(crate) cables: Vec<(String, bool)>,
    pub(crate) working_set: Option<WorkingSetPlan>,
}

/// Where memory comes from.
pub(crate) enum MemorySource {
    /// Its files, as many as layers.
    Files(Vec<File>),
    /// A process that puts in each page when it is first touched. It has the memory of all layers, as one file of all of
    /// RAM would have it; which it took for that is its own business.
    Server(PageServer),
}

impl Prepared {
    /// Opens the files that `load` names, and reads the state.
    ///
    /// # Errors
    /// A file is missing, is not a snapshot's, is damaged, or newer than this program.
    pub fn open(load: &SnapshotLoad) -> Result<Self, LoadError> {
        let path = &load.snapshot_path;
        let format = |source| LoadError::Format {
            path: path.clone(),
            source,
        };
        let mut state = StateFile::read(&read_bounded(path)?).map_err(format)?;
        let mut take = |kind: &str| state.take(kind).map_err(format);
        let description = take(state::DESCRIPTION)?;
        let (machine, memory) = (take(state::MACHINE)?, take(state::MEMORY)?);
        let machine: MachineStateV1 = part(path, &machine, state::MACHINE, state::MACHINE_VERSION)?;
        let memory: MemoryStateV1 = part(path, &memory, state::MEMORY, state::MEMORY_VERSION)?;
        if machine.layout != LAYOUT {
            return Err(LoadError::Layout {
                path: path.clone(),
                found: machine.layout,
            });
        }
        let config = described(path, &description)?;
        let copies = match state.take_if_any(state::DRIVES) {
            Some(drives) => part(path, &drives, state::DRIVES, state::DRIVES_VERSION)?,
            None => Vec::new(),
        };
        let source = open_memory(load, &memory)?;
        Ok(Self {
            load: load.clone(),
            config,
            machine,
            memory,
            copies,
            source,
            state,
            ram: None,
        })
    }

    /// Maps the memory, too. Copies of this process share what of it they do not write.
    ///
    /// # Errors
    /// The description in it is none of a machine, or not of this memory; the host does not map it; a process is to serve it.
    pub fn map_memory(&mut self) -> Result<(), BuildError> {
        if matches!(self.source, MemorySource::Server(_)) {
            return Err(BuildError::Load(LoadError::PreparedServer));
        }
        let pages = self.huge_pages(&self.load);
        if pages == HugePages::Hugetlb2M {
            return Err(BuildError::Load(LoadError::PreparedHugePages));
        }
        let path = &self.load.snapshot_path;
        let valid = validate(&self.config).map_err(|broken| {
            let all: Vec<_> = broken.iter().map(ToString::to_string).collect();
            BuildError::Load(LoadError::Invalid {
                path: path.clone(),
                why: all.join("; "),
            })
        })?;
        let ram = map_memory(
            &valid,
            &self.memory.ranges,
            &self.source,
            &self.memory.layers,
            pages,
        )?;
        self.ram = Some(ram);
        Ok(())
    }

    /// What `load` makes of it, which names the same files.
    ///
    /// # Errors
    /// Something is to be named anew that the snapshot does not have; or `load` is of another snapshot.
    pub fn snapshot(self, load: &SnapshotLoad) -> Result<Snapshot, LoadError> {
        for (what, same) in [
            (
                "snapshot_path",
                load.snapshot_path == self.load.snapshot_path,
            ),
            ("mem_backend", load.mem_backend == self.load.mem_backend),
            (
                "huge_pages",
                self.ram.is_none() || self.huge_pages(load) == self.huge_pages(&self.load),
            ),
        ] {
            if !same {
                return Err(LoadError::NotPrepared { what });
            }
        }
        let pages = self.huge_pages(load);
        let Self {
            mut config,
            machine,
            memory,
            copies,
            source,
            state,
            ram,
            ..
        } = self;
        name_anew(load, &mut config)?;
        warn_of_originals(load, &copies);
        config.machine_config.track_dirty_pages = load.track_dirty_pages;
        config.machine_config.huge_pages = pages;
        let working_set = match pages {
            HugePages::None => plan_working_set(load, &memory, &source)?,
            // All is read before it runs.
            HugePages::Transparent | HugePages::Hugetlb2M => None,
        };
        Ok(Snapshot {
            config,
            machine,
            memory: source,
            ram,
            working_set,
            layers: memory.layers,
            ranges: memory.ranges,
            state,
            clock: match load.clock_realtime {
                true => RestoredClock::AdvanceByWallTime,
                false => RestoredClock::AsSaved,
            },
            resume: load.resume_vm,
            cables: load
                .network_overrides
                .iter()
                .map(|new| (new.iface_id.clone(), new.link_up))
                .collect(),
        })
    }

    /// What `load` says of them, and else the snapshot.
    fn huge_pages(&self, load: &SnapshotLoad) -> HugePages {
        load.huge_pages
            .unwrap_or(self.config.machine_config.huge_pages)
    }
}

impl Snapshot {
    /// Opens the files that `load` names, and reads the state.
    ///
    /// # Errors
    /// As [`Prepared::open`] and [`Prepared::snapshot`].
    pub fn open(load: &SnapshotLoad) -> Result<Self, LoadError> {
        Prepared::open(load)?.snapshot(load)
    }

    /// What every version of this program can say of a snapshot: version of its form, and who wrote it.
    ///
    /// # Errors
    /// The file is missing, or no snapshot's state.
    pub fn describe(path: &Path) -> Result<String, LoadError> {
        let header = Header::read(&read_bounded(path)?).map_err(|source| LoadError::Format {
            path: path.to_owned(),
            source,
        })?;
        Ok(format!("v{}.0.0", header.format))
    }

    /// The description of the machine, with what was named anew.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// `options`, with what the guest has seen of the machine already.
    #[must_use]
    pub fn options(&self, options: Options) -> Options {
        Options {
            boot_timer: self.machine.boot_timer,
            transport: match self.machine.transport {
                TransportV1::Mmio => Transport::Mmio,
                TransportV1::Pci => Transport::Pci,
            },
            ..options
        }
    }
}

/// The description in the state at `path`.
pub(super) fn described(path: &Path, saved: &SavedState) -> Result<VmConfig, LoadError> {
    VmConfig::from_json_bytes(&saved.bytes, state::DESCRIPTION).map_err(|source| {
        LoadError::Description {
            path: path.to_owned(),
            source,
        }
    })
}

pub(super) fn part<T: serde::de::DeserializeOwned>(
    path: &Path,
    saved: &SavedState,
    kind: &str,
    version: u32,
) -> Result<T, LoadError> {
    saved
        .unpack(kind, version)
        .map_err(|source| LoadError::Part {
            path: path.to_owned(),
            source,
        })
}

/// Everything that lies elsewhere than where the snapshot was taken.
fn name_anew(load: &SnapshotLoad, config: &mut VmConfig) -> Result<(), LoadError> {
    let unknown = |what: String, known: Vec<&str>| LoadError::Override {
        path: load.snapshot_path.clone(),
        what,
        known: if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        },
    };
    for new in &load.network_overrides {
        let all = &mut config.network_interfaces;
        match all.iter_mut().find(|i| i.iface_id == new.iface_id) {
            Some(interface) => {
                interface.host_dev_name.clone_from(&new.host_dev_name);
                interface.link = new.link.unwrap_or(interface.link);
                if new.vhost_fds.is_some() {
                    interface.vhost_fds.clone_from(&new.vhost_fds);
                }
                if new.egress.is_some() {
                    interface.egress.clone_from(&new.egress);
                }
            }
            None => {
                let known = config.network_interfaces.iter().map(|i| &*i.iface_id);
                return Err(unknown(
                    format!("network_overrides name interface {:?}", new.iface_id),
                    known.collect(),
                ));
            }
        }
    }
    for new in &load.drive_overrides {
        match config
            .drives
            .iter_mut()
            .find(|d| d.drive_id == new.drive_id)
        {
            Some(drive) => {
                drive.path_on_host.clone_from(&new.path_on_host);
                if new.format.is_some() {
                    (drive.format, drive.backing) = (new.format, None);
                }
                drive.backing = new.backing.or(drive.backing);
            }
            None => {
                let known = config.drives.iter().map(|d| &*d.drive_id);
                return Err(unknown(
                    format!("drive_overrides name drive {:?}", new.drive_id),
                    known.collect(),
                ));
            }
        }
    }
    if let Some(new) = &load.vsock_override {
        match &mut config.vsock {
            Some(vsock) => vsock.uds_path.clone_from(&new.uds_path),
            None => {
                return Err(unknown(
                    "vsock_override names a socket device".into(),
                    Vec::new(),
                ));
            }
        }
    }
    Ok(())
}

fn plan_working_set(
    load: &SnapshotLoad,
    memory: &MemoryStateV1,
    source: &MemorySource,
) -> Result<Option<WorkingSetPlan>, LoadError> {
    let wrong = |why: &str| Err(LoadError::WorkingSet(why.to_owned()));
    match (&load.working_set_path, source) {
        (None, _) if load.working_set_ms.is_some() => {
            wrong("working_set_ms is given without working_set_path: add that, or leave it out")
        }
        (None, _) => Ok(None),
        (Some(_), MemorySource::Server(_)) => wrong(
            "working_set_path is given, and memory is served by a process, which puts in pages as it likes: leave it out",
        ),
        (Some(path), MemorySource::Files(_)) => {
            let after = Duration::from_millis(load.working_set_ms.unwrap_or(WORKING_SET_MS));
            let plan = WorkingSetPlan::open(path, after, memory.layers.last());
            plan.map_err(LoadError::WorkingSet)
        }
    }
}

/// A disk that was copied, and is not named anew, is that with which the guest went on.
fn warn_of_originals(load: &SnapshotLoad, copies: &[DriveCopyV1]) {
    for DriveCopyV1 { drive_id, path } in copies {
        let mut anew = load.drive_overrides.iter();
        if !anew.any(|new| new.drive_id == *drive_id) {
            log::warn!(
                "drive {drive_id}: what the guest has written since the snapshot is on its disk; name its copy {}, or an image over it, \
                 in drive_overrides",
                path.display()
            );
        }
    }
}

pub(super) fn open_memory(
    load: &SnapshotLoad,
    memory: &MemoryStateV1,
) -> Result<MemorySource, LoadError> {
    let mut newest = None;
    if let Some(backend) = &load.mem_backend {
        if backend.backend_type == MemoryBackendType::Uffd {
            let server = PageServer::connect(&backend.backend_path)?;
            return Ok(MemorySource::Server(server));
        }
        newest = Some(&backend.backend_path);
    }
    let size = memory.size_bytes();
    let last = memory.layers.len().saturating_sub(1);
    let mut files = Vec::new();
    for (index, layer) in memory.layers.iter().enumerate() {
        let named = newest.filter(|_| index == last);
        let path = match named {
            Some(path) => path.clone(),
            None => find_layer(layer, &load.snapshot_path, newest.map(|path| &**path)),
        };
        let file = resources::open("memory file", &path)?;
        check_mark(&file, &path, size, layer)?;
        files.push(file);
    }
    Ok(MemorySource::Files(files))
}

/// Where a memory file of a chain is: beside the state, with its id behind its name, which is what keeps those of a chain apart that
/// all had one name; or where [`find`] finds it.
pub(super) fn find_layer(layer: &LayerV1, state: &Path, memory: Option<&Path>) -> PathBuf {
    let beside = || {
        let mut name = layer.path.file_name()?.to_owned();
        name.push(format!("-{}", layer.id));
        let path = state.parent()?.join(name);
        path.exists().then_some(path)
    };
    beside().unwrap_or_else(|| find(&layer.path, state, memory))
}

/// Where a file of a snapshot is: where it was written, or, if that is gone, beside the files of the snapshot, which may have been moved
/// together.
pub(super) fn find(written: &Path, state: &Path, memory: Option<&Path>) -> PathBuf {
    if written.exists() {
        return written.to_owned();
    }
    let beside = |other: &Path| Some(other.parent()?.join(written.file_name()?));
    [memory, Some(state)]
        .into_iter()
        .flatten()
        .filter_map(beside)
        .find(|path| path.exists())
        .unwrap_or_else(|| written.to_owned())
}

pub(super) fn check_mark(
    file: &File,
    path: &Path,
    size: u64,
    layer: &LayerV1,
) -> Result<(), LoadError> {
    let wrong = |why: String| LoadError::Memory {
        path: path.to_owned(),
        why,
    };
    let meta = file.metadata().map_err(|source| LoadError::File {
        path: path.to_owned(),
        source,
    })?;
    let wanted = size.saturating_add(MARK_BYTES as u64);
    if meta.len() != wanted {
        return Err(wrong(format!(
            "it has {} bytes, {wanted} are needed: it was cut, is not whole yet, or of another guest",
            meta.len()
        )));
    }
    let mut mark = [0; MARK_BYTES];
    file.read_exact_at(&mut mark, size)
        .map_err(|source| LoadError::File {
            path: path.to_owned(),
            source,
        })?;
    let (says, id) = mark.split_at(MARK.len());
    if says != MARK {
        return Err(wrong("it has no mark behind its pages".into()));
    }
    if id != layer.id.as_bytes() {
        return Err(wrong(format!(
            "its id is {}, that of the snapshot's is {}: a snapshot was taken anew over one of the two files, or the wrong one is named",
            String::from_utf8_lossy(id),
            layer.id
        )));
    }
    Ok(())
}

pub(super) fn read_bounded(path: &Path) -> Result<Vec<u8>, LoadError> {
    let failed = |source| LoadError::File {
        path: path.to_owned(),
        source,
    };
    let file = resources::open("snapshot", path)?;
    let len = file.metadata().map_err(failed)?.len();
    // And one, so that the end is found without growing.
    let room = usize::try_from(len).map_or(MAX_FILE_BYTES, |len| len.saturating_add(1));
    let mut bytes = Vec::with_capacity(room.min(MAX_FILE_BYTES));
    file.take(MAX_FILE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(bytes)
}
