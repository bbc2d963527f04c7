//! A driver that changes a frame after the doorbell, while rules for what it sends are kept: what was judged is what goes out.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use alveole_counters::CounterSet;
use alveole_egress_filter::{EgressCounters, HEAD_BYTES, Policy, filter};
use alveole_egress_rules::{Egress, Rule};
use alveole_guest_memory::{GuestBuffers, GuestRam};
use alveole_net_link::testing::pair;
use alveole_net_link::{Frame, HEADER_BYTES, LinkQueue, NetLink, Offloads, Received, Sent};
use alveole_virtio::testing::{Buffer, Driver, Stage};
use alveole_virtio_net::{NetConfig, VirtioNet};

const TX: u16 = 1;
const ALLOWED: [u8; 4] = [198, 51, 100, 1];
const FORBIDDEN: [u8; 4] = [203, 0, 113, 66];
/// Where an IPv4 destination lies in a frame.
const DESTINATION: usize = 30;
/// Where a TCP port lies.
const PORT: usize = 36;

/// Stands between the filter and the link, and for another processor of the guest: whatever looks like the frame in guest memory
/// gets another destination, after the filter has looked and before the link does.
struct Meddler {
    inner: Box<dyn LinkQueue>,
    ram: GuestRam,
    pattern: Vec<u8>,
}

impl Meddler {
    /// Changes every copy of the frame that guest memory has; how many there were.
    fn meddle(&self) -> usize {
        let mut all = vec![0; 4 << 20];
        let size = (0..=all.len())
            .rev()
            .step_by(4096)
            .find(|size| self.ram.read(0, &mut all[..*size]).is_ok());
        let all = &all[..size.unwrap()];
        let places: Vec<_> = all
            .windows(self.pattern.len())
            .enumerate()
            .filter(|(_, window)| *window == self.pattern)
            .map(|(at, _)| at)
            .collect();
        for at in &places {
            self.ram
                .write((at + DESTINATION) as u64, &FORBIDDEN)
                .unwrap();
            self.ram.write((at + PORT) as u64, &[0, 25]).unwrap();
            self.ram
                .write((at + HEAD_BYTES) as u64, b"changed")
                .unwrap();
        }
        places.len()
    }
}

impl LinkQueue for Meddler {
    fn send(&mut self, frame: Frame<'_>) -> io::Result<Sent> {
        assert_eq!(self.meddle(), 1);
        self.inner.send(frame)
    }

    fn receive(&mut self, into: &GuestBuffers) -> io::Result<Received> {
        self.inner.receive(into)
    }

    fn receive_kept(&mut self, into: &mut [u8]) -> io::Result<Received> {
        self.inner.receive_kept(into)
    }

    fn readable_fd(&self) -> BorrowedFd<'_> {
        self.inner.readable_fd()
    }

    fn writable_fd(&self) -> BorrowedFd<'_> {
        self.inner.writable_fd()
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.inner.set_guest_offloads(offloads)
    }

    fn set_active(&mut self, active: bool) -> io::Result<()> {
        self.inner.set_active(active)
    }
}

/// The headers of a segment to port 80 of `to`, of a frame with 1000 bytes behind them.
fn headers(to: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 7, 8, 0];
    frame.extend([0x45, 0, 4, 16, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 2, 15]);
    frame.extend(to);
    frame.extend([
        0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    frame
}

struct Wire {
    // Its threads end with it.
    _stage: Stage,
    driver: Driver,
    end: UnixDatagram,
    counters: Arc<EgressCounters>,
}

fn wire() -> Wire {
    let stage = Stage::new();
    let (link, mut ends) = pair(1);
    let end = ends.remove(0);
    end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let ram = stage.ram().clone();
    let queues = link.queues.into_iter().map(|inner| {
        Box::new(Meddler {
            inner,
            ram: ram.clone(),
            pattern: headers(ALLOWED),
        }) as Box<dyn LinkQueue>
    });
    let link = NetLink {
        facts: link.facts,
        queues: queues.collect(),
        vhost: Vec::new(),
    };
    let rule: Rule = "allow,to=198.51.100.0/24,protocol=tcp,port=80"
        .parse()
        .unwrap();
    let policy = Policy::new(&[rule], Egress::Closed, &[], &[], &[]).unwrap();
    let counters = Arc::new(EgressCounters::new("eth0"));
    let link = filter(link, policy, counters.clone()).unwrap();
    let device = VirtioNet::new(&NetConfig::new("net"), link).unwrap();
    let mut driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
    let offered = driver.access().device_features();
    driver.start_with(offered);
    Wire {
        _stage: stage,
        driver,
        end,
        counters,
    }
}

#[test]
fn a_header_that_changes_after_the_doorbell_goes_out_as_it_was_judged() {
    let payload = [7; 1000];
    let whole = [&[0; HEADER_BYTES], &headers(ALLOWED)[..], &payload].concat();
    let mut wire = wire();
    wire.driver.request(TX, &[Buffer::Out(&whole)]);
    let mut arrived = vec![0; 1 << 16];
    let len = wire.end.recv(&mut arrived).unwrap();
    assert_eq!(len, whole.len());
    let (looked_at, rest) = arrived[..len].split_at(HEADER_BYTES + HEAD_BYTES);
    assert!(looked_at == &whole[..looked_at.len()]);
    // The payload is the guest's to change: it goes by reference.
    assert!(rest.starts_with(b"changed\x07"));
}

#[test]
fn what_is_refused_meets_no_link_and_its_buffers_come_back() {
    let mut wire = wire();
    let whole = [&[0; HEADER_BYTES], &headers(FORBIDDEN)[..], &[7; 1000]].concat();
    wire.driver.request(TX, &[Buffer::Out(&whole)]);
    wire.end.set_nonblocking(true).unwrap();
    assert!(wire.end.recv(&mut [0; 64]).is_err());
    let mut denied = 0;
    wire.counters.visit(&mut |name, count| {
        if name == "denied" {
            denied = count;
        }
    });
    assert_eq!(denied, 1);
}
