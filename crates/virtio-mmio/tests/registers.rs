//! The register block: what every driver may ask, and what a hostile one tries.

use alveole_io_bus::{BusDevice, Outcome};
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Access, Buffer, Driver, Echo, Stage, Subject, conformance};
use alveole_virtio_mmio::testing::{MmioAccess, carry};

struct Echoes;

impl Subject for Echoes {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(Echo::new(2))
    }

    fn exercise(&self, driver: &mut Driver) {
        for queue in 0..2 {
            let used = driver.request(queue, &[Buffer::Out(b"hello"), Buffer::In(8)]);
            assert_eq!((used.len, &used.bytes[..5]), (5, &b"hello"[..]));
        }
    }
}

#[test]
fn the_transport_conforms() {
    conformance(&Echoes, &carry);
}

#[test]
fn the_block_says_what_it_is() {
    let stage = Stage::new();
    let mut mmio = MmioAccess::new(&stage, Box::new(Echo::new(1)));
    assert_eq!(mmio.get(0), u32::from_le_bytes(*b"virt"));
    assert_eq!(mmio.get(4), 2);
    assert_eq!(mmio.get(8), 63);
    // No shared memory.
    mmio.set(0xac, 0);
    assert_eq!(
        [
            mmio.get(0xb0),
            mmio.get(0xb4),
            mmio.get(0xb8),
            mmio.get(0xbc)
        ],
        [u32::MAX; 4]
    );
}

#[test]
fn queue_ready_zero_stops_a_queue() {
    let stage = Stage::new();
    let mut mmio = MmioAccess::new(&stage, Box::new(Echo::new(1)));
    mmio.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    mmio.enable_queue(0);
    mmio.set(0x44, 2);
    assert!(mmio.queue_is_enabled(0));
    mmio.set(0x44, 0);
    assert!(!mmio.queue_is_enabled(0));
}

#[test]
fn an_interrupt_is_acknowledged_bit_by_bit() {
    let stage = Stage::new();
    let mut mmio = MmioAccess::new(&stage, Box::new(Echo::new(1)));
    mmio.set(0x64, u32::MAX);
    assert_eq!(mmio.get(0x60), 0);
    let mut driver = Driver::new(Box::new(mmio), stage.ram());
    // With event indices, a driver that polls faster than the worker asks is told of nothing.
    driver.start_with(0);
    driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    driver.wait_interrupt(true, false);
    assert_eq!(
        driver.access().take_interrupts(),
        alveole_virtio::testing::Interrupts::default()
    );
}

#[test]
fn odd_accesses_are_refused_and_harm_nothing() {
    let stage = Stage::new();
    let mut mmio = MmioAccess::new(&stage, Box::new(Echo::new(2)));
    for offset in 0..0x100 {
        for width in [1, 2, 4, 8] {
            let mut bytes = vec![0xee; width];
            let read = mmio.registers.read(offset, &mut bytes);
            // All but a status that would start the device with nothing set up.
            let write = mmio.registers.write(offset, &vec![0xff; width]);
            let fits = width == 4 && offset % 4 == 0;
            assert_eq!(read == Outcome::Done, fits, "{offset:#x} {width}");
            assert_eq!(write == Outcome::Done, fits, "{offset:#x} {width}");
        }
    }
    mmio.set_status(0);
    let mut driver = Driver::new(Box::new(mmio), stage.ram());
    driver.start();
    Echoes.exercise(&mut driver);
}

#[test]
fn a_reset_clears_interrupts_and_ready_bits() {
    let stage = Stage::new();
    let mut mmio = MmioAccess::new(&stage, Box::new(Echo::new(2)));
    for (queue, used) in [(0, 0x3000), (1, Stage::RAM_BYTES)] {
        mmio.set_up_queue(queue, 16, [0x1000, 0x2000, used]);
        mmio.enable_queue(queue);
    }
    // A queue that lies nowhere: NEEDS_RESET, which is told.
    mmio.set_driver_features(alveole_virtio::features::VERSION_1);
    for status in [1, 3, 11, 15] {
        mmio.set_status(status);
    }
    assert_eq!(mmio.get(0x60), 2);
    mmio.set_status(0);
    assert_eq!(mmio.get(0x60), 0);
    for queue in 0..2 {
        assert!(!mmio.queue_is_enabled(queue));
        assert_eq!(mmio.get(0xc0), 0);
    }
}

#[test]
fn queue_reset_reads_zero_before_and_after() {
    let stage = Stage::new();
    let mut mmio = MmioAccess::new(&stage, Box::new(Echo::new(1)));
    mmio.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_eq!(mmio.get(0xc0), 0);
    mmio.enable_queue(0);
    assert_eq!((mmio.get(0xc0), mmio.get(0x44)), (0, 1));
    mmio.set(0xc0, 1);
    assert_eq!((mmio.get(0xc0), mmio.get(0x44)), (0, 0));
    mmio.enable_queue(0);
    assert_eq!((mmio.get(0xc0), mmio.get(0x44)), (0, 1));
}
