//! The device as a driver meets it, over real sockets, without a transport.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use alveole_counters::CounterSet;
use alveole_net_link::testing::{loopback, pair, plain_pair};
use alveole_net_link::{HEADER_BYTES, MAX_FRAME_BYTES, NetLink};
use alveole_rate_limiter::{Bucket, Limits};
use alveole_virtio::testing::{Buffer, Driver, Indirect, Stage, Subject, Used, conformance};
use alveole_virtio::{RestoreError, SavedState, VirtioDevice, status};
use alveole_virtio_net::{NetConfig, NetError, NetHandle, VirtioNet};

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const MTU: u64 = 1 << 3;
const MAC_FEATURE: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const MQ: u64 = 1 << 22;
const CTRL_MAC_ADDR: u64 = 1 << 23;
const GUEST_USO4: u64 = 1 << 54;
const GUEST_USO6: u64 = 1 << 55;
const HOST_USO: u64 = 1 << 56;
const LONG: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

const RX: u16 = 0;
const TX: u16 = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const NO_OFFLOADS: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
const SHORT: Duration = Duration::from_millis(30);

/// A frame of `len` bytes from the guest's address, whose content tells its parts apart.
fn frame(len: usize, tag: u8) -> Vec<u8> {
    let mut bytes = vec![0xff; 6];
    bytes.extend(MAC);
    bytes.extend([0x88, 0xb5]);
    bytes.extend((bytes.len()..len).map(|at| (at % 251) as u8 ^ tag));
    bytes.truncate(len);
    bytes
}

fn with_header(header: &[u8], frame: &[u8]) -> Vec<u8> {
    [header, frame].concat()
}

struct Nic {
    stage: Stage,
    handle: NetHandle,
    driver: Driver,
    ends: Vec<UnixDatagram>,
}

fn config() -> NetConfig {
    NetConfig {
        mac: Some(MAC),
        ..NetConfig::new("net")
    }
}

fn nic_of(config: &NetConfig, pairs: u16, without: u64) -> Nic {
    let (link, ends) = pair(pairs);
    for end in &ends {
        end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    let (stage, handle, driver) = started(config, link, without);
    Nic {
        stage,
        handle,
        driver,
        ends,
    }
}

fn started(config: &NetConfig, link: NetLink, without: u64) -> (Stage, NetHandle, Driver) {
    let stage = Stage::new();
    let device = VirtioNet::new(config, link).unwrap();
    let handle = device.handle();
    let mut driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
    let offered = driver.access().device_features();
    driver.start_with(offered & !without);
    (stage, handle, driver)
}

fn nic() -> Nic {
    nic_of(&config(), 1, 0)
}

impl Nic {
    fn count(&self, name: &str) -> u64 {
        let mut found = None;
        self.handle.counters().visit(&mut |n, v| {
            if n == name {
                found = Some(v);
            }
        });
        found.unwrap_or_else(|| panic!("there is no counter {name}"))
    }

    fn wait_count(&self, name: &str, least: u64) {
        let start = Instant::now();
        while self.count(name) < least {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{name} stays at {}",
                self.count(name)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The guest sends one frame in one piece.
    fn send(&mut self, header: &[u8], frame: &[u8]) {
        let used = self
            .driver
            .request(TX, &[Buffer::Out(&with_header(header, frame))]);
        assert_eq!(used.len, 0, "nothing is written to what is sent");
    }

    /// The next datagram of the other side.
    fn arrived(&self, pair: usize) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 17];
        let len = self.ends[pair].recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    fn nothing_arrived(&self) {
        self.ends[0].set_nonblocking(true).unwrap();
        let e = self.ends[0].recv(&mut [0; 64]).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
        self.ends[0].set_nonblocking(false).unwrap();
    }

    fn push(&self, pair: usize, header: &[u8], frame: &[u8]) {
        self.ends[pair].send(&with_header(header, frame)).unwrap();
    }

    /// Class, command, data; the answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        command(&mut self.driver, bytes)
    }

    fn config(&mut self) -> ([u8; 6], u16, u16, u16) {
        let mut bytes = [0; 12];
        self.driver.access().read_config(0, &mut bytes);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (bytes[..6].try_into().unwrap(), word(6), word(8), word(10))
    }

    /// Nothing comes out of a queue for a while.
    fn quiet(&mut self, queue: u16) {
        std::thread::sleep(SHORT);
        assert_eq!(self.driver.poll(queue), None);
    }

    fn needs_reset(&mut self) -> bool {
        self.driver.wait_for_needs_reset(Duration::from_secs(5))
    }
}

/// The number of the control queue.
fn control_queue(driver: &mut Driver) -> u16 {
    if driver.features() & MQ == 0 {
        return 2;
    }
    let mut pairs = [0; 2];
    driver.access().read_config(8, &mut pairs);
    2 * u16::from_le_bytes(pairs)
}

fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    let queue = control_queue(driver);
    let (start, data) = bytes.split_at(bytes.len().min(2));
    let mut buffers = vec![Buffer::Out(start)];
    if !data.is_empty() {
        buffers.push(Buffer::Out(data));
    }
    buffers.push(Buffer::In(1));
    let used = driver.request(queue, &buffers);
    assert_eq!(used.len, 1);
    used.bytes[0]
}

/// What the driver finds of a frame: its header, its bytes.
fn taken(used: &Used) -> (&[u8], &[u8]) {
    used.bytes[..used.len as usize].split_at(HEADER_BYTES)
}

const ONE_BUFFER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

// ---- the suite

/// Gives back what it gets.
struct Nics(u16);

impl Subject for Nics {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(VirtioNet::new(&config(), loopback(self.0)).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        for len in [60, 1514] {
            let bytes = frame(len, 5);
            driver.submit(RX, &[Buffer::In(12), Buffer::In(1600)]);
            driver.request(TX, &[Buffer::Out(&NO_OFFLOADS), Buffer::Out(&bytes)]);
            let used = driver.wait(RX);
            assert_eq!(taken(&used), (&ONE_BUFFER[..], &bytes[..]));
        }
        if driver.features() & CTRL_VQ != 0 {
            // Known, or not; answered in any case.
            let mac = [&[1, 1][..], &MAC].concat();
            let known = driver.features() & CTRL_MAC_ADDR != 0;
            assert_eq!(command(driver, &mac), u8::from(!known));
            assert_eq!(command(driver, &[9, 9, 9]), 1);
        }
    }
}

