//! Another boot id: the kernel makes one with its first use and keeps it, and those who tell boots apart by it would take a copy of
//! this guest for this guest. So a file lies over it, as in containers that have one of their own.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

/// random(4).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// A new one for each read.
const UUID: &str = "/proc/sys/kernel/random/uuid";
/// Where a memory file system lies for a moment: a folder that every kernel has, and in which nobody looks for anything.
const MOMENTARY: &str = "/proc/fs";

/// Gives the guest another boot id. Processes in mount namespaces of their own, with a `/proc` of their own, have the kernel's.
pub(crate) fn renew() -> Result<(), String> {
    lay_over().map_err(|e| format!("the boot id is the one of before: {e}"))
}

fn lay_over() -> io::Result<()> {
    let id = fs::read(UUID)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", MOMENTARY, "tmpfs", flags, c"mode=0755,size=4k")?;
    // That of an earlier copy; there is none in a guest that has booted.
    let _ = unmount(BOOT_ID, UnmountFlags::DETACH);
    let file = Path::new(MOMENTARY).join("boot_id");
    let laid = fs::write(&file, id)
        .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o444)))
        .and_then(|()| Ok(mount_bind(&file, BOOT_ID)?));
    // The file stays, as it lies somewhere.
    let gone = unmount(MOMENTARY, UnmountFlags::DETACH);
    laid.and(Ok(gone?))
}
