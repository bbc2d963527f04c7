//! The virtio devices of a machine, and what carries them.

use std::sync::Arc;

use alveole_acpi::{DeviceNode, PciRoot};
use alveole_block_store::{BlockStore, Cache, OpenError};
use alveole_counters::CounterSet;
use alveole_egress_filter::EgressCounters;
use alveole_guest_memory::GuestRam;
use alveole_hypervisor::Partition;
use alveole_io_bus::BusBuilder;
use alveole_mmds::{Metadata, MetadataCounters};
use alveole_net_link::{LinkSpec, NetLink, VhostSpec};
use alveole_virtio_blk::{BlkConfig, BlkHandle, VirtioBlk};
use alveole_virtio_net::{NetConfig, NetHandle, VirtioNet};
use alveole_virtio_rng::VirtioRng;
use alveole_virtio_vsock::{VirtioVsock, VsockHandle};
use alveole_vm_config::LinkKind;

use crate::ValidConfig;
use crate::build::{BuildError, Options};
use crate::catalog::carriers::{Carrier, SharedTransport};
use crate::catalog::{SharedPart, Threads};
use crate::resources::ResourceError;
use crate::validate::{ValidDrive, ValidInterface, ValidMetadata};

/// What each kind of device adds to the system calls of threads.
const BLOCK_SANDBOX: &str = "virtio-block";
const NET_SANDBOX: &str = "virtio-net";
const VHOST_SANDBOX: &str = "virtio-net-vhost";
const VSOCK_SANDBOX: &str = "virtio-vsock";
const RNG_SANDBOX: &str = "virtio-rng";

/// The virtio devices of a machine, with everything that they need of the host open, and not yet placed.
pub(crate) struct VirtioDevices {
    disks: Vec<Disk>,
    interfaces: Vec<Interface>,
    vsock: Option<VirtioVsock>,
    rng: Option<VirtioRng>,
    metadata: Option<Arc<MetadataCounters>>,
}

struct Interface {
    device: VirtioNet,
    name: String,
    pairs: usize,
    vhost: bool,
    egress: Option<Arc<EgressCounters>>,
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
    pub(crate) interfaces: Vec<NetHandle>,
    pub(crate) vsock: Option<VsockHandle>,
    pub(crate) cmdline: Vec<String>,
    pub(crate) cmdline_without_acpi: Vec<String>,
    pub(crate) pci: Option<PciRoot>,
    pub(crate) sandbox: Option<&'static str>,
    pub(crate) transports: Vec<SharedTransport>,
    pub(crate) host_bridge: Option<SharedPart>,
}

impl VirtioDevices {
    /// Opens what the devices of `config` need.
    pub(crate) fn open(
        config: &ValidConfig,
        metadata: &Arc<Metadata>,
    ) -> Result<Self, ResourceError> {
        if let Some(valid) = &config.metadata {
            metadata.configure(valid.config);
        }
        let disks = config.drives.iter().map(open_disk);
        let interfaces = config.interfaces.iter().map(|interface| {
            let is_named = |valid: &ValidMetadata| valid.interfaces.contains(&interface.id);
            let reads = config.metadata.as_ref().is_some_and(is_named);
            open_interface(interface, reads.then_some(metadata))
        });
        let rng = config.entropy.map(VirtioRng::new).transpose();
        let vsock = config.vsock.as_ref().map(VirtioVsock::new).transpose()?;
        Ok(Self {
            disks: disks.collect::<Result<_, _>>()?,
            interfaces: interfaces.collect::<Result<_, _>>()?,
            vsock,
            rng: rng.map_err(ResourceError::Entropy)?,
            metadata: config
                .metadata
                .as_ref()
                .map(|_| metadata.counters().clone()),
        })
    }

    /// What the devices add to the system calls of threads.
    pub(crate) fn sandbox(&self) -> Vec<&'static str> {
        let block = (!self.disks.is_empty()).then_some(BLOCK_SANDBOX);
        let net = (!self.interfaces.is_empty()).then_some(NET_SANDBOX);
        let vhost = self.interfaces.iter().any(|i| i.vhost);
        let vhost = vhost.then_some(VHOST_SANDBOX);
        let rng = self.rng.as_ref().map(|_| RNG_SANDBOX);
        let vsock = self.vsock.as_ref().map(|_| VSOCK_SANDBOX);
        let all = [block, net, vhost, vsock, rng];
        all.into_iter().flatten().collect()
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
        let mut counters: Vec<Arc<dyn CounterSet + Send + Sync>> = Vec::new();
        let (mut disks, mut interfaces, mut cmdline) = (Vec::new(), Vec::new(), Vec::new());
        if let Some(metadata) = self.metadata {
            counters.push(metadata);
        }
        let mut carrier = Carrier::new(options.transport);
        for disk in self.disks {
            let handle = disk.device.handle();
            counters.push(handle.counters().clone());
            disks.push(handle);
            cmdline.extend(disk.root);
            let hosting = threads.for_disk(&disk.name, disk.queues, options.disk_threads)?;
            carrier.carry(Box::new(disk.device), partition, ram, hosting, memory)?;
        }
        for interface in self.interfaces {
            let handle = interface.device.handle();
            counters.push(handle.counters().clone());
            interfaces.push(handle);
            if let Some(egress) = interface.egress {
                counters.push(egress);
            }
            let hosting = threads.for_interface(&interface.name, interface.pairs)?;
            carrier.carry(Box::new(interface.device), partition, ram, hosting, memory)?;
        }
        let vsock = self.vsock.as_ref().map(VirtioVsock::handle);
        if let (Some(device), Some(handle)) = (self.vsock, &vsock) {
            counters.push(handle.counters().clone());
            let hosting = threads.for_device("vsock")?;
            carrier.carry(Box::new(device), partition, ram, hosting, memory)?;
        }
        if let Some(rng) = self.rng {
            counters.push(rng.counters().clone());
            carrier.carry(Box::new(rng), partition, ram, threads.shared(), memory)?;
        }
        let carried = carrier.finish(memory)?;
        cmdline.push(carried.cmdline.to_owned());
        Ok(Placed {
            nodes: carried.nodes,
            counters,
            disks,
            interfaces,
            vsock,
            cmdline,
            cmdline_without_acpi: carried.cmdline_without_acpi,
            pci: carried.pci,
            sandbox: carried.sandbox,
            transports: carried.transports,
            host_bridge: carried.host_bridge,
        })
    }
}

