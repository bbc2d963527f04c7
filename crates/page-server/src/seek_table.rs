//! The seek table of zstd's seekable format, version 0.1.0 (facebook/zstd, contrib/seekable_format): a skippable frame at the end of the
//! file that says how long each frame is, packed and unpacked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::packed::PackedError;

const SKIPPABLE_MAGIC: u32 = 0x184d_2a5e;
const SEEKABLE_MAGIC: u32 = 0x8f92_eab1;
const HEADER_BYTES: u64 = 8;
pub(crate) const FOOTER_BYTES: u64 = 9;
/// Bit 7 of the descriptor: each entry has a checksum, too.
const HAS_CHECKSUMS: u8 = 1 << 7;
/// Bits 6 to 2 must be zero.
const RESERVED: u8 = 0b0111_1100;
const ENTRY_BYTES: u64 = 8;
const CHECKSUM_BYTES: u64 = 4;

/// Most frames of a file: a table says what is kept in memory for each. Chunks of 64 KiB come to 1 TiB.
pub(crate) const MAX_FRAMES: u32 = 1 << 24;
/// Entries that are read at once.
const PIECE: u64 = 4096;

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) compressed: u32,
    pub(crate) size: u32,
}

/// Where the table is, and what it has.
pub(crate) struct SeekTable<'a> {
    file: &'a File,
    /// Where the table's frame begins, and so the others end.
    pub(crate) at: u64,
    pub(crate) frames: u64,
    entry_bytes: u64,
}

fn number(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

/// Whether the file ends as one with a table does.
pub(crate) fn is_there(file: &File) -> io::Result<bool> {
    let Some(at) = file.metadata()?.len().checked_sub(FOOTER_BYTES) else {
        return Ok(false);
    };
    let mut footer = [0; FOOTER_BYTES as usize];
    file.read_exact_at(&mut footer, at)?;
    Ok(number(&footer, 5) == SEEKABLE_MAGIC)
}

impl<'a> SeekTable<'a> {
    pub(crate) fn find(file: &'a File) -> Result<Self, PackedError> {
        let broken = |why: String| Err(PackedError::Broken(why));
        if !is_there(file)? {
            return Err(PackedError::NotPacked);
        }
        let len = file.metadata()?.len();
        let mut footer = [0; FOOTER_BYTES as usize];
        file.read_exact_at(&mut footer, len - FOOTER_BYTES)?;
        let (frames, descriptor) = (number(&footer, 0), footer[4]);
        if descriptor & RESERVED != 0 {
            return broken(format!(
                "its seek table is of a form that is not known (descriptor {descriptor:#x})"
            ));
        }
        if frames > MAX_FRAMES {
            return broken(format!(
                "its seek table has {frames} frames, {MAX_FRAMES} are the most"
            ));
        }
        let entry_bytes = match descriptor & HAS_CHECKSUMS {
            0 => ENTRY_BYTES,
            _ => ENTRY_BYTES + CHECKSUM_BYTES,
        };
        let body = u64::from(frames) * entry_bytes + FOOTER_BYTES;
        let Some(at) = len.checked_sub(HEADER_BYTES + body) else {
            return broken(format!(
                "its seek table of {frames} frames would be longer than the file, of {len} bytes"
            ));
        };
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, at)?;
        if number(&header, 0) != SKIPPABLE_MAGIC || u64::from(number(&header, 4)) != body {
            return broken("its seek table does not begin where it should".into());
        }
        Ok(Self {
            file,
            at,
            frames: frames.into(),
            entry_bytes,
        })
    }

    /// Gives `take` each entry in turn.
    pub(crate) fn read(
        &self,
        mut take: impl FnMut(Entry) -> Result<(), PackedError>,
    ) -> Result<(), PackedError> {
        let mut bytes = Vec::new();
        let mut done = 0;
        while done < self.frames {
            let count = (self.frames - done).min(PIECE);
            bytes.resize((count * self.entry_bytes) as usize, 0);
            let at = self.at + HEADER_BYTES + done * self.entry_bytes;
            self.file.read_exact_at(&mut bytes, at)?;
            // Frames have checksums of their own, by which they are judged when they are unpacked.
            for entry in bytes.chunks_exact(self.entry_bytes as usize) {
                take(Entry {
                    compressed: number(entry, 0),
                    size: number(entry, 4),
                })?;
            }
            done += count;
        }
        Ok(())
    }
}

/// The frame with the table of these entries.
pub(crate) fn written(entries: &[Entry]) -> Vec<u8> {
    let body = entries.len() * ENTRY_BYTES as usize + FOOTER_BYTES as usize;
    let mut bytes = Vec::with_capacity(HEADER_BYTES as usize + body);
    bytes.extend(SKIPPABLE_MAGIC.to_le_bytes());
    // At most 2^24 entries of 8 bytes.
    bytes.extend((body as u32).to_le_bytes());
    for entry in entries {
        bytes.extend(entry.compressed.to_le_bytes());
        bytes.extend(entry.size.to_le_bytes());
    }
    bytes.extend((entries.len() as u32).to_le_bytes());
    bytes.push(0);
    bytes.extend(SEEKABLE_MAGIC.to_le_bytes());
    bytes
}
