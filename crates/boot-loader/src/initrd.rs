//! Where the initrd goes: as high as the kernel takes it, on whole pages, above the kernel.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use alveole_guest_memory::PAGE_SIZE;

use crate::LoadError;
use crate::kernel::Kernel;
use crate::memory_map::MemoryMap;

#[derive(Debug)]
pub(crate) struct Initrd<'a> {
    pub(crate) file: &'a File,
    pub(crate) range: Range<u64>,
}

impl<'a> Initrd<'a> {
    /// Finds room for `file`.
    pub(crate) fn fit(
        file: &'a File,
        path: &Path,
        kernel: &Kernel,
        memory: &MemoryMap,
    ) -> Result<Self, LoadError> {
        let size_bytes = length(file, path)?;
        let kernel_end = kernel.range.end.next_multiple_of(PAGE_SIZE);
        let kernel_limit = kernel.initrd_last.saturating_add(1);
        let limit = memory.low_end.min(kernel_limit);
        let start = limit
            .checked_sub(size_bytes)
            .map(|start| start & !(PAGE_SIZE - 1));
        if let Some(start) = start.filter(|start| *start >= kernel_end) {
            return Ok(Self {
                file,
                range: start..start.saturating_add(size_bytes),
            });
        }
        let path = path.to_path_buf();
        let most = kernel_limit.min(alveole_guest_memory::HOLE_START);
        let needs = size_bytes
            .checked_next_multiple_of(PAGE_SIZE)
            .and_then(|pages| kernel_end.checked_add(pages));
        Err(match needs.filter(|needs| *needs <= most) {
            Some(needs_bytes) => LoadError::InitrdMemory {
                path,
                size_bytes,
                memory_bytes: memory.low_end,
                kernel_bytes: kernel.range.end.saturating_sub(kernel.range.start),
                needs_bytes,
            },
            None => LoadError::InitrdLimit {
                path,
                size_bytes,
                kernel_end,
                limit: most,
            },
        })
    }
}

fn length(file: &File, path: &Path) -> Result<u64, LoadError> {
    let path = || path.to_path_buf();
    let metadata = file.metadata().map_err(|source| LoadError::InitrdFile {
        path: path(),
        source,
    })?;
    if !metadata.is_file() {
        let kind = if metadata.is_dir() {
            io::Error::from(io::ErrorKind::IsADirectory)
        } else {
            io::Error::other("it is a device, pipe or socket")
        };
        return Err(LoadError::InitrdFile {
            path: path(),
            source: kind,
        });
    }
    match metadata.len() {
        0 => Err(LoadError::InitrdEmpty { path: path() }),
        len => Ok(len),
    }
}
