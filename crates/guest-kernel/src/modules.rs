//! A kernel's modules, as depmod(8) describes a tree of them: which files make a driver work, in which order.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::{KernelError, compressed};

/// The modules of a machine that runs images: its buses and devices, a root that is only read under one that is written, and
/// sockets to the host.
pub const MACHINE: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "ext4",
    "overlay",
    "af_packet",
];

/// The files of one release's modules.
#[derive(Debug)]
pub struct ModuleTree {
    root: PathBuf,
    /// A module's name, its file below the root, and the files that it needs.
    files: BTreeMap<String, (String, Vec<String>)>,
    builtin: HashSet<String>,
    /// What a module asks the kernel for while it starts: in no dependency of its file.
    soft: BTreeMap<String, Vec<String>>,
    aliases: BTreeMap<String, Vec<String>>,
}

/// The name of a module by its file: dashes and underscores are the same.
fn name_of(file: &str) -> String {
    let last = file.rsplit('/').next().unwrap_or(file);
    let name = last.split(".ko").next().unwrap_or(last);
    name.replace('-', "_")
}

impl ModuleTree {
    /// Reads what depmod wrote into a tree (`/lib/modules/RELEASE`).
    ///
    /// # Errors
    ///
    /// It is none, or cannot be read.
    pub fn open(root: &Path) -> Result<Self, KernelError> {
        let read = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
        let path = root.join("modules.dep");
        let dep = fs::read_to_string(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => KernelError::NoTree {
                path: root.into(),
                why: "it has no modules.dep (give the folder lib/modules/RELEASE; depmod writes that file)",
            },
            _ => KernelError::file("read", &path)(e),
        })?;
        let files = dep.lines().filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            Some((name_of(file), (file.to_owned(), needs)))
        });
        let mut soft = BTreeMap::new();
        for line in read("modules.softdep").lines() {
            let mut words = line.split_whitespace();
            if words.next() == Some("softdep")
                && let Some(name) = words.next()
            {
                let before = words
                    .skip_while(|w| *w != "pre:")
                    .skip(1)
                    .take_while(|w| *w != "post:");
                soft.entry(name.replace('-', "_"))
                    .or_insert_with(Vec::new)
                    .extend(before.map(str::to_owned));
            }
        }
        let mut aliases = BTreeMap::<_, Vec<_>>::new();
        for line in read("modules.alias").lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(alias), Some(module)) =
                (words.next(), words.next(), words.next())
            {
                aliases
                    .entry(alias.replace('-', "_"))
                    .or_default()
                    .push(module.replace('-', "_"));
            }
        }
        Ok(Self {
            root: root.into(),
            files: files.collect(),
            builtin: read("modules.builtin").lines().map(name_of).collect(),
            soft,
            aliases,
        })
    }

    /// The release that the modules are of: the folder's name.
    #[must_use]
    pub fn release(&self) -> String {
        let name = self.root.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The files that make these modules work, each after those that it needs. Modules that are built in have none.
    ///
    /// # Errors
    ///
    /// One is neither a file nor built in.
    pub fn resolve(&self, names: &[&str]) -> Result<Vec<PathBuf>, KernelError> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            let name = name.replace('-', "_");
            if !self.add(&name, &mut seen, &mut order) && !self.builtin.contains(&name) {
                return Err(KernelError::NoModule {
                    name,
                    tree: self.root.clone(),
                });
            }
        }
        Ok(order)
    }

    /// Whether there is such a file.
    fn add(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<PathBuf>) -> bool {
        let Some((file, needs)) = self.files.get(name) else {
            // An alias is what a soft dependency names; whatever of it there is.
            let mut found = false;
            for module in self.aliases.get(name).into_iter().flatten() {
                found |= self.files.contains_key(module) && self.add(module, seen, order);
            }
            return found;
        };
        // Before its needs: they may name each other in a damaged tree.
        if !seen.insert(name.to_owned()) {
            return true;
        }
        for soft in self.soft.get(name).into_iter().flatten() {
            self.add(&soft.replace('-', "_"), seen, order);
        }
        // Theirs are in their own lines, but also here; the last is needed first.
        for need in needs.iter().rev() {
            self.add(&name_of(need), seen, order);
        }
        order.push(self.root.join(file));
        true
    }

    /// A module's file without compression, and the name that it has then.
    pub(crate) fn read(path: &Path) -> Result<(String, Vec<u8>), KernelError> {
        let bytes = compressed::module(path).map_err(KernelError::file("read the module", path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok((format!("{}.ko", name_of(&name)), bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("6.1.0-test");
        fs::create_dir(&root).unwrap();
        for (name, text) in files {
            fs::write(root.join(name), text).unwrap();
        }
        let tree = ModuleTree::open(&root).unwrap();
        (dir, tree)
    }

    fn names(tree: &ModuleTree, names: &[&str]) -> Vec<String> {
        let order = tree.resolve(names).unwrap();
        let names = order.iter().map(|p| name_of(&p.to_string_lossy()));
        names.collect()
    }

    const DEP: &str = "kernel/a.ko: kernel/b.ko kernel/c.ko.xz\nkernel/b.ko: kernel/c.ko.xz\nkernel/c.ko.xz:\n\
        kernel/ext4.ko: kernel/jbd2.ko\nkernel/jbd2.ko:\nkernel/crc32c-generic.ko.zst:\nkernel/crc32c_intel.ko:\n";

    #[test]
    fn each_after_what_it_needs_and_once() {
        let (_dir, tree) = tree(&[("modules.dep", DEP)]);
        assert_eq!(tree.release(), "6.1.0-test");
        assert_eq!(names(&tree, &["a", "b"]), ["c", "b", "a"]);
    }

    #[test]
    fn what_is_asked_for_while_starting_comes_before() {
        let soft = "# comment\nsoftdep ext4 pre: crc32c post: other\n";
        let alias =
            "alias crc32c crc32c_generic\nalias crc32c crc32c_intel\nalias crypto-x nothing\n";
        let (_dir, tree) = tree(&[
            ("modules.dep", DEP),
            ("modules.softdep", soft),
            ("modules.alias", alias),
        ]);
        assert_eq!(
            names(&tree, &["ext4"]),
            ["crc32c_generic", "crc32c_intel", "jbd2", "ext4"]
        );
    }

    #[test]
    fn built_in_is_as_good_and_missing_is_said() {
        let (_dir, tree) = tree(&[
            ("modules.dep", DEP),
            ("modules.builtin", "kernel/drivers/virtio/virtio-pci.ko\n"),
        ]);
        assert!(names(&tree, &["virtio_pci"]).is_empty());
        let error = tree.resolve(&["nothing"]).unwrap_err().to_string();
        assert!(
            error.contains("'nothing'") && error.contains("6.1.0-test"),
            "{error}"
        );
    }

    #[test]
    fn a_tree_that_turns_in_circles_ends() {
        let (_dir, tree) = tree(&[("modules.dep", "a.ko: b.ko\nb.ko: a.ko\n")]);
        assert_eq!(names(&tree, &["a"]).len(), 2);
        assert!(
            ModuleTree::open(Path::new("/nowhere"))
                .unwrap_err()
                .to_string()
                .contains("depmod")
        );
    }
}
