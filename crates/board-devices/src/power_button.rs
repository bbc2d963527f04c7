//! The button on the case. Pressing it asks the guest to shut down by itself.
//!
//! A hardware-reduced machine has no fixed power button: the press is an interrupt of the generic
//! event device (ACPI 6.5: 5.6.9), whose `_EVT` notifies the button device `PNP0C0C` with 0x80.

use alveole_interrupts::IrqLine;

/// The button, on the interrupt line of the generic event device. A guest that ignores it, or merges
/// two presses into one, is within its rights.
#[derive(Debug, Clone)]
pub struct PowerButton(IrqLine);

impl PowerButton {
    /// A button on `line`, which must be the edge-triggered one that the event device names.
    #[must_use]
    pub fn new(line: IrqLine) -> Self {
        Self(line)
    }

    /// Presses and releases. Does not wait for the guest.
    pub fn press(&self) {
        self.0.pulse();
    }
}
