//! Our devices and transports under a driver that others wrote: the crate `virtio-drivers`, which knows nothing
//! of this house. Its queues, device drivers and PCI enumeration are used as they are; what is ours is the
//! machine below them: guest memory, and registers in the order and widths in which it accesses them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![expect(
    unsafe_code,
    reason = "the driver works with pointers into guest memory, as a kernel does"
)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixDatagram;
use std::os::unix::net::{UnixListener, UnixStream};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use alveole_block_store::RamStore;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_net_link::testing::pair;
use alveole_rate_limiter::Limits;
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::Stage;
use alveole_virtio_blk::{BlkConfig, BlkHandle, VirtioBlk};
use alveole_virtio_mmio::testing::MmioAccess;
use alveole_virtio_net::{NetConfig, NetHandle, VirtioNet};
use alveole_virtio_pci::testing::{ECAM_ADDR, PciAccess};
use alveole_virtio_rng::VirtioRng;
use alveole_virtio_vsock::{VirtioVsock, VsockConfig, VsockHandle};
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, MemoryBarType, PciRoot,
};
use virtio_drivers::transport::pci::virtio_device_type;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How long a test may take: the driver waits for a device for ever.
const PATIENCE: Duration = Duration::from_secs(60);
/// What lies around a buffer that the device was given.
const SURROUNDINGS: u8 = 0xa5;
const PAGE: u64 = PAGE_SIZE as u64;
const DISK_BYTES: usize = 1 << 20;

// ---- Guest memory, as the driver's platform gives it out.

thread_local! {
    /// The memory of this thread's machine: the driver's platform has no object to keep it in.
    static MEMORY: RefCell<Option<Memory>> = const { RefCell::new(None) };
}

struct Memory {
    /// Guest-physical 0 is mapped here.
    host_ptr: NonNull<u8>,
    /// What is given out: address to pages.
    taken: BTreeMap<u64, u64>,
}

impl Memory {
    /// Pages that nobody uses, never those at 0.
    fn take(&mut self, pages: u64) -> u64 {
        let mut addr = PAGE;
        for (start, len) in &self.taken {
            if addr + pages * PAGE <= *start {
                break;
            }
            addr = start + len * PAGE;
        }
        assert!(
            addr + pages * PAGE <= Stage::RAM_BYTES,
            "guest memory is full"
        );
        self.taken.insert(addr, pages);
        addr
    }

    fn pointer(&self, addr: u64) -> NonNull<u8> {
        assert!(addr < Stage::RAM_BYTES);
        // SAFETY: guest memory is one mapping of so many bytes, see `on_a_machine`.
        unsafe { self.host_ptr.add(usize::try_from(addr).unwrap()) }
    }
}

fn with_memory<T>(act: impl FnOnce(&mut Memory) -> T) -> T {
    MEMORY.with_borrow_mut(|memory| act(memory.as_mut().expect("no machine on this thread")))
}

/// Guest memory for the driver. Its rings lie there; buffers of programs are copied there and back, as where
/// a device reaches a part of memory only, so that each address which the device gets is the guest's.
struct GuestPages;

