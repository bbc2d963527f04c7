use std::sync::{Arc, Mutex};

use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, MachineRequest, Outcome};
use alveole_saved_state::Saves;
use proptest::prelude::*;

use super::*;

fn read(device: &mut dyn BusDevice, offset: u64) -> u8 {
    let mut byte = [0xaa];
    assert_eq!(
        device.read(offset, &mut byte),
        Outcome::Done,
        "offset {offset}"
    );
    byte[0]
}

#[test]
fn sleep_type_five_switches_off_and_others_wake_at_once() {
    let mut ports = PowerPorts::new();
    let off = MachineRequest::PowerOff;
    // SLP_TYP without SLP_EN only selects.
    assert_eq!(ports.write(SLEEP_CONTROL_OFFSET, &[5 << 2]), Outcome::Done);
    assert_eq!(read(&mut ports, SLEEP_STATUS_OFFSET), 0);
    assert_eq!(
        ports.write(SLEEP_CONTROL_OFFSET, &[5 << 2 | 1 << 5]),
        Outcome::Asks(off)
    );
    assert_eq!(
        read(&mut ports, SLEEP_CONTROL_OFFSET),
        5 << 2,
        "SLP_EN reads as zero"
    );
    for sleep_type in [0, 1, 2, 3, 4, 6, 7] {
        let mut ports = PowerPorts::new();
        let value = sleep_type << 2 | 1 << 5;
        assert_eq!(ports.write(SLEEP_CONTROL_OFFSET, &[value]), Outcome::Done);
        assert_eq!(read(&mut ports, SLEEP_STATUS_OFFSET), 0x80);
        assert_eq!(ports.write(SLEEP_STATUS_OFFSET, &[0]), Outcome::Done);
        assert_eq!(read(&mut ports, SLEEP_STATUS_OFFSET), 0x80);
        assert_eq!(ports.write(SLEEP_STATUS_OFFSET, &[0x80]), Outcome::Done);
        assert_eq!(read(&mut ports, SLEEP_STATUS_OFFSET), 0);
    }
}

#[test]
fn reserved_bits_of_sleep_control_do_not_matter() {
    let value = 0b1101_0111 | 1 << 5;
    let asks = Outcome::Asks(MachineRequest::PowerOff);
    assert_eq!(
        PowerPorts::new().write(SLEEP_CONTROL_OFFSET, &[value]),
        asks
    );
}

#[test]
fn only_the_reset_value_resets() {
    for value in 0..=u8::MAX {
        let want = if value == RESET_VALUE {
            Outcome::Asks(MachineRequest::Reset)
        } else {
            Outcome::Done
        };
        assert_eq!(PowerPorts::new().write(RESET_OFFSET, &[value]), want);
    }
}

fn keyboard() -> (KeyboardController, IrqLine) {
    let line = IrqLine::new().unwrap();
    (KeyboardController::new(line.clone()), line)
}

fn command(device: &mut KeyboardController, byte: u8) {
    assert_eq!(
        device.write(KEYBOARD_COMMAND_OFFSET, &[byte]),
        Outcome::Done,
        "command {byte:#x}"
    );
}

fn data(device: &mut KeyboardController, byte: u8) {
    let outcome = device.write(KEYBOARD_DATA_OFFSET, &[byte]);
    assert_eq!(outcome, Outcome::Done, "data {byte:#x}");
}

fn status(device: &mut KeyboardController) -> u8 {
    read(device, KEYBOARD_COMMAND_OFFSET)
}

/// Everything that can be read, as long as the status says so; bounded as a driver's patience is.
fn read_all(device: &mut KeyboardController) -> Vec<u8> {
    let mut all = Vec::new();
    while status(device) & 1 != 0 {
        all.push(read(device, KEYBOARD_DATA_OFFSET));
        assert!(all.len() <= 16, "it never becomes empty: {all:x?}");
    }
    all
}

