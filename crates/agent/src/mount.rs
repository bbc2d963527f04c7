//! Mounts: those of every Linux guest, and those that the host describes.
//!
//! Volumes are made ready before the guest's root is there (`staged`), and put into their places in it afterwards, so that links
//! of the image lead where they lead for its programs.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alveole_agent_protocol::{Mount, Setup, Source, Volume};
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::mount::{MountFlags, mount, mount_move};

/// Where the guest's root is put together, in the initramfs.
const ROOT: &str = "/root";
/// Where changes of the root are kept.
const CHANGES: &str = "/changes";
/// What of the root was changed, there.
pub(crate) const CHANGED: &str = "root";
/// Where the disk with the kernel's modules is.
const MODULES: &str = "/kernel-modules";
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
    let (mut flags, options) = split_options(&what.options);
    if what.read_only {
        flags |= MountFlags::RDONLY;
    }
    attach(&source, target, &what.kind, flags, &options)
}

/// Those options that are the same for all file systems, and the others.
fn split_options(options: &str) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut others = Vec::new();
    for word in options.split(',') {
        match word {
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "" | "rw" | "suid" | "dev" | "exec" | "atime" => {}
            other => others.push(other),
        }
    }
    (flags, others.join(","))
}

/// File systems that are written and that no path leads to once the root is there.
#[derive(Default)]
pub(crate) struct Hidden {
    /// The disk of the root's changes.
    pub(crate) changes: Option<OwnedFd>,
    /// Those of volumes.
    pub(crate) volumes: Vec<OwnedFd>,
}

/// Puts the guest's root together and moves into it.
pub(crate) fn root(setup: &Setup) -> Result<Hidden, String> {
    let mut hidden = Hidden::default();
    if let Some(disk) = &setup.changes {
        described(disk, CHANGES)?;
        hidden.changes = Some(opened(CHANGES)?);
    } else {
        attach("tmpfs", CHANGES, "tmpfs", MountFlags::empty(), "mode=0755")?;
    }
    let mut volumes = Vec::new();
    for (number, volume) in setup.volumes.iter().enumerate() {
        volumes.push((volume, staged(volume, number, &mut hidden.volumes)?));
    }
    let modules = match &setup.modules {
        Some(disk) => {
            described(disk, MODULES)?;
            Some(opened(MODULES)?)
        }
        None => None,
    };
    if let Some(lower) = &setup.root {
        overlay(lower, setup.read_only)?;
        in_root(ROOT, setup.shm_bytes)?;
        move_into(ROOT)?;
    } else {
        in_root("", setup.shm_bytes)?;
    }
    for what in &setup.mounts {
        described(what, &what.target)?;
    }
    if let Some(modules) = modules {
        place_modules(&modules).unwrap_or_else(|e| tell(&e));
    }
    for (volume, staged) in volumes {
        place(volume, staged.as_ref())?;
    }
    Ok(hidden)
}

/// Whether the root is not to be changed, once all in it is in its place.
pub(crate) fn is_sealed(setup: &Setup) -> bool {
    setup.read_only && setup.root.is_some()
}

/// Nothing of the root is changed from now on.
pub(crate) fn seal_root() -> Result<(), String> {
    rustix::mount::mount_remount("/", MountFlags::RDONLY, "").map_err(|e| {
        format!(
            "cannot make the root one that is only read: {}",
            io::Error::from(e)
        )
    })
}

/// The root of a guest can be changed for a moment, by this program.
pub(crate) fn unseal_root() -> Result<(), String> {
    rustix::mount::mount_remount("/", MountFlags::empty(), "").map_err(|e| {
        format!(
            "cannot make the root one that can be written: {}",
            io::Error::from(e)
        )
    })
}

fn opened(folder: &str) -> Result<OwnedFd, String> {
    open(folder, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| format!("cannot open '{folder}': {}", io::Error::from(e)))
}

/// The path of an open folder or file, wherever it is.
fn path_of(open: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", open.as_raw_fd())
}

fn make_folder(path: &str) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|e| format!("cannot make '{path}': {e}"))
}

