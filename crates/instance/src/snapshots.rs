//! Snapshots of VMs with a name, which outlive the VMs they are of.
//!
//! ```text
//! NAME/snapshot.json    what it is
//! NAME/state, memory    as the monitor writes them
//! NAME/memory.zst       instead of memory, where that was packed
//! NAME/memory-ID        of a diff: what it builds upon, further names of other snapshots' memory, so that it needs none of them
//! NAME/working-set      what its guests touch first, once one has been loaded
//! NAME/changes...       the disk that took the root's changes, of the same moment, and what it is laid over
//! NAME/volumeN.erofs    copies of this host's folders that the VM had
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::folder::{UNFINISHED, Unfinished, check_name, found_in, read_json, sweep, write_json};
use crate::{InstanceError, Record};

/// The memory file that is a snapshot's own.
pub const MEMORY: &str = "memory";
/// What there is instead of that where memory is packed.
pub const PACKED: &str = "memory.zst";

/// What a memory file that a snapshot builds upon is called in its folder: the monitor finds it by this.
#[must_use]
pub fn memory_before(id: &str) -> String {
    format!("{MEMORY}-{id}")
}

/// All snapshots of one user.
#[derive(Clone, Debug)]
pub struct Snapshots {
    folder: PathBuf,
}

/// What is written down about a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The version of this file.
    pub version: u32,
    /// When it was taken: milliseconds since 1970.
    pub created_ms: u64,
    /// How long the guest stood still for it, in microseconds.
    pub stood_still_us: u64,
    /// The VM's name.
    pub vm: String,
    /// What the VM was.
    pub record: Record,
    /// Processors of the machine that ran.
    pub cpus: u8,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// The main process's number in the guest.
    pub main_pid: u32,
    /// The words about networks that the guest was set up by.
    pub network: Vec<String>,
    /// The ids of the memory files that it is made of, the oldest first, its own last; those before are what a diff builds upon.
    /// Of a snapshot of an older version nothing is known.
    #[serde(default)]
    pub memory_ids: Vec<String>,
}

impl SnapshotRecord {
    /// The version to be written.
    pub const VERSION: u32 = 1;
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name, and its folder's.
    pub name: String,
    /// What it is.
    pub record: SnapshotRecord,
    folder: PathBuf,
}

/// A snapshot without a name, which goes with this. Copies that have loaded it go on.
#[derive(Debug)]
pub struct PassingSnapshot {
    snapshot: Snapshot,
    folder: Unfinished,
}

/// That a snapshot is being loaded: it is not removed meanwhile.
#[derive(Debug)]
pub struct Loading {
    _lock: File,
}

impl Snapshots {
    /// Those in this folder, which is made with the first.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// Takes a snapshot: `take` puts its files into this folder.
    ///
    /// # Errors
    ///
    /// The name cannot be one, or is another's, or nothing can be written. Those of `take` come as they are.
    pub fn create<E: From<InstanceError>>(
        &self,
        name: &str,
        take: impl FnOnce(&Path) -> Result<SnapshotRecord, E>,
    ) -> Result<Snapshot, E> {
        check_name(name).map_err(|_| InstanceError::SnapshotName(name.into()))?;
        let folder = self.folder.join(name);
        if folder.exists() {
            return Err(InstanceError::SnapshotExists(name.into()).into());
        }
        let PassingSnapshot {
            snapshot,
            folder: new,
        } = self.pass(take)?;
        match fs::rename(new.path(), &folder) {
            Ok(()) => {}
            // A folder that is there is never empty.
            Err(_) if folder.exists() => {
                return Err(InstanceError::SnapshotExists(name.into()).into());
            }
            Err(e) => return Err(InstanceError::file("make the folder", &folder)(e).into()),
        }
        Ok(Snapshot {
            name: name.into(),
            folder,
            ..snapshot
        })
    }

