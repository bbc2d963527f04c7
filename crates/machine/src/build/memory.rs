//! Steps 1 and 2: RAM is mapped, the partition sees it.

use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;

use crate::build::BuildError;
use crate::snapshot::RangeV1;
use crate::{Snapshot, ValidConfig};

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

/// The RAM of a snapshot.
pub(super) fn map_snapshot(
    config: &ValidConfig,
    snapshot: &Snapshot,
) -> Result<WithMemory, BuildError> {
    let ranges = config
        .memory
        .ranges()
        .iter()
        .map(|range| RangeV1::from(*range));
    if !ranges.eq(snapshot.ranges.iter().copied()) {
        return Err(BuildError::OtherMemory);
    }
    let layers: Vec<_> = snapshot
        .layers
        .iter()
        .map(|(f, layer)| (f, &layer.map))
        .collect();
    Ok(WithMemory {
        ram: GuestRam::map_snapshot(&config.memory, &layers)?,
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
