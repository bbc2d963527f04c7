//! Memory and state into files, on the thread that opens files. New files come into being beside those that may be there, and take
//! their place when they are whole: memory first, then the state, which says by an id which memory it belongs to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestRam, MemoryMap, PageKind, PageSet, PreparedCapture};
use alveole_saved_state::{SavedState, StateFile};
use alveole_virtio_blk::BlkHandle;
use alveole_vm_config::SnapshotCreate;

use crate::snapshot::Flattened;
use crate::snapshot::new_file::New;
use crate::snapshot::state::{self, DriveCopyV1, ID_BYTES, LayerV1, MARK, MemoryStateV1};

const PAGE_BYTES: u64 = 4096;

/// A snapshot to write.
pub(crate) struct SnapshotJob {
    pub(crate) create: SnapshotCreate,
    /// All but memory.
    pub(crate) state: StateFile,
    pub(crate) ram: GuestRam,
    /// Which pages are written.
    pub(crate) pages: PageSet,
    /// The files that have the others, the oldest first.
    pub(crate) base: Vec<LayerV1>,
    /// The disks that `create` names, in its order.
    pub(crate) disks: Vec<BlkHandle>,
}

/// What came of writing a snapshot.
#[derive(Debug)]
pub struct Taken {
    pub(crate) outcome: Result<Written, String>,
}

impl Taken {
    pub(crate) fn failed(why: String) -> Self {
        Self { outcome: Err(why) }
    }
}

/// A snapshot that is whole.
#[derive(Debug)]
pub(crate) struct Written {
    /// The files that have memory from now on, the oldest first.
    pub(crate) layers: Vec<LayerV1>,
    /// Bytes of memory in the newest.
    pub(crate) memory_bytes: u64,
    /// How long images of disks were copied, for which the guest stood still.
    pub(crate) copying_disks: Duration,
}

/// A live snapshot whose memory is being written ahead.
pub(crate) struct Ahead {
    files: Files,
    prepared: PreparedCapture,
}

impl Ahead {
    /// Makes the files.
    pub(crate) fn begin(create: &SnapshotCreate, ram: &GuestRam) -> Result<Self, String> {
        // What a diff builds upon is looked at when it is known, at the end.
        let files = Files::make(create)?;
        let prepared = ram.prepare_capture(&files.memory.file);
        Ok(Self {
            prepared: prepared.map_err(|e| files.memory.wrong(&e))?,
            files,
        })
    }

    /// Writes pages as they are, more or less: what changes meanwhile is written again.
    pub(crate) fn write(&mut self, pages: &PageSet) -> Result<(), String> {
        let written = self.prepared.write_ahead(pages);
        written.map_err(|e| self.files.memory.wrong(&e))
    }
}

/// The files of a snapshot, not in their places yet.
struct Files {
    memory: New,
    machine: New,
    /// One for each disk that is copied.
    disks: Vec<New>,
}

impl Files {
    fn make(create: &SnapshotCreate) -> Result<Self, String> {
        let memory = New::beside(&create.mem_file_path)?;
        let machine = New::beside(&create.snapshot_path)?;
        let disks = create.drives.iter().map(|drive| {
            New::beside(&drive.path_on_host)
                .map_err(|why| format!("drive {:?}: {why}", drive.drive_id))
        });
        let files = Self {
            memory,
            machine,
            disks: disks.collect::<Result<_, _>>()?,
        };
        let mut named: Vec<(&str, &New)> = vec![
            ("mem_file_path", &files.memory),
            ("snapshot_path", &files.machine),
        ];
        for disk in &files.disks {
            named.push(("path_on_host of a drive", disk));
        }
        for (index, (name, file)) in named.iter().enumerate() {
            let earlier = named.get(..index).unwrap_or_default();
            if let Some((other, _)) = earlier.iter().find(|(_, e)| e.place == file.place) {
                return Err(format!(
                    "{:?} is to be both {other} and {name}: give them different names",
                    file.named
                ));
            }
            file.check_unused()?;
        }
        Ok(files)
    }

    fn check_base(&self, base: &[LayerV1]) -> Result<(), String> {
        self.memory.check_base(base)?;
        self.machine.check_base(base)?;
        self.disks.iter().try_for_each(|disk| disk.check_base(base))
    }

    /// Marks the memory file, which has the pages of `map`, and has the state name it as the newest after those of `base`. All of them.
    fn add_memory(
        &self,
        state: &mut StateFile,
        ram: &GuestRam,
        base: Vec<LayerV1>,
        map: MemoryMap,
    ) -> Result<Vec<LayerV1>, String> {
        let memory = &self.memory;
        let id = new_id().map_err(|e| memory.wrong(&e))?;
        let mark = [&MARK[..], id.as_bytes()].concat();
        memory
            .file
            .write_all_at(&mark, ram.size_bytes())
            .map_err(|e| memory.failed("write", &e))?;
        let mut layers = base;
        layers.push(LayerV1 {
            path: memory.place.clone(),
            id,
            map,
        });
        let memory_state = MemoryStateV1 {
            ranges: ram.mapped_ranges().map(|(range, _)| range.into()).collect(),
            layers,
        };
        state.add(SavedState::pack(
            state::MEMORY,
            state::MEMORY_VERSION,
            &memory_state,
        ));
        Ok(memory_state.layers)
    }

