//! A packed memory file, read.
//!
//! Frames have up to [`MAX_FRAME_BYTES`] unpacked, in whole pages; the last may have less, as the mark behind the pages has. Longer ones have zeroes
//! alone, in the one form of `zeroes.rs`, and are known without being read again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::seek_table::{SeekTable, is_there};
use crate::{PAGE_BYTES, zeroes};

/// Largest frame that is unpacked: a file says how much memory that takes.
pub(crate) const MAX_FRAME_BYTES: u32 = 1 << 20;
/// The magic number of frames that have nothing, with any last four bits (RFC 8878, 3.1.2).
const SKIPPABLE: u32 = 0x184d_2a50;
/// Longest frame of zeroes: that of the format.
const MAX_ZEROES_BYTES: u32 = 1 << 30;

/// Why a packed memory file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// It is something else.
    #[error("it is no packed memory: it does not end with a seek table of zstd's seekable format")]
    NotPacked,
    /// It was packed already.
    #[error("it is packed already")]
    Packed,
    /// It is damaged, or made by somebody who wanted it so.
    #[error("it is damaged, or packed in another way: {0}")]
    Broken(String),
    /// A frame cannot be unpacked.
    #[error("its frame {index}, for bytes {} to {} of memory, is damaged: {why}", memory.start, memory.end)]
    Frame {
        /// Which, counted from 0.
        index: usize,
        /// What of memory it has.
        memory: Range<u64>,
        /// What zstd said.
        why: String,
    },
    /// The host.
    #[error("{0}")]
    Io(#[from] io::Error),
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    /// Where its content begins in memory.
    start: u64,
    /// Where it begins in the file.
    at: u64,
}

/// A packed memory file. Its index is in memory: 16 bytes a frame.
#[derive(Debug)]
pub struct PackedMemory {
    file: File,
    /// One more than there are, which says where the last ends.
    frames: Vec<Frame>,
    size: u64,
}

/// What unpacks frames, and has room for them.
pub(crate) struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
    compressed: Vec<u8>,
}

impl Unpacker {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            zstd: zstd::bulk::Decompressor::new()?,
            compressed: Vec::new(),
        })
    }
}

/// Whether a file ends as packed memory does.
///
/// # Errors
/// It cannot be read.
pub fn is_packed(file: &File) -> io::Result<bool> {
    is_there(file)
}

impl PackedMemory {
    /// Reads the index of a packed memory file.
    ///
    /// # Errors
    /// It is none, or its index lies, or it cannot be read.
    pub fn open(file: File) -> Result<Self, PackedError> {
        let table = SeekTable::find(&file)?;
        let mut frames = Vec::new();
        let (mut start, mut at, mut over) = (0_u64, 0_u64, false);
        let most_compressed = zstd::zstd_safe::compress_bound(MAX_FRAME_BYTES as usize);
        table.read(|entry| {
            let (index, size) = (frames.len(), u64::from(entry.size));
            let broken = |why: &str| {
                Err(PackedError::Broken(format!(
                    "of frame {index} its seek table says {} bytes packed, {size} unpacked: {why}",
                    entry.compressed
                )))
            };
            let from = at;
            at = at.saturating_add(entry.compressed.into());
            if at > table.at {
                return broken("there are not so many in the file");
            }
            if size == 0 {
                // A frame would be left out, and all that follows come too early.
                let mut magic = [0; 4];
                file.read_exact_at(&mut magic, from)?;
                return match u32::from_le_bytes(magic) & !0xf == SKIPPABLE {
                    true => Ok(()),
                    false => broken("it has some"),
                };
            }
            if over {
                return broken("it follows one that is not of whole pages");
            }
            if entry.size > MAX_FRAME_BYTES {
                if entry.size > MAX_ZEROES_BYTES || !size.is_multiple_of(PAGE_BYTES) {
                    return broken("one of zeroes has whole pages, and at most 1 GiB");
                }
                if entry.compressed as usize != zeroes::frame_bytes(entry.size) {
                    return broken(
                        "one that is larger than 1 MiB has to be of zeroes; pack the memory in smaller chunks",
                    );
                }
                let wanted = zeroes::frame(entry.size);
                let mut found = vec![0; wanted.len()];
                file.read_exact_at(&mut found, from)?;
                if found != wanted {
                    return broken(
                        "one that is larger than 1 MiB has to be of zeroes; pack the memory in smaller chunks",
                    );
                }
            } else if entry.compressed as usize > most_compressed {
                return broken("no content of this size packs to so many");
            }
            over = !size.is_multiple_of(PAGE_BYTES);
            frames.push(Frame { start, at: from });
            start = start.saturating_add(size);
            Ok(())
        })?;
        if at != table.at {
            return Err(PackedError::Broken(format!(
                "its seek table says that all frames have {at} bytes, and they have {}",
                table.at
            )));
        }
        frames.push(Frame { start, at });
        Ok(Self {
            file,
            frames,
            size: start,
        })
    }

