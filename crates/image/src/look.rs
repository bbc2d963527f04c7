//! What the tree of an image in the making has at a path: its base by the root disk, further layers by what was noted of their entries.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use alveole_erofs::{Image as Disk, Info, Kind as DiskKind};

use crate::error::{Doing, ImageError};
use crate::layers::place_of;
use crate::limits::MAX_LINKS_FOLLOWED;
use crate::tarfile::{Kind, Tar};
use crate::tree::{What, clean, parts};

/// Most bytes of a file that is read, such as `/etc/passwd`.
const MAX_FILE: u64 = 4 << 20;

/// What is at a path, links not followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    Directory,
    Link(Vec<u8>),
    /// With where its content is, if that can be read.
    File(Content),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Layer, offset, bytes.
    InLayer(usize, u64, u64),
    /// An inode of the root disk.
    InDisk(u64),
    No,
}

#[derive(Debug)]
enum Noted {
    Directory,
    /// A directory that is only named by what lies in it.
    Implied,
    Link(Vec<u8>),
    File(u64, u64),
    Other,
    /// Another name of what is at this path.
    Same(Box<[u8]>),
    Gone,
}

#[derive(Debug, Default)]
struct Layer {
    noted: HashMap<Box<[u8]>, Noted>,
    /// Directories in which lower layers have nothing.
    opaque: Vec<Box<[u8]>>,
    file: Option<File>,
}

/// A tree.
#[derive(Debug, Default)]
pub(crate) struct Look {
    base: Option<Disk>,
    layers: Vec<Layer>,
}

impl Look {
    /// Begins with a root disk.
    pub(crate) fn over(path: &Path) -> Result<Self, ImageError> {
        let file = File::open(path).doing(|| format!("open {}", path.display()))?;
        let base = Disk::open(file).map_err(|source| ImageError::ReadDisk {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            base: Some(base),
            layers: Vec::new(),
        })
    }

    /// Adds a layer, a tar file that is not packed.
    pub(crate) fn add(&mut self, path: &Path) -> Result<(), ImageError> {
        let refuse = |e: std::io::Error| ImageError::Layer {
            layer: path.display().to_string(),
            why: e.to_string(),
        };
        let file = File::open(path).doing(|| format!("open {}", path.display()))?;
        let mut layer = Layer::default();
        let mut tar = Tar::new(std::io::BufReader::new(file));
        while let Some(entry) = tar.next_entry().map_err(refuse)? {
            let Some((path, special)) = place_of(&entry).map_err(refuse)? else {
                continue;
            };
            let mut above = &path[..];
            while let Some(slash) = above.iter().rposition(|b| *b == b'/') {
                above = &above[..slash];
                layer.noted.entry(above.into()).or_insert(Noted::Implied);
            }
            let noted = match (special, &entry.kind) {
                (Some(What::Opaque), _) => {
                    layer.opaque.push(path);
                    continue;
                }
                (Some(_), _) => Noted::Gone,
                (None, Kind::Directory) => Noted::Directory,
                (None, Kind::HardLink(target)) => Noted::Same(clean(target)),
                (None, Kind::Symlink(target)) => Noted::Link(target.clone()),
                (None, Kind::File) => {
                    Noted::File(tar.position().map_err(refuse)?, entry.size_bytes)
                }
                (None, _) => Noted::Other,
            };
            layer.noted.insert(path, noted);
            tar.pass_over().map_err(refuse)?;
        }
        layer.file = Some(File::open(path).doing(|| format!("open {}", path.display()))?);
        self.layers.push(layer);
        Ok(())
    }

    /// What is at a clean path no part of which is a link.
    fn at(&self, path: &[u8], mut below: usize) -> Result<Found, ImageError> {
        if path.is_empty() {
            return Ok(Found::Directory);
        }
        let mut implied = false;
        while below > 0 {
            let index = below - 1;
            let layer = &self.layers[index];
            below = index;
            match layer.noted.get(path) {
                Some(Noted::Directory) => return Ok(Found::Directory),
                Some(Noted::Implied) => implied = true,
                Some(Noted::Link(target)) => return Ok(Found::Link(target.clone())),
                Some(Noted::File(at, size)) => {
                    return Ok(Found::File(Content::InLayer(index, *at, *size)));
                }
                Some(Noted::Other) => return Ok(Found::File(Content::No)),
                // It is of the same layer, or of a lower one.
                Some(Noted::Same(target)) if **target != *path => {
                    return self.at(target, index + 1);
                }
                Some(Noted::Same(_) | Noted::Gone) => return Ok(Found::Nothing),
                None => {}
            }
            let mut above = path;
            let mut hidden = layer.opaque.iter().any(|o| o.is_empty());
            while let Some(slash) = above.iter().rposition(|b| *b == b'/') {
                above = &above[..slash];
                let covers = !matches!(
                    layer.noted.get(above),
                    None | Some(Noted::Directory | Noted::Implied)
                );
                hidden |= covers || layer.opaque.iter().any(|opaque| **opaque == *above);
            }
            if hidden {
                return Ok(if implied {
                    Found::Directory
                } else {
                    Found::Nothing
                });
            }
        }
        match self.in_base(path)? {
            Found::Nothing if implied => Ok(Found::Directory),
            found => Ok(found),
        }
    }

