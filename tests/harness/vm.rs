//! A guest in the making, a guest that runs, and how it ended.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

use crate::api_client::Client;

use super::console::{Console, Output, Reader, Settings, Terminal, connect, write};
use super::patience;
use super::sources::{self, Source, skip};

/// How long a boot may take, before patience.
const BOOT_SECONDS: u64 = 60;
/// What the guest's init says when it runs.
const END_OF_BOOT: &str = "alveole-guest: ready";
/// Console lines that a failure shows.
const SHOWN_LINES: usize = 25;
/// The unprivileged user everywhere.
pub(crate) const NOBODY: u32 = 65534;

/// A guest in the making.
#[derive(Debug)]
pub(crate) struct Vm {
    source: Source,
    memory_mib: u64,
    cpus: u32,
    words: String,
    console: Console,
    options: Vec<String>,
    drives: Vec<serde_json::Value>,
    interfaces: Vec<serde_json::Value>,
    vsock: Option<PathBuf>,
    cpu_config: Option<serde_json::Value>,
    metadata: Option<serde_json::Value>,
    inherits: Option<(u8, PathBuf)>,
    by_nobody: bool,
    /// The words for `alveole run`, if it is started by that.
    by_alveole: Option<Vec<String>>,
    takes_commands: bool,
    by_api: bool,
    /// The snapshot that is loaded instead.
    loads: Option<serde_json::Value>,
    tracks_dirty_pages: bool,
    huge_pages: &'static str,
    /// Nothing is described or started: tests do that.
    is_bare: bool,
}

impl Vm {
    /// A distribution's own bzImage; nothing, with the skip told, where it cannot run.
    #[track_caller]
    pub(crate) fn stock() -> Option<Self> {
        Self::of(sources::stock("ALVEOLE_TEST_KERNEL"))
    }

    /// The ELF file inside that bzImage.
    #[track_caller]
    pub(crate) fn stock_elf() -> Option<Self> {
        Self::of(sources::stock("ALVEOLE_TEST_VMLINUX"))
    }

    /// The kernel that boots quickest here, for tests that ask nothing of it.
    #[track_caller]
    pub(crate) fn any() -> Option<Self> {
        Self::of(sources::any())
    }

    #[track_caller]
    fn of(source: Result<Source, String>) -> Option<Self> {
        match source {
            Ok(source) => Some(Self {
                source,
                memory_mib: 256,
                cpus: 1,
                words: "console=ttyS0 panic=-1 quiet".into(),
                console: Console::default(),
                options: Vec::new(),
                drives: Vec::new(),
                interfaces: Vec::new(),
                vsock: None,
                cpu_config: None,
                metadata: None,
                inherits: None,
                by_nobody: false,
                by_alveole: None,
                takes_commands: false,
                by_api: false,
                loads: None,
                tracks_dirty_pages: false,
                huge_pages: "None",
                is_bare: false,
            }),
            Err(why) => {
                skip(&why);
                None
            }
        }
    }

    pub(crate) fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    pub(crate) fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// More words for the kernel's command line. The last of several equal ones counts.
    pub(crate) fn cmdline(mut self, words: &str) -> Self {
        self.words = format!("{} {words}", self.words);
        self
    }

    /// What the guest's init does after the boot.
    pub(crate) fn init_does(self, what: &str) -> Self {
        self.cmdline(&format!("alveole.do={what}"))
    }

    pub(crate) fn console(mut self, console: Console) -> Self {
        self.console = console;
        self
    }

    /// One more word for `alveole-vmm`.
    pub(crate) fn option(mut self, word: &str) -> Self {
        self.options.push(word.into());
        self
    }

    /// One more disk, as the description has it; `drive_id` is made up, `is_root_device` is false unless
    /// said, and flushes reach the medium.
    pub(crate) fn disk(mut self, path: &Path, more: serde_json::Value) -> Self {
        let mut drive = json!({
            "drive_id": format!("disk{}", self.drives.len()),
            "path_on_host": path,
            "is_root_device": false,
            "cache_type": "Writeback",
        });
        if let (Some(drive), serde_json::Value::Object(more)) = (drive.as_object_mut(), more) {
            drive.extend(more);
        }
        self.drives.push(drive);
        self
    }

