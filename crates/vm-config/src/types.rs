//! The wire types. Names, defaults and values are Firecracker's; only what this build can do is here.
//!
//! Reading them is `reader.rs`'s job: serde's derived readers stop at the first mistake, ours lists all.

use std::path::PathBuf;

use serde::Serialize;

/// A whole machine description, as in `--config-file`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmConfig {
    /// What the guest boots. Required.
    pub boot_source: BootSource,
    /// Processors and memory.
    pub machine_config: MachineConfig,
    /// Where log lines go, and which; none: the program's own default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where counters are written; none: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// Where the serial console writes; none: standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// Disks, in the order in which the guest finds them; the root device comes first wherever it stands.
    pub drives: Vec<Drive>,
    /// Network interfaces, in the order in which the guest finds them.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device; none: the guest has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// The entropy device; none: the guest has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// The metadata service; none: the guest finds none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<crate::MmdsConfig>,
    /// What the processors say of themselves; none: what the host's can do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<crate::CpuConfigSource>,
}

/// What the guest boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BootSource {
    /// The kernel image on the host.
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
    /// The kernel's command line; none: the program's own default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

/// Processors and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MachineConfig {
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Size of guest RAM, in MiB.
    pub mem_size_mib: u64,
    /// Whether the guest sees two threads per core. Only `false` is built.
    pub smt: bool,
    /// Whether pages the guest writes are remembered for diff snapshots.
    pub track_dirty_pages: bool,
    /// Which CPU features are hidden from the guest, by a name; nothing said: those that have been said before, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Which host pages back guest RAM.
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    /// What Firecracker builds when the description has no `machine-config`.
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: HugePages::None,
        }
    }
}

/// Which CPU features are hidden from the guest: Firecracker's names for sets of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum CpuTemplate {
    /// None.
    #[default]
    None,
    /// As on instances C3, for Intel's Skylake, Cascade Lake and Ice Lake.
    C3,
    /// As on instances T2, for the same.
    T2,
    /// The same with one set of mitigations, for Skylake and Cascade Lake.
    T2S,
    /// As Cascade Lake, for it and Ice Lake.
    T2CL,
    /// The instructions of T2CL, for AMD's Milan.
    T2A,
}

/// Which host pages back guest RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum HugePages {
    /// What the host gives: huge ones where it can.
    #[default]
    None,
    /// Transparent huge pages, also for a guest that goes on from a snapshot.
    Transparent,
    /// Pages of 2 MiB of the host's pool (hugetlbfs), all reserved before the guest starts.
    #[serde(rename = "2M")]
    Hugetlb2M,
}

/// Where log lines go, and which. An absent field leaves the program's own default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Logger {
    /// A file or named pipe on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// The least serious level that is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether a line names its level.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether a line names the source file and line it comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines from this module path are written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How serious a log line is. Read without regard to case; `Warn` is taken for `Warning`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum LogLevel {
    /// Nothing is written.
    Off,
    /// Something failed.
    Error,
    /// Something is odd.
    Warning,
    /// Something worth knowing.
    Info,
    /// For whoever looks for a mistake.
    Debug,
    /// Everything.
    Trace,
}

/// Where counters are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// A file or named pipe on the host.
    pub metrics_path: PathBuf,
}

/// Where the serial console writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Serial {
    /// A file or named pipe on the host; none: standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
}

/// A disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Drive {
    /// Its name in this description and in messages.
    pub drive_id: String,
    /// The image or block device on the host.
    pub path_on_host: PathBuf,
    /// Whether the guest boots from it: it becomes the first disk, and `root=` is added to the command
    /// line.
    pub is_root_device: bool,
    /// The partition of it that is the root file system; none: all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Whether the guest may only read it.
    pub is_read_only: bool,
    /// What stands between the guest and the medium.
    pub cache_type: CacheType,
    /// Who carries its requests; none: io_uring where the host has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// Bounds on bytes and operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// How blocks lie in the file (not a field of Firecracker's); none: qcow2 for a name that ends so,
    /// else raw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Where the files that an image is laid over may lie (not a field of Firecracker's); none: beside it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingPlace>,
    /// Number of queues (not a field of Firecracker's); none: one for each vCPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u64>,
    /// The serial number that the guest sees (not a field of Firecracker's); none: made of the image's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// What stands between a guest and a medium.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum CacheType {
    /// The host's page cache; flushes are ignored.
    #[default]
    Unsafe,
    /// The host's page cache; flushes reach the medium.
    Writeback,
    /// Nothing; flushes reach the medium (not a value of Firecracker's).
    Direct,
}

