//! What lies in a guest's root and is no part of its image: folders and files of this host, volumes, memory.
//!
//! There is no file system that host and guest share: of a folder or file of this host the guest has a copy, made at each start as a
//! disk that is only read. What the guest writes lies over it, on the disk with the root's changes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use alveole_agent_protocol as protocol;
use alveole_agent_protocol::Source;
use alveole_erofs::{LeftOut, pack};
use alveole_instance::{Content, Placed, Record, Vm, Volumes};
use alveole_vm_config::{CacheType, Drive};
use anyhow::{Context, bail};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::empty_disk;
use crate::hint;
use crate::places::Places;

/// The size of a volume that is made because it is named: its disk is sparse.
pub(crate) const USUAL_BYTES: u64 = 10 << 30;
/// Each is a disk, and a machine has places for so many.
const MAX_DISKS: usize = 16;
/// What of the guest's root is its kernel's.
const KERNELS: [&str; 4] = ["/", "/proc", "/sys", "/dev"];

const EXPECTED: &str = "write HOST:GUEST[:ro] with a folder or file of this host, NAME:GUEST[:ro] with a volume (alveole volume ls), or GUEST alone; \
                        GUEST is a path that begins with /";

/// `-v` in one word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    placed: Placed,
    /// Words that other programs know, and that say nothing here.
    ignored: Vec<String>,
}

impl Volume {
    /// The name of what is there after the VM, too.
    pub(super) fn outlives_vm(&self) -> Option<&str> {
        match &self.placed.what {
            Content::Volume(name) => Some(name),
            _ => None,
        }
    }
}

/// A place in the guest: an absolute path without detours.
fn target(text: &str) -> Result<String, String> {
    if !text.starts_with('/') {
        return Err(format!(
            "{text:?} is no place in the guest, which begins with /; {EXPECTED}"
        ));
    }
    let mut parts = Vec::new();
    for part in Path::new(text).components() {
        match part {
            Component::Normal(name) => parts.push(name.to_string_lossy()),
            Component::ParentDir => {
                return Err(format!("{text:?} has ..: write the place itself"));
            }
            _ => {}
        }
    }
    let plain = format!("/{}", parts.join("/"));
    if KERNELS.contains(&plain.as_str()) {
        return Err(format!(
            "{plain:?} is the guest's own: name a folder or file below it"
        ));
    }
    Ok(plain)
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<_> = text.split(':').collect();
        let (what, place, options) = match words.as_slice() {
            [place] => (None, *place, ""),
            [what, place] => (Some(*what), *place, ""),
            [what, place, options] => (Some(*what), *place, *options),
            _ => return Err(format!("it has too many colons; {EXPECTED}")),
        };
        let what = match what {
            Some("") => return Err(format!("it names nothing of this host; {EXPECTED}")),
            Some(path) if path.contains('/') || path == "." || path == ".." => {
                Content::Host(path.into())
            }
            Some("~") => {
                return Err("'~' is for shells, which do not see it here: write $HOME".into());
            }
            Some(name) => Content::Volume(name.into()),
            None => Content::Own,
        };
        let mut volume = Self {
            placed: Placed {
                target: target(place)?,
                fill: !matches!(what, Content::Host(_)),
                what,
                read_only: false,
            },
            ignored: Vec::new(),
        };
        for option in options.split(',').filter(|o| !o.is_empty()) {
            match option {
                "ro" | "readonly" => volume.placed.read_only = true,
                "rw" => volume.placed.read_only = false,
                "nocopy" => volume.placed.fill = false,
                "z" | "Z" | "cached" | "delegated" | "consistent" | "private" | "rprivate"
                | "shared" | "rshared" | "slave" | "rslave" => {
                    volume.ignored.push(option.to_owned());
                }
                other => {
                    return Err(format!(
                        "{other:?} is no option of a volume: there are ro, rw and nocopy"
                    ));
                }
            }
        }
        Ok(volume)
    }
}

/// `--tmpfs` in one word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Memory(Placed);

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, options) = text.split_once(':').unwrap_or((text, ""));
        // As containers have it; what is said later counts.
        let mut all = vec!["nosuid", "nodev", "noexec", "mode=1777"];
        for option in options.split(',').filter(|o| !o.is_empty()) {
            match option.split_once('=') {
                Some(("size" | "mode" | "uid" | "gid" | "nr_inodes" | "nr_blocks", _)) => {}
                None if ["suid", "dev", "exec"].contains(&option) => {
                    let opposite = format!("no{option}");
                    all.retain(|o| *o != opposite);
                    continue;
                }
                None if ["rw", "ro", "nosuid", "nodev", "noexec"].contains(&option) => {}
                _ => {
                    return Err(format!(
                        "{option:?} is no option of memory: there are size=, mode=, uid=, gid=, nr_inodes=, ro, exec, suid and dev"
                    ));
                }
            }
            all.push(option);
        }
        Ok(Self(Placed {
            target: target(place)?,
            what: Content::Memory(all.join(",")),
            read_only: false,
            fill: false,
        }))
    }
}

