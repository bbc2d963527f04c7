//! Where the time of a start goes: who has reached a stage says so in a file that the environment names.
//!
//! Each line is the stage and the nanoseconds since 1970, in one write, as `alveole run`, the keeper and who measures them are
//! different processes. `tools/bench run` reads them.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// The variable that names the file; without it nothing is written.
const VARIABLE: &str = "ALVEOLE_STAGES";

/// The file, if there is one; [`reached`] appends to it.
#[must_use]
pub fn stages_file() -> Option<PathBuf> {
    std::env::var_os(VARIABLE)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
}

/// Says that a stage has been reached. A file that cannot be written to is no reason to fail.
pub fn reached(stage: &str) {
    static FILE: OnceLock<Option<File>> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let path = stages_file()?;
        let opened = File::options().append(true).create(true).open(&path);
        opened
            .map_err(|e| log::warn!("cannot write stages to '{}': {e}", path.display()))
            .ok()
    });
    if let Some(mut file) = file.as_ref() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = format!("{stage} {}\n", now.unwrap_or_default().as_nanos());
        let _ = file.write_all(line.as_bytes());
    }
}
