//! Every virtio device on every transport: the suite that all of them pass.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use alveole_block_store::RamStore;
use alveole_net_link::testing::loopback;
use alveole_rate_limiter::Limits;
use alveole_virtio::testing::{
    Access, Buffer, Driver, Indirect, Stage, Subject, Used, conformance,
};
use alveole_virtio::{SavedState, TransportControl, VirtioDevice, features, status};
use alveole_virtio_blk::{BlkConfig, VirtioBlk};
use alveole_virtio_mmio::testing::MmioAccess;
use alveole_virtio_net::{NetConfig, VirtioNet};
use alveole_virtio_pci::testing::PciAccess;
use alveole_virtio_rng::VirtioRng;
use alveole_virtio_vsock::{HEADER_BYTES, HOST_CID, Header, VirtioVsock, VsockConfig, op};
use tempfile::TempDir;

const DISK_BYTES: usize = 1 << 20;
const QUEUES: u16 = 2;

struct Disk;

impl Subject for Disk {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let config = BlkConfig {
            queues: QUEUES,
            ..BlkConfig::new("disk")
        };
        Box::new(VirtioBlk::new(&config, Arc::new(RamStore::new(DISK_BYTES))).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        for queue in 0..QUEUES {
            let data = [queue as u8 + 1; 512];
            let header = |kind: u32| [kind.to_le_bytes(), [0; 4], [3, 0, 0, 0], [0; 4]].concat();
            let write = header(1);
            let used = driver.request(
                queue,
                &[Buffer::Out(&write), Buffer::Out(&data), Buffer::In(1)],
            );
            assert_eq!(used.bytes, [0], "the write's status");
            let read = header(0);
            let used = driver.request(queue, &[Buffer::Out(&read), Buffer::In(512), Buffer::In(1)]);
            assert_eq!((&used.bytes[..512], used.bytes[512]), (&data[..], 0));
        }
    }
}

struct Rng;

impl Subject for Rng {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(VirtioRng::new(Limits::default()).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        let [a, b] = [0; 2].map(|_| driver.request(0, &[Buffer::In(32)]).bytes);
        assert_ne!(a, b);
    }
}

/// A network that gives back what it gets, by this many pairs of queues.
struct Network(u16);

/// A feature that only network devices have.
const CTRL_VQ: u64 = 1 << 17;

/// No offloads, 800 bytes of a frame.
fn frame() -> Vec<u8> {
    [vec![0; 12], vec![0xff; 6], vec![7; 794]].concat()
}

impl Subject for Network {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(VirtioNet::new(&NetConfig::new("net"), loopback(self.0)).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        // What was offered before came back by now, or its frame would not have.
        while driver.poll(1).is_some() {}
        driver.submit(0, &[Buffer::In(4096)]);
        driver.request(1, &[Buffer::Out(&frame())]);
        let used = driver.wait(0);
        assert_eq!(used.bytes[12..812], frame()[12..]);
        if driver.features() & CTRL_VQ != 0 {
            let has_several = driver.features() & (1 << 22) != 0;
            let queue = if has_several { 2 * self.0 } else { 2 };
            let used = driver.request(queue, &[Buffer::Out(&[9, 9]), Buffer::In(1)]);
            assert_eq!(used.bytes, [1], "an unknown command");
        }
    }
}

/// Devices whose connections to `PORT` all reach one program, which sends back what it gets.
struct Sockets {
    dir: TempDir,
    made: AtomicU32,
}

const CID: u32 = 3;
const PORT: u32 = 7;
const SOCKET_TX: u16 = 1;

impl Sockets {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("echo")).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    std::io::copy(&mut stream.try_clone().unwrap(), &mut stream)
                });
            }
        });
        Self {
            dir,
            made: AtomicU32::new(0),
        }
    }
}

fn packet(op: u16, port: u32, data: &[u8]) -> Vec<u8> {
    let header = Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: port,
        len: data.len() as u32,
        kind: 1,
        op,
        // The end of both directions, where the operation is one.
        flags: 3,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    };
    [&header.to_bytes(), data].concat()
}

