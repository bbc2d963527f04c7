//! A folder of this host as a tar stream: the layer of a root file system.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata as HostMetadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use alveole_erofs::Metadata;

use crate::error::{Doing, ImageError};
use crate::tarfile::{END, Kind, head, is_written, padding};

/// Most bytes of the names or of one value of a file's attributes, as Linux has it.
const MAX_ATTRIBUTE: usize = 64 << 10;

/// Writes what lies in `root`, sorted by name, so that the same folder gives the same bytes. Files of whoever is asking are
/// root's in it unless that is root: they could not have made others. Sockets are left out.
pub(crate) fn write_tar(root: &Path, to: &mut File) -> Result<(), ImageError> {
    let mut out = BufWriter::with_capacity(1 << 20, to);
    let mut links: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut left = vec![PathBuf::new()];
    let own = rustix::process::geteuid();
    while let Some(relative) = left.pop() {
        let path = root.join(&relative);
        let doing = || format!("read {}", path.display());
        let host = fs::symlink_metadata(&path).doing(doing)?;
        let name = relative.as_os_str().as_bytes();
        if host.is_dir() {
            let entries: Result<Vec<PathBuf>, io::Error> = fs::read_dir(&path)
                .doing(doing)?
                .map(|e| e.map(|e| relative.join(e.file_name())))
                .collect();
            let mut entries = entries.doing(doing)?;
            // The last is taken first.
            entries.sort_unstable_by(|a, b| b.cmp(a));
            left.extend(entries);
        }
        let Some(kind) = kind(&path, &host, name, &mut links).doing(doing)? else {
            continue;
        };
        let mut metadata = Metadata {
            mode: (host.mode() & 0o7777) as u16,
            uid: host.uid(),
            gid: host.gid(),
            mtime: host.mtime(),
            mtime_nsec: host.mtime_nsec() as u32,
            xattrs: attributes(&path).doing(doing)?,
        };
        if !own.is_root() && host.uid() == own.as_raw() {
            (metadata.uid, metadata.gid) = (0, 0);
        }
        let size = if kind == Kind::File { host.len() } else { 0 };
        let name = if name.is_empty() { b"." } else { name };
        let writing = || "write a layer".into();
        out.write_all(&head(name, &kind, &metadata, size).doing(writing)?)
            .doing(writing)?;
        if kind == Kind::File {
            let file = File::open(&path).doing(doing)?;
            let copied = io::copy(&mut file.take(size), &mut out).doing(doing)?;
            if copied != size {
                return Err(ImageError::Format(format!(
                    "{} became shorter while it was read: import it when it rests",
                    path.display()
                )));
            }
            out.write_all(padding(size)).doing(writing)?;
        }
    }
    out.write_all(&END)
        .and_then(|()| out.flush())
        .doing(|| "write a layer".into())
}

fn kind(
    path: &Path,
    host: &HostMetadata,
    name: &[u8],
    links: &mut HashMap<(u64, u64), Vec<u8>>,
) -> io::Result<Option<Kind>> {
    if !host.is_dir() && host.nlink() > 1 {
        if let Some(first) = links.get(&(host.dev(), host.ino())) {
            return Ok(Some(Kind::HardLink(first.clone())));
        }
        links.insert((host.dev(), host.ino()), name.to_vec());
    }
    let (major, minor) = (
        rustix::fs::major(host.rdev()),
        rustix::fs::minor(host.rdev()),
    );
    let kind = host.file_type();
    Ok(Some(match () {
        () if kind.is_dir() => Kind::Directory,
        () if kind.is_symlink() => Kind::Symlink(fs::read_link(path)?.into_os_string().into_vec()),
        () if kind.is_char_device() => Kind::CharDevice(major, minor),
        () if kind.is_block_device() => Kind::BlockDevice(major, minor),
        () if kind.is_fifo() => Kind::Fifo,
        () if kind.is_socket() => return Ok(None),
        () => Kind::File,
    }))
}

fn attributes(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; MAX_ATTRIBUTE];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        len => len?,
    };
    let mut found = Vec::new();
    for name in names[..len]
        .split(|b| *b == 0)
        .filter(|name| is_written(name))
    {
        let mut value = vec![0; MAX_ATTRIBUTE];
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
            // `trusted.` is for root; others may be gone.
            Err(rustix::io::Errno::PERM | rustix::io::Errno::NODATA) => continue,
            len => value.truncate(len?),
        }
        found.push((name.to_vec(), value));
    }
    found.sort();
    Ok(found)
}
