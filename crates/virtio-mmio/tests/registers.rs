//! The register block: what every driver may ask, and what a hostile one tries.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::{Duration, Instant};

use alveole_io_bus::{BusDevice, Outcome};
use alveole_virtio::testing::{Access, Buffer, Driver, Echo, Stage, Subject, conformance};
use alveole_virtio::{SavedState, TransportControl, VirtioDevice, features};
use alveole_virtio_mmio::testing::{MmioAccess, carry};
use serde_json::{Value, json};

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

/// Where the hand-made rings are: descriptors, available ring, used ring, data.
const RINGS: [u64; 3] = [0x1000, 0x2000, 0x3000];
const DATA: u64 = 0x4000;

/// A started device whose one queue has request `0`, one byte to be echoed, in its table.
fn by_hand(stage: &Stage) -> MmioAccess {
    let mut mmio = MmioAccess::new(stage, Box::new(Echo::new(1)));
    for (at, next, flags) in [(0, 1u16, 1u16), (1, 0, 2)] {
        let at = RINGS[0] + 16 * at;
        let ram = stage.ram();
        ram.write(at, &(DATA + u64::from(flags)).to_le_bytes())
            .unwrap();
        ram.write(at + 8, &1u32.to_le_bytes()).unwrap();
        ram.write(at + 12, &flags.to_le_bytes()).unwrap();
        ram.write(at + 14, &next.to_le_bytes()).unwrap();
    }
    mmio.set_driver_features(features::VERSION_1 | features::RING_RESET);
    for status in [1, 3, 11] {
        mmio.set_status(status);
    }
    mmio.set_up_queue(0, 16, RINGS);
    mmio.enable_queue(0);
    mmio.set_status(15);
    assert_eq!(mmio.status(), 15);
    mmio
}

/// Makes the request available for the `count`th time, and rings.
fn request(mmio: &mut MmioAccess, stage: &Stage, count: u16) {
    stage
        .ram()
        .write(RINGS[1] + 2, &count.to_le_bytes())
        .unwrap();
    mmio.notify(0);
}

fn used_index(stage: &Stage) -> u16 {
    stage.ram().read_plain(RINGS[2] + 2).unwrap()
}

fn wait_for(mut what: impl FnMut() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "nothing came");
        std::thread::yield_now();
    }
}

#[test]
fn an_event_is_shown_until_it_is_acknowledged() {
    let stage = Stage::new();
    let mut mmio = by_hand(&stage);
    assert_eq!(mmio.get(0x60), 0);
    request(&mut mmio, &stage, 1);
    wait_for(|| mmio.get(0x60) != 0);
    for _ in 0..3 {
        assert_eq!(mmio.get(0x60), 1, "reading does not acknowledge");
    }
    // A change of the configuration comes to it.
    mmio.write_config(4, &[0; 4]);
    assert_eq!(mmio.get(0x60), 3);
    mmio.set(0x64, 0);
    mmio.set(0x64, !3);
    assert_eq!(mmio.get(0x60), 3, "neither was acknowledged");
    mmio.set(0x64, 1);
    assert_eq!(mmio.get(0x60), 2);
    request(&mut mmio, &stage, 2);
    wait_for(|| mmio.get(0x60) != 2);
    assert_eq!(mmio.get(0x60), 3);
    mmio.set(0x64, 2);
    assert_eq!(mmio.get(0x60), 1);
    mmio.set(0x64, 1);
    assert_eq!(mmio.get(0x60), 0);
    assert!(mmio.line.take_edges() >= 3);
    // Nothing is left for whoever comes next.
    mmio.write_config(4, &[0; 4]);
    mmio.set_status(0);
    assert_eq!(mmio.get(0x60), 0);
}

#[test]
fn a_queue_that_is_not_ready_is_not_touched() {
    let stage = Stage::new();
    // By either register.
    for stop in [0x44, 0xc0] {
        stage.ram().write(RINGS[1], &[0; 64]).unwrap();
        stage.ram().write(RINGS[2], &[0; 64]).unwrap();
        let mut mmio = by_hand(&stage);
        request(&mut mmio, &stage, 1);
        wait_for(|| used_index(&stage) == 1);
        mmio.set(stop, u32::from(stop == 0xc0));
        assert_eq!((mmio.get(0x44), mmio.get(0xc0)), (0, 0));
        let mut before = [0; 256];
        stage.ram().read(RINGS[2], &mut before).unwrap();
        request(&mut mmio, &stage, 2);
        std::thread::sleep(Duration::from_millis(20));
        let mut after = [0; 256];
        stage.ram().read(RINGS[2], &mut after).unwrap();
        assert_eq!(after, before);
        // Ready again, from nothing, with another size.
        mmio.set_up_queue(0, 8, RINGS);
        mmio.enable_queue(0);
        wait_for(|| used_index(&stage) == 2);
    }
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

/// What a file may say of a register block, and cannot be.
#[test]
fn a_saved_state_that_cannot_be_is_refused() {
    let stage = Stage::new();
    let mut mmio = by_hand(&stage);
    mmio.registers.pause();
    let saved = mmio.registers.save().unwrap();
    let state: Value = serde_json::from_slice(&saved.bytes).unwrap();
    let restore = |state: &Value| {
        let mut other = MmioAccess::new(&stage, Box::new(Echo::new(1)));
        other.registers.restore(&SavedState {
            bytes: serde_json::to_vec(state).unwrap(),
            ..saved.clone()
        })
    };
    restore(&state).unwrap();
    for (at, value) in [
        ("/interrupt_status", json!(4)),
        ("/interrupt_status", json!(-1)),
        ("/core/status", json!(0x1f)),
        ("/core/status", json!(4)),
        ("/core/queues/0/size", json!(0)),
        ("/core/queues", json!([])),
        ("/core/driver_features", json!(0)),
        ("/core/device/kind", json!("disk")),
        ("/core/device/bytes", json!([1, 2])),
        ("/core", json!({})),
    ] {
        let mut spoilt = state.clone();
        *spoilt.pointer_mut(at).unwrap() = value;
        let e = restore(&spoilt).expect_err(at);
        assert!(e.to_string().len() > 30, "{e}");
    }
    let mut more = state.clone();
    more["what_is_this"] = json!(1);
    restore(&more).unwrap_err();
}
