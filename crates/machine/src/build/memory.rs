//! Steps 1 and 2: RAM is mapped, the partition sees it.

use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;

use crate::ValidConfig;
use crate::build::BuildError;

/// RAM is mapped.
pub(super) struct WithMemory {
    ram: GuestRam,
}

/// The partition sees the RAM.
pub(super) struct WithPartition {
    pub(super) ram: GuestRam,
    pub(super) partition: Box<dyn Partition>,
}

pub(super) fn plan_memory(config: &ValidConfig) -> Result<WithMemory, BuildError> {
    Ok(WithMemory {
        ram: GuestRam::map(&config.memory)?,
    })
}

impl WithMemory {
    pub(super) fn create_partition(
        self,
        config: &ValidConfig,
        mut partition: Box<dyn Partition>,
    ) -> Result<WithPartition, BuildError> {
        let most = partition.max_cpus();
        if config.cpus > most {
            return Err(BuildError::TooManyCpus {
                asked: config.cpus,
                most,
            });
        }
        partition.map_ram(&self.ram)?;
        Ok(WithPartition {
            ram: self.ram,
            partition,
        })
    }
}