impl Subject for Sockets {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.path().join(format!("v{number}"));
        let port = self.dir.path().join(format!("v{number}_{PORT}"));
        std::os::unix::fs::symlink(self.dir.path().join("echo"), port).unwrap();
        let config = VsockConfig {
            guest_cid: CID,
            uds_path: path,
        };
        Box::new(VirtioVsock::new(&config).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        const HEADER: u32 = HEADER_BYTES as u32;
        let has_streams = driver.features() & 0b101 != 0b100;
        let mut answer = |packet: &[u8]| {
            driver.submit(0, &[Buffer::In(HEADER), Buffer::In(5)]);
            assert_eq!(driver.request(SOCKET_TX, &[Buffer::Out(packet)]).len, 0);
            let used = driver.wait(0);
            let (header, data) = used.bytes.split_first_chunk().unwrap();
            (Header::from_bytes(header).op, used.len, data.to_vec())
        };
        let (accepted, ..) = answer(&packet(op::REQUEST, PORT, &[]));
        if !has_streams {
            assert_eq!(accepted, op::RST);
            return;
        }
        assert_eq!(accepted, op::RESPONSE);
        let echo = answer(&packet(op::RW, PORT, b"hello"));
        assert_eq!(echo, (op::RW, HEADER + 5, b"hello".to_vec()));
        assert_eq!(answer(&packet(op::SHUTDOWN, PORT, &[])).0, op::RST);
    }

    fn victim_queue(&self) -> u16 {
        SOCKET_TX
    }
}

fn by_mmio(stage: &Stage, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
    alveole_virtio_mmio::testing::carry(stage, device)
}

fn by_pci(stage: &Stage, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
    alveole_virtio_pci::testing::carry(stage, device)
}

#[test]
fn a_disk_by_mmio() {
    conformance(&Disk, &by_mmio);
}

#[test]
fn a_disk_by_pci() {
    conformance(&Disk, &by_pci);
}

#[test]
fn entropy_by_mmio() {
    conformance(&Rng, &by_mmio);
}

#[test]
fn entropy_by_pci() {
    conformance(&Rng, &by_pci);
}

#[test]
fn a_network_by_mmio() {
    conformance(&Network(1), &by_mmio);
}

#[test]
fn a_network_by_pci() {
    conformance(&Network(1), &by_pci);
}

#[test]
fn a_network_of_several_pairs_by_mmio() {
    conformance(&Network(3), &by_mmio);
}

#[test]
fn a_network_of_several_pairs_by_pci() {
    conformance(&Network(3), &by_pci);
}

#[test]
fn sockets_by_mmio() {
    conformance(&Sockets::new(), &by_mmio);
}

#[test]
fn sockets_by_pci() {
    conformance(&Sockets::new(), &by_pci);
}

// ---- a device that moves ----

/// Stops a device and takes its state.
fn pause_and_save(access: &mut dyn Access) -> SavedState {
    let mut saved = None;
    access.with_control(&mut |control| {
        control.pause();
        saved = control.save();
    });
    saved.unwrap()
}

fn restore(access: &mut dyn Access, saved: &SavedState) {
    access.with_control(&mut |control| control.restore(saved).unwrap());
}

/// A driver that has used its device. Without event indices, so that it is told of every request, however fast
/// it polls.
fn driver_at_work(subject: &dyn Subject, access: Box<dyn Access>, stage: &Stage) -> Driver {
    let mut driver = Driver::new(access, stage.ram());
    let offered = driver.access().device_features();
    driver.start_with(offered & !features::EVENT_IDX);
    subject.exercise(&mut driver);
    driver.wait_interrupt(true, false);
    driver
}

/// A request that each device answers with bytes on queue 0: a read of a disk, entropy, room for a frame and the
/// frame, or a packet to nobody.
fn offer(driver: &mut Driver) {
    let read = [0u8; 16];
    let is_network = driver.features() & CTRL_VQ != 0;
    if is_network {
        driver.submit(0, &[Buffer::In(4096)]);
        driver.submit(1, &[Buffer::Out(&frame())]);
        return;
    }
    let is_disk = driver.features() & (1 << 6) != 0;
    let buffers: &[Buffer<'_>] = if is_disk {
        &[Buffer::Out(&read), Buffer::In(512), Buffer::In(1)]
    } else {
        &[Buffer::In(512)]
    };
    if has_sockets(driver) {
        let packet = packet(op::RW, PORT, &[]);
        driver.offer(SOCKET_TX, &[Buffer::Out(&packet)], Indirect::No);
        driver.notify(SOCKET_TX);
    }
    driver.offer(0, buffers, Indirect::No);
    driver.notify(0);
}

fn has_sockets(driver: &Driver) -> bool {
    driver.features() & 0b111 == 0b101
}

/// Waits for the answer to what was offered.
fn answer(driver: &mut Driver) -> Used {
    if has_sockets(driver) {
        driver.wait(SOCKET_TX);
    }
    driver.wait(0)
}

