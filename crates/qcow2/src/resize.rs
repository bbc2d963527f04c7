//! Growing and shrinking. The caller sees to it that no request is under way.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::bytes::{bytes_of, index, put, wide};
use crate::entry::Entry;
use crate::error::{Act, ImageError};
use crate::file::BackingRead;
use crate::header::MOST_L1_BYTES;
use crate::image::{Image, Shared};
use crate::writer::{Run, Writer};

impl Image {
    /// Gives the disk another size. What is added reads as zeroes, whatever `backing` holds there; what is
    /// cut off is lost. No other call may be under way, and nothing looked up before may be used after.
    ///
    /// # Errors
    /// The size is not possible, the image is damaged or open for reading only, or the file failed.
    pub fn resize(&self, size_bytes: u64, backing: &dyn BackingRead) -> Result<(), ImageError> {
        let old = self.size_bytes();
        let refuse = |reason| Err(ImageError::Resize { size_bytes, reason });
        let mut writer = self.lock()?;
        let g = self.shared.geometry;
        if !size_bytes.is_multiple_of(512) {
            return refuse("the size must be a multiple of 512");
        }
        if self.shared.version < 3 && writer.snapshots > 0 {
            return refuse("snapshots of version 2 do not say how large their disk was");
        }
        let l1_bytes = g.l1_entries(size_bytes).saturating_mul(8);
        if l1_bytes > MOST_L1_BYTES || i64::try_from(size_bytes).is_err() {
            return refuse("the L1 table would be too long for this cluster size");
        }
        if size_bytes < old {
            return writer.shrink(&self.shared, size_bytes);
        }
        writer.grow_l1(&self.shared, g.l1_entries(size_bytes))?;
        drop(writer);
        self.blank(old, size_bytes, backing)?;
        let writer = self.lock()?;
        writer.set_size(&self.shared, size_bytes)
    }

    /// Makes what is about to become visible read as zeroes: the rest of the last cluster, and what the
    /// backing image has there.
    fn blank(&self, old: u64, new: u64, backing: &dyn BackingRead) -> Result<(), ImageError> {
        let g = self.shared.geometry;
        let whole = g.ceil(old);
        self.fill(old, whole.min(new), backing)?;
        let end = new.min(backing.size_bytes());
        if !self.shared.has_backing || end <= whole {
            return Ok(());
        }
        if self.shared.version < 3 {
            return self.fill(whole, end, backing);
        }
        self.zero_clusters(whole, g.ceil(end), false)
    }
}

impl Writer {
    fn set_size(&self, shared: &Shared, size: u64) -> Result<(), ImageError> {
        let file = &*shared.file;
        file.sync().act("make tables durable")?;
        file.write_at(&size.to_be_bytes(), 24)
            .act("write the new size")?;
        file.sync().act("make the new size durable")?;
        shared.size.store(size, Ordering::Release);
        Ok(())
    }

    fn grow_l1(&mut self, shared: &Shared, entries: u64) -> Result<(), ImageError> {
        let g = self.geometry;
        let l1 = shared.l1.read().unwrap_or_else(PoisonError::into_inner);
        let mut table = l1.clone();
        drop(l1);
        let old_bytes = wide(table.len()).saturating_mul(8);
        if entries <= wide(table.len()) {
            return Ok(());
        }
        table.resize(index(entries), 0);
        let bytes = bytes_of(&table);
        let run = self.allocate_table(shared, g.clusters(wide(bytes.len())))?;
        let offset = g.offset(run.first);
        let file = &*shared.file;
        let written = file
            .write_at(&bytes, offset)
            .act("write a larger L1 table")
            .and_then(|()| file.sync().act("make the L1 table durable"));
        if written.is_err() {
            self.unclaim(shared, &[run]);
            return written;
        }
        let mut fields = [0; 12];
        let narrow = u32::try_from(entries).unwrap_or(u32::MAX);
        put(&mut fields, 0, &narrow.to_be_bytes());
        put(&mut fields, 4, &offset.to_be_bytes());
        file.write_at(&fields, 36).act("write the header")?;
        file.sync().act("make the header durable")?;
        *shared.l1.write().unwrap_or_else(PoisonError::into_inner) = table;
        let end = offset.saturating_add(wide(bytes.len()));
        shared.l1_guard.set(offset, end);
        let old = std::mem::replace(&mut self.l1_offset, offset);
        if old_bytes > 0 {
            self.give_back(shared, self.run_of(old, old_bytes))?;
        }
        Ok(())
    }

    /// The size first: entries beyond it do no harm, but a disk without its entries would.
    fn shrink(&mut self, shared: &Shared, size: u64) -> Result<(), ImageError> {
        let g = self.geometry;
        self.set_size(shared, size)?;
        let first = g.index(g.ceil(size));
        let l1 = shared.l1.read().unwrap_or_else(PoisonError::into_inner);
        let tables = wide(l1.len());
        drop(l1);
        let mut gone = Vec::new();
        for l1_index in g.l1_index(first)..tables {
            let start = l1_index.saturating_mul(g.l2_entries());
            let end = start.saturating_add(g.l2_entries());
            self.drop_entries(shared, l1_index, first.max(start), end, &mut gone)?;
        }
        shared.cache.clear();
        shared.decoded.clear();
        shared.file.sync().act("make tables durable")?;
        self.release(shared, &gone)
    }

    /// Takes guest clusters `first..end` out of their L2 table, or the table with them.
    fn drop_entries(
        &mut self,
        shared: &Shared,
        l1_index: u64,
        first: u64,
        end: u64,
        gone: &mut Vec<Run>,
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let Some((table, copied)) = shared.l2_table(l1_index)? else {
            return Ok(());
        };
        // A table with other users goes as a whole if all of it is cut off; its clusters lose one each.
        let whole = g.l2_index(first) == 0;
        let table = match whole {
            true => {
                self.owned(shared, table, copied)?;
                table
            }
            false => self.own_table(shared, l1_index)?,
        };
        let mut cluster = first;
        while cluster < end {
            let slice_end = g.slice_start(g.slice(cluster).saturating_add(1)).min(end);
            let mut entries = vec![0; index(slice_end.saturating_sub(cluster))];
            shared.entries(g.slice(cluster), g.slice_index(cluster), &mut entries)?;
            for (raw, guest) in entries.iter().zip(cluster..) {
                match shared.read_entry(*raw, g.offset(guest))? {
                    Entry::Unallocated | Entry::Zero { kept: None, .. } => {}
                    Entry::Compressed { host, size } => gone.push(self.run_of(host, size)),
                    Entry::Data { host, copied }
                    | Entry::Zero {
                        kept: Some(host),
                        copied,
                    } => {
                        self.owned(shared, host, copied)?;
                        gone.push(self.run_of(host, 1));
                    }
                }
            }
            if !whole {
                let none = vec![0; entries.len()];
                self.show(shared, table, cluster, &none)?;
            }
            cluster = slice_end;
        }
        if whole {
            self.set_l1(shared, l1_index, 0)?;
            gone.push(self.run_of(table, 1));
        }
        Ok(())
    }
}
