//! Checks of this machine: what is there, what that means for guests, what to do about it.
//!
//! Each check gathers what the machine says and leaves the judgement to a pure function, so that other
//! machines can be judged in tests. Nothing is changed by a check, and nothing is left behind.

mod calls;
mod disks;
mod isolation;
mod kernel;
mod kvm;
mod lab;
mod network;
mod resources;

use std::fmt;
use std::fs;
use std::path::Path;

use rustix::fs::Access;
use serde::Serialize;

pub use kvm::{Probed, probe_kvm};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// There, with a limit worth knowing.
    Warn,
    /// Not there, or not usable.
    Missing,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Missing => "missing",
        })
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name for programs.
    pub key: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// How it ended.
    pub status: Status,
    /// Whether no guest runs here without it.
    pub required: bool,
    /// What was found. One line.
    pub finding: String,
    /// What to do about it, if anything can be done.
    pub cure: Option<String>,
}

impl Check {
    fn new(key: &'static str, title: &'static str, (status, finding, cure): Finding) -> Self {
        Self {
            key,
            title,
            status,
            required: false,
            finding,
            cure,
        }
    }

    fn required(self) -> Self {
        Self {
            required: true,
            ..self
        }
    }
}

/// Status, finding and cure of one check, before it has a name.
type Finding = (Status, String, Option<String>);

fn ok(finding: impl Into<String>) -> Finding {
    (Status::Ok, finding.into(), None)
}

fn warn(finding: impl Into<String>, cure: impl Into<String>) -> Finding {
    (Status::Warn, finding.into(), Some(cure.into()))
}

fn missing(finding: impl Into<String>, cure: impl Into<String>) -> Finding {
    (Status::Missing, finding.into(), Some(cure.into()))
}

/// Runs every check, in an order that reads well. Takes a few milliseconds, half a second at most.
#[must_use]
pub fn run_checks() -> Vec<Check> {
    let mut checks = vec![
        Check::new("kernel", "kernel", kernel::version()),
        Check::new("processors", "processors", resources::processors()),
        Check::new("memory", "memory", resources::memory()),
    ];
    checks.extend(kvm::checks());
    checks.extend([
        Check::new("seccomp", "seccomp", isolation::seccomp()).required(),
        Check::new("landlock", "Landlock", isolation::landlock()),
        Check::new("cgroup", "cgroup v2", isolation::cgroup()),
        Check::new("io_uring", "io_uring", disks::io_uring()),
        Check::new("direct_io", "direct I/O", disks::direct_io()),
        Check::new("userfaultfd", "userfaultfd", kernel::userfaultfd()),
        Check::new("tun", "tun/tap", network::tun()),
        Check::new("vhost_net", "vhost-net", network::vhost_net()),
        Check::new("vhost_vsock", "vhost-vsock", network::vhost_vsock()),
        Check::new(
            "thp",
            "transparent huge pages",
            resources::transparent_huge_pages(),
        ),
        Check::new(
            "hugetlb",
            "reserved huge pages",
            resources::reserved_huge_pages(),
        ),
        Check::new("nofile", "open files", resources::open_files()),
        Check::new("memlock", "locked memory", resources::locked_memory()),
        Check::new("lab", "lab", lab::lab()),
    ]);
    checks
}

/// Where guests can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Guests {
    /// On this machine itself.
    Here,
    /// In the lab.
    Lab,
    /// Not at all, as things are.
    Nowhere,
}

impl Guests {
    /// What the checks add up to.
    #[must_use]
    pub fn by(checks: &[Check]) -> Self {
        let stopped = |check: &Check| check.required && check.status == Status::Missing;
        let lab = |check: &Check| check.key == "lab" && check.status != Status::Missing;
        if !checks.iter().any(stopped) {
            Self::Here
        } else if !crate::in_lab() && checks.iter().any(lab) {
            Self::Lab
        } else {
            Self::Nowhere
        }
    }
}

// What checks share ----------------------------------------------------------------------------

/// A small file of procfs or sysfs, without the line's end; none if it cannot be read.
fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim_end().to_owned())
}

