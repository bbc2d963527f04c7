//! The state of a whole machine, asked of its parts while it stands still.

use std::sync::PoisonError;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use alveole_guest_memory::{MAX_LAYERS, PageSet};
use alveole_hypervisor::{CpuState, NotedFrom};
use alveole_saved_state::{SavedState, StateFile};
use alveole_vcpu::{Order, ReportKind};
use alveole_virtio_blk::BlkHandle;
use alveole_vm_config::{SnapshotCreate, SnapshotType};
use alveole_vm_control::{Answer, Command, Refusal, Reply, SnapshotTaken};

use crate::build::Transport;
use crate::control::Tick;
use crate::lifecycle::Lifecycle;
use crate::snapshot::state::{self, LayerV1, MachineStateV1, TransportV1};
use crate::snapshot::{LAYOUT, SnapshotJob, Taken};
use crate::{End, Event, Machine};

/// What a machine knows of the snapshots of it.
#[derive(Default)]
pub(crate) struct Tracking {
    /// Whether written pages are noted.
    pub(crate) is_on: bool,
    /// The memory files of the last snapshot, which a diff builds upon.
    pub(crate) layers: Vec<LayerV1>,
    /// Pages that were noted and are in none of them: a snapshot failed, or is being written.
    pub(super) unsaved: Option<PageSet>,
    /// The one that is being written.
    pub(super) underway: Option<Underway>,
    /// A round of it was written while control waited for something else.
    pub(crate) ahead_waits: bool,
}

impl Tracking {
    /// Whether a snapshot is being written.
    pub(crate) fn is_underway(&self) -> bool {
        self.underway.is_some()
    }
}

/// A snapshot that is being written.
pub(super) struct Underway {
    what: String,
    reply: Reply,
    pub(super) create: SnapshotCreate,
    start: Instant,
    /// How long the guest stood still so far.
    pub(super) stood_still: Duration,
    /// Written pages were not noted before.
    pub(super) tracks_for_this: bool,
    /// Memory that is to be written while the guest runs, in how many rounds so far.
    pub(super) rounds: u32,
    /// Pages that were noted as written, and have not been written out again.
    pub(super) again: Option<PageSet>,
}

/// Why a machine did not come to say its state.
pub(super) enum Stopped {
    /// It ended.
    Ended(Box<End>),
    /// Something could not be had.
    Failed(String),
}

