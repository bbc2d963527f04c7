//! Counts every reference to every cluster of an image, by walking all of its tables.
//!
//! A table that many others point to is walked once, and its entries count as often. So the work is
//! bounded by what lies in the file, not by what a hostile file says about itself.

use std::collections::BTreeMap;

use crate::bytes::{entries_of, index, u16_at, u32_at, u64_at, wide};
use crate::entry::{Entry, OFFSET_MASK, read_l1, read_refcount};
use crate::error::{Act, ImageError};
use crate::file::ImageFile;
use crate::geometry::Geometry;
use crate::header::{Header, MOST_L1_BYTES};

/// Clusters whose references lie side by side in memory.
const CHUNK: u64 = 1024;
/// Most memory for references, in chunks: 1 GiB, enough for 16 TiB of data in clusters of 64 KiB. A
/// hostile image could otherwise ask for any amount.
const MOST_CHUNKS: usize = 1 << 18;
/// Longest snapshot table, as QEMU has it.
const MOST_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// Most L1 entries of all snapshots, for hostile images whose snapshots share what they point to.
const MOST_L1_ENTRIES: u64 = 1 << 27;
/// Most clusters of bitmaps.
const MOST_BITMAP_ENTRIES: u64 = 1 << 24;
/// Most findings that are told one by one.
const MOST_FINDINGS: usize = 100;

/// References, by cluster.
#[derive(Default)]
pub(crate) struct References {
    chunks: BTreeMap<u64, Box<[u32]>>,
}

impl References {
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        let count = chunk.and_then(|c| c.get(index(cluster % CHUNK)));
        count.copied().unwrap_or_default().into()
    }

    fn place(&mut self, cluster: u64) -> Result<&mut u32, ImageError> {
        let full = self.chunks.len() >= MOST_CHUNKS;
        let chunk = match self.chunks.entry(cluster / CHUNK) {
            std::collections::btree_map::Entry::Vacant(_) if full => None,
            entry => entry
                .or_insert_with(|| vec![0; index(CHUNK)].into_boxed_slice())
                .get_mut(index(cluster % CHUNK)),
        };
        chunk.ok_or(ImageError::Limit {
            what: "the number of clusters that can be counted here",
            limit: wide(MOST_CHUNKS).saturating_mul(CHUNK),
        })
    }

    fn add(&mut self, cluster: u64, times: u32) -> Result<(), ImageError> {
        let place = self.place(cluster)?;
        *place = place.saturating_add(times);
        Ok(())
    }

    pub(crate) fn remove_one(&mut self, cluster: u64) {
        if let Ok(place) = self.place(cluster) {
            *place = place.saturating_sub(1);
        }
    }

    /// Clusters with references, in order.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            let first = chunk.saturating_mul(CHUNK);
            let counts = counts.iter().zip(first..);
            counts
                .filter(|(count, _)| **count > 0)
                .map(|(count, cluster)| (cluster, (*count).into()))
        })
    }

    /// One after the last cluster with references.
    pub(crate) fn end(&self) -> u64 {
        let last = self.chunks.iter().next_back();
        last.map_or(0, |(chunk, counts)| {
            let at = counts.iter().rposition(|count| *count > 0);
            let first = chunk.saturating_mul(CHUNK);
            first.saturating_add(at.map_or(0, |at| wide(at).saturating_add(1)))
        })
    }
}

/// What is wrong, in words; only the first are kept.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) count: u64,
    pub(crate) list: Vec<String>,
}

impl Findings {
    pub(crate) fn note(&mut self, what: impl FnOnce() -> String) {
        if self.list.len() < MOST_FINDINGS {
            self.list.push(what());
        }
    }

    pub(crate) fn add(&mut self, what: impl FnOnce() -> String) {
        self.count = self.count.saturating_add(1);
        self.note(what);
    }
}

/// A walk through an image.
pub(crate) struct Scan<'a> {
    file: &'a dyn ImageFile,
    header: &'a Header,
    geometry: Geometry,
    host_end: u64,
    pub(crate) references: References,
    /// Entries that make no sense; what they point to is not counted.
    pub(crate) damage: Findings,
    l2_tables: BTreeMap<u64, u32>,
    l1_entries: u64,
}

