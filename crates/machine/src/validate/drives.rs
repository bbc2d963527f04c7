//! The rules of disks.

use std::path::PathBuf;
use std::time::Duration;

use alveole_block_store::{Backing, Cache, Engine, Format, OpenOptions};
use alveole_rate_limiter::{Bucket, Limits};
use alveole_vm_config::{
    BackingPlace, CacheType, DiskFormat, Drive, IoEngine, RateLimiter, TokenBucket, VmConfig,
};

use crate::validate::{Invalid, MAX_CPUS, is_id, shown};

/// Most drives: each has an interrupt of its own, and two are left for the socket and the entropy device.
pub const MAX_DRIVES: usize = 16;
/// Most queues of one drive.
pub const MAX_QUEUES: u64 = MAX_CPUS as u64;
/// The longest serial number (virtio 1.3, section 5.2.6.1).
pub const SERIAL_BYTES: usize = 20;
/// A disk that keeps all rules.
#[derive(Debug, Clone)]
pub(crate) struct ValidDrive {
    pub(crate) id: String,
    pub(crate) path: PathBuf,
    pub(crate) open: OpenOptions,
    pub(crate) limits: Limits,
    pub(crate) queues: u16,
    /// What the guest sees instead of the medium's identity.
    pub(crate) serial: Option<String>,
    /// What the kernel is told, where it boots from this disk.
    pub(crate) root: Option<String>,
}

/// Checks all drives; the root device comes first.
pub(super) fn validate(config: &VmConfig, broken: &mut Vec<Invalid>) -> Vec<ValidDrive> {
    if config.drives.len() > MAX_DRIVES {
        broken.push(Invalid::TooManyDrives(config.drives.len()));
    }
    let mut valid = Vec::new();
    let mut root: Option<&Drive> = None;
    for (index, drive) in config.drives.iter().enumerate() {
        let earlier = config.drives.get(..index).unwrap_or(&[]);
        check(index, drive, earlier, broken);
        if drive.is_root_device {
            if let Some(first) = root {
                broken.push(Invalid::TwoRoots(
                    shown(&first.drive_id),
                    shown(&drive.drive_id),
                ));
            }
            root = root.or(Some(drive));
        }
        valid.push(of(drive, config.machine_config.vcpu_count));
    }
    valid.sort_by_key(|drive| drive.root.is_none());
    valid
}

