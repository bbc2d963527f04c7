//! From a wire description to a checked one. All rules that need more than one field or the machine's
//! limits live here, each with its message; every broken rule is reported, not only the first.

mod drives;
mod egress;
mod interfaces;
mod metadata;
mod processors;
mod templates;
mod vsock;

use std::path::PathBuf;

use alveole_guest_memory::{HostPages, MemoryPlan};
use alveole_rate_limiter::Limits;
use alveole_virtio_vsock::{MAX_GUEST_CID, MAX_PATH_BYTES, MIN_GUEST_CID, VsockConfig};
use alveole_vm_config::{CpuTemplate, CpuidRegister, HugePages, VmConfig};

pub use drives::{MAX_DRIVES, MAX_QUEUES, SERIAL_BYTES};
pub(crate) use drives::{ValidDrive, limits};
pub(crate) use interfaces::ValidInterface;
pub(crate) use metadata::ValidMetadata;
pub(crate) use processors::ValidCpuConfig;
pub use templates::NotForHost;
pub(crate) use templates::check_host;

/// Most processors of one guest: the machine tables are tested up to here.
pub const MAX_CPUS: u32 = 64;
/// Most virtio devices of one guest: on virtio-mmio each has an interrupt of its own.
pub(crate) const MAX_DEVICES: usize = 18;
/// Longest name of a drive or a network interface.
const MAX_ID_BYTES: usize = 64;
/// Least memory that a 64-bit distribution kernel unpacks itself in, in MiB.
pub const MIN_MEMORY_MIB: u64 = 64;
/// What a kernel is told when the description has no `boot_args`. Unlike Firecracker's default it needs no
/// switches against devices that are not there: ACPI says so.
const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";

/// A description that keeps all rules. Only [`validate`] makes one.
#[derive(Debug, Clone)]
pub struct ValidConfig {
    pub(crate) cpus: u32,
    /// Whose name `cpu_config` has; none: it has none.
    pub(crate) cpu_template: CpuTemplate,
    pub(crate) cpu_config: ValidCpuConfig,
    pub(crate) memory: MemoryPlan,
    /// Which pages of the host RAM is made of.
    pub(crate) host_pages: HostPages,
    /// Whether written pages are noted.
    pub(crate) track_dirty_pages: bool,
    pub(crate) kernel_path: PathBuf,
    pub(crate) initrd_path: Option<PathBuf>,
    pub(crate) cmdline: String,
    /// The root device, if there is one, comes first.
    pub(crate) drives: Vec<ValidDrive>,
    pub(crate) interfaces: Vec<ValidInterface>,
    pub(crate) vsock: Option<VsockConfig>,
    pub(crate) entropy: Option<Limits>,
    pub(crate) metadata: Option<ValidMetadata>,
}

impl ValidConfig {
    /// Number of processors.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.cpus
    }

    /// The drive of this name.
    pub(crate) fn drive(&self, id: &str) -> Option<&ValidDrive> {
        self.drives.iter().find(|drive| drive.id == id)
    }

    /// The network interface of this name.
    pub(crate) fn interface(&self, id: &str) -> Option<&ValidInterface> {
        self.interfaces.iter().find(|interface| interface.id == id)
    }

    /// Size of guest RAM, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory.size_bytes()
    }
}