    /// Bytes of the file that was packed.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> usize {
        self.frames.len() - 1
    }

    /// The frame that has this byte, and what of memory it has.
    pub(crate) fn frame_at(&self, offset: u64) -> Option<(usize, Range<u64>)> {
        let index = self
            .frames
            .partition_point(|frame| frame.start <= offset)
            .checked_sub(1)?;
        (offset < self.size).then(|| (index, self.content(index)))
    }

    fn content(&self, index: usize) -> Range<u64> {
        self.frames[index].start..self.frames[index + 1].start
    }

    /// Whether a frame has zeroes alone, by its length.
    pub(crate) fn is_zeroes(content: &Range<u64>) -> bool {
        content.end - content.start > MAX_FRAME_BYTES.into()
    }

    /// Unpacks a frame that is not of zeroes alone.
    pub(crate) fn unpack_frame(
        &self,
        index: usize,
        with: &mut Unpacker,
        into: &mut Vec<u8>,
    ) -> Result<(), PackedError> {
        let memory = self.content(index);
        // Frames that have nothing may lie behind it.
        let packed = (self.frames[index + 1].at - self.frames[index].at)
            .min(zstd::zstd_safe::compress_bound(MAX_FRAME_BYTES as usize) as u64);
        let size = (memory.end - memory.start) as usize;
        with.compressed.resize(packed as usize, 0);
        self.file
            .read_exact_at(&mut with.compressed, self.frames[index].at)?;
        into.resize(size, 0);
        let done = with
            .zstd
            .decompress_to_buffer(&with.compressed, &mut into[..])
            .map_err(|e| e.to_string())
            .and_then(|got| match got == size {
                true => Ok(()),
                false => Err(format!("it has {got} bytes")),
            });
        done.map_err(|why| PackedError::Frame { index, memory, why })
    }

    /// Unpacks everything and gives it away, piece by piece from the beginning; of zeroes only how many there are.
    fn each(
        &self,
        mut take: impl FnMut(u64, Result<&[u8], u64>) -> io::Result<()>,
    ) -> Result<(), PackedError> {
        let (mut unpacker, mut bytes) = (Unpacker::new()?, Vec::new());
        for index in 0..self.frames() {
            let content = self.content(index);
            if Self::is_zeroes(&content) {
                take(content.start, Err(content.end - content.start))?;
                continue;
            }
            self.unpack_frame(index, &mut unpacker, &mut bytes)?;
            take(content.start, Ok(&bytes))?;
        }
        Ok(())
    }

    /// Unpacks all frames, and looks whether their checksums are right.
    ///
    /// # Errors
    /// The first that is damaged.
    pub fn verify(&self) -> Result<(), PackedError> {
        self.each(|_, _| Ok(()))
    }

    /// Writes what was packed to an empty file. Pages of zeroes become holes.
    ///
    /// # Errors
    /// A frame is damaged, or the file cannot be written.
    pub fn unpack(&self, into: &File) -> Result<(), PackedError> {
        into.set_len(self.size)?;
        self.each(|start, piece| {
            let Ok(bytes) = piece else { return Ok(()) };
            for run in runs(bytes) {
                if !run.zeroes {
                    let at = start + run.bytes.start as u64;
                    into.write_all_at(&bytes[run.bytes], at)?;
                }
            }
            Ok(())
        })
    }
}

/// Pages that follow each other, all of zeroes or none.
pub(crate) struct Run {
    pub(crate) bytes: Range<usize>,
    pub(crate) zeroes: bool,
}

/// Parts bytes into such; what is behind the last whole page counts as a page.
pub(crate) fn runs(bytes: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0;
    for page in bytes.chunks(PAGE_BYTES as usize) {
        let zeroes = is_zero(page);
        let end = at + page.len();
        match runs.last_mut() {
            Some(run) if run.zeroes == zeroes => run.bytes.end = end,
            _ => runs.push(Run {
                bytes: at..end,
                zeroes,
            }),
        }
        at = end;
    }
    runs
}

/// Whether all bytes are zero. Words at a time: most pages that are not tell in the first.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}
