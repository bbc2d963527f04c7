use std::io;

use thiserror::Error;

/// Why an image could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The host could not write.
    #[error("cannot write the image: {0}")]
    Io(#[from] io::Error),
    /// Block addresses have 32 bits.
    #[error(
        "the image would be larger than 16 TiB, the most that EROFS with blocks of 4 KiB can have"
    )]
    TooLarge,
    /// A name that no directory can hold.
    #[error("file name of {0} bytes: from 1 to 255 are possible, without / and zero")]
    Name(usize),
    /// Two entries of a directory have one name.
    #[error("two files are called {0:?} in one directory")]
    Twice(String),
    /// A symbolic link that Linux would not follow.
    #[error("symbolic link to a target of {0} bytes: from 1 to 4095 are possible")]
    Target(usize),
    /// More than an inode can have.
    #[error("extended attributes of {size} bytes on one file: {most} are the most")]
    Xattrs {
        /// What they would take.
        size: usize,
        /// What they may take.
        most: usize,
    },
    /// EROFS knows namespaces of attributes by number, and none for this.
    #[error(
        "extended attribute {0:?}: only names in user., trusted., security. and system.posix_acl_* can be kept"
    )]
    XattrName(String),
    /// The caller has not given what it had announced.
    #[error("a file of {announced} bytes was given {given}")]
    Size {
        /// Size with which it was begun.
        announced: u64,
        /// What came.
        given: u64,
    },
    /// A directory is entered in no or in several directories, or is the root.
    #[error("directory {0} is not entered exactly once")]
    Tree(usize),
}

/// Why an image could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The host could not read.
    #[error("cannot read the image: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("not an EROFS image: its magic number is {0:#x}")]
    Magic(u32),
    /// It is compressed, on several devices, or newer.
    #[error("the image uses features that are not read here: {0}")]
    Feature(String),
    /// It contradicts itself.
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
}
