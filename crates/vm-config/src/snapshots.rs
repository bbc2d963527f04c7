//! The bodies of requests that take and load snapshots.

use std::path::PathBuf;

use crate::object::Object;
use crate::read;
use crate::types::{BackingPlace, DiskFormat, Egress, HugePages, LinkKind};

/// Takes a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotCreate {
    /// Where the state of processors and devices goes.
    pub snapshot_path: PathBuf,
    /// Where guest memory goes.
    pub mem_file_path: PathBuf,
    /// How much of it.
    pub snapshot_type: SnapshotType,
    /// Whether the guest goes on while memory is written. It stands still for a moment; no need to pause it before.
    pub live: bool,
    /// Disks whose images are copied, as they are at the same instant as memory.
    pub drives: Vec<DriveCopy>,
    /// Whether the files are on the medium when the snapshot is told to be whole. Without it a host that loses power may lose it.
    pub sync: bool,
    /// Whether pages the guest writes are remembered from this snapshot on, if they were not before: a diff after it has these alone.
    pub track_dirty_pages: bool,
    /// Whether diffs after it build upon it. Of one that is not kept, they build upon the one before.
    pub is_base: bool,
}

impl Default for SnapshotCreate {
    fn default() -> Self {
        Self {
            snapshot_path: PathBuf::new(),
            mem_file_path: PathBuf::new(),
            snapshot_type: SnapshotType::default(),
            live: false,
            drives: Vec::new(),
            sync: true,
            track_dirty_pages: false,
            is_base: true,
        }
    }
}

/// A disk whose image is copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriveCopy {
    /// Its name.
    pub drive_id: String,
    /// Where the copy goes.
    pub path_on_host: PathBuf,
}

/// How much of guest memory a snapshot has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What the guest and its devices have written since the snapshot before; that must stay where it is.
    Diff,
}

/// Loads a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotLoad {
    /// Where the state of processors and devices is.
    pub snapshot_path: PathBuf,
    /// Who has guest memory; none: the file that the snapshot names.
    pub mem_backend: Option<MemoryBackend>,
    /// Whether its memory is read into huge pages, and not mapped from the file; none: as the snapshot's guest had it.
    pub huge_pages: Option<HugePages>,
    /// Whether pages the guest writes are remembered from now on, for diff snapshots.
    pub track_dirty_pages: bool,
    /// Whether the guest runs at once.
    pub resume_vm: bool,
    /// Interfaces that are carried by something else than in the snapshot.
    pub network_overrides: Vec<NetworkOverride>,
    /// Where the sockets of the socket device are.
    pub vsock_override: Option<VsockOverride>,
    /// Disks that lie somewhere else than in the snapshot.
    pub drive_overrides: Vec<DriveOverride>,
    /// Whether the guest's clock goes on from the time of now, and not from that of the snapshot.
    pub clock_realtime: bool,
    /// A file that says which pages a guest of this snapshot touches first: they are read from the memory file while it goes on. If it is not
    /// there, it is made of what this guest touches.
    pub working_set_path: Option<PathBuf>,
    /// After which time of running that is looked at, in milliseconds; none: [`WORKING_SET_MS`].
    pub working_set_ms: Option<u64>,
}

/// For how long a guest's touching of memory is of interest, in milliseconds, where nothing is said.
pub const WORKING_SET_MS: u64 = 1000;

/// Who has the memory of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBackend {
    /// What it is.
    pub backend_type: MemoryBackendType,
    /// The file, or the socket of the process.
    pub backend_path: PathBuf,
}

/// What has the memory of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MemoryBackendType {
    /// A file, which is mapped.
    #[default]
    File,
    /// A process that answers page faults.
    Uffd,
}

/// An interface that is carried by something else than in the snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOverride {
    /// Its name.
    pub iface_id: String,
    /// What carries it.
    pub host_dev_name: String,
    /// What `host_dev_name` names; none: the same as in the snapshot.
    pub link: Option<LinkKind>,
    /// The numbers of descriptors of `/dev/vhost-net`, of an interface with `vhost`; none: as in the snapshot.
    pub vhost_fds: Option<String>,
    /// What the guest may send by it; none: as in the snapshot.
    pub egress: Option<Egress>,
    /// Whether the cable is in. Out, the guest is told so as it goes on.
    pub link_up: bool,
}

