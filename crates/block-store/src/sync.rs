//! The engine of plain calls: one after the other, on the thread that kicks.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use crate::host_file::HostFile;
use crate::piece::{Piece, Step};
use crate::sys;

pub(crate) struct SyncEngine {
    files: Arc<[Arc<HostFile>]>,
    pending: VecDeque<Piece>,
}

impl SyncEngine {
    pub(crate) fn new(files: Arc<[Arc<HostFile>]>) -> Self {
        Self {
            files,
            pending: VecDeque::new(),
        }
    }

    pub(crate) fn start(&mut self, piece: Piece) {
        self.pending.push_back(piece);
    }

    pub(crate) fn has_more(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Carries out what was started, until nothing is left.
    pub(crate) fn run(&mut self, finished: &mut Vec<(Piece, io::Result<()>)>) {
        while let Some(mut piece) = self.pending.pop_front() {
            let result = carry_out(&mut piece, &self.files);
            finished.push((piece, result));
        }
    }
}

/// All calls of one piece.
pub(crate) fn carry_out(piece: &mut Piece, files: &[Arc<HostFile>]) -> io::Result<()> {
    let file = &files[piece.file];
    loop {
        let step = piece.step(file);
        // SAFETY: the ranges are guest RAM, an area or zeroes; the piece keeps all of them.
        let result = unsafe { call(step, file) };
        if let Some(result) = piece.after(result, file) {
            return result;
        }
    }
}

/// One call.
///
/// # Safety
/// The ranges of the step are mapped, and the kernel may write to those of a read.
pub(crate) unsafe fn call(step: Step<'_>, file: &HostFile) -> io::Result<u64> {
    match step {
        // SAFETY: the caller's promise.
        Step::Read(ranges, at) => unsafe { sys::read(file.file(), ranges, at) },
        // SAFETY: the caller's promise.
        Step::Write(ranges, at, durable) => unsafe { sys::write(file.file(), ranges, at, durable) },
        Step::Sync => file.file().sync_data().map(|()| 0),
        Step::Fallocate { mode, offset, len } => {
            sys::fallocate(file.file(), mode, offset, len).map(|()| 0)
        }
        Step::DiscardBlocks { offset, len } => {
            sys::discard_blocks(file.file(), offset, len).map(|()| 0)
        }
    }
}
