//! What a request costs without a guest: RAM, plain calls and io_uring beside each other.
//!
//! `cargo run --release -p alveole-block-store --example store_bench [-- <part of a store's name>]`, in a folder of a real
//! file system: random reads of 4 KiB, `QD` in flight. The best of five runs counts. With `strace -cf` before the
//! program's name it is seen how many system calls that takes (and nothing of the times).

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on says where")]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use alveole_block_store::{
    Backing, BlockStore, Cache, Engine, Format, OpenOptions, Operation, RamStore, Request, open,
    tools,
};
use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan};

const SIZE: usize = 256 << 20;
const BLOCK: u64 = 4096;

fn main() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![7; SIZE]).unwrap();
    let overlay = folder.path().join("overlay.qcow2");
    let full = folder.path().join("full.qcow2");
    tools::create_overlay(&overlay, &path, Format::Raw).unwrap();
    tools::convert(
        &path,
        Format::Raw,
        &full,
        Format::Qcow2,
        Backing::BesideImage,
    )
    .unwrap();
    let only = std::env::args().nth(1);
    let mut base = None;
    println!(
        "{:<28} {:>4} {:>12} {:>8}",
        "store", "QD", "ns/request", "ratio"
    );
    for depth in [1_usize, 32] {
        for (name, store) in stores(&path, &overlay, &full) {
            if only.as_ref().is_some_and(|o| !name.contains(o.as_str())) {
                continue;
            }
            let ns = (0..5)
                .map(|_| measure(store.as_ref(), depth))
                .fold(f64::MAX, f64::min);
            let base = *base.get_or_insert(ns);
            println!("{name:<28} {depth:>4} {ns:>12.0} {:>8.2}", ns / base);
        }
    }
}

fn stores(path: &Path, overlay: &Path, full: &Path) -> Vec<(String, Arc<dyn BlockStore>)> {
    let mut stores: Vec<(String, Arc<dyn BlockStore>)> =
        vec![("ram".into(), Arc::new(RamStore::new(SIZE)))];
    for (engine, name) in [(Engine::Sync, "sync"), (Engine::IoUring, "io_uring")] {
        for (cache, cached) in [(Cache::Writeback, "writeback"), (Cache::Direct, "direct")] {
            let options = OpenOptions {
                format: Format::Raw,
                read_only: true,
                cache,
                engine,
                ..OpenOptions::default()
            };
            match open(path, &options) {
                Ok(store) => stores.push((format!("{name} {cached}"), store)),
                Err(e) => println!("{name} {cached}: left out: {e}"),
            }
        }
    }
    for (image, name) in [
        (overlay, "io_uring empty overlay"),
        (full, "io_uring full qcow2"),
    ] {
        let options = OpenOptions {
            format: Format::Qcow2,
            read_only: true,
            ..OpenOptions::default()
        };
        stores.push((name.into(), open(image, &options).unwrap()));
    }
    stores
}

fn measure(store: &dyn BlockStore, depth: usize) -> f64 {
    let ram = GuestRam::map(&MemoryPlan::around_hole(16 << 20).unwrap()).unwrap();
    let mut queue = store.open_queues(1, depth as u32).unwrap().remove(0);
    let mut spare: Vec<GuestBuffers> = (0..depth as u64)
        .map(|n| {
            let mut buffers = GuestBuffers::new(&ram);
            buffers.push(n * 2 * BLOCK, BLOCK).unwrap();
            buffers
        })
        .collect();
    let mut done = Vec::with_capacity(depth);
    let mut state = 88_172_645_463_325_252_u64;
    let total = if store.geometry().block_size_bytes > 512 || depth == 1 {
        100_000
    } else {
        400_000
    };
    let start = Instant::now();
    let mut completed = 0;
    while completed < total {
        while let Some(buffers) = spare.pop() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            queue.submit(Request {
                tag: 0,
                operation: Operation::Read,
                offset: state % (SIZE as u64 / BLOCK) * BLOCK,
                len: BLOCK,
                buffers,
            });
        }
        queue.kick(&mut done);
        if done.is_empty() {
            wait(&*queue);
            queue.collect(&mut done);
        }
        for completion in done.drain(..) {
            assert!(completion.result.is_ok());
            spare.push(completion.buffers);
            completed += 1;
        }
        if start.elapsed().as_secs() > 3 {
            break;
        }
    }
    let ns = start.elapsed().as_nanos() as f64 / f64::from(completed);
    queue.drain(&mut done);
    ns
}

#[expect(unsafe_code, reason = "std has no poll")]
fn wait(queue: &dyn alveole_block_store::StoreQueue) {
    use std::os::fd::AsRawFd;
    let fd = queue.event_fd().unwrap().as_raw_fd();
    let mut count = [0_u8; 8];
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, and room for the 8 bytes of an eventfd.
    unsafe {
        libc::poll(&raw mut poll, 1, -1);
        libc::read(fd, count.as_mut_ptr().cast(), 8);
    }
}
