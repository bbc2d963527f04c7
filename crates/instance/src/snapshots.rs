//! Snapshots of VMs with a name, which outlive the VMs they are of.
//!
//! ```text
//! NAME/snapshot.json    what it is
//! NAME/state, memory    as the monitor writes them
//! NAME/memory.zst       instead of memory, where that was packed
//! NAME/working-set      what its guests touch first, once one has been loaded
//! NAME/changes...       the disk that took the root's changes, of the same moment, and what it is laid over
//! NAME/volumeN.erofs    copies of this host's folders that the VM had
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::folder::{UNFINISHED, check_name, found_in, read_json, sweep, write_json};
use crate::{InstanceError, Record};

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
    folder: tempfile::TempDir,
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
        let folder = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.folder)
            .map_err(InstanceError::file("make a folder in", &self.folder))?;
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

    /// Puts other files in its place, all at once: `make` makes them in this folder, where its description is already.
    ///
    /// # Errors
    ///
    /// It is being loaded, or nothing can be written. Those of `make` come as they are; it is as it was then.
    pub fn replace<E: From<InstanceError>>(
        &self,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let _lock = self.locked(FlockOperation::NonBlockingLockExclusive)?;
        let beside = self.folder.parent().unwrap_or(&self.folder);
        let new = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(beside)
            .map_err(InstanceError::file("make a folder in", beside))?;
        write_json(&new.path().join("snapshot.json"), &self.record)?;
        make(new.path())?;
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
            record: vm.record,
        }
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
        let error = made.replace(|_| Ok::<_, InstanceError>(())).unwrap_err();
        assert!(matches!(error, InstanceError::SnapshotInUse(_)), "{error}");
        drop((first, second));
        fs::write(made.at("old"), "").unwrap();
        let failed = made.replace(|_| Err::<(), _>(InstanceError::DoesNotRun("x".into())));
        assert!(failed.is_err() && made.at("old").exists());
        let write = |folder: &Path| {
            fs::write(folder.join("new"), "").map_err(InstanceError::file("write", folder))
        };
        made.replace(write).unwrap();
        assert!(made.at("new").exists() && !made.at("old").exists());
        assert_eq!(all.find("one").unwrap().record, made.record);
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
