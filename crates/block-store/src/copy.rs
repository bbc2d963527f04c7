//! The file that blocks lie in into another one, while nobody writes to it: by sharing extents, inside the kernel, or by hand, whichever
//! the two file systems can do together.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::bounce::AREA_BYTES;
use crate::host_file::HostFile;
use crate::{StoreError, sys};

/// Bytes that the kernel is asked to copy at once: it may be stopped in between.
const RANGE_BYTES: u64 = 64 << 20;

/// Whether there is a file to copy.
pub(crate) fn may_copy(file: &HostFile) -> Result<(), StoreError> {
    match file.is_device() {
        false => Ok(()),
        true => Err(StoreError::Device {
            path: file.path().to_owned(),
        }),
    }
}

/// Copies all of `file` into `into`, which is empty. What `file` has no data for is a hole there.
pub(crate) fn copy(file: &HostFile, into: &File) -> Result<(), StoreError> {
    may_copy(file)?;
    let copied = match sys::clone_file(file.file(), into) {
        Ok(()) => Ok(()),
        Err(e) if cannot(&e) => copy_data(file, into),
        Err(e) => Err(e),
    };
    copied.map_err(|source| StoreError::Copy {
        path: file.path().to_owned(),
        source,
    })
}

/// Whether the host cannot do this between these two files, but something else.
fn cannot(error: &io::Error) -> bool {
    // FICLONE: no such request here, or not between these; copy_file_range(2): the same, before and since Linux 5.19.
    matches!(
        error.raw_os_error(),
        Some(
            libc::EOPNOTSUPP
                | libc::ENOTTY
                | libc::EXDEV
                | libc::EINVAL
                | libc::ENOSYS
                | libc::EBADF
                | libc::EPERM
        )
    )
}

fn copy_data(file: &HostFile, into: &File) -> io::Result<()> {
    into.set_len(sys::size(file.file())?)?;
    let mut in_kernel = file.direct().is_none();
    let mut at = 0;
    while let Some(data) = sys::next_data(file.file(), at)? {
        at = data.end;
        copy_range(file, into, data, &mut in_kernel)?;
    }
    Ok(())
}

/// Copies one range; `in_kernel` says whether the kernel can, as far as is known.
fn copy_range(
    file: &HostFile,
    into: &File,
    mut left: Range<u64>,
    in_kernel: &mut bool,
) -> io::Result<()> {
    let mut bytes = Vec::new();
    while left.start < left.end {
        let len = left.end - left.start;
        if *in_kernel {
            match sys::copy_range(file.file(), into, left.start, len.min(RANGE_BYTES) as usize) {
                // Some file systems say so of what they cannot copy like this.
                Ok(0) => *in_kernel = false,
                Ok(n) => left.start += n as u64,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if cannot(&e) => *in_kernel = false,
                Err(e) => return Err(e),
            }
            continue;
        }
        bytes.resize(len.min(AREA_BYTES as u64) as usize, 0);
        let n = file.read_bytes(&mut bytes, left.start)?;
        if n == 0 {
            return Err(io::Error::other("it became shorter meanwhile"));
        }
        into.write_all_at(&bytes[..n], left.start)?;
        left.start += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::host_file::How;

    /// Data, a hole of 4 MiB, and an end that is no multiple of a block.
    fn image() -> (tempfile::TempDir, std::path::PathBuf, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::create(&path).unwrap();
        let mut bytes = vec![0; (4 << 20) + 300_123];
        for range in [0..100_000, (4 << 20)..bytes.len()] {
            for at in range {
                bytes[at] = (at * 31 % 251) as u8 + 1;
            }
        }
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(&bytes[..100_000], 0).unwrap();
        file.write_all_at(&bytes[4 << 20..], 4 << 20).unwrap();
        (dir, path, bytes)
    }

    fn open(path: &std::path::Path, direct: bool) -> HostFile {
        let how = How {
            write: true,
            direct,
            lock: false,
        };
        HostFile::open(path, how).unwrap()
    }

    #[test]
    fn a_copy_has_the_bytes_and_the_holes() {
        let (dir, path, bytes) = image();
        let file = open(&path, false);
        let copy_path = dir.path().join("copy");
        copy(&file, &File::create(&copy_path).unwrap()).unwrap();
        assert!(std::fs::read(&copy_path).unwrap() == bytes);
        let used = |path: &std::path::Path| std::fs::metadata(path).unwrap().blocks() * 512;
        assert!(used(&copy_path) < 2 << 20, "{}", used(&copy_path));
    }

    #[test]
    fn without_the_kernel_and_with_direct_io_it_is_the_same() {
        let (dir, path, bytes) = image();
        let direct = std::panic::catch_unwind(|| open(&path, true)).ok();
        for file in [
            Some(open(&path, false)).filter(|_| direct.is_none()),
            direct,
        ] {
            let Some(file) = file else { continue };
            let into = dir.path().join("copy");
            let copied = File::create(&into).unwrap();
            copied.set_len(bytes.len() as u64).unwrap();
            copy_range(&file, &copied, 0..bytes.len() as u64, &mut false).unwrap();
            assert!(std::fs::read(&into).unwrap() == bytes);
        }
    }

    #[test]
    fn an_empty_file_and_one_without_data_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hole");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let into = dir.path().join("copy");
        copy(&open(&path, false), &File::create(&into).unwrap()).unwrap();
        assert_eq!(std::fs::metadata(&into).unwrap().len(), 1 << 20);
    }
}
