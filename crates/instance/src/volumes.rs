//! Volumes: disks with a name, which outlive the VMs that use them.
//!
//! ```text
//! NAME/volume.json   what it is
//! NAME/disk          an ext4 file system; what VMs see is its folder `data`
//! NAME/lock          held by the keepers of those that use it: exclusively by who writes, shared by who reads
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::InstanceError;
use crate::folder::{UNFINISHED, Unfinished, found_in, now_ms, read_json, sweep, write_json};

/// All volumes of one user.
#[derive(Clone, Debug)]
pub struct Volumes {
    folder: PathBuf,
}

/// What is written down about a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// When it was made: milliseconds since 1970.
    pub created_ms: u64,
    /// What it can grow to.
    pub size_bytes: u64,
    /// Words for people and programs.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its name, and its folder's.
    pub name: String,
    /// What it is.
    pub record: VolumeRecord,
    folder: PathBuf,
}

/// That a volume is used; it ends with this process, however that ends.
#[derive(Debug)]
pub struct Use {
    _lock: File,
}

impl Volumes {
    /// Those in this folder, which is made with the first.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// Makes a volume; `make` makes its disk at this path, which is not there yet.
    ///
    /// # Errors
    ///
    /// The name cannot be one, or is another's, or nothing can be written. Those of `make` come as they are.
    pub fn create<E: From<InstanceError>>(
        &self,
        name: &str,
        size_bytes: u64,
        labels: BTreeMap<String, String>,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Volume, E> {
        check_name(name)?;
        let folder = self.folder.join(name);
        if folder.exists() {
            return Err(InstanceError::VolumeExists(name.into()).into());
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(InstanceError::file("make the folder", &self.folder))?;
        self.sweep();
        let new = Unfinished::make_in(&self.folder)?;
        make(&new.path().join("disk"))?;
        let record = VolumeRecord {
            created_ms: now_ms(),
            size_bytes,
            labels,
        };
        write_json(&new.path().join("volume.json"), &record)?;
        let lock = new.path().join("lock");
        File::create(&lock).map_err(InstanceError::file("make", &lock))?;
        // A folder that is there is never empty, so that this fails.
        match fs::rename(new.path(), &folder) {
            Ok(()) => {}
            Err(_) if folder.exists() => {
                return Err(InstanceError::VolumeExists(name.into()).into());
            }
            Err(e) => return Err(InstanceError::file("make the folder", &folder)(e).into()),
        }
        Ok(Volume {
            name: name.into(),
            record,
            folder,
        })
    }

    /// All volumes, by name.
    ///
    /// # Errors
    ///
    /// The folder of all, or one's description, cannot be read.
    pub fn list(&self) -> Result<Vec<Volume>, InstanceError> {
        found_in(
            &self.folder,
            |name| check_name(name).is_ok(),
            |name| match self.find(name) {
                Err(InstanceError::UnknownVolume(_)) => Ok(None),
                found => found.map(Some),
            },
        )
    }

    /// The volume of this name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn find(&self, name: &str) -> Result<Volume, InstanceError> {
        check_name(name)?;
        let folder = self.folder.join(name);
        let record = read_json(&folder.join("volume.json"))?
            .ok_or_else(|| InstanceError::UnknownVolume(name.into()))?;
        Ok(Volume {
            name: name.into(),
            record,
            folder,
        })
    }

    /// Removes what killed commands left half-made, a minute after.
    pub fn sweep(&self) {
        sweep(&self.folder);
    }
}

impl Volume {
    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// What it takes of this host's disk, in bytes.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        fs::metadata(self.disk()).map_or(0, |m| m.blocks().saturating_mul(512))
    }

