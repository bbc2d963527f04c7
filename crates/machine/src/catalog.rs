//! The devices of a machine: the only place that names them. Each is placed on a bus, wired to its
//! interrupt and described to the guest here, and nowhere else.

use std::sync::{Arc, Mutex};

use alveole_acpi::{DeviceNode, PowerRegisters};
use alveole_board_devices::{
    BOOT_TIMER_SIZE_BYTES, BootTimer, KEYBOARD_PORTS, KeyboardReset, PANIC_PORTS, POWER_PORTS,
    PanicPort, PowerButton, PowerPorts, RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET,
    SLEEP_STATUS_OFFSET,
};
use alveole_hypervisor::Partition;
use alveole_io_bus::{BusBuilder, BusDevice, SharedDevice};
use alveole_serial::{Console, ConsoleHandle, ConsoleWorker, UART_PORTS};

use crate::build::BuildError;
use crate::layout;

/// The devices that add to the system calls of a thread (`resources/seccomp/<arch>/devices.d`).
pub(crate) const SECCOMP: &[&str] = &["serial"];

/// All devices of one machine, placed.
pub(crate) struct Devices {
    pub(crate) ports: BusBuilder,
    pub(crate) memory: BusBuilder,
    /// What the guest is told of them.
    pub(crate) nodes: Vec<DeviceNode>,
    pub(crate) power_button: PowerButton,
    pub(crate) console: ConsoleHandle,
    pub(crate) console_worker: ConsoleWorker,
}

/// Places every device.
pub(crate) fn place(
    partition: &dyn Partition,
    console: Console,
    boot_timer: bool,
) -> Result<Devices, BuildError> {
    let mut ports = BusBuilder::new();
    let mut memory = BusBuilder::new();
    let serial_line = partition.irq_line(layout::SERIAL_GSI)?;
    let (uart, console_worker, console) = console.into_parts(serial_line);
    let power_button = PowerButton::new(partition.irq_line(layout::POWER_BUTTON_GSI)?);

    let port = u64::from;
    ports.place(
        "serial",
        port(layout::SERIAL_PORT),
        UART_PORTS,
        shared(uart),
    )?;
    ports.place(
        "keyboard",
        port(layout::KEYBOARD_PORT),
        KEYBOARD_PORTS,
        shared(KeyboardReset),
    )?;
    ports.place(
        "panic-port",
        port(layout::PANIC_PORT),
        PANIC_PORTS,
        shared(PanicPort),
    )?;
    ports.place(
        "power",
        port(layout::POWER_PORT),
        POWER_PORTS,
        shared(PowerPorts::new()),
    )?;
    if boot_timer {
        let timer = shared(BootTimer::new());
        memory.place(
            "boot-timer",
            layout::BOOT_TIMER_ADDR,
            BOOT_TIMER_SIZE_BYTES,
            timer,
        )?;
    }
    let nodes = vec![
        DeviceNode {
            name: *b"COM1",
            hid: "PNP0501",
            uid: 0,
            ports: vec![(layout::SERIAL_PORT, 8)],
            memory: Vec::new(),
            gsi: Some(layout::SERIAL_GSI),
        },
        DeviceNode {
            name: *b"PANI",
            hid: "QEMU0001",
            uid: 0,
            ports: vec![(layout::PANIC_PORT, 1)],
            memory: Vec::new(),
            gsi: None,
        },
    ];
    Ok(Devices {
        ports,
        memory,
        nodes,
        power_button,
        console,
        console_worker,
    })
}

/// Where the guest finds the power registers.
pub(crate) fn power_registers() -> PowerRegisters {
    let at = |offset: u64| layout::POWER_PORT + u16::try_from(offset).unwrap_or(0);
    PowerRegisters {
        sleep_control_port: at(SLEEP_CONTROL_OFFSET),
        sleep_status_port: at(SLEEP_STATUS_OFFSET),
        reset_port: at(RESET_OFFSET),
        reset_value: RESET_VALUE,
    }
}

/// What a restart through the firmware runs, in real mode: a write to the reset register.
///
/// Kernels with EFI support take hardware-reduced tables for a sign of EFI, restart by its services, have
/// none, and jump to where a PC's firmware is (Linux arch/x86/kernel/reboot.c, `efi_reboot_required`).
/// Without this they would run zeros there, for ever.
pub(crate) fn restart_code() -> [u8; 9] {
    let [low, high] = power_registers().reset_port.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

/// The command line with what a kernel cannot learn from the tables. What the user says goes first.
///
/// A machine without a PCI bus has no table that says so, and kernels look for one through ports: over two
/// hundred accesses, each an exit.
pub(crate) fn complete_cmdline(cmdline: &str) -> String {
    if cmdline
        .split_whitespace()
        .any(|word| word.starts_with("pci="))
    {
        return cmdline.to_owned();
    }
    format!("{cmdline} pci=off").trim_start().to_owned()
}

fn shared(device: impl BusDevice + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_word_on_pci_counts() {
        assert_eq!(complete_cmdline(""), "pci=off");
        assert_eq!(complete_cmdline("quiet"), "quiet pci=off");
        assert_eq!(complete_cmdline("pci=conf1 quiet"), "pci=conf1 quiet");
    }
}
