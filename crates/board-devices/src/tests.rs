use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, MachineRequest, Outcome};
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

#[test]
fn the_keyboard_resets_and_nothing_else() {
    for value in 0..=u8::MAX {
        let want = if value == 0xfe {
            Outcome::Asks(MachineRequest::Reset)
        } else {
            Outcome::Done
        };
        assert_eq!(KeyboardReset.write(4, &[value]), want);
        assert_eq!(KeyboardReset.write(0, &[value]), Outcome::Done);
    }
    assert_eq!(KeyboardReset.write(4, &[0xfe, 0]), Outcome::Refused);
}

#[test]
fn linux_neither_spins_before_a_reset_nor_finds_a_keyboard() {
    // kb_wait(): until "input full" (0x02) is clear.
    assert_eq!(read(&mut KeyboardReset, 4) & 0x02, 0);
    // i8042_flush(): fails while "output full" (0x01) stays set.
    for _ in 0..17 {
        assert_ne!(read(&mut KeyboardReset, 4) & 0x01, 0);
        assert_eq!(read(&mut KeyboardReset, 0), 0);
    }
    for others in 1..4 {
        assert_eq!(KeyboardReset.read(others, &mut [0]), Outcome::Refused);
        assert_eq!(KeyboardReset.write(others, &[0xfe]), Outcome::Refused);
    }
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

proptest! {
    /// Whatever a guest does, it gets an answer; only one-byte accesses are ever carried out.
    #[test]
    fn any_access_is_answered(
        accesses in prop::collection::vec((any::<bool>(), 0u64..8, prop::collection::vec(any::<u8>(), 0..9)), 0..64)
    ) {
        let mut devices: [Box<dyn BusDevice>; 4] = [
            Box::new(PowerPorts::new()),
            Box::new(KeyboardReset),
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
}
