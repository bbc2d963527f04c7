//! The folders of VMs.
//!
//! ```text
//! NAME/vm.json      what it is
//! NAME/lock         held by its keeper: whether it runs is whether somebody holds this
//! NAME/phase.json   what the keeper does
//! NAME/ended.json   how it ended
//! NAME/log, log.1   what the main process said, a line of JSON each
//! NAME/console      what the guest's kernel said
//! NAME/monitor      what the monitor said
//! NAME/changes      the disk that takes the root's changes
//! .events...        what happened to all of them (`events`)
//! ```
//!
//! Sockets are elsewhere, as their paths are bounded (108 bytes, unix(7)) and as a host that starts again has none:
//!
//! ```text
//! ID/keeper       where its keeper is asked
//! ID/vsock        the monitor's socket of vsock; ID/vsock_1025 where the guest says that it is there
//! ID/api          the monitor's API
//! ```
//!
//! A folder is made beside and renamed, so that there is none without its description.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::record::VERSION;
use crate::{Ended, EventReader, Happened, InstanceError, Phase, Record, State};

/// What is not whole begins with it, which no name of a VM or a volume does.
pub(crate) const UNFINISHED: &str = ".new-";

/// All VMs of one user.
#[derive(Clone, Debug)]
pub struct Vms {
    folder: PathBuf,
    run: PathBuf,
}

/// One of them.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name, and its folder's.
    pub name: String,
    /// What it is.
    pub record: Record,
    folder: PathBuf,
    run: PathBuf,
}

/// That this process keeps the VM. Its lock goes with the process, however that ends.
#[derive(Debug)]
pub struct KeeperLock {
    _file: File,
}

impl Vms {
    /// Those in this folder, with their sockets in `run`. Both are made with the first.
    #[must_use]
    pub fn new(folder: &Path, run: &Path) -> Self {
        Self {
            folder: folder.into(),
            run: run.into(),
        }
    }

    /// Where they are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes a VM of this name.
    ///
    /// # Errors
    ///
    /// The name cannot be one, or is another's, or the folder cannot be written.
    pub fn create(&self, name: &str, record: &Record) -> Result<Vm, InstanceError> {
        check_name(name)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(InstanceError::file("make the folder", &self.folder))?;
        let new = Unfinished::make_in(&self.folder)?;
        write_json(&new.path().join("vm.json"), record)?;
        let lock = new.path().join("lock");
        File::create(&lock).map_err(InstanceError::file("make", &lock))?;
        let folder = self.folder.join(name);
        // A folder that is there is never empty, so that this fails.
        match fs::rename(new.path(), &folder) {
            Ok(()) => {}
            Err(_) if folder.exists() => return Err(InstanceError::Exists(name.into())),
            Err(e) => return Err(InstanceError::file("make the folder", &folder)(e)),
        }
        let vm = Vm {
            name: name.into(),
            record: record.clone(),
            folder,
            run: self.run.join(&record.id),
        };
        vm.note(Happened::Created);
        Ok(vm)
    }

    /// What happened to all VMs, as far as that is kept, and what happens.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn events(&self) -> Result<EventReader, InstanceError> {
        EventReader::new(&self.folder)
    }

    /// All VMs, by name. Folders that cannot be read are passed over with a warning.
    ///
    /// # Errors
    ///
    /// The folder of all cannot be read. One that is not there is empty.
    pub fn list(&self) -> Result<Vec<Vm>, InstanceError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(InstanceError::file("read", &self.folder))?,
        };
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if check_name(&name).is_err() {
                continue;
            }
            match self.open(&name) {
                Ok(vm) => all.push(vm),
                // Removed since.
                Err(InstanceError::Unknown(_)) => {}
                Err(e) => log::warn!("{e}"),
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The VM of this name, or of the id that begins so.
    ///
    /// # Errors
    ///
    /// There is none, or several ids begin so.
    pub fn find(&self, name: &str) -> Result<Vm, InstanceError> {
        let unknown = || InstanceError::Unknown(name.into());
        if check_name(name).is_ok() {
            match self.open(name) {
                Err(InstanceError::Unknown(_)) => {}
                found => return found,
            }
        }
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(unknown());
        }
        let mut found = self.list()?;
        found.retain(|vm| vm.record.id.starts_with(name));
        match found.len() {
            0 => Err(unknown()),
            1 => Ok(found.remove(0)),
            _ => Err(InstanceError::Ambiguous(name.into())),
        }
    }

    fn open(&self, name: &str) -> Result<Vm, InstanceError> {
        let folder = self.folder.join(name);
        let record = read_record(&folder, name)?;
        Ok(Vm {
            name: name.into(),
            run: self.run.join(&record.id),
            record,
            folder,
        })
    }

    /// Removes what killed commands left half-made.
    pub fn sweep(&self) {
        sweep(&self.folder);
    }
}

