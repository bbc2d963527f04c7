//! What carries virtio devices: register blocks in memory, or functions of a PCI bus.

use std::sync::{Arc, Mutex};

use alveole_acpi::{DeviceNode, PciRoot};
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::{DoorbellValue, Partition};
use alveole_interrupts::Doorbell;
use alveole_io_bus::BusBuilder;
use alveole_pci::{ECAM_BYTES, RootBus};
use alveole_virtio::{Hosting, Signals, TransportControl, TransportCore, VirtioDevice};
use alveole_virtio_mmio::{MmioTransport, NOTIFY_OFFSET, SIZE_BYTES};
use alveole_virtio_pci::{BAR_BYTES, PciTransport, notify_offset};

use crate::build::{BuildError, Transport};
use crate::catalog::SharedPart;
use crate::layout;

/// What a PCI bus adds to the system calls of a processor's thread, which connects messages.
const PCI_SANDBOX: &str = "pci";

/// The owner's handle on a device behind its transport, whichever that is.
pub(crate) type SharedTransport = Arc<Mutex<dyn TransportControl>>;

/// Gives virtio devices their places, one after the other.
pub(super) struct Carrier {
    kind: Kind,
    transports: Vec<SharedTransport>,
}

enum Kind {
    Mmio {
        next: u32,
        nodes: Vec<DeviceNode>,
        words: Vec<String>,
    },
    Pci {
        next: u8,
        bus: RootBus,
    },
}

/// What the guest and the threads are told of the carrier.
#[derive(Default)]
pub(super) struct Carried {
    pub(super) nodes: Vec<DeviceNode>,
    pub(super) pci: Option<PciRoot>,
    pub(super) sandbox: Option<&'static str>,
    /// A word for the kernel's command line.
    pub(super) cmdline: &'static str,
    /// Words for a kernel that reads no tables.
    pub(super) cmdline_without_acpi: Vec<String>,
    /// In the order in which devices were placed.
    pub(super) transports: Vec<SharedTransport>,
    /// The PCI bus's own state.
    pub(super) host_bridge: Option<SharedPart>,
}

impl Carrier {
    pub(super) fn new(kind: Transport) -> Self {
        let kind = match kind {
            Transport::Mmio => Kind::Mmio {
                next: 0,
                nodes: Vec::new(),
                words: Vec::new(),
            },
            Transport::Pci => Kind::Pci {
                // The host bridge is the first.
                next: 1,
                bus: RootBus::new(),
            },
        };
        Self {
            kind,
            transports: Vec::new(),
        }
    }

    pub(super) fn carry(
        &mut self,
        device: Box<dyn VirtioDevice>,
        partition: &dyn Partition,
        ram: &GuestRam,
        hosting: Hosting,
        memory: &mut BusBuilder,
    ) -> Result<(), BuildError> {
        let transport = match &mut self.kind {
            Kind::Mmio { next, nodes, words } => {
                let slot = *next;
                *next += 1;
                let (node, transport) = by_mmio(slot, device, partition, ram, hosting, memory)?;
                words.extend(mmio_word(&node));
                nodes.push(node);
                transport
            }
            Kind::Pci { next, bus } => {
                let slot = *next;
                *next += 1;
                by_pci(slot, bus, device, partition, ram, hosting, memory)?
            }
        };
        self.transports.push(transport);
        Ok(())
    }

    /// Ends placing.
    pub(super) fn finish(self, memory: &mut BusBuilder) -> Result<Carried, BuildError> {
        let transports = self.transports;
        match self.kind {
            // A machine without a PCI bus has no table that says so, and kernels look for one through
            // ports: over two hundred accesses, each an exit.
            Kind::Mmio { nodes, words, .. } => Ok(Carried {
                nodes,
                transports,
                cmdline_without_acpi: words,
                cmdline: "pci=off",
                ..Carried::default()
            }),
            Kind::Pci { bus, .. } => {
                let shared = Arc::new(Mutex::new(bus));
                memory.place("pci", layout::ECAM_ADDR, ECAM_BYTES, shared.clone())?;
                Ok(Carried {
                    transports,
                    host_bridge: Some(shared),
                    pci: Some(PciRoot {
                        ecam_addr: layout::ECAM_ADDR,
                        buses: 1,
                        windows: vec![(layout::BARS_ADDR, layout::BARS_BYTES)],
                    }),
                    sandbox: Some(PCI_SANDBOX),
                    // Without looking for it through ports first, where it is not.
                    cmdline: "pci=noearly",
                    ..Carried::default()
                })
            }
        }
    }
}

