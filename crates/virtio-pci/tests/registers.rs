//! The function: what every driver may ask, and what a hostile one tries.

use std::time::{Duration, Instant};

use alveole_io_bus::Outcome;
use alveole_virtio::testing::{Access, Buffer, Driver, Echo, Stage, Subject, conformance};
use alveole_virtio::{Identity, SavedState, TransportControl, VirtioDevice, features, status};
use alveole_virtio_pci::testing::{BAR_ADDR, ECAM_ADDR, PciAccess, carry};
use alveole_virtio_pci::{BAR_BYTES, NO_VECTOR, PciTransport, notify_offset};
use proptest::prelude::*;
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

fn echo(queues: usize) -> (Stage, PciAccess) {
    let stage = Stage::new();
    let access = PciAccess::new(&stage, Box::new(Echo::new(queues)));
    (stage, access)
}

/// A second view of the same function, to look at while a driver holds the first.
fn twin(access: &PciAccess, stage: &Stage) -> PciAccess {
    let mut twin = access.share(stage, Box::new(Echo::new(2)));
    twin.structures.clear();
    twin.probe();
    twin
}

/// A driver that is told of every request: with event indices, one that polls faster than the worker asks is
/// told of nothing.
fn told_of_all(access: PciAccess, stage: &Stage) -> Driver {
    let mut driver = Driver::new(Box::new(access), stage.ram());
    let offered = driver.access().device_features();
    driver.start_with(offered & !features::EVENT_IDX);
    driver
}

/// Waits until a worker's thread has sent something.
fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "nothing came");
        std::thread::yield_now();
    }
}

#[test]
fn the_transport_conforms() {
    conformance(&Echoes, &carry);
}

#[test]
fn the_function_says_what_it_is() {
    let (_stage, pci) = echo(1);
    assert_eq!(pci.config_u32(0x00), 0x107f_1af4);
    let [revision, interface, sub, base] = pci.config(8);
    assert_eq!((revision, interface, sub, base), (1, 0, 0, 0xff));
    assert_eq!(pci.config_u32(0x2c), 0x007f_1af4);
    // One function of type 0, no interrupt pin.
    assert_eq!(pci.config::<1>(0x0e), [0]);
    assert_eq!(pci.config::<1>(0x3d), [0]);
    assert_ne!(pci.config::<1>(0x06)[0] & 0x10, 0, "there are capabilities");
    assert_eq!(pci.bar, (BAR_ADDR, BAR_BYTES));
}

#[test]
fn capabilities_lead_to_every_structure() {
    let (_stage, pci) = echo(2);
    let types: Vec<u8> = pci.structures.iter().map(|s| s.cfg_type).collect();
    assert_eq!(types, [1, 3, 4, 2, 5]);
    for s in &pci.structures {
        let want = match s.cfg_type {
            2 | 5 => 20,
            _ => 16,
        };
        assert_eq!(s.cap_len, want, "with its extra data");
        assert_eq!(pci.config::<1>(s.at + 4), [0], "BAR 0");
        let end = s.addr + u64::from(s.length);
        assert!(end <= BAR_ADDR + BAR_BYTES, "{s:?}");
        assert!(s.cfg_type == 3 || s.addr % 4 == 0, "{s:?}");
    }
    let notify = pci.structure(2).unwrap();
    let multiplier = pci.config_u32(notify.at + 16);
    assert!(multiplier.is_power_of_two() && multiplier % 4 == 0);
    for queue in 0..2 {
        pci.set::<2>(0x16, queue);
        let offset = pci.get::<2>(0x1e) * multiplier;
        assert!(notify.length >= offset + 4);
        let addr = notify.addr + u64::from(offset);
        assert_eq!(addr, BAR_ADDR + notify_offset(queue as u16));
    }
    assert_eq!(pci.structure(4).unwrap().length, 8);
    assert_eq!(pci.structure(1).unwrap().length, 0x40);
    // Two queues and the configuration.
    assert_eq!(pci.config::<2>(pci.msix_at + 2)[0], 2);
}

