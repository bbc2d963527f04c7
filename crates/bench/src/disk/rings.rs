//! A lean driver of a block device: rings, buffers and tables are written once, and used over and over, so
//! that the device is measured and not the driver.
//!
//! It does as a guest's driver does: one indirect table for each request, a doorbell only when the device
//! asks for one, an interrupt for each batch that was taken. It does not sleep: it looks at the rings. Knows
//! reads of one block only, and not what serves them.

use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use alveole_guest_memory::{AccessError, GuestRam};
use alveole_virtio::{QueuePart, TransportCore, features, status};
use anyhow::{Context, bail, ensure};

/// Bytes of a request.
pub(super) const BLOCK: u64 = 4096;
/// Guest memory that the rings and buffers need, for any number of queues that is measured.
pub(super) const RAM_BYTES: u64 = 16 << 20;

const PAGE: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const SECTOR_SHIFT: u32 = 9;
/// What is not a status of the device.
const NO_STATUS: u8 = 0xff;
/// How often the rings are looked at before another thread gets the processor.
const SPINS: u32 = 500;
/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long to go on.
#[derive(Debug, Clone, Copy)]
pub(super) enum Until {
    Requests(u64),
    Time(Duration),
}

/// One queue: where its parts are, and what has happened. A slot is its head, its table and its buffers.
struct Ring {
    size: u16,
    avail: u64,
    used: u64,
    slots: u64,
    avail_idx: u16,
    used_seen: u16,
    free: Vec<u16>,
    /// What the echo has seen.
    echoed: u16,
}

/// The guest's side of some queues.
pub(super) struct Rings {
    ram: GuestRam,
    rings: Vec<Ring>,
    blocks: u64,
    random: u64,
}

/// Who serves the rings.
pub(super) enum Server<'a> {
    /// A device, on threads of its own.
    Device(&'a TransportCore),
    /// Nobody: the driver gives each request back to itself.
    Echo,
}

impl Rings {
    /// Lays `queues` rings of `size` out in `ram`, `depth` requests each, for a disk of `disk_bytes`.
    pub(super) fn new(
        ram: &GuestRam,
        queues: u16,
        size: u16,
        depth: u16,
        disk_bytes: u64,
    ) -> anyhow::Result<Self> {
        ensure!(
            depth <= size,
            "{depth} requests do not fit a queue of {size}"
        );
        let mut next = PAGE;
        let mut take = |bytes: u64| {
            let addr = next;
            next += bytes.next_multiple_of(PAGE);
            addr
        };
        let mut rings = Vec::new();
        for _ in 0..queues {
            let n = u64::from(size);
            let table = take(16 * n);
            let (avail, used) = (take(6 + 2 * n), take(6 + 8 * n));
            let slots = take(u64::from(depth) * PAGE);
            let data = take(u64::from(depth) * BLOCK);
            for slot in 0..depth {
                let at = slots + u64::from(slot) * PAGE;
                let buffer = data + u64::from(slot) * BLOCK;
                descriptor(ram, table, slot, (at, 48, INDIRECT, 0))?;
                descriptor(ram, at, 0, (at + 64, 16, NEXT, 1))?;
                descriptor(ram, at, 1, (buffer, BLOCK as u32, NEXT | WRITE, 2))?;
                descriptor(ram, at, 2, (at + 128, 1, WRITE, 0))?;
                // A header of zeroes is a read of sector 0.
                ram.write(at + 64, &[0; 16])?;
            }
            rings.push(Ring {
                size,
                avail,
                used,
                slots,
                avail_idx: 0,
                used_seen: 0,
                free: (0..depth).collect(),
                echoed: 0,
            });
        }
        ensure!(next <= RAM_BYTES, "guest memory is full");
        Ok(Self {
            ram: ram.clone(),
            rings,
            blocks: disk_bytes / BLOCK,
            random: 88_172_645_463_325_252,
        })
    }

