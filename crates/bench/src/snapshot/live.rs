//! Snapshots of guests that go on, against the size of their memory.
//!
//! Does not know what becomes of the times.

use std::path::Path;

use anyhow::Context;

use super::life::{Arrivals, BEAT_PAGES, Files, Process, Shape};
use super::table::Row;
use super::{Plan, milliseconds};
use crate::vmm::Vmm;

/// Snapshots of a guest of `mib` that changes `window_mib` for ever, in `folder`: one of all of its memory, and one of what has changed since.
pub(super) fn measure(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    window_mib: u64,
    folder: &Path,
    add: &mut dyn FnMut(Row, f64),
) -> anyhow::Result<()> {
    let shape = Shape {
        memory_mib: mib,
        window_mib,
        beat_pages: BEAT_PAGES,
        pause_us: 500,
        tracks_pages: true,
        tap: None,
    };
    let arrivals = Arrivals::new()?;
    let (full, diff) = (Files::new(folder, "live"), Files::new(folder, "live-diff"));
    let mut guest = Process::boot(plan, vmm, &shape, &arrivals).context("boot")?;
    let live = guest.take_live(&full, "Full")?;
    add(Row::LiveFull, milliseconds(live.still));
    add(Row::LiveFullWritten, milliseconds(live.written));
    guest.change_all(&shape)?;
    let live = guest.take_live(&diff, "Diff")?;
    add(Row::LiveDiff, milliseconds(live.still));
    add(Row::LiveDiffWritten, milliseconds(live.written));
    Ok(())
}
