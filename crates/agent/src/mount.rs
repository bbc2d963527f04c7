//! Mounts: those of every Linux guest, and those that the host describes.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alveole_agent_protocol::{Mount, Setup, Source};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, mount, mount_move};

/// Where the guest's root is put together, in the initramfs.
const ROOT: &str = "/root";
/// Where changes of the root are kept.
const CHANGES: &str = "/changes";
/// What of the root was changed, there.
pub(crate) const CHANGED: &str = "root";
/// Disks that the machine has may be found by the kernel a little later.
const DISK_PATIENCE: Duration = Duration::from_secs(10);

const NO_PROGRAMS: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

fn attach(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), String> {
    let failed = |why: &dyn std::fmt::Display| {
        format!("cannot mount {kind} '{source}' at '{target}': {why}")
    };
    fs::create_dir_all(target).map_err(|e| failed(&e))?;
    let options = std::ffi::CString::new(options).map_err(|e| failed(&e))?;
    mount(source, target, kind, flags, Some(options.as_c_str())).map_err(|e| {
        let cure = match e {
            rustix::io::Errno::NODEV => {
                ": does the kernel have that file system (a module in the initramfs)?"
            }
            _ => "",
        };
        failed(&format!("{}{cure}", io::Error::from(e)))
    })
}

/// What is needed to see the machine at all. In the initramfs nothing is there.
pub(crate) fn first() -> Result<(), String> {
    attach(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        "mode=0755",
    )?;
    attach("proc", "/proc", "proc", NO_PROGRAMS, "")?;
    attach("sysfs", "/sys", "sysfs", NO_PROGRAMS, "")
}

