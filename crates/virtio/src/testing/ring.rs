//! A queue without device, transport and loop: for fuzzers of what parses chains.

use std::sync::Arc;

use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_interrupts::Doorbell;
use virtio_queue::{Queue, QueueT};

use super::{Interrupts, Recorder};
use crate::{Chain, LiveQueue, Signals};

const SIZE: u16 = 64;
const RAM_BYTES: u64 = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Indirect tables and data; the same bytes, so that a fuzzer finds both.
const CONTENT: u64 = 0x4000;

/// Guest memory whose rings a fuzzer writes.
///
/// Input: one byte of options, one with how many requests there are, one with how far off the available
/// index is, then descriptors of ten bytes each: where the address begins (one of eight ways), three bytes of it,
/// four of length, one of flags, one of next. They are the queue's table, and in full form also lie where
/// indirect tables and data are.
pub struct FuzzRing {
    ram: GuestRam,
}

impl Default for FuzzRing {
    fn default() -> Self {
        Self::new()
    }
}

/// Most addresses a fuzzer makes up would be outside memory: half of these are inside.
fn address(base: u8, low: [u8; 3]) -> u64 {
    let [a, b, c] = low;
    let low = u64::from(u32::from_le_bytes([a, b, c, 0]));
    match base % 8 {
        0..=3 => CONTENT + low % 0x4000,
        4 => low,
        5 => RAM_BYTES.wrapping_sub(low),
        6 => 0u64.wrapping_sub(low),
        _ => low << 40,
    }
}

impl FuzzRing {
    /// One MiB of memory.
    #[must_use]
    pub fn new() -> Self {
        let plan = MemoryPlan::around_hole(RAM_BYTES).unwrap();
        Self {
            ram: GuestRam::map(&plan).unwrap(),
        }
    }

    /// Writes the rings as `bytes` say and takes each request until there is none or the ring is broken.
    pub fn walk(&self, bytes: &[u8], mut each: impl FnMut(&Chain, &GuestRam)) {
        let [options, requests, off, descriptors @ ..] = bytes else {
            return;
        };
        let mut table = Vec::new();
        for part in descriptors.chunks_exact(10).take(usize::from(SIZE)) {
            table.extend(address(part[0], [part[1], part[2], part[3]]).to_le_bytes());
            table.extend(&part[4..8]);
            table.extend([part[8] & 7, 0, part[9] % (SIZE as u8 + 1), 0]);
        }
        table.resize(16 * usize::from(SIZE), 0);
        self.ram.write(DESCRIPTORS, &table).unwrap();
        // Raw, too: the header of a request, and tables of any length.
        self.ram.write(CONTENT, &table).unwrap();
        let raw = descriptors.get(..4096.min(descriptors.len())).unwrap();
        self.ram.write(CONTENT + 0x1000, raw).unwrap();
        let requests = u16::from(requests % 80);
        let idx = requests.wrapping_add(if *off > 250 { u16::from(*off) << 8 } else { 0 });
        self.ram.write(AVAILABLE, &[0, 0]).unwrap();
        self.ram.write(AVAILABLE + 2, &idx.to_le_bytes()).unwrap();
        for entry in 0..SIZE {
            let at = AVAILABLE + 4 + 2 * u64::from(entry);
            self.ram.write(at, &entry.to_le_bytes()).unwrap();
        }
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(options & 1 != 0);
        queue.set_ready(true);
        let told = Arc::new(std::sync::Mutex::new(Interrupts::default()));
        let signals = Signals::new(Box::new(Recorder(told)));
        let bell = Doorbell::new().unwrap();
        let mut queue = LiveQueue::new(0, queue, self.ram.clone(), bell, signals, "fuzzed");
        let mut chain = Chain::new();
        while let Ok(true) = queue.pop(&mut chain) {
            each(&chain, &self.ram);
            if queue.complete(chain.head(), 1).is_err() || queue.notify().is_err() {
                break;
            }
        }
        let _ = queue.want_doorbell();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a fuzzer is worth if this does not hold: its input becomes chains.
    #[test]
    fn an_input_becomes_chains() {
        let one = [0, 0, 0, 0, 16, 0, 0, 0, 1, 1];
        let two = [0, 0x10, 0, 0, 1, 0, 0, 0, 2, 0];
        let mut bytes = vec![1, 1, 0];
        bytes.extend([one, two].concat());
        let mut seen = Vec::new();
        FuzzRing::new().walk(&bytes, |chain, ram| {
            assert!(ram.contains(chain.readable()[0].addr, 16));
            seen.push((chain.head(), chain.readable_bytes(), chain.writable_bytes()));
        });
        assert_eq!(seen, [(0, 16, 1)]);
        let mut walked = 0;
        bytes[1] = 2;
        FuzzRing::new().walk(&bytes, |_, _| walked += 1);
        assert_eq!(walked, 2, "the second descriptor is a chain, too");
        FuzzRing::new().walk(&[0, 1, 255], |_, _| panic!("an index jump is none"));
        FuzzRing::new().walk(&[], |_, _| panic!("nothing is none"));
    }
}
