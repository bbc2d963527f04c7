//! What no honest driver does, to a disk and to the entropy device, on every transport. What breaks a ring of any
//! device is in the conformance suite.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "shared with tests that need the rest")]
mod carriers;
#[expect(dead_code, reason = "shared with tests that need the rest")]
mod stores;

use std::time::{Duration, Instant};

use alveole_block_store::RamStore;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_rate_limiter::{Bucket, Limits};
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Buffer, Driver, Indirect, Stage};
use alveole_virtio_mmio::testing::MmioAccess;
use alveole_virtio_pci::BAR_BYTES;
use alveole_virtio_pci::testing::{BAR_ADDR, ECAM_ADDR, PciAccess};
use alveole_virtio_rng::{MAX_REQUEST_BYTES, VirtioRng};
use carriers::{
    Carry, DISCARD, IN, IO_ERROR, OK, OUT, TRANSPORTS, WRITE_ZEROES, ask, disk, header, range,
};
use stores::TestStore;

const SIZE: usize = 1 << 20;
const SECTORS: u64 = SIZE as u64 / 512;
/// How long a device may take to notice that its ring is broken.
const NOTICE: Duration = Duration::from_secs(5);
const END: u64 = Stage::RAM_BYTES;

fn rng(limits: Limits) -> Box<dyn VirtioDevice> {
    Box::new(VirtioRng::new(limits).unwrap())
}

fn on_a_disk(carry: Carry, test: impl FnOnce(&mut Driver, &RamStore)) {
    let stage = Stage::new();
    let store = RamStore::from_bytes((0..SIZE).map(|i| (i / 512) as u8).collect());
    let mut driver = Driver::new(carry(&stage, disk(store.clone(), 1)), stage.ram());
    driver.start();
    test(&mut driver, &store);
    assert_eq!(
        ask(&mut driver, 0, IN, 3, &[], 512),
        (OK, vec![3; 512]),
        "the disk lives"
    );
}

