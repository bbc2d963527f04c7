//! The one thing a PC keyboard controller (Intel 8042) is still needed for: resetting the machine.
//!
//! Linux does it with `reboot=k`, and as one of its last resorts (arch/x86/kernel/reboot.c). There is
//! no keyboard. A kernel that looks for one must give up fast, and one that resets must not wait:
//! - Status reads "output full, input empty" for ever. `kb_wait()` looks only at "input empty" and
//!   does not spin; `i8042_flush()` (drivers/input/serio/i8042.c) tries to empty the output, gives up
//!   after 16 bytes and reports that there is no controller: under a millisecond. With a status of
//!   zero the driver would wait half a second for the answer to its first command.
//! - Data reads zero.

use alveole_io_bus::{BusDevice, MachineRequest, Outcome};

/// First port of the range.
pub const KEYBOARD_FIRST_PORT: u64 = 0x60;
/// Ports in the range. Those between data and command belong to others and are refused: 0x61 (speaker
/// and timer gate) must read all ones, so that a kernel that calibrates against it does not wait.
pub const KEYBOARD_PORTS: u64 = 5;

const DATA_OFFSET: u64 = 0;
const COMMAND_OFFSET: u64 = 4;
const STATUS_OUTPUT_FULL: u8 = 1;
/// "Pulse output line 0", which is wired to the processor's reset.
const COMMAND_RESET: u8 = 0xfe;

/// Data port and command port. It has no state.
#[derive(Debug, Default)]
pub struct KeyboardReset;

impl BusDevice for KeyboardReset {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        let [byte] = into else {
            return Outcome::Refused;
        };
        *byte = match offset {
            DATA_OFFSET => 0,
            COMMAND_OFFSET => STATUS_OUTPUT_FULL,
            _ => return Outcome::Refused,
        };
        Outcome::Done
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        match (offset, from) {
            (COMMAND_OFFSET, &[COMMAND_RESET]) => Outcome::Asks(MachineRequest::Reset),
            (COMMAND_OFFSET | DATA_OFFSET, &[_]) => Outcome::Done,
            _ => Outcome::Refused,
        }
    }
}
