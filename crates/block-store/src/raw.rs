//! Blocks one after the other in a file or device.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::carrier::{changes_parts, write_alone};
use crate::copy;
use crate::file_queue::{self, Behind};
use crate::gate::{SharedCarrier, lock};
use crate::host_file::{HostFile, How};
use crate::piece::{Action, Piece};
use crate::request::check;
use crate::{
    BlockStore, Cache, Geometry, OpenError, OpenOptions, Operation, Request, SECTOR_BYTES,
    StoreError, StoreQueue,
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
        // Of other formats the guest's disk does not end where the file does.
        let len_bytes = file.len_bytes();
        if let Some(needs) = file.direct().filter(|_| file.is_writable())
            && !len_bytes.is_multiple_of(needs.offset.into())
        {
            return Err(OpenError::Direct {
                path: path.to_owned(),
                why: format!(
                    "its size, {len_bytes} bytes, is no multiple of the {} that its file system writes directly; \
                     resize it",
                    needs.offset
                ),
            });
        }
        let tail = len_bytes % SECTOR_BYTES;
        if tail != 0 {
            log::warn!(
                "{}: {len_bytes} bytes is no multiple of {SECTOR_BYTES}: the last {tail} are not seen by the guest",
                path.display()
            );
        }
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
        file_queue::open_queues(&self.0, count, depth)
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

    fn may_copy_image(&self) -> Result<(), StoreError> {
        copy::may_copy(&self.0.file)
    }

    fn copy_image(&self, into: &File) -> Result<(), StoreError> {
        copy::copy(&self.0.file, into)
    }
}

impl Behind for Shared {
    fn files(&self) -> Arc<[Arc<HostFile>]> {
        Arc::new([Arc::clone(&self.file)])
    }

    fn uring(&self) -> bool {
        self.uring
    }

    fn geometry(&self) -> Geometry {
        Self::geometry(self)
    }

    fn submit(&self, carrier: &SharedCarrier, request: Request) {
        let file = &self.file;
        let checked = check(&request, &Self::geometry(self));
        let cached = self.cache == Cache::Unsafe;
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
            lock(carrier).complete(tag, checked, request.buffers);
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
                lock(carrier).complete(tag, Ok(()), request.buffers);
                return;
            }
        }
        let piece = Piece::new(0, action, offset, len, request.buffers);
        if changes_parts(file, action, offset, len) {
            let result = file.gate().pass_alone(|| write_alone(file, &piece));
            lock(carrier).complete(tag, result, piece.buffers);
            return;
        }
        loop {
            let mut carrier = lock(carrier);
            if matches!(action, Action::Read | Action::Sync) || !file.gate().is_closed() {
                carrier.transfer(tag, piece);
                return;
            }
            drop(carrier);
            file.gate().wait();
        }
    }
}
