//! What every device must do on every transport.

use std::time::Duration;

use super::{Access, Driver, Stage};
use crate::{RestoreError, SavedState, TransportStateV1, VirtioDevice, features, status};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// How long a device may take to notice a broken ring.
const NOTICE: Duration = Duration::from_secs(5);
/// How long to watch that a device goes on in peace.
const PEACE: Duration = Duration::from_millis(20);

/// How many saved states with one byte changed are tried.
const HOSTILE_STATES: u32 = 400;

/// A device under test.
pub trait Subject {
    /// A new device. What it stands on (a store) may be shared by all of them.
    fn device(&self) -> Box<dyn VirtioDevice>;

    /// Uses every queue of a started device and asserts that it does its work.
    fn exercise(&self, driver: &mut Driver);

    /// A queue on which any broken chain ends in NEEDS_RESET.
    fn victim_queue(&self) -> u16 {
        0
    }
}

/// How a transport carries a device.
pub type Carry<'a> = &'a dyn Fn(&Stage, Box<dyn VirtioDevice>) -> Box<dyn Access>;

/// Runs the whole suite.
///
/// # Panics
/// The device or the transport breaks a rule; the message names it.
pub fn conformance(subject: &dyn Subject, carry: Carry<'_>) {
    let run = |name: &str, test: &dyn Fn(&Case<'_>)| {
        println!("conformance: {name}");
        test(&Case { subject, carry });
    };
    run("works", &works);
    run("status walk", &status_walk);
    run("feature refusal", &feature_refusal);
    run("features are optional", &features_are_optional);
    run("reset in every status", &reset_in_every_status);
    run("queue set-up", &queue_set_up);
    run("bad queue addresses", &bad_queue_addresses);
    run("queue reset", &queue_reset);
    run("broken rings", &broken_rings);
    run("pause and resume", &pause_and_resume);
    run("save and restore", &save_and_restore);
    run("hostile states", &hostile_states);
    run("configuration space", &configuration_space);
    run("reset storm", &reset_storm);
}

struct Case<'a> {
    subject: &'a dyn Subject,
    carry: Carry<'a>,
}

impl Case<'_> {
    /// Runs `test` with a driver that has not touched the device yet.
    fn with_driver(&self, test: impl FnOnce(&mut Driver)) {
        let stage = Stage::new();
        let access = (self.carry)(&stage, self.subject.device());
        let mut driver = Driver::new(access, stage.ram());
        test(&mut driver);
    }
}

fn works(case: &Case<'_>) {
    case.with_driver(|driver| {
        driver.start();
        case.subject.exercise(driver);
        driver.start();
        case.subject.exercise(driver);
    });
}

/// Section 3.1.1 and the device's side of 2.1.2.
fn status_walk(case: &Case<'_>) {
    case.with_driver(|driver| {
        let offered = driver.access().device_features();
        let access = driver.access();
        assert_eq!(access.status(), 0, "the status after a reset");
        // DRIVER_OK before FEATURES_OK is not taken.
        access.set_status(status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK);
        assert_eq!(access.status(), status::ACKNOWLEDGE | status::DRIVER);
        access.set_driver_features(offered);
        access.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        let walked = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        assert_eq!(access.status(), walked);
        // Bits that are left out stay.
        access.set_status(status::ACKNOWLEDGE);
        assert_eq!(access.status(), walked);
        // Features are fixed now.
        access.set_driver_features(0);
        access.set_status(walked | status::FAILED);
        assert_eq!(access.status(), walked | status::FAILED);
        // NEEDS_RESET is the device's to set.
        access.set_status(walked | status::FAILED | status::NEEDS_RESET);
        assert_eq!(access.status(), walked | status::FAILED);
        access.set_status(0);
        assert_eq!(access.status(), 0);
    });
}

/// Sections 2.2.2 and 6.1: what was not offered is not agreed to, nor are older versions.
fn feature_refusal(case: &Case<'_>) {
    case.with_driver(|driver| {
        let offered = driver.access().device_features();
        assert_ne!(offered & features::VERSION_1, 0, "VERSION_1 is offered");
        let foreign = (0..64)
            .map(|bit| 1u64 << bit)
            .find(|bit| offered & bit == 0)
            .unwrap();
        for wanted in [
            offered | foreign,
            offered & !features::VERSION_1,
            0,
            u64::MAX,
        ] {
            let access = driver.access();
            access.set_status(0);
            access.set_status(status::ACKNOWLEDGE | status::DRIVER);
            access.set_driver_features(wanted);
            access.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
            assert_eq!(
                access.status() & status::FEATURES_OK,
                0,
                "features {wanted:#x}"
            );
            access.set_status(status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK);
            assert_eq!(
                access.status() & status::DRIVER_OK,
                0,
                "features {wanted:#x}"
            );
        }
        driver.start();
        case.subject.exercise(driver);
    });
}

