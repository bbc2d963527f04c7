//! The device as a driver meets it, over a store in memory, without a transport.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use alveole_block_store::RamStore;
use alveole_counters::CounterSet;
use alveole_rate_limiter::{Bucket, Limits};
use alveole_virtio::testing::{Buffer, Driver, Indirect, Stage, Subject, conformance};
use alveole_virtio::{VirtioDevice, features};
use alveole_virtio_blk::{BlkConfig, BlkError, BlkHandle, VirtioBlk};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const SIZE: usize = 1 << 20;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

struct Disk {
    stage: Stage,
    store: RamStore,
    handle: BlkHandle,
    driver: Driver,
}

fn disk_of(store: RamStore, config: &BlkConfig) -> Disk {
    let stage = Stage::new();
    let device = VirtioBlk::new(config, Arc::new(store.clone())).unwrap();
    let handle = device.handle();
    let driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
    let mut disk = Disk {
        stage,
        store,
        handle,
        driver,
    };
    disk.driver.start();
    disk
}

fn disk() -> Disk {
    let bytes = (0..SIZE).map(|i| (i / 512) as u8).collect();
    disk_of(RamStore::from_bytes(bytes), &BlkConfig::new("disk"))
}

impl Disk {
    /// One request; the status and what was read.
    fn ask(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, Vec<u8>) {
        ask(&mut self.driver, 0, kind, sector, out, room)
    }

    fn count(&self, name: &str) -> u64 {
        let mut found = None;
        self.handle.counters().visit(&mut |n, v| {
            if n == name {
                found = Some(v);
            }
        });
        found.unwrap()
    }
}

