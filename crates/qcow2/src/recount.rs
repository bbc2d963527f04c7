//! Compares reference counts with the references there are, and puts them right: for
//! [`check`](crate::check()), and when an image is opened for writing that was not closed.

use crate::bytes::{bytes_of, entries_of, wide};
use crate::entry::{COMPRESSED, COPIED, OFFSET_MASK, read_l1, read_refcount};
use crate::error::{Act, ImageError};
use crate::file::ImageFile;
use crate::header::Header;
use crate::refcounts::{Refcounts, Space};
use crate::scan::{Findings, References, Scan};

/// What is put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the file is only read.
    No,
    /// Clusters that nobody uses become free.
    Leaks,
    /// Counts and flags, too. An image with entries that point outside the file or make no sense is left
    /// as it is: what they once meant is still in use.
    All,
}

/// What was found, not counting what was repaired.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) corruptions: u64,
    pub(crate) leaks: u64,
    pub(crate) corruptions_fixed: u64,
    pub(crate) leaks_fixed: u64,
}

fn bump(n: &mut u64) {
    *n = n.saturating_add(1);
}

/// One comparison.
pub(crate) struct Recount<'a> {
    pub(crate) file: &'a dyn ImageFile,
    pub(crate) header: &'a Header,
    pub(crate) counts: &'a mut Refcounts,
    pub(crate) space: &'a mut Space,
    pub(crate) repair: Repair,
    pub(crate) outcome: Outcome,
    pub(crate) findings: Findings,
}

