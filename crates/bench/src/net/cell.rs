//! One cell of the table without a guest: the network device over one link, driven for a while in one direction, in a
//! process of its own. Another process may count its system calls.
//!
//! Knows the device and its links; does not know which cells there are. A tap is made in the network namespace in which
//! the process was started, which is to be its own.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use alveole_event_loop::EventLoop;
use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_interrupts::{Doorbell, IrqLine};
use alveole_net_link::testing::pair;
use alveole_net_link::{HEADER_BYTES, LinkSpec, NetLink, open};
use alveole_virtio::{Hosting, Signals, TransportCore, Wires, status};
use alveole_virtio_net::{NetConfig, NetHandle, VirtioNet};
use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::ring::{Memory, RAM_BYTES, Ring};
use crate::cells::mark;

/// Ethernet, IP and UDP headers.
const HEADERS: usize = 42;
/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the other side waits before it looks whether it is over.
const PEER_WAIT: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Link {
    Pair,
    Stream,
    Tap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Direction {
    /// From the guest.
    Tx,
    /// To the guest.
    Rx,
}

/// What to drive, how long.
#[derive(Debug, Args)]
pub(crate) struct Cell {
    #[arg(long, value_enum)]
    link: Link,
    #[arg(long, value_enum)]
    direction: Direction,
    /// Length of each frame
    #[arg(long)]
    bytes: usize,
    /// So many frames; else for --milliseconds
    #[arg(long)]
    frames: Option<u64>,
    #[arg(long, default_value_t = 500)]
    milliseconds: u64,
}

/// Interrupts as KVM takes them: a write to a descriptor.
struct Lines([IrqLine; 3]);

impl Wires for Lines {
    fn queue(&self, queue: u16) {
        if let Some(line) = self.0.get(usize::from(queue)) {
            line.pulse();
        }
    }
    fn config(&self) {}
    fn clear(&self) {}
}

/// The other side of the link, which takes what comes or sends without end.
enum Peer {
    Datagrams(UnixDatagram),
    Stream(UnixStream),
    Host(UdpSocket),
    /// The host's network stack, which drops what it does not know.
    Nobody,
}

fn ip(words: &str) -> anyhow::Result<()> {
    let done = Command::new("ip").args(words.split(' ')).output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "ip {words}: {}", said.trim());
    Ok(())
}

fn open_link(cell: &Cell) -> anyhow::Result<(NetLink, Peer)> {
    Ok(match cell.link {
        Link::Pair => {
            let (link, mut ends) = pair(1);
            let end = ends.pop().context("a pair has an end")?;
            end.set_read_timeout(Some(PEER_WAIT))?;
            end.set_write_timeout(Some(PEER_WAIT))?;
            (link, Peer::Datagrams(end))
        }
        Link::Stream => {
            let (ours, theirs) = UnixStream::pair()?;
            theirs.set_read_timeout(Some(PEER_WAIT))?;
            theirs.set_write_timeout(Some(PEER_WAIT))?;
            let link = open(LinkSpec::StreamFd(ours.into()), 1)?;
            (link, Peer::Stream(theirs))
        }
        Link::Tap => {
            ip("tuntap add dev tap0 mode tap vnet_hdr")?;
            let _ = fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
            ip("link set tap0 mtu 65521 up")?;
            ip("addr add 10.9.0.1/24 dev tap0")?;
            ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0")?;
            let link = open(
                LinkSpec::Tap {
                    name: "tap0".into(),
                },
                1,
            )?;
            let peer = match cell.direction {
                Direction::Tx => Peer::Nobody,
                Direction::Rx => {
                    let socket = UdpSocket::bind("10.9.0.1:5000")?;
                    socket.connect("10.9.0.2:5000")?;
                    Peer::Host(socket)
                }
            };
            (link, peer)
        }
    })
}

/// Takes, or sends frames of `bytes`, until it is over.
fn serve(peer: &Peer, direction: Direction, bytes: usize, over: &AtomicBool) {
    let frame = vec![0x5a; HEADER_BYTES + bytes];
    let framed: Vec<u8> = {
        let one = [&(bytes as u32).to_be_bytes()[..], &frame[HEADER_BYTES..]].concat();
        one.repeat((1usize << 16).div_ceil(one.len()))
    };
    let mut room = vec![0; 1 << 18];
    let with_zeroes = [&[0; HEADER_BYTES][..], &frame[HEADER_BYTES..]].concat();
    let mut at = 0;
    while !over.load(Ordering::Relaxed) {
        let done = match (peer, direction) {
            (Peer::Nobody, _) => return,
            (Peer::Datagrams(end), Direction::Tx) => end.recv(&mut room),
            (Peer::Datagrams(end), Direction::Rx) => end.send(&with_zeroes),
            (Peer::Stream(end), Direction::Tx) => (&*end).read(&mut room),
            (Peer::Stream(end), Direction::Rx) => (&*end).write(&framed[at..]).inspect(|n| {
                at = (at + n) % framed.len();
            }),
            (Peer::Host(socket), _) => socket.send(&frame[..bytes - HEADERS]),
        };
        match done {
            Ok(0) => return,
            Ok(_) => {}
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            // The interface's queue is full.
            Err(e) if e.raw_os_error() == Some(105) => thread::yield_now(),
            Err(_) => return,
        }
    }
}

