//! Reference counts: the table in memory, and the blocks that are in use.
//!
//! Nothing here decides when a count may reach the file: the writer does, see the crate's opening words.

use std::collections::{BTreeSet, HashMap};

use crate::bytes::{self, bytes_of, entries_of, field, index, wide};
use crate::entry::read_refcount;
use crate::error::{Act, ImageError, OpenError};
use crate::file::ImageFile;
use crate::geometry::{Geometry, MOST_HOST_OFFSET};
use crate::header::{Header, MOST_REFCOUNT_TABLE_BYTES};

/// Most bytes of refcount blocks in memory; at least four blocks are. A guest that writes all over a
/// fragmented image would otherwise have all of them.
const MOST_CACHED_BYTES: u64 = 1 << 20;
/// The file grows by half, but no more than this at once: each step waits until the disk has everything
/// written so far, and a kill leaves the rest as a hole behind the image.
const MOST_GROWTH_BYTES: u64 = 1 << 30;
/// And by at least so many clusters.
const LEAST_GROWTH_CLUSTERS: u64 = 256;

/// The end of the file, where new clusters come from. What is taken here reads as zeroes, even after a
/// crash: the file gets its length, durably, before a cluster is given out.
#[derive(Debug)]
pub(crate) struct Space {
    /// The first cluster that nothing was ever put in.
    pub(crate) end: u64,
    /// Durable length of the file.
    pub(crate) len: u64,
}

impl Space {
    /// Takes `n` clusters.
    pub(crate) fn take(
        &mut self,
        file: &dyn ImageFile,
        geometry: Geometry,
        n: u64,
    ) -> Result<u64, ImageError> {
        let first = self.end;
        let end = first.saturating_add(n);
        if geometry.offset(end) >= MOST_HOST_OFFSET {
            return Err(ImageError::Limit {
                what: "the length of the file",
                limit: MOST_HOST_OFFSET,
            });
        }
        if geometry.offset(end) > self.len {
            let step = (self.len / 2).clamp(
                geometry.offset(LEAST_GROWTH_CLUSTERS),
                MOST_GROWTH_BYTES.max(geometry.offset(LEAST_GROWTH_CLUSTERS)),
            );
            let len = geometry.ceil(geometry.offset(end).saturating_add(step));
            file.set_len(len).act("extend the image")?;
            file.sync().act("make the image's length durable")?;
            self.len = len;
        }
        self.end = end;
        Ok(first)
    }
}

struct Block {
    bytes: Vec<u8>,
    dirty: bool,
    stamp: u64,
}

/// All counts of an image.
pub(crate) struct Refcounts {
    geometry: Geometry,
    table: Vec<u64>,
    pub(crate) table_offset: u64,
    pub(crate) table_clusters: u64,
    /// Entries of the table that the file does not have yet.
    new_entries: BTreeSet<u64>,
    blocks: HashMap<u64, Block>,
    stamp: u64,
    /// Tables that were left behind when a larger one was made: first cluster and how many.
    pub(crate) retired: Vec<(u64, u64)>,
}

impl Refcounts {
    pub(crate) fn read(file: &dyn ImageFile, header: &Header) -> Result<Self, OpenError> {
        let mut bytes = vec![0; index(header.refcount_bytes())];
        file.read_at(&mut bytes, header.refcount_offset)
            .act_open("read the refcount table")?;
        Ok(Self {
            geometry: header.geometry,
            table: entries_of(&bytes).collect(),
            table_offset: header.refcount_offset,
            table_clusters: header.refcount_clusters.into(),
            new_entries: BTreeSet::new(),
            blocks: HashMap::new(),
            stamp: 0,
            retired: Vec::new(),
        })
    }

    /// Entries of the table as they are.
    pub(crate) fn table(&self) -> &[u64] {
        &self.table
    }

    pub(crate) fn table_end(&self) -> u64 {
        let bytes = self.geometry.offset(self.table_clusters);
        self.table_offset.saturating_add(bytes)
    }

    /// Takes a damaged entry out of the table: a new block will be made when it is needed.
    pub(crate) fn drop_block(&mut self, block: u64) {
        if let Some(entry) = self.table.get_mut(index(block)) {
            *entry = 0;
        }
        self.new_entries.insert(block);
        self.blocks.remove(&block);
    }

