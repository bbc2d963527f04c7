//! What tests of networks share.

use std::fs::File;
use std::io::Write;
use std::process::Command;

/// Says loudly that a test cannot run here, and has it counted.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
    }
}

/// A command that runs what follows in namespaces of its own: network, mounts and processes, which end with it. None, and
/// said so, where that is not allowed.
pub(crate) fn in_namespaces(test: &str) -> Option<Command> {
    let separate = || {
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--pid", "--fork", "--kill-child"]);
        command.arg("--mount-proc");
        command
    };
    let works = separate().arg("true").output();
    if !works.is_ok_and(|o| o.status.success()) {
        skip(test, "only root can make network namespaces");
        return None;
    }
    Some(separate())
}