#[test]
fn a_device_without_configuration_has_no_structure_for_it() {
    struct Bare(Echo);
    impl VirtioDevice for Bare {
        fn identity(&self) -> Identity {
            Identity {
                config_len: 0,
                ..self.0.identity()
            }
        }
        fn read_config(&self, at: u32, into: &mut [u8]) {
            self.0.read_config(at, into);
        }
        fn write_config(&mut self, at: u32, from: &[u8]) {
            self.0.write_config(at, from);
        }
        fn start(
            &mut self,
            kit: alveole_virtio::StartKit,
        ) -> Result<Vec<Box<dyn alveole_virtio::QueueWorker>>, alveole_virtio::StartError> {
            self.0.start(kit)
        }
        fn reset(&mut self) {
            self.0.reset();
        }
        fn save(&self) -> alveole_virtio::SavedState {
            self.0.save()
        }
        fn restore(
            &mut self,
            saved: &alveole_virtio::SavedState,
        ) -> Result<(), alveole_virtio::RestoreError> {
            self.0.restore(saved)
        }
    }
    let stage = Stage::new();
    let pci = PciAccess::new(&stage, Box::new(Bare(Echo::new(1))));
    assert_eq!(pci.structure(4), None);
}

#[test]
fn the_bar_can_be_sized_but_not_moved() {
    let (stage, pci) = echo(2);
    let was: [u32; 2] = [pci.config_u32(0x10), pci.config_u32(0x14)];
    for value in [0u32, 0xd000_0000, 0x8000, 0x7fff_ffff] {
        pci.set_config(0x10, &value.to_le_bytes());
        pci.set_config(0x14, &value.to_le_bytes());
        assert_eq!([pci.config_u32(0x10), pci.config_u32(0x14)], was);
    }
    // The other five registers do not exist.
    for register in [0x18, 0x1c, 0x20, 0x24, 0x30] {
        pci.set_config(register, &[0xff; 4]);
        assert_eq!(pci.config_u32(register), 0);
    }
    assert!(pci.function.lock().unwrap().moves_refused() > 0);
    let mut driver = Driver::new(Box::new(pci), stage.ram());
    driver.start();
    Echoes.exercise(&mut driver);
}

#[test]
fn nothing_answers_at_the_bar_while_memory_is_not_decoded() {
    let (_stage, pci) = echo(1);
    pci.set_config(4, &[0, 0]);
    let mut bytes = [0; 4];
    assert_eq!(pci.bus.read(BAR_ADDR, &mut bytes), Outcome::Refused);
    assert_eq!(bytes, [0xff; 4]);
    assert_eq!(pci.bus.write(BAR_ADDR + 0x14, &[1]), Outcome::Refused);
    pci.set_config(4, &[2, 0]);
    assert_eq!(pci.get::<1>(0x14), 0);
}

#[test]
fn features_are_shown_half_by_half() {
    let (_stage, mut pci) = echo(1);
    for select in 2..40 {
        pci.set::<4>(0x00, select);
        assert_eq!((pci.get::<4>(0x00), pci.get::<4>(0x04)), (select, 0));
    }
    let offered = pci.device_features();
    assert_eq!(offered & (1 << 37), 0, "no SR-IOV without its capability");
    pci.set_driver_features(offered);
    for select in 0..2 {
        pci.set::<4>(0x08, select);
        assert_eq!(pci.get::<4>(0x0c), (offered >> (32 * select)) as u32);
    }
    // Of features that are not offered.
    assert_eq!(
        [pci.get::<2>(0x38), pci.get::<2>(0x3c), pci.get::<2>(0x3e)],
        [0; 3]
    );
    assert_eq!(pci.get::<2>(0x12), 1);
}

#[test]
fn wide_fields_have_independent_halves() {
    let (_stage, pci) = echo(1);
    for offset in [0x20, 0x28, 0x30] {
        pci.set::<4>(offset + 4, 0x1234_5678);
        assert_eq!(
            (pci.get::<4>(offset), pci.get::<4>(offset + 4)),
            (0, 0x1234_5678)
        );
        pci.set::<4>(offset, 0x9abc_def0);
        assert_eq!(pci.get::<4>(offset), 0x9abc_def0);
        assert_eq!(pci.get::<4>(offset + 4), 0x1234_5678);
    }
}

