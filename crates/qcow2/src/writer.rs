//! What changes an image: finding clusters, filling them, and showing them in the tables, in an order that
//! a crash at any point leaves whole. The order is explained in the crate's opening words.

mod claim;

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::bytes::{bytes_of, index, is_zero, wide};
use crate::entry::{COPIED, Entry};
use crate::error::{Act, ImageError, OpenError};
use crate::file::{BackingRead, ImageFile};
use crate::geometry::Geometry;
use crate::header::{CORRUPT, DIRTY, Header};
use crate::image::Shared;
use crate::recount;
use crate::refcounts::{Refcounts, Space};

/// Most bytes that are filled and made durable at once: what a large request of a guest may take in
/// memory (a cluster is filled whole, so it is one cluster at least).
const MOST_PART_BYTES: u64 = 2 << 20;

/// Clusters in a row.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) len: u64,
    /// Durably zero: nothing was ever there.
    fresh: bool,
}

/// What becomes of one guest cluster.
enum Plan {
    /// It is written where it is.
    Keep(u64),
    /// It has a cluster, whose content does not count.
    Refill(u64),
    /// It gets a cluster; what it had is given back.
    Move { was_zero: bool, had: Option<Run> },
}

/// What is written at once, and what becomes of each of its clusters; with it, where the guest sees that.
struct Part<'a> {
    offset: u64,
    data: &'a [u8],
    plans: &'a [(Plan, u64)],
}

/// The one that may change the image.
pub(crate) struct Writer {
    pub(crate) geometry: Geometry,
    incompatible: u64,
    /// Counts may be written late, since the image is marked dirty (version 3).
    lazy: bool,
    marked: bool,
    pub(crate) counts: Refcounts,
    pub(crate) space: Space,
    /// Where the search for holes goes on.
    search: u64,
    reserve: Run,
    /// References to give back once the tables that dropped them are durable.
    pub(crate) pending: Vec<Run>,
    pub(crate) l1_offset: u64,
    pub(crate) snapshots: u32,
    pub(crate) no_holes: bool,
    closed: bool,
}

impl Writer {
    pub(crate) fn open(
        file: &dyn ImageFile,
        header: &Header,
        mut l1: Vec<u64>,
    ) -> Result<(Self, Vec<u64>), OpenError> {
        if header.incompatible & CORRUPT != 0 {
            return Err(OpenError::MarkedCorrupt);
        }
        let geometry = header.geometry;
        let mut counts = Refcounts::read(file, header)?;
        let len = geometry.ceil(header.file_len);
        let mut space = Space {
            end: geometry.index(len),
            len,
        };
        if len != header.file_len {
            file.set_len(len).act_open("complete the last cluster")?;
        }
        if header.autoclear != 0 {
            let cleared = file.write_at(&[0; 8], 88).and_then(|()| file.sync());
            cleared.act_open("clear autoclear features")?;
        }
        let dirty = header.incompatible & DIRTY != 0;
        if dirty {
            recount::rebuild(file, header, &mut l1, &mut counts, &mut space)
                .map_err(OpenError::Rebuild)?;
        }
        let writer = Self {
            geometry,
            incompatible: header.incompatible,
            lazy: header.version >= 3,
            marked: dirty,
            counts,
            space,
            search: 0,
            reserve: Run::default(),
            pending: Vec::new(),
            l1_offset: header.l1_offset,
            snapshots: header.snapshots,
            no_holes: false,
            closed: false,
        };
        Ok((writer, l1))
    }

    pub(crate) fn host_end(&self) -> u64 {
        self.space.len
    }

    /// Tells look-ups how long the file is and where the refcount table lies.
    pub(crate) fn publish(&self, shared: &Shared) {
        shared.host_end.store(self.space.len, Ordering::Release);
        let end = self.counts.table_end();
        shared.refcount_guard.set(self.counts.table_offset, end);
    }

    /// Before the first change that counts follow late: says so, durably.
    fn mark(&mut self, file: &dyn ImageFile) -> Result<(), ImageError> {
        if self.lazy && !self.marked {
            let bits = self.incompatible | DIRTY;
            file.write_at(&bits.to_be_bytes(), 72)
                .act("mark the image dirty")?;
            file.sync().act("mark the image dirty")?;
            self.marked = true;
        }
        Ok(())
    }