#[test]
fn the_device_conforms() {
    conformance(&Nics(1), &|stage, device| stage.direct(device));
}

#[test]
fn the_device_conforms_with_several_pairs() {
    conformance(&Nics(2), &|stage, device| stage.direct(device));
}

// ---- what is offered

#[test]
fn a_link_without_headers_means_no_offloads() {
    let offered = |link: NetLink| VirtioNet::new(&config(), link).unwrap().identity().features;
    let plain = offered(plain_pair().0);
    assert_eq!(
        plain,
        MAC_FEATURE | STATUS | CTRL_VQ | GUEST_ANNOUNCE | MRG_RXBUF | CTRL_MAC_ADDR
    );
    let with = offered(loopback(1));
    let host = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
    assert_eq!(
        with & !plain,
        host | GUEST_CSUM | CTRL_GUEST_OFFLOADS | LONG
    );
    let several = offered(loopback(3));
    assert_eq!(several & !with, MQ);
    let fixed = NetConfig {
        source_mac_filter: true,
        mtu: Some(9000),
        ..config()
    };
    let fixed = VirtioNet::new(&fixed, loopback(1)).unwrap().identity();
    assert_eq!(fixed.features, with & !CTRL_MAC_ADDR | MTU);
}

#[test]
fn a_description_that_cannot_be_says_what_to_do() {
    let error = |config: NetConfig, link: NetLink| -> String {
        let e: NetError = VirtioNet::new(&config, link).err().unwrap();
        e.to_string()
    };
    let mac = |mac| NetConfig {
        mac: Some(mac),
        ..NetConfig::new("lan")
    };
    let e = error(mac([1, 2, 3, 4, 5, 0xff]), loopback(1));
    assert!(
        e.contains("01:02:03:04:05:ff") && e.contains("group"),
        "{e}"
    );
    let e = error(mac([0; 6]), loopback(1));
    assert!(e.contains("network lan") && e.contains("zero"), "{e}");
    let mut fixed = loopback(1);
    fixed.facts.mac = Some([2, 0, 0, 0, 0, 9]);
    let e = error(config(), fixed);
    assert!(
        e.contains("02:00:00:00:00:09") && e.contains("02:00:00:00:00:07"),
        "{e}"
    );
    for size in [0, 1, 3, 2048] {
        let (mut rx, mut others) = (config(), config());
        rx.rx_queue_size = size;
        others.queue_size = size;
        for wrong in [rx, others] {
            let e = error(wrong, loopback(1));
            assert!(e.contains(&format!("of {size}:")), "{e}");
        }
    }
    let e = error(
        NetConfig {
            mtu: Some(67),
            ..config()
        },
        loopback(1),
    );
    assert!(e.contains("67"), "{e}");
    let mut none = loopback(1);
    none.queues.clear();
    assert!(error(config(), none).contains("0 pairs"));
}

#[test]
fn an_address_that_nobody_gave_is_made_up_or_the_links_own() {
    let config = NetConfig::new("net");
    let mac = |link| VirtioNet::new(&config, link).unwrap().handle().mac();
    let (a, b) = (mac(loopback(1)), mac(loopback(1)));
    assert_ne!(a, b);
    assert_eq!(a[0] & 3, 2, "local, and of one interface");
    let mut fixed = loopback(1);
    fixed.facts.mac = Some(MAC);
    assert_eq!(mac(fixed), MAC);
}

#[test]
fn the_configuration_says_what_there_is() {
    let mut nic = nic_of(
        &NetConfig {
            mtu: Some(9000),
            ..config()
        },
        3,
        0,
    );
    assert_eq!(nic.config(), (MAC, 1, 3, 9000));
    // Nothing of it is the driver's to write.
    nic.driver.access().write_config(0, &[0xff; 12]);
    assert_eq!(nic.config(), (MAC, 1, 3, 9000));
}

// ---- from the guest

#[test]
fn frames_of_every_kind_of_length_reach_the_link_as_they_are() {
    let mut nic = nic();
    for len in [
        14,
        15,
        59,
        60,
        61,
        1513,
        1514,
        1518,
        4096,
        9014,
        65_549,
        65_550,
        MAX_FRAME_BYTES,
    ] {
        let bytes = frame(len, 3);
        nic.send(&NO_OFFLOADS, &bytes);
        assert_eq!(nic.arrived(0), with_header(&NO_OFFLOADS, &bytes), "{len}");
    }
    assert_eq!(nic.count("tx_frames"), 13);
}

/// An Ethernet header is the least that is a frame.
#[test]
fn frames_of_every_length_reach_the_link_or_are_refused() {
    let mut nic = nic();
    let all = with_header(&NO_OFFLOADS, &frame(MAX_FRAME_BYTES + HEADER_BYTES + 1, 3));
    let longest = all.len() - HEADER_BYTES;
    let room = nic.driver.allocate(all.len() as u64);
    nic.driver.ram().write(room, &all).unwrap();
    let lengths = 14..=MAX_FRAME_BYTES;
    for len in 0..=longest {
        let chain = HEADER_BYTES + len;
        let buffer = Buffer::Raw(room, u32::try_from(chain).unwrap(), false);
        assert_eq!(nic.driver.request(TX, &[buffer]).len, 0, "{len}");
        if lengths.contains(&len) {
            assert!(nic.arrived(0) == all[..chain], "{len}");
        }
    }
    let passed = lengths.count();
    assert_eq!(nic.count("tx_frames"), passed as u64);
    assert_eq!(nic.count("tx_malformed"), (longest + 1 - passed) as u64);
}

#[test]
fn any_framing_of_a_chain_is_the_same_frame() {
    let mut nic = nic();
    let bytes = with_header(&NO_OFFLOADS, &frame(300, 9));
    let cuts: [&[usize]; 6] = [&[], &[12], &[1], &[11, 13], &[3, 3, 20, 26, 27], &[299]];
    for cut in cuts {
        for indirect in [Indirect::No, Indirect::Yes] {
            let mut buffers = Vec::new();
            let mut from = 0;
            for to in cut.iter().copied().chain([bytes.len()]) {
                buffers.push(Buffer::Out(&bytes[from..to]));
                from = to;
            }
            nic.driver.offer(TX, &buffers, indirect);
            nic.driver.notify(TX);
            nic.driver.wait(TX);
            assert_eq!(nic.arrived(0), bytes, "{cut:?} {indirect:?}");
        }
    }
}

