//! What section 5.2 of virtio 1.3 asks of a disk and only a store that keeps a record, or the host's system
//! calls, can witness.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "shared with tests that need the rest")]
mod carriers;
mod stores;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use alveole_block_store::{Cache, Engine, OpenOptions, Operation, RamStore};
use alveole_rate_limiter::Limits;
use alveole_virtio::testing::{Driver, Stage};
use alveole_virtio::{VirtioDevice, features};
use alveole_virtio_blk::{BlkConfig, VirtioBlk};
use alveole_virtio_rng::VirtioRng;
use carriers::{FLUSH, IN, OK, OUT, TRANSPORTS, WRITE_ZEROES, ask, disk, range};
use stores::{Event, TestStore};

const SIZE: usize = 1 << 20;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// Offsets in the configuration space (section 5.2.4).
const WRITEBACK: u32 = 32;
const UNUSED0: u32 = 33;
const MAY_UNMAP: u32 = 56;
const UNUSED1: u32 = 57;

fn byte(driver: &mut Driver, at: u32) -> u8 {
    let mut byte = [0xee];
    driver.access().read_config(at, &mut byte);
    byte[0]
}

/// Section 5.2.6.2: what a store is asked for each of the three ways in which a write becomes stable, and that
/// nothing is told complete before the store has said so.
#[test]
fn stable_writes_are_durable_before_they_are_told_complete() {
    for (transport, carry) in TRANSPORTS {
        let stage = Stage::new();
        let store = TestStore {
            delay: Duration::from_millis(5),
            ..TestStore::new(SIZE)
        };
        let mut driver = Driver::new(carry(&stage, disk(store.clone(), 1)), stage.ram());
        let offered = driver.access().device_features();
        let write = |durable| Operation::Write { durable };
        let done = |operation| vec![Event::Asked(operation), Event::Done(operation)];
        let asked = |driver: &mut Driver, kind: u32, out: &[u8]| {
            store.take_record();
            assert_eq!(ask(driver, 0, kind, 0, out, 0).0, OK);
            // Taken as soon as the guest can know: what is missing here came too late.
            store.take_record()
        };
        // Neither cache mode nor flush were taken, but flush was offered.
        driver.start_with(offered & !(F_FLUSH | F_CONFIG_WCE));
        assert_eq!(asked(&mut driver, OUT, &[1; 512]), done(write(true)));
        // The cache mode was taken and says write-through.
        driver.start_with(offered);
        for (writeback, durable) in [(1, false), (0, true), (1, false)] {
            driver.access().write_config(WRITEBACK, &[writeback]);
            let record = asked(&mut driver, OUT, &[2; 512]);
            assert_eq!(
                record,
                done(write(durable)),
                "{transport}, writeback {writeback}"
            );
        }
        // A flush after the write was completed.
        assert_eq!(asked(&mut driver, FLUSH, &[]), done(Operation::Flush));
        // Flush without the cache mode.
        driver.start_with(offered & !F_CONFIG_WCE);
        assert_eq!(asked(&mut driver, OUT, &[3; 512]), done(write(false)));
        assert_eq!(asked(&mut driver, FLUSH, &[]), done(Operation::Flush));
    }
}

/// The same for the host: the calls that make writes last return before the guest is told.
#[test]
fn stable_writes_reach_the_host_as_durable_ones() {
    const CHILD: &str = "ALVEOLE_TEST_STABLE_WRITES";
    if let Some(image) = std::env::var_os(CHILD) {
        write_stably(Path::new(&image));
        return;
    }
    let probe = Command::new("strace")
        .args(["-o", "/dev/null", "true"])
        .output();
    if !probe.is_ok_and(|output| output.status.success()) {
        skip(
            "stable_writes_reach_the_host_as_durable_ones",
            "strace is not installed, or may not trace here",
        );
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (image, trace) = (dir.path().join("disk.img"), dir.path().join("trace"));
    std::fs::write(&image, vec![0; SIZE]).unwrap();
    let output = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=pwritev2,fdatasync,fsync,write"])
        .arg("-o")
        .arg(&trace)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "stable_writes_reach_the_host_as_durable_ones"])
        .args(["--nocapture", "--test-threads=1"])
        .env(CHILD, &image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let trace = std::fs::read_to_string(&trace).unwrap();
    // What each mark ends.
    let mut before = Vec::new();
    let mut seen = Vec::new();
    for line in trace.lines() {
        match line.split_once("told: ") {
            Some((_, rest)) => {
                let mark = rest.split("\\n").next().unwrap_or(rest);
                seen.push((mark.to_owned(), std::mem::take(&mut before).join("\n")));
            }
            None => before.push(line),
        }
    }
    let lasting = |calls: &str| calls.contains("RWF_DSYNC");
    let flushed = |calls: &str| calls.contains("fdatasync(") || calls.contains("fsync(");
    let judged: Vec<_> = seen
        .iter()
        .map(|(mark, calls)| (mark.as_str(), lasting(calls), flushed(calls)))
        .collect();
    assert_eq!(
        judged,
        [
            ("started", false, false),
            ("write without flush", true, false),
            ("write through", true, false),
            ("write back", false, false),
            ("flush", false, true),
        ],
        "{trace}"
    );
}

