//! Inodes, attributes and directories as bytes of an image.

use crate::error::WriteError;
use crate::format::{
    BLOCK, DIRENT, EXTENDED_INODE, XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES, dirent_type,
    mode_bits,
};
use crate::{Kind, MAX_XATTRS, Metadata, Xattr};

pub(crate) const LINKS_OFFSET: u64 = 44;

pub(crate) struct Head {
    pub(crate) layout: u16,
    pub(crate) kind: Kind,
    pub(crate) size_bytes: u64,
    /// First block, device number or format of chunks.
    pub(crate) union: u32,
    pub(crate) links: u32,
}

impl Head {
    /// An extended inode (64 bytes).
    pub(crate) fn encode(&self, metadata: &Metadata, xattrs_len: usize, number: usize) -> [u8; 64] {
        let mut bytes = [0; EXTENDED_INODE as usize];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        let xattr_count = match xattrs_len {
            0 => 0,
            // `encode_xattrs` sees that it fits.
            len => ((len - XATTR_HEADER) / 4 + 1) as u16,
        };
        put(0, &(1 | self.layout << 1).to_le_bytes());
        put(2, &xattr_count.to_le_bytes());
        put(
            4,
            &(metadata.mode & 0o7777 | mode_bits(self.kind)).to_le_bytes(),
        );
        put(8, &self.size_bytes.to_le_bytes());
        put(16, &self.union.to_le_bytes());
        // For 32-bit stat only, so that it may wrap.
        put(20, &(number as u32).to_le_bytes());
        put(24, &metadata.uid.to_le_bytes());
        put(28, &metadata.gid.to_le_bytes());
        put(32, &metadata.mtime.to_le_bytes());
        put(40, &metadata.mtime_nsec.to_le_bytes());
        put(LINKS_OFFSET as usize, &self.links.to_le_bytes());
        bytes
    }
}

pub(crate) fn encode_xattrs(xattrs: &[Xattr]) -> Result<Vec<u8>, WriteError> {
    if xattrs.is_empty() {
        return Ok(Vec::new());
    }
    let mut bytes = vec![0; XATTR_HEADER];
    for (name, value) in xattrs {
        let unknown = || WriteError::XattrName(String::from_utf8_lossy(name).into_owned());
        let (index, rest) = XATTR_PREFIXES
            .iter()
            .find_map(|(index, prefix, whole)| {
                let rest = name.strip_prefix(*prefix)?;
                (rest.is_empty() == *whole).then_some((*index, rest))
            })
            .ok_or_else(unknown)?;
        let too_large = |size| WriteError::Xattrs {
            size,
            most: MAX_XATTRS,
        };
        let name_len = u8::try_from(rest.len()).map_err(|_| unknown())?;
        let value_len = u16::try_from(value.len()).map_err(|_| too_large(value.len()))?;
        bytes.extend_from_slice(&[name_len, index]);
        bytes.extend_from_slice(&value_len.to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(XATTR_ENTRY), 0);
        if bytes.len() > MAX_XATTRS {
            return Err(too_large(bytes.len()));
        }
    }
    Ok(bytes)
}

/// Splits names of these lengths into blocks: how many go into each.
fn split(lengths: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut blocks = vec![(0, 0)];
    for len in lengths {
        let need = len + DIRENT;
        match blocks.last_mut() {
            Some((count, bytes)) if *bytes + need <= BLOCK as usize => {
                *count += 1;
                *bytes += need;
            }
            _ => blocks.push((1, need)),
        }
    }
    blocks
}

/// Size of a directory whose entries have been sorted.
pub(crate) fn directory_size(lengths: impl Iterator<Item = usize>) -> u64 {
    let blocks = split(lengths);
    let last = blocks.last().map_or(0, |b| b.1) as u64;
    (blocks.len() as u64 - 1) * BLOCK + last
}

/// Blocks of entries, each with its names behind; the last is as long as need be.
pub(crate) fn encode_directory(entries: &[(&[u8], u64, Kind)]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut rest = entries;
    for (count, _) in split(entries.iter().map(|e| e.0.len())) {
        data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        let (block, after) = rest.split_at(count);
        rest = after;
        let mut name_at = count * DIRENT;
        for (name, nid, kind) in block {
            data.extend_from_slice(&nid.to_le_bytes());
            data.extend_from_slice(&(name_at as u16).to_le_bytes());
            data.extend_from_slice(&[dirent_type(*kind), 0]);
            name_at += name.len();
        }
        for (name, ..) in block {
            data.extend_from_slice(name);
        }
    }
    data
}
