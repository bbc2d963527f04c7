//! The state directory: one file for each network, one for the settings of this host that were changed, and a lock.
//!
//! Files are replaced as a whole, so that whoever is killed leaves the old one or the new one.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::lease::Lease;
use crate::spec::NetworkSpec;
use crate::words::NetworkName;

/// Format of state files; a later program reads earlier ones.
const VERSION: u32 = 1;
/// Largest state file that is read, in bytes.
const MOST_BYTES: u64 = 16 << 20;

/// A network and what is plugged into it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkState {
    version: u32,
    /// What it is to be.
    pub spec: NetworkSpec,
    /// Whether it is being removed: whoever comes next finishes that.
    #[serde(default)]
    pub removing: bool,
    /// Its VMs, the longest idle first.
    #[serde(default)]
    pub leases: Vec<Lease>,
}

impl NetworkState {
    /// A new network, without VMs.
    #[must_use]
    pub fn new(spec: NetworkSpec) -> Self {
        Self {
            version: VERSION,
            spec,
            removing: false,
            leases: Vec::new(),
        }
    }
}

/// Settings of this host that were changed: what they were before.
pub type SettingsBefore = BTreeMap<String, String>;

/// Where things are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    /// What lasts: networks and addresses. Mode 0700.
    pub state: PathBuf,
    /// What helpers read while they run: mode 0755, as they run under another user.
    pub run: PathBuf,
}

impl Folders {
    /// The usual ones: of the system for root, else of the user (XDG base directory specification 0.8).
    #[must_use]
    pub fn usual() -> Self {
        if rustix::process::geteuid().is_root() {
            return Self {
                state: "/var/lib/alveole/networks".into(),
                run: "/run/alveole/networks".into(),
            };
        }
        let home = |variable: &str| {
            std::env::var_os(variable)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        let state = home("XDG_STATE_HOME")
            .or_else(|| home("HOME").map(|home| home.join(".local/state")))
            .unwrap_or_else(std::env::temp_dir);
        let run = home("XDG_RUNTIME_DIR").unwrap_or_else(|| state.clone());
        Self {
            state: state.join("alveole/networks"),
            run: run.join("alveole/networks-run"),
        }
    }

    /// All below one folder.
    #[must_use]
    pub fn below(folder: &Path) -> Self {
        Self {
            state: folder.join("networks"),
            run: folder.join("run"),
        }
    }
}

/// The state directory, held by this process alone until it is dropped.
#[derive(Debug)]
pub(crate) struct State {
    folders: Folders,
    _lock: File,
}

impl State {
    /// Takes the lock, waiting for whoever has it.
    pub(crate) fn lock(folders: &Folders) -> Result<Self, Error> {
        let make = |path: &Path, mode: u32| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(path)
                .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
                .map_err(|e| Error::file("make the folder", path, e))
        };
        make(&folders.state, 0o700)?;
        make(&folders.run, 0o755)?;
        let path = folders.state.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| Error::file("open", &path, e))?;
        loop {
            match flock(&lock, FlockOperation::LockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::file("lock", &path, e.into())),
            }
        }
        let state = Self {
            folders: folders.clone(),
            _lock: lock,
        };
        state.sweep()?;
        Ok(state)
    }

    pub(crate) fn run_folder(&self) -> &Path {
        &self.folders.run
    }

    /// What somebody who was killed had begun to write.
    fn sweep(&self) -> Result<(), Error> {
        for path in self.files()? {
            if path.extension() == Some(OsStr::new("new")) {
                fs::remove_file(&path).map_err(|e| Error::file("remove", &path, e))?;
            }
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<PathBuf>, Error> {
        let folder = &self.folders.state;
        let failed = |e| Error::file("read the folder", folder, e);
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(failed)? {
            files.push(entry.map_err(failed)?.path());
        }
        files.sort();
        Ok(files)
    }

    pub(crate) fn networks(&self) -> Result<BTreeMap<NetworkName, NetworkState>, Error> {
        read_networks(&self.files()?)
    }

    pub(crate) fn save(&self, network: &NetworkState) -> Result<(), Error> {
        self.write(&self.network_file(&network.spec.name), network)
    }

    pub(crate) fn forget(&self, name: &NetworkName) -> Result<(), Error> {
        let path = self.network_file(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", &path, e)),
            _ => Ok(()),
        }
    }

    fn network_file(&self, name: &NetworkName) -> PathBuf {
        self.folders.state.join(format!("{name}.network.json"))
    }

    fn settings_file(&self) -> PathBuf {
        self.folders.state.join("settings.json")
    }

    pub(crate) fn settings(&self) -> Result<SettingsBefore, Error> {
        let path = self.settings_file();
        if path.exists() {
            read(&path)
        } else {
            Ok(SettingsBefore::new())
        }
    }

    pub(crate) fn save_settings(&self, settings: &SettingsBefore) -> Result<(), Error> {
        let path = self.settings_file();
        if settings.is_empty() {
            return match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    Err(Error::file("remove", &path, e))
                }
                _ => Ok(()),
            };
        }
        self.write(&path, settings)
    }

    fn write(&self, path: &Path, content: &impl Serialize) -> Result<(), Error> {
        let failed = |e: io::Error| Error::file("write", path, e);
        let text = serde_json::to_vec_pretty(content).map_err(|e| failed(e.into()))?;
        replace_file(path, &text, 0o600).map_err(failed)
    }
}

