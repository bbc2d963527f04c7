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