/// All that is to lie in a guest's root: what was said, and for what the image says beside that, what is the VM's own. Each after those it lies in.
pub(crate) fn placed(
    said: &[Volume],
    memory: &[Memory],
    image: &[String],
) -> anyhow::Result<Vec<Placed>> {
    let mut all: Vec<Placed> = Vec::new();
    for volume in said {
        let mut placed = volume.placed.clone();
        if let Some(word) = volume.ignored.first() {
            hint(&format!(
                "'{word}' of '{}' says nothing here: nothing is shared with the guest",
                placed.target
            ));
        }
        if let Content::Host(path) = &mut placed.what {
            *path = on_host(path)?;
        }
        all.push(placed);
    }
    all.extend(memory.iter().map(|m| m.0.clone()));
    all.sort_by(|a, b| a.target.cmp(&b.target));
    if let Some(two) = all.windows(2).find(|two| two[0].target == two[1].target) {
        bail!(
            "'{}' is given twice: one thing can be at a place",
            two[0].target
        );
    }
    for place in image {
        // Others wrote it: what is no place is passed over.
        let Ok(target) = target(place) else { continue };
        if all.iter().all(|p| p.target != target) {
            all.push(Placed {
                target,
                what: Content::Own,
                read_only: false,
                fill: true,
            });
        }
    }
    let disks = all
        .iter()
        .filter(|p| matches!(p.what, Content::Host(_) | Content::Volume(_)));
    if disks.count() > MAX_DISKS {
        bail!("more than {MAX_DISKS} folders, files and volumes: each is a disk of the machine");
    }
    // What is above comes first.
    all.sort_by_key(|p| (p.target.matches('/').count(), p.target.clone()));
    Ok(all)
}

fn on_host(path: &Path) -> anyhow::Result<PathBuf> {
    let found = path.canonicalize().with_context(|| {
        format!(
            "cannot use '{}' of this host as a volume (it is not made by this)",
            path.display()
        )
    })?;
    let kind = fs::metadata(&found)
        .with_context(|| format!("cannot use '{}' as a volume", path.display()))?
        .file_type();
    if kind.is_dir() || kind.is_file() {
        return Ok(found);
    }
    let kind = match () {
        () if kind.is_socket() => {
            "a socket: its programs are on this host, and cannot be reached by a file of the guest"
        }
        () if kind.is_block_device() || kind.is_char_device() => {
            "a device of this host, which the guest does not have"
        }
        () => "a pipe of this host",
    };
    bail!("cannot use '{}' as a volume: it is {kind}", path.display())
}