    /// Lets an L1 entry show the new table in `run`; gives that back if it did not come to it.
    fn show_table(&mut self, shared: &Shared, l1_index: u64, run: Run) -> Result<u64, ImageError> {
        let table = self.geometry.offset(run.first);
        let entry = table | COPIED;
        let shown = self.set_l1(shared, l1_index, entry);
        if shown.is_err() {
            let at = self.l1_offset.saturating_add(l1_index.saturating_mul(8));
            let mut now = [0; 8];
            let read = shared.file.read_at(&mut now, at);
            if read.is_ok() && u64::from_be_bytes(now) != entry {
                self.unclaim(shared, &[run]);
            }
        }
        shown.map(|()| table)
    }

    /// The L2 table of an L1 entry, made or copied if need be so that it may be written.
    pub(crate) fn own_table(&mut self, shared: &Shared, l1_index: u64) -> Result<u64, ImageError> {
        let file = &*shared.file;
        let Some((table, copied)) = shared.l2_table(l1_index)? else {
            let run = self.allocate(shared, 1)?;
            if !run.fresh {
                let empty = vec![0; self.geometry.cluster_len()];
                self.write_table(shared, run, &empty)?;
            }
            return self.show_table(shared, l1_index, run);
        };
        match self.owned(shared, table, copied)? {
            true if copied => Ok(table),
            true => {
                self.set_l1(shared, l1_index, table | COPIED)?;
                Ok(table)
            }
            false => {
                let mut bytes = vec![0; self.geometry.cluster_len()];
                file.read_at(&mut bytes, table).act("read an L2 table")?;
                let run = self.allocate(shared, 1)?;
                self.write_table(shared, run, &bytes)?;
                let copy = self.show_table(shared, l1_index, run)?;
                self.give_back(shared, self.run_of(table, 1))?;
                Ok(copy)
            }
        }
    }

    /// Fills the new L2 table in `run`, durably; gives that back if it cannot.
    fn write_table(&mut self, shared: &Shared, run: Run, bytes: &[u8]) -> Result<(), ImageError> {
        let file = &*shared.file;
        let written = file
            .write_at(bytes, self.geometry.offset(run.first))
            .act("write an L2 table")
            .and_then(|()| file.sync().act("make an L2 table durable"));
        if written.is_err() {
            self.unclaim(shared, &[run]);
        }
        written
    }

    pub(crate) fn set_l1(
        &mut self,
        shared: &Shared,
        l1_index: u64,
        entry: u64,
    ) -> Result<(), ImageError> {
        let at = self.l1_offset.saturating_add(l1_index.saturating_mul(8));
        shared
            .file
            .write_at(&entry.to_be_bytes(), at)
            .act("write the L1 table")?;
        let mut l1 = shared.l1.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = l1.get_mut(index(l1_index)) {
            *place = entry;
        }
        Ok(())
    }

    /// Clusters that `size` bytes at `host` touch.
    pub(crate) fn run_of(&self, host: u64, size: u64) -> Run {
        let first = self.geometry.index(host);
        let last = host.saturating_add(size).saturating_sub(1);
        let last = self.geometry.index(last);
        Run {
            first,
            len: last.saturating_sub(first).saturating_add(1),
            fresh: false,
        }
    }

    /// Whether a cluster has no user but the active state. The flag says so, or a count of one.
    pub(crate) fn owned(
        &mut self,
        shared: &Shared,
        host: u64,
        copied: bool,
    ) -> Result<bool, ImageError> {
        if let Some(what) = shared.guarded(host) {
            return Err(ImageError::Overlap {
                host_offset: host,
                what,
            });
        }
        if copied {
            return Ok(true);
        }
        let cluster = self.geometry.index(host);
        match self.counts.get(&*shared.file, self.space.len, cluster)? {
            0 => Err(ImageError::Table {
                table: "refcount table",
                index: cluster,
                entry: 0,
                fault: "a cluster in use has no reference",
            }),
            count => Ok(count == 1),
        }
    }

    fn plan(&mut self, shared: &Shared, raw: u64, guest: u64) -> Result<Plan, ImageError> {
        Ok(match shared.read_entry(raw, guest)? {
            Entry::Unallocated => Plan::Move {
                was_zero: !shared.has_backing,
                had: None,
            },
            Entry::Zero { kept: None, .. } => Plan::Move {
                was_zero: true,
                had: None,
            },
            Entry::Compressed { host, size } => Plan::Move {
                was_zero: false,
                had: Some(self.run_of(host, size)),
            },
            Entry::Zero {
                kept: Some(host),
                copied,
            } => match self.owned(shared, host, copied)? {
                true => Plan::Refill(host),
                false => Plan::Move {
                    was_zero: true,
                    had: Some(self.run_of(host, 1)),
                },
            },
            Entry::Data { host, copied } => match self.owned(shared, host, copied)? {
                true => Plan::Keep(host),
                false => Plan::Move {
                    was_zero: false,
                    had: Some(self.run_of(host, 1)),
                },
            },
        })
    }

