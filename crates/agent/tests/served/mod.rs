//! An agent that serves sessions at a unix socket of this host, and what tests ask of it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Guest, Session, Streams};
use alveole_agent_protocol::{Exit, Process};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// An agent that ends with its test.
pub(crate) struct Agent {
    pub(crate) child: Child,
    pub(crate) folder: tempfile::TempDir,
}

impl Agent {
    pub(crate) fn start() -> Self {
        Self::start_by(&[])
    }

    /// Started by these words before its own.
    pub(crate) fn start_by(before: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent");
        let mut words = before.to_vec();
        words.extend([env!("CARGO_BIN_EXE_alveole-agent"), "serve"]);
        let child = Command::new(words[0])
            .args(&words[1..])
            .arg(&socket)
            .spawn()
            .unwrap();
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            assert!(Instant::now() < until, "no agent");
            thread::sleep(Duration::from_millis(2));
        }
        Self { child, folder }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    pub(crate) fn guest(&self) -> Guest {
        Guest::direct(&self.socket(), PATIENCE)
    }

    pub(crate) fn session(&self) -> Session {
        self.guest().session().unwrap()
    }

    /// Runs a script to its end; gives its exit, output and errors.
    #[track_caller]
    pub(crate) fn sh(&self, script: &str) -> (Exit, String, String) {
        self.run(&sh(script), None).unwrap()
    }

    pub(crate) fn run(
        &self,
        process: &Process,
        input: Option<Box<dyn Read + Send>>,
    ) -> Result<(Exit, String, String), AgentError> {
        let (output, errors) = (Kept::default(), Kept::default());
        let streams = Streams {
            input,
            output: Some(Box::new(output.clone())),
            errors: Some(Box::new(errors.clone())),
        };
        let exit = self.guest().run(process, streams, |_, _| {})?;
        Ok((exit, output.text(), errors.text()))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn sh(script: &str) -> Process {
    Process {
        args: ["sh", "-c", script].map(str::to_owned).into(),
        ..Process::default()
    }
}

/// What is written, kept.
#[derive(Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
