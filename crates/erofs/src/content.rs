//! What an image is made of, beside regular files: as callers of the writer say it.

use crate::{Inode, Metadata};

/// What a file other than a regular one or a directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Symbolic link to these bytes.
    Symlink(Vec<u8>),
    /// Character device: major and minor number.
    CharDevice(u32, u32),
    /// Block device: major and minor number.
    BlockDevice(u32, u32),
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
}

/// What a name in a directory stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Child {
    /// A file that was written before.
    Inode(Inode),
    /// A directory, by its index in the list given to [`Writer::finish`](crate::Writer::finish).
    Directory(usize),
}

/// A directory, as [`Writer::finish`](crate::Writer::finish) takes it.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    /// Owner, permissions and the like.
    pub metadata: Metadata,
    /// Names without `.` and `..`, in any order.
    pub entries: Vec<(Vec<u8>, Child)>,
}
