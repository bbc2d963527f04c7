//! KVM: the node, the right to open it, and whether guests really run.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use alveole_hypervisor::{Partition, PartitionError};
use alveole_hypervisor_kvm::{KVM_PATH, KvmPartition, ProbeVerdict, probe};

use super::{Check, Finding, missing, ok, read, warn};

/// What the probe guest means for a caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// Whether unmodified kernels run.
    pub capable: bool,
    /// Why, in one line.
    pub text: String,
}

/// Can the KVM of this machine run an unmodified 64-bit kernel? Asks a tiny guest.
#[must_use]
pub fn probe_kvm() -> Probed {
    judge_probe(&probe())
}

fn judge_probe(asked: &Result<ProbeVerdict, PartitionError>) -> Probed {
    match asked {
        Ok(verdict) => Probed {
            capable: *verdict == ProbeVerdict::Capable,
            text: verdict.to_string(),
        },
        Err(e) => Probed {
            capable: false,
            text: e.to_string(),
        },
    }
}

pub(super) fn checks() -> Vec<Check> {
    let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
    let node = fs::metadata(KVM_PATH);
    let open = File::options()
        .read(true)
        .write(true)
        .open(KVM_PATH)
        .map(drop);
    let offered = read("/proc/misc").is_some_and(|misc| offers_kvm(&misc));
    let (guest, capabilities) = if open.is_ok() {
        (judge_guest(probe_kvm()), judge_capabilities(limits()))
    } else {
        let unknown = || {
            missing(
                format!("not known without {KVM_PATH}"),
                "see the lines above",
            )
        };
        (unknown(), unknown())
    };
    let nested = ["kvm_intel", "kvm_amd"]
        .iter()
        .find_map(|module| read(format!("/sys/module/{module}/parameters/nested")));
    vec![
        Check::new(
            "cpu_virtualisation",
            "CPU virtualisation",
            judge_processor(&cpuinfo, nested.as_deref()),
        ),
        Check::new(
            "kvm_device",
            "KVM device",
            judge_node(node.as_ref(), offered, &cpuinfo),
        )
        .required(),
        Check::new(
            "kvm_access",
            "KVM access",
            judge_access(open, node.as_ref().ok()),
        )
        .required(),
        Check::new("kvm_guest", "KVM runs guests", guest).required(),
        Check::new("kvm_capabilities", "KVM capabilities", capabilities),
    ]
}

// The processor --------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Intel,
    Amd,
}

fn extension(cpuinfo: &str) -> Option<Extension> {
    let mut flags = flags(cpuinfo);
    flags.find_map(|flag| match flag {
        "vmx" => Some(Extension::Intel),
        "svm" => Some(Extension::Amd),
        _ => None,
    })
}

fn flags(cpuinfo: &str) -> impl Iterator<Item = &str> {
    cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .and_then(|line| line.split_once(':'))
        .map_or("", |(_, flags)| flags)
        .split_whitespace()
}

fn virtual_machine(cpuinfo: &str) -> bool {
    flags(cpuinfo).any(|flag| flag == "hypervisor")
}

fn judge_processor(cpuinfo: &str, nested: Option<&str>) -> Finding {
    let place = if virtual_machine(cpuinfo) {
        "a virtual machine"
    } else {
        "a physical machine"
    };
    let name = match extension(cpuinfo) {
        Some(Extension::Intel) => "VT-x (vmx)",
        Some(Extension::Amd) => "AMD-V (svm)",
        None => {
            return missing(
                format!("no vmx or svm flag in /proc/cpuinfo, on {place}"),
                if virtual_machine(cpuinfo) {
                    "switch on nested virtualisation for this VM (its kind of cloud instance may lack it)"
                } else {
                    "switch on virtualisation (VT-x, AMD-V, SVM) in the firmware"
                },
            );
        }
    };
    let nested = match nested {
        Some("Y" | "1") => "guests can have guests",
        Some(_) => "guests cannot have guests",
        None => "no KVM module for it",
    };
    ok(format!("{name}, on {place}; {nested}"))
}

