//! Commands about guests of images that are there.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, SystemTime};

use alveole_agent_client::{AgentError, Guest, Streams};
use alveole_agent_protocol::{Process, Refusal};
use alveole_instance::{Ask, Happened, InstanceError, LogReader, State, Vm, Vms, ask};
use anyhow::{Context, bail};
use clap::Subcommand;
use serde_json::json;

use super::copy::{End, copy};
use super::events::{EventsArgs, events};
use super::ports;
use super::run::{attached_to, set, start};
use super::stats::stats;
use super::terminal::{Raw, is_terminal, pass_signals, size};
use super::top::{TopArgs, top};
use super::update::{UpdateArgs, update};
use super::{Format, shortened, table};
use crate::places::Places;
use crate::{hint, print};

/// An agent that is alive answers.
pub(super) const AGENT_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at something that changes.
const LOOK: Duration = Duration::from_millis(20);
/// A keeper writes down the end of what was killed.
const END_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Subcommand)]
pub(crate) enum GuestCommand {
    /// List VMs
    Ps {
        /// Those that do not run, too
        #[arg(short, long)]
        all: bool,
        /// Ids alone
        #[arg(short, long)]
        quiet: bool,
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Run a further process in a VM
    Exec {
        /// Pass on what comes here
        #[arg(short, long)]
        interactive: bool,
        /// Give it a terminal
        #[arg(short, long)]
        tty: bool,
        /// Set a variable of the environment; repeatable
        #[arg(short, long, value_name = "NAME[=VALUE]")]
        env: Vec<String>,
        /// Where it starts [as the VM's process]
        #[arg(short, long, value_name = "FOLDER")]
        workdir: Option<String>,
        /// Who it is [as the VM's process]
        #[arg(short, long, value_name = "USER")]
        user: Option<String>,
        /// The VM
        vm: String,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy files and folders into a VM or out of it
    #[command(after_help = "\
Into a folder that is there, under its own name; else it gets the name that is said. `FOLDER/.` is what is in the folder. In the \
VM all of it is root's; here it is this user's, without set-user and set-group bits.")]
    Cp {
        /// What a link leads to, instead of the link
        #[arg(short = 'L', long)]
        follow_link: bool,
        /// A path, or VM:PATH
        from: End,
        /// A path, or VM:PATH
        to: End,
    },
    /// Show what a VM's process said
    Logs {
        /// And what it says from now on
        #[arg(short, long)]
        follow: bool,
        /// With the time of each line
        #[arg(short, long)]
        timestamps: bool,
        /// Not what is older: a time (2026-01-02T03:04:05Z) or so long ago (10m)
        #[arg(long, value_name = "WHEN", value_parser = super::time_or_ago)]
        since: Option<SystemTime>,
        /// The VM
        vm: String,
    },
    /// Show what VMs use, as this host and as they themselves see it
    Stats {
        /// One line each, and end
        #[arg(long)]
        no_stream: bool,
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: Format,
        /// The VMs [all that run]
        vms: Vec<String>,
    },
    /// Watch VMs: what they use, live, sorted and filtered
    Top(TopArgs),
    /// Show what happened to VMs
    Events(EventsArgs),
    /// Change what VMs are and may use, while they run as far as that goes
    Update(UpdateArgs),
    /// Be attached to a VM's process; Ctrl-P Ctrl-Q lets go of a terminal
    Attach {
        /// Pass nothing on
        #[arg(long)]
        no_stdin: bool,
        /// The VM
        vm: String,
    },
    /// Start VMs that have ended, with what they wrote
    Start {
        /// Be attached to it
        #[arg(short, long)]
        attach: bool,
        /// Pass on what comes here
        #[arg(short, long, requires = "attach")]
        interactive: bool,
        /// The VMs
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Ask VMs' processes to end, wait, then kill them
    Stop {
        /// How long they have, in seconds
        #[arg(short, long, value_name = "SECONDS", default_value = "10")]
        time: u32,
        /// Instead of the VM's own signal
        #[arg(short, long, value_parser = super::signal)]
        signal: Option<u8>,
        /// The VMs
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Send VMs' processes a signal
    Kill {
        /// A signal, by name or number
        #[arg(short, long, value_parser = super::signal, default_value = "KILL")]
        signal: u8,
        /// End the machine as it is instead, as if its power went: what it has not written out is lost
        #[arg(long)]
        machine: bool,
        /// The VMs
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Remove VMs, and what they wrote
    Rm {
        /// End those that run
        #[arg(short, long)]
        force: bool,
        /// The VMs
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Wait until VMs end, and print their exit statuses
    Wait {
        /// The VMs
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Show everything that is known of VMs, as JSON
    Inspect {
        /// The VMs
        #[arg(required = true)]
        vms: Vec<String>,
    },
    /// Give a VM that does not run another name
    Rename {
        /// The VM
        vm: String,
        /// Its new name
        name: String,
    },
}

pub(crate) fn guest(command: &GuestCommand) -> anyhow::Result<ExitCode> {
    let vms = Places::usual().vms();
    match command {
        GuestCommand::Ps { all, quiet, format } => ps(&vms, *all, *quiet, *format),
        GuestCommand::Exec {
            interactive,
            tty,
            env,
            workdir,
            user,
            vm,
            command,
        } => {
            let vm = vms.find(vm)?;
            let mut process = Process {
                args: command.clone(),
                terminal: None,
                input: *interactive,
                ..vm.record.process.clone()
            };
            for word in env {
                set(&mut process.env, word);
            }
            if let Some(folder) = workdir {
                process.cwd.clone_from(folder);
            }
            if let Some(user) = user {
                process.user.clone_from(user);
            }
            if *tty {
                process.terminal = Some(size().unwrap_or(alveole_agent_protocol::WindowSize {
                    rows: 24,
                    columns: 80,
                }));
            }
            Ok(exec(&vm, &process))
        }
        GuestCommand::Cp {
            follow_link,
            from,
            to,
        } => copy(&vms, from, to, *follow_link),
        GuestCommand::Logs {
            follow,
            timestamps,
            since,
            vm,
        } => logs(&vms.find(vm)?, *follow, *timestamps, *since),
        GuestCommand::Stats {
            no_stream,
            format,
            vms: names,
        } => stats(&vms, names, *no_stream, *format),
        GuestCommand::Top(args) => top(&vms, args),
        GuestCommand::Events(args) => events(&vms, args),
        GuestCommand::Update(args) => each(&vms, &args.vms, |vm| update(&vm, args)),
        GuestCommand::Attach { no_stdin, vm } => {
            let vm = vms.find(vm)?;
            Ok(attached_to(
                &vm,
                false,
                !no_stdin && vm.record.process.input,
            ))
        }
        GuestCommand::Start {
            attach,
            interactive,
            vms: names,
        } => {
            if *attach && names.len() > 1 {
                bail!("--attach is for one VM");
            }
            each(&vms, names, |vm| start(&vm, *attach, *interactive))
        }
        GuestCommand::Stop {
            time,
            signal,
            vms: names,
        } => each(&vms, names, |vm| {
            let what = Ask::Stop {
                signal: *signal,
                grace_ms: time.saturating_mul(1000),
            };
            let patience = Duration::from_secs(u64::from(*time)) + END_PATIENCE;
            end(&vm, &what, patience)?;
            done(&vm.name)
        }),
        GuestCommand::Kill {
            signal,
            machine,
            vms: names,
        } => each(&vms, names, |vm| {
            match *signal {
                _ if *machine => end(&vm, &Ask::Kill, END_PATIENCE)?,
                KILL => {
                    let what = Ask::Stop {
                        signal: Some(KILL),
                        grace_ms: 0,
                    };
                    end(&vm, &what, END_PATIENCE)?;
                }
                signal => ask(&vm, &Ask::Signal(signal))?,
            }
            done(&vm.name)
        }),
        GuestCommand::Rm { force, vms: names } => each(&vms, names, |vm| {
            let name = vm.name.clone();
            match *force {
                true => end_and_remove(&vms, vm)?,
                false => remove(&vms, vm)?,
            }
            done(&name)
        }),
        GuestCommand::Wait { vms: names } => each(&vms, names, |vm| {
            let status = wait(&vm, None)?.unwrap_or_default();
            done(&status.to_string())
        }),
        GuestCommand::Inspect { vms: names } => {
            let mut all = Vec::new();
            for name in names {
                all.push(facts(&vms.find(name)?)?);
            }
            let json = serde_json::to_string_pretty(&all).context("cannot write JSON")?;
            print(&format!("{json}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        GuestCommand::Rename { vm, name } => {
            vms.find(vm)?.rename(name)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Ends a VM that runs, and removes it.
pub(crate) fn end_and_remove(vms: &Vms, vm: Vm) -> anyhow::Result<()> {
    if vm.is_kept()? {
        end(&vm, &Ask::Kill, END_PATIENCE)?;
    }
    remove(vms, vm)
}

fn remove(vms: &Vms, vm: Vm) -> anyhow::Result<()> {
    let name = vm.name.clone();
    // Of one that was to be removed with its end, nothing is left.
    match vm.lock() {
        Ok(lock) => match vm.remove(&lock) {
            Err(_) if vms.find(&name).is_err() => Ok(()),
            removed => Ok(removed?),
        },
        Err(_) if vms.find(&name).is_err() => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn done(line: &str) -> anyhow::Result<ExitCode> {
    print(&format!("{line}\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Does the same with several; what goes wrong with one is said, and the others are done.
fn each(
    vms: &Vms,
    names: &[String],
    mut what: impl FnMut(Vm) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    let mut result = ExitCode::SUCCESS;
    for name in names {
        let done = vms.find(name).map_err(Into::into).and_then(&mut what);
        match done {
            Ok(code) if names.len() == 1 => return Ok(code),
            Ok(_) => {}
            Err(e) => {
                hint(&format!("{e:#}"));
                result = ExitCode::FAILURE;
            }
        }
    }
    Ok(result)
}

/// Asks for a VM's end and waits for it. One that does not run has ended.
fn end(vm: &Vm, what: &Ask, patience: Duration) -> anyhow::Result<()> {
    match ask(vm, what) {
        Ok(()) => {}
        Err(InstanceError::DoesNotRun(_)) if !vm.is_kept().unwrap_or(false) => return Ok(()),
        // It ends just now.
        Err(InstanceError::DoesNotRun(_)) => {}
        Err(e) => return Err(e.into()),
    }
    if wait(vm, Some(patience))?.is_none() && vm.is_kept().unwrap_or(false) {
        bail!(
            "the VM '{}' does not end within {} s: alveole kill --machine {} ends the machine as it is",
            vm.name,
            patience.as_secs(),
            vm.name
        );
    }
    Ok(())
}

/// Waits for a VM's end; gives its exit status. None: patience is at its end, or it was removed.
fn wait(vm: &Vm, patience: Option<Duration>) -> anyhow::Result<Option<u8>> {
    let begun = std::time::Instant::now();
    loop {
        match vm.state() {
            Ok(State::Ended(ended)) => return Ok(Some(ended.status)),
            Ok(State::Created | State::Lost) => return Ok(Some(LOST)),
            Ok(State::Kept(_)) => {}
            Err(InstanceError::Unknown(_)) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        if patience.is_some_and(|patience| begun.elapsed() > patience) {
            return Ok(None);
        }
        thread::sleep(LOOK);
    }
}

/// SIGKILL.
const KILL: u8 = 9;
/// The status of a VM whose keeper was killed.
const LOST: u8 = 137;

fn exec(vm: &Vm, process: &Process) -> ExitCode {
    let terminal = process.terminal.is_some();
    if !vm.is_kept().unwrap_or(false) {
        hint(&InstanceError::DoesNotRun(vm.name.clone()).to_string());
        return ExitCode::from(125);
    }
    let raw = (terminal && process.input && is_terminal()).then(Raw::enter);
    let guest = Guest::new(&vm.socket("vsock"), AGENT_PATIENCE);
    let streams = Streams {
        input: process
            .input
            .then(|| Box::new(io::stdin()) as Box<dyn Read + Send>),
        output: Some(Box::new(io::stdout())),
        errors: Some(Box::new(io::stderr())),
    };
    let exit = guest.run(process, streams, |controls, _| {
        vm.note(Happened::Exec {
            program: process.args.first().cloned().unwrap_or_default(),
        });
        if let Err(e) = pass_signals(controls, terminal) {
            hint(&format!("signals are not passed on: {e}"));
        }
    });
    drop(raw);
    match exit {
        Ok(exit) => ExitCode::from(exit.status()),
        Err(e) => {
            hint(&e.to_string());
            ExitCode::from(match &e {
                AgentError::Refused(r) if r.code == Refusal::NOT_EXECUTABLE => 126,
                AgentError::Refused(r) if r.code == Refusal::NOT_FOUND => 127,
                _ => 125,
            })
        }
    }
}

fn logs(
    vm: &Vm,
    follow: bool,
    timestamps: bool,
    since: Option<SystemTime>,
) -> anyhow::Result<ExitCode> {
    let mut reader = LogReader::open(&vm.at("log"));
    let (mut out, mut errors) = (io::stdout().lock(), io::stderr().lock());
    loop {
        // Before the last look: what was said until it ended is there then.
        let goes_on = follow && vm.is_kept().unwrap_or(false);
        while let Some(entry) = reader.next_entry().context("cannot read the VM's log")? {
            let is_old =
                |since| humantime::parse_rfc3339(&entry.time).is_ok_and(|time| time < since);
            if since.is_some_and(is_old) {
                continue;
            }
            let text = if timestamps {
                format!("{} {}", entry.time, entry.log)
            } else {
                entry.log
            };
            let written = if entry.stream == "stderr" {
                errors.write_all(text.as_bytes())
            } else {
                out.write_all(text.as_bytes())
            };
            match written {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                written => written.context("cannot write the log")?,
            }
        }
        out.flush().context("cannot write the log")?;
        if !goes_on {
            return Ok(ExitCode::SUCCESS);
        }
        thread::sleep(LOOK);
    }
}

/// A VM's state in one word, and since when.
fn word(state: &State) -> (String, Option<u64>) {
    match state {
        State::Created => ("created".into(), None),
        State::Kept(phase) => (phase.phase.clone(), Some(phase.started_ms)),
        State::Ended(ended) => (format!("exited ({})", ended.status), Some(ended.at_ms)),
        State::Lost => ("lost".into(), None),
    }
}

/// What a VM publishes by now, for people and for programs: one that does not run publishes nothing.
fn published_now(vm: &Vm, state: &State) -> (String, serde_json::Value) {
    let all = match state {
        State::Kept(_) => ports::published(&vm.record),
        _ => Vec::new(),
    };
    (ports::shown(&all), ports::as_json(&all))
}

fn facts(vm: &Vm) -> anyhow::Result<serde_json::Value> {
    let state = vm.state()?;
    let mut facts = serde_json::to_value(&vm.record).context("cannot write JSON")?;
    facts["name"] = json!(vm.name);
    facts["state"] = json!(word(&state).0.split(' ').next());
    facts["details"] = json!(state);
    facts["ports"] = published_now(vm, &state).1;
    facts["folder"] = json!(vm.folder());
    facts["sockets"] = json!(vm.run_folder());
    Ok(facts)
}

fn ps(vms: &Vms, all: bool, quiet: bool, format: Format) -> anyhow::Result<ExitCode> {
    let mut found = Vec::new();
    for vm in vms.list()? {
        match vm.state() {
            Ok(state) if all || matches!(state, State::Kept(_)) => found.push((vm, state)),
            Ok(_) | Err(InstanceError::Unknown(_)) => {}
            Err(e) => hint(&e.to_string()),
        }
    }
    // The newest first.
    found.sort_by_key(|(vm, _)| std::cmp::Reverse(vm.record.created_ms));
    let text = if quiet {
        found
            .iter()
            .map(|(vm, _)| format!("{}\n", vm.record.id))
            .collect()
    } else if format == Format::Json {
        let list: Vec<_> = found
            .iter()
            .map(|(vm, state)| {
                let (word, since_ms) = word(state);
                json!({
                    "id": vm.record.id, "name": vm.name, "image": vm.record.image, "command": vm.record.process.args,
                    "created_ms": vm.record.created_ms, "state": word, "since_ms": since_ms,
                    "cpus": vm.record.cpus, "memory_mib": vm.record.memory_mib, "labels": vm.record.labels,
                    "ports": published_now(vm, state).1,
                })
            })
            .collect();
        format!(
            "{}\n",
            serde_json::to_string_pretty(&list).context("cannot write JSON")?
        )
    } else {
        let rows = found.iter().map(|(vm, state)| {
            let (word, since) = word(state);
            vec![
                vm.record.id.clone(),
                vm.name.clone(),
                shortened(&vm.record.image),
                shortened(&vm.record.process.args.join(" ")),
                word,
                since.map(ago).unwrap_or_default(),
                published_now(vm, state).0,
            ]
        });
        table(
            &["ID", "NAME", "IMAGE", "COMMAND", "STATE", "SINCE", "PORTS"],
            rows.collect(),
        )
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn ago(ms: u64) -> String {
    let then = SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
    let ago = SystemTime::now().duration_since(then).unwrap_or_default();
    let ago = Duration::from_secs(ago.as_secs());
    let text = humantime::format_duration(ago).to_string();
    // The two largest units are enough.
    let words: Vec<_> = text.split(' ').take(2).collect();
    format!("{} ago", words.join(" "))
}
