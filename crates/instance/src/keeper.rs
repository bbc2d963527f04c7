//! Keeping a VM: its machine, its main process, who is attached, and how it ended.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Controls, Duplex, Guest, Session, Streams};
use alveole_agent_protocol::{
    Answer, Control, Exit, Process, READY_PORT, Refusal, Shutdown, ShutdownHow, Stream, from_json,
};
use rustix::process::{Signal, pidfd_send_signal};

use crate::ask::Ask;
use crate::beginning::{
    AGENT_PATIENCE, Failure, NOT_STARTED, become_other, boot, broken, not_started,
};
use crate::folder::{now_ms, write_json};
use crate::log::LogWriter;
use crate::monitor::{Monitor, MonitorTemplate};
use crate::stages::reached;
use crate::streams::{Fanout, Hub, Input, lock};
use crate::{Beginning, Ended, Happened, InstanceError, KeeperLock, Phase, Restart, Vm};

/// Whoever starts a VM attaches at once.
const FIRST_CLIENT_PATIENCE: Duration = Duration::from_secs(30);
/// What the guest's other processes have, after the main one.
const OTHERS_GRACE_MS: u32 = 2000;
/// The guest's end, after that.
const OFF_PATIENCE: Duration = Duration::from_secs(10);
/// Clients that know the end go at once.
const CLIENTS_PATIENCE: Duration = Duration::from_secs(5);
/// Between an end and the next start by itself; doubled each time, up to a minute; begun anew after a good while.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
const GOOD_WHILE: Duration = Duration::from_secs(10);
/// Between two looks at whether a guest without a main process is still wanted.
const SERVING_LOOK: Duration = Duration::from_millis(5);

/// What a start of the machine needs.
pub struct Machine {
    /// The monitor, with all its words and descriptors. It runs until it, or the keeper, ends.
    pub monitor: Command,
    /// Who gives it sooner.
    pub template: Option<MonitorTemplate>,
    /// What the guest is to be, or becomes.
    pub begin: Beginning,
    /// What must live as long as the machine does.
    pub held: Vec<Box<dyn Send>>,
    /// Nothing that the guest writes is kept: after its main process it need not end in order.
    pub discarded: bool,
}

/// What clients can do to the VM while it is kept.
struct Kept {
    hub: Arc<Hub>,
    now: Mutex<Now>,
    stop_signal: u8,
    vm: Vm,
}

#[derive(Default)]
struct Now {
    controls: Option<Controls>,
    input: Option<Input>,
    /// The monitor's process, by a descriptor: no other process can be meant.
    monitor: Option<OwnedFd>,
    /// Somebody asked for its end: it is not started again.
    stopping: bool,
    /// Who started it gave it up by this signal, before its process had begun.
    given_up: Option<u8>,
}

/// What a VM is kept for.
#[derive(Clone, Copy)]
pub enum Purpose<'a> {
    /// Its main process.
    Run {
        /// Which begins when a client is there, if there is this: the end of a pipe whose other end is closed if that has gone.
        client: Option<&'a OwnedFd>,
    },
    /// Its agent alone, until this says that it is over. What is known of its main process stays as it is.
    Serve(&'a dyn Fn() -> bool),
}

/// What a keeper tells who started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told<'a> {
    /// It can be asked.
    Serves,
    /// The main process runs.
    Runs,
    /// It does not.
    Failed(&'a str),
}

