//! Images for guests: small roots, empty disks, and what tools of others say about an image.
//!
//! A test hands a guest what to do on a disk of its own (`scripted`), so that one root serves many.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use serde_json::json;

use super::sources::skip;
use super::vm::Vm;

/// Runs a tool of the host; false, with the skip told, where it is missing.
#[track_caller]
pub(crate) fn tool(name: &str, args: &[&str]) -> bool {
    match Command::new(name).args(args).output() {
        Ok(output) => {
            assert_success(name, args, &output);
            true
        }
        Err(e) => {
            skip(&format!("{name}: {e}"));
            false
        }
    }
}

/// What a tool of the host prints, which is there if the test came as far as this.
#[track_caller]
pub(crate) fn output(name: &str, args: &[&str]) -> String {
    let output = Command::new(name).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_success(name, args, &output);
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn assert_success(name: &str, args: &[&str], output: &Output) {
    let said = [&output.stdout[..], &output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{name} {args:?}: {said}");
}

pub(crate) fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// Makes the files of a small root file system whose init runs `script` and powers off.
pub(crate) fn root_files(dir: &Path, script: &str) -> PathBuf {
    let root = dir.join("root");
    for sub in ["bin", "sbin", "proc", "sys", "dev", "tmp", "mnt"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"];
    let busybox = busybox.iter().find(|p| Path::new(p).exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let list = Command::new(busybox).arg("--list").output().unwrap().stdout;
    for name in String::from_utf8(list)
        .unwrap()
        .lines()
        .filter(|n| *n != "busybox")
    {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let init = root.join("sbin/init");
    let text = format!(
        "#!/bin/sh\nexport PATH=/bin\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\nmount -t tmpfs tmp /tmp\n{script}\n\
         sync\nstty -F /dev/console opost\npoweroff -f\n"
    );
    fs::write(&init, text).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    root
}

/// Puts a program of the host's below `root`, with the libraries that it names.
pub(crate) fn add_program(root: &Path, program: &str) {
    let libraries = output("ldd", &[program]);
    let files = libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .chain([program]);
    for file in files {
        let copy = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(file, copy).unwrap();
    }
}

/// Makes `image` a file system of `mib` MiB that holds what is below `root`.
#[track_caller]
pub(crate) fn ext4(image: &Path, root: &Path, mib: u64) -> bool {
    File::create(image).unwrap().set_len(mib << 20).unwrap();
    tool(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-d", path(root), path(image)],
    )
}

/// How an image keeps its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2,
}

pub(crate) use Format::{Qcow2, Raw};

/// An empty disk of `mib` MiB in `dir`; nothing, with the skip told, where the tool is missing.
#[track_caller]
pub(crate) fn empty(dir: &Path, format: Format, mib: u64) -> Option<PathBuf> {
    let size = format!("{mib}M");
    let image = match format {
        Raw => dir.join("disk.raw"),
        Qcow2 => dir.join("disk.qcow2"),
    };
    let name = if format == Raw { "raw" } else { "qcow2" };
    let args = ["create", "-q", "-f", name, path(&image), &size];
    tool("qemu-img", &args).then_some(image)
}

/// The content of the image as a raw file beside it, read by QEMU; a qcow2 is checked first.
#[track_caller]
pub(crate) fn as_raw(image: &Path, format: Format) -> PathBuf {
    if format == Raw {
        return image.into();
    }
    output("qemu-img", &["check", "-q", "-f", "qcow2", path(image)]);
    let raw = image.with_extension("as-raw");
    let args = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        path(image),
        path(&raw),
    ];
    output("qemu-img", &args);
    raw
}

/// The SHA-256 of a file, as the tool of that name prints it.
#[track_caller]
pub(crate) fn sum(file: &Path) -> String {
    let line = output("sha256sum", &[path(file)]);
    line.split_whitespace().next().unwrap().into()
}

/// What the file takes of the host's disk.
pub(crate) fn allocated_bytes(file: &Path) -> u64 {
    fs::metadata(file).unwrap().blocks() * 512
}

/// The guest's root and its script: the disks before and after those of the test.
///
/// The test's own first disk is `/dev/vdb`.
#[track_caller]
pub(crate) fn scripted(
    vm: Vm,
    root: &Path,
    dir: &Path,
    disks: impl FnOnce(Vm) -> Vm,
    script: &str,
) -> Vm {
    let vm = disks(vm.disk(root, json!({"is_root_device": true, "is_read_only": true})));
    // A shell reads it from the device: what pads the last sector are empty lines.
    let mut text = format!("#!/bin/sh\n{script}\n").into_bytes();
    text.resize(text.len().next_multiple_of(512), b'\n');
    let file = dir.join("script");
    fs::write(&file, text).unwrap();
    vm.disk(&file, json!({"is_read_only": true}))
}

/// A root that holds fio with its libraries, and runs the disk that is a script; made once.
pub(crate) fn fio_root() -> Option<&'static Path> {
    static MADE: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let fio = ["/usr/bin/fio", "/usr/local/bin/fio"];
        let fio = fio.into_iter().find(|p| Path::new(p).exists());
        let fio = fio.ok_or("fio is not installed")?;
        let dir = tempfile::tempdir().unwrap();
        let root = root_files(
            dir.path(),
            // Errors are the tests' own doing: they are not to come between the lines of the script.
            "dmesg -n 1\nfor disk in /sys/block/vd*; do \
             [ \"$(head -c 9 /dev/${disk##*/})\" != '#!/bin/sh' ] || sh /dev/${disk##*/}; done",
        );
        add_program(&root, fio);
        // Where cargo keeps what tests make: nothing is left elsewhere, and the next run writes over it.
        let image = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fio-root.ext4");
        let new = image.with_extension(std::process::id().to_string());
        if !ext4(&new, &root, 160) {
            return Err("mke2fs is not installed".into());
        }
        fs::rename(&new, &image).unwrap();
        Ok(image)
    });
    made.as_deref().map_err(|why| skip(why)).ok()
}

/// Roots of Debian's packages, as `tools/lib/debian-root.sh` makes them.
#[derive(Debug)]
pub(crate) struct DebianRoot {
    dir: PathBuf,
}

impl DebianRoot {
    /// Those in the directory that `ALVEOLE_TEST_DEBIAN` names; nothing, with the skip told, without it.
    #[track_caller]
    pub(crate) fn find() -> Option<Self> {
        let Some(dir) = std::env::var_os("ALVEOLE_TEST_DEBIAN").map(PathBuf::from) else {
            skip("ALVEOLE_TEST_DEBIAN is not set");
            return None;
        };
        let it = Self { dir };
        // Set, and wrong: a skip would hide it.
        assert!(
            it.image("ext4").is_file(),
            "ALVEOLE_TEST_DEBIAN names {}, where there is no root.ext4",
            it.dir.display()
        );
        Some(it)
    }

    /// The image with this file system.
    pub(crate) fn image(&self, file_system: &str) -> PathBuf {
        self.dir.join(format!("root.{file_system}"))
    }

    /// What was packed, as text: `os-release` or `packages`.
    pub(crate) fn fact(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap()
    }

    /// A copy of the ext4 image in `dir`, for a guest that writes.
    #[track_caller]
    pub(crate) fn copy(&self, dir: &Path) -> PathBuf {
        let copy = dir.join("base.img");
        let image = self.image("ext4");
        output("cp", &["--sparse=always", path(&image), path(&copy)]);
        copy
    }
}
