//! An open image, and the look-ups that every request of a guest makes.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::bytes::{entries_of, index, wide};
use crate::cache::SliceCache;
use crate::compressed::{DecodedClusters, decode};
use crate::entry::{Entry, read_l1};
use crate::error::{Act, ImageError, OpenError};
use crate::file::{BackingRead, ImageFile};
use crate::geometry::Geometry;
use crate::header::{self, Backing, Compression, Header};
use crate::writer::Writer;

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing is ever written to the file.
    ReadOnly,
    /// The file belongs to this image alone.
    ReadWrite,
}

/// What is known about an image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk that the guest sees.
    pub virtual_size_bytes: u64,
    /// The unit in which the file is given out.
    pub cluster_size_bytes: u64,
    /// What the image is laid over.
    pub backing: Option<Backing>,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Width of a reference count.
    pub refcount_bits: u32,
    /// Whether the owner asked for reference counts to be written late. Ours always are in version 3.
    pub lazy_refcounts: bool,
    /// Whether the image was found not closed cleanly. Opened for writing it has been repaired since.
    pub dirty: bool,
    /// Whether the image is marked as damaged.
    pub corrupt: bool,
    /// How many snapshots lie inside. Only the active state can be reached here.
    pub snapshots: u32,
}

/// What a read meets first. Each covers at most what was asked for, and at least one byte of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The bytes lie in the file.
    Data {
        /// Where.
        file_offset: u64,
        /// How many.
        len: u64,
    },
    /// Zeroes.
    Zero {
        /// How many.
        len: u64,
    },
    /// The backing image has them, at the same guest offset; zeroes beyond its end, or if there is none.
    Backing {
        /// How many.
        len: u64,
    },
    /// Compressed: see [`Image::read_compressed`].
    Compressed {
        /// How many.
        len: u64,
    },
}

/// What a write meets first. Each covers at most what was asked for, and at least one byte of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteExtent {
    /// The bytes may be written straight to the file. The place stays theirs until the image is resized
    /// or closed, whatever other threads do meanwhile.
    InPlace {
        /// Where.
        file_offset: u64,
        /// How many.
        len: u64,
    },
    /// A cluster must be found first: see [`Image::write_allocating`].
    Allocating {
        /// How many.
        len: u64,
    },
}

/// A run of guest bytes that are stored alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    At(u64),
    Zero,
    Backing,
    Compressed,
    Allocate,
}

impl Step {
    /// Whether `next`, `covered` bytes further on, continues this.
    fn joins(self, covered: u64, next: Self) -> bool {
        match (self, next) {
            (Self::At(here), Self::At(there)) => here.checked_add(covered) == Some(there),
            (a, b) => a == b,
        }
    }
}

/// A place in the file that a table lies in and data must not go to. Tables may move.
#[derive(Default)]
pub(crate) struct Guard {
    start: AtomicU64,
    end: AtomicU64,
}

impl Guard {
    pub(crate) fn set(&self, offset: u64, end: u64) {
        self.start.store(offset, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    fn holds(&self, host: u64) -> bool {
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&host)
    }
}

/// What look-ups and the writer both need.
pub(crate) struct Shared {
    pub(crate) file: Box<dyn ImageFile>,
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
    pub(crate) has_backing: bool,
    compression: Compression,
    pub(crate) l1: RwLock<Vec<u64>>,
    pub(crate) cache: SliceCache,
    pub(crate) decoded: DecodedClusters,
    /// Size of the disk.
    pub(crate) size: AtomicU64,
    /// Length of the file.
    pub(crate) host_end: AtomicU64,
    pub(crate) l1_guard: Guard,
    pub(crate) refcount_guard: Guard,
    pub(crate) snapshot_guard: Guard,
}

/// An open image. It may be used from several threads at once: look-ups share locks, allocations take
/// turns. Data written in place go past it, straight to the file.
pub struct Image {
    pub(crate) shared: Shared,
    pub(crate) writer: Option<Mutex<Writer>>,
    header: Header,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Image").field(&self.info()).finish()
    }
}

