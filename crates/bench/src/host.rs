//! Where the measuring was done: host kernel, processors, load, and which kernel the guests ran.
//!
//! Reads only; does not know what is measured.

use std::fs;
use std::path::Path;
use std::thread;

use serde_json::{Value, json};

/// The conditions of a measurement.
#[derive(Debug)]
pub(crate) struct Conditions {
    pub(crate) in_lab: bool,
    host_kernel: String,
    cpus: usize,
    cpu_model: String,
    load_before: String,
    guest_kernel: String,
    guest_kernel_bytes: usize,
}

impl Conditions {
    /// Looks at this machine and at the file of a guest kernel (whose text is `kernel`).
    pub(crate) fn now(kernel: &[u8]) -> Self {
        let name = rustix::system::uname();
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            in_lab: std::env::var_os("ALVEOLE_LAB").is_some_and(|value| value == "1"),
            host_kernel: name.release().to_string_lossy().into_owned(),
            cpus: thread::available_parallelism().map_or(0, Into::into),
            cpu_model: model
                .map_or("an unknown processor", |(_, model)| model)
                .to_owned(),
            load_before: load(),
            guest_kernel: linux_version(kernel).unwrap_or_else(|| "of unknown version".into()),
            guest_kernel_bytes: kernel.len(),
        }
    }

    /// In one line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let place = if self.in_lab {
            "in the lab (software emulation: only ratios of like kinds mean anything)"
        } else {
            "natively on this machine's KVM"
        };
        vec![
            format!(
                "Where: {place}; host Linux {}, {} CPUs ({})",
                self.host_kernel, self.cpus, self.cpu_model
            ),
            format!(
                "Load averages: {} before, {} after",
                self.load_before,
                load()
            ),
            format!(
                "Guest kernel: Linux {}, a file of {:.1} MiB",
                self.guest_kernel,
                self.guest_kernel_bytes as f64 / f64::from(1 << 20)
            ),
        ]
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "in_lab": self.in_lab, "host_kernel": self.host_kernel, "cpus": self.cpus,
            "cpu_model": self.cpu_model, "load_before": self.load_before, "load_after": load(),
            "guest_kernel": self.guest_kernel, "guest_kernel_bytes": self.guest_kernel_bytes,
        })
    }
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .take(3)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Reads a whole file, so that it is in the page cache, too.
///
/// # Errors
/// It cannot be read.
pub(crate) fn warm(file: &Path) -> anyhow::Result<Vec<u8>> {
    use anyhow::Context;
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// A process that runs this program, if there is any.
pub(crate) fn running(program: &Path) -> Option<u32> {
    let program = fs::canonicalize(program).ok()?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.find(|id| fs::read_link(format!("/proc/{id}/exe")).is_ok_and(|exe| exe == program))
}

/// The release in the banner that every uncompressed kernel holds.
fn linux_version(kernel: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = kernel;
    loop {
        let at = rest
            .windows(BANNER.len())
            .position(|window| window == BANNER)?;
        rest = &rest[at + BANNER.len()..];
        // Not a format of the same words.
        if rest.first().is_some_and(u8::is_ascii_digit) {
            let end = rest
                .iter()
                .position(|byte| !byte.is_ascii_graphic())
                .unwrap_or(rest.len());
            return Some(String::from_utf8_lossy(&rest[..end]).into_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let kernel = b"\x7fELF..Linux version %s (%s)\0..Linux version 6.12.1-cloud (x@y)\0";
        assert_eq!(linux_version(kernel).as_deref(), Some("6.12.1-cloud"));
        assert_eq!(linux_version(b"bzImage"), None);
    }

    #[test]
    fn running_programs_are_found() {
        let mine = std::env::current_exe().unwrap();
        assert!(running(&mine).is_some());
        assert_eq!(running(Path::new("/proc/self/status")), None);
    }

    #[test]
    fn this_machine_has_conditions() {
        let conditions = Conditions::now(b"");
        assert!(conditions.cpus > 0 && !conditions.host_kernel.is_empty());
        assert_eq!(conditions.lines().len(), 3);
    }
}