// SAFETY: `dma_alloc` gives zeroed, page-aligned pages of a mapping that outlives the driver (see
// `on_a_machine`), each to one owner until it is freed.
unsafe impl Hal for GuestPages {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        with_memory(|memory| {
            let addr = memory.take(pages as u64);
            let at = memory.pointer(addr);
            // SAFETY: the pages were taken just now; nobody else uses them.
            unsafe { at.write_bytes(0, pages * PAGE_SIZE) };
            (addr, at)
        })
    }

    unsafe fn dma_dealloc(addr: PhysAddr, at: NonNull<u8>, pages: usize) -> i32 {
        with_memory(|memory| {
            assert_eq!(at, memory.pointer(addr));
            assert_eq!(memory.taken.remove(&addr), Some(pages as u64));
        });
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are no memory here")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        // As far into the page as the buffer is into its own: devices must take any address.
        let from = buffer.cast::<u8>();
        let skip = from.as_ptr() as u64 % PAGE;
        let pages = (skip + buffer.len() as u64 + 1).div_ceil(PAGE);
        with_memory(|memory| {
            let start = memory.take(pages);
            let place = memory.pointer(start);
            // SAFETY: the pages were taken just now, and are more than skip and buffer; the caller lends the
            // buffer for this call.
            unsafe {
                place.write_bytes(SURROUNDINGS, (pages * PAGE) as usize);
                place
                    .add(skip as usize)
                    .copy_from_nonoverlapping(from, buffer.len());
            }
            start + skip
        })
    }

    unsafe fn unshare(addr: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        let skip = (addr % PAGE) as usize;
        let start = addr - skip as u64;
        with_memory(|memory| {
            let pages = memory.taken.remove(&start).expect("this was shared");
            let place = memory.pointer(start);
            // SAFETY: the pages are the driver's again: the device has given the buffer back.
            let all = unsafe {
                std::slice::from_raw_parts(place.as_ptr(), usize::try_from(pages * PAGE).unwrap())
            };
            let (before, rest) = all.split_at(skip);
            let (bytes, behind) = rest.split_at(buffer.len());
            for around in [before, behind] {
                assert!(
                    around.iter().all(|byte| *byte == SURROUNDINGS),
                    "the device wrote beside a buffer"
                );
            }
            let to = buffer.cast::<u8>();
            if direction == BufferDirection::DriverToDevice {
                // SAFETY: the caller lends the buffer for this call; it is read here.
                let was = unsafe { std::slice::from_raw_parts(to.as_ptr(), buffer.len()) };
                assert_eq!(was, bytes, "the device wrote what it was to read");
            } else {
                // SAFETY: the caller lends the buffer for this call, and it is no guest memory.
                unsafe { to.copy_from_nonoverlapping(place.add(skip), buffer.len()) };
            }
        });
    }
}

