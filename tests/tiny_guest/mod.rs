//! Runs the real `alveole-vmm` on tiny kernels and wrong input, and looks at what it leaves behind.

pub(crate) mod code;
pub(crate) mod filters;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use code::tiny_kernel;
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use tempfile::TempDir;

/// Nothing here takes longer, even in the lab. What does hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// `out` of one byte to a port.
pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee] // mov dx, port; mov al, value; out dx, al
}

/// Prints on the serial port.
pub(crate) fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|b| out(0x3f8, b)).collect()
}

/// Switches off through the sleep control port.
pub(crate) fn power_off() -> Vec<u8> {
    [out(0x600, 0x34), hang()].concat()
}

/// Sleeps for ever: hlt; jmp to it.
pub(crate) fn hang() -> Vec<u8> {
    vec![0xf4, 0xeb, 0xfd]
}

/// A folder with a description, a kernel and the output of the program beside it.
pub(crate) struct Bench {
    /// The program runs here; everything in it is listed before and after.
    dir: TempDir,
    /// Its standard error goes here.
    aside: TempDir,
    program: Command,
}

/// How the program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    /// What it said on standard error.
    pub(crate) said: String,
    /// Files that were not there before.
    pub(crate) left: Vec<String>,
}

/// A program that runs.
pub(crate) struct Running<'a> {
    bench: &'a Bench,
    pub(crate) child: Child,
    before: BTreeSet<String>,
}

impl Bench {
    /// A folder with the kernel `code` and its description `vm.json`.
    pub(crate) fn new(code: &[u8]) -> Self {
        let bench = Self {
            dir: TempDir::new().unwrap(),
            aside: TempDir::new().unwrap(),
            program: Command::new(env!("CARGO_BIN_EXE_alveole-vmm")),
        };
        bench.write("kernel", &tiny_kernel(code));
        bench.describe("kernel", 1, 64);
        bench
    }

    /// Runs the program through `words`, such as `prlimit`.
    pub(crate) fn through(mut self, words: &[&str]) -> Self {
        let mut program = Command::new(words[0]);
        program.args(&words[1..]).arg(self.program.get_program());
        self.program = program;
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.file(name), bytes).unwrap();
    }

    /// Describes a machine with this kernel, this many processors and MiB of memory.
    pub(crate) fn describe(&self, kernel: &str, cpus: u64, mib: u64) {
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": {kernel:?}}},
                "machine-config": {{"vcpu_count": {cpus}, "mem_size_mib": {mib}}}}}"#
        );
        self.write("vm.json", text.as_bytes());
    }

    /// A file of this length without content.
    pub(crate) fn sparse(&self, name: &str, size_bytes: u64) {
        File::create(self.file(name))
            .unwrap()
            .set_len(size_bytes)
            .unwrap();
    }

    /// Everything in the folder.
    fn listing(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path()).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn said_path(&self) -> PathBuf {
        self.aside.path().join("stderr")
    }

    /// A command for the program with `arguments`, in the folder, without input and output.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program.get_program());
        command
            .args(self.program.get_args())
            .args(arguments)
            .current_dir(self.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.said_path()).unwrap());
        command
    }

    /// Starts the program on `vm.json` with `more` arguments.
    pub(crate) fn start(&self, more: &[&str]) -> Running<'_> {
        let arguments = [&["--config-file", "vm.json", "--no-api"], more].concat();
        self.start_command(self.command(&arguments))
    }

    pub(crate) fn start_command(&self, mut command: Command) -> Running<'_> {
        let before = self.listing();
        let child = command.spawn().unwrap();
        Running {
            bench: self,
            child,
            before,
        }
    }

    /// Runs the program on `vm.json` without a console, to its end.
    pub(crate) fn run(&self) -> Ended {
        self.start(&["--console", "none"]).end()
    }

    /// Runs the program with these arguments only, to its end.
    pub(crate) fn run_with(&self, arguments: &[&str]) -> Ended {
        self.start_command(self.command(arguments)).end()
    }

    /// Runs it on a description with this text.
    pub(crate) fn run_text(&self, text: &[u8]) -> Ended {
        self.write("vm.json", text);
        self.run()
    }
}