/// A broken rule.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Invalid {
    /// No processor.
    #[error("vcpu_count is 0: a guest needs at least 1 processor")]
    NoCpu,
    /// Too many processors.
    #[error("vcpu_count is {0}: this machine has at most {MAX_CPUS} processors")]
    TooManyCpus(u32),
    /// Too little memory.
    #[error("mem_size_mib is {0}: a 64-bit kernel needs at least {MIN_MEMORY_MIB} MiB")]
    TooLittleMemory(u64),
    /// The size cannot be laid out.
    #[error("mem_size_mib is {mib}: {why}")]
    Memory {
        /// The size.
        mib: u64,
        /// Why not.
        why: String,
    },
    /// A size that is not made of huge pages.
    #[error(
        "mem_size_mib is {0}, and huge_pages are \"2M\": memory of huge pages is a multiple of 2 MiB; give it one more or less, or say \"Transparent\""
    )]
    OddMemory(u64),
    /// No kernel.
    #[error("kernel_image_path is empty: name the kernel to boot")]
    NoKernel,
    /// A drive without a name.
    #[error("drives[{0}].drive_id is empty: give the disk a name")]
    NoDriveId(usize),
    /// A name that cannot be one.
    #[error("drive_id {0:?}: a name has at most 64 letters, digits, '_', '-' and '.'")]
    DriveId(String),
    /// Two drives of one name.
    #[error("drive_id {0:?} is given to two drives: give each a name of its own")]
    SameDriveId(String),
    /// No path.
    #[error("drive {0:?} has an empty path_on_host: name an image or a block device")]
    NoDrivePath(String),
    /// Two roots.
    #[error("drives {0:?} and {1:?} are both the root device: only one can be")]
    TwoRoots(String, String),
    /// A raw image is laid over nothing.
    #[error(
        "drive {0:?} has \"backing\", and a raw image is laid over nothing: remove it, or set format to \"qcow2\""
    )]
    RawBacking(String),
    /// An impossible number of queues.
    #[error("drive {id:?} has num_queues {queues}: give it 1 to {MAX_QUEUES}")]
    Queues {
        /// The drive.
        id: String,
        /// What was asked for.
        queues: u64,
    },
    /// A serial number that does not fit.
    #[error(
        "drive {id:?} has serial {serial:?}: give it 1 to {SERIAL_BYTES} printable ASCII characters without spaces"
    )]
    Serial {
        /// The drive.
        id: String,
        /// What was given.
        serial: String,
    },
    /// A partition that would break the command line.
    #[error("drive {id:?} has partuuid {partuuid:?}: it has letters, digits and '-' only")]
    PartUuid {
        /// The drive.
        id: String,
        /// What was given.
        partuuid: String,
    },
    /// A context that no guest can have.
    #[error("vsock has guest_cid {0}: a guest has one from {MIN_GUEST_CID} to {MAX_GUEST_CID}")]
    GuestCid(u64),
    /// No path.
    #[error("vsock has an empty uds_path: name the socket to be made")]
    NoUdsPath,
    /// A path that no socket can have.
    #[error("vsock has uds_path {0:?} with a zero byte: no file can be called so")]
    UdsPathWithZero(PathBuf),
    /// A path that is too long.
    #[error(
        "vsock has uds_path {path:?} of {len} bytes: it may have {MAX_PATH_BYTES}, so that it and \"_4294967295\" fit the address of \
         a unix socket; choose a shorter directory, or one relative to where the monitor is started"
    )]
    LongUdsPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// More drives than there are interrupts.
    #[error("{0} drives: this machine has room for {MAX_DRIVES}")]
    TooManyDrives(usize),
    /// More devices than there are interrupts.
    #[error(
        "{0} devices (drives, network interfaces and others): this machine has room for {MAX_DEVICES}; \
         leave some out"
    )]
    TooManyDevices(usize),
    /// An interface without a name.
    #[error("network-interfaces[{0}].iface_id is empty: give the interface a name")]
    NoInterfaceId(usize),
    /// A name that cannot be one.
    #[error("iface_id {0:?}: a name has at most 64 letters, digits, '_', '-' and '.'")]
    InterfaceId(String),
    /// Two interfaces of one name.
    #[error("iface_id {0:?} is given to two network interfaces: give each a name of its own")]
    SameInterfaceId(String),
    /// What carries its frames cannot be that.
    #[error("network interface {id:?}: host_dev_name {name:?} {why}")]
    HostDevName {
        /// The interface.
        id: String,
        /// What was given.
        name: String,
        /// What is wrong, and what to do.
        why: &'static str,
    },
    /// A hardware address that no guest can have.
    #[error("network interface {id:?}: guest_mac {mac:?} cannot be a guest's address: {why}")]
    GuestMac {
        /// The interface.
        id: String,
        /// What was given.
        mac: String,
        /// Why not.
        why: &'static str,
    },
    /// Two interfaces with one address.
    #[error(
        "network interfaces {first:?} and {second:?} have the same guest_mac {mac}: give each its own, or none"
    )]
    SameMac {
        /// The first with it.
        first: String,
        /// The second.
        second: String,
        /// The address, as the second has it.
        mac: String,
    },
    /// An impossible packet size.
    #[error("network interface {id:?}: mtu {mtu}: give it 68 to 65535 bytes")]
    Mtu {
        /// The interface.
        id: String,
        /// What was asked for.
        mtu: u64,
    },
    /// What the host's kernel does not do.
    #[error(
        "network interface {id:?} has vhost and {field}: with vhost the host's kernel serves the queues, and {why}; leave \
         {field} or vhost out"
    )]
    Vhost {
        /// The interface.
        id: String,
        /// What does not go with it.
        field: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// Rules for what the guest sends that cannot be.
    #[error("network interface {id:?} has egress that cannot be kept: {why}")]
    Egress {
        /// The interface.
        id: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Descriptors of vhost-net that cannot be.
    #[error("network interface {id:?} has vhost_fds {fds:?}: {why}")]
    VhostFds {
        /// The interface.
        id: String,
        /// What was given.
        fds: String,
        /// What is wrong, and what to do.
        why: &'static str,
    },
    /// No interface for the metadata service.
    #[error(
        "mmds-config has no network_interfaces: name those through which the guest is to reach the metadata service"
    )]
    NoMetadataInterface,
    /// An interface that is not there.
    #[error(
        "mmds-config names the network interface {id:?}; the machine has {}: add it before, or name another",
        if known.is_empty() { "none".to_owned() } else { known.join(", ") }
    )]
    MetadataInterface {
        /// What was named.
        id: String,
        /// What there is.
        known: Vec<String>,
    },
    /// An address that is not for such services.
    #[error(
        "mmds-config has ipv4_address {0}: the metadata service has a link-local one, from 169.254.1.0 to 169.254.254.255"
    )]
    MetadataAddress(std::net::Ipv4Addr),
    /// A template that cannot be read.
    #[error("cpu_template {name}: {why}: this is a bug of the monitor, please report it")]
    BadTemplate {
        /// Its name.
        name: String,
        /// What is wrong with its file.
        why: String,
    },
    /// The description names a file that nobody has read.
    #[error(
        "cpu-config is in {0:?}, which has not been read: this is a bug of the monitor, please report it"
    )]
    UnreadCpuConfig(PathBuf),
    /// Two modifiers of one register of a CPUID leaf.
    #[error(
        "cpuid_modifiers name {register} of leaf {leaf:#x}, subleaf {subleaf:#x} twice: put all of its bits into one bitmap"
    )]
    CpuidTwice {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: CpuidRegister,
    },
    /// Two modifiers of one CPUID leaf that contradict each other.
    #[error(
        "cpuid_modifiers give leaf {leaf:#x}, subleaf {subleaf:#x} the flags {first} and {second}: give it the same everywhere"
    )]
    CpuidFlags {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The flags of one.
        first: u32,
        /// The flags of the other.
        second: u32,
    },
    /// Two modifiers of one register.
    #[error("msr_modifiers name {0:#x} twice: put all of its bits into one bitmap")]
    MsrTwice(u32),
    /// An impossible number of queues.
    #[error("network interface {id:?} has num_queue_pairs {pairs}: give it 1 to {MAX_CPUS}")]
    QueuePairs {
        /// The interface.
        id: String,
        /// What was asked for.
        pairs: u64,
    },
}

