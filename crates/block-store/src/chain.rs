//! A qcow2 image and what it is laid over: found, checked and opened once, with everything that its use needs.
//!
//! An image is made by others, and so is the name of the file that it says it is laid over. The format of that file
//! is what the image says, or what the file's own name says, and never what its content looks like: a guest that writes to a
//! raw disk could make it look like an image that is laid over any file of the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use alveole_qcow2::{Access, BackingRead, Extent, Image, ImageError, ImageFile};

use crate::gate::lock;
use crate::host_file::{HostFile, How, PUNCH_HOLE};
use crate::{Backing, Cache, OpenError, OpenOptions, sys};

/// Most images in a chain: a hostile image must not have us open files for ever.
const MAX_DEPTH: usize = 64;

/// An image file as its tables are read and written.
pub(crate) struct TableFile {
    file: Arc<HostFile>,
    /// Flushes are ignored.
    cached: bool,
    /// Direct I/O writes whole blocks; two writes into one take turns.
    turn: Mutex<()>,
}

impl TableFile {
    pub(crate) fn new(file: Arc<HostFile>, cached: bool) -> Self {
        Self {
            file,
            cached,
            turn: Mutex::new(()),
        }
    }
}

impl ImageFile for TableFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let n = self.file.read_bytes(into, offset)?;
        into[n..].fill(0);
        Ok(())
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let _turn = self.file.direct().map(|_| lock(&self.turn));
        self.file.write_bytes(from, offset)
    }

    fn len(&self) -> io::Result<u64> {
        sys::size(self.file.file())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.file().set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        if self.cached {
            return Ok(());
        }
        self.file.sync()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.file.lacks(PUNCH_HOLE) {
            return Ok(false);
        }
        match sys::fallocate(self.file.file(), PUNCH_HOLE, offset, len) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.file.set_lacks(PUNCH_HOLE);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }
}

/// One file of a chain.
pub(crate) enum Layer {
    Image(Box<Image>),
    Raw { size_bytes: u64 },
}

/// Where bytes of the guest's disk are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In a file, as they are.
    Data {
        file: usize,
        offset: u64,
    },
    Zero,
    /// In an image, compressed.
    Compressed {
        layer: usize,
    },
}

/// Images from the guest's down to the lowest. Layer `n` is in file `n`.
pub(crate) struct Chain {
    layers: Vec<Layer>,
    files: Arc<[Arc<HostFile>]>,
}

impl Chain {
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        let mut opening = Opening {
            options,
            root: folder_of(path)?,
            layers: Vec::new(),
            files: Vec::new(),
        };
        let mut next = opening.image(path.to_owned(), !options.read_only)?;
        while let Some((path, format)) = next {
            next = match format {
                crate::Format::Qcow2 => opening.image(path, false)?,
                crate::Format::Raw => opening.raw(&path)?,
            };
        }
        Ok(Self {
            layers: opening.layers,
            files: opening.files.into(),
        })
    }

    pub(crate) fn files(&self) -> &Arc<[Arc<HostFile>]> {
        &self.files
    }

    /// The guest's image.
    pub(crate) fn image(&self) -> Option<&Image> {
        match self.layers.first() {
            Some(Layer::Image(image)) => Some(image),
            _ => None,
        }
    }

    pub(crate) fn below(&self) -> Below<'_> {
        Below(self)
    }

    /// Where the first of `len` bytes are, as seen from layer `from`, and how many are there.
    pub(crate) fn find(
        &self,
        from: usize,
        offset: u64,
        len: u64,
    ) -> Result<(Place, u64), ImageError> {
        let mut len = len;
        for (n, layer) in self.layers.iter().enumerate().skip(from) {
            let size = match layer {
                Layer::Image(image) => image.size_bytes(),
                Layer::Raw { size_bytes } => *size_bytes,
            };
            if offset >= size {
                return Ok((Place::Zero, len));
            }
            len = len.min(size - offset);
            let image = match layer {
                Layer::Image(image) => image,
                Layer::Raw { .. } => return Ok((Place::Data { file: n, offset }, len)),
            };
            match image.lookup(offset, len)? {
                Extent::Data { file_offset, len } => {
                    let place = Place::Data {
                        file: n,
                        offset: file_offset,
                    };
                    return Ok((place, len));
                }
                Extent::Zero { len } => return Ok((Place::Zero, len)),
                Extent::Compressed { len } => return Ok((Place::Compressed { layer: n }, len)),
                Extent::Backing { len: there } => len = there,
            }
        }
        Ok((Place::Zero, len))
    }

    /// Reads compressed bytes that [`Chain::find`] found.
    pub(crate) fn read_compressed(
        &self,
        layer: usize,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), ImageError> {
        match self.layers.get(layer) {
            Some(Layer::Image(image)) => image.read_compressed(offset, into),
            _ => Ok(()),
        }
    }

    /// How many of the `len` bytes from `offset` on are known to be zeroes without being read.
    pub(crate) fn empty(&self, offset: u64, len: u64) -> io::Result<u64> {
        let (place, len) = self.find(0, offset, len).map_err(io::Error::other)?;
        match place {
            Place::Zero => Ok(len),
            Place::Data { file, offset } => Ok(empty(&self.files[file], offset, len)?),
            Place::Compressed { .. } => Ok(0),
        }
    }

    /// Reads by plain calls, as seen from layer `from`.
    pub(crate) fn read(&self, from: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let rest = (into.len() - done) as u64;
            let (place, len) = self.find(from, at, rest).map_err(io::Error::other)?;
            let part = &mut into[done..done + len as usize];
            match place {
                Place::Zero => part.fill(0),
                Place::Compressed { layer } => self
                    .read_compressed(layer, at, part)
                    .map_err(io::Error::other)?,
                Place::Data { file, offset } => {
                    if self.files[file].read_bytes(part, offset)? < part.len() {
                        let text = "a file of the image has become shorter";
                        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                    }
                }
            }
            done += len as usize;
        }
        Ok(())
    }
}

