//! What a caller may choose when a store is opened.

use std::path::Path;

/// How blocks lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// One after the other: raw images, block devices, ISO images.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// The format of an image that nobody said: what its name ends in, and never what its content looks like,
    /// because a guest writes the content.
    #[must_use]
    pub fn by_name(path: &Path) -> Self {
        if path.extension().is_some_and(|ending| ending == "qcow2") {
            Self::Qcow2
        } else {
            Self::Raw
        }
    }
}

/// What stands between the guest and the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// The host's page cache; a flush of the guest reaches the medium.
    #[default]
    Writeback,
    /// Nothing (`O_DIRECT`); a flush of the guest reaches the medium.
    Direct,
    /// The host's page cache; flushes are ignored. What was written is lost when the host goes down.
    Unsafe,
}

/// Who carries requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// io_uring where the host has it, else plain calls.
    #[default]
    Auto,
    /// io_uring, or opening fails.
    IoUring,
    /// One plain call after the other, on the thread that kicks.
    Sync,
}

/// Where the backing files of an image may lie. An image is made by others: a name in it could point to
/// any file that the monitor may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// In the directory of the image, or below it.
    #[default]
    BesideImage,
    /// Anywhere.
    Anywhere,
}

/// How to open a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    /// How blocks lie in it. Never guessed from the content: a guest writes the content.
    pub format: Format,
    /// Refuse writes, and open what lies there for reading only.
    pub read_only: bool,
    /// What stands between the guest and the medium.
    pub cache: Cache,
    /// Who carries requests.
    pub engine: Engine,
    /// Where backing files may lie.
    pub backing: Backing,
    /// Lock the file against other writers, in the way of QEMU.
    pub lock: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: Format::default(),
            read_only: false,
            cache: Cache::default(),
            engine: Engine::default(),
            backing: Backing::default(),
            lock: true,
        }
    }
}
