//! The command line of `alveole-vmm`: text to [`Args`], nothing else. Firecracker's options are all known: one
//! whose function does not exist yet is refused, and says so, unless to ignore it does no harm.

use std::ffi::OsString;
use std::path::PathBuf;

use alveole_api_server::DEFAULT_MAX_BODY_BYTES;
use alveole_machine::{DiskThreads, Flatten, OnSigterm, Placement, Transport};
use alveole_serial::{ConsoleTarget, FileStart};
use alveole_vm_config::{LogLevel, Logger};

/// Name of a machine that nobody gave one; Firecracker's.
const DEFAULT_ID: &str = "anonymous-instance";

/// What `--help` prints.
pub(crate) const HELP: &str = "\
alveole-vmm: runs one virtual machine in this process

usage: alveole-vmm [--api-sock PATH] [{--config-file | --load-snapshot} FILE [--no-api]] [options]

  --api-sock PATH       serve Firecracker's API on a unix socket here
                        (default: /run/firecracker.socket, as Firecracker has it)
  --config-file FILE    description of the machine, as Firecracker reads it (JSON): the guest is
                        started at once, and not by a client of the API
  --load-snapshot FILE  snapshot to load, as PUT /snapshot/load has it (JSON): at once, and not by a
                        client of the API
  --template PATH       run no guest: prepare what --load-snapshot names, and make a copy of this process for each
                        who asks on a unix socket here (crates/process-template says how); a copy gets a command
                        line of its own, whose --load-snapshot names the same files
  --no-api              no API socket: run what the file describes
  --http-api-max-payload-size BYTES
                        largest body that the API takes (default: 51200)
  --metadata FILE       what the guest finds at the metadata service at first, as JSON
  --mmds-size-limit N   most bytes of it (default: as of a body of the API)
  --console WHERE       serial console: stdio (default), file:PATH, unix:PATH, none
  --kernel-memory HOW   share: map kernel and initrd copy-on-write, one copy for all guests;
                        copy: into the guest's own huge pages; auto (default): share where
                        the processor has nested paging, else copy, as faults are dear there
  --enable-pci          put devices on a PCI bus, with an interrupt for each queue, instead of
                        virtio-mmio register blocks
  --disk-threads WHICH  threads that serve disks: disk (default): one for each; queue: one for each
                        queue, as far as the host has processors; shared: that of all devices
  --on-sigterm WHAT     end (default): end at once, as by any other signal; power-button: ask the
                        guest to power off, and end at the second one
  --boot-timer          say how long it took from the start of this process to the first
                        guest instruction and to the guest's init
  --id ID               name of this machine in log lines (default: anonymous-instance)
  --log-path FILE       write log lines to FILE (default: standard error)
  --level LEVEL         Off, Error, Warning (default), Info, Debug or Trace
  --module PATH         only log lines whose module path starts with PATH
  --show-level          name the level in log lines
  --show-log-origin     name file and line of origin in log lines
  --metrics-path FILE   write counters to FILE, one JSON line a minute and one at the end
  --seccomp-filter FILE filters of your own, as Firecracker's seccompiler-bin compiles them: they come on top of
                        the built-in ones, and so only take rights away
  --no-seccomp          understood, and the filters stay (a warning says so)
  --start-time-us, --start-time-cpu-us, --parent-cpu-time-us N
                        what a jailer says of itself, for the times of the start in the counters
  --snapshot-version    the version of the form in which snapshots are written
  --describe-snapshot FILE
                        that in which the snapshot whose state is FILE was written
  --verify-snapshot FILE
                        look whether the snapshot whose state is FILE is whole, and what it is: exit status 152
                        where it is not; with --memory FILE its newest memory file is there
  --flatten-snapshot FILE --into-state FILE --into-memory FILE
                        make one full snapshot of that one and those it builds upon
  --version, --help

exit status: 0 the guest powered off, asked for a reset or was ended from the console, 4 its
kernel panicked, 5 a triple fault, 6 KVM could not run it, 1 the host failed, or the filters of
--seccomp-filter are wrong, 148 a system call was refused by the sandbox, 152 the description, or what it names, is wrong,
153 the command line is wrong, 156 the terminal is gone, or SIGHUP, 131 SIGQUIT; by SIGTERM and
SIGINT it dies, which shells show as 143 and 130
";