impl From<String> for Stopped {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

impl Machine {
    /// Takes a snapshot, and answers when it is written. The guest, if it runs, goes on as soon as its memory has been
    /// captured. The end, should the machine come to it meanwhile.
    pub(crate) fn create_snapshot(
        &mut self,
        create: SnapshotCreate,
        reply: Reply,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Option<End> {
        let what = Command::CreateSnapshot(create.clone()).to_string();
        if self.tracking.underway.is_some() {
            let why = "another one is being written; wait for its answer";
            reply.send(Err(Refusal::Failed(format!("cannot {what}: {why}"))));
            return None;
        }
        let may_be = self.check_chain(&create);
        if let Err(why) = may_be.and_then(|()| self.disks_to_copy(&create).map(drop)) {
            reply.send(Err(Refusal::Failed(format!("cannot {what}: {why}"))));
            return None;
        }
        let tracks_from_here = create.track_dirty_pages && !self.tracking.is_on;
        let is_running = self.state == Lifecycle::Running;
        self.tracking.underway = Some(Underway {
            what,
            reply,
            create,
            start: Instant::now(),
            stood_still: Duration::ZERO,
            tracks_for_this: false,
            rounds: 0,
            again: None,
        });
        match is_running {
            true => self.begin_ahead(events, tick),
            false => {
                if tracks_from_here && let Err(why) = self.begin_tracking(NotedFrom::Now) {
                    self.snapshot_failed(why);
                    return None;
                }
                self.capture(events, tick)
            }
        }
    }

    /// Whether this snapshot, and diffs after it, could be loaded.
    fn check_chain(&self, create: &SnapshotCreate) -> Result<(), String> {
        if create.track_dirty_pages && !create.is_base {
            return Err(String::from(
                "track_dirty_pages is for diffs after this snapshot, which with is_base false do not build upon it: leave one of them out",
            ));
        }
        let before = self.base(create.snapshot_type).len();
        if before >= MAX_LAYERS {
            return Err(format!(
                "the snapshot before is made of {before} memory files, and more than {MAX_LAYERS} make no memory: take a full one (snapshot_type \
                 Full, or no --diff), upon which further diffs build; to flatten the one before makes one file of its own, for those who load it"
            ));
        }
        Ok(())
    }

    /// Has memory captured while the machine stands still. It goes on if it ran.
    pub(super) fn capture(&mut self, events: &Receiver<Event>, tick: &mut Tick<'_>) -> Option<End> {
        let ran = self.state == Lifecycle::Running;
        let start = Instant::now();
        if let Some(end) = self.pause(events, tick) {
            return Some(end);
        }
        let captured = self
            .hand_over(events, tick)
            .and_then(|()| self.wait_for_capture(events, tick));
        if !matches!(captured, Err(Stopped::Ended(_))) {
            if ran {
                self.resume();
                self.stood_still_since(start);
            }
            // Nobody needs to stand still for that. Where noting is to go on, only a failure ends it.
            if !self.tracks_on() {
                self.end_ahead();
            }
        }
        match captured {
            Ok(None) => {}
            Ok(Some(taken)) => self.snapshot_taken(taken),
            Err(Stopped::Failed(why)) => self.snapshot_failed(why),
            Err(Stopped::Ended(end)) => return Some(*end),
        }
        None
    }

    pub(super) fn stood_still_since(&mut self, start: Instant) {
        if let Some(underway) = &mut self.tracking.underway {
            underway.stood_still = underway.stood_still.saturating_add(start.elapsed());
        }
    }

    pub(super) fn snapshot_failed(&mut self, why: String) {
        self.snapshot_taken(Taken::failed(why));
    }

    /// Answers whoever wanted the snapshot.
    pub(crate) fn snapshot_taken(&mut self, taken: Taken) {
        if taken.outcome.is_ok() && self.tracks_on() {
            self.tracking.is_on = true;
        } else {
            self.end_ahead();
        }
        let Some(underway) = self.tracking.underway.take() else {
            return;
        };
        let what = &underway.what;
        let outcome = match taken.outcome {
            Ok(written) => {
                let memory_ids = written.layers.iter().map(|layer| layer.id.clone());
                let memory_ids = memory_ids.collect();
                if underway.create.is_base {
                    self.tracking.layers = written.layers;
                    self.tracking.unsaved = None;
                }
                log::info!(
                    "snapshot written within {:?}: {} KiB of memory",
                    underway.start.elapsed(),
                    written.memory_bytes >> 10
                );
                match underway.create.live {
                    true => Ok(Answer::Snapshot(SnapshotTaken {
                        stood_still_us: u64::try_from(underway.stood_still.as_micros())
                            .unwrap_or(u64::MAX),
                        disks_us: u64::try_from(written.copying_disks.as_micros())
                            .unwrap_or(u64::MAX),
                        memory_bytes: written.memory_bytes,
                        memory_ids,
                    })),
                    false => Ok(Answer::Done),
                }
            }
            Err(why) => Err(Refusal::Failed(format!("cannot {what}: {why}"))),
        };
        underway.reply.send(outcome);
    }

    /// Waits until memory is captured, or all is over. One thing after the other: what clients ask waits.
    fn wait_for_capture(
        &mut self,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Result<Option<Taken>, Stopped> {
        loop {
            match next(events)? {
                Event::Captured => return Ok(None),
                Event::Taken(taken) => return Ok(Some(*taken)),
                other => self.meanwhile(other, events, tick)?,
            }
        }
    }

    fn meanwhile(
        &mut self,
        event: Event,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Result<(), Stopped> {
        match event {
            Event::Request(request) => self.deferred.push_back(request),
            Event::Ahead => self.tracking.ahead_waits = true,
            other => {
                if let Some(end) = self.handle(other, events, tick) {
                    return Err(Stopped::Ended(Box::new(end)));
                }
            }
        }
        Ok(())
    }

    fn hand_over(&mut self, events: &Receiver<Event>, tick: &mut Tick<'_>) -> Result<(), Stopped> {
        let state = self.gather(events, tick)?;
        let Some(underway) = &self.tracking.underway else {
            return Err(String::from("it was called off").into());
        };
        let create = underway.create.clone();
        let (pages, base) = match underway.again {
            Some(_) => self.pages_left(create.snapshot_type)?,
            None => self.pages_for(create.snapshot_type)?,
        };
        let job = SnapshotJob {
            disks: self.disks_to_copy(&create)?,
            create,
            state,
            ram: self.ram.clone(),
            pages,
            base,
        };
        match &self.files {
            Some(files) => {
                files.snapshot(job);
                Ok(())
            }
            None => Err(String::from("this machine has no thread that writes files").into()),
        }
    }

    /// The disks whose images are to be copied.
    fn disks_to_copy(&self, create: &SnapshotCreate) -> Result<Vec<BlkHandle>, String> {
        let mut disks = Vec::new();
        for (index, drive) in create.drives.iter().enumerate() {
            let id = &drive.drive_id;
            let Some(disk) = self.disk(id) else {
                let known = self.desk.iter().flat_map(|d| &d.config().drives);
                let known: Vec<_> = known.map(|d| &*d.drive_id).collect();
                return Err(format!(
                    "drives name {id:?}, and the machine has no such drive; it has {}",
                    if known.is_empty() {
                        "none".to_owned()
                    } else {
                        known.join(", ")
                    }
                ));
            };
            let mut earlier = create.drives.iter().take(index);
            if earlier.any(|other| other.drive_id == *id) {
                return Err(format!("drives name {id:?} twice; copy it once"));
            }
            if disk.geometry().read_only {
                return Err(format!(
                    "drive {id:?} is read-only: its image does not change, and needs no copy; leave it out"
                ));
            }
            disk.may_copy_image().map_err(|e| e.to_string())?;
            disks.push(disk.clone());
        }
        Ok(disks)
    }

    /// Which pages are to be written, and which files have the others.
    fn pages_for(&mut self, kind: SnapshotType) -> Result<(PageSet, Vec<LayerV1>), String> {
        if self.tracking.is_on {
            // Also for a full one: a diff tells what was written since the snapshot before, whichever kind that was.
            self.take_changed()?;
        } else if kind == SnapshotType::Diff {
            log::info!(
                "nobody noted which pages were written (track_dirty_pages): the diff snapshot has them all"
            );
        }
        Ok((self.whole(kind), self.base(kind).to_vec()))
    }

    /// All pages that a snapshot has.
    pub(super) fn whole(&self, kind: SnapshotType) -> PageSet {
        match &self.tracking.unsaved {
            Some(unsaved) if !self.base(kind).is_empty() => unsaved.clone(),
            _ => PageSet::all(self.ram.pages()),
        }
    }

    /// The files that have the others: of a diff of which written pages were noted.
    pub(super) fn base(&self, kind: SnapshotType) -> &[LayerV1] {
        match kind {
            SnapshotType::Diff if self.tracking.is_on => &self.tracking.layers,
            SnapshotType::Diff | SnapshotType::Full => &[],
        }
    }

    /// Pages that have been written since they were asked for before, by the guest and by devices, which stand still.
    pub(super) fn take_changed(&mut self) -> Result<PageSet, String> {
        let mut changed = self.take_dirty()?;
        changed.union(&self.ram.take_written());
        self.note_unsaved(&changed);
        Ok(changed)
    }

    /// Pages that the hypervisor has noted since they were asked for before.
    pub(super) fn take_dirty(&self) -> Result<PageSet, String> {
        let dirty = self.partition.take_dirty(&self.ram);
        let dirty = dirty.map_err(|e| e.to_string())?;
        PageSet::from_bitmaps(&self.ram.range_pages(), &dirty).map_err(|e| e.to_string())
    }

    /// The state of every part but memory. The machine is paused.
    fn gather(
        &mut self,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Result<StateFile, Stopped> {
        let cpus = self.cpu_states(events, tick)?;
        let Some(desk) = &self.desk else {
            return Err(String::from("nobody knows the description of this machine").into());
        };
        let config = serde_json::to_vec(desk.config()).map_err(|e| e.to_string())?;
        let mut file = StateFile::new(&desk.writer());
        file.add(SavedState {
            kind: state::DESCRIPTION.into(),
            version: state::DESCRIPTION_VERSION,
            bytes: config,
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let machine = MachineStateV1 {
            layout: LAYOUT,
            transport: match self.options.transport {
                Transport::Mmio => TransportV1::Mmio,
                Transport::Pci => TransportV1::Pci,
            },
            boot_timer: self.options.boot_timer,
            saved_at_ns: now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
        };
        file.add(SavedState::pack(
            state::MACHINE,
            state::MACHINE_VERSION,
            &machine,
        ));
        for (index, cpu) in cpus.iter().enumerate() {
            file.add(SavedState::pack(
                &state::cpu(index),
                state::CPU_VERSION,
                cpu,
            ));
        }
        for part in &self.parts {
            let part = part.lock().unwrap_or_else(PoisonError::into_inner);
            file.add(part.save());
        }
        for (index, transport) in self.transports.iter().enumerate() {
            let transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
            let device = transport.save().ok_or_else(|| {
                format!("device {index} is at work still: this is a bug of the monitor, please report it")
            })?;
            file.add(SavedState::pack(
                &state::device(index),
                state::DEVICE_VERSION,
                &device,
            ));
        }
        // After the processors and devices, which may raise interrupts as they stop.
        let partition = self.partition.save().map_err(|e| e.to_string())?;
        file.add(SavedState::pack(
            state::PARTITION,
            state::PARTITION_VERSION,
            &partition,
        ));
        Ok(file)
    }

    /// What every processor says, in their order.
    fn cpu_states(
        &mut self,
        events: &Receiver<Event>,
        tick: &mut Tick<'_>,
    ) -> Result<Vec<CpuState>, Stopped> {
        for vcpu in &self.vcpus {
            vcpu.order(Order::Save);
        }
        let mut states: Vec<Option<CpuState>> = vec![None; self.vcpus.len()];
        while states.iter().any(Option::is_none) {
            match next(events)? {
                Event::Vcpu(report) => {
                    let cpu = report.cpu;
                    match report.kind {
                        ReportKind::Saved(saved) => {
                            let saved = saved.map_err(|why| format!("processor {cpu}: {why}"))?;
                            let place = states.get_mut(usize::try_from(cpu).unwrap_or(usize::MAX));
                            if let Some(place) = place {
                                *place = Some(saved);
                            }
                        }
                        _ => self.meanwhile(Event::Vcpu(report), events, tick)?,
                    }
                }
                other => self.meanwhile(other, events, tick)?,
            }
        }
        Ok(states.into_iter().flatten().collect())
    }
}

fn next(events: &Receiver<Event>) -> Result<Event, Stopped> {
    events.recv().map_err(|_| {
        Stopped::Ended(Box::new(End::HostError(
            "every thread of the machine is gone".into(),
        )))
    })
}