/// Keeps a VM until it has ended for good, and gives how. The main thread calls it, as the monitor ends with who started it.
/// `machine` makes what each start needs, of the VM as it is by then; `tell` is told how far it is.
///
/// # Errors
///
/// The folder cannot be used. How the guest fares is no error of this.
pub fn keep(
    vm: &Vm,
    _proves: &KeeperLock,
    purpose: Purpose<'_>,
    mut machine: impl FnMut(&Vm) -> Result<Machine, String>,
    mut tell: impl FnMut(Told<'_>),
) -> Result<Ended, InstanceError> {
    if vm.was_lost() {
        vm.note(Happened::Lost);
    }
    let serves = matches!(purpose, Purpose::Serve(_));
    if !serves {
        remove(&vm.at("ended.json"))?;
    }
    for old in [vm.at("phase.json"), vm.socket("keeper")] {
        remove(&old)?;
    }
    let mut phase = Phase {
        phase: "starting".into(),
        started_ms: now_ms(),
        restarts: 0,
        monitor_pid: None,
        keeper_pid: rustix::process::getpid()
            .as_raw_nonzero()
            .get()
            .cast_unsigned(),
        cpus: vm.record.cpus,
        memory_mib: vm.record.memory_mib,
        main_pid: None,
        network: Vec::new(),
    };
    write_json(&vm.at("phase.json"), &phase)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(vm.run_folder())
        .map_err(InstanceError::file("make the folder", vm.run_folder()))?;
    let log = LogWriter::open(&vm.at("log")).map_err(InstanceError::file("open", vm.at("log")))?;
    let control = Arc::new(Kept {
        hub: Hub::new(log),
        now: Mutex::default(),
        stop_signal: vm.record.stop_signal,
        vm: vm.clone(),
    });
    // Before anybody can ask for it.
    let mut input = new_input(&control)?;
    let socket = vm.socket("keeper");
    let listener = UnixListener::bind(&socket).map_err(InstanceError::file("make", &socket))?;
    let serving = Arc::clone(&control);
    thread::Builder::new()
        .name("clients".into())
        .spawn(move || serve(&listener, &serving))
        .map_err(InstanceError::file("serve", &socket))?;

    reached("kept");
    tell(Told::Serves);
    let mut pause = RESTART_PAUSE;
    let ended = loop {
        let begun = Instant::now();
        let once = Once {
            vm,
            control: &control,
            purpose: match purpose {
                // Who was there first goes on after a restart.
                Purpose::Run { .. } if phase.restarts > 0 => Purpose::Run { client: None },
                purpose => purpose,
            },
            input: input.take(),
        };
        let outcome = once.run(&mut machine, &mut phase, &mut tell);
        let (status, why) = match outcome {
            Ok(exit) => (exit.status(), None),
            Err(_) if let Some(signal) = lock(&control.now).given_up => {
                (signal.saturating_add(128), None)
            }
            Err(failure) => {
                tell(Told::Failed(&failure.why));
                (failure.status, Some(failure.why))
            }
        };
        let ended = Ended {
            status,
            at_ms: now_ms(),
            why,
        };
        if !serves {
            vm.note((&ended).into());
        }
        let stopping = lock(&control.now).stopping;
        // As it is by now: it may have been changed while the machine ran.
        let restart = vm.again().map_or(vm.record.restart, |vm| vm.record.restart);
        let again = !stopping
            && !serves
            && match restart {
                Restart::No => false,
                Restart::OnFailure(most) => {
                    ended.status != 0 && most.is_none_or(|most| phase.restarts < most)
                }
                Restart::Always => true,
            };
        if !again {
            break ended;
        }
        control.hub.again();
        input = new_input(&control)?;
        if begun.elapsed() > GOOD_WHILE {
            pause = RESTART_PAUSE;
        }
        phase.restarts += 1;
        vm.note(Happened::Restarting {
            restarts: phase.restarts,
            pause_ms: u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
        });
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
        if lock(&control.now).stopping {
            break ended;
        }
    };
    if !serves {
        write_json(&vm.at("ended.json"), &ended)?;
    }
    let answer = match &ended.why {
        Some(why) => Answer::Refused(Refusal {
            code: code_of(ended.status).into(),
            text: why.clone(),
        }),
        // Whatever it was, its status is what shells and people have.
        None => Answer::Exited(Exit::Code(ended.status)),
    };
    if let Purpose::Run {
        client: Some(client),
    } = purpose
        && phase.restarts == 0
    {
        // Who started it is told even if all was over before it was attached.
        wait_for_first(&control.hub, client);
    }
    control.hub.end(&answer);
    control.hub.wait_for_none(CLIENTS_PATIENCE);
    remove(&vm.at("phase.json"))?;
    let _ = fs::remove_dir_all(vm.run_folder());
    Ok(ended)
}

fn remove(path: &Path) -> Result<(), InstanceError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(InstanceError::file("remove", path)(e))
        }
        _ => Ok(()),
    }
}