// The device -----------------------------------------------------------------------------------

/// Whether the kernel has a KVM device, whatever is in `/dev`.
fn offers_kvm(misc: &str) -> bool {
    misc.lines()
        .any(|line| line.split_whitespace().nth(1) == Some("kvm"))
}

fn judge_node(node: Result<&Metadata, &io::Error>, offered: bool, cpuinfo: &str) -> Finding {
    match node {
        Ok(node) if node.file_type().is_char_device() => ok(format!("{KVM_PATH} is there")),
        Ok(_) => missing(
            format!("{KVM_PATH} is no character device"),
            format!("sudo rm {KVM_PATH} && sudo mknod {KVM_PATH} c 10 232"),
        ),
        Err(_) => missing(
            format!("there is no {KVM_PATH}"),
            node_cure(offered, cpuinfo),
        ),
    }
}

fn node_cure(offered: bool, cpuinfo: &str) -> &'static str {
    match (offered, extension(cpuinfo)) {
        (true, _) => {
            "give it to this container (docker run --device /dev/kvm), or sudo mknod /dev/kvm c 10 232"
        }
        (false, Some(Extension::Intel)) => "sudo modprobe kvm_intel",
        (false, Some(Extension::Amd)) => "sudo modprobe kvm_amd",
        (false, None) => "the processor has no virtualisation to offer: see CPU virtualisation",
    }
}

fn judge_access(open: io::Result<()>, node: Option<&Metadata>) -> Finding {
    match (open, node) {
        (Ok(()), _) => ok(format!("{KVM_PATH} opens")),
        (Err(e), Some(node)) if e.kind() == io::ErrorKind::PermissionDenied => {
            let group = read("/etc/group").and_then(|groups| group_name(&groups, node.gid()));
            missing(
                format!("no permission to open {KVM_PATH}"),
                access_cure(node.mode(), group.as_deref()),
            )
        }
        (Err(e), Some(_)) => missing(
            format!("cannot open {KVM_PATH}: {e}"),
            "sudo modprobe kvm_intel or kvm_amd; dmesg says why KVM does not start",
        ),
        (Err(_), None) => missing(format!("there is no {KVM_PATH} to open"), "see KVM device"),
    }
}

fn access_cure(mode: u32, group: Option<&str>) -> String {
    const GROUP_MAY: u32 = 0o060;
    match group {
        Some(group) if mode & GROUP_MAY == GROUP_MAY && group != "root" => {
            format!("sudo usermod -aG {group} $USER, then log in again")
        }
        _ => format!("sudo setfacl -m u:$USER:rw {KVM_PATH}"),
    }
}

