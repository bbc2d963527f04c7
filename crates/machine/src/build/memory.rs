//! Steps 1 and 2: RAM is mapped, the partition sees it.

use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;
use alveole_vm_config::HugePages;

use crate::build::BuildError;
use crate::snapshot::{LayerV1, MemorySource, RangeV1};
use crate::validate::host_pages;
use crate::{Snapshot, ValidConfig};

/// Address space that is needed besides guest memory, for each processor (a stack and what KVM shares of it), and for the other
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
    snapshot: &mut Snapshot,
) -> Result<WithMemory, BuildError> {
    let ram = match snapshot.ram.take() {
        Some(ram) => ram,
        None => map_memory(
            config,
            &snapshot.ranges,
            &snapshot.memory,
            &snapshot.layers,
            snapshot.config().machine_config.huge_pages,
        )?,
    };
    Ok(WithMemory { ram })
}

/// RAM as `config` lays it out, which has to be that of the snapshot, with what `source` has of it.
pub(crate) fn map_memory(
    config: &ValidConfig,
    ranges: &[RangeV1],
    source: &MemorySource,
    layers: &[LayerV1],
    huge_pages: HugePages,
) -> Result<GuestRam, BuildError> {
    let laid_out = config.memory.ranges().iter();
    if !laid_out
        .map(|range| RangeV1::from(*range))
        .eq(ranges.iter().copied())
    {
        return Err(BuildError::OtherMemory);
    }
    let pages = host_pages(huge_pages);
    Ok(match source {
        MemorySource::Files(files) => {
            let maps = layers.iter().map(|layer| &layer.map);
            let layers: Vec<_> = files.iter().zip(maps).collect();
            match huge_pages {
                HugePages::None => GuestRam::map_snapshot(&config.memory, &layers)?,
                // Pages of a file are small ones.
                HugePages::Transparent | HugePages::Hugetlb2M => {
                    GuestRam::copy_snapshot(&config.memory, &layers, pages)?
                }
            }
        }
        MemorySource::Server(server) => GuestRam::map_served(&config.memory, server, pages)?,
    })
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
