//! What the tests of this crate share: files to work on, a queue with a model beside it, loud skips.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test program uses a part of it"
)]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use alveole_block_store::{
    BlockStore, Completion, Engine, OpenOptions, Operation, Request, StoreQueue, io_uring_available,
};
use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan, PAGE_SIZE};

/// Says that `test` is skipped, where people and tools look.
pub(crate) fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut log = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}

/// A folder on a real file system, where `O_DIRECT` works: not /tmp, which is RAM on many hosts.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A file of `size_bytes`, filled with bytes that differ from place to place.
pub(crate) fn file(folder: &Path, name: &str, size_bytes: usize) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, pattern(size_bytes, 1)).unwrap();
    path
}

/// Bytes that differ from place to place and from seed to seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub(crate) fn ram() -> GuestRam {
    GuestRam::map(&MemoryPlan::around_hole(32 << 20).unwrap()).unwrap()
}

/// One request in flight, with what it should do to the model.
struct Flight {
    tag: u64,
    operation: Operation,
    offset: u64,
    len: u64,
    expected: Option<Vec<u8>>,
}

/// Queues of one store, and what the store should hold.
pub(crate) struct Rig {
    pub(crate) ram: GuestRam,
    pub(crate) store: Arc<dyn BlockStore>,
    pub(crate) queues: Vec<Box<dyn StoreQueue>>,
    pub(crate) model: Vec<u8>,
    flights: Vec<Flight>,
    next_addr: u64,
    next_tag: u64,
}

impl Rig {
    pub(crate) fn new(
        store: Arc<dyn BlockStore>,
        queues: usize,
        depth: u32,
        model: Vec<u8>,
    ) -> Self {
        let queues = store.open_queues(queues, depth).unwrap();
        let rig = Self {
            ram: ram(),
            store,
            queues,
            model,
            flights: Vec::new(),
            next_addr: 0,
            next_tag: 1,
        };
        assert_eq!(rig.store.geometry().size_bytes, rig.model.len() as u64);
        rig
    }

    /// Buffers of `len` bytes in pieces of odd lengths at odd addresses where `cut` is not 0.
    pub(crate) fn buffers(&mut self, len: u64, cut: u64) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(&self.ram);
        if cut == 0 {
            self.next_addr = self.next_addr.next_multiple_of(4096);
            buffers.push(self.next_addr, len).unwrap();
            self.next_addr += len;
            return buffers;
        }
        let mut left = len;
        while left > 0 {
            let now = left.min(cut);
            buffers.push(self.next_addr + 1, now).unwrap();
            self.next_addr += now + 3;
            left -= now;
        }
        buffers
    }

    fn overlaps(&self, offset: u64, len: u64) -> bool {
        self.flights
            .iter()
            .any(|f| f.offset < offset + len && offset < f.offset + f.len)
    }

    /// Submits to queue `at`, after what is in its way is done.
    pub(crate) fn submit(
        &mut self,
        at: usize,
        operation: Operation,
        offset: u64,
        len: u64,
        cut: u64,
    ) {
        if self.overlaps(offset, len) || self.next_addr + 4 * len > 30 << 20 {
            self.settle();
        }
        let transfers = matches!(operation, Operation::Read | Operation::Write { .. });
        let buffers = self.buffers(if transfers { len } else { 0 }, cut);
        let tag = self.next_tag;
        self.next_tag += 1;
        let range = offset as usize..(offset + len) as usize;
        let mut expected = None;
        match operation {
            Operation::Read => {
                // So that bytes which nobody wrote are seen.
                buffers.copy_from(0, &vec![0xa5; len as usize]);
                expected = Some(self.model[range].to_vec());
            }
            Operation::Write { .. } => {
                let bytes = pattern(len as usize, tag);
                buffers.copy_from(0, &bytes);
                self.model[range].copy_from_slice(&bytes);
            }
            Operation::WriteZeroes { .. } => self.model[range].fill(0),
            Operation::Discard | Operation::Flush => {}
        }
        self.flights.push(Flight {
            tag,
            operation,
            offset,
            len,
            expected,
        });
        self.queues[at].submit(Request {
            tag,
            operation,
            offset,
            len,
            buffers,
        });
    }

    pub(crate) fn kick(&mut self, at: usize) {
        let mut done = Vec::new();
        self.queues[at].kick(&mut done);
        self.take(done);
    }

    /// Waits for everything, and checks it.
    pub(crate) fn settle(&mut self) {
        for at in 0..self.queues.len() {
            let mut done = Vec::new();
            self.queues[at].drain(&mut done);
            assert_eq!(self.queues[at].in_flight(), 0);
            self.take(done);
        }
        assert!(self.flights.is_empty(), "requests were lost");
        self.next_addr = 0;
    }

    pub(crate) fn take(&mut self, done: Vec<Completion>) {
        for completion in done {
            let at = self
                .flights
                .iter()
                .position(|f| f.tag == completion.tag)
                .unwrap();
            let flight = self.flights.swap_remove(at);
            let what = (flight.operation, flight.offset, flight.len);
            assert!(
                completion.result.is_ok(),
                "{what:?}: {:?}",
                completion.result
            );
            if let Some(expected) = flight.expected {
                let mut got = vec![0; expected.len()];
                completion.buffers.copy_to(0, &mut got);
                assert!(got == expected, "{what:?} read something else");
            }
        }
    }

    /// Reads all of the store by its first queue.
    pub(crate) fn read_all(&mut self) -> Vec<u8> {
        self.settle();
        let len = self.model.len() as u64;
        let buffers = self.buffers(len, 0);
        let addr = 0;
        // A snapshot must hold what disks have written into RAM.
        self.ram.track_writes();
        self.queues[0].submit(Request {
            tag: 0,
            operation: Operation::Read,
            offset: 0,
            len,
            buffers,
        });
        let mut done = Vec::new();
        self.queues[0].drain(&mut done);
        assert!(done[0].result.is_ok(), "{:?}", done[0].result);
        let written = self.ram.take_written();
        let pages = std::iter::once(0..len.div_ceil(PAGE_SIZE));
        assert!(written.runs().eq(pages), "pages a read wrote");
        let mut all = vec![0; len as usize];
        self.ram.read(addr, &mut all).unwrap();
        self.next_addr = 0;
        all
    }
}