fn group_name(groups: &str, gid: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut words = line.split(':');
        let (name, id) = (words.next()?, words.nth(1)?);
        (id.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

// Guests ---------------------------------------------------------------------------------------

fn judge_guest(probed: Probed) -> Finding {
    if probed.capable {
        return ok(probed.text);
    }
    missing(
        probed.text,
        "use the lab (alveole run --lab), or a machine with hardware virtualisation",
    )
}

/// Most vCPUs, and whether guests have the timer that costs them least.
fn limits() -> Result<(u32, bool), PartitionError> {
    let partition = KvmPartition::new()?;
    Ok((partition.max_cpus(), partition.has_tsc_deadline_timer()))
}

fn judge_capabilities(limits: Result<(u32, bool), PartitionError>) -> Finding {
    match limits {
        Ok((cpus, true)) => ok(format!(
            "all that are needed, {cpus} vCPUs at most, TSC deadline timer"
        )),
        Ok((cpus, false)) => warn(
            format!("all that are needed, {cpus} vCPUs at most, no TSC deadline timer"),
            "nothing: guests take a slower timer",
        ),
        Err(e) => missing(e.to_string(), "run a newer kernel"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    const METAL: &str = "processor\t: 0\nflags\t\t: fpu vmx sse2\nvmx flags\t: vnmi\n";
    const CLOUD: &str = "processor\t: 0\nflags\t\t: fpu sse2 hypervisor\n";
    const LAB: &str = "processor\t: 0\nflags\t\t: fpu svm hypervisor npt\n";

    #[test]
    fn flags_are_whole_words() {
        assert_eq!(extension(METAL), Some(Extension::Intel));
        assert_eq!(extension(LAB), Some(Extension::Amd));
        assert_eq!(extension(CLOUD), None);
        assert_eq!(extension("flags\t: svm_lock novmx\n"), None);
        assert_eq!(extension(""), None);
        assert!(virtual_machine(LAB) && !virtual_machine(METAL));
    }

    #[test]
    fn the_processor_line_names_the_right_switch() {
        assert!(judge_processor(CLOUD, None).2.unwrap().contains("nested"));
        assert!(
            judge_processor("flags : fpu\n", None)
                .2
                .unwrap()
                .contains("firmware")
        );
        let text = judge_processor(METAL, Some("Y")).1;
        assert_eq!(
            text,
            "VT-x (vmx), on a physical machine; guests can have guests"
        );
        assert!(
            judge_processor(LAB, Some("0"))
                .1
                .contains("cannot have guests")
        );
    }

    #[test]
    fn a_missing_node_is_cured_by_its_cause() {
        assert!(offers_kvm("232 kvm\n200 tun\n"));
        assert!(!offers_kvm("200 tun\n235 kvm-x\n"));
        assert!(node_cure(true, METAL).contains("--device"));
        assert!(node_cure(false, METAL).contains("kvm_intel"));
        assert!(node_cure(false, LAB).contains("kvm_amd"));
        assert!(!node_cure(false, CLOUD).contains("modprobe"));
        let gone = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(judge_node(Err(&gone), false, METAL).0, Status::Missing);
        assert_eq!(
            judge_node(Ok(&fs::metadata("/").unwrap()), false, METAL).0,
            Status::Missing
        );
        assert_eq!(
            judge_node(Ok(&fs::metadata("/dev/null").unwrap()), false, METAL).0,
            Status::Ok
        );
    }

    #[test]
    fn no_permission_is_cured_by_the_group_only_if_that_helps() {
        assert_eq!(
            access_cure(0o20660, Some("kvm")),
            "sudo usermod -aG kvm $USER, then log in again"
        );
        assert!(access_cure(0o20600, Some("kvm")).contains("setfacl"));
        assert!(access_cure(0o20660, Some("root")).contains("setfacl"));
        assert!(access_cure(0o20660, None).contains("setfacl"));
        assert_eq!(
            group_name("root:x:0:\nkvm:x:104:me\n", 104).as_deref(),
            Some("kvm")
        );
        assert_eq!(group_name("root:x:0:\nkvm:x:104:me\n", 10), None);
    }

    #[test]
    fn only_a_capable_verdict_is_good() {
        let interpreted = Ok(ProbeVerdict::Interpreted("popcnt is unknown".into()));
        let refused = Err(PartitionError::Unavailable("too old".into()));
        for (asked, capable, status, word) in [
            (Ok(ProbeVerdict::Capable), true, Status::Ok, "runs here"),
            (interpreted, false, Status::Missing, "popcnt"),
            (refused, false, Status::Missing, "too old"),
        ] {
            let probed = judge_probe(&asked);
            assert_eq!(probed.capable, capable);
            let (got, finding, _) = judge_guest(probed);
            assert_eq!(got, status);
            assert!(finding.contains(word), "{finding}");
        }
        assert_eq!(judge_capabilities(Ok((64, true))).0, Status::Ok);
        assert_eq!(judge_capabilities(Ok((64, false))).0, Status::Warn);
    }
}