    /// One more network interface over the tap `name`, as the description has it; `iface_id` is made up.
    pub(crate) fn tap(mut self, name: &str, more: serde_json::Value) -> Self {
        let mut interface = json!({
            "iface_id": format!("net{}", self.interfaces.len()),
            "host_dev_name": name,
        });
        if let (Some(interface), serde_json::Value::Object(more)) =
            (interface.as_object_mut(), more)
        {
            interface.extend(more);
        }
        self.interfaces.push(interface);
        self
    }

    /// The socket device, which listens at `path`.
    pub(crate) fn vsock(mut self, path: &Path) -> Self {
        self.vsock = Some(path.into());
        self
    }

    /// What its processors say of themselves.
    pub(crate) fn cpu_config(mut self, cpu_config: serde_json::Value) -> Self {
        self.cpu_config = Some(cpu_config);
        self
    }

    /// The metadata service, as the description has it.
    pub(crate) fn metadata(mut self, config: serde_json::Value) -> Self {
        self.metadata = Some(config);
        self
    }

    /// The monitor is started with `path` open as this descriptor.
    pub(crate) fn inherits(mut self, fd: u8, path: &Path) -> Self {
        self.inherits = Some((fd, path.into()));
        self
    }

    pub(crate) fn kernel(mut self, path: &Path) -> Self {
        self.source.kernel = path.into();
        self
    }

    pub(crate) fn initrd(mut self, path: &Path) -> Self {
        self.source.initrd = path.into();
        self
    }

    pub(crate) fn kernel_path(&self) -> &Path {
        &self.source.kernel
    }

    pub(crate) fn initrd_path(&self) -> &Path {
        &self.source.initrd
    }

    /// The kernel's command line.
    pub(crate) fn kernel_words(&self) -> String {
        let words = format!("{} {}", self.source.words, self.words);
        words.trim().to_owned()
    }

    /// Runs the monitor as a user without any right, on copies of the files that this user can read.
    pub(crate) fn run_by_nobody(mut self) -> Self {
        self.by_nobody = true;
        self
    }

    /// Starts it as people do, by `alveole run` and these words.
    pub(crate) fn by_alveole(mut self, words: &[&str]) -> Self {
        self.by_alveole = Some(words.iter().map(|word| (*word).to_owned()).collect());
        self
    }

    /// Lets the guest do what [`Running::ask`] says; it powers off with the word `exit`.
    pub(crate) fn takes_commands(mut self) -> Self {
        self.takes_commands = true;
        self.init_does("run:/commands")
    }

    /// Has it described and started by a client of the API, [`Running::client`], instead of by a file.
    pub(crate) fn by_api(mut self) -> Self {
        self.by_api = true;
        self
    }

    /// Pages that it writes are noted, for diff snapshots.
    pub(crate) fn tracks_dirty_pages(mut self) -> Self {
        self.tracks_dirty_pages = true;
        self
    }

    /// Which pages of the host its memory is made of, as the description says it.
    pub(crate) fn huge_pages(mut self, kind: &'static str) -> Self {
        self.huge_pages = kind;
        self
    }

    /// A monitor that waits for a client's first word.
    pub(crate) fn nothing_yet(mut self) -> Self {
        self.is_bare = true;
        self.by_api()
    }

    /// Has it go on from a snapshot, which a client of the API loads with this body. Nothing else that was said counts, but
    /// its console and options.
    pub(crate) fn loads(mut self, body: serde_json::Value) -> Self {
        self.loads = Some(body);
        self.by_api()
    }

    /// Starts it.
    pub(crate) fn boot(self) -> Running {
        let dir = tempfile::Builder::new()
            .prefix("alveole-test-")
            .tempdir()
            .unwrap();
        let mut command = self.command(dir.path());
        let terminal = (self.console == Console::Terminal).then(Terminal::open);
        match &terminal {
            Some(terminal) => {
                command.stdin(terminal.stdio()).stdout(terminal.stdio());
            }
            None => {
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
            }
        }
        let before = terminal.as_ref().map(Terminal::settings);
        let started = Instant::now();
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        // It holds the sides of the terminal that the child was given.
        drop(command);

        match &self.loads {
            Some(body) => {
                let mut client = Client::at(&dir.path().join("api"));
                client.done("PUT", "/snapshot/load", body.clone());
            }
            None if self.by_api && !self.is_bare => self.describe_and_start(dir.path()),
            None => {}
        }
        let (output, errors) = (Output::default(), Output::default());
        let errors_reader = Reader::start(child.stderr.take().unwrap(), errors.clone());
        let stdout = child.stdout.take();
        let mut readers = vec![errors_reader];
        match self.console {
            Console::Terminal => {
                let file = terminal.as_ref().unwrap().file();
                readers.push(Reader::start(file, output.clone()));
            }
            Console::Pipe => readers.push(Reader::start(stdout.unwrap(), output.clone())),
            Console::File => {
                readers.push(Reader::start(stdout.unwrap(), Output::default()));
                readers.push(Reader::follow(dir.path().join("console"), output.clone()));
            }
            Console::Socket => readers.push(Reader::start(stdout.unwrap(), Output::default())),
        }
        Running {
            stdin: child.stdin.take(),
            group: Pid::from_raw(i32::try_from(child.id()).unwrap()),
            child,
            dir,
            console: self.console,
            terminal,
            before,
            output,
            errors,
            readers,
            seen: 0,
            started,
            memory_mib: self.memory_mib,
            ended: false,
        }
    }

