//! Programs of the distribution that this crate runs, and what they may do.

use std::fs;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set, set_no_new_privs};

/// What a server on a bridge needs: to become another user, to make raw packets and set up addresses in its
/// neighbour table (DHCP), to use ports below 1024.
pub(crate) const NETWORK_SERVICE: [CapabilitySet; 6] = [
    CapabilitySet::SETUID,
    CapabilitySet::SETGID,
    CapabilitySet::CHOWN,
    CapabilitySet::NET_ADMIN,
    CapabilitySet::NET_RAW,
    CapabilitySet::NET_BIND_SERVICE,
];

/// Finds a program in `PATH` and where administrators' programs are.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .chain(usual)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Who a helper becomes: `nobody`, but where there is nobody else (a user namespace of one user).
pub(crate) fn helper_user() -> &'static str {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let users: u64 = map
        .lines()
        .filter_map(|l| l.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum();
    if users > 1 { "nobody" } else { "root" }
}

/// Takes from a program all rights but these, for good, before it starts.
pub(crate) fn confine(command: &mut Command, keep: &'static [CapabilitySet]) {
    let keep = keep.iter().fold(CapabilitySet::empty(), |all, c| all | *c);
    let confine = move || {
        set_no_new_privs(true)?;
        for capability in CapabilitySet::all().iter() {
            if !keep.contains(capability) {
                // A kernel may not know the last ones; without the right to do this there is nothing to lose.
                let _ = remove_capability_from_bounding_set(capability);
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec, `confine` only makes system calls: it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(confine);
    }
}

/// Lets a program have this descriptor.
pub(crate) fn inherit(command: &mut Command, fd: RawFd) {
    let prepare = move || {
        // SAFETY: the caller holds the descriptor until the program is started.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl_setfd(fd, FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: between fork and exec, `prepare` only makes system calls: it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(prepare);
    }
}

/// Has the program killed when the thread that starts it ends, whatever it does then; not if it changes its user
/// (prctl(2), PR_SET_PDEATHSIG).
pub(crate) fn end_with_parent(command: &mut Command) {
    let prepare = || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec, `prepare` only makes a system call: it neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(prepare);
    }
}
