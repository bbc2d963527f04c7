//! Kernels from files, packages and nowhere, in a store that stays whole.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use alveole_guest_kernel::{KernelStore, MACHINE, ModuleTree, Source, write_initramfs};
use tempfile::TempDir;

const RELEASE: &str = "6.1.0-9-test";

/// What passes for a kernel, with its release in it.
fn kernel(at: &Path) {
    let mut bytes = vec![0; 4096];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    let text = format!("{RELEASE} (somebody@somewhere) #1\0");
    bytes[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
    fs::write(at, bytes).unwrap();
}

/// A tree in which each module that a machine needs is a file of its own, compressed in one of the usual ways.
fn modules(below: &Path) -> PathBuf {
    let tree = below.join("lib/modules").join(RELEASE);
    fs::create_dir_all(tree.join("kernel")).unwrap();
    let mut dep = String::new();
    for (at, name) in MACHINE.iter().enumerate() {
        let file = format!("kernel/{name}.ko");
        let path = tree.join(&file);
        fs::write(&path, format!("the module {name}")).unwrap();
        let suffix = [("", ""), ("xz", ".xz"), ("zstd", ".zst"), ("gzip", ".gz")][at % 4];
        if !suffix.0.is_empty() {
            let mut tool = Command::new(suffix.0);
            if suffix.0 == "zstd" {
                tool.args(["-q", "--rm"]);
            }
            assert!(tool.arg(&path).status().unwrap().success());
        }
        dep.push_str(&format!("{file}{}:\n", suffix.1));
    }
    fs::write(tree.join("modules.dep"), dep).unwrap();
    tree
}

/// A package of what is below a folder.
fn build(root: &Path, compression: &str) -> PathBuf {
    let control =
        "Package: kernel\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@x.x>\nDescription: x\n";
    fs::create_dir_all(root.join("DEBIAN")).unwrap();
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    let out = root.with_extension("deb");
    let built = Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Z", compression, "--build"])
        .args([root, &out])
        .output()
        .unwrap();
    assert!(built.status.success(), "{built:?}");
    out
}

struct Bench {
    dir: TempDir,
    store: KernelStore,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = KernelStore::new(&dir.path().join("kernels"));
        kernel(&dir.path().join("vmlinuz"));
        modules(dir.path());
        Self { dir, store }
    }

    fn files(&self) -> Source {
        Source::Files {
            kernel: self.dir.path().join("vmlinuz"),
            modules: Some(self.dir.path().join("lib/modules").join(RELEASE)),
        }
    }

    /// A package as Debian's tools make it.
    fn package(&self, compression: &str, merged_usr: bool) -> PathBuf {
        let root = self
            .dir
            .path()
            .join(format!("package-{compression}-{merged_usr}"));
        fs::create_dir_all(root.join("boot")).unwrap();
        kernel(&root.join(format!("boot/vmlinuz-{RELEASE}")));
        modules(&if merged_usr {
            root.join("usr")
        } else {
            root.clone()
        });
        build(&root, compression)
    }

    #[track_caller]
    fn refuses(&self, source: &Source, words: &[&str]) {
        let before = self.names();
        let error = self.store.add(source, None).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "does not say {word:?}: {error}");
        }
        assert_eq!(self.names(), before);
    }

    /// Everything in the store's folder.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("kernels"));
        let names = entries.into_iter().flatten().flatten();
        let mut names: Vec<_> = names
            .map(|e| e.file_name().into_string().unwrap())
            .collect();
        names.retain(|n| n != "lock");
        names.sort();
        names
    }
}

