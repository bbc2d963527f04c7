//! A store in RAM, for tests and benches.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::request::check;
use crate::{
    BlockStore, Completion, Geometry, Operation, Request, SECTOR_BYTES, StoreError, StoreQueue,
};

/// A store in RAM. Clones share it.
#[derive(Debug, Clone)]
pub struct RamStore {
    bytes: Arc<Mutex<Vec<u8>>>,
    read_only: bool,
}

impl RamStore {
    /// Zeroes; what is over a multiple of [`SECTOR_BYTES`] is cut off.
    #[must_use]
    pub fn new(size_bytes: usize) -> Self {
        Self::from_bytes(vec![0; size_bytes])
    }

    /// A store that holds `bytes`; what is over a multiple of [`SECTOR_BYTES`] is cut off.
    #[must_use]
    pub fn from_bytes(mut bytes: Vec<u8>) -> Self {
        bytes.truncate(bytes.len() / SECTOR_BYTES as usize * SECTOR_BYTES as usize);
        Self {
            bytes: Arc::new(Mutex::new(bytes)),
            read_only: false,
        }
    }

    /// The same bytes, not to be written.
    #[must_use]
    pub fn read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }

    /// A copy of what lies in it.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, request: &Request) -> io::Result<()> {
        let mut bytes = self.lock();
        check(request, &geometry(&bytes, self.read_only))?;
        // Within the store, as was checked, which is in memory.
        let (at, end) = (
            request.offset as usize,
            (request.offset + request.len) as usize,
        );
        match request.operation {
            Operation::Read => request.buffers.copy_from(0, &bytes[at..end]),
            Operation::Write { .. } => request.buffers.copy_to(0, &mut bytes[at..end]),
            Operation::Discard | Operation::WriteZeroes { .. } => bytes[at..end].fill(0),
            Operation::Flush => {}
        }
        Ok(())
    }
}

fn geometry(bytes: &[u8], read_only: bool) -> Geometry {
    Geometry {
        size_bytes: bytes.len() as u64,
        block_size_bytes: SECTOR_BYTES as u32,
        physical_block_size_bytes: SECTOR_BYTES as u32,
        optimal_io_bytes: 0,
        read_only,
        discard: !read_only,
        discard_granularity_bytes: if read_only { 0 } else { SECTOR_BYTES as u32 },
        write_zeroes: !read_only,
        rotational: Some(false),
    }
}

impl BlockStore for RamStore {
    fn geometry(&self) -> Geometry {
        geometry(&self.lock(), self.read_only)
    }

    fn engine_name(&self) -> &'static str {
        "ram"
    }

    fn open_queues(&self, count: usize, _: u32) -> Result<Vec<Box<dyn StoreQueue>>, StoreError> {
        let queue = || -> Box<dyn StoreQueue> {
            Box::new(RamQueue {
                store: self.clone(),
                done: Vec::new(),
            })
        };
        Ok((0..count).map(|_| queue()).collect())
    }

    fn refresh(&self) -> Result<Geometry, StoreError> {
        Ok(self.geometry())
    }

    fn resize(&self, size_bytes: u64) -> Result<Geometry, StoreError> {
        let refuse = |reason: &str| StoreError::Resize {
            path: "(ram)".into(),
            size_bytes,
            reason: reason.into(),
        };
        let size = usize::try_from(size_bytes).map_err(|_| refuse("that is no size"))?;
        if self.read_only || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(refuse("it is read-only, or the size is no multiple of 512"));
        }
        self.lock().resize(size, 0);
        Ok(self.geometry())
    }

    fn identity(&self) -> String {
        format!("ram{:x}", Arc::as_ptr(&self.bytes) as usize)
    }
}

struct RamQueue {
    store: RamStore,
    done: Vec<Completion>,
}

impl StoreQueue for RamQueue {
    fn submit(&mut self, request: Request) {
        let result = self.store.carry_out(&request);
        self.done.push(Completion {
            tag: request.tag,
            result,
            buffers: request.buffers,
        });
    }

    fn kick(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn collect(&mut self, done: &mut Vec<Completion>) {
        self.kick(done);
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn drain(&mut self, done: &mut Vec<Completion>) {
        self.kick(done);
    }

    fn geometry(&self) -> Geometry {
        self.store.geometry()
    }
}