#[test]
fn a_frame_of_crumbs_is_sent_all_the_same() {
    let mut nic = nic();
    let bytes = with_header(&NO_OFFLOADS, &frame(1020 - HEADER_BYTES, 9));
    // Every second byte, so that none of them are neighbours: more parts than one system call takes.
    let room = nic.driver.allocate(2 * 1020);
    let table = nic.driver.allocate(16 * 1026);
    let ram = nic.driver.ram().clone();
    let count = 1026u64;
    for i in 0..count {
        let at = table + 16 * i;
        let (addr, len) = if i < 1020 {
            ram.write(room + 2 * i, &bytes[i as usize..=i as usize])
                .unwrap();
            (room + 2 * i, 1u32)
        } else {
            (room, 0)
        };
        ram.write(at, &addr.to_le_bytes()).unwrap();
        ram.write(at + 8, &len.to_le_bytes()).unwrap();
        let more = u16::from(i + 1 < count);
        ram.write(at + 12, &more.to_le_bytes()).unwrap();
        ram.write(at + 14, &((i + 1) as u16).to_le_bytes()).unwrap();
    }
    nic.driver.write_descriptor(TX, 0, table, 16 * 1026, 4, 0);
    nic.driver.make_available(TX, 0);
    nic.driver.notify(TX);
    assert_eq!(nic.arrived(0), bytes);
}

fn header(flags: u8, gso: u8, hdr_len: u16, gso_size: u16, start: u16, offset: u16) -> Vec<u8> {
    let mut bytes = vec![flags, gso];
    for field in [hdr_len, gso_size, start, offset, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

#[test]
fn what_is_agreed_upon_is_left_to_the_link() {
    let mut nic = nic();
    for (gso, len) in [
        (0, 100),
        (1, 40_000),
        (0x81, 40_000),
        (4, 65_550),
        (5, 30_000),
    ] {
        let size = if gso == 0 { 0 } else { 1448 };
        let head = header(1, gso, 54, size, 34, 16);
        let bytes = frame(len, gso);
        nic.send(&head, &bytes);
        assert_eq!(nic.arrived(0), with_header(&head, &bytes));
    }
}

#[test]
fn frames_that_lie_are_dropped_and_counted_and_the_next_passes() {
    let mut nic = nic();
    let good = frame(100, 1);
    let mut dropped = 0;
    let bad: Vec<(&str, Vec<u8>, usize)> = vec![
        ("no Ethernet header", NO_OFFLOADS.to_vec(), 13),
        (
            "longer than any frame",
            NO_OFFLOADS.to_vec(),
            MAX_FRAME_BYTES + 1,
        ),
        ("gso without a size", header(1, 1, 54, 0, 34, 16), 3000),
        ("gso without checksum", header(0, 1, 54, 1448, 34, 16), 3000),
        ("UFO", header(1, 3, 54, 1448, 34, 16), 3000),
        (
            "a gso nobody knows",
            header(1, 0x33, 54, 1448, 34, 16),
            3000,
        ),
        ("checksum starts outside", header(1, 0, 0, 0, 100, 0), 100),
        ("checksum ends outside", header(1, 0, 0, 0, 50, 49), 100),
        ("offsets that wrap", header(1, 0, 0, 0, 0xffff, 0xffff), 100),
    ];
    for (name, head, len) in &bad {
        nic.send(head, &frame(*len, 1));
        dropped += 1;
        assert_eq!(nic.count("tx_malformed"), dropped, "{name}");
        nic.nothing_arrived();
    }
    let all = with_header(&NO_OFFLOADS, &good);
    // Chains that are no frames.
    for len in 1..HEADER_BYTES {
        nic.driver.request(TX, &[Buffer::Out(&all[..len])]);
        dropped += 1;
    }
    nic.driver.request(TX, &[Buffer::Out(&all), Buffer::In(8)]);
    nic.driver.request(TX, &[Buffer::In(200)]);
    let end = Stage::RAM_BYTES;
    for (addr, len) in [
        (end, 60),
        (end - 10, 60),
        (u64::MAX, 60),
        (u64::MAX - 20, 60),
        (0, 0),
    ] {
        nic.driver.request(TX, &[Buffer::Raw(addr, len, false)]);
        nic.driver.request(
            TX,
            &[Buffer::Out(&all), Buffer::Raw(addr, len.max(1), false)],
        );
    }
    dropped += 2 + 9;
    // The last of them, with one byte at address 0 behind it, is a frame.
    assert_eq!(nic.arrived(0).len(), all.len() + 1);
    assert_eq!(nic.count("tx_malformed"), dropped);
    nic.nothing_arrived();
    nic.send(&NO_OFFLOADS, &good);
    assert_eq!(nic.arrived(0), all);
    assert_eq!(nic.driver.access().status() & status::NEEDS_RESET, 0);
}

#[test]
fn what_was_not_agreed_upon_is_dropped() {
    let csum = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
    let mut nic = nic_of(&config(), 1, csum);
    nic.send(&header(1, 0, 0, 0, 34, 16), &frame(100, 1));
    assert_eq!(nic.count("tx_malformed"), 1);
    let mut nic = nic_of(&config(), 1, HOST_TSO6);
    nic.send(&header(1, 4, 54, 1448, 34, 16), &frame(3000, 1));
    assert_eq!(nic.count("tx_malformed"), 1);
    nic.send(&header(1, 1, 54, 1448, 34, 16), &frame(3000, 1));
    nic.arrived(0);
}

#[test]
fn a_spoofed_source_is_dropped_and_counted() {
    let filtered = NetConfig {
        source_mac_filter: true,
        ..config()
    };
    let mut nic = nic_of(&filtered, 1, 0);
    let mut bytes = frame(100, 1);
    nic.send(&NO_OFFLOADS, &bytes);
    assert_eq!(nic.arrived(0), with_header(&NO_OFFLOADS, &bytes));
    // Cut where the address is, too.
    let all = with_header(&NO_OFFLOADS, &bytes);
    let (a, b) = all.split_at(HEADER_BYTES + 9);
    nic.driver.request(TX, &[Buffer::Out(a), Buffer::Out(b)]);
    assert_eq!(nic.arrived(0), all);
    for byte in 6..12 {
        bytes[byte] ^= 1;
        nic.send(&NO_OFFLOADS, &bytes);
        bytes[byte] ^= 1;
    }
    assert_eq!(nic.count("tx_spoofed"), 6);
    nic.nothing_arrived();
    // Nor can the guest take another address.
    let mac = [1, 1, 2, 0, 0, 0, 0, 8];
    assert_eq!(nic.command(&mac), 1);
    assert_eq!(nic.handle.mac(), MAC);
}

#[test]
fn a_link_that_takes_nothing_holds_frames_back_without_losing_one() {
    let mut nic = nic();
    let count = 200u64;
    let bytes = frame(9000, 1);
    let addr = nic.driver.allocate(bytes.len() as u64 + 12);
    nic.driver.ram().write(addr + 12, &bytes).unwrap();
    for _ in 0..count {
        let buffers = [Buffer::Raw(addr, bytes.len() as u32 + 12, false)];
        nic.driver.offer(TX, &buffers, Indirect::No);
    }
    nic.driver.notify(TX);
    nic.wait_count("tx_blocked", 1);
    std::thread::sleep(SHORT);
    assert!(nic.count("tx_frames") < count);
    assert!(nic.count("tx_blocked") < 10, "it does not spin");
    for _ in 0..count {
        assert_eq!(nic.arrived(0)[12..], bytes);
        // Also that the host can change a guest's limits while frames wait is not in the way.
        nic.handle.change_tx_limits(Limits::default());
    }
    for _ in 0..count {
        nic.driver.wait(TX);
    }
    assert_eq!(nic.count("tx_frames"), count);
}

// ---- to the guest

#[test]
fn frames_of_every_kind_of_length_reach_one_buffer() {
    for without in [MRG_RXBUF, 0] {
        let mut nic = nic_of(&config(), 1, without);
        for len in [14, 60, 1514, 4096, 9014, 65_550, MAX_FRAME_BYTES] {
            let bytes = frame(len, 3);
            nic.driver.submit(RX, &[Buffer::In(70_000)]);
            nic.push(0, &NO_OFFLOADS, &bytes);
            let used = nic.driver.wait(RX);
            assert_eq!(taken(&used), (&ONE_BUFFER[..], &bytes[..]), "{len}");
        }
        assert_eq!(nic.count("rx_frames"), 7);
    }
}

#[test]
fn a_frame_fits_exactly_or_is_lost_where_buffers_cannot_be_merged() {
    let mut nic = nic_of(&config(), 1, MRG_RXBUF);
    let bytes = frame(1514, 3);
    for (room, fits) in [(1526, true), (1525, false), (13, false), (12, false)] {
        let before = nic.count("rx_too_long");
        nic.driver.submit(RX, &[Buffer::In(room)]);
        nic.push(0, &NO_OFFLOADS, &bytes);
        if !fits {
            nic.wait_count("rx_too_long", before + 1);
            // The buffer is still the device's, for a frame that fits; a small one does.
            assert_eq!(nic.driver.poll(RX), None);
            nic.driver.access().reset_queue(RX);
            nic.driver.add_queue(RX, 64);
            continue;
        }
        let used = nic.driver.wait(RX);
        assert_eq!(taken(&used).1, bytes);
    }
    nic.driver.submit(RX, &[Buffer::In(100)]);
    nic.push(0, &NO_OFFLOADS, &bytes);
    nic.push(0, &NO_OFFLOADS, &frame(60, 1));
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, 1));
}