/// Section 2.2.2: any valid subset is accepted, and the device works by it.
fn features_are_optional(case: &Case<'_>) {
    case.with_driver(|driver| {
        let offered = driver.access().device_features();
        assert_eq!(
            offered & features::OF_EVERY_DEVICE,
            features::OF_EVERY_DEVICE
        );
        driver.start_with(offered & !features::OF_EVERY_DEVICE);
        case.subject.exercise(driver);
        // Each of them alone, and all but that one.
        for bit in (0..64)
            .map(|bit| offered & 1 << bit)
            .filter(|bit| *bit != 0)
        {
            for subset in [bit, offered & !bit] {
                driver.start_with(subset);
                case.subject.exercise(driver);
            }
        }
    });
}

/// Sections 2.1.2 and 2.4.1: zero in the status resets whatever came before.
fn reset_in_every_status(case: &Case<'_>) {
    case.with_driver(|driver| {
        let offered = driver.access().device_features();
        let walk = [
            0,
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
            status::FAILED,
        ];
        for steps in 0..=walk.len() {
            let mut value = 0;
            for step in walk.iter().take(steps) {
                value |= step;
                if *step == status::FEATURES_OK {
                    driver.access().set_driver_features(offered);
                }
                driver.access().set_status(value);
            }
            driver.reset();
            assert_eq!(
                driver.access().take_interrupts(),
                super::Interrupts::default()
            );
            assert!(!driver.access().queue_is_enabled(0));
        }
        driver.start();
        case.subject.exercise(driver);
    });
}

fn queue_set_up(case: &Case<'_>) {
    case.with_driver(|driver| {
        let offered = driver.access().device_features();
        driver.negotiate(offered);
        let max = driver.access().queue_max_size(0);
        assert!(
            max.is_power_of_two() && max <= crate::MAX_QUEUE_SIZE,
            "{max}"
        );
        for queue in [0x7fff, u16::MAX] {
            assert_eq!(
                driver.access().queue_max_size(queue),
                0,
                "there is no queue {queue}"
            );
            driver
                .access()
                .set_up_queue(queue, 16, [0x1000, 0x2000, 0x3000]);
            driver.access().enable_queue(queue);
            assert!(!driver.access().queue_is_enabled(queue));
        }
        // Set up for good after nonsense; smaller than the largest.
        driver
            .access()
            .set_up_queue(0, max.wrapping_sub(1) | 3, [1, 1, 1]);
        driver.access().set_up_queue(0, 0, [u64::MAX; 3]);
        let mut queue = 0;
        loop {
            let max = driver.access().queue_max_size(queue);
            if max == 0 {
                break;
            }
            driver.add_queue(queue, max.min(16));
            queue += 1;
        }
        // An enabled queue does not change.
        driver.access().set_up_queue(0, 4, [0x10, 0x10, 0x10]);
        driver.driver_ok();
        case.subject.exercise(driver);
    });
}

fn bad_queue_addresses(case: &Case<'_>) {
    case.with_driver(|driver| {
        let offered = driver.access().device_features();
        let max = driver.access().queue_max_size(0);
        let end = Stage::RAM_BYTES;
        for addrs in [
            [0x1001, 0x2000, 0x3000],
            [0x1000, 0x2001, 0x3000],
            [0x1000, 0x2000, 0x3002],
            [end, 0x2000, 0x3000],
            [end - 16, 0x2000, 0x3000],
            [0x1000, end - 2, 0x3000],
            [0x1000, 0x2000, end - 8],
            [!15, !1, !3],
            [0xfec0_0000, 0xfee0_0000, 0xffff_f000],
        ] {
            driver.negotiate(offered);
            driver.access().set_up_queue(0, max, addrs);
            driver.access().enable_queue(0);
            let now = driver.access().status();
            driver.access().set_status(now | status::DRIVER_OK);
            let status = driver.access().status();
            assert_eq!(
                status & (status::NEEDS_RESET | status::DRIVER_OK),
                status::NEEDS_RESET,
                "queue at {addrs:#x?}: status {status:#x}"
            );
        }
        driver.start();
        case.subject.exercise(driver);
    });
}

