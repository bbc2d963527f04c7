//! The core of a queue on files: carries transfers by an engine, in several pieces where it must, and puts them
//! together again.
//!
//! Does not know what a request of a guest means: its owner has checked and translated it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use alveole_guest_memory::GuestBuffers;

use crate::bounce::{AREA_BYTES, Pool};
use crate::host_file::{Alignment, HostFile};
use crate::piece::{Action, Piece};
use crate::sync::{SyncEngine, carry_out};
use crate::uring::{RingError, UringEngine};
use crate::{Completion, sys};

enum EngineOf {
    Uring(Box<UringEngine>),
    Sync(SyncEngine),
}

/// A request that is in several pieces.
struct Parent {
    tag: u64,
    buffers: GuestBuffers,
    pieces: usize,
    result: io::Result<()>,
}

pub(crate) struct Carrier {
    files: Arc<[Arc<HostFile>]>,
    engine: EngineOf,
    parents: Vec<Option<Parent>>,
    free_parents: Vec<u32>,
    areas: Pool,
    /// Pieces that wait for an area.
    waiting: VecDeque<Piece>,
    finished: Vec<(Piece, io::Result<()>)>,
    ready: Vec<Completion>,
    in_flight: usize,
}

/// Names a request in several pieces.
#[derive(Clone, Copy)]
pub(crate) struct ParentId(u32);

impl Carrier {
    pub(crate) fn new(
        files: Arc<[Arc<HostFile>]>,
        uring: bool,
        depth: u32,
    ) -> Result<Self, RingError> {
        let engine = if uring {
            EngineOf::Uring(Box::new(UringEngine::new(Arc::clone(&files), depth)?))
        } else {
            EngineOf::Sync(SyncEngine::new(Arc::clone(&files)))
        };
        Ok(Self {
            files,
            engine,
            parents: Vec::new(),
            free_parents: Vec::new(),
            areas: Pool::default(),
            waiting: VecDeque::new(),
            finished: Vec::new(),
            ready: Vec::new(),
            in_flight: 0,
        })
    }

