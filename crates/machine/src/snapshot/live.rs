//! Live snapshots, control's side: most of memory is written while the guest runs, round by round, and what it has changed meanwhile is
//! written again. When little is left, the machine stands still for as long as it takes to capture that.

use std::sync::mpsc::Receiver;
use std::time::Instant;

use alveole_guest_memory::PageSet;
use alveole_hypervisor::NotedFrom;
use alveole_vm_config::SnapshotType;

use crate::control::Tick;
use crate::lifecycle::Lifecycle;
use crate::snapshot::state::LayerV1;
use crate::{End, Event, Machine};

/// So few pages are captured at once: the child that has them costs the guest a millisecond or two.
const FEW_PAGES: u64 = 2048;
/// Rounds after which a guest that writes faster than its memory is written out is stopped all the same.
const MAX_ROUNDS: u32 = 8;

impl Machine {
    /// Begins to write memory while the guest runs.
    pub(super) fn begin_ahead(
        &mut self,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Option<End> {
        if !self.tracking.is_on {
            // Writes of devices are noted from a moment on at which none works.
            let start = Instant::now();
            if let Some(end) = self.pause(events, tick) {
                return Some(end);
            }
            let tracked = self.begin_tracking(NotedFrom::FirstTake);
            self.resume();
            self.stood_still_since(start);
            if let Err(why) = tracked {
                self.snapshot_failed(why);
                return None;
            }
        }
        let create = self.tracking.underway.as_ref().map(|u| u.create.clone());
        match (create, &self.files) {
            (Some(create), Some(files)) => files.prepare(create, self.ram.clone()),
            _ => self.snapshot_failed("this machine has no thread that writes files".into()),
        }
        None
    }

    /// The files are made, or another round has been written.
    pub(crate) fn go_on_ahead(
        &mut self,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Option<End> {
        let Some(underway) = &self.tracking.underway else {
            return None;
        };
        let (rounds, kind) = (underway.rounds, underway.create.snapshot_type);
        let next = match self.next_round(rounds, kind) {
            Ok(next) => next,
            Err(why) => {
                self.snapshot_failed(why);
                return None;
            }
        };
        let is_last = rounds > 0
            && (next.count() <= FEW_PAGES
                || rounds >= MAX_ROUNDS
                || self.state != Lifecycle::Running);
        if let Some(underway) = &mut self.tracking.underway {
            underway.rounds = rounds.saturating_add(1);
            underway.again = Some(match is_last {
                true => next.clone(),
                false => PageSet::none(self.ram.pages()),
            });
        }
        if is_last {
            return self.capture(events, tick);
        }
        if let Some(files) = &self.files {
            files.ahead(next);
        }
        None
    }

    /// What the next round writes: at first all that the snapshot has, then what has changed since that was asked for, which is before any of it is
    /// written.
    fn next_round(&mut self, rounds: u32, kind: SnapshotType) -> Result<PageSet, String> {
        let changed = self.take_dirty()?;
        self.note_unsaved(&changed);
        if rounds > 0 {
            return Ok(changed);
        }
        Ok(self.whole(kind))
    }

    /// What has changed since the last round, with the machine standing still; and which files have the rest of a diff.
    pub(super) fn pages_left(
        &mut self,
        kind: SnapshotType,
    ) -> Result<(PageSet, Vec<LayerV1>), String> {
        let mut left = self.take_changed()?;
        if let Some(again) = self.tracking.underway.as_mut().and_then(|u| u.again.take()) {
            left.union(&again);
        }
        Ok((left, self.base(kind).to_vec()))
    }

    /// Pages that the next diff has to have, should this snapshot fail.
    pub(super) fn note_unsaved(&mut self, pages: &PageSet) {
        if self.tracking.is_on {
            match &mut self.tracking.unsaved {
                Some(unsaved) => unsaved.union(pages),
                none => *none = Some(pages.clone()),
            }
        }
    }

    /// Notes what is written, for the snapshot that is being written. The machine stands still.
    pub(super) fn begin_tracking(&mut self, from: NotedFrom) -> Result<(), String> {
        if let Some(underway) = &mut self.tracking.underway {
            underway.tracks_for_this = true;
        }
        let tracked = self.partition.track_dirty(&self.ram, from);
        self.ram.track_writes();
        tracked.map_err(|e| e.to_string())
    }

    /// Whether what is noted for the snapshot that is being written is to be noted after it, too.
    pub(super) fn tracks_on(&self) -> bool {
        let underway = self.tracking.underway.as_ref();
        underway.is_some_and(|u| u.tracks_for_this && u.create.track_dirty_pages)
    }

    /// Notes no more what is written, where that was for one snapshot.
    pub(super) fn end_ahead(&mut self) {
        let Some(underway) = &mut self.tracking.underway else {
            return;
        };
        if !std::mem::take(&mut underway.tracks_for_this) {
            return;
        }
        self.ram.stop_tracking_writes();
        if let Err(e) = self.partition.untrack_dirty(&self.ram) {
            log::warn!("pages that the guest writes are noted on, which costs it time: {e}");
        }
    }
}
