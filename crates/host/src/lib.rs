//! What this host can do, and where its programs are.
//!
//! Deliberately does not know: how findings are shown, how a machine is described or run.

pub mod doctor;
pub mod programs;

/// Whether this process runs inside the lab (`tools/lab` says so in the environment).
#[must_use]
pub fn in_lab() -> bool {
    std::env::var_os("ALVEOLE_LAB").is_some_and(|value| value == "1")
}
