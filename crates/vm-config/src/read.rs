//! Which fields a machine description has, and what this build can do with each.

use crate::cpu;
use crate::object::{Leaf, Object, Value};
use crate::types::{
    BackingPlace, BootSource, CacheType, CpuTemplate, DiskFormat, Drive, Egress, EgressDefault,
    Entropy, HugePages, IoEngine, LinkKind, LogLevel, Logger, MachineConfig, Metrics,
    NetworkInterface, RateLimiter, Serial, TokenBucket, VmConfig, Vsock,
};

pub(crate) fn vm_config(top: &mut Object<'_>) -> VmConfig {
    let config = VmConfig {
        boot_source: top.required_section("boot-source", boot_source),
        machine_config: top
            .section("machine-config", machine_config)
            .unwrap_or_default(),
        logger: top.section("logger", logger),
        metrics: top.section("metrics", metrics),
        serial: top.section("serial", serial),
        drives: top.list("drives", drive),
        network_interfaces: top.list("network-interfaces", network_interface),
        vsock: top.section("vsock", vsock),
        entropy: top.section("entropy", entropy),
        mmds_config: top.section("mmds-config", crate::requests::mmds_config),
        cpu_config: top
            .take("cpu-config")
            .filter(|value| !value.is_null())
            .and_then(|value| cpu::source(&value)),
    };
    for (key, what) in [
        ("balloon", "the balloon device is"),
        ("pmem", "persistent memory devices are"),
        ("memory-hotplug", "memory hotplug is"),
    ] {
        top.not_built(key, what);
    }
    config
}

pub(crate) fn boot_source(section: &mut Object<'_>) -> BootSource {
    BootSource {
        kernel_image_path: section.required("kernel_image_path"),
        initrd_path: section.optional("initrd_path"),
        boot_args: section.optional("boot_args"),
    }
}

pub(crate) fn machine_config(section: &mut Object<'_>) -> MachineConfig {
    MachineConfig {
        vcpu_count: section.required("vcpu_count"),
        mem_size_mib: section.required("mem_size_mib"),
        smt: smt(section).unwrap_or_default(),
        track_dirty_pages: section.optional("track_dirty_pages").unwrap_or_default(),
        cpu_template: template(section),
        huge_pages: huge_pages(section).unwrap_or_default(),
    }
}

pub(crate) fn smt(section: &mut Object<'_>) -> Option<bool> {
    let what = "the guest sees one thread per core; threads that share a core are";
    only_false(section, "smt", what)
}

/// A switch of Firecracker's that cannot be switched on here. `what` says what is not built.
fn only_false(section: &mut Object<'_>, name: &'static str, what: &str) -> Option<bool> {
    let value = section.take(name)?;
    let on = value.read().unwrap_or_default();
    if on {
        value.wrong(format_args!(
            "true cannot be had: {what} not built yet; set it to false"
        ));
    }
    Some(on)
}

pub(crate) fn template(section: &mut Object<'_>) -> Option<CpuTemplate> {
    // Firecracker takes null here, unlike for huge_pages.
    let value = section.take("cpu_template").filter(|v| !v.is_null())?;
    let name = value.read::<String>()?;
    Some(match name.as_str() {
        "None" => CpuTemplate::None,
        "C3" => CpuTemplate::C3,
        "T2" => CpuTemplate::T2,
        "T2S" => CpuTemplate::T2S,
        "T2CL" => CpuTemplate::T2CL,
        "T2A" => CpuTemplate::T2A,
        "V1N1" => {
            value.wrong(format_args!(
                "\"V1N1\" cannot be had: it is for aarch64, and this is x86-64; leave it out"
            ));
            CpuTemplate::None
        }
        _ => {
            value.wrong(format_args!(
                "{} is no CPU template; known are None, C3, T2, T2S, T2CL, T2A",
                value.shown()
            ));
            CpuTemplate::None
        }
    })
}

pub(crate) fn huge_pages(section: &mut Object<'_>) -> Option<HugePages> {
    let value = section.take("huge_pages")?;
    let said = value.read::<String>()?;
    Some(pages_of_word(&value, &said, "").unwrap_or_default())
}

/// The kind of huge pages that a word names. `more`: what else could be said.
pub(crate) fn pages_of_word(value: &Value<'_>, said: &str, more: &str) -> Option<HugePages> {
    match said {
        "None" => Some(HugePages::None),
        "Transparent" => Some(HugePages::Transparent),
        "2M" => Some(HugePages::Hugetlb2M),
        _ => {
            value.wrong(format_args!(
                "{} is no kind of huge pages; known are {more}None, Transparent, 2M",
                value.shown()
            ));
            None
        }
    }
}

pub(crate) fn logger(section: &mut Object<'_>) -> Logger {
    Logger {
        log_path: section.optional("log_path"),
        level: section.optional("level"),
        show_level: section.optional("show_level"),
        show_log_origin: section.optional("show_log_origin"),
        module: section.optional("module"),
    }
}

impl Leaf for LogLevel {
    const EXPECTED: &'static str = "one of Off, Error, Warning, Info, Debug, Trace";