/// More than section 4.1.3.1 asks: drivers exist that write an address in one piece.
#[test]
fn wide_fields_are_accessed_in_one_piece_too() {
    let (_stage, pci) = echo(1);
    let common = pci.structure(1).unwrap().addr;
    for (offset, value) in [
        (0x20, 0x1234_5678_9abc_def0u64),
        (0x28, u64::MAX),
        (0x30, 1),
    ] {
        pci.store(common + offset, &value.to_le_bytes());
        assert_eq!(u64::from_le_bytes(pci.load(common + offset)), value);
        let halves = [pci.get::<4>(offset), pci.get::<4>(offset + 4)];
        assert_eq!(halves, [value as u32, (value >> 32) as u32]);
    }
    // Nothing else is.
    let mut bytes = [0; 8];
    for offset in [0x00, 0x08, 0x14, 0x18, 0x24, 0x2c, 0x34, 0x38] {
        assert_eq!(pci.bus.read(common + offset, &mut bytes), Outcome::Refused);
        assert_eq!(pci.bus.write(common + offset, &bytes), Outcome::Refused);
    }
}

#[test]
fn a_reset_unmaps_and_disables_everything() {
    let (_stage, mut pci) = echo(2);
    pci.set_status(status::ACKNOWLEDGE);
    pci.set_up_queue(1, 16, [0x1000, 0x2000, 0x3000]);
    pci.enable_queue(1);
    assert_eq!((pci.get::<2>(0x10), pci.get::<2>(0x1a)), (0, 2));
    pci.set_status(0);
    pci.set::<2>(0x16, 1);
    assert_eq!(pci.get::<1>(0x14), 0);
    assert_eq!(pci.get::<2>(0x10), u32::from(NO_VECTOR));
    assert_eq!(pci.get::<2>(0x1a), u32::from(NO_VECTOR));
    assert_eq!((pci.get::<2>(0x1c), pci.get::<2>(0x3a)), (0, 0));
    assert_eq!(pci.get::<2>(0x18), 64);
}

#[test]
fn a_queue_reset_is_over_when_it_was_asked_for() {
    let (_stage, mut pci) = echo(1);
    pci.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    pci.enable_queue(0);
    pci.set::<2>(0x1c, 0);
    pci.set::<2>(0x3a, 2);
    assert_eq!(pci.get::<2>(0x1c), 1, "only a reset disables");
    pci.set::<2>(0x3a, 1);
    assert_eq!((pci.get::<2>(0x1c), pci.get::<2>(0x3a)), (0, 0));
    assert_eq!(pci.get::<2>(0x1a), u32::from(NO_VECTOR));
    pci.set_up_queue(0, 32, [0x1000, 0x2000, 0x3000]);
    pci.enable_queue(0);
    assert_eq!((pci.get::<2>(0x1c), pci.get::<2>(0x3a)), (1, 0));
}

#[test]
fn events_map_to_every_vector_of_the_table_and_to_none_beyond() {
    let (_stage, pci) = echo(2);
    for register in [0x10, 0x1a] {
        for vector in 0..3 {
            pci.set::<2>(register, vector);
            assert_eq!(pci.get::<2>(register), vector);
        }
        for vector in [3, 0x7ff, 0x800, 0xfffe, 0xffff] {
            pci.set::<2>(register, 1);
            pci.set::<2>(register, vector);
            assert_eq!(pci.get::<2>(register), u32::from(NO_VECTOR));
        }
    }
    // A queue that is not there.
    pci.set::<2>(0x16, 2);
    pci.set::<2>(0x1a, 1);
    assert_eq!(pci.get::<2>(0x1a), u32::from(NO_VECTOR));
    assert_eq!((pci.get::<2>(0x18), pci.get::<2>(0x1e)), (0, 0));
}

#[test]
fn each_queue_has_its_message_and_none_without_vector() {
    let (stage, pci) = echo(2);
    let look = twin(&pci, &stage);
    let mut driver = told_of_all(pci, &stage);
    driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    wait_for(|| look.take(1));
    driver.request(1, &[Buffer::Out(b"x"), Buffer::In(1)]);
    wait_for(|| look.take(2));
    assert!(!look.take(0) && !look.take(1));
    // Unmapped, the queue works on in silence.
    look.set::<2>(0x16, 0);
    look.set::<2>(0x1a, u32::from(NO_VECTOR));
    for _ in 0..10 {
        driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    }
    // A change by the host raises the configuration's message, unless that is unmapped.
    driver.access().write_config(4, &[0; 4]);
    wait_for(|| look.take(0));
    look.set::<2>(0x10, u32::from(NO_VECTOR));
    driver.access().write_config(4, &[0; 4]);
    assert!(!look.take(0) && !look.take(1));
}