impl Recount<'_> {
    pub(crate) fn run(
        &mut self,
        references: &mut References,
        l1: &mut [u64],
    ) -> Result<(), ImageError> {
        self.blocks(references);
        self.compare(references)?;
        self.missing(references)?;
        for (first, len) in std::mem::take(&mut self.counts.retired) {
            for cluster in first..first.saturating_add(len) {
                self.counts.set(self.file, self.space, cluster, 0)?;
            }
        }
        self.flags(l1)?;
        if self.repair != Repair::No {
            self.counts.write_back(self.file, true)?;
        }
        Ok(())
    }

    /// Counts one mismatch; says whether it is to be repaired.
    fn judge(&mut self, is_leak: bool, what: impl FnOnce() -> String) -> bool {
        let fix = match self.repair {
            Repair::No => false,
            Repair::Leaks => is_leak,
            Repair::All => true,
        };
        bump(match (is_leak, fix) {
            (true, true) => &mut self.outcome.leaks_fixed,
            (true, false) => &mut self.outcome.leaks,
            (false, true) => &mut self.outcome.corruptions_fixed,
            (false, false) => &mut self.outcome.corruptions,
        });
        self.findings.note(what);
        fix
    }

    /// Refcount blocks that cannot be where they are said to be.
    fn blocks(&mut self, references: &mut References) {
        let geometry = self.header.geometry;
        for (raw, number) in self.counts.table().to_vec().into_iter().zip(0_u64..) {
            match read_refcount(raw, geometry, self.space.len) {
                Ok(0) => {}
                Ok(host) => {
                    let cluster = geometry.index(host);
                    if references.get(cluster) <= 1 {
                        continue;
                    }
                    let what = || format!("refcount block {number} at {host:#x} is shared");
                    if self.judge(false, what) {
                        references.remove_one(cluster);
                        self.counts.drop_block(number);
                    }
                }
                Err(fault) => {
                    let what =
                        || format!("entry {number} of the refcount table, {raw:#018x}: {fault}");
                    if self.judge(false, what) {
                        self.counts.drop_block(number);
                    }
                }
            }
        }
    }

    /// Whether there is a block for a cluster.
    fn has_block(&self, number: u64) -> bool {
        let entry = self.counts.table().get(crate::bytes::index(number));
        let entry = entry.copied().unwrap_or_default();
        let valid = read_refcount(entry, self.header.geometry, self.space.len);
        valid.is_ok_and(|host| host != 0)
    }

    /// Every count of every block.
    fn compare(&mut self, references: &References) -> Result<(), ImageError> {
        let entries = self.header.geometry.block_entries();
        let host_end = self.space.len;
        for number in 0..wide(self.counts.table().len()) {
            if !self.has_block(number) {
                continue;
            }
            let first = number.saturating_mul(entries);
            for cluster in first..first.saturating_add(entries) {
                let found = self.counts.get(self.file, host_end, cluster)?;
                self.settle(cluster, found, references.get(cluster))?;
            }
        }
        Ok(())
    }

    fn settle(&mut self, cluster: u64, found: u64, wanted: u64) -> Result<(), ImageError> {
        if found == wanted {
            return Ok(());
        }
        let what = || format!("cluster {cluster} is counted {found} times and used {wanted} times");
        if self.judge(found > wanted, what) {
            self.counts.set(self.file, self.space, cluster, wanted)?;
        }
        Ok(())
    }

    /// Clusters in use for which there is no block.
    fn missing(&mut self, references: &References) -> Result<(), ImageError> {
        let entries = self.header.geometry.block_entries();
        let had: Vec<bool> = (0..wide(self.counts.table().len()))
            .map(|number| self.has_block(number))
            .collect();
        for (cluster, wanted) in references.used() {
            let number = cluster.checked_div(entries).unwrap_or_default();
            let had = had.get(crate::bytes::index(number)).copied();
            if !had.unwrap_or_default() {
                self.settle(cluster, 0, wanted)?;
            }
        }
        Ok(())
    }

    /// Flags of active entries that say who may be written in place.
    fn flags(&mut self, l1: &mut [u64]) -> Result<(), ImageError> {
        let geometry = self.header.geometry;
        let mut bytes = vec![0; geometry.cluster_len()];
        for (raw, number) in l1.iter_mut().zip(0_u64..) {
            let Ok((table, copied)) = read_l1(*raw, geometry, self.space.len) else {
                continue;
            };
            if table == 0 {
                continue;
            }
            if self.flag_is_wrong(table, copied)? {
                let what = || format!("the flag of entry {number} of the L1 table is wrong");
                if self.judge(false, what) {
                    *raw ^= COPIED;
                    let at = self
                        .header
                        .l1_offset
                        .saturating_add(number.saturating_mul(8));
                    self.file
                        .write_at(&raw.to_be_bytes(), at)
                        .act("write the L1 table")?;
                }
            }
            self.file
                .read_at(&mut bytes, table)
                .act("read an L2 table")?;
            let mut entries: Vec<u64> = entries_of(&bytes).collect();
            if self.l2_flags(&mut entries)? {
                self.file
                    .write_at(&bytes_of(&entries), table)
                    .act("write an L2 table")?;
            }
        }
        Ok(())
    }

    /// Puts the flags of an L2 table right; says whether one was wrong.
    fn l2_flags(&mut self, entries: &mut [u64]) -> Result<bool, ImageError> {
        let mut changed = false;
        for raw in entries {
            let host = *raw & OFFSET_MASK;
            let plain = *raw & COMPRESSED == 0 && host != 0 && host < self.space.len;
            if plain && self.flag_is_wrong(host, *raw & COPIED != 0)? {
                let what = || format!("the flag of entry {raw:#018x} of an L2 table is wrong");
                if self.judge(false, what) {
                    *raw ^= COPIED;
                    changed = true;
                }
            }
        }
        Ok(changed)
    }

    fn flag_is_wrong(&mut self, host: u64, copied: bool) -> Result<bool, ImageError> {
        let cluster = self.header.geometry.index(host);
        // A damaged entry of the refcount table was told already.
        let entries = self.header.geometry.block_entries();
        if !self.has_block(cluster.checked_div(entries).unwrap_or_default()) {
            return Ok(copied);
        }
        let count = self.counts.get(self.file, self.space.len, cluster)?;
        Ok(copied != (count == 1))
    }
}

/// Makes the counts of an image right that was not closed, and cuts what lies behind its last cluster. If
/// tables are damaged, nobody knows what is in use: that is left to a tool.
pub(crate) fn rebuild(
    file: &dyn ImageFile,
    header: &Header,
    l1: &mut [u64],
    counts: &mut Refcounts,
    space: &mut Space,
) -> Result<(), ImageError> {
    let mut scan = Scan::new(file, header);
    scan.run(l1, counts.table())?;
    if scan.damage.count > 0 {
        return Err(ImageError::Damaged {
            count: scan.damage.count,
            first: scan.damage.list.first().cloned().unwrap_or_default(),
        });
    }
    let mut references = scan.references;
    space.end = references.end();
    let len = header.geometry.offset(space.end);
    if len < space.len {
        file.set_len(len).act("cut the unused end of the image")?;
        space.len = len;
    }
    let mut recount = Recount {
        file,
        header,
        counts,
        space,
        repair: Repair::All,
        outcome: Outcome::default(),
        findings: Findings::default(),
    };
    recount.run(&mut references, l1)?;
    let outcome = recount.outcome;
    log::info!(
        "qcow2: the image was not closed; {} counts were too high, {} too low or flags wrong",
        outcome.leaks_fixed,
        outcome.corruptions_fixed
    );
    Ok(())
}
