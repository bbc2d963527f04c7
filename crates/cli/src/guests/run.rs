//! `alveole run IMAGE`: makes a VM, starts its keeper, and is attached to it until it ends.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Streams};
use alveole_agent_protocol::{Process, Refusal, WindowSize};
use alveole_host::{in_lab, programs};
use alveole_image::RunConfig;
use alveole_instance::{
    Attach, InstanceError, Limits, Record, Restart, State, Vm, attach, reached,
};
use anyhow::{Context, bail};

use super::keep::NOTE;
use super::limits::LimitArgs;
use super::ports;
use super::terminal::{Keys, Raw, is_terminal, pass_signals, size};
use super::volumes::{Memory, Volume, make_missing, placed, say_what_is_copied, write_changes};
use crate::image::here_or_pulled;
use crate::lab;
use crate::places::Places;
use crate::run::RunArgs;
use crate::size::{DiskSize, MemorySize};
use crate::{hint, print};

/// The status of what could not be started, as `docker run` has it.
const NOT_STARTED: u8 = 125;
/// SIGTERM, if the image says nothing.
pub(super) const USUAL_STOP_SIGNAL: u8 = 15;

/// What is for guests of images alone.
#[derive(clap::Args)]
pub(crate) struct ImageArgs {
    /// Keep the process's input open, and pass on what comes here
    #[arg(short, long, requires = "image")]
    pub(crate) interactive: bool,

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

    /// Publish each port that the image exposes on a free port of 127.0.0.1 (alveole ps shows them), but for those of -p
    #[arg(short = 'P', long, requires = "image")]
    publish_all: bool,

    /// Who the process is, by names of the image or by numbers [the image's]
    #[arg(short, long, value_name = "USER[:GROUP]", requires = "image")]
    user: Option<String>,

    /// The program, instead of the image's; an empty one is none
    #[arg(long, value_name = "PROGRAM", requires = "image")]
    entrypoint: Option<String>,

    /// Nothing of the root can be changed
    #[arg(long, requires = "image")]
    read_only: bool,

    // Not as a comment: rustdoc would take the brackets for links.
    #[arg(
        short,
        long,
        value_name = "HOST:GUEST[:ro]",
        requires = "image",
        help = "What lies at GUEST: a copy of a folder or file of this host, made at each start (what the VM writes stays in \
                the VM); with NAME:GUEST a volume, which outlives it (alveole volume) and is made if it is not there; with \
                GUEST alone a place of its own; repeatable"
    )]
    volume: Vec<Volume>,

    /// Memory as a folder, with options as size=64M; repeatable
    #[arg(long, value_name = "GUEST[:OPTION,...]", requires = "image")]
    tmpfs: Vec<Memory>,

    /// The size of /dev/shm [half of the memory]
    #[arg(long, value_name = "SIZE", requires = "image")]
    shm_size: Option<MemorySize>,

    /// A word about it, for people and programs; repeatable
    #[arg(long, value_name = "NAME[=VALUE]", requires = "image")]
    label: Vec<String>,

    /// What happens after its end
    #[arg(long, value_name = "no|on-failure[:N]|always", value_parser = restart, requires = "image")]
    restart: Option<Restart>,

    /// The signal that asks the process to end [the image's, or TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = super::signal, requires = "image")]
    stop_signal: Option<u8>,

    #[command(flatten)]
    pub(crate) limits: LimitArgs,
}

impl ImageArgs {
    /// Whether a terminal here is to be one for the process.
    pub(crate) fn wants_terminal(&self) -> bool {
        self.interactive || self.tty
    }

    /// What is asked for that cannot be had in the lab, and why; nothing there outlives the command.
    pub(crate) fn refused_in_lab(&self) -> Option<String> {
        if self.detach {
            return Some(
                "-d: the lab ends with the command that has entered it; leave -d out".into(),
            );
        }
        if self.publish_all {
            return Some("-P: nobody outside of the lab reaches a port in it; leave -P out".into());
        }
        if let Some(name) = self.volume.iter().find_map(Volume::outlives_vm) {
            return Some(format!(
                "-v {name}: what is written to a volume in the lab is forgotten; name a folder, of which the guest has a copy"
            ));
        }
        if !self.rm {
            return Some(
                "the VM is gone with the lab, and what it wrote: say so, with --rm".into(),
            );
        }
        None
    }

