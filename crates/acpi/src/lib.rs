//! Describes a board to the guest as ACPI tables: a description goes in, bytes come out.
//!
//! The model is hardware-reduced ACPI (ACPI 6.5, 4.1): no fixed event hardware, no 8259, no timer. What
//! the guest needs to know beyond processors and the I/O APIC stands in the DSDT as devices, and events
//! come through one Generic Event Device.
//!
//! Deliberately does not know: guest memory, the hypervisor, which devices exist, what a kernel is.

mod check;
mod dsdt;
mod mp_table;
mod tables;

#[cfg(test)]
mod tests;

pub use mp_table::{MP_TABLE_ADDR, mp_table};

/// The sleep type that switches the machine off: what `\_S5` gives and the guest writes to the sleep
/// control register.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Hardware id of a PC's keyboard controller. A board that has such a node says so in the FADT, too: kernels look there first.
pub const KEYBOARD_CONTROLLER_HID: &str = "PNP0303";
/// Most bytes that [`build`] gives: what the firmware area of a PC holds from 0xe0000 on takes twice that.
pub const MAX_SIZE_BYTES: usize = 64 << 10;
/// Most processors that can be described; more would not fit in [`MAX_SIZE_BYTES`].
pub const MAX_CPUS: usize = 1024;

/// Bytes of a VMClock: a page, as programs map it.
pub const VM_CLOCK_BYTES: u64 = 4096;

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct Board {
    /// Local APIC id of every processor, the boot processor first. The id is also the `_UID`.
    pub cpu_apic_ids: Vec<u32>,
    /// Address of the I/O APIC, which takes the interrupts from 0 on.
    pub io_apic_addr: u32,
    /// How the guest switches off and resets.
    pub power: PowerRegisters,
    /// Interrupt of the power button, edge-triggered.
    pub power_button_gsi: u32,
    /// How the guest learns that it goes on as another machine.
    pub generation: Generation,
    /// The PCI bus, if there is one.
    pub pci: Option<PciRoot>,
    /// Devices that the guest cannot find by itself.
    pub nodes: Vec<DeviceNode>,
}

/// A PCI Express root: segment 0, whose buses are counted from 0.
///
/// There is no interrupt routing: its functions have no pins and signal by messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciRoot {
    /// First address of the configuration window (ECAM), a multiple of [`ECAM_BUS_BYTES`].
    pub ecam_addr: u64,
    /// Number of buses in the window, 1 to 256.
    pub buses: u16,
    /// Where BARs may lie: first address, length in bytes.
    pub windows: Vec<(u64, u64)>,
}

/// Bytes of configuration window for each bus (PCI Express Base 5.0, 7.2.2).
pub const ECAM_BUS_BYTES: u64 = 1 << 20;

/// A generation id (Microsoft, "Virtual Machine Generation ID", 2012), and a VMClock (Linux include/uapi/linux/vmclock-abi.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation {
    /// Where the id's 16 bytes lie: a multiple of 8, in memory that the guest does not use.
    pub id_addr: u64,
    /// Where the VMClock's page of [`VM_CLOCK_BYTES`] lies: a multiple of that, in memory that the guest does not use.
    pub clock_addr: u64,
    /// The interrupt that says that both are new ones: edge-triggered, nobody else's.
    pub gsi: u32,
}

/// One-byte ports for sleep (ACPI 6.5, 4.8.3.7) and reset (4.8.3.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerRegisters {
    /// Takes the sleep type and the enable bit.
    pub sleep_control_port: u16,
    /// Says that the machine woke.
    pub sleep_status_port: u16,
    /// Resets the machine.
    pub reset_port: u16,
    /// What is to be written there.
    pub reset_value: u8,
}