/// One request alone, on a queue where nothing else is in flight.
pub(crate) fn one(
    queue: &mut dyn StoreQueue,
    operation: Operation,
    offset: u64,
    buffers: GuestBuffers,
) -> std::io::Result<GuestBuffers> {
    let len = buffers.len_bytes();
    one_of(queue, operation, offset, len, buffers)
}

pub(crate) fn one_of(
    queue: &mut dyn StoreQueue,
    operation: Operation,
    offset: u64,
    len: u64,
    buffers: GuestBuffers,
) -> std::io::Result<GuestBuffers> {
    queue.submit(Request {
        tag: 77,
        operation,
        offset,
        len,
        buffers,
    });
    let mut done = Vec::new();
    queue.drain(&mut done);
    assert_eq!(done.len(), 1);
    let done = done.remove(0);
    assert_eq!(done.tag, 77);
    done.result.map(|()| done.buffers)
}

pub(crate) fn engines() -> Vec<Engine> {
    if let Err(reason) = io_uring_available() {
        skip("the engine io_uring", &reason);
        return vec![Engine::Sync];
    }
    vec![Engine::Sync, Engine::IoUring]
}

pub(crate) fn with(engine: Engine) -> OpenOptions {
    OpenOptions {
        engine,
        ..OpenOptions::default()
    }
}

pub(crate) fn reader() -> OpenOptions {
    OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    }
}

pub(crate) fn queue(store: &Arc<dyn BlockStore>) -> Box<dyn StoreQueue> {
    store.open_queues(1, 8).unwrap().remove(0)
}

/// Something mounted, taken away at the end.
pub(crate) struct Mount(pub(crate) PathBuf);

impl Mount {
    /// A file system in RAM; `None` where this user may not mount.
    pub(crate) fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(at)
            .output();
        mounted
            .is_ok_and(|o| o.status.success())
            .then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // At its ease: the kernel takes rings down at its own.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A loop device over a file, taken away at the end.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    pub(crate) fn new(over: &Path, options: &[&str]) -> Result<Self, String> {
        let mut reason = String::new();
        // Two that look for a free one at the same time find the same.
        for _ in 0..10 {
            let output = Command::new("losetup")
                .args(["--show", "-f"])
                .args(options)
                .arg(over)
                .output()
                .map_err(|e| format!("no losetup: {e}"))?;
            if output.status.success() {
                return Ok(Self(
                    String::from_utf8(output.stdout).unwrap().trim().into(),
                ));
            }
            reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            thread::sleep(Duration::from_millis(50));
        }
        Err(reason)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}