/// The disk whose serial number this is.
fn disk(serial: &str) -> Result<PathBuf, String> {
    let until = Instant::now() + DISK_PATIENCE;
    loop {
        let mut seen = Vec::new();
        for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
            let text = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
            if text.trim_end() == serial {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
            seen.push(format!(
                "{}='{}'",
                entry.file_name().display(),
                text.trim_end()
            ));
        }
        if Instant::now() > until {
            seen.sort();
            return Err(format!(
                "no disk has the serial number '{serial}' (there are: {}): is its driver in the initramfs?",
                seen.join(", ")
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Mounts what the host describes below `root`.
fn described(what: &Mount, target: &str) -> Result<(), String> {
    let source = match &what.source {
        Source::Disk(serial) => disk(serial)?.display().to_string(),
        Source::Tag(word) => word.clone(),
        Source::Nothing => what.kind.clone(),
    };
    let mut flags = MountFlags::empty();
    if what.read_only {
        flags |= MountFlags::RDONLY;
    }
    attach(&source, target, &what.kind, flags, &what.options)
}

/// Puts the guest's root together and moves into it. Gives the disk of its changes, if it has one.
pub(crate) fn root(setup: &Setup) -> Result<Option<OwnedFd>, String> {
    let mut changes = None;
    if let Some(lower) = &setup.root {
        if setup.read_only {
            described(lower, ROOT)?;
        } else {
            changes = overlay(lower, setup.changes.as_ref())?;
        }
        in_root(ROOT)?;
        move_into(ROOT)?;
    } else {
        in_root("")?;
    }
    for what in &setup.mounts {
        described(what, &what.target)?;
    }
    Ok(changes)
}

fn overlay(lower: &Mount, changes: Option<&Mount>) -> Result<Option<OwnedFd>, String> {
    const LOWER: &str = "/lower";
    described(lower, LOWER)?;
    let mut on_disk = None;
    match changes {
        Some(disk) => {
            described(disk, CHANGES)?;
            let folder = open(CHANGES, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
            on_disk = Some(folder.map_err(|e| format!("cannot open '{CHANGES}': {e}"))?);
        }
        None => attach("tmpfs", CHANGES, "tmpfs", MountFlags::empty(), "mode=0755")?,
    }
    let (changed, work) = (format!("{CHANGES}/{CHANGED}"), format!("{CHANGES}/work"));
    for folder in [&changed, &work] {
        fs::create_dir_all(folder).map_err(|e| format!("cannot make '{folder}': {e}"))?;
    }
    // A root is what its image says, owner and mode of its top included.
    copy_attributes(Path::new(LOWER), Path::new(&changed))?;
    // A layer can be made of what is kept only if each change is kept as itself, whatever the kernel would do by itself.
    let options = format!(
        "lowerdir={LOWER},upperdir={changed},workdir={work},redirect_dir=off,metacopy=off,index=off"
    );
    attach("root", ROOT, "overlay", MountFlags::empty(), &options)?;
    Ok(on_disk)
}

fn copy_attributes(from: &Path, to: &Path) -> Result<(), String> {
    use std::os::unix::fs::{MetadataExt, chown};
    let copy = || {
        let metadata = fs::metadata(from)?;
        chown(to, Some(metadata.uid()), Some(metadata.gid()))?;
        fs::set_permissions(to, metadata.permissions())
    };
    copy().map_err(|e: io::Error| {
        format!(
            "cannot make '{}' as '{}': {e}",
            to.display(),
            from.display()
        )
    })
}

/// What every program expects to be there, and a container, too.
fn in_root(root: &str) -> Result<(), String> {
    if !root.is_empty() {
        for place in ["/dev", "/proc", "/sys"] {
            let target = format!("{root}{place}");
            // In a root that cannot be changed the image must have them.
            fs::create_dir_all(&target).map_err(|e| format!("cannot make '{target}': {e}"))?;
            mount_move(place, &target)
                .map_err(|e| format!("cannot move '{place}' to '{target}': {e}"))?;
        }
    }
    let at = |place: &str| format!("{root}{place}");
    attach(
        "devpts",
        &at("/dev/pts"),
        "devpts",
        MountFlags::NOSUID | MountFlags::NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;
    attach("shm", &at("/dev/shm"), "tmpfs", NO_PROGRAMS, "mode=1777")?;
    attach("mqueue", &at("/dev/mqueue"), "mqueue", NO_PROGRAMS, "").unwrap_or_else(|e| tell(&e));
    attach(
        "tmpfs",
        &at("/run"),
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=0755",
    )
    .unwrap_or_else(|e| tell(&e));
    attach("cgroup2", &at("/sys/fs/cgroup"), "cgroup2", NO_PROGRAMS, "")
        .unwrap_or_else(|e| tell(&e));
    for (link, to) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(to, at(link));
    }
    Ok(())
}

/// A kernel without it, or an image without the folder, is no reason to have no guest.
fn tell(why: &str) {
    eprintln!("alveole-agent: {why}; the guest goes on without it");
}

/// Makes the folder this process's root. An initramfs cannot be pivoted away from: it is emptied, which gives its memory
/// back, and covered.
fn move_into(root: &str) -> Result<(), String> {
    let failed = |e: &dyn std::fmt::Display| format!("cannot make '{root}' the root: {e}");
    for gone in ["/lib", "/init", "/modules"] {
        let path = Path::new(gone);
        let _ = if path.is_dir() {
            fs::remove_dir_all(path)
        } else {
            fs::remove_file(path)
        };
    }
    rustix::process::chdir(root).map_err(|e| failed(&e))?;
    mount_move(".", "/").map_err(|e| failed(&e))?;
    rustix::process::chroot(".").map_err(|e| failed(&e))?;
    rustix::process::chdir("/").map_err(|e| failed(&e))
}

/// Makes every file system safe to be left: written out, and not written any more.
pub(crate) fn leave(changes: Option<&OwnedFd>) {
    rustix::fs::sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // The last first, as they lie over one another.
    for line in mounts.lines().rev() {
        let mut words = line.split(' ');
        if let (Some(source), Some(target)) = (words.next(), words.next())
            && source.starts_with("/dev/")
        {
            let target = target.replace("\\040", " ");
            let _ = rustix::mount::mount_remount(&target, MountFlags::RDONLY, "");
        }
    }
    if let Some(changes) = changes {
        // Nothing is begun that had to be finished by the next start.
        let path = format!("/proc/self/fd/{}", changes.as_raw_fd());
        let _ = rustix::mount::mount_remount(&path, MountFlags::RDONLY, "");
    }
    rustix::fs::sync();
}
