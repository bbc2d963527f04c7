//! Finding clusters, counting them, and giving them back.

use std::sync::PoisonError;

use super::{Run, Writer};
use crate::error::{Act, ImageError};
use crate::image::Shared;

/// How many counts one allocation looks at for a hole before it takes a new cluster at the end of the
/// file: a fragmented image must not make a write wait for a search through all of it.
const MOST_SEARCHED: u64 = 64 << 10;
/// How often an allocation skips clusters beyond the end that claim to be in use, in a hostile image.
const MOST_SKIPPED: u32 = 1024;
/// Clusters that version 2 counts ahead, so that not every allocation waits for the disk. They are a leak
/// if the image is not closed.
const RESERVED_CLUSTERS: u64 = 32;
/// Most ranges that wait for a flush to be given back. A guest that overwrites compressed clusters and
/// never flushes would otherwise fill memory.
const MOST_PENDING: usize = 4096;

impl Writer {
    /// Finds up to `wanted` clusters in a row and counts them. In version 2 the counts are durable.
    pub(crate) fn allocate(&mut self, shared: &Shared, wanted: u64) -> Result<Run, ImageError> {
        let file = &*shared.file;
        self.mark(file)?;
        if self.lazy {
            return self.claim(shared, wanted);
        }
        if self.reserve.len == 0 {
            let claimed = self.claim(shared, wanted.max(RESERVED_CLUSTERS))?;
            self.count_durably(shared, claimed)?;
            self.reserve = claimed;
        }
        let len = wanted.min(self.reserve.len);
        let run = Run {
            len,
            ..self.reserve
        };
        self.reserve.first = self.reserve.first.saturating_add(len);
        self.reserve.len = self.reserve.len.saturating_sub(len);
        Ok(run)
    }

    /// Like [`allocate`](Self::allocate), all in a row at the end of the file.
    pub(crate) fn allocate_table(&mut self, shared: &Shared, len: u64) -> Result<Run, ImageError> {
        self.mark(&*shared.file)?;
        let run = self.claim_new(shared, len)?;
        if !self.lazy {
            self.count_durably(shared, run)?;
        }
        Ok(run)
    }

    fn count_durably(&mut self, shared: &Shared, run: Run) -> Result<(), ImageError> {
        let counted = self.counts.write_back(&*shared.file, true);
        if counted.is_err() {
            self.unclaim(shared, &[run]);
        }
        counted
    }

    fn claim(&mut self, shared: &Shared, wanted: u64) -> Result<Run, ImageError> {
        match self.claim_hole(shared, wanted)? {
            Some(run) => Ok(run),
            None => self.claim_new(shared, wanted),
        }
    }

    fn claim_hole(&mut self, shared: &Shared, wanted: u64) -> Result<Option<Run>, ImageError> {
        let file = &*shared.file;
        let from = self.search;
        let to = self.space.end.min(from.saturating_add(MOST_SEARCHED));
        if from >= to {
            return Ok(None);
        }
        let len = self.space.len;
        let Some(first) = self.counts.first_free(file, len, from, to)? else {
            self.search = to;
            return Ok(None);
        };
        let mut end = first.saturating_add(1);
        while end < to
            && end.saturating_sub(first) < wanted
            && self.counts.get(file, len, end)? == 0
        {
            end = end.saturating_add(1);
        }
        let run = Run {
            first,
            len: end.saturating_sub(first),
            fresh: false,
        };
        self.search = end;
        self.count(shared, run)?;
        Ok(Some(run))
    }

    fn claim_new(&mut self, shared: &Shared, len: u64) -> Result<Run, ImageError> {
        let file = &*shared.file;
        for _ in 0..MOST_SKIPPED {
            let first = self.space.take(file, self.geometry, len)?;
            let end = first.saturating_add(len);
            let used = (first..end).try_fold(0, |used, cluster| {
                let count = self.counts.get(file, self.space.len, cluster)?;
                Ok::<_, ImageError>(used | count)
            })?;
            if used != 0 {
                continue;
            }
            let run = Run {
                first,
                len,
                fresh: true,
            };
            self.count(shared, run)?;
            return Ok(run);
        }
        Err(ImageError::Limit {
            what: "clusters beyond the end of the file that claim to be in use",
            limit: MOST_SKIPPED.into(),
        })
    }

