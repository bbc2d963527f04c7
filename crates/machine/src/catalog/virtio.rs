//! The virtio devices of a machine, and what carries them.

use std::sync::{Arc, Mutex};

use alveole_acpi::DeviceNode;
use alveole_block_store::Cache;
use alveole_counters::CounterSet;
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::{DoorbellValue, Partition};
use alveole_interrupts::Doorbell;
use alveole_io_bus::BusBuilder;
use alveole_virtio::{Hosting, Signals, TransportCore, VirtioDevice};
use alveole_virtio_blk::{BlkConfig, BlkHandle, VirtioBlk};
use alveole_virtio_mmio::{MmioTransport, NOTIFY_OFFSET, SIZE_BYTES};
use alveole_virtio_rng::VirtioRng;

use crate::build::{BuildError, Options};
use crate::catalog::Threads;
use crate::resources::ResourceError;
use crate::validate::ValidDrive;
use crate::{ValidConfig, layout};

/// What disks and the entropy device add to the system calls of threads.
const BLOCK_SANDBOX: &str = "virtio-block";
const RNG_SANDBOX: &str = "virtio-rng";

/// The virtio devices of a machine, with everything that they need of the host open, and not yet placed.
pub(crate) struct VirtioDevices {
    disks: Vec<Disk>,
    rng: Option<VirtioRng>,
}

struct Disk {
    device: VirtioBlk,
    name: String,
    queues: usize,
    root: Option<String>,
}

/// What came of placing them.
pub(crate) struct Placed {
    pub(crate) nodes: Vec<DeviceNode>,
    pub(crate) counters: Vec<Arc<dyn CounterSet + Send + Sync>>,
    pub(crate) disks: Vec<BlkHandle>,
    pub(crate) cmdline: Vec<String>,
}

impl VirtioDevices {
    /// Opens what the devices of `config` need.
    pub(crate) fn open(config: &ValidConfig) -> Result<Self, ResourceError> {
        let disks = config.drives.iter().map(open_disk);
        let rng = config.entropy.map(VirtioRng::new).transpose();
        Ok(Self {
            disks: disks.collect::<Result<_, _>>()?,
            rng: rng.map_err(ResourceError::Entropy)?,
        })
    }

    /// What the devices add to the system calls of threads.
    pub(crate) fn sandbox(&self) -> Vec<&'static str> {
        let block = (!self.disks.is_empty()).then_some(BLOCK_SANDBOX);
        let rng = self.rng.as_ref().map(|_| RNG_SANDBOX);
        block.into_iter().chain(rng).collect()
    }

    /// Gives each device its place in the guest.
    pub(crate) fn place(
        self,
        partition: &dyn Partition,
        ram: &GuestRam,
        threads: &mut Threads,
        memory: &mut BusBuilder,
        options: Options,
    ) -> Result<Placed, BuildError> {
        let mut placed = Placed {
            nodes: Vec::new(),
            counters: Vec::new(),
            disks: Vec::new(),
            cmdline: Vec::new(),
        };
        let mut slots = MmioSlots { next: 0 };
        for disk in self.disks {
            let handle = disk.device.handle();
            placed.counters.push(handle.counters().clone());
            placed.disks.push(handle);
            placed.cmdline.extend(disk.root);
            let hosting = threads.for_disk(&disk.name, disk.queues, options.disk_threads)?;
            let node = slots.carry(Box::new(disk.device), partition, ram, hosting, memory)?;
            placed.nodes.push(node);
        }
        if let Some(rng) = self.rng {
            placed.counters.push(rng.counters().clone());
            let node = slots.carry(Box::new(rng), partition, ram, threads.shared(), memory)?;
            placed.nodes.push(node);
        }
        Ok(placed)
    }
}

fn open_disk(drive: &ValidDrive) -> Result<Disk, ResourceError> {
    let store = alveole_block_store::open(&drive.path, &drive.open).map_err(|source| {
        ResourceError::Drive {
            id: drive.id.clone(),
            source,
        }
    })?;
    let config = BlkConfig {
        queues: drive.queues,
        cache: drive.open.cache,
        limits: drive.limits,
        ..BlkConfig::new(&format!("drive {}", drive.id))
    };
    log::info!(
        "drive {}: {} by {}{}",
        drive.id,
        drive.path.display(),
        store.engine_name(),
        if drive.open.cache == Cache::Unsafe {
            ", flushes ignored"
        } else {
            ""
        }
    );
    Ok(Disk {
        device: VirtioBlk::new(&config, store)?,
        name: drive.id.clone(),
        queues: usize::from(drive.queues),
        root: drive.root.clone(),
    })
}

/// Register blocks and interrupts, one after the other.
struct MmioSlots {
    next: u32,
}

impl MmioSlots {
    fn carry(
        &mut self,
        device: Box<dyn VirtioDevice>,
        partition: &dyn Partition,
        ram: &GuestRam,
        hosting: Hosting,
        memory: &mut BusBuilder,
    ) -> Result<DeviceNode, BuildError> {
        let slot = self.next;
        self.next += 1;
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
        memory.place(identity.name, addr, SIZE_BYTES, shared)?;
        let [a, b] = [slot / 10, slot % 10].map(|digit| b'0' + u8::try_from(digit).unwrap_or(0));
        Ok(DeviceNode {
            name: [b'V', b'I', a, b],
            hid: "LNRO0005",
            uid: slot,
            ports: Vec::new(),
            memory: vec![(addr, SIZE_BYTES)],
            gsi: Some(gsi),
        })
    }
}