/// Which pages of the host RAM of this kind is made of.
pub(crate) fn host_pages(kind: HugePages) -> HostPages {
    match kind {
        HugePages::None | HugePages::Transparent => HostPages::Anonymous,
        HugePages::Hugetlb2M => HostPages::Huge2M,
    }
}

/// Checks `config` against the machine's rules.
///
/// # Errors
/// Every broken rule.
pub fn validate(config: &VmConfig) -> Result<ValidConfig, Vec<Invalid>> {
    let mut broken = Vec::new();
    let cpus = u32::from(config.machine_config.vcpu_count);
    match cpus {
        0 => broken.push(Invalid::NoCpu),
        1..=MAX_CPUS => {}
        _ => broken.push(Invalid::TooManyCpus(cpus)),
    }
    let (cpu_template, source) = processors::source(config, &mut broken);
    let cpu_config = processors::validate(source.as_ref(), &mut broken);
    let mib = config.machine_config.mem_size_mib;
    let memory = if mib < MIN_MEMORY_MIB {
        broken.push(Invalid::TooLittleMemory(mib));
        None
    } else {
        MemoryPlan::around_hole(mib.min(u64::MAX >> 20) << 20)
            .map_err(|e| {
                broken.push(Invalid::Memory {
                    mib,
                    why: e.to_string(),
                });
            })
            .ok()
    };
    let host_pages = host_pages(config.machine_config.huge_pages);
    if let Some(Err(_)) = memory.as_ref().map(|memory| host_pages.check(memory)) {
        broken.push(Invalid::OddMemory(mib));
    }
    let boot = &config.boot_source;
    if boot.kernel_image_path.as_os_str().is_empty() {
        broken.push(Invalid::NoKernel);
    }
    let drives = drives::validate(config, &mut broken);
    let interfaces = interfaces::validate(config, &mut broken);
    let devices = drives.len()
        + interfaces.len()
        + usize::from(config.vsock.is_some())
        + usize::from(config.entropy.is_some());
    if devices > MAX_DEVICES {
        broken.push(Invalid::TooManyDevices(devices));
    }
    let vsock = config
        .vsock
        .as_ref()
        .and_then(|v| vsock::validate(v, &mut broken));
    let metadata = config
        .mmds_config
        .as_ref()
        .map(|m| metadata::validate(m, &interfaces, &mut broken));
    let limiter = config.entropy.map(|e| e.rate_limiter.unwrap_or_default());
    match memory {
        Some(memory) if broken.is_empty() => Ok(ValidConfig {
            cpus,
            cpu_template,
            cpu_config,
            memory,
            host_pages,
            track_dirty_pages: config.machine_config.track_dirty_pages,
            kernel_path: boot.kernel_image_path.clone(),
            initrd_path: boot.initrd_path.clone(),
            cmdline: boot
                .boot_args
                .clone()
                .unwrap_or_else(|| DEFAULT_CMDLINE.into()),
            drives,
            interfaces,
            vsock,
            entropy: limiter.map(|l| drives::limits(&l)),
            metadata,
        }),
        _ => Err(broken),
    }
}

