//! Small fixed hardware: power and reset ports, keyboard controller, boot timer, panic port, power button, generation id,
//! VMClock.
//!
//! Each is a few bytes of state behind one-byte registers. What the guest asks goes back with the
//! access as [`Outcome::Asks`](alveole_io_bus::Outcome::Asks); nothing here acts on it, waits, or
//! writes to the log, so a guest that repeats itself costs its own exits and nothing else.
//!
//! Where a device sits by convention is an exported constant, because firmware tables and kernels
//! name the same numbers. Placing it on a bus is the wiring's business.
//!
//! Deliberately does not know: buses, the machine's lifecycle, interrupt numbers, ACPI tables.

mod boot_timer;
mod generation;
mod keyboard;
mod keyboard_controller;
mod panic_port;
mod power_button;
mod power_ports;
mod vm_clock;

#[cfg(test)]
mod tests;

pub use boot_timer::{BOOT_TIMER_GUEST_ADDR, BOOT_TIMER_MAGIC, BOOT_TIMER_SIZE_BYTES, BootTimer};
pub use generation::{GENERATION_ID_BYTES, Generation, GenerationError};
pub use keyboard_controller::{
    KEYBOARD_COMMAND_OFFSET, KEYBOARD_DATA_OFFSET, KEYBOARD_FIRST_PORT, KEYBOARD_PORTS,
    KeyboardController, Keys, Pressed,
};
pub use panic_port::{PANIC_PORT, PANIC_PORTS, PanicPort};
pub use power_button::PowerButton;
pub use power_ports::{
    POWER_PORTS, PowerPorts, RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET,
    SLEEP_TYPE_OFF,
};
pub use vm_clock::VM_CLOCK_BYTES;
