//! Blocks in a qcow2 image. Bytes that have their place go the same way as those of a raw image, through the engine; what
//! changes tables is done on the thread that submits.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use alveole_guest_memory::GuestBuffers;
use alveole_qcow2::{Image, ImageError, WriteExtent};

use crate::carrier::{Carrier, changes_parts};
use crate::chain::{Chain, Place};
use crate::copy;
use crate::file_queue::{self, Behind};
use crate::gate::{Gate, SharedCarrier, lock};
use crate::host_file::HostFile;
use crate::piece::{Action, Piece};
use crate::request::check;
use crate::{
    BlockStore, Cache, Geometry, OpenError, OpenOptions, Operation, Request, SECTOR_BYTES,
    StoreError, StoreQueue,
};

/// Most bytes that are copied at once on their way through the tables: a guest names any length.
const COPY_BYTES: u64 = 1 << 20;

struct Shared {
    chain: Chain,
    cache: Cache,
    uring: bool,
    read_only: bool,
    cluster_bytes: u32,
    discards: bool,
}

impl Shared {
    fn file(&self) -> &Arc<HostFile> {
        &self.chain.files()[0]
    }

    fn gate(&self) -> &Gate {
        self.file().gate()
    }

    fn image(&self) -> io::Result<&Image> {
        let missing = || io::Error::from(io::ErrorKind::Unsupported);
        self.chain.image().ok_or_else(missing)
    }

    fn geometry(&self) -> Geometry {
        let size = self.chain.image().map_or(0, Image::size_bytes);
        let file = self.file().geometry();
        Geometry {
            size_bytes: size / SECTOR_BYTES * SECTOR_BYTES,
            block_size_bytes: file.block_size_bytes,
            physical_block_size_bytes: file.physical_block_size_bytes,
            optimal_io_bytes: self.cluster_bytes,
            read_only: self.read_only,
            discard: self.discards,
            discard_granularity_bytes: if self.discards { self.cluster_bytes } else { 0 },
            write_zeroes: !self.read_only,
            rotational: file.rotational,
        }
    }

    /// Writes on this thread, wherever the bytes go.
    fn write(&self, offset: u64, buffers: &GuestBuffers) -> io::Result<()> {
        let (image, len) = (self.image()?, buffers.len_bytes());
        let mut bytes = Vec::new();
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let rest = (len - done).min(COPY_BYTES);
            let extent = image.lookup_write(at, rest).map_err(plain)?;
            let (WriteExtent::InPlace { len: now, .. } | WriteExtent::Allocating { len: now }) =
                extent;
            bytes.resize(now as usize, 0);
            buffers.copy_to(done, &mut bytes);
            match extent {
                WriteExtent::InPlace { file_offset, .. } => {
                    self.file().write_bytes(&bytes, file_offset)?;
                }
                WriteExtent::Allocating { .. } => image
                    .write_allocating(at, &bytes, &self.chain.below())
                    .map_err(plain)?,
            }
            done += now;
        }
        Ok(())
    }

    /// What changes tables, or parts of blocks, or must last.
    fn change(&self, request: &Request) -> io::Result<()> {
        let (image, below) = (self.image()?, self.chain.below());
        let (offset, len) = (request.offset, request.len);
        match request.operation {
            Operation::Write { durable } => {
                self.write(offset, &request.buffers)?;
                if durable {
                    image.flush().map_err(plain)?;
                }
                Ok(())
            }
            Operation::Discard => image.discard(offset, len).map_err(plain),
            Operation::WriteZeroes { may_unmap } => image
                .write_zeroes(offset, len, may_unmap, &below)
                .map_err(plain),
            Operation::Read | Operation::Flush => Ok(()),
        }
    }
}

