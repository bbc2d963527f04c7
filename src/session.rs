//! From a description to a machine that is built: at once, where a file describes it, or when a client of the API
//! says so. Until then this thread answers clients; afterwards the machine does.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use alveole_event_loop::Worker;
use alveole_hypervisor_kvm::KvmPartition;
use alveole_machine::{
    Bulletin, Desk, End, Event, HostResources, Identity, Machine, Mailbox, Options, Prepared,
    Snapshot,
};
use alveole_mmds::Metadata;
use alveole_serial::{Console, ConsoleTarget};
use alveole_vm_config::{Logger, Metrics, SnapshotLoad, VmConfig};
use alveole_vm_control::{Answer, Command, Refusal, Request, State, permit};

use crate::cli::{self, Args};
use crate::description;
use crate::exit::{self, Failure};
use crate::logger;
use crate::metrics::{MetricsFile, Startup};

/// What came of waiting for a client to start the machine.
pub(crate) enum Started {
    /// It is built.
    Machine(Box<Machine>),
    /// Something ended this process before.
    Ended(Box<End>),
}

/// A machine in the making.
pub(crate) struct Session<'a> {
    args: &'a Args,
    mailbox: Mailbox,
    desk: Desk,
    counters: Option<MetricsFile>,
    startup: Startup,
    /// From when times of the boot are measured, and what happened then.
    begun: (Instant, &'static str),
    /// The times of the boot have been told, or are not wanted.
    told: bool,
    /// Why log and counters cannot be written; told with whatever else is wrong.
    unopened: Vec<String>,
}

impl<'a> Session<'a> {
    /// A session whose log and counters are as `args` and, where they are silent, `config` say. Whether these can be written is
    /// told by [`Self::opened`], and by [`Self::build`] with all else that is wrong.
    ///
    /// # Errors
    /// The metadata cannot be read.
    pub(crate) fn new(
        args: &'a Args,
        config: VmConfig,
        mailbox: Mailbox,
        process_start: Instant,
    ) -> Result<Self, Failure> {
        let file = config.logger.clone().unwrap_or_default();
        let said = args.logger();
        let log = logger::change(&Logger {
            log_path: said.log_path.or(file.log_path),
            level: said.level.or(file.level),
            show_level: said.show_level.or(file.show_level),
            show_log_origin: said.show_log_origin.or(file.show_log_origin),
            module: said.module.or(file.module),
        });
        let path = args.metrics_path.as_ref();
        let path = path.or(config.metrics.as_ref().map(|m| &m.metrics_path));
        let mut unopened: Vec<_> = log.err().into_iter().collect();
        let counters = path.and_then(|path| {
            let opened = MetricsFile::open(path, process_start, Startup::default());
            opened.map_err(|why| unopened.push(why)).ok()
        });
        let identity = Identity {
            id: args.id().into(),
            app_name: "Alveole".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            api_version: alveole_api_server::API_VERSION.into(),
            began: process_start,
        };
        Ok(Self {
            args,
            mailbox,
            desk: Desk::new(identity, config, metadata(args)?),
            counters,
            startup: Startup::default(),
            begun: (process_start, "process start"),
            told: !args.boot_timer,
            unopened,
        })
    }

    /// The API is served: the start is over.
    pub(crate) fn serves(&mut self) {
        self.startup = Startup::until_now(self.args.launched);
        if let Some(counters) = &mut self.counters {
            counters.set_startup(self.startup);
        }
    }

    /// Whether log and counters can be written.
    ///
    /// # Errors
    /// One of them cannot, or both.
    pub(crate) fn opened(&self) -> Result<(), Failure> {
        match self.unopened.is_empty() {
            true => Ok(()),
            false => Err(Failure::Host(self.unopened.join("; "))),
        }
    }

    /// `wrong`, and what else of the files that are written cannot be opened.
    fn all_wrong(&self, wrong: impl Iterator<Item = String>) -> String {
        let console = Console::try_file(&self.console_target()).err();
        let console = console.map(|e| e.to_string());
        let all = wrong.chain(self.unopened.iter().cloned()).chain(console);
        all.collect::<Vec<_>>().join("; ")
    }

    /// What clients have said, for the machine to answer them.
    pub(crate) fn desk(&self) -> Desk {
        self.desk.clone()
    }

    /// What others may read of the machine without asking.
    pub(crate) fn bulletin(&self) -> Bulletin {
        self.desk.bulletin().clone()
    }

