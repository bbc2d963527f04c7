//! The devices of a machine: the only place that names them. Each is placed on a bus, wired to its
//! interrupt and described to the guest here, and nowhere else.

mod carriers;
mod threads;
mod virtio;

use std::sync::{Arc, Mutex};

use alveole_acpi::{DeviceNode, KEYBOARD_CONTROLLER_HID, PciRoot, PowerRegisters};
use alveole_board_devices::{
    BOOT_TIMER_SIZE_BYTES, BootTimer, Generation, KEYBOARD_COMMAND_OFFSET, KEYBOARD_PORTS,
    KeyboardController, Keys, PANIC_PORTS, POWER_PORTS, PanicPort, PowerButton, PowerPorts,
    RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET, SLEEP_STATUS_OFFSET,
};
use alveole_counters::CounterSet;
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;
use alveole_io_bus::{BusBuilder, BusDevice, SharedDevice};
use alveole_saved_state::Saves;
use alveole_serial::{Console, ConsoleHandle, ConsoleWorker, UART_PORTS};
use alveole_virtio_blk::BlkHandle;
use alveole_virtio_net::NetHandle;
use alveole_virtio_vsock::VsockHandle;

use crate::build::{BuildError, Options};
use crate::layout;

pub(crate) use carriers::SharedTransport;
pub(crate) use threads::{Running, Threads};
pub(crate) use virtio::{VirtioDevices, drive_name, interface_name, try_drive, try_interface};

/// What the console adds to the system calls of a thread (`resources/seccomp/<arch>/devices.d`).
const SERIAL_SANDBOX: &str = "serial";

/// All devices of one machine, placed.
pub(crate) struct Devices {
    pub(crate) ports: BusBuilder,
    pub(crate) memory: BusBuilder,
    /// What the guest is told of them.
    pub(crate) nodes: Vec<DeviceNode>,
    pub(crate) power_button: PowerButton,
    pub(crate) keys: Keys,
    pub(crate) generation: Generation,
    pub(crate) console: ConsoleHandle,
    pub(crate) console_worker: ConsoleWorker,
    /// The event loops that host workers.
    pub(crate) threads: Threads,
    /// Counters of virtio devices.
    pub(crate) counters: Vec<Arc<dyn CounterSet + Send + Sync>>,
    /// The owner's handles on disks.
    pub(crate) disks: Vec<BlkHandle>,
    /// The owner's handles on network interfaces.
    pub(crate) interfaces: Vec<NetHandle>,
    /// The owner's handle on the socket device.
    pub(crate) vsock: Option<VsockHandle>,
    /// What the devices add to the system calls of threads.
    pub(crate) sandbox: Vec<&'static str>,
    /// What a kernel that does not read the tables' devices must be told.
    pub(crate) cmdline: Vec<String>,
    /// What a kernel that reads no tables must be told besides.
    pub(crate) cmdline_without_acpi: Vec<String>,
    /// The PCI bus, if there is one.
    pub(crate) pci: Option<PciRoot>,
    /// The owner's handles on virtio devices behind their transports, in the order of their places.
    pub(crate) transports: Vec<SharedTransport>,
    /// Other parts that have a state.
    pub(crate) parts: Vec<SharedPart>,
}

/// The owner's handle on a part that has a state.
pub(crate) type SharedPart = Arc<Mutex<dyn Saves>>;