    fn split(&self, cluster: u64) -> (u64, u64) {
        let entries = self.geometry.block_entries();
        (
            cluster.checked_div(entries).unwrap_or(0),
            cluster.checked_rem(entries).unwrap_or(0),
        )
    }

    fn entry(&self, block: u64, host_end: u64) -> Result<u64, ImageError> {
        let raw = self.table.get(index(block)).copied().unwrap_or_default();
        read_refcount(raw, self.geometry, host_end).map_err(|fault| ImageError::Table {
            table: "refcount table",
            index: block,
            entry: raw,
            fault,
        })
    }

    /// Brings a block into memory; `None` if there is none.
    fn block(
        &mut self,
        file: &dyn ImageFile,
        host_end: u64,
        block: u64,
    ) -> Result<Option<&mut Block>, ImageError> {
        self.stamp = self.stamp.wrapping_add(1);
        if !self.blocks.contains_key(&block) {
            let offset = self.entry(block, host_end)?;
            if offset == 0 {
                return Ok(None);
            }
            let mut bytes = vec![0; self.geometry.cluster_len()];
            file.read_at(&mut bytes, offset)
                .act("read a refcount block")?;
            self.insert(file, block, bytes, false)?;
        }
        let stamp = self.stamp;
        let found = self.blocks.get_mut(&block);
        Ok(match found {
            Some(found) => {
                found.stamp = stamp;
                Some(found)
            }
            None => None,
        })
    }

    fn insert(
        &mut self,
        file: &dyn ImageFile,
        block: u64,
        bytes: Vec<u8>,
        dirty: bool,
    ) -> Result<(), ImageError> {
        let most = self.geometry.index(MOST_CACHED_BYTES).max(4);
        if wide(self.blocks.len()) >= most {
            let oldest = self.blocks.iter().min_by_key(|(_, b)| b.stamp);
            if let Some(oldest) = oldest.map(|(n, _)| *n) {
                self.write_block(file, oldest)?;
                self.blocks.remove(&oldest);
            }
        }
        let stamp = self.stamp;
        let bytes = Block {
            bytes,
            dirty,
            stamp,
        };
        self.blocks.insert(block, bytes);
        Ok(())
    }

    fn write_block(&mut self, file: &dyn ImageFile, block: u64) -> Result<(), ImageError> {
        let offset = self.entry(block, u64::MAX)?;
        if let Some(b) = self
            .blocks
            .get_mut(&block)
            .filter(|b| b.dirty && offset != 0)
        {
            file.write_at(&b.bytes, offset)
                .act("write a refcount block")?;
            b.dirty = false;
        }
        Ok(())
    }

    pub(crate) fn get(
        &mut self,
        file: &dyn ImageFile,
        host_end: u64,
        cluster: u64,
    ) -> Result<u64, ImageError> {
        let (block, at) = self.split(cluster);
        let order = self.geometry.refcount_order;
        let block = self.block(file, host_end, block)?;
        Ok(block.map_or(0, |b| read_count(&b.bytes, at, order)))
    }

    /// Sets a count, making a block for it and room in the table if need be.
    pub(crate) fn set(
        &mut self,
        file: &dyn ImageFile,
        space: &mut Space,
        cluster: u64,
        count: u64,
    ) -> Result<(), ImageError> {
        if count > self.geometry.most_references() {
            return Err(ImageError::Limit {
                what: "the reference count of a cluster",
                limit: self.geometry.most_references(),
            });
        }
        let (number, at) = self.split(cluster);
        self.ensure_block(file, space, number)?;
        let order = self.geometry.refcount_order;
        if let Some(block) = self.block(file, space.len, number)? {
            block.dirty = true;
            write_count(&mut block.bytes, at, order, count);
        }
        Ok(())
    }

    fn ensure_block(
        &mut self,
        file: &dyn ImageFile,
        space: &mut Space,
        block: u64,
    ) -> Result<(), ImageError> {
        if block >= wide(self.table.len()) {
            self.grow(file, space, block)?;
        }
        if self.entry(block, space.len)? != 0 {
            return Ok(());
        }
        let place = space.take(file, self.geometry, 1)?;
        let empty = vec![0; self.geometry.cluster_len()];
        if let Err(e) = self.insert(file, block, empty, true) {
            space.end = place;
            return Err(e);
        }
        if let Some(entry) = self.table.get_mut(index(block)) {
            *entry = self.geometry.offset(place);
        }
        self.new_entries.insert(block);
        let counted = self.set(file, space, place, 1);
        if counted.is_err() {
            // A block that nobody counts would be given out as a cluster for data.
            self.forget_block(block);
        }
        counted
    }

