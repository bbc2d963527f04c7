//! A guest that says what it is told to: packets of any kind through real rings in real guest memory, and the
//! host's side of the device in a directory of its own.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use alveole_virtio::testing::{Buffer, Driver, Indirect, Stage};
use alveole_virtio_vsock::{
    HEADER_BYTES, HOST_CID, Header, VirtioVsock, VsockConfig, VsockHandle, op,
};

pub const CID: u32 = 52;
pub const RX: u16 = 0;
pub const TX: u16 = 1;
pub const EVENT: u16 = 2;
/// How much room the guest says it has, unless a test says otherwise.
pub const ROOM: u32 = 256 << 10;
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Guest memory of one buffer to be sent.
const TX_BYTES: u64 = HEADER_BYTES as u64 + (64 << 10);

/// A device's place on the host.
pub struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    pub fn config(&self) -> VsockConfig {
        VsockConfig {
            guest_cid: CID,
            uds_path: self.path(),
        }
    }

    pub fn device(&self) -> VirtioVsock {
        VirtioVsock::new(&self.config()).unwrap()
    }

    /// Listens for the guest's connections to `port`.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// A client that has said where it wants to go.
    pub fn connect(&self, port: u32) -> UnixStream {
        let mut stream = self.client();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    /// A client that has said nothing.
    pub fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

/// Reads the device's answer to a client: its port.
pub fn read_ok(stream: &UnixStream) -> u32 {
    let mut line = String::new();
    BufReader::with_capacity(1, stream)
        .read_line(&mut line)
        .unwrap();
    let port = line.strip_prefix("OK ").and_then(|l| l.strip_suffix('\n'));
    port.unwrap_or_else(|| panic!("{line:?}")).parse().unwrap()
}

/// Whether the peer has closed.
pub fn is_closed(stream: &mut UnixStream) -> bool {
    !matches!(stream.read(&mut [0]), Ok(1))
}

pub struct Guest {
    pub driver: Driver,
    pub handle: VsockHandle,
    /// Receive buffers by head.
    rooms: HashMap<u16, (u64, u32)>,
    /// Where packets to be sent lie, and which are free.
    free_tx: Vec<u64>,
    in_flight: HashMap<u16, u64>,
}

impl Guest {
    /// Without receive buffers.
    pub fn new(stage: &Stage, device: VirtioVsock) -> Self {
        let handle = device.handle();
        let driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
        Self::with(driver, handle)
    }

    pub fn with(mut driver: Driver, handle: VsockHandle) -> Self {
        driver.start();
        let free_tx = (0..64).map(|_| driver.allocate(TX_BYTES)).collect();
        Self {
            driver,
            handle,
            rooms: HashMap::new(),
            free_tx,
            in_flight: HashMap::new(),
        }
    }

    /// With receive buffers of a page.
    pub fn ready(stage: &Stage, host: &Host) -> Self {
        let mut guest = Self::new(stage, host.device());
        guest.give_rooms(128, 4096);
        guest
    }

    /// Gives so many receive buffers.
    pub fn give_rooms(&mut self, count: usize, len: u32) {
        for _ in 0..count {
            let addr = self.driver.allocate(len.into());
            self.give_room(addr, len);
        }
        self.driver.notify(RX);
    }

    fn give_room(&mut self, addr: u64, len: u32) {
        let buffers = [Buffer::Raw(addr, len, true)];
        let head = self.driver.offer(RX, &buffers, Indirect::No);
        self.rooms.insert(head, (addr, len));
    }

    fn reap(&mut self) {
        while let Some(used) = self.driver.poll(TX) {
            self.free_tx
                .push(self.in_flight.remove(&used.head).unwrap());
        }
    }

    /// Sends a packet, with no more data than fits a buffer. False where all buffers wait to be read.
    pub fn try_send(&mut self, header: Header, data: &[u8]) -> bool {
        self.reap();
        let Some(addr) = self.free_tx.pop() else {
            return false;
        };
        let ram = self.driver.ram();
        ram.write(addr, &header.to_bytes()).unwrap();
        ram.write(addr + HEADER_BYTES as u64, data).unwrap();
        let len = (HEADER_BYTES + data.len()) as u32;
        let buffers = [Buffer::Raw(addr, len, false)];
        let head = self.driver.offer(TX, &buffers, Indirect::No);
        self.in_flight.insert(head, addr);
        self.driver.notify(TX);
        true
    }

    pub fn send(&mut self, header: Header, data: &[u8]) {
        let start = Instant::now();
        while !self.try_send(header, data) {
            assert!(start.elapsed() < PATIENCE, "the device reads no packets");
            std::thread::yield_now();
        }
    }

    /// The next packet, if there is one. Its buffer is given again.
    pub fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.driver.poll(RX)?;
        let (addr, len) = self.rooms.remove(&used.head).unwrap();
        assert!(used.len <= len && used.len as usize >= HEADER_BYTES);
        let mut header = [0; HEADER_BYTES];
        self.driver.ram().read(addr, &mut header).unwrap();
        let header = Header::from_bytes(&header);
        let mut data = vec![0; used.len as usize - HEADER_BYTES];
        assert_eq!(header.len as usize, data.len());
        let from = addr + HEADER_BYTES as u64;
        self.driver.ram().read(from, &mut data).unwrap();
        self.give_room(addr, len);
        self.driver.notify(RX);
        Some((header, data))
    }

    pub fn recv(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            assert!(start.elapsed() < PATIENCE, "the device sends nothing");
            std::thread::yield_now();
        }
    }

    /// The next packet, which must be of this kind.
    #[track_caller]
    pub fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.recv();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// Whether the device is silent for a while.
    pub fn hears_nothing(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(50));
        self.poll().is_none()
    }

    /// A connection to `port` that is established.
    #[track_caller]
    pub fn open(&mut self, local: u32, port: u32) -> Link {
        let link = Link::new(local, port);
        self.send(link.header(op::REQUEST), &[]);
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (port, local));
        link
    }

    /// Takes the next connection of the host.
    #[track_caller]
    pub fn accept(&mut self) -> Link {
        let request = self.expect(op::REQUEST);
        let link = Link::new(request.dst_port, request.src_port);
        self.send(link.header(op::RESPONSE), &[]);
        link
    }
}

/// The guest's end of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    pub local: u32,
    pub port: u32,
    pub room: u32,
    /// Bytes received.
    pub fwd_cnt: u32,
}

impl Link {
    pub fn new(local: u32, port: u32) -> Self {
        Self {
            local,
            port,
            room: ROOM,
            fwd_cnt: 0,
        }
    }

    pub fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: self.local,
            dst_port: self.port,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: self.room,
            fwd_cnt: self.fwd_cnt,
        }
    }

    pub fn data(&self, len: usize) -> Header {
        Header {
            len: len as u32,
            ..self.header(op::RW)
        }
    }

    pub fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(op::SHUTDOWN)
        }
    }

    pub fn is_of(&self, header: &Header) -> bool {
        (header.src_port, header.dst_port) == (self.port, self.local)
    }

    /// Reads `len` bytes of data, and says that they were consumed.
    #[track_caller]
    pub fn read(&mut self, guest: &mut Guest, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let (header, data) = guest.recv();
            if header.op == op::CREDIT_UPDATE || header.op == op::CREDIT_REQUEST {
                continue;
            }
            assert!(header.op == op::RW && self.is_of(&header), "{header:?}");
            all.extend(data);
            self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
        }
        assert_eq!(all.len(), len);
        guest.send(self.header(op::CREDIT_UPDATE), &[]);
        all
    }
}