#[test]
fn a_long_frame_is_spread_over_buffers_that_become_used_together() {
    let mut nic = nic();
    let sizes = [1526u32, 100, 12, 4096, 1526];
    for len in [60, 1514, 1515, 1650, 9014, 65_550] {
        let bytes = frame(len, 8);
        let mut rooms = Vec::new();
        // More than the device holds ready at a time.
        for _ in 0..2 {
            for i in 0..60 {
                let room = sizes[i % sizes.len()];
                rooms.push(room);
                nic.driver.offer(RX, &[Buffer::In(room)], Indirect::No);
            }
        }
        nic.driver.notify(RX);
        nic.push(0, &NO_OFFLOADS, &bytes);
        let first = nic.driver.wait(RX);
        let count = u16::from_le_bytes([first.bytes[10], first.bytes[11]]);
        let mut got = first.bytes[..first.len as usize].to_vec();
        let mut lens = vec![first.len];
        for _ in 1..count {
            // Not waited for: section 5.1.6.4.1 has them used together.
            let used = nic.driver.poll(RX).expect("all at once");
            got.extend(&used.bytes[..used.len as usize]);
            lens.push(used.len);
        }
        assert_eq!(got[HEADER_BYTES..], bytes, "{len}");
        let (last, full) = lens.split_last().unwrap();
        assert_eq!(full, &rooms[..full.len()], "all but the last are full");
        assert!(*last > 0 && *last <= rooms[full.len()]);
        nic.quiet(RX);
        // The rest of the buffers goes on being used; begin anew for the arithmetic.
        nic.driver.access().reset_queue(RX);
        nic.driver.add_queue(RX, 256);
    }
}

#[test]
fn with_few_buffers_small_frames_pass_and_a_long_one_waits_for_more() {
    let mut nic = nic();
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.push(0, &NO_OFFLOADS, &frame(60, 1));
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, 1));
    assert_eq!(nic.count("rx_kept"), 1);
    let long = frame(4000, 2);
    nic.push(0, &NO_OFFLOADS, &long);
    nic.wait_count("rx_kept", 2);
    assert_eq!(nic.driver.poll(RX), None);
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    let mut got: Vec<u8> = Vec::new();
    for _ in 0..3 {
        let used = nic.driver.wait(RX);
        got.extend(&used.bytes[..used.len as usize]);
    }
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(got[12..], long);
}