/// What a jailer says of itself, in microseconds: the monotonic clock when it started; the processor time that this process had used
/// before it became this program; and what processes before it had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Launched {
    pub(crate) start_us: Option<u64>,
    pub(crate) start_cpu_us: Option<u64>,
    pub(crate) parent_cpu_us: Option<u64>,
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Args {
    pub(crate) api_sock: PathBuf,
    pub(crate) max_body_bytes: usize,
    pub(crate) metadata: Option<PathBuf>,
    pub(crate) metadata_limit_bytes: Option<usize>,
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) load_snapshot: Option<PathBuf>,
    pub(crate) template: Option<PathBuf>,
    pub(crate) no_api: bool,
    pub(crate) console: Option<ConsoleTarget>,
    pub(crate) boot_timer: bool,
    pub(crate) placement: Option<Placement>,
    pub(crate) disk_threads: DiskThreads,
    pub(crate) transport: Transport,
    pub(crate) on_sigterm: OnSigterm,
    pub(crate) id: Option<String>,
    pub(crate) log_path: Option<PathBuf>,
    pub(crate) level: Option<LogLevel>,
    pub(crate) module: Option<String>,
    pub(crate) show_level: bool,
    pub(crate) show_log_origin: bool,
    pub(crate) metrics_path: Option<PathBuf>,
    pub(crate) launched: Launched,
    /// No filters were wished for. They stay: the program is right under them, and nobody is worse off.
    pub(crate) no_seccomp: bool,
    pub(crate) seccomp_filter: Option<PathBuf>,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            api_sock: "/run/firecracker.socket".into(),
            max_body_bytes: DEFAULT_MAX_BODY_BYTES,
            metadata: None,
            metadata_limit_bytes: None,
            config_file: None,
            load_snapshot: None,
            template: None,
            no_api: false,
            console: None,
            boot_timer: false,
            placement: None,
            disk_threads: DiskThreads::default(),
            transport: Transport::default(),
            on_sigterm: OnSigterm::default(),
            id: None,
            log_path: None,
            level: None,
            module: None,
            show_level: false,
            show_log_origin: false,
            metrics_path: None,
            launched: Launched::default(),
            no_seccomp: false,
            seccomp_filter: None,
        }
    }
}

impl Args {
    /// The machine's name.
    pub(crate) fn id(&self) -> &str {
        self.id.as_deref().unwrap_or(DEFAULT_ID)
    }

    /// What is said about the log.
    pub(crate) fn logger(&self) -> Logger {
        Logger {
            log_path: self.log_path.clone(),
            level: self.level,
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        }
    }
}

/// What to do.
#[derive(Debug)]
pub(crate) enum Request {
    Run(Box<Args>),
    Help,
    Version,
    SnapshotVersion,
    DescribeSnapshot(PathBuf),
    /// The state, and its newest memory file.
    VerifySnapshot(PathBuf, Option<PathBuf>),
    FlattenSnapshot(Flatten),
}

/// What is to be done with snapshots, without a machine.
#[derive(Default)]
struct Tool {
    verify: Option<PathBuf>,
    flatten: Option<PathBuf>,
    memory: Option<PathBuf>,
    into_state: Option<PathBuf>,
    into_memory: Option<PathBuf>,
}

impl Tool {
    fn request(self) -> Result<Option<Request>, String> {
        let Self {
            verify,
            flatten,
            memory,
            into_state,
            into_memory,
        } = self;
        let into = into_state.is_some() || into_memory.is_some();
        match (verify, flatten) {
            (Some(_), Some(_)) => Err(
                "--verify-snapshot and --flatten-snapshot exclude each other; leave one out".into(),
            ),
            (Some(_), None) | (None, None) if into => {
                Err("--into-state and --into-memory say where --flatten-snapshot FILE writes to; add that, or leave them out".into())
            }
            (Some(state), None) => Ok(Some(Request::VerifySnapshot(state, memory))),
            (None, Some(state)) => match (into_state, into_memory) {
                (Some(into_state), Some(into_memory)) => {
                    Ok(Some(Request::FlattenSnapshot(Flatten {
                        state,
                        memory,
                        into_state,
                        into_memory,
                    })))
                }
                _ => Err(
                    "--flatten-snapshot needs --into-state FILE and --into-memory FILE: add them"
                        .into(),
                ),
            },
            (None, None) if memory.is_some() => Err(
                "--memory says where the memory of --verify-snapshot or --flatten-snapshot is; add one of them, or leave it out"
                    .into(),
            ),
            (None, None) => Ok(None),
        }
    }
}