/// Section 2.6.1.
fn queue_reset(case: &Case<'_>) {
    case.with_driver(|driver| {
        driver.start();
        case.subject.exercise(driver);
        let mut queue = 0;
        loop {
            let max = driver.access().queue_max_size(queue);
            if max == 0 {
                break;
            }
            driver.access().reset_queue(queue);
            assert!(!driver.access().queue_is_enabled(queue));
            assert_eq!(driver.access().status() & status::NEEDS_RESET, 0);
            driver.add_queue(queue, max);
            case.subject.exercise(driver);
            queue += 1;
        }
        driver.access().reset_queue(0x7fff);
        case.subject.exercise(driver);
    });
}

/// Chains and rings that no driver may make. Each one ends in NEEDS_RESET, and a reset heals.
fn broken_rings(case: &Case<'_>) {
    let queue = case.subject.victim_queue();
    let end = Stage::RAM_BYTES;
    type Breaking = fn(&mut Driver, u16);
    let breakings: [(&str, Breaking); 15] = [
        ("a circle of one", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, 16, NEXT, 0);
            d.make_available(q, 0);
        }),
        ("a circle of two", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, 16, NEXT, 1);
            d.write_descriptor(q, 1, room, 16, NEXT, 0);
            d.make_available(q, 0);
        }),
        ("a next beyond the table", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, 16, NEXT, 0xffff);
            d.make_available(q, 0);
        }),
        ("a head beyond the table", |d, q| {
            d.make_available(q, 0xffff);
        }),
        ("an index jump", |d, q| d.set_available_index(q, 0x8000)),
        ("an index one too far", |d, q| {
            let size = d.access().queue_max_size(q);
            d.set_available_index(q, size + 1);
        }),
        ("an index that goes back", |d, q| {
            d.set_available_index(q, 0xffff);
        }),
        ("a circle in an indirect table", |d, q| {
            let room = d.allocate(4096);
            let ram = d.ram().clone();
            for (i, next) in [(0u64, 1u16), (1, 0)] {
                ram.write(room + 16 * i, &room.to_le_bytes()).unwrap();
                ram.write(room + 16 * i + 8, &1u32.to_le_bytes()).unwrap();
                ram.write(room + 16 * i + 12, &NEXT.to_le_bytes()).unwrap();
                ram.write(room + 16 * i + 14, &next.to_le_bytes()).unwrap();
            }
            d.write_descriptor(q, 0, room, 32, INDIRECT, 0);
            d.make_available(q, 0);
        }),
        ("what is read behind what is written", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, 16, NEXT | WRITE, 1);
            d.write_descriptor(q, 1, room, 16, 0, 0);
            d.make_available(q, 0);
        }),
        ("a chain over 2^32 bytes", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, u32::MAX, NEXT | WRITE, 1);
            d.write_descriptor(q, 1, room, u32::MAX, WRITE, 0);
            d.make_available(q, 0);
        }),
        ("an indirect table outside memory", |d, q| {
            d.write_descriptor(q, 0, Stage::RAM_BYTES, 64, INDIRECT, 0);
            d.make_available(q, 0);
        }),
        ("an indirect table of odd length", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, 17, INDIRECT, 0);
            d.make_available(q, 0);
        }),
        ("an empty indirect table", |d, q| {
            let room = d.allocate(4096);
            d.write_descriptor(q, 0, room, 0, INDIRECT, 0);
            d.make_available(q, 0);
        }),
        ("an indirect table in an indirect table", |d, q| {
            let room = d.allocate(4096);
            let ram = d.ram().clone();
            ram.write(room, &room.to_le_bytes()).unwrap();
            ram.write(room + 8, &16u32.to_le_bytes()).unwrap();
            ram.write(room + 12, &INDIRECT.to_le_bytes()).unwrap();
            d.write_descriptor(q, 0, room, 16, INDIRECT, 0);
            d.make_available(q, 0);
        }),
        ("an indirect table of 4096 buffers", |d, q| {
            let room = d.allocate(16 * 4096);
            let ram = d.ram().clone();
            for i in 0..4096u64 {
                ram.write(room + 16 * i, &room.to_le_bytes()).unwrap();
                ram.write(room + 16 * i + 8, &1u32.to_le_bytes()).unwrap();
                let (flags, next) = (NEXT, ((i + 1) % 4096) as u16);
                ram.write(room + 16 * i + 12, &flags.to_le_bytes()).unwrap();
                ram.write(room + 16 * i + 14, &next.to_le_bytes()).unwrap();
            }
            d.write_descriptor(q, 0, room, 16 * 4096, INDIRECT, 0);
            d.make_available(q, 0);
        }),
    ];
    case.with_driver(|driver| {
        for (name, make) in breakings {
            driver.start();
            make(driver, queue);
            driver.notify(queue);
            assert!(
                driver.wait_for_needs_reset(NOTICE),
                "{name}: no NEEDS_RESET"
            );
            driver.wait_interrupt(false, true);
            // Going on ringing changes nothing.
            for _ in 0..100 {
                driver.notify(queue);
            }
            driver.start();
            case.subject.exercise(driver);
        }
        // These are the device's to judge: an answer, or NEEDS_RESET; nothing worse.
        for (addr, len) in [
            (end, 16),
            (end - 1, 2),
            (u64::MAX, 1),
            (u64::MAX - 15, u32::MAX),
            (0xfee0_0000, 4096),
            (0, 0),
        ] {
            for flags in [0, WRITE] {
                driver.start();
                driver.write_descriptor(queue, 0, addr, len, flags, 0);
                driver.make_available(queue, 0);
                driver.notify(queue);
                driver.wait_for_needs_reset(PEACE);
                driver.start();
                case.subject.exercise(driver);
            }
        }
    });
}

