//! Boots real guests with the built `alveole-vmm`, and watches them.
//!
//! A test reads aloud: `let mut vm = Vm::stock()?.memory_mib(128).boot(); vm.wait_for("ready");
//! assert_eq!(vm.wait().code, Some(0));`. Whatever happens takes a bounded time, and a guest ends with
//! the test that booted it. `tests/README.md` names the environment variables.
//!
//! Deliberately does not know: what any test is about, how the files it is given were made.

mod console;
pub(crate) mod images;
mod sources;
mod vm;

pub(crate) use console::Console;
pub(crate) use sources::skip;
pub(crate) use vm::{End, NOBODY, Running, Vm, is_root, kvm_is_open_to_all};

use std::time::Duration;

/// A time-out for something that takes a moment, on a machine as slow as this one may be.
///
/// `ALVEOLE_TEST_PATIENCE` multiplies it; the lab, where everything is done in software, has 4 when
/// nothing is said.
pub(crate) fn patience(seconds: u64) -> Duration {
    let said = std::env::var("ALVEOLE_TEST_PATIENCE").ok();
    let factor = said.and_then(|text| text.parse::<f64>().ok());
    let usual = if in_the_lab() { 4.0 } else { 1.0 };
    let factor = factor.filter(|f| f.is_finite() && *f > 0.0);
    Duration::from_secs(seconds).mul_f64(factor.unwrap_or(usual))
}

/// Whether this runs in `tools/lab`.
pub(crate) fn in_the_lab() -> bool {
    std::env::var_os("ALVEOLE_LAB").is_some_and(|v| v == "1")
}
