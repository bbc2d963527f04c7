//! What goes wrong outside of requests.

use std::io;
use std::path::PathBuf;

/// Why an open store cannot do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A queue's part could not be made.
    #[error("cannot open a queue of depth {depth} to {}: {what}: {source}", path.display())]
    Queue {
        /// The store.
        path: PathBuf,
        /// How deep the queue was to be.
        depth: u32,
        /// The step that failed.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// The host does not say how large the store is.
    #[error("cannot see how large {} is: {source}", path.display())]
    Size {
        /// The store.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// There is no file that could be copied.
    #[error("its blocks lie in no file of the host")]
    NoFile,
    /// A device is not copied.
    #[error(
        "{} is a block device: pause the guest and copy it by means of its own, as a snapshot of LVM",
        path.display()
    )]
    Device {
        /// The store.
        path: PathBuf,
    },
    /// The image cannot be copied.
    #[error("cannot copy {}: {source}{}", path.display(), room(source))]
    Copy {
        /// The store.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The store cannot have that size.
    #[error("cannot make {} {size_bytes} bytes large: {reason}", path.display())]
    Resize {
        /// The store.
        path: PathBuf,
        /// The size asked for.
        size_bytes: u64,
        /// Why, and what to do.
        reason: String,
    },
}
fn room(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; make room, or name another disk",
        _ => "",
    }
}

/// Why something cannot be opened as a store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host does not open it.
    #[error("cannot open {} for {access}: {source}{cure}", path.display())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// How.
        access: &'static str,
        /// What the host says.
        source: io::Error,
        /// What to do about it.
        cure: &'static str,
    },
    /// There is something that holds no blocks.
    #[error("cannot use {} as a disk: it is {kind}; name a file or a block device", path.display())]
    Kind {
        /// What was to be opened.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// There is nothing in it.
    #[error("cannot use {} as a disk: it holds less than one sector of 512 bytes; make it larger first", path.display())]
    Empty {
        /// What was to be opened.
        path: PathBuf,
    },
    /// Direct I/O was asked for, and is not to be had.
    #[error("cannot use direct I/O on {}: {why}; or choose cache=writeback", path.display())]
    Direct {
        /// What was to be opened.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Somebody else uses the image in a way that does not go together with this one.
    #[error("cannot lock {} for {access}: {holder}; stop that first, or use the image read-only in both", path.display())]
    Locked {
        /// What was to be opened.
        path: PathBuf,
        /// How it was to be used.
        access: &'static str,
        /// Who uses it and how.
        holder: String,
        /// This process is among them.
        by_us: bool,
    },
    /// It is no image of the format that it should have, or a damaged one.
    #[error("cannot open {} as qcow2: {source}", path.display())]
    Image {
        /// What was to be opened.
        path: PathBuf,
        /// What is wrong with it.
        source: alveole_qcow2::OpenError,
    },
    /// What an image is laid over cannot be used.
    #[error("cannot use {backing:?}, which {} is laid over: {reason}", image.display())]
    Backing {
        /// The image.
        image: PathBuf,
        /// What it names.
        backing: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// io_uring was asked for, and is not to be had.
    #[error("cannot use io_uring: {reason}; or choose engine=sync")]
    Engine {
        /// Why not.
        reason: String,
    },
}

impl OpenError {
    /// What a person can do about an error of open(2), as the end of a sentence.
    pub(crate) fn cure(error: &io::Error, write: bool) -> &'static str {
        match error.raw_os_error() {
            Some(libc::ENOENT) => "; check the name",
            Some(libc::EACCES | libc::EPERM | libc::EROFS) if write => {
                "; use it read-only, or give the right to write"
            }
            Some(libc::EACCES | libc::EPERM) => "; give the right to read",
            Some(libc::EBUSY) => "; it is mounted or used by another program",
            Some(libc::ENOMEDIUM) => "; insert a medium",
            _ => "",
        }
    }
}
