//! Our qcow2 engine beside imago's, on the same images in the page cache:
//! `cargo run --release -p alveole-block-store --example against_imago`, in a folder of a real file system.
//!
//! One thread each. imago is built in its synchronous form, which takes one request at a time: at `QD` 32 ours gets 32
//! before it is kicked, imago one after the other. The best of five runs counts, run by turns.

#![expect(clippy::unwrap_used, reason = "a bench that cannot go on says where")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use alveole_block_store::{
    Backing, Cache, Engine, Format, OpenOptions, Operation, Request, StoreQueue, open, tools,
};
use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan};
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};

const SIZE: u64 = 256 << 20;
const CLUSTER: u64 = 64 << 10;
const RUNS: usize = 5;

/// A row of requests, all alike.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    image: Image,
    write: bool,
    len: u64,
    depth: usize,
    count: u64,
    at: fn(u64) -> u64,
}

/// What the requests meet.
#[derive(Clone, Copy, PartialEq)]
enum Image {
    /// All of it has its place.
    Full,
    /// Nothing has, and nothing lies beneath.
    Empty,
    /// Nothing has; a full raw image lies beneath.
    Overlay,
}

fn random(n: u64) -> u64 {
    // The upper bits of a multiplication: every block once in a while, in no order.
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % (SIZE / 4096) * 4096
}

fn sequential(n: u64) -> u64 {
    n * (128 << 10) % SIZE
}

/// Every cluster once, in no order.
fn each_cluster(n: u64) -> u64 {
    n * 1031 % (SIZE / CLUSTER) * CLUSTER
}

#[rustfmt::skip]
const LOADS: [Load; 9] = [
    Load { name: "4k random read", image: Image::Full, write: false, len: 4096, depth: 1, count: 100_000, at: random },
    Load { name: "4k random read", image: Image::Full, write: false, len: 4096, depth: 32, count: 200_000, at: random },
    Load { name: "4k random read, from the base", image: Image::Overlay, write: false, len: 4096, depth: 32, count: 200_000, at: random },
    Load { name: "4k random write in place", image: Image::Full, write: true, len: 4096, depth: 1, count: 100_000, at: random },
    Load { name: "4k random write in place", image: Image::Full, write: true, len: 4096, depth: 32, count: 200_000, at: random },
    Load { name: "4k write, each a new cluster", image: Image::Empty, write: true, len: 4096, depth: 1, count: SIZE / CLUSTER, at: each_cluster },
    Load { name: "4k write, each a cluster copied", image: Image::Overlay, write: true, len: 4096, depth: 1, count: SIZE / CLUSTER / 4, at: each_cluster },
    Load { name: "128k sequential read", image: Image::Full, write: false, len: 128 << 10, depth: 1, count: 8192, at: sequential },
    Load { name: "128k sequential write", image: Image::Full, write: true, len: 128 << 10, depth: 1, count: 8192, at: sequential },
];