    /// Takes a snapshot without a name.
    ///
    /// # Errors
    ///
    /// Nothing can be written. Those of `take` come as they are.
    pub fn pass<E: From<InstanceError>>(
        &self,
        take: impl FnOnce(&Path) -> Result<SnapshotRecord, E>,
    ) -> Result<PassingSnapshot, E> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(InstanceError::file("make the folder", &self.folder))?;
        self.sweep();
        let folder = Unfinished::make_in(&self.folder)?;
        let record = take(folder.path())?;
        write_json(&folder.path().join("snapshot.json"), &record)?;
        Ok(PassingSnapshot {
            snapshot: Snapshot {
                name: record.vm.clone(),
                record,
                folder: folder.path().into(),
            },
            folder,
        })
    }

    /// All snapshots, by name.
    ///
    /// # Errors
    ///
    /// The folder of all, or one's description, cannot be read.
    pub fn list(&self) -> Result<Vec<Snapshot>, InstanceError> {
        found_in(
            &self.folder,
            |name| check_name(name).is_ok(),
            |name| match self.find(name) {
                Err(InstanceError::UnknownSnapshot(_)) => Ok(None),
                found => found.map(Some),
            },
        )
    }

    /// The snapshot of this name.
    ///
    /// # Errors
    ///
    /// There is none, or it was written by a newer version.
    pub fn find(&self, name: &str) -> Result<Snapshot, InstanceError> {
        let unknown = || InstanceError::UnknownSnapshot(name.into());
        check_name(name).map_err(|_| unknown())?;
        let found = Snapshot::open(&self.folder.join(name))?.ok_or_else(unknown)?;
        Ok(Snapshot {
            name: name.into(),
            ..found
        })
    }

    /// The memory files that all of them have, by their ids. One that several have is there by one of its names.
    ///
    /// # Errors
    ///
    /// Those of [`Snapshots::list`].
    pub fn memory_files(&self) -> Result<BTreeMap<String, PathBuf>, InstanceError> {
        let all = self.list()?;
        Ok(all.iter().flat_map(Snapshot::memory_files).collect())
    }

    /// Removes what killed commands left half-made, a minute after.
    pub fn sweep(&self) {
        sweep(&self.folder);
    }
}

impl Snapshot {
    /// That in this folder, if there is one.
    ///
    /// # Errors
    ///
    /// It cannot be read, or was written by a newer version.
    pub fn open(folder: &Path) -> Result<Option<Self>, InstanceError> {
        let path = folder.join("snapshot.json");
        let Some(record) = read_json::<SnapshotRecord>(&path)? else {
            return Ok(None);
        };
        if record.version > SnapshotRecord::VERSION {
            return Err(InstanceError::Record {
                path,
                why: format!(
                    "it is of version {}, and this program knows up to {}",
                    record.version,
                    SnapshotRecord::VERSION
                ),
            });
        }
        Ok(Some(Self {
            name: record.vm.clone(),
            record,
            folder: folder.into(),
        }))
    }

    /// Something in its folder.
    #[must_use]
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The id of its own memory file, if that is known.
    #[must_use]
    pub fn memory_id(&self) -> Option<&str> {
        self.record.memory_ids.last().map(String::as_str)
    }

    /// The ids of the memory files before it that it builds upon, the oldest first; of a full one none.
    #[must_use]
    pub fn builds_upon(&self) -> &[String] {
        let ids = &self.record.memory_ids;
        ids.split_last().map_or(&[], |(_, before)| before)
    }

    /// The memory files in its folder with their ids, the oldest first, its own last; not its own where that is packed.
    #[must_use]
    pub fn memory_files(&self) -> Vec<(String, PathBuf)> {
        let before = self.builds_upon().iter();
        let mut files: Vec<_> = before
            .map(|id| (id.clone(), self.at(&memory_before(id))))
            .collect();
        let own = self.memory_id().filter(|_| !self.is_packed());
        files.extend(own.map(|id| (id.into(), self.at(MEMORY))));
        files
    }

    /// Whether its memory file is packed.
    #[must_use]
    pub fn is_packed(&self) -> bool {
        self.at(PACKED).exists()
    }