/// What `find` finds of the folders in a folder, by name; none of a folder that is not there. Others than those with a name that `is_name`
/// takes are passed over.
pub(crate) fn found_in<T>(
    folder: &Path,
    is_name: impl Fn(&str) -> bool,
    find: impl Fn(&str) -> Result<Option<T>, InstanceError>,
) -> Result<Vec<T>, InstanceError> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(InstanceError::file("read", folder))?,
    };
    let names = entries
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| is_name(name)).collect();
    names.sort();
    // What was removed since is none.
    names
        .iter()
        .filter_map(|name| find(name).transpose())
        .collect()
}

/// A folder that is being made: it goes with this, unless it has got its name. As long as this is there nobody takes it for a left one,
/// however long that takes.
#[derive(Debug)]
pub(crate) struct Unfinished {
    folder: tempfile::TempDir,
    _lock: File,
}

impl Unfinished {
    pub(crate) fn make_in(folder: &Path) -> Result<Self, InstanceError> {
        let new = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(folder)
            .map_err(InstanceError::file("make a folder in", folder))?;
        let locked = || -> io::Result<File> {
            let lock = File::open(new.path())?;
            flock(&lock, FlockOperation::LockShared)?;
            Ok(lock)
        };
        let lock = locked().map_err(InstanceError::file("lock", new.path()))?;
        Ok(Self {
            _lock: lock,
            folder: new,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// Removes what lies in a folder and was left half-made, a minute after: who makes one now is not disturbed.
pub(crate) fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let old = entry
            .metadata()
            .is_ok_and(|m| now_ms() / 1000 > m.mtime().unsigned_abs() + 60);
        let unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
        let is_left = || {
            let locked = |lock| flock(lock, FlockOperation::NonBlockingLockExclusive);
            File::open(entry.path()).is_ok_and(|lock| locked(lock).is_ok())
        };
        if unfinished && old && is_left() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Record {
    /// A new id.
    ///
    /// # Errors
    ///
    /// The host has no entropy.
    pub fn new_id() -> Result<String, InstanceError> {
        let mut bytes = [0; 6];
        getrandom::fill(&mut bytes).map_err(|e| {
            InstanceError::file("read", "/dev/urandom")(io::Error::other(e.to_string()))
        })?;
        Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
    }

    /// The version to be written.
    pub const VERSION: u32 = VERSION;
}

impl Vm {
    /// Something in its folder.
    #[must_use]
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// One of its sockets.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }

    /// Where its sockets are.
    #[must_use]
    pub fn run_folder(&self) -> &Path {
        &self.run
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it does.
    ///
    /// # Errors
    ///
    /// Its folder cannot be read.
    pub fn state(&self) -> Result<State, InstanceError> {
        if self.is_kept()? {
            let starting = Phase {
                phase: "starting".into(),
                started_ms: now_ms(),
                restarts: 0,
                monitor_pid: None,
                keeper_pid: 0,
                cpus: self.record.cpus,
                memory_mib: self.record.memory_mib,
                main_pid: None,
                network: Vec::new(),
            };
            // Of the one that keeps it now: it removes the other's first.
            return Ok(State::Kept(
                read_json(&self.at("phase.json"))?.unwrap_or(starting),
            ));
        }
        if let Some(ended) = read_json::<Ended>(&self.at("ended.json"))? {
            return Ok(State::Ended(ended));
        }
        // It may have ended, or been removed, between the two looks.
        if self.at("phase.json").exists() {
            return Ok(State::Lost);
        }
        Ok(State::Created)
    }

    /// Whether somebody keeps it.
    ///
    /// # Errors
    ///
    /// Its folder is gone.
    pub fn is_kept(&self) -> Result<bool, InstanceError> {
        let path = self.at("lock");
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(InstanceError::Unknown(self.name.clone()));
            }
            file => file.map_err(InstanceError::file("open", &path))?,
        };
        // Shared: those who look do not take each other for keepers.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
            Err(e) => Err(InstanceError::file("lock", &path)(e.into())),
        }
    }

    /// What its folder says by now.
    ///
    /// # Errors
    ///
    /// It is gone, or cannot be understood.
    pub fn again(&self) -> Result<Self, InstanceError> {
        let record = read_record(&self.folder, &self.name)?;
        if record.id != self.record.id {
            return Err(InstanceError::Unknown(self.name.clone()));
        }
        Ok(Self {
            record,
            ..self.clone()
        })
    }

    /// Changes what it is; gives what it is then. Those who change it at the same time do so one after the other, and its keeper
    /// has it with its next start. Nothing is changed where `how` fails.
    ///
    /// # Errors
    ///
    /// It is gone, its folder cannot be written, or the error of `how`.
    pub fn change<E: From<InstanceError>>(
        &self,
        how: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<Self, E> {
        // Of the folder itself: it is not the keeper's, and goes with the folder.
        let folder = File::open(&self.folder).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => InstanceError::Unknown(self.name.clone()),
            _ => InstanceError::file("open", &self.folder)(e),
        })?;
        rustix::io::retry_on_intr(|| flock(&folder, FlockOperation::LockExclusive))
            .map_err(|e| InstanceError::file("lock", &self.folder)(e.into()))?;
        let mut changed = self.again()?;
        how(&mut changed.record)?;
        write_json(&changed.at("vm.json"), &changed.record)?;
        Ok(changed)
    }

    /// Whether nobody wrote down how it ended, which is for who holds its lock to say.
    pub(crate) fn was_lost(&self) -> bool {
        self.at("phase.json").exists() && !self.at("ended.json").exists()
    }

    /// Becomes its keeper.
    ///
    /// # Errors
    ///
    /// It has one.
    pub fn lock(&self) -> Result<KeeperLock, InstanceError> {
        let path = self.at("lock");
        let file = File::open(&path).map_err(InstanceError::file("open", &path))?;
        // Those who look hold it for a moment.
        for _ in 0..LOCK_TRIES {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(KeeperLock { _file: file }),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Err(e) => return Err(InstanceError::file("lock", &path)(e.into())),
            }
        }
        Err(InstanceError::Runs(self.name.clone()))
    }

