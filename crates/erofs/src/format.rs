//! The numbers of `fs/erofs/erofs_fs.h`.

use crate::Kind;

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const BLOCK_BITS: u8 = 12;
pub(crate) const SUPER_OFFSET: u64 = 1024;
pub(crate) const SUPER_SIZE: usize = 128;
pub(crate) const MAGIC: u32 = 0xe0f5_e1e2;
pub(crate) const COMPAT_SB_CHKSUM: u32 = 1;
pub(crate) const COMPAT_MTIME: u32 = 2;
pub(crate) const INCOMPAT_CHUNKED_FILE: u32 = 4;

/// A nid counts such slots from the start of the metadata area.
pub(crate) const SLOT: u64 = 32;
pub(crate) const COMPACT_INODE: u64 = 32;
pub(crate) const EXTENDED_INODE: u64 = 64;

pub(crate) const FLAT_PLAIN: u16 = 0;
pub(crate) const FLAT_INLINE: u16 = 2;
pub(crate) const CHUNK_BASED: u16 = 4;

pub(crate) const CHUNK_BITS_MASK: u16 = 0x1f;
pub(crate) const CHUNK_INDEXES: u16 = 0x20;
/// A chunk that is not there: zeros.
pub(crate) const NULL_BLOCK: u32 = u32::MAX;

pub(crate) const XATTR_HEADER: usize = 12;
pub(crate) const XATTR_ENTRY: usize = 4;
pub(crate) const DIRENT: usize = 12;

/// Namespaces of attributes: number, prefix, whether the prefix is the whole name. Longer prefixes come first.
pub(crate) const XATTR_PREFIXES: [(u8, &[u8], bool); 5] = [
    (2, b"system.posix_acl_access", true),
    (3, b"system.posix_acl_default", true),
    (1, b"user.", false),
    (4, b"trusted.", false),
    (6, b"security.", false),
];

const S_IFMT: u16 = 0o170_000;

/// Type, its number in directories, its bits in `st_mode`.
const KINDS: [(Kind, u8, u16); 7] = [
    (Kind::File, 1, 0o100_000),
    (Kind::Directory, 2, 0o040_000),
    (Kind::CharDevice, 3, 0o020_000),
    (Kind::BlockDevice, 4, 0o060_000),
    (Kind::Fifo, 5, 0o010_000),
    (Kind::Socket, 6, 0o140_000),
    (Kind::Symlink, 7, 0o120_000),
];

pub(crate) fn dirent_type(kind: Kind) -> u8 {
    KINDS.iter().find(|k| k.0 == kind).map_or(0, |k| k.1)
}

pub(crate) fn mode_bits(kind: Kind) -> u16 {
    KINDS.iter().find(|k| k.0 == kind).map_or(0, |k| k.2)
}

pub(crate) fn kind_of_mode(mode: u16) -> Option<Kind> {
    KINDS.iter().find(|k| k.2 == mode & S_IFMT).map(|k| k.0)
}

/// Device numbers as the kernel's `new_encode_dev` has them.
pub(crate) fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

pub(crate) fn decode_device(number: u32) -> (u32, u32) {
    (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00)
}

/// CRC-32C (Castagnoli) as the kernel's `crc32c` computes it: no inversion at the end.
pub(crate) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_usual_words() {
        // The check value of the CRC catalogue, before its final inversion.
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_come_back() {
        for (major, minor) in [(0, 0), (1, 3), (4095, 1_048_575), (259, 256)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }
}