    /// Takes it into use: who writes has it alone.
    ///
    /// # Errors
    ///
    /// Others use it in a way that this contradicts, or it is to be only read and its file system is not in order.
    pub fn take(&self, read_only: bool) -> Result<Use, InstanceError> {
        let path = self.folder.join("lock");
        let lock = File::open(&path).map_err(InstanceError::file("open", &path))?;
        let how = match read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        match rustix::fs::flock(&lock, how) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(InstanceError::VolumeInUse(self.name.clone()));
            }
            Err(e) => return Err(InstanceError::file("lock", &path)(e.into())),
        }
        if read_only && self.needs_recovery()? {
            return Err(InstanceError::VolumeDirty(self.name.clone()));
        }
        Ok(Use { _lock: lock })
    }

    /// Whether some VM that runs uses it.
    #[must_use]
    pub fn is_used(&self) -> bool {
        matches!(self.take(false), Err(InstanceError::VolumeInUse(_)))
    }

    /// `EXT4_FEATURE_INCOMPAT_RECOVER` in `s_feature_incompat`, at 0x60 of the superblock, which is at 1024 (Linux,
    /// Documentation/filesystems/ext4/super.rst).
    fn needs_recovery(&self) -> Result<bool, InstanceError> {
        let mut features = [0; 4];
        let path = self.disk();
        File::open(&path)
            .and_then(|file| file.read_exact_at(&mut features, 1024 + 0x60))
            .map_err(InstanceError::file("read", &path))?;
        Ok(u32::from_le_bytes(features) & 4 != 0)
    }

    /// Removes it, with what is in it.
    ///
    /// # Errors
    ///
    /// A VM that runs uses it, or it cannot be removed.
    pub fn remove(self) -> Result<(), InstanceError> {
        let _alone = self.take(false)?;
        let mut gone = self.folder.clone();
        gone.set_file_name(format!("{UNFINISHED}removed-{}", self.name));
        let _ = fs::remove_dir_all(&gone);
        fs::rename(&self.folder, &gone).map_err(InstanceError::file("remove", &self.folder))?;
        fs::remove_dir_all(&gone).map_err(InstanceError::file("remove", &gone))
    }
}

/// As docker has them, so that its users' scripts work.
fn check_name(name: &str) -> Result<(), InstanceError> {
    let first = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    if first && name.len() <= 64 && name.bytes().all(plain) {
        return Ok(());
    }
    Err(InstanceError::VolumeName(name.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(path: &Path) -> Result<(), InstanceError> {
        fs::write(path, vec![0; 4096]).map_err(InstanceError::file("write", path))
    }

    #[test]
    fn who_writes_a_volume_has_it_alone() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(&dir.path().join("volumes"));
        assert!(volumes.list().unwrap().is_empty());
        let data = volumes
            .create("data", 1 << 30, BTreeMap::new(), make)
            .unwrap();
        let again = volumes.create("data", 1, BTreeMap::new(), make);
        assert!(matches!(again, Err(InstanceError::VolumeExists(_))));
        let (one, two) = (data.take(true).unwrap(), data.take(true).unwrap());
        assert!(matches!(
            data.take(false),
            Err(InstanceError::VolumeInUse(_))
        ));
        assert!(data.clone().remove().is_err() && data.is_used());
        drop((one, two));
        let alone = data.take(false).unwrap();
        assert!(data.take(true).is_err());
        drop(alone);
        // A journal that is to be replayed.
        let disk = File::options().write(true).open(data.disk()).unwrap();
        disk.write_all_at(&[4], 1024 + 0x60).unwrap();
        assert!(matches!(
            data.take(true),
            Err(InstanceError::VolumeDirty(_))
        ));
        assert!(!data.is_used());
        data.remove().unwrap();
        assert!(matches!(
            volumes.find("data"),
            Err(InstanceError::UnknownVolume(_))
        ));
        for name in ["", ".x", "a/b", "../x", "-a"] {
            let made = volumes.create(name, 1, BTreeMap::new(), make);
            assert!(
                matches!(made, Err(InstanceError::VolumeName(_))),
                "{name:?}"
            );
        }
    }
}