#[test]
fn a_frame_for_which_there_are_never_enough_buffers_does_not_stop_the_others() {
    let mut nic = nic();
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.push(0, &NO_OFFLOADS, &frame(60_000, 1));
    nic.push(0, &NO_OFFLOADS, &frame(60, 2));
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, 2));
    assert_eq!(nic.count("rx_too_long"), 1);
}

#[test]
fn a_guest_that_gives_no_buffers_costs_nothing_and_loses_nothing_that_the_link_keeps() {
    let mut nic = nic();
    nic.ends[0].set_nonblocking(true).unwrap();
    let mut sent = 0u32;
    let end = Instant::now() + Duration::from_millis(200);
    while Instant::now() < end {
        match nic.ends[0].send(&with_header(&NO_OFFLOADS, &frame(100, sent as u8))) {
            Ok(_) => sent += 1,
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
    }
    assert!(sent > 0);
    assert_eq!(nic.count("rx_frames"), 0);
    assert!(
        nic.count("rx_starved") <= u64::from(sent) + 10,
        "{} looks for {sent} frames",
        nic.count("rx_starved")
    );
    for number in 0..sent {
        nic.driver.submit(RX, &[Buffer::In(1526)]);
        assert_eq!(taken(&nic.driver.wait(RX)).1, frame(100, number as u8));
    }
}

#[test]
fn buffers_that_are_none_need_a_reset() {
    let end = Stage::RAM_BYTES;
    let bad: [&[Buffer<'_>]; 5] = [
        &[Buffer::Out(&[0; 100])],
        &[Buffer::Out(&[0; 12]), Buffer::In(1514)],
        &[Buffer::In(11)],
        &[Buffer::Raw(end - 4, 1526, true)],
        &[Buffer::In(12), Buffer::Raw(u64::MAX - 100, 1526, true)],
    ];
    for (number, buffers) in bad.into_iter().enumerate() {
        for without in [MRG_RXBUF, 0] {
            let mut nic = nic_of(&config(), 1, without);
            nic.driver.submit(RX, buffers);
            assert!(nic.needs_reset(), "chain {number}");
            nic.driver.start();
            nic.driver.submit(RX, &[Buffer::In(1526)]);
            nic.push(0, &NO_OFFLOADS, &frame(60, 1));
            nic.driver.wait(RX);
        }
    }
}

#[test]
fn a_driver_without_checksums_finds_no_flags() {
    let mut nic = nic_of(&config(), 1, GUEST_CSUM | LONG);
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.push(0, &header(2, 0, 0, 0, 0, 0), &frame(60, 1));
    assert_eq!(taken(&nic.driver.wait(RX)).0, ONE_BUFFER);
    let mut nic = self::nic();
    nic.driver.submit(RX, &[Buffer::In(70_000)]);
    let head = header(1, 1, 54, 1448, 34, 16);
    nic.push(0, &head, &frame(30_000, 1));
    let used = nic.driver.wait(RX);
    assert_eq!(taken(&used).0[..10], head[..10]);
}

#[test]
fn what_is_not_to_be_cut_is_not_longer_than_the_mtu() {
    let mtu = NetConfig {
        mtu: Some(1500),
        ..config()
    };
    for (without, passes) in [(0, false), (MTU, true)] {
        let mut nic = nic_of(&mtu, 1, without);
        for _ in 0..3 {
            nic.driver.submit(RX, &[Buffer::In(70_000)]);
        }
        nic.push(0, &NO_OFFLOADS, &frame(1519, 1));
        if passes {
            assert_eq!(taken(&nic.driver.wait(RX)).1.len(), 1519);
        } else {
            nic.wait_count("rx_too_long", 1);
        }
        // With a tag, and one that is to be cut.
        nic.push(0, &NO_OFFLOADS, &frame(1518, 1));
        assert_eq!(taken(&nic.driver.wait(RX)).1.len(), 1518);
        nic.push(0, &header(1, 1, 54, 1448, 34, 16), &frame(30_000, 1));
        assert_eq!(taken(&nic.driver.wait(RX)).1.len(), 30_000);
    }
}

#[test]
fn a_link_without_headers_gets_none_and_gives_an_empty_one() {
    let (link, end) = plain_pair();
    end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (_stage, _, mut driver) = started(&config(), link, 0);
    let bytes = frame(200, 1);
    driver.request(TX, &[Buffer::Out(&NO_OFFLOADS), Buffer::Out(&bytes)]);
    let mut got = [0; 300];
    let len = end.recv(&mut got).unwrap();
    assert_eq!(got[..len], bytes);
    for buffers in [&[Buffer::In(1526)][..], &[Buffer::In(70_000)]] {
        driver.submit(RX, buffers);
        end.send(&bytes).unwrap();
        assert_eq!(taken(&driver.wait(RX)), (&ONE_BUFFER[..], &bytes[..]));
    }
}

#[test]
fn buffers_that_were_not_used_outlive_a_pause() {
    let mut nic = nic();
    for _ in 0..60 {
        nic.driver.submit(RX, &[Buffer::In(1526)]);
    }
    nic.push(0, &NO_OFFLOADS, &frame(60, 0));
    nic.driver.wait(RX);
    nic.driver
        .access()
        .with_control(&mut |control| control.pause());
    nic.push(0, &NO_OFFLOADS, &frame(60, 1));
    nic.quiet(RX);
    nic.driver
        .access()
        .with_control(&mut |control| control.resume());
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, 1));
    for number in 2..60 {
        nic.push(0, &NO_OFFLOADS, &frame(60, number));
        assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, number));
    }
}

#[test]
fn one_half_goes_on_while_the_queue_of_the_other_is_reset() {
    let mut nic = nic();
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.driver.access().reset_queue(TX);
    nic.push(0, &NO_OFFLOADS, &frame(60, 1));
    nic.driver.wait(RX);
    nic.driver.add_queue(TX, 16);
    nic.send(&NO_OFFLOADS, &frame(60, 2));
    nic.arrived(0);
    nic.driver.access().reset_queue(RX);
    nic.push(0, &NO_OFFLOADS, &frame(60, 3));
    nic.send(&NO_OFFLOADS, &frame(60, 4));
    nic.arrived(0);
    nic.driver.add_queue(RX, 16);
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, 3));
}

