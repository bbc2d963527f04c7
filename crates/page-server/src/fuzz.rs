//! For `fuzz/`: any bytes as what others hand over.

use std::io::Write;

use crate::seek_table::{Entry, written};
use crate::{PackedMemory, message};

/// Most frames of a file that is put together here.
const MOST_FRAMES: usize = 8;

/// Opens any bytes as packed memory, and unpacks all of it: as they are, and as frames with a seek table that finds its way into them. Nothing may panic, and no more
/// memory be taken than the constants say.
pub fn fuzz_packed(bytes: &[u8]) {
    open_and_unpack(bytes);
    let Some((count, rest)) = bytes.split_first() else {
        return;
    };
    let count = usize::from(*count) % MOST_FRAMES;
    let Some((sizes, frames)) = rest.split_at_checked(count * 4) else {
        return;
    };
    let mut left = frames.len();
    let entries: Vec<Entry> = sizes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|size| {
            let compressed = usize::from(u16::from_le_bytes([size[0], size[1]])).min(left);
            left -= compressed;
            let pages = u32::from(u16::from_le_bytes([size[2], size[3]]));
            Entry {
                compressed: compressed as u32,
                size: pages * 4096,
            }
        })
        .collect();
    let mut whole = frames[..frames.len() - left].to_vec();
    whole.extend(written(&entries));
    open_and_unpack(&whole);
}

fn open_and_unpack(bytes: &[u8]) {
    let Ok(fd) = rustix::fs::memfd_create("packed", rustix::fs::MemfdFlags::CLOEXEC) else {
        return;
    };
    let mut file = std::fs::File::from(fd);
    if file.write_all(bytes).is_err() {
        return;
    }
    let Ok(packed) = PackedMemory::open(file) else {
        return;
    };
    let _ = packed.verify();
    for offset in [0, packed.size_bytes() / 2, packed.size_bytes()] {
        if let Some((_, content)) = packed.frame_at(offset) {
            assert!(content.contains(&offset));
        }
    }
}

/// Reads any bytes as what a monitor says of its memory.
pub fn fuzz_message(bytes: &[u8]) {
    let pages_bytes = 1 << 30;
    if let Ok(Some(ranges)) = message::read(bytes, pages_bytes) {
        for range in ranges {
            assert!(range.size > 0 && range.offset + range.size <= pages_bytes);
            assert!(range.host_addr.checked_add(range.size).is_some());
        }
    }
}