    /// The variables that the process has from this one: those that are named without a value.
    ///
    /// # Errors
    ///
    /// A file of them cannot be read.
    pub(crate) fn inherited(&self) -> anyhow::Result<Vec<String>> {
        let mut names = self.variables()?;
        names.retain(|word| !word.contains('='));
        Ok(names)
    }

    /// All variables as they were said, later ones after earlier ones.
    fn variables(&self) -> anyhow::Result<Vec<String>> {
        let mut words = Vec::new();
        for file in &self.env_file {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("cannot read --env-file '{}'", file.display()))?;
            let lines = text.lines().map(str::trim_start);
            let said = lines.filter(|l| !l.is_empty() && !l.starts_with('#'));
            words.extend(said.map(str::to_owned));
        }
        words.extend(self.env.iter().cloned());
        Ok(words)
    }
}

pub(super) fn restart(text: &str) -> Result<Restart, String> {
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

/// What is known of what is to be run.
struct Base {
    id: String,
    root_disk: PathBuf,
    config: RunConfig,
}

/// An image by its name or id, or a disk with a root file system, named by a path that begins with `/`, `./` or `../`.
fn base(name: &str) -> anyhow::Result<Base> {
    if ["/", "./", "../"]
        .iter()
        .any(|begin| name.starts_with(begin))
    {
        let root_disk = Path::new(name)
            .canonicalize()
            .with_context(|| format!("cannot use the disk '{name}' as an image"))?;
        return Ok(Base {
            id: String::new(),
            root_disk,
            config: RunConfig {
                cmd: vec!["/bin/sh".into()],
                ..RunConfig::default()
            },
        });
    }
    let image = here_or_pulled(name)?;
    Ok(Base {
        id: image.id.to_string(),
        root_disk: image.root_disk,
        config: image.config,
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
        Ok(begun) => Ok(attached_from_start(begun, args.for_image.interactive)),
        Err(e) => {
            hint(&format!("{e:#}"));
            Ok(ExitCode::from(NOT_STARTED))
        }
    }
}

/// A VM whose keeper can be asked.
pub(super) struct Begun {
    pub(super) vm: Vm,
    pub(super) keeper: Child,
    told: BufReader<std::process::ChildStdout>,
}

fn begin(args: &RunArgs, image_name: &str, mut network: Vec<String>) -> anyhow::Result<Begun> {
    let more = &args.for_image;
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
    let base = base(image_name)?;
    let process = process(args, &base.config)?;
    if args.lab && !in_lab() {
        match lab::enter(args)? {}
    }
    let volumes = placed(&more.volume, &more.tmpfs, &base.config.volumes)?;
    let disk_bytes = disk_bytes(args, write_changes(&volumes))?;
    let published_free = match more.publish_all {
        true => ports::exposed_on_free(&args.network, &base.config.exposed_ports)?,
        false => Vec::new(),
    };
    let cpu_config = args.cpu_config.as_ref().map(|path| {
        path.canonicalize()
            .with_context(|| format!("cannot use --cpu-config '{}'", path.display()))
    });
    let cpu_config = cpu_config.transpose()?;
    let id = Record::new_id()?;
    let name = args.network.name().unwrap_or_else(|| format!("vm-{id}"));
    network.push(format!("--name={name}"));
    let mut limits = Limits::default();
    more.limits.change(&mut limits);
    let hostname = args.network.hostname().unwrap_or_else(|| name.clone());
    let record = Record {
        version: Record::VERSION,
        image: image_name.into(),
        image_id: base.id,
        created_ms: now_ms(),
        root_disk: base.root_disk,
        kernel: kernel.name,
        cpus: args.cpus,
        memory_mib: args.memory.mib(),
        disk_bytes,
        read_only: more.read_only,
        hostname,
        network,
        published_free,
        process,
        stop_signal: stop_signal(more.stop_signal, &base.config),
        labels: labels(&more.label),
        restart: more.restart.unwrap_or_default(),
        remove: more.rm,
        limits,
        cpu_config,
        shm_bytes: more.shm_size.map(|size| size.mib() << 20),
        volumes,
        id,
    };
    let vms = places.vms();
    vms.sweep();
    make_missing(&places, &record.volumes)?;
    let vm = vms.create(&name, &record)?;
    reached("created");
    say_what_is_copied(&record);
    start_keeper(&vm, (!more.detach).then_some("--with-client").as_slice())
}

/// The usual size of a disk for changes: it is sparse.
pub(super) const USUAL_DISK_BYTES: u64 = 10 << 30;

/// The size of the disk that takes changes: those of the root, and those of what lies in it.
fn disk_bytes(args: &RunArgs, for_volumes: bool) -> anyhow::Result<Option<u64>> {
    if args.for_image.read_only && !for_volumes {
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

/// Words about something, as pairs.
pub(crate) fn labels(words: &[String]) -> BTreeMap<String, String> {
    let pair = |word: &String| match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), value.to_owned()),
        None => (word.clone(), String::new()),
    };
    words.iter().map(pair).collect()
}

/// What was said, or what the image says, if it can be understood: others wrote it.
fn stop_signal(said: Option<u8>, image: &RunConfig) -> u8 {
    said.or_else(|| super::signal(&image.stop_signal).ok())
        .unwrap_or(USUAL_STOP_SIGNAL)
}

/// The image's process, with what was said instead: as of containers, a program that is said takes the place of the image's entrypoint and
/// arguments, arguments that are said that of its arguments.
fn process(args: &RunArgs, image: &RunConfig) -> anyhow::Result<Process> {
    let more = &args.for_image;
    let mut env = Vec::new();
    for word in image.env.iter().filter(|word| word.contains('=')) {
        set(&mut env, word);
    }
    for word in &more.variables()? {
        set(&mut env, word);
    }
    let mut words = match &more.entrypoint {
        Some(program) => vec![program.clone()],
        None => image.entrypoint.clone(),
    };
    // An empty one is none.
    words.retain(|word| !word.is_empty());
    match (args.command.as_slice(), &more.entrypoint) {
        ([], None) => words.extend(image.cmd.iter().cloned()),
        (said, _) => words.extend(said.iter().cloned()),
    }
    if words.is_empty() {
        bail!("the image says no program to run: give one, behind the image's name");
    }
    let size = || {
        size().unwrap_or(WindowSize {
            rows: 24,
            columns: 80,
        })
    };
    Ok(Process {
        args: words,
        env,
        cwd: more
            .workdir
            .clone()
            .unwrap_or_else(|| image.working_dir.clone()),
        make_cwd: true,
        user: more.user.clone().unwrap_or_else(|| image.user.clone()),
        terminal: more.tty.then(size),
        input: more.interactive,
        outlives_session: false,
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

pub(super) fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Starts a VM's keeper, and waits until it can be asked.
pub(super) fn start_keeper(vm: &Vm, words: &[&str]) -> anyhow::Result<Begun> {
    let exe = std::env::current_exe().context("cannot find out which program this is")?;
    let mut command = Command::new(exe);
    command.args(["keep", &vm.name]).args(words);
    // One that serves does so as long as this is open.
    let mut keeper = command
        .stdin(match words.contains(&"--serve") {
            true => Stdio::piped(),
            false => Stdio::null(),
        })
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
    /// What the keeper says next about how far it is; what is for people goes to standard error.
    pub(super) fn hear(&mut self) -> anyhow::Result<String> {
        loop {
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
            let line = line.trim_end();
            let Some(note) = line.strip_prefix(NOTE) else {
                return Ok(line.to_owned());
            };
            // The terminal may be the guest's by now.
            let end = match self.vm.record.process.terminal {
                Some(_) => "\r",
                None => "",
            };
            hint(&format!("{note}{end}"));
        }
    }
}

/// Starts a VM that was stopped.
pub(super) fn start(vm: &Vm, attached: bool, interactive: bool) -> anyhow::Result<ExitCode> {
    say_what_is_copied(&vm.record);
    let begun = start_keeper(vm, attached.then_some("--with-client").as_slice())?;
    if attached {
        return Ok(attached_from_start(begun, interactive));
    }
    Ok(started(begun, &vm.name))
}

/// Is attached to a VM that begins, and hears what its keeper has to say meanwhile.
fn attached_from_start(mut begun: Begun, interactive: bool) -> ExitCode {
    let vm = begun.vm.clone();
    std::thread::scope(|scope| {
        // Whatever went wrong, who is attached is told as well.
        scope.spawn(|| drop(begun.hear()));
        attached_to(&vm, true, interactive)
    })
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

/// With --rm nothing of it is left when its command ends, as scripts expect that run the next one by the same name.
fn wait_until_removed(vm: &Vm) {
    /// Its keeper lets go of who is attached, and removes a folder.
    const PATIENCE: Duration = Duration::from_secs(10);
    let until = Instant::now() + PATIENCE;
    while vm.at("vm.json").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
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
    if first && vm.record.remove && !detached.load(Ordering::Relaxed) {
        wait_until_removed(vm);
    }
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
