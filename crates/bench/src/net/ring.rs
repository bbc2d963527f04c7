//! A lean driver of one queue of a network device: buffers and tables are written once, and used over and over, so that
//! the device is measured and not the driver.
//!
//! It does as a guest's driver does: an indirect table where a frame has several parts, a doorbell only when the device
//! asks for one, an interrupt for each batch that was taken. It does not sleep: it looks at the ring.

use std::sync::atomic::{Ordering, fence};

use alveole_guest_memory::GuestRam;
use alveole_virtio::{QueuePart, TransportCore};
use anyhow::Context;

/// Guest memory that the rings and buffers need.
pub(super) const RAM_BYTES: u64 = 64 << 20;
/// Size of each queue.
pub(super) const SIZE: u16 = 256;

const PAGE: u64 = 4096;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Gives guest memory out, page by page.
pub(super) struct Memory {
    pub(super) ram: GuestRam,
    next: u64,
}

impl Memory {
    pub(super) fn new(ram: &GuestRam) -> Self {
        Self {
            ram: ram.clone(),
            next: PAGE,
        }
    }

    fn take(&mut self, bytes: u64) -> u64 {
        let addr = self.next;
        self.next += bytes.next_multiple_of(PAGE);
        addr
    }
}

/// One queue, all of whose buffers are alike.
pub(super) struct Ring {
    ram: GuestRam,
    queue: u16,
    addrs: [u64; 3],
    avail_idx: u16,
    used_seen: u16,
    free: Vec<u16>,
}

impl Ring {
    /// A queue whose every buffer is `bytes` long, in parts of a page.
    pub(super) fn new(
        memory: &mut Memory,
        queue: u16,
        bytes: u64,
        is_writable: bool,
        content: &[u8],
    ) -> anyhow::Result<Self> {
        let n = u64::from(SIZE);
        let addrs = [
            memory.take(16 * n),
            memory.take(6 + 2 * n),
            memory.take(6 + 8 * n),
        ];
        let write = if is_writable { WRITE } else { 0 };
        for slot in 0..SIZE {
            let buffer = memory.take(bytes);
            memory.ram.write(buffer, content)?;
            let parts = bytes.div_ceil(PAGE);
            if parts == 1 {
                descriptor(
                    &memory.ram,
                    addrs[0],
                    slot,
                    (buffer, bytes as u32, write, 0),
                )?;
                continue;
            }
            let table = memory.take(16 * parts);
            for part in 0..parts {
                let len = (bytes - part * PAGE).min(PAGE) as u32;
                let more = if part + 1 < parts { NEXT } else { 0 };
                let next = part as u16 + 1;
                let at = buffer + part * PAGE;
                descriptor(
                    &memory.ram,
                    table,
                    part as u16,
                    (at, len, write | more, next),
                )?;
            }
            let len = 16 * parts as u32;
            descriptor(&memory.ram, addrs[0], slot, (table, len, INDIRECT, 0))?;
        }
        Ok(Self {
            ram: memory.ram.clone(),
            queue,
            addrs,
            avail_idx: 0,
            used_seen: 0,
            free: (0..SIZE).collect(),
        })
    }

    /// Tells the device where it is.
    pub(super) fn set_up(&self, core: &mut TransportCore) {
        core.select_queue(self.queue);
        core.set_queue_size(SIZE);
        let parts = [
            QueuePart::Descriptors,
            QueuePart::Available,
            QueuePart::Used,
        ];
        for (part, addr) in parts.into_iter().zip(self.addrs) {
            core.set_queue_addr(part, addr);
        }
        core.enable_queue();
    }

    /// Makes all free buffers available.
    pub(super) fn offer(&mut self, core: &TransportCore) -> anyhow::Result<()> {
        let [_, avail, used] = self.addrs;
        let old = self.avail_idx;
        for slot in self.free.drain(..) {
            let entry = avail + 4 + 2 * u64::from(self.avail_idx % SIZE);
            self.ram.write_plain(entry, &slot.to_le())?;
            self.avail_idx = self.avail_idx.wrapping_add(1);
        }
        let now = self.avail_idx;
        if now == old {
            return Ok(());
        }
        fence(Ordering::SeqCst);
        self.ram.write_plain(avail + 2, &now.to_le())?;
        fence(Ordering::SeqCst);
        let event: u16 = self.ram.read_plain(used + 4 + 8 * u64::from(SIZE))?;
        // vring_need_event of section 2.7.10.
        if now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(old) {
            core.ring(self.queue);
        }
        Ok(())
    }

    /// Takes everything that was given back; how many buffers.
    pub(super) fn take_used(&mut self) -> anyhow::Result<usize> {
        let [_, avail, used] = self.addrs;
        let before = self.free.len();
        loop {
            let idx: u16 = self.ram.read_plain(used + 2)?;
            if idx == self.used_seen {
                return Ok(self.free.len() - before);
            }
            fence(Ordering::SeqCst);
            while self.used_seen != idx {
                let entry = used + 4 + 8 * u64::from(self.used_seen % SIZE);
                let head: u32 = self.ram.read_plain(entry)?;
                let slot = u16::try_from(head).ok().filter(|slot| *slot < SIZE);
                self.free
                    .push(slot.with_context(|| format!("the device gave back {head}"))?);
                self.used_seen = self.used_seen.wrapping_add(1);
            }
            // Interrupt me for the next one; what came meanwhile is seen by looking again.
            let event = avail + 4 + 2 * u64::from(SIZE);
            self.ram.write_plain(event, &self.used_seen.to_le())?;
            fence(Ordering::SeqCst);
        }
    }
}

fn descriptor(
    ram: &GuestRam,
    table: u64,
    index: u16,
    (addr, len, flags, next): (u64, u32, u16, u16),
) -> anyhow::Result<()> {
    let at = table + 16 * u64::from(index);
    ram.write_plain(at, &addr.to_le())?;
    ram.write_plain(at + 8, &len.to_le())?;
    ram.write_plain(at + 12, &flags.to_le())?;
    ram.write_plain(at + 14, &next.to_le())?;
    Ok(())
}