/// What can be said to a template; the rest is for its copies.
const OF_TEMPLATES: [&str; 8] = [
    "template",
    "load-snapshot",
    "id",
    "log-path",
    "level",
    "module",
    "show-level",
    "show-log-origin",
];

/// Longest `--id`, as Firecracker has it.
const MAX_ID_CHARS: usize = 64;

/// Reads the command line.
///
/// # Errors
/// A word that is not understood: what it is and what is expected.
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Request, String> {
    use lexopt::Arg::{Long, Short, Value};
    let mut args = Args::default();
    let mut tool = Tool::default();
    let mut seen: Vec<String> = Vec::new();
    let mut parser = lexopt::Parser::from_args(words);
    while let Some(word) = parser.next().map_err(|e| e.to_string())? {
        let name = match word {
            Short('h') => "help".into(),
            Short('V') => "version".into(),
            Long(name) => name.to_owned(),
            Short(other) => return Err(format!("unknown option -{other}")),
            Value(value) => return Err(format!("unexpected word {value:?}")),
        };
        if seen.contains(&name) {
            return Err(format!("--{name} is given twice; give it once"));
        }
        seen.push(name.clone());
        let mut text = || -> Result<String, String> {
            let value = parser.value().map_err(|e| e.to_string())?;
            value
                .into_string()
                .map_err(|v| format!("--{name} {}: not UTF-8", v.display()))
        };
        match name.as_str() {
            "help" => return Ok(Request::Help),
            "version" => return Ok(Request::Version),
            "snapshot-version" => return Ok(Request::SnapshotVersion),
            "describe-snapshot" => return Ok(Request::DescribeSnapshot(text()?.into())),
            "verify-snapshot" => tool.verify = Some(text()?.into()),
            "flatten-snapshot" => tool.flatten = Some(text()?.into()),
            "memory" => tool.memory = Some(text()?.into()),
            "into-state" => tool.into_state = Some(text()?.into()),
            "into-memory" => tool.into_memory = Some(text()?.into()),
            "no-api" => args.no_api = true,
            "no-seccomp" => args.no_seccomp = true,
            "seccomp-filter" => args.seccomp_filter = Some(text()?.into()),
            "boot-timer" => args.boot_timer = true,
            "enable-pci" => args.transport = Transport::Pci,
            "show-level" => args.show_level = true,
            "show-log-origin" => args.show_log_origin = true,
            "config-file" => args.config_file = Some(text()?.into()),
            "load-snapshot" => args.load_snapshot = Some(text()?.into()),
            "template" => args.template = Some(text()?.into()),
            "api-sock" => args.api_sock = text()?.into(),
            "metadata" => args.metadata = Some(text()?.into()),
            "mmds-size-limit" => args.metadata_limit_bytes = Some(number(&name, &text()?)?),
            "http-api-max-payload-size" => {
                args.max_body_bytes = number(&name, &text()?)?;
            }
            "start-time-us" => args.launched.start_us = Some(number(&name, &text()?)?),
            "start-time-cpu-us" => args.launched.start_cpu_us = Some(number(&name, &text()?)?),
            "parent-cpu-time-us" => args.launched.parent_cpu_us = Some(number(&name, &text()?)?),
            "log-path" => args.log_path = Some(text()?.into()),
            "metrics-path" => args.metrics_path = Some(text()?.into()),
            "module" => args.module = Some(text()?),
            "kernel-memory" => args.placement = placement(&text()?)?,
            "disk-threads" => args.disk_threads = disk_threads(&text()?)?,
            "on-sigterm" => args.on_sigterm = on_sigterm(&text()?)?,
            "console" => args.console = Some(console(&text()?)?),
            "level" => args.level = Some(level(&text()?)?),
            "id" => args.id = Some(id(text()?)?),
            _ => return Err(format!("unknown option --{name}")),
        }
    }
    if let Some(request) = tool.request()? {
        return Ok(request);
    }
    if args.template.is_some() {
        if args.load_snapshot.is_none() {
            return Err(
                "--template without --load-snapshot: there is nothing to prepare; add --load-snapshot FILE".into(),
            );
        }
        if let Some(other) = seen.iter().find(|name| !OF_TEMPLATES.contains(&&***name)) {
            return Err(format!(
                "--template and --{other} exclude each other: say --{other} to each copy"
            ));
        }
    }
    if args.no_seccomp && args.seccomp_filter.is_some() {
        return Err("--no-seccomp and --seccomp-filter exclude each other; leave one out".into());
    }
    if args.config_file.is_some() && args.load_snapshot.is_some() {
        return Err(
            "--config-file and --load-snapshot exclude each other: a snapshot says all of a machine; leave one out"
                .into(),
        );
    }
    if args.no_api && args.config_file.is_none() && args.load_snapshot.is_none() {
        return Err(
            "--no-api without --config-file: nobody could say what to run; add --config-file FILE, or --load-snapshot FILE"
                .into(),
        );
    }
    Ok(Request::Run(Box::new(args)))
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("--{name} {value:?}: expected a whole number from 0 up"))
}