fn negotiate(core: &mut TransportCore) {
    core.set_status(status::ACKNOWLEDGE | status::DRIVER);
    for select in 0..2 {
        core.select_device_features(select);
        core.select_driver_features(select);
        core.set_driver_features(core.device_features());
    }
    core.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
}

/// Runs the cell; what came of it, as JSON on standard output.
pub(crate) fn run(cell: &Cell) -> anyhow::Result<()> {
    let (link, peer) = open_link(cell)?;
    let device = VirtioNet::new(&NetConfig::new("bench"), link)?;
    let handle = device.handle();
    let ram = GuestRam::map(&MemoryPlan::around_hole(RAM_BYTES)?)?;
    let mut memory = Memory::new(&ram);
    let is_tx = cell.direction == Direction::Tx;
    // As Linux has them: a frame behind its header, room in pieces.
    let mut ring = if is_tx {
        let len = HEADER_BYTES + cell.bytes;
        let content = [&[0; HEADER_BYTES][..], &[0xff; 12], &[0x88, 0xb5]].concat();
        Ring::new(&mut memory, 1, len as u64, false, &content)?
    } else {
        let room = if cell.bytes <= 1514 { 1536 } else { 4096 };
        Ring::new(&mut memory, 0, room, true, &[])?
    };

    let mut event_loop = EventLoop::new()?;
    let loops = event_loop.handle();
    let (tell, told) = mpsc::channel();
    let device_thread = thread::spawn(move || {
        let _ = tell.send(rustix::thread::gettid().as_raw_nonzero().to_string());
        event_loop.run()
    });
    let device_id = told.recv()?;
    let over = Arc::new(AtomicBool::new(false));
    let peer_thread = {
        let (over, direction, bytes) = (over.clone(), cell.direction, cell.bytes);
        thread::spawn(move || serve(&peer, direction, bytes, &over))
    };

    let bells: Result<Vec<_>, _> = (0..3).map(|_| Doorbell::new()).collect();
    let lines = Lines([IrqLine::new()?, IrqLine::new()?, IrqLine::new()?]);
    let mut core = TransportCore::new(
        Box::new(device),
        ram,
        bells?,
        Signals::new(Box::new(lines)),
        Hosting::on(vec![loops.clone()]),
    );
    negotiate(&mut core);
    ring.set_up(&mut core);
    let ready = core.status() | status::DRIVER_OK;
    core.set_status(ready);
    ensure!(core.status() == ready, "the device does not start");

    drive(&mut ring, &core, &handle, is_tx, |_, spent| {
        spent > Duration::from_millis(50)
    })?;
    let before = busy_ns(&device_id)?;
    mark();
    let time = Duration::from_millis(cell.milliseconds);
    let frames = cell.frames;
    let (count, wall) = drive(&mut ring, &core, &handle, is_tx, |count, spent| {
        frames.map_or(spent >= time, |frames| count >= frames)
    })?;
    mark();
    let cpu = busy_ns(&device_id)? - before;
    over.store(true, Ordering::Relaxed);
    core.set_status(0);
    drop(core);
    loops.stop();
    let _ = device_thread.join();
    let _ = peer_thread.join();
    println!(
        "{}",
        json!({
            "frames": count,
            "ns": wall.as_nanos() as f64 / count as f64,
            "cpu_ns": cpu as f64 / count as f64,
            "thread": device_id,
        })
    );
    Ok(())
}

/// Keeps the ring full until it is over; how many frames passed, and in which time.
fn drive(
    ring: &mut Ring,
    core: &TransportCore,
    handle: &NetHandle,
    is_tx: bool,
    is_over: impl Fn(u64, Duration) -> bool,
) -> anyhow::Result<(u64, Duration)> {
    let counters = handle.counters();
    let passed = || {
        if is_tx {
            counters.tx_frames.get()
        } else {
            counters.rx_frames.get()
        }
    };
    let (first, start) = (passed(), Instant::now());
    let mut last = start;
    loop {
        ring.offer(core)?;
        let took = ring.take_used()?;
        let count = passed() - first;
        let spent = start.elapsed();
        if is_over(count, spent) && count > 0 {
            return Ok((count, spent));
        }
        if took > 0 {
            last = Instant::now();
        } else {
            if last.elapsed() > PATIENCE {
                bail!("the device moves nothing: {count} frames so far");
            }
            thread::yield_now();
        }
    }
}

/// How long a thread was on a processor.
fn busy_ns(thread: &str) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/task/{thread}/schedstat"))?;
    let first = text.split_whitespace().next().context("no time")?;
    Ok(first.parse()?)
}