    /// Writes the state and puts all into their places, that last: it says of each that it is there.
    fn put(self, state: &StateFile, sync: bool) -> Result<(), String> {
        self.machine
            .file
            .write_all_at(&state.to_bytes(), 0)
            .map_err(|e| self.machine.failed("write", &e))?;
        let Self {
            memory,
            machine,
            disks,
        } = self;
        let all = || disks.iter().chain([&memory, &machine]);
        if sync {
            // Nothing takes its place before all are on the medium.
            all().try_for_each(New::sync)?;
        }
        let folders: Vec<PathBuf> = all().filter_map(New::folder).collect();
        // An older state must not be found with images that are not its own: of those nobody could see that.
        if !disks.is_empty() {
            machine.remove_older()?;
        }
        for disk in disks {
            disk.put()?;
        }
        memory.put()?;
        machine.put()?;
        if sync {
            sync_folders(folders)?;
        }
        Ok(())
    }
}

/// What takes places in folders is there after a loss of power, too.
fn sync_folders(mut folders: Vec<PathBuf>) -> Result<(), String> {
    folders.sort();
    folders.dedup();
    for folder in folders {
        File::open(&folder)
            .and_then(|folder| folder.sync_data())
            .map_err(|e| format!("{folder:?}: cannot sync this folder: {e}"))?;
    }
    Ok(())
}

/// Writes a snapshot. `captured` is called as soon as the guest may go on, where that is before all is written.
pub(crate) fn take(job: SnapshotJob, ahead: Option<Ahead>, captured: impl FnOnce()) -> Taken {
    Taken {
        outcome: write(job, ahead, captured),
    }
}

fn write(
    job: SnapshotJob,
    ahead: Option<Ahead>,
    captured: impl FnOnce(),
) -> Result<Written, String> {
    let SnapshotJob {
        create,
        mut state,
        ram,
        mut pages,
        mut base,
        disks,
    } = job;
    let (files, prepared) = match ahead {
        Some(Ahead { files, prepared }) => (files, Some(prepared)),
        None => (Files::make(&create)?, None),
    };
    if !create.live && files.memory.is_of(&base) {
        // Firecracker writes a diff into the file that is there, which has all of memory then.
        log::info!(
            "{:?} has memory that the diff snapshot would build upon: all of memory is written, in its place",
            create.mem_file_path
        );
        pages = PageSet::all(ram.pages());
        base.clear();
    }
    files.check_base(&base)?;
    let memory = &files.memory;
    let start = Instant::now();
    for (disk, copy) in disks.iter().zip(&files.disks) {
        let copied = disk.copy_image(&copy.file);
        copied.map_err(|e| copy.wrong(&e))?;
    }
    let copying_disks = start.elapsed();
    let map = match create.live {
        true => {
            let prepared = match prepared {
                Some(prepared) => Ok(prepared),
                None => ram.prepare_capture(&memory.file),
            };
            let capture = prepared.and_then(|prepared| prepared.start(&pages));
            let capture = capture.map_err(|e| memory.wrong(&e))?;
            captured();
            capture.wait().map_err(|e| memory.wrong(&e))?
        }
        false => ram
            .save_pages(&pages, &memory.file)
            .map_err(|e| memory.wrong(&e))?,
    };
    let memory_bytes = map.pages_of(PageKind::Data).saturating_mul(PAGE_BYTES);
    let layers = files.add_memory(&mut state, &ram, base, map)?;
    if !files.disks.is_empty() {
        let copies = create.drives.iter().zip(&files.disks);
        let copies: Vec<_> = copies
            .map(|(drive, copy)| DriveCopyV1 {
                drive_id: drive.drive_id.clone(),
                path: copy.place.clone(),
            })
            .collect();
        state.add_optional(SavedState::pack(
            state::DRIVES,
            state::DRIVES_VERSION,
            &copies,
        ));
    }
    files.put(&state, create.sync)?;
    Ok(Written {
        layers,
        memory_bytes,
        copying_disks,
    })
}

/// A chain of memory files that becomes one.
pub(super) struct Flat<'a> {
    /// All but memory.
    pub(super) state: StateFile,
    /// What the chain makes up.
    pub(super) ram: &'a GuestRam,
    /// All of it.
    pub(super) pages: PageSet,
    /// What must stay until the new files are there.
    pub(super) chain: &'a [LayerV1],
    pub(super) into_state: &'a Path,
    pub(super) into_memory: &'a Path,
}

/// Writes the one full snapshot.
pub(super) fn write_flat(flat: Flat<'_>) -> Result<Flattened, String> {
    let Flat {
        mut state,
        ram,
        pages,
        chain,
        into_state,
        into_memory,
    } = flat;
    let create = SnapshotCreate {
        snapshot_path: into_state.to_owned(),
        mem_file_path: into_memory.to_owned(),
        ..SnapshotCreate::default()
    };
    let files = Files::make(&create)?;
    files.check_base(chain)?;
    let memory = &files.memory;
    let map = ram
        .save_pages(&pages, &memory.file)
        .map_err(|e| memory.wrong(&e))?;
    let memory_bytes = map.pages_of(PageKind::Data).saturating_mul(PAGE_BYTES);
    let layers = files.add_memory(&mut state, ram, Vec::new(), map)?;
    files.put(&state, true)?;
    Ok(Flattened {
        memory_bytes,
        memory_id: layers.last().map_or_else(String::new, |l| l.id.clone()),
    })
}

/// An id that no other memory file has.
fn new_id() -> io::Result<String> {
    let mut bytes = [0; ID_BYTES];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