#[test]
fn the_isr_status_says_what_messages_do_not_and_forgets_when_read() {
    let (stage, pci) = echo(2);
    let look = twin(&pci, &stage);
    let isr = look.structure(3).unwrap().addr;
    let mut driver = told_of_all(pci, &stage);
    driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    wait_for(|| look.take(1));
    assert_eq!(look.load::<1>(isr), [0], "messages say it");
    driver.access().write_config(4, &[0; 4]);
    assert_eq!(look.config::<1>(6)[0] & 8, 0);
    assert_eq!(look.load::<1>(isr), [2], "set for the configuration always");
    assert_eq!(look.load::<1>(isr), [0]);
    assert!(look.take(0));
    // Without messages: both bits, and Interrupt Status in the header.
    let [low, high] = look.config::<2>(look.msix_at + 2);
    look.set_config(look.msix_at + 2, &[low, high & !0x80]);
    driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    wait_for(|| look.config::<1>(6)[0] & 8 != 0);
    driver.access().write_config(4, &[0; 4]);
    assert_eq!(look.load::<1>(isr), [3]);
    assert_eq!(look.config::<1>(6)[0] & 8, 0);
    assert!(!look.take(0) && !look.take(1));
}

#[test]
fn a_masked_message_waits_and_is_sent_once() {
    let (stage, pci) = echo(2);
    let look = twin(&pci, &stage);
    let pending = look.bar.0 + u64::from(look.config_u32(look.msix_at + 8) & !7);
    let mut driver = told_of_all(pci, &stage);
    look.mask(1, true);
    for _ in 0..3 {
        driver.request(0, &[Buffer::Out(b"x"), Buffer::In(1)]);
    }
    wait_for(|| look.load::<8>(pending)[0] == 2);
    assert!(!look.take(1));
    let before = look.vectors[1].connected.lock().unwrap().len();
    look.mask(1, false);
    assert_eq!(look.vectors[1].line.take_edges(), 1);
    assert_eq!(look.load::<4>(pending), [0; 4]);
    let after = look.vectors[1].connected.lock().unwrap().len();
    assert_eq!(before, after, "the message is the same");
}

#[test]
fn an_odd_device_configuration_change_is_never_missed() {
    let (stage, pci) = echo(1);
    let mut driver = Driver::new(Box::new(pci), stage.ram());
    driver.start();
    let mut last = driver.access().config_generation();
    for changes in [1, 2, 255, 256, 257, 512] {
        for _ in 0..changes {
            driver.access().write_config(4, &[0; 4]);
        }
        let mut word = [0; 4];
        driver.access().read_config(4, &mut word);
        let now = driver.access().config_generation();
        assert_ne!(now, last, "after {changes} changes");
        last = now;
    }
    assert_eq!(driver.access().config_generation(), last);
}

#[test]
fn the_configuration_access_window_reaches_every_virtio_register() {
    let (stage, pci) = echo(2);
    let window = pci.structure(5).unwrap().at;
    // Also where memory is not decoded: that is what it is for.
    pci.set_config(4, &[0, 0]);
    let aim = |offset: u32, length: u32| {
        pci.set_config(window + 4, &[0]);
        pci.set_config(window + 8, &offset.to_le_bytes());
        pci.set_config(window + 12, &length.to_le_bytes());
    };
    aim(0x14, 1);
    pci.set_config(window + 16, &[status::ACKNOWLEDGE]);
    assert_eq!(pci.config::<1>(window + 16), [status::ACKNOWLEDGE]);
    aim(0x12, 2);
    assert_eq!(pci.config::<2>(window + 16), [2, 0]);
    aim(0x00, 4);
    pci.set_config(window + 16, &1u32.to_le_bytes());
    aim(0x04, 4);
    let high = (features::OF_EVERY_DEVICE >> 32) as u32;
    assert_eq!(pci.config_u32(window + 16), high);
    // The device's configuration, and a doorbell.
    aim(0x1000, 4);
    pci.set_config(window + 16, &0xfeed_u32.to_le_bytes());
    assert_eq!(pci.config_u32(window + 16), 0xfeed);
    aim(notify_offset(1) as u32, 2);
    pci.set_config(window + 16, &[1, 0]);
    // What it may not reach does nothing: other BARs, odd lengths, odd offsets, MSI-X, beyond the BAR.
    for (bar, offset, length) in [
        (1, 0x14, 1),
        (0xff, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x14, 8),
        (0, 0x15, 2),
        (0, 0x4000, 4),
        (0, 0x8000, 4),
        (0, u32::MAX, 1),
        (0, 0xffff_fffc, 4),
    ] {
        pci.set_config(window + 4, &[bar]);
        pci.set_config(window + 8, &u32::to_le_bytes(offset));
        pci.set_config(window + 12, &u32::to_le_bytes(length));
        pci.set_config(window + 16, &[0; 4]);
        let _ = pci.config_u32(window + 16);
    }
    pci.set_config(4, &[6, 0]);
    assert_eq!(pci.get::<1>(0x14), u32::from(status::ACKNOWLEDGE));
    let mut driver = Driver::new(Box::new(pci), stage.ram());
    driver.start();
    Echoes.exercise(&mut driver);
}

