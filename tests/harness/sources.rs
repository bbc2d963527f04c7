//! Which kernels there are to boot here, and whether they can run.

use std::fs::File;
use std::io::Write;
use std::panic::Location;
use std::path::PathBuf;
use std::sync::OnceLock;

use alveole_hypervisor_kvm::{KVM_PATH, ProbeVerdict, probe};

use super::in_the_lab;

/// A kernel and what goes with it.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// What this kernel wants on every command line.
    pub(crate) words: String,
    /// What its processors must say of themselves, and be saved with.
    pub(crate) cpu_config: Option<serde_json::Value>,
}

/// A file named by an environment variable.
fn named(variable: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os(variable).ok_or_else(|| format!("{variable} is not set"))?;
    let path = PathBuf::from(path);
    if path.is_file() {
        return Ok(path);
    }
    // Set, and wrong: a skip would hide it.
    panic!("{variable} names {}, which is no file", path.display());
}

/// Whether unmodified kernels run on the KVM here, or why not. Asked once: the answer takes a moment.
fn capable() -> Result<(), String> {
    static ANSWER: OnceLock<Result<(), String>> = OnceLock::new();
    let ask = || match probe() {
        Ok(ProbeVerdict::Capable) => Ok(()),
        Ok(verdict) => Err(verdict.to_string()),
        Err(e) => Err(e.to_string()),
    };
    // The probe measures time: a busy lab may look like an interpreter once, but not again and again.
    let tries = if in_the_lab() { PROBE_TRIES } else { 1 };
    let first_good = || (1..tries).map(|_| ask()).find(Result::is_ok);
    ANSWER
        .get_or_init(|| ask().or_else(|e| first_good().unwrap_or(Err(e))))
        .clone()
}

/// How often the probe is asked where it may err.
const PROBE_TRIES: u32 = 10;

/// A distribution's kernel from the file that `variable` names.
pub(crate) fn stock(variable: &str) -> Result<Source, String> {
    capable().map_err(|why| format!("{why}; run it in the lab (tests/README.md)"))?;
    Ok(Source {
        kernel: named(variable)?,
        initrd: named("ALVEOLE_TEST_INITRD")?,
        words: String::new(),
        cpu_config: None,
    })
}

/// Whatever kernel boots quickest here.
pub(crate) fn any() -> Result<Source, String> {
    let why = match stock("ALVEOLE_TEST_VMLINUX").or_else(|_| stock("ALVEOLE_TEST_KERNEL")) {
        Ok(source) => return Ok(source),
        Err(why) => why,
    };
    if in_the_lab() || !std::path::Path::new(KVM_PATH).exists() {
        return Err(why);
    }
    let Ok(kernel) = named("ALVEOLE_NATIVE_KERNEL") else {
        return Err(why);
    };
    Ok(Source {
        kernel,
        initrd: named("ALVEOLE_TEST_INITRD")?,
        words: std::env::var("ALVEOLE_NATIVE_CMDLINE").unwrap_or_default(),
        cpu_config: cpu_config(),
    })
}

fn cpu_config() -> Option<serde_json::Value> {
    let path = named("ALVEOLE_NATIVE_CPU_CONFIG").ok()?;
    let text = std::fs::read(&path).unwrap();
    Some(serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// Says loudly that the calling test does not run, and why; `tools/test` counts these lines.
#[track_caller]
pub(crate) fn skip(why: &str) {
    let thread = std::thread::current();
    let test = match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        // With one test thread there are no names.
        _ => Location::caller().to_string(),
    };
    let line = format!("SKIPPED {test}: {why}\n");
    // Not `eprint!`: the test runner keeps that for itself.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().append(true).create(true).open(&path);
        let written = log.and_then(|mut log| log.write_all(line.as_bytes()));
        written.expect("the file that ALVEOLE_SKIP_LOG names takes a line");
    }
}