fn code_of(status: u8) -> &'static str {
    match status {
        126 => Refusal::NOT_EXECUTABLE,
        127 => Refusal::NOT_FOUND,
        _ => Refusal::FAILED,
    }
}

/// The main process's input, if it has one; the end that the process reads.
fn new_input(control: &Kept) -> Result<Option<File>, InstanceError> {
    if !control.vm.record.process.input {
        return Ok(None);
    }
    let (theirs, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| InstanceError::file("make a pipe for", control.vm.folder())(e.into()))?;
    lock(&control.now).input = Some(Input::new(File::from(ours)));
    Ok(Some(File::from(theirs)))
}

/// One start of the machine, to its end.
struct Once<'a> {
    vm: &'a Vm,
    control: &'a Arc<Kept>,
    purpose: Purpose<'a>,
    input: Option<File>,
}

impl Once<'_> {
    fn run(
        mut self,
        machine: &mut impl FnMut(&Vm) -> Result<Machine, String>,
        phase: &mut Phase,
        tell: &mut impl FnMut(Told<'_>),
    ) -> Result<Exit, Failure> {
        let vm = self.vm;
        let told = |e: InstanceError| not_started(e.to_string());
        let ready = vm.socket(&format!("vsock_{READY_PORT}"));
        let sockets = [ready.clone(), vm.socket("vsock"), vm.socket("api")];
        for old in &sockets {
            remove(old).map_err(told)?;
        }
        let listener =
            UnixListener::bind(&ready).map_err(|e| told(InstanceError::file("make", &ready)(e)))?;
        // What was changed since the last start is so from this one on.
        let now = vm.again().map_err(told)?;
        phase.cpus = now.record.cpus;
        phase.memory_mib = now.record.memory_mib;
        let Machine {
            monitor,
            template,
            begin,
            held,
            discarded,
        } = machine(&now).map_err(not_started)?;
        phase.main_pid = None;
        phase.network = match &begin {
            Beginning::Boot(setup) => setup.network.clone(),
            Beginning::Restored(restored) => restored.identity.words(),
        };
        let mut monitor = Monitor::start(vm, monitor, template.as_ref(), held)
            .map_err(|e| not_started(format!("cannot start the monitor: {e}")))?;
        reached("monitor");
        lock(&self.control.now).monitor = monitor.pidfd();
        // Somebody asked for its end before there was one to be killed.
        if lock(&self.control.now).stopping {
            kill(self.control);
        }
        let result = self.in_machine(listener, begin, &mut monitor, phase, tell);
        {
            let mut now = lock(&self.control.now);
            now.controls = None;
            now.input = None;
        }
        if result.is_ok() && !discarded && !monitor.has_ended() {
            let guest = Guest::new(&vm.socket("vsock"), AGENT_PATIENCE);
            let how = Shutdown {
                how: ShutdownHow::PowerOff,
                signal: 15,
                grace_ms: OTHERS_GRACE_MS,
            };
            if guest.shut_down(how).is_ok() {
                monitor.end(Duration::from_millis(OTHERS_GRACE_MS.into()) + OFF_PATIENCE);
            }
        }
        lock(&self.control.now).monitor = None;
        if monitor.says_panic() {
            vm.note(Happened::Panicked);
        }
        drop(monitor);
        reached("off");
        for gone in &sockets {
            let _ = fs::remove_file(gone);
        }
        result
    }

    fn in_machine(
        &mut self,
        listener: UnixListener,
        begin: Beginning,
        monitor: &mut Monitor,
        phase: &mut Phase,
        tell: &mut impl FnMut(Told<'_>),
    ) -> Result<Exit, Failure> {
        let (vm, control) = (self.vm, self.control);
        let main = match begin {
            Beginning::Boot(setup) => {
                boot(vm, listener, *setup, monitor)?;
                None
            }
            Beginning::Restored(restored) => {
                drop(listener);
                become_other(vm, &restored, monitor)?;
                Some(restored.main_pid)
            }
        };
        if let Purpose::Run {
            client: Some(client),
        } = self.purpose
            && !wait_for_first(&control.hub, client)
        {
            return Err(not_started("who started it is gone"));
        }
        let streams = Streams {
            input: self
                .input
                .take()
                .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
            output: Some(Box::new(Fanout::new(&control.hub, Stream::Output))),
            errors: Some(Box::new(Fanout::new(&control.hub, Stream::Errors))),
        };
        phase.phase = "running".into();
        phase.started_ms = now_ms();
        phase.monitor_pid = Some(monitor.id());
        if let Purpose::Serve(over) = self.purpose {
            write_json(&vm.at("phase.json"), phase).map_err(|e| not_started(e.to_string()))?;
            tell(Told::Runs);
            while !over() {
                if monitor.has_ended() {
                    return Err(broken(monitor, &AgentError::Ended, "the guest ended early"));
                }
                thread::sleep(SERVING_LOOK);
            }
            return Ok(Exit::Code(0));
        }
        let guest = Guest::new(&vm.socket("vsock"), AGENT_PATIENCE);
        let begun = |controls, pid| {
            phase.main_pid = Some(pid);
            if let Err(e) = write_json(&vm.at("phase.json"), phase) {
                log::warn!("{e}");
            }
            reached("started");
            lock(&control.now).controls = Some(controls);
            control.hub.begun(pid);
            vm.note(Happened::Started {
                restarts: phase.restarts,
            });
            tell(Told::Runs);
        };
        let exit = match main {
            None => {
                let process = Process {
                    outlives_session: true,
                    ..vm.record.process.clone()
                };
                guest.run(&process, streams, begun)
            }
            Some(pid) => guest.rejoin(pid, streams, begun),
        };
        reached("exited");
        match exit {
            Ok(exit) => Ok(exit),
            Err(AgentError::Refused(refusal)) => Err(Failure {
                status: match refusal.code.as_str() {
                    Refusal::NOT_EXECUTABLE => 126,
                    Refusal::NOT_FOUND => 127,
                    _ => NOT_STARTED,
                },
                why: refusal.shown(),
            }),
            Err(e) => Err(broken(monitor, &e, "the guest ended before its process")),
        }
    }
}

/// Waits until the client is there that the process is to begin with; false: it has gone, or does not come.
fn wait_for_first(hub: &Hub, client: &OwnedFd) -> bool {
    let until = Instant::now() + FIRST_CLIENT_PATIENCE;
    loop {
        let came = hub.wait_for_first(Duration::from_millis(20));
        // An end of a pipe without another end is told whatever is asked for (poll(2)).
        let mut end = [rustix::event::PollFd::new(
            client,
            rustix::event::PollFlags::empty(),
        )];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let has_gone = rustix::event::poll(&mut end, Some(&now)) == Ok(1);
        if came || has_gone || Instant::now() > until {
            return came;
        }
    }
}

/// Signals that give a VM up whose process has not begun: HUP, INT, QUIT, TERM.
const GIVING_UP: [u8; 4] = [1, 2, 3, 15];

fn serve(listener: &UnixListener, control: &Arc<Kept>) {
    for connection in listener.incoming().flatten() {
        let control = Arc::clone(control);
        let _ = thread::Builder::new().name("client".into()).spawn(move || {
            // Whoever breaks off is not answered any more.
            let _ = client(connection, &control);
        });
    }
}

fn client(connection: UnixStream, control: &Arc<Kept>) -> Result<(), AgentError> {
    let mut session = Session::begin(connection, AGENT_PATIENCE)?;
    match session.request::<Ask>()? {
        Ask::Attach(how) => attached(session, control, &how),
        Ask::Stop { signal, grace_ms } => {
            let signal = signal.unwrap_or(control.stop_signal);
            control.vm.note(Happened::Stopping {
                signal: Some(signal),
            });
            stop(control, signal, grace_ms);
            session.answer_with(&Answer::Done)
        }
        Ask::Signal(signal) => {
            control.vm.note(Happened::Signalled { signal });
            // As containers have it: after this one it is not started again.
            if signal == 9 || signal == 15 || signal == control.stop_signal {
                lock(&control.now).stopping = true;
            }
            let answer = match &lock(&control.now).controls {
                Some(controls) => {
                    controls.signal(signal);
                    Answer::Done
                }
                None => Answer::Refused(Refusal {
                    code: Refusal::NOT_FOUND.into(),
                    text: format!("the main process of '{}' does not run now", control.vm.name),
                }),
            };
            session.answer_with(&answer)
        }
        Ask::Kill => {
            control.vm.note(Happened::Stopping { signal: None });
            kill(control);
            session.answer_with(&Answer::Done)
        }
    }
}

/// Asks for the end, and sees that it comes.
fn stop(control: &Arc<Kept>, signal: u8, grace_ms: u32) {
    let controls = {
        let mut now = lock(&control.now);
        now.stopping = true;
        now.controls.clone()
    };
    let Some(controls) = controls else {
        // It is just starting, or ends by itself.
        kill(control);
        return;
    };
    controls.signal(signal);
    let control = Arc::clone(control);
    let _ = thread::Builder::new().name("stop".into()).spawn(move || {
        thread::sleep(Duration::from_millis(grace_ms.into()));
        controls.signal(9);
        // An agent that is dead or hung does not carry it out.
        thread::sleep(AGENT_PATIENCE);
        if lock(&control.now).controls.is_some() {
            kill(&control);
        }
    });
}

fn kill(control: &Kept) {
    let mut now = lock(&control.now);
    now.stopping = true;
    if let Some(monitor) = &now.monitor {
        // One that has ended is as good.
        let _ = pidfd_send_signal(monitor, Signal::KILL);
    }
}

fn attached(
    mut session: Session,
    control: &Arc<Kept>,
    how: &crate::Attach,
) -> Result<(), AgentError> {
    // The process waits for the first; all others wait for the process.
    let started = if how.first {
        Ok(0)
    } else {
        control.hub.wait_for_start()
    };
    match started {
        Ok(pid) => session.answer_with(&Answer::Started { pid })?,
        Err(last) => return session.answer_with(&last),
    }
    let mut duplex = Duplex::begin(session)?;
    let input = lock(&control.now).input.clone().filter(|_| how.input);
    let terminal = control.vm.record.process.terminal.is_some();
    let writer = input.map(|input| input.writer(how.first && !terminal));
    duplex.take(Stream::Input, writer)?;
    let sender = duplex.sender();
    let Some(number) = control.hub.add(sender.clone(), how.first, how.history) else {
        let _ = sender.message(&Answer::Refused(Refusal {
            code: Refusal::FAILED.into(),
            text: "too many are attached already".into(),
        }));
        return Ok(());
    };
    let result = loop {
        match duplex.message() {
            Ok(json) => {
                let Ok(wish) = from_json::<Control>(&json, "control") else {
                    continue;
                };
                let controls = lock(&control.now).controls.clone();
                match (wish, controls) {
                    (Control::Resize(size), Some(controls)) => controls.resize(size),
                    (Control::Signal(signal), Some(controls)) => controls.signal(signal),
                    (Control::Signal(signal), None) if how.first && GIVING_UP.contains(&signal) => {
                        lock(&control.now).given_up = Some(signal);
                        kill(control);
                    }
                    _ => {}
                }
            }
            Err(AgentError::Ended) => break Ok(()),
            Err(e) => break Err(e),
        }
    };
    control.hub.remove(number);
    sender.over();
    result
}