/// Interrupt and clock of the keyboard on, mouse off; translated or not.
fn listen(device: &mut KeyboardController, translated: bool) {
    command(device, 0x60);
    data(device, 0x25 | if translated { 0x40 } else { 0 });
}

#[test]
fn the_keyboard_resets_by_each_way_that_lowers_the_line_and_by_no_other() {
    let reset = Outcome::Asks(MachineRequest::Reset);
    for value in 0..=u8::MAX {
        let (mut device, _) = keyboard();
        let want = match value >= 0xf0 && value % 2 == 0 {
            true => reset,
            false => Outcome::Done,
        };
        assert_eq!(device.write(4, &[value]), want, "command {value:#x}");
        let (mut device, _) = keyboard();
        assert_eq!(device.write(0, &[value]), Outcome::Done);
        let want = if value & 1 == 0 { reset } else { Outcome::Done };
        command(&mut device, 0xd1);
        assert_eq!(device.write(0, &[value]), want, "output lines {value:#x}");
    }
    assert_eq!(keyboard().0.write(4, &[0xfe, 0]), Outcome::Refused);
}

#[test]
fn linux_never_waits_for_the_controller() {
    let (mut device, _) = keyboard();
    // kb_wait(), i8042_wait_write(): until "input full" (0x02) is clear.
    assert_eq!(status(&mut device) & 0x02, 0);
    // i8042_flush(): nothing is there, and the lock is open.
    assert_eq!(status(&mut device) & 0x11, 0x10);
    // i8042_controller_init(): the control byte reads the same twice, and translates.
    for _ in 0..2 {
        command(&mut device, 0x20);
        assert_eq!(read_all(&mut device), [0x64]);
    }
    // i8042_check_aux(), where the tables do not say that there is no mouse: each answer is there at once, and says no.
    command(&mut device, 0xd3);
    data(&mut device, 0x5a);
    assert_eq!(status(&mut device) & 0x21, 0x01, "not as from a mouse");
    assert_eq!(read_all(&mut device), [0x5a]);
    command(&mut device, 0xa9);
    let [wire] = read_all(&mut device)[..] else {
        panic!("one byte")
    };
    assert!(!matches!(wire, 0 | 0xfa | 0xff), "{wire:#x}");
    // i8042_controller_selftest().
    command(&mut device, 0xaa);
    assert_eq!(read_all(&mut device), [0x55]);
    command(&mut device, 0xab);
    assert_eq!(read_all(&mut device), [0]);
    for others in 1..4 {
        assert_eq!(device.read(others, &mut [0]), Outcome::Refused);
        assert_eq!(device.write(others, &[0xfe]), Outcome::Refused);
    }
}

/// What atkbd says to a keyboard (drivers/input/keyboard/atkbd.c): an interrupt for each byte of each answer.
#[test]
fn a_keyboard_answers_what_a_driver_asks() {
    for (said, answers, translated) in [
        (&[0xf2][..], &[&[0xfa, 0xab, 0x83][..]][..], false),
        (&[0xf2], &[&[0xfa, 0xab, 0x41]], true),
        (&[0xff], &[&[0xfa, 0xaa]], true),
        (&[0xed, 0x07], &[&[0xfa], &[0xfa]], true),
        (&[0xf3, 0x00], &[&[0xfa], &[0xfa]], true),
        (&[0xf0, 0x00], &[&[0xfa], &[0xfa, 0x02]], false),
        (&[0xf0, 0x00], &[&[0xfa], &[0xfa, 0x41]], true),
        (&[0xf0, 0x02], &[&[0xfa], &[0xfa]], true),
        (&[0xf0, 0x03], &[&[0xfa], &[0xfe]], true),
        (&[0xf4], &[&[0xfa]], true),
        (&[0xf5], &[&[0xfa]], true),
        (&[0xee], &[&[0xee]], true),
        (&[0x17], &[&[0xfe]], true),
    ] {
        let (mut device, line) = keyboard();
        listen(&mut device, translated);
        for (&byte, &answer) in said.iter().zip(answers) {
            data(&mut device, byte);
            for &want in answer {
                assert_eq!(line.take_edges(), 1, "{said:x?}");
                assert_eq!(status(&mut device) & 1, 1);
                assert_eq!(read(&mut device, 0), want, "{said:x?}");
            }
            assert_eq!((line.take_edges(), status(&mut device) & 1), (0, 0));
        }
    }
}

