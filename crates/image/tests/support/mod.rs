//! What tests of images share: layers from lists of entries, and trees as lines of text.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Output};

use alveole_erofs::{Image, Kind};
use tar::{EntryType, Header};

/// Says loudly that a test cannot run here, and has it counted.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
    }
}

/// Whether programs are here; says so where one is not.
pub(crate) fn have(test: &str, programs: &[&str]) -> bool {
    for program in programs {
        if Command::new(program).arg("--version").output().is_err() {
            skip(test, &format!("there is no {program}"));
            return false;
        }
    }
    true
}

/// Runs a command that must succeed.
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// An entry of a layer.
#[derive(Debug, Clone)]
pub(crate) struct E {
    pub(crate) path: String,
    pub(crate) kind: EntryType,
    pub(crate) link: String,
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

fn entry(path: &str, kind: EntryType) -> E {
    E {
        path: path.into(),
        kind,
        link: String::new(),
        data: Vec::new(),
        mode: 0o755,
        device: (0, 0),
        xattrs: Vec::new(),
    }
}

pub(crate) fn file(path: &str, data: impl Into<Vec<u8>>) -> E {
    E {
        data: data.into(),
        mode: 0o644,
        ..entry(path, EntryType::Regular)
    }
}

pub(crate) fn dir(path: &str) -> E {
    entry(path, EntryType::Directory)
}

pub(crate) fn symlink(path: &str, to: &str) -> E {
    E {
        link: to.into(),
        mode: 0o777,
        ..entry(path, EntryType::Symlink)
    }
}

pub(crate) fn link(path: &str, to: &str) -> E {
    E {
        link: to.into(),
        ..entry(path, EntryType::Link)
    }
}

pub(crate) fn device(path: &str, major: u32, minor: u32) -> E {
    E {
        device: (major, minor),
        ..entry(path, EntryType::Char)
    }
}

/// A layer of these entries, with owners and times made of their places.
pub(crate) fn layer(entries: &[E]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (index, e) in entries.iter().enumerate() {
        let mut header = Header::new_gnu();
        header.set_entry_type(e.kind);
        header.set_mode(e.mode);
        header.set_uid(1000 + index as u64);
        header.set_gid(2000 + index as u64);
        header.set_mtime(1_600_000_000 + index as u64);
        header.set_size(e.data.len() as u64);
        header.set_device_major(e.device.0).unwrap();
        header.set_device_minor(e.device.1).unwrap();
        let mut records = Vec::new();
        let mut record = |key: &str, value: &[u8]| {
            let rest = key.len() + value.len() + 3;
            let len = (1..6)
                .map(|digits| rest + digits)
                .find(|len| len.to_string().len() == len - rest)
                .unwrap();
            records.extend(format!("{len} {key}=").into_bytes());
            records.extend_from_slice(value);
            records.push(b'\n');
        };
        if e.path.len() < 100 {
            header.as_mut_bytes()[..e.path.len()].copy_from_slice(e.path.as_bytes());
        } else {
            record("path", e.path.as_bytes());
        }
        if e.link.len() < 100 {
            header.as_mut_bytes()[157..157 + e.link.len()].copy_from_slice(e.link.as_bytes());
        } else {
            record("linkpath", e.link.as_bytes());
        }
        for (name, value) in &e.xattrs {
            record(&format!("SCHILY.xattr.{name}"), value);
        }
        header.set_cksum();
        if !records.is_empty() {
            let mut extended = Header::new_ustar();
            extended.set_entry_type(EntryType::XHeader);
            extended.set_size(records.len() as u64);
            extended.set_cksum();
            tar.extend_from_slice(extended.as_bytes());
            tar.extend_from_slice(&records);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.extend_from_slice(header.as_bytes());
        tar.extend_from_slice(&e.data);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

/// A tree: what can be seen of each path, in a line.
pub(crate) type Tree = BTreeMap<Vec<u8>, String>;

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The tree of a root disk.
pub(crate) fn disk_tree(path: &Path) -> Tree {
    let image = Image::open(File::open(path).unwrap()).unwrap();
    let mut tree = Tree::new();
    let mut left = vec![(Vec::new(), image.root())];
    while let Some((path, nid)) = left.pop() {
        let info = image.info(nid).unwrap();
        if info.kind == Kind::Directory {
            for entry in image.entries(&info).unwrap() {
                left.push(([&path[..], b"/", &entry.name].concat(), entry.nid));
            }
        }
        let m = &info.metadata;
        let what = match info.kind {
            Kind::File => {
                let mut data = vec![0; info.size_bytes as usize];
                image.read_at(&info, 0, &mut data).unwrap();
                format!("{} bytes {:x}", data.len(), hash(&data))
            }
            Kind::Symlink => format!(
                "to {:?}",
                String::from_utf8_lossy(&image.target(&info).unwrap())
            ),
            _ => format!("{:?}", info.device),
        };
        let xattrs: Vec<_> = m
            .xattrs
            .iter()
            .map(|(n, v)| (String::from_utf8_lossy(n), hash(v)))
            .collect();
        let line = format!(
            "{:?} {:o} {}:{} {}.{} links {} {what} {xattrs:?}",
            info.kind,
            m.mode,
            m.uid,
            m.gid,
            m.mtime,
            m.mtime_nsec,
            if info.kind == Kind::Directory {
                0
            } else {
                info.links
            },
        );
        tree.insert(path, line);
    }
    tree
}

/// The tree of a folder of this host.
pub(crate) fn host_tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let m = fs::symlink_metadata(&path).unwrap();
        let kind = m.file_type();
        let kind = match () {
            () if kind.is_dir() => Kind::Directory,
            () if kind.is_symlink() => Kind::Symlink,
            () if kind.is_char_device() => Kind::CharDevice,
            () if kind.is_block_device() => Kind::BlockDevice,
            () if kind.is_fifo() => Kind::Fifo,
            () if kind.is_socket() => Kind::Socket,
            () => Kind::File,
        };
        let device = (rustix::fs::major(m.rdev()), rustix::fs::minor(m.rdev()));
        let what = match kind {
            Kind::File => {
                let data = fs::read(&path).unwrap();
                format!("{} bytes {:x}", data.len(), hash(&data))
            }
            Kind::Symlink => format!(
                "to {:?}",
                String::from_utf8_lossy(fs::read_link(&path).unwrap().as_os_str().as_bytes())
            ),
            _ => format!("{device:?}"),
        };
        let mut names = vec![0; 65536];
        let len = rustix::fs::llistxattr(&path, &mut names[..]).unwrap_or(0);
        let mut xattrs: Vec<_> = names[..len]
            .split(|b| *b == 0)
            .filter(|name| !name.is_empty())
            .map(|name| {
                let mut value = vec![0; 65536];
                let len =
                    rustix::fs::lgetxattr(&path, std::ffi::OsStr::from_bytes(name), &mut value[..])
                        .unwrap();
                (
                    String::from_utf8_lossy(name).into_owned(),
                    hash(&value[..len]),
                )
            })
            .collect();
        xattrs.sort();
        let line = format!(
            "{kind:?} {:o} {}:{} {}.{} links {} {what} {xattrs:?}",
            m.mode() & 0o7777,
            m.uid(),
            m.gid(),
            m.mtime(),
            m.mtime_nsec(),
            if kind == Kind::Directory {
                0
            } else {
                m.nlink()
            },
        );
        tree.insert(
            path.as_os_str().as_bytes()[root.as_os_str().len()..].to_vec(),
            line,
        );
        if kind == Kind::Directory {
            left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
    }
    tree
}

/// Fails with the first difference.
pub(crate) fn assert_same(ours: &Tree, theirs: &Tree) {
    let show = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    for (path, line) in theirs {
        assert_eq!(ours.get(path), Some(line), "{} (ours first)", show(path));
    }
    for path in ours.keys() {
        assert!(theirs.contains_key(path), "only ours has {}", show(path));
    }
}

/// An OCI layout in a folder, of these layers, called `latest`.
pub(crate) fn layout(at: &Path, layers: &[Vec<u8>]) {
    fs::create_dir_all(at.join("blobs/sha256")).unwrap();
    let add = |bytes: &[u8]| {
        let digest = alveole_image::Digest::of(bytes);
        fs::write(at.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        digest.to_string()
    };
    let descriptor = |kind: &str, bytes: &[u8]| serde_json::json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": add(bytes), "size": bytes.len() });
    let layer_list: Vec<_> = layers
        .iter()
        .map(|bytes| descriptor("layer.v1.tar", bytes))
        .collect();
    let diff_ids: Vec<String> = layers
        .iter()
        .map(|bytes| alveole_image::Digest::of(bytes).to_string())
        .collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "created": "2024-01-02T03:04:05Z",
        "config": { "Env": ["PATH=/bin", "A=b c"], "Entrypoint": ["/bin/e"], "Cmd": ["x", "y"], "User": "7:8", "WorkingDir": "/w",
            "Volumes": { "/data": {} }, "ExposedPorts": { "80/tcp": {} }, "StopSignal": "SIGQUIT", "Labels": { "l": "m" } },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        // umoci insists on one.
        "history": layers.iter().map(|_| serde_json::json!({ "created_by": "a test" })).collect::<Vec<_>>(),
    });
    let config = descriptor("config.v1+json", config.to_string().as_bytes());
    let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layer_list });
    let mut manifest = descriptor("manifest.v1+json", manifest.to_string().as_bytes());
    manifest["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "latest" });
    fs::write(
        at.join("index.json"),
        serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string(),
    )
    .unwrap();
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}
