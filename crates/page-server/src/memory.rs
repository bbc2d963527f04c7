//! A memory file as it is served: plain or packed, in windows of some pages.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::PAGE_BYTES;
use crate::pack::next_data;
use crate::packed::{PackedError, PackedMemory, Unpacker, is_packed};

/// A memory file.
pub struct Memory {
    form: Form,
    size: u64,
}

enum Form {
    Plain { file: File, bytes: Vec<u8> },
    Packed(Box<Packed>),
}

struct Packed {
    memory: PackedMemory,
    unpacker: Unpacker,
    /// Frames by their numbers, those used last in front.
    unpacked: VecDeque<(usize, Vec<u8>)>,
    most_bytes: usize,
}

/// What is in some pages.
pub(crate) enum Content<'a> {
    Bytes(&'a [u8]),
    Zeroes,
}

impl Memory {
    /// Opens a memory file, plain or packed. Of a packed one, up to `kept_bytes` that were unpacked are kept for who wants them next; at least one frame is.
    ///
    /// # Errors
    /// It cannot be read; or its index lies.
    pub fn open(file: File, kept_bytes: usize) -> Result<Self, PackedError> {
        if !is_packed(&file)? {
            let size = file.metadata()?.len();
            let bytes = Vec::new();
            let form = Form::Plain { file, bytes };
            return Ok(Self { form, size });
        }
        let memory = PackedMemory::open(file)?;
        Ok(Self {
            size: memory.size_bytes(),
            form: Form::Packed(Box::new(Packed {
                memory,
                unpacker: Unpacker::new()?,
                unpacked: VecDeque::new(),
                most_bytes: kept_bytes,
            })),
        })
    }

    /// Bytes of its whole pages.
    #[must_use]
    pub fn pages_bytes(&self) -> u64 {
        self.size / PAGE_BYTES * PAGE_BYTES
    }

    /// What lies behind its pages: the mark.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn tail(&mut self) -> Result<Vec<u8>, PackedError> {
        let from = self.pages_bytes();
        let len = (self.size - from) as usize;
        if len == 0 {
            return Ok(Vec::new());
        }
        match &mut self.form {
            Form::Plain { file, .. } => {
                let mut tail = vec![0; len];
                file.read_exact_at(&mut tail, from)?;
                Ok(tail)
            }
            Form::Packed(packed) => {
                let (frame, range) = packed.frame_at(from)?;
                let bytes = packed.unpacked(frame)?;
                let behind = (from - range.start) as usize;
                Ok(bytes.get(behind..).unwrap_or_default().to_vec())
            }
        }
    }

    /// The page at `offset`, with those around it that are cheap to have with it: within the aligned `at_once` bytes, a power of two of pages. Which bytes
    /// of memory that is, and what they are.
    pub(crate) fn around(
        &mut self,
        offset: u64,
        at_once: u64,
    ) -> Result<(Range<u64>, Content<'_>), PackedError> {
        let start = offset / at_once * at_once;
        let window = start..(start + at_once).min(self.pages_bytes());
        match &mut self.form {
            Form::Plain { file, bytes } => {
                if next_data(file, window.start, window.end)? >= window.end {
                    return Ok((window, Content::Zeroes));
                }
                bytes.resize((window.end - window.start) as usize, 0);
                file.read_exact_at(bytes, window.start)?;
                Ok((window, Content::Bytes(bytes)))
            }
            Form::Packed(packed) => {
                let (frame, range) = packed.frame_at(offset)?;
                let window = window.start.max(range.start)..window.end.min(range.end);
                if PackedMemory::is_zeroes(&range) {
                    return Ok((window, Content::Zeroes));
                }
                let bytes = packed.unpacked(frame)?;
                let part =
                    (window.start - range.start) as usize..(window.end - range.start) as usize;
                Ok((window, Content::Bytes(&bytes[part])))
            }
        }
    }
}

impl Packed {
    fn frame_at(&self, offset: u64) -> Result<(usize, Range<u64>), PackedError> {
        let found = self.memory.frame_at(offset);
        found.ok_or_else(|| PackedError::Broken(format!("no frame has byte {offset} of memory")))
    }

    /// A frame's content: kept, or unpacked now.
    fn unpacked(&mut self, frame: usize) -> Result<&[u8], PackedError> {
        let found = match self.unpacked.iter().position(|(f, _)| *f == frame) {
            Some(at) => self.unpacked.remove(at).map(|(_, bytes)| bytes),
            None => None,
        };
        let bytes = match found {
            Some(bytes) => bytes,
            None => {
                let mut room = Vec::new();
                let mut kept: usize = self.unpacked.iter().map(|(_, b)| b.len()).sum();
                // The oldest give their room to the new one.
                while kept >= self.most_bytes
                    && let Some((_, oldest)) = self.unpacked.pop_back()
                {
                    kept -= oldest.len();
                    room = oldest;
                }
                self.memory
                    .unpack_frame(frame, &mut self.unpacker, &mut room)?;
                room
            }
        };
        self.unpacked.push_front((frame, bytes));
        Ok(&self.unpacked[0].1)
    }
}