/// Who carries a disk's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum IoEngine {
    /// One plain call after the other.
    Sync,
    /// io_uring.
    Async,
}

/// How blocks lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// One after the other.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// Where the files that an image is laid over may lie: what it names was chosen by whoever made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackingPlace {
    /// In the folder of the image, or below it.
    Beside,
    /// Anywhere: for images that are trusted.
    Anywhere,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NetworkInterface {
    /// Its name in this description and in messages.
    pub iface_id: String,
    /// What carries its frames on the host: the name of a tap, of an interface with a macvtap, or the path of a
    /// unix socket, as `link` says.
    pub host_dev_name: String,
    /// What `host_dev_name` names (not a field of Firecracker's).
    pub link: LinkKind,
    /// The guest's hardware address, as six pairs of hexadecimal digits; none: a random one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Largest packet, in bytes, that the guest is told; none: the guest's own default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u64>,
    /// Bounds on what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Bounds on what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Number of queue pairs (not a field of Firecracker's); none: one. A tap has several if it was made with
    /// `multi_queue`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queue_pairs: Option<u64>,
    /// Whether frames that claim to come from another hardware address are dropped (not a field of
    /// Firecracker's).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub anti_spoofing: bool,
    /// Whether the host's kernel serves the queues, by vhost-net (not a field of Firecracker's): of taps and macvtaps,
    /// without rate limiters and `anti_spoofing`. Where the host has none, that is an error: a description means the same
    /// on every host.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
    /// With `vhost`: the numbers of descriptors of `/dev/vhost-net` that this process was started with, one for each pair of
    /// queues, with commas between them (not a field of Firecracker's); none: it is opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_fds: Option<String>,
    /// What the guest may send by it (not a field of Firecracker's); none: anything. Not with `vhost`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
}

/// What a guest may send by one interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Egress {
    /// Rules as `alveole net create --rule` has them, asked in this order: the first that fits decides.
    pub rules: Vec<String>,
    /// What happens to what no rule names.
    pub default: EgressDefault,
    /// Addresses that `to=host` stands for, and which rules for others and `default` leave out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub host: Vec<String>,
    /// Addresses of networks of other guests, which `to=outside` and `"open"` leave out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub guests: Vec<String>,
    /// Addresses of which names may be asked, whatever the rules say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub resolvers: Vec<String>,
}

/// What happens to what no rule names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EgressDefault {
    /// It passes.
    #[default]
    Open,
    /// It is refused.
    Closed,
}

/// What carries the frames of a network interface on the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// A tap, by its name.
    #[default]
    Tap,
    /// A macvtap, by its name.
    Macvtap,
    /// A tap, a macvtap or a connected unix socket that this process was started with, by the number of its
    /// descriptor; of a tap with several queues by the numbers of all, with commas between them. A datagram socket
    /// carries a frame in each datagram, as QEMU's `-netdev dgram` does.
    Fd,
    /// A unix stream socket that carries each frame behind its length, as passt and QEMU's `-netdev stream` do.
    Stream,
}

/// Bounds on bytes and operations; an absent one does not bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// How many tokens in how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TokenBucket {
    /// Tokens a full bucket holds.
    pub size: u64,
    /// Tokens besides, spent first and once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket is full again.
    pub refill_time: u64,
}

/// The socket device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Vsock {
    /// Context of the guest: its address.
    pub guest_cid: u64,
    /// The unix socket on the host where programs connect, and whose path begins those of the sockets that the
    /// guest reaches.
    pub uds_path: PathBuf,
    /// Its name. Firecracker has given it up; it is read and not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// The entropy device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Entropy {
    /// Bounds on bytes and operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