#[test]
fn ctrl_alt_del_goes_down_and_up_in_the_set_that_the_driver_wants() {
    let keys: [(bool, &[u8]); 2] = [
        (true, &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]),
        (
            false,
            &[
                0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
            ],
        ),
    ];
    for (translated, codes) in keys {
        let (device, line) = keyboard();
        let device = Arc::new(Mutex::new(device));
        let keys = Keys::of(&device);
        listen(&mut device.lock().unwrap(), translated);
        for _ in 0..3 {
            assert_eq!(keys.press_ctrl_alt_del(), Pressed::Yes);
            // Not a byte more before these have been read.
            assert_eq!(keys.press_ctrl_alt_del(), Pressed::Unread);
            let mut device = device.lock().unwrap();
            for &code in codes {
                assert_eq!(line.take_edges(), 1);
                assert_eq!(read(&mut *device, 0), code);
            }
            assert_eq!((line.take_edges(), status(&mut device) & 1), (0, 0));
            assert_eq!(read(&mut *device, 0), 0, "nothing is left");
        }
    }
}

#[test]
fn keys_are_pressed_only_where_somebody_listens() {
    let (device, line) = keyboard();
    let device = Arc::new(Mutex::new(device));
    let keys = Keys::of(&device);
    let with = |act: fn(&mut KeyboardController)| act(&mut device.lock().unwrap());
    // As the machine starts, while a driver has the keyboard off, and after it has gone.
    assert_eq!(keys.press_ctrl_alt_del(), Pressed::NobodyListens);
    with(|device| {
        command(device, 0x60);
        data(device, 0x35);
    });
    assert_eq!(keys.press_ctrl_alt_del(), Pressed::NobodyListens);
    with(|device| {
        listen(device, true);
        command(device, 0xad);
    });
    assert_eq!(keys.press_ctrl_alt_del(), Pressed::NobodyListens);
    assert_eq!(line.take_edges(), 0);
    with(|device| command(device, 0xae));
    assert_eq!(keys.press_ctrl_alt_del(), Pressed::Yes);
    assert_eq!(line.take_edges(), 1);
    // Pressed keys wait while the keyboard is off, and the interrupt comes when it is on again.
    with(|device| {
        command(device, 0xad);
        assert_eq!(status(device) & 1, 0);
        assert_eq!(read(device, 0), 0);
        command(device, 0xae);
        assert_eq!(status(device) & 1, 1);
    });
    assert_eq!(line.take_edges(), 1);
    with(|device| {
        // What the keyboard is told meanwhile is answered first and takes no key away.
        data(device, 0xed);
        assert_eq!(read(device, 0), 0xfa);
        data(device, 0x00);
        assert_eq!(read_all(device).len(), 1 + 8);
        listen(device, true);
        command(device, 0x60);
        data(device, 0x44);
    });
    assert_eq!(keys.press_ctrl_alt_del(), Pressed::NobodyListens);
}

#[test]
fn a_guest_boots_once() {
    let mut timer = BootTimer::new();
    assert_eq!(timer.write(0, &[122]), Outcome::Done);
    assert_eq!(timer.write(1, &[123]), Outcome::Refused);
    assert_eq!(timer.write(0, &[123, 0]), Outcome::Refused);
    assert_eq!(
        timer.write(0, &[123]),
        Outcome::Asks(MachineRequest::Booted)
    );
    assert_eq!(timer.write(0, &[123]), Outcome::Done);
    assert_eq!(timer.read(0, &mut [0]), Outcome::Refused);
}

