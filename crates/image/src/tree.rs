//! The tree that layers make, by the plain rules: the lowest first, entry by entry.
//!
//! The rules are those of the OCI image specification ("Image Layer Filesystem Changeset"): an entry replaces what was there, but a directory
//! joins a directory; a whiteout hides what lower layers have, and nothing of its own. Where a parent is a symbolic link, it is followed
//! within the root, as `umoci` and containerd do; a parent that is missing is made.

use std::collections::BTreeMap;

use alveole_erofs::{Child, Directory, Inode, Metadata};

use crate::limits::MAX_LINKS_FOLLOWED;

/// What an entry of a layer does. Paths are clean: relative to the root, no empty part, no `.` or `..`.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) path: Box<[u8]>,
    pub(crate) what: What,
}

#[derive(Debug, Clone)]
pub(crate) enum What {
    Directory(Metadata),
    /// A file by its number; a symbolic link has its target as well.
    File(usize, Option<Box<[u8]>>),
    /// A second name for what is at this clean path.
    Link(Box<[u8]>),
    /// What lower layers have at the path is gone.
    Whiteout,
    /// What lower layers have in the directory at the path is gone.
    Opaque,
}

#[derive(Debug, Clone)]
struct Slot {
    /// The layer that put it there; for a directory, the last one that named it or put something into it.
    layer: usize,
    what: Here,
}

#[derive(Debug, Clone)]
enum Here {
    Directory(usize),
    File(usize, Option<Box<[u8]>>),
}

#[derive(Debug, Default)]
struct Node {
    parent: usize,
    metadata: Metadata,
    children: BTreeMap<Box<[u8]>, Slot>,
    /// The last layer that has hidden all below in it, plus one.
    purged: usize,
}

#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
    most_nodes: usize,
}

/// A directory nobody said anything about.
fn plain_directory() -> Metadata {
    Metadata {
        mode: 0o755,
        ..Metadata::default()
    }
}

impl Tree {
    /// An empty root, below which at most so many directories are ever made.
    pub(crate) fn new(most_nodes: u64) -> Self {
        Self {
            nodes: vec![Node {
                metadata: plain_directory(),
                ..Node::default()
            }],
            most_nodes: usize::try_from(most_nodes).unwrap_or(usize::MAX),
        }
    }

    /// Applies an entry of a layer, counted from the lowest, 0. The error says what cannot be.
    pub(crate) fn apply(&mut self, layer: usize, event: &Event) -> Result<(), String> {
        let shown = || String::from_utf8_lossy(&event.path).into_owned();
        let (parent, name) = split(&event.path);
        let said = |why: String| format!("{}: {why}", shown());
        match &event.what {
            What::Opaque => {
                if let Some(node) = self.directory(layer, &event.path, false).map_err(said)? {
                    self.purge(layer, node);
                }
                return Ok(());
            }
            What::Whiteout => {
                if let Some(node) = self.directory(layer, parent, false).map_err(said)? {
                    self.hide(layer, node, name);
                }
                return Ok(());
            }
            What::Directory(metadata) if name.is_empty() => {
                self.nodes[0].metadata.clone_from(metadata);
                return Ok(());
            }
            _ if name.is_empty() => return Err("the root can only be a directory".into()),
            _ => {}
        }
        let Some(node) = self.directory(layer, parent, true).map_err(said)? else {
            return Err(said("its directory cannot be made".into()));
        };
        let what = match &event.what {
            What::Directory(metadata) => {
                let there = self.nodes[node].children.get_mut(name);
                if let Some(Slot {
                    layer: last,
                    what: Here::Directory(index),
                }) = there
                {
                    *last = layer;
                    let index = *index;
                    self.nodes[index].metadata.clone_from(metadata);
                    return Ok(());
                }
                Here::Directory(self.make(node, metadata.clone()).map_err(said)?)
            }
            What::File(number, target) => Here::File(*number, target.clone()),
            What::Link(target) => {
                let target_shown = String::from_utf8_lossy(target).into_owned();
                let (target_parent, target_name) = split(target);
                let found = self
                    .directory(layer, target_parent, false)
                    .map_err(said)?
                    .and_then(|node| self.nodes[node].children.get(target_name));
                match found {
                    // It is there already.
                    Some(Slot {
                        what: Here::File(..),
                        ..
                    }) if **target == *event.path => return Ok(()),
                    Some(Slot {
                        what: here @ Here::File(..),
                        ..
                    }) => here.clone(),
                    Some(_) => {
                        return Err(said(format!(
                            "it is a hard link to the directory {target_shown}"
                        )));
                    }
                    None => {
                        return Err(said(format!(
                            "it is a hard link to {target_shown}, which is not there"
                        )));
                    }
                }
            }
            What::Whiteout | What::Opaque => return Ok(()),
        };
        self.nodes[node]
            .children
            .insert(name.into(), Slot { layer, what });
        Ok(())
    }

