//! EROFS, the kernel's read-only file system: a writer that takes files as they come, and a reader.
//!
//! The format is that of the kernel's `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`: what Linux 5.15 reads,
//! uncompressed. A folder of this host is packed as it is. Deliberately does
//! not know: layers, tar, containers, what an image is for.

mod content;
mod encode;
mod error;
mod folder;
mod format;
mod reader;
mod write_out;
mod writer;

pub use content::{Child, Content, Directory};
pub use error::{ReadError, WriteError};
pub use folder::{LeftOut, PackError, pack};
pub use reader::{Entry, Image, Info};
pub use write_out::WriteOut;
pub use writer::{FileWriter, Inode, Writer};

/// Longest name in a directory, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest target of a symbolic link, in bytes (what Linux takes).
pub const MAX_TARGET: usize = 4095;
/// Bytes of extended attributes that one inode can hold, with their names and padding.
pub const MAX_XATTRS: usize = 200 << 10;

/// Full name and value of an extended attribute.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// What `stat` says of a file, beside its type, size and links.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permissions with set-user-id, set-group-id and sticky bits: the low 12 bits of `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content: seconds since 1970, which may be negative.
    pub mtime: i64,
    /// Nanoseconds of it, below 10^9.
    pub mtime_nsec: u32,
    /// Extended attributes by full name (`user.a`, `security.capability`), sorted and each once.
    pub xattrs: Vec<Xattr>,
}

/// Types of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
}
