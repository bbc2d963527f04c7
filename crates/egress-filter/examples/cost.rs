//! What the filter costs for a frame, beside the same link without it. The link is none: it takes and gives frames without a
//! system call. `cargo run --release -p alveole-egress-filter --example cost`

#![expect(
    clippy::unwrap_used,
    reason = "a measurement that cannot go on says where"
)]

use std::hint::black_box;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use alveole_egress_filter::{EgressCounters, Policy, filter};
use alveole_egress_rules::{Egress, Rule};
use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan};
use alveole_net_link::{
    Frame, HEADER_BYTES, LinkFacts, LinkQueue, NetLink, Offloads, Received, Sent,
};

const FRAMES: u32 = 1_000_000;
const ROUNDS: usize = 7;

/// Takes every frame, and gives the same one again and again.
struct Nowhere {
    fd: std::os::fd::OwnedFd,
    frame: Vec<u8>,
}

impl LinkQueue for Nowhere {
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent> {
        black_box(frame.start);
        black_box(frame.rest);
        Ok(Sent::Done)
    }

    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received> {
        into.copy_from(0, &self.frame);
        Ok(Received::Frame(self.frame.len() as u64))
    }

    fn receive_seen(&mut self, head: &mut [u8], into: &GuestBuffers) -> io::Result<Received> {
        let known = head.len().min(self.frame.len());
        head[..known].copy_from_slice(&self.frame[..known]);
        self.receive(into)
    }

    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received> {
        into[..self.frame.len()].copy_from_slice(&self.frame);
        Ok(Received::Frame(self.frame.len() as u64))
    }

    fn readable_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn writable_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn set_guest_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active(&mut self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// A frame over IPv4 behind a header without offloads: `protocol` 6 or 17, ports and flags as given.
fn frame(
    from: [u8; 4],
    to: [u8; 4],
    protocol: u8,
    ports: (u16, u16),
    flags: u8,
    len: usize,
) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0]);
    frame.extend(((len - 14) as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend([from, to].concat());
    frame.extend([ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags]);
    frame.resize(HEADER_BYTES + len, 7);
    frame
}

fn link(received: &[u8]) -> NetLink {
    let fd = std::fs::File::open("/dev/null").unwrap().into();
    let queue = Nowhere {
        fd,
        frame: received.to_vec(),
    };
    NetLink {
        facts: LinkFacts {
            name: "nowhere".into(),
            offloads: Offloads::ALL,
            mtu: None,
            mac: None,
        },
        queues: vec![Box::new(queue)],
        vhost: Vec::new(),
    }
}

/// Rules of which the last one alone fits.
fn policy(rules: usize) -> Policy {
    let denies = (1..rules).map(|n| format!("deny,to=203.0.{}.0/24,protocol=tcp,port=25", n % 256));
    let last = "allow,to=198.51.100.0/24".to_owned();
    let rules: Vec<Rule> = denies
        .chain([last])
        .map(|rule| rule.parse().unwrap())
        .collect();
    Policy::new(&rules, Egress::Closed, &[], &[], &[]).unwrap()
}

fn filtered(rules: usize, received: &[u8]) -> NetLink {
    filter(
        link(received),
        policy(rules),
        Arc::new(EgressCounters::new("cost")),
    )
    .unwrap()
}

/// The median of some rounds, in ns for each call.
fn measure(mut call: impl FnMut()) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..FRAMES {
                call();
            }
            start.elapsed().as_nanos() as f64 / f64::from(FRAMES)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn main() {
    const GUEST: [u8; 4] = [10, 0, 2, 15];
    const ALLOWED: [u8; 4] = [198, 51, 100, 9];
    const OTHER: [u8; 4] = [192, 0, 2, 9];
    let ram = GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap();
    let send = |mut link: NetLink, bytes: &[u8]| {
        let (start, frame) = bytes.split_at(HEADER_BYTES);
        let mut rest = GuestBuffers::new(&ram);
        // As Linux does: headers and payload in parts of their own.
        let cut = frame.len().min(66) as u64;
        rest.push(0x1000, cut).unwrap();
        rest.push(0x4000, frame.len() as u64 - cut).unwrap();
        rest.copy_from(0, frame);
        let queue = &mut link.queues[0];
        measure(|| {
            black_box(queue.send(Frame { start, rest: &rest }).unwrap());
        })
    };
    let receive = |mut link: NetLink| {
        let mut into = GuestBuffers::new(&ram);
        into.push(0x8000, 9100).unwrap();
        let queue = &mut link.queues[0];
        measure(|| {
            black_box(queue.receive(&into).unwrap());
        })
    };
    for (what, protocol, len) in [
        ("udp, 64 bytes", 17, 64),
        ("tcp, 1514 bytes", 6, 1514),
        ("tcp, 9014 bytes", 6, 9014),
    ] {
        let out = frame(GUEST, ALLOWED, protocol, (40_000, 443), 16, len);
        println!(
            "send {what}: {:.0} ns without, with 1 rule {:.0}, 10 {:.0}, 100 {:.0}, 1000 {:.0}",
            send(link(&[]), &out),
            send(filtered(1, &[]), &out),
            send(filtered(10, &[]), &out),
            send(filtered(100, &[]), &out),
            send(filtered(1000, &[]), &out)
        );
    }
    let refused = frame(GUEST, OTHER, 17, (40_000, 53), 0, 64);
    println!("send, refused: {:.0} ns", send(filtered(10, &[]), &refused));
    let asked = frame(OTHER, GUEST, 17, (53, 7000), 0, 64);
    let mut heard = filtered(10, &asked);
    let mut into = GuestBuffers::new(&ram);
    into.push(0x8000, 9100).unwrap();
    heard.queues[0].receive(&into).unwrap();
    let answer = frame(GUEST, OTHER, 17, (7000, 53), 0, 64);
    println!(
        "send, an answer that no rule allows: {:.0} ns",
        send(heard, &answer)
    );
    let known = frame(ALLOWED, GUEST, 6, (443, 40_000), 16, 1514);
    println!(
        "receive tcp, 1514 bytes: {:.0} ns without, with 10 rules {:.0}",
        receive(link(&known)),
        receive(filtered(10, &known))
    );
    println!(
        "receive udp, 64 bytes, of who may be answered: {:.0} ns without, with 10 rules {:.0}",
        receive(link(&asked)),
        receive(filtered(10, &asked))
    );
}
