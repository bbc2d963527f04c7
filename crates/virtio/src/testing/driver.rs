//! A driver that writes real rings.

use std::time::{Duration, Instant};

use alveole_guest_memory::GuestRam;

use super::Access;
use crate::{features, status};

/// How long the driver waits for a device.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where rings and buffers begin.
const FIRST_ADDR: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a request.
#[derive(Debug, Clone, Copy)]
pub enum Buffer<'a> {
    /// Bytes for the device to read.
    Out(&'a [u8]),
    /// Room for the device to write.
    In(u32),
    /// Any descriptor: address, length, whether the device may write.
    Raw(u64, u32, bool),
}

/// Whether a request takes one descriptor that refers to a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indirect {
    /// A chain in the table of the queue.
    No,
    /// A table of its own.
    Yes,
}

/// A request that the device has given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub len: u32,
    /// The contents of all [`Buffer::In`], one after the other.
    pub bytes: Vec<u8>,
}

struct Ring {
    size: u16,
    addrs: [u64; 3],
    avail_idx: u16,
    used_seen: u16,
    free: Vec<u16>,
    /// By head.
    in_flight: Vec<Option<InFlight>>,
}

struct InFlight {
    descriptors: Vec<u16>,
    /// Address and length of everything the device may write.
    results: Vec<(u64, u32)>,
}

/// Plays the guest.
pub struct Driver {
    access: Box<dyn Access>,
    ram: GuestRam,
    next_addr: u64,
    features: u64,
    rings: Vec<Option<Ring>>,
}

impl Driver {
    /// A driver that has not touched the device yet.
    #[must_use]
    pub fn new(access: Box<dyn Access>, ram: &GuestRam) -> Self {
        Self {
            access,
            ram: ram.clone(),
            next_addr: FIRST_ADDR,
            features: 0,
            rings: Vec::new(),
        }
    }

    /// The registers.
    pub fn access(&mut self) -> &mut dyn Access {
        self.access.as_mut()
    }

    /// Goes on with other registers, those of the device that has taken the state of this one over.
    pub fn move_to(&mut self, access: Box<dyn Access>) {
        self.access = access;
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The features agreed upon.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Goes the whole way (section 3.1.1) with all features the device offers, and all queues.
    pub fn start(&mut self) {
        let offered = self.access.device_features();
        self.start_with(offered);
    }

    /// Goes the whole way with these features.
    pub fn start_with(&mut self, features: u64) {
        self.negotiate(features | features::VERSION_1);
        let mut queue = 0;
        loop {
            let max = self.access.queue_max_size(queue);
            if max == 0 {
                break;
            }
            self.add_queue(queue, max);
            queue += 1;
        }
        self.driver_ok();
    }

    /// Resets, and comes as far as FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.reset();
        self.access.set_status(status::ACKNOWLEDGE);
        self.access.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.access.set_driver_features(features);
        self.features = features;
        let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.access.set_status(wanted);
        assert_eq!(
            self.access.status(),
            wanted,
            "features {features:#x} were refused"
        );
    }

    /// Says DRIVER_OK, and asserts that it is taken.
    pub fn driver_ok(&mut self) {
        let now = self.access.status();
        self.access.set_status(now | status::DRIVER_OK);
        let status = self.access.status();
        assert_eq!(
            status & (status::DRIVER_OK | status::NEEDS_RESET),
            status::DRIVER_OK,
            "{status:#x}"
        );
    }

    /// Resets the device and forgets all rings.
    pub fn reset(&mut self) {
        self.access.set_status(0);
        assert_eq!(self.access.status(), 0);
        self.rings.clear();
        self.next_addr = FIRST_ADDR;
        self.features = 0;
    }

    /// `len` zeroed bytes of guest memory that nobody else uses.
    pub fn allocate(&mut self, len: u64) -> u64 {
        let addr = self.next_addr.next_multiple_of(4096);
        self.next_addr = addr + len;
        assert!(
            self.next_addr <= super::Stage::RAM_BYTES,
            "guest memory is full"
        );
        self.ram
            .write(addr, &vec![0; usize::try_from(len).unwrap()])
            .unwrap();
        addr
    }