// ---- the owner's side

fn bytes_in(size: u64, refill: Duration) -> Limits {
    Limits {
        bandwidth: Some(Bucket {
            size,
            one_time_burst: 0,
            refill_time: refill,
        }),
        ops: None,
    }
}

#[test]
fn the_rate_of_each_direction_is_bounded_and_changed_live() {
    let hour = Duration::from_secs(3600);
    let limited = NetConfig {
        rx_limits: bytes_in(1000, hour),
        tx_limits: bytes_in(1000, hour),
        ..config()
    };
    let mut nic = nic_of(&limited, 1, 0);
    for _ in 0..4 {
        nic.driver.submit(RX, &[Buffer::In(70_000)]);
        nic.push(0, &NO_OFFLOADS, &frame(600, 1));
    }
    nic.driver.wait(RX);
    nic.wait_count("rx_throttled", 1);
    nic.quiet(RX);
    // The other direction has a limit of its own.
    let bytes = frame(600, 1);
    for _ in 0..4 {
        nic.driver
            .submit(TX, &[Buffer::Out(&NO_OFFLOADS), Buffer::Out(&bytes)]);
    }
    nic.driver.wait(TX);
    nic.wait_count("tx_throttled", 1);
    nic.quiet(TX);
    nic.handle.change_rx_limits(bytes_in(1 << 30, hour));
    for _ in 0..3 {
        nic.driver.wait(RX);
    }
    nic.quiet(TX);
    nic.handle.change_tx_limits(bytes_in(1 << 30, hour));
    for _ in 0..3 {
        nic.driver.wait(TX);
    }
    assert_eq!((nic.count("rx_frames"), nic.count("tx_frames")), (4, 4));
}

