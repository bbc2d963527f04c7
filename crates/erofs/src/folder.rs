//! A folder of this host as an image. Nothing is followed: neither links, nor mounts of other file systems.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat, fstat, openat, readlinkat, seek, statat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::{Child, Content, Directory, Inode, Metadata, WriteError, Writer, Xattr};

/// Folders that lie deeper are refused: each is open while it is read.
const MAX_DEPTH: usize = 200;
/// Most bytes of the names or of one value of a file's attributes, as Linux has it.
const MAX_ATTRIBUTE: usize = 64 << 10;
const READ: usize = 1 << 20;

/// Why a folder was not made an image.
#[derive(Debug, Error)]
pub enum PackError {
    /// It, or something in it, cannot be read.
    #[error("cannot read '{}': {source}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It grows or shrinks.
    #[error("'{}' changed while it was read: let it rest, or leave it out", .0.display())]
    Changed(PathBuf),
    /// Folders in folders without end.
    #[error("'{}' lies more than {MAX_DEPTH} folders deep", .0.display())]
    Deep(PathBuf),
    /// It is a socket or a device, or none of what an image can have.
    #[error("'{}' is neither a folder nor a file: sockets, pipes and devices cannot be copied", .0.display())]
    Kind(PathBuf),
    /// An image cannot hold it, or cannot be written.
    #[error("cannot keep '{}': {source}", path.display())]
    Write {
        /// What.
        path: PathBuf,
        /// Why not.
        source: WriteError,
    },
}

/// What was not taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Sockets and devices: they lead to programs and hardware of this host.
    pub special: u64,
    /// Folders at which other file systems are mounted; they are there, empty.
    pub mounts: u64,
}

/// Makes an image in an empty file, which must be open for reading and writing: what is in the folder `source` lies in its root; of
/// a file it holds that alone, under its last name. Owners, modes, times, attributes, hard links and holes are as they are. The folder
/// or file of this device and number is passed over: whoever writes the image into a folder below `source` names it.
///
/// # Errors
///
/// Something cannot be read, or changes meanwhile, or the image not be written.
pub fn pack(
    source: &Path,
    file: File,
    uuid: [u8; 16],
    pass_over: Option<(u64, u64)>,
) -> Result<LeftOut, PackError> {
    let read = |e: Errno| PackError::Read {
        path: source.into(),
        source: e.into(),
    };
    let write = |source_error| PackError::Write {
        path: source.into(),
        source: source_error,
    };
    let writer = Writer::new(file).map_err(write)?;
    let here = statat(rustix::fs::CWD, source, AtFlags::empty()).map_err(read)?;
    let mut packing = Packing {
        writer,
        directories: vec![Directory::default()],
        links: HashMap::new(),
        left_out: LeftOut::default(),
        device: here.st_dev,
        pass_over,
        buffer: vec![0; READ],
        path: source.into(),
    };
    match FileType::from_raw_mode(here.st_mode) {
        FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(source, flags, Mode::empty()).map_err(read)?;
            packing.folder(0, &folder, &here, 0)?;
        }
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let open = rustix::fs::open(source, flags, Mode::empty()).map_err(read)?;
            let inode = packing.file(open)?;
            let name = source.file_name().unwrap_or(OsStr::new("file"));
            packing.directories[0] = Directory {
                metadata: Metadata {
                    mode: 0o755,
                    ..Metadata::default()
                },
                entries: vec![(name.as_bytes().to_vec(), Child::Inode(inode))],
            };
        }
        _ => return Err(PackError::Kind(source.into())),
    }
    let mut writer = packing.writer;
    writer.set_uuid(uuid);
    writer.finish(&packing.directories).map_err(write)?;
    Ok(packing.left_out)
}

struct Packing {
    writer: Writer,
    directories: Vec<Directory>,
    /// Files with several names, by device and number.
    links: HashMap<(u64, u64), Inode>,
    left_out: LeftOut,
    device: u64,
    pass_over: Option<(u64, u64)>,
    buffer: Vec<u8>,
    /// Where it is, for what there is to say.
    path: PathBuf,
}