impl<'a> Scan<'a> {
    pub(crate) fn new(file: &'a dyn ImageFile, header: &'a Header) -> Self {
        Self {
            file,
            header,
            geometry: header.geometry,
            host_end: header.geometry.ceil(header.file_len),
            references: References::default(),
            damage: Findings::default(),
            l2_tables: BTreeMap::new(),
            l1_entries: 0,
        }
    }

    /// Counts everything that the header, these two tables and what they point to refer to.
    pub(crate) fn run(&mut self, l1: &[u64], refcount_table: &[u64]) -> Result<(), ImageError> {
        let h = self.header;
        self.add(0, h.geometry.cluster_size(), 1, "header")?;
        self.add(h.l1_offset, h.l1_bytes(), 1, "L1 table")?;
        self.l1(l1, 1, "L1 table");
        self.snapshots()?;
        self.l2_tables()?;
        self.add(h.refcount_offset, h.refcount_bytes(), 1, "refcount table")?;
        for (raw, number) in refcount_table.iter().zip(0_u64..) {
            match read_refcount(*raw, self.geometry, self.host_end) {
                Ok(0) => {}
                Ok(block) => self.add(block, self.geometry.cluster_size(), 1, "refcount block")?,
                // Told, and repaired, where counts are compared.
                Err(_) => log::debug!("qcow2: refcount table entry {number} is damaged"),
            }
        }
        self.bitmaps()
    }

    /// Counts `times` references to every cluster that `size` bytes at `host` touch.
    fn add(
        &mut self,
        host: u64,
        size: u64,
        times: u32,
        what: &'static str,
    ) -> Result<(), ImageError> {
        if size == 0 {
            return Ok(());
        }
        let last = host.saturating_add(size).saturating_sub(1);
        if self.geometry.floor(last) >= self.host_end {
            self.damage
                .add(|| format!("the {what} at {host:#x} passes the end of the file"));
            return Ok(());
        }
        for cluster in self.geometry.index(host)..=self.geometry.index(last) {
            self.references.add(cluster, times)?;
        }
        Ok(())
    }

    /// Notes the L2 tables of an L1 table.
    fn l1(&mut self, entries: &[u64], times: u32, table: &'static str) {
        for (raw, number) in entries.iter().zip(0_u64..) {
            match read_l1(*raw, self.geometry, self.host_end) {
                Ok((0, _)) => {}
                Ok((host, _)) => {
                    let known = self.l2_tables.entry(host).or_default();
                    *known = known.saturating_add(times);
                }
                Err(fault) => self
                    .damage
                    .add(|| format!("entry {number} of the {table}, {raw:#018x}: {fault}")),
            }
        }
    }

    fn l2_tables(&mut self) -> Result<(), ImageError> {
        let g = self.geometry;
        let mut bytes = vec![0; g.cluster_len()];
        for (table, times) in std::mem::take(&mut self.l2_tables) {
            self.add(table, g.cluster_size(), times, "L2 table")?;
            self.file
                .read_at(&mut bytes, table)
                .act("read an L2 table")?;
            for (raw, number) in entries_of(&bytes).zip(0_u64..) {
                // Compressed data may pass the end of the file within their last sector.
                match Entry::read(raw, g, self.header.version, self.host_end) {
                    Ok(Entry::Unallocated | Entry::Zero { kept: None, .. }) => {}
                    Ok(
                        Entry::Data { host, .. }
                        | Entry::Zero {
                            kept: Some(host), ..
                        },
                    ) => self.add(host, g.cluster_size(), times, "cluster")?,
                    Ok(Entry::Compressed { host, size }) => {
                        let size = size.min(self.host_end.saturating_sub(host));
                        self.add(host, size, times, "compressed cluster")?;
                    }
                    Err(fault) => self.damage.add(|| {
                        format!(
                            "entry {number} of the L2 table at {table:#x}, {raw:#018x}: {fault}"
                        )
                    }),
                }
            }
        }
        Ok(())
    }

