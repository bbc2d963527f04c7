//! The saved state of the registers. Not used by logic.
//!
//! What the guest has written and nobody has taken yet belongs to the console, not to the guest: it is no part of it.

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

pub(crate) const KIND: &str = "serial";
pub(crate) const VERSION: u32 = 1;

/// The registers, under the names of the data sheet, and the bytes in the input FIFO.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct UartStateV1 {
    dll: u8,
    dlm: u8,
    ier: u8,
    iir: u8,
    lcr: u8,
    lsr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    input: Vec<u8>,
}

impl UartStateV1 {
    pub(crate) fn of(state: SerialState) -> Self {
        // Exhaustive, so that a new field has to decide whether it is saved.
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = state;
        Self {
            dll: baud_divisor_low,
            dlm: baud_divisor_high,
            ier: interrupt_enable,
            iir: interrupt_identification,
            lcr: line_control,
            lsr: line_status,
            mcr: modem_control,
            msr: modem_status,
            scr: scratch,
            input: in_buffer,
        }
    }

    pub(crate) fn registers(self) -> SerialState {
        SerialState {
            baud_divisor_low: self.dll,
            baud_divisor_high: self.dlm,
            interrupt_enable: self.ier,
            interrupt_identification: self.iir,
            line_control: self.lcr,
            line_status: self.lsr,
            modem_control: self.mcr,
            modem_status: self.msr,
            scratch: self.scr,
            in_buffer: self.input,
        }
    }
}
