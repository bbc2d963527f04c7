//! The device as a driver meets it, without a transport.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use alveole_rate_limiter::{Bucket, Limits};
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Buffer, Driver, Stage, Subject, conformance};
use alveole_virtio_rng::{MAX_REQUEST_BYTES, VirtioRng};

struct Rngs;

impl Subject for Rngs {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(VirtioRng::new(Limits::default()).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        let mut seen = Vec::new();
        for _ in 0..4 {
            let used = driver.request(0, &[Buffer::In(32), Buffer::In(32)]);
            assert_eq!(used.len, 64);
            assert!(!seen.contains(&used.bytes), "the same bytes twice");
            assert_ne!(used.bytes[..32], used.bytes[32..]);
            seen.push(used.bytes);
        }
    }
}

#[test]
fn the_device_conforms() {
    conformance(&Rngs, &|stage, device| stage.direct(device));
}

fn driver(stage: &Stage, limits: Limits) -> Driver {
    let device = VirtioRng::new(limits).unwrap();
    let mut driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
    driver.start();
    driver
}

#[test]
fn a_request_gets_no_more_than_the_bound() {
    let stage = Stage::new();
    let mut driver = driver(&stage, Limits::default());
    let used = driver.request(0, &[Buffer::In(1 << 20), Buffer::In(1 << 20)]);
    assert_eq!(used.len as usize, MAX_REQUEST_BYTES);
    assert!(used.bytes[MAX_REQUEST_BYTES..].iter().all(|b| *b == 0));
    assert!(used.bytes[..MAX_REQUEST_BYTES].iter().any(|b| *b != 0));
}

#[test]
fn the_rate_is_bounded() {
    let stage = Stage::new();
    let limits = Limits {
        bandwidth: Some(Bucket {
            size: 1000,
            one_time_burst: 0,
            refill_time: Duration::from_millis(200),
        }),
        ops: None,
    };
    let mut driver = driver(&stage, limits);
    let start = Instant::now();
    for _ in 0..20 {
        assert_eq!(driver.request(0, &[Buffer::In(100)]).len, 100);
    }
    assert!(start.elapsed() >= Duration::from_millis(190));
}

#[test]
fn what_is_no_buffer_for_bytes_breaks_the_ring() {
    let stage = Stage::new();
    let mut driver = driver(&stage, Limits::default());
    let end = Stage::RAM_BYTES;
    let cases: [&[Buffer<'_>]; 4] = [
        &[Buffer::Out(b"to be read")],
        &[Buffer::Out(b"to be read"), Buffer::In(8)],
        &[Buffer::In(0)],
        &[Buffer::Raw(end - 4, 8, true)],
    ];
    for buffers in cases {
        driver.start();
        driver.submit(0, buffers);
        assert!(
            driver.wait_for_needs_reset(Duration::from_secs(5)),
            "{buffers:?}"
        );
    }
    driver.start();
    Rngs.exercise(&mut driver);
}

/// Section 5.4.6.2: at least one byte, also where the host has none at the moment.
#[test]
fn a_request_waits_for_a_host_without_entropy() {
    static FAILURES: AtomicU32 = AtomicU32::new(2);
    let stage = Stage::new();
    let device = VirtioRng::with_source(Limits::default(), |bytes| {
        let left = FAILURES.load(Ordering::Relaxed);
        if left > 0 {
            FAILURES.store(left - 1, Ordering::Relaxed);
            return Err(std::io::Error::other("none yet"));
        }
        bytes.fill(7);
        Ok(())
    });
    let device = device.unwrap();
    let counters = device.counters().clone();
    let mut driver = Driver::new(stage.direct(Box::new(device)), stage.ram());
    driver.start();
    let used = driver.request(0, &[Buffer::In(32)]);
    assert_eq!((used.len, used.bytes), (32, vec![7; 32]));
    assert_eq!((counters.errors.get(), counters.throttled.get()), (2, 0));
}