fn can_write(path: impl AsRef<Path>) -> bool {
    rustix::fs::access(path.as_ref(), Access::READ_OK | Access::WRITE_OK).is_ok()
}

/// The words after `name:` in a file such as `/proc/meminfo` or `/proc/self/status`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// Whether this process may do what `capability` (its number in capabilities(7)) allows.
fn capable(status: &str, capability: u32) -> bool {
    field(status, "CapEff")
        .and_then(|bits| u64::from_str_radix(bits, 16).ok())
        .is_some_and(|bits| bits >> capability & 1 == 1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::os::unix::fs::FileTypeExt;

    use super::*;

    #[test]
    fn every_check_has_a_key_of_its_own_and_says_something() {
        let checks = run_checks();
        let keys: HashSet<_> = checks.iter().map(|check| check.key).collect();
        assert_eq!(keys.len(), checks.len());
        for check in &checks {
            assert!(
                !check.finding.is_empty() && !check.finding.contains('\n'),
                "{check:?}"
            );
            if let Some(cure) = &check.cure {
                assert!(!cure.is_empty() && !cure.contains('\n'), "{check:?}");
            }
            if check.required {
                assert_ne!(
                    check.status,
                    Status::Warn,
                    "required is there or not: {check:?}"
                );
            }
        }
    }

    #[test]
    fn the_checks_agree_with_the_machine() {
        let checks = run_checks();
        let status = |key: &str| checks.iter().find(|check| check.key == key).unwrap().status;
        let device =
            |path: &str| fs::metadata(path).is_ok_and(|kind| kind.file_type().is_char_device());
        assert_eq!(status("kvm_device") == Status::Ok, device("/dev/kvm"));
        for (key, path) in [
            ("kvm_access", "/dev/kvm"),
            ("tun", "/dev/net/tun"),
            ("vhost_net", "/dev/vhost-net"),
            ("vhost_vsock", "/dev/vhost-vsock"),
        ] {
            if !device(path) {
                assert_eq!(status(key), Status::Missing, "{key}");
            }
        }
        if status("kvm_guest") == Status::Ok {
            assert_eq!(status("kvm_access"), Status::Ok);
        }
        assert_eq!(
            Guests::by(&checks) == Guests::Here,
            ["kvm_device", "kvm_access", "kvm_guest", "seccomp"]
                .iter()
                .all(|key| status(key) == Status::Ok)
        );
        // A second look sees the same, but for what depends on how busy the machine is.
        let steady = |check: &&Check| !matches!(check.key, "kvm_guest" | "memory");
        let again: Vec<_> = run_checks()
            .iter()
            .filter(steady)
            .map(|check| (check.key, check.status))
            .collect();
        let first: Vec<_> = checks
            .iter()
            .filter(steady)
            .map(|check| (check.key, check.status))
            .collect();
        assert_eq!(first, again);
    }

    #[test]
    fn only_what_is_required_keeps_guests_away() {
        let check = |key, finding| Check::new(key, key, finding);
        let fine = check("kvm_guest", ok("yes")).required();
        let broken = check("kvm_guest", missing("no", "cure")).required();
        let lab = check("lab", warn("can be installed", "tools/lab prepare"));
        let no_lab = check("lab", missing("no", "cure"));
        let extra = check("tun", missing("no", "cure"));

        assert_eq!(
            Guests::by(&[fine.clone(), extra, no_lab.clone()]),
            Guests::Here
        );
        if !crate::in_lab() {
            assert_eq!(Guests::by(&[broken.clone(), lab]), Guests::Lab);
        }
        assert_eq!(Guests::by(&[broken, no_lab]), Guests::Nowhere);
    }

    #[test]
    fn fields_and_capabilities_are_found() {
        let status = "Name:\tx\nCapEffective:\t0\nCapEff:\t0000000000001000\n";
        assert_eq!(field(status, "CapEff"), Some("0000000000001000"));
        assert_eq!(field(status, "Cap"), None);
        assert!(capable(status, 12));
        assert!(!capable(status, 11));
        assert!(!capable("", 12));
    }
}