#[test]
fn a_panic_is_reported_and_a_crash_kernel_is_not() {
    assert_eq!(read(&mut PanicPort, 0), 3);
    assert_eq!(
        PanicPort.write(0, &[1]),
        Outcome::Asks(MachineRequest::Panicked)
    );
    assert_eq!(
        PanicPort.write(0, &[3]),
        Outcome::Asks(MachineRequest::Panicked)
    );
    assert_eq!(PanicPort.write(0, &[2]), Outcome::Done);
    assert_eq!(PanicPort.write(0, &[0]), Outcome::Done);
}

#[test]
fn a_press_is_one_edge() {
    let line = IrqLine::new().unwrap();
    let button = PowerButton::new(line.clone());
    button.press();
    assert_eq!(line.take_edges(), 1);
}

#[test]
fn a_controller_goes_on_from_the_middle_of_a_command() {
    let (mut device, _) = keyboard();
    assert_eq!(
        device.write(KEYBOARD_COMMAND_OFFSET, &[0x60]),
        Outcome::Done
    );
    let saved = device.save();
    let (mut other, line) = keyboard();
    other.restore(&saved).unwrap();
    // The parameter of the command: interrupts on. Then an answer of the keyboard comes with one.
    assert_eq!(other.write(KEYBOARD_DATA_OFFSET, &[0x45]), Outcome::Done);
    assert_eq!(other.write(KEYBOARD_DATA_OFFSET, &[0xee]), Outcome::Done);
    assert_eq!(line.take_edges(), 1);
    let saved = other.save();
    let (mut third, _) = keyboard();
    third.restore(&saved).unwrap();
    assert_eq!(read(&mut third, KEYBOARD_DATA_OFFSET), 0xee);
    assert!(third.restore(&PowerPorts::new().save()).is_err());
}

#[test]
fn power_ports_keep_what_was_chosen() {
    let mut ports = PowerPorts::new();
    assert_eq!(
        ports.write(SLEEP_CONTROL_OFFSET, &[3 << 2 | 1 << 5]),
        Outcome::Done
    );
    let mut others = PowerPorts::new();
    others.restore(&ports.save()).unwrap();
    assert_eq!(read(&mut others, SLEEP_CONTROL_OFFSET), 3 << 2);
    assert_eq!(read(&mut others, SLEEP_STATUS_OFFSET), 0x80);
}

proptest! {
    /// Whatever a guest does, it gets an answer; only one-byte accesses are ever carried out.
    #[test]
    fn any_access_is_answered(
        accesses in prop::collection::vec((any::<bool>(), 0u64..8, prop::collection::vec(any::<u8>(), 0..9)), 0..64)
    ) {
        let mut devices: [Box<dyn BusDevice>; 4] = [
            Box::new(PowerPorts::new()),
            Box::new(keyboard().0),
            Box::new(BootTimer::new()),
            Box::new(PanicPort),
        ];
        for device in &mut devices {
            for (write, offset, bytes) in &accesses {
                let outcome = if *write {
                    device.write(*offset, bytes)
                } else {
                    device.read(*offset, &mut bytes.clone())
                };
                prop_assert!(bytes.len() == 1 || outcome == Outcome::Refused);
            }
            prop_assert_eq!(device.write(u64::MAX, &[1]), Outcome::Refused);
        }
    }

    /// Whatever a guest says to the controller, and however often: few bytes are kept for it, and no more edges sent than it made accesses.
    #[test]
    fn a_keyboard_keeps_and_sends_little(
        accesses in prop::collection::vec((any::<bool>(), prop::sample::select(vec![0u64, 4]), any::<u8>(), any::<bool>()), 0..256)
    ) {
        let (device, line) = keyboard();
        let device = Arc::new(Mutex::new(device));
        let keys = Keys::of(&device);
        for (write, offset, byte, press) in &accesses {
            let before = line.take_edges();
            prop_assert!(before <= 2, "{before} edges");
            if *press {
                let _ = keys.press_ctrl_alt_del();
            }
            let mut device = device.lock().unwrap();
            let _ = match write {
                true => device.write(*offset, &[*byte]),
                false => device.read(*offset, &mut [0]),
            };
        }
        // Its answer, the keyboard's answer, keys.
        let mut device = device.lock().unwrap();
        command(&mut device, 0xae);
        let mut left = 0;
        while status(&mut device) & 1 != 0 {
            read(&mut *device, 0);
            left += 1;
        }
        prop_assert!(left <= 1 + 3 + 16, "{left} bytes");
    }
}