    fn snapshots(&mut self) -> Result<(), ImageError> {
        let start = self.header.snapshots_offset;
        let mut at = start;
        let mut seen: BTreeMap<(u64, u64), u32> = BTreeMap::new();
        for number in 0..self.header.snapshots {
            let mut fixed = [0; 40];
            self.file
                .read_at(&mut fixed, at)
                .act("read the snapshot table")?;
            let l1_bytes = u64::from(u32_at(&fixed, 8)).saturating_mul(8);
            let name = u64::from(u16_at(&fixed, 12)).saturating_add(u16_at(&fixed, 14).into());
            let len = u64::from(u32_at(&fixed, 36))
                .saturating_add(name)
                .saturating_add(40);
            at = at.saturating_add(len.div_ceil(8).saturating_mul(8));
            let table_bytes = at.saturating_sub(start);
            if table_bytes > MOST_SNAPSHOT_TABLE_BYTES || at > self.host_end {
                self.damage
                    .add(|| format!("entry {number} of the snapshot table is {len} bytes long"));
                return Ok(());
            }
            let l1 = u64_at(&fixed, 0);
            let end = l1.checked_add(l1_bytes).filter(|end| *end <= self.host_end);
            if !self.geometry.is_aligned(l1) || l1_bytes > MOST_L1_BYTES || end.is_none() {
                self.damage.add(|| {
                    format!("the L1 table of snapshot {number}, {l1_bytes} bytes at {l1:#x}, lies outside")
                });
                continue;
            }
            let known = seen.entry((l1, l1_bytes)).or_default();
            *known = known.saturating_add(1);
        }
        self.add(start, at.saturating_sub(start), 1, "snapshot table")?;
        for ((l1, l1_bytes), times) in seen {
            self.l1_entries = self.l1_entries.saturating_add(l1_bytes / 8);
            if self.l1_entries > MOST_L1_ENTRIES {
                return Err(ImageError::Limit {
                    what: "the number of L1 entries of all snapshots",
                    limit: MOST_L1_ENTRIES,
                });
            }
            self.add(l1, l1_bytes, times, "L1 table of a snapshot")?;
            let mut bytes = vec![0; index(l1_bytes)];
            self.file
                .read_at(&mut bytes, l1)
                .act("read the L1 table of a snapshot")?;
            let entries: Vec<u64> = entries_of(&bytes).collect();
            self.l1(&entries, times, "L1 table of a snapshot");
        }
        Ok(())
    }

    /// Clusters of bitmaps, which others wrote here and still trust.
    fn bitmaps(&mut self) -> Result<(), ImageError> {
        let Some(bitmaps) = self.header.live_bitmaps() else {
            return Ok(());
        };
        let start = bitmaps.directory_offset;
        let (size, mut entries) = (bitmaps.directory_size, 0_u64);
        self.add(
            start,
            size.min(MOST_SNAPSHOT_TABLE_BYTES),
            1,
            "bitmap directory",
        )?;
        let mut at = start;
        for number in 0..bitmaps.count {
            let mut fixed = [0; 24];
            self.file
                .read_at(&mut fixed, at)
                .act("read the bitmap directory")?;
            let len = u64::from(u16_at(&fixed, 18))
                .saturating_add(u32_at(&fixed, 20).into())
                .saturating_add(24);
            at = at.saturating_add(len.div_ceil(8).saturating_mul(8));
            let (table, table_entries) = (u64_at(&fixed, 0), u64::from(u32_at(&fixed, 8)));
            let table_bytes = table_entries.saturating_mul(8);
            entries = entries.saturating_add(table_entries);
            let outside = at.saturating_sub(start) > size
                || table.saturating_add(table_bytes) > self.host_end
                || !self.geometry.is_aligned(table)
                || entries > MOST_BITMAP_ENTRIES;
            if outside {
                self.damage
                    .add(|| format!("entry {number} of the bitmap directory points outside"));
                return Ok(());
            }
            self.add(table, table_bytes, 1, "bitmap table")?;
            let mut bytes = vec![0; index(table_bytes)];
            self.file
                .read_at(&mut bytes, table)
                .act("read a bitmap table")?;
            for raw in entries_of(&bytes) {
                let host = raw & OFFSET_MASK;
                if host != 0 {
                    self.add(host, self.geometry.cluster_size(), 1, "bitmap")?;
                }
            }
        }
        Ok(())
    }
}