impl Default for NetworkOverride {
    fn default() -> Self {
        Self {
            iface_id: String::new(),
            host_dev_name: String::new(),
            link: None,
            vhost_fds: None,
            egress: None,
            link_up: true,
        }
    }
}

/// Where the sockets of the socket device are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VsockOverride {
    /// The path of the host's socket.
    pub uds_path: PathBuf,
}

/// A disk that lies somewhere else than in the snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriveOverride {
    /// Its name.
    pub drive_id: String,
    /// Where it lies.
    pub path_on_host: PathBuf,
    /// How blocks lie in the file; none: as in the snapshot. One that is named has the default for `backing`, too.
    pub format: Option<DiskFormat>,
    /// Where the files that an image is laid over may lie; none: as in the snapshot.
    pub backing: Option<BackingPlace>,
}

pub(crate) fn create(body: &mut Object<'_>) -> SnapshotCreate {
    SnapshotCreate {
        snapshot_path: body.required("snapshot_path"),
        mem_file_path: body.required("mem_file_path"),
        snapshot_type: body.optional("snapshot_type").unwrap_or_default(),
        live: body.optional("live").unwrap_or_default(),
        drives: body.list("drives", |body| DriveCopy {
            drive_id: body.required("drive_id"),
            path_on_host: body.required("path_on_host"),
        }),
        sync: body.optional("sync").unwrap_or(true),
        track_dirty_pages: body.optional("track_dirty_pages").unwrap_or_default(),
        is_base: body.optional("is_base").unwrap_or(true),
    }
}

pub(crate) fn load(body: &mut Object<'_>) -> SnapshotLoad {
    // The older names of two fields, which clients still send.
    let tracked: Option<bool> = body.optional("track_dirty_pages");
    let enabled: Option<bool> = body.optional("enable_diff_snapshots");
    let file = body.take("mem_file_path").filter(|value| !value.is_null());
    let backend = body.section("mem_backend", |body| MemoryBackend {
        backend_type: body.required("backend_type"),
        backend_path: body.required("backend_path"),
    });
    let mem_backend = match (backend, file) {
        (Some(backend), Some(file)) => {
            file.wrong("mem_backend is given, too: leave one of them out");
            Some(backend)
        }
        (None, Some(file)) => file.read().map(|backend_path| MemoryBackend {
            backend_type: MemoryBackendType::File,
            backend_path,
        }),
        (backend, None) => backend,
    };
    let huge_pages = body.take("huge_pages").filter(|value| !value.is_null());
    let huge_pages = huge_pages.and_then(|value| {
        let said = value.read::<String>()?;
        match said.as_str() {
            "Snapshot" => None,
            other => read::pages_of_word(&value, other, "Snapshot, "),
        }
    });
    SnapshotLoad {
        snapshot_path: body.required("snapshot_path"),
        mem_backend,
        huge_pages,
        track_dirty_pages: tracked.or(enabled).unwrap_or_default(),
        resume_vm: body.optional("resume_vm").unwrap_or_default(),
        network_overrides: body.list("network_overrides", |body| NetworkOverride {
            iface_id: body.required("iface_id"),
            host_dev_name: body.required("host_dev_name"),
            link: body.optional("link"),
            vhost_fds: body.optional("vhost_fds"),
            egress: body.section("egress", read::egress),
            link_up: body.optional("link_up").unwrap_or(true),
        }),
        vsock_override: body.section("vsock_override", |body| VsockOverride {
            uds_path: body.required("uds_path"),
        }),
        drive_overrides: body.list("drive_overrides", |body| DriveOverride {
            drive_id: body.required("drive_id"),
            path_on_host: body.required("path_on_host"),
            format: body.optional("format"),
            backing: body.optional("backing"),
        }),
        clock_realtime: body.optional("clock_realtime").unwrap_or_default(),
        working_set_path: body.optional("working_set_path"),
        working_set_ms: body.optional("working_set_ms"),
    }
}

