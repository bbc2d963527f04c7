//! The thin VMM: one process runs one guest.
//!
//! Reads the description, opens what the host must give, has the machine built and run, and says how it
//! ended. Knows no device, no register and no KVM request; all of that is below `alveole_machine`.

mod cli;
mod description;
mod exit;
mod logger;
mod metrics;
mod signals;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use alveole_hypervisor_kvm::KvmPartition;
use alveole_machine::{Event, HostResources, Machine, Mailbox, Options};
use alveole_serial::{Console, ConsoleTarget};
use alveole_vm_config::{LogLevel, VmConfig};
use cli::{Args, Request};
use exit::Failure;

/// How often counters are written; Firecracker's period.
const METRICS_PERIOD: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let started = process_start();
    report_panics();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Request::Help) => print(cli::HELP),
        Ok(Request::Version) => print(concat!("alveole-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Request::Run(args)) => match run(&args, started) {
            Ok(code) => code,
            Err(failure) => exit::failed(&failure),
        },
        Err(text) => exit::failed(&Failure::Usage(text)),
    }
}

fn run(args: &Args, started: Instant) -> Result<ExitCode, Failure> {
    let config = description::read(args)?;
    start_logger(args, &config).map_err(Failure::Host)?;
    let valid = alveole_machine::validate(&config).map_err(|broken| {
        let all: Vec<_> = broken.iter().map(ToString::to_string).collect();
        Failure::Config(format!("this machine cannot be built: {}", all.join("; ")))
    })?;
    let metrics_path = args.metrics_path.as_ref();
    let metrics_path = metrics_path.or(config.metrics.as_ref().map(|m| &m.metrics_path));
    let mut metrics = metrics_path
        .map(|path| metrics::MetricsFile::open(path, started))
        .transpose()
        .map_err(Failure::Host)?;

    let host = |e: &dyn std::error::Error| Failure::Host(e.to_string());
    alveole_thread_sandbox::install_refusal_report(alveole_serial::restore_terminal)
        .map_err(|e| host(&e))?;
    let (mailbox, events) = Mailbox::new();
    let signals = signals::SignalWorker::new(mailbox.clone()).map_err(Failure::Host)?;
    let resources = HostResources::open(&valid).map_err(|e| Failure::Config(e.to_string()))?;
    let partition = KvmPartition::new().map_err(|e| host(&e))?;
    let target = console_target(args, &config);
    let options = Options {
        boot_timer: args.boot_timer,
        end_with_terminal: matches!(target, ConsoleTarget::Terminal),
        placement: args.placement,
        disk_threads: args.disk_threads,
        transport: args.transport,
    };
    let to_control = mailbox.clone();
    let console = Console::open(
        &target,
        Box::new(move |e| to_control.send(Event::Console(e))),
    )
    .map_err(|e| host(&e))?;
    let mut machine = alveole_machine::build(
        &valid,
        resources,
        console,
        Box::new(partition),
        vec![Box::new(signals)],
        (mailbox, events),
        options,
    )
    .map_err(|e| match e.blames_description() {
        true => Failure::Config(e.to_string()),
        false => host(&e),
    })?;

    let mut told = !args.boot_timer;
    let end = machine.run(METRICS_PERIOD, &mut |machine| {
        told = told || tell_boot_time(machine, started);
        if let Some(file) = &mut metrics {
            file.write(machine);
        }
    });
    drop(machine);
    Ok(exit::ended(&end))
}

fn start_logger(args: &Args, config: &VmConfig) -> Result<(), String> {
    let file = config.logger.clone().unwrap_or_default();
    logger::start(logger::Settings {
        path: args.log_path.as_deref().or(file.log_path.as_deref()),
        id: args
            .id
            .clone()
            .unwrap_or_else(|| "anonymous-instance".into()),
        level: args.level.or(file.level).unwrap_or(LogLevel::Warning),
        show_level: args.show_level || file.show_level.unwrap_or(false),
        show_origin: args.show_log_origin || file.show_log_origin.unwrap_or(false),
        module: args.module.clone().or(file.module),
    })
}

/// The command line wins over the file; neither: the terminal.
fn console_target(args: &Args, config: &VmConfig) -> ConsoleTarget {
    let from_file = config
        .serial
        .as_ref()
        .and_then(|s| s.serial_out_path.clone());
    let from_file = from_file.map(cli::file_console);
    args.console
        .clone()
        .or(from_file)
        .unwrap_or(ConsoleTarget::Terminal)
}

/// True when the guest's init has been seen and the times have been told.
fn tell_boot_time(machine: &Machine, started: Instant) -> bool {
    let milestones = machine.milestones();
    let (Some(first), Some(init)) = (milestones.first_instruction, milestones.booted) else {
        return false;
    };
    let ms = |at: Instant| at.saturating_duration_since(started).as_secs_f64() * 1000.0;
    exit::say(&format!(
        "boot timer: process start to first guest instruction {:.2} ms, to guest init {:.2} ms",
        ms(first),
        ms(init)
    ));
    true
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
