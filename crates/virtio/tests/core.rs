//! The core with the simplest device, without a transport.

use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Buffer, Driver, Echo, Indirect, Stage, Subject, conformance};

struct Echoes(usize, bool);

impl Subject for Echoes {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let echo = Echo::new(self.0);
        Box::new(if self.1 { echo.with_one_worker() } else { echo })
    }

    fn exercise(&self, driver: &mut Driver) {
        for queue in 0..self.0 as u16 {
            for indirect in [Indirect::No, Indirect::Yes] {
                let buffers = [
                    Buffer::Out(b"hel"),
                    Buffer::Out(b"lo"),
                    Buffer::In(2),
                    Buffer::In(8),
                ];
                let head = driver.offer(queue, &buffers, indirect);
                driver.notify(queue);
                let used = driver.wait(queue);
                assert_eq!((used.head, used.len), (head, 5));
                assert_eq!(&used.bytes[..5], b"hello");
            }
        }
    }
}

#[test]
fn a_worker_for_each_queue_conforms() {
    conformance(&Echoes(3, false), &|stage, device| stage.direct(device));
}

#[test]
fn one_worker_for_all_queues_conforms() {
    conformance(&Echoes(3, true), &|stage, device| stage.direct(device));
}

#[test]
fn a_thousand_requests_in_batches_come_back_in_order_and_with_interrupts() {
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    driver.start();
    let batches: u32 = if cfg!(debug_assertions) { 20 } else { 60 };
    for batch in 0..batches {
        let numbers: Vec<u32> = (0..16).map(|i| batch * 16 + i).collect();
        for n in &numbers {
            driver.offer(
                0,
                &[Buffer::Out(&n.to_le_bytes()), Buffer::In(4)],
                Indirect::No,
            );
        }
        driver.notify(0);
        driver.wait_interrupt(true, false);
        for n in &numbers {
            assert_eq!(driver.wait(0).bytes, n.to_le_bytes());
        }
    }
}

#[test]
fn what_was_offered_before_driver_ok_and_during_a_pause_is_served_after() {
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    let offered = driver.access().device_features();
    driver.negotiate(offered);
    driver.add_queue(0, 16);
    driver.submit(0, &[Buffer::Out(b"early"), Buffer::In(5)]);
    assert_eq!(driver.poll(0), None);
    driver.driver_ok();
    assert_eq!(driver.wait(0).bytes, b"early");
    driver.access().with_core(&mut |core| core.pause());
    driver.submit(0, &[Buffer::Out(b"pause"), Buffer::In(5)]);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.poll(0), None);
    driver.access().with_core(&mut |core| core.resume());
    assert_eq!(driver.wait(0).bytes, b"pause");
}

#[test]
fn a_change_of_the_configuration_by_the_host_interrupts_and_has_a_new_generation() {
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    driver.start();
    let before = driver.access().config_generation();
    driver.access().write_config(4, &[0; 4]);
    driver.wait_interrupt(false, true);
    assert_ne!(driver.access().config_generation(), before);
    let mut word = [0; 4];
    driver.access().read_config(4, &mut word);
    assert_eq!(word, 1u32.to_le_bytes());
}

#[test]
fn a_guest_that_breaks_its_ring_for_ever_gets_a_few_log_lines() {
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    let mut trouble = 0;
    for _ in 0..30 {
        driver.start();
        driver.make_available(0, 0xffff);
        driver.notify(0);
        assert!(driver.wait_for_needs_reset(std::time::Duration::from_secs(5)));
        driver
            .access()
            .with_core(&mut |core| trouble = core.signals().trouble());
    }
    assert_eq!(
        trouble,
        30,
        "every one is counted; the first {} are logged",
        alveole_virtio::MAX_TROUBLE_LINES
    );
}

#[test]
fn without_interrupts_asked_for_there_are_none() {
    let stage = Stage::new();
    let mut driver = Driver::new(stage.direct(Box::new(Echo::new(1))), stage.ram());
    driver.start_with(0);
    // VIRTQ_AVAIL_F_NO_INTERRUPT.
    let flags = driver.ring_addrs(0)[1];
    driver.ram().write(flags, &1u16.to_le_bytes()).unwrap();
    driver.request(0, &[Buffer::Out(b"quiet"), Buffer::In(5)]);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert!(!driver.access().take_interrupts().queue);
    driver.ram().write(flags, &0u16.to_le_bytes()).unwrap();
    driver.request(0, &[Buffer::Out(b"loud"), Buffer::In(4)]);
    driver.wait_interrupt(true, false);
}
