//! The lab: a host in software that can run guests where this one cannot.

use std::path::{Path, PathBuf};

use super::{Finding, missing, ok, warn};
use crate::programs::{self, NotFound};

/// Where Debian has it, as a package of its own and formerly with QEMU.
const VIRTIOFSD_PATHS: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"];

pub(super) fn lab() -> Finding {
    if crate::in_lab() {
        return ok("this is the lab");
    }
    let mut lacking = Vec::new();
    if programs::in_path("qemu-system-x86_64").is_none() {
        lacking.push("qemu-system-x86_64");
    }
    if !VIRTIOFSD_PATHS.iter().any(|path| Path::new(path).exists()) {
        lacking.push("virtiofsd");
    }
    judge(
        programs::lab_tool(),
        &lacking,
        programs::in_path("apt-get").is_some(),
    )
}

fn judge(tool: Result<PathBuf, NotFound>, lacking: &[&str], installable: bool) -> Finding {
    let tool = match tool {
        Ok(tool) => tool,
        Err(e) => {
            let text = e.to_string();
            // The message names its own cure, after the last semicolon.
            let (finding, cure) = text.rsplit_once("; ").unwrap_or((&text, "see the README"));
            return missing(finding, cure);
        }
    };
    let tool = tool.display();
    if lacking.is_empty() {
        return ok(format!("{tool}, with qemu-system-x86_64 and virtiofsd"));
    }
    let finding = format!("{tool}, without {}", lacking.join(" and "));
    if installable {
        warn(
            finding,
            format!("{tool} prepare (installs what is missing)"),
        )
    } else {
        missing(finding, "install them: there is no apt-get here to do it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn the_lab_is_there_when_its_parts_are_or_can_be_had() {
        let tool = || Ok(PathBuf::from("/src/tools/lab"));
        assert_eq!(judge(tool(), &[], false).0, Status::Ok);
        let (status, finding, cure) = judge(tool(), &["virtiofsd"], true);
        assert_eq!(status, Status::Warn);
        assert_eq!(finding, "/src/tools/lab, without virtiofsd");
        assert!(cure.unwrap().starts_with("/src/tools/lab prepare"));
        assert_eq!(judge(tool(), &["virtiofsd"], false).0, Status::Missing);
    }

    #[test]
    fn no_lab_tool_says_where_it_was_looked_for() {
        let (status, finding, cure) = judge(
            Err(NotFound::Lab {
                exe: "/usr/bin".into(),
                cwd: "/home/me".into(),
            }),
            &[],
            true,
        );
        assert_eq!(status, Status::Missing);
        assert!(
            finding.contains("/usr/bin") && finding.contains("/home/me"),
            "{finding}"
        );
        assert!(cure.unwrap().contains("ALVEOLE_LAB_TOOL"));
    }
}
