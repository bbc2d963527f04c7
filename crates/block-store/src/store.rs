//! The port: what a store is, and one queue's way to it.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

use alveole_guest_memory::GuestBuffers;

use crate::StoreError;

/// What requests count in: offsets and lengths are multiples of this many bytes, whatever the host's
/// blocks are.
pub const SECTOR_BYTES: u64 = 512;

/// What to do with a range of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffers from the store.
    Read,
    /// Write the buffers to the store.
    Write {
        /// Complete only when the bytes survive a loss of power (write-through).
        durable: bool,
    },
    /// Complete when every write that was completed before survives a loss of power.
    Flush,
    /// The range is no longer needed; what it reads as afterwards is not said.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// The host may give the space back.
        may_unmap: bool,
    },
}

/// One thing to do.
#[derive(Debug)]
pub struct Request {
    /// The caller's name for it, given back in its [`Completion`].
    pub tag: u64,
    /// What to do.
    pub operation: Operation,
    /// First byte in the store; a multiple of [`SECTOR_BYTES`].
    pub offset: u64,
    /// Bytes in the store; a multiple of [`SECTOR_BYTES`]. For reads and writes all of `buffers`; nothing
    /// for a flush.
    pub len: u64,
    /// Where the bytes of reads and writes go to and come from. May lie at any address.
    pub buffers: GuestBuffers,
}

/// What came of a [`Request`].
#[derive(Debug)]
pub struct Completion {
    /// The request's.
    pub tag: u64,
    /// Whether it was done. After an error the range of a write holds old bytes, new ones, or both.
    pub result: io::Result<()>,
    /// The request's, for use again.
    pub buffers: GuestBuffers,
}

/// What a store looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Its size; a multiple of [`SECTOR_BYTES`].
    pub size_bytes: u64,
    /// Smallest write that the host does not have to make of a read and a write.
    pub block_size_bytes: u32,
    /// What the medium itself writes at once.
    pub physical_block_size_bytes: u32,
    /// What a stream should be read and written in; 0 where the host does not say.
    pub optimal_io_bytes: u32,
    /// Writes, discards and zeroes are refused.
    pub read_only: bool,
    /// A discard gives something back.
    pub discard: bool,
    /// Less than this is not given back; 0 without `discard`.
    pub discard_granularity_bytes: u32,
    /// Zeroes need not be written out (at the moment: a host may find out later that they must).
    pub write_zeroes: bool,
    /// Whether the medium turns, where the host says so.
    pub rotational: Option<bool>,
}

/// One queue's way to a store.
///
/// Used by one thread at a time, but not always by the same: requests in flight survive the move.
/// Dropping it waits for what is in flight, since the kernel writes to its buffers.
pub trait StoreQueue: Send {
    /// Takes a request. Makes no system call where the engine hands over in batches. Never refuses:
    /// what is wrong with a request is said by its completion.
    fn submit(&mut self, request: Request);

    /// Hands over what was taken, by at most one system call where the engine hands over in batches, and
    /// adds what is complete to `done`.
    fn kick(&mut self, done: &mut Vec<Completion>);

    /// Becomes readable when completions wait for [`StoreQueue::collect`]: once for some of them, so it is
    /// watched by edges and need not be read. `None`: everything completes in [`StoreQueue::kick`].
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether [`StoreQueue::kick`] would find something complete, or has something to hand over. A look into
    /// memory, no system call.
    fn has_news(&mut self) -> bool {
        false
    }

    /// The caller looks by itself ([`StoreQueue::has_news`]): the descriptor of [`StoreQueue::event_fd`] need not
    /// become readable, until [`StoreQueue::want_event`].
    fn stop_event(&mut self) {}

    /// Has the descriptor become readable again at the next completion, as it does from the beginning. True:
    /// something is complete already, for which it may not.
    fn want_event(&mut self) -> bool {
        false
    }

    /// Adds what is complete to `done`. It may be nothing, although the descriptor said so.
    fn collect(&mut self, done: &mut Vec<Completion>);

    /// Requests taken and not yet handed back.
    fn in_flight(&self) -> usize;

    /// Hands over what was taken and waits until nothing is in flight: as long as the host needs.
    fn drain(&mut self, done: &mut Vec<Completion>);

    /// What the store looks like now.
    fn geometry(&self) -> Geometry;
}

/// Where blocks really are.
pub trait BlockStore: Send + Sync {
    /// What it looks like now.
    fn geometry(&self) -> Geometry;

    /// The engine that carries requests, in a word for people.
    fn engine_name(&self) -> &'static str;

    /// Opens `count` ways to it, each with room for `depth` requests at the host at the same time (more wait in
    /// the queue). Everything that a sandbox forbids later happens here.
    ///
    /// # Errors
    /// The host does not give what a queue needs.
    fn open_queues(&self, count: usize, depth: u32)
    -> Result<Vec<Box<dyn StoreQueue>>, StoreError>;

    /// Looks again how large the file or device is, for its owner may have changed that.
    ///
    /// # Errors
    /// The host does not say. The old size stays.
    fn refresh(&self) -> Result<Geometry, StoreError>;

    /// Makes the store `size_bytes` large. A smaller one loses its end.
    ///
    /// # Errors
    /// It is a device, read-only, or the host has no room.
    fn resize(&self, size_bytes: u64) -> Result<Geometry, StoreError>;

    /// A name that stays the same as long as the file or device does.
    fn identity(&self) -> String;

    /// Whether [`Self::copy_image`] can do anything.
    ///
    /// # Errors
    /// It cannot: the blocks lie in no file of their own.
    fn may_copy_image(&self) -> Result<(), StoreError> {
        Err(StoreError::NoFile)
    }

    /// Copies the file that the blocks lie in, as it is, into the new and empty file `into`: as a clone that shares its extents where
    /// the file system has such, else what is data of it. Of an image that is laid over others, only the image. Nothing may be in
    /// flight meanwhile.
    ///
    /// # Errors
    /// There is no such file, or the host cannot read the one or write the other.
    fn copy_image(&self, _into: &File) -> Result<(), StoreError> {
        self.may_copy_image()
    }
}
