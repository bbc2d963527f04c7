//! Files that come into being beside those that may be there, and take their places when they are whole.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::snapshot::state::LayerV1;

/// Memory belongs to the user who runs the guest, as all its secrets are in it.
const MODE: u32 = 0o600;
/// Most names that are tried for a file in the making.
const MAX_TRIES: u32 = 64;
/// Most entries of a folder that are looked through for what was left there.
const MAX_ENTRIES: usize = 100_000;

/// A file that is not in its place yet; dropped before, it is gone.
pub(super) struct New {
    pub(super) file: File,
    /// What was asked for, for messages.
    pub(super) named: PathBuf,
    /// Where it goes: an absolute path.
    pub(super) place: PathBuf,
    /// Where it is.
    beside: Option<PathBuf>,
}

impl New {
    pub(super) fn beside(named: &Path) -> Result<Self, String> {
        let wrong = |why: String| format!("{named:?}: {why}");
        let Some(name) = named.file_name() else {
            return Err(wrong("it names no file; give it one".into()));
        };
        let folder = match named.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let folder = fs::canonicalize(folder).map_err(|e| {
            wrong(format!(
                "cannot find its folder: {e}; make the folder, or name another"
            ))
        })?;
        let place = folder.join(name);
        match fs::symlink_metadata(&place) {
            Ok(meta) if !meta.is_file() => {
                return Err(wrong(
                    "something is there that is no plain file; give it another name".into(),
                ));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(wrong(e.to_string())),
        }
        remove_leftovers(&folder, name);
        let (file, beside) = make_hidden(&folder, name)
            .map_err(|e| wrong(format!("cannot make it: {e}; may this user write there?")))?;
        Ok(Self {
            file,
            named: named.to_owned(),
            place,
            beside: Some(beside),
        })
    }

    /// Whoever has an image open must not lose its name.
    pub(super) fn check_unused(&self) -> Result<(), String> {
        match alveole_block_store::holder_of(&self.place) {
            None => Ok(()),
            Some(holder) => Err(format!(
                "{:?} is an image in use: {holder}; give it another name",
                self.named
            )),
        }
    }

    /// The folder that it goes to.
    pub(super) fn folder(&self) -> Option<PathBuf> {
        self.place.parent().map(Path::to_owned)
    }

    /// Takes away what is in its place.
    pub(super) fn remove_older(&self) -> Result<(), String> {
        match fs::remove_file(&self.place) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(self.failed("take away the older one before", &e))
            }
            _ => Ok(()),
        }
    }

    /// Whether it takes the place of one of these.
    pub(super) fn is_of(&self, base: &[LayerV1]) -> bool {
        base.iter().any(|layer| layer.path == self.place)
    }

    /// A diff must not take away what it builds upon.
    pub(super) fn check_base(&self, base: &[LayerV1]) -> Result<(), String> {
        match self.is_of(base) {
            false => Ok(()),
            true => Err(format!(
                "{:?} has memory that this snapshot builds upon: give it another name",
                self.named
            )),
        }
    }

    pub(super) fn wrong(&self, why: &dyn std::error::Error) -> String {
        format!("{:?}: {why}", self.named)
    }

    pub(super) fn failed(&self, act: &str, e: &io::Error) -> String {
        let cure = match e.kind() {
            io::ErrorKind::StorageFull => "; make room, or name another disk",
            _ => "",
        };
        format!("{:?}: cannot {act} it: {e}{cure}", self.named)
    }

    pub(super) fn sync(&self) -> Result<(), String> {
        self.file.sync_data().map_err(|e| self.failed("sync", &e))
    }

    pub(super) fn put(mut self) -> Result<(), String> {
        if let Some(beside) = self.beside.take() {
            let renamed = fs::rename(&beside, &self.place);
            if renamed.is_err() {
                self.beside = Some(beside);
            }
            renamed.map_err(|e| self.failed("put into its place", &e))?;
        }
        Ok(())
    }
}

impl Drop for New {
    fn drop(&mut self) {
        if let Some(beside) = &self.beside {
            let _ = fs::remove_file(beside);
        }
    }
}

/// Makes a file that becomes `name`, in the same folder, and locks it for as long as somebody has it open: whoever finds it without a
/// lock knows that nobody will finish it. A number of a process says little where each has numbers of its own.
fn make_hidden(folder: &Path, name: &OsStr) -> io::Result<(File, PathBuf)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(MODE);
    let mut number = 0u32;
    loop {
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        if number > 0 {
            hidden.push(format!("-{number}"));
        }
        let beside = folder.join(hidden);
        match options.open(&beside) {
            Ok(file) => match alveole_block_store::lock_alone(&file) {
                // Somebody took it for a leftover before it was locked.
                Ok(false) => {}
                Ok(true) if file.metadata()?.nlink() == 0 => {}
                // Without locks it is never removed by others.
                Ok(true) | Err(_) => return Ok((file, beside)),
            },
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < MAX_TRIES => {}
            Err(e) => return Err(e),
        }
        number += 1;
    }
}

/// Removes what processes that were killed have left of files that were to become `name`. What cannot be seen or removed stays.
fn remove_leftovers(folder: &Path, name: &OsStr) {
    let mut start = OsString::from(".");
    start.push(name);
    start.push(".");
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten().take(MAX_ENTRIES) {
        let found = entry.file_name();
        let number = found.as_bytes().strip_prefix(start.as_bytes());
        let is_ours = number.is_some_and(|number| {
            number.first().is_some_and(u8::is_ascii_digit)
                && number.iter().all(|b| b.is_ascii_digit() || *b == b'-')
        });
        if !is_ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = File::options().read(true).write(true).open(&path)
            && alveole_block_store::lock_alone(&file).is_ok_and(|alone| alone)
            && fs::remove_file(&path).is_ok()
        {
            log::info!(
                "removed {}, which a process that was killed had left",
                path.display()
            );
        }
    }
}