    /// Sets one queue up with fresh rings and enables it.
    pub fn add_queue(&mut self, queue: u16, size: u16) {
        let n = u64::from(size);
        let addrs = [
            self.allocate(16 * n),
            self.allocate(6 + 2 * n),
            self.allocate(6 + 8 * n),
        ];
        self.access.set_up_queue(queue, size, addrs);
        self.access.enable_queue(queue);
        assert!(self.access.queue_is_enabled(queue));
        let at = usize::from(queue);
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, || None);
        }
        self.rings[at] = Some(Ring {
            size,
            addrs,
            avail_idx: 0,
            used_seen: 0,
            free: (0..size).rev().collect(),
            in_flight: (0..size).map(|_| None).collect(),
        });
    }

    fn ring(&mut self, queue: u16) -> &mut Ring {
        self.rings[usize::from(queue)].as_mut().unwrap()
    }

    /// Addresses of a queue's descriptor table, available and used ring.
    #[must_use]
    pub fn ring_addrs(&self, queue: u16) -> [u64; 3] {
        self.rings[usize::from(queue)].as_ref().unwrap().addrs
    }

    /// Makes one request available and rings.
    pub fn submit(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> u16 {
        let head = self.offer(queue, buffers, Indirect::No);
        self.access.notify(queue);
        head
    }

    /// Makes one request available without ringing.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer<'_>], indirect: Indirect) -> u16 {
        let mut descriptors = Vec::new();
        let mut results = Vec::new();
        for buffer in buffers {
            let (addr, len, writable) = match buffer {
                Buffer::Out(bytes) => {
                    let addr = self.allocate(bytes.len() as u64);
                    self.ram.write(addr, bytes).unwrap();
                    (addr, u32::try_from(bytes.len()).unwrap(), false)
                }
                Buffer::In(len) => {
                    let addr = self.allocate(u64::from(*len));
                    results.push((addr, *len));
                    (addr, *len, true)
                }
                Buffer::Raw(addr, len, writable) => (*addr, *len, *writable),
            };
            descriptors.push((addr, len, if writable { WRITE } else { 0 }));
        }
        let taken: Vec<u16> = {
            let count = if indirect == Indirect::Yes {
                1
            } else {
                descriptors.len()
            };
            let ring = self.ring(queue);
            (0..count)
                .map(|_| ring.free.pop().expect("the queue is full"))
                .collect()
        };
        if indirect == Indirect::Yes {
            let table = self.allocate(16 * descriptors.len() as u64);
            let last = descriptors.len() - 1;
            for (i, (addr, len, flags)) in descriptors.iter().enumerate() {
                let next = u16::try_from(i + 1).unwrap();
                let more = if i == last { 0 } else { NEXT };
                write_descriptor(
                    &self.ram,
                    table,
                    u16::try_from(i).unwrap(),
                    *addr,
                    *len,
                    flags | more,
                    next,
                );
            }
            let len = u32::try_from(16 * descriptors.len()).unwrap();
            self.write_descriptor(queue, taken[0], table, len, INDIRECT, 0);
        } else {
            for (i, (addr, len, flags)) in descriptors.iter().enumerate() {
                let next = taken.get(i + 1);
                let more = if next.is_some() { NEXT } else { 0 };
                self.write_descriptor(
                    queue,
                    taken[i],
                    *addr,
                    *len,
                    flags | more,
                    next.copied().unwrap_or(0),
                );
            }
        }
        let head = taken[0];
        self.ring(queue).in_flight[usize::from(head)] = Some(InFlight {
            descriptors: taken,
            results,
        });
        self.make_available(queue, head);
        head
    }

    /// Writes one descriptor of the queue's table, whatever it says.
    pub fn write_descriptor(
        &mut self,
        queue: u16,
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let table = self.ring_addrs(queue)[0];
        write_descriptor(&self.ram, table, index, addr, len, flags, next);
    }

    /// Puts `head`, whatever it is, into the available ring.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let ring = self.ring(queue);
        let entry = ring.addrs[1] + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        let (idx_addr, idx) = (ring.addrs[1] + 2, ring.avail_idx);
        self.ram.write(entry, &head.to_le_bytes()).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.ram.write(idx_addr, &idx.to_le_bytes()).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    /// Sets the available index, whatever it is.
    pub fn set_available_index(&mut self, queue: u16, idx: u16) {
        let ring = self.ring(queue);
        ring.avail_idx = idx;
        let addr = ring.addrs[1] + 2;
        self.ram.write(addr, &idx.to_le_bytes()).unwrap();
    }

    /// Rings.
    pub fn notify(&mut self, queue: u16) {
        self.access.notify(queue);
    }

    /// Takes the next used request, if there is one.
    pub fn poll(&mut self, queue: u16) -> Option<Used> {
        let ram = self.ram.clone();
        let wants_events = self.features & features::EVENT_IDX != 0;
        let ring = self.ring(queue);
        let idx: u16 = ram.read_plain(ring.addrs[2] + 2).unwrap();
        if idx == ring.used_seen {
            return None;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let entry = ring.addrs[2] + 4 + 8 * u64::from(ring.used_seen % ring.size);
        let head: u32 = ram.read_plain(entry).unwrap();
        let len: u32 = ram.read_plain(entry + 4).unwrap();
        ring.used_seen = ring.used_seen.wrapping_add(1);
        if wants_events {
            // Interrupt me for the next one.
            let event = ring.addrs[1] + 4 + 2 * u64::from(ring.size);
            ram.write(event, &ring.used_seen.to_le_bytes()).unwrap();
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        }
        let head = u16::try_from(head).unwrap();
        let InFlight {
            descriptors,
            results,
        } = ring.in_flight[usize::from(head)]
            .take()
            .unwrap_or_else(|| panic!("the device gave back {head}, which it was not given"));
        ring.free.extend(descriptors);
        let mut bytes = Vec::new();
        for (addr, len) in results {
            let start = bytes.len();
            bytes.resize(start + len as usize, 0);
            ram.read(addr, &mut bytes[start..]).unwrap();
        }
        Some(Used { head, len, bytes })
    }

    /// Waits for the next used request.
    pub fn wait(&mut self, queue: u16) -> Used {
        let start = Instant::now();
        loop {
            if let Some(used) = self.poll(queue) {
                return used;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the device completes nothing (status {:#x})",
                self.access.status()
            );
            std::thread::yield_now();
        }
    }

    /// One request from beginning to end: what the device wrote, and how many bytes it says that was.
    pub fn request(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> Used {
        let head = self.submit(queue, buffers);
        let used = self.wait(queue);
        assert_eq!(used.head, head);
        used
    }

    /// Waits until the device says NEEDS_RESET; false when it completes everything offered instead, or
    /// goes on in peace.
    pub fn wait_for_needs_reset(&mut self, patience: Duration) -> bool {
        let start = Instant::now();
        while start.elapsed() < patience {
            if self.access.status() & status::NEEDS_RESET != 0 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    /// Waits for an interrupt of each kind that is asked for.
    pub fn wait_interrupt(&mut self, queue: bool, config: bool) {
        let start = Instant::now();
        let mut got = super::Interrupts::default();
        while (queue && !got.queue) || (config && !got.config) {
            let more = self.access.take_interrupts();
            got.queue |= more.queue;
            got.config |= more.config;
            assert!(start.elapsed() < PATIENCE, "no interrupt: {got:?}");
            std::thread::yield_now();
        }
    }
}

fn write_descriptor(
    ram: &GuestRam,
    table: u64,
    index: u16,
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    let at = table + 16 * u64::from(index);
    ram.write(at, &addr.to_le_bytes()).unwrap();
    ram.write(at + 8, &len.to_le_bytes()).unwrap();
    ram.write(at + 12, &flags.to_le_bytes()).unwrap();
    ram.write(at + 14, &next.to_le_bytes()).unwrap();
}