/// One device in the DSDT, directly below `\_SB`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    /// Its name segment: four of `A-Z 0-9 _`, no digit first (ACPI 6.5, 5.3).
    pub name: [u8; 4],
    /// Hardware id: seven or eight of `A-Z 0-9` (ACPI 6.5, 6.1.5).
    pub hid: &'static str,
    /// Tells devices of one hardware id apart.
    pub uid: u32,
    /// Port ranges: first port, number of ports.
    pub ports: Vec<(u16, u8)>,
    /// Memory ranges: first address, length in bytes.
    pub memory: Vec<(u64, u64)>,
    /// Its interrupt: edge-triggered, active high, not shared.
    pub gsi: Option<u32>,
}

/// Finished tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Where the guest finds the root pointer (RSDP).
    pub rsdp_addr: u64,
    /// All tables, one after the other.
    pub bytes: Vec<u8>,
    /// Where the bytes are to lie.
    pub load_addr: u64,
}

/// Why a board cannot be described.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcpiError {
    /// The tables would lie where no kernel looks for them or keeps them.
    #[error(
        "cannot place ACPI tables of {size_bytes} bytes at {at:#x}: give a multiple of 16 so that they end below 1 MiB"
    )]
    Place {
        /// Where they were to lie.
        at: u64,
        /// Their length.
        size_bytes: usize,
    },
    /// Too much to describe.
    #[error(
        "cannot describe the board: its ACPI tables take {0} bytes, at most {MAX_SIZE_BYTES} fit; give it fewer processors or devices"
    )]
    TooLarge(usize),
    /// No processor, or more than can be named.
    #[error("cannot describe a board of {0} processors: give it 1 to {MAX_CPUS}")]
    CpuCount(usize),
    /// Two processors are one.
    #[error("cannot describe the board: two processors have the local APIC id {0}")]
    SameApicId(u32),
    /// A name that ACPI does not allow.
    #[error(
        "cannot describe device {name:?}: a name is four of A-Z, 0-9 and _ and does not start with a digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// A name that is taken.
    #[error("cannot describe device {name:?} ({hid}): the name is taken")]
    SameName {
        /// The name.
        name: String,
        /// Hardware id of the device that comes second.
        hid: &'static str,
    },
    /// A hardware id that ACPI does not allow.
    #[error(
        "cannot describe device {name:?}: its hardware id {hid:?} is not seven or eight of A-Z and 0-9"
    )]
    BadHid {
        /// Name of the device.
        name: String,
        /// The id.
        hid: &'static str,
    },
    /// A generation id or a VMClock that no guest would find, or hear of.
    #[error(
        "cannot describe the generation id at {:#x} and the VMClock at {:#x}, interrupt {}: give addresses that are multiples of 8 and of \
         {VM_CLOCK_BYTES}, behind the tables or before them, and an interrupt that is not the power button's", .0.id_addr, .0.clock_addr, .0.gsi
    )]
    BadGeneration(Generation),
    /// A bus whose configuration window or whose windows for BARs cannot be.
    #[error(
        "cannot describe the PCI bus: {buses} buses at {ecam_addr:#x}; give 1 to 256 buses on a multiple of {ECAM_BUS_BYTES:#x}, and a window for BARs"
    )]
    BadPci {
        /// First address of the configuration window.
        ecam_addr: u64,
        /// Number of buses.
        buses: u16,
    },
    /// An empty range, or one that passes the end of its address space.
    #[error(
        "cannot describe device {name:?}: its {space} range {start:#x}+{size:#x} is empty or passes the end of the address space"
    )]
    BadRange {
        /// Name of the device.
        name: String,
        /// `port` or `memory`.
        space: &'static str,
        /// First port or address.
        start: u64,
        /// Length.
        size: u64,
    },
}

/// Describes `board` in tables that are to lie at `at`.
///
/// # Errors
/// The board has no processors or too many, a device is described wrongly, or the tables do not fit
/// between `at` and 1 MiB.
pub fn build(board: &Board, at: u64) -> Result<Tables, AcpiError> {
    check::check(board)?;
    tables::lay_out(board, at)
}