/// The driver is on the new device and notices nothing: what it offered while the device was moved is done, it
/// is told, and goes on.
fn goes_on(subject: &dyn Subject, driver: &mut Driver) {
    let running = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    assert_eq!(driver.access().status(), running);
    driver
        .access()
        .with_control(&mut |control| control.resume());
    assert!(answer(driver).len >= HEADER_BYTES as u32);
    driver.wait_interrupt(true, false);
    for _ in 0..3 {
        subject.exercise(driver);
        driver.wait_interrupt(true, false);
    }
}

fn moves_by_mmio(subject: &dyn Subject) {
    let stage = Stage::new();
    let make = || MmioAccess::new(&stage, subject.device());
    let mut driver = driver_at_work(subject, Box::new(make()), &stage);
    // Selectors, and an interrupt that is not acknowledged.
    let access = driver.access();
    access.with_core(&mut |core| {
        core.select_queue(7);
        core.select_device_features(1);
        core.select_driver_features(1);
    });
    offer(&mut driver);
    answer(&mut driver);
    let saved = pause_and_save(driver.access());
    let mut twin = make();
    restore(&mut twin, &saved);
    assert_eq!(twin.get(0x60), 1, "the interrupt that was not acknowledged");
    assert_eq!(twin.get(0x34), 0, "there is no queue 7");
    let high = (features::OF_EVERY_DEVICE >> 32) as u32;
    assert_eq!(twin.get(0x10) & high, high);
    twin.registers.core().select_queue(0);
    assert_eq!(twin.get(0x44), 1);
    // Its edge may have been on the way: it comes once more.
    let line = twin.line.clone();
    assert_eq!(line.take_edges(), 0, "nothing before the start");
    twin.registers.resume();
    assert_eq!(line.take_edges(), 1);
    twin.registers.pause();
    driver.move_to(Box::new(twin));
    offer(&mut driver);
    goes_on(subject, &mut driver);
}

fn moves_by_pci(subject: &dyn Subject) {
    let stage = Stage::new();
    let pci = PciAccess::new(&stage, subject.device());
    let look = pci.share(&stage, subject.device());
    let mut driver = driver_at_work(subject, Box::new(pci), &stage);
    // Queue 0's message is masked in the table, and an interrupt waits there.
    look.mask(1, true);
    offer(&mut driver);
    answer(&mut driver);
    let start = std::time::Instant::now();
    while look.pending() != [1] {
        assert!(start.elapsed() < std::time::Duration::from_secs(10));
        std::thread::yield_now();
    }
    let saved = pause_and_save(driver.access());
    offer(&mut driver);
    // A new function that no kernel has looked at: no address is decoded, nothing is enabled.
    let mut twin = PciAccess::untouched(&stage, subject.device());
    restore(&mut twin, &saved);
    twin.know(&look);
    let look = twin.share(&stage, subject.device());
    for at in (0..0x100).step_by(4) {
        assert_eq!(look.config_u32(at), twin.config_u32(at));
    }
    driver.move_to(Box::new(twin));
    // Every message goes where it went, but the masked one, which waits.
    for (index, vector) in look.vectors.iter().enumerate() {
        let connected = vector.connected.lock().unwrap().last().copied().flatten();
        let data = connected.map(|message| message.data);
        let wanted = (index != 1).then_some(0x30 + index as u32);
        assert_eq!(data, wanted, "vector {index}");
    }
    assert_eq!(look.pending(), [1]);
    assert!(!look.take(1));
    look.mask(1, false);
    assert!(look.take(1), "the message that waited");
    assert!(look.pending().is_empty());
    goes_on(subject, &mut driver);
}

#[test]
fn a_disk_moves_by_mmio() {
    moves_by_mmio(&Disk);
}

#[test]
fn a_disk_moves_by_pci() {
    moves_by_pci(&Disk);
}

#[test]
fn a_network_moves_by_mmio() {
    moves_by_mmio(&Network(1));
}

#[test]
fn a_network_moves_by_pci() {
    moves_by_pci(&Network(1));
}

#[test]
fn entropy_moves_by_mmio() {
    moves_by_mmio(&Rng);
}

#[test]
fn entropy_moves_by_pci() {
    moves_by_pci(&Rng);
}

#[test]
fn sockets_move_by_mmio() {
    moves_by_mmio(&Sockets::new());
}

#[test]
fn sockets_move_by_pci() {
    moves_by_pci(&Sockets::new());
}
