//! A PC's keyboard controller (Intel 8042; IBM Personal System/2 Hardware Interface Technical Reference, "Keyboard and auxiliary
//! device controller") with a keyboard and no mouse.
//!
//! It is there for two things: Ctrl-Alt-Del, which many guests take for the wish that they restart in good order, and the reset
//! that Linux makes by `reboot=k`, and as one of its last resorts. Each access is a costly exit, so nothing here is ever busy: a
//! driver that finds the controller (Linux, drivers/input/serio/i8042.c) waits for no answer, also where it looks for a mouse.

use std::sync::{Arc, Mutex, PoisonError};

use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, MachineRequest, Outcome};
use alveole_saved_state::{RestoreError, SavedState, Saves};
use serde::{Deserialize, Serialize};

use crate::keyboard::{Keyboard, KeyboardStateV1};

/// First port of the range.
pub const KEYBOARD_FIRST_PORT: u64 = 0x60;
/// Ports in the range. Those between data and command belong to others and are refused: 0x61 (speaker
/// and timer gate) must read all ones, so that a kernel that calibrates against it does not wait.
pub const KEYBOARD_PORTS: u64 = 5;
/// Offset of the data port.
pub const KEYBOARD_DATA_OFFSET: u64 = 0;
/// Offset of the port that takes commands and reads the status.
pub const KEYBOARD_COMMAND_OFFSET: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1;
/// What the guest says is bit 2 of the control byte.
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_NOT_LOCKED: u8 = 1 << 4;

const CONTROL_INTERRUPT: u8 = 1;
const CONTROL_SYSTEM: u8 = 1 << 2;
const CONTROL_KEYBOARD_OFF: u8 = 1 << 4;
const CONTROL_MOUSE_OFF: u8 = 1 << 5;
const CONTROL_TRANSLATE: u8 = 1 << 6;
/// As a PC's firmware leaves it, but that no interrupt comes before a driver asks for it.
const CONTROL_AT_START: u8 = CONTROL_SYSTEM | CONTROL_MOUSE_OFF | CONTROL_TRANSLATE;

const COMMAND_READ_CONTROL: u8 = 0x20;
const COMMAND_WRITE_CONTROL: u8 = 0x60;
const COMMAND_TEST_MOUSE_WIRE: u8 = 0xa9;
const COMMAND_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD_WIRE: u8 = 0xab;
const COMMAND_KEYBOARD_OFF: u8 = 0xad;
const COMMAND_KEYBOARD_ON: u8 = 0xae;
const COMMAND_READ_OUTPUT_LINES: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_LINES: u8 = 0xd1;
const COMMAND_RETURN_BYTE: u8 = 0xd2;
const COMMAND_RETURN_BYTE_OF_MOUSE: u8 = 0xd3;
const COMMAND_WRITE_MOUSE: u8 = 0xd4;
/// The first of sixteen whose low bits say which output lines are pulsed: those that are clear.
const COMMAND_PULSE: u8 = 0xf0;

/// Wired to the processor's reset; low resets.
const OUTPUT_NO_RESET: u8 = 1;
const OUTPUT_A20: u8 = 1 << 1;

const TEST_PASSED: u8 = 0x55;
const WIRE_GOOD: u8 = 0;
/// No mouse: its clock stays low.
const WIRE_CLOCK_LOW: u8 = 1;

/// Data port and command port. Raises its line only from accesses and presses, so a guest pays for its interrupts by its exits.
#[derive(Debug)]
pub struct KeyboardController {
    line: IrqLine,
    keyboard: Keyboard,
    control: u8,
    /// The controller's own answer, which goes before the keyboard's; a new one takes its place.
    answer: Option<u8>,
    /// The command whose parameter is the next byte at the data port.
    unfinished: Option<u8>,
}

impl KeyboardController {
    /// A controller on `line`, which must be edge-triggered.
    #[must_use]
    pub fn new(line: IrqLine) -> Self {
        Self {
            line,
            keyboard: Keyboard::default(),
            control: CONTROL_AT_START,
            answer: None,
            unfinished: None,
        }
    }

    fn translates(&self) -> bool {
        self.control & CONTROL_TRANSLATE != 0
    }

    fn keyboard_has_byte(&self) -> bool {
        self.control & CONTROL_KEYBOARD_OFF == 0 && self.keyboard.has_byte()
    }

    fn status(&self) -> u8 {
        let full = self.answer.is_some() || self.keyboard_has_byte();
        // The control byte has the system bit in the same place.
        STATUS_NOT_LOCKED
            | (self.control & STATUS_SYSTEM)
            | if full { STATUS_OUTPUT_FULL } else { 0 }
    }

    /// One edge for the next byte of the keyboard. The controller's own answers are waited for by reading the status.
    fn tell(&self) {
        if self.control & CONTROL_INTERRUPT != 0 && self.keyboard_has_byte() {
            self.line.pulse();
        }
    }

    fn set_control(&mut self, value: u8) {
        self.control = value;
        self.tell();
    }

