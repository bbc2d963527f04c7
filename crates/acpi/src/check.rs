//! Refuses a board that cannot be said in ACPI, before anything is written.

use std::collections::HashSet;

use crate::{
    AcpiError, Board, DeviceNode, ECAM_BUS_BYTES, MAX_CPUS, PciRoot, VM_CLOCK_BYTES, dsdt,
};

pub(crate) fn check(board: &Board) -> Result<(), AcpiError> {
    let cpus = board.cpu_apic_ids.len();
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(AcpiError::CpuCount(cpus));
    }
    let mut ids = HashSet::new();
    if let Some(twice) = board.cpu_apic_ids.iter().find(|id| !ids.insert(**id)) {
        return Err(AcpiError::SameApicId(*twice));
    }
    let generation = board.generation;
    if !generation.id_addr.is_multiple_of(8)
        || !generation.clock_addr.is_multiple_of(VM_CLOCK_BYTES)
        || generation.gsi == board.power_button_gsi
    {
        return Err(AcpiError::BadGeneration(generation));
    }
    if let Some(pci) = &board.pci {
        check_pci(pci)?;
    }
    let mut names: HashSet<[u8; 4]> = dsdt::OWN_NAMES.into_iter().collect();
    for node in &board.nodes {
        check_node(node)?;
        if !names.insert(node.name) {
            return Err(AcpiError::SameName {
                name: name_of(node),
                hid: node.hid,
            });
        }
    }
    Ok(())
}

fn check_node(node: &DeviceNode) -> Result<(), AcpiError> {
    let lead = |c: &u8| c.is_ascii_uppercase() || *c == b'_';
    let rest = |c: &u8| lead(c) || c.is_ascii_digit();
    if !lead(&node.name[0]) || !node.name.iter().all(rest) {
        return Err(AcpiError::BadName {
            name: name_of(node),
        });
    }
    let id_char = |c: u8| c.is_ascii_uppercase() || c.is_ascii_digit();
    if !matches!(node.hid.len(), 7 | 8) || !node.hid.bytes().all(id_char) {
        return Err(AcpiError::BadHid {
            name: name_of(node),
            hid: node.hid,
        });
    }
    let ports = node.ports.iter().map(|&(start, size)| {
        (
            "port",
            u64::from(start),
            u64::from(size),
            u64::from(u16::MAX),
        )
    });
    let memory = node
        .memory
        .iter()
        .map(|&(start, size)| ("memory", start, size, u64::MAX));
    for (space, start, size, last) in ports.chain(memory) {
        if last_of(start, size).is_none_or(|end| end > last) {
            return Err(AcpiError::BadRange {
                name: name_of(node),
                space,
                start,
                size,
            });
        }
    }
    Ok(())
}

fn check_pci(pci: &PciRoot) -> Result<(), AcpiError> {
    let ecam_bytes = u64::from(pci.buses).saturating_mul(ECAM_BUS_BYTES);
    if !(1..=256).contains(&pci.buses)
        || !pci.ecam_addr.is_multiple_of(ECAM_BUS_BYTES)
        || last_of(pci.ecam_addr, ecam_bytes).is_none()
        || pci.windows.is_empty()
    {
        return Err(AcpiError::BadPci {
            ecam_addr: pci.ecam_addr,
            buses: pci.buses,
        });
    }
    for &(start, size) in &pci.windows {
        if last_of(start, size).is_none() {
            return Err(AcpiError::BadRange {
                name: dsdt::PCI_NAME.into(),
                space: "memory",
                start,
                size,
            });
        }
    }
    Ok(())
}

/// The last address of a range; none where it is empty or wraps.
fn last_of(start: u64, size: u64) -> Option<u64> {
    size.checked_sub(1).and_then(|span| start.checked_add(span))
}

fn name_of(node: &DeviceNode) -> String {
    node.name.escape_ascii().to_string()
}