    /// Writes `data` at `offset`, within one slice.
    fn write_part(
        &mut self,
        shared: &Shared,
        offset: u64,
        data: &[u8],
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let end = offset.saturating_add(wide(data.len()));
        let first = g.index(offset);
        let clusters = g.index(g.ceil(end)).saturating_sub(first);
        let table = self.own_table(shared, g.l1_index(first))?;
        let (slice, at) = (g.slice(first), g.slice_index(first));
        let mut old = vec![0; index(clusters)];
        shared.entries(slice, at, &mut old)?;
        let guests = (first..).map(|cluster| g.offset(cluster));
        let plans = old
            .iter()
            .zip(guests)
            .map(|(raw, guest)| Ok((self.plan(shared, *raw, guest)?, guest)))
            .collect::<Result<Vec<_>, ImageError>>()?;
        let mut claimed = Vec::new();
        let part = Part {
            offset,
            data,
            plans: &plans,
        };
        let new = match self.fill_part(shared, &part, backing, &mut claimed) {
            Ok(new) => new,
            Err(e) => {
                self.unclaim(shared, &claimed);
                return Err(e);
            }
        };
        if old != new
            && let Err(e) = self.show(shared, table, first, &new)
        {
            // Some of the entries may be in the file all the same.
            let mut now = vec![0; old.len()];
            if shared.entries(slice, at, &mut now).is_ok() {
                let hidden: Vec<Run> = claimed
                    .into_iter()
                    .filter(|run| {
                        let start = g.offset(run.first);
                        let within = start..start.saturating_add(g.offset(run.len));
                        !now.iter()
                            .any(|raw| within.contains(&(raw & crate::entry::OFFSET_MASK)))
                    })
                    .collect();
                self.unclaim(shared, &hidden);
            }
            return Err(e);
        }
        for (plan, _) in &plans {
            if let Plan::Move { had: Some(run), .. } = plan {
                self.give_back(shared, *run)?;
            }
        }
        Ok(())
    }

    /// Fills the clusters of a part, durably where that must be; says which entries show them, and which of them are new.
    fn fill_part(
        &mut self,
        shared: &Shared,
        part: &Part<'_>,
        backing: &dyn BackingRead,
        claimed: &mut Vec<Run>,
    ) -> Result<Vec<u64>, ImageError> {
        let (g, file) = (self.geometry, &*shared.file);
        let Part {
            offset,
            data,
            plans,
        } = *part;
        let end = offset.saturating_add(wide(data.len()));
        let mut new = Vec::with_capacity(plans.len());
        let mut must_sync = false;
        let mut rest = plans;
        while let Some((plan, guest)) = rest.first() {
            let moving = rest
                .iter()
                .take_while(|(plan, _)| matches!(plan, Plan::Move { .. }))
                .count();
            let (host, len, blank) = match plan {
                Plan::Keep(host) => {
                    let from = offset.max(*guest);
                    let to = end.min(guest.saturating_add(g.cluster_size()));
                    let part = part_of(data, offset, from, to);
                    let there = host.saturating_add(from.saturating_sub(*guest));
                    file.write_at(part, there).act("write data")?;
                    new.push(*host | COPIED);
                    rest = rest.get(1..).unwrap_or_default();
                    continue;
                }
                Plan::Refill(host) => (*host, 1, false),
                Plan::Move { .. } => {
                    let run = self.allocate(shared, wide(moving))?;
                    claimed.push(run);
                    (g.offset(run.first), run.len, run.fresh)
                }
            };
            let (these, others) = rest.split_at(index(len).min(rest.len()));
            let was_zero = these.iter().all(|(plan, _)| match plan {
                Plan::Move { was_zero, .. } => *was_zero,
                _ => true,
            });
            let fill = Fill {
                guest: *guest,
                host,
                len: g.offset(len),
                blank,
                was_zero,
            };
            must_sync |= fill.write(shared, offset, data, backing)?;
            for cluster in 0..len {
                new.push(host.saturating_add(g.offset(cluster)) | COPIED);
            }
            rest = others;
        }
        if must_sync {
            file.sync().act("make data durable")?;
        }
        Ok(new)
    }