/// Uses a disk over a file and marks in the stream of system calls when it was told what.
fn write_stably(image: &Path) {
    let options = OpenOptions {
        engine: Engine::Sync,
        ..OpenOptions::default()
    };
    let store = alveole_block_store::open(image, &options).unwrap();
    let device = VirtioBlk::new(&BlkConfig::new("disk"), store).unwrap();
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
    let offered = driver.access().device_features();
    driver.start_with(offered & !(F_FLUSH | F_CONFIG_WCE));
    eprintln!("told: started");
    assert_eq!(ask(&mut driver, 0, OUT, 0, &[1; 4096], 0).0, OK);
    eprintln!("told: write without flush");
    driver.start_with(offered);
    driver.access().write_config(WRITEBACK, &[0]);
    assert_eq!(ask(&mut driver, 0, OUT, 8, &[2; 4096], 0).0, OK);
    eprintln!("told: write through");
    driver.access().write_config(WRITEBACK, &[1]);
    assert_eq!(ask(&mut driver, 0, OUT, 16, &[3; 4096], 0).0, OK);
    eprintln!("told: write back");
    assert_eq!(ask(&mut driver, 0, FLUSH, 0, &[], 0).0, OK);
    eprintln!("told: flush");
}

fn skip(test: &str, why: &str) {
    use std::io::Write;
    let line = format!("SKIPPED {test}: {why}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.append(true).create(true).open(path).unwrap();
        writeln!(file, "{line}").unwrap();
    }
}

/// Section 5.2.6.2.
#[test]
fn may_unmap_is_clear_where_nothing_can_be_given_back() {
    for (transport, carry) in TRANSPORTS {
        for discard in [true, false] {
            let store = TestStore {
                discard,
                ..TestStore::new(SIZE)
            };
            let stage = Stage::new();
            let mut driver = Driver::new(carry(&stage, disk(store, 1)), stage.ram());
            driver.start();
            let offered = driver.features() & (F_DISCARD | F_WRITE_ZEROES);
            let wanted = if discard { F_DISCARD } else { 0 } | F_WRITE_ZEROES;
            assert_eq!(offered, wanted, "{transport}");
            assert_eq!(byte(&mut driver, MAY_UNMAP), u8::from(discard));
            // Zeroes they become all the same, whether they may be unmapped or not.
            for flag in [0, 1] {
                assert_eq!(ask(&mut driver, 0, OUT, 4, &[7; 512], 0).0, OK);
                let mut range = range(4, 1);
                range[12] = flag;
                assert_eq!(ask(&mut driver, 0, WRITE_ZEROES, 0, &range, 0).0, OK);
                assert_eq!(ask(&mut driver, 0, IN, 4, &[], 512), (OK, vec![0; 512]));
            }
        }
    }
}

/// Section 5.2.6.2: the field changes with the medium, and the driver is told.
#[test]
fn a_change_of_may_unmap_is_told() {
    for (_, carry) in TRANSPORTS {
        let stage = Stage::new();
        let device = VirtioBlk::new(&BlkConfig::new("disk"), Arc::new(TestStore::new(SIZE)));
        let device = device.unwrap();
        let handle = device.handle();
        let mut driver = Driver::new(carry(&stage, Box::new(device)), stage.ram());
        driver.start();
        assert_eq!(byte(&mut driver, MAY_UNMAP), 1);
        let other = TestStore {
            discard: false,
            ..TestStore::new(SIZE)
        };
        handle.change_medium(Arc::new(other)).unwrap();
        driver.wait_interrupt(false, true);
        assert_eq!(byte(&mut driver, MAY_UNMAP), 0);
    }
}

/// Section 5.2.5.2.
#[test]
fn unused_bytes_of_the_configuration_are_zero() {
    for (_, carry) in TRANSPORTS {
        let stage = Stage::new();
        let mut driver = Driver::new(carry(&stage, disk(TestStore::new(SIZE), 2)), stage.ram());
        for _ in 0..2 {
            for at in [UNUSED0, UNUSED1, UNUSED1 + 1, UNUSED1 + 2] {
                assert_eq!(byte(&mut driver, at), 0, "byte {at}");
                driver.access().write_config(at, &[0xff]);
                assert_eq!(byte(&mut driver, at), 0, "byte {at}");
            }
            // With its neighbours, too.
            driver.access().write_config(UNUSED0 - 1, &[1, 0xff, 0, 0]);
            driver.access().write_config(UNUSED1 - 1, &[0xff; 4]);
            driver.start();
        }
        // Nothing of what only zoned devices have.
        for at in 60..96 {
            assert_eq!(byte(&mut driver, at), 0, "byte {at}");
        }
    }
}