    fn in_base(&self, path: &[u8]) -> Result<Found, ImageError> {
        let Some(disk) = &self.base else {
            return Ok(Found::Nothing);
        };
        let wrong = |source| ImageError::ReadDisk {
            path: "of the base".into(),
            source,
        };
        let mut info: Info = disk.info(disk.root()).map_err(wrong)?;
        for part in parts(path) {
            if info.kind != DiskKind::Directory {
                return Ok(Found::Nothing);
            }
            let entries = disk.entries(&info).map_err(wrong)?;
            let Some(entry) = entries.iter().find(|entry| entry.name == part) else {
                return Ok(Found::Nothing);
            };
            info = disk.info(entry.nid).map_err(wrong)?;
        }
        Ok(match info.kind {
            DiskKind::Directory => Found::Directory,
            DiskKind::Symlink => Found::Link(disk.target(&info).map_err(wrong)?),
            DiskKind::File => Found::File(Content::InDisk(info.nid)),
            _ => Found::File(Content::No),
        })
    }

    /// Where a path leads, all links followed within the root, and what is there. A path that does not exist leads where it would be made.
    pub(crate) fn follow(&self, path: &[u8]) -> Result<(Box<[u8]>, Found), ImageError> {
        let mut left: Vec<Vec<u8>> = parts(path).rev().map(<[u8]>::to_vec).collect();
        let (mut at, mut found) = (Vec::new(), Found::Directory);
        let mut followed = 0;
        while let Some(name) = left.pop() {
            if name == b".." {
                let up = at.iter().rposition(|b| *b == b'/').unwrap_or(0);
                at.truncate(up);
                found = Found::Directory;
                continue;
            }
            let before = at.len();
            if !at.is_empty() {
                at.push(b'/');
            }
            at.extend_from_slice(&name);
            found = self.at(&at, self.layers.len())?;
            if let Found::Link(target) = &found {
                followed += 1;
                if followed > MAX_LINKS_FOLLOWED {
                    return Err(ImageError::Format(format!(
                        "/{} follows too many links",
                        String::from_utf8_lossy(path)
                    )));
                }
                at.truncate(if target.starts_with(b"/") { 0 } else { before });
                left.extend(parts(target).rev().map(<[u8]>::to_vec));
                found = Found::Directory;
            }
        }
        Ok((at.into(), found))
    }

    /// The content of a file; nothing where there is none.
    pub(crate) fn read(&self, path: &[u8]) -> Result<Vec<u8>, ImageError> {
        let shown = || format!("read /{} of the image", String::from_utf8_lossy(path));
        let mut bytes = Vec::new();
        match self.follow(path)?.1 {
            Found::File(Content::InLayer(layer, at, size)) => {
                if let Some(mut file) = self.layers[layer].file.as_ref() {
                    file.seek(SeekFrom::Start(at)).doing(shown)?;
                    file.take(size.min(MAX_FILE))
                        .read_to_end(&mut bytes)
                        .doing(shown)?;
                }
            }
            Found::File(Content::InDisk(nid)) => {
                if let Some(disk) = &self.base {
                    let wrong = |source| ImageError::ReadDisk {
                        path: "of the base".into(),
                        source,
                    };
                    let info = disk.info(nid).map_err(wrong)?;
                    bytes.resize(info.size_bytes.min(MAX_FILE) as usize, 0);
                    disk.read_at(&info, 0, &mut bytes).map_err(wrong)?;
                }
            }
            _ => {}
        }
        Ok(bytes)
    }

    /// Numbers of `USER[:GROUP]`, by the image's own files; the group is the user's if it is not said.
    pub(crate) fn owner(&self, text: &str) -> Result<(u32, u32), ImageError> {
        let lines = |path: &[u8]| -> Result<String, ImageError> {
            Ok(String::from_utf8_lossy(&self.read(path)?).into_owned())
        };
        let unknown = |what: &str, name: &str| {
            ImageError::Format(format!(
                "the image has no {what} {name:?}: give a number, or make it by a RUN before"
            ))
        };
        let number = |line: &str, field: usize| {
            line.split(':')
                .nth(field)
                .and_then(|n| n.parse::<u32>().ok())
        };
        let (user, group) = text
            .split_once(':')
            .map_or((text, None), |(user, group)| (user, Some(group)));
        let (uid, mut gid) = match user.parse::<u32>() {
            Ok(uid) => (uid, uid),
            Err(_) => {
                let users = lines(b"etc/passwd")?;
                let found = users
                    .lines()
                    .find(|line| line.split(':').next() == Some(user));
                let found = found.and_then(|line| Some((number(line, 2)?, number(line, 3)?)));
                found.ok_or_else(|| unknown("user", user))?
            }
        };
        if let Some(group) = group {
            gid = match group.parse() {
                Ok(gid) => gid,
                Err(_) => {
                    let groups = lines(b"etc/group")?;
                    let found = groups
                        .lines()
                        .find(|line| line.split(':').next() == Some(group));
                    found
                        .and_then(|line| number(line, 2))
                        .ok_or_else(|| unknown("group", group))?
                }
            };
        }
        Ok((uid, gid))
    }
}
