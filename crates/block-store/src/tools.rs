//! What people do with images that no guest uses: make, look at, check, resize, commit, convert.
//!
//! All of it is synchronous and opens what it needs. Files are made under another name and get theirs when they are
//! complete; one that is there already is never touched.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alveole_qcow2::{
    Access, Backing as BackingName, CheckError, CreateOptions, Extent, Image, ImageError, NoBacking,
};
pub use alveole_qcow2::{Info as Qcow2Info, Repair, Report};

use crate::chain::{self, Chain, TableFile, find_backing};
use crate::host_file::{HostFile, How};
use crate::{Backing, Format, OpenError, OpenOptions, SECTOR_BYTES};

/// Bytes that are copied at once.
const COPY_BYTES: usize = 2 << 20;

/// Why a tool could not do it.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// An image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is something already.
    #[error("cannot make {}: it is there already; remove it, or choose another name", path.display())]
    Exists {
        /// What was to be made.
        path: PathBuf,
    },
    /// The host failed.
    #[error("cannot {act} {}: {source}", path.display())]
    Io {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The image failed.
    #[error("cannot {act} {}: {source}", path.display())]
    Image {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What is wrong.
        source: ImageError,
    },
    /// It is not possible, or was not meant.
    #[error("cannot {act} {}: {reason}", path.display())]
    Refused {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
}

trait At<T> {
    fn at(self, act: &'static str, path: &Path) -> Result<T, ToolError>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, act: &'static str, path: &Path) -> Result<T, ToolError> {
        self.map_err(|source| ToolError::Io {
            act,
            path: path.to_owned(),
            source,
        })
    }
}

impl<T> At<T> for Result<T, ImageError> {
    fn at(self, act: &'static str, path: &Path) -> Result<T, ToolError> {
        self.map_err(|source| ToolError::Image {
            act,
            path: path.to_owned(),
            source,
        })
    }
}

fn refused(act: &'static str, path: &Path, reason: impl Into<String>) -> ToolError {
    ToolError::Refused {
        act,
        path: path.to_owned(),
        reason: reason.into(),
    }
}

fn open_file(path: &Path, write: bool) -> Result<Arc<HostFile>, OpenError> {
    let how = How {
        write,
        direct: false,
        lock: true,
    };
    HostFile::open(path, how).map(Arc::new)
}

fn open_image(path: &Path, file: &Arc<HostFile>, write: bool) -> Result<Image, OpenError> {
    let access = if write {
        Access::ReadWrite
    } else {
        Access::ReadOnly
    };
    let tables = TableFile::new(Arc::clone(file), false);
    Image::open(Box::new(tables), access).map_err(|source| OpenError::Image {
        path: path.to_owned(),
        source,
    })
}

/// Makes a file by `fill` that nobody sees before it is complete.
fn make(path: &Path, fill: impl FnOnce(&File) -> Result<(), ToolError>) -> Result<(), ToolError> {
    let exists = || ToolError::Exists {
        path: path.to_owned(),
    };
    if fs::symlink_metadata(path).is_ok() {
        return Err(exists());
    }
    let Some(name) = path.file_name() else {
        return Err(refused("make", path, "that is no name of a file"));
    };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.new", std::process::id()));
    let hidden = path.with_file_name(hidden);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&hidden)
        .at("make", path)?;
    let made = fill(&file).and_then(|()| {
        // A second name fails where there is one already; a rename would not.
        match fs::hard_link(&hidden, path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(exists()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => {
                // A file system without second names: take the name first, then put the file there.
                File::create_new(path).at("make", path)?;
                fs::rename(&hidden, path).at("make", path)
            }
            other => other.at("make", path),
        }
    });
    // It is gone where it was renamed.
    let _ = fs::remove_file(&hidden);
    made
}

fn check_size(path: &Path, size_bytes: u64) -> Result<(), ToolError> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) || size_bytes >> 63 != 0 {
        let reason = format!("{size_bytes} bytes are no size of a disk: a multiple of 512 is");
        return Err(refused("make", path, reason));
    }
    Ok(())
}

/// Makes an empty raw image; it takes room when it is written.
///
/// # Errors
/// There is something at `path`, or the host fails.
pub fn create_raw(path: &Path, size_bytes: u64) -> Result<(), ToolError> {
    check_size(path, size_bytes)?;
    make(path, |file| file.set_len(size_bytes).at("make", path))
}

