//! What a fuzzer drives: everything that a hostile image meets.

use std::sync::{Arc, Mutex};

use crate::bytes::{index, wide};
use crate::file::NoBacking;
use crate::image::{Access, Image};
use crate::recount::Repair;

/// How many places of a disk are looked at.
const PLACES: u64 = 24;

/// Opens `bytes` as an image, reads and writes here and there, checks and repairs it. Whatever the bytes
/// are, this comes back.
#[doc(hidden)]
pub fn fuzz_open_and_read(bytes: &[u8]) {
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let file = Arc::new(Mutex::new(bytes.to_vec()));
        if let Ok(image) = Image::open(Box::new(Arc::clone(&file)), access) {
            visit(&image);
            drop(image.close());
        }
        for repair in [Repair::No, Repair::Leaks, Repair::All] {
            drop(crate::check(&file, repair));
        }
    }
}

fn visit(image: &Image) {
    let size = image.size_bytes();
    let cluster = image.info().cluster_size_bytes;
    let step = size.div_ceil(PLACES).max(1);
    let mut data = vec![0x5a; index(cluster.saturating_add(7).min(128 << 10))];
    for place in 0..PLACES {
        // The first clusters one by one, then all over the disk.
        let near = place.saturating_mul(cluster);
        let far = place.saturating_mul(step);
        for at in [near, far, size.saturating_sub(far)] {
            let len = wide(data.len()).min(size.saturating_sub(at));
            let part = data.get_mut(..index(len)).unwrap_or_default();
            drop(image.lookup(at, len));
            drop(image.read(at, part, &NoBacking));
            drop(image.lookup_write(at, len));
            drop(image.write_allocating(at, part, &NoBacking));
            drop(image.write_zeroes(at, len, place % 2 == 0, &NoBacking));
            drop(image.discard(at, len));
        }
    }
    drop(image.flush());
    drop(image.resize(size.saturating_add(cluster) & !511, &NoBacking));
    drop(image.resize((size / 2) & !511, &NoBacking));
}