    /// Writes L2 entries, in the file and for look-ups.
    pub(crate) fn show(
        &mut self,
        shared: &Shared,
        table: u64,
        first: u64,
        entries: &[u64],
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let offset = table.saturating_add(g.l2_index(first).saturating_mul(8));
        let bytes = bytes_of(entries);
        let write = || {
            shared
                .file
                .write_at(&bytes, offset)
                .act("write an L2 table")
        };
        shared
            .cache
            .update(g.slice(first), g.slice_index(first), entries, write)
    }

    /// Brings the file to rest: counts written, not dirty, not longer than needed.
    pub(crate) fn close(&mut self, shared: &Shared) -> Result<(), ImageError> {
        if self.closed {
            return Ok(());
        }
        self.closed = true;
        let file = &*shared.file;
        file.sync().act("flush the image")?;
        let mut pending = std::mem::take(&mut self.pending);
        pending.push(std::mem::take(&mut self.reserve));
        self.release(shared, &pending)?;
        self.counts.write_back(file, !self.lazy)?;
        let end = self.geometry.offset(self.space.end);
        if end < self.space.len {
            file.set_len(end).act("cut the unused end of the image")?;
            self.space.len = end;
        }
        if self.marked {
            file.sync().act("make reference counts durable")?;
            let bits = self.incompatible & !DIRTY;
            file.write_at(&bits.to_be_bytes(), 72)
                .act("mark the image clean")?;
            file.sync().act("mark the image clean")?;
            self.marked = false;
        }
        Ok(())
    }
}

fn part_of(data: &[u8], offset: u64, from: u64, to: u64) -> &[u8] {
    let range = index(from.saturating_sub(offset))..index(to.saturating_sub(offset));
    data.get(range).unwrap_or_default()
}

/// Clusters to be filled for the first time.
struct Fill {
    guest: u64,
    host: u64,
    len: u64,
    /// The host clusters are durably zero.
    blank: bool,
    /// The guest clusters are.
    was_zero: bool,
}

impl Fill {
    /// Writes the part of `data` that goes here, and around it what was there. Says whether that must be
    /// durable before a table shows it: only zeroes over zeroes need not, since any mixture of old and
    /// new that a crash leaves is one that a disk may leave, too.
    fn write(
        &self,
        shared: &Shared,
        offset: u64,
        data: &[u8],
        backing: &dyn BackingRead,
    ) -> Result<bool, ImageError> {
        let file = &*shared.file;
        let data_end = offset.saturating_add(wide(data.len()));
        let from = offset.max(self.guest);
        let to = data_end.min(self.guest.saturating_add(self.len));
        let part = part_of(data, offset, from, to);
        let lead = from.saturating_sub(self.guest);
        if self.blank && self.was_zero {
            let at = self.host.saturating_add(lead);
            file.write_at(part, at).act("write data")?;
            return Ok(false);
        }
        let mut bytes = vec![0; index(self.len)];
        if !self.was_zero {
            // Nothing of the backing image may show where the disk grows later.
            let size = shared.size.load(Ordering::Acquire);
            let there = index(size.saturating_sub(self.guest)).min(bytes.len());
            let old = bytes.get_mut(..there).unwrap_or_default();
            shared.read(self.guest, old, backing)?;
        }
        let was_zero = is_zero(&bytes);
        crate::bytes::put(&mut bytes, index(lead), part);
        if self.blank && was_zero {
            let at = self.host.saturating_add(lead);
            file.write_at(part, at).act("write data")?;
            return Ok(false);
        }
        file.write_at(&bytes, self.host).act("write data")?;
        Ok(true)
    }
}

impl Writer {
    pub(crate) fn write(
        &mut self,
        shared: &Shared,
        offset: u64,
        data: &[u8],
        backing: &dyn BackingRead,
    ) -> Result<(), ImageError> {
        let g = self.geometry;
        let (mut rest, mut at) = (data, offset);
        while !rest.is_empty() {
            let slice = g.slice(g.index(at));
            let slice_end = g.offset(g.slice_start(slice.saturating_add(1)));
            let most = g
                .floor(at)
                .saturating_add(MOST_PART_BYTES.max(g.cluster_size()))
                .min(slice_end);
            let len = index(most.saturating_sub(at)).min(rest.len());
            let (part, tail) = rest.split_at(len);
            self.write_part(shared, at, part, backing)?;
            rest = tail;
            at = at.saturating_add(wide(len));
        }
        Ok(())
    }
}
