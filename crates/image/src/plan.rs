//! What copying files becomes in an image: which entries its layer has, and where they lie.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use alveole_erofs::Metadata;

use crate::context::{Context, Item, ItemKind, exactly};
use crate::error::{Doing, ImageError};
use crate::look::{Found, Look};
use crate::tarfile::{END, Kind, head, padding};
use crate::tree::{clean, parts};

/// What is copied from a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFiles {
    /// Paths and patterns below the context.
    pub sources: Vec<String>,
    /// Absolute; with a slash at its end it is a folder.
    pub to: String,
    /// User and group.
    pub owner: (u32, u32),
    /// Instead of the files' own.
    pub mode: Option<u16>,
    /// Archives are refused, as others would unpack them here.
    pub no_archives: bool,
}

/// An entry that is to be written.
pub(crate) struct Planned {
    /// Clean, without links in it.
    to: Vec<u8>,
    item: Item,
}

/// Places what was found in a context.
pub(crate) fn plan(
    look: &Look,
    context: &Context,
    what: &CopyFiles,
    found: Vec<Vec<Item>>,
) -> Result<Vec<Planned>, ImageError> {
    let (to, at) = look.follow(&clean(what.to.as_bytes()))?;
    let into = what.to.ends_with('/') || at == Found::Directory;
    let single = found.len() == 1 && what.sources.len() == 1;
    if !single && !what.to.ends_with('/') {
        return Err(ImageError::Format(format!(
            "several files cannot become {}: write {}/, with a slash at its end",
            what.to, what.to
        )));
    }
    let mut plan = Plan {
        look,
        entries: BTreeMap::new(),
        what,
    };
    for items in found {
        let Some(top) = items.first().cloned() else {
            continue;
        };
        if what.no_archives && context.is_archive(&top)? {
            return Err(ImageError::Format(format!(
                "{} is an archive, which others would unpack here: COPY it, and RUN tar",
                context.shown(&top.path)
            )));
        }
        if top.kind == ItemKind::Directory {
            plan.folder(&to)?;
            plan.below(&to, &top.path, &items[1..])?;
        } else if into {
            plan.folder(&to)?;
            // What a link is called, not what it leads to.
            let name = top.path.file_name().unwrap_or_default().as_bytes().to_vec();
            plan.add(&joined(&to, &name), top)?;
        } else {
            plan.add(&to, top)?;
        }
    }
    Ok(plan
        .entries
        .into_iter()
        .map(|(to, item)| Planned { to, item })
        .collect())
}

/// What a copy becomes.
struct Plan<'a> {
    look: &'a Look,
    /// By their places; one that comes later replaces one before.
    entries: BTreeMap<Vec<u8>, Item>,
    what: &'a CopyFiles,
}