    pub(crate) fn event(&self) -> Option<&Arc<OwnedFd>> {
        match &self.engine {
            EngineOf::Uring(uring) => Some(uring.event()),
            EngineOf::Sync(_) => None,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether [`Carrier::run`] or [`Carrier::hand_out`] has something to do.
    pub(crate) fn has_news(&mut self) -> bool {
        !self.ready.is_empty()
            || match &mut self.engine {
                EngineOf::Uring(uring) => uring.has_news(),
                EngineOf::Sync(sync) => sync.has_more(),
            }
    }

    pub(crate) fn stop_event(&mut self) {
        if let EngineOf::Uring(uring) = &mut self.engine {
            uring.stop_event();
        }
    }

    /// True: there is news already.
    pub(crate) fn want_event(&mut self) -> bool {
        if let EngineOf::Uring(uring) = &mut self.engine {
            uring.want_event();
        }
        self.has_news()
    }

    /// A request that is done, or has failed, before anybody was asked.
    pub(crate) fn complete(&mut self, tag: u64, result: io::Result<()>, buffers: GuestBuffers) {
        self.in_flight += 1;
        self.ready.push(Completion {
            tag,
            result,
            buffers,
        });
    }

    /// A request that is one transfer.
    pub(crate) fn transfer(&mut self, tag: u64, mut piece: Piece) {
        if self.fits(&piece) {
            self.in_flight += 1;
            piece.tag = tag;
            self.start(piece);
            return;
        }
        let whole = piece.buffers.part(0, piece.buffers.len_bytes());
        let buffers = std::mem::replace(&mut piece.buffers, whole);
        let parent = self.begin(tag, buffers);
        self.add(parent, piece);
        self.end(parent, Ok(()));
    }

    /// Begins a request of several transfers; until [`Carrier::end`] it does not complete.
    pub(crate) fn begin(&mut self, tag: u64, buffers: GuestBuffers) -> ParentId {
        self.in_flight += 1;
        let parent = Some(Parent {
            tag,
            buffers,
            pieces: 1,
            result: Ok(()),
        });
        match self.free_parents.pop() {
            Some(at) => {
                self.parents[at as usize] = parent;
                ParentId(at)
            }
            None => {
                self.parents.push(parent);
                ParentId((self.parents.len() - 1) as u32)
            }
        }
    }

    /// One of its transfers.
    pub(crate) fn add(&mut self, parent: ParentId, mut piece: Piece) {
        piece.parent = Some(parent.0);
        if self.fits(&piece) {
            self.count(parent);
            self.start(piece);
        } else if let Some(alignment) = self.files[piece.file].direct() {
            self.add_through_areas(parent, &piece, alignment);
        }
    }

    /// All transfers were added; `result` is what came of what was done without one.
    pub(crate) fn end(&mut self, parent: ParentId, result: io::Result<()>) {
        self.part_done(parent.0, result);
    }

    fn count(&mut self, parent: ParentId) {
        if let Some(parent) = &mut self.parents[parent.0 as usize] {
            parent.pieces += 1;
        }
    }

    /// Whether the kernel takes the piece as it is.
    fn fits(&self, piece: &Piece) -> bool {
        let Some(needs) = self.files[piece.file].direct() else {
            return true;
        };
        match piece.action {
            Action::Sync | Action::Discard => true,
            Action::Zero { .. } => is_whole(piece.offset, piece.len, needs),
            Action::Read | Action::Write { .. } => {
                is_whole(piece.offset, piece.len, needs)
                    && piece.buffers.iovecs().iter().all(|v| {
                        (v.iov_base as usize).is_multiple_of(needs.memory as usize)
                            && v.iov_len.is_multiple_of(needs.offset as usize)
                    })
            }
        }
    }

    /// Cuts a transfer that `O_DIRECT` does not take into pieces that go through areas. A write is of whole blocks:
    /// parts of blocks go through [`write_alone`].
    fn add_through_areas(&mut self, parent: ParentId, piece: &Piece, needs: Alignment) {
        let (block, end) = (u64::from(needs.offset), piece.offset + piece.len);
        let mut at = piece.offset;
        while at < end {
            let start = at / block * block;
            let stop = end.min(start + AREA_BYTES as u64);
            let buffers = piece.buffers.part(at - piece.offset, stop - at);
            let len = stop.next_multiple_of(block) - start;
            let mut part = Piece::new(piece.file, piece.action, start, len, buffers);
            part.skip = (at - start) as usize;
            part.parent = Some(parent.0);
            self.count(parent);
            self.waiting.push_back(part);
            at = stop;
        }
        self.start_waiting();
    }

    fn start_waiting(&mut self) {
        while let Some(mut piece) = self.waiting.pop_front() {
            let Some(mut area) = self.areas.take() else {
                self.waiting.push_front(piece);
                break;
            };
            if matches!(piece.action, Action::Write { .. }) {
                let len = piece.buffers.len_bytes() as usize;
                piece.buffers.copy_to(0, &mut area.bytes()[..len]);
            }
            piece.area = Some(area);
            self.start(piece);
        }
    }

    fn start(&mut self, mut piece: Piece) {
        let file = &self.files[piece.file];
        if piece.action == Action::Discard && file.is_device() {
            // An ioctl, which no ring carries before Linux 6.12.
            let result = carry_out(&mut piece, &self.files);
            self.finished.push((piece, result));
            return;
        }
        match &mut self.engine {
            EngineOf::Uring(uring) => uring.start(piece, &mut self.finished),
            EngineOf::Sync(sync) => sync.start(piece),
        }
    }

    /// Hands over what was taken, and takes what is complete.
    pub(crate) fn run(&mut self) {
        loop {
            match &mut self.engine {
                EngineOf::Uring(uring) => uring.kick(&mut self.finished),
                EngineOf::Sync(sync) => sync.run(&mut self.finished),
            }
            if !self.settle() {
                break;
            }
        }
    }

    /// Waits until nothing is left but completions. Their owner is told that there are some.
    pub(crate) fn finish_all(&mut self) {
        while self.in_flight > self.ready.len() {
            match &mut self.engine {
                EngineOf::Uring(uring) => uring.finish(&mut self.finished),
                EngineOf::Sync(sync) => sync.run(&mut self.finished),
            }
            self.settle();
        }
        if let (Some(event), false) = (self.event(), self.ready.is_empty()) {
            sys::signal(event);
        }
    }

    /// Hands completions out.
    pub(crate) fn hand_out(&mut self, done: &mut Vec<Completion>) {
        self.in_flight -= self.ready.len();
        done.append(&mut self.ready);
    }

    /// Takes in what the engine has finished; whether something new was started by that.
    fn settle(&mut self) -> bool {
        let mut finished = std::mem::take(&mut self.finished);
        let mut freed = false;
        for (mut piece, result) in finished.drain(..) {
            if let Some(area) = piece.area.take() {
                if piece.action == Action::Read && result.is_ok() {
                    let len = piece.buffers.len_bytes() as usize;
                    let bytes = &area.shared_bytes()[piece.skip..piece.skip + len];
                    piece.buffers.copy_from(0, bytes);
                }
                self.areas.give_back(area);
                freed = true;
            }
            match piece.parent {
                Some(parent) => self.part_done(parent, result),
                None => self.ready.push(Completion {
                    tag: piece.tag,
                    result,
                    buffers: piece.buffers,
                }),
            }
        }
        self.finished = finished;
        let more = freed && !self.waiting.is_empty();
        if more {
            self.start_waiting();
        }
        more || !self.finished.is_empty()
    }

    fn part_done(&mut self, parent: u32, result: io::Result<()>) {
        let slot = &mut self.parents[parent as usize];
        let Some(p) = slot else { return };
        p.pieces -= 1;
        if p.result.is_ok() {
            p.result = result;
        }
        if p.pieces == 0
            && let Some(p) = slot.take()
        {
            self.free_parents.push(parent);
            self.ready.push(Completion {
                tag: p.tag,
                result: p.result,
                buffers: p.buffers,
            });
        }
    }
}

fn is_whole(offset: u64, len: u64, needs: Alignment) -> bool {
    (offset | len).is_multiple_of(needs.offset.into())
}

/// Whether the piece changes parts of blocks, which has to be done by [`write_alone`].
pub(crate) fn changes_parts(file: &HostFile, action: Action, offset: u64, len: u64) -> bool {
    let changes = matches!(action, Action::Write { .. } | Action::Zero { .. });
    changes
        && file
            .direct()
            .is_some_and(|needs| !is_whole(offset, len, needs))
}

/// Writes parts of blocks, all on this thread. The caller sees to it that nobody else writes to the file
/// meanwhile.
pub(crate) fn write_alone(file: &HostFile, piece: &Piece) -> io::Result<()> {
    let mut done = 0;
    let mut bytes = vec![
        0;
        usize::try_from(piece.len)
            .unwrap_or(AREA_BYTES)
            .min(AREA_BYTES)
    ];
    while done < piece.len {
        let now = &mut bytes[..(piece.len - done).min(AREA_BYTES as u64) as usize];
        if matches!(piece.action, Action::Write { .. }) {
            piece.buffers.copy_to(done, now);
        }
        file.write_bytes(now, piece.offset + done)?;
        done += now.len() as u64;
    }
    if piece.action == (Action::Write { durable: true }) {
        file.file().sync_data()?;
    }
    Ok(())
}