fn pause(driver: &mut Driver) {
    driver.access().with_control(&mut |control| control.pause());
}

fn resume(driver: &mut Driver) {
    driver
        .access()
        .with_control(&mut |control| control.resume());
}

fn save(access: &mut dyn Access) -> Option<SavedState> {
    let mut saved = None;
    access.with_control(&mut |control| saved = control.save());
    saved
}

fn restore(access: &mut dyn Access, saved: &SavedState) -> Result<(), RestoreError> {
    let mut result = Ok(());
    access.with_control(&mut |control| result = control.restore(saved));
    result
}

fn pause_and_resume(case: &Case<'_>) {
    case.with_driver(|driver| {
        pause(driver);
        resume(driver);
        driver.start();
        for _ in 0..3 {
            case.subject.exercise(driver);
            pause(driver);
            pause(driver);
            assert_ne!(driver.access().status() & status::DRIVER_OK, 0);
            resume(driver);
            resume(driver);
        }
        case.subject.exercise(driver);
        pause(driver);
        driver.reset();
        resume(driver);
        driver.start();
        case.subject.exercise(driver);
    });
}

/// The whole transport: a driver goes on with another device as if nothing had happened.
fn save_and_restore(case: &Case<'_>) {
    let stage = Stage::new();
    let make = || (case.carry)(&stage, case.subject.device());
    let mut driver = Driver::new(make(), stage.ram());
    let fresh = save(driver.access()).expect("a device that nobody has started can be saved");
    driver.start();
    case.subject.exercise(&mut driver);
    assert_eq!(
        save(driver.access()),
        None,
        "a running device has no state to save"
    );
    for _ in 0..3 {
        pause(&mut driver);
        let saved = save(driver.access()).unwrap();
        let mut twin = make();
        restore(twin.as_mut(), &fresh).unwrap();
        restore(twin.as_mut(), &saved).unwrap();
        assert_eq!(
            save(twin.as_mut()).as_ref(),
            Some(&saved),
            "what was restored is saved the same"
        );
        driver.move_to(twin);
        resume(&mut driver);
        case.subject.exercise(&mut driver);
    }
    assert_eq!(restore(driver.access(), &fresh), Err(RestoreError::Running));
    // What a driver may write before features are agreed upon does not spoil its state.
    driver.reset();
    driver.access().set_driver_features(u64::MAX);
    let odd = save(driver.access()).unwrap();
    driver.move_to(make());
    restore(driver.access(), &odd).unwrap();
    resume(&mut driver);
    driver.start();
    case.subject.exercise(&mut driver);
}