    /// Builds what has been described. `workers` run on the machine's loop.
    ///
    /// # Errors
    /// The description is wrong, or the host does not give what it needs. Nothing is left behind.
    pub(crate) fn build(&self, workers: Vec<Box<dyn Worker>>) -> Result<Machine, Failure> {
        let config = self.desk.config();
        let valid = alveole_machine::validate(config).map_err(|broken| {
            let all = self.all_wrong(broken.iter().map(ToString::to_string));
            Failure::Config(format!("this machine cannot be built: {all}"))
        })?;
        let host = |e: &dyn std::error::Error| Failure::Host(e.to_string());
        let resources = HostResources::open(&valid, self.desk.metadata()).map_err(|first| {
            let all = HostResources::all_refused(&valid, first);
            Failure::Config(self.all_wrong(all.iter().map(ToString::to_string)))
        })?;
        if !self.unopened.is_empty() {
            return Err(Failure::Host(self.all_wrong(std::iter::empty())));
        }
        let partition = KvmPartition::new().map_err(|e| host(&e))?;
        let (console, options) = self.console()?;
        alveole_machine::build(
            &valid,
            resources,
            console,
            Box::new(partition),
            workers,
            &self.mailbox,
            options,
        )
        .map_err(|e| match e.blames_description() {
            true => Failure::Config(e.to_string()),
            false => host(&e),
        })
    }

    /// The console, open, and what the command line says of the machine.
    fn console(&self) -> Result<(Console, Options), Failure> {
        let target = self.console_target();
        let options = Options {
            boot_timer: self.args.boot_timer,
            end_with_terminal: matches!(target, ConsoleTarget::Terminal),
            placement: self.args.placement,
            disk_threads: self.args.disk_threads,
            transport: self.args.transport,
            on_sigterm: self.args.on_sigterm,
        };
        let to_control = self.mailbox.clone();
        let on_event = Box::new(move |e| to_control.send(Event::Console(e)));
        let console = Console::open(&target, on_event);
        Ok((console.map_err(|e| Failure::Host(e.to_string()))?, options))
    }

    /// The command line wins over the description; neither: the terminal.
    fn console_target(&self) -> ConsoleTarget {
        let serial = self.desk.config().serial.as_ref();
        let described = serial.and_then(|s| s.serial_out_path.clone());
        let described = described.map(cli::file_console);
        let said = self.args.console.clone().or(described);
        said.unwrap_or(ConsoleTarget::Terminal)
    }

    /// Answers clients until one of them starts the machine.
    ///
    /// # Errors
    /// The API does not go on.
    pub(crate) fn wait_for_start(&mut self, events: &Receiver<Event>) -> Result<Started, Failure> {
        self.desk.post(State::NotStarted);
        loop {
            match events.recv() {
                Ok(Event::Request(request)) => {
                    if let Some(machine) = self.answer(request) {
                        return Ok(Started::Machine(Box::new(machine)));
                    }
                }
                Ok(Event::Signal(number)) => {
                    return Ok(Started::Ended(Box::new(End::Signal(number))));
                }
                Ok(Event::LoopEnded(why)) => return Err(Failure::Host(why)),
                // There is no machine that could say anything.
                Ok(
                    Event::Vcpu(_)
                    | Event::Console(_)
                    | Event::Opened(_)
                    | Event::Ahead
                    | Event::Captured
                    | Event::Taken(_),
                ) => {}
                Err(_) => return Err(Failure::Host("the API is gone".into())),
            }
        }
    }

    /// Answers one request. The machine, if it was the one to start it and that could be done.
    fn answer(&mut self, request: Request) -> Option<Machine> {
        let Request { command, reply } = request;
        let state = State::NotStarted;
        let permitted = permit(state, &command);
        let what = format!("cannot {command}");
        let outcome = match (permitted, command) {
            (Err(refusal), _) => Err(refusal),
            (Ok(()), Command::Start) => {
                self.begun = (Instant::now(), "InstanceStart");
                match self.start() {
                    Ok(machine) => {
                        // What is asked from now on waits in the mailbox for the machine, which does nothing before it runs.
                        self.desk.post(State::Running);
                        reply.send(Ok(Answer::Done));
                        return Some(machine);
                    }
                    Err(why) => Err(Refusal::Failed(format!("cannot start the guest: {why}"))),
                }
            }
            (Ok(()), Command::LoadSnapshot(load)) => match self.load(&load, Vec::new(), None) {
                Ok(machine) => {
                    self.desk.post(if load.resume_vm {
                        State::Running
                    } else {
                        State::Paused
                    });
                    reply.send(Ok(Answer::Done));
                    return Some(machine);
                }
                Err(why) => Err(Refusal::Failed(format!("{what}: {}", why.into_text()))),
            },
            (Ok(()), Command::PutLogger(wanted)) => self.set_logger(wanted),
            (Ok(()), Command::PutMetrics(wanted)) => self.set_metrics(wanted),
            (Ok(()), other) => self.desk.carry_out(state, other),
        };
        reply.send(outcome);
        None
    }

