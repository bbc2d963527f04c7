//! Zeroes and discards.
//!
//! A discarded cluster stays allocated: it gets the zero flag, and its space goes back to the file system
//! as a hole. Were it given back to the image, it could become a cluster of another guest offset while a
//! write in place, looked up before the discard, is still on its way to it, and that write would land in
//! the other's data. So a place, once given to a guest offset, stays there until the image is closed.

use crate::bytes::index;
use crate::entry::{COPIED, Entry, ZERO};
use crate::error::ImageError;
use crate::file::BackingRead;
use crate::image::{Extent, Image, Shared};
use crate::writer::{Run, Writer};

/// Zeroes that are written at once, where zeroes must be written.
const MOST_ZEROES_BYTES: u64 = 256 << 10;

impl Image {
    /// Makes `len` bytes at `offset` read as zeroes. `may_unmap` says that their space may go back to the
    /// file system; whole clusters keep their place in the image in either case.
    ///
    /// # Errors
    /// As [`write_allocating`](Self::write_allocating).
    pub fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        may_unmap: bool,
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        drop(self.lock()?);
        self.shared.check_range(offset, len)?;
        let end = offset.saturating_add(len);
        if self.shared.version < 3 {
            return self.fill(offset, end, backing);
        }
        let (from, to) = self.whole_clusters(offset, end);
        if from >= to {
            return self.fill(offset, end, backing);
        }
        self.fill(offset, from, backing)?;
        self.zero_clusters(from, to, may_unmap)?;
        self.fill(to.min(end), end, backing)
    }

    /// Says that `len` bytes at `offset` are of no use any more. Whole clusters read as zeroes from now
    /// on; version 2 has no way to say so and ignores it.
    ///
    /// # Errors
    /// As [`write_allocating`](Self::write_allocating).
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        drop(self.lock()?);
        self.shared.check_range(offset, len)?;
        let (from, to) = self.whole_clusters(offset, offset.saturating_add(len));
        if self.shared.version < 3 || from >= to {
            return Ok(());
        }
        self.zero_clusters(from, to, true)
    }

    /// The clusters that lie in a range as a whole; the last one of the disk may be cut short.
    fn whole_clusters(&self, offset: u64, end: u64) -> (u64, u64) {
        let g = self.shared.geometry;
        let to = match end == self.size_bytes() {
            true => g.ceil(end),
            false => g.floor(end),
        };
        (g.ceil(offset), to)
    }

    /// Writes zeroes, where there is something else.
    pub(crate) fn fill(
        &self,
        offset: u64,
        end: u64,
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        let mut at = offset;
        let mut zeroes = Vec::new();
        while at < end {
            let mut writer = self.lock()?;
            let len = end.saturating_sub(at);
            let done = match self.shared.lookup(at, len)? {
                Extent::Zero { len } => len,
                Extent::Backing { len } if !self.shared.has_backing => len,
                Extent::Data { len, .. } | Extent::Backing { len } | Extent::Compressed { len } => {
                    let len = len.min(MOST_ZEROES_BYTES);
                    zeroes.resize(index(len), 0);
                    writer.write(&self.shared, at, &zeroes, backing)?;
                    len
                }
            };
            at = at.saturating_add(done);
        }
        Ok(())
    }

    /// Sets the zero flag of clusters from `from` to `to`, both on cluster boundaries.
    pub(crate) fn zero_clusters(&self, from: u64, to: u64, unmap: bool) -> Result<(), ImageError> {
        let g = self.shared.geometry;
        let (mut cluster, end) = (g.index(from), g.index(to));
        while cluster < end {
            let slice_end = g.slice_start(g.slice(cluster).saturating_add(1)).min(end);
            let mut writer = self.lock()?;
            writer.zero_slice(&self.shared, cluster, slice_end, unmap)?;
            cluster = slice_end;
        }
        Ok(())
    }
}

impl Writer {
    /// Sets the zero flag of guest clusters `first..end` of one slice.
    fn zero_slice(
        &mut self,
        shared: &Shared,
        first: u64,
        end: u64,
        unmap: bool,
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let l1_index = g.l1_index(first);
        if !shared.has_backing && shared.l2_table(l1_index)?.is_none() {
            return Ok(());
        }
        let mut old = vec![0; index(end.saturating_sub(first))];
        shared.entries(g.slice(first), g.slice_index(first), &mut old)?;
        let mut new = Vec::with_capacity(old.len());
        let mut holes: Vec<u64> = Vec::new();
        let mut gone: Vec<Run> = Vec::new();
        for (raw, cluster) in old.iter().zip(first..) {
            new.push(match shared.read_entry(*raw, g.offset(cluster))? {
                Entry::Unallocated if shared.has_backing => ZERO,
                Entry::Unallocated | Entry::Zero { kept: None, .. } => *raw,
                Entry::Compressed { host, size } => {
                    gone.push(self.run_of(host, size));
                    ZERO
                }
                Entry::Data { host, copied }
                | Entry::Zero {
                    kept: Some(host),
                    copied,
                } => match self.owned(shared, host, copied)? {
                    true => {
                        holes.push(host);
                        host | COPIED | ZERO
                    }
                    false => {
                        gone.push(self.run_of(host, 1));
                        ZERO
                    }
                },
            });
        }
        if old != new {
            let table = self.own_table(shared, l1_index)?;
            self.show(shared, table, first, &new)?;
        }
        for run in gone {
            self.give_back(shared, run)?;
        }
        if unmap {
            self.punch(shared, &holes);
        }
        Ok(())
    }

    /// Gives space back to the file system. It is no loss if that fails.
    fn punch(&mut self, shared: &Shared, clusters: &[u64]) {
        let size = self.geometry.cluster_size();
        let mut rest = clusters;
        while let (Some(first), false) = (rest.first(), self.no_holes) {
            let run = rest
                .iter()
                .zip(0_u64..)
                .take_while(|(host, n)| first.checked_add(n.saturating_mul(size)) == Some(**host))
                .count();
            let len = size.saturating_mul(crate::bytes::wide(run));
            match shared.file.punch_hole(*first, len) {
                Ok(true) => {}
                Ok(false) => self.no_holes = true,
                Err(e) => log::debug!("qcow2: no hole at {first:#x}: {e}"),
            }
            rest = rest.get(run..).unwrap_or_default();
        }
    }
}
