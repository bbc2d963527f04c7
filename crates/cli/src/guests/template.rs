//! The process of which the monitors of many copies of one snapshot are copies.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use alveole_host::programs;
use alveole_instance::Snapshot;
use anyhow::{Context, bail};
use tempfile::TempDir;

use super::restore::load_of;
use crate::run::{hand_over, path_of};

/// It reads the snapshot's state, and maps its memory.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_micros(200);

/// A template, which ends with the last of its copies once this is gone.
pub(super) struct Template {
    process: Child,
    folder: TempDir,
}

impl Template {
    /// Starts one for copies of `snapshot`.
    pub(super) fn start(snapshot: &Snapshot) -> anyhow::Result<Self> {
        let load = hand_over(&load_of(snapshot))?;
        let folder = tempfile::tempdir().context("cannot make a folder for a socket")?;
        let socket = socket_in(folder.path());
        let process = Command::new(programs::vmm()?)
            .arg("--template")
            .arg(&socket)
            .arg("--load-snapshot")
            .arg(path_of(&load))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Its copies outlive this program, and what a terminal says is not for them.
            .process_group(0)
            .spawn()
            .context("cannot start the VMM")?;
        let mut template = Self { process, folder };
        let until = Instant::now() + PATIENCE;
        while !socket.exists() {
            if let Some(status) = template.process.try_wait()? {
                let mut said = String::new();
                if let Some(mut errors) = template.process.stderr.take() {
                    errors.read_to_string(&mut said)?;
                }
                let said = said.lines().last().unwrap_or_default();
                bail!("the VMM cannot prepare copies: {status}: {said}");
            }
            if Instant::now() > until {
                bail!("the VMM has not prepared copies within {PATIENCE:?}");
            }
            thread::sleep(LOOK);
        }
        Ok(template)
    }

    pub(super) fn socket(&self) -> PathBuf {
        socket_in(self.folder.path())
    }
}

fn socket_in(folder: &Path) -> PathBuf {
    folder.join("template")
}