/// A saved state comes from a file, and that from anybody.
fn hostile_states(case: &Case<'_>) {
    let stage = Stage::new();
    let make = || (case.carry)(&stage, case.subject.device());
    let mut driver = Driver::new(make(), stage.ram());
    driver.start();
    case.subject.exercise(&mut driver);
    pause(&mut driver);
    let mut core = None;
    driver.access().with_core(&mut |c| core = c.save());
    let core: TransportStateV1 = core.unwrap();
    let spoils: [fn(&mut TransportStateV1); 12] = [
        |s| s.queues.clear(),
        |s| s.queues.push(s.queues[0]),
        |s| s.queues[0].size = 0,
        |s| s.queues[0].size = 3,
        |s| s.queues[0].size = 0x8000,
        |s| s.driver_features = u64::MAX,
        |s| s.driver_features = 0,
        |s| s.status = status::DRIVER_OK,
        |s| s.status |= 0x10,
        |s| s.status |= status::NEEDS_RESET,
        |s| s.device.kind = "something else".into(),
        |s| s.device.version += 1,
    ];
    let mut other = make();
    other.with_core(&mut |other| {
        for (i, spoil) in spoils.iter().enumerate() {
            let mut state = core.clone();
            spoil(&mut state);
            assert!(other.restore(&state).is_err(), "spoilt state {i}");
        }
        // Rings that are not in memory, or elsewhere than the positions say: the driver is told.
        for spoil in [
            |s: &mut TransportStateV1| s.queues[0].used_addr = Stage::RAM_BYTES,
            |s: &mut TransportStateV1| s.queues[0].available_addr = u64::MAX - 1,
            |s: &mut TransportStateV1| s.queues[0].descriptors_addr += 1,
        ] {
            let mut lost = core.clone();
            spoil(&mut lost);
            other.restore(&lost).unwrap();
            other.resume();
            assert_ne!(other.status() & status::NEEDS_RESET, 0);
            other.reset();
        }
        let mut lost = core.clone();
        lost.queues[0].next_avail = lost.queues[0].next_avail.wrapping_add(0x8000);
        other.restore(&lost).unwrap();
        other.resume();
        let start = std::time::Instant::now();
        while other.status() & status::NEEDS_RESET == 0 {
            assert!(start.elapsed() < NOTICE, "a position far ahead is noticed");
            std::thread::yield_now();
        }
        other.reset();
    });
    // The transport's own bytes, cut off, changed, of another kind or version.
    let whole = save(driver.access()).unwrap();
    let spoilt = |spoil: &dyn Fn(&mut SavedState)| {
        let mut state = whole.clone();
        spoil(&mut state);
        restore(make().as_mut(), &state)
    };
    let e = spoilt(&|s| s.version += 1).unwrap_err();
    assert!(matches!(e, RestoreError::Version { .. }), "{e}");
    let e = spoilt(&|s| s.kind.push('x')).unwrap_err();
    assert!(matches!(e, RestoreError::Kind { .. }), "{e}");
    for len in (0..whole.bytes.len()).step_by(7) {
        spoilt(&|s| s.bytes.truncate(len)).unwrap_err();
    }
    // Any byte changed: refused, or a device that can be started and reset.
    let mut seed = 1u32;
    for _ in 0..HOSTILE_STATES {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let at = (seed >> 8) as usize % whole.bytes.len();
        let mut state = whole.clone();
        // Mostly digits, so that the result is a number again.
        state.bytes[at] = b"0123456789,0123456789"[seed as usize % 21];
        let mut other = make();
        if restore(other.as_mut(), &state).is_ok() {
            other.with_control(&mut |control| control.resume());
            other.with_core(&mut |core| core.reset());
        }
    }
}

/// Any width, any offset, within and beyond: no answer is a crash.
fn configuration_space(case: &Case<'_>) {
    case.with_driver(|driver| {
        driver.start();
        let mut offsets: Vec<u32> = (0..128).collect();
        offsets.extend([255, 256, 1000, 4095, u32::MAX - 7, u32::MAX]);
        for at in offsets {
            for width in [1, 2, 4, 8] {
                let mut bytes = vec![0xee; width];
                driver.access().read_config(at, &mut bytes);
            }
        }
        let before = driver.access().config_generation();
        assert_eq!(
            driver.access().config_generation(),
            before,
            "nothing has changed"
        );
        case.subject.exercise(driver);
        for at in (0..256).rev() {
            for width in [1, 2, 4, 8] {
                driver.access().write_config(at, &vec![0; width]);
            }
        }
        driver.start();
        case.subject.exercise(driver);
    });
}

fn reset_storm(case: &Case<'_>) {
    case.with_driver(|driver| {
        for _ in 0..50 {
            driver.start();
            driver.notify(0);
        }
        for _ in 0..50 {
            driver.access().set_status(0);
        }
        driver.start();
        case.subject.exercise(driver);
    });
}