/// Makes an empty qcow2 image. `cluster_bits` is the binary logarithm of the cluster size; 16 is usual.
///
/// # Errors
/// There is something at `path`, the size is not possible, or the host fails.
pub fn create_qcow2(path: &Path, size_bytes: u64, cluster_bits: u32) -> Result<(), ToolError> {
    check_size(path, size_bytes)?;
    let mut options = CreateOptions::new(size_bytes);
    options.cluster_bits = cluster_bits;
    make_qcow2(path, &options)
}

fn make_qcow2(path: &Path, options: &CreateOptions) -> Result<(), ToolError> {
    make(path, |file| {
        alveole_qcow2::create(file, options).map_err(|source| {
            ToolError::Open(OpenError::Image {
                path: path.to_owned(),
                source,
            })
        })
    })
}

/// Makes a qcow2 image that is laid over `base`, which must not be written from then on.
///
/// The base is named by its place within the folder of the image where it lies there, so that both can be moved together;
/// else by its full name.
///
/// # Errors
/// There is something at `path`, the base cannot be opened, or the host fails.
pub fn create_overlay(path: &Path, base: &Path, base_format: Format) -> Result<(), ToolError> {
    let file = open_file(base, false)?;
    let (size, format) = match base_format {
        Format::Raw => (file.len_bytes().next_multiple_of(SECTOR_BYTES), "raw"),
        Format::Qcow2 => (open_image(base, &file, false)?.size_bytes(), "qcow2"),
    };
    check_size(base, size)?;
    let name = backing_name(path, base)?;
    let backing = BackingName {
        path: name,
        format: Some(format.to_owned()),
    };
    make_qcow2(path, &CreateOptions::overlay(size, backing))
}

fn backing_name(path: &Path, base: &Path) -> Result<String, ToolError> {
    let base_found = fs::canonicalize(base).at("find", base)?;
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let folder = fs::canonicalize(folder).at("find the folder of", path)?;
    let name = base_found.strip_prefix(&folder).unwrap_or(&base_found);
    let Some(name) = name.to_str() else {
        let reason = "its name is not UTF-8, which images need; rename it";
        return Err(refused("lay an image over", base, reason));
    };
    // A colon in its first part would make a protocol of it.
    let first = name.split('/').next().unwrap_or_default();
    Ok(if first.contains(':') {
        format!("./{name}")
    } else {
        name.to_owned()
    })
}

/// What is known about an image.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ImageInfo {
    /// How blocks lie in it.
    pub format: Format,
    /// How large the guest's disk is.
    pub size_bytes: u64,
    /// Room that the file takes on the host.
    pub used_bytes: u64,
    /// What a qcow2 image says of itself.
    pub qcow2: Option<Qcow2Info>,
    /// The file that it is laid over, where there is one and it can be found.
    pub backing: Option<PathBuf>,
    /// Who writes to it just now, if somebody does: then these are the facts of a moment.
    pub in_use: Option<String>,
}

/// Looks at one image; what it is laid over need not be there, and a guest may use it.
///
/// # Errors
/// It cannot be opened, or is damaged.
pub fn info(path: &Path, format: Format) -> Result<ImageInfo, ToolError> {
    let (file, in_use) = match open_file(path, false) {
        Err(OpenError::Locked { holder, .. }) => {
            let how = How {
                write: false,
                direct: false,
                lock: false,
            };
            (Arc::new(HostFile::open(path, how)?), Some(holder))
        }
        other => (other?, None),
    };
    let used_bytes = file.file().metadata().at("look at", path)?.blocks() * 512;
    let qcow2 = match format {
        Format::Raw => None,
        Format::Qcow2 => Some(open_image(path, &file, false)?.info()),
    };
    let backing = qcow2.as_ref().and_then(|q| q.backing.as_ref());
    let backing = backing.and_then(|b| find_backing(path, &b.path).ok());
    Ok(ImageInfo {
        format,
        size_bytes: qcow2
            .as_ref()
            .map_or(file.geometry().size_bytes, |q| q.virtual_size_bytes),
        used_bytes,
        qcow2,
        backing,
        in_use,
    })
}