/// Runs `test` with a machine on a thread of its own, and looks after itself when it hangs.
fn on_a_machine(test: impl FnOnce(&Stage) + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let stage = Stage::new();
        let mut ranges = stage.ram().mapped_ranges();
        let (range, host_addr) = ranges.next().unwrap();
        assert_eq!((range.start, range.size_bytes), (0, Stage::RAM_BYTES));
        assert!(ranges.next().is_none());
        drop(ranges);
        MEMORY.set(Some(Memory {
            host_ptr: NonNull::new(host_addr as *mut u8).unwrap(),
            taken: BTreeMap::new(),
        }));
        test(&stage);
        // The drivers are gone, and with them every page.
        let left = with_memory(|memory| std::mem::take(&mut memory.taken));
        assert!(left.is_empty(), "still shared: {left:x?}");
        MEMORY.set(None);
        done.send(()).unwrap();
    });
    match ended.recv_timeout(PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the driver waits for ever"),
        _ => {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

// ---- Registers, in the order and widths of the driver's own transports.

/// Registers of the MMIO transport. The driver's own implementation needs real registers behind pointers.
#[derive(Clone)]
struct Mmio(Rc<RefCell<MmioAccess>>);

impl Mmio {
    fn get(&self, offset: u64) -> u32 {
        self.0.borrow_mut().get(offset)
    }

    fn set(&self, offset: u64, value: u32) {
        self.0.borrow_mut().set(offset, value);
    }
}

impl Transport for Mmio {
    fn device_type(&self) -> DeviceType {
        assert_eq!((self.get(0x00), self.get(0x04)), (0x7472_6976, 2));
        DeviceType::try_from(self.get(0x08)).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.set(0x14, 0);
        let low = u64::from(self.get(0x10));
        self.set(0x14, 1);
        low | u64::from(self.get(0x10)) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.set(0x30, queue.into());
        self.get(0x34)
    }

    fn notify(&mut self, queue: u16) {
        self.set(0x50, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.get(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.set(0x70, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: u64, available: u64, used: u64) {
        self.set(0x30, queue.into());
        self.set(0x38, size);
        for (offset, addr) in [(0x80, table), (0x90, available), (0xa0, used)] {
            self.set(offset, addr as u32);
            self.set(offset + 4, (addr >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.set(0x30, queue.into());
        self.set(0x44, 0);
        while self.get(0x44) != 0 {}
        self.set(0x38, 0);
        for offset in [0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            self.set(offset, 0);
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.set(0x30, queue.into());
        self.get(0x44) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.get(0x60);
        if status != 0 {
            self.set(0x64, status);
        }
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.get(0xfc)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let mut bytes = vec![0; size_of::<T>()];
        let mut mmio = self.0.borrow_mut();
        let outcome = mmio.registers.read(0x100 + offset as u64, &mut bytes);
        assert_eq!(outcome, Outcome::Done);
        Ok(T::read_from_bytes(&bytes).unwrap())
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        let mut mmio = self.0.borrow_mut();
        let outcome = mmio
            .registers
            .write(0x100 + offset as u64, value.as_bytes());
        assert_eq!(outcome, Outcome::Done);
        Ok(())
    }
}

/// The configuration space through the window, for the driver's enumeration.
#[derive(Clone)]
struct Window(Arc<PciAccess>);

impl Window {
    fn addr(place: DeviceFunction, offset: u8) -> u64 {
        let DeviceFunction {
            bus,
            device,
            function,
        } = place;
        let place = u64::from(bus) << 20 | u64::from(device) << 15 | u64::from(function) << 12;
        ECAM_ADDR + (place | u64::from(offset))
    }
}

impl ConfigurationAccess for Window {
    fn read_word(&self, place: DeviceFunction, offset: u8) -> u32 {
        u32::from_le_bytes(self.0.load(Self::addr(place, offset)))
    }

    fn write_word(&mut self, place: DeviceFunction, offset: u8, data: u32) {
        self.0.store(Self::addr(place, offset), &data.to_le_bytes());
    }

    unsafe fn unsafe_clone(&self) -> Self {
        self.clone()
    }
}

/// A function that the driver's enumeration found, its structures as the capabilities say.
struct Pci {
    bus: Arc<PciAccess>,
    kind: DeviceType,
    common: u64,
    notify: u64,
    multiplier: u64,
    isr: u64,
    config: Option<(u64, u32)>,
}

impl Pci {
    fn find(access: PciAccess) -> Self {
        let bus = Arc::new(access);
        let window = Window(bus.clone());
        let mut root = PciRoot::new(window.clone());
        let found: Vec<_> = root
            .enumerate_bus(0)
            .filter_map(|(place, info)| Some((place, virtio_device_type(&info)?)))
            .collect();
        let [(place, kind)] = found[..] else {
            panic!("one virtio function on the bus: {found:?}")
        };
        let Some(BarInfo::Memory {
            address_type: MemoryBarType::Width64,
            prefetchable: false,
            address,
            size,
        }) = root.bar_info(place, 0).unwrap()
        else {
            panic!("BAR 0 is memory of 64 bits")
        };
        root.set_command(place, Command::MEMORY_SPACE | Command::BUS_MASTER);
        let mut structures = BTreeMap::new();
        let mut multiplier = 0;
        for capability in root.capabilities(place).filter(|c| c.id == 9) {
            let [_, cfg_type] = capability.private_header.to_le_bytes();
            let [bar, offset, length] =
                [4, 8, 12].map(|field| window.read_word(place, capability.offset + field));
            if cfg_type == 2 {
                multiplier = window.read_word(place, capability.offset + 16).into();
            }
            if cfg_type < 5 {
                assert_eq!(bar & 0xff, 0);
                assert!(u64::from(offset) + u64::from(length) <= size);
                structures
                    .entry(cfg_type)
                    .or_insert((address + u64::from(offset), length));
            }
        }
        Self {
            kind,
            common: structures[&1].0,
            notify: structures[&2].0,
            multiplier,
            isr: structures[&3].0,
            config: structures.get(&4).copied(),
            bus,
        }
    }

    fn get<const N: usize>(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        bytes[..N].copy_from_slice(&self.bus.load::<N>(self.common + offset));
        u32::from_le_bytes(bytes)
    }

    fn set(&self, offset: u64, value: &[u8]) {
        self.bus.store(self.common + offset, value);
    }

    fn config_addr(&self, offset: usize, len: usize) -> Result<u64, Error> {
        let (addr, length) = self.config.ok_or(Error::ConfigSpaceMissing)?;
        if offset + len > length as usize {
            return Err(Error::ConfigSpaceTooSmall);
        }
        Ok(addr + offset as u64)
    }
}

impl Transport for Pci {
    fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.set(0x00, &0u32.to_le_bytes());
        let low = u64::from(self.get::<4>(0x04));
        self.set(0x00, &1u32.to_le_bytes());
        low | u64::from(self.get::<4>(0x04)) << 32
    }

    fn write_driver_features(&mut self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(0x08, &select.to_le_bytes());
            self.set(0x0c, &half.to_le_bytes());
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.set(0x16, &queue.to_le_bytes());
        self.get::<2>(0x18)
    }

    fn notify(&mut self, queue: u16) {
        self.set(0x16, &queue.to_le_bytes());
        let offset = u64::from(self.get::<2>(0x1e)) * self.multiplier;
        self.bus.store(self.notify + offset, &queue.to_le_bytes());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.get::<1>(0x14))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.set(0x14, &[status.bits() as u8]);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, table: u64, available: u64, used: u64) {
        self.set(0x16, &queue.to_le_bytes());
        self.set(0x18, &(size as u16).to_le_bytes());
        // The driver's own transport writes addresses in one piece.
        for (offset, addr) in [(0x20, table), (0x28, available), (0x30, used)] {
            self.set(offset, &addr.to_le_bytes());
        }
        self.set(0x1c, &1u16.to_le_bytes());
    }

    // The driver's own transport does nothing here, and resets when it goes.
    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.set(0x16, &queue.to_le_bytes());
        self.get::<2>(0x1c) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let [status] = self.bus.load::<1>(self.isr);
        InterruptStatus::from_bits_retain(status.into())
    }

    fn read_config_generation(&self) -> u32 {
        self.get::<1>(0x15)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let mut bytes = vec![0; size_of::<T>()];
        let addr = self.config_addr(offset, bytes.len())?;
        assert_eq!(self.bus.bus.read(addr, &mut bytes), Outcome::Done);
        Ok(T::read_from_bytes(&bytes).unwrap())
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        let addr = self.config_addr(offset, size_of::<T>())?;
        self.bus.store(addr, value.as_bytes());
        Ok(())
    }
}

impl Drop for Pci {
    fn drop(&mut self) {
        self.set_status(DeviceStatus::empty());
        while !self.get_status().is_empty() {}
    }
}

// ---- What the tests do, whatever the transport.

fn by_mmio(stage: &Stage, device: Box<dyn VirtioDevice>) -> Mmio {
    Mmio(Rc::new(RefCell::new(MmioAccess::new(stage, device))))
}

/// Without MSI-X, which the driver does not know: it polls the ISR status.
fn by_pci(stage: &Stage, device: Box<dyn VirtioDevice>) -> Pci {
    Pci::find(PciAccess::untouched(stage, device))
}

struct Disk {
    store: RamStore,
    handle: BlkHandle,
    device: Box<dyn VirtioDevice>,
}

fn disk(store: RamStore) -> Disk {
    let config = BlkConfig {
        id: Some("an-independent-disk".into()),
        queues: 2,
        ..BlkConfig::new("disk")
    };
    let device = VirtioBlk::new(&config, Arc::new(store.clone())).unwrap();
    Disk {
        store,
        handle: device.handle(),
        device: Box::new(device),
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 512 + seed) as u8).collect()
}

type Blk<T> = VirtIOBlk<GuestPages, T>;

/// Waits until the device tells of used buffers by an interrupt.
fn wait_interrupt<T: Transport>(blk: &mut Blk<T>, wanted: InterruptStatus) {
    let start = Instant::now();
    while !blk.ack_interrupt().contains(wanted) {
        assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        std::thread::yield_now();
    }
}

fn blocks_go_there_and_back<T: Transport>(transport: T, store: &RamStore) {
    assert_eq!(transport.device_type(), DeviceType::Block);
    let mut blk = Blk::new(transport).unwrap();
    assert_eq!(blk.capacity(), (DISK_BYTES / SECTOR_SIZE) as u64);
    assert!(!blk.readonly());
    let mut id = [0; 20];
    let len = blk.device_id(&mut id).unwrap();
    assert_eq!(&id[..len], b"an-independent-disk");
    // Of one sector, of several pages, at both ends.
    for (block, sectors) in [(0, 1), (7, 3), (100, 64), (2047, 1), (1024, 1024)] {
        let bytes = pattern(block, sectors * SECTOR_SIZE);
        blk.write_blocks(block, &bytes).unwrap();
        blk.flush().unwrap();
        let at = block * SECTOR_SIZE;
        assert_eq!(store.to_bytes()[at..at + bytes.len()], bytes);
        let mut back = vec![0; bytes.len()];
        blk.read_blocks(block, &mut back).unwrap();
        assert_eq!(back, bytes);
    }
    // What is not on the disk is an error, and only that.
    let mut room = [0; 1024];
    assert_eq!(blk.read_blocks(2047, &mut room), Err(Error::IoError));
    assert_eq!(
        blk.write_blocks(usize::MAX / 512, &room),
        Err(Error::IoError)
    );
    // Often enough that both indices of the rings wrap.
    let mut sector = [0; SECTOR_SIZE];
    for round in 0..70_000 {
        blk.read_blocks(round % 2048, &mut sector).unwrap();
    }
}

struct Reading {
    token: u16,
    block: usize,
    request: BlkReq,
    bytes: Box<[u8; SECTOR_SIZE]>,
    response: BlkResp,
}

fn a_full_queue_of_reads_comes_back<T: Transport>(transport: T) {
    let mut blk = Blk::new(transport).unwrap();
    blk.enable_interrupts();
    let all = pattern(3, DISK_BYTES);
    for (i, piece) in all.chunks(128 * SECTOR_SIZE).enumerate() {
        blk.write_blocks(i * 128, piece).unwrap();
    }
    for round in 0..50 {
        let _ = blk.ack_interrupt();
        let mut readings: Vec<Box<Reading>> = Vec::new();
        loop {
            let mut reading = Box::new(Reading {
                token: 0,
                block: (round * 37 + readings.len() * 5) % 2048,
                request: BlkReq::default(),
                bytes: Box::new([0; SECTOR_SIZE]),
                response: BlkResp::default(),
            });
            let Reading {
                block,
                request,
                bytes,
                response,
                ..
            } = &mut *reading;
            // SAFETY: all three live in a box that is not touched until the read is complete.
            let taken = unsafe { blk.read_blocks_nb(*block, request, &mut bytes[..], response) };
            match taken {
                Ok(token) => reading.token = token,
                Err(e) => {
                    assert_eq!(e, Error::QueueFull);
                    break;
                }
            }
            readings.push(reading);
        }
        assert!(
            readings.len() >= usize::from(blk.virt_queue_size()) / 3,
            "{} reads fill the queue",
            readings.len()
        );
        wait_interrupt(&mut blk, InterruptStatus::QUEUE_INTERRUPT);
        while !readings.is_empty() {
            let Some(token) = blk.peek_used() else {
                std::thread::yield_now();
                continue;
            };
            let at = readings.iter().position(|r| r.token == token).unwrap();
            let mut reading = readings.swap_remove(at);
            let Reading {
                request,
                bytes,
                response,
                ..
            } = &mut *reading;
            // SAFETY: these are what the read was begun with.
            unsafe { blk.complete_read_blocks(token, request, &mut bytes[..], response) }.unwrap();
            assert_eq!(reading.response.status(), RespStatus::OK);
            let start = reading.block * SECTOR_SIZE;
            assert_eq!(reading.bytes[..], all[start..start + SECTOR_SIZE]);
        }
    }
}

fn a_new_size_is_told<T: Transport>(transport: T, handle: &BlkHandle) {
    let mut blk = Blk::new(transport).unwrap();
    let mut sector = [0; SECTOR_SIZE];
    assert_eq!(blk.read_blocks(2048, &mut sector), Err(Error::IoError));
    handle.resize(2 * DISK_BYTES as u64).unwrap();
    wait_interrupt(&mut blk, InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT);
    blk.read_blocks(2048, &mut sector).unwrap();
}

fn a_read_only_disk_is_seen_as_one<T: Transport>(transport: T) {
    let mut blk = Blk::new(transport).unwrap();
    assert!(blk.readonly());
    let mut sector = [0; SECTOR_SIZE];
    blk.read_blocks(5, &mut sector).unwrap();
    assert_eq!(sector, [7; SECTOR_SIZE]);
    assert_eq!(blk.write_blocks(5, &sector), Err(Error::IoError));
    blk.flush().unwrap();
}

fn entropy_is_given<T: Transport>(transport: T) {
    assert_eq!(transport.device_type(), DeviceType::EntropySource);
    let mut rng = VirtIORng::<GuestPages, T>::new(transport).unwrap();
    rng.enable_interrupts();
    let mut seen = Vec::new();
    for len in [1, 8, 16, 63, 4096, 10_000, 65_536] {
        let mut bytes = vec![0; len];
        assert_eq!(rng.request_entropy(&mut bytes).unwrap(), len);
        if len >= 16 {
            assert!(!seen.contains(&bytes[..16].to_vec()), "the same again");
            assert!(bytes[len - 8..].iter().any(|b| *b != 0));
            seen.push(bytes[..16].to_vec());
        }
        let start = Instant::now();
        while rng.ack_interrupt().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        }
    }
    // More than a request gets: what is over stays as it was.
    let mut bytes = vec![0; 100_000];
    let given = rng.request_entropy(&mut bytes).unwrap();
    assert_eq!(given, 65_536);
    assert!(bytes[given..].iter().all(|b| *b == 0));
    for _ in 0..70_000 {
        assert_eq!(rng.request_entropy(&mut bytes[..4]).unwrap(), 4);
    }
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

struct Network {
    end: UnixDatagram,
    handle: NetHandle,
    device: Box<dyn VirtioDevice>,
}

fn network() -> Network {
    let config = NetConfig {
        mac: Some(MAC),
        ..NetConfig::new("net")
    };
    let (link, mut ends) = pair(1);
    let device = VirtioNet::new(&config, link).unwrap();
    let end = ends.pop().unwrap();
    end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    Network {
        end,
        handle: device.handle(),
        device: Box::new(device),
    }
}

/// A header without offloads, and a frame.
fn on_the_wire(frame: &[u8]) -> Vec<u8> {
    [&[0; 12], frame].concat()
}

type Net<T> = VirtIONetRaw<GuestPages, T, 16>;

/// Gives the device a buffer for each room, has `send` send each frame, and leaves in each room its frame alone.
fn receive<T: Transport>(net: &mut Net<T>, rooms: &mut [Vec<u8>], mut send: impl FnMut(usize)) {
    let begin = |room: &mut Vec<u8>| {
        // SAFETY: the room is not touched until the frame is complete.
        unsafe { net.receive_begin(room) }.unwrap()
    };
    let tokens: Vec<u16> = rooms.iter_mut().map(begin).collect();
    for (number, token) in tokens.into_iter().enumerate() {
        send(number);
        let start = Instant::now();
        while net.poll_receive().is_none() {
            assert!(start.elapsed() < Duration::from_secs(10), "no frame");
            std::thread::yield_now();
        }
        assert_eq!(net.poll_receive(), Some(token), "in order");
        let room = &mut rooms[number];
        // SAFETY: this is what the token was given for.
        let (header, len) = unsafe { net.receive_complete(token, room) }.unwrap();
        room.truncate(header + len);
        room.drain(..header);
    }
}

fn frames_go_there_and_back<T: Transport>(transport: T, end: &UnixDatagram) {
    assert_eq!(transport.device_type(), DeviceType::Network);
    let mut net = Net::new(transport).unwrap();
    assert_eq!(net.mac_address(), MAC);
    net.enable_interrupts();
    let mut got = vec![0; 1 << 17];
    // Often enough that the rings are gone round a hundred times.
    for round in 0..1600 {
        let frame = pattern(round, 60 + round * 7 % 1455);
        net.send(&frame).unwrap();
        let len = end.recv(&mut got).unwrap();
        assert_eq!(got[..len], on_the_wire(&frame));
        let mut rooms = [vec![0; 2048]];
        receive(&mut net, &mut rooms, |_| {
            end.send(&got[..len]).unwrap();
        });
        assert_eq!(rooms[0], frame);
        if round % 64 == 0 {
            let start = Instant::now();
            while !net
                .ack_interrupt()
                .contains(InterruptStatus::QUEUE_INTERRUPT)
            {
                assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
            }
        }
    }
    // Several buffers at a time, and frames that wait for them.
    for number in 0..8 {
        end.send(&on_the_wire(&pattern(number, 3000))).unwrap();
    }
    let mut rooms = vec![vec![0; 4096]; 8];
    receive(&mut net, &mut rooms, |_| ());
    for (number, room) in rooms.iter().enumerate() {
        assert_eq!(*room, pattern(number, 3000));
    }
}

fn a_pulled_cable_is_told<T: Transport>(transport: T, handle: &NetHandle, end: &UnixDatagram) {
    let mut net = Net::new(transport).unwrap();
    net.enable_interrupts();
    for up in [false, true] {
        handle.set_link(up);
        let start = Instant::now();
        let wanted = InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT;
        while !net.ack_interrupt().contains(wanted) {
            assert!(start.elapsed() < Duration::from_secs(10), "no interrupt");
        }
    }
    net.send(&pattern(1, 60)).unwrap();
    let mut got = [0; 100];
    assert_eq!(end.recv(&mut got).unwrap(), 72);
    end.send(&on_the_wire(&pattern(2, 1514))).unwrap();
    let mut rooms = [vec![0; 2000]];
    receive(&mut net, &mut rooms, |_| ());
    assert_eq!(rooms[0], pattern(2, 1514));
}

/// A socket device and its place on the host.
fn sockets() -> (tempfile::TempDir, VsockHandle, Box<dyn VirtioDevice>) {
    let dir = tempfile::tempdir().unwrap();
    let device = VirtioVsock::new(&VsockConfig {
        guest_cid: 77,
        uds_path: dir.path().join("v.sock"),
    });
    let device = device.unwrap();
    (dir, device.handle(), Box::new(device))
}

type Sockets<T> = VsockConnectionManager<GuestPages, T>;

/// What a socket of the guest has received.
fn read<T: Transport>(sockets: &mut Sockets<T>, peer: VsockAddr, port: u32, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let mut piece = [0; 1024];
        let got = sockets.recv(peer, port, &mut piece).unwrap();
        all.extend(&piece[..got]);
        if got == 0 {
            sockets.poll().unwrap();
        } else {
            sockets.update_credit(peer, port).unwrap();
        }
    }
    assert_eq!(all.len(), len);
    all
}

/// Sends all of it, as the peer has room.
fn write<T: Transport>(sockets: &mut Sockets<T>, peer: VsockAddr, port: u32, bytes: &[u8]) {
    for piece in bytes.chunks(4096) {
        while let Err(e) = sockets.send(peer, port, piece) {
            let wait = virtio_drivers::device::socket::SocketError::InsufficientBufferSpaceInPeer;
            assert_eq!(e, wait.into());
            sockets.poll().unwrap();
        }
    }
}

fn sockets_connect_both_ways<T: Transport>(transport: T, dir: &std::path::Path) {
    assert_eq!(transport.device_type(), DeviceType::Socket);
    let listener = UnixListener::bind(dir.join("v.sock_80")).unwrap();
    let mut sockets = Sockets::new(VirtIOSocket::new(transport).unwrap());
    assert_eq!(sockets.guest_cid(), 77);
    // The guest connects; everything it sends comes back.
    let host = VsockAddr { cid: 2, port: 80 };
    sockets.connect(host, 1234).unwrap();
    let event = sockets.wait_for_event().unwrap();
    assert_eq!(event.event_type, VsockEventType::Connected);
    let (mut stream, _) = listener.accept().unwrap();
    let bytes = pattern(1, 3_000_000);
    let echo = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    write(&mut sockets, host, 1234, &bytes);
    sockets.shutdown(host, 1234).unwrap();
    assert!(echo.join().unwrap() == bytes);
    loop {
        let event = sockets.wait_for_event().unwrap();
        if let VsockEventType::Disconnected { .. } = event.event_type {
            break;
        }
    }
    // The host connects to a port that is listened at, and to one that is not.
    sockets.listen(52);
    let bytes = pattern(2, 200_000);
    let (path, sent) = (dir.join("v.sock"), bytes.clone());
    let client = std::thread::spawn(move || {
        let mut refused = UnixStream::connect(&path).unwrap();
        refused.write_all(b"CONNECT 53\n").unwrap();
        assert_eq!(refused.read(&mut [0]).unwrap_or(0), 0);
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(b"CONNECT 52\n").unwrap();
        let mut line = String::new();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        reader.read_line(&mut line).unwrap();
        stream.write_all(&sent).unwrap();
        let mut back = [0; 5];
        reader.read_exact(&mut back).unwrap();
        (line, back)
    });
    let event = sockets.wait_for_event().unwrap();
    assert_eq!(event.event_type, VsockEventType::ConnectionRequest);
    let peer = event.source;
    assert!(read(&mut sockets, peer, 52, bytes.len()) == bytes);
    write(&mut sockets, peer, 52, b"thank");
    let (line, back) = client.join().unwrap();
    assert_eq!(line, format!("OK {}\n", peer.port));
    assert_eq!(&back, b"thank");
    // Nobody listens there.
    sockets.connect(VsockAddr { cid: 2, port: 81 }, 1).unwrap();
    loop {
        let event = sockets.wait_for_event().unwrap();
        if event.destination.port == 1 {
            let VsockEventType::Disconnected { .. } = event.event_type else {
                panic!("{event:?}")
            };
            break;
        }
    }
    // This driver never takes its eight receive buffers back.
    drop(sockets);
    let left = with_memory(|memory| std::mem::take(&mut memory.taken));
    assert_eq!(left.len(), 8, "{left:x?}");
}

// ---- Device by transport.

#[test]
fn frames_by_mmio() {
    on_a_machine(|stage| {
        let Network { end, device, .. } = network();
        frames_go_there_and_back(by_mmio(stage, device), &end);
    });
}

#[test]
fn frames_by_pci() {
    on_a_machine(|stage| {
        let Network { end, device, .. } = network();
        frames_go_there_and_back(by_pci(stage, device), &end);
    });
}

#[test]
fn a_pulled_cable_by_mmio() {
    on_a_machine(|stage| {
        let network = network();
        let transport = by_mmio(stage, network.device);
        a_pulled_cable_is_told(transport, &network.handle, &network.end);
    });
}

#[test]
fn a_pulled_cable_by_pci() {
    on_a_machine(|stage| {
        let network = network();
        let transport = by_pci(stage, network.device);
        a_pulled_cable_is_told(transport, &network.handle, &network.end);
    });
}

#[test]
fn blocks_by_mmio() {
    on_a_machine(|stage| {
        let Disk { store, device, .. } = disk(RamStore::new(DISK_BYTES));
        blocks_go_there_and_back(by_mmio(stage, device), &store);
    });
}

#[test]
fn blocks_by_pci() {
    on_a_machine(|stage| {
        let Disk { store, device, .. } = disk(RamStore::new(DISK_BYTES));
        blocks_go_there_and_back(by_pci(stage, device), &store);
    });
}

#[test]
fn a_full_queue_by_mmio() {
    on_a_machine(|stage| {
        let disk = disk(RamStore::new(DISK_BYTES));
        let access = MmioAccess::new(stage, disk.device);
        let line = access.line.clone();
        a_full_queue_of_reads_comes_back(Mmio(Rc::new(RefCell::new(access))));
        assert!(line.take_edges() > 0, "the line was pulsed");
    });
}

#[test]
fn a_full_queue_by_pci() {
    on_a_machine(|stage| {
        a_full_queue_of_reads_comes_back(by_pci(stage, disk(RamStore::new(DISK_BYTES)).device));
    });
}

#[test]
fn a_new_size_by_mmio() {
    on_a_machine(|stage| {
        let Disk { handle, device, .. } = disk(RamStore::new(DISK_BYTES));
        a_new_size_is_told(by_mmio(stage, device), &handle);
    });
}

#[test]
fn a_new_size_by_pci() {
    on_a_machine(|stage| {
        let Disk { handle, device, .. } = disk(RamStore::new(DISK_BYTES));
        a_new_size_is_told(by_pci(stage, device), &handle);
    });
}

#[test]
fn a_read_only_disk_by_mmio() {
    on_a_machine(|stage| {
        let store = RamStore::from_bytes(vec![7; DISK_BYTES]).read_only();
        a_read_only_disk_is_seen_as_one(by_mmio(stage, disk(store).device));
    });
}

#[test]
fn a_read_only_disk_by_pci() {
    on_a_machine(|stage| {
        let store = RamStore::from_bytes(vec![7; DISK_BYTES]).read_only();
        a_read_only_disk_is_seen_as_one(by_pci(stage, disk(store).device));
    });
}

#[test]
fn entropy_by_mmio() {
    on_a_machine(|stage| {
        let device = Box::new(VirtioRng::new(Limits::default()).unwrap());
        entropy_is_given(by_mmio(stage, device));
    });
}

#[test]
fn entropy_by_pci() {
    on_a_machine(|stage| {
        let device = Box::new(VirtioRng::new(Limits::default()).unwrap());
        entropy_is_given(by_pci(stage, device));
    });
}

#[test]
fn sockets_by_mmio() {
    on_a_machine(|stage| {
        let (dir, handle, device) = sockets();
        sockets_connect_both_ways(by_mmio(stage, device), dir.path());
        assert_eq!(handle.counters().bad_packets.get(), 0);
    });
}

#[test]
fn sockets_by_pci() {
    on_a_machine(|stage| {
        let (dir, handle, device) = sockets();
        sockets_connect_both_ways(by_pci(stage, device), dir.path());
        assert_eq!(handle.counters().bad_packets.get(), 0);
    });
}

/// A driver that goes and another that comes: the second finds a device as new.
#[test]
fn one_driver_after_another() {
    on_a_machine(|stage| {
        let mmio = by_mmio(stage, disk(RamStore::new(DISK_BYTES)).device);
        for round in 0..20u8 {
            let mut blk = Blk::new(mmio.clone()).unwrap();
            let mut sector = [0; SECTOR_SIZE];
            blk.read_blocks(0, &mut sector).unwrap();
            assert_eq!(sector, [round; SECTOR_SIZE]);
            blk.write_blocks(0, &[round + 1; SECTOR_SIZE]).unwrap();
        }
        assert!(!mmio.get_status().contains(DeviceStatus::DEVICE_NEEDS_RESET));
    });
}