fn check(index: usize, drive: &Drive, earlier: &[Drive], broken: &mut Vec<Invalid>) {
    let id = &drive.drive_id;
    if id.is_empty() {
        broken.push(Invalid::NoDriveId(index));
    } else if !is_id(id) {
        broken.push(Invalid::DriveId(shown(id)));
    } else if earlier.iter().any(|other| other.drive_id == *id) {
        broken.push(Invalid::SameDriveId(id.clone()));
    }
    let id = &shown(id);
    if drive.path_on_host.as_os_str().is_empty() {
        broken.push(Invalid::NoDrivePath(id.clone()));
    }
    if drive.backing.is_some() && format(drive) == Format::Raw {
        broken.push(Invalid::RawBacking(id.clone()));
    }
    if let Some(queues) = drive.num_queues
        && !(1..=MAX_QUEUES).contains(&queues)
    {
        broken.push(Invalid::Queues {
            id: id.clone(),
            queues,
        });
    }
    if let Some(serial) = &drive.serial
        && !((1..=SERIAL_BYTES).contains(&serial.len())
            && serial.bytes().all(|b| b.is_ascii_graphic()))
    {
        broken.push(Invalid::Serial {
            id: id.clone(),
            serial: shown(serial),
        });
    }
    if let Some(partuuid) = &drive.partuuid
        && drive.is_root_device
        && (partuuid.is_empty()
            || !partuuid
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-'))
    {
        broken.push(Invalid::PartUuid {
            id: id.clone(),
            partuuid: partuuid.clone(),
        });
    }
}

fn of(drive: &Drive, cpus: u8) -> ValidDrive {
    let queues = drive.num_queues.unwrap_or(u64::from(cpus)).max(1);
    let mode = if drive.is_read_only { "ro" } else { "rw" };
    let device = match &drive.partuuid {
        Some(partuuid) => format!("PARTUUID={partuuid}"),
        None => "/dev/vda".into(),
    };
    ValidDrive {
        id: drive.drive_id.clone(),
        path: drive.path_on_host.clone(),
        open: OpenOptions {
            format: format(drive),
            backing: match drive.backing {
                None | Some(BackingPlace::Beside) => Backing::BesideImage,
                Some(BackingPlace::Anywhere) => Backing::Anywhere,
            },
            read_only: drive.is_read_only,
            cache: match drive.cache_type {
                CacheType::Unsafe => Cache::Unsafe,
                CacheType::Writeback => Cache::Writeback,
                CacheType::Direct => Cache::Direct,
            },
            engine: match drive.io_engine {
                None => Engine::Auto,
                Some(IoEngine::Sync) => Engine::Sync,
                Some(IoEngine::Async) => Engine::IoUring,
            },
            ..OpenOptions::default()
        },
        limits: drive.rate_limiter.as_ref().map(limits).unwrap_or_default(),
        queues: u16::try_from(queues).unwrap_or(1),
        serial: drive.serial.clone(),
        root: drive
            .is_root_device
            .then(|| format!("root={device} {mode}")),
    }
}

fn format(drive: &Drive) -> Format {
    match drive.format {
        Some(DiskFormat::Raw) => Format::Raw,
        Some(DiskFormat::Qcow2) => Format::Qcow2,
        None => Format::by_name(&drive.path_on_host),
    }
}

pub(crate) fn limits(limiter: &RateLimiter) -> Limits {
    let bucket = |bucket: TokenBucket| Bucket {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: Duration::from_millis(bucket.refill_time),
    };
    Limits {
        bandwidth: limiter.bandwidth.map(bucket),
        ops: limiter.ops.map(bucket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate as validate_all;

    fn drive(id: &str) -> Drive {
        Drive {
            drive_id: id.into(),
            path_on_host: format!("{id}.img").into(),
            ..Drive::default()
        }
    }

    fn config(drives: Vec<Drive>) -> VmConfig {
        let mut config = VmConfig::default();
        config.boot_source.kernel_image_path = "k".into();
        config.machine_config.vcpu_count = 3;
        config.drives = drives;
        config
    }

    #[test]
    fn every_broken_rule_has_its_message() {
        let odd = Drive {
            drive_id: "a b".into(),
            num_queues: Some(65),
            ..drive("x")
        };
        let root = |id: &str, partuuid: &str| Drive {
            is_root_device: true,
            partuuid: Some(partuuid.into()),
            ..drive(id)
        };
        let raw = Drive {
            backing: Some(BackingPlace::Anywhere),
            ..drive("flat")
        };
        let numbered = |serial: &str| Drive {
            serial: Some(serial.into()),
            ..drive(&format!("n{}", serial.len()))
        };
        let nothing = Drive::default();
        let drives = vec![
            drive("a"),
            drive("a"),
            odd,
            root("r", "x y"),
            root("s", "1-2"),
            raw,
            numbered(""),
            numbered("a b"),
            numbered(&"x".repeat(SERIAL_BYTES + 1)),
            numbered(&"x".repeat(SERIAL_BYTES)),
            nothing,
        ];
        let broken = validate_all(&config(drives)).unwrap_err();
        let told: Vec<_> = broken.iter().map(ToString::to_string).collect();
        for (line, part) in told.iter().zip([
            "\"a\" is given to two",
            "\"a b\": a name has",
            "num_queues 65: give it 1 to 64",
            "partuuid \"x y\"",
            "\"r\" and \"s\" are both the root",
            "\"flat\" has \"backing\", and a raw image is laid over nothing",
            "\"n0\" has serial \"\": give it 1 to 20",
            "\"n3\" has serial \"a b\"",
            "\"n21\" has serial",
            "drives[10].drive_id is empty",
            "empty path_on_host",
        ]) {
            assert!(line.contains(part), "{line} / {part}");
        }
        assert_eq!(told.len(), 11, "{told:#?}");
        let many = (0..=MAX_DRIVES).map(|i| drive(&i.to_string())).collect();
        let broken = validate_all(&config(many)).unwrap_err();
        assert_eq!(broken, [Invalid::TooManyDrives(MAX_DRIVES + 1)]);
    }

    #[test]
    fn the_root_device_comes_first_and_names_itself() {
        let root = Drive {
            is_root_device: true,
            is_read_only: true,
            ..drive("root")
        };
        let valid = validate_all(&config(vec![drive("data"), root])).unwrap();
        let ids: Vec<_> = valid.drives.iter().map(|d| d.id.as_str()).collect();
        assert_eq!(ids, ["root", "data"]);
        assert_eq!(valid.drives[0].root.as_deref(), Some("root=/dev/vda ro"));
        assert_eq!(
            (valid.drives[0].queues, valid.drives[1].root.as_ref()),
            (3, None)
        );
    }

    #[test]
    fn bases_lie_beside_their_image_unless_it_is_said() {
        for (said, backing) in [
            (None, Backing::BesideImage),
            (Some(BackingPlace::Beside), Backing::BesideImage),
            (Some(BackingPlace::Anywhere), Backing::Anywhere),
        ] {
            let mut image = Drive {
                path_on_host: "a.qcow2".into(),
                backing: said,
                ..drive("d")
            };
            let valid = validate_all(&config(vec![image.clone()])).unwrap();
            assert_eq!(valid.drives[0].open.backing, backing);
            // By its name it is an image, and it is said to be none.
            image.format = Some(DiskFormat::Raw);
            assert_eq!(validate_all(&config(vec![image])).is_err(), said.is_some());
        }
    }

    #[test]
    fn the_format_is_said_or_in_the_name() {
        let named = |path: &str, format| Drive {
            path_on_host: path.into(),
            format,
            ..drive("d")
        };
        for (drive, format) in [
            (named("a.img", None), Format::Raw),
            (named("a.qcow2", None), Format::Qcow2),
            (named("a.qcow2", Some(DiskFormat::Raw)), Format::Raw),
            (named("a", Some(DiskFormat::Qcow2)), Format::Qcow2),
        ] {
            assert_eq!(of(&drive, 1).open.format, format, "{drive:?}");
        }
    }
}
