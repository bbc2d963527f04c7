//! One transfer within one file, and the system calls that it takes: short ones are continued, and what
//! a file system cannot do is done in another way. Does not know who makes the calls.

use std::io;

use alveole_guest_memory::{GuestBuffers, MAX_IOVECS};

use crate::bounce::Area;
use crate::host_file::{HostFile, PUNCH_HOLE, ZERO_RANGE};
use crate::sys::{MAX_TRANSFER, Ranges};

/// How often a call may be interrupted or put off before the request fails: a host that is out of
/// memory for good must not keep a queue busy for ever.
const MAX_RETRIES: u32 = 10_000;

const ZEROES_BYTES: usize = 16 << 10;
#[repr(C, align(16384))]
struct Zeroes([u8; ZEROES_BYTES]);
static ZEROES: Zeroes = Zeroes([0; ZEROES_BYTES]);

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Read,
    Write { durable: bool },
    Sync,
    Discard,
    Zero { may_unmap: bool },
}

/// The next system call.
#[derive(Clone, Copy)]
pub(crate) enum Step<'a> {
    Read(Ranges<'a>, u64),
    Write(Ranges<'a>, u64, bool),
    Sync,
    Fallocate { mode: i32, offset: u64, len: u64 },
    DiscardBlocks { offset: u64, len: u64 },
}

/// How zeroes are made at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroWay {
    Punch,
    Range,
    Write,
}

/// Ranges that all lead to the same zeroes.
#[derive(Debug)]
struct ZeroList(Vec<libc::iovec>);
// SAFETY: the pointers lead to a static.
unsafe impl Send for ZeroList {}

#[derive(Debug)]
pub(crate) struct Piece {
    /// The tag of the request, where the piece is all of it.
    pub(crate) tag: u64,
    /// Whose part it is, where it is not.
    pub(crate) parent: Option<u32>,
    /// Which file of the queue.
    pub(crate) file: usize,
    pub(crate) action: Action,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Where the guest has the bytes; with an area only the kernel does not see them.
    pub(crate) buffers: GuestBuffers,
    /// Stands in for `buffers`, which begin `skip` bytes after its start.
    pub(crate) area: Option<Area>,
    pub(crate) skip: usize,
    moved: u64,
    rest: Option<GuestBuffers>,
    way: ZeroWay,
    zeroes: Option<Box<ZeroList>>,
    retries: u32,
}

impl Piece {
    pub(crate) fn new(
        file: usize,
        action: Action,
        offset: u64,
        len: u64,
        buffers: GuestBuffers,
    ) -> Self {
        Self {
            tag: 0,
            parent: None,
            file,
            action,
            offset,
            len,
            buffers,
            area: None,
            skip: 0,
            moved: 0,
            rest: None,
            way: match action {
                Action::Zero { may_unmap: false } => ZeroWay::Range,
                _ => ZeroWay::Punch,
            },
            zeroes: None,
            retries: 0,
        }
    }

