//! What a guest can cost the host by doing the same for ever: nothing that grows. One test, because it counts the
//! process's memory, descriptors and log lines.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "shared with tests that need the rest")]
mod carriers;
#[expect(dead_code, reason = "shared with tests that need the rest")]
mod stores;

use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use alveole_block_store::OpenOptions;
use alveole_rate_limiter::Limits;
use alveole_virtio::testing::{Buffer, Driver, Indirect, Stage};
use alveole_virtio::{MAX_TROUBLE_LINES, VirtioDevice, status};
use alveole_virtio_blk::{BlkConfig, VirtioBlk};
use alveole_virtio_pci::testing::PciAccess;
use alveole_virtio_rng::VirtioRng;
use carriers::{Carry, FLUSH, IN, IO_ERROR, OK, OUT, TRANSPORTS, ask, disk, header};
use stores::TestStore;

const SIZE: usize = 1 << 20;
const RESETS: u32 = 300;
/// How far memory may wander without growing: less than a page for each reset.
const NOISE_BYTES: u64 = 1 << 20;

/// Every line that was logged.
struct Lines(Mutex<Vec<String>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }
    fn flush(&self) {}
}

fn take_lines() -> Vec<String> {
    std::mem::take(&mut LINES.0.lock().unwrap())
}

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Memory that this process alone has in RAM.
fn anonymous_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[test]
fn nothing_that_a_guest_repeats_costs_more_each_time() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![0; 16 << 20]).unwrap();
    for (transport, carry) in TRANSPORTS {
        let slow = TestStore {
            delay: Duration::from_millis(2),
            ..TestStore::new(SIZE)
        };
        let name = format!("{transport}, slow");
        let met = reset_storm(&name, carry, disk(slow, 2), IN);
        assert!(
            met > RESETS / 2,
            "{name}: only {met} resets met requests in flight"
        );
        // The host's real engine, too: a flush takes it longer than its system call.
        let file = alveole_block_store::open(&image, &OpenOptions::default()).unwrap();
        let file = VirtioBlk::new(&two_queues(), file).unwrap();
        let name = format!("{transport}, file");
        let met = reset_storm(&name, carry, Box::new(file), FLUSH);
        println!("{name}: {met} of {RESETS} resets met requests in flight");
        broken_rings(transport, carry);
        failing_host(transport, carry);
    }
    odd_functions();
}

fn two_queues() -> BlkConfig {
    BlkConfig {
        queues: 2,
        ..BlkConfig::new("disk")
    }
}

/// Hundreds of resets while the store holds requests of two queues. After each, the memory of rings and buffers
/// is the driver's own again. Gives how many resets met requests in flight.
fn reset_storm(name: &str, carry: Carry, device: Box<dyn VirtioDevice>, kind: u32) -> u32 {
    const CANARY: u8 = 0xa5;
    let stage = Stage::new();
    let mut driver = Driver::new(carry(&stage, device), stage.ram());
    let canary = vec![CANARY; 1 << 20];
    let mut left = canary.clone();
    let mut in_flight = 0;
    let mut at_rest = None;
    take_lines();
    for reset in 0..RESETS {
        // The first resets are the ones that may allocate what is used again.
        if reset == RESETS / 3 {
            at_rest = Some((open_descriptors(), anonymous_bytes()));
        }
        driver.start();
        let first = driver.ring_addrs(0)[0];
        let read = header(kind, 0);
        for queue in [0, 1] {
            for _ in 0..8 {
                let buffers = [Buffer::Out(&read), Buffer::In(512), Buffer::In(1)];
                driver.offer(queue, &buffers, Indirect::No);
            }
            driver.notify(queue);
        }
        // Somewhere between "not looked yet" and "some are done".
        let until = Instant::now() + Duration::from_micros(u64::from(reset % 20) * 50);
        while Instant::now() < until {
            std::thread::yield_now();
        }
        let used = driver.ring_addrs(0)[2];
        let done: u16 = driver.ram().read_plain(used + 2).unwrap();
        in_flight += u32::from(done < 8);
        driver.access().set_status(0);
        assert_eq!(driver.access().status(), 0);
        driver.ram().write(first, &canary).unwrap();
        // Longer than the store takes, now and then: this is what the test is about, and what it costs.
        if reset % 10 == 0 {
            std::thread::sleep(Duration::from_millis(4));
        }
        driver.ram().read(first, &mut left).unwrap();
        assert!(left == canary, "{name}: memory written after reset {reset}");
        let told = driver.access().take_interrupts();
        assert!(!told.queue && !told.config, "{name}: told after the reset");
    }
    let (descriptors, bytes) = at_rest.unwrap();
    assert_eq!(open_descriptors(), descriptors, "{name}: descriptors");
    let grown = anonymous_bytes().saturating_sub(bytes);
    assert!(grown < NOISE_BYTES, "{name}: {grown} bytes more");
    driver.start();
    for queue in [0, 1] {
        assert_eq!(ask(&mut driver, queue, OUT, 1, &[9; 512], 0).0, OK);
        let read = ask(&mut driver, queue, IN, 1, &[], 512);
        assert_eq!(read, (OK, vec![9; 512]));
    }
    assert_eq!(take_lines(), Vec::<String>::new(), "{name}: log lines");
    in_flight
}