#[test]
fn capabilities_are_read_only_but_the_window() {
    let (_stage, pci) = echo(2);
    let caps = pci.capabilities();
    let window = pci.structure(5).unwrap().at;
    let mut before = Vec::new();
    for at in (0x40..0x100u16).step_by(4) {
        before.push(pci.config_u32(at));
    }
    for at in (0x40..0x100u16).step_by(4) {
        if at < window && at != pci.msix_at {
            pci.set_config(at, &[0xff; 4]);
        }
    }
    for (at, before) in (0x40..window).step_by(4).zip(before) {
        assert_eq!(pci.config_u32(at), before, "{at:#x}");
    }
    pci.set_config(window, &[0xff; 4]);
    assert_eq!(pci.capabilities(), caps);
}

#[test]
fn what_does_not_fit_in_the_bar_is_refused() {
    let stage = Stage::new();
    let vector = || {
        let line = alveole_interrupts::IrqLine::new().unwrap();
        alveole_interrupts::MsiVector::new(line, std::sync::Arc::new(|_| Ok(())))
    };
    for (bar, vectors) in [(0x1000, 2), (BAR_ADDR, 0), (BAR_ADDR, 513)] {
        let vectors = (0..vectors).map(|_| vector()).collect();
        let made = PciTransport::new(bar, vectors, |wires| {
            stage.core(Box::new(Echo::new(1)), wires)
        });
        assert!(made.is_err());
    }
}

/// What a file may say of a function, and cannot be.
#[test]
fn a_saved_state_that_cannot_be_is_refused() {
    let (stage, mut pci) = echo(2);
    pci.set_status(status::ACKNOWLEDGE);
    let saved = pci.function.lock().unwrap().save().unwrap();
    let state: Value = serde_json::from_slice(&saved.bytes).unwrap();
    let restore = |state: &Value| {
        let other = PciAccess::untouched(&stage, Box::new(Echo::new(2)));
        let saved = SavedState {
            bytes: serde_json::to_vec(state).unwrap(),
            ..saved.clone()
        };
        let mut function = other.function.lock().unwrap();
        function.restore(&saved)
    };
    restore(&state).unwrap();
    let bar_high = u64::from(BAR_ADDR.to_le_bytes()[4]);
    let longer = |list: &Value| {
        let mut list = list.clone();
        let first = list[0].clone();
        list.as_array_mut().unwrap().push(first);
        list
    };
    for (at, value, why) in [
        ("/space/bytes/0", json!(0), "another vendor"),
        ("/space/bytes/52", json!(0), "no capabilities"),
        ("/space/bytes/66", json!(9), "another number of messages"),
        ("/space/bytes/17", json!(0), "a BAR elsewhere"),
        ("/space/bytes/20", json!(bar_high + 1), "a BAR elsewhere"),
        (
            "/space/bytes",
            longer(&state["space"]["bytes"]),
            "257 bytes",
        ),
        ("/space/bytes", json!([]), "no bytes"),
        ("/space/bytes/4", json!(256), "no byte"),
        ("/msix/entries", json!([]), "no messages"),
        (
            "/msix/entries",
            longer(&state["msix"]["entries"]),
            "one more",
        ),
        (
            "/msix/entries/0/address",
            json!(0xfee0_0002u32),
            "odd address",
        ),
        ("/isr", json!(4), "an interrupt that is none"),
        ("/config_vector", json!(3), "a vector beyond the table"),
        (
            "/queue_vectors/1",
            json!(0xfffe),
            "a vector beyond the table",
        ),
        ("/queue_vectors", json!([0]), "a queue too few"),
        ("/queue_vectors", json!([0, 1, 2]), "a queue too many"),
        ("/shown_generation", json!(-1), "no byte"),
        ("/core/device/version", json!(9), "another version"),
        ("/core/queues/0", json!({"size": 4}), "half a queue"),
        ("/core", json!(null), "nothing"),
    ] {
        let mut spoilt = state.clone();
        *spoilt.pointer_mut(at).unwrap() = value;
        let e = restore(&spoilt).expect_err(&format!("{at}: {why}"));
        assert!(e.to_string().len() > 30, "{e}");
    }
    let mut more = state.clone();
    more["what_is_this"] = json!(1);
    restore(&more).unwrap_err();
    // Messages to where no interrupt controller is are the guest's to choose, here as there.
    let mut odd = state.clone();
    odd["msix"]["entries"][0]["address"] = json!(u64::MAX - 3);
    odd["msix"]["entries"][0]["pending"] = json!(true);
    restore(&odd).unwrap();
}