    fn make(&mut self, parent: usize, metadata: Metadata) -> Result<usize, String> {
        if self.nodes.len() > self.most_nodes {
            return Err("there are too many directories; --max-entries allows more".into());
        }
        self.nodes.push(Node {
            parent,
            metadata,
            ..Node::default()
        });
        Ok(self.nodes.len() - 1)
    }

    /// The directory at a path, links followed within the root; what is missing is made, or nothing found.
    fn directory(
        &mut self,
        layer: usize,
        path: &[u8],
        make: bool,
    ) -> Result<Option<usize>, String> {
        let mut left: Vec<Box<[u8]>> = parts(path).rev().map(Into::into).collect();
        let (mut at, mut followed) = (0, 0);
        while let Some(name) = left.pop() {
            if *name == *b".." {
                at = self.nodes[at].parent;
                continue;
            }
            match self.nodes[at].children.get_mut(&name) {
                Some(Slot {
                    what: Here::Directory(index),
                    layer: last,
                }) => {
                    at = *index;
                    if make {
                        *last = layer;
                    }
                }
                Some(Slot {
                    what: Here::File(_, Some(target)),
                    ..
                }) => {
                    followed += 1;
                    if followed > MAX_LINKS_FOLLOWED {
                        return Err("its path follows too many symbolic links".into());
                    }
                    if target.starts_with(b"/") {
                        at = 0;
                    }
                    let target: Vec<Box<[u8]>> = parts(target).rev().map(Into::into).collect();
                    left.extend(target);
                }
                Some(Slot {
                    what: Here::File(_, None),
                    ..
                }) if make => {
                    return Err(format!(
                        "it lies below {}, which is no directory",
                        String::from_utf8_lossy(&name)
                    ));
                }
                None if make => {
                    let made = self.make(at, plain_directory())?;
                    let slot = Slot {
                        layer,
                        what: Here::Directory(made),
                    };
                    self.nodes[at].children.insert(name, slot);
                    at = made;
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// Hides what lower layers have under a name.
    fn hide(&mut self, layer: usize, node: usize, name: &[u8]) {
        match self.nodes[node].children.get(name) {
            Some(slot) if slot.layer < layer => {
                self.nodes[node].children.remove(name);
            }
            Some(Slot {
                what: Here::Directory(index),
                ..
            }) => {
                let index = *index;
                self.purge(layer, index);
            }
            _ => {}
        }
    }

    /// Hides what lower layers have in a directory. What this layer brought stays.
    fn purge(&mut self, layer: usize, node: usize) {
        let mut left = vec![node];
        while let Some(node) = left.pop() {
            let node = &mut self.nodes[node];
            if node.purged == layer + 1 {
                continue;
            }
            node.purged = layer + 1;
            node.children.retain(|_, slot| slot.layer >= layer);
            left.extend(node.children.values().filter_map(|slot| match slot.what {
                Here::Directory(index) => Some(index),
                Here::File(..) => None,
            }));
        }
    }

    /// Numbers of the files that are in the tree.
    pub(crate) fn files(&self) -> impl Iterator<Item = usize> {
        self.reachable().into_iter().flat_map(|node| {
            self.nodes[node]
                .children
                .values()
                .filter_map(|slot| match slot.what {
                    Here::File(number, _) => Some(number),
                    Here::Directory(_) => None,
                })
        })
    }

    fn reachable(&self) -> Vec<usize> {
        let mut found = vec![0];
        let mut next = 0;
        while let Some(node) = found.get(next) {
            next += 1;
            let below = self.nodes[*node]
                .children
                .values()
                .filter_map(|slot| match slot.what {
                    Here::Directory(index) => Some(index),
                    Here::File(..) => None,
                });
            let below: Vec<usize> = below.collect();
            found.extend(below);
        }
        found
    }

    /// The directories as an image has them. `inode` gives that of a file by its number.
    pub(crate) fn directories(
        mut self,
        inode: impl Fn(usize) -> Option<Inode>,
    ) -> Option<Vec<Directory>> {
        let reachable = self.reachable();
        let mut places = vec![0; self.nodes.len()];
        for (place, node) in reachable.iter().enumerate() {
            places[*node] = place;
        }
        let directory = |node: &usize| {
            let node = std::mem::take(&mut self.nodes[*node]);
            let entries = node.children.into_iter().map(|(name, slot)| {
                let child = match slot.what {
                    Here::Directory(index) => Child::Directory(places[index]),
                    Here::File(number, _) => Child::Inode(inode(number)?),
                };
                Some((name.into_vec(), child))
            });
            Some(Directory {
                entries: entries.collect::<Option<_>>()?,
                metadata: node.metadata,
            })
        };
        reachable.iter().map(directory).collect()
    }
}

/// The names of a path, without those that mean nothing.
pub(crate) fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|b| *b == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// A clean path's directory, and its last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

/// A path without `.`, `..` and doubled slashes, from the root on; `..` does not lead out of it.
pub(crate) fn clean(path: &[u8]) -> Box<[u8]> {
    let mut kept: Vec<&[u8]> = Vec::new();
    for part in parts(path) {
        if part == b".." {
            kept.pop();
        } else {
            kept.push(part);
        }
    }
    kept.join(&b'/').into()
}