fn ask(
    driver: &mut Driver,
    queue: u16,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> (u8, Vec<u8>) {
    let header = header(kind, sector);
    let mut buffers = vec![Buffer::Out(&header)];
    if !out.is_empty() {
        buffers.push(Buffer::Out(out));
    }
    if room > 0 {
        buffers.push(Buffer::In(room));
    }
    buffers.push(Buffer::In(1));
    let used = driver.request(queue, &buffers);
    let mut bytes = used.bytes;
    let status = bytes.pop().unwrap();
    if status == OK {
        assert_eq!(used.len as usize, bytes.len() + 1);
    }
    (status, bytes)
}

struct Disks(u16);

impl Subject for Disks {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let config = BlkConfig {
            queues: self.0,
            ..BlkConfig::new("disk")
        };
        Box::new(VirtioBlk::new(&config, Arc::new(RamStore::new(SIZE))).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        for queue in 0..self.0 {
            let bytes = [queue as u8 + 1; 1024];
            assert_eq!(ask(driver, queue, OUT, 7, &bytes, 0).0, OK);
            assert_eq!(ask(driver, queue, FLUSH, 0, &[], 0).0, OK);
            assert_eq!(ask(driver, queue, IN, 7, &[], 1024), (OK, bytes.to_vec()));
        }
    }
}

#[test]
fn one_queue_conforms() {
    conformance(&Disks(1), &|stage, device| stage.direct(device));
}

#[test]
fn four_queues_conform() {
    conformance(&Disks(4), &|stage, device| stage.direct(device));
}

#[test]
fn reads_and_writes_reach_the_store() {
    let mut disk = disk();
    assert_eq!(
        disk.ask(IN, 3, &[], 1024),
        (OK, [[3; 512], [4; 512]].concat())
    );
    assert_eq!(disk.ask(OUT, 5, &[0xaa; 512], 0).0, OK);
    assert_eq!(disk.store.to_bytes()[5 * 512..6 * 512], [0xaa; 512]);
    assert_eq!(disk.ask(FLUSH, 0, &[], 0).0, OK);
    let counted =
        ["reads", "writes", "flushes", "bytes_read", "bytes_written"].map(|n| disk.count(n));
    assert_eq!(counted, [1, 1, 1, 1024, 512]);
    let mut seen = Vec::new();
    let handle = &disk.handle;
    handle.counters().visit_histograms(&mut |name, observed| {
        assert!(observed.sum_ns > 0, "{name}");
        seen.push((name.to_owned(), observed.count));
    });
    let one_each = ["read", "write", "flush"].map(|name| (name.to_owned(), 1));
    assert_eq!(seen, one_each);
}

#[test]
fn the_identity_is_cut_off_or_filled_up() {
    let config = BlkConfig {
        id: Some("a-name-that-is-longer-than-twenty".into()),
        ..BlkConfig::new("disk")
    };
    let mut disk = disk_of(RamStore::new(SIZE), &config);
    assert_eq!(
        disk.ask(GET_ID, 0, &[], 20),
        (OK, b"a-name-that-is-longe".to_vec())
    );
    assert_eq!(disk.ask(GET_ID, 0, &[], 3), (OK, b"a-n".to_vec()));
    let (status, bytes) = disk.ask(GET_ID, 0, &[], 32);
    assert_eq!((status, &bytes[..20]), (OK, &b"a-name-that-is-longe"[..]));
}

#[test]
fn the_configuration_space_says_what_the_store_is() {
    let config = BlkConfig {
        queues: 3,
        ..BlkConfig::new("disk")
    };
    let mut disk = disk_of(RamStore::new(SIZE), &config);
    let mut space = [0; 60];
    disk.driver.access().read_config(0, &mut space);
    let word = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(
        u64::from_le_bytes(space[..8].try_into().unwrap()),
        SIZE as u64 / 512
    );
    assert_eq!(word(12), 254, "seg_max");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(space[32], 1, "writeback");
    assert_eq!(u16::from_le_bytes([space[34], space[35]]), 3, "num_queues");
    assert!(word(36) > 0 && word(40) > 0 && word(48) > 0 && word(52) > 0);
    // Only the write-back byte takes a write; a reset undoes it.
    disk.driver.access().write_config(0, &[0xff; 60]);
    let mut again = [0; 60];
    disk.driver.access().read_config(0, &mut again);
    assert_eq!(again, space);
    disk.driver.access().write_config(32, &[0]);
    disk.driver.access().read_config(32, &mut again[..1]);
    assert_eq!(again[0], 0);
    disk.driver.start();
    disk.driver.access().read_config(32, &mut again[..1]);
    assert_eq!(again[0], 1);
}

#[test]
fn a_request_may_be_cut_into_descriptors_in_any_way() {
    let mut disk = disk();
    let header = header(OUT, 9);
    let data: Vec<u8> = (0..1024).map(|i| i as u8).collect();
    let joined = [&header[..], &data[..]].concat();
    for cuts in [
        vec![1, 2, 3],
        vec![16],
        vec![15, 17],
        vec![500],
        vec![16, 16, 700],
        (1..60).collect(),
    ] {
        for indirect in [Indirect::No, Indirect::Yes] {
            disk.driver.start();
            let mut buffers = Vec::new();
            let mut at = 0;
            for cut in cuts.iter().copied().chain([joined.len()]) {
                buffers.push(Buffer::Out(&joined[at..cut.max(at)]));
                at = cut.max(at);
            }
            buffers.push(Buffer::In(1));
            disk.driver.offer(0, &buffers, indirect);
            disk.driver.notify(0);
            assert_eq!(disk.driver.wait(0).bytes, [OK]);
            assert_eq!(disk.store.to_bytes()[9 * 512..11 * 512], data);
        }
    }
    // Reading into pieces, with the status in the last of them.
    let header = self::header(IN, 9);
    let buffers = [
        Buffer::Out(&header),
        Buffer::In(1),
        Buffer::In(510),
        Buffer::In(0),
        Buffer::In(514),
    ];
    let used = disk.driver.request(0, &buffers);
    assert_eq!(
        (used.len, &used.bytes[..1024], used.bytes[1024]),
        (1025, &data[..], OK)
    );
}

#[test]
fn what_is_not_on_the_disk_is_an_io_error() {
    let mut disk = disk();
    let end = SIZE as u64 / 512;
    for (sector, room) in [
        (end, 512),
        (end - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
    ] {
        assert_eq!(
            disk.ask(IN, sector, &[], room).0,
            IO_ERROR,
            "read {sector} {room}"
        );
        let bytes = vec![0; room as usize];
        assert_eq!(
            disk.ask(OUT, sector, &bytes, 0).0,
            IO_ERROR,
            "write {sector} {room}"
        );
    }
    assert_eq!(disk.count("errors"), 14);
    assert_eq!(disk.ask(IN, end - 1, &[], 512).0, OK);
}

#[test]
fn data_outside_memory_is_an_io_error_and_the_disk_lives() {
    let mut disk = disk();
    for (addr, len) in [
        (Stage::RAM_BYTES, 512),
        (Stage::RAM_BYTES - 256, 512),
        (u64::MAX - 255, 512),
        (0xfee0_0000, 512),
    ] {
        let header = header(IN, 0);
        let buffers = [
            Buffer::Out(&header),
            Buffer::Raw(addr, len, true),
            Buffer::In(1),
        ];
        assert_eq!(disk.driver.request(0, &buffers).bytes, [IO_ERROR]);
    }
    assert_eq!(disk.ask(IN, 0, &[], 512).0, OK);
}

#[test]
fn what_cannot_be_answered_breaks_the_ring() {
    let long = header(IN, 0);
    let cases: [&[Buffer<'_>]; 5] = [
        // No room for a status.
        &[Buffer::Out(&long)],
        &[Buffer::Out(&long), Buffer::In(0)],
        // A status outside memory.
        &[Buffer::Out(&long), Buffer::Raw(Stage::RAM_BYTES, 1, true)],
        // No header, or a part of one.
        &[Buffer::In(513)],
        &[Buffer::Out(&long[..15]), Buffer::In(513)],
    ];
    let mut disk = disk();
    for (i, buffers) in cases.iter().enumerate() {
        disk.driver.start();
        disk.driver.submit(0, buffers);
        assert!(
            disk.driver.wait_for_needs_reset(Duration::from_secs(5)),
            "case {i}"
        );
        disk.driver.start();
        assert_eq!(disk.ask(IN, 0, &[], 512).0, OK);
    }
}

#[test]
fn unknown_requests_are_not_supported() {
    let mut disk = disk();
    // Among them life time (10), secure erase (14), and those of zones (15, 16, 18 and so on to 26).
    let known = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES];
    let low = (0..40).filter(|kind| !known.contains(kind));
    let unknown: Vec<u32> = low.chain([0x8000_0000, u32::MAX]).collect();
    for kind in unknown.iter().copied() {
        assert_eq!(disk.ask(kind, 0, &[], 512).0, UNSUPPORTED, "{kind}");
        assert_eq!(disk.ask(kind, 0, &[1; 512], 0).0, UNSUPPORTED, "{kind}");
    }
    assert_eq!(disk.count("unsupported"), 2 * unknown.len() as u64);
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    let mut disk = disk();
    let two = [range(2, 3, 1), range(10, 1, 0)].concat();
    assert_eq!(disk.ask(WRITE_ZEROES, 0, &two, 0).0, OK);
    let bytes = disk.store.to_bytes();
    assert!(bytes[2 * 512..5 * 512].iter().all(|b| *b == 0));
    assert_eq!(
        (
            bytes[5 * 512],
            bytes[9 * 512],
            bytes[10 * 512],
            bytes[11 * 512]
        ),
        (5, 9, 0, 11)
    );
    assert_eq!(disk.ask(DISCARD, 0, &range(20, 2, 0), 0).0, OK);
    assert_eq!(disk.ask(DISCARD, 0, &range(20, 0, 0), 0).0, OK);
    let end = SIZE as u64 / 512;
    for (bad, status) in [
        (range(0, 1, 2), UNSUPPORTED),
        (range(0, 1, u32::MAX), UNSUPPORTED),
        (range(end, 1, 0), IO_ERROR),
        (range(end - 1, 2, 0), IO_ERROR),
        (range(u64::MAX, 1, 0), IO_ERROR),
        (range(0, u32::MAX, 0), IO_ERROR),
        (vec![0; 15], IO_ERROR),
        (vec![0; 17], IO_ERROR),
        (range(0, 1, 0).repeat(33), IO_ERROR),
    ] {
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(disk.ask(kind, 0, &bad, 0).0, status, "{bad:?}");
        }
    }
    assert_eq!(
        disk.ask(DISCARD, 0, &range(0, 1, 1), 0).0,
        UNSUPPORTED,
        "unmap means nothing here"
    );
    assert_eq!(disk.ask(DISCARD, 0, &[], 0).0, IO_ERROR);
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_write() {
    let store = RamStore::from_bytes(vec![7; SIZE]).read_only();
    let mut disk = disk_of(store, &BlkConfig::new("disk"));
    let offered = disk.driver.access().device_features();
    assert_ne!(offered & 1 << 5, 0, "RO");
    assert_eq!(
        offered & (1 << 9 | 1 << 11 | 1 << 13 | 1 << 14),
        0,
        "nothing that writes"
    );
    assert_eq!(disk.ask(OUT, 0, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(disk.ask(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, IO_ERROR);
    assert_eq!(disk.ask(DISCARD, 0, &range(0, 1, 0), 0).0, IO_ERROR);
    assert_eq!(disk.ask(IN, 0, &[], 512), (OK, vec![7; 512]));
    assert_eq!(disk.ask(FLUSH, 0, &[], 0).0, OK);
}

#[test]
fn an_unsafe_cache_offers_no_flush() {
    let config = BlkConfig {
        cache: alveole_block_store::Cache::Unsafe,
        ..BlkConfig::new("disk")
    };
    let mut disk = disk_of(RamStore::new(SIZE), &config);
    assert_eq!(
        disk.driver.access().device_features() & (1 << 9 | 1 << 11),
        0
    );
    assert_eq!(disk.ask(OUT, 0, &[1; 512], 0).0, OK);
}

#[test]
fn a_full_queue_of_requests_is_served() {
    let mut disk = disk();
    for _ in 0..5 {
        disk.driver.start();
        let header = header(IN, 1);
        for _ in 0..256 {
            let buffers = [Buffer::Out(&header), Buffer::In(512), Buffer::In(1)];
            disk.driver.offer(0, &buffers, Indirect::Yes);
        }
        disk.driver.notify(0);
        for _ in 0..256 {
            let used = disk.driver.wait(0);
            assert_eq!((used.bytes[0], used.bytes[512]), (1, OK));
        }
    }
}

fn ops(size: u64, ms: u64) -> Limits {
    Limits {
        ops: Some(Bucket {
            size,
            one_time_burst: 0,
            refill_time: Duration::from_millis(ms),
        }),
        bandwidth: None,
    }
}

#[test]
fn the_limiter_holds_requests_back_in_the_ring() {
    let config = BlkConfig {
        limits: ops(10, 200),
        ..BlkConfig::new("disk")
    };
    let mut disk = disk_of(RamStore::new(SIZE), &config);
    let start = Instant::now();
    for _ in 0..20 {
        assert_eq!(disk.ask(IN, 0, &[], 512).0, OK);
    }
    // Ten at once, ten at the rate; a name costs nothing.
    assert!(
        start.elapsed() >= Duration::from_millis(190),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(disk.ask(GET_ID, 0, &[], 20).0, OK);
    assert!(disk.count("throttled") > 0);
}

#[test]
fn a_live_change_of_limits_frees_what_waits() {
    let config = BlkConfig {
        limits: ops(1, 3_600_000),
        ..BlkConfig::new("disk")
    };
    let mut disk = disk_of(RamStore::new(SIZE), &config);
    assert_eq!(disk.ask(IN, 0, &[], 512).0, OK);
    let header = header(IN, 0);
    disk.driver
        .submit(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(disk.driver.poll(0), None, "an hour has not passed");
    disk.handle.change_limits(ops(0, 0));
    assert_eq!(disk.driver.wait(0).bytes[512], OK);
}

#[test]
fn a_reset_with_throttled_requests_forgets_them() {
    let config = BlkConfig {
        limits: ops(1, 3_600_000),
        ..BlkConfig::new("disk")
    };
    let mut disk = disk_of(RamStore::new(SIZE), &config);
    assert_eq!(disk.ask(IN, 0, &[], 512).0, OK);
    for _ in 0..10 {
        let header = header(IN, 0);
        disk.driver
            .submit(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
        disk.driver.start();
    }
    disk.handle.change_limits(ops(0, 0));
    assert_eq!(disk.ask(IN, 0, &[], 512).0, OK);
}

#[test]
fn a_resize_reaches_the_guest() {
    let mut disk = disk();
    let generation = disk.driver.access().config_generation();
    let end = SIZE as u64 / 512;
    assert_eq!(disk.ask(IN, end, &[], 512).0, IO_ERROR);
    disk.handle.resize(SIZE as u64 * 2).unwrap();
    disk.driver.wait_interrupt(false, true);
    assert_ne!(disk.driver.access().config_generation(), generation);
    let mut capacity = [0; 8];
    disk.driver.access().read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), end * 2);
    assert_eq!(disk.ask(IN, end, &[], 512).0, OK);
    // Nothing new is nothing to tell.
    let generation = disk.driver.access().config_generation();
    disk.handle.refresh().unwrap();
    assert_eq!(disk.driver.access().config_generation(), generation);
}

#[test]
fn a_medium_is_changed_under_load() {
    let store = RamStore::from_bytes(vec![1; SIZE]).read_only();
    let config = BlkConfig {
        queues: 2,
        ..BlkConfig::new("cd")
    };
    let mut disk = disk_of(store, &config);
    for round in 2..12u8 {
        let size = SIZE + usize::from(round) * 512;
        let medium = RamStore::from_bytes(vec![round; size]).read_only();
        let header = header(IN, 0);
        for queue in 0..2 {
            disk.driver.submit(
                queue,
                &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)],
            );
        }
        disk.handle.change_medium(Arc::new(medium)).unwrap();
        for queue in 0..2 {
            // Old or new, but one of them.
            let byte = disk.driver.wait(queue).bytes[0];
            assert!(
                byte == round || byte == round - 1,
                "{byte} in round {round}"
            );
        }
        disk.driver.wait_interrupt(false, true);
        for queue in 0..2 {
            let last = size as u64 / 512 - 1;
            let deadline = Instant::now() + Duration::from_secs(5);
            // Each queue changes over when it is next awake.
            while ask(&mut disk.driver, queue, IN, last, &[], 512) != (OK, vec![round; 512]) {
                assert!(Instant::now() < deadline);
            }
        }
    }
    let writable = RamStore::new(SIZE);
    let e = disk.handle.change_medium(Arc::new(writable)).unwrap_err();
    assert!(matches!(e, BlkError::OtherMedium { .. }), "{e}");
    // A stopped disk takes the new medium at its next start.
    disk.driver.reset();
    let medium = RamStore::from_bytes(vec![99; SIZE]).read_only();
    disk.handle.change_medium(Arc::new(medium)).unwrap();
    disk.driver.start();
    assert_eq!(disk.ask(IN, 0, &[], 512), (OK, vec![99; 512]));
    drop(disk.stage);
}

#[test]
fn impossible_queues_are_refused_by_name() {
    for (queues, queue_size) in [(0, 256), (1, 0), (1, 3), (1, 2048)] {
        let config = BlkConfig {
            queues,
            queue_size,
            ..BlkConfig::new("vda")
        };
        let e = VirtioBlk::new(&config, Arc::new(RamStore::new(512)))
            .err()
            .unwrap();
        assert!(
            e.to_string().contains("vda") && e.to_string().contains(&queue_size.to_string()),
            "{e}"
        );
    }
}

#[test]
fn a_saved_disk_is_not_restored_to_a_smaller_one() {
    let save =
        |bytes| VirtioBlk::new(&BlkConfig::new("disk"), Arc::new(RamStore::new(bytes))).unwrap();
    let saved = save(SIZE).save();
    save(SIZE).restore(&saved).unwrap();
    let e = save(SIZE / 2).restore(&saved).unwrap_err();
    assert!(e.to_string().contains("1048576"), "{e}");
    let mut newer = saved.clone();
    newer.version = 2;
    save(SIZE).restore(&newer).unwrap_err();
    let mut odd = saved;
    odd.bytes = b"{}".to_vec();
    save(SIZE).restore(&odd).unwrap_err();
}

#[test]
fn all_ring_features_are_offered() {
    let mut disk = disk();
    let offered = disk.driver.access().device_features();
    assert_eq!(
        offered & features::OF_EVERY_DEVICE,
        features::OF_EVERY_DEVICE
    );
    for bit in [1, 2, 6, 9, 10, 11, 14] {
        assert_ne!(offered & 1 << bit, 0, "feature bit {bit}");
    }
}

/// Section 5.2.5.2.
#[test]
fn who_takes_the_cache_mode_without_flush_is_shown_write_through() {
    let mut disk = disk();
    let offered = disk.driver.access().device_features();
    let mut byte = [9];
    for (without, writeback) in [(1 << 9, 0), (0, 1), (1 << 9 | 1 << 11, 1)] {
        disk.driver.start_with(offered & !without);
        disk.driver.access().read_config(32, &mut byte);
        assert_eq!(byte, [writeback], "without {without:#x}");
        assert_eq!(disk.ask(OUT, 0, &[1; 512], 0).0, OK);
    }
}