    /// Takes a block back that is not in the file yet.
    fn forget_block(&mut self, block: u64) {
        if let Some(entry) = self.table.get_mut(index(block)) {
            *entry = 0;
        }
        self.new_entries.remove(&block);
        self.blocks.remove(&block);
    }

    /// Makes a larger table, and leaves the old one behind. If that fails, the old one is as it was.
    fn grow(
        &mut self,
        file: &dyn ImageFile,
        space: &mut Space,
        block: u64,
    ) -> Result<(), ImageError> {
        let (len, end) = (self.table.len(), space.end);
        let grown = self.larger_table(file, space, block);
        let old = wide(len);
        if grown.is_err() && self.table_clusters < self.clusters_of_table() {
            // All that was taken since was for this, and nothing in the file points there yet.
            let start = self.geometry.offset(end);
            let entries = self.table.iter().zip(0_u64..);
            let made = entries.filter(|(entry, number)| **entry >= start || *number >= old);
            let made: Vec<u64> = made.map(|(_, number)| number).collect();
            for number in made {
                self.forget_block(number);
            }
            self.table.truncate(len);
            for cluster in end..space.end {
                if matches!(self.get(file, space.len, cluster), Ok(1)) {
                    let _ = self.set(file, space, cluster, 0);
                }
            }
            // What was written there is no longer zero. If it cannot be cut off, it is free, and not taken for zero.
            if file.set_len(self.geometry.offset(end)).is_ok() {
                space.len = self.geometry.offset(end);
                space.end = end;
            }
        }
        grown
    }

    /// Clusters that the table in memory fills.
    fn clusters_of_table(&self) -> u64 {
        let bytes = wide(self.table.len()).saturating_mul(8);
        self.geometry.clusters(bytes)
    }

    fn larger_table(
        &mut self,
        file: &dyn ImageFile,
        space: &mut Space,
        block: u64,
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let len = wide(self.table.len());
        let mut wanted = block.saturating_add(1).max(len.saturating_add(len / 2));
        // It has to cover itself, and the blocks that count it.
        let clusters = loop {
            let clusters = g.clusters(wanted.saturating_mul(8));
            let end = space.end.saturating_add(clusters.saturating_mul(2));
            let needed = self.split(end.saturating_add(64)).0.saturating_add(1);
            if clusters.saturating_mul(g.l2_entries()) >= needed {
                break clusters;
            }
            wanted = needed;
        };
        if g.offset(clusters) > MOST_REFCOUNT_TABLE_BYTES {
            return Err(ImageError::Limit {
                what: "the length of the refcount table",
                limit: MOST_REFCOUNT_TABLE_BYTES,
            });
        }
        let first = space.take(file, g, clusters)?;
        self.table
            .resize(index(clusters.saturating_mul(g.l2_entries())), 0);
        for cluster in first..first.saturating_add(clusters) {
            self.set(file, space, cluster, 1)?;
        }
        // Blocks, then the table that shows them, then the header that shows the table.
        self.write_blocks(file)?;
        file.write_at(&bytes_of(&self.table), g.offset(first))
            .act("write a larger refcount table")?;
        file.sync().act("make the refcount table durable")?;
        let mut fields = [0; 12];
        bytes::put(&mut fields, 0, &g.offset(first).to_be_bytes());
        let clusters_field = u32::try_from(clusters).unwrap_or(u32::MAX);
        bytes::put(&mut fields, 8, &clusters_field.to_be_bytes());
        let written = file.write_at(&fields, 48).act("write the header");
        let mut now = [0; 12];
        // What the header says counts, whatever came of writing it.
        if written.is_err() && (file.read_at(&mut now, 48).is_err() || now != fields) {
            return written;
        }
        self.new_entries.clear();
        let old = (g.index(self.table_offset), self.table_clusters);
        self.table_offset = g.offset(first);
        self.table_clusters = clusters;
        file.sync().act("make the header durable")?;
        self.retired.push(old);
        Ok(())
    }