/// One access to the window or the BAR.
#[derive(Debug, Clone)]
struct Poke {
    bar: bool,
    offset: u64,
    width: usize,
    value: Option<u64>,
}

fn pokes() -> impl Strategy<Value = Vec<Poke>> {
    let places = prop_oneof![
        (Just(true), 0u64..0x48),
        (Just(true), 0x7fe..0x804u64),
        (Just(true), 0xffcu64..0x1014),
        (Just(true), 0x1ff8u64..0x2014),
        (Just(true), 0x3ff8u64..0x4040),
        (Just(true), 0x5ff0u64..0x6048),
        (Just(true), 0u64..0x8000),
        (Just(false), 0x1_8000u64..0x1_8100),
        (Just(false), 0u64..0x10_0000),
    ];
    let width = prop::sample::select(vec![1usize, 2, 4, 8]);
    let value = prop::option::of(prop_oneof![any::<u64>(), Just(u64::MAX), 0u64..8]);
    let poke = (places, width, value).prop_map(|((bar, offset), width, value)| Poke {
        bar,
        offset,
        width,
        value,
    });
    prop::collection::vec(poke, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_access_of_any_width_is_survived(pokes in pokes()) {
        let (stage, pci) = echo(2);
        for poke in pokes {
            let addr = if poke.bar { BAR_ADDR } else { ECAM_ADDR } + poke.offset;
            if let Some(value) = poke.value {
                let _ = pci.bus.write(addr, &value.to_le_bytes()[..poke.width]);
            } else {
                let mut bytes = vec![0; poke.width];
                let _ = pci.bus.read(addr, &mut bytes);
            }
        }
        // A kernel that comes afterwards finds a sound function, once whoever asked for the BAR's size has
        // ended that.
        for register in [0x10, 0x14] {
            pci.set_config(register, &[0; 4]);
        }
        let mut after = twin(&pci, &stage);
        prop_assert_eq!(after.bar, (BAR_ADDR, BAR_BYTES));
        after.set_status(0);
        after.enable_msix();
        let mut driver = told_of_all(after, &stage);
        Echoes.exercise(&mut driver);
        driver.wait_interrupt(true, false);
    }

    #[test]
    fn registers_answer_in_their_own_width_alone(offset in 0u64..0x40, width in 1usize..=8) {
        let (_stage, pci) = echo(1);
        let natural = match offset {
            0x14 | 0x15 => 1,
            0x10..0x20 | 0x38..0x40 => 2,
            _ => 4,
        };
        let mut bytes = vec![0; width];
        let whole = width == 8 && [0x20, 0x28, 0x30].contains(&offset);
        let fits = whole || width == natural && offset.is_multiple_of(natural as u64);
        prop_assert_eq!(pci.bus.read(BAR_ADDR + offset, &mut bytes) == Outcome::Done, fits);
        prop_assert_eq!(pci.bus.write(BAR_ADDR + offset, &bytes) == Outcome::Done, fits);
    }
}
