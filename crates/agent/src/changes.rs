//! The root's changes as a layer of an image: what the overlay keeps, with its whiteouts and opaque directories as the OCI
//! image specification has them ("Image Layer Filesystem Changeset").
//!
//! How the overlay marks them is said in the kernel's Documentation/filesystems/overlayfs.rst.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use alveole_agent_protocol::{Changes, Refusal};
use rustix::fs::{Mode, OFlags, open};
use tar::{Builder, EntryType, Header};

use crate::copy::{chain, refused, start};
use crate::freeze::Frozen;
use crate::mount::CHANGED;
use crate::session::Job;

/// Attributes of the overlay's own.
const OVERLAY: &[u8] = b"trusted.overlay.";
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Most bytes of the names or of one value of a file's attributes (limits.h: XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MAX_ATTRIBUTE: usize = 64 << 10;
/// Longest name in a header's own field.
const MAX_SHORT_NAME: usize = 100;

/// What this agent writes for the guest (`init`): it is the guest's, and no image's.
const OWN: [&str; 3] = ["etc/hostname", "etc/hosts", "etc/resolv.conf"];
/// Where it shows the modules of the guest's kernel (`mount`), below one of these.
const MODULES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// Packs the changes, as output. `changes`: the disk on which they are kept.
pub(crate) fn pack(request: Changes, changes: Option<&OwnedFd>) -> Result<Job, Refusal> {
    let failed = |e: &dyn std::fmt::Display| {
        refused(
            Refusal::FAILED,
            format!("cannot read what was changed in the guest: {e}"),
        )
    };
    let Some(changes) = changes else {
        return Err(failed(
            &"nothing of its root is kept on a disk; was it started without one?",
        ));
    };
    let path = format!("/proc/self/fd/{}", changes.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let disk = open(path, flags, Mode::empty()).map_err(|e| failed(&e))?;
    start(|ours| {
        let (output, theirs) = ours?;
        let root = PathBuf::from(format!("/proc/self/fd/{}/{CHANGED}", disk.as_raw_fd()));
        let kept = disk.try_clone()?;
        let work = move || {
            // The paths lead through it.
            let _kept = kept;
            let frozen = match request.freeze {
                true => Some(Frozen::new(disk).map_err(|e| {
                    format!("cannot hold the guest's disk still: {e}; --no-freeze does without")
                })?),
                false => None,
            };
            let written = write_layer(&root, File::from(theirs)).map_err(|e| chain(&e));
            drop(frozen);
            written.map_err(|e| format!("cannot read what was changed in the guest: {e}"))
        };
        Ok((None, Some(output), work))
    })
}

/// Writes the layer of what lies in `root`, an overlay's upper directory, sorted by name.
fn write_layer(root: &Path, to: impl Write) -> io::Result<()> {
    let mut layer = Layer {
        out: Builder::new(to),
        links: HashMap::new(),
    };
    layer.out.follow_symlinks(false);
    layer.out.sparse(true);
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let mut left = vec![PathBuf::new()];
    while let Some(relative) = left.pop() {
        let is_own = OWN.iter().any(|own| relative == Path::new(own))
            || MODULES
                .iter()
                .any(|m| relative == Path::new(m).join(&release));
        if is_own {
            continue;
        }
        let named =
            |e: io::Error| io::Error::new(e.kind(), format!("/{}: {e}", relative.display()));
        if layer.one(root, &relative).map_err(named)? {
            let entries: Result<Vec<PathBuf>, io::Error> = fs::read_dir(root.join(&relative))
                .map_err(named)?
                .map(|entry| entry.map(|e| relative.join(e.file_name())))
                .collect();
            let mut entries = entries.map_err(named)?;
            // The last is taken first.
            entries.sort_unstable_by(|a, b| b.cmp(a));
            left.extend(entries);
        }
    }
    layer.out.finish()?;
    layer.out.get_mut().flush()
}

struct Layer<W: Write> {
    out: Builder<W>,
    /// Names of files that have several, by their numbers.
    links: HashMap<u64, PathBuf>,
}

impl<W: Write> Layer<W> {
    /// Writes one entry; says whether it is a directory.
    fn one(&mut self, root: &Path, relative: &Path) -> io::Result<bool> {
        let path = root.join(relative);
        let found = fs::symlink_metadata(&path)?;
        let kind = found.file_type();
        if kind.is_char_device() && found.rdev() == 0 {
            self.mark(relative)?;
            return Ok(false);
        }
        let (own, overlay) = attributes(&path)?;
        let overlay = |name: &str| {
            let found = overlay
                .iter()
                .find(|(n, _)| n.strip_prefix(OVERLAY) == Some(name.as_bytes()));
            found.map(|(_, value)| value.as_slice())
        };
        if overlay("redirect").is_some() || overlay("metacopy").is_some() {
            return Err(io::Error::other(
                "the overlay keeps it as a change of something elsewhere (redirect_dir or metacopy), which a layer cannot say",
            ));
        }
        if kind.is_file() && overlay("whiteout").is_some() {
            self.mark(relative)?;
            return Ok(false);
        }
        let name = relative.file_name().unwrap_or_default();
        if name.as_bytes().starts_with(WHITEOUT) {
            return Err(io::Error::other(
                "layers have no names that begin with .wh., which mean that something is gone",
            ));
        }
        if kind.is_socket() {
            return Ok(false);
        }
        if !kind.is_dir() && found.nlink() > 1 {
            if let Some(first) = self.links.get(&found.ino()).cloned() {
                let first = first.into_os_string().into_vec();
                self.entry(relative, EntryType::Link, &found, Some(first), &[])?;
                return Ok(false);
            }
            self.links.insert(found.ino(), relative.to_owned());
        }
        if kind.is_file() {
            self.extended(&found, None, None, &own)?;
            self.out.append_file(relative, &mut File::open(&path)?)?;
            return Ok(false);
        }
        let mut target = None;
        let entry_type = match () {
            () if kind.is_dir() => EntryType::Directory,
            () if kind.is_symlink() => {
                target = Some(fs::read_link(&path)?.into_os_string().into_vec());
                EntryType::Symlink
            }
            () if kind.is_char_device() => EntryType::Char,
            () if kind.is_block_device() => EntryType::Block,
            () => EntryType::Fifo,
        };
        self.entry(relative, entry_type, &found, target, &own)?;
        // `x` marks one that has whiteouts of the newer kind in it.
        if kind.is_dir() && overlay("opaque") == Some(b"y") {
            self.empty(&relative.join(OsStr::from_bytes(OPAQUE)))?;
        }
        Ok(kind.is_dir())
    }

    /// That what lies below is gone.
    fn mark(&mut self, relative: &Path) -> io::Result<()> {
        let name = relative.file_name().unwrap_or_default();
        let name = [WHITEOUT, name.as_bytes()].concat();
        self.empty(&relative.with_file_name(OsStr::from_bytes(&name)))
    }

    fn empty(&mut self, relative: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        self.named(relative, header)
    }

    fn entry(
        &mut self,
        relative: &Path,
        entry_type: EntryType,
        found: &Metadata,
        target: Option<Vec<u8>>,
        own: &[(Vec<u8>, Vec<u8>)],
    ) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata(found);
        header.set_entry_type(entry_type);
        header.set_size(0);
        if entry_type == EntryType::Char || entry_type == EntryType::Block {
            header.set_device_major(rustix::fs::major(found.rdev()))?;
            header.set_device_minor(rustix::fs::minor(found.rdev()))?;
        }
        let long = (relative.as_os_str().len() >= MAX_SHORT_NAME).then_some(relative);
        self.extended(found, long, target, own)?;
        self.plain(relative, header)
    }

    fn named(&mut self, relative: &Path, header: Header) -> io::Result<()> {
        let path = relative.as_os_str().as_bytes();
        if path.len() >= MAX_SHORT_NAME {
            self.out.append_pax_extensions([("path", path)])?;
        }
        self.plain(relative, header)
    }

    /// An entry whose long name, if it has one, was said before it.
    fn plain(&mut self, relative: &Path, mut header: Header) -> io::Result<()> {
        let path = match relative.as_os_str().as_bytes() {
            [] => b".",
            path => path,
        };
        let slash: &[u8] = match header.entry_type().is_dir() {
            true => b"/",
            false => b"",
        };
        let name = [&path[..path.len().min(MAX_SHORT_NAME - 1)], slash].concat();
        header.as_mut_bytes()[..name.len()].copy_from_slice(&name);
        header.set_cksum();
        self.out.append(&header, io::empty())
    }

    /// What a header has no room for: time to the nanosecond, attributes, long names, targets to the letter.
    fn extended(
        &mut self,
        found: &Metadata,
        path: Option<&Path>,
        target: Option<Vec<u8>>,
        own: &[(Vec<u8>, Vec<u8>)],
    ) -> io::Result<()> {
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if found.mtime_nsec() != 0 || found.mtime() < 0 {
            records.push((
                "mtime".into(),
                time(found.mtime(), found.mtime_nsec()).into(),
            ));
        }
        if let Some(path) = path {
            records.push(("path".into(), path.as_os_str().as_bytes().to_vec()));
        }
        if let Some(target) = target {
            records.push(("linkpath".into(), target));
        }
        for (name, value) in own {
            // Linux has attributes of other names; no program uses them.
            if let Ok(name) = std::str::from_utf8(name) {
                records.push((format!("SCHILY.xattr.{name}"), value.clone()));
            }
        }
        if records.is_empty() {
            return Ok(());
        }
        let records = records
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        self.out.append_pax_extensions(records)
    }
}

/// `-1.5` for -2 s and 500,000,000 ns.
fn time(seconds: i64, nanoseconds: i64) -> String {
    if seconds < 0 && nanoseconds > 0 {
        let whole = seconds.saturating_add(1).unsigned_abs();
        return format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds);
    }
    format!("{seconds}.{nanoseconds:09}")
}

type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// A file's attributes, and those of the overlay.
fn attributes(path: &Path) -> io::Result<(Attributes, Attributes)> {
    let mut names = vec![0; MAX_ATTRIBUTE];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::NOTSUP) => 0,
        len => len?,
    };
    let mut found = Vec::new();
    for name in names[..len]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; MAX_ATTRIBUTE];
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
            // Gone meanwhile, where nobody holds it still.
            Err(rustix::io::Errno::NODATA) => continue,
            len => value.truncate(len?),
        }
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found
        .into_iter()
        .partition(|(name, _)| !name.starts_with(OVERLAY)))
}