#[test]
fn what_a_disk_cannot_answer_breaks_the_ring() {
    let read = header(IN, 0);
    let cases: [(&str, &[Buffer<'_>]); 9] = [
        ("no status byte", &[Buffer::Out(&read)]),
        (
            "no room for it",
            &[Buffer::Out(&read), Buffer::In(0), Buffer::In(0)],
        ),
        (
            "it is outside memory",
            &[
                Buffer::Out(&read),
                Buffer::In(512),
                Buffer::Raw(END, 1, true),
            ],
        ),
        (
            "its buffer leaves memory",
            &[Buffer::Out(&read), Buffer::Raw(END - 256, 513, true)],
        ),
        (
            "its buffer passes the end of addresses",
            &[Buffer::Out(&read), Buffer::Raw(u64::MAX - 3, 16, true)],
        ),
        ("no header", &[Buffer::In(513)]),
        (
            "half a header",
            &[Buffer::Out(&read[..15]), Buffer::In(513)],
        ),
        (
            "an empty header",
            &[Buffer::Out(&[]), Buffer::Out(&[]), Buffer::In(513)],
        ),
        (
            "a header outside memory",
            &[Buffer::Raw(END - 8, 16, false), Buffer::In(513)],
        ),
    ];
    for (transport, carry) in TRANSPORTS {
        on_a_disk(carry, |driver, _| {
            for (name, buffers) in cases {
                driver.submit(0, buffers);
                let noticed = driver.wait_for_needs_reset(NOTICE);
                assert!(noticed, "{transport}: {name}");
                driver.start();
            }
        });
    }
}

#[test]
fn a_header_may_lie_in_sixteen_descriptors_or_between_empty_ones() {
    for (_, carry) in TRANSPORTS {
        on_a_disk(carry, |driver, _| {
            let read = header(IN, 7);
            let mut one_each: Vec<_> = read.chunks(1).map(Buffer::Out).collect();
            one_each.extend([Buffer::In(512), Buffer::In(1)]);
            let mut with_empty = vec![Buffer::Out(&[])];
            for part in read.chunks(5) {
                with_empty.extend([Buffer::Out(part), Buffer::Out(&[])]);
            }
            with_empty.extend([Buffer::In(0), Buffer::In(512), Buffer::In(0)]);
            with_empty.extend([Buffer::In(1), Buffer::In(0)]);
            for buffers in [one_each, with_empty] {
                for indirect in [Indirect::No, Indirect::Yes] {
                    driver.offer(0, &buffers, indirect);
                    driver.notify(0);
                    let used = driver.wait(0);
                    assert_eq!((&used.bytes[..512], used.bytes[512]), (&[7; 512][..], OK));
                }
            }
        });
    }
}

#[test]
fn sectors_that_are_not_there_are_io_errors_and_change_nothing() {
    for (transport, carry) in TRANSPORTS {
        on_a_disk(carry, |driver, store| {
            let before = store.to_bytes();
            for sector in [
                SECTORS,
                SECTORS - 1,
                1 << 32,
                1 << 54,
                (1 << 55) - 1,
                1 << 55,
                u64::MAX / 512,
                u64::MAX - 1,
                u64::MAX,
            ] {
                let name = format!("{transport}: sector {sector:#x}");
                let (status, _) = ask(driver, 0, IN, sector, &[], 1024);
                assert_eq!(status, IO_ERROR, "{name}");
                let (status, _) = ask(driver, 0, OUT, sector, &[0xee; 1024], 0);
                assert_eq!(status, IO_ERROR, "{name}");
                for kind in [DISCARD, WRITE_ZEROES] {
                    for sectors in [2, 1 << 21, u32::MAX] {
                        let (status, _) = ask(driver, 0, kind, 0, &range(sector, sectors), 0);
                        assert_eq!(status, IO_ERROR, "{name}");
                    }
                }
            }
            assert!(store.to_bytes() == before, "{transport}: the disk changed");
        });
    }
}

#[test]
fn data_where_no_memory_is_and_data_without_end_are_io_errors() {
    for (transport, carry) in TRANSPORTS {
        on_a_disk(carry, |driver, store| {
            let before = store.to_bytes();
            for (addr, len) in [
                (END, 512),
                (END - 256, 512),
                (u64::MAX - 255, 512),
                (0xfee0_0000, 512),
                // The registers of the device itself.
                (BAR_ADDR, 512),
                (0, u32::MAX - 511),
                (END - 512, u32::MAX - 511),
            ] {
                for (kind, writable) in [(IN, true), (OUT, false)] {
                    let head = header(kind, 0);
                    let data = Buffer::Raw(addr, len, writable);
                    let used = driver.request(0, &[Buffer::Out(&head), data, Buffer::In(1)]);
                    assert_eq!(used.bytes, [IO_ERROR], "{transport}: {addr:#x}+{len:#x}");
                }
            }
            assert!(store.to_bytes() == before, "{transport}: the disk changed");
        });
    }
}

/// Reads whose data goes where the descriptors or the rings are.
#[test]
fn a_disk_that_is_told_to_write_over_its_rings_is_healed_by_a_reset() {
    for (_, carry) in TRANSPORTS {
        on_a_disk(carry, |driver, _| {
            for part in 0..3 {
                for _ in 0..4 {
                    let [table, available, used] = driver.ring_addrs(0);
                    let target = [table, available, used][part];
                    let read = header(IN, 200);
                    let data = Buffer::Raw(target, 512, true);
                    driver.submit(0, &[Buffer::Out(&read), data, Buffer::In(1)]);
                    driver.wait_for_needs_reset(Duration::from_millis(10));
                    driver.notify(0);
                    driver.start();
                }
            }
        });
    }
}

#[test]
fn what_is_no_buffer_for_random_bytes_breaks_the_ring() {
    let cases: [&[Buffer<'_>]; 6] = [
        &[Buffer::Out(b"to be read")],
        &[Buffer::Out(b"to be read"), Buffer::In(8)],
        &[Buffer::In(0)],
        &[Buffer::Raw(END - 4, 8, true)],
        &[Buffer::Raw(u64::MAX - 3, 8, true)],
        &[Buffer::In(8), Buffer::Raw(END, 8, true)],
    ];
    for (transport, carry) in TRANSPORTS {
        let stage = Stage::new();
        let mut driver = Driver::new(carry(&stage, rng(Limits::default())), stage.ram());
        for buffers in cases {
            driver.start();
            driver.submit(0, buffers);
            let noticed = driver.wait_for_needs_reset(NOTICE);
            assert!(noticed, "{transport}: {buffers:?}");
        }
        driver.start();
        assert_eq!(driver.request(0, &[Buffer::In(32)]).len, 32);
    }
}

#[test]
fn a_request_for_entropy_gets_no_more_than_its_bound() {
    for (transport, carry) in TRANSPORTS {
        let stage = Stage::new();
        let mut driver = Driver::new(carry(&stage, rng(Limits::default())), stage.ram());
        driver.start();
        for buffers in [
            vec![Buffer::In(8 << 20)],
            vec![Buffer::In(100), Buffer::In(MAX_REQUEST_BYTES as u32 + 1)],
            vec![Buffer::In(4096); 40],
        ] {
            let used = driver.request(0, &buffers);
            assert_eq!(used.len as usize, MAX_REQUEST_BYTES, "{transport}");
            let (given, rest) = used.bytes.split_at(MAX_REQUEST_BYTES);
            assert!(given.chunks(64).all(|part| part.iter().any(|b| *b != 0)));
            assert!(
                rest.iter().all(|b| *b == 0),
                "{transport}: more was written"
            );
            driver.start();
        }
        // A buffer of all memory: what counts is where the first bytes go.
        let all = Buffer::Raw(8 << 20, (END - (8 << 20)) as u32, true);
        assert_eq!(driver.request(0, &[all]).len as usize, MAX_REQUEST_BYTES);
    }
}

#[test]
fn the_rate_of_entropy_is_bounded() {
    let bucket = |size| {
        Some(Bucket {
            size,
            one_time_burst: 0,
            refill_time: Duration::from_millis(200),
        })
    };
    let bandwidth = Limits {
        bandwidth: bucket(1000),
        ops: None,
    };
    let ops = Limits {
        bandwidth: None,
        ops: bucket(10),
    };
    for (transport, carry) in TRANSPORTS {
        for limits in [bandwidth, ops] {
            let stage = Stage::new();
            let mut driver = Driver::new(carry(&stage, rng(limits)), stage.ram());
            driver.start();
            let start = Instant::now();
            // All at once: what the bounds leave waits in the ring, and so does a driver that resets.
            for _ in 0..20 {
                driver.offer(0, &[Buffer::In(100)], Indirect::No);
            }
            driver.notify(0);
            for _ in 0..20 {
                assert_eq!(driver.wait(0).len, 100);
            }
            let took = start.elapsed();
            assert!(took >= Duration::from_millis(190), "{transport}: {took:?}");
            driver.start();
            assert!(driver.request(0, &[Buffer::In(100)]).len == 100);
            let took = start.elapsed();
            assert!(took >= Duration::from_millis(205), "{transport}: {took:?}");
        }
    }
}

/// Every byte of the register block, in every width, read and written.
#[test]
fn every_register_by_mmio_in_every_width() {
    let disk = || disk(RamStore::new(SIZE), 2);
    let entropy = || rng(Limits::default());
    let devices: [&dyn Fn() -> Box<dyn VirtioDevice>; 2] = [&disk, &entropy];
    for device in devices {
        let stage = Stage::new();
        let mut mmio = MmioAccess::new(&stage, device());
        for value in [0xffu8, 0, 1] {
            for offset in 0..0x1000 {
                for width in [1, 2, 3, 4, 8] {
                    let mut bytes = vec![value; width];
                    let write = mmio.registers.write(offset, &bytes);
                    let read = mmio.registers.read(offset, &mut bytes);
                    let fits = offset >= 0x100 || width == 4 && offset % 4 == 0;
                    assert_eq!(
                        (read == Outcome::Done, write == Outcome::Done),
                        (fits, fits),
                        "{offset:#x} {width}"
                    );
                }
            }
        }
        let mut driver = Driver::new(Box::new(mmio), stage.ram());
        driver.start();
        works(&mut driver);
    }
}

/// The same for the function's registers and its configuration space, and where nothing is.
#[test]
fn every_register_by_pci_in_every_width() {
    let disk = || disk(RamStore::new(SIZE), 2);
    let entropy = || rng(Limits::default());
    let devices: [&dyn Fn() -> Box<dyn VirtioDevice>; 2] = [&disk, &entropy];
    for device in devices {
        let stage = Stage::new();
        let pci = PciAccess::new(&stage, device());
        let config = ECAM_ADDR + (alveole_virtio_pci::testing::DEVICE << 15);
        for value in [0xffu8, 0, 1] {
            for (base, len) in [
                (BAR_ADDR, BAR_BYTES + 8),
                (config, 0x1000),
                (BAR_ADDR, 0x1000),
            ] {
                for addr in base..base + len {
                    for width in [1, 2, 3, 4, 8] {
                        let mut bytes = vec![value; width];
                        let _ = pci.bus.write(addr, &bytes);
                        let _ = pci.bus.read(addr, &mut bytes);
                    }
                }
            }
        }
        // What a kernel that comes afterwards does first: it ends the sizing of BARs, and looks.
        for register in [0x10, 0x14] {
            pci.set_config(register, &[0; 4]);
        }
        let mut after = pci.share(&stage, device());
        after.structures.clear();
        after.probe();
        assert_eq!(after.bar, (BAR_ADDR, BAR_BYTES));
        after.enable_msix();
        let mut driver = Driver::new(Box::new(after), stage.ram());
        driver.start();
        works(&mut driver);
    }
}

fn works(driver: &mut Driver) {
    // BLK_SIZE, which the entropy device does not have.
    if driver.features() & (1 << 6) == 0 {
        assert_eq!(driver.request(0, &[Buffer::In(32)]).len, 32);
    } else {
        for queue in 0..2 {
            assert_eq!(ask(driver, queue, OUT, 1, &[queue as u8; 512], 0).0, OK);
            let read = ask(driver, queue, IN, 1, &[], 512);
            assert_eq!(read, (OK, vec![queue as u8; 512]));
        }
    }
}

/// Section 2.6.1 under load: one queue is reset while the store holds its requests and those of another.
#[test]
fn a_busy_queue_is_reset_and_its_neighbour_goes_on() {
    let store = TestStore {
        delay: Duration::from_millis(4),
        ..TestStore::new(SIZE)
    };
    for (transport, carry) in TRANSPORTS {
        let stage = Stage::new();
        let mut driver = Driver::new(carry(&stage, disk(store.clone(), 2)), stage.ram());
        for round in 0..30u64 {
            driver.start();
            let read = header(IN, 1);
            let buffers = [Buffer::Out(&read), Buffer::In(512), Buffer::In(1)];
            for queue in [0, 1] {
                for _ in 0..20 {
                    driver.offer(queue, &buffers, Indirect::No);
                }
                driver.notify(queue);
            }
            // At another point of the work each time.
            std::thread::sleep(Duration::from_micros(round * 200));
            let [_, _, used] = driver.ring_addrs(0);
            driver.access().reset_queue(0);
            assert!(!driver.access().queue_is_enabled(0));
            // From here on the driver may do with that memory what it likes.
            let canary = [0xa5; 256];
            driver.ram().write(used, &canary).unwrap();
            for _ in 0..20 {
                assert_eq!(driver.wait(1).bytes[512], OK, "{transport}");
            }
            let mut left = [0; 256];
            driver.ram().read(used, &mut left).unwrap();
            assert_eq!(left, canary, "{transport}: written after the reset");
            driver.add_queue(0, 8);
            assert_eq!(ask(&mut driver, 0, IN, 1, &[], 512).0, OK);
            assert_eq!(ask(&mut driver, 1, IN, 1, &[], 512).0, OK);
        }
    }
}