/// Compares the tables of a qcow2 image with one another, and puts right what `repair` says.
///
/// # Errors
/// It cannot be opened, or the host fails.
pub fn check(path: &Path, repair: Repair) -> Result<Report, ToolError> {
    let file = open_file(path, repair != Repair::No)?;
    let tables = TableFile::new(file, false);
    alveole_qcow2::check(&tables, repair).map_err(|e| match e {
        CheckError::Open(source) => ToolError::Open(OpenError::Image {
            path: path.to_owned(),
            source,
        }),
        CheckError::Image(source) => ToolError::Image {
            act: "check",
            path: path.to_owned(),
            source,
        },
    })
}

/// Gives an image another size. A smaller one loses its end: only with `shrink`.
///
/// # Errors
/// The size is not possible, or the host fails.
pub fn resize(
    path: &Path,
    format: Format,
    size_bytes: u64,
    shrink: bool,
    backing: Backing,
) -> Result<(), ToolError> {
    check_size(path, size_bytes)?;
    let options = OpenOptions {
        format,
        backing,
        ..OpenOptions::default()
    };
    let small = |old: u64| {
        if size_bytes < old && !shrink {
            let reason =
                format!("it holds {old} bytes, what is beyond {size_bytes} would be lost; say so");
            return Err(refused("resize", path, reason));
        }
        Ok(())
    };
    match format {
        Format::Raw => {
            let file = open_file(path, true)?;
            if file.is_device() {
                return Err(refused("resize", path, "it is a block device"));
            }
            small(file.geometry().size_bytes)?;
            file.file().set_len(size_bytes).at("resize", path)
        }
        Format::Qcow2 => {
            let chain = Chain::open(path, &options)?;
            let Some(image) = chain.image() else {
                return Ok(());
            };
            small(image.size_bytes())?;
            image
                .resize(size_bytes, &chain.below())
                .and_then(|()| image.flush())
                .at("resize", path)
        }
    }
}

/// Where a tool writes to.
enum Target {
    Raw(Arc<HostFile>),
    Image(Chain),
}

impl Target {
    fn open(path: &Path, format: Format, backing: Backing) -> Result<Self, OpenError> {
        let options = OpenOptions {
            format,
            backing,
            ..OpenOptions::default()
        };
        Ok(match format {
            Format::Raw => Self::Raw(open_file(path, true)?),
            Format::Qcow2 => Self::Image(Chain::open(path, &options)?),
        })
    }

    fn size_bytes(&self) -> u64 {
        match self {
            Self::Raw(file) => file.len_bytes(),
            Self::Image(chain) => chain.image().map_or(0, Image::size_bytes),
        }
    }

    fn grow(&self, path: &Path, size_bytes: u64) -> Result<(), ToolError> {
        match self {
            Self::Raw(file) => file.file().set_len(size_bytes).at("resize", path),
            Self::Image(chain) => match chain.image() {
                Some(image) => image.resize(size_bytes, &chain.below()).at("resize", path),
                None => Ok(()),
            },
        }
    }

    fn write(&self, path: &Path, offset: u64, bytes: &[u8]) -> Result<(), ToolError> {
        match self {
            Self::Raw(file) => file.write_bytes(bytes, offset).at("write", path),
            Self::Image(chain) => match chain.image() {
                Some(image) => image
                    .write_allocating(offset, bytes, &chain.below())
                    .at("write", path),
                None => Ok(()),
            },
        }
    }

    fn finish(self, path: &Path) -> Result<(), ToolError> {
        match self {
            Self::Raw(file) => file.file().sync_all().at("write", path),
            Self::Image(chain) => match chain.image() {
                Some(image) => image.flush().at("write", path),
                None => Ok(()),
            },
        }
    }
}