fn placement(value: &str) -> Result<Option<Placement>, String> {
    match value {
        "auto" => Ok(None),
        "share" => Ok(Some(Placement::Map)),
        "copy" => Ok(Some(Placement::Copy)),
        _ => Err(format!(
            "--kernel-memory {value:?}: expected auto, share or copy"
        )),
    }
}

fn disk_threads(value: &str) -> Result<DiskThreads, String> {
    match value {
        "shared" => Ok(DiskThreads::Shared),
        "disk" => Ok(DiskThreads::PerDisk),
        "queue" => Ok(DiskThreads::PerQueue),
        _ => Err(format!(
            "--disk-threads {value:?}: expected disk, queue or shared"
        )),
    }
}

fn on_sigterm(value: &str) -> Result<OnSigterm, String> {
    match value {
        "end" => Ok(OnSigterm::End),
        "power-button" => Ok(OnSigterm::PressPowerButton),
        _ => Err(format!(
            "--on-sigterm {value:?}: expected end or power-button"
        )),
    }
}

fn console(value: &str) -> Result<ConsoleTarget, String> {
    match value.split_once(':') {
        None if value == "stdio" => Ok(ConsoleTarget::Terminal),
        None if value == "none" => Ok(ConsoleTarget::None),
        Some(("file", path)) if !path.is_empty() => Ok(file_console(path)),
        Some(("unix", path)) if !path.is_empty() => Ok(ConsoleTarget::Socket(path.into())),
        _ => Err(format!(
            "--console {value:?}: expected stdio, file:PATH, unix:PATH or none"
        )),
    }
}

/// A console file: what it held before stays, and nothing limits it but the disk.
pub(crate) fn file_console(path: impl Into<PathBuf>) -> ConsoleTarget {
    ConsoleTarget::File {
        path: path.into(),
        start: FileStart::Append,
        limit_bytes: None,
    }
}

fn level(value: &str) -> Result<LogLevel, String> {
    let known = [
        ("off", LogLevel::Off),
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warning),
        ("warning", LogLevel::Warning),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    known
        .into_iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(value))
        .map(|(_, level)| level)
        .ok_or_else(|| {
            format!("--level {value:?}: expected Off, Error, Warning, Info, Debug or Trace")
        })
}

