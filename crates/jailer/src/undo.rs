//! What was made and must go again when the jail does not come about.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, unlinkat};
use rustix::io::Errno;

use crate::failure::{Failure, OrFail};

/// A cgroup is busy until the processes that have left it are taken down, a moment after they have ended.
const TRIES: u32 = 200;
const BETWEEN_TRIES: Duration = Duration::from_millis(1);

/// Things made so far. Dropped, it removes them, the last one first; in the process that made it alone. They are
/// held by their folders' descriptors, so that they are reached from within another root, too.
#[derive(Debug)]
pub(crate) struct Undo {
    made: Vec<Made>,
    process: u32,
}

#[derive(Debug)]
struct Made {
    folder: OwnedFd,
    name: OsString,
    is_folder: bool,
    path: PathBuf,
}

impl Undo {
    pub(crate) fn new() -> Self {
        Self {
            made: Vec::new(),
            process: std::process::id(),
        }
    }

    /// Remembers the file `name` in `folder`; `path` is what people call it.
    pub(crate) fn file(
        &mut self,
        folder: impl AsFd,
        name: &OsStr,
        path: &Path,
    ) -> Result<(), Failure> {
        self.add(folder, name, path, false)
    }

    /// Remembers a folder in `folder`.
    pub(crate) fn folder(
        &mut self,
        folder: impl AsFd,
        name: &OsStr,
        path: &Path,
    ) -> Result<(), Failure> {
        self.add(folder, name, path, true)
    }

    /// Everything stays.
    pub(crate) fn keep(&mut self) {
        self.made.clear();
    }

    fn add(
        &mut self,
        folder: impl AsFd,
        name: &OsStr,
        path: &Path,
        is_folder: bool,
    ) -> Result<(), Failure> {
        let folder = folder.as_fd().try_clone_to_owned().or_fail(
            || format!("remember {path:?}"),
            "raise the limit of open files (ulimit -n)",
        )?;
        self.made.push(Made {
            folder,
            name: name.to_owned(),
            is_folder,
            path: path.to_owned(),
        });
        Ok(())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        let mut left = None;
        for made in self.made.iter().rev() {
            match made.remove() {
                // Somebody else's file may have come into a folder meanwhile: it is not ours to remove.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {}
                Err(e) => left = Some((made, e)),
            }
        }
        // The last one is the outermost: the others are in it, but for cgroups.
        if let Some((made, e)) = left {
            crate::say(&format!(
                "cannot remove again what was made, {:?} among it: {e}; remove it by hand",
                made.path
            ));
        }
    }
}

impl Made {
    fn remove(&self) -> Result<(), Errno> {
        let flags = if self.is_folder {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        for _ in 1..TRIES {
            match unlinkat(&self.folder, &*self.name, flags) {
                Err(Errno::BUSY) => std::thread::sleep(BETWEEN_TRIES),
                other => return other,
            }
        }
        unlinkat(&self.folder, &*self.name, flags)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_was_made_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let fd = fs::File::open(dir.path()).unwrap();
        fs::write(at("before"), "").unwrap();
        fs::create_dir(at("made")).unwrap();
        fs::create_dir(at("shared")).unwrap();
        let mut undo = Undo::new();
        for name in ["made", "shared"] {
            undo.folder(&fd, name.as_ref(), &at(name)).unwrap();
        }
        let inner = fs::File::open(at("made")).unwrap();
        fs::write(at("made/file"), "").unwrap();
        fs::write(at("shared/of another"), "").unwrap();
        undo.file(&inner, "file".as_ref(), &at("made/file"))
            .unwrap();
        undo.file(&inner, "gone".as_ref(), &at("made/gone"))
            .unwrap();
        drop(undo);
        assert!(!at("made").exists());
        assert!(at("shared/of another").exists() && at("before").exists());
    }
}
