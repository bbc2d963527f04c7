//! The kernel and the interfaces it may or may not offer.

use std::io;
use std::path::Path;

use super::{Finding, calls, can_write, missing, ok, read, warn};

/// The oldest kernel that is still maintained by anybody; guests have not been tried on older ones.
const OLDEST: (u32, u32) = (5, 10);

pub(super) fn version() -> Finding {
    judge_version(
        &read("/proc/sys/kernel/osrelease").unwrap_or_default(),
        std::env::consts::ARCH,
    )
}

fn judge_version(release: &str, arch: &str) -> Finding {
    let Some(version) = parse_version(release) else {
        return warn(
            format!("{arch}, release {release:?} says no version"),
            "nothing, if guests run",
        );
    };
    let finding = format!("Linux {release}, {arch}");
    if version < OLDEST {
        return warn(
            format!("{finding}: older than any that was tried"),
            format!("run Linux {}.{} or later", OLDEST.0, OLDEST.1),
        );
    }
    ok(finding)
}

/// `6.1.0-18-amd64` is 6.1.
fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn io_uring() -> Finding {
    judge_io_uring(
        calls::try_io_uring(),
        read("/proc/sys/kernel/io_uring_disabled").as_deref(),
    )
}

fn judge_io_uring(tried: io::Result<()>, disabled: Option<&str>) -> Finding {
    let Err(e) = tried else {
        return ok("rings can be made");
    };
    match (e.raw_os_error(), disabled) {
        (Some(libc::ENOSYS), _) => missing(
            "this kernel has none",
            "run a kernel with CONFIG_IO_URING, or let it through the sandbox around this process",
        ),
        (Some(libc::EPERM), Some("2")) => missing(
            "switched off by sysctl kernel.io_uring_disabled=2",
            "sudo sysctl kernel.io_uring_disabled=0",
        ),
        (Some(libc::EPERM), Some("1")) => missing(
            "sysctl kernel.io_uring_disabled=1 keeps it for a group this user is not in",
            "join the group whose number is sysctl kernel.io_uring_group, or sudo sysctl \
             kernel.io_uring_disabled=0",
        ),
        (Some(libc::EPERM), _) => missing(
            "refused by a sandbox around this process (seccomp, as containers have it)",
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile",
        ),
        (Some(libc::ENOMEM), _) => missing(
            format!("no memory may be locked for a ring: {e}"),
            "raise the limit on locked memory (ulimit -l)",
        ),
        _ => missing(format!("a ring was refused: {e}"), "see io_uring_setup(2)"),
    }
}

const USERFAULTFD_PATH: &str = "/dev/userfaultfd";

pub(super) fn userfaultfd() -> Finding {
    judge_userfaultfd(
        calls::try_userfaultfd(),
        Path::new(USERFAULTFD_PATH).exists(),
        can_write(USERFAULTFD_PATH),
    )
}

fn judge_userfaultfd(tried: io::Result<()>, device: bool, writable: bool) -> Finding {
    let Err(e) = tried else {
        return ok("the system call works, for faults of the kernel too");
    };
    if writable {
        return ok(format!("through {USERFAULTFD_PATH}"));
    }
    match e.raw_os_error() {
        Some(libc::ENOSYS) => missing(
            "this kernel has none",
            "run a kernel with CONFIG_USERFAULTFD",
        ),
        Some(libc::EPERM) if device => missing(
            format!("neither the system call nor {USERFAULTFD_PATH} is allowed to this user"),
            format!("sudo setfacl -m u:$USER:rw {USERFAULTFD_PATH}"),
        ),
        Some(libc::EPERM) => missing(
            "the system call is not allowed to this user, or not by a sandbox around this process",
            "sudo sysctl vm.unprivileged_userfaultfd=1",
        ),
        _ => missing(format!("refused: {e}"), "see userfaultfd(2)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn refused(errno: i32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(parse_version("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse_version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(parse_version("5.9-rc1"), Some((5, 9)));
        assert_eq!(parse_version("next"), None);
        assert_eq!(parse_version("6"), None);
        assert_eq!(judge_version("5.9.16", "x86_64").0, Status::Warn);
        assert_eq!(judge_version("5.10.1", "x86_64").0, Status::Ok);
        assert_eq!(judge_version("", "x86_64").0, Status::Warn);
    }

    #[test]
    fn io_uring_tells_what_forbids_it() {
        assert_eq!(judge_io_uring(Ok(()), Some("1")).0, Status::Ok);
        for (errno, sysctl, word) in [
            (libc::ENOSYS, None, "kernel has none"),
            (libc::EPERM, Some("2"), "io_uring_disabled=2"),
            (libc::EPERM, Some("1"), "group"),
            (libc::EPERM, Some("0"), "seccomp"),
            (libc::EPERM, None, "seccomp"),
            (libc::ENOMEM, Some("0"), "locked"),
            (libc::EMFILE, Some("0"), "open files"),
        ] {
            let (status, finding, cure) = judge_io_uring(refused(errno), sysctl);
            assert_eq!(status, Status::Missing);
            assert!(finding.contains(word), "{finding}");
            assert!(cure.is_some());
        }
    }

    #[test]
    fn userfaultfd_is_there_by_either_way() {
        assert_eq!(judge_userfaultfd(Ok(()), false, false).0, Status::Ok);
        assert_eq!(
            judge_userfaultfd(refused(libc::EPERM), true, true).0,
            Status::Ok
        );
        let cure = |device| {
            judge_userfaultfd(refused(libc::EPERM), device, false)
                .2
                .unwrap()
        };
        assert!(cure(true).contains("setfacl"));
        assert!(cure(false).contains("unprivileged_userfaultfd"));
        assert_eq!(
            judge_userfaultfd(refused(libc::ENOSYS), false, false).0,
            Status::Missing
        );
    }
}