    fn count(&mut self, shared: &Shared, run: Run) -> Result<(), ImageError> {
        self.check_free(shared, run)?;
        let file = &*shared.file;
        let clusters = run.first..run.first.saturating_add(run.len);
        let counted = clusters
            .clone()
            .try_for_each(|cluster| self.counts.set(file, &mut self.space, cluster, 1));
        if counted.is_err() {
            for cluster in clusters {
                if matches!(self.counts.get(file, self.space.len, cluster), Ok(1)) {
                    let _ = self.counts.set(file, &mut self.space, cluster, 0);
                }
            }
            self.search = self.search.min(run.first);
            self.publish(shared);
            return counted;
        }
        let retired = std::mem::take(&mut self.counts.retired);
        self.pending.extend(retired.iter().map(|(first, len)| Run {
            first: *first,
            len: *len,
            fresh: false,
        }));
        self.publish(shared);
        Ok(())
    }

    /// Refuses a "free" cluster that a table lies in: the image's counts cannot be trusted then.
    fn check_free(&self, shared: &Shared, run: Run) -> Result<(), ImageError> {
        let start = self.geometry.offset(run.first);
        let end = start.saturating_add(self.geometry.offset(run.len));
        let overlap = |host_offset, what| Err(ImageError::Overlap { host_offset, what });
        for cluster in run.first..run.first.saturating_add(run.len) {
            let host = self.geometry.offset(cluster);
            if let Some(what) = shared.guarded(host) {
                return overlap(host, what);
            }
        }
        let within = |entry: &&u64| {
            let host = **entry & crate::entry::OFFSET_MASK;
            (start..end).contains(&host)
        };
        let l1 = shared.l1.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = l1.iter().find(within) {
            return overlap(*entry & crate::entry::OFFSET_MASK, "L2 table");
        }
        if let Some(entry) = self.counts.table().iter().find(within) {
            return overlap(*entry, "refcount block");
        }
        Ok(())
    }

    /// Remembers that a reference is gone, for [`release`](Self::release) after the next flush.
    pub(crate) fn give_back(&mut self, shared: &Shared, run: Run) -> Result<(), ImageError> {
        self.pending.push(run);
        if self.pending.len() < MOST_PENDING {
            return Ok(());
        }
        let pending = std::mem::take(&mut self.pending);
        shared.file.sync().act("make tables durable")?;
        self.release(shared, &pending)
    }

    /// Takes references off, the tables that held them being durable without.
    pub(crate) fn release(&mut self, shared: &Shared, runs: &[Run]) -> Result<(), ImageError> {
        if runs.is_empty() {
            return Ok(());
        }
        // Counts that are too high are a leak at worst, so this needs no order.
        let file = &*shared.file;
        self.mark(file)?;
        for run in runs {
            for cluster in run.first..run.first.saturating_add(run.len) {
                let count = self.counts.get(file, self.space.len, cluster)?;
                let Some(count) = count.checked_sub(1) else {
                    log::warn!("qcow2: cluster {cluster} is given back, but was not in use");
                    continue;
                };
                self.counts.set(file, &mut self.space, cluster, count)?;
                if count == 0 {
                    self.search = self.search.min(cluster);
                }
            }
        }
        if !self.lazy {
            self.counts.write_back(file, false)?;
        }
        Ok(())
    }

    /// Clusters that were found and that no table shows are free again: a guest that writes to a full disk over and over
    /// must not use them up.
    pub(crate) fn unclaim(&mut self, shared: &Shared, runs: &[Run]) {
        if let Err(e) = self.release(shared, runs) {
            log::debug!("qcow2: clusters are lost that were to be given back: {e}");
        }
    }
}