/// The name of a drive's device and of its counters.
pub(crate) fn drive_name(id: &str) -> String {
    format!("drive {id}")
}

/// The name of a network interface's device and of its counters.
pub(crate) fn interface_name(id: &str) -> String {
    format!("net {id}")
}

/// Looks whether what `drive` names can be opened as it says.
pub(crate) fn try_drive(drive: &ValidDrive) -> Result<(), ResourceError> {
    alveole_block_store::look(&drive.path, &drive.open).map_err(|source| refused(drive, source))
}

/// Looks whether what carries the frames of `interface` can be opened. Only of interfaces of the host: the other side
/// of a socket would take the look for a guest that has gone.
pub(crate) fn try_interface(interface: &ValidInterface) -> Result<(), ResourceError> {
    match interface.link {
        LinkKind::Tap | LinkKind::Macvtap => open_link(interface).map(drop),
        LinkKind::Stream | LinkKind::Fd => Ok(()),
    }
}

fn open_store(drive: &ValidDrive) -> Result<Arc<dyn BlockStore>, ResourceError> {
    alveole_block_store::open(&drive.path, &drive.open).map_err(|source| refused(drive, source))
}

fn refused(drive: &ValidDrive, source: OpenError) -> ResourceError {
    ResourceError::Drive {
        id: drive.id.clone(),
        source,
    }
}

fn open_disk(drive: &ValidDrive) -> Result<Disk, ResourceError> {
    let store = open_store(drive)?;
    let config = BlkConfig {
        id: drive.serial.clone(),
        queues: drive.queues,
        cache: drive.open.cache,
        limits: drive.limits,
        ..BlkConfig::new(&drive_name(&drive.id))
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

fn open_link(interface: &ValidInterface) -> Result<NetLink, ResourceError> {
    let id = &interface.id;
    let name = interface.host_dev_name.clone();
    let failed = |source| ResourceError::Link {
        id: id.clone(),
        source,
    };
    let spec = match interface.link {
        LinkKind::Tap => LinkSpec::Tap { name },
        LinkKind::Macvtap => LinkSpec::Macvtap { interface: name },
        LinkKind::Stream => LinkSpec::Stream { path: name.into() },
        LinkKind::Fd => LinkSpec::inherited(&name).map_err(failed)?,
    };
    let pairs = interface.queue_pairs;
    let link = match &interface.vhost_fds {
        _ if !interface.vhost => alveole_net_link::open(spec, pairs),
        None => alveole_net_link::open_with_vhost(spec, pairs, VhostSpec::Node),
        Some(fds) => VhostSpec::inherited(fds)
            .and_then(|fds| alveole_net_link::open_with_vhost(spec, pairs, fds)),
    };
    link.map_err(failed)
}

fn open_interface(
    interface: &ValidInterface,
    metadata: Option<&Arc<Metadata>>,
) -> Result<Interface, ResourceError> {
    let id = &interface.id;
    let mut link = open_link(interface)?;
    let mut egress = None;
    // Behind the metadata service: what is for that leaves by no link.
    if let Some(policy) = &interface.egress {
        let counters = egress.insert(Arc::new(EgressCounters::new(id)));
        link = alveole_egress_filter::filter(link, policy.clone(), counters.clone()).map_err(
            |source| ResourceError::Egress {
                id: id.clone(),
                source,
            },
        )?;
    }
    if let Some(metadata) = metadata {
        link = alveole_mmds::detour(link, metadata).map_err(|source| ResourceError::Metadata {
            id: id.clone(),
            source,
        })?;
    }
    log::info!(
        "network interface {id}: {}{}",
        link.facts.name,
        if interface.vhost { " by vhost" } else { "" }
    );
    let pairs = link.queues.len();
    let config = NetConfig {
        mac: interface.mac,
        mtu: interface.mtu,
        rx_limits: interface.rx_limits,
        tx_limits: interface.tx_limits,
        source_mac_filter: interface.anti_spoofing,
        ..NetConfig::new(&interface_name(id))
    };
    Ok(Interface {
        device: VirtioNet::new(&config, link)?,
        name: id.clone(),
        pairs,
        vhost: interface.vhost,
        egress,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_filter_counts_has_its_families() {
        let counters = EgressCounters::new("eth0");
        let mut seen = 0;
        counters.visit(&mut |counter, _| {
            assert!(
                alveole_metrics::is_known(counters.name(), counter),
                "{counter}"
            );
            seen += 1;
        });
        assert!(seen > 3);
    }
}
