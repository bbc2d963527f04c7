//! How a guest's kernel says that it has panicked: the pvpanic device on its ISA port.
//!
//! Specification: QEMU docs/specs/pvpanic.rst. Reading gives the events the device knows, writing
//! reports events. Linux finds it by the ACPI device `QEMU0001`.

use alveole_io_bus::{BusDevice, MachineRequest, Outcome};

/// The port by convention; the ACPI device names it again.
pub const PANIC_PORT: u64 = 0x505;
/// Ports that the device takes.
pub const PANIC_PORTS: u64 = 1;

const PANICKED: u8 = 1 << 0;
/// The guest has panicked and runs a crash kernel of its own: it will go on, nothing to do.
const CRASH_LOADED: u8 = 1 << 1;

/// The panic port. It has no state.
#[derive(Debug, Default)]
pub struct PanicPort;

impl BusDevice for PanicPort {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        match (offset, into) {
            (0, [byte]) => {
                *byte = PANICKED | CRASH_LOADED;
                Outcome::Done
            }
            _ => Outcome::Refused,
        }
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        match (offset, from) {
            (0, &[events]) if events & PANICKED != 0 => Outcome::Asks(MachineRequest::Panicked),
            (0, &[_]) => Outcome::Done,
            _ => Outcome::Refused,
        }
    }
}