    /// What to ask the kernel for. The ranges stay where they are until [`Piece::after`], even if the piece
    /// is moved meanwhile: they lie in guest RAM or on the heap.
    pub(crate) fn step(&mut self, file: &HostFile) -> Step<'_> {
        let at = self.offset + self.moved;
        match self.action {
            Action::Read => Step::Read(self.ranges(), at),
            Action::Write { durable } => Step::Write(self.ranges(), at, durable),
            Action::Sync => Step::Sync,
            Action::Discard if file.is_device() => Step::DiscardBlocks {
                offset: self.offset,
                len: self.len,
            },
            Action::Discard => self.fallocate(PUNCH_HOLE),
            Action::Zero { .. } => {
                if self.way == ZeroWay::Punch && file.lacks(PUNCH_HOLE) {
                    self.way = ZeroWay::Range;
                }
                if self.way == ZeroWay::Range && file.lacks(ZERO_RANGE) {
                    self.way = ZeroWay::Write;
                }
                match self.way {
                    ZeroWay::Punch => self.fallocate(PUNCH_HOLE),
                    ZeroWay::Range => self.fallocate(ZERO_RANGE),
                    ZeroWay::Write => Step::Write(self.zero_ranges(), at, false),
                }
            }
        }
    }

    fn fallocate(&self, mode: i32) -> Step<'static> {
        Step::Fallocate {
            mode,
            offset: self.offset,
            len: self.len,
        }
    }

    fn ranges(&mut self) -> Ranges<'_> {
        let left = usize::try_from(self.len - self.moved).unwrap_or(MAX_TRANSFER);
        if let Some(area) = &mut self.area {
            // An area holds all of its piece, so `moved` is within it.
            let rest = &mut area.bytes()[self.moved as usize..];
            return Ranges::One(rest.as_mut_ptr(), left.min(rest.len()));
        }
        let buffers = self.rest.as_ref().unwrap_or(&self.buffers);
        let ranges = match self.action {
            Action::Read => buffers.iovecs_to_fill(),
            _ => buffers.iovecs(),
        };
        match ranges {
            [one] => Ranges::One(one.iov_base.cast(), one.iov_len.min(MAX_TRANSFER)),
            many => Ranges::Many(&many[..many.len().min(MAX_IOVECS)]),
        }
    }

    fn zero_ranges(&mut self) -> Ranges<'_> {
        let list = self
            .zeroes
            .get_or_insert_with(|| Box::new(ZeroList(Vec::new())));
        list.0.clear();
        let mut left = self.len - self.moved;
        while left > 0 && list.0.len() < MAX_IOVECS {
            let now = left.min(ZEROES_BYTES as u64);
            list.0.push(libc::iovec {
                iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
                iov_len: now as usize,
            });
            left -= now;
        }
        Ranges::Many(&list.0)
    }

    /// Takes in what came of the step. `None`: there is another one.
    pub(crate) fn after(
        &mut self,
        result: io::Result<u64>,
        file: &HostFile,
    ) -> Option<io::Result<()>> {
        match result {
            Ok(n) => self.after_success(n),
            Err(e) => self.after_error(e, file),
        }
    }

    fn after_success(&mut self, n: u64) -> Option<io::Result<()>> {
        let transfer = match self.action {
            Action::Read | Action::Write { .. } => true,
            Action::Zero { .. } => self.way == ZeroWay::Write,
            Action::Sync | Action::Discard => false,
        };
        if !transfer {
            return Some(Ok(()));
        }
        self.moved += n;
        // What an area reads beyond the guest's bytes, to its next block, may lie behind the end of the file.
        let wanted = match &self.area {
            Some(_) if self.action == Action::Read => self.skip as u64 + self.buffers.len_bytes(),
            _ => self.len,
        };
        if self.moved >= wanted {
            return Some(Ok(()));
        }
        if n == 0 {
            let kind = io::ErrorKind::UnexpectedEof;
            return Some(Err(io::Error::new(kind, "the file has become shorter")));
        }
        if self.area.is_none() && !matches!(self.action, Action::Zero { .. }) {
            self.rest = Some(self.buffers.part(self.moved, self.len - self.moved));
        }
        None
    }

    fn after_error(&mut self, error: io::Error, file: &HostFile) -> Option<io::Result<()>> {
        let errno = error.raw_os_error().unwrap_or(0);
        if matches!(errno, libc::EINTR | libc::EAGAIN) {
            self.retries += 1;
            if self.retries < MAX_RETRIES {
                return None;
            }
        }
        if self.action == Action::Sync {
            file.set_sync_failed();
        }
        let missing = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV);
        match (self.action, self.way) {
            // A hint: who cannot follow it does not fail.
            (Action::Discard, _) if missing || errno == libc::EINVAL => Some(Ok(())),
            (Action::Zero { .. }, ZeroWay::Punch | ZeroWay::Range)
                if missing || matches!(errno, libc::EINVAL | libc::EPERM) =>
            {
                let (mode, next) = match self.way {
                    ZeroWay::Punch => (PUNCH_HOLE, ZeroWay::Range),
                    _ => (ZERO_RANGE, ZeroWay::Write),
                };
                if missing {
                    file.set_lacks(mode);
                }
                self.way = next;
                None
            }
            _ => Some(Err(error)),
        }
    }
}
