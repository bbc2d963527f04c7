//! The file that an image lies in.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// Positional, synchronous access to the file that an image lies in. Calls come from several threads.
///
/// What [`Image`](crate::Image) promises about crashes holds as far as [`sync`](Self::sync) does: a file
/// of a disk that need not outlive the host may do nothing there, and is faster.
pub trait ImageFile: Send + Sync {
    /// Fills `into` from `offset` on. What lies beyond the end reads as zeroes.
    ///
    /// # Errors
    /// The file cannot be read.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `from`.
    ///
    /// # Errors
    /// The file cannot be written.
    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()>;

    /// Length in bytes.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn len(&self) -> io::Result<u64>;

    /// Whether nothing is in it.
    ///
    /// # Errors
    /// The file cannot be asked.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Cuts, or extends with zeroes.
    ///
    /// # Errors
    /// The file cannot be resized.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Returns when everything written before is durable, length included.
    ///
    /// # Errors
    /// Something written before may be lost.
    fn sync(&self) -> io::Result<()>;

    /// Gives the space of a range back, which then reads as zeroes. `false` if this file cannot.
    ///
    /// # Errors
    /// The file can, but did not.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool>;
}

impl ImageFile for File {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (into, offset);
        while !rest.is_empty() {
            match FileExt::read_at(self, rest, at) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => {
                    at = at.saturating_add(crate::bytes::wide(n));
                    rest = rest.get_mut(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(from, offset)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Self::set_len(self, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(self, how, offset, len) {
            Ok(()) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }
}

/// An image in memory, for tests and fuzzing.
impl ImageFile for Mutex<Vec<u8>> {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.lock().unwrap_or_else(PoisonError::into_inner);
        let from = bytes.get(crate::bytes::index(offset)..).unwrap_or_default();
        let n = from.len().min(into.len());
        let (found, beyond) = into.split_at_mut(n);
        found.copy_from_slice(from.get(..n).unwrap_or_default());
        beyond.fill(0);
        Ok(())
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start
            .checked_add(from.len())
            .filter(|end| *end <= MOST_MEMORY_BYTES)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        crate::bytes::put(&mut bytes, start, from);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let bytes = self.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(crate::bytes::wide(bytes.len()))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len)
            .ok()
            .filter(|len| *len <= MOST_MEMORY_BYTES)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .resize(len, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        let mut bytes = self.lock().unwrap_or_else(PoisonError::into_inner);
        let start = crate::bytes::index(offset).min(bytes.len());
        let end = crate::bytes::index(offset.saturating_add(len)).min(bytes.len());
        if let Some(hole) = bytes.get_mut(start..end) {
            hole.fill(0);
        }
        Ok(true)
    }
}

/// Longest image in memory: a hostile image must not make a fuzzer eat the machine.
const MOST_MEMORY_BYTES: usize = 1 << 30;

impl<T: ImageFile + ?Sized> ImageFile for Arc<T> {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(into, offset)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_at(from, offset)
    }

    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        (**self).set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        (**self).punch_hole(offset, len)
    }
}

/// What an image is laid over: reads go there where the image has nothing of its own.
pub trait BackingRead {
    /// Fills `into` from guest offset `offset` on. What lies beyond the end reads as zeroes.
    ///
    /// # Errors
    /// The backing image cannot be read.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Length of the backing image in bytes.
    fn size_bytes(&self) -> u64;
}

/// No backing image: all zeroes.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoBacking;

impl BackingRead for NoBacking {
    fn read_at(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        0
    }
}