fn id(value: String) -> Result<String, String> {
    let fits = (1..=MAX_ID_CHARS).contains(&value.chars().count());
    if fits && value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Ok(value);
    }
    Err(format!(
        "--id {value:?}: expected 1 to {MAX_ID_CHARS} letters, digits and hyphens"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Args, String> {
        match parse(line.split_whitespace().map(OsString::from))? {
            Request::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn firecrackers_words_are_understood() {
        let a = run("--no-api --config-file=vm.json --id a-1 --level warn --boot-timer").unwrap();
        assert_eq!(a.config_file, Some("vm.json".into()));
        assert!(a.no_api && a.boot_timer);
        assert_eq!(a.level, Some(LogLevel::Warning));
        assert_eq!(a.id.as_deref(), Some("a-1"));
        let a = run(
            "--api-sock /run/a.sock --http-api-max-payload-size 7 --start-time-us 1 --start-time-cpu-us 2 \
             --parent-cpu-time-us 3",
        )
        .unwrap();
        assert_eq!(a.api_sock, PathBuf::from("/run/a.sock"));
        assert_eq!(a.max_body_bytes, 7);
        let a = run("--load-snapshot l.json --no-api").unwrap();
        assert_eq!(a.load_snapshot, Some("l.json".into()));
        let a = run("--template t.sock --load-snapshot l.json --level info").unwrap();
        assert_eq!(a.template, Some("t.sock".into()));
        let a = run("--seccomp-filter f.bpf").unwrap();
        assert_eq!(a.seccomp_filter, Some("f.bpf".into()));
        assert_eq!(
            run("").unwrap().api_sock,
            PathBuf::from("/run/firecracker.socket")
        );
    }

    #[test]
    fn what_is_done_with_snapshots_is_said_in_any_order() {
        let words = |line: &str| parse(line.split_whitespace().map(OsString::from));
        assert!(matches!(
            words("--memory m --verify-snapshot s"),
            Ok(Request::VerifySnapshot(state, Some(_))) if state.as_os_str() == "s"
        ));
        let Ok(Request::FlattenSnapshot(flatten)) =
            words("--into-memory m --flatten-snapshot s --into-state t")
        else {
            panic!();
        };
        assert_eq!(flatten.into_state, PathBuf::from("t"));
        assert_eq!(flatten.memory, None);
        for line in [
            "--verify-snapshot s --flatten-snapshot s",
            "--verify-snapshot s --into-state t",
            "--flatten-snapshot s --into-state t",
            "--memory m",
            "--into-memory m",
        ] {
            assert!(words(line).unwrap_err().contains("--"), "{line}");
        }
    }

    /// Every option of Firecracker's own parser is either understood or refused with its reason.
    #[test]
    fn every_option_of_firecracker_is_known() {
        for option in [
            "api-sock x",
            "id x",
            "seccomp-filter x",
            "no-seccomp",
            "start-time-us 1",
            "start-time-cpu-us 1",
            "parent-cpu-time-us 1",
            "config-file x",
            "metadata x",
            "no-api --config-file x",
            "log-path x",
            "level info",
            "module x",
            "show-level",
            "show-log-origin",
            "metrics-path x",
            "boot-timer",
            "version",
            "snapshot-version",
            "describe-snapshot x",
            "http-api-max-payload-size 1",
            "mmds-size-limit 1",
            "enable-pci",
            "help",
        ] {
            let line = format!("--{option}");
            let parsed = parse(line.split_whitespace().map(OsString::from));
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
    }

    #[test]
    fn snapshots_can_be_asked_about() {
        let parsed = |line: &str| parse(line.split_whitespace().map(OsString::from));
        assert!(matches!(
            parsed("--snapshot-version"),
            Ok(Request::SnapshotVersion)
        ));
        let described = parsed("--describe-snapshot a/b");
        assert!(matches!(described, Ok(Request::DescribeSnapshot(p)) if p.as_os_str() == "a/b"));
        assert!(parsed("--describe-snapshot").is_err());
    }

    #[test]
    fn wrong_words_are_named() {
        for (line, want) in [
            ("--nope", "--nope"),
            ("-x", "-x"),
            ("stray", "stray"),
            ("--config-file", "config-file"),
            ("--level loud", "loud"),
            ("--id a/b", "a/b"),
            (
                "--console tty",
                "expected stdio, file:PATH, unix:PATH or none",
            ),
            ("--console file:", "expected stdio"),
            ("--kernel-memory huge", "expected auto, share or copy"),
            ("--disk-threads many", "expected disk, queue or shared"),
            ("--no-api=1", "no-api"),
            ("--no-api", "add --config-file FILE"),
            ("--id a --id b", "--id is given twice"),
            (
                "--http-api-max-payload-size many",
                "expected a whole number",
            ),
            ("--start-time-us -1", "expected a whole number"),
            ("--seccomp-filter", "seccomp-filter"),
            ("--seccomp-filter f --no-seccomp", "exclude each other"),
            ("--mmds-size-limit x", "expected a whole number"),
            ("--template t", "add --load-snapshot FILE"),
            (
                "--template t --load-snapshot l --api-sock a",
                "say --api-sock to each copy",
            ),
        ] {
            let e = run(line).unwrap_err();
            assert!(e.contains(want), "{line}: {e}");
        }
    }

    #[test]
    fn consoles() {
        assert!(matches!(
            run("--console none").unwrap().console,
            Some(ConsoleTarget::None)
        ));
        let a = run("--console unix:/run/x:y.sock").unwrap();
        assert!(
            matches!(a.console, Some(ConsoleTarget::Socket(p)) if p.as_os_str() == "/run/x:y.sock")
        );
    }
}
