//! The jail's folders and files, and going in.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, StatVfsMountFlags, Uid, chownat, fchmod, fchown,
    fstatvfs, makedev, mkdirat, mknodat, openat, statat,
};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount,
};
use rustix::process::{chdir, chroot, fchdir, pivot_root, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::cli::Args;
use crate::failure::{Failure, OrFail};
use crate::program::{PID_SUFFIX, Program};
use crate::undo::Undo;

/// Where the kernel lists devices with numbers of their own, userfaultfd among them.
const MISC: &str = "/proc/misc";
/// Rights of the jail's folders and devices; Firecracker's.
const FOLDER_MODE: Mode = Mode::RWXU;
const DEVICE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Rights of the folders that lead to the jail.
const WAY_MODE: Mode = Mode::from_raw_mode(0o755);
/// What is not given while the jail is made, whoever starts the jailer.
const UMASK: Mode = Mode::from_raw_mode(0o022);
/// The jail's folders: devices, and where the API socket is by default.
const FOLDERS: [&str; 3] = ["dev", "dev/net", "run"];

/// Major and minor number of a character device.
type Number = (u32, u32);

/// Devices in each jail (Linux Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, Number); 3] = [
    ("dev/kvm", (10, 232)),
    ("dev/net/tun", (10, 200)),
    ("dev/urandom", (1, 9)),
];
const USERFAULTFD: &str = "dev/userfaultfd";

/// What a jail is made of.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Exists, and is no link.
    base: PathBuf,
    /// Folders below it, the last one the jail's root.
    way: [String; 3],
    /// As `way` says them, for people.
    root: PathBuf,
    program: Program,
    owner: (Uid, Gid),
    devices: Vec<(&'static str, Number)>,
}

/// A jail that has been made.
#[derive(Debug)]
pub(crate) struct Jail {
    root: OwnedFd,
    path: PathBuf,
    /// Takes the number of the program's process.
    pub(crate) pid_file: File,
}

impl Plan {
    /// Finds out what is to be made.
    ///
    /// # Errors
    /// The folder for jails is missing or cannot hold one.
    pub(crate) fn new(args: &Args, program: Program) -> Result<Self, Failure> {
        let base = &args.chroot_base;
        let act = || format!("put jails into --chroot-base-dir {base:?}");
        let base = fs::canonicalize(base)
            .or_fail(act, &format!("make it: mkdir -p {}", base.display()))?;
        if !base.is_dir() {
            return Err(Failure::new(act(), "it is not a folder", "name a folder"));
        }
        let name = program.name.to_str().ok_or_else(|| {
            Failure::new(
                format!("call a jail by the program {:?}", program.path),
                "its name is not UTF-8",
                "rename it",
            )
        })?;
        let way = [name.to_owned(), args.id.clone(), "root".to_owned()];
        let root = way.iter().fold(base.clone(), |path, name| path.join(name));
        let misc = fs::read_to_string(MISC).unwrap_or_default();
        Ok(Self {
            base,
            way,
            root,
            program,
            owner: (Uid::from_raw(args.uid), Gid::from_raw(args.gid)),
            devices: devices(&misc),
        })
    }

    /// Where the program will be, as seen from within.
    pub(crate) fn program_inside(&self) -> PathBuf {
        Path::new("/").join(&self.program.name)
    }

    fn pid_name(&self) -> String {
        format!("{}{PID_SUFFIX}", self.way[0])
    }

    /// Makes everything. What somebody has put into the jail's root before stays there, but not what a jailer makes:
    /// an old jail is not used again.
    ///
    /// # Errors
    /// The jail has been used, or something cannot be made. What was made is in `undo`.
    pub(crate) fn make(&self, undo: &mut Undo) -> Result<Jail, Failure> {
        let before = umask(UMASK);
        let made = self.make_all(undo);
        umask(before);
        made
    }