/// Writes what an image holds of its own into what it is laid over. The image itself stays as it is; it may be removed
/// then, or used on.
///
/// # Errors
/// One of them is in use or cannot be opened, or the host fails. What was written until then is the same in both.
pub fn commit(path: &Path, backing: Backing) -> Result<(), ToolError> {
    let options = OpenOptions {
        format: Format::Qcow2,
        read_only: true,
        backing,
        lock: false,
        ..OpenOptions::default()
    };
    // The whole chain once, for the rules about backing files; the base is then opened for writing.
    let chain = Chain::open(path, &options)?;
    let base = chain.files().get(1).map(|f| f.path().to_owned());
    let format = chain
        .image()
        .and_then(|i| i.info().backing)
        .and_then(|b| b.format);
    drop(chain);
    let Some(base) = base else {
        return Err(refused("commit", path, "it is laid over nothing"));
    };
    let format = match format.as_deref() {
        Some("raw") => Format::Raw,
        None if base.extension().is_some_and(|e| e == "raw") => Format::Raw,
        _ => Format::Qcow2,
    };
    // For writing, although it is not written: nobody may change it meanwhile.
    let file = open_file(path, true)?;
    let image = open_image(path, &file, false)?;
    let target = Target::open(&base, format, backing)?;
    let size = image.size_bytes();
    if target.size_bytes() < size {
        target.grow(&base, size)?;
    }
    let mut bytes = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < size {
        let now = (size - at).min(COPY_BYTES as u64);
        let extent = image.lookup(at, now).at("read", path)?;
        let len = match extent {
            Extent::Backing { len } => len,
            Extent::Data { len, .. } | Extent::Zero { len } | Extent::Compressed { len } => {
                let part = &mut bytes[..len as usize];
                image.read(at, part, &NoBacking).at("read", path)?;
                target.write(&base, at, part)?;
                len
            }
        };
        at += len;
    }
    target.finish(&base)
}

/// Makes a copy of an image, with all that it is laid over, in a format. Zeroes take no room in it.
///
/// # Errors
/// There is something at `to`, the image cannot be opened, or the host fails.
pub fn convert(
    from: &Path,
    from_format: Format,
    to: &Path,
    to_format: Format,
    backing: Backing,
) -> Result<(), ToolError> {
    let options = OpenOptions {
        format: from_format,
        read_only: true,
        backing,
        ..OpenOptions::default()
    };
    let (chain, raw) = match from_format {
        Format::Raw => (None, Some(open_file(from, false)?)),
        Format::Qcow2 => (Some(Chain::open(from, &options)?), None),
    };
    let size = match (&chain, &raw) {
        (Some(chain), _) => chain.image().map_or(0, Image::size_bytes),
        (None, raw) => raw.as_ref().map_or(0, |f| f.len_bytes()),
    }
    .next_multiple_of(SECTOR_BYTES);
    check_size(from, size)?;
    let read = |at: u64, into: &mut [u8]| match (&chain, &raw) {
        (Some(chain), _) => chain.read(0, at, into),
        (None, Some(file)) => {
            let n = file.read_bytes(into, at)?;
            into[n..].fill(0);
            Ok(())
        }
        (None, None) => Ok(()),
    };
    // A device that knows no holes is read.
    let empty = |at: u64, len: u64| match (&chain, &raw) {
        (Some(chain), _) => chain.empty(at, len).unwrap_or(0),
        (None, Some(file)) => chain::empty(file, at, len).unwrap_or(0),
        (None, None) => 0,
    };
    // Under a name of its own until it is complete.
    let mut hidden = std::ffi::OsString::from(to);
    hidden.push(".part");
    let hidden = PathBuf::from(hidden);
    if fs::symlink_metadata(to).is_ok() {
        return Err(ToolError::Exists {
            path: to.to_owned(),
        });
    }
    match to_format {
        Format::Raw => create_raw(&hidden, size)?,
        Format::Qcow2 => create_qcow2(&hidden, size, 16)?,
    }
    let copy = || {
        let target = Target::open(&hidden, to_format, Backing::BesideImage)?;
        let mut bytes = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < size {
            // Whole pieces, so that what is written keeps its alignment.
            let skipped = empty(at, size - at) / COPY_BYTES as u64 * COPY_BYTES as u64;
            if skipped > 0 {
                at += skipped;
                continue;
            }
            let part = &mut bytes[..(size - at).min(COPY_BYTES as u64) as usize];
            read(at, part).at("read", from)?;
            for (n, cluster) in part.chunks(64 << 10).enumerate() {
                if cluster.iter().any(|b| *b != 0) {
                    target.write(to, at + (n as u64) * (64 << 10), cluster)?;
                }
            }
            at += part.len() as u64;
        }
        target.finish(to)
    };
    let copied = copy().and_then(|()| match fs::hard_link(&hidden, to) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(ToolError::Exists {
            path: to.to_owned(),
        }),
        other => other.at("make", to),
    });
    let _ = fs::remove_file(&hidden);
    copied
}
