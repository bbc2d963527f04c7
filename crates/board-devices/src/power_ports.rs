//! Switching off and resetting: the sleep registers of hardware-reduced ACPI and the reset register.
//!
//! ACPI 6.5: 4.8.3.7 (sleep control and status registers), 4.8.3.6 (reset register), 5.2.9 (the FADT
//! that names all three; its flags need `HW_REDUCED_ACPI` and `RESET_REG_SUP`). DSDT `\_S5` must give
//! [`SLEEP_TYPE_OFF`].

use alveole_io_bus::{BusDevice, MachineRequest, Outcome};
use alveole_saved_state::{RestoreError, SavedState, Saves};
use serde::{Deserialize, Serialize};

/// One-byte ports that the device takes.
pub const POWER_PORTS: u64 = 3;
/// Offset of the sleep control register: FADT `SLEEP_CONTROL_REG`.
pub const SLEEP_CONTROL_OFFSET: u64 = 0;
/// Offset of the sleep status register: FADT `SLEEP_STATUS_REG`.
pub const SLEEP_STATUS_OFFSET: u64 = 1;
/// Offset of the reset register: FADT `RESET_REG`.
pub const RESET_OFFSET: u64 = 2;
/// What resets the machine when it is written to the reset register: FADT `RESET_VALUE`.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means off: both numbers of DSDT `\_S5`.
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLP_TYP_SHIFT: u32 = 2;
const SLP_TYP_MASK: u8 = 0b111 << SLP_TYP_SHIFT;
const SLP_EN: u8 = 1 << 5;
const WAK_STS: u8 = 1 << 7;

/// The three ports. All sleep types but off wake up at once: the machine has no other sleep.
#[derive(Debug, Default)]
pub struct PowerPorts {
    sleep_type_bits: u8,
    woke: bool,
}

impl PowerPorts {
    /// A machine that is on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn write_sleep_control(&mut self, value: u8) -> Outcome {
        self.sleep_type_bits = value & SLP_TYP_MASK;
        if value & SLP_EN == 0 {
            return Outcome::Done;
        }
        // A kernel that asks for a sleep we do not have polls WAK_STS: let it go on.
        self.woke = true;
        if self.sleep_type_bits >> SLP_TYP_SHIFT == SLEEP_TYPE_OFF {
            Outcome::Asks(MachineRequest::PowerOff)
        } else {
            Outcome::Done
        }
    }
}

impl BusDevice for PowerPorts {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        let [byte] = into else {
            return Outcome::Refused;
        };
        *byte = match offset {
            // SLP_EN always reads as zero.
            SLEEP_CONTROL_OFFSET => self.sleep_type_bits,
            SLEEP_STATUS_OFFSET if self.woke => WAK_STS,
            SLEEP_STATUS_OFFSET | RESET_OFFSET => 0,
            _ => return Outcome::Refused,
        };
        Outcome::Done
    }

    fn write(&mut self, offset: u64, from: &[u8]) -> Outcome {
        let &[value] = from else {
            return Outcome::Refused;
        };
        match offset {
            SLEEP_CONTROL_OFFSET => self.write_sleep_control(value),
            SLEEP_STATUS_OFFSET => {
                // Writing a one clears the bit.
                self.woke &= value & WAK_STS == 0;
                Outcome::Done
            }
            RESET_OFFSET if value == RESET_VALUE => Outcome::Asks(MachineRequest::Reset),
            RESET_OFFSET => Outcome::Done,
            _ => Outcome::Refused,
        }
    }
}

const KIND: &str = "power";
const VERSION: u32 = 1;

/// The saved state. Not used by logic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PowerStateV1 {
    sleep_type: u8,
    woke: bool,
}

impl Saves for PowerPorts {
    fn save(&self) -> SavedState {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let Self {
            sleep_type_bits,
            woke,
        } = self;
        let state = PowerStateV1 {
            sleep_type: sleep_type_bits >> SLP_TYP_SHIFT,
            woke: *woke,
        };
        SavedState::pack(KIND, VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let state: PowerStateV1 = saved.unpack(KIND, VERSION)?;
        let most = SLP_TYP_MASK >> SLP_TYP_SHIFT;
        if state.sleep_type > most {
            return Err(RestoreError::Invalid {
                kind: KIND.into(),
                why: format!(
                    "sleep type {}, of which {most} is the last",
                    state.sleep_type
                ),
            });
        }
        self.sleep_type_bits = state.sleep_type << SLP_TYP_SHIFT;
        self.woke = state.woke;
        Ok(())
    }
}
