//! The file that describes the machine: from its path to a [`VmConfig`].

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use alveole_vm_config::{Body, CpuConfig, CpuConfigSource, SnapshotLoad, VmConfig};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::exit::Failure;

/// Reads the description at `path`, and the CPU template if it names a file with one.
///
/// # Errors
/// It cannot be read, or it is wrong: what, why and what to do.
pub(crate) fn read(path: &Path) -> Result<VmConfig, Failure> {
    let text = read_text(path)?;
    let name = path.display().to_string();
    let wrong = |e: alveole_vm_config::ConfigError| Failure::Config(e.to_string());
    let mut config = VmConfig::from_json_bytes(&text, &name).map_err(wrong)?;
    if let Some(CpuConfigSource::File(path)) = &config.cpu_config {
        let text = read_text(path)?;
        let name = path.display().to_string();
        let cpu_config = CpuConfig::from_json_bytes(&text, &name).map_err(wrong)?;
        config.cpu_config = Some(CpuConfigSource::Here(cpu_config));
    }
    Ok(config)
}

/// Reads which snapshot to load, and how, from the file at `path`.
///
/// # Errors
/// It cannot be read, or it is wrong: what, why and what to do.
pub(crate) fn read_load(path: &Path) -> Result<SnapshotLoad, Failure> {
    let text = read_text(path)?;
    let name = path.display().to_string();
    SnapshotLoad::from_json_bytes(&text, &name).map_err(|e| Failure::Config(e.to_string()))
}

/// Reads the file at `path`, which is as long as a description may be.
///
/// # Errors
/// It cannot be read: why and what to do.
pub(crate) fn read_text(path: &Path) -> Result<Vec<u8>, Failure> {
    let name = path.display().to_string();
    read_bounded(path).map_err(|e| {
        let hint = match e.kind() {
            ErrorKind::NotFound => "; is the path right?",
            ErrorKind::PermissionDenied => "; make it readable for this user",
            ErrorKind::IsADirectory => "; name a file in it",
            _ if e.raw_os_error() == Some(nix::libc::EMFILE) => {
                "; raise the limit on open files (ulimit -n)"
            }
            _ => "",
        };
        Failure::Config(format!("cannot read {name:?}: {e}{hint}"))
    })
}

/// A whole file, or one byte more than a description may have: the reader then says so.
fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    // To open a named pipe takes for ever when nobody writes to it; like this it reads as empty.
    let mut options = File::options();
    options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let file = options.open(path)?;
    // A writer that is there may take its time.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    let mut text = Vec::new();
    let limit = u64::try_from(alveole_vm_config::MAX_SIZE_BYTES).unwrap_or(u64::MAX);
    (&file)
        .take(limit.saturating_add(1))
        .read_to_end(&mut text)?;
    if text.is_empty() && file.metadata()?.file_type().is_fifo() {
        return Err(std::io::Error::other(
            "nobody writes to this pipe; start its writer first",
        ));
    }
    Ok(text)
}