/// Makes a volume ready, in the initramfs, where programs of the guest cannot see it. None: it is mounted where it belongs.
fn staged(
    volume: &Volume,
    number: usize,
    hidden: &mut Vec<OwnedFd>,
) -> Result<Option<OwnedFd>, String> {
    let what = &volume.mount;
    let mut shown = format!("/volumes/{number}");
    match (&what.source, &volume.changes) {
        (Source::Nothing, None) => return Ok(None),
        (Source::Nothing, Some(name)) => {
            shown = format!("{CHANGES}/volumes/{name}");
            make_folder(&shown)?;
        }
        (_, changes) => {
            // What is written goes elsewhere.
            let below = Mount {
                read_only: what.read_only || changes.is_some(),
                ..what.clone()
            };
            described(&below, &shown)?;
            if let Some(name) = changes {
                let over = format!("/volumes/{number}.written");
                let written = format!("{CHANGES}/volumes/{name}");
                layer(&shown, &written, &over)?;
                shown = over;
            } else if !what.read_only {
                hidden.push(opened(&shown)?);
            }
        }
    }
    if !volume.within.is_empty() {
        shown = format!("{shown}/{}", volume.within);
        if !Path::new(&shown).exists() {
            make_folder(&shown)?;
        }
    }
    opened(&shown).map(Some)
}

/// Puts a volume into its place in the guest's root.
fn place(volume: &Volume, staged: Option<&OwnedFd>) -> Result<(), String> {
    let what = &volume.mount;
    let target = &what.target;
    let Some(staged) = staged else {
        return described(what, target);
    };
    let failed = |why: &dyn std::fmt::Display| format!("cannot put a volume at '{target}': {why}");
    let source = path_of(staged);
    let is_dir = fs::metadata(&source).map_err(|e| failed(&e))?.is_dir();
    let is_there = Path::new(target).exists();
    match (is_dir, is_there) {
        (true, true) if !Path::new(target).is_dir() => {
            return Err(failed(
                &"it is a folder, and what the image has there is a file",
            ));
        }
        (false, true) if Path::new(target).is_dir() => {
            return Err(failed(
                &"it is a file, and what the image has there is a folder",
            ));
        }
        (true, false) => make_folder(target)?,
        (false, false) => {
            if let Some(folder) = Path::new(target).parent() {
                make_folder(&folder.display().to_string())?;
            }
            fs::File::create(target).map_err(|e| failed(&e))?;
        }
        _ => {}
    }
    // What the image has there is hidden by the volume.
    let hidden = match volume.fill && is_there && is_dir && !what.read_only {
        true => Some(opened(target)?),
        false => None,
    };
    rustix::mount::mount_bind(&source, target).map_err(|e| failed(&io::Error::from(e)))?;
    if let Some(hidden) = hidden {
        fill(target, &path_of(&hidden)).map_err(|e| failed(&e))?;
    }
    if what.read_only {
        rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "")
            .map_err(|e| failed(&io::Error::from(e)))?;
    }
    Ok(())
}

/// Gives an empty folder what another has, its owner and mode included.
fn fill(folder: &str, from: &str) -> Result<(), String> {
    let mut entries = fs::read_dir(folder).map_err(|e| format!("cannot read it: {e}"))?;
    if entries.next().is_some() {
        return Ok(());
    }
    crate::copy::all(Path::new(from), Path::new(folder))?;
    copy_attributes(Path::new(from), Path::new(folder))
}