    /// Writes zeroes where the rings' indices are: as new.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        for ring in &self.rings {
            for (at, entry) in [(ring.avail, 2), (ring.used, 8)] {
                let bytes = 6 + entry * usize::from(ring.size);
                self.ram.write(at, &vec![0; bytes])?;
            }
        }
        Ok(())
    }

    /// Goes the whole way with the device (section 3.1.1), with all it offers.
    pub(super) fn start(&self, core: &mut TransportCore) -> anyhow::Result<()> {
        let mut now = status::ACKNOWLEDGE | status::DRIVER;
        core.set_status(now);
        for select in 0..2 {
            core.select_device_features(select);
            core.select_driver_features(select);
            core.set_driver_features(core.device_features());
        }
        now |= status::FEATURES_OK;
        core.set_status(now);
        for feature in [features::INDIRECT_DESC, features::EVENT_IDX] {
            ensure!(core.has(feature), "the device lacks feature {feature:#x}");
        }
        for (queue, ring) in (0..).zip(&self.rings) {
            core.select_queue(queue);
            core.set_queue_size(ring.size);
            // The table is the first thing that was laid out for a ring.
            let table = ring.avail - (16 * u64::from(ring.size)).next_multiple_of(PAGE);
            core.set_queue_addr(QueuePart::Descriptors, table);
            core.set_queue_addr(QueuePart::Available, ring.avail);
            core.set_queue_addr(QueuePart::Used, ring.used);
            core.enable_queue();
        }
        now |= status::DRIVER_OK;
        core.set_status(now);
        ensure!(
            core.status() == now,
            "the device does not start: {:#x}",
            core.status()
        );
        Ok(())
    }

    /// Keeps all slots of all queues busy; how many requests were completed. Nothing is in flight after it.
    pub(super) fn run(&mut self, server: &Server<'_>, until: Until) -> anyhow::Result<u64> {
        let start = Instant::now();
        let (mut submitted, mut completed, mut idle, mut last) = (0, 0, 0_u32, start);
        let mut going = true;
        while going || completed < submitted {
            let mut got = 0;
            for queue in 0..self.rings.len() {
                got += self.take_used(queue)?;
                if going {
                    let most = match until {
                        Until::Requests(count) => count - submitted,
                        Until::Time(_) => u64::MAX,
                    };
                    submitted += self.submit(queue, most, server)?;
                }
            }
            completed += got;
            going = going
                && match until {
                    Until::Requests(count) => submitted < count,
                    // The clock costs as much as a ring: looked at now and then.
                    Until::Time(time) => completed % 64 >= got || start.elapsed() < time,
                };
            if got > 0 {
                idle = 0;
                continue;
            }
            idle += 1;
            if idle % SPINS == 0 {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            if idle == SPINS {
                last = Instant::now();
            } else if idle % (SPINS * 64) == 0 && last.elapsed() > PATIENCE {
                bail!("the device completes nothing: {completed} of {submitted} requests");
            }
        }
        Ok(completed)
    }

    /// Makes all free slots available, at most `most`.
    fn submit(&mut self, queue: usize, most: u64, server: &Server<'_>) -> anyhow::Result<u64> {
        let ring = self.rings.get_mut(queue).context("no such queue")?;
        let old = ring.avail_idx;
        let mut count = 0;
        while count < most {
            let Some(slot) = ring.free.pop() else { break };
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let sector = (self.random % self.blocks) * (BLOCK >> SECTOR_SHIFT);
            let at = ring.slots + u64::from(slot) * PAGE;
            self.ram.write_plain(at + 72, &sector.to_le())?;
            self.ram.write_plain(at + 128, &NO_STATUS)?;
            let entry = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
            self.ram.write_plain(entry, &slot.to_le())?;
            ring.avail_idx = ring.avail_idx.wrapping_add(1);
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        fence(Ordering::SeqCst);
        self.ram
            .write_plain(ring.avail + 2, &ring.avail_idx.to_le())?;
        fence(Ordering::SeqCst);
        match server {
            Server::Device(core) => {
                let event: u16 = self
                    .ram
                    .read_plain(ring.used + 4 + 8 * u64::from(ring.size))?;
                // vring_need_event of section 2.7.10.
                let now = ring.avail_idx;
                if now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(old) {
                    core.ring(queue as u16);
                }
            }
            Server::Echo => ring.echo(&self.ram)?,
        }
        Ok(count)
    }

    /// Takes everything that was given back.
    fn take_used(&mut self, queue: usize) -> anyhow::Result<u64> {
        let ring = self.rings.get_mut(queue).context("no such queue")?;
        let mut count = 0;
        loop {
            let idx: u16 = self.ram.read_plain(ring.used + 2)?;
            if idx == ring.used_seen {
                break;
            }
            fence(Ordering::SeqCst);
            while ring.used_seen != idx {
                let entry = ring.used + 4 + 8 * u64::from(ring.used_seen % ring.size);
                let head: u32 = self.ram.read_plain(entry)?;
                let slot = u16::try_from(head).ok().filter(|&slot| slot < ring.size);
                let slot = slot.with_context(|| format!("the device gave back {head}"))?;
                let done: u8 = self
                    .ram
                    .read_plain(ring.slots + u64::from(slot) * PAGE + 128)?;
                ensure!(done == 0, "a request ended with status {done}");
                ring.free.push(slot);
                ring.used_seen = ring.used_seen.wrapping_add(1);
                count += 1;
            }
            // Interrupt me for the next one; what came meanwhile is seen by looking again.
            let event = ring.avail + 4 + 2 * u64::from(ring.size);
            self.ram.write_plain(event, &ring.used_seen.to_le())?;
            fence(Ordering::SeqCst);
        }
        Ok(count)
    }
}

impl Ring {
    /// Gives everything back that was made available.
    fn echo(&mut self, ram: &GuestRam) -> Result<(), AccessError> {
        while self.echoed != self.avail_idx {
            let place = u64::from(self.echoed % self.size);
            let head: u16 = ram.read_plain(self.avail + 4 + 2 * place)?;
            ram.write_plain(self.slots + u64::from(head) * PAGE + 128, &0_u8)?;
            ram.write_plain(self.used + 4 + 8 * place, &u32::from(head))?;
            self.echoed = self.echoed.wrapping_add(1);
        }
        ram.write_plain(self.used + 2, &self.echoed)
    }
}

fn descriptor(
    ram: &GuestRam,
    table: u64,
    index: u16,
    (addr, len, flags, next): (u64, u32, u16, u16),
) -> Result<(), AccessError> {
    let at = table + 16 * u64::from(index);
    ram.write_plain(at, &addr.to_le())?;
    ram.write_plain(at + 8, &len.to_le())?;
    ram.write_plain(at + 12, &flags.to_le())?;
    ram.write_plain(at + 14, &next.to_le())
}

#[cfg(test)]
mod tests {
    use alveole_guest_memory::MemoryPlan;

    use super::*;

    #[test]
    fn the_echo_completes_what_was_asked_for() {
        let ram = GuestRam::map(&MemoryPlan::around_hole(RAM_BYTES).unwrap()).unwrap();
        let mut rings = Rings::new(&ram, 4, 256, 32, 1 << 20).unwrap();
        for count in [1, 31, 1000, 100_000] {
            assert_eq!(
                rings.run(&Server::Echo, Until::Requests(count)).unwrap(),
                count
            );
        }
        let time = Until::Time(Duration::from_millis(5));
        assert!(rings.run(&Server::Echo, time).unwrap() > 100);
        assert!(Rings::new(&ram, 1, 16, 32, 1 << 20).is_err());
    }
}