/// Whether `text` can name a drive or a network interface.
fn is_id(text: &str) -> bool {
    text.len() <= MAX_ID_BYTES
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

/// A name as messages show it: not more of it than a name may have.
fn shown(id: &str) -> String {
    id.chars().take(MAX_ID_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(cpus: u8, mib: u64, kernel: &str) -> VmConfig {
        let mut c = VmConfig::default();
        c.machine_config.vcpu_count = cpus;
        c.machine_config.mem_size_mib = mib;
        c.boot_source.kernel_image_path = kernel.into();
        c
    }

    #[test]
    fn every_broken_rule_is_listed() {
        let broken = validate(&config(0, 0, "")).unwrap_err();
        assert_eq!(
            broken,
            [
                Invalid::NoCpu,
                Invalid::TooLittleMemory(0),
                Invalid::NoKernel
            ]
        );
        let broken = validate(&config(65, u64::MAX, "k")).unwrap_err();
        assert!(matches!(broken[0], Invalid::TooManyCpus(65)));
        assert!(broken[1].to_string().contains("16 TiB"), "{}", broken[1]);
    }

    #[test]
    fn huge_pages_make_even_sizes() {
        for (kind, mib, broken) in [
            (HugePages::Hugetlb2M, 65, true),
            (HugePages::Hugetlb2M, 66, false),
            (HugePages::Transparent, 65, false),
        ] {
            let mut config = config(1, mib, "k");
            config.machine_config.huge_pages = kind;
            let told = validate(&config).err();
            assert_eq!(told, broken.then(|| vec![Invalid::OddMemory(mib)]));
        }
    }

    #[test]
    fn the_limits_themselves_are_fine() {
        for (cpus, mib) in [(1, MIN_MEMORY_MIB), (64, 16 << 20)] {
            let valid = validate(&config(cpus, mib, "k")).unwrap();
            assert_eq!(valid.memory_bytes(), mib << 20);
            assert_eq!(valid.cpus(), u32::from(cpus));
        }
    }
}
