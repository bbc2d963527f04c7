//! The thin VMM: one process runs one guest.
//!
//! Reads the command line, serves the API, has the machine built and run, and says how it ended. Knows no device, no
//! register and no KVM request; all of that is below `alveole_machine`.

mod cli;
mod description;
mod exit;
mod log_limit;
mod logger;
mod metrics;
mod session;
mod signals;
mod snapshots;
mod template;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use alveole_api_server::{ApiSocket, ApiThread, SendRequest};
use alveole_event_loop::Worker;
use alveole_machine::{Bulletin, End, Event, Files, Mailbox, Prepared, SNAPSHOT_VERSION};
use alveole_thread_sandbox::ExtraFilters;
use alveole_vm_control::{Answer, Command};
use cli::{Args, Request};
use exit::Failure;
use session::{Session, Started};

/// How often counters are written; Firecracker's period.
const METRICS_PERIOD: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let started = process_start();
    report_panics();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Request::Help) => print(cli::HELP),
        Ok(Request::Version) => print(concat!("alveole-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Request::SnapshotVersion) => print(&format!("v{SNAPSHOT_VERSION}\n")),
        Ok(Request::DescribeSnapshot(path)) => snapshots::describe(&path),
        Ok(Request::VerifySnapshot(state, memory)) => snapshots::verify(&state, memory.as_deref()),
        Ok(Request::FlattenSnapshot(flatten)) => snapshots::flatten(&flatten),
        Ok(Request::Run(args)) => match template::begin(&args, started) {
            // Not before everything is put away: it may die here.
            Ok(Some(end)) => exit::ended(&end),
            Ok(None) => ExitCode::SUCCESS,
            Err(failure) => exit::failed(&failure),
        },
        Err(text) => exit::failed(&Failure::Usage(text)),
    }
}

fn run(args: &Args, started: Instant, prepared: Option<Prepared>) -> Result<End, Failure> {
    if args.no_seccomp {
        log::warn!(
            "--no-seccomp: the filters stay; if one refuses a call, the last line of standard error names it: tell us"
        );
    }
    if let Some(path) = &args.seccomp_filter {
        add_filters(path)?;
    }
    let host = |e: &dyn std::error::Error| Failure::Host(e.to_string());
    let config = args.config_file.as_deref().map(description::read);
    let config = config.transpose()?;
    let load = args.load_snapshot.as_deref().map(description::read_load);
    let load = load.transpose()?;
    if let Some(load) = &load
        && args.no_api
        && !load.resume_vm
    {
        return Err(Failure::Config(
            "--no-api with a snapshot that is not resumed: nobody could let its guest go on; say \"resume_vm\": true".into(),
        ));
    }
    let at_once = config.is_some();

    let (mailbox, events) = Mailbox::new();
    let config = config.unwrap_or_default();
    let mut session = Session::new(args, config, mailbox.clone(), started)?;
    if !at_once {
        session.opened()?;
    }
    alveole_thread_sandbox::install_refusal_report(alveole_serial::restore_terminal)
        .map_err(|e| host(&e))?;
    let signals = signals::SignalWorker::new(mailbox.clone()).map_err(Failure::Host)?;
    let mut workers: Vec<Box<dyn Worker>> = vec![Box::new(signals)];
    // Signals end this process before there is a machine, too: where there is an API, its loop takes them.
    let mut api = None;
    if !args.no_api {
        let workers = std::mem::take(&mut workers);
        api = Some(serve(args, &mailbox, session.bulletin(), workers)?);
        session.serves();
    }

    let mut machine = if at_once {
        session.build(workers)?
    } else if let Some(load) = &load {
        session.load(load, workers, prepared)?
    } else {
        match session.wait_for_start(&events)? {
            Started::Machine(machine) => *machine,
            Started::Ended(end) => return Ok(*end),
        }
    };
    if api.is_some() {
        let files = Files::start(&mailbox).map_err(|e| host(&e))?;
        machine.answer_clients(session.desk(), Some(files));
    }
    let end = machine.run(&events, METRICS_PERIOD, &mut |machine| {
        session.tick(machine)
    });
    // What clients still wait for is answered by being dropped; then the API writes that, and goes.
    drop((machine, events));
    drop(api);
    Ok(end)
}

/// Starts the API, with `workers` on its loop. What stands in the `bulletin` is answered from it: clients who ask again and again
/// whether the machine runs wake nobody.
fn serve(
    args: &Args,
    mailbox: &Mailbox,
    bulletin: Bulletin,
    workers: Vec<Box<dyn Worker>>,
) -> Result<ApiThread, Failure> {
    let socket = ApiSocket::bind(&args.api_sock).map_err(|e| Failure::Host(e.to_string()))?;
    let (requests, failures) = (mailbox.clone(), mailbox.clone());
    let send: SendRequest = Box::new(move |request| {
        let asks = request.command == Command::GetInstance;
        match bulletin.instance().filter(|_| asks) {
            Some(instance) => request.reply.send(Ok(Answer::Instance(instance))),
            None => requests.send(Event::Request(request)),
        }
    });
    let failed = move |why| failures.send(Event::LoopEnded(why));
    ApiThread::start(socket, args.max_body_bytes, send, workers, failed)
        .map_err(|e| Failure::Host(e.to_string()))
}

/// Has every thread that is confined from now on confined by the filters at `path`, too. Firecracker's exit code for wrong ones is 1.
fn add_filters(path: &Path) -> Result<(), Failure> {
    let option = |why: String| Failure::Host(format!("--seccomp-filter: {why}"));
    let bytes = description::read_text(path).map_err(|e| option(e.into_text()))?;
    ExtraFilters::from_bytes(&bytes)
        .and_then(alveole_thread_sandbox::set_extra_filters)
        .map_err(|e| option(format!("{path:?}: {e}")))
}

/// As many descriptors as the host allows: each connection of the socket device is one, and the usual limit of 1024 is there for programs that
/// use select().
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    // Where it cannot be had, whoever runs out says so.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        log::warn!("the limit on open files stays {soft}: {e}");
    }
}

/// When this process started: the processor time it has used so far lies between then and now.
fn process_start() -> Instant {
    let now = Instant::now();
    let used = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .map_or(Duration::ZERO, Duration::from);
    now.checked_sub(used).unwrap_or(now)
}

/// A panic gives the terminal back and says one line. No backtrace: it would read files, which no thread
/// may do once it is confined.
fn report_panics() {
    std::panic::set_hook(Box::new(|info| {
        alveole_serial::restore_terminal();
        exit::say(&format!(
            "this is a bug of the monitor, please report it: {info}"
        ));
    }));
}

fn print(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
