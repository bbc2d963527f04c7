//! The engine on io_uring: one ring for each queue, made for its files alone.
//!
//! The ring is restricted before it is enabled: it takes six operations, on its registered files only, and
//! can never be given others. Who takes the process over has no more in it than in the calls themselves.
//!
//! Files are registered: that restricts the ring, and saves about 7 % of the processor time of a read from the page
//! cache. Not registered are buffers: they would save a seventh of that of direct I/O and nothing of reads from the page
//! cache, but would pin all of a guest's RAM. Nor is there a polling thread: it would take a processor for each ring.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use io_uring::register::{Probe, Restriction};
use io_uring::{IoUring, opcode, squeue, types};

use crate::host_file::HostFile;
use crate::piece::{Action, Piece, Step};
use crate::sync::carry_out;
use crate::sys::{self, Ranges};

/// What a ring may be asked for.
const OPERATIONS: [(u8, &str); 6] = [
    (opcode::Read::CODE, "READ"),
    (opcode::Write::CODE, "WRITE"),
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
];

/// Most requests of one ring at the host. A guest chooses its queue size; this is what virtio allows.
pub(crate) const MAX_DEPTH: u32 = 4096;

/// How often a batch is handed over again when the kernel took none of it and nothing is in flight
/// whose end would free something.
const MAX_IDLE_ATTEMPTS: u32 = 1000;

/// Whether the host offers io_uring as this crate uses it.
///
/// # Errors
/// The reason, for people.
pub fn io_uring_available() -> Result<(), String> {
    let ring = build_ring(1).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has none, or a sandbox hides it".to_owned(),
        Some(libc::EPERM) => match fs::read_to_string("/proc/sys/kernel/io_uring_disabled") {
            Ok(n) if n.trim() != "0" => {
                let n = n.trim();
                format!("the host forbids it by the sysctl kernel.io_uring_disabled={n}")
            }
            _ => "a sandbox or security policy of the host forbids it".to_owned(),
        },
        Some(libc::ENOMEM) => {
            "there is no memory for it within the limit of locked memory (ulimit -l)".to_owned()
        }
        Some(libc::EINVAL) => "this kernel is older than 5.10".to_owned(),
        _ => e.to_string(),
    })?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|e| format!("the kernel does not say what it can: {e}"))?;
    for (code, name) in OPERATIONS {
        if !probe.is_supported(code) {
            return Err(format!("this kernel has no IORING_OP_{name}"));
        }
    }
    Ok(())
}

/// A ring that is not enabled yet, with the best flags that this kernel knows.
fn build_ring(entries: u32) -> io::Result<IoUring> {
    // SUBMIT_ALL (5.18): a bad entry does not hold the rest of its batch back. COOP_TASKRUN (5.19):
    // completions do not interrupt the thread, which enters the kernel soon anyway, or sees by TASKRUN_FLAG that
    // it should. Not SINGLE_ISSUER and what needs it: queues move between threads.
    let modern = IoUring::builder()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .build(entries);
    match modern {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_r_disabled().build(entries)
        }
        other => other,
    }
}

/// `IORING_ENTER_GETEVENTS` of Linux include/uapi/linux/io_uring.h.
const ENTER_GETEVENTS: u32 = 1;

