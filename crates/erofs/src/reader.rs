use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::ReadError;
use crate::format::{
    BLOCK, BLOCK_BITS, CHUNK_BASED, CHUNK_BITS_MASK, CHUNK_INDEXES, COMPACT_INODE, DIRENT,
    EXTENDED_INODE, FLAT_INLINE, FLAT_PLAIN, INCOMPAT_CHUNKED_FILE, MAGIC, NULL_BLOCK, SLOT,
    SUPER_OFFSET, SUPER_SIZE, XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES, decode_device,
    kind_of_mode,
};
use crate::{Kind, MAX_TARGET, MAX_XATTRS, Metadata, Xattr};

/// Largest directory that is read, in bytes: some million names. A damaged image could announce any size.
const MAX_DIRECTORY: u64 = 256 << 20;

/// An image that is read. What it says is checked where it is used: a damaged one gives errors, no more.
#[derive(Debug)]
pub struct Image {
    file: File,
    meta_at: u64,
    root: u64,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name, without slashes.
    pub name: Vec<u8>,
    /// Number of its inode; the same for all hard links.
    pub nid: u64,
}

/// What an inode says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Number of the inode.
    pub nid: u64,
    /// Type.
    pub kind: Kind,
    /// Owner, permissions, time, attributes.
    pub metadata: Metadata,
    /// Bytes of the content.
    pub size_bytes: u64,
    /// Names that it has.
    pub links: u32,
    /// Major and minor number, of devices.
    pub device: (u32, u32),
    layout: u16,
    union: u32,
    /// Behind inode and attributes.
    body_at: u64,
}

impl Image {
    /// Opens an image: one of blocks of 4 KiB, uncompressed, on one device.
    ///
    /// # Errors
    /// Other files, other images, or the host's.
    pub fn open(file: File) -> Result<Self, ReadError> {
        let mut block = [0; SUPER_SIZE];
        file.read_exact_at(&mut block, SUPER_OFFSET)?;
        if u32_at(&block, 0) != MAGIC {
            return Err(ReadError::Magic(u32_at(&block, 0)));
        }
        let unknown = u32_at(&block, 80) & !INCOMPAT_CHUNKED_FILE;
        if unknown != 0 {
            return Err(ReadError::Feature(format!("incompatible {unknown:#x}")));
        }
        if block[12] != BLOCK_BITS {
            return Err(ReadError::Feature(format!("blocks of 2^{}", block[12])));
        }
        Ok(Self {
            file,
            meta_at: u64::from(u32_at(&block, 40)) * BLOCK,
            root: u64::from(u16_at(&block, 14)),
        })
    }

    /// Number of the root directory's inode.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Reads an inode with its attributes.
    ///
    /// # Errors
    /// A damaged image, or the host's.
    pub fn info(&self, nid: u64) -> Result<Info, ReadError> {
        let at = nid
            .checked_mul(SLOT)
            .and_then(|at| at.checked_add(self.meta_at))
            .filter(|at| *at < u64::MAX / 2)
            .ok_or(ReadError::Damaged("the number of an inode is too large"))?;
        let mut head = [0; EXTENDED_INODE as usize];
        self.file
            .read_exact_at(&mut head[..COMPACT_INODE as usize], at)?;
        let extended = head[0] & 1 == 1;
        if extended {
            self.file.read_exact_at(&mut head, at)?;
        }
        let mode = u16_at(&head, 4);
        let kind = kind_of_mode(mode).ok_or(ReadError::Damaged("an inode has no known type"))?;
        let head_len = if extended {
            EXTENDED_INODE
        } else {
            COMPACT_INODE
        };
        let xattrs_len = match u16_at(&head, 2) {
            0 => 0,
            n => XATTR_HEADER + 4 * (usize::from(n) - 1),
        };
        let mut metadata = Metadata {
            mode: mode & 0o7777,
            xattrs: self.xattrs(at + head_len, xattrs_len)?,
            ..Metadata::default()
        };
        let (size_bytes, links);
        if extended {
            size_bytes = u64_at(&head, 8);
            links = u32_at(&head, 44);
            metadata.uid = u32_at(&head, 24);
            metadata.gid = u32_at(&head, 28);
            metadata.mtime = u64_at(&head, 32).cast_signed();
            metadata.mtime_nsec = u32_at(&head, 40);
        } else {
            size_bytes = u64::from(u32_at(&head, 8));
            links = u32::from(u16_at(&head, 6));
            metadata.uid = u32::from(u16_at(&head, 24));
            metadata.gid = u32::from(u16_at(&head, 26));
        }
        let union = u32_at(&head, 16);
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        Ok(Info {
            nid,
            kind,
            metadata,
            size_bytes,
            links,
            device: if is_device {
                decode_device(union)
            } else {
                (0, 0)
            },
            layout: u16_at(&head, 0) >> 1 & 7,
            union,
            body_at: at + head_len + xattrs_len as u64,
        })
    }

    fn xattrs(&self, at: u64, len: usize) -> Result<Vec<Xattr>, ReadError> {
        if len == 0 {
            return Ok(Vec::new());
        }
        if len > MAX_XATTRS {
            return Err(ReadError::Damaged("an inode has too many attributes"));
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at)?;
        if bytes[4] != 0 {
            return Err(ReadError::Feature("shared attributes".into()));
        }
        let mut found = Vec::new();
        let mut rest = &bytes[XATTR_HEADER..];
        while let Some((head, after)) = rest.split_at_checked(XATTR_ENTRY) {
            let (name_len, value_len) = (usize::from(head[0]), usize::from(u16_at(head, 2)));
            let cut = || ReadError::Damaged("an attribute is cut off");
            let (name, after) = after.split_at_checked(name_len).ok_or_else(cut)?;
            let (value, _) = after.split_at_checked(value_len).ok_or_else(cut)?;
            let prefix = XATTR_PREFIXES.iter().find(|p| p.0 == head[1]);
            let prefix = prefix.ok_or(ReadError::Damaged("an attribute has no known prefix"))?;
            found.push(([prefix.1, name].concat(), value.to_vec()));
            let whole = (XATTR_ENTRY + name_len + value_len).next_multiple_of(XATTR_ENTRY);
            rest = rest.get(whole..).unwrap_or_default();
        }
        Ok(found)
    }

