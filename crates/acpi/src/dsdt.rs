//! The DSDT: processors, devices, the power button and what off means, as AML (ACPI 6.5, chapter 20).
//!
//! ```text
//! \_S5                 off
//! \_SB.CPUS.C000 ...   processors (ACPI0007, 8.4), in a container (ACPI0010)
//! \_SB.PWRB            power button, control method (4.8.2.2.1.2)
//! \_SB.GED_            turns the button's interrupt into a notification (5.6.9)
//! \_SB.<node>          every device of the board
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, Equal, IO, If, Interrupt, Memory32Fixed,
    Method, Name, Notify, Package, Path, ResourceTemplate, Scope,
};

use crate::{Board, DeviceNode, SLEEP_TYPE_OFF};

/// Names below `\_SB` that no device of the board may have.
pub(crate) const OWN_NAMES: [[u8; 4]; 3] = [*b"CPUS", *b"PWRB", *b"GED_"];

/// `Notify` value of a power button that was pressed (ACPI 6.5, table 5.166).
const BUTTON_PRESSED: u8 = 0x80;

/// The AML behind the table's header.
pub(crate) fn aml(board: &Board) -> Vec<u8> {
    let mut system_bus = Vec::new();
    processors(&board.cpu_apic_ids).to_aml_bytes(&mut system_bus);
    power_button(board.power_button_gsi, &mut system_bus);
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

fn power_button(gsi: u32, into: &mut Vec<u8>) {
    Device::new("PWRB".into(), vec![&hid("PNP0C0C"), &uid(0)]).to_aml_bytes(into);
    let line = interrupt(gsi);
    let lines = resources(vec![&line]);
    let button = Path::new("PWRB");
    let press = Notify::new(&button, &BUTTON_PRESSED);
    let is_button = Equal::new(&Arg(0), &gsi);
    let on_button = If::new(&is_button, vec![&press]);
    let event = Method::new("_EVT".into(), 1, true, vec![&on_button]);
    Device::new(
        "GED_".into(),
        vec![&hid("ACPI0013"), &uid(0), &lines, &event],
    )
    .to_aml_bytes(into);
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
        // `check` has seen that the range is not empty and does not wrap.
        _ => Box::new(AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            start,
            start.saturating_add(size.saturating_sub(1)),
            None,
        )),
    }
}