/// The step of opening a ring that failed, with what the host said.
pub(crate) type RingError = (&'static str, io::Error);

pub(crate) struct UringEngine {
    ring: IoUring,
    event: Arc<OwnedFd>,
    files: Arc<[Arc<HostFile>]>,
    /// What is at the kernel or on its way, by the number that the kernel knows it by.
    slots: Vec<Option<Piece>>,
    free: Vec<u32>,
    /// What has no slot yet.
    pending: VecDeque<Piece>,
    /// A write that goes by a plain call if nothing comes to it before the kick.
    alone: Option<Piece>,
    /// The slots of the entries that the kernel has not taken yet; it takes them in order.
    unsubmitted: VecDeque<u32>,
    reaped: Vec<(u32, i32)>,
    idle_attempts: u32,
    /// The eventfd is not signalled: the owner looks by itself.
    quiet: bool,
    /// The ring is broken: nothing is handed over any more.
    dead: bool,
}

impl UringEngine {
    pub(crate) fn new(files: Arc<[Arc<HostFile>]>, depth: u32) -> Result<Self, RingError> {
        let depth = depth.clamp(1, MAX_DEPTH);
        let ring = build_ring(depth).map_err(|e| ("making the ring", e))?;
        let event = sys::event_fd().map_err(|e| ("making its eventfd", e))?;
        let submitter = ring.submitter();
        let fds: Vec<_> = files.iter().map(|f| f.file().as_raw_fd()).collect();
        submitter
            .register_files(&fds)
            .map_err(|e| ("registering its files", e))?;
        submitter
            .register_eventfd(event.as_raw_fd())
            .map_err(|e| ("registering its eventfd", e))?;
        let fixed = squeue::Flags::FIXED_FILE.bits();
        let mut allowed: Vec<_> = OPERATIONS
            .iter()
            .map(|(code, _)| Restriction::sqe_op(*code))
            .chain([
                Restriction::sqe_flags_allowed(fixed),
                Restriction::sqe_flags_required(fixed),
            ])
            .collect();
        submitter
            .register_restrictions(&mut allowed)
            .map_err(|e| ("restricting the ring", e))?;
        submitter
            .register_enable_rings()
            .map_err(|e| ("enabling the ring", e))?;
        Ok(Self {
            event: Arc::new(event),
            files,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            pending: VecDeque::new(),
            alone: None,
            unsubmitted: VecDeque::with_capacity(depth as usize),
            reaped: Vec::with_capacity(depth as usize),
            idle_attempts: 0,
            quiet: false,
            dead: false,
            ring,
        })
    }

    pub(crate) fn event(&self) -> &Arc<OwnedFd> {
        &self.event
    }

    /// How many pieces the kernel has.
    fn at_kernel(&self) -> usize {
        self.slots.len() - self.free.len() - self.unsubmitted.len()
    }

    /// Takes a piece. No system call.
    pub(crate) fn start(&mut self, piece: Piece, finished: &mut Vec<(Piece, io::Result<()>)>) {
        if self.dead {
            finished.push(failed(piece));
            return;
        }
        match self.alone.take() {
            Some(first) => self.queue(first),
            None if self.free.len() == self.slots.len() && self.better_by_a_call(&piece) => {
                self.alone = Some(piece);
                return;
            }
            None => {}
        }
        self.queue(piece);
    }

    /// Whether the kernel would hand the piece to a worker although it waits for nothing: a write to the page cache of a
    /// regular file, where its file system cannot promise not to wait (ext4, overlayfs and tmpfs cannot). Waking that
    /// worker costs ten times the write. Of several writes the first alone pays it, and then they are one system call.
    fn better_by_a_call(&self, piece: &Piece) -> bool {
        let file = &self.files[piece.file];
        piece.action == (Action::Write { durable: false })
            && !file.is_device()
            && file.direct().is_none()
    }

    fn queue(&mut self, piece: Piece) {
        match self.free.pop() {
            Some(slot) => self.put(slot, piece),
            None => self.pending.push_back(piece),
        }
    }

    fn put(&mut self, slot: u32, piece: Piece) {
        let piece = self.slots[slot as usize].insert(piece);
        let file = &self.files[piece.file];
        let fd = types::Fixed(piece.file as u32);
        let entry = entry_of(piece.step(file), fd).user_data(slot.into());
        // SAFETY: what the entry points to is guest RAM, an area, zeroes, or the list of such ranges on the heap;
        // the piece keeps all of them, and stays in its slot until the kernel has answered.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // There are as many entries as slots.
        debug_assert!(pushed.is_ok());
        self.unsubmitted.push_back(slot);
    }

    /// Whether [`UringEngine::kick`] has something to do.
    pub(crate) fn has_news(&mut self) -> bool {
        self.alone.is_some()
            || !self.unsubmitted.is_empty()
            || !self.ring.completion().is_empty()
            || self.ring.submission().taskrun()
    }

    /// The eventfd need not be signalled: the owner looks by itself.
    pub(crate) fn stop_event(&mut self) {
        if !self.quiet {
            self.ring.completion().disable_eventfd();
            self.quiet = true;
        }
    }

    /// The eventfd is to be signalled for what completes from now on. What came just before is seen by who looks
    /// afterwards: the kernel publishes a completion before it reads this flag, with a barrier in between
    /// (Linux io_uring/io_uring.c, `__io_cq_unlock_post`).
    pub(crate) fn want_event(&mut self) {
        if self.quiet {
            self.ring.completion().enable_eventfd();
            self.quiet = false;
            fence(Ordering::SeqCst);
        }
    }

    /// Hands everything over that was taken, and takes what is complete. One system call for a batch, none
    /// where there is none; more only where something was cut short or put off.
    pub(crate) fn kick(&mut self, finished: &mut Vec<(Piece, io::Result<()>)>) {
        if let Some(mut piece) = self.alone.take() {
            let result = carry_out(&mut piece, &self.files);
            finished.push((piece, result));
        }
        loop {
            let before = self.unsubmitted.len();
            if before > 0 || self.ring.submission().taskrun() {
                self.enter(0, finished);
            }
            let stuck = before > 0 && self.unsubmitted.len() == before;
            self.reap(finished);
            if self.unsubmitted.is_empty() || stuck {
                break;
            }
        }
        // Nothing will complete and wake the caller up, so it has to come back by itself.
        if !self.unsubmitted.is_empty() && self.at_kernel() == 0 {
            sys::signal(&self.event);
        }
    }

    /// Waits until nothing is left.
    pub(crate) fn finish(&mut self, finished: &mut Vec<(Piece, io::Result<()>)>) {
        loop {
            self.kick(finished);
            if self.at_kernel() > 0 {
                self.enter(1, finished);
            } else if self.unsubmitted.is_empty() {
                break;
            }
        }
    }

    fn enter(&mut self, want: usize, finished: &mut Vec<(Piece, io::Result<()>)>) {
        let submitter = self.ring.submitter();
        let entered = if self.dead {
            // SAFETY: hands nothing over, and passes no argument.
            unsafe { submitter.enter::<()>(0, want as u32, ENTER_GETEVENTS, None) }
        } else {
            submitter.submit_and_wait(want)
        };
        match entered.map_err(|e| (e.raw_os_error(), e)) {
            Ok(n) => {
                self.unsubmitted.drain(..n.min(self.unsubmitted.len()));
                self.idle_attempts = 0;
            }
            Err((Some(libc::EINTR), _)) => {}
            // The kernel has no memory, or waits for its completions to be taken.
            Err((Some(libc::EAGAIN | libc::EBUSY), _))
                if self.at_kernel() > 0 || self.idle_attempts < MAX_IDLE_ATTEMPTS =>
            {
                self.idle_attempts += u32::from(self.at_kernel() == 0);
            }
            Err((_, e)) => self.give_up(&e, finished),
        }
    }

    /// The ring takes nothing more: what was not handed over fails. Its entries still lie in the ring, so
    /// nothing may be handed over ever again.
    fn give_up(&mut self, error: &io::Error, finished: &mut Vec<(Piece, io::Result<()>)>) {
        if !self.dead {
            log::error!("io_uring takes no more requests: {error}; the disk fails from here on");
        }
        self.dead = true;
        for slot in std::mem::take(&mut self.unsubmitted) {
            if let Some(piece) = self.slots[slot as usize].take() {
                finished.push(failed(piece));
                self.free.push(slot);
            }
        }
        finished.extend(self.pending.drain(..).map(failed));
    }

    /// Takes what is complete. No system call.
    fn reap(&mut self, finished: &mut Vec<(Piece, io::Result<()>)>) {
        let mut reaped = std::mem::take(&mut self.reaped);
        loop {
            reaped.extend(
                self.ring
                    .completion()
                    .map(|c| (c.user_data() as u32, c.result())),
            );
            if reaped.is_empty() {
                break;
            }
            for (slot, result) in reaped.drain(..) {
                self.complete(slot, result, finished);
            }
        }
        self.reaped = reaped;
    }

    fn complete(&mut self, slot: u32, result: i32, finished: &mut Vec<(Piece, io::Result<()>)>) {
        let Some(mut piece) = self.slots[slot as usize].take() else {
            return;
        };
        let result = u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        let file = &self.files[piece.file];
        match piece.after(result, file) {
            Some(result) => {
                finished.push((piece, result));
                match self.pending.pop_front() {
                    Some(next) => self.put(slot, next),
                    None => self.free.push(slot),
                }
            }
            None if self.dead => {
                finished.push(failed(piece));
                self.free.push(slot);
            }
            None => self.put(slot, piece),
        }
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        // The kernel writes to the buffers of what it has: they must not go before it is done.
        let mut finished = Vec::new();
        self.finish(&mut finished);
    }
}

fn entry_of(step: Step<'_>, fd: types::Fixed) -> squeue::Entry {
    match step {
        Step::Read(Ranges::One(ptr, len), at) => {
            opcode::Read::new(fd, ptr, len as u32).offset(at).build()
        }
        Step::Read(Ranges::Many(list), at) => {
            opcode::Readv::new(fd, list.as_ptr(), list.len() as u32)
                .offset(at)
                .build()
        }
        Step::Write(Ranges::One(ptr, len), at, durable) => opcode::Write::new(fd, ptr, len as u32)
            .offset(at)
            .rw_flags(flags(durable))
            .build(),
        Step::Write(Ranges::Many(list), at, durable) => {
            opcode::Writev::new(fd, list.as_ptr(), list.len() as u32)
                .offset(at)
                .rw_flags(flags(durable))
                .build()
        }
        Step::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Step::Fallocate { mode, offset, len } => opcode::Fallocate::new(fd, len)
            .offset(offset)
            .mode(mode)
            .build(),
        // Carried out before it comes here.
        Step::DiscardBlocks { .. } => opcode::Fsync::new(fd).build(),
    }
}

fn failed(piece: Piece) -> (Piece, io::Result<()>) {
    (piece, Err(io::Error::from_raw_os_error(libc::EIO)))
}

fn flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_file::How;

    #[test]
    fn a_ring_takes_nothing_else_and_never_will() {
        if let Err(reason) = io_uring_available() {
            let line = format!("SKIPPED a_ring_takes_nothing_else_and_never_will: {reason}\n");
            eprint!("{line}");
            if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
                let mut log = fs::File::options()
                    .append(true)
                    .create(true)
                    .open(path)
                    .unwrap();
                std::io::Write::write_all(&mut log, line.as_bytes()).unwrap();
            }
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let how = How {
            write: true,
            direct: false,
            lock: false,
        };
        let host = HostFile::open(file.path(), how).unwrap();
        let mut engine = UringEngine::new(Arc::new([Arc::new(host)]), 4).unwrap();
        let mut bytes = [0_u8; 512];
        let other = types::Fd(file.as_file().as_raw_fd());
        for (entry, fits) in [
            (
                opcode::Read::new(types::Fixed(0), bytes.as_mut_ptr(), 512).build(),
                true,
            ),
            (
                opcode::Read::new(other, bytes.as_mut_ptr(), 512).build(),
                false,
            ),
            (opcode::Nop::new().build(), false),
            (
                opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
                false,
            ),
            (
                opcode::Fsync::new(types::Fixed(0))
                    .build()
                    .flags(squeue::Flags::IO_LINK),
                false,
            ),
        ] {
            // SAFETY: there is room for what the first may read, and it is waited for.
            unsafe { engine.ring.submission().push(&entry) }.unwrap();
            engine.ring.submitter().submit_and_wait(1).unwrap();
            let result = engine.ring.completion().next().unwrap().result();
            let expected = if fits { 512 } else { -libc::EACCES };
            assert_eq!(result, expected, "{entry:?}");
        }
        let submitter = engine.ring.submitter();
        let files = submitter.register_files_update(0, &[0]);
        assert_eq!(files.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
