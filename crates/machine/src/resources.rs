//! What the host must give before a machine can be built: opened here, before any sandbox is entered.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alveole_mmds::Metadata;
use alveole_vm_config::BootSource;

use crate::ValidConfig;
use crate::build::BuildError;
use crate::catalog::{VirtioDevices, try_drive, try_interface};

/// The process is out of file descriptors.
const EMFILE: i32 = 24;

/// The open files of one machine.
pub struct HostResources {
    /// Nothing: the machine is restored, and goes on where it was.
    boot: Option<BootFiles>,
    virtio: VirtioDevices,
}

/// What the guest boots.
pub(crate) struct BootFiles {
    pub(crate) kernel: File,
    pub(crate) kernel_path: PathBuf,
    pub(crate) initrd: Option<(File, PathBuf)>,
}

/// Why the host does not give what the machine needs.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// A file.
    #[error("cannot open the {what} {path:?}: {source}{}", cure(source))]
    File {
        /// What it is to the machine.
        what: &'static str,
        /// The path as it was given.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// What lies behind a disk.
    #[error("drive {id:?}: {source}")]
    Drive {
        /// Its name.
        id: String,
        /// Why not.
        source: alveole_block_store::OpenError,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] alveole_virtio_blk::BlkError),
    /// What carries the frames of a network interface.
    #[error("network interface {id:?}: {source}")]
    Link {
        /// Its name.
        id: String,
        /// Why not.
        source: alveole_net_link::LinkError,
    },
    /// The filter of what the guest sends.
    #[error("network interface {id:?}: {source}")]
    Egress {
        /// The name of the interface.
        id: String,
        /// Why not.
        source: io::Error,
    },
    /// The metadata service.
    #[error("network interface {id:?}: {source}")]
    Metadata {
        /// The name of the interface.
        id: String,
        /// Why not.
        source: io::Error,
    },
    /// A network device.
    #[error(transparent)]
    Net(#[from] alveole_virtio_net::NetError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] alveole_virtio_vsock::VsockError),
    /// The entropy device.
    #[error("the entropy device has no timer: {0}; raise the limit on open files (ulimit -n)")]
    Entropy(io::Error),
}

impl HostResources {
    /// Opens everything that `config` names. `metadata`: what its guest reads, if it is configured so.
    ///
    /// # Errors
    /// A file is missing, not readable, or not a file; a disk cannot be used as it is described.
    pub fn open(config: &ValidConfig, metadata: &Arc<Metadata>) -> Result<Self, ResourceError> {
        Ok(Self {
            boot: Some(BootFiles::open(
                &config.kernel_path,
                config.initrd_path.as_deref(),
            )?),
            virtio: VirtioDevices::open(config, metadata)?,
        })
    }

    /// Opens what the devices of `config` need, and nothing to boot: for a machine that is restored.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_devices(
        config: &ValidConfig,
        metadata: &Arc<Metadata>,
    ) -> Result<Self, ResourceError> {
        Ok(Self {
            boot: None,
            virtio: VirtioDevices::open(config, metadata)?,
        })
    }

    /// Everything that the host does not give of what `config` names, after [`Self::open`] met the first: whoever mends
    /// a description wants to know all of it.
    #[must_use]
    pub fn all_refused(config: &ValidConfig, first: ResourceError) -> Vec<ResourceError> {
        let initrd = config.initrd_path.as_deref();
        let boot = [("kernel", Some(&*config.kernel_path)), ("initrd", initrd)];
        let boot = boot
            .into_iter()
            .filter_map(|(what, path)| open(what, path?).err());
        let drives = config.drives.iter().filter_map(|d| try_drive(d).err());
        let interfaces = config.interfaces.iter();
        let interfaces = interfaces.filter_map(|i| try_interface(i).err());
        let mut all: Vec<_> = boot.chain(drives).chain(interfaces).collect();
        // Some is only refused in its place: the second use of an image, the last descriptor.
        let told = first.to_string();
        if !all.iter().any(|other| other.to_string() == told) {
            all.insert(0, first);
        }
        all
    }

    pub(crate) fn into_parts(self) -> Result<(BootFiles, VirtioDevices), BuildError> {
        let boot = self.boot.ok_or(BuildError::NothingToBoot)?;
        Ok((boot, self.virtio))
    }

    pub(crate) fn into_devices(self) -> VirtioDevices {
        self.virtio
    }
}

impl BootFiles {
    fn open(kernel_path: &Path, initrd_path: Option<&Path>) -> Result<Self, ResourceError> {
        let initrd = match initrd_path {
            Some(path) => Some((open("initrd", path)?, path.to_owned())),
            None => None,
        };
        Ok(Self {
            kernel: open("kernel", kernel_path)?,
            kernel_path: kernel_path.to_owned(),
            initrd,
        })
    }
}

/// Looks whether kernel and initrd can be opened.
pub(crate) fn try_boot_files(source: &BootSource) -> Result<(), ResourceError> {
    BootFiles::open(&source.kernel_image_path, source.initrd_path.as_deref()).map(drop)
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

pub(crate) fn open(what: &'static str, path: &Path) -> Result<File, ResourceError> {
    let failed = |source| ResourceError::File {
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