type Ours = (&'static str, Engine, Cache);

/// `unsafe` does not wait for the medium, as imago does not.
const OURS: [Ours; 3] = [
    ("sync, unsafe", Engine::Sync, Cache::Unsafe),
    ("io_uring, unsafe", Engine::IoUring, Cache::Unsafe),
    ("io_uring, writeback", Engine::IoUring, Cache::Writeback),
];

fn main() {
    let folder = tempfile::tempdir_in(".").unwrap();
    let images = Images::new(folder.path());
    println!(
        "{:<32} {:>3} {:<22} {:>10} {:>9}",
        "load", "QD", "engine", "ns", "of imago"
    );
    for load in LOADS {
        let mut best = [f64::INFINITY; OURS.len() + 1];
        for _ in 0..RUNS {
            let theirs = imago(&load, &images.get(load.image));
            best[0] = best[0].min(theirs);
            for (ours, best) in OURS.iter().zip(&mut best[1..]) {
                *best = best.min(ours_takes(&load, &images.get(load.image), *ours));
            }
        }
        let names = ["imago"].into_iter().chain(OURS.map(|(name, ..)| name));
        for (name, ns) in names.zip(best) {
            println!(
                "{:<32} {:>3} {:<22} {:>10.0} {:>8.2}x",
                load.name,
                load.depth,
                name,
                ns,
                ns / best[0]
            );
        }
    }
}

/// The images, as each run finds them.
struct Images {
    folder: PathBuf,
    base: PathBuf,
    full: PathBuf,
}

impl Images {
    fn new(folder: &Path) -> Self {
        let base = folder.join("base.raw");
        std::fs::write(&base, vec![7; SIZE as usize]).unwrap();
        let full = folder.join("full.qcow2");
        let within = Backing::BesideImage;
        tools::convert(&base, Format::Raw, &full, Format::Qcow2, within).unwrap();
        Self {
            folder: folder.to_owned(),
            base,
            full,
        }
    }

    fn get(&self, image: Image) -> PathBuf {
        if image == Image::Full {
            return self.full.clone();
        }
        let path = self.folder.join("fresh.qcow2");
        let _ = std::fs::remove_file(&path);
        match image {
            Image::Overlay => tools::create_overlay(&path, &self.base, Format::Raw).unwrap(),
            _ => tools::create_qcow2(&path, SIZE, CLUSTER.trailing_zeros()).unwrap(),
        }
        path
    }
}

fn each(start: Instant, count: u64) -> f64 {
    start.elapsed().as_nanos() as f64 / count as f64
}

fn imago(load: &Load, path: &Path) -> f64 {
    let image = Qcow2::<ImagoFile>::builder_path(path)
        .write(load.write)
        .open(PermissiveImplicitOpenGate::default())
        .unwrap();
    let image = FormatAccess::new(image);
    let mut buffers = vec![vec![3_u8; load.len as usize]; load.depth];
    let start = Instant::now();
    for n in 0..load.count {
        let buffer = &mut buffers[n as usize % load.depth];
        let at = (load.at)(n);
        if load.write {
            image.write(&*buffer, at).unwrap();
        } else {
            image.read(buffer, at).unwrap();
        }
    }
    // Its tables are kept back until then, ours are not.
    image.flush().unwrap();
    each(start, load.count)
}

fn ours_takes(load: &Load, path: &Path, (_, engine, cache): Ours) -> f64 {
    let options = OpenOptions {
        format: Format::Qcow2,
        read_only: !load.write,
        engine,
        cache,
        ..OpenOptions::default()
    };
    let store = open(path, &options).unwrap();
    let ram = GuestRam::map(&MemoryPlan::around_hole(64 << 20).unwrap()).unwrap();
    let mut queue = store.open_queues(1, load.depth as u32).unwrap().remove(0);
    let mut spare: Vec<GuestBuffers> = (0..load.depth as u64)
        .map(|n| {
            let mut buffers = GuestBuffers::new(&ram);
            buffers.push(n * load.len, load.len).unwrap();
            buffers
        })
        .collect();
    let mut done = Vec::with_capacity(load.depth);
    let (mut begun, mut completed) = (0, 0);
    let start = Instant::now();
    while completed < load.count {
        while begun < load.count
            && let Some(buffers) = spare.pop()
        {
            queue.submit(Request {
                tag: begun,
                operation: if load.write {
                    Operation::Write { durable: false }
                } else {
                    Operation::Read
                },
                offset: (load.at)(begun),
                len: load.len,
                buffers,
            });
            begun += 1;
        }
        queue.kick(&mut done);
        while done.is_empty() {
            wait(&*queue);
            queue.collect(&mut done);
        }
        for completion in done.drain(..) {
            completion.result.unwrap();
            spare.push(completion.buffers);
            completed += 1;
        }
    }
    each(start, load.count)
}

#[expect(unsafe_code, reason = "std has no poll")]
fn wait(queue: &dyn StoreQueue) {
    use std::os::fd::AsRawFd;
    let Some(fd) = queue.event_fd() else {
        return;
    };
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut count = [0_u8; 8];
    // SAFETY: one pollfd, and room for the 8 bytes of an eventfd.
    unsafe {
        libc::poll(&raw mut poll, 1, -1);
        libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), 8);
    }
}