    /// Removes it. Whoever calls this holds its lock.
    ///
    /// # Errors
    ///
    /// Something of it cannot be removed.
    pub fn remove(self, _lock: &KeeperLock) -> Result<(), InstanceError> {
        if self.was_lost() {
            self.note(Happened::Lost);
        }
        let _ = fs::remove_dir_all(&self.run);
        // Away at once, so that its name is free and nobody finds half of it.
        let gone = self
            .folder
            .with_file_name(format!("{UNFINISHED}{}", self.record.id));
        fs::rename(&self.folder, &gone).map_err(InstanceError::file("remove", &self.folder))?;
        self.note(Happened::Removed);
        fs::remove_dir_all(&gone).map_err(InstanceError::file("remove", &gone))
    }

    /// Gives it another name.
    ///
    /// # Errors
    ///
    /// It runs, or the name cannot be one or is another's.
    pub fn rename(self, name: &str) -> Result<(), InstanceError> {
        check_name(name)?;
        let _lock = self.lock()?;
        let to = self.folder.with_file_name(name);
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            &self.folder,
            rustix::fs::CWD,
            &to,
            rustix::fs::RenameFlags::NOREPLACE,
        ) {
            Err(rustix::io::Errno::EXIST) => Err(InstanceError::Exists(name.into())),
            done => done.map_err(|e| InstanceError::file("rename", &self.folder)(e.into())),
        }?;
        let renamed = Self {
            name: name.into(),
            folder: to,
            ..self.clone()
        };
        renamed.note(Happened::Renamed {
            from: self.name.clone(),
        });
        Ok(())
    }
}

/// What a VM is, as its folder says.
fn read_record(folder: &Path, name: &str) -> Result<Record, InstanceError> {
    let path = folder.join("vm.json");
    let record: Record = match read_json(&path)? {
        Some(record) => record,
        None => return Err(InstanceError::Unknown(name.into())),
    };
    if record.version > VERSION {
        return Err(InstanceError::Record {
            path,
            why: format!("it is of version {}", record.version),
        });
    }
    Ok(record)
}

const LOCK_TRIES: u32 = 50;

/// The name is a folder's, a host's and one in a network: all of them take this.
pub(crate) fn check_name(name: &str) -> Result<(), InstanceError> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    if bytes.len() <= 63
        && ends.iter().all(|b| b.is_some_and(|b| plain(*b)))
        && bytes.iter().all(|b| plain(*b) || *b == b'-')
    {
        return Ok(());
    }
    Err(InstanceError::Name(name.into()))
}

/// Replaces a file as a whole.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), InstanceError> {
    let write = || {
        let json = serde_json::to_vec_pretty(value)?;
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(path.parent().unwrap_or(Path::new(".")))?;
        io::Write::write_all(&mut file, &json)?;
        file.persist(path).map_err(|e| e.error).map(drop)
    };
    write().map_err(InstanceError::file("write", path))
}

/// None: there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, InstanceError> {
    let json = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        json => json.map_err(InstanceError::file("read", path))?,
    };
    serde_json::from_slice(&json)
        .map(Some)
        .map_err(|e| InstanceError::Record {
            path: path.into(),
            why: e.to_string(),
        })
}

pub(crate) fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// A VM that nobody keeps, with a folder for its sockets.
#[cfg(test)]
pub(crate) fn test_vm(dir: &Path) -> Vm {
    use alveole_agent_protocol::Process;

    use crate::Restart;

    let record = Record {
        version: Record::VERSION,
        id: "0123456789ab".into(),
        image: "x".into(),
        image_id: String::new(),
        created_ms: 1,
        root_disk: "/x".into(),
        kernel: "k".into(),
        cpus: 1,
        memory_mib: 64,
        disk_bytes: None,
        read_only: true,
        hostname: "x".into(),
        network: Vec::new(),
        process: Process {
            args: vec!["true".into()],
            ..Process::default()
        },
        stop_signal: 15,
        labels: Default::default(),
        restart: Restart::No,
        remove: false,
        limits: Default::default(),
        volumes: Vec::new(),
        shm_bytes: None,
        cpu_config: None,
        published_free: Vec::new(),
    };
    let vms = Vms::new(&dir.join("vms"), &dir.join("run"));
    let vm = vms.create("web", &record).unwrap();
    fs::create_dir_all(vm.run_folder()).unwrap();
    vm
}
