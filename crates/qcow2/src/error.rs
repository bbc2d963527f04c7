//! What can go wrong, in words for the owner of the image.

use std::io;

/// An image cannot be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file itself failed.
    #[error("cannot {act}: {source}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Another format.
    #[error("not a qcow2 image: it starts with {found:#010x} instead of 0x514649fb")]
    Magic {
        /// The first four bytes.
        found: u32,
    },
    /// The file is shorter than a header.
    #[error("the file ends after {found_bytes} bytes, the header needs {needed_bytes}")]
    Truncated {
        /// Length of the file.
        found_bytes: u64,
        /// Length of a header.
        needed_bytes: u64,
    },
    /// A field of the header, or an option, has a value that cannot be.
    #[error("{field} is {value}: {rule}")]
    Field {
        /// Name of the field as in the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold.
        rule: String,
    },
    /// The image needs a feature that is not supported.
    #[error(
        "the image needs {names}, which is not supported; `qemu-img convert` makes a plain copy"
    )]
    Features {
        /// Names of the features, separated by commas.
        names: String,
    },
    /// A name in the header is not text.
    #[error("the {field} is not UTF-8")]
    NotText {
        /// Which name.
        field: &'static str,
    },
    /// Tables claim the same place in the file.
    #[error("the {first} and the {second} overlap")]
    Overlap {
        /// One of them.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// The image is marked as corrupt and may be read only.
    #[error(
        "the image is marked corrupt and can be opened for reading only; `qemu-img check -r all` may repair it"
    )]
    MarkedCorrupt,
    /// The image was not closed cleanly and its reference counts could not be rebuilt.
    #[error("the image was not closed cleanly and its reference counts cannot be rebuilt: {0}")]
    Rebuild(#[source] ImageError),
}

/// An access to an open image failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file itself failed.
    #[error("cannot {act}: {source}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The image is open for reading only.
    #[error("the image is open for reading only")]
    ReadOnly,
    /// The range passes the end of the disk.
    #[error("{len} bytes at {offset:#x} pass the end of the disk, {size_bytes:#x}")]
    OutOfRange {
        /// Guest offset.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the disk.
        size_bytes: u64,
    },
    /// The table entry of a guest cluster makes no sense.
    #[error("entry {entry:#018x} of guest offset {offset:#x} is damaged: {fault}")]
    Entry {
        /// Guest offset.
        offset: u64,
        /// The L2 entry.
        entry: u64,
        /// What is wrong.
        fault: &'static str,
    },
    /// An entry of a higher table makes no sense.
    #[error("entry {index} of the {table}, {entry:#018x}, is damaged: {fault}")]
    Table {
        /// Which table.
        table: &'static str,
        /// Which entry.
        index: u64,
        /// What it holds.
        entry: u64,
        /// What is wrong.
        fault: &'static str,
    },
    /// Compressed data make no sense.
    #[error("the compressed cluster at guest offset {offset:#x} is damaged: {reason}")]
    Compressed {
        /// Guest offset.
        offset: u64,
        /// What the decoder says.
        reason: String,
    },
    /// A write would go to a cluster that a table lies in.
    #[error(
        "the image is damaged: the {what} lies at host offset {host_offset:#x}, where data would go"
    )]
    Overlap {
        /// Offset in the file.
        host_offset: u64,
        /// What lies there.
        what: &'static str,
    },
    /// Tables are damaged, so that nobody can say which clusters are in use.
    #[error("{count} table entries are damaged, the first: {first}")]
    Damaged {
        /// How many.
        count: u64,
        /// The first.
        first: String,
    },
    /// A limit of the format or of this engine is reached.
    #[error("{what} would pass {limit}")]
    Limit {
        /// What is full.
        what: &'static str,
        /// How much there may be.
        limit: u64,
    },
    /// The image cannot be resized as asked.
    #[error("cannot resize to {size_bytes} bytes: {reason}")]
    Resize {
        /// Wanted size.
        size_bytes: u64,
        /// Why not.
        reason: &'static str,
    },
}

/// Names what was tried when a file operation fails.
pub(crate) trait Act<T> {
    fn act(self, act: &'static str) -> Result<T, ImageError>;
    fn act_open(self, act: &'static str) -> Result<T, OpenError>;
}

impl<T> Act<T> for io::Result<T> {
    fn act(self, act: &'static str) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io { act, source })
    }

    fn act_open(self, act: &'static str) -> Result<T, OpenError> {
        self.map_err(|source| OpenError::Io { act, source })
    }
}
