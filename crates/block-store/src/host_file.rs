//! One open file or block device of the host: what it is, what it can do, what it must be aligned to.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::bounce::{AREA_BYTES, Area, MAX_ALIGNMENT};
use crate::gate::Gate;
use crate::inherited;
use crate::sys::{self, Ranges};
use crate::{Geometry, OpenError, SECTOR_BYTES};

/// Gives a range back to the file system; it reads as zeroes afterwards.
pub(crate) const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Makes a range zeroes and keeps its space.
pub(crate) const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// What `O_DIRECT` asks of buffers and offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub(crate) memory: u32,
    pub(crate) offset: u32,
}

/// How to open a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) write: bool,
    pub(crate) direct: bool,
    pub(crate) lock: bool,
}

#[derive(Debug)]
pub(crate) struct HostFile {
    path: PathBuf,
    file: File,
    device: bool,
    write: bool,
    direct: Option<Alignment>,
    locked: bool,
    len_bytes: u64,
    sync_failed: AtomicBool,
    lacks: AtomicU8,
    geometry: Geometry,
    identity: String,
    gate: Gate,
}

impl HostFile {
    /// Opens `path` as it is asked for, and locks it.
    pub(crate) fn open(path: &Path, how: How) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Open {
            path: path.to_owned(),
            access: if how.write {
                "reading and writing"
            } else {
                "reading"
            },
            cure: OpenError::cure(&source, how.write),
            source,
        };
        let inherited = inherited::open(path).map_err(failed)?;
        // Before it is opened: opening a FIFO waits, and opening a terminal or tape does something.
        let facts = match &inherited {
            Some(file) => file.metadata(),
            None => fs::metadata(path),
        };
        let facts = facts.map_err(failed)?;
        let kind = facts.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind {
                path: path.to_owned(),
                kind: if kind.is_dir() {
                    "a directory"
                } else if kind.is_fifo() {
                    "a FIFO"
                } else if kind.is_socket() {
                    "a socket"
                } else {
                    "a character device"
                },
            });
        }
        let mut options = fs::OpenOptions::new();
        options.read(true).write(how.write);
        if how.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        let no_direct = |why: String| OpenError::Direct {
            path: path.to_owned(),
            why,
        };
        let file = match inherited {
            Some(file) => inherited::prepare(&file, how.write, how.direct).map(|()| file),
            None => options.open(path),
        };
        let file = file.map_err(|e| {
            if how.direct && e.raw_os_error() == Some(libc::EINVAL) {
                no_direct("its file system has none".into())
            } else {
                failed(e)
            }
        })?;
        let device = kind.is_block_device();
        if how.lock {
            crate::lock::lock(&file, path, how.write)?;
        }
        let size = sys::size(&file).map_err(failed)?;
        let geometry = if device {
            device_geometry(&file, &facts, size, how.write).map_err(failed)?
        } else {
            file_geometry(&file, &facts, size, how.write)
        };
        if geometry.read_only && how.write {
            return Err(failed(io::Error::from_raw_os_error(libc::EROFS)));
        }
        let direct = if how.direct {
            Some(alignment(&file, &facts).map_err(no_direct)?)
        } else {
            None
        };
        Ok(Self {
            path: path.to_owned(),
            device,
            write: how.write,
            direct,
            locked: how.lock,
            len_bytes: size,
            sync_failed: AtomicBool::new(false),
            lacks: AtomicU8::new(0),
            geometry: Geometry {
                block_size_bytes: direct
                    .map_or(0, |d| d.offset)
                    .max(geometry.block_size_bytes),
                ..geometry
            },
            identity: identity_of(&facts),
            file,
            gate: Gate::default(),
        })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn is_device(&self) -> bool {
        self.device
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.write
    }

    pub(crate) fn direct(&self) -> Option<Alignment> {
        self.direct
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// As it was when the file was opened.
    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(crate) fn identity(&self) -> &str {
        &self.identity
    }

    /// Whether the host has said that it cannot do this kind of `fallocate` here.
    pub(crate) fn lacks(&self, mode: i32) -> bool {
        self.lacks.load(Ordering::Relaxed) & bit(mode) != 0
    }

    pub(crate) fn set_lacks(&self, mode: i32) {
        self.lacks.fetch_or(bit(mode), Ordering::Relaxed);
    }

    /// A sync has failed: Linux says so once, and forgets. Nobody may take a later success for an answer about what
    /// was written before.
    pub(crate) fn set_sync_failed(&self) {
        self.sync_failed.store(true, Ordering::Release);
    }

    /// Makes durable what the tables of an image say.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            let text = "a sync has failed before; open the image again";
            return Err(io::Error::other(text));
        }
        self.file
            .sync_data()
            .inspect_err(|_| self.set_sync_failed())
    }

    /// How large the file was when it was opened, to the byte.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Fills `into` from `offset` on, whatever direct I/O asks for; as far as the file goes. Says how far that is.
    pub(crate) fn read_bytes(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let rest = &mut into[done..];
            let n = match self.direct {
                None => match FileExt::read_at(&self.file, rest, at) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    other => other?,
                },
                Some(needs) => {
                    let block = u64::from(needs.offset);
                    let (start, skip) = (at / block * block, (at % block) as usize);
                    let mut area = Area::new();
                    let there = self.read_blocks(&mut area, start, skip + rest.len(), needs)?;
                    let n = there.saturating_sub(skip).min(rest.len());
                    rest[..n].copy_from_slice(&area.bytes()[skip..skip + n]);
                    n
                }
            };
            if n == 0 {
                break;
            }
            done += n;
        }
        Ok(done)
    }

    /// Writes all of `from`, whatever direct I/O asks for. Parts of blocks are read before: the caller sees to it that
    /// nobody else writes to those blocks.
    pub(crate) fn write_bytes(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let Some(needs) = self.direct else {
            return self.file.write_all_at(from, offset);
        };
        let block = u64::from(needs.offset);
        let mut area = Area::new();
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let (start, skip) = (at / block * block, (at % block) as usize);
            let now = (from.len() - done).min(AREA_BYTES - skip);
            let len = (skip + now).next_multiple_of(block as usize);
            if skip + now != len || skip != 0 {
                let there = self.read_blocks(&mut area, start, len, needs)?;
                area.bytes()[there..len].fill(0);
            }
            area.bytes()[skip..skip + now].copy_from_slice(&from[done..done + now]);
            self.file.write_all_at(&area.bytes()[..len], start)?;
            done += now;
        }
        Ok(())
    }

    /// Reads whole blocks that hold `len` bytes, or what fits into the area; says how much there is.
    fn read_blocks(
        &self,
        area: &mut Area,
        start: u64,
        len: usize,
        needs: Alignment,
    ) -> io::Result<usize> {
        let len = len.next_multiple_of(needs.offset as usize).min(AREA_BYTES);
        let mut done = 0;
        while done < len {
            match self
                .file
                .read_at(&mut area.bytes()[done..len], start + done as u64)
            {
                Ok(n) => {
                    done += n;
                    // What is cut within a block is so by the end of the file.
                    if n == 0 || !n.is_multiple_of(needs.offset as usize) {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    /// How large the file is now, in whole sectors.
    pub(crate) fn size_now(&self) -> io::Result<u64> {
        Ok(sys::size(&self.file)? / SECTOR_BYTES * SECTOR_BYTES)
    }
}

impl Drop for HostFile {
    fn drop(&mut self) {
        // Rings have finished what they had, but the kernel takes them down at its ease.
        if self.locked {
            sys::unlock(&self.file);
        }
    }
}

fn bit(mode: i32) -> u8 {
    if mode == PUNCH_HOLE { 1 } else { 2 }
}

/// What names a file or device for as long as it exists.
fn identity_of(facts: &fs::Metadata) -> String {
    format!("{}{}{}", facts.dev(), facts.rdev(), facts.ino())
}

/// Who has the image at `path` open, to read or to write, if that is a plain file and somebody has; this process counts.
#[must_use]
pub fn holder_of(path: &Path) -> Option<String> {
    if !fs::metadata(path).ok()?.is_file() {
        return None;
    }
    match crate::lock::lock(&File::open(path).ok()?, path, true) {
        Err(OpenError::Locked { holder, .. }) => Some(holder),
        _ => None,
    }
}

/// What [`crate::BlockStore::identity`] would be of a store that is opened at `path`; nothing is opened.
///
/// # Errors
/// There is nothing, or it cannot be looked at.
pub fn identity_at(path: &Path) -> io::Result<String> {
    let facts = match inherited::open(path)? {
        Some(file) => file.metadata(),
        None => fs::metadata(path),
    };
    facts.map(|facts| identity_of(&facts))
}

fn file_geometry(file: &File, facts: &fs::Metadata, size: u64, write: bool) -> Geometry {
    // Behind the end nothing is there to be given back: this asks only whether it could be.
    let end = size.next_multiple_of(1 << 20);
    let discard = write && sys::fallocate(file, PUNCH_HOLE, end, 4096).is_ok();
    let block = u32::try_from(facts.blksize()).unwrap_or(4096);
    Geometry {
        size_bytes: size / SECTOR_BYTES * SECTOR_BYTES,
        block_size_bytes: SECTOR_BYTES as u32,
        physical_block_size_bytes: block.clamp(SECTOR_BYTES as u32, 64 << 10),
        optimal_io_bytes: 0,
        read_only: !write,
        discard,
        discard_granularity_bytes: if discard { block } else { 0 },
        write_zeroes: write,
        rotational: None,
    }
}

fn device_geometry(
    file: &File,
    facts: &fs::Metadata,
    size: u64,
    write: bool,
) -> io::Result<Geometry> {
    let said = sys::device_facts(file)?;
    let granularity = queue_fact(facts.rdev(), "discard_granularity");
    let most = queue_fact(facts.rdev(), "discard_max_bytes");
    let discard = write && most.is_some_and(|n| n > 0);
    Ok(Geometry {
        size_bytes: size / SECTOR_BYTES * SECTOR_BYTES,
        block_size_bytes: said.logical,
        physical_block_size_bytes: said.physical,
        optimal_io_bytes: said.optimal,
        read_only: !write || said.read_only,
        discard,
        discard_granularity_bytes: if discard {
            granularity
                .and_then(|n| n.try_into().ok())
                .unwrap_or(said.logical)
        } else {
            0
        },
        write_zeroes: write
            && queue_fact(facts.rdev(), "write_zeroes_max_bytes").is_some_and(|n| n > 0),
        rotational: queue_fact(facts.rdev(), "rotational").map(|n| n != 0),
    })
}

/// What sysfs says of the request queue of a disk, or of the disk of a partition.
fn queue_fact(device: u64, name: &str) -> Option<u64> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let folder = format!("/sys/dev/block/{major}:{minor}");
    let text = fs::read_to_string(format!("{folder}/queue/{name}"))
        .or_else(|_| fs::read_to_string(format!("{folder}/../queue/{name}")));
    text.ok()?.trim().parse().ok()
}

/// What `O_DIRECT` asks for on this file; or why it cannot be used.
fn alignment(file: &File, facts: &fs::Metadata) -> Result<Alignment, String> {
    let found = match sys::direct_alignment(file) {
        Some((0, _) | (_, 0)) => {
            return Err("its file system carries it out through the page cache".into());
        }
        Some((memory, offset)) => Alignment { memory, offset },
        None => try_alignments(file, facts)?,
    };
    if found.memory.max(found.offset) > MAX_ALIGNMENT {
        return Err(format!("it needs blocks of {} bytes", found.offset));
    }
    // The kernel says powers of two; nothing here works with anything else.
    let fits = |n: u32| n.is_power_of_two();
    if !fits(found.memory) || !fits(found.offset) {
        return Err(format!("it asks for strange blocks: {found:?}"));
    }
    Ok(Alignment {
        memory: found.memory,
        offset: found.offset.max(SECTOR_BYTES as u32),
    })
}

/// Finds the alignment by reading, for kernels before 6.1 and file systems that do not say.
fn try_alignments(file: &File, facts: &fs::Metadata) -> Result<Alignment, String> {
    let mut area = Area::new();
    if facts.len() == 0 && facts.is_file() {
        return Ok(Alignment {
            memory: 4096,
            offset: 4096,
        });
    }
    for shift in 9..=14 {
        let size = 1_usize << shift;
        let at = &mut area.bytes()[..size];
        let ranges = Ranges::One(at.as_mut_ptr(), at.len());
        // SAFETY: `at` has room for the bytes, and is not looked at.
        match unsafe { sys::read(file, ranges, 0) } {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(format!("it cannot be read directly: {e}")),
            Ok(_) => {
                let size = size as u32;
                return Ok(Alignment {
                    memory: size,
                    offset: size,
                });
            }
        }
    }
    Err("no block size was taken".into())
}