    /// The names in a directory, sorted, without `.` and `..`.
    ///
    /// # Errors
    /// A damaged image, something that is no directory, or the host's.
    pub fn entries(&self, directory: &Info) -> Result<Vec<Entry>, ReadError> {
        if directory.kind != Kind::Directory {
            return Err(ReadError::Damaged("what should be a directory is none"));
        }
        if directory.size_bytes > MAX_DIRECTORY {
            return Err(ReadError::Damaged("a directory is too large"));
        }
        let mut data = vec![0; directory.size_bytes as usize];
        self.read_at(directory, 0, &mut data)?;
        let mut entries = Vec::new();
        for block in data.chunks(BLOCK as usize) {
            let damaged = || ReadError::Damaged("a directory's names are not where it says");
            if block.len() < DIRENT {
                return Err(damaged());
            }
            let count = usize::from(u16_at(block, 8)) / DIRENT;
            for index in 0..count {
                let head = block.get(index * DIRENT..(index + 1) * DIRENT);
                let head = head.ok_or_else(damaged)?;
                let from = usize::from(u16_at(head, 8));
                let next = block.get((index + 1) * DIRENT..(index + 2) * DIRENT);
                let to = match next {
                    Some(next) if index + 1 < count => usize::from(u16_at(next, 8)),
                    _ => block.len(),
                };
                let name = block.get(from..to).ok_or_else(damaged)?;
                // The last name of a block ends with it, or with a zero.
                let name = name.split(|b| *b == 0).next().unwrap_or_default();
                if !matches!(name, b"." | b"..") {
                    entries.push(Entry {
                        name: name.to_vec(),
                        nid: u64_at(head, 0),
                    });
                }
            }
        }
        Ok(entries)
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// A damaged image, something that is no link, or the host's.
    pub fn target(&self, link: &Info) -> Result<Vec<u8>, ReadError> {
        if link.kind != Kind::Symlink || link.size_bytes > MAX_TARGET as u64 {
            return Err(ReadError::Damaged("what should be a symbolic link is none"));
        }
        let mut target = vec![0; link.size_bytes as usize];
        self.read_at(link, 0, &mut target)?;
        Ok(target)
    }

    /// Reads content from `offset` on. What lies beyond the end is an error.
    ///
    /// # Errors
    /// A damaged image, a place beyond the end, or the host's.
    pub fn read_at(&self, info: &Info, offset: u64, into: &mut [u8]) -> Result<(), ReadError> {
        let beyond = ReadError::Damaged("a place beyond the end of a file was asked for");
        if offset
            .checked_add(into.len() as u64)
            .is_none_or(|end| end > info.size_bytes)
        {
            return Err(beyond);
        }
        let (mut offset, mut into) = (offset, into);
        while !into.is_empty() {
            let (at, len) = self.extent(info, offset)?;
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(into.len());
            let (now, later) = into.split_at_mut(part);
            match at {
                Some(at) => self.file.read_exact_at(now, at)?,
                None => now.fill(0),
            }
            offset += part as u64;
            into = later;
        }
        Ok(())
    }

    /// The next stretch of content at `offset`, which lies before the end: whether it is a hole, and its length in bytes.
    ///
    /// # Errors
    /// A damaged image, or the host's.
    pub fn stretch(&self, info: &Info, offset: u64) -> Result<(bool, u64), ReadError> {
        let (at, len) = self.extent(info, offset)?;
        Ok((at.is_none(), len.min(info.size_bytes - offset)))
    }

    /// Where the content at `offset` lies (nowhere: zeros) and for how many bytes on.
    fn extent(&self, info: &Info, offset: u64) -> Result<(Option<u64>, u64), ReadError> {
        let tail_at = info.size_bytes / BLOCK * BLOCK;
        let start = u64::from(info.union) * BLOCK;
        match info.layout {
            FLAT_PLAIN => Ok((Some(start + offset), info.size_bytes - offset)),
            FLAT_INLINE if offset < tail_at => Ok((Some(start + offset), tail_at - offset)),
            FLAT_INLINE => {
                let at = info.body_at + (offset - tail_at);
                Ok((Some(at), info.size_bytes - offset))
            }
            CHUNK_BASED => {
                let format = info.union as u16;
                let bits = u32::from(format & CHUNK_BITS_MASK) + u32::from(BLOCK_BITS);
                let chunk = offset >> bits;
                let within = offset & ((1 << bits) - 1);
                let len = ((1 << bits) - within).min(info.size_bytes - offset);
                let block = if format & CHUNK_INDEXES == 0 {
                    self.number_at(info.body_at + 4 * chunk)?
                } else {
                    self.number_at(info.body_at.next_multiple_of(8) + 8 * chunk + 4)?
                };
                let at = (block != NULL_BLOCK).then(|| u64::from(block) * BLOCK + within);
                Ok((at, len))
            }
            layout => Err(ReadError::Feature(format!("data layout {layout}"))),
        }
    }

    fn number_at(&self, at: u64) -> Result<u32, ReadError> {
        let mut bytes = [0; 4];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_le_bytes(bytes))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