impl Image {
    /// Opens the image in `file`.
    ///
    /// For writing, an image that was not closed cleanly gets its reference counts rebuilt first, and
    /// autoclear features (bitmaps) are marked as stale, since writes here do not follow them.
    ///
    /// # Errors
    /// The file is not an image, needs features that are not supported, is damaged, or failed.
    pub fn open(file: Box<dyn ImageFile>, access: Access) -> Result<Self, OpenError> {
        let header = Header::read(&*file)?;
        let geometry = header.geometry;
        let mut table = vec![0; index(header.l1_bytes())];
        file.read_at(&mut table, header.l1_offset)
            .act_open("read the L1 table")?;
        let l1: Vec<u64> = entries_of(&table).collect();
        let (writer, l1, host_end) = match access {
            Access::ReadOnly => (None, l1, header.file_len),
            Access::ReadWrite => {
                let (writer, l1) = Writer::open(&*file, &header, l1)?;
                let end = writer.host_end();
                (Some(Mutex::new(writer)), l1, end)
            }
        };
        let shared = Shared {
            file,
            geometry,
            version: header.version,
            has_backing: header.backing.is_some(),
            compression: header.compression,
            l1: RwLock::new(l1),
            cache: SliceCache::new(geometry),
            decoded: DecodedClusters::default(),
            size: AtomicU64::new(header.size),
            host_end: AtomicU64::new(host_end),
            l1_guard: Guard::default(),
            refcount_guard: Guard::default(),
            snapshot_guard: Guard::default(),
        };
        let l1_end = header.l1_offset.saturating_add(header.l1_bytes());
        shared.l1_guard.set(header.l1_offset, l1_end);
        if let Some(writer) = &writer {
            let writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.publish(&shared);
        }
        if header.snapshots > 0 {
            let bytes = u64::from(header.snapshots).saturating_mul(40);
            let end = header.snapshots_offset.saturating_add(bytes);
            shared.snapshot_guard.set(header.snapshots_offset, end);
        }
        Ok(Self {
            shared,
            writer,
            header,
        })
    }

    /// What is known about the image.
    #[must_use]
    pub fn info(&self) -> Info {
        let h = &self.header;
        Info {
            version: h.version,
            virtual_size_bytes: self.size_bytes(),
            cluster_size_bytes: h.geometry.cluster_size(),
            backing: h.backing.clone(),
            compression: h.compression,
            refcount_bits: 1_u32.wrapping_shl(h.geometry.refcount_order),
            lazy_refcounts: h.compatible & header::LAZY_REFCOUNTS != 0,
            dirty: h.incompatible & header::DIRTY != 0,
            corrupt: h.incompatible & header::CORRUPT != 0,
            snapshots: h.snapshots,
        }
    }