fn by_mmio(
    slot: u32,
    device: Box<dyn VirtioDevice>,
    partition: &dyn Partition,
    ram: &GuestRam,
    hosting: Hosting,
    memory: &mut BusBuilder,
) -> Result<(DeviceNode, SharedTransport), BuildError> {
    let addr = layout::VIRTIO_MMIO_ADDR + u64::from(slot) * SIZE_BYTES;
    let gsi = layout::VIRTIO_MMIO_GSI + slot;
    if gsi > layout::LAST_GSI {
        return Err(BuildError::TooManyDevices);
    }
    let identity = device.identity();
    let doorbells = (0u32..)
        .zip(&identity.queue_sizes)
        .map(|(queue, _)| partition.doorbell(addr + NOTIFY_OFFSET, DoorbellValue::Word(queue)))
        .collect::<Result<Vec<Doorbell>, _>>()?;
    let line = partition.irq_line(gsi)?;
    let transport = MmioTransport::new(line, |wires| {
        TransportCore::new(device, ram.clone(), doorbells, Signals::new(wires), hosting)
    });
    let shared = Arc::new(Mutex::new(transport));
    memory.place(identity.name, addr, SIZE_BYTES, shared.clone())?;
    let [a, b] = [slot / 10, slot % 10].map(|digit| b'0' + u8::try_from(digit).unwrap_or(0));
    let node = DeviceNode {
        name: [b'V', b'I', a, b],
        hid: "LNRO0005",
        uid: slot,
        ports: Vec::new(),
        memory: vec![(addr, SIZE_BYTES)],
        gsi: Some(gsi),
    };
    Ok((node, shared))
}

/// How Linux is told of a register block that it does not find in a table: length, address, interrupt (its
/// drivers/virtio/virtio_mmio.c, if built with `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`).
fn mmio_word(node: &DeviceNode) -> Option<String> {
    let ((addr, len), gsi) = (node.memory.first()?, node.gsi?);
    Some(format!("virtio_mmio.device={len:#x}@{addr:#x}:{gsi}"))
}

fn by_pci(
    slot: u8,
    bus: &mut RootBus,
    device: Box<dyn VirtioDevice>,
    partition: &dyn Partition,
    ram: &GuestRam,
    hosting: Hosting,
    memory: &mut BusBuilder,
) -> Result<SharedTransport, BuildError> {
    let addr = layout::BARS_ADDR + u64::from(slot) * BAR_BYTES;
    if addr + BAR_BYTES > layout::BARS_ADDR + layout::BARS_BYTES {
        return Err(BuildError::TooManyDevices);
    }
    let identity = device.identity();
    let doorbells = (0u16..)
        .zip(&identity.queue_sizes)
        .map(|(queue, _)| partition.doorbell(addr + notify_offset(queue), DoorbellValue::Any))
        .collect::<Result<Vec<Doorbell>, _>>()?;
    // One for each queue, one for the configuration.
    let vectors = (0..=identity.queue_sizes.len())
        .map(|_| partition.msi_vector())
        .collect::<Result<Vec<_>, _>>()?;
    let transport = PciTransport::new(addr, vectors, |wires| {
        TransportCore::new(device, ram.clone(), doorbells, Signals::new(wires), hosting)
    })?;
    let shared = Arc::new(Mutex::new(transport));
    bus.place(slot, shared.clone())
        .map_err(|_| BuildError::TooManyDevices)?;
    memory.place(identity.name, addr, BAR_BYTES, shared.clone())?;
    Ok(shared)
}
