//! What the program does with snapshots without a machine.

use std::path::Path;
use std::process::ExitCode;

use alveole_machine::{Flatten, Snapshot, Verified};

use crate::exit::{self, Failure};
use crate::print;

/// Prints the version of the form that the snapshot at `path` is written in.
pub(crate) fn describe(path: &Path) -> ExitCode {
    match Snapshot::describe(path) {
        Ok(described) => print(&format!("{described}\n")),
        Err(e) => exit::failed(&Failure::Config(e.to_string())),
    }
}

/// Prints what the snapshot is, and says what is wrong with it.
pub(crate) fn verify(state: &Path, memory: Option<&Path>) -> ExitCode {
    let Verified { found, wrong } = alveole_machine::verify(state, memory);
    let text: String = found.iter().map(|line| format!("{line}\n")).collect();
    if wrong.is_empty() {
        return print(&format!("{text}whole\n"));
    }
    let _ = print(&text);
    exit::failed(&Failure::Config(wrong.join("; ")))
}

/// Makes one snapshot of a chain, and prints how much memory it has, and its id.
pub(crate) fn flatten(flatten: &Flatten) -> ExitCode {
    match alveole_machine::flatten(flatten) {
        Ok(flat) => print(&format!(
            "{} KiB of memory\nid {}\n",
            flat.memory_bytes >> 10,
            flat.memory_id
        )),
        Err(why) => exit::failed(&Failure::Config(format!(
            "cannot flatten snapshot {:?}: {why}",
            flatten.state
        ))),
    }
}