impl Packing {
    fn read(&self, error: impl Into<io::Error>) -> PackError {
        PackError::Read {
            path: self.path.clone(),
            source: error.into(),
        }
    }

    fn write(&self, source: WriteError) -> PackError {
        match source {
            // More or less came than there was at first.
            WriteError::Size { .. } => PackError::Changed(self.path.clone()),
            source => PackError::Write {
                path: self.path.clone(),
                source,
            },
        }
    }

    /// Fills the directory `index`.
    fn folder(
        &mut self,
        index: usize,
        folder: &OwnedFd,
        stat: &Stat,
        depth: usize,
    ) -> Result<(), PackError> {
        if depth > MAX_DEPTH {
            return Err(PackError::Deep(self.path.clone()));
        }
        let mut names = Vec::new();
        for entry in Dir::read_from(folder).map_err(|e| self.read(e))? {
            let name = entry.map_err(|e| self.read(e))?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort();
        self.directories[index].metadata = metadata(stat, attributes(folder));
        for name in names {
            let bytes = name.to_bytes();
            self.path.push(OsStr::from_bytes(bytes));
            // Of another process, it may be gone by now.
            match statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => {}
                Err(e) => return Err(self.read(e)),
                Ok(stat) => {
                    if let Some(child) = self.entry(folder, &name, &stat, depth)? {
                        self.directories[index]
                            .entries
                            .push((bytes.to_vec(), child));
                    }
                }
            }
            self.path.pop();
        }
        Ok(())
    }

    fn entry(
        &mut self,
        folder: &OwnedFd,
        name: &std::ffi::CStr,
        stat: &Stat,
        depth: usize,
    ) -> Result<Option<Child>, PackError> {
        let which = (stat.st_dev, stat.st_ino);
        if self.pass_over == Some(which) {
            return Ok(None);
        }
        if let Some(inode) = self.links.get(&which) {
            return Ok(Some(Child::Inode(*inode)));
        }
        let open = |flags| {
            let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(folder, name, flags, Mode::empty())
        };
        let inode = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let index = self.directories.len();
                self.directories.push(Directory::default());
                if stat.st_dev == self.device {
                    let opened = open(OFlags::DIRECTORY).map_err(|e| self.read(e))?;
                    self.folder(index, &opened, stat, depth + 1)?;
                } else {
                    self.left_out.mounts += 1;
                    self.directories[index].metadata = metadata(stat, Vec::new());
                }
                return Ok(Some(Child::Directory(index)));
            }
            FileType::RegularFile => {
                // A pipe that took its place meanwhile is not waited for.
                let opened = open(OFlags::NONBLOCK).map_err(|e| self.read(e))?;
                self.file(opened)?
            }
            FileType::Symlink => {
                let target = readlinkat(folder, name, Vec::new()).map_err(|e| self.read(e))?;
                let content = Content::Symlink(target.into_bytes());
                let written = self.writer.special(&metadata(stat, Vec::new()), &content);
                written.map_err(|e| self.write(e))?
            }
            FileType::Fifo => {
                let written = self
                    .writer
                    .special(&metadata(stat, Vec::new()), &Content::Fifo);
                written.map_err(|e| self.write(e))?
            }
            _ => {
                self.left_out.special += 1;
                return Ok(None);
            }
        };
        if stat.st_nlink > 1 {
            self.links.insert(which, inode);
        }
        Ok(Some(Child::Inode(inode)))
    }

    fn file(&mut self, open: OwnedFd) -> Result<Inode, PackError> {
        let stat = fstat(&open).map_err(|e| self.read(e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(PackError::Changed(self.path.clone()));
        }
        let metadata = metadata(&stat, attributes(&open));
        let file = File::from(open);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let (path, buffer) = (self.path.clone(), &mut self.buffer);
        let read = |source: io::Error| PackError::Read {
            path: path.clone(),
            source,
        };
        let write = |source| match source {
            WriteError::Size { .. } => PackError::Changed(path.clone()),
            source => PackError::Write {
                path: path.clone(),
                source,
            },
        };
        let mut writing = self.writer.begin(size);
        let mut at = 0;
        while at < size {
            // Where the host's file system knows of no holes, all is data.
            let begin = match seek(&file, SeekFrom::Data(at)) {
                Ok(begin) => begin.min(size),
                Err(Errno::NXIO) => size,
                Err(_) => at,
            };
            writing.hole(begin - at).map_err(write)?;
            at = begin;
            let end = seek(&file, SeekFrom::Hole(at)).unwrap_or(size).min(size);
            while at < end {
                let most = usize::try_from(end - at).unwrap_or(READ).min(buffer.len());
                let count = file.read_at(&mut buffer[..most], at).map_err(read)?;
                if count == 0 {
                    return Err(PackError::Changed(path));
                }
                writing.data(&buffer[..count]).map_err(write)?;
                at += count as u64;
            }
        }
        writing.end(&metadata).map_err(write)
    }
}