/// Places every device.
pub(crate) fn place(
    partition: &dyn Partition,
    ram: &GuestRam,
    console: Console,
    virtio: VirtioDevices,
    options: Options,
) -> Result<Devices, BuildError> {
    let mut ports = BusBuilder::new();
    let mut memory = BusBuilder::new();
    let serial_line = partition.irq_line(layout::SERIAL_GSI)?;
    let (uart, console_worker, console) = console.into_parts(serial_line);
    let power_button = PowerButton::new(partition.irq_line(layout::POWER_BUTTON_GSI)?);

    let line = partition.irq_line(layout::GENERATION_GSI)?;
    let generation = Generation::new(line, layout::GENERATION_ID_ADDR, layout::VM_CLOCK_ADDR);

    let keyboard = KeyboardController::new(partition.irq_line(layout::KEYBOARD_GSI)?);
    let keyboard = Arc::new(Mutex::new(keyboard));
    let keys = Keys::of(&keyboard);

    let uart = Arc::new(Mutex::new(uart));
    let power = Arc::new(Mutex::new(PowerPorts::new()));

    let port = u64::from;
    ports.place(
        "serial",
        port(layout::SERIAL_PORT),
        UART_PORTS,
        uart.clone(),
    )?;
    ports.place(
        "keyboard",
        port(layout::KEYBOARD_PORT),
        KEYBOARD_PORTS,
        keyboard.clone(),
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
        power.clone(),
    )?;
    if options.boot_timer {
        let timer = shared(BootTimer::new());
        memory.place(
            "boot-timer",
            layout::BOOT_TIMER_ADDR,
            BOOT_TIMER_SIZE_BYTES,
            timer,
        )?;
    }
    let mut nodes = vec![
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
        DeviceNode {
            name: *b"KBD_",
            hid: KEYBOARD_CONTROLLER_HID,
            uid: 0,
            ports: vec![(layout::KEYBOARD_PORT, 1), (keyboard_command_port(), 1)],
            memory: Vec::new(),
            gsi: Some(layout::KEYBOARD_GSI),
        },
    ];
    let mut threads = Threads::new()?;
    let mut sandbox = vec![SERIAL_SANDBOX];
    sandbox.extend(virtio.sandbox());
    let placed = virtio.place(partition, ram, &mut threads, &mut memory, options)?;
    nodes.extend(placed.nodes);
    sandbox.extend(placed.sandbox);
    let mut parts: Vec<SharedPart> = vec![uart, keyboard, power];
    parts.extend(placed.host_bridge);
    Ok(Devices {
        ports,
        memory,
        nodes,
        power_button,
        keys,
        generation,
        console,
        console_worker,
        threads,
        counters: placed.counters,
        disks: placed.disks,
        interfaces: placed.interfaces,
        vsock: placed.vsock,
        sandbox,
        cmdline: placed.cmdline,
        cmdline_without_acpi: placed.cmdline_without_acpi,
        pci: placed.pci,
        transports: placed.transports,
        parts,
    })
}

fn keyboard_command_port() -> u16 {
    layout::KEYBOARD_PORT + u16::try_from(KEYBOARD_COMMAND_OFFSET).unwrap_or(0)
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

/// The command line with what a kernel cannot learn from the tables. What the user says goes first, and of
/// each `name=` only what the user has not said is added. Of the tables' devices it is told only by `acpi=off`:
/// a kernel that learns of a device twice finds it taken, and complains.
pub(crate) fn complete_cmdline(
    cmdline: &str,
    devices: &[String],
    without_acpi: &[String],
) -> String {
    // What follows "--" is for init, not for the kernel.
    let (kernel, init) = match cmdline.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (cmdline, None),
    };
    let is_said = |words: &str| {
        let name = words.split_inclusive('=').next().unwrap_or(words);
        kernel.split_whitespace().any(|word| word.starts_with(name))
    };
    let reads_no_tables = kernel.split_whitespace().any(|word| word == "acpi=off");
    let without_acpi = if reads_no_tables { without_acpi } else { &[] };
    let mut whole = kernel.trim_end().to_owned();
    for words in devices.iter().chain(without_acpi) {
        if !is_said(words) {
            if !whole.is_empty() {
                whole.push(' ');
            }
            whole.push_str(words);
        }
    }
    if let Some(init) = init {
        whole.push_str(" -- ");
        whole.push_str(init);
    }
    whole
}

fn shared(device: impl BusDevice + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_word_counts() {
        let words = ["root=/dev/vda ro".to_owned(), "pci=off".to_owned()];
        let devices = ["dev=a:1".to_owned(), "dev=b:2".to_owned()];
        for (said, whole) in [
            ("", "root=/dev/vda ro pci=off"),
            ("quiet", "quiet root=/dev/vda ro pci=off"),
            ("pci=conf1 quiet", "pci=conf1 quiet root=/dev/vda ro"),
            ("root=LABEL=x", "root=LABEL=x pci=off"),
            (
                "quiet -- root=a b",
                "quiet root=/dev/vda ro pci=off -- root=a b",
            ),
            // Both devices, unless the user names any.
            (
                "acpi=off",
                "acpi=off root=/dev/vda ro pci=off dev=a:1 dev=b:2",
            ),
            ("acpi=off dev=c", "acpi=off dev=c root=/dev/vda ro pci=off"),
            ("acpi=force", "acpi=force root=/dev/vda ro pci=off"),
            (
                "quiet -- acpi=off",
                "quiet root=/dev/vda ro pci=off -- acpi=off",
            ),
        ] {
            assert_eq!(complete_cmdline(said, &words, &devices), whole);
        }
    }
}