/// Replaces a file as a whole, on disk before it has its name.
pub(crate) fn replace_file(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(mode)
        .open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)
}

/// The networks as they are, for who only looks: without the lock, as files are replaced as a whole.
pub(crate) fn look(folders: &Folders) -> Result<BTreeMap<NetworkName, NetworkState>, Error> {
    let folder = &folders.state;
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(Error::file("read the folder", folder, e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        files.push(
            entry
                .map_err(|e| Error::file("read the folder", folder, e))?
                .path(),
        );
    }
    read_networks(&files)
}

fn read_networks(files: &[PathBuf]) -> Result<BTreeMap<NetworkName, NetworkState>, Error> {
    let mut networks = BTreeMap::new();
    for path in files {
        let Some(name) = path
            .file_name()
            .and_then(OsStr::to_str)
            .and_then(|n| n.strip_suffix(".network.json"))
        else {
            continue;
        };
        let network: NetworkState = read(path)?;
        let damaged = |why: String| Error::DamagedState {
            path: path.clone(),
            why,
        };
        if network.version != VERSION {
            return Err(damaged(format!(
                "its version is {}, this program knows {VERSION}",
                network.version
            )));
        }
        if network.spec.name.as_str() != name {
            return Err(damaged(format!("it describes '{}'", network.spec.name)));
        }
        networks.insert(network.spec.name.clone(), network);
    }
    Ok(networks)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let failed = |e| Error::file("read", path, e);
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > MOST_BYTES {
        let why = format!("it has {length} bytes");
        return Err(Error::DamagedState {
            path: path.to_owned(),
            why,
        });
    }
    let text = fs::read(path).map_err(failed)?;
    serde_json::from_slice(&text).map_err(|e| Error::DamagedState {
        path: path.to_owned(),
        why: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::NetworkRequest;

    fn network(name: &str) -> NetworkState {
        NetworkState::new(
            NetworkRequest::default()
                .check(&name.parse().unwrap())
                .unwrap(),
        )
    }

    #[test]
    fn what_is_saved_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders::below(folder.path());
        let state = State::lock(&folders).unwrap();
        state.save(&network("a")).unwrap();
        state.save(&network("b")).unwrap();
        state.forget(&"a".parse().unwrap()).unwrap();
        assert_eq!(
            state.networks().unwrap().into_values().collect::<Vec<_>>(),
            [network("b")]
        );
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folders.state), 0o700);
        assert_eq!(mode(&folders.state.join("b.network.json")), 0o600);
        assert_eq!(look(&folders).unwrap().len(), 1);
    }

    #[test]
    fn half_written_and_damaged_files() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders::below(folder.path());
        drop(State::lock(&folders).unwrap());
        let new = folders.state.join("a.network.json.new");
        fs::write(&new, "{\"vers").unwrap();
        let state = State::lock(&folders).unwrap();
        assert!(!new.exists() && state.networks().unwrap().is_empty());
        let path = folders.state.join("a.network.json");
        let good = serde_json::to_string(&network("a")).unwrap();
        for (text, word) in [
            (String::new(), "EOF"),
            (good[..good.len() / 2].to_owned(), "EOF"),
            (
                good.replace("\"version\":1", "\"version\":2"),
                "version is 2",
            ),
            (
                good.replace("\"name\":\"a\"", "\"name\":\"b\""),
                "describes 'b'",
            ),
            (good.replace("\"name\":\"a\"", "\"name\":\"../a\""), "'.'"),
        ] {
            fs::write(&path, text).unwrap();
            let said = state.networks().unwrap_err().to_string();
            assert!(
                said.contains(word) && said.contains("a.network.json"),
                "{said}"
            );
        }
    }

    #[test]
    fn a_second_one_waits_for_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders::below(folder.path());
        let held = State::lock(&folders).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let second = std::thread::spawn(move || {
            State::lock(&folders).unwrap();
            tell.send(()).unwrap();
        });
        assert!(
            told.recv_timeout(std::time::Duration::from_millis(100))
                .is_err()
        );
        drop(held);
        told.recv_timeout(std::time::Duration::from_secs(10))
            .unwrap();
        second.join().unwrap();
    }
}
