//! Device-normative clauses on rings that no other test is about; `conformance.md` lists all of them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::{Duration, Instant};

use alveole_virtio::testing::{Buffer, Driver, Echo, Indirect, Stage};
use alveole_virtio::{features, status};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn echo(stage: &Stage, without: u64) -> Driver {
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    let offered = driver.access().device_features();
    driver.start_with(offered & !without);
    driver
}

fn word(driver: &Driver, addr: u64) -> u16 {
    let mut bytes = [0; 2];
    driver.ram().read(addr, &mut bytes).unwrap();
    u16::from_le_bytes(bytes)
}

fn used_index(driver: &Driver) -> u16 {
    word(driver, driver.ring_addrs(0)[2] + 2)
}

/// Waits for so many used entries.
fn wait_used(driver: &Driver, count: u16) {
    let start = Instant::now();
    while used_index(driver) != count {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
}

/// Peace: what should not happen would have happened by then.
fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

#[test]
fn nothing_is_consumed_before_driver_ok_and_after_a_reset() {
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    let offered = driver.access().device_features();
    driver.negotiate(offered);
    driver.add_queue(0, 16);
    driver.submit(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    pause();
    assert_eq!(used_index(&driver), 0);
    assert!(!driver.access().take_interrupts().queue);
    driver.driver_ok();
    driver.wait(0);
    let used = driver.ring_addrs(0)[2] + 2;
    // The worker has looked for the last time.
    pause();
    driver.offer(0, &[Buffer::Out(b"y"), Buffer::In(1)], Indirect::No);
    driver.access().set_status(0);
    driver.access().notify(0);
    pause();
    assert_eq!(word(&driver, used), 1);
    assert!(!driver.access().take_interrupts().queue);
}

#[test]
fn a_reset_queue_is_quiet_and_starts_from_nothing() {
    let stage = Stage::new();
    // A driver that polls faster than the worker asks would be told of nothing with event indices.
    let mut driver = echo(&stage, features::EVENT_IDX);
    driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    driver.wait_interrupt(true, false);
    let used = driver.ring_addrs(0)[2] + 2;
    // The worker has looked for the last time.
    pause();
    driver.offer(0, &[Buffer::Out(b"y"), Buffer::In(1)], Indirect::No);
    driver.access().reset_queue(0);
    driver.access().notify(0);
    pause();
    assert_eq!(word(&driver, used), 1);
    assert!(!driver.access().take_interrupts().queue);
    // Fresh rings of another size, from index 0 on.
    driver.add_queue(0, 8);
    for _ in 0..20 {
        driver.request(0, &[Buffer::Out(b"z"), Buffer::In(1)]);
    }
    assert_eq!(used_index(&driver), 20);
}

#[test]
fn the_configuration_can_be_read_before_features_are_agreed_upon() {
    let stage = Stage::new();
    let mut access = stage.direct(Box::new(Echo::new(1)));
    let mut bytes = [0xee; 8];
    access.read_config(0, &mut bytes);
    assert_eq!(bytes, [0; 8]);
    access.set_status(status::ACKNOWLEDGE | status::DRIVER);
    bytes.fill(0xee);
    access.read_config(0, &mut bytes);
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn any_framing_gives_the_same_answer() {
    let stage = Stage::new();
    let mut driver = echo(&stage, 0);
    for indirect in [Indirect::No, Indirect::Yes] {
        for pieces in [1usize, 2, 3, 6] {
            let bytes = b"abcdef";
            let outs = bytes.chunks(6 / pieces).map(Buffer::Out);
            let ins = (0..pieces).map(|_| Buffer::In(6 / pieces as u32));
            let buffers: Vec<_> = outs.chain(ins).collect();
            driver.offer(0, &buffers, indirect);
            driver.access().notify(0);
            let used = driver.wait(0);
            assert_eq!((used.bytes.as_slice(), used.len), (&bytes[..], 6));
        }
    }
}

#[test]
fn readable_buffers_and_descriptors_stay_as_they_were() {
    let stage = Stage::new();
    let mut driver = echo(&stage, 0);
    let (out, back) = (driver.allocate(16), driver.allocate(16));
    driver.ram().write(out, b"0123456789abcdef").unwrap();
    let table = driver.ring_addrs(0)[0];
    driver.write_descriptor(0, 0, out, 16, NEXT, 1);
    driver.write_descriptor(0, 1, back, 16, WRITE, 0);
    let mut before = [0; 64];
    driver.ram().read(table, &mut before).unwrap();
    driver.make_available(0, 0);
    driver.access().notify(0);
    wait_used(&driver, 1);
    let (mut after, mut kept) = ([0; 64], [0; 16]);
    driver.ram().read(table, &mut after).unwrap();
    driver.ram().read(out, &mut kept).unwrap();
    assert_eq!((after, &kept), (before, b"0123456789abcdef"));
}

#[test]
fn a_table_may_follow_descriptors_and_its_write_flag_says_nothing() {
    let stage = Stage::new();
    for flag in [0, WRITE] {
        let mut driver = echo(&stage, 0);
        let (out, more, back, table) = (
            driver.allocate(4),
            driver.allocate(4),
            driver.allocate(8),
            driver.allocate(32),
        );
        driver.ram().write(out, b"abcd").unwrap();
        driver.ram().write(more, b"efgh").unwrap();
        driver.write_descriptor(0, 0, out, 4, NEXT, 5);
        driver.write_descriptor(0, 5, table, 32, INDIRECT | flag, 0);
        for (at, addr, len, flags) in [(table, more, 4u32, NEXT), (table + 16, back, 8, WRITE)] {
            driver.ram().write(at, &addr.to_le_bytes()).unwrap();
            driver.ram().write(at + 8, &len.to_le_bytes()).unwrap();
            driver.ram().write(at + 12, &flags.to_le_bytes()).unwrap();
            driver.ram().write(at + 14, &1u16.to_le_bytes()).unwrap();
        }
        driver.make_available(0, 0);
        driver.access().notify(0);
        wait_used(&driver, 1);
        let mut bytes = [0; 8];
        driver.ram().read(back, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abcdefgh", "flag {flag}");
    }
}

#[test]
fn what_is_used_was_written_before() {
    let stage = Stage::new();
    let mut driver = echo(&stage, 0);
    for len in [0u32, 1, 5, 300] {
        let bytes = vec![0x5a; len as usize];
        let used = driver.request(0, &[Buffer::Out(&bytes), Buffer::In(300)]);
        assert_eq!(used.len, len);
        assert!(used.bytes[..len as usize].iter().all(|b| *b == 0x5a));
    }
}

#[test]
fn with_event_indices_the_flag_is_ignored_and_the_index_counts() {
    let stage = Stage::new();
    let mut driver = echo(&stage, 0);
    let [_, avail, used] = driver.ring_addrs(0);
    let used_event = avail + 4 + 2 * 64;
    // NO_INTERRUPT says nothing; an interrupt is wanted for entry 2.
    driver.ram().write(avail, &1u16.to_le_bytes()).unwrap();
    driver.ram().write(used_event, &2u16.to_le_bytes()).unwrap();
    // Told for the third alone. The requests are not taken back: that would ask for the next one.
    for (count, told) in [(1, false), (2, false), (3, true), (4, false)] {
        driver.submit(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
        wait_used(&driver, count);
        pause();
        assert_eq!(driver.access().take_interrupts().queue, told, "{count}");
    }
    assert_eq!(word(&driver, used), 0, "flags of the used ring");
}

#[test]
fn without_event_indices_the_index_is_ignored() {
    let stage = Stage::new();
    let mut driver = echo(&stage, features::EVENT_IDX);
    let [_, avail, used] = driver.ring_addrs(0);
    driver
        .ram()
        .write(avail + 4 + 2 * 64, &0x4000u16.to_le_bytes())
        .unwrap();
    for _ in 0..3 {
        driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
        driver.wait_interrupt(true, false);
    }
    assert!(word(&driver, used) <= 1, "flags of the used ring");
}

#[test]
fn doorbells_without_requests_change_nothing() {
    let stage = Stage::new();
    let mut driver = echo(&stage, 0);
    for _ in 0..1000 {
        driver.access().notify(0);
    }
    pause();
    assert_eq!(used_index(&driver), 0);
    assert_eq!(driver.access().status() & status::NEEDS_RESET, 0);
    driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
}