    fn take_command(&mut self, command: u8) -> Outcome {
        self.unfinished = None;
        match command {
            COMMAND_READ_CONTROL => self.answer = Some(self.control),
            COMMAND_TEST_MOUSE_WIRE => self.answer = Some(WIRE_CLOCK_LOW),
            COMMAND_TEST => self.answer = Some(TEST_PASSED),
            COMMAND_TEST_KEYBOARD_WIRE => self.answer = Some(WIRE_GOOD),
            COMMAND_KEYBOARD_OFF => self.set_control(self.control | CONTROL_KEYBOARD_OFF),
            COMMAND_KEYBOARD_ON => self.set_control(self.control & !CONTROL_KEYBOARD_OFF),
            COMMAND_READ_OUTPUT_LINES => self.answer = Some(OUTPUT_NO_RESET | OUTPUT_A20),
            COMMAND_WRITE_CONTROL
            | COMMAND_WRITE_OUTPUT_LINES
            | COMMAND_RETURN_BYTE
            | COMMAND_RETURN_BYTE_OF_MOUSE
            | COMMAND_WRITE_MOUSE => self.unfinished = Some(command),
            COMMAND_PULSE.. if command & OUTPUT_NO_RESET == 0 => {
                return Outcome::Asks(MachineRequest::Reset);
            }
            // Among them those for the mouse that is not there.
            _ => {}
        }
        Outcome::Done
    }

    fn take_data(&mut self, byte: u8) -> Outcome {
        match self.unfinished.take() {
            Some(COMMAND_WRITE_CONTROL) => self.set_control(byte),
            Some(COMMAND_WRITE_OUTPUT_LINES) if byte & OUTPUT_NO_RESET == 0 => {
                return Outcome::Asks(MachineRequest::Reset);
            }
            // As the keyboard's also where it should be the mouse's: by that a driver sees at once that there is none.
            Some(COMMAND_RETURN_BYTE | COMMAND_RETURN_BYTE_OF_MOUSE) => self.answer = Some(byte),
            Some(_) => {}
            None => {
                // Speaking to the keyboard switches its clock on.
                self.control &= !CONTROL_KEYBOARD_OFF;
                self.keyboard.take(byte, self.translates());
                self.tell();
            }
        }
        Outcome::Done
    }

    fn read_data(&mut self) -> u8 {
        if let Some(answer) = self.answer.take() {
            self.tell();
            return answer;
        }
        if !self.keyboard_has_byte() {
            return 0;
        }
        let byte = self.keyboard.next_byte().unwrap_or(0);
        self.tell();
        byte
    }
}

impl BusDevice for KeyboardController {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        let [byte] = into else {
            return Outcome::Refused;
        };
        *byte = match offset {
            KEYBOARD_DATA_OFFSET => self.read_data(),
            KEYBOARD_COMMAND_OFFSET => self.status(),
            _ => return Outcome::Refused,
        };
        Outcome::Done
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        match (offset, from) {
            (KEYBOARD_COMMAND_OFFSET, &[command]) => self.take_command(command),
            (KEYBOARD_DATA_OFFSET, &[byte]) => self.take_data(byte),
            _ => Outcome::Refused,
        }
    }
}

const KIND: &str = "keyboard";
const VERSION: u32 = 1;

/// The saved state. Not used by logic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ControllerStateV1 {
    keyboard: KeyboardStateV1,
    control: u8,
    answer: Option<u8>,
    unfinished: Option<u8>,
}

impl Saves for KeyboardController {
    fn save(&self) -> SavedState {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            line: _,
            keyboard,
            control,
            answer,
            unfinished,
        } = self;
        let state = ControllerStateV1 {
            keyboard: keyboard.save(),
            control: *control,
            answer: *answer,
            unfinished: *unfinished,
        };
        SavedState::pack(KIND, VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let state: ControllerStateV1 = saved.unpack(KIND, VERSION)?;
        let keyboard = Keyboard::restored(state.keyboard);
        self.keyboard = keyboard.ok_or_else(|| RestoreError::Invalid {
            kind: KIND.into(),
            why: "its keyboard has more to say than its buffer holds".into(),
        })?;
        self.control = state.control;
        self.answer = state.answer;
        self.unfinished = state.unfinished;
        // The edge may have been on its way when the state was saved.
        self.tell();
        Ok(())
    }
}

/// What came of pressing keys.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pressed {
    /// The guest's driver will read them.
    Yes,
    /// The guest has no driver that wants to know of keys: none was pressed.
    NobodyListens,
    /// The driver has not read the keys that were pressed before: none was pressed.
    Unread,
}

/// The owner's hand on the keyboard of a controller that a bus has.
#[derive(Debug, Clone)]
pub struct Keys(Arc<Mutex<KeyboardController>>);

impl Keys {
    /// The keys of `controller`.
    #[must_use]
    pub fn of(controller: &Arc<Mutex<KeyboardController>>) -> Self {
        Self(Arc::clone(controller))
    }

    /// Presses Ctrl, Alt and Del together, and lets them go. Does not wait for the guest.
    pub fn press_ctrl_alt_del(&self) -> Pressed {
        let mut controller = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = controller.control & (CONTROL_INTERRUPT | CONTROL_KEYBOARD_OFF);
        if state != CONTROL_INTERRUPT {
            return Pressed::NobodyListens;
        }
        let translated = controller.translates();
        if !controller.keyboard.press_ctrl_alt_del(translated) {
            return Pressed::Unread;
        }
        controller.tell();
        Pressed::Yes
    }
}