    fn make_all(&self, undo: &mut Undo) -> Result<Jail, Failure> {
        let root = self.make_way(undo)?;
        self.check_mount(&root)?;
        self.check_unused(&root)?;
        self.check_interpreter()?;
        self.copy_program(&root, undo)?;
        let mut folders = Vec::new();
        for name in FOLDERS {
            folders.push((self.make_folder(&root, name, undo)?, self.root.join(name)));
        }
        for (name, number) in &self.devices {
            self.make_device(&root, name, *number, undo)?;
        }
        let pid_name = self.pid_name();
        let path = self.root.join(&pid_name);
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o644);
        let pid_file = openat(&root, pid_name.as_str(), flags, mode)
            .or_fail(|| format!("make {path:?}"), "is the disk full?")?;
        undo.file(&root, pid_name.as_ref(), &path)?;
        // Not before: whoever owns a folder can put something else where a device was.
        for (fd, path) in &folders {
            self.own(fd, path, FOLDER_MODE)?;
        }
        self.own(&root, &self.root, FOLDER_MODE)?;
        Ok(Jail {
            root,
            path: self.root.clone(),
            pid_file: pid_file.into(),
        })
    }

    /// The folders that lead to the jail's root, and that itself.
    fn make_way(&self, undo: &mut Undo) -> Result<OwnedFd, Failure> {
        let mut folder = rustix::fs::open(&self.base, FOLDER_FLAGS, Mode::empty())
            .or_fail(|| format!("open {:?}", self.base), "is the path right?")?;
        let mut path = self.base.clone();
        for name in &self.way {
            path.push(name);
            folder = make_folder_in(&folder, name, &path, undo)?;
        }
        Ok(folder)
    }

    fn make_folder(&self, root: &OwnedFd, name: &str, undo: &mut Undo) -> Result<OwnedFd, Failure> {
        let (folder, last) = self.parent(root, name)?;
        make_folder_in(&folder, last, &self.root.join(name), undo)
    }

    /// The folder that `name`, a path in the jail, is in, and its last part. No part of it may be a link: who has
    /// prepared the jail may be somebody else.
    fn parent<'a>(&self, root: &OwnedFd, name: &'a str) -> Result<(OwnedFd, &'a str), Failure> {
        let act = || format!("open {:?}", self.root.join(name));
        let mut folder = root
            .try_clone()
            .or_fail(act, "raise the limit of open files (ulimit -n)")?;
        let mut parts = name.split('/').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                return Ok((folder, part));
            }
            folder = openat(&folder, part, FOLDER_FLAGS, Mode::empty())
                .or_fail(act, "it must be no link: remove it")?;
        }
        Ok((folder, name))
    }

    fn check_mount(&self, root: &OwnedFd) -> Result<(), Failure> {
        let act = || format!("use {:?} as a jail", self.root);
        let flags = fstatvfs(root)
            .or_fail(act, "is the file system well?")?
            .f_flag;
        for (flag, word, what) in [
            (StatVfsMountFlags::NODEV, "nodev", "devices cannot be used"),
            (
                StatVfsMountFlags::NOEXEC,
                "noexec",
                "programs cannot be started",
            ),
        ] {
            if flags.contains(flag) {
                return Err(Failure::new(
                    act(),
                    format!("its file system is mounted {word}: {what} there"),
                    "mount it without, or give another --chroot-base-dir",
                ));
            }
        }
        Ok(())
    }

    /// That nothing is there which a jailer makes.
    fn check_unused(&self, root: &OwnedFd) -> Result<(), Failure> {
        let pid_name = self.pid_name();
        let names = [self.way[0].as_str(), pid_name.as_str()];
        let names = names
            .into_iter()
            .chain(self.devices.iter().map(|(name, _)| *name));
        let mut found = Vec::new();
        for name in names {
            match statat(root, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => found.push(name),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(e) => {
                    let path = self.root.join(name);
                    return Err(Failure::new(
                        format!("look for {path:?}"),
                        io::Error::from(e),
                        "is the disk well?",
                    ));
                }
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        Err(Failure::new(
            format!("use {:?} as a jail", self.root),
            format!(
                "it has been used before, or is in use: it has {}",
                found.join(", ")
            ),
            format!(
                "give another --id or, if nothing runs there any more, remove {:?}",
                self.root.parent().unwrap_or(&self.root)
            ),
        ))
    }

    /// A program that needs another one to be started needs it in the jail.
    fn check_interpreter(&self) -> Result<(), Failure> {
        let Some(interpreter) = &self.program.interpreter else {
            return Ok(());
        };
        let inside = self
            .root
            .join(interpreter.strip_prefix("/").unwrap_or(interpreter));
        if fs::symlink_metadata(&inside).is_ok() {
            return Ok(());
        }
        Err(Failure::new(
            format!("start {:?} in a jail", self.program.path),
            format!("it needs {interpreter:?}, which is not in the jail"),
            format!(
                "give a static program, or put {inside:?} there, and the libraries that it loads"
            ),
        ))
    }

    /// A copy, not a link: two jails share no memory, and what happens to one's program does not touch another's.
    fn copy_program(&self, root: &OwnedFd, undo: &mut Undo) -> Result<(), Failure> {
        let path = self.root.join(&self.program.name);
        let act = || format!("copy {:?} to {path:?}", self.program.path);
        let cure = "is the disk full?";
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let copy = openat(root, &*self.program.name, flags, Mode::empty()).or_fail(act, cure)?;
        undo.file(root, &self.program.name, &path)?;
        let mut copy = File::from(copy);
        io::copy(&mut &self.program.file, &mut copy).or_fail(act, cure)?;
        self.own(&copy, &path, Mode::from_raw_mode(self.program.mode))
    }

    fn make_device(
        &self,
        root: &OwnedFd,
        name: &str,
        number: Number,
        undo: &mut Undo,
    ) -> Result<(), Failure> {
        let path = self.root.join(name);
        let (folder, last) = self.parent(root, name)?;
        let device = makedev(number.0, number.1);
        mknodat(
            &folder,
            last,
            FileType::CharacterDevice,
            DEVICE_MODE,
            device,
        )
        .or_fail(
            || format!("make device {path:?}"),
            "run the jailer as root, outside of a user namespace",
        )?;
        undo.file(&folder, last.as_ref(), &path)?;
        let (user, group) = self.owner;
        chownat(
            &folder,
            last,
            Some(user),
            Some(group),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .or_fail(
            || format!("give {path:?} to user {}", user.as_raw()),
            OWN_CURE,
        )
    }

    fn own(&self, fd: impl AsFd, path: &Path, mode: Mode) -> Result<(), Failure> {
        let (user, group) = self.owner;
        fchown(&fd, Some(user), Some(group))
            .and_then(|()| fchmod(&fd, mode))
            .or_fail(
                || {
                    format!(
                        "give {path:?} to user {} and group {}",
                        user.as_raw(),
                        group.as_raw()
                    )
                },
                OWN_CURE,
            )
    }
}

const OWN_CURE: &str = "run the jailer as root; are user and group known in this user namespace?";
const FOLDER_FLAGS: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens the folder `name` in `folder`, or makes it.
fn make_folder_in(
    folder: &OwnedFd,
    name: &str,
    path: &Path,
    undo: &mut Undo,
) -> Result<OwnedFd, Failure> {
    let act = || format!("make folder {path:?}");
    match mkdirat(folder, name, WAY_MODE) {
        Ok(()) => undo.folder(folder, name.as_ref(), path)?,
        Err(Errno::EXIST) => {}
        Err(e) => {
            let cure = "run the jailer as root; is the file system full or mounted read-only?";
            return Err(Failure::new(act(), io::Error::from(e), cure));
        }
    }
    openat(folder, name, FOLDER_FLAGS, Mode::empty()).map_err(|e| match e {
        Errno::LOOP | Errno::NOTDIR => Failure::new(
            act(),
            "it exists, and is a link or a file",
            "remove it, or give another --id",
        ),
        e => Failure::new(act(), io::Error::from(e), "run the jailer as root"),
    })
}

/// The devices of a jail, by what the kernel lists: userfaultfd has a number of its own on each host, or none.
fn devices(misc: &str) -> Vec<(&'static str, Number)> {
    let userfaultfd = misc.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let minor = words.next()?.parse().ok()?;
        (words.next()? == "userfaultfd").then_some((USERFAULTFD, (10, minor)))
    });
    DEVICES.into_iter().chain(userfaultfd).collect()
}