/// A guest that breaks its ring, or cannot be started, and resets, and does so again.
fn broken_rings(transport: &str, carry: Carry) {
    let disk = || disk(TestStore::new(SIZE), 1);
    let entropy =
        || -> Box<dyn VirtioDevice> { Box::new(VirtioRng::new(Limits::default()).unwrap()) };
    let devices: [&dyn Fn() -> Box<dyn VirtioDevice>; 2] = [&disk, &entropy];
    for device in devices {
        let stage = Stage::new();
        let mut driver = Driver::new(carry(&stage, device()), stage.ram());
        take_lines();
        for round in 0..100 {
            if round % 2 == 0 {
                driver.start();
                driver.make_available(0, 0xffff);
                driver.notify(0);
                assert!(driver.wait_for_needs_reset(Duration::from_secs(5)));
                for _ in 0..20 {
                    driver.notify(0);
                }
            } else {
                let offered = driver.access().device_features();
                driver.negotiate(offered);
                driver.access().set_up_queue(0, 16, [1, 1, 1]);
                driver.access().enable_queue(0);
                for _ in 0..20 {
                    let now = driver.access().status();
                    driver.access().set_status(now | status::DRIVER_OK);
                }
                assert!(driver.wait_for_needs_reset(Duration::from_secs(5)));
            }
        }
        let lines = take_lines();
        let most = MAX_TROUBLE_LINES as usize + 1;
        assert_eq!(lines.len(), most, "{transport}: {lines:#?}");
        assert!(lines[most - 1].contains("no more is said"), "{lines:?}");
    }
}

/// A disk whose host gives errors for ever.
fn failing_host(transport: &str, carry: Carry) {
    let store = TestStore {
        fails: true,
        ..TestStore::new(SIZE)
    };
    let stage = Stage::new();
    let mut driver = Driver::new(carry(&stage, disk(store, 1)), stage.ram());
    driver.start();
    take_lines();
    for _ in 0..200 {
        assert_eq!(ask(&mut driver, 0, IN, 0, &[], 512).0, IO_ERROR);
    }
    let lines = take_lines();
    assert!((1..=11).contains(&lines.len()), "{transport}: {lines:#?}");
    // What the guest itself asks for wrongly is no news.
    for _ in 0..200 {
        assert_eq!(ask(&mut driver, 0, IN, u64::MAX, &[], 512).0, IO_ERROR);
    }
    assert_eq!(take_lines(), Vec::<String>::new(), "{transport}");
}

/// BARs that are moved, and accesses where nothing is.
fn odd_functions() {
    let stage = Stage::new();
    let pci = PciAccess::new(&stage, disk(TestStore::new(SIZE), 1));
    take_lines();
    for round in 0..1000u32 {
        pci.set_config(0x10, &(round << 16).to_le_bytes());
        let mut bytes = [0; 8];
        let _ = pci.bus.read(pci.bar.0 + 1, &mut bytes);
        let _ = pci.bus.write(pci.bar.0 + 1, &bytes);
    }
    let lines = take_lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
}
