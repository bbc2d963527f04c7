//! `alveole run IMAGE`: makes a VM, starts its keeper, and is attached to it until it ends.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use alveole_agent_client::{AgentError, Streams};
use alveole_agent_protocol::{Process, Refusal};
use alveole_host::programs;
use alveole_instance::{Attach, InstanceError, Record, Restart, State, Vm, attach};
use anyhow::{Context, bail};

use super::terminal::{Keys, Raw, is_terminal, pass_signals, size};
use crate::places::Places;
use crate::run::RunArgs;
use crate::size::DiskSize;
use crate::{hint, print};

/// The status of what could not be started, as `docker run` has it.
const NOT_STARTED: u8 = 125;
/// SIGTERM, if the image says nothing.
const USUAL_STOP_SIGNAL: u8 = 15;

/// What is for guests of images alone.
#[derive(clap::Args)]
pub(crate) struct ImageArgs {
    /// Keep the process's input open, and pass on what comes here
    #[arg(short, long, requires = "image")]
    interactive: bool,

    /// Give the process a terminal
    #[arg(short, long, requires = "image")]
    tty: bool,

    /// Leave it running, and print its id
    #[arg(short, long, requires = "image")]
    detach: bool,

    /// Remove it, and what it wrote, when it ends
    #[arg(long, requires = "image", conflicts_with = "restart")]
    rm: bool,

    /// Set a variable of the environment; without a value it is this process's; repeatable
    #[arg(short, long, value_name = "NAME[=VALUE]", requires = "image")]
    env: Vec<String>,

    /// Set variables from a file, a NAME=VALUE on each line; repeatable
    #[arg(long, value_name = "FILE", requires = "image")]
    env_file: Vec<PathBuf>,

    /// Where the process starts [the image's]
    #[arg(short, long, value_name = "FOLDER", requires = "image")]
    workdir: Option<String>,

    /// Who the process is: USER[:GROUP], names of the image or numbers [the image's]
    #[arg(short, long, value_name = "USER", requires = "image")]
    user: Option<String>,

    /// The program, instead of the image's; an empty one is none
    #[arg(long, value_name = "PROGRAM", requires = "image")]
    entrypoint: Option<String>,

    /// Nothing of the root can be changed
    #[arg(long, requires = "image")]
    read_only: bool,

    /// A word about it, for people and programs; repeatable
    #[arg(long, value_name = "NAME[=VALUE]", requires = "image")]
    label: Vec<String>,

    /// What happens after its end: no, on-failure[:N] or always
    #[arg(long, value_name = "WHAT", value_parser = restart, requires = "image")]
    restart: Option<Restart>,

    /// The signal that asks the process to end [the image's, or TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = super::signal, requires = "image")]
    stop_signal: Option<u8>,
}

fn restart(text: &str) -> Result<Restart, String> {
    match text.split_once(':') {
        None if text == "no" => Ok(Restart::No),
        None if text == "always" => Ok(Restart::Always),
        None if text == "on-failure" => Ok(Restart::OnFailure(None)),
        Some(("on-failure", most)) if most.parse::<u32>().is_ok() => {
            Ok(Restart::OnFailure(most.parse().ok()))
        }
        _ => Err("write no, on-failure, on-failure:N or always".into()),
    }
}

/// What is known of an image.
struct Image {
    id: String,
    root_disk: PathBuf,
    process: Process,
    stop_signal: Option<u8>,
}

/// A disk with a root file system, named by its path.
fn image(name: &str) -> anyhow::Result<Image> {
    let path = Path::new(name);
    if !name.contains('/') {
        bail!(
            "there is no image '{name}'; a disk with a root file system (EROFS) is named by its path, as ./root.erofs"
        );
    }
    let root_disk = path
        .canonicalize()
        .with_context(|| format!("cannot use the image '{name}'"))?;
    Ok(Image {
        id: String::new(),
        root_disk,
        process: Process {
            args: vec!["/bin/sh".into()],
            ..Process::default()
        },
        stop_signal: None,
    })
}

/// Runs an image; gives the exit status of its process.
pub(crate) fn run_image(
    args: &RunArgs,
    image_name: &str,
    network: Vec<String>,
) -> anyhow::Result<ExitCode> {
    match begin(args, image_name, network) {
        Ok(begun) if args.for_image.detach => {
            let id = begun.vm.record.id.clone();
            Ok(started(begun, &id))
        }
        Ok(begun) => Ok(attached_to(&begun.vm, true, args.for_image.interactive)),
        Err(e) => {
            hint(&format!("{e:#}"));
            Ok(ExitCode::from(NOT_STARTED))
        }
    }
}