    /// What its own memory file takes of this host's disk, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let own = self.at(if self.is_packed() { PACKED } else { MEMORY });
        fs::metadata(own).map_or(0, |m| m.blocks().saturating_mul(512))
    }

    /// Whether it has no name, and goes with the command that has taken it.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        let name = self.folder.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(UNFINISHED)
    }

    /// What it takes of this host's disk, in bytes.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let blocks = files.filter_map(|file| file.metadata().ok().map(|m| m.blocks()));
        blocks.sum::<u64>().saturating_mul(512)
    }

    /// Keeps it from being removed, as long as what this gives is there.
    ///
    /// # Errors
    ///
    /// It is gone, or being removed.
    pub fn load(&self) -> Result<Loading, InstanceError> {
        let lock = self.locked(FlockOperation::NonBlockingLockShared)?;
        Ok(Loading { _lock: lock })
    }

    fn locked(&self, how: FlockOperation) -> Result<File, InstanceError> {
        let folder = File::open(&self.folder).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => InstanceError::UnknownSnapshot(self.name.clone()),
            _ => InstanceError::file("open", &self.folder)(e),
        })?;
        match rustix::fs::flock(&folder, how) {
            Ok(()) => Ok(folder),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(InstanceError::SnapshotInUse(self.name.clone()))
            }
            Err(e) => Err(InstanceError::file("lock", &self.folder)(e.into())),
        }
    }

    /// Puts other files in its place, all at once: `make` makes them in this folder, and says what it is from now on.
    ///
    /// # Errors
    ///
    /// It is being loaded, or nothing can be written. Those of `make` come as they are; it is as it was then.
    pub fn replace<E: From<InstanceError>>(
        &self,
        make: impl FnOnce(&Path) -> Result<SnapshotRecord, E>,
    ) -> Result<(), E> {
        let _lock = self.locked(FlockOperation::NonBlockingLockExclusive)?;
        let beside = self.folder.parent().unwrap_or(&self.folder);
        let new = Unfinished::make_in(beside)?;
        let record = make(new.path())?;
        write_json(&new.path().join("snapshot.json"), &record)?;
        // What was there is removed with the folder's other name.
        rustix::fs::renameat_with(
            rustix::fs::CWD,
            new.path(),
            rustix::fs::CWD,
            &self.folder,
            rustix::fs::RenameFlags::EXCHANGE,
        )
        .map_err(|e| InstanceError::file("replace", &self.folder)(e.into()))?;
        Ok(())
    }

    /// Removes it. VMs that have loaded it go on: they keep what they need of it.
    ///
    /// # Errors
    ///
    /// It is being loaded, or something of it cannot be removed.
    pub fn remove(self) -> Result<(), InstanceError> {
        let _lock = self.locked(FlockOperation::NonBlockingLockExclusive)?;
        let gone =
            self.folder
                .with_file_name(format!("{UNFINISHED}{}-{}", self.name, std::process::id()));
        // Away at once, so that its name is free and nobody finds half of it.
        fs::rename(&self.folder, &gone).map_err(InstanceError::file("remove", &self.folder))?;
        fs::remove_dir_all(&gone).map_err(InstanceError::file("remove", &gone))
    }
}

impl PassingSnapshot {
    /// As one with a name.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::test_vm;

    fn record(dir: &Path) -> SnapshotRecord {
        let vm = test_vm(dir);
        SnapshotRecord {
            version: SnapshotRecord::VERSION,
            created_ms: 1,
            stood_still_us: 2,
            vm: vm.name.clone(),
            cpus: 1,
            memory_mib: 64,
            main_pid: 77,
            network: vec!["alveole.net=02:00:00:00:00:01".into()],
            memory_ids: vec!["aa".into()],
            record: vm.record,
        }
    }

