//! VMs in which no process of their own runs: their agents serve, and go with whoever started them. Images are made with them.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Guest, Streams};
use alveole_agent_protocol::{Changes, Exit, Process, Request};
use alveole_image::{Draft, Unchecked};
use alveole_instance::{Ask, Limits, Record, Restart, Vm, ask};
use anyhow::{Context, bail};

use super::commands::AGENT_PATIENCE;
use super::run::{Begun, USUAL_DISK_BYTES, USUAL_STOP_SIGNAL, now_ms, start_keeper};
use super::terminal::pass_signals;
use crate::hint;
use crate::places::Places;

/// A guest that was asked to leave in order.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// A VM whose agent serves.
pub(crate) struct Maker {
    begun: Begun,
}

/// What a step of a build wants of its VM.
pub(crate) struct Wanted<'a> {
    pub(crate) image: &'a str,
    pub(crate) root_disk: std::path::PathBuf,
    pub(crate) kernel: Option<&'a str>,
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u64,
    pub(crate) network: Vec<String>,
    pub(crate) process: Process,
}

impl Maker {
    /// Makes a VM that is gone with its end, and starts it.
    pub(crate) fn new(wanted: Wanted<'_>) -> anyhow::Result<Self> {
        let places = Places::usual();
        let kernel = places.kernels().get(wanted.kernel)?;
        let id = Record::new_id()?;
        let name = format!("build-{id}");
        let mut network = wanted.network;
        network.push(format!("--name={name}"));
        let record = Record {
            version: Record::VERSION,
            image: wanted.image.into(),
            image_id: String::new(),
            created_ms: now_ms(),
            root_disk: wanted.root_disk,
            kernel: kernel.name,
            cpus: wanted.cpus,
            memory_mib: wanted.memory_mib,
            disk_bytes: Some(USUAL_DISK_BYTES),
            read_only: false,
            hostname: name.clone(),
            network,
            process: wanted.process,
            stop_signal: USUAL_STOP_SIGNAL,
            labels: [("build".to_owned(), String::new())].into(),
            restart: Restart::No,
            limits: Limits::default(),
            shm_bytes: None,
            cpu_config: None,
            published_free: Vec::new(),
            volumes: Vec::new(),
            remove: true,
            id,
        };
        let vms = places.vms();
        vms.sweep();
        Self::start(&vms.create(&name, &record)?, false)
    }

    /// Starts a VM that was stopped, without its network and its process.
    pub(crate) fn of(vm: &Vm) -> anyhow::Result<Self> {
        Self::start(vm, true)
    }

    fn start(vm: &Vm, offline: bool) -> anyhow::Result<Self> {
        let words: &[&str] = match offline {
            true => &["--serve", "--offline"],
            false => &["--serve"],
        };
        let mut begun = start_keeper(vm, words)?;
        match begun.hear()?.as_str() {
            "runs" => Ok(Self { begun }),
            why => bail!("the VM '{}' did not start: {why}", vm.name),
        }
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.begun.vm
    }

    /// Runs a process whose output is this one's standard error.
    pub(crate) fn run(&self, process: &Process) -> Result<Exit, AgentError> {
        let streams = Streams {
            input: None,
            output: Some(Box::new(io::stderr())),
            errors: Some(Box::new(io::stderr())),
        };
        guest(self.vm()).run(process, streams, |controls, _| {
            if let Err(e) = pass_signals(controls, false) {
                hint(&format!("signals are not passed on: {e}"));
            }
        })
    }

    /// Ends it as it is: what it has not written out is lost.
    pub(crate) fn kill(mut self) {
        // One that has ended already is as good.
        let _ = ask(self.vm(), &Ask::Kill);
        drop(self.begun.keeper.stdin.take());
        let _ = self.begun.keeper.wait();
    }

    /// Has it leave its disk in order.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        drop(self.begun.keeper.stdin.take());
        let until = Instant::now() + END_PATIENCE;
        while self
            .begun
            .keeper
            .try_wait()
            .context("cannot wait for the VM's keeper")?
            .is_none()
        {
            if Instant::now() > until {
                let name = self.vm().name.clone();
                self.kill();
                bail!("the VM '{name}' did not end in order, and was ended as it was");
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

fn guest(vm: &Vm) -> Guest {
    Guest::new(&vm.socket("vsock"), AGENT_PATIENCE)
}

/// A disk's content, and as much again for names, is all that a guest can have; one that sends more is stopped.
const MOST_OF_DISK: u64 = 2;

/// The changes of a VM's root, as a layer. Nothing in it is trusted.
pub(crate) fn changes(vm: &Vm, draft: &Draft, freeze: bool) -> anyhow::Result<Unchecked> {
    let disk_bytes = vm
        .record
        .disk_bytes
        .context("nothing of its root can be changed (--read-only), and so nothing was")?;
    let (theirs, ours) = io::pipe().context("cannot make a pipe")?;
    let guest = guest(vm);
    let packing = thread::Builder::new()
        .name("changes".into())
        .spawn(move || {
            let streams = Streams {
                output: Some(Box::new(ours)),
                ..Streams::default()
            };
            guest.copy(&Request::Changes(Changes { freeze }), streams)
        })
        .context("cannot start a thread")?;
    // Where this fails the other thread is left alone: a guest that sends for ever would keep it.
    let received = draft.receive(theirs, disk_bytes.saturating_mul(MOST_OF_DISK))?;
    match packing.join() {
        Ok(packed) => packed?,
        Err(_) => bail!("cannot receive what was changed"),
    }
    Ok(received)
}
