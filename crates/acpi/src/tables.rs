//! The fixed tables and where each lies: RSDP, XSDT, FADT, MADT, MCFG if there is a PCI bus, DSDT,
//! in this order.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::{
    AcpiError, Board, DeviceNode, Generation, KEYBOARD_CONTROLLER_HID, MAX_SIZE_BYTES, Tables,
    VM_CLOCK_BYTES, dsdt,
};

const OEM: [u8; 6] = *b"ALVEOL";
const OEM_TABLE: [u8; 8] = *b"ALVEOLE ";
const OEM_REVISION: u32 = 1;

/// Length of the header of every table but the RSDP (ACPI 6.5, 5.2.6).
const HEADER_LEN: u32 = 36;
/// Every table starts on such a boundary; the RSDP must (5.2.5.1).
const ALIGN: usize = 16;
/// Length of a generation id.
const GENERATION_ID_BYTES: u64 = 16;
/// The legacy area, in which the tables must lie, ends here.
const PLACE_END: u64 = 1 << 20;

/// Where every processor has its local APIC (Intel SDM vol. 3A, 11.4.1).
const LOCAL_APIC_ADDR: u32 = 0xfee0_0000;
/// The first id that a Processor Local APIC structure cannot hold (ACPI 6.5, 5.2.12.12).
const FIRST_X2APIC_ID: u32 = 255;

/// `IAPC_BOOT_ARCH` (table 5.11). What is not said to be absent a kernel probes for; legacy devices (bit 0) are
/// absent while their bit is clear.
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

pub(crate) fn lay_out(board: &Board, at: u64) -> Result<Tables, AcpiError> {
    let madt = madt(board);
    let mcfg = mcfg(board);
    let dsdt = table(*b"DSDT", 2, &dsdt::aml(board));

    // All but the RSDP and the DSDT.
    let listed = if mcfg.is_empty() { 2 } else { 3 };
    let xsdt_at = Rsdp::len().next_multiple_of(ALIGN);
    let fadt_at = (xsdt_at + HEADER_LEN as usize + listed * 8).next_multiple_of(ALIGN);
    let madt_at = (fadt_at + FADT_LEN).next_multiple_of(ALIGN);
    let mcfg_at = (madt_at + madt.len()).next_multiple_of(ALIGN);
    let dsdt_at = (mcfg_at + mcfg.len()).next_multiple_of(ALIGN);
    let size_bytes = dsdt_at + dsdt.len();
    if size_bytes > MAX_SIZE_BYTES {
        return Err(AcpiError::TooLarge(size_bytes));
    }
    let end = at.checked_add(size_bytes as u64);
    if !at.is_multiple_of(ALIGN as u64) || end.is_none_or(|end| end > PLACE_END) {
        return Err(AcpiError::Place { at, size_bytes });
    }

    let Generation {
        id_addr,
        clock_addr,
        gsi: _,
    } = board.generation;
    for (start, length) in [(id_addr, GENERATION_ID_BYTES), (clock_addr, VM_CLOCK_BYTES)] {
        if start.saturating_add(length) > at && end.is_some_and(|end| start < end) {
            return Err(AcpiError::BadGeneration(board.generation));
        }
    }

    let addr = |offset: usize| at + offset as u64;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(addr(fadt_at));
    xsdt.add_entry(addr(madt_at));
    if !mcfg.is_empty() {
        xsdt.add_entry(addr(mcfg_at));
    }
    let parts = [
        (0, bytes_of(&Rsdp::new(OEM, addr(xsdt_at)))),
        (xsdt_at, bytes_of(&xsdt)),
        (fadt_at, fadt(board, addr(dsdt_at))),
        (madt_at, madt),
        (mcfg_at, mcfg),
        (dsdt_at, dsdt),
    ];
    let mut bytes = Vec::with_capacity(size_bytes);
    for (offset, part) in parts {
        bytes.resize(offset, 0);
        bytes.extend(part);
    }
    Ok(Tables {
        rsdp_addr: at,
        bytes,
        load_addr: at,
    })
}

/// Length of a FADT of revision 6.
const FADT_LEN: usize = 276;

/// Fixed ACPI description table (ACPI 6.5, 5.2.9).
fn fadt(board: &Board, dsdt_addr: u64) -> Vec<u8> {
    let power = board.power;
    let has_keyboard = |node: &DeviceNode| node.hid == KEYBOARD_CONTROLLER_HID;
    let keyboard = match board.nodes.iter().any(has_keyboard) {
        true => KEYBOARD_CONTROLLER,
        false => 0,
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt_addr)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        // Set means: not fixed hardware. The power button is a device; there is no sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (keyboard | NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(power.reset_port);
    fadt.reset_value = power.reset_value;
    fadt.sleep_control_reg = port(power.sleep_control_port);
    fadt.sleep_status_reg = port(power.sleep_status_port);
    bytes_of(&fadt.finalize())
}

/// A register of one byte at a port (ACPI 6.5, 5.2.3.2).
fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}

/// Multiple APIC description table (ACPI 6.5, 5.2.12). `PCAT_COMPAT` stays clear: there is no 8259. No
/// interrupt source overrides either: what is wired says its own trigger in the DSDT.
///
/// Written by hand because `acpi_tables` has no x2APIC structure.
fn madt(board: &Board) -> Vec<u8> {
    const ENABLED: u32 = 1;
    let mut body = Vec::new();
    body.extend(LOCAL_APIC_ADDR.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for &id in &board.cpu_apic_ids {
        match u8::try_from(id) {
            // 5.2.12.2: type, length, uid, id, flags.
            Ok(short) if id < FIRST_X2APIC_ID => body.extend([0, 8, short, short]),
            // 5.2.12.12: type, length, reserved, id, flags; the uid comes last.
            _ => {
                body.extend([9, 16, 0, 0]);
                body.extend(id.to_le_bytes());
            }
        }
        body.extend(ENABLED.to_le_bytes());
        if id >= FIRST_X2APIC_ID {
            body.extend(id.to_le_bytes());
        }
    }
    // 5.2.12.3: type, length, id, reserved, address, first interrupt.
    body.extend([1, 12, 0, 0]);
    body.extend(board.io_apic_addr.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    table(*b"APIC", 6, &body)
}

/// Where the configuration space of the PCI bus is (PCI Firmware Specification 3.3, 4.1.2); empty where
/// there is no bus.
fn mcfg(board: &Board) -> Vec<u8> {
    let Some(pci) = &board.pci else {
        return Vec::new();
    };
    let last_bus = u8::try_from(pci.buses.saturating_sub(1)).unwrap_or(u8::MAX);
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(pci.ecam_addr, 0, 0, last_bus);
    bytes_of(&mcfg)
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(
        signature,
        HEADER_LEN,
        revision,
        OEM,
        OEM_TABLE,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
