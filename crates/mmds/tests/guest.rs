//! A guest with a TCP stack of its own reads its metadata through a link, and does what no honest guest does.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a test that cannot go on says where"
)]

use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan};
use alveole_mmds::{
    DEFAULT_ADDRESS, HARDWARE_ADDRESS, MAX_CONNECTIONS, MAX_WAITING_FRAMES, Metadata,
    MetadataConfig, Version, detour,
};
use alveole_net_link::testing::pair;
use alveole_net_link::{Frame, HEADER_BYTES, LinkQueue, Received};
use serde_json::json;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// The guest's side of the link.
struct Wire {
    link: Box<dyn LinkQueue>,
    ram: GuestRam,
    mtu: usize,
    checksums: ChecksumCapabilities,
    /// Whether frames are taken.
    takes: bool,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut Wire);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Wire {
    fn send(&mut self, frame: &[u8]) {
        // What a device copies first may be more or less of the frame; the rest lies in guest memory.
        let split = frame.len().min(20);
        let mut start = vec![0; HEADER_BYTES];
        start.extend_from_slice(&frame[..split]);
        let mut rest = GuestBuffers::new(&self.ram);
        rest.push(0x1000, (frame.len() - split) as u64).unwrap();
        rest.copy_from(0, &frame[split..]);
        let frame = Frame {
            start: &start,
            rest: &rest,
        };
        self.link.send(frame).unwrap();
    }

    /// A frame to the guest, received in its memory.
    fn frame(&mut self) -> Option<Vec<u8>> {
        let mut buffers = GuestBuffers::new(&self.ram);
        for at in [0x10_0000, 0x11_0000] {
            buffers.push(at, 800).unwrap();
        }
        match self.link.receive(&buffers).unwrap() {
            Received::Frame(len) => {
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                buffers.copy_to(0, &mut bytes);
                Some(bytes.split_off(HEADER_BYTES))
            }
            Received::WouldBlock => None,
            other => panic!("{other:?}"),
        }
    }
}