read::words! { SnapshotType, "one of \"Full\", \"Diff\"",
"Full" => SnapshotType::Full, "Diff" => SnapshotType::Diff, }
read::words! { MemoryBackendType, "one of \"File\", \"Uffd\"",
"File" => MemoryBackendType::File, "Uffd" => MemoryBackendType::Uffd, }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Body;

    fn load(text: &str) -> Result<SnapshotLoad, String> {
        SnapshotLoad::from_json_bytes(text.as_bytes(), "body").map_err(|e| e.to_string())
    }

    #[test]
    fn old_and_new_names_mean_the_same() {
        let old =
            load(r#"{"snapshot_path": "s", "mem_file_path": "m", "enable_diff_snapshots": true}"#);
        let new = load(
            r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"},
                "track_dirty_pages": true}"#,
        );
        assert_eq!(old, new);
        assert!(old.unwrap().track_dirty_pages);
        for (said, pages) in [
            ("Snapshot", None),
            ("None", Some(HugePages::None)),
            ("Transparent", Some(HugePages::Transparent)),
            ("2M", Some(HugePages::Hugetlb2M)),
        ] {
            let body = format!(r#"{{"snapshot_path": "s", "huge_pages": "{said}"}}"#);
            assert_eq!(load(&body).unwrap().huge_pages, pages);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (body, part) in [
            ("{}", "\"snapshot_path\": this field is required"),
            (
                r#"{"snapshot_path": "s", "mem_file_path": "m", "mem_backend": {"backend_type": "File", "backend_path": "m"}}"#,
                "leave one of them out",
            ),
            (
                r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "Disk", "backend_path": "m"}}"#,
                "one of \"File\", \"Uffd\"",
            ),
            (
                r#"{"snapshot_path": "s", "huge_pages": "1G"}"#,
                "known are Snapshot, None, Transparent, 2M",
            ),
            (
                r#"{"snapshot_path": "s", "network_overrides": [{"iface_id": "a"}]}"#,
                "host_dev_name",
            ),
        ] {
            let told = load(body).unwrap_err();
            assert!(told.contains(part), "{told}");
        }
    }

    #[test]
    fn a_snapshot_is_full_and_not_live_by_default() {
        let body = r#"{"snapshot_path": "s", "mem_file_path": "m"}"#;
        let create = SnapshotCreate::from_json_bytes(body.as_bytes(), "body").unwrap();
        assert_eq!(create.snapshot_type, SnapshotType::Full);
        assert!(!create.live && create.sync && create.drives.is_empty());
    }

    #[test]
    fn what_is_named_anew_says_how_it_is_used() {
        let body = r#"{"snapshot_path": "s",
            "drive_overrides": [{"drive_id": "a", "path_on_host": "b", "format": "qcow2", "backing": "anywhere"}],
            "network_overrides": [{"iface_id": "n", "host_dev_name": "7", "link": "fd", "vhost_fds": "8", "link_up": false,
                                   "egress": {"default": "closed"}},
                                  {"iface_id": "m", "host_dev_name": "tap1"}]}"#;
        let load = load(body).unwrap();
        let drive = &load.drive_overrides[0];
        assert_eq!(drive.format, Some(DiskFormat::Qcow2));
        assert_eq!(drive.backing, Some(BackingPlace::Anywhere));
        let [fd, tap] = &load.network_overrides[..] else {
            panic!("{load:?}");
        };
        assert_eq!((fd.link, fd.link_up), (Some(LinkKind::Fd), false));
        assert_eq!(fd.vhost_fds.as_deref(), Some("8"));
        assert!(fd.egress.is_some());
        let plain = NetworkOverride {
            iface_id: "m".into(),
            host_dev_name: "tap1".into(),
            ..NetworkOverride::default()
        };
        assert_eq!(*tap, plain, "the cable is in, and the rest as it was");
    }
}
