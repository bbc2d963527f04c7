//! The DSDT: processors, devices, the power button and what off means, as AML (ACPI 6.5, chapter 20).
//!
//! ```text
//! \_S5                 off
//! \_SB.CPUS.C000 ...   processors (ACPI0007, 8.4), in a container (ACPI0010)
//! \_SB.PWRB            power button, control method (4.8.2.2.1.2)
//! \_SB.VGEN            generation id (VM_Gen_Counter): where it lies
//! \_SB.VCLK            VMClock: where it lies
//! \_SB.GED_            turns the interrupts of button and generation into notifications (5.6.9)
//! \_SB.PCI0            root of the PCI bus (PNP0A08), if there is one
//! \_SB.ECAM            its configuration window, taken (PNP0C02)
//! \_SB.<node>          every device of the board
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, Equal, IO, If, Interrupt, Memory32Fixed,
    Method, Name, Notify, Package, Path, ResourceTemplate, Scope,
};

use crate::{Board, DeviceNode, ECAM_BUS_BYTES, PciRoot, SLEEP_TYPE_OFF, VM_CLOCK_BYTES};

/// Names below `\_SB` that no device of the board may have.
pub(crate) const OWN_NAMES: [[u8; 4]; 7] = [
    *b"CPUS", *b"PWRB", *b"VGEN", *b"VCLK", *b"GED_", *b"PCI0", *b"ECAM",
];
/// The root of the PCI bus.
pub(crate) const PCI_NAME: &str = "PCI0";

/// `Notify` value of a power button that was pressed (ACPI 6.5, table 5.166).
const BUTTON_PRESSED: u8 = 0x80;
/// `Notify` value of a generation id that is a new one (Microsoft, "Virtual Machine Generation ID"), and of a VMClock.
const GENERATION_CHANGED: u8 = 0x80;
/// Of a generation id: this monitor's own name for it, and by what drivers find it. The first of these is Microsoft's
/// and too long for ACPI (6.1.2); the second is the one of Hyper-V that is not.
const GENERATION_HID: &str = "ALVE0001";
const GENERATION_CIDS: [&str; 2] = ["VM_Gen_Counter", "VMGENCTR"];
/// Of a VMClock: the name that its driver in Linux looks for, and the one that is nobody's own.
const CLOCK_HID: &str = "AMZNC10C";
const CLOCK_CID: &str = "VMCLOCK";

/// The AML behind the table's header.
pub(crate) fn aml(board: &Board) -> Vec<u8> {
    let mut system_bus = Vec::new();
    processors(&board.cpu_apic_ids).to_aml_bytes(&mut system_bus);
    Device::new("PWRB".into(), vec![&hid("PNP0C0C"), &uid(0)]).to_aml_bytes(&mut system_bus);
    generation_id(board.generation.id_addr, &mut system_bus);
    clock(board.generation.clock_addr, &mut system_bus);
    let events: [(u32, &[&str], u8); 2] = [
        (board.power_button_gsi, &["PWRB"], BUTTON_PRESSED),
        (board.generation.gsi, &["VGEN", "VCLK"], GENERATION_CHANGED),
    ];
    event_device(events, &mut system_bus);
    if let Some(pci) = &board.pci {
        pci_root(pci, &mut system_bus);
    }
    for node in &board.nodes {
        device(node, &mut system_bus);
    }
    let mut bytes = Vec::new();
    let off = SLEEP_TYPE_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&off, &off, &0u8, &0u8])).to_aml_bytes(&mut bytes);
    bytes.extend(Scope::raw("\\_SB_".into(), system_bus));
    bytes
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn processors(apic_ids: &[u32]) -> Raw {
    let mut children = Vec::new();
    for (index, id) in apic_ids.iter().enumerate() {
        let name = Path::new(&format!("C{index:03X}"));
        Device::new(name, vec![&hid("ACPI0007"), &uid(*id)]).to_aml_bytes(&mut children);
    }
    let mut bytes = Vec::new();
    let all = Raw(children);
    Device::new("CPUS".into(), vec![&hid("ACPI0010"), &uid(0), &all]).to_aml_bytes(&mut bytes);
    Raw(bytes)
}

fn generation_id(guest_addr: u64, into: &mut Vec<u8>) {
    let [first, second] = GENERATION_CIDS;
    let compatible = Name::new("_CID".into(), &Package::new(vec![&first, &second]));
    let described = Name::new("_DDN".into(), &first);
    let low = guest_addr & u64::from(u32::MAX);
    let high = guest_addr >> 32;
    let addr = Name::new("ADDR".into(), &Package::new(vec![&low, &high]));
    Device::new(
        "VGEN".into(),
        vec![
            &hid(GENERATION_HID),
            &compatible,
            &described,
            &uid(0),
            &addr,
        ],
    )
    .to_aml_bytes(into);
}