/// Makes the devices by which modules are loaded when somebody opens them, such as `/dev/fuse` and `/dev/net/tun`: lines
/// `MODULE NAME c10:229` (depmod(8)). What is not in order is passed over.
fn static_nodes(modules: &str) {
    /// What everybody may open, as udev's rules have it: they give what the kernel grants whoever asks.
    const FOR_ALL: [&str; 2] = ["fuse", "net/tun"];
    let list = fs::read_to_string(format!("{modules}/modules.devname")).unwrap_or_default();
    for line in list.lines().filter(|l| !l.starts_with('#')) {
        let mut words = line.split(' ').skip(1);
        let (Some(name), Some(device)) = (words.next(), words.next()) else {
            continue;
        };
        let kind = match device.as_bytes().first() {
            Some(b'c') => FileType::CharacterDevice,
            Some(b'b') => FileType::BlockDevice,
            _ => continue,
        };
        let Some((major, minor)) = device[1..].split_once(':') else {
            continue;
        };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else {
            continue;
        };
        let path = Path::new("/dev").join(name);
        if name.split('/').any(|part| part == "..") || path.exists() {
            continue;
        }
        if let Some(folder) = path.parent() {
            let _ = fs::create_dir_all(folder);
        }
        let mode = if FOR_ALL.contains(&name) {
            0o666
        } else {
            0o600
        };
        let device = makedev(major, minor);
        if mknodat(CWD, &path, kind, Mode::from_raw_mode(mode), device).is_ok() {
            let _ = rustix::fs::chmod(&path, Mode::from_raw_mode(mode));
        }
    }
}

/// Shows the kernel's modules where programs look for them, and has the kernel ask this program for those that it needs itself.
fn place_modules(modules: &OwnedFd) -> Result<(), String> {
    let release = rustix::system::uname();
    let target = format!("/lib/modules/{}", release.release().to_string_lossy());
    make_folder(&target)?;
    rustix::mount::mount_bind(path_of(modules), &target).map_err(|e| {
        format!(
            "cannot show the kernel's modules at '{target}': {}",
            io::Error::from(e)
        )
    })?;
    static_nodes(&target);
    fs::write("/proc/sys/kernel/modprobe", crate::modprobe::HELPER)
        .map_err(|e| format!("the kernel cannot be told who loads its modules: {e}"))
}

/// Mounts the root, under a file system that takes its changes. One that is not to be changed has places for what is mounted in it, and
/// files that name the guest, all the same: those are in memory.
fn overlay(lower: &Mount, read_only: bool) -> Result<(), String> {
    const LOWER: &str = "/lower";
    const UNCHANGED: &str = "/unchanged";
    described(lower, LOWER)?;
    let changes = if read_only {
        attach(
            "tmpfs",
            UNCHANGED,
            "tmpfs",
            MountFlags::empty(),
            "mode=0755",
        )?;
        UNCHANGED
    } else {
        CHANGES
    };
    let (changed, work) = (format!("{changes}/{CHANGED}"), format!("{changes}/work"));
    overlay_at(LOWER, &changed, &work, ROOT)
}

/// As the root, for a volume.
fn layer(lower: &str, written: &str, at: &str) -> Result<(), String> {
    let (changed, work) = (format!("{written}/changed"), format!("{written}/work"));
    overlay_at(lower, &changed, &work, at)
}

fn overlay_at(lower: &str, changed: &str, work: &str, at: &str) -> Result<(), String> {
    for folder in [changed, work] {
        make_folder(folder)?;
    }
    // It is what is below, owner and mode of its top included.
    copy_attributes(Path::new(lower), Path::new(changed))?;
    // Each change is kept as itself, whatever the kernel would do by itself: a layer can be made of what is kept, and nothing refers to
    // what is below, which another start may have anew.
    let options = format!(
        "lowerdir={lower},upperdir={changed},workdir={work},redirect_dir=off,metacopy=off,index=off,xino=off"
    );
    attach("root", at, "overlay", MountFlags::empty(), &options)
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
fn in_root(root: &str, shm_bytes: Option<u64>) -> Result<(), String> {
    if !root.is_empty() {
        for place in ["/dev", "/proc", "/sys"] {
            let target = format!("{root}{place}");
            make_folder(&target)?;
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
    let shm = shm_bytes.map_or_else(String::new, |bytes| format!(",size={bytes}"));
    let shm = format!("mode=1777{shm}");
    attach("shm", &at("/dev/shm"), "tmpfs", NO_PROGRAMS, &shm)?;
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

/// Makes every file system safe to be left: written out, and not written any more. `hidden`: those that no path leads to.
pub(crate) fn leave(hidden: &Hidden) {
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
    for folder in hidden.volumes.iter().chain(&hidden.changes) {
        // Nothing is begun that had to be finished by the next start.
        let _ = rustix::mount::mount_remount(path_of(folder), MountFlags::RDONLY, "");
    }
    rustix::fs::sync();
}
