//! Which pages a guest of a snapshot touches first: recorded at one load, read from the memory file at the next ones, while the guest goes on.
//!
//! Reading is all that is done (readahead(2)). To map the pages, too, would spare a guest whose memory file is in the page cache some
//! faults, and cost each clone the time for it and page tables, whether it touches them or not.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestRam, MemoryMap, PageSet, read_ahead};
use alveole_saved_state::{MAX_FILE_BYTES, SavedState, StateFile};
use alveole_thread_sandbox::Role;
use serde::{Deserialize, Serialize};

use crate::resources::{self, ResourceError};
use crate::snapshot::new_file::New;
use crate::snapshot::state::LayerV1;

const KIND: &str = "working set";
const VERSION: u32 = 1;
/// Of the thread, and of what it is called in messages about refused system calls.
const NAME: &str = "working set";
/// What this process has mapped of its memory.
const PAGEMAP: &str = "/proc/self/pagemap";

/// The one section of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkingSetV1 {
    /// The id of the newest memory file.
    memory_id: String,
    /// First page and how many, in order.
    runs: Vec<(u64, u64)>,
}

/// What to do about a working set, with what it needs open.
pub(crate) enum WorkingSetPlan {
    /// These pages are read.
    Read(Vec<(u64, u64)>),
    /// It is recorded.
    Record {
        pagemap: File,
        path: PathBuf,
        after: Duration,
        writer: String,
    },
}

impl WorkingSetPlan {
    /// Looks what is at `path`.
    ///
    /// # Errors
    /// Something else than a working set: it is not written over.
    pub(crate) fn open(
        path: &Path,
        after: Duration,
        newest: Option<&LayerV1>,
    ) -> Result<Option<Self>, String> {
        let id = newest.map(|layer| &*layer.id).unwrap_or_default();
        match read(path) {
            Ok(Some(set)) if set.memory_id == id => return Ok(Some(Self::Read(set.runs))),
            Ok(Some(_)) => log::info!(
                "{} is the working set of another snapshot: recording it anew",
                path.display()
            ),
            Ok(None) => {}
            Err(why) => {
                return Err(format!(
                    "working_set_path {path:?}: {why}; name another file, or remove it"
                ));
            }
        }
        Ok(match File::open(PAGEMAP) {
            Ok(pagemap) => Some(Self::Record {
                pagemap,
                path: path.to_owned(),
                after,
                writer: concat!("Alveole ", env!("CARGO_PKG_VERSION")).to_owned(),
            }),
            Err(e) => {
                // As in a jail, which has no /proc: whoever loads it outside can record it.
                log::warn!("the working set is not recorded: cannot open {PAGEMAP}: {e}");
                None
            }
        })
    }
}

fn read(path: &Path) -> Result<Option<WorkingSetV1>, String> {
    let file = match resources::open("working set", path) {
        Ok(file) => file,
        Err(ResourceError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(e) => return Err(e.to_string()),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    let mut file = StateFile::read(&bytes).map_err(|e| e.to_string())?;
    let saved = file.take(KIND).map_err(|e| e.to_string())?;
    let set = saved.unpack(KIND, VERSION);
    set.map(Some).map_err(|e| e.to_string())
}

/// A thread that reads a working set ahead, or records it. Dropped, it does no more.
pub(crate) struct WorkingSet {
    /// Says that the guest runs.
    runs: Sender<()>,
    /// Who records.
    recorder: Option<JoinHandle<()>>,
}

impl WorkingSet {
    /// Starts the thread. `files` are those of `layers`.
    pub(crate) fn start(
        plan: WorkingSetPlan,
        files: Vec<File>,
        layers: Vec<LayerV1>,
        ram: GuestRam,
    ) -> io::Result<Self> {
        let (runs, told) = mpsc::channel();
        let records = matches!(plan, WorkingSetPlan::Record { .. });
        let thread = std::thread::Builder::new()
            .name(NAME.into())
            .stack_size(alveole_thread_sandbox::STACK_BYTES)
            .spawn(move || {
                if let Err(e) = alveole_thread_sandbox::enter(Role::Files, NAME) {
                    log::warn!("the working set is left alone: {e}");
                    return;
                }
                let done = match plan {
                    WorkingSetPlan::Read(runs) => ahead(runs, &files, &layers, &ram, &told),
                    WorkingSetPlan::Record {
                        pagemap,
                        path,
                        after,
                        writer,
                    } => record(&pagemap, &path, after, &writer, &layers, &ram, &told),
                };
                if let Err(why) = done {
                    log::warn!("the working set: {why}");
                }
            })?;
        Ok(Self {
            runs,
            recorder: records.then_some(thread),
        })
    }

    /// The guest runs.
    pub(crate) fn guest_runs(&self) {
        let _ = self.runs.send(());
    }

    /// The guest has ended: what it has touched by now is recorded, if it was to be.
    pub(crate) fn end(self) {
        let Self { runs, recorder } = self;
        drop(runs);
        if let Some(recorder) = recorder {
            let _ = recorder.join();
        }
    }
}

fn ahead(
    runs: Vec<(u64, u64)>,
    files: &[File],
    layers: &[LayerV1],
    ram: &GuestRam,
    told: &Receiver<()>,
) -> Result<(), String> {
    let start = Instant::now();
    let runs = runs
        .into_iter()
        .map(|(first, pages)| first..first.saturating_add(pages));
    let set = PageSet::from_runs(ram.pages(), runs).map_err(|e| e.to_string())?;
    let layers: Vec<_> = files.iter().zip(maps(layers)).collect();
    let goes_on = || !matches!(told.try_recv(), Err(TryRecvError::Disconnected));
    read_ahead(&layers, &set, goes_on).map_err(|e| e.to_string())?;
    log::info!(
        "working set: {} pages read ahead within {:?}",
        set.count(),
        start.elapsed()
    );
    Ok(())
}

fn record(
    pagemap: &File,
    path: &Path,
    after: Duration,
    writer: &str,
    layers: &[LayerV1],
    ram: &GuestRam,
    told: &Receiver<()>,
) -> Result<(), String> {
    // Of a guest that never ran there is nothing to record.
    if told.recv().is_err() {
        return Ok(());
    }
    let start = Instant::now();
    while let Some(left) = after.checked_sub(start.elapsed()) {
        match told.recv_timeout(left) {
            Ok(()) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    let touched = ram.touched(pagemap).map_err(|e| e.to_string())?;
    let newest = layers.last().map(|layer| layer.id.clone());
    let set = WorkingSetV1 {
        memory_id: newest.unwrap_or_default(),
        runs: touched
            .runs()
            .map(|run| (run.start, run.end - run.start))
            .collect(),
    };
    let mut state = StateFile::new(writer);
    state.add(SavedState::pack(KIND, VERSION, &set));
    let file = New::beside(path)?;
    file.file
        .write_all_at(&state.to_bytes(), 0)
        .map_err(|e| e.to_string())?;
    file.put()?;
    log::info!(
        "working set: {} pages recorded in {}",
        touched.count(),
        path.display()
    );
    Ok(())
}

fn maps(layers: &[LayerV1]) -> impl Iterator<Item = &MemoryMap> {
    layers.iter().map(|layer| &layer.map)
}