    fn from_json(raw: &str) -> Option<Self> {
        let name: String = serde_json::from_str(raw).ok()?;
        Some(match name.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "error" => Self::Error,
            "warning" | "warn" => Self::Warning,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }
}

pub(crate) fn drive(section: &mut Object<'_>) -> Drive {
    section.not_built("socket", "disks served over vhost-user are");
    Drive {
        drive_id: section.required("drive_id"),
        path_on_host: section.required("path_on_host"),
        is_root_device: section.required("is_root_device"),
        partuuid: section.optional("partuuid"),
        is_read_only: section.optional("is_read_only").unwrap_or_default(),
        cache_type: section.optional("cache_type").unwrap_or_default(),
        io_engine: section.optional("io_engine"),
        rate_limiter: section.section("rate_limiter", rate_limiter),
        format: section.optional("format"),
        backing: section.optional("backing"),
        num_queues: section.optional("num_queues"),
        serial: section.optional("serial"),
    }
}

pub(crate) fn network_interface(section: &mut Object<'_>) -> NetworkInterface {
    NetworkInterface {
        iface_id: section.required("iface_id"),
        host_dev_name: section.required("host_dev_name"),
        guest_mac: section.optional("guest_mac"),
        mtu: section.optional("mtu"),
        rx_rate_limiter: section.section("rx_rate_limiter", rate_limiter),
        tx_rate_limiter: section.section("tx_rate_limiter", rate_limiter),
        link: section.optional("link").unwrap_or_default(),
        num_queue_pairs: section.optional("num_queue_pairs"),
        anti_spoofing: section.optional("anti_spoofing").unwrap_or_default(),
        vhost: section.optional("vhost").unwrap_or_default(),
        vhost_fds: section.optional("vhost_fds"),
        egress: section.section("egress", egress),
    }
}

pub(crate) fn egress(section: &mut Object<'_>) -> Egress {
    Egress {
        rules: section.entries("rules", Value::read),
        default: section.optional("default").unwrap_or_default(),
        host: section.entries("host", Value::read),
        guests: section.entries("guests", Value::read),
        resolvers: section.entries("resolvers", Value::read),
    }
}

pub(crate) fn vsock(section: &mut Object<'_>) -> Vsock {
    Vsock {
        guest_cid: section.required("guest_cid"),
        uds_path: section.required("uds_path"),
        vsock_id: section.optional("vsock_id"),
    }
}

pub(crate) fn entropy(section: &mut Object<'_>) -> Entropy {
    Entropy {
        rate_limiter: section.section("rate_limiter", rate_limiter),
    }
}

pub(crate) fn rate_limiter(section: &mut Object<'_>) -> RateLimiter {
    RateLimiter {
        bandwidth: section.section("bandwidth", token_bucket),
        ops: section.section("ops", token_bucket),
    }
}

fn token_bucket(section: &mut Object<'_>) -> TokenBucket {
    TokenBucket {
        size: section.required("size"),
        one_time_burst: section.optional("one_time_burst"),
        refill_time: section.required("refill_time"),
    }
}

/// A choice among words, which are read as they are written.
macro_rules! words {
    ($type:ty, $expected:literal, $($word:literal => $value:expr,)*) => {
        impl $crate::object::Leaf for $type {
            const EXPECTED: &'static str = $expected;

            fn from_json(raw: &str) -> Option<Self> {
                let word: String = serde_json::from_str(raw).ok()?;
                match word.as_str() {
                    $($word => Some($value),)*
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use words;

words! { CacheType, "one of \"Unsafe\", \"Writeback\", \"Direct\"",
"Unsafe" => CacheType::Unsafe, "Writeback" => CacheType::Writeback, "Direct" => CacheType::Direct, }
words! { IoEngine, "one of \"Sync\", \"Async\"",
"Sync" => IoEngine::Sync, "Async" => IoEngine::Async, }
words! { DiskFormat, "one of \"raw\", \"qcow2\"",
"raw" => DiskFormat::Raw, "qcow2" => DiskFormat::Qcow2, }
words! { LinkKind, "one of \"tap\", \"macvtap\", \"fd\", \"stream\"",
"tap" => LinkKind::Tap, "macvtap" => LinkKind::Macvtap, "fd" => LinkKind::Fd,
"stream" => LinkKind::Stream, }
words! { EgressDefault, "one of \"open\", \"closed\"",
"open" => EgressDefault::Open, "closed" => EgressDefault::Closed, }
words! { BackingPlace, "one of \"beside\", \"anywhere\"",
"beside" => BackingPlace::Beside, "anywhere" => BackingPlace::Anywhere, }

pub(crate) fn metrics(section: &mut Object<'_>) -> Metrics {
    let metrics = Metrics {
        metrics_path: section.required("metrics_path"),
    };
    only_false(
        section,
        "emit_id",
        "metrics that carry the id of the VM are",
    );
    section.not_built("properties", "metrics with properties of your own are");
    metrics
}

pub(crate) fn serial(section: &mut Object<'_>) -> Serial {
    let serial = Serial {
        serial_out_path: section.optional("serial_out_path"),
    };
    section.not_built("rate_limiter", "rate limiters are");
    serial
}