impl Jail {
    /// Makes the jail's root the root of this process and of those that it makes, and takes everything else out of
    /// its sight. The jail's own mounts come along, and so does what the host mounts below it later.
    ///
    /// # Errors
    /// The kernel refuses a step; the process is then somewhere between.
    pub(crate) fn enter(&self) -> Result<(), Failure> {
        let act = |what: &str| format!("enter jail {:?}: {what}", self.path);
        let cure = "run the jailer as root; its own root must be a mount point (no initramfs, no bare chroot)";
        fchdir(&self.root).or_fail(|| act("change the folder"), cure)?;
        // SAFETY: there is one thread, and its descriptors stay shared with nobody.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.or_fail(|| act("unshare mounts"), cure)?;
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", flags).or_fail(|| act("keep mounts to itself"), cure)?;
        mount_bind_recursive(".", ".").or_fail(|| act("bind it to itself"), cure)?;
        // Once more by name: the present folder is still the one below the new mount.
        let name = self.path.file_name().unwrap_or(OsStr::new("."));
        chdir(Path::new("..").join(name)).or_fail(|| act("change the folder"), cure)?;
        // The old root lies over the new one then (pivot_root(2), "pivot_root(".", ".")"): no folder for it is needed.
        pivot_root(".", ".").or_fail(|| act("pivot_root"), cure)?;
        unmount(".", UnmountFlags::DETACH).or_fail(|| act("unmount the old root"), cure)?;
        chdir("/").or_fail(|| act("change the folder"), cure)?;
        chroot(".").or_fail(|| act("chroot"), cure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn userfaultfd_is_where_the_kernel_says() {
        let with = devices(" 59 userfaultfd\n232 kvm\n");
        assert_eq!(with.last(), Some(&("dev/userfaultfd", (10, 59))));
        assert_eq!(with.len(), 4);
        for misc in [
            "",
            "232 kvm",
            "userfaultfd",
            "x userfaultfd",
            "59 userfaultfd2",
            "\n\n",
        ] {
            assert_eq!(devices(misc), DEVICES, "{misc:?}");
        }
    }
}