fn clock(guest_addr: u64, into: &mut Vec<u8>) {
    let compatible = Name::new("_CID".into(), &CLOCK_CID);
    let described = Name::new("_DDN".into(), &CLOCK_CID);
    let page = memory_range(guest_addr, VM_CLOCK_BYTES);
    let page = resources(vec![page.as_ref()]);
    Device::new(
        "VCLK".into(),
        vec![&hid(CLOCK_HID), &compatible, &described, &uid(0), &page],
    )
    .to_aml_bytes(into);
}

/// The generic event device: an interrupt, the devices that it is about, and what they are notified of.
fn event_device(events: [(u32, &[&str], u8); 2], into: &mut Vec<u8>) {
    let lines = events.map(|(gsi, ..)| interrupt(gsi));
    let lines = resources(lines.iter().map(|line| line as &dyn Aml).collect());
    let mut body = Vec::new();
    for (gsi, devices, value) in events {
        let mut notify = Vec::new();
        for device in devices {
            Notify::new(&Path::new(device), &value).to_aml_bytes(&mut notify);
        }
        let is_it = Equal::new(&Arg(0), &gsi);
        If::new(&is_it, vec![&Raw(notify)]).to_aml_bytes(&mut body);
    }
    let body = Raw(body);
    let event = Method::new("_EVT".into(), 1, true, vec![&body]);
    Device::new(
        "GED_".into(),
        vec![&hid("ACPI0013"), &uid(0), &lines, &event],
    )
    .to_aml_bytes(into);
}

/// The root bridge, and the area that must be taken for Linux to use the MCFG table's window
/// (arch/x86/pci/mmconfig-shared.c; PCI Firmware Specification 3.3, 4.1.2).
///
/// No `_OSC`: nothing is granted, because there is nothing to control (no hot-plug, no ports, no errors).
/// No `_PRT`: no function has an interrupt pin.
fn pci_root(pci: &PciRoot, into: &mut Vec<u8>) {
    let last_bus = pci.buses.saturating_sub(1);
    let mut all: Vec<Box<dyn Aml>> = vec![Box::new(AddressSpace::new_bus_number(0u16, last_bus))];
    for &(start, size) in &pci.windows {
        all.push(window(start, size));
    }
    let all = resources(all.iter().map(Box::as_ref).collect());
    let compatible = Name::new("_CID".into(), &"PNP0A03");
    let segment = Name::new("_SEG".into(), &0u8);
    let first_bus = Name::new("_BBN".into(), &0u8);
    let ecam = Name::new("_CBA".into(), &pci.ecam_addr);
    Device::new(
        PCI_NAME.into(),
        vec![
            &hid("PNP0A08"),
            &compatible,
            &uid(0),
            &segment,
            &first_bus,
            &ecam,
            &all,
        ],
    )
    .to_aml_bytes(into);
    let ecam_bytes = u64::from(pci.buses).saturating_mul(ECAM_BUS_BYTES);
    let taken = memory_range(pci.ecam_addr, ecam_bytes);
    let taken = resources(vec![taken.as_ref()]);
    Device::new("ECAM".into(), vec![&hid("PNP0C02"), &uid(0), &taken]).to_aml_bytes(into);
}

fn device(node: &DeviceNode, into: &mut Vec<u8>) {
    let ports = node
        .ports
        .iter()
        .map(|&(start, count)| -> Box<dyn Aml> { Box::new(IO::new(start, start, 1, count)) });
    let memory = node
        .memory
        .iter()
        .map(|&(start, size)| memory_range(start, size));
    let line = node
        .gsi
        .iter()
        .map(|&gsi| -> Box<dyn Aml> { Box::new(interrupt(gsi)) });
    let all: Vec<Box<dyn Aml>> = ports.chain(memory).chain(line).collect();
    let all = resources(all.iter().map(Box::as_ref).collect());
    let name = Path::new(&String::from_utf8_lossy(&node.name));
    Device::new(name, vec![&hid(node.hid), &uid(node.uid), &all]).to_aml_bytes(into);
}

fn hid(id: &'static str) -> Name {
    Name::new("_HID".into(), &id)
}

fn uid(id: u32) -> Name {
    Name::new("_UID".into(), &id)
}

fn resources(all: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(all))
}

/// Edge-triggered, active high, not shared: what an irqfd without resampling can be.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn memory_range(start: u64, size: u64) -> Box<dyn Aml> {
    match (u32::try_from(start), u32::try_from(size)) {
        (Ok(start), Ok(size)) => Box::new(Memory32Fixed::new(true, start, size)),
        _ => window(start, size),
    }
}

fn window(start: u64, size: u64) -> Box<dyn Aml> {
    Box::new(AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        start,
        // `check` has seen that the range is not empty and does not wrap.
        start.saturating_add(size.saturating_sub(1)),
        None,
    ))
}