#[test]
fn a_generation_id_is_written_where_it_lies_and_told_by_an_edge() {
    const AT: u64 = 0xf_0000;
    const CLOCK: u64 = 0xf_1000;
    let ram = GuestRam::map(&MemoryPlan::around_hole(64 << 20).unwrap()).unwrap();
    let line = IrqLine::new().unwrap();
    let generation = Generation::new(line.clone(), AT, CLOCK);
    let around = || {
        let mut bytes = [0; 48];
        ram.read(AT - 16, &mut bytes).unwrap();
        bytes
    };
    let mut seen = vec![around()];
    for _ in 0..3 {
        generation.renew(&ram).unwrap();
        seen.push(around());
    }
    for (index, bytes) in seen.iter().enumerate() {
        assert_eq!((&bytes[..16], &bytes[32..]), (&[0; 16][..], &[0; 16][..]));
        assert!(
            seen[..index].iter().all(|before| before != bytes),
            "an id that was there before"
        );
    }
    assert_eq!(
        line.take_edges(),
        0,
        "a guest that stands still is told later"
    );
    generation.announce();
    assert_eq!(line.take_edges(), 1);

    let nowhere = Generation::new(line, 1 << 40, CLOCK);
    let error = nowhere.renew(&ram).unwrap_err().to_string();
    assert!(error.contains("0x10000000000"), "{error}");
}

/// Offsets and values are those of Linux's vmclock-abi.h.
#[test]
fn a_vm_clock_says_that_the_machine_is_another_one() {
    const CLOCK: u64 = 0xf_1000;
    let ram = GuestRam::map(&MemoryPlan::around_hole(64 << 20).unwrap()).unwrap();
    let generation = Generation::new(IrqLine::new().unwrap(), 0xf_0000, CLOCK);
    let renewed = || {
        generation.renew(&ram).unwrap();
        let mut page = [0; VM_CLOCK_BYTES as usize];
        ram.read(CLOCK, &mut page).unwrap();
        page
    };
    let number = |page: &[u8], at: usize, size: usize| {
        let bytes = page[at..at + size].iter().rev();
        bytes.fold(0_u64, |n, b| n << 8 | u64::from(*b))
    };
    let first = renewed();
    assert_eq!(&first[..4], b"VCLK");
    assert_eq!((number(&first, 4, 4), number(&first, 8, 2)), (4096, 1));
    assert_eq!((first[10], first[34]), (0xff, 0), "no counter, no status");
    assert_eq!(number(&first, 24, 8), 1 << 8 | 1 << 9);
    assert_eq!(number(&first, 12, 4), 2);
    assert!(first[112..].iter().all(|b| *b == 0));
    let marks = |page: &[u8]| (number(page, 16, 8), number(page, 104, 8));
    let second = renewed();
    assert_eq!(number(&second, 12, 4), 4);
    assert_ne!(marks(&first).0, marks(&second).0);
    assert_ne!(marks(&first).1, marks(&second).1);
    // Whatever the guest has written there.
    ram.write(CLOCK, &[0xff; 112]).unwrap();
    let third = renewed();
    assert_eq!((&third[..4], number(&third, 12, 4)), (&b"VCLK"[..], 0));
    assert_eq!(number(&third, 24, 8), 1 << 8 | 1 << 9);
}
