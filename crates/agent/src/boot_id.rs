//! Another boot id: the kernel makes one with its first use and keeps it, and those who tell boots apart by it would take a copy of
//! this guest for this guest. So a file lies over it, as in containers that have one of their own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, move_mount, open_tree, unmount,
};

/// random(4).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// A new one for each read.
const UUID: &str = "/proc/sys/kernel/random/uuid";

/// Gives the guest another boot id. Processes in mount namespaces of their own, with a `/proc` of their own, have the kernel's.
pub(crate) fn renew() -> Result<(), String> {
    let act = |e: io::Error| format!("the boot id is the one of before: {e}");
    let id = fs::read(UUID).map_err(act)?;
    let file = file(&id).map_err(act)?;
    // That of an earlier copy; there is none in a guest that has booted.
    let _ = unmount(BOOT_ID, UnmountFlags::DETACH);
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&file, "", CWD, BOOT_ID, empty).map_err(|e| act(e.into()))
}

/// A file with this content, as a mount that is nowhere yet. It lies in a memory file system of its own, which nobody else sees.
fn file(content: &[u8]) -> io::Result<OwnedFd> {
    let memory = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&memory)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&memory, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let mut file = File::from(openat(&root, "boot_id", flags, Mode::RUSR)?);
    file.write_all(content)?;
    file.set_permissions(fs::Permissions::from_mode(0o444))?;
    drop(file);
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(&root, "boot_id", clone)?)
}