    fn start(&self) -> Result<Machine, String> {
        let source = &self.desk.config().boot_source;
        if source.kernel_image_path.as_os_str().is_empty() {
            return Err("there is nothing to boot yet; PUT /boot-source first".into());
        }
        self.build(Vec::new()).map_err(Failure::into_text)
    }

    /// The machine of a snapshot, whose description becomes ours. `workers` run on the machine's loop. What is `prepared` is not read again.
    ///
    /// # Errors
    /// The snapshot is damaged, or not one of this host, or what it names is not there. Nothing is left behind.
    pub(crate) fn load(
        &mut self,
        load: &SnapshotLoad,
        workers: Vec<Box<dyn Worker>>,
        prepared: Option<Prepared>,
    ) -> Result<Machine, Failure> {
        self.begun = (Instant::now(), "LoadSnapshot");
        self.told = true;
        if !self.desk.is_blank() {
            return Err(Failure::Config("something of a machine has been said already, and a snapshot says all of it; load it into a new process, before anything but log and metrics".into()));
        }
        let config = |e: &dyn std::error::Error| Failure::Config(e.to_string());
        let host = |e: &dyn std::error::Error| Failure::Host(e.to_string());
        let snapshot = match prepared {
            Some(prepared) => prepared.snapshot(load),
            None => Snapshot::open(load),
        };
        let snapshot = snapshot.map_err(|e| match e.blames_snapshot() {
            true => config(&e),
            false => host(&e),
        })?;
        let valid = alveole_machine::validate(snapshot.config()).map_err(|broken| {
            let all: Vec<_> = broken.iter().map(ToString::to_string).collect();
            Failure::Config(all.join("; "))
        })?;
        let resources = HostResources::open_devices(&valid, self.desk.metadata());
        let resources = resources.map_err(|e| config(&e))?;
        let partition = KvmPartition::new().map_err(|e| host(&e))?;
        self.desk.set_restored(snapshot.config().clone());
        let (console, options) = self.console()?;
        alveole_machine::restore(
            &valid,
            resources,
            console,
            Box::new(partition),
            workers,
            &self.mailbox,
            options,
            snapshot,
        )
        .map_err(|e| match e.blames_description() {
            true => config(&e),
            false => host(&e),
        })
    }

    fn set_logger(&mut self, wanted: Logger) -> Result<Answer, Refusal> {
        logger::change(&wanted).map_err(|why| cannot("set the log", &why))?;
        self.desk.set_logger(wanted);
        Ok(Answer::Done)
    }

    fn set_metrics(&mut self, wanted: Metrics) -> Result<Answer, Refusal> {
        let act = "set where counters are written";
        if self.counters.is_some() {
            let why = "they are written to a file already; that can be said once";
            return Err(cannot(act, why));
        }
        let file = MetricsFile::open(&wanted.metrics_path, self.begun.0, self.startup);
        self.counters = Some(file.map_err(|why| cannot(act, &why))?);
        self.desk.set_metrics(wanted);
        Ok(Answer::Done)
    }

    /// Tells the times of the boot when they are known, and writes the counters out.
    ///
    /// # Errors
    /// They cannot be written.
    pub(crate) fn tick(&mut self, machine: &Machine) -> Result<(), String> {
        self.told = self.told || self.tell_boot_time(machine);
        match &mut self.counters {
            Some(file) => file.write(machine),
            None => Ok(()),
        }
    }

    /// True when the guest's init has been seen and the times have been told.
    fn tell_boot_time(&self, machine: &Machine) -> bool {
        let milestones = machine.milestones();
        let (Some(first), Some(init)) = (milestones.first_instruction, milestones.booted) else {
            return false;
        };
        let (start, name) = self.begun;
        let ms = |at: Instant| -> f64 {
            let since: Duration = at.saturating_duration_since(start);
            since.as_secs_f64() * 1000.0
        };
        exit::say(&format!(
            "boot timer: {name} to first guest instruction {:.2} ms, to guest init {:.2} ms",
            ms(first),
            ms(init)
        ));
        true
    }
}

/// The metadata service, with what the command line wants to be in it.
fn metadata(args: &Args) -> Result<Arc<Metadata>, Failure> {
    let limit = args.metadata_limit_bytes.unwrap_or(args.max_body_bytes);
    let metadata = Metadata::new(limit);
    if let Some(path) = &args.metadata {
        let name = path.display();
        let wrong = |why: String| Failure::Config(format!("--metadata {name:?}: {why}"));
        let text = description::read_text(path)?;
        let data = serde_json::from_slice(&text)
            .map_err(|e| wrong(format!("it is no JSON: {e}; mend it there")))?;
        metadata.put(data).map_err(|e| wrong(e.to_string()))?;
    }
    Ok(Arc::new(metadata))
}

fn cannot(act: &str, why: &str) -> Refusal {
    Refusal::Failed(format!("cannot {act}: {why}"))
}
