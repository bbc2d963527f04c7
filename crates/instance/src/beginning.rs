//! How a guest begins: it boots and is set up, or goes on from a snapshot and becomes somebody else.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Session};
use alveole_agent_protocol::{READY_PORT, Request, Setup};

use crate::folder::now_ms;
use crate::identity::{Identity, renew};
use crate::monitor::Monitor;
use crate::stages::reached;
use crate::{Happened, MonitorApi, Vm};

/// A guest's kernel and agent, on a slow host.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
/// The memory of a snapshot is mapped; a handler of page faults, or a disk that sleeps, may take a while.
const LOAD_PATIENCE: Duration = Duration::from_secs(60);
const LOAD_LOOK: Duration = Duration::from_micros(200);
/// An agent that is alive answers.
pub(crate) const AGENT_PATIENCE: Duration = Duration::from_secs(10);

/// How a guest begins.
pub enum Beginning {
    /// It boots, and its agent makes it this.
    Boot(Box<Setup>),
    /// The monitor has loaded a snapshot, and its processors run.
    Restored(Restored),
}

/// What a restored guest becomes before it is anybody's.
pub struct Restored {
    /// The name of the VM whose moment it goes on from.
    pub from: String,
    /// Who it is from now on.
    pub identity: Identity,
    /// Its main process, by its number in the guest.
    pub main_pid: u32,
    /// How long its hooks may take.
    pub hooks: Option<Duration>,
    /// Interfaces whose cables are out until it is somebody else: two guests of one address would be on a network.
    pub links: Vec<String>,
}

/// Why a machine did not do what it was to, and the status that says so.
pub(crate) struct Failure {
    pub(crate) status: u8,
    pub(crate) why: String,
}

/// As `docker run` has them: 125 it could not be started, 126 the program cannot be executed, 127 there is none.
pub(crate) const NOT_STARTED: u8 = 125;

pub(crate) fn not_started(why: impl Into<String>) -> Failure {
    Failure {
        status: NOT_STARTED,
        why: why.into(),
    }
}

/// Waits for the guest's agent, and has it make the guest what it is to be.
pub(crate) fn boot(
    vm: &Vm,
    listener: UnixListener,
    setup: Setup,
    monitor: &mut Monitor,
) -> Result<(), Failure> {
    let connection = wait_for_guest(&listener, monitor)?;
    // The first that connects is the agent, as it is the guest's first process; others of the guest are not listened to.
    drop(listener);
    let _ = fs::remove_file(vm.socket(&format!("vsock_{READY_PORT}")));
    reached("agent");
    let setup = Setup {
        unix_ns: Some(now_ms().saturating_mul(1_000_000)),
        ..setup
    };
    Session::begin(connection, BOOT_PATIENCE)
        .and_then(|session| session.ask(&Request::Setup(Box::new(setup))))
        .map_err(|e| broken(monitor, &e, "the guest cannot be set up"))?;
    Ok(())
}

/// Makes a guest that goes on from a snapshot somebody else, and puts its cables in.
pub(crate) fn become_other(
    vm: &Vm,
    restored: &Restored,
    monitor: &mut Monitor,
) -> Result<(), Failure> {
    let until = Instant::now() + LOAD_PATIENCE;
    // The device's socket comes with the machine.
    while UnixStream::connect(vm.socket("vsock")).is_err() {
        if monitor.has_ended() {
            let words = monitor.last_words();
            return Err(not_started(format!(
                "the snapshot cannot be loaded: {words}"
            )));
        }
        if Instant::now() > until {
            return Err(not_started(format!(
                "the snapshot is not loaded after {} s",
                LOAD_PATIENCE.as_secs()
            )));
        }
        thread::sleep(LOAD_LOOK);
    }
    reached("loaded");
    let renewed = match renew(vm, &restored.identity, AGENT_PATIENCE, restored.hooks) {
        Ok(renewed) => renewed,
        Err(e) if monitor.has_ended() => {
            let words = monitor.last_words();
            return Err(not_started(format!("{e}; the monitor ended, {words}")));
        }
        Err(e) => return Err(not_started(e.to_string())),
    };
    let failures = renewed.failures();
    if !failures.is_empty() {
        // Of hooks: what they leave undone is the user's to know, before the guest is used.
        return Err(not_started(failures.join("; ")));
    }
    let api = MonitorApi::new(vm, AGENT_PATIENCE);
    for link in &restored.links {
        api.put(
            &format!("/network-interfaces/{link}/link"),
            &serde_json::json!({"up": true}),
        )
        .map_err(|e| not_started(e.to_string()))?;
    }
    vm.note(Happened::Restored {
        from: restored.from.clone(),
    });
    reached("renewed");
    Ok(())
}

fn wait_for_guest(listener: &UnixListener, monitor: &mut Monitor) -> Result<UnixStream, Failure> {
    let cannot = |e: io::Error| not_started(format!("cannot wait for the guest: {e}"));
    listener.set_nonblocking(true).map_err(cannot)?;
    let until = Instant::now() + BOOT_PATIENCE;
    loop {
        match listener.accept() {
            Ok((connection, _)) => {
                connection.set_nonblocking(false).map_err(cannot)?;
                return Ok(connection);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(cannot(e)),
        }
        if monitor.has_ended() {
            let words = monitor.last_words();
            let said = match monitor.last_of_console() {
                Some(line) => {
                    format!("the last on its console, which is in the VM's folder: {line}")
                }
                None => "it said nothing on its console".into(),
            };
            return Err(not_started(format!(
                "the guest ended before its agent was there: {words}; {said}"
            )));
        }
        if Instant::now() > until {
            return Err(not_started(format!(
                "the guest's agent is not there after {} s; the guest's console is in the VM's folder",
                BOOT_PATIENCE.as_secs()
            )));
        }
        let ready = rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN);
        let moment = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        let _ = rustix::event::poll(&mut [ready], Some(&moment));
    }
}

/// What is known of a machine that does not go on.
pub(crate) fn broken(monitor: &mut Monitor, error: &AgentError, what: &str) -> Failure {
    // The connection is gone a moment before the monitor is.
    let until = Instant::now() + Duration::from_millis(500);
    while !monitor.has_ended() && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    let why = if monitor.has_ended() {
        format!("{what}: the monitor ended, {}", monitor.last_words())
    } else {
        format!("{what}: {error}")
    };
    not_started(why)
}
