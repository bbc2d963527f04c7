//! Step 3: every device is on its bus.

use alveole_event_loop::Worker;
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;
use alveole_serial::Console;

use crate::build::memory::WithPartition;
use crate::build::{BuildError, Options};
use crate::catalog::{self, Devices, VirtioDevices};

/// Every device is on its bus.
pub(super) struct WithDevices {
    pub(super) ram: GuestRam,
    pub(super) partition: Box<dyn Partition>,
    pub(super) devices: Devices,
}

impl WithPartition {
    pub(super) fn place_devices(
        self,
        console: Console,
        virtio: VirtioDevices,
        options: Options,
    ) -> Result<WithDevices, BuildError> {
        let Self { ram, partition } = self;
        let devices = catalog::place(partition.as_ref(), &ram, console, virtio, options)?;
        Ok(WithDevices {
            ram,
            partition,
            devices,
        })
    }
}

impl WithDevices {
    /// Gives `worker`, if there is one, a thread of its own.
    pub(super) fn alone(mut self, worker: Option<Box<dyn Worker>>) -> Result<Self, BuildError> {
        if let Some(worker) = worker {
            self.devices.threads.alone(worker)?;
        }
        Ok(self)
    }
}