    /// Memory of many GiB takes its time to be written, and a thousand copies theirs to be made.
    #[test]
    fn what_is_being_made_is_not_swept_however_long_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        let record = record(dir.path());
        let all = Snapshots::new(&dir.path().join("snapshots"));
        let age = |folder: &Path| {
            let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
            File::open(folder).unwrap().set_modified(long_ago).unwrap();
        };
        let passing = all
            .pass(|folder| {
                fs::write(folder.join("memory"), "half").unwrap();
                age(folder);
                all.sweep();
                assert!(folder.join("memory").exists());
                Ok::<_, InstanceError>(record.clone())
            })
            .unwrap();
        let folder = passing.snapshot().folder().to_owned();
        age(&folder);
        all.sweep();
        assert!(folder.exists());
        // Of a command that was killed.
        let left = all.folder.join(format!("{UNFINISHED}left"));
        fs::create_dir(&left).unwrap();
        age(&left);
        all.sweep();
        assert!(!left.exists());
    }

    #[test]
    fn a_snapshot_is_whole_or_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let record = record(dir.path());
        let all = Snapshots::new(&dir.path().join("snapshots"));
        assert!(all.list().unwrap().is_empty());
        let failed = all.create("web-1", |folder| {
            fs::write(folder.join("memory"), "half").unwrap();
            Err::<SnapshotRecord, _>(InstanceError::DoesNotRun("web".into()))
        });
        assert!(matches!(failed, Err(InstanceError::DoesNotRun(_))));
        assert_eq!(
            fs::read_dir(dir.path().join("snapshots")).unwrap().count(),
            0
        );
        let take = |folder: &Path| {
            fs::write(folder.join("memory"), vec![1; 8192]).unwrap();
            Ok::<_, InstanceError>(record.clone())
        };
        let made = all.create("web-1", take).unwrap();
        assert_eq!(made.record, record);
        assert!(made.at("memory").exists() && made.taken_bytes() >= 8192);
        let again = all.create("web-1", take).unwrap_err();
        assert!(matches!(again, InstanceError::SnapshotExists(_)), "{again}");
        for name in ["", "../x", "Web", ".new-x"] {
            let error = all.create(name, take).unwrap_err();
            assert!(matches!(error, InstanceError::SnapshotName(_)), "{error}");
            assert!(matches!(
                all.find(name),
                Err(InstanceError::UnknownSnapshot(_))
            ));
        }
        let names: Vec<_> = all.list().unwrap().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["web-1"]);
    }

    #[test]
    fn what_is_being_loaded_stays() {
        let dir = tempfile::tempdir().unwrap();
        let record = record(dir.path());
        let all = Snapshots::new(&dir.path().join("snapshots"));
        let made = all
            .create("one", |_| Ok::<_, InstanceError>(record.clone()))
            .unwrap();
        let (first, second) = (made.load().unwrap(), made.load().unwrap());
        let error = made.clone().remove().unwrap_err();
        assert!(matches!(error, InstanceError::SnapshotInUse(_)), "{error}");
        let as_it_is = |_: &Path| Ok::<_, InstanceError>(record.clone());
        let error = made.replace(as_it_is).unwrap_err();
        assert!(matches!(error, InstanceError::SnapshotInUse(_)), "{error}");
        drop((first, second));
        fs::write(made.at("old"), "").unwrap();
        let failed =
            made.replace(|_| Err::<SnapshotRecord, _>(InstanceError::DoesNotRun("x".into())));
        assert!(failed.is_err() && made.at("old").exists());
        let other = SnapshotRecord {
            memory_ids: vec!["bb".into()],
            ..record.clone()
        };
        let write = |folder: &Path| {
            fs::write(folder.join("new"), "").map_err(InstanceError::file("write", folder))?;
            Ok::<_, InstanceError>(other.clone())
        };
        made.replace(write).unwrap();
        assert!(made.at("new").exists() && !made.at("old").exists());
        assert_eq!(all.find("one").unwrap().record, other);
        assert_eq!(
            fs::read_dir(dir.path().join("snapshots")).unwrap().count(),
            1
        );
        made.clone().remove().unwrap();
        assert!(matches!(
            made.load(),
            Err(InstanceError::UnknownSnapshot(_))
        ));
        assert!(all.list().unwrap().is_empty());
        let passing = all.pass(|_| Ok::<_, InstanceError>(record)).unwrap();
        let folder = passing.snapshot().folder().to_owned();
        assert!(all.list().unwrap().is_empty() && folder.exists());
        assert!(passing.snapshot().is_passing() && !made.is_passing());
        drop(passing);
        assert!(!folder.exists());
    }

    #[test]
    fn memory_files_are_known_by_their_ids_whoever_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let all = Snapshots::new(&dir.path().join("snapshots"));
        let record = record(dir.path());
        let take = |name: &str, ids: &[&str]| {
            let record = SnapshotRecord {
                memory_ids: ids.iter().map(|id| (*id).into()).collect(),
                ..record.clone()
            };
            all.create(name, |_| Ok::<_, InstanceError>(record))
                .unwrap()
        };
        let full = take("full", &["aa"]);
        let diff = take("diff", &["aa", "bb"]);
        // Of an older version.
        let old = take("old", &[]);
        assert_eq!(
            (full.builds_upon(), full.memory_id()),
            (&[][..], Some("aa"))
        );
        assert_eq!(diff.builds_upon(), ["aa"]);
        assert_eq!((old.builds_upon(), old.memory_id()), (&[][..], None));
        let own = ("bb".to_owned(), diff.at("memory"));
        assert_eq!(
            diff.memory_files(),
            [("aa".into(), diff.at("memory-aa")), own.clone()]
        );
        let found = all.memory_files().unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found.get("bb"), Some(&own.1));
        full.remove().unwrap();
        let found = all.memory_files().unwrap();
        assert_eq!(found.get("aa"), Some(&diff.at("memory-aa")));
    }

    #[test]
    fn one_of_a_newer_version_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = record(dir.path());
        record.version = 99;
        let all = Snapshots::new(&dir.path().join("snapshots"));
        all.create("one", |_| Ok::<_, InstanceError>(record))
            .unwrap();
        let error = all.find("one").unwrap_err().to_string();
        assert!(error.contains("99") && error.contains("newer"), "{error}");
    }
}
