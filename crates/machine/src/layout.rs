//! Where things lie in the guest: ports, physical addresses and interrupt numbers that are the machine's
//! choice. What the boot loader chooses stands in `alveole_boot_loader`'s layout.
//!
//! | address space | range | what |
//! |---|---|---|
//! | ports | 0x60, 0x64 | keyboard controller |
//! | ports | 0x3f8-0x3ff | serial port |
//! | ports | 0x505 | panic port (pvpanic) |
//! | ports | 0x600-0x602 | power: sleep control, sleep status, reset |
//! | memory | 0xf_0000, 0xf_1000 | generation id, VMClock |
//! | memory | 0xf_fff0 | what a restart through the firmware runs |
//! | memory | 0xc000_0000 | boot timer (as Firecracker's), only when asked for |
//! | memory | 0xc000_1000-0xc001_2fff | virtio devices, a page each; or none, with PCI: |
//! | memory | 0xd000_0000-0xd00f_ffff | the PCI bus's configuration window |
//! | memory | 0xd100_0000-0xd1ff_ffff | BARs |
//! | memory | 0xfec0_0000, 0xfee0_0000 | I/O APIC, local APICs (the hypervisor's) |
//! | GSI | 1, 3, 4, 5 | keyboard controller, generation, serial port, power button |
//! | GSI | 6-23 | virtio devices, one each |

/// First port of the serial port (COM1).
pub(crate) const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt, as on every PC.
pub(crate) const SERIAL_GSI: u32 = 4;
/// First port of the keyboard controller; the command port is four further on.
pub(crate) const KEYBOARD_PORT: u16 = 0x60;
/// Its interrupt, as on every PC.
pub(crate) const KEYBOARD_GSI: u32 = 1;
/// The panic port, where QEMU has it.
pub(crate) const PANIC_PORT: u16 = 0x505;
/// First of the power ports.
pub(crate) const POWER_PORT: u16 = 0x600;
/// Interrupt of the power button.
pub(crate) const POWER_BUTTON_GSI: u32 = 5;
/// The boot timer; the first address behind low RAM.
pub(crate) const BOOT_TIMER_ADDR: u64 = 0xc000_0000;
/// The I/O APIC, where the hypervisor puts it.
pub(crate) const IO_APIC_ADDR: u32 = 0xfec0_0000;
/// The ACPI tables: in the area that PCs keep for firmware and that is never RAM for the kernel.
pub(crate) const ACPI_ADDR: u64 = 0xe_0000;
/// The generation id, in a page of its own behind the tables: a guest may map it in another way than the rest.
pub(crate) const GENERATION_ID_ADDR: u64 = 0xf_0000;
/// The VMClock, in a page of its own, which programs of the guest may map.
pub(crate) const VM_CLOCK_ADDR: u64 = 0xf_1000;
/// Interrupt that says that both are new ones.
pub(crate) const GENERATION_GSI: u32 = 3;
/// Where a processor goes that restarts through the firmware in real mode (ffff:0000).
pub(crate) const RESTART_ADDR: u64 = 0xf_fff0;
/// The register block of the first virtio device; the others follow.
pub(crate) const VIRTIO_MMIO_ADDR: u64 = 0xc000_1000;
/// Interrupt of the first virtio device; the others follow.
pub(crate) const VIRTIO_MMIO_GSI: u32 = 6;
/// The last interrupt of the I/O APIC, and so the last virtio device.
pub(crate) const LAST_GSI: u32 = 23;
/// The configuration window (ECAM) of the PCI bus.
pub(crate) const ECAM_ADDR: u64 = 0xd000_0000;
/// Where BARs lie: room for 512 devices, of which a bus has 32.
pub(crate) const BARS_ADDR: u64 = 0xd100_0000;
/// Length of that window.
pub(crate) const BARS_BYTES: u64 = 16 << 20;

// Generation id and VMClock have pages of the firmware area for themselves, which the memory map keeps from the guest.
const _: () = {
    use alveole_acpi::MAX_SIZE_BYTES;
    use alveole_boot_loader::layout::{FIRMWARE_AREA_START, HIGH_RAM_START};
    use alveole_guest_memory::PAGE_SIZE;
    assert!(GENERATION_ID_ADDR.is_multiple_of(PAGE_SIZE));
    assert!(VM_CLOCK_ADDR.is_multiple_of(PAGE_SIZE));
    assert!(alveole_board_devices::VM_CLOCK_BYTES == alveole_acpi::VM_CLOCK_BYTES);
    assert!(ACPI_ADDR == FIRMWARE_AREA_START);
    assert!(GENERATION_ID_ADDR >= ACPI_ADDR + MAX_SIZE_BYTES as u64);
    assert!(VM_CLOCK_ADDR >= GENERATION_ID_ADDR + PAGE_SIZE);
    assert!(VM_CLOCK_ADDR + PAGE_SIZE <= RESTART_ADDR);
    assert!(RESTART_ADDR < HIGH_RAM_START);
};