/// A VM whose keeper can be asked.
struct Begun {
    vm: Vm,
    keeper: Child,
    told: BufReader<std::process::ChildStdout>,
}

fn begin(args: &RunArgs, image_name: &str, mut network: Vec<String>) -> anyhow::Result<Begun> {
    let more = &args.for_image;
    if args.lab {
        bail!("--lab is for guests that are booted by --kernel and --initrd alone");
    }
    args.refuse_bare_options()?;
    if more.tty && !more.detach && more.interactive && !is_terminal() {
        bail!("-t with -i wants a terminal, and standard input is none: leave -t out");
    }
    programs::vmm()?;
    programs::agent()?;
    let places = Places::usual();
    let kernel = places
        .kernels()
        .get(args.kernel.as_ref().and_then(|k| k.to_str()))?;
    let image = image(image_name)?;
    let process = process(args, image.process)?;
    let id = Record::new_id()?;
    let name = args.network.name().unwrap_or_else(|| format!("vm-{id}"));
    network.push(format!("--name={name}"));
    let hostname = args.network.hostname().unwrap_or_else(|| name.clone());
    let record = Record {
        version: Record::VERSION,
        image: image_name.into(),
        image_id: image.id,
        created_ms: now_ms(),
        root_disk: image.root_disk,
        kernel: kernel.name,
        cpus: args.cpus,
        memory_mib: args.memory.mib(),
        disk_bytes: disk_bytes(args)?,
        read_only: more.read_only,
        hostname,
        network,
        process,
        stop_signal: more
            .stop_signal
            .or(image.stop_signal)
            .unwrap_or(USUAL_STOP_SIGNAL),
        labels: labels(&more.label),
        restart: more.restart.unwrap_or_default(),
        remove: more.rm,
        id,
    };
    let vms = places.vms();
    vms.sweep();
    let vm = vms.create(&name, &record)?;
    start_keeper(&vm, !more.detach)
}

/// The usual size of a disk for changes: it is sparse.
const USUAL_DISK_BYTES: u64 = 10 << 30;

fn disk_bytes(args: &RunArgs) -> anyhow::Result<Option<u64>> {
    if args.for_image.read_only {
        return Ok(None);
    }
    match args.disk.as_slice() {
        [] => Ok(Some(USUAL_DISK_BYTES)),
        [disk] => {
            let word = disk.path().display().to_string();
            let size: DiskSize = word.parse().map_err(|e| {
                anyhow::anyhow!("--disk {word}: with an image it is the size of the disk that takes its changes, as 10G ({e})")
            })?;
            Ok(Some(size.bytes()))
        }
        _ => bail!("--disk is given twice: with an image it is the size of its one disk"),
    }
}

fn labels(words: &[String]) -> BTreeMap<String, String> {
    let pair = |word: &String| match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (word.clone(), String::new()),
    };
    words.iter().map(pair).collect()
}

fn process(args: &RunArgs, image: Process) -> anyhow::Result<Process> {
    let more = &args.for_image;
    let mut env = image.env;
    for file in &more.env_file {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read --env-file '{}'", file.display()))?;
        let lines = text.lines().map(str::trim_start);
        for line in lines.filter(|l| !l.is_empty() && !l.starts_with('#')) {
            set(&mut env, line);
        }
    }
    for word in &more.env {
        set(&mut env, word);
    }
    let mut words = image.args;
    if !args.command.is_empty() || more.entrypoint.is_some() {
        words = Vec::new();
        words.extend(more.entrypoint.clone().filter(|e| !e.is_empty()));
        words.extend(args.command.clone());
    }
    Ok(Process {
        args: words,
        env,
        cwd: more.workdir.clone().unwrap_or(image.cwd),
        make_cwd: true,
        user: more.user.clone().unwrap_or(image.user),
        terminal: more.tty.then(|| {
            size().unwrap_or(alveole_agent_protocol::WindowSize {
                rows: 24,
                columns: 80,
            })
        }),
        input: more.interactive,
    })
}