    /// Size of the disk that the guest sees.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.size.load(Ordering::Acquire)
    }

    /// Where a read of `len` bytes at guest offset `offset` has to look first.
    ///
    /// # Errors
    /// The range passes the end of the disk, or the tables that describe it are damaged or unreadable.
    pub fn lookup(&self, offset: u64, len: u64) -> Result<Extent, ImageError> {
        self.shared.check_range(offset, len)?;
        self.shared.lookup(offset, len)
    }

    /// Where a write of `len` bytes at guest offset `offset` has to go first.
    ///
    /// # Errors
    /// The image is open for reading only, the range passes the end of the disk, or the tables that
    /// describe it are damaged or unreadable.
    pub fn lookup_write(&self, offset: u64, len: u64) -> Result<WriteExtent, ImageError> {
        if self.writer.is_none() {
            return Err(ImageError::ReadOnly);
        }
        self.shared.check_range(offset, len)?;
        let shared = &self.shared;
        let (step, len) = shared.find(offset, len, |entry| match entry {
            Entry::Data { host, copied: true } if shared.guarded(host).is_none() => Step::At(host),
            _ => Step::Allocate,
        })?;
        Ok(match step {
            Step::At(file_offset) => WriteExtent::InPlace { file_offset, len },
            _ => WriteExtent::Allocating { len },
        })
    }

    /// Reads bytes that [`lookup`](Self::lookup) called compressed. If they have been overwritten since,
    /// what they hold now is read.
    ///
    /// # Errors
    /// The compressed data are damaged or unreadable.
    pub fn read_compressed(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        self.shared.check_range(offset, wide(into.len()))?;
        self.shared.read_compressed(offset, into)
    }

    /// Reads `into` from guest offset `offset` on, wherever the bytes are: the simple way, for tools and
    /// small reads.
    ///
    /// # Errors
    /// The range passes the end of the disk, or something on the way is damaged or unreadable.
    pub fn read(
        &self,
        offset: u64,
        into: &mut [u8],
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        self.shared.check_range(offset, wide(into.len()))?;
        self.shared.read(offset, into, backing)
    }

    /// The writer, if the image is open for writing.
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, Writer>, ImageError> {
        let writer = self.writer.as_ref().ok_or(ImageError::ReadOnly)?;
        Ok(writer.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Shared {
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        let size_bytes = self.size.load(Ordering::Acquire);
        match offset.checked_add(len) {
            Some(end) if end <= size_bytes => Ok(()),
            _ => Err(ImageError::OutOfRange {
                offset,
                len,
                size_bytes,
            }),
        }
    }

    /// Which table lies at a host offset, if one does that data must not overwrite.
    pub(crate) fn guarded(&self, host: u64) -> Option<&'static str> {
        let host = self.geometry.floor(host);
        match host {
            0 => Some("header"),
            h if self.l1_guard.holds(h) => Some("L1 table"),
            h if self.refcount_guard.holds(h) => Some("refcount table"),
            h if self.snapshot_guard.holds(h) => Some("snapshot table"),
            _ => None,
        }
    }

    pub(crate) fn to_cluster_end(&self, offset: u64) -> u64 {
        let g = self.geometry;
        g.cluster_size().saturating_sub(g.within(offset))
    }

    pub(crate) fn read_entry(&self, raw: u64, offset: u64) -> Result<Entry, ImageError> {
        let end = self.host_end.load(Ordering::Acquire);
        Entry::read(raw, self.geometry, self.version, end).map_err(|fault| ImageError::Entry {
            offset,
            entry: raw,
            fault,
        })
    }

    pub(crate) fn lookup(&self, offset: u64, len: u64) -> Result<Extent, ImageError> {
        let (step, len) = self.find(offset, len, |entry| match entry {
            Entry::Unallocated => Step::Backing,
            Entry::Zero { .. } => Step::Zero,
            Entry::Data { host, .. } => Step::At(host),
            Entry::Compressed { .. } => Step::Compressed,
        })?;
        Ok(match step {
            // The last cluster of a file may be cut short: what is missing reads as zeroes.
            Step::At(file_offset) => {
                let end = self.host_end.load(Ordering::Acquire);
                match end.saturating_sub(file_offset) {
                    0 => Extent::Zero {
                        len: self.to_cluster_end(offset).min(len),
                    },
                    there => Extent::Data {
                        file_offset,
                        len: there.min(len),
                    },
                }
            }
            Step::Zero => Extent::Zero { len },
            Step::Compressed => Extent::Compressed { len },
            Step::Backing | Step::Allocate => Extent::Backing { len },
        })
    }

    /// Reads within the tables' reach, which may pass the end of the disk.
    pub(crate) fn read(
        &self,
        offset: u64,
        into: &mut [u8],
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        let (mut rest, mut at) = (into, offset);
        while !rest.is_empty() {
            let extent = self.lookup(at, wide(rest.len()))?;
            let (Extent::Data { len, .. }
            | Extent::Zero { len }
            | Extent::Backing { len }
            | Extent::Compressed { len }) = extent;
            let (part, tail) = rest.split_at_mut(index(len).min(rest.len()));
            match extent {
                Extent::Data { file_offset, .. } => {
                    self.file.read_at(part, file_offset).act("read data")?;
                }
                Extent::Zero { .. } => part.fill(0),
                Extent::Backing { .. } => self.read_backing(at, part, backing)?,
                Extent::Compressed { .. } => self.read_compressed(at, part)?,
            }
            rest = tail;
            at = at.saturating_add(len);
        }
        Ok(())
    }

    /// The run that starts at `offset`, across slices.
    fn find(
        &self,
        offset: u64,
        len: u64,
        classify: impl Fn(Entry) -> Step + Copy,
    ) -> Result<(Step, u64), ImageError> {
        let (step, mut covered) = self.find_in_slice(offset, len, classify)?;
        while covered < len {
            let at = offset.saturating_add(covered);
            if self.geometry.slice_index(self.geometry.index(at)) != 0 {
                break;
            }
            let rest = len.saturating_sub(covered);
            // What is damaged further on is told when it is asked for.
            match self.find_in_slice(at, rest, classify) {
                Ok((next, more)) if step.joins(covered, next) => {
                    covered = covered.saturating_add(more);
                }
                _ => break,
            }
        }
        Ok((step, covered))
    }

    fn find_in_slice(
        &self,
        offset: u64,
        len: u64,
        classify: impl Fn(Entry) -> Step + Copy,
    ) -> Result<(Step, u64), ImageError> {
        let slice = self.geometry.slice(self.geometry.index(offset));
        let scan = |entries: &[u64]| self.scan(entries, offset, len, classify);
        if let Some(found) = self.cache.peek(slice, scan) {
            return found;
        }
        let loaded = self.cache.load(
            slice,
            |into| self.read_slice(slice, into),
            |entries| entries.map(scan),
        )?;
        match loaded {
            Some(found) => found,
            None => {
                let next = self.geometry.slice_start(slice.saturating_add(1));
                let there = self.geometry.offset(next).saturating_sub(offset);
                Ok((classify(Entry::Unallocated), there.min(len)))
            }
        }
    }

    fn scan(
        &self,
        entries: &[u64],
        offset: u64,
        len: u64,
        classify: impl Fn(Entry) -> Step,
    ) -> Result<(Step, u64), ImageError> {
        let at = self.geometry.slice_index(self.geometry.index(offset));
        let mut rest = entries.get(at..).unwrap_or_default().iter();
        let first = rest.next().copied().unwrap_or_default();
        let step = match classify(self.read_entry(first, offset)?) {
            Step::At(host) => Step::At(host.saturating_add(self.geometry.within(offset))),
            step => step,
        };
        let end = self.host_end.load(Ordering::Acquire);
        let mut covered = self.to_cluster_end(offset);
        while covered < len {
            let Some(raw) = rest.next() else { break };
            // What is damaged further on is told when it is asked for.
            let Ok(entry) = Entry::read(*raw, self.geometry, self.version, end) else {
                break;
            };
            if !step.joins(covered, classify(entry)) {
                break;
            }
            covered = covered.saturating_add(self.geometry.cluster_size());
        }
        Ok((step, covered.min(len)))
    }

    /// Reads a slice from its L2 table; `false` if there is no table.
    pub(crate) fn read_slice(&self, slice: u64, into: &mut [u64]) -> Result<bool, ImageError> {
        let first = self.geometry.slice_start(slice);
        let l1_index = self.geometry.l1_index(first);
        let Some((table, _)) = self.l2_table(l1_index)? else {
            return Ok(false);
        };
        let at = self.geometry.l2_index(first).saturating_mul(8);
        let mut bytes = vec![0; into.len().saturating_mul(8)];
        self.file
            .read_at(&mut bytes, table.saturating_add(at))
            .act("read an L2 table")?;
        for (into, entry) in into.iter_mut().zip(entries_of(&bytes)) {
            *into = entry;
        }
        Ok(true)
    }

    /// Where an L2 table lies, and whether it has one user only.
    pub(crate) fn l2_table(&self, l1_index: u64) -> Result<Option<(u64, bool)>, ImageError> {
        let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
        let raw = l1.get(index(l1_index)).copied().unwrap_or_default();
        drop(l1);
        let end = self.host_end.load(Ordering::Acquire);
        let (host, copied) =
            read_l1(raw, self.geometry, end).map_err(|fault| ImageError::Table {
                table: "L1 table",
                index: l1_index,
                entry: raw,
                fault,
            })?;
        Ok((host != 0).then_some((host, copied)))
    }

    /// Entries `at..at + into.len()` of a slice; zeroes if there is no table.
    pub(crate) fn entries(
        &self,
        slice: u64,
        at: usize,
        into: &mut [u64],
    ) -> Result<(), ImageError> {
        let mut copy = |entries: &[u64]| {
            let end = at.saturating_add(into.len());
            into.copy_from_slice(entries.get(at..end).unwrap_or(&vec![0; into.len()]));
        };
        if self.cache.peek(slice, &mut copy).is_some() {
            return Ok(());
        }
        let load = |into: &mut [u64]| self.read_slice(slice, into);
        self.cache.load(slice, load, |entries| match entries {
            Some(entries) => copy(entries),
            None => copy(&[]),
        })
    }

    fn raw_entry(&self, offset: u64) -> Result<u64, ImageError> {
        let cluster = self.geometry.index(offset);
        let mut entry = [0];
        let slice = self.geometry.slice(cluster);
        self.entries(slice, self.geometry.slice_index(cluster), &mut entry)?;
        let [entry] = entry;
        Ok(entry)
    }

    fn read_compressed(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let (mut rest, mut at) = (into, offset);
        while !rest.is_empty() {
            let here = self.to_cluster_end(at);
            let (part, tail) = rest.split_at_mut(index(here).min(rest.len()));
            self.read_compressed_part(at, part)?;
            rest = tail;
            at = at.saturating_add(here);
        }
        Ok(())
    }

    /// Reads within one cluster.
    fn read_compressed_part(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let within = index(self.geometry.within(offset));
        loop {
            let raw = self.raw_entry(offset)?;
            match self.read_entry(raw, offset)? {
                Entry::Compressed { host, size } => {
                    let Some(cluster) = self.decoded_cluster(offset, raw, host, size)? else {
                        continue;
                    };
                    let end = within.saturating_add(into.len());
                    into.copy_from_slice(cluster.get(within..end).unwrap_or(&vec![0; into.len()]));
                }
                Entry::Data { host, .. } => {
                    let at = host.saturating_add(wide(within));
                    self.file.read_at(into, at).act("read data")?;
                }
                Entry::Zero { .. } | Entry::Unallocated => into.fill(0),
            }
            return Ok(());
        }
    }

    /// `None` if the cluster was overwritten meanwhile: its compressed data may have made room already.
    fn decoded_cluster(
        &self,
        offset: u64,
        raw: u64,
        host: u64,
        size: u64,
    ) -> Result<Option<Arc<[u8]>>, ImageError> {
        if let Some(cluster) = self.decoded.get(raw) {
            return Ok(Some(cluster));
        }
        // At most two clusters long: the entry has no room for more.
        let mut bytes = vec![0; index(size)];
        self.file
            .read_at(&mut bytes, host)
            .act("read compressed data")?;
        let decoded = decode(self.compression, self.geometry, &bytes);
        if self.raw_entry(offset)? != raw {
            return Ok(None);
        }
        let cluster: Arc<[u8]> = decoded
            .map_err(|reason| ImageError::Compressed { offset, reason })?
            .into();
        self.decoded.put(raw, &cluster);
        Ok(Some(cluster))
    }

    pub(crate) fn read_backing(
        &self,
        offset: u64,
        into: &mut [u8],
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        if !self.has_backing {
            into.fill(0);
            return Ok(());
        }
        backing.read_at(offset, into).act("read the backing image")
    }
}
