//! Packs a memory file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::packed::{MAX_FRAME_BYTES, PackedError, is_packed, is_zero};
use crate::seek_table::{Entry, MAX_FRAMES, written};
use crate::{PAGE_BYTES, zeroes};

/// What is packed together, and put into a guest's memory together: 16 pages. README.md has what other sizes gave.
pub(crate) const CHUNK_BYTES: u64 = 64 << 10;
/// Longer runs of zeroes have more than one frame.
const MOST_ZEROES_BYTES: u64 = 256 << 20;
/// zstd's own usual one. Higher ones take two to five times as long for a twentieth less.
const LEVEL: i32 = 3;

/// How large a memory file is, in its forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Bytes from its beginning to its end, holes included.
    pub memory_bytes: u64,
    /// What it took of the disk.
    pub taken_bytes: u64,
    /// What it has packed.
    pub packed_bytes: u64,
}

/// Packs the memory file `from`, whose holes are not read, into the empty file `into`. Who wants it on the disk has to sync it.
///
/// # Errors
/// It is packed already, or larger than 1 TiB; one of the two cannot be read or written.
pub fn pack(from: &File, into: &File) -> Result<Sizes, PackedError> {
    if is_packed(from)? {
        return Err(PackedError::Packed);
    }
    let meta = from.metadata()?;
    let len = meta.len();
    let pages_end = len / PAGE_BYTES * PAGE_BYTES;
    let mut writer = Writer {
        out: BufWriter::with_capacity(1 << 20, into),
        zstd: zstd::bulk::Compressor::new(LEVEL)?,
        entries: Vec::new(),
        zeroes: 0,
        written: 0,
    };
    writer.zstd.include_checksum(true)?;
    let mut chunk = Vec::new();
    let mut at = 0;
    while at < len {
        let data = next_data(from, at, len)?;
        // To where the next chunk with data begins.
        let hole_end = (data / CHUNK_BYTES * CHUNK_BYTES).min(pages_end);
        if hole_end > at {
            writer.zeroes += hole_end - at;
            at = hole_end;
            continue;
        }
        // What lies behind the pages is a frame of its own, to be found without unpacking any of them.
        let end = match at < pages_end {
            true => (at + CHUNK_BYTES).min(pages_end),
            false => (at + CHUNK_BYTES).min(len),
        };
        chunk.resize((end - at) as usize, 0);
        from.read_exact_at(&mut chunk, at)?;
        match at < pages_end && is_zero(&chunk) {
            true => writer.zeroes += end - at,
            false => writer.chunk(&chunk)?,
        }
        at = end;
    }
    let packed_bytes = writer.finish()?;
    Ok(Sizes {
        memory_bytes: len,
        taken_bytes: meta.blocks() * 512,
        packed_bytes,
    })
}

/// Where the next data begin at or behind `at`; `len` if there are none.
pub(crate) fn next_data(file: &File, at: u64, len: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(data),
        Err(Errno::NXIO) => Ok(len),
        // A file system that knows no holes.
        Err(Errno::INVAL) => Ok(at),
        Err(e) => Err(e.into()),
    }
}

struct Writer<'a> {
    out: BufWriter<&'a File>,
    zstd: zstd::bulk::Compressor<'static>,
    entries: Vec<Entry>,
    /// Not written yet.
    zeroes: u64,
    written: u64,
}

impl Writer<'_> {
    fn chunk(&mut self, bytes: &[u8]) -> Result<(), PackedError> {
        self.write_zeroes()?;
        let frame = self.zstd.compress(bytes)?;
        self.frame(&frame, bytes.len() as u32)
    }

    fn write_zeroes(&mut self) -> Result<(), PackedError> {
        while self.zeroes > 0 {
            let size = self.zeroes.min(MOST_ZEROES_BYTES) as u32;
            self.zeroes -= u64::from(size);
            // Short ones are unpacked like any other frame, and have a checksum as those have.
            let frame = match size {
                ..=MAX_FRAME_BYTES => self.zstd.compress(&vec![0; size as usize])?,
                _ => zeroes::frame(size),
            };
            self.frame(&frame, size)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: &[u8], size: u32) -> Result<(), PackedError> {
        if self.entries.len() >= MAX_FRAMES as usize {
            return Err(PackedError::Broken(format!(
                "it has more than {MAX_FRAMES} chunks, which are the most"
            )));
        }
        self.out.write_all(frame)?;
        self.written += frame.len() as u64;
        self.entries.push(Entry {
            compressed: frame.len() as u32,
            size,
        });
        Ok(())
    }

    fn finish(mut self) -> Result<u64, PackedError> {
        self.write_zeroes()?;
        let table = written(&self.entries);
        self.out.write_all(&table)?;
        self.out.flush()?;
        Ok(self.written + table.len() as u64)
    }
}
