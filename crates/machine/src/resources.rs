//! What the host must give before a machine can be built: opened here, before any sandbox is entered.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::ValidConfig;

/// The process is out of file descriptors.
const EMFILE: i32 = 24;

/// The open files of one machine.
pub struct HostResources {
    pub(crate) kernel: File,
    pub(crate) kernel_path: PathBuf,
    pub(crate) initrd: Option<(File, PathBuf)>,
}

/// Why a file could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the {what} {path:?}: {source}{}", cure(source))]
pub struct ResourceError {
    /// What it is to the machine.
    what: &'static str,
    /// The path as it was given.
    path: PathBuf,
    /// What the host said.
    source: io::Error,
}

impl HostResources {
    /// Opens everything that `config` names.
    ///
    /// # Errors
    /// A file is missing, not readable, or not a file.
    pub fn open(config: &ValidConfig) -> Result<Self, ResourceError> {
        let kernel = open("kernel", &config.kernel_path)?;
        let initrd = match &config.initrd_path {
            Some(path) => Some((open("initrd", path)?, path.clone())),
            None => None,
        };
        Ok(Self {
            kernel,
            kernel_path: config.kernel_path.clone(),
            initrd,
        })
    }
}

fn cure(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; is the path right?",
        io::ErrorKind::PermissionDenied => "; make it readable for this user",
        io::ErrorKind::IsADirectory => "; name a file in it",
        io::ErrorKind::Other => "; name a file",
        _ if source.raw_os_error() == Some(EMFILE) => "; raise the limit on open files (ulimit -n)",
        _ => "",
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, ResourceError> {
    let failed = |source| ResourceError {
        what,
        path: path.to_owned(),
        source,
    };
    // A named pipe would block here until somebody writes; only what can be mapped makes sense.
    let kind = std::fs::metadata(path).map_err(failed)?.file_type();
    if kind.is_dir() {
        return Err(failed(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    if !kind.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    File::open(path).map_err(failed)
}
