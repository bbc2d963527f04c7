//! Looks an image over, as `qemu-img check` does.

use crate::bytes::{entries_of, index};
use crate::error::{Act, ImageError, OpenError};
use crate::file::ImageFile;
use crate::header::{CORRUPT, DIRTY, Header};
use crate::recount::{Outcome, Recount, Repair};
use crate::refcounts::{Refcounts, Space};
use crate::scan::{Findings, Scan};

/// What a check found. Repaired faults are counted apart from those that are left.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Report {
    /// Faults that may cost data.
    pub corruptions: u64,
    /// Clusters that nobody uses, and that are not free.
    pub leaks: u64,
    /// Faults that were repaired.
    pub corruptions_fixed: u64,
    /// Clusters that were made free.
    pub leaks_fixed: u64,
    /// The first faults in words.
    pub findings: Vec<String>,
}

/// A check could not be done.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its tables cannot be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// Compares what an image refers to with what it says is in use. Nobody else may have it open for writing.
///
/// # Errors
/// The image cannot be opened, is too large to be counted, or the file failed.
pub fn check(file: &dyn ImageFile, repair: Repair) -> Result<Report, CheckError> {
    let header = Header::read(file)?;
    let geometry = header.geometry;
    let mut bytes = vec![0; index(header.l1_bytes())];
    file.read_at(&mut bytes, header.l1_offset)
        .act("read the L1 table")?;
    let mut l1: Vec<u64> = entries_of(&bytes).collect();
    let mut counts = Refcounts::read(file, &header)?;
    let len = geometry.ceil(header.file_len);
    let mut scan = Scan::new(file, &header);
    scan.run(&l1, counts.table())?;
    let (mut references, damage) = (scan.references, scan.damage);
    let mut space = Space {
        end: geometry.index(len),
        len,
    };
    // Clusters that are in use through damaged entries look like leaks.
    let repair = match damage.count {
        0 => repair,
        _ => Repair::No,
    };
    let mut recount = Recount {
        file,
        header: &header,
        counts: &mut counts,
        space: &mut space,
        repair,
        outcome: Outcome::default(),
        findings: Findings::default(),
    };
    recount.run(&mut references, &mut l1)?;
    let (outcome, findings) = (recount.outcome, recount.findings);
    let corruptions = outcome.corruptions.saturating_add(damage.count);
    let stale = header.incompatible & (DIRTY | CORRUPT);
    if repair == Repair::All && corruptions == 0 && stale != 0 {
        let bits = header.incompatible & !(DIRTY | CORRUPT);
        file.write_at(&bits.to_be_bytes(), 72)
            .and_then(|()| file.sync())
            .act("mark the image clean")?;
    }
    let mut list = damage.list;
    list.extend(findings.list);
    Ok(Report {
        corruptions,
        leaks: outcome.leaks,
        corruptions_fixed: outcome.corruptions_fixed,
        leaks_fixed: outcome.leaks_fixed,
        findings: list,
    })
}
