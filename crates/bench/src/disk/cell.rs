//! One cell of the table without a guest: the block device over one store, driven for a while, in a process
//! of its own. Another process may count its system calls.
//!
//! Knows the device and its stores; does not know which cells there are.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use alveole_block_store::{BlockStore, Cache, Engine, Format, OpenOptions, RamStore, open};
use alveole_event_loop::{EventLoop, LoopHandle};
use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_interrupts::{Doorbell, IrqLine};
use alveole_virtio::{Hosting, Signals, TransportCore, Wires};
use alveole_virtio_blk::{BlkConfig, QUEUE_SIZE, VirtioBlk};
use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::json;

use crate::cells::mark;

use super::rings::{RAM_BYTES, Rings, Server, Until};

/// No more of the image is used: all of it is in RAM for one store.
const MOST_BYTES: u64 = 256 << 20;

/// What the device stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Store {
    Ram,
    Uring,
    Sync,
    UringDirect,
}

/// What to drive, how long.
#[derive(Debug, Args)]
pub(crate) struct Cell {
    #[arg(long, value_enum)]
    store: Store,
    /// The image; of RAM its size counts
    #[arg(long)]
    image: PathBuf,
    #[arg(long)]
    queues: u16,
    #[arg(long)]
    depth: u16,
    /// A thread for each queue
    #[arg(long)]
    thread_per_queue: bool,
    /// So many requests; else for --milliseconds
    #[arg(long)]
    requests: Option<u64>,
    #[arg(long, default_value_t = 500)]
    milliseconds: u64,
}

/// Interrupts as KVM takes them: a write to a descriptor.
struct Lines(Vec<IrqLine>);

impl Wires for Lines {
    fn queue(&self, queue: u16) {
        if let Some(line) = self.0.get(usize::from(queue)) {
            line.pulse();
        }
    }
    fn config(&self) {}
    fn clear(&self) {}
}

/// Event loops on threads of their own.
struct Loops {
    handles: Vec<LoopHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Loops {
    fn start(count: u16) -> anyhow::Result<Self> {
        let mut all = Self {
            handles: Vec::new(),
            threads: Vec::new(),
        };
        for _ in 0..count {
            let mut event_loop = EventLoop::new()?;
            all.handles.push(event_loop.handle());
            all.threads.push(thread::spawn(move || {
                if let Err(e) = event_loop.run() {
                    eprintln!("alveole-bench: the event loop ended: {e}");
                }
            }));
        }
        Ok(all)
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        self.handles.iter().for_each(LoopHandle::stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Runs the cell; what came of it, as JSON on standard output.
pub(crate) fn run(cell: &Cell) -> anyhow::Result<()> {
    let size = fs::metadata(&cell.image)
        .with_context(|| format!("cannot read {}", cell.image.display()))?
        .len()
        .min(MOST_BYTES);
    let store: Arc<dyn BlockStore> = match cell.store {
        Store::Ram => Arc::new(RamStore::from_bytes(vec![7; usize::try_from(size)?])),
        Store::Uring | Store::Sync | Store::UringDirect => {
            let options = OpenOptions {
                format: Format::Raw,
                read_only: true,
                cache: if cell.store == Store::UringDirect {
                    Cache::Direct
                } else {
                    Cache::Writeback
                },
                engine: if cell.store == Store::Sync {
                    Engine::Sync
                } else {
                    Engine::IoUring
                },
                ..OpenOptions::default()
            };
            open(&cell.image, &options)?
        }
    };
    let config = BlkConfig {
        queues: cell.queues,
        ..BlkConfig::new("bench")
    };
    let device = Box::new(VirtioBlk::new(&config, store)?);
    let ram = GuestRam::map(&MemoryPlan::around_hole(RAM_BYTES)?)?;
    let mut rings = Rings::new(&ram, cell.queues, QUEUE_SIZE, cell.depth, size)?;
    let until = match cell.requests {
        Some(count) => Until::Requests(count),
        None => Until::Time(Duration::from_millis(cell.milliseconds)),
    };

    // The driver alone, on the same rings; they begin anew for the device.
    let start = Instant::now();
    let count = rings.run(&Server::Echo, until)?;
    let driver_ns = start.elapsed().as_nanos() as f64 / count as f64;
    rings = Rings::new(&ram, cell.queues, QUEUE_SIZE, cell.depth, size)?;
    rings.clear()?;

    let threads = if cell.thread_per_queue {
        cell.queues
    } else {
        1
    };
    let loops = Loops::start(threads)?;
    let lines: io::Result<_> = (0..cell.queues).map(|_| IrqLine::new()).collect();
    let bells: io::Result<_> = (0..cell.queues).map(|_| Doorbell::new()).collect();
    let mut core = TransportCore::new(
        device,
        ram,
        bells?,
        Signals::new(Box::new(Lines(lines?))),
        Hosting::on(loops.handles.clone()),
    );
    rings.start(&mut core)?;
    // Everything is touched once, and threads that the kernel adds are there.
    rings.run(&Server::Device(&core), Until::Requests(2000))?;

    let before = busy_ns()?;
    mark();
    let start = Instant::now();
    let count = rings.run(&Server::Device(&core), until)?;
    let wall = start.elapsed();
    mark();
    let after = busy_ns()?;
    // Threads that came and went between the two are missed; the kernel keeps its workers for seconds.
    let cpu: u64 = after
        .iter()
        .map(|(id, ns)| ns.saturating_sub(before.get(id).copied().unwrap_or(0)))
        .sum();
    core.set_status(0);
    println!(
        "{}",
        json!({
            "requests": count,
            "ns": wall.as_nanos() as f64 / count as f64,
            "cpu_ns": cpu as f64 / count as f64,
            "driver_ns": driver_ns,
        })
    );
    Ok(())
}

/// How long each thread but this one was on a processor.
fn busy_ns() -> anyhow::Result<BTreeMap<String, u64>> {
    let own = rustix::thread::gettid().as_raw_nonzero().to_string();
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/task")?.flatten() {
        let id = entry.file_name().to_string_lossy().into_owned();
        let text = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
        if let Some(ns) = text
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok())
            && id != own
        {
            all.insert(id, ns);
        }
    }
    Ok(all)
}
