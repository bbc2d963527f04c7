//! System calls that neither std nor rustix offers without `unsafe`: each only asks.

#![expect(unsafe_code, reason = "raw system calls; see each")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct io_uring_params` of io_uring.h: 10 words, then two descriptions of ring offsets.
const IO_URING_PARAMS_BYTES: usize = 120;
/// Given to landlock_create_ruleset to ask for the version instead (landlock.h).
const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
/// `_IOR('T', 207, unsigned int)` of if_tun.h.
const TUNGETFEATURES: u32 = 0x8004_54cf;

/// Makes a ring with one entry and drops it.
pub(super) fn try_io_uring() -> io::Result<()> {
    let mut params = [0u64; IO_URING_PARAMS_BYTES / 8];
    // SAFETY: the kernel writes one `io_uring_params`, for which there is room, and keeps no pointer.
    let got = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1u32, params.as_mut_ptr()) };
    drop(fd(got)?);
    Ok(())
}

/// Makes a userfaultfd that also sees the kernel's own accesses, and drops it.
pub(super) fn try_userfaultfd() -> io::Result<()> {
    // SAFETY: takes flags, returns a descriptor.
    let got = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    drop(fd(got)?);
    Ok(())
}

/// Version of the Landlock interface.
pub(super) fn landlock_version() -> io::Result<i64> {
    // SAFETY: with this flag no pointer is read, and the result is a number and no descriptor.
    let got = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(got)
}

/// The `IFF_*` flags that this kernel's tun driver knows.
pub(super) fn tun_features(tun: &File) -> io::Result<u32> {
    let mut features = 0u32;
    // SAFETY: the descriptor is open, and the kernel writes one u32 for which there is room.
    let got = unsafe {
        libc::ioctl(
            tun.as_raw_fd(),
            TUNGETFEATURES.into(),
            std::ptr::from_mut(&mut features),
        )
    };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(features)
}

fn fd(got: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(got) {
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
