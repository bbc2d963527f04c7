//! Steps 1 and 2: RAM is mapped, the partition sees it.

use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;
use alveole_vm_config::HugePages;

use crate::build::BuildError;
use crate::snapshot::{MemorySource, RangeV1};
use crate::validate::host_pages;
use crate::{Snapshot, ValidConfig};

/// Address space that is needed besides guest memory, for each processor (a stack of 2 MiB and what KVM shares of it), and for the other
/// threads, their stacks and the heap.
const ROOM_PER_CPU_BYTES: u64 = 3 << 20;
const ROOM_BYTES: u64 = 10 << 20;

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
        ram: GuestRam::map_of(&config.memory, config.host_pages)?,
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
    let huge_pages = snapshot.config().machine_config.huge_pages;
    let pages = host_pages(huge_pages);
    let ram = match &snapshot.memory {
        MemorySource::Files(files) => {
            let layers: Vec<_> = files
                .iter()
                .zip(snapshot.layers.iter().map(|layer| &layer.map))
                .collect();
            match huge_pages {
                HugePages::None => GuestRam::map_snapshot(&config.memory, &layers)?,
                // Pages of a file are small ones.
                HugePages::Transparent | HugePages::Hugetlb2M => {
                    GuestRam::copy_snapshot(&config.memory, &layers, pages)?
                }
            }
        }
        MemorySource::Server(server) => GuestRam::map_served(&config.memory, server, pages)?,
    };
    Ok(WithMemory { ram })
}

impl WithMemory {
    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    pub(super) fn create_partition(
        self,
        config: &ValidConfig,
        mut partition: Box<dyn Partition>,
    ) -> Result<WithPartition, BuildError> {
        let room = u64::from(config.cpus).saturating_mul(ROOM_PER_CPU_BYTES);
        self.ram.leaves_room(room.saturating_add(ROOM_BYTES))?;
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
