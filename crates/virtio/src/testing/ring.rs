//! A queue without device, transport and loop: for fuzzers of what parses chains.

use std::sync::Arc;

use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_interrupts::Doorbell;
use virtio_queue::{Queue, QueueT};

use super::{Interrupts, Recorder};
use crate::{Chain, LiveQueue, Signals};

/// Most requests that one memory is asked for.
const MOST_REQUESTS: u32 = 1024;

/// Guest memory whose first bytes a fuzzer writes: the available ring of a queue of 64 at 0, its descriptors at
/// 0x100, its used ring at 0x600, and what follows.
pub struct FuzzRing {
    ram: GuestRam,
}

impl Default for FuzzRing {
    fn default() -> Self {
        Self::new()
    }
}

impl FuzzRing {
    const SIZE: u16 = 64;
    /// Bytes that are written anew each time.
    const BYTES: usize = 16 << 10;

    /// One MiB of memory.
    #[must_use]
    pub fn new() -> Self {
        let plan = MemoryPlan::around_hole(1 << 20).unwrap();
        Self {
            ram: GuestRam::map(&plan).unwrap(),
        }
    }

    /// Puts `bytes` into memory and takes each request until there is none or the ring is broken. The first
    /// byte says whether event indices were agreed upon.
    pub fn walk(&self, bytes: &[u8], mut each: impl FnMut(&Chain, &GuestRam)) {
        let (options, content) = bytes.split_first().unwrap_or((&0, &[]));
        let mut memory = vec![0; Self::BYTES];
        let len = content.len().min(Self::BYTES);
        memory[..len].copy_from_slice(&content[..len]);
        self.ram.write(0, &memory).unwrap();
        let mut queue = Queue::new(Self::SIZE).unwrap();
        queue.set_size(Self::SIZE);
        queue.set_desc_table_address(Some(0x100), Some(0));
        queue.set_avail_ring_address(Some(0), Some(0));
        queue.set_used_ring_address(Some(0x600), Some(0));
        queue.set_event_idx(options & 1 != 0);
        queue.set_ready(true);
        let told = Arc::new(std::sync::Mutex::new(Interrupts::default()));
        let signals = Signals::new(Box::new(Recorder(told)));
        let bell = Doorbell::new().unwrap();
        let mut queue = LiveQueue::new(0, queue, self.ram.clone(), bell, signals, "fuzzed");
        let mut chain = Chain::new();
        for _ in 0..MOST_REQUESTS {
            let Ok(true) = queue.pop(&mut chain) else {
                break;
            };
            each(&chain, &self.ram);
            if queue.complete(chain.head(), 1).is_err() || queue.notify().is_err() {
                break;
            }
        }
        let _ = queue.want_doorbell();
    }
}