fn metadata(stat: &Stat, xattrs: Vec<Xattr>) -> Metadata {
    Metadata {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_nsec: stat.st_mtime_nsec as u32,
        xattrs,
    }
}

/// Attributes that an image can have, and that whoever is asking may read: a file system without them has none.
fn attributes(file: &OwnedFd) -> Vec<Xattr> {
    let mut names = vec![0; MAX_ATTRIBUTE];
    let length = rustix::fs::flistxattr(file, &mut names[..]).unwrap_or(0);
    let mut found = Vec::new();
    for name in names[..length].split(|b| *b == 0) {
        // Labels of SELinux are of this host's policy.
        let kept = [
            &b"user."[..],
            b"security.capability",
            b"system.posix_acl_access",
            b"system.posix_acl_default",
        ];
        if !kept.iter().any(|k| name.starts_with(k)) {
            continue;
        }
        let mut value = vec![0; MAX_ATTRIBUTE];
        if let Ok(length) = rustix::fs::fgetxattr(file, OsStr::from_bytes(name), &mut value[..]) {
            value.truncate(length);
            found.push((name.to_vec(), value));
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;
    use crate::{Image, Kind};

    fn packed(source: &Path) -> Result<(tempfile::NamedTempFile, LeftOut), PackError> {
        let image = tempfile::NamedTempFile::new().unwrap();
        let left_out = pack(source, image.reopen().unwrap(), [7; 16], None)?;
        Ok((image, left_out))
    }

    #[test]
    fn a_folder_is_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), "content").unwrap();
        fs::hard_link(at("a/b/file"), at("a/other")).unwrap();
        symlink("/etc/shadow", at("link")).unwrap();
        fs::set_permissions(at("a"), PermissionsExt::from_mode(0o1770)).unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        sparse.write_all_at(b"end", (1 << 30) - 3).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let (file, left_out) = packed(dir.path()).unwrap();
        assert_eq!(left_out.special, 1);
        assert!(file.as_file().metadata().unwrap().blocks() * 512 < 1 << 20);
        let image = Image::open(file.reopen().unwrap()).unwrap();
        let mut names = Vec::new();
        let mut left = vec![(PathBuf::new(), image.root())];
        while let Some((path, nid)) = left.pop() {
            let info = image.info(nid).unwrap();
            if info.kind == Kind::Directory {
                for entry in image.entries(&info).unwrap() {
                    if !matches!(&entry.name[..], b"." | b"..") {
                        left.push((path.join(OsStr::from_bytes(&entry.name)), entry.nid));
                    }
                }
            }
            names.push((path.display().to_string(), info.kind, info.links));
        }
        names.sort();
        let names: Vec<_> = names.iter().map(|(n, k, l)| (n.as_str(), *k, *l)).collect();
        assert_eq!(
            names,
            [
                ("", Kind::Directory, 3),
                ("a", Kind::Directory, 3),
                ("a/b", Kind::Directory, 2),
                ("a/b/file", Kind::File, 2),
                ("a/other", Kind::File, 2),
                ("link", Kind::Symlink, 1),
                ("sparse", Kind::File, 1),
            ]
        );
    }

    #[test]
    fn what_cannot_be_packed_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let text = packed(&dir.path().join("none")).unwrap_err().to_string();
        assert!(text.contains("none") && text.contains("No such"), "{text}");
        assert!(matches!(
            packed(Path::new("/dev/null")),
            Err(PackError::Kind(_))
        ));
    }
}