/// Sections 2.2.2, 5.2.5.2 and 6.2: exactly what is implemented is offered, and nothing without what it needs.
#[test]
fn exactly_what_is_implemented_is_offered() {
    let size_max_seg_max_blk_size_topology = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 10;
    let mq = 1 << 12;
    let of_every_disk = size_max_seg_max_blk_size_topology | features::OF_EVERY_DEVICE;
    let offered = |device: Box<dyn VirtioDevice>| {
        let stage = Stage::new();
        let (_, carry) = TRANSPORTS[0];
        let by_mmio = carry(&stage, device).device_features();
        assert_eq!(by_mmio & 1 << 37, 0, "SR-IOV");
        by_mmio
    };
    let unsafe_disk = |ram| {
        let config = BlkConfig {
            cache: Cache::Unsafe,
            ..BlkConfig::new("disk")
        };
        Box::new(VirtioBlk::new(&config, Arc::new(ram)).unwrap())
    };
    let no_discard = TestStore {
        discard: false,
        ..TestStore::new(SIZE)
    };
    let ram = || RamStore::new(SIZE);
    let wce = F_FLUSH | F_CONFIG_WCE;
    for (device, wanted) in [
        (disk(ram(), 1), wce | F_DISCARD | F_WRITE_ZEROES),
        (disk(ram(), 4), wce | F_DISCARD | F_WRITE_ZEROES | mq),
        (disk(no_discard, 1), wce | F_WRITE_ZEROES),
        (disk(ram().read_only(), 1), F_RO),
        (unsafe_disk(ram()), F_DISCARD | F_WRITE_ZEROES),
    ] {
        let offered = offered(device);
        assert_eq!(offered, wanted | of_every_disk, "{offered:#x}");
        assert!(offered & F_CONFIG_WCE == 0 || offered & F_FLUSH != 0);
    }
    let rng = VirtioRng::new(Limits::default()).unwrap();
    assert_eq!(offered(Box::new(rng)), features::OF_EVERY_DEVICE);
}

/// Sections 2.5.2, 4.1.4.3.1 and 4.2.2.1: a driver that reads the size while it changes can tell, from the
/// first access on; it is told when it is ready, not before.
#[test]
fn a_size_that_changes_before_the_driver_is_ready_is_not_missed() {
    for (transport, carry) in TRANSPORTS {
        let stage = Stage::new();
        let device = VirtioBlk::new(&BlkConfig::new("disk"), Arc::new(RamStore::new(SIZE)));
        let device = device.unwrap();
        let handle = device.handle();
        let mut driver = Driver::new(carry(&stage, Box::new(device)), stage.ram());
        for round in 1..4u64 {
            let offered = driver.access().device_features();
            driver.negotiate(offered);
            let before = driver.access().config_generation();
            handle.resize(SIZE as u64 + round * 512).unwrap();
            let mut capacity = [0; 8];
            driver.access().read_config(0, &mut capacity);
            assert_eq!(u64::from_le_bytes(capacity), SIZE as u64 / 512 + round);
            let after = driver.access().config_generation();
            assert_ne!(before, after, "{transport}");
            driver.add_queue(0, 16);
            let told = driver.access().take_interrupts();
            assert!(!told.config, "{transport}: not before DRIVER_OK");
            driver.driver_ok();
            driver.wait_interrupt(false, true);
            assert_eq!(driver.access().config_generation(), after);
        }
        // Nothing missed is nothing told.
        driver.start();
        assert!(!driver.access().take_interrupts().config);
    }
}

/// Sections 2.5.2 and 4.1.3.2: every field can be read before features are agreed upon, those that hang on
/// features too, and of a field of 64 bits each half by itself.
#[test]
fn the_configuration_can_be_read_before_features_are_agreed_upon_and_in_halves() {
    const LEN: usize = 60;
    for (transport, carry) in TRANSPORTS {
        let stage = Stage::new();
        let mut driver = Driver::new(carry(&stage, disk(RamStore::new(SIZE), 3)), stage.ram());
        let mut early = [0; LEN];
        driver.access().read_config(0, &mut early);
        driver.start();
        let mut late = [0; LEN];
        driver.access().read_config(0, &mut late);
        assert_eq!(early, late, "{transport}");
        let [low, high] = [0, 4].map(|at| {
            let mut half = [0xee; 4];
            driver.access().read_config(at, &mut half);
            u32::from_le_bytes(half)
        });
        assert_eq!((low, high), (SIZE as u32 / 512, 0), "{transport}");
        // Number of queues, sectors of a discard.
        assert_eq!(late[34..36], 3u16.to_le_bytes());
        assert_ne!(late[36..40], [0; 4]);
    }
}