/// Volumes that are named and not there are made.
pub(crate) fn make_missing(places: &Places, all: &[Placed]) -> anyhow::Result<()> {
    let volumes = places.volumes();
    for placed in all {
        let Content::Volume(name) = &placed.what else {
            continue;
        };
        match volumes.find(name) {
            Ok(_) => {}
            Err(alveole_instance::InstanceError::UnknownVolume(_)) => {
                make(places, &volumes, name, USUAL_BYTES, BTreeMap::new())?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Makes a volume; somebody else may have made it meanwhile.
pub(crate) fn make(
    places: &Places,
    volumes: &Volumes,
    name: &str,
    bytes: u64,
    labels: BTreeMap<String, String>,
) -> anyhow::Result<()> {
    volumes
        .create(name, bytes, labels, |disk| {
            empty_disk::make(&places.empty_disks(), bytes, disk)
        })
        .map(drop)
}

/// Says what is copied, as nothing else would tell that it is no shared folder.
pub(crate) fn say_what_is_copied(record: &Record) {
    let copied: Vec<_> = record
        .volumes
        .iter()
        .filter_map(|p| match &p.what {
            Content::Host(path) => Some((path.display().to_string(), p.read_only)),
            _ => None,
        })
        .collect();
    if copied.is_empty() {
        return;
    }
    let names: Vec<_> = copied.iter().map(|(name, _)| name.as_str()).collect();
    let back = match copied.iter().all(|(_, read_only)| *read_only) {
        true => "",
        false => ", and what it writes stays in the VM (alveole cp brings it back)",
    };
    hint(&format!(
        "the guest has a copy of {} as of now{back}",
        names.join(", ")
    ));
}

/// What a start of the machine needs for them.
#[derive(Default)]
pub(crate) struct Prepared {
    pub(crate) drives: Vec<Drive>,
    pub(crate) mounts: Vec<protocol::Volume>,
    /// What lives as long as the machine does.
    pub(crate) held: Vec<Box<dyn Send>>,
    /// What of folders was not copied, in words.
    pub(crate) left_out: Vec<String>,
}

/// Whether a disk is needed that takes what is written to them, though the root be one that is only read.
pub(crate) fn write_changes(all: &[Placed]) -> bool {
    all.iter().any(|p| {
        matches!(p.what, Content::Own) || matches!(p.what, Content::Host(_)) && !p.read_only
    })
}

/// What becomes of copies of folders.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copies {
    /// They are made.
    New,
    /// They are there.
    Kept,
}

/// Makes ready what a VM has.
pub(crate) fn prepare(places: &Places, vm: &Vm, copies: Copies) -> anyhow::Result<Prepared> {
    let mut prepared = Prepared::default();
    for (number, placed) in vm.record.volumes.iter().enumerate() {
        let serial = format!("volume{number}");
        let disk = |path: PathBuf, is_read_only| Drive {
            drive_id: serial.clone(),
            serial: Some(serial.clone()),
            path_on_host: path,
            is_read_only,
            cache_type: CacheType::Writeback,
            ..Drive::default()
        };
        let mut volume = protocol::Volume {
            mount: protocol::Mount {
                source: Source::Disk(serial.clone()),
                kind: String::new(),
                target: placed.target.clone(),
                read_only: placed.read_only,
                options: String::new(),
            },
            within: String::new(),
            changes: None,
            fill: placed.fill,
        };
        match &placed.what {
            Content::Host(path) => {
                let image = vm.at(&format!("{serial}.erofs"));
                if copies == Copies::New {
                    prepared.left_out.extend(copy(path, &image)?);
                }
                if path.is_file() {
                    volume.within = last_name(path)?;
                }
                volume.mount.kind = "erofs".into();
                volume.changes = (!placed.read_only).then(|| key(&placed.target));
                prepared.drives.push(disk(image, true));
            }
            Content::Volume(name) => {
                let found = places.volumes().find(name)?;
                prepared.held.push(Box::new(found.take(placed.read_only)?));
                volume.mount.kind = "ext4".into();
                volume.within = "data".into();
                prepared.drives.push(disk(found.disk(), placed.read_only));
            }
            Content::Own => {
                volume.mount.source = Source::Nothing;
                volume.changes = Some(key(&placed.target));
            }
            Content::Memory(options) => {
                volume.mount.source = Source::Nothing;
                volume.mount.kind = "tmpfs".into();
                volume.mount.options.clone_from(options);
            }
        }
        prepared.mounts.push(volume);
    }
    Ok(prepared)
}

fn last_name(path: &Path) -> anyhow::Result<String> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| {
        format!(
            "cannot use '{}' as a volume: its name is no UTF-8",
            path.display()
        )
    })?;
    Ok(name.to_owned())
}

/// The name of a folder for what is written at a place: the same for the same place, whatever else the VM has.
fn key(target: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    let mut key = String::new();
    for byte in target.trim_start_matches('/').bytes() {
        match byte {
            _ if plain(byte) => key.push(byte.into()),
            _ => key.push_str(&format!("_{byte:02x}")),
        }
    }
    // Of a long place its end tells it apart, and its length.
    match key.len() {
        0..=200 => key,
        length => format!("{length}-{}", &key[length - 180..]),
    }
}

/// Copies a folder or file of this host into an image; says what of it was left out.
fn copy(from: &Path, image: &Path) -> anyhow::Result<Option<String>> {
    let act = || format!("cannot copy '{}' for the VM", from.display());
    let _ = fs::remove_file(image);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(image)
        .with_context(act)?;
    // Not the images themselves, where the folder has the VMs in it.
    let own = image.parent().and_then(Path::parent);
    let own = own.and_then(|folder| fs::metadata(folder).ok());
    let own = own.map(|m| (m.dev(), m.ino()));
    // Each copy is another file system, so that nothing in the guest takes a file of it for one of an earlier copy.
    let mut uuid = [0; 16];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    uuid.copy_from_slice(&now.unwrap_or_default().as_nanos().to_le_bytes());
    let left_out = match pack(from, file, uuid, own) {
        Ok(left_out) => left_out,
        Err(e) => {
            let _ = fs::remove_file(image);
            return Err(e).with_context(act);
        }
    };
    Ok(words_of(&left_out).map(|what| format!("of '{}' {what}", from.display())))
}

/// What was left out, if anything was.
fn words_of(left_out: &LeftOut) -> Option<String> {
    let count = |number: u64, one: &str, many: &str| match number {
        0 => None,
        1 => Some(format!("1 {one}")),
        number => Some(format!("{number} {many}")),
    };
    let special = count(left_out.special, "socket or device", "sockets and devices");
    let mounts = count(
        left_out.mounts,
        "mounted file system",
        "mounted file systems",
    );
    let words: Vec<_> = special.into_iter().chain(mounts).collect();
    (!words.is_empty()).then(|| words.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(text: &str) -> Result<Placed, String> {
        text.parse().map(|v: Volume| v.placed)
    }

    #[test]
    fn volumes_in_one_word() {
        let host = volume("./a:/b//c/:ro,z").unwrap();
        assert_eq!(host.what, Content::Host("./a".into()));
        assert_eq!((host.target.as_str(), host.read_only), ("/b/c", true));
        assert!(!host.fill);
        let named = volume("data:/var/lib/data").unwrap();
        assert_eq!(named.what, Content::Volume("data".into()));
        assert!(named.fill && !named.read_only);
        assert!(!volume("data:/x:nocopy").unwrap().fill);
        assert_eq!(volume("/data").unwrap().what, Content::Own);
        assert_eq!(volume(".:/x").unwrap().what, Content::Host(".".into()));
        for (text, said) in [
            ("", "begins with /"),
            ("data", "begins with /"),
            ("/a:b", "begins with /"),
            (":/a", "names nothing"),
            ("a:/b:rx", "\"rx\""),
            ("a:/b:ro:x", "colons"),
            ("a:/", "own"),
            ("a:/proc/", "own"),
            ("a:/x/../y", ".."),
            ("~:/x", "$HOME"),
        ] {
            let error = volume(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn memory_in_one_word() {
        let options = |text: &str| {
            text.parse().map(|m: Memory| match m.0.what {
                Content::Memory(options) => options,
                _ => String::new(),
            })
        };
        assert_eq!(options("/tmp").unwrap(), "nosuid,nodev,noexec,mode=1777");
        assert_eq!(
            options("/tmp:size=64m,exec").unwrap(),
            "nosuid,nodev,mode=1777,size=64m"
        );
        assert!(options("/tmp:much").unwrap_err().contains("size="));
    }

    #[test]
    fn what_is_above_comes_first_and_a_place_is_taken_once() {
        let parse =
            |words: &[&str]| -> Vec<Volume> { words.iter().map(|w| w.parse().unwrap()).collect() };
        let memory: Vec<Memory> = vec!["/z".parse().unwrap()];
        let image = ["/data/".to_owned(), "/a/b".into(), "no place".into()];
        let all = placed(&parse(&["one:/a/b/c", "two:/a/b"]), &memory, &image).unwrap();
        let targets: Vec<_> = all.iter().map(|p| p.target.as_str()).collect();
        assert_eq!(targets, ["/data", "/z", "/a/b", "/a/b/c"]);
        assert_eq!(all[2].what, Content::Volume("two".into()));
        let twice = placed(&parse(&["one:/z"]), &memory, &[]).unwrap_err();
        assert!(twice.to_string().contains("/z"), "{twice}");
        let none = placed(&parse(&["/no/such/folder:/a"]), &[], &[]).unwrap_err();
        assert!(format!("{none:#}").contains("/no/such/folder"), "{none:#}");
        let device = placed(&parse(&["/dev/null:/a"]), &[], &[]).unwrap_err();
        assert!(device.to_string().contains("device"), "{device}");
    }

    #[test]
    fn what_is_left_out_is_told_in_words() {
        let words = |special, mounts| words_of(&LeftOut { special, mounts });
        assert_eq!(words(0, 0), None);
        assert_eq!(words(1, 0).unwrap(), "1 socket or device");
        assert_eq!(
            words(2, 1).unwrap(),
            "2 sockets and devices and 1 mounted file system"
        );
    }

    #[test]
    fn places_have_folders_of_their_own() {
        assert_eq!(key("/var/lib"), "var_2flib");
        assert_ne!(key("/a/b"), key("/a_2fb"));
        assert!(key(&format!("/{}", "x".repeat(4000))).len() < 256);
    }
}