#[test]
fn frames_by_the_second_are_bounded_too() {
    let limits = Limits {
        ops: Some(Bucket {
            size: 10,
            one_time_burst: 0,
            refill_time: Duration::from_millis(100),
        }),
        bandwidth: None,
    };
    let mut nic = nic_of(
        &NetConfig {
            tx_limits: limits,
            ..config()
        },
        1,
        0,
    );
    let reader = nic.ends.pop().unwrap();
    let start = Instant::now();
    std::thread::spawn(move || while reader.recv(&mut [0; 128]).is_ok() {});
    let bytes = with_header(&NO_OFFLOADS, &frame(60, 1));
    for _ in 0..40 {
        nic.driver.submit(TX, &[Buffer::Out(&bytes)]);
    }
    for _ in 0..40 {
        nic.driver.wait(TX);
    }
    assert!(
        start.elapsed() >= Duration::from_millis(290),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_stop_does_not_wait_for_the_limiter() {
    let limited = NetConfig {
        rx_limits: bytes_in(1000, Duration::from_secs(3600)),
        ..config()
    };
    let mut nic = nic_of(&limited, 1, 0);
    for number in 0..2 {
        nic.driver.submit(RX, &[Buffer::In(70_000)]);
        nic.push(0, &NO_OFFLOADS, &frame(900, number));
    }
    nic.driver.wait(RX);
    nic.wait_count("rx_throttled", 1);
    nic.driver
        .access()
        .with_control(&mut |control| control.pause());
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(900, 1));
}

#[test]
fn a_cable_that_is_pulled_loses_frames_and_keeps_none() {
    let mut nic = nic();
    nic.driver.access().take_interrupts();
    nic.handle.set_link(false);
    nic.driver.wait_interrupt(false, true);
    assert_eq!((nic.config().1, nic.handle.link_is_up()), (0, false));
    nic.send(&NO_OFFLOADS, &frame(60, 1));
    assert_eq!(nic.count("tx_link_down"), 1);
    nic.nothing_arrived();
    nic.driver.submit(RX, &[Buffer::In(70_000)]);
    nic.driver.submit(RX, &[Buffer::In(70_000)]);
    nic.push(0, &NO_OFFLOADS, &frame(60, 2));
    nic.quiet(RX);
    nic.handle.set_link(false);
    nic.handle.set_link(true);
    nic.driver.wait_interrupt(false, true);
    assert_eq!(nic.config().1, 1);
    nic.wait_count("rx_link_down", 1);
    nic.push(0, &NO_OFFLOADS, &frame(60, 3));
    assert_eq!(taken(&nic.driver.wait(RX)).1, frame(60, 3));
    nic.send(&NO_OFFLOADS, &frame(60, 4));
    nic.arrived(0);
    for _ in 0..50 {
        nic.handle.set_link(false);
        nic.handle.set_link(true);
    }
    nic.send(&NO_OFFLOADS, &frame(60, 5));
    nic.arrived(0);
}

#[test]
fn the_link_stays_as_the_owner_left_it_over_a_reset() {
    let mut nic = nic();
    nic.handle.set_link(false);
    nic.driver.start();
    assert_eq!(nic.config().1, 0);
}

#[test]
fn the_guest_is_asked_to_announce_itself_until_it_answers() {
    let mut nic = nic();
    nic.driver.access().take_interrupts();
    assert!(nic.handle.announce());
    nic.driver.wait_interrupt(false, true);
    assert_eq!(nic.config().1, 3);
    assert_eq!(nic.command(&[3, 0]), 0);
    assert_eq!(nic.config().1, 1);
    assert!(!nic.handle.is_announcing());
    assert!(nic.handle.announce());
    nic.driver.reset();
    assert!(
        !nic.handle.is_announcing(),
        "a new driver is not asked for the old one"
    );
    assert!(!nic.handle.announce(), "nobody is there to ask");
    let mut nic = nic_of(&config(), 1, GUEST_ANNOUNCE);
    assert!(!nic.handle.announce());
    assert_eq!(nic.command(&[3, 0]), 1);
}

// ---- control commands

#[test]
fn the_driver_changes_its_address() {
    let mut nic = nic();
    let mac = [2, 9, 9, 9, 9, 9];
    assert_eq!(nic.command(&[&[1, 1][..], &mac].concat()), 0);
    assert_eq!(nic.config().0, mac);
    assert_eq!(nic.handle.mac(), mac);
    for bad in [[3, 9, 9, 9, 9, 9], [0xff; 6], [0; 6]] {
        assert_eq!(nic.command(&[&[1, 1][..], &bad].concat()), 1);
        assert_eq!(nic.config().0, mac);
    }
    nic.driver.start();
    assert_eq!(
        nic.config().0,
        MAC,
        "a reset gives the owner's address back"
    );
}

#[test]
fn frames_use_as_many_pairs_as_the_driver_says() {
    let mut nic = nic_of(&config(), 3, 0);
    let rx = |pair: u16| 2 * pair;
    for pair in 0..3 {
        nic.driver.submit(rx(pair), &[Buffer::In(70_000)]);
        nic.driver.submit(rx(pair), &[Buffer::In(70_000)]);
    }
    nic.push(1, &NO_OFFLOADS, &frame(60, 1));
    nic.quiet(rx(1));
    let set = |pairs: u16| [&[4, 0][..], &pairs.to_le_bytes()].concat();
    for bad in [0, 4, 0x8000, u16::MAX] {
        assert_eq!(nic.command(&set(bad)), 1, "{bad}");
    }
    assert_eq!(nic.handle.active_pairs(), 1);
    assert_eq!(nic.command(&set(2)), 0);
    assert_eq!(taken(&nic.driver.wait(rx(1))).1, frame(60, 1));
    nic.push(2, &NO_OFFLOADS, &frame(60, 2));
    nic.quiet(rx(2));
    for pair in 0..2u16 {
        let bytes = with_header(&NO_OFFLOADS, &frame(60, 5));
        nic.driver.request(rx(pair) + 1, &[Buffer::Out(&bytes)]);
        assert_eq!(nic.arrived(usize::from(pair)), bytes);
    }
    assert_eq!(nic.command(&set(1)), 0);
    nic.push(1, &NO_OFFLOADS, &frame(60, 3));
    nic.quiet(rx(1));
    assert_eq!(nic.command(&set(3)), 0);
    assert_eq!(taken(&nic.driver.wait(rx(1))).1, frame(60, 3));
    nic.driver.start();
    assert_eq!(nic.handle.active_pairs(), 1, "a reset leaves one");
}

#[test]
fn the_control_queue_is_where_the_driver_looks_for_it() {
    let mut nic = nic_of(&config(), 3, MQ);
    // Without MQ it is queue 2, whatever the device has.
    let mac = [&[1, 1][..], &MAC].concat();
    assert_eq!(nic.command(&mac), 0);
    assert_eq!(nic.command(&[4, 0, 2, 0]), 1, "MQ was not agreed upon");
    let mut nic = nic_of(&config(), 3, 0);
    assert_eq!(nic.command(&mac), 0);
}

#[test]
fn offloads_are_switched_within_what_was_agreed_upon() {
    let mut nic = nic_of(&config(), 1, GUEST_USO4 | GUEST_USO6);
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    assert_eq!(nic.command(&set(0)), 0);
    nic.driver.submit(RX, &[Buffer::In(1526)]);
    nic.push(0, &header(2, 0, 0, 0, 0, 0), &frame(60, 1));
    assert_eq!(
        taken(&nic.driver.wait(RX)).0,
        ONE_BUFFER,
        "no checksums, no flags"
    );
    assert_eq!(nic.command(&set(GUEST_CSUM | GUEST_TSO4)), 0);
    for bad in [GUEST_USO4, 1 << 10, CSUM, u64::MAX, HOST_TSO4] {
        assert_eq!(nic.command(&set(bad)), 1, "{bad:#x}");
    }
    let mut nic = nic_of(&config(), 1, CTRL_GUEST_OFFLOADS);
    assert_eq!(nic.command(&set(0)), 1);
}

#[test]
fn commands_of_every_class_and_length_are_answered() {
    let mut nic = nic();
    let mut refused = 0;
    for class in 0..=8u8 {
        for code in 0..=3u8 {
            for len in [0, 1, 2, 4, 6, 7, 8, 9, 64, 4096] {
                let bytes = [&[class, code][..], &vec![2; len]].concat();
                let answer = nic.command(&bytes);
                let known = matches!((class, code, len), (1, 1, 6) | (3, 0, 0));
                assert_eq!(answer == 0, known, "{class} {code} {len}");
                refused += u64::from(answer);
            }
        }
        if class % 3 == 2 {
            // Guest memory of the test is given out once.
            nic.driver.start();
        }
    }
    assert_eq!(nic.count("commands_refused"), refused);
    // Cut off.
    for bytes in [&[][..], &[1], &[3]] {
        let queue = control_queue(&mut nic.driver);
        let mut buffers = Vec::new();
        if !bytes.is_empty() {
            buffers.push(Buffer::Out(bytes));
        }
        buffers.push(Buffer::In(1));
        assert_eq!(nic.driver.request(queue, &buffers).bytes, [1]);
    }
    // In crumbs, with an answer behind other room, and from outside memory.
    let queue = control_queue(&mut nic.driver);
    let used = nic.driver.request(
        queue,
        &[
            Buffer::Out(&[3]),
            Buffer::Out(&[0]),
            Buffer::In(3),
            Buffer::In(1),
        ],
    );
    assert_eq!(used.bytes, [0, 0, 0, 0]);
    let outside = Buffer::Raw(u64::MAX - 1, 2, false);
    assert_eq!(
        nic.driver.request(queue, &[outside, Buffer::In(1)]).bytes,
        [1]
    );
    assert_eq!(nic.driver.access().status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_command_without_room_for_the_answer_needs_a_reset() {
    for last in [
        None,
        Some(Buffer::Raw(Stage::RAM_BYTES, 1, true)),
        Some(Buffer::Raw(u64::MAX, 4, true)),
    ] {
        let mut nic = nic();
        let queue = control_queue(&mut nic.driver);
        let mut buffers = vec![Buffer::Out(&[3, 0])];
        buffers.extend(last);
        nic.driver.submit(queue, &buffers);
        assert!(nic.needs_reset());
        nic.driver.start();
        assert_eq!(nic.command(&[3, 0]), 0);
    }
}

// ---- resets and moves

#[test]
fn resets_under_traffic_lose_frames_at_most() {
    let nic = nic();
    let Nic {
        stage: _stage,
        handle,
        mut driver,
        mut ends,
    } = nic;
    let end = ends.pop().unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let traffic = {
        let over = over.clone();
        std::thread::spawn(move || {
            end.set_nonblocking(true).unwrap();
            let bytes = with_header(&NO_OFFLOADS, &frame(3000, 1));
            while !over.load(Ordering::Relaxed) {
                let _ = end.send(&bytes);
                let _ = end.recv(&mut [0; 4096]);
            }
            end
        })
    };
    let rounds = if cfg!(debug_assertions) { 60 } else { 300 };
    for round in 0..rounds {
        let offered = driver.access().device_features();
        driver.start_with(if round % 2 == 0 {
            offered
        } else {
            offered & !MRG_RXBUF
        });
        for _ in 0..20 {
            driver.submit(RX, &[Buffer::In(4096)]);
            let bytes = with_header(&NO_OFFLOADS, &frame(100, 1));
            driver.submit(TX, &[Buffer::Out(&bytes)]);
        }
        if round % 3 == 0 {
            driver.wait(RX);
        }
        if round % 7 == 0 {
            driver.access().reset_queue(RX);
        }
    }
    over.store(true, Ordering::Relaxed);
    let end = traffic.join().unwrap();
    driver.start();
    end.set_nonblocking(false).unwrap();
    // What is left from before, then ours.
    let own = with_header(&NO_OFFLOADS, &frame(77, 9));
    end.send(&own).unwrap();
    loop {
        driver.submit(RX, &[Buffer::In(70_000)]);
        let used = driver.wait(RX);
        let (_, bytes) = taken(&used);
        if bytes == frame(77, 9) {
            break;
        }
        assert!(
            bytes == frame(3000, 1) || bytes == frame(100, 1),
            "{} bytes",
            bytes.len()
        );
        driver.start();
    }
    let mut errors = 0;
    handle.counters().visit(&mut |name, value| {
        if name.ends_with("_errors") || name == "tx_malformed" {
            errors += value;
        }
    });
    assert_eq!(errors, 0);
}

fn saved(driver: &mut Driver) -> SavedState {
    let mut saved = None;
    driver.access().with_control(&mut |control| {
        control.pause();
        saved = control.save();
    });
    saved.unwrap()
}

#[test]
fn a_moved_device_goes_on_and_announces_itself() {
    let mut nic = nic_of(&config(), 2, 0);
    let mac = [2, 9, 9, 9, 9, 9];
    nic.command(&[&[1, 1][..], &mac].concat());
    nic.command(&[4, 0, 2, 0]);
    nic.command(&[&[5, 0][..], &GUEST_CSUM.to_le_bytes()].concat());
    for pair in 0..2 {
        nic.driver.submit(2 * pair, &[Buffer::In(1526)]);
    }
    let state = saved(&mut nic.driver);
    let (link, ends) = pair(2);
    let device = VirtioNet::new(&config(), link).unwrap();
    nic.handle = device.handle();
    nic.ends = ends;
    let mut access = nic.stage.direct(Box::new(device));
    access.with_control(&mut |control| {
        control.restore(&state).unwrap();
        control.resume();
    });
    nic.driver.move_to(access);
    assert_eq!(nic.config().0, mac);
    assert_eq!(nic.handle.active_pairs(), 2);
    for pair in 0..2u16 {
        nic.push(usize::from(pair), &NO_OFFLOADS, &frame(60, 1));
        assert_eq!(taken(&nic.driver.wait(2 * pair)).1, frame(60, 1));
    }
    assert!(nic.handle.announce());
    assert_eq!(nic.config().1, 3);
}

#[test]
fn a_state_that_does_not_fit_is_refused_with_a_reason() {
    let refused = |from: NetConfig, pairs: u16, to: NetConfig, link: NetLink, act: &[u8]| {
        let mut nic = nic_of(&from, pairs, 0);
        if !act.is_empty() {
            assert_eq!(nic.command(act), 0);
        }
        let state = saved(&mut nic.driver);
        let device = VirtioNet::new(&to, link).unwrap();
        let mut access = nic.stage.direct(Box::new(device));
        let mut result = Ok(());
        access.with_control(&mut |control| result = control.restore(&state));
        let e: RestoreError = result.unwrap_err();
        e.to_string()
    };
    let e = refused(config(), 1, config(), loopback(2), &[]);
    assert!(e.contains("queues"), "{e}");
    let e = refused(config(), 1, config(), plain_pair().0, &[]);
    assert!(e.contains("features"), "{e}");
    let mtu = NetConfig {
        mtu: Some(9000),
        ..config()
    };
    let e = refused(
        mtu.clone(),
        1,
        NetConfig {
            mtu: Some(1500),
            ..mtu
        },
        loopback(1),
        &[],
    );
    assert!(e.contains("MTU") && e.contains("9000"), "{e}");
    let mut fixed = loopback(1);
    fixed.facts.mac = Some(MAC);
    // The link passes one address, the driver uses another; refused for the features already.
    let e = refused(config(), 1, config(), fixed, &[1, 1, 2, 9, 9, 9, 9, 9]);
    assert!(e.contains("features"), "{e}");
}

/// Two guests on one wire, one frame after the other there and back.
#[test]
fn two_devices_speak_to_each_other() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let link = |fd: UnixDatagram| {
        alveole_net_link::open(alveole_net_link::LinkSpec::DatagramFd(fd.into()), 1).unwrap()
    };
    let (_a_stage, _, mut a) = started(&config(), link(ours), 0);
    let (_b_stage, b_handle, mut b) = started(&config(), link(theirs), 0);
    for number in 0..50 {
        let bytes = frame(100 + number, number as u8);
        for there in [true, false] {
            let (from, to) = if there {
                (&mut a, &mut b)
            } else {
                (&mut b, &mut a)
            };
            to.submit(RX, &[Buffer::In(70_000)]);
            from.request(TX, &[Buffer::Out(&NO_OFFLOADS), Buffer::Out(&bytes)]);
            assert_eq!(taken(&to.wait(RX)).1, bytes);
        }
        if number % 10 == 9 {
            a.start();
            b.start();
        }
    }
    assert_eq!(b_handle.counters().rx_frames.get(), 50);
}