/// What the host said, where it did: a full disk must look like one.
fn plain(error: ImageError) -> io::Error {
    match error {
        ImageError::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}

/// A qcow2 image with what it is laid over.
pub(crate) struct Qcow2Store(Arc<Shared>);

impl Qcow2Store {
    pub(crate) fn open(path: &Path, options: &OpenOptions, uring: bool) -> Result<Self, OpenError> {
        let chain = Chain::open(path, options)?;
        let info = chain.image().map(Image::info);
        let (version, cluster) = info.map_or((3, 0), |i| (i.version, i.cluster_size_bytes));
        let shared = Shared {
            chain,
            cache: options.cache,
            uring,
            read_only: options.read_only,
            cluster_bytes: u32::try_from(cluster).unwrap_or(0),
            discards: !options.read_only && version >= 3,
        };
        if shared.geometry().size_bytes == 0 {
            return Err(OpenError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(Self(Arc::new(shared)))
    }
}

impl BlockStore for Qcow2Store {
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
        Ok(self.geometry())
    }

    fn resize(&self, size_bytes: u64) -> Result<Geometry, StoreError> {
        let shared = &self.0;
        let resize = || {
            let image = shared.image().map_err(|e| e.to_string())?;
            // Nothing may be under way that was looked up before.
            shared
                .gate()
                .pass_alone(|| image.resize(size_bytes, &shared.chain.below()))
                .map_err(|e| e.to_string())
        };
        resize().map_err(|reason| StoreError::Resize {
            path: shared.file().path().to_owned(),
            size_bytes,
            reason,
        })?;
        Ok(self.geometry())
    }

    fn identity(&self) -> String {
        self.0.file().identity().to_owned()
    }

    fn may_copy_image(&self) -> Result<(), StoreError> {
        copy::may_copy(self.0.file())
    }

    fn copy_image(&self, into: &File) -> Result<(), StoreError> {
        copy::copy(self.0.file(), into)
    }
}

impl Shared {
    /// Reads and writes: what has its place goes to the engine.
    fn transfer(shared: &Shared, carrier: &mut Carrier, request: Request) {
        let write = request.operation != Operation::Read;
        let (offset, len) = (request.offset, request.len);
        let action = if write {
            Action::Write { durable: false }
        } else {
            Action::Read
        };
        let first = Self::place(shared, write, offset, len);
        if let Ok((Some(Place::Data { file, offset }), all)) = first
            && all == len
        {
            let piece = Piece::new(file, action, offset, len, request.buffers);
            carrier.transfer(request.tag, piece);
            return;
        }
        let whole = request.buffers.part(0, len);
        let parent = carrier.begin(request.tag, request.buffers);
        let mut next = first;
        let mut done = 0;
        let result = loop {
            let (place, now) = match next {
                Ok(found) => found,
                Err(e) => break Err(e),
            };
            let at = offset + done;
            let part = match place {
                Some(Place::Data { file, offset }) => {
                    let part = whole.part(done, now);
                    carrier.add(parent, Piece::new(file, action, offset, now, part));
                    Ok(())
                }
                Some(Place::Zero) => {
                    whole.zero(done, now);
                    Ok(())
                }
                Some(Place::Compressed { layer }) => {
                    Self::decompress(shared, layer, at, &whole.part(done, now))
                }
                None => shared.write(at, &whole.part(done, now)),
            };
            done += now;
            if part.is_err() || done == len {
                break part;
            }
            next = Self::place(shared, write, offset + done, len - done);
        };
        carrier.end(parent, result);
    }

    /// Where the first bytes are or go; `None`: nowhere yet.
    fn place(shared: &Shared, write: bool, at: u64, len: u64) -> io::Result<(Option<Place>, u64)> {
        if !write {
            let (place, len) = shared.chain.find(0, at, len).map_err(plain)?;
            return Ok((Some(place), len));
        }
        Ok(
            match shared.image()?.lookup_write(at, len).map_err(plain)? {
                WriteExtent::InPlace { file_offset, len } => {
                    let place = Place::Data {
                        file: 0,
                        offset: file_offset,
                    };
                    (Some(place), len)
                }
                WriteExtent::Allocating { len } => (None, len),
            },
        )
    }

    fn decompress(shared: &Shared, layer: usize, at: u64, into: &GuestBuffers) -> io::Result<()> {
        let mut bytes = vec![0; into.len_bytes().min(COPY_BYTES) as usize];
        let mut done = 0;
        while done < into.len_bytes() {
            let now = &mut bytes[..(into.len_bytes() - done).min(COPY_BYTES) as usize];
            shared
                .chain
                .read_compressed(layer, at + done, now)
                .map_err(plain)?;
            into.copy_from(done, now);
            done += now.len() as u64;
        }
        Ok(())
    }
}

impl Behind for Shared {
    fn files(&self) -> Arc<[Arc<HostFile>]> {
        Arc::clone(self.chain.files())
    }

    fn uring(&self) -> bool {
        self.uring
    }

    fn geometry(&self) -> Geometry {
        Self::geometry(self)
    }

    fn submit(&self, carrier: &SharedCarrier, mut request: Request) {
        let shared = self;
        let cached = shared.cache == Cache::Unsafe;
        if cached && let Operation::Write { durable } = &mut request.operation {
            *durable = false;
        }
        let checked = check(&request, &Self::geometry(self));
        let nothing = match request.operation {
            Operation::Flush => cached || shared.read_only,
            _ => request.len == 0,
        };
        if checked.is_err() || nothing {
            lock(carrier).complete(request.tag, checked, request.buffers);
            return;
        }
        let action = match request.operation {
            Operation::Write { durable } => Action::Write { durable },
            Operation::WriteZeroes { may_unmap } => Action::Zero { may_unmap },
            _ => Action::Read,
        };
        if changes_parts(shared.file(), action, request.offset, request.len) {
            let result = shared.gate().pass_alone(|| shared.change(&request));
            lock(carrier).complete(request.tag, result, request.buffers);
            return;
        }
        loop {
            let mut carrier = lock(carrier);
            // Reads, too: a resize moves what they have looked up.
            if shared.gate().is_closed() {
                drop(carrier);
                shared.gate().wait();
                continue;
            }
            match request.operation {
                Operation::Read | Operation::Write { durable: false } => {
                    Self::transfer(shared, &mut carrier, request);
                }
                // What the tables give back is counted at the next flush of their own; that may be late.
                Operation::Flush => {
                    let piece = Piece::new(0, Action::Sync, 0, 0, request.buffers);
                    carrier.transfer(request.tag, piece);
                }
                _ => {
                    let result = shared.change(&request);
                    carrier.complete(request.tag, result, request.buffers);
                }
            }
            return;
        }
    }
}