    fn write_blocks(&mut self, file: &dyn ImageFile) -> Result<(), ImageError> {
        let dirty = self.blocks.iter().filter(|(_, b)| b.dirty);
        let mut dirty: Vec<u64> = dirty.map(|(n, _)| *n).collect();
        dirty.sort_unstable();
        for block in dirty {
            self.write_block(file, block)?;
        }
        Ok(())
    }

    /// Writes what the file does not have yet. With `ordered`, blocks are durable before the table shows
    /// them, and all is when this returns.
    pub(crate) fn write_back(
        &mut self,
        file: &dyn ImageFile,
        ordered: bool,
    ) -> Result<(), ImageError> {
        if self.new_entries.is_empty() && !self.blocks.values().any(|b| b.dirty) {
            return Ok(());
        }
        self.write_blocks(file)?;
        if ordered {
            file.sync().act("make reference counts durable")?;
        }
        if self.new_entries.is_empty() {
            return Ok(());
        }
        for block in &self.new_entries {
            let entry = self.table.get(index(*block)).copied().unwrap_or_default();
            let at = self.table_offset.saturating_add(block.saturating_mul(8));
            file.write_at(&entry.to_be_bytes(), at)
                .act("write the refcount table")?;
        }
        self.new_entries.clear();
        if ordered {
            file.sync().act("make reference counts durable")?;
        }
        Ok(())
    }

    /// The first cluster from `from` on whose count is 0, below `to`.
    pub(crate) fn first_free(
        &mut self,
        file: &dyn ImageFile,
        host_end: u64,
        from: u64,
        to: u64,
    ) -> Result<Option<u64>, ImageError> {
        let order = self.geometry.refcount_order;
        let entries = self.geometry.block_entries();
        let mut cluster = from;
        while cluster < to {
            let (number, at) = self.split(cluster);
            let Some(block) = self.block(file, host_end, number)? else {
                return Ok(Some(cluster));
            };
            let here = entries.saturating_sub(at).min(to.saturating_sub(cluster));
            let free =
                (at..at.saturating_add(here)).find(|at| read_count(&block.bytes, *at, order) == 0);
            if let Some(free) = free {
                let further = free.saturating_sub(at);
                return Ok(Some(cluster.saturating_add(further)));
            }
            cluster = cluster.saturating_add(here);
        }
        Ok(None)
    }
}

/// Count number `at` of a block.
pub(crate) fn read_count(block: &[u8], at: u64, order: u32) -> u64 {
    let at = index(at);
    match order {
        0..=2 => {
            let bits = 1_usize.wrapping_shl(order);
            let bit = at.saturating_mul(bits);
            let byte = block.get(bit / 8).copied().unwrap_or_default();
            let shift = u32::try_from(bit % 8).unwrap_or_default();
            let mask = 1_u8.wrapping_shl(1_u32.wrapping_shl(order)).wrapping_sub(1);
            u64::from(byte.wrapping_shr(shift) & mask)
        }
        3 => block.get(at).copied().unwrap_or_default().into(),
        4 => u16::from_be_bytes(field(block, at.saturating_mul(2))).into(),
        5 => u32::from_be_bytes(field(block, at.saturating_mul(4))).into(),
        _ => u64::from_be_bytes(field(block, at.saturating_mul(8))),
    }
}

/// Sets count number `at` of a block. The caller has compared `count` with what an entry holds.
pub(crate) fn write_count(block: &mut [u8], at: u64, order: u32, count: u64) {
    let at = index(at);
    let value = count.to_be_bytes();
    match order {
        0..=2 => {
            let bits = 1_u32.wrapping_shl(order);
            let bit = at.saturating_mul(index(bits.into()));
            let shift = u32::try_from(bit % 8).unwrap_or_default();
            let mask = 1_u8.wrapping_shl(bits).wrapping_sub(1).wrapping_shl(shift);
            let [.., low] = value;
            if let Some(byte) = block.get_mut(bit / 8) {
                *byte = (*byte & !mask) | (low.wrapping_shl(shift) & mask);
            }
        }
        order => {
            let width = 1_usize.wrapping_shl(order.saturating_sub(3));
            let from = value.len().saturating_sub(width);
            let value = value.get(from..).unwrap_or_default();
            bytes::put(block, at.saturating_mul(width), value);
        }
    }
}