/// Sets a variable; without a value it is this process's, if that has it.
pub(super) fn set(env: &mut Vec<(String, String)>, word: &str) {
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
        None => (word.to_owned(), std::env::var(word).ok()),
    };
    env.retain(|(known, _)| *known != name);
    env.extend(value.map(|value| (name, value)));
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Starts a VM's keeper, and waits until it can be asked.
fn start_keeper(vm: &Vm, with_client: bool) -> anyhow::Result<Begun> {
    let exe = std::env::current_exe().context("cannot find out which program this is")?;
    let mut command = Command::new(exe);
    command.args(["keep", &vm.name]);
    if with_client {
        command.arg("--with-client");
    }
    let mut keeper = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the VM's keeper")?;
    let told = keeper
        .stdout
        .take()
        .context("cannot hear the VM's keeper")?;
    let mut begun = Begun {
        vm: vm.clone(),
        keeper,
        told: BufReader::new(told),
    };
    match begun.hear()?.as_str() {
        "serves" => Ok(begun),
        why => bail!("the VM '{}' did not start: {why}", vm.name),
    }
}

impl Begun {
    /// What the keeper says next.
    fn hear(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.told
            .read_line(&mut line)
            .context("cannot hear the VM's keeper")?;
        if line.is_empty() {
            let status = self
                .keeper
                .wait()
                .context("cannot wait for the VM's keeper")?;
            bail!("the VM's keeper ended ({status}) without a word");
        }
        Ok(line.trim_end().to_owned())
    }
}

/// Starts a VM that was stopped.
pub(super) fn start(vm: &Vm, attached: bool, interactive: bool) -> anyhow::Result<ExitCode> {
    let begun = start_keeper(vm, attached)?;
    if attached {
        return Ok(attached_to(vm, true, interactive));
    }
    Ok(started(begun, &vm.name))
}

/// Waits until the process runs, and prints `what`.
fn started(mut begun: Begun, what: &str) -> ExitCode {
    match begun.hear() {
        Ok(word) if word == "runs" => match print(&format!("{what}\n")) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(why) => {
            hint(&format!("the VM '{}' did not start: {why}", begun.vm.name));
            status_of(&begun.vm).unwrap_or(ExitCode::from(NOT_STARTED))
        }
        Err(e) => {
            hint(&format!("{e:#}"));
            ExitCode::from(NOT_STARTED)
        }
    }
}

/// The status that a keeper wrote down, when it has.
fn status_of(vm: &Vm) -> Option<ExitCode> {
    for _ in 0..1000 {
        match vm.state() {
            Ok(State::Ended(ended)) => return Some(ExitCode::from(ended.status)),
            Ok(State::Kept(_)) => std::thread::sleep(std::time::Duration::from_millis(2)),
            _ => return None,
        }
    }
    None
}

/// Is attached to a VM until its process ends, or until the keys that let go.
pub(super) fn attached_to(vm: &Vm, first: bool, interactive: bool) -> ExitCode {
    let terminal = vm.record.process.terminal.is_some();
    let raw = (terminal && interactive && is_terminal()).then(Raw::enter);
    let detached = Arc::new(AtomicBool::new(false));
    let name = vm.name.clone();
    let input: Option<Box<dyn Read + Send>> = match (interactive, &raw) {
        (false, _) => None,
        (true, None) => Some(Box::new(io::stdin())),
        (true, Some(_)) => {
            // What waits for the guest's end does not wait for this: the process ends here.
            let before = raw.as_ref().and_then(Raw::before);
            let keys = Keys::new(&detached, move || {
                Raw::restore(before.as_ref());
                eprintln!(
                    "\nalveole: let go of '{name}', which goes on; alveole attach {name} is there again"
                );
                std::process::exit(0);
            });
            Some(Box::new(keys))
        }
    };
    let streams = Streams {
        input,
        output: Some(Box::new(io::stdout())),
        errors: Some(Box::new(io::stderr())),
    };
    let how = Attach {
        input: interactive,
        first,
        history: !first,
    };
    let exit = attach(vm, how, streams, |controls, _| {
        if terminal && let Some(size) = size() {
            controls.resize(size);
        }
        if let Err(e) = pass_signals(controls, terminal) {
            hint(&format!("signals are not passed on: {e}"));
        }
    });
    drop(raw);
    if detached.load(Ordering::Relaxed) {
        return ExitCode::SUCCESS;
    }
    match exit {
        Ok(exit) => ExitCode::from(exit.status()),
        Err(InstanceError::Agent(AgentError::Refused(refusal))) => {
            hint(&refusal.shown());
            ExitCode::from(match refusal.code.as_str() {
                Refusal::NOT_EXECUTABLE => 126,
                Refusal::NOT_FOUND => 127,
                _ => NOT_STARTED,
            })
        }
        Err(e) => {
            hint(&e.to_string());
            ExitCode::from(NOT_STARTED)
        }
    }
}