impl Plan<'_> {
    /// A folder that is copied into: as it is if it is there, else made with those above it.
    fn folder(&mut self, to: &[u8]) -> Result<(), ImageError> {
        let mut at = Vec::new();
        for part in parts(to) {
            at = joined(&at, part);
            match self.look.follow(&at)?.1 {
                Found::Nothing => {
                    self.entries.entry(at.clone()).or_insert(Item {
                        path: PathBuf::new(),
                        kind: ItemKind::Directory,
                        mode: 0o755,
                        size_bytes: 0,
                    });
                }
                Found::Directory => {}
                _ => return Err(self.no_place(&at, "is no folder in the image")),
            }
        }
        Ok(())
    }

    /// All that lies in a folder of the context.
    fn below(&mut self, to: &[u8], top: &Path, items: &[Item]) -> Result<(), ImageError> {
        // Where folders of the context come to lie: links of the image are followed.
        let mut places: BTreeMap<PathBuf, Vec<u8>> =
            BTreeMap::from([(top.to_owned(), to.to_vec())]);
        for item in items {
            let parent = item.path.parent().unwrap_or(Path::new(""));
            let name = item.path.file_name().unwrap_or_default().as_bytes();
            let Some(place) = places.get(parent) else {
                // It is in a folder that is left out, and is not itself.
                self.folder_of(&mut places, top, parent)?;
                let place = places.get(parent).cloned().unwrap_or_default();
                self.one(&mut places, &joined(&place, name), item)?;
                continue;
            };
            let at = joined(place, name);
            self.one(&mut places, &at, item)?;
        }
        Ok(())
    }

    /// Places folders that are left out but for something in them.
    fn folder_of(
        &mut self,
        places: &mut BTreeMap<PathBuf, Vec<u8>>,
        top: &Path,
        folder: &Path,
    ) -> Result<(), ImageError> {
        let below: Vec<&Path> = folder.ancestors().take_while(|path| *path != top).collect();
        for path in below.into_iter().rev() {
            if !places.contains_key(path) {
                let parent = places
                    .get(path.parent().unwrap_or(Path::new("")))
                    .cloned()
                    .unwrap_or_default();
                let (at, _) = self.look.follow(&joined(
                    &parent,
                    path.file_name().unwrap_or_default().as_bytes(),
                ))?;
                self.folder(&at)?;
                places.insert(path.to_owned(), at.into());
            }
        }
        Ok(())
    }

    fn one(
        &mut self,
        places: &mut BTreeMap<PathBuf, Vec<u8>>,
        at: &[u8],
        item: &Item,
    ) -> Result<(), ImageError> {
        if item.kind != ItemKind::Directory {
            return self.add(at, item.clone());
        }
        let (real, found) = self.look.follow(at)?;
        match found {
            Found::Directory if *real != *at => {
                places.insert(item.path.clone(), real.into());
                return Ok(());
            }
            Found::Directory | Found::Nothing => {}
            _ => {
                return Err(self.no_place(at, "is no folder in the image, but one in the context"));
            }
        }
        places.insert(item.path.clone(), at.to_vec());
        self.add(at, item.clone())
    }

    fn add(&mut self, at: &[u8], item: Item) -> Result<(), ImageError> {
        if at.is_empty() {
            return Err(self.no_place(at, "is the root: write a name behind it"));
        }
        let name = at.rsplit(|b| *b == b'/').next().unwrap_or_default();
        if name.starts_with(b".wh.") {
            return Err(self.no_place(at, "cannot be in a layer, where names that begin with .wh. mean that something is gone"));
        }
        if item.kind != ItemKind::Directory {
            // Not through a link: that would be replaced, as with docker.
            let is_folder = self.look.follow(at)?;
            if is_folder.1 == Found::Directory && *is_folder.0 == *at {
                return Err(
                    self.no_place(at, "is a folder in the image, and a file in the context")
                );
            }
        }
        self.entries.insert(at.to_vec(), item);
        Ok(())
    }

    fn no_place(&self, at: &[u8], why: &str) -> ImageError {
        ImageError::Format(format!(
            "cannot copy to {}: /{} {why}",
            self.what.to,
            String::from_utf8_lossy(at)
        ))
    }
}

fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() {
        return name.to_vec();
    }
    [folder, b"/", name].concat()
}

/// Writes the layer of what was planned.
pub(crate) fn write_plan(
    context: &Context,
    planned: &[Planned],
    what: &CopyFiles,
    time: u64,
    out: &mut dyn Write,
) -> Result<(), ImageError> {
    let writing = || "write a layer".to_owned();
    for Planned { to, item } in planned {
        let kind = match &item.kind {
            ItemKind::File => Kind::File,
            ItemKind::Directory => Kind::Directory,
            ItemKind::Symlink(target) => Kind::Symlink(target.clone()),
        };
        let is_link = matches!(kind, Kind::Symlink(_));
        // Folders that were made on the way are nobody's of the context.
        let is_ours = !item.path.as_os_str().is_empty();
        let metadata = Metadata {
            mode: what
                .mode
                .filter(|_| !is_link && is_ours)
                .unwrap_or(item.mode),
            uid: what.owner.0,
            gid: what.owner.1,
            mtime: time.cast_signed(),
            ..Metadata::default()
        };
        out.write_all(&head(to, &kind, &metadata, item.size_bytes).doing(writing)?)
            .doing(writing)?;
        if kind == Kind::File {
            let file = context.file(&item.path)?;
            exactly(file, item.size_bytes, out)
                .doing(|| format!("read {}", context.shown(&item.path)))?;
            out.write_all(padding(item.size_bytes)).doing(writing)?;
        }
    }
    out.write_all(&END).doing(writing)
}