    fn command(&self, dir: &Path) -> Command {
        let mut kernel = self.source.kernel.clone();
        let mut initrd = self.source.initrd.clone();
        let mut monitor = PathBuf::from(env!("CARGO_BIN_EXE_alveole-vmm"));
        // Of another package: built with the whole workspace.
        let mut alveole = monitor.with_file_name("alveole");
        if self.takes_commands {
            let with = dir.join("kept-initrd-of-commands");
            fs::write(
                &with,
                add_file(&fs::read(&initrd).unwrap(), "commands", COMMANDS),
            )
            .unwrap();
            initrd = with;
        }
        if self.by_nobody {
            for path in [&mut kernel, &mut initrd, &mut monitor, &mut alveole] {
                let name = path.file_name().unwrap().display();
                let copy = dir.join(format!("kept-{name}"));
                // By a process of its own: what this one holds open for writing would be inherited by what another test starts at
                // the same time, and nobody can run a program that is open for writing.
                let copied = Command::new("cp").arg(&path).arg(&copy).status().unwrap();
                assert!(copied.success(), "cp {}", path.display());
                fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
                *path = copy;
            }
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        if let Some(words) = &self.by_alveole {
            let mut command = Command::new(alveole);
            command.args(["run", "--no-probe", "--kernel"]).arg(kernel);
            command.arg("--initrd").arg(initrd);
            let line = format!("{} {}", self.source.words, self.words);
            command.args(["--cmdline", line.trim()]);
            command.args(["--cpus", &self.cpus.to_string()]);
            command.args(["--memory", &self.memory_mib.to_string()]);
            command.args(words).env("ALVEOLE_VMM", monitor);
            return self.as_its_user(command);
        }
        let mut description = json!({
            "boot-source": {
                "kernel_image_path": kernel,
                "initrd_path": initrd,
                "boot_args": self.kernel_words(),
            },
            "machine-config": {
                "vcpu_count": self.cpus,
                "mem_size_mib": self.memory_mib,
                "track_dirty_pages": self.tracks_dirty_pages,
                "huge_pages": self.huge_pages,
            },
            "drives": self.drives,
            "network-interfaces": self.interfaces,
        });
        if !self.drives.is_empty() {
            description["entropy"] = json!({});
        }
        if let Some(path) = &self.vsock {
            description["vsock"] = json!({ "guest_cid": 3, "uds_path": path });
        }
        if let Some(cpu_config) = self.cpu_config.as_ref().or(self.source.cpu_config.as_ref()) {
            description["cpu-config"] = cpu_config.clone();
        }
        if let Some(metadata) = &self.metadata {
            description["mmds-config"] = metadata.clone();
        }
        let file = dir.join("vm.json");
        fs::write(&file, description.to_string()).unwrap();

        let mut command = match &self.inherits {
            None => Command::new(monitor),
            Some((fd, path)) => {
                let mut shell = Command::new("sh");
                let words = format!("exec {fd}<>\"$0\"; exec \"$@\"");
                shell.arg("-c").arg(words).arg(path).arg(monitor);
                shell
            }
        };
        if self.by_api {
            command.arg("--api-sock").arg(dir.join("api"));
        } else {
            command.arg("--config-file").arg(&file).arg("--no-api");
        }
        let at = |name: &str| dir.join(name).display().to_string();
        match self.console {
            Console::Pipe | Console::Terminal => {}
            Console::File => {
                command.args(["--console".into(), format!("file:{}", at("console"))]);
            }
            Console::Socket => {
                command.args(["--console".into(), format!("unix:{}", at("socket"))]);
            }
        }
        if !self.by_nobody {
            command.args(["--metrics-path".into(), at("metrics")]);
        }
        command.args(&self.options);
        self.as_its_user(command)
    }

    fn as_its_user(&self, mut command: Command) -> Command {
        command.process_group(0);
        if self.by_nobody && is_root() {
            // For root this also gives up the groups.
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

/// What a guest that takes commands runs; its console shows what each says and then its exit status.
const COMMANDS: &str = "#!/bin/sh
dmesg -n 1
stty -echo
echo takes-commands
while read -r line; do
    eval \"$line\"
    echo \"=$?=\"
done
";

/// An initramfs with one more file, executable, at its top: archives may follow each other
/// (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
fn add_file(initramfs: &[u8], name: &str, content: &str) -> Vec<u8> {
    let mut all = initramfs.to_vec();
    let mut add = |name: &str, mode: u32, content: &str| {
        all.resize(all.len().next_multiple_of(4), 0);
        // inode, mode, owner, group, links, time, size, four device numbers, length of the name, checksum.
        let [size, name_len] = [content.len(), name.len() + 1];
        let fields = [1, mode as usize, 0, 0, 1, 0, size, 0, 0, 0, 0, name_len, 0];
        all.extend_from_slice(b"070701");
        for field in fields {
            all.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        all.extend_from_slice(name.as_bytes());
        all.push(0);
        all.resize(all.len().next_multiple_of(4), 0);
        all.extend_from_slice(content.as_bytes());
    };
    add(name, 0o100_755, content);
    add("TRAILER!!!", 0, "");
    all
}

impl Vm {
    /// Says what the file says, one request for each part.
    fn describe_and_start(&self, dir: &Path) {
        let text = fs::read_to_string(dir.join("vm.json")).unwrap();
        let description: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut client = Client::at(&dir.join("api"));
        let parts = description.as_object().unwrap();
        // What names others comes after them.
        let (last, first): (Vec<_>, Vec<_>) = parts.iter().partition(|(p, _)| *p == "mmds-config");
        for (part, body) in first.into_iter().chain(last) {
            let part = part.replace("mmds-config", "mmds/config");
            match body {
                serde_json::Value::Array(devices) => {
                    for device in devices {
                        let id = device["drive_id"].as_str().or(device["iface_id"].as_str());
                        client.done("PUT", &format!("/{part}/{}", id.unwrap()), device.clone());
                    }
                }
                body => client.done("PUT", &format!("/{part}"), body.clone()),
            }
        }
        client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    }
}

/// How a monitor ended.
#[derive(Debug)]
pub(crate) struct End {
    /// Its exit code; 128 more than the signal that killed it, as in a shell.
    pub(crate) code: Option<i32>,
    /// The signal that killed it, if one did.
    pub(crate) signal: Option<i32>,
    /// What it said on standard error.
    pub(crate) stderr: String,
    /// What the guest said on the console.
    pub(crate) console: String,
    /// Its last line of counters; `null` if it wrote none.
    pub(crate) metrics: serde_json::Value,
    /// From its start to its end.
    pub(crate) elapsed: Duration,
    /// How the terminal was set before and after.
    pub(crate) terminal: Option<(Settings, Settings)>,
}

impl End {
    /// The one line which says how the machine ended.
    pub(crate) fn line(&self) -> &str {
        let last = self.stderr.lines().last().unwrap_or_default();
        last.strip_prefix("alveole-vmm: ").unwrap_or(last)
    }

    /// The code, with all that was said should it be another.
    #[track_caller]
    pub(crate) fn assert_code(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "{self}");
        self
    }

    /// Asserts that the last words on standard error begin like this and say where a vCPU stood.
    #[track_caller]
    pub(crate) fn assert_line(&self, begins: &str) -> &Self {
        assert!(self.line().starts_with(begins), "not {begins:?}: {self}");
        self
    }

    /// What the guest said after `label`, line by line.
    pub(crate) fn said(&self, label: &str) -> Vec<&str> {
        let lines = self.console.lines();
        lines.filter_map(|l| l.strip_prefix(label)).collect()
    }

    /// A counter of the last line of counters, summed over all sets that have it.
    pub(crate) fn counter(&self, name: &str) -> u64 {
        let sets = self.metrics.as_object().expect("there are counters");
        sets.values().filter_map(|set| set[name].as_u64()).sum()
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "ended with code {:?}, signal {:?}, after {:?}",
            self.code, self.signal, self.elapsed
        )?;
        f.write_str(&shown(&self.console, &self.stderr))
    }
}

/// Whether the tests run as root.
/// Whether users without rights, too, may have guests here.
pub(crate) fn kvm_is_open_to_all() -> bool {
    !is_root() || fs::metadata("/dev/kvm").is_ok_and(|m| m.permissions().mode() & 0o006 == 0o006)
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn shown(console: &str, stderr: &str) -> String {
    let lines: Vec<_> = console.lines().collect();
    let last = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
    format!(
        "--- the last of {} console lines ---\n{last}\n--- stderr ---\n{stderr}\n---",
        lines.len()
    )
}

/// A guest that runs. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    group: Pid,
    dir: TempDir,
    console: Console,
    terminal: Option<Terminal>,
    before: Option<Settings>,
    output: Output,
    errors: Output,
    readers: Vec<Reader>,
    /// Characters of the console that `wait_for` is done with.
    seen: usize,
    started: Instant,
    memory_mib: u64,
    ended: bool,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A client of its API, where it has one.
    pub(crate) fn client(&self) -> Client {
        Client::at(&self.file("api"))
    }

    /// Waits until the guest's init runs.
    #[track_caller]
    pub(crate) fn wait_for_boot(&mut self) {
        self.wait_for(END_OF_BOOT);
    }

    /// Waits until the console shows `text`, after what was waited for before.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) {
        let output = self.output.clone();
        self.seen = self.wait_in(&output, self.seen, text);
    }

    /// Waits until a guest that takes commands does.
    #[track_caller]
    pub(crate) fn wait_for_commands(&mut self) {
        self.wait_for("takes-commands\n");
    }

    /// Has a guest that takes commands do something; its exit status and what it said.
    #[track_caller]
    pub(crate) fn ask(&mut self, command: &str) -> (i32, String) {
        let start = self.seen;
        self.type_in(&format!("{command}\n"));
        loop {
            let line_start = self.seen;
            self.wait_for("\n");
            let output = self.output.text();
            let line = output[line_start..self.seen - 1].strip_suffix('=');
            if let Some((rest, status)) = line.and_then(|line| line.rsplit_once('='))
                && let Ok(status) = status.parse()
            {
                let said = &output[start..line_start + rest.len()];
                return (status, said.trim().to_owned());
            }
        }
    }

    /// Ends a guest that takes commands.
    #[track_caller]
    pub(crate) fn leave(mut self) -> End {
        self.type_in("exit 0\n");
        self.wait()
    }

    /// Whether the console has shown `text`.
    pub(crate) fn has_shown(&self, text: &str) -> bool {
        self.output.text().contains(text)
    }

    /// How many characters the console has shown.
    pub(crate) fn shown(&self) -> usize {
        self.output.text().len()
    }

    /// Waits until the console has shown `text`, wherever.
    #[track_caller]
    pub(crate) fn wait_for_anywhere(&mut self, text: &str) {
        let output = self.output.clone();
        self.wait_in(&output, 0, text);
    }

    /// Waits until the monitor says `text` on standard error.
    #[track_caller]
    pub(crate) fn wait_for_stderr(&mut self, text: &str) {
        let errors = self.errors.clone();
        self.wait_in(&errors, 0, text);
    }

    /// Waits until `text` is in `output` from `start` on, and returns where it ends.
    #[track_caller]
    fn wait_in(&mut self, output: &Output, start: usize, text: &str) -> usize {
        let until = Instant::now() + patience(BOOT_SECONDS);
        let mut after_the_end = 0;
        loop {
            let gone = self.child.try_wait().unwrap();
            let all = output.text();
            if let Some(at) = all.get(start..).and_then(|new| new.find(text)) {
                return start + at + text.len();
            }
            if let Some(status) = gone {
                // The readers may still have something on the way.
                after_the_end += 1;
                if after_the_end > 10 {
                    self.fail(&format!("ended ({status}) before it showed {text:?}"));
                }
            }
            if Instant::now() > until {
                self.fail(&format!("did not show {text:?} in time"));
            }
            output.wait_for_more(Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn fail(&self, what: &str) -> ! {
        panic!(
            "the guest {what}\n{}",
            shown(&self.output.text(), &self.errors.text())
        );
    }

    /// Types at the console.
    pub(crate) fn type_in(&mut self, text: &str) {
        match (&self.terminal, &mut self.stdin) {
            (Some(terminal), _) => write(terminal.file(), text),
            (None, Some(stdin)) => write(stdin, text),
            (None, None) => panic!("there is no way to type"),
        }
    }

    /// A client of the console socket; what it gets counts as the console from now on.
    pub(crate) fn attach(&mut self) -> std::os::unix::net::UnixStream {
        let stream = connect(&self.file("socket"), patience(10));
        let from = stream.try_clone().unwrap();
        self.readers.push(Reader::start(from, self.output.clone()));
        stream
    }

    /// From now on nobody reads the console.
    pub(crate) fn stop_reading(&self) {
        for reader in &self.readers[1..] {
            reader.pause();
        }
    }

    /// Takes the terminal away.
    pub(crate) fn hang_up(&mut self) {
        for reader in &self.readers[1..] {
            reader.close();
        }
        // The reader waits in the kernel: the echo of this wakes it, and it sees that it is over.
        self.type_in("\n");
        self.terminal = None;
        for reader in &mut self.readers[1..] {
            reader.finish();
        }
    }

    /// How the terminal is set now.
    pub(crate) fn settings(&self) -> Settings {
        self.terminal.as_ref().unwrap().settings()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.group, signal).unwrap();
    }

    /// A path in the test's own directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the kernel says about each thread: name and the lines of its `status`.
    pub(crate) fn threads(&self) -> Vec<(String, String)> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks
            .map(|task| {
                let task = task.unwrap().path();
                let name = fs::read_to_string(task.join("comm")).unwrap();
                let status = fs::read_to_string(task.join("status")).unwrap();
                (name.trim().to_owned(), status)
            })
            .collect()
    }

    /// Memory that the monitor has touched, without the guest's RAM.
    pub(crate) fn own_kib(&self) -> u64 {
        let maps = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        // RAM is several mappings side by side: pieces of the kernel's file lie in it.
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((from, to)) = first.split_once('-') {
                let at = |text| u64::from_str_radix(text, 16).unwrap();
                let (from, to) = (at(from), at(to));
                match runs.last_mut() {
                    Some(run) if run.1 == from => run.1 = to,
                    _ => runs.push((from, to, 0)),
                }
            } else if first == "Rss:" {
                let kib: u64 = words.next().unwrap().parse().unwrap();
                runs.last_mut().unwrap().2 += kib;
            }
        }
        let is_ram = |from, to| to - from >= self.memory_mib << 20;
        assert!(
            runs.iter().any(|&(from, to, _)| is_ram(from, to)),
            "the guest's RAM is not to be seen in smaps"
        );
        let own = runs.iter().filter(|&&(from, to, _)| !is_ram(from, to));
        own.map(|run| run.2).sum()
    }

    /// Waits for the end, and sees to it that nothing is left behind.
    #[track_caller]
    pub(crate) fn wait(mut self) -> End {
        let until = Instant::now() + patience(BOOT_SECONDS);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > until {
                self.fail("did not end in time");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let elapsed = self.started.elapsed();
        self.ended = true;
        let after = self.terminal.as_ref().map(Terminal::settings);
        self.finish_reading();
        let end = End {
            code: status.code().or_else(|| Some(128 + status.signal()?)),
            signal: status.signal(),
            stderr: self.errors.text(),
            console: self.output.text(),
            metrics: self.metrics(),
            elapsed,
            terminal: self.before.take().zip(after),
        };
        self.assert_nothing_is_left(&end);
        end
    }

    fn metrics(&self) -> serde_json::Value {
        let text = fs::read_to_string(self.file("metrics")).unwrap_or_default();
        let line = text.lines().last().unwrap_or("null");
        serde_json::from_str(line).unwrap()
    }

    #[track_caller]
    fn assert_nothing_is_left(&self, end: &End) {
        assert!(
            killpg(self.group, None::<Signal>).is_err(),
            "processes are left: {end}"
        );
        let known = ["vm.json", "metrics", "console", "kept-"];
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let expected = known.iter().any(|k| name.starts_with(k));
            // A killed process cannot tidy up.
            let excused = name == "socket" && end.signal.is_some();
            assert!(expected || excused, "{name} is left: {end}");
        }
    }

    fn finish_reading(&mut self) {
        // Our side of a terminal sees no end as long as we hold the other side as well.
        self.terminal = None;
        for reader in &mut self.readers {
            if self.console == Console::File {
                // A file has no end.
                reader.close();
            }
            reader.finish();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            let _ = killpg(self.group, Signal::SIGKILL);
            let _ = self.child.wait();
            self.finish_reading();
        }
    }
}
