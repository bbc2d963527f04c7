//! For `fuzz/`: any bytes as what others hand over.

use std::io::Write;

use crate::{PackedMemory, message};

/// Opens any bytes as packed memory, and unpacks all of it. Nothing may panic, and no more memory be taken than the constants say.
pub fn fuzz_packed(bytes: &[u8]) {
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