#[test]
fn the_first_is_the_default_and_others_can_be() {
    let bench = Bench::new();
    let none = bench.store.get(None).unwrap_err().to_string();
    assert!(none.contains("alveole kernel add"), "{none}");
    let first = bench.store.add(&bench.files(), None).unwrap();
    assert_eq!((first.name.as_str(), first.default), (RELEASE, true));
    assert_eq!(fs::read(first.kernel()).unwrap().len(), 4096);
    let error = bench
        .store
        .add(&bench.files(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("already"), "{error}");
    bench.store.add(&bench.files(), Some("other")).unwrap();
    assert_eq!(bench.store.get(None).unwrap().name, RELEASE);
    bench.store.set_default("other").unwrap();
    assert_eq!(bench.store.get(None).unwrap().name, "other");
    let unknown = bench.store.get(Some("nothing")).unwrap_err().to_string();
    assert!(
        unknown.contains(RELEASE) && unknown.contains("other"),
        "{unknown}"
    );
    bench.store.remove("other").unwrap();
    assert_eq!(bench.store.list().unwrap().len(), 1);
    assert_eq!(bench.names(), [RELEASE, "default"]);
    // The next one that is added is the default, as there is none.
    bench.store.get(None).unwrap_err();
    assert!(
        bench
            .store
            .add(&bench.files(), Some("third"))
            .unwrap()
            .default
    );
}

#[test]
fn packages_in_every_compression() {
    let bench = Bench::new();
    for (compression, merged_usr) in [
        ("xz", false),
        ("zstd", true),
        ("gzip", false),
        ("none", true),
    ] {
        let package = bench.package(compression, merged_usr);
        let kernel = bench
            .store
            .add(&Source::Package(package), Some(compression))
            .unwrap();
        assert_eq!(kernel.release, RELEASE);
        let modules = kernel.kernel().with_file_name("modules");
        let order = fs::read_to_string(modules.join("order")).unwrap();
        assert_eq!(order.lines().count(), MACHINE.len());
        for name in MACHINE {
            let text = fs::read_to_string(modules.join(format!("{name}.ko"))).unwrap();
            assert_eq!(text, format!("the module {name}"));
        }
    }
}

/// Says loudly that a test does not run; `tools/test` counts these lines.
fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    // Not `eprint!`: the test runner keeps that for itself.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut log = fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}

/// Debian's packages say nothing of which modules need which: that is found out where they are installed.
#[test]
fn a_package_as_debian_has_them() {
    const NAME: &str = "a_package_as_debian_has_them";
    let Some(vmlinuz) = std::env::var_os("ALVEOLE_TEST_KERNEL").map(PathBuf::from) else {
        return skip(NAME, "ALVEOLE_TEST_KERNEL is not set");
    };
    let trees = fs::read_dir(vmlinuz.with_file_name("lib").join("modules"));
    let Some(tree) = trees.into_iter().flatten().flatten().next() else {
        return skip(NAME, "beside ALVEOLE_TEST_KERNEL are no modules");
    };
    let (tree, release) = (tree.path(), tree.file_name());
    let bench = Bench::new();
    let root = bench.dir.path().join("debian");
    let modules = root.join("lib/modules").join(&release);
    let order = ModuleTree::open(&tree).unwrap().resolve(MACHINE).unwrap();
    for file in &order {
        let to = modules.join(file.strip_prefix(&tree).unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
    for name in [
        "modules.builtin",
        "modules.builtin.modinfo",
        "modules.order",
    ] {
        let _ = fs::copy(tree.join(name), modules.join(name));
    }
    fs::create_dir_all(root.join("boot")).unwrap();
    let name = format!("vmlinuz-{}", release.to_str().unwrap());
    fs::copy(&vmlinuz, root.join("boot").join(name)).unwrap();
    let package = build(&root, "none");
    let kernel = bench.store.add(&Source::Package(package), None).unwrap();
    assert_eq!(kernel.release, release.to_str().unwrap());
    let listed =
        fs::read_to_string(kernel.kernel().with_file_name("modules").join("order")).unwrap();
    assert_eq!(listed.lines().count(), order.len(), "{listed}");
    // Whatever needs another comes after it.
    let place = |name: &str| listed.lines().position(|l| l == name).unwrap();
    assert!(place("virtio_ring.ko") < place("virtio_blk.ko"), "{listed}");
}

#[test]
fn what_is_no_kernel_leaves_nothing() {
    let bench = Bench::new();
    let at = |name: &str| bench.dir.path().join(name);
    fs::write(at("text"), "x".repeat(1000)).unwrap();
    fs::create_dir(at("empty")).unwrap();
    let with = |kernel: &str, modules: Option<&str>| Source::Files {
        kernel: at(kernel),
        modules: modules.map(at),
    };
    bench.refuses(&with("text", None), &["text", "bzImage", "ELF"]);
    bench.refuses(&with("missing", None), &["missing", "No such file"]);
    bench.refuses(&with("vmlinuz", Some("empty")), &["empty", "modules.dep"]);
    bench.refuses(&Source::Package(at("text")), &["text", "damaged"]);
    bench.refuses(
        &Source::Package(at("missing")),
        &["missing", "No such file"],
    );
    let tree = at("lib/modules").join(RELEASE);
    let dep = fs::read_to_string(tree.join("modules.dep")).unwrap();
    fs::write(tree.join("modules.dep"), dep.replace("erofs", "other")).unwrap();
    bench.refuses(&bench.files(), &["'erofs'", "linux-image"]);
    // The folder's name is the release that its modules are of.
    let others = at("lib/modules").join("6.1.0-8-test");
    fs::rename(&tree, &others).unwrap();
    let mixed = with("vmlinuz", Some("lib/modules/6.1.0-8-test"));
    bench.refuses(&mixed, &[RELEASE, "another one, 6.1.0-8-test", "vmlinuz"]);
    fs::rename(&others, &tree).unwrap();
    // A module that is named and not there.
    fs::write(
        tree.join("modules.dep"),
        dep.replace("ext4.ko", "gone/ext4.ko"),
    )
    .unwrap();
    bench.refuses(&bench.files(), &["gone/ext4.ko", "No such file"]);
    for name in [
        "",
        "..",
        "a/b",
        ".hidden",
        "default",
        "lock",
        &"x".repeat(101),
    ] {
        let error = bench
            .store
            .add(&with("vmlinuz", None), Some(name))
            .unwrap_err();
        assert!(error.to_string().contains("kernel's name"), "{error}");
    }
}

/// A package may be anybody's.
#[test]
fn a_package_that_leads_elsewhere_is_refused() {
    let bench = Bench::new();
    let package = bench.package("gzip", false);
    let work = bench.dir.path().join("evil");
    fs::create_dir(&work).unwrap();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(4);
    header.set_mode(0o644);
    // By hand: the library's own functions refuse such a name.
    let name = b"boot/../../outside";
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_cksum();
    builder.append(&header, &b"evil"[..]).unwrap();
    fs::write(work.join("data.tar"), builder.into_inner().unwrap()).unwrap();
    let evil = bench.dir.path().join("evil.deb");
    fs::copy(&package, &evil).unwrap();
    let ar = |words: &[&str], more: &[&Path]| {
        let done = Command::new("ar").args(words).args(more).status().unwrap();
        assert!(done.success());
    };
    ar(&["d"], &[&evil, Path::new("data.tar.gz")]);
    ar(&["q"], &[&evil, &work.join("data.tar")]);
    bench.refuses(&Source::Package(evil), &["leads elsewhere"]);
    assert!(!bench.dir.path().join("outside").exists());
}

#[test]
fn the_initramfs_is_what_cpio_reads_and_follows_its_agent() {
    let bench = Bench::new();
    let kernel = bench.store.add(&bench.files(), None).unwrap();
    let agent = bench.dir.path().join("agent");
    fs::write(&agent, "#!agent").unwrap();
    let first = kernel.initramfs(&agent).unwrap();
    assert_eq!(kernel.initramfs(&agent).unwrap(), first);
    let listed = Command::new("cpio")
        .args(["--quiet", "-itv"])
        .stdin(fs::File::open(&first).unwrap())
        .output()
        .unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    assert!(
        text.lines()
            .any(|l| l.starts_with("-rwxr-xr-x") && l.ends_with(" init")),
        "{text}"
    );
    assert!(
        text.lines()
            .any(|l| l.starts_with("crw-------") && l.ends_with("dev/console")),
        "{text}"
    );
    assert!(
        text.contains("modules/virtio_blk.ko") && text.contains("modules/order"),
        "{text}"
    );
    fs::write(&agent, "#!another agent").unwrap();
    let second = kernel.initramfs(&agent).unwrap();
    assert_ne!(first, second);
    assert!(!first.exists() && second.exists());
    // The same inputs give the same bytes.
    let write = || {
        let mut bytes = Vec::new();
        write_initramfs(&mut bytes, b"agent", &[("a.ko".into(), vec![1, 2, 3])]).unwrap();
        bytes
    };
    assert_eq!(write(), write());
}
