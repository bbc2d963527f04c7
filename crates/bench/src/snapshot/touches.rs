//! What it costs a restored guest to write pages that it has not touched yet, with the memory file in the page cache, and with the
//! file on a disk only.
//!
//! Does not know what becomes of the times.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::{Advice, fadvise};
use serde_json::json;

use super::life::{Arrivals, BEAT, Files, Process, Shape};
use super::table::{Case, Place, Row};
use super::{Plan, Samples};
use crate::vmm::{Kind, Vmm, utf8};

/// What the guest changes, and how much of it between two beats: 8 MiB, so that a beat itself is a small part of the time.
const WINDOW_MIB: u64 = 32;
const BEAT_PAGES: u64 = 2048;
/// Beats until the window has been changed once.
const BEATS: usize = (WINDOW_MIB << 20) as usize / (BEAT_PAGES as usize * 4096);
/// After so much of a guest's running it is recorded what it has touched.
const SET_MS: u64 = 500;
/// Between two beats.
const PAUSE_US: u32 = 1000;

/// Restores a guest of `mib` from `folder`, which the host has in memory, or, if it is on a disk, has forgotten.
pub(super) fn measure(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    folder: &Path,
    is_disk: bool,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let shape = Shape {
        memory_mib: mib,
        window_mib: WINDOW_MIB,
        beat_pages: BEAT_PAGES,
        pause_us: PAUSE_US,
        tracks_pages: false,
        tap: None,
    };
    let arrivals = Arrivals::new()?;
    let files = Files::new(folder, "touches");
    let mut guest = Process::boot(plan, vmm, &shape, &arrivals).context("boot")?;
    guest.take_full(&files).context("full snapshot")?;
    drop(guest);
    let place = if is_disk { Place::Cold } else { Place::Warm };
    if is_disk {
        forget(&files.memory).context("drop the memory file from the page cache")?;
    }
    let case = Case { place, number: mib };
    let folder = plan.scratch.join("touches");
    let mut process = Process::start(plan, vmm, &folder, &arrivals)?;
    process.load(&files)?;
    samples.push((case, Row::FirstTouch, touch(&mut process)?));
    let again = process.run.wait_for_many(BEAT, BEATS);
    let before = again.map_err(anyhow::Error::msg)?;
    let second = process.beat()?.saturating_sub(before);
    samples.push((case, Row::SecondTouch, each(second)));
    drop(process);
    // Peers know no such thing.
    if vmm.kind != Kind::Alveole {
        return Ok(());
    }
    let set = plan.scratch.join("touches.set");
    let _ = fs::remove_file(&set);
    let with_set = json!({"working_set_path": utf8(&set)?, "working_set_ms": SET_MS});
    let mut process = Process::start(plan, vmm, &folder, &arrivals)?;
    process.load_with(&files, with_set.clone())?;
    let until = Instant::now() + plan.patience;
    while !set.exists() {
        if Instant::now() > until {
            bail!(process.run.failure("it records no working set"));
        }
        thread::sleep(Duration::from_millis(1));
        process.run.drain();
    }
    drop(process);
    if is_disk {
        forget(&files.memory).context("drop the memory file from the page cache")?;
    }
    let mut process = Process::start(plan, vmm, &folder, &arrivals)?;
    process.load_with(&files, with_set)?;
    samples.push((case, Row::AheadTouch, touch(&mut process)?));
    Ok(())
}

/// What it costs a guest that was just restored to write a page, in microseconds. Its first beat comes from somewhere in the middle of its pages;
/// the next is of pages that were not touched.
fn touch(process: &mut Process) -> anyhow::Result<f64> {
    let before = process.beat()?;
    Ok(each(process.beat()?.saturating_sub(before)))
}

/// Microseconds for each page between two beats that are so far apart.
fn each(time: Duration) -> f64 {
    let touching = time.saturating_sub(Duration::from_micros(PAUSE_US.into()));
    touching.as_secs_f64() * 1e6 / BEAT_PAGES as f64
}

/// Has the host forget what it has of a file's data, which is on the disk then: posix_fadvise(2).
fn forget(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}