impl Running<'_> {
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.bench.said_path()).unwrap()).into_owned()
    }

    /// Waits until `what` holds; false when the program ended first.
    pub(crate) fn wait_until(&mut self, mut what: impl FnMut() -> bool) -> bool {
        let until = Instant::now() + PATIENCE;
        while !what() {
            if self.child.try_wait().unwrap().is_some() {
                return what();
            }
            assert!(
                Instant::now() < until,
                "waited in vain; it said: {}",
                self.said()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Whether it ends within `patience`.
    pub(crate) fn ends_within(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.child.try_wait().unwrap().is_none() {
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.id()).unwrap());
        nix::sys::signal::kill(id, signal).unwrap();
    }

    /// Waits for the end and looks at what is left.
    pub(crate) fn end(mut self) -> Ended {
        assert!(
            self.ends_within(PATIENCE),
            "it hangs; it said: {}",
            self.said()
        );
        let status = self.child.wait().unwrap();
        let left = self
            .bench
            .listing()
            .difference(&self.before)
            .cloned()
            .collect();
        assert_eq!(
            processes_in(self.bench.path()),
            Vec::<String>::new(),
            "processes are left"
        );
        Ended {
            status,
            said: self.said(),
            left,
        }
    }
}

/// A test that fails leaves no program behind.
impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// Its exit code; 128 more than the signal that killed it, as in a shell.
    pub(crate) fn code(&self) -> Option<i32> {
        let killed = || Some(128 + self.status.signal()?);
        self.status.code().or_else(killed)
    }

    /// That it ended with this code, said all of `words` and left nothing behind.
    #[track_caller]
    pub(crate) fn assert(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code(), Some(code), "{words:?}: {self:?}");
        for word in words {
            assert!(self.said.contains(word), "does not say {word:?}: {self:?}");
        }
        assert!(self.left.is_empty(), "files are left: {self:?}");
    }

    /// That it ended by itself: no signal, no panic.
    #[track_caller]
    pub(crate) fn assert_orderly(&self, input: &dyn std::fmt::Debug) {
        let orderly = [0, 1, 3, 4, 5, 6, 143, 152, 153];
        let code = self.code();
        assert!(
            code.is_some_and(|c| orderly.contains(&c)),
            "signal {:?}, {self:?} after {input:?}",
            self.status.signal()
        );
        assert!(
            !self.said.contains("bug of the monitor"),
            "{self:?} after {input:?}"
        );
    }
}

/// Processes whose current directory is `dir`.
fn processes_in(dir: &Path) -> Vec<String> {
    let numbers = fs::read_dir("/proc").unwrap().map(|e| e.unwrap().path());
    numbers
        .filter(|p| fs::read_link(p.join("cwd")).is_ok_and(|cwd| cwd == dir))
        .map(|p| p.display().to_string())
        .collect()
}

/// Whether the guest can run here; says so loudly if it cannot.
pub(crate) fn no_kvm(test: &str) -> bool {
    let missing = !Path::new("/dev/kvm").exists();
    if missing {
        skipped(test, "no /dev/kvm on this machine");
    }
    missing
}

/// Says that a test did not test anything.
pub(crate) fn skipped(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut log = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}

/// A pseudo terminal: what a person sees, and what the program has. Not inherited by programs of other
/// tests: they would keep it alive.
pub(crate) fn terminal() -> (File, OwnedFd) {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits());
    let slave = options.open(ptsname_r(&master).unwrap()).unwrap();
    (File::from(OwnedFd::from(master)), slave.into())
}

/// Starts a guest that says "up" on a terminal and waits until it is seen there.
pub(crate) fn start_on<'a>(bench: &'a Bench, slave: &OwnedFd, master: &mut File) -> Running<'a> {
    start_on_with(bench, slave, master, &[])
}

/// The same, with more words for the program.
pub(crate) fn start_on_with<'a>(
    bench: &'a Bench,
    slave: &OwnedFd,
    master: &mut File,
    more: &[&str],
) -> Running<'a> {
    let words = [&["--config-file", "vm.json", "--no-api"], more].concat();
    let mut command = bench.command(&words);
    let end = || Stdio::from(slave.try_clone().unwrap());
    command.stdin(end()).stdout(end());
    let running = bench.start_command(command);
    let mut seen = Vec::new();
    while !seen.ends_with(b"up\n") {
        let mut byte = [0];
        master.read_exact(&mut byte).unwrap();
        seen.push(byte[0]);
        seen.retain(|b| *b != b'\r');
    }
    running
}