/// How many of the `len` bytes from `offset` on lie in a hole of the file.
pub(crate) fn empty(file: &HostFile, offset: u64, len: u64) -> io::Result<u64> {
    let data = sys::next_data(file.file(), offset)?;
    let until_data = data.map_or(len, |data| data.start.saturating_sub(offset));
    Ok(until_data.min(len))
}

/// What lies under the guest's image.
pub(crate) struct Below<'a>(&'a Chain);

impl BackingRead for Below<'_> {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.read(1, offset, into)
    }

    fn size_bytes(&self) -> u64 {
        match self.0.layers.get(1) {
            Some(Layer::Image(image)) => image.size_bytes(),
            Some(Layer::Raw { size_bytes }) => *size_bytes,
            None => 0,
        }
    }
}

/// A chain that is being opened.
struct Opening<'a> {
    options: &'a OpenOptions,
    /// Where backing files may lie.
    root: PathBuf,
    layers: Vec<Layer>,
    files: Vec<Arc<HostFile>>,
}

type Next = Option<(PathBuf, crate::Format)>;

impl Opening<'_> {
    fn file(&mut self, path: &Path, write: bool) -> Result<Arc<HostFile>, OpenError> {
        let how = How {
            write,
            direct: self.options.cache == Cache::Direct,
            lock: self.options.lock,
        };
        let file = Arc::new(HostFile::open(path, how)?);
        self.files.push(Arc::clone(&file));
        Ok(file)
    }

    fn raw(&mut self, path: &Path) -> Result<Next, OpenError> {
        let file = self.file(path, false)?;
        self.layers.push(Layer::Raw {
            size_bytes: file.len_bytes(),
        });
        Ok(None)
    }

    /// Opens an image, and says what it is laid over.
    fn image(&mut self, path: PathBuf, write: bool) -> Result<Next, OpenError> {
        let file = self.file(&path, write)?;
        let tables = TableFile::new(Arc::clone(&file), self.options.cache == Cache::Unsafe);
        let access = if write {
            Access::ReadWrite
        } else {
            Access::ReadOnly
        };
        let image = Image::open(Box::new(tables), access).map_err(|source| OpenError::Image {
            path: path.clone(),
            source,
        })?;
        let info = image.info();
        if let Some(needs) = file.direct()
            && info.cluster_size_bytes < needs.offset.into()
        {
            return Err(OpenError::Direct {
                path,
                why: format!(
                    "its clusters of {} bytes are smaller than the {} that are written directly",
                    info.cluster_size_bytes, needs.offset
                ),
            });
        }
        self.layers.push(Layer::Image(Box::new(image)));
        info.backing
            .map(|backing| self.backing(&path, &backing))
            .transpose()
    }

    /// Where a backing file is and what format it has, if it may be used.
    fn backing(
        &self,
        image: &Path,
        backing: &alveole_qcow2::Backing,
    ) -> Result<(PathBuf, crate::Format), OpenError> {
        let refuse = |reason: String| OpenError::Backing {
            image: image.to_owned(),
            backing: backing.path.clone(),
            reason,
        };
        if self.layers.len() >= MAX_DEPTH {
            return Err(refuse(format!(
                "more than {MAX_DEPTH} images lie over one another; commit some"
            )));
        }
        let found = find_backing(image, &backing.path).map_err(refuse)?;
        if self.options.backing == Backing::BesideImage && !found.starts_with(&self.root) {
            return Err(refuse(format!(
                "it is {}, outside of {}; if you trust the image, allow that by backing=anywhere",
                found.display(),
                self.root.display()
            )));
        }
        let format = match backing.format.as_deref() {
            Some("qcow2") => crate::Format::Qcow2,
            Some("raw") => crate::Format::Raw,
            Some(other) => {
                return Err(refuse(format!("its format {other:?} is not supported")));
            }
            None if backing.path.ends_with(".qcow2") => crate::Format::Qcow2,
            None if backing.path.ends_with(".raw") => crate::Format::Raw,
            None => {
                return Err(refuse(
                    "the image does not say its format, and guessing lets guests choose files of the host; \
                     say it by `qemu-img rebase -u -F raw -b <name> <image>`"
                        .into(),
                ));
            }
        };
        let facts = fs::metadata(&found).map_err(|e| refuse(e.to_string()))?;
        use std::os::unix::fs::MetadataExt;
        let same = |file: &Arc<HostFile>| {
            file.file()
                .metadata()
                .is_ok_and(|m| (m.dev(), m.ino()) == (facts.dev(), facts.ino()))
        };
        if self.files.iter().any(same) {
            return Err(refuse(
                "that is a circle: it is in this chain already".into(),
            ));
        }
        Ok((found, format))
    }
}

fn folder_of(path: &Path) -> Result<PathBuf, OpenError> {
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    fs::canonicalize(folder).map_err(|source| OpenError::Open {
        path: path.to_owned(),
        access: "reading",
        cure: OpenError::cure(&source, false),
        source,
    })
}

/// The file that an image names, without links.
pub(crate) fn find_backing(image: &Path, name: &str) -> Result<PathBuf, String> {
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') {
        return Err("only names of files are supported, not protocols or options".into());
    }
    if name.is_empty() || name.contains('\0') {
        return Err("that is no name of a file".into());
    }
    let folder = image.parent().unwrap_or(Path::new(""));
    fs::canonicalize(folder.join(name)).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => format!(
            "there is no {}; bring it back, or name another by `qemu-img rebase -u`",
            folder.join(name).display()
        ),
        _ => e.to_string(),
    })
}
