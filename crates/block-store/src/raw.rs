//! Blocks one after the other in a file or device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::carrier::{Carrier, changes_parts, write_alone};
use crate::gate::{SharedCarrier, lock};
use crate::host_file::{HostFile, How};
use crate::piece::{Action, Piece};
use crate::request::check;
use crate::{
    BlockStore, Cache, Completion, Geometry, OpenError, OpenOptions, Operation, Request,
    SECTOR_BYTES, StoreError, StoreQueue,
};

#[derive(Debug)]
struct Shared {
    file: Arc<HostFile>,
    size_bytes: AtomicU64,
    cache: Cache,
    uring: bool,
}

impl Shared {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes.load(Ordering::Acquire),
            ..self.file.geometry()
        }
    }
}

/// A raw image, a block device, an ISO image.
#[derive(Debug)]
pub(crate) struct RawStore(Arc<Shared>);

impl RawStore {
    pub(crate) fn open(path: &Path, options: &OpenOptions, uring: bool) -> Result<Self, OpenError> {
        let file = HostFile::open(
            path,
            How {
                write: !options.read_only,
                direct: options.cache == Cache::Direct,
                lock: options.lock,
            },
        )?;
        let size_bytes = file.geometry().size_bytes;
        if size_bytes == 0 {
            return Err(OpenError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(Self(Arc::new(Shared {
            file: Arc::new(file),
            size_bytes: AtomicU64::new(size_bytes),
            cache: options.cache,
            uring,
        })))
    }
}

impl BlockStore for RawStore {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn engine_name(&self) -> &'static str {
        crate::engine_name(self.0.uring)
    }

    fn open_queues(
        &self,
        count: usize,
        depth: u32,
    ) -> Result<Vec<Box<dyn StoreQueue>>, StoreError> {
        (0..count)
            .map(|_| -> Result<Box<dyn StoreQueue>, StoreError> {
                let files: Arc<[_]> = Arc::new([Arc::clone(&self.0.file)]);
                let carrier =
                    Carrier::new(files, self.0.uring, depth).map_err(|(what, source)| {
                        StoreError::Queue {
                            path: self.0.file.path().to_owned(),
                            depth,
                            what,
                            source,
                        }
                    })?;
                let event = carrier.event().cloned();
                let carrier = Arc::new(Mutex::new(carrier));
                self.0.file.gate().add(&carrier);
                Ok(Box::new(RawQueue {
                    shared: Arc::clone(&self.0),
                    carrier,
                    event,
                }))
            })
            .collect()
    }

    fn refresh(&self) -> Result<Geometry, StoreError> {
        let size = self.0.file.size_now().map_err(|source| StoreError::Size {
            path: self.0.file.path().to_owned(),
            source,
        })?;
        self.0.size_bytes.store(size, Ordering::Release);
        Ok(self.geometry())
    }

    fn resize(&self, size_bytes: u64) -> Result<Geometry, StoreError> {
        let file = &self.0.file;
        let refuse = |reason: String| StoreError::Resize {
            path: file.path().to_owned(),
            size_bytes,
            reason,
        };
        if file.is_device() {
            return Err(refuse(
                "it is a block device: resize that, then look again".into(),
            ));
        }
        if !file.is_writable() {
            return Err(refuse("it is open read-only".into()));
        }
        let block = u64::from(file.geometry().block_size_bytes).max(SECTOR_BYTES);
        if size_bytes == 0 || !size_bytes.is_multiple_of(block) {
            return Err(refuse(format!("the size must be a multiple of {block}")));
        }
        file.file()
            .set_len(size_bytes)
            .map_err(|e| refuse(e.to_string()))?;
        self.refresh()
    }

    fn identity(&self) -> String {
        self.0.file.identity().to_owned()
    }
}

struct RawQueue {
    shared: Arc<Shared>,
    carrier: SharedCarrier,
    event: Option<Arc<OwnedFd>>,
}

impl StoreQueue for RawQueue {
    fn submit(&mut self, request: Request) {
        let shared = &self.shared;
        let file = &shared.file;
        let checked = check(&request, &shared.geometry());
        let cached = shared.cache == Cache::Unsafe;
        let action = match request.operation {
            Operation::Read => Action::Read,
            Operation::Write { durable } => Action::Write {
                durable: durable && !cached,
            },
            Operation::Flush => Action::Sync,
            Operation::Discard => Action::Discard,
            Operation::WriteZeroes { may_unmap } => Action::Zero { may_unmap },
        };
        let (tag, offset, mut len) = (request.tag, request.offset, request.len);
        let nothing = match action {
            Action::Sync => cached || !file.is_writable(),
            _ => len == 0,
        };
        if checked.is_err() || nothing {
            lock(&self.carrier).complete(tag, checked, request.buffers);
            return;
        }
        let mut offset = offset;
        if action == Action::Discard && file.is_device() {
            // The device takes whole blocks of its own only; the rest keeps its bytes, as a hint may.
            let block = u64::from(file.geometry().block_size_bytes);
            let end = (offset + len) / block * block;
            offset = offset.next_multiple_of(block);
            len = end.saturating_sub(offset);
            if len == 0 {
                lock(&self.carrier).complete(tag, Ok(()), request.buffers);
                return;
            }
        }
        let piece = Piece::new(0, action, offset, len, request.buffers);
        if changes_parts(file, action, offset, len) {
            let result = file.gate().pass_alone(|| write_alone(file, &piece));
            lock(&self.carrier).complete(tag, result, piece.buffers);
            return;
        }
        loop {
            let mut carrier = lock(&self.carrier);
            if matches!(action, Action::Read | Action::Sync) || !file.gate().is_closed() {
                carrier.transfer(tag, piece);
                return;
            }
            drop(carrier);
            file.gate().wait();
        }
    }

    fn kick(&mut self, done: &mut Vec<Completion>) {
        let mut carrier = lock(&self.carrier);
        carrier.run();
        carrier.hand_out(done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.event.as_ref().map(|e| e.as_fd())
    }

    fn collect(&mut self, done: &mut Vec<Completion>) {
        self.kick(done);
    }

    fn in_flight(&self) -> usize {
        lock(&self.carrier).in_flight()
    }

    fn drain(&mut self, done: &mut Vec<Completion>) {
        let mut carrier = lock(&self.carrier);
        carrier.finish_all();
        carrier.hand_out(done);
    }

    fn geometry(&self) -> Geometry {
        self.shared.geometry()
    }
}