impl Device for Wire {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        if !self.takes {
            return None;
        }
        let frame = self.frame()?;
        Some((Rx(frame), Tx(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum = self.checksums.clone();
        capabilities
    }
}

struct Guest {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    time: Instant,
    next_port: u16,
    host: UnixDatagram,
    metadata: Arc<Metadata>,
}

fn guest_with(version: Version, mtu: usize, checksums: ChecksumCapabilities) -> Guest {
    let metadata = Arc::new(Metadata::new(51_200));
    metadata.configure(MetadataConfig {
        version,
        ..MetadataConfig::default()
    });
    metadata
        .put(json!({"latest": {"meta-data": {"id": "i-1", "long": "x".repeat(40_000)}}}))
        .unwrap();
    let (link, mut ends) = pair(1);
    let mut link = detour(link, &metadata).unwrap();
    let mut wire = Wire {
        link: link.queues.remove(0),
        ram: GuestRam::map(&MemoryPlan::around_hole(4 << 20).unwrap()).unwrap(),
        mtu,
        checksums,
        takes: true,
    };
    let mut config = Config::new(EthernetAddress(GUEST_MAC).into());
    config.random_seed = 7;
    let mut interface = Interface::new(config, &mut wire, Instant::ZERO);
    interface.update_ip_addrs(|addresses| {
        addresses
            .push(IpCidr::new(IpAddress::Ipv4(GUEST), 24))
            .unwrap();
        // A route to the service: on the link.
        addresses
            .push(IpCidr::new(
                IpAddress::Ipv4(Ipv4Addr::new(169, 254, 1, 1)),
                16,
            ))
            .unwrap();
    });
    Guest {
        wire,
        interface,
        sockets: SocketSet::new(Vec::new()),
        time: Instant::ZERO,
        next_port: 40_000,
        host: ends.remove(0),
        metadata,
    }
}

fn guest() -> Guest {
    guest_with(Version::V1, 1514, ChecksumCapabilities::default())
}

impl Guest {
    fn poll(&mut self) {
        self.time += smoltcp::time::Duration::from_millis(1);
        self.interface
            .poll(self.time, &mut self.wire, &mut self.sockets);
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
        let socket = self.sockets.add(tcp::Socket::new(buffer(), buffer()));
        self.next_port += 1;
        let context = self.interface.context();
        self.sockets
            .get_mut::<tcp::Socket<'_>>(socket)
            .connect(context, (DEFAULT_ADDRESS, 80), self.next_port)
            .unwrap();
        for _ in 0..100 {
            self.poll();
            if self.socket(socket).may_send() {
                return socket;
            }
        }
        panic!("no connection: {}", self.socket(socket).state());
    }

    fn socket(&mut self, socket: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(socket)
    }

    /// Sends, and reads until the other side has closed, or so many bytes came.
    fn talk(&mut self, socket: SocketHandle, text: &str, until: impl Fn(&str) -> bool) -> String {
        let (mut left, mut got) = (text.as_bytes(), Vec::new());
        for _ in 0..10_000 {
            let end = self.socket(socket);
            if end.can_send() && !left.is_empty() {
                let sent = end.send_slice(left).unwrap();
                left = &left[sent..];
            }
            while end.can_recv() {
                end.recv(|bytes| {
                    got.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .unwrap();
            }
            let is_over = !end.may_recv() && !end.can_recv();
            let said = String::from_utf8_lossy(&got);
            if is_over || until(&said) {
                return said.into_owned();
            }
            self.poll();
        }
        panic!("no end after {:?}", String::from_utf8_lossy(&got));
    }

    /// One request on a connection of its own.
    fn ask(&mut self, text: &str) -> String {
        let socket = self.connect();
        let said = self.talk(socket, text, |_| false);
        self.socket(socket).close();
        for _ in 0..10 {
            self.poll();
        }
        self.sockets.remove(socket);
        said
    }

    /// What came out on the other side of the link.
    fn at_host(&self) -> Option<Vec<u8>> {
        self.host.set_nonblocking(true).unwrap();
        let mut room = [0; 70_000];
        let len = self.host.recv(&mut room).ok()?;
        Some(room[HEADER_BYTES..len].to_vec())
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

#[test]
fn a_guest_reads_its_metadata() {
    let mut guest = guest();
    let said = guest.ask(&get("/latest/meta-data/id"));
    assert!(
        said.starts_with("HTTP/1.1 200 OK\r\n") && said.ends_with("\r\n\r\ni-1"),
        "{said}"
    );
    let said = guest.ask(&get("/latest/meta-data/long"));
    assert!(
        said.ends_with(&"x".repeat(40_000)) && said.len() < 40_500,
        "{}",
        said.len()
    );
    assert_eq!(guest.at_host(), None, "none of it leaves the guest");
}

#[test]
fn a_guest_that_leaves_checksums_and_segments_to_its_device_is_understood() {
    let mut nothing = ChecksumCapabilities::ignored();
    nothing.ipv4 = smoltcp::phy::Checksum::Both;
    let mut guest = guest_with(Version::V1, 5000, nothing);
    let path = format!("/{}", "a".repeat(3000));
    let said = guest.ask(&get(&path));
    assert!(said.starts_with("HTTP/1.1 404 "), "{said}");
}

#[test]
fn a_session_goes_on_one_connection() {
    let mut guest = guest_with(Version::V2, 1514, ChecksumCapabilities::default());
    let socket = guest.connect();
    let said = guest.talk(
        socket,
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n",
        |said| said.contains("\r\n\r\n") && said.len() > 200,
    );
    let token = said.rsplit("\r\n").next().unwrap().to_owned();
    // Two at once, the second in two parts.
    let one = format!("GET /latest/meta-data/id HTTP/1.1\r\nX-metadata-token: {token}\r\n\r\n");
    let both = format!("{one}{}", &one[..30]);
    let said = guest.talk(socket, &both, |said| said.contains("i-1"));
    assert_eq!(said.matches("200 OK").count(), 1, "{said}");
    let said = guest.talk(socket, &one[30..], |said| said.contains("i-1"));
    assert_eq!(said.matches("200 OK").count(), 1, "{said}");
    let said = guest.talk(socket, &get("/latest"), |_| false);
    assert!(said.starts_with("HTTP/1.1 401 "), "{said}");
    assert_eq!(guest.metadata.counters().connections_created.get(), 1);
}

#[test]
fn nonsense_is_answered_and_cut() {
    let mut guest = guest();
    for (text, expected) in [
        ("nonsense\r\n\r\n".to_owned(), "HTTP/1.1 400 "),
        (
            format!("GET /{} HTTP/1.1\r\n", "a".repeat(10_000)),
            "HTTP/1.1 413 ",
        ),
    ] {
        let said = guest.ask(&text);
        assert!(
            said.starts_with(expected) && said.contains("Connection: close"),
            "{said}"
        );
    }
    assert_eq!(guest.metadata.counters().requests_refused.get(), 2);
}

#[test]
fn a_thousand_requests_leave_room_for_more() {
    let mut guest = guest();
    for _ in 0..1000 {
        assert!(guest.ask(&get("/latest/meta-data/id")).ends_with("i-1"));
    }
    assert_eq!(guest.metadata.counters().connections_evicted.get(), 0);
}

#[test]
fn connections_that_say_nothing_make_room() {
    let mut guest = guest();
    let silent: Vec<_> = (0..5 * MAX_CONNECTIONS).map(|_| guest.connect()).collect();
    assert!(guest.ask(&get("/latest/meta-data/id")).ends_with("i-1"));
    let open = silent
        .iter()
        .filter(|s| guest.sockets.get::<tcp::Socket<'_>>(**s).may_send());
    assert!(open.count() < MAX_CONNECTIONS);
    assert!(guest.metadata.counters().connections_evicted.get() >= 4 * MAX_CONNECTIONS as u64);
}

#[test]
fn a_guest_that_takes_nothing_is_bounded() {
    let mut guest = guest();
    let socket = guest.connect();
    guest.wire.takes = false;
    guest
        .socket(socket)
        .send_slice(get("/latest/meta-data/long").as_bytes())
        .unwrap();
    for _ in 0..2000 {
        guest.poll();
    }
    let mut waiting = 0;
    while guest.wire.frame().is_some() {
        waiting += 1;
        assert!(waiting <= 10 * MAX_WAITING_FRAMES, "more and more");
    }
    assert!(waiting > 0);
    // And it can still be served.
    guest.wire.takes = true;
    assert!(guest.ask(&get("/latest/meta-data/id")).ends_with("i-1"));
}

#[test]
fn what_is_for_others_passes() {
    let mut guest = guest();
    let mut arp = vec![0xff; 6];
    arp.extend_from_slice(&GUEST_MAC);
    arp.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend_from_slice(&GUEST_MAC);
    arp.extend_from_slice(&GUEST.octets());
    arp.extend_from_slice(&[0; 6]);
    let ask = |whom: Ipv4Addr| [arp.clone(), whom.octets().to_vec()].concat();
    let other = ask(Ipv4Addr::new(172, 16, 0, 1));
    guest.wire.send(&other);
    assert_eq!(guest.at_host(), Some(other));
    guest.wire.send(&ask(DEFAULT_ADDRESS));
    assert_eq!(guest.at_host(), None);
    let answer = guest.wire.frame().unwrap();
    assert_eq!(&answer[22..28], HARDWARE_ADDRESS);
    // Too short to say whom they are for, and frames of the host.
    for len in [14, 33, 41] {
        let short = vec![8; len];
        guest.wire.send(&short);
        assert_eq!(guest.at_host(), Some(short));
    }
    let frame = [vec![0; HEADER_BYTES], vec![5; 60]].concat();
    guest.host.send(&frame).unwrap();
    assert_eq!(guest.wire.frame(), Some(vec![5; 60]));
}
