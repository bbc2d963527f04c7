//! A process that has a snapshot prepared, and guests whose VMM is a copy of it.
//!
//! Does not know what becomes of the times.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use alveole_process_template::Copy;
use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::life::{Arrivals, BEAT, Files};
use super::table::Row;
use super::{Plan, milliseconds, networked};
use crate::client::Client;
use crate::run::{self, Run};
use crate::vmm::{Vmm, utf8};

/// The template, which ends with this.
pub(super) struct Template {
    _run: Run,
    socket: PathBuf,
    load: PathBuf,
    /// What that file says.
    body: Value,
}

impl Template {
    /// Starts one, and waits until it can be asked.
    pub(super) fn start(plan: &Plan, vmm: &Vmm, files: &Files) -> anyhow::Result<Self> {
        let load = plan.scratch.join("load.json");
        let mut body = files.load_body()?;
        body["resume_vm"] = json!(true);
        fs::write(&load, body.to_string())?;
        let socket = plan.scratch.join("template");
        let _ = fs::remove_file(&socket);
        let words = [
            "--template",
            utf8(&socket)?,
            "--load-snapshot",
            utf8(&load)?,
        ];
        let words: Vec<_> = words.into_iter().map(Into::into).collect();
        let stderr = plan.scratch.join("template.stderr");
        let run = Run::start(vmm.path.as_os_str(), &words, &stderr, plan.patience)?;
        let until = Instant::now() + plan.patience;
        while !fs::metadata(&socket).is_ok_and(|m| m.file_type().is_socket()) {
            if Instant::now() > until {
                bail!(run.failure("no template"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Self {
            _run: run,
            socket,
            load,
            body,
        })
    }
}

/// A guest whose VMM is a copy of a template.
pub(super) struct Guest {
    copy: Copy,
    output: PipeReader,
    client: Client,
    /// Just before it was asked for.
    pub(super) start: Instant,
    patience: Duration,
}

impl Guest {
    /// Has one made. Its socket is alone in `folder`, which is made. Over `tap`, if there is one, goes its network.
    pub(super) fn start(
        plan: &Plan,
        template: &Template,
        folder: &Path,
        tap: Option<&str>,
        arrivals: &Arrivals,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let socket = folder.join("api");
        let _ = fs::remove_file(&socket);
        let mut load = template.load.clone();
        if let Some(tap) = tap {
            load = folder.with_extension("load.json");
            let mut body = template.body.clone();
            body[networked::OVERRIDES] = networked::overrides(tap);
            fs::write(&load, body.to_string())?;
        }
        let words = load_words(&socket, &load)?.map(OsStr::new);
        let (output, theirs) = std::io::pipe()?;
        let nothing = File::open("/dev/null")?;
        let errors = File::create(folder.with_extension("stderr"))?;
        let descriptors = [
            (0, nothing.as_fd()),
            (1, theirs.as_fd()),
            (2, errors.as_fd()),
        ];
        arrivals.expect(folder)?;
        let start = Instant::now();
        let copy = Copy::ask(&template.socket, &words, &descriptors)?;
        let client = Client::connect(&socket, arrivals, plan.patience)?;
        Ok(Self {
            copy,
            output,
            client,
            start,
            patience: plan.patience,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.copy.pid()
    }

    /// Waits until its machine runs, and answers.
    pub(super) fn answered(&mut self) -> anyhow::Result<()> {
        self.client.ask("GET", "/machine-config", "")?;
        Ok(())
    }

    /// Waits until the guest has beaten.
    pub(super) fn beat(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + self.patience;
        let mut some = [0; 4096];
        while run::wait_readable(&self.output, until) {
            let count = self.output.read(&mut some)?;
            if some[..count].contains(&BEAT) {
                return Ok(());
            }
            if count == 0 {
                break;
            }
        }
        bail!("no beat of a template's copy");
    }
}

/// The command line of a VMM that loads what this file says.
fn load_words<'a>(socket: &'a Path, load: &'a Path) -> anyhow::Result<[&'a str; 6]> {
    let (socket, load) = (utf8(socket)?, utf8(load)?);
    Ok([
        "--api-sock",
        socket,
        "--level",
        "Error",
        "--load-snapshot",
        load,
    ])
}

/// How soon a copy answers and runs; and how soon a program does that is executed for the same.
pub(super) fn measure(
    plan: &Plan,
    vmm: &Vmm,
    files: &Files,
    arrivals: &Arrivals,
    add: &mut dyn FnMut(Row, f64),
) -> anyhow::Result<()> {
    let template = Template::start(plan, vmm, files)?;
    let folder = plan.scratch.join("copied");
    let mut guest = Guest::start(plan, &template, &folder, None, arrivals)?;
    guest.answered().context("a template's copy")?;
    add(Row::CopyAnswered, milliseconds(guest.start.elapsed()));
    guest.beat()?;
    add(Row::CopyBeat, milliseconds(guest.start.elapsed()));
    drop(guest);

    let folder = plan.scratch.join("executed");
    let (run, start) = execute(plan, vmm, &template, &folder, arrivals)?;
    let mut client = Client::connect(&folder.join("api"), arrivals, plan.patience)?;
    client
        .ask("GET", "/machine-config", "")
        .with_context(|| run.failure("it was to load a snapshot"))?;
    add(Row::ExecutedAnswered, milliseconds(start.elapsed()));
    Ok(())
}

/// Executes the program for what the template has prepared. Its socket is alone in `folder`, which is made; when it was started.
pub(super) fn execute(
    plan: &Plan,
    vmm: &Vmm,
    template: &Template,
    folder: &Path,
    arrivals: &Arrivals,
) -> anyhow::Result<(Run, Instant)> {
    fs::create_dir_all(folder)?;
    let socket = folder.join("api");
    let _ = fs::remove_file(&socket);
    let words = load_words(&socket, &template.load)?;
    let words: Vec<_> = words.into_iter().map(Into::into).collect();
    arrivals.expect(folder)?;
    let errors = folder.with_extension("stderr");
    let start = Instant::now();
    let run = Run::start(vmm.path.as_os_str(), &words, &errors, plan.patience)?;
    Ok((run, start))
}
