//! What fences a VMM in: seccomp, Landlock, cgroups.

use std::io;
use std::path::{Path, PathBuf};

use super::{Finding, calls, can_write, missing, ok, read, warn};

/// What our filters answer with.
const NEEDED_ACTIONS: [&str; 3] = ["kill_process", "trap", "allow"];

pub(super) fn seccomp() -> Finding {
    judge_seccomp(
        read("/proc/sys/kernel/seccomp/actions_avail").as_deref(),
        &read("/proc/self/status").unwrap_or_default(),
    )
}

fn judge_seccomp(actions: Option<&str>, status: &str) -> Finding {
    const CURE: &str = "run a kernel with CONFIG_SECCOMP_FILTER, 4.14 or later";
    let Some(mode) = super::field(status, "Seccomp") else {
        return missing("this kernel has none", CURE);
    };
    // Hidden from a container's view of /proc/sys, perhaps; then the mode must do.
    if let Some(actions) = actions {
        let lacking: Vec<_> = NEEDED_ACTIONS
            .into_iter()
            .filter(|action| !actions.split_whitespace().any(|known| known == *action))
            .collect();
        if !lacking.is_empty() {
            return missing(
                format!("this kernel's filters cannot {}", lacking.join(", ")),
                CURE,
            );
        }
    }
    ok(if mode == "2" {
        "filters can be entered; this process is in one already"
    } else {
        "filters can be entered"
    })
}

pub(super) fn landlock() -> Finding {
    judge_landlock(calls::landlock_version())
}

fn judge_landlock(version: io::Result<i64>) -> Finding {
    match version {
        Ok(version) => ok(format!("ABI {version}")),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => missing(
            "built into this kernel, but not switched on",
            "boot it with lsm=landlock,… (the list in /sys/kernel/security/lsm, landlock first)",
        ),
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => missing(
            "this kernel has none",
            "run a kernel with CONFIG_SECURITY_LANDLOCK, 5.13 or later",
        ),
        Err(e) => missing(
            format!("refused: {e}"),
            "let landlock_create_ruleset through the sandbox around this process",
        ),
    }
}

/// What limits a guest.
const CONTROLLERS: [&str; 4] = ["cpu", "io", "memory", "pids"];

pub(super) fn cgroup() -> Finding {
    let Some(mount) = read("/proc/self/mounts").and_then(|mounts| cgroup2_mount(&mounts)) else {
        return missing(
            "not mounted",
            "sudo mount -t cgroup2 cgroup2 /sys/fs/cgroup (systemd does it at boot)",
        );
    };
    let own = read("/proc/self/cgroup")
        .and_then(|text| own_cgroup(&text))
        .unwrap_or_default();
    let directory = match own.trim_start_matches('/') {
        "" => mount.clone(),
        path => mount.join(path),
    };
    // In a namespace whose root is not what is mounted, the own path does not exist.
    let directory = if directory.is_dir() { directory } else { mount };
    judge_cgroup(
        &directory,
        &read(directory.join("cgroup.controllers")).unwrap_or_default(),
        can_write(&directory) && can_write(directory.join("cgroup.procs")),
    )
}

/// Where cgroup v2 is mounted. A space in a path is `\040` there, which none is expected to have.
fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (path, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// The path of this process in cgroup v2, which has number 0 and no controllers in this list.
fn own_cgroup(text: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(str::to_owned)
}

fn judge_cgroup(directory: &Path, controllers: &str, writable: bool) -> Finding {
    let here: Vec<_> = controllers.split_whitespace().collect();
    let lacking: Vec<_> = CONTROLLERS
        .into_iter()
        .filter(|name| !here.contains(name))
        .collect();
    let place = directory.display();
    if lacking.len() == CONTROLLERS.len() {
        return warn(
            format!("{place} has no controllers: guests cannot be limited"),
            "boot with systemd.unified_cgroup_hierarchy=1 (cgroup v1 holds them), or have them delegated",
        );
    }
    if !lacking.is_empty() {
        return warn(
            format!("{place} lacks {}", lacking.join(", ")),
            "have them delegated: systemd-run --user --scope -p Delegate=yes",
        );
    }
    if !writable {
        return warn(
            format!(
                "{place} has {}, but is not delegated to this user",
                CONTROLLERS.join(", ")
            ),
            "systemd-run --user --scope -p Delegate=yes alveole …, or run as root",
        );
    }
    ok(format!("{place}: {}, writable", CONTROLLERS.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn seccomp_needs_its_actions() {
        let all = "kill_process kill_thread trap errno user_notif trace log allow";
        assert_eq!(judge_seccomp(Some(all), "Seccomp:\t0").0, Status::Ok);
        assert!(
            judge_seccomp(Some(all), "Seccomp:\t2")
                .1
                .contains("already")
        );
        assert_eq!(judge_seccomp(None, "Seccomp:\t0").0, Status::Ok);
        assert_eq!(judge_seccomp(Some(all), "Name:\tx").0, Status::Missing);
        let (status, finding, _) = judge_seccomp(Some("kill trap allow"), "Seccomp:\t0");
        assert_eq!(status, Status::Missing);
        assert!(finding.ends_with("cannot kill_process"), "{finding}");
    }

    #[test]
    fn landlock_tells_off_from_absent() {
        assert_eq!(judge_landlock(Ok(6)).1, "ABI 6");
        let cure = |errno| {
            judge_landlock(Err(io::Error::from_raw_os_error(errno)))
                .2
                .unwrap()
        };
        assert!(cure(libc::EOPNOTSUPP).contains("lsm="));
        assert!(cure(libc::ENOSYS).contains("CONFIG_SECURITY_LANDLOCK"));
        assert!(cure(libc::EPERM).contains("sandbox"));
    }

    #[test]
    fn the_second_hierarchy_is_found_among_the_first() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\nodd\n"), None);
        let own = "4:memory:/a\n0::/user.slice/session-1.scope\n";
        assert_eq!(
            own_cgroup(own).as_deref(),
            Some("/user.slice/session-1.scope")
        );
        assert_eq!(own_cgroup("4:memory:/a\n"), None);
    }

    #[test]
    fn cgroups_need_controllers_and_the_right_to_use_them() {
        let judge = |controllers, writable| judge_cgroup(Path::new("/c"), controllers, writable);
        let all = "cpuset cpu io memory hugetlb pids";
        assert_eq!(judge(all, true).0, Status::Ok);
        assert!(judge(all, false).1.contains("not delegated"));
        assert!(judge("memory pids", true).1.ends_with("lacks cpu, io"));
        assert!(judge("", true).1.contains("no controllers"));
        assert_eq!(judge("", true).0, Status::Warn);
    }
}
