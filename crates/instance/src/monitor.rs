//! The monitor's process, and what is seen of its guest from outside.

use std::fs::{self, File};
use std::io::{self, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use alveole_process_template::{AskError, Copy, HowEnded};
use rustix::process::{PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};

use crate::{Happened, Vm};

/// A console's text that has grown so far is put aside, and the one before it is gone.
const MAX_CONSOLE_BYTES: u64 = 1 << 20;
/// The monitor's exit status where the guest's kernel panicked.
const PANICKED: i32 = 4;
/// So often in one run of the machine it is written down that the guest was out of memory: a guest can be so, or say so, for ever.
const MAX_OOM_EVENTS: u32 = 16;
/// The longest line of a console that is looked at.
const MAX_LOOKED_AT_BYTES: usize = 1024;
/// How much of what the monitor said last is told.
const TOLD_BYTES: usize = 600;
/// So much of a console is looked through for what was said last.
const TOLD_LINES_BYTES: usize = 4096;
/// What the agent's words on the console begin with: behind those about what it cannot do it powers the machine off.
const AGENT_WORD: &str = "alveole-agent: ";
/// So long the last of a console is waited for, where the monitor has ended.
const CONSOLE_PATIENCE: Duration = Duration::from_millis(200);

/// A process that has the snapshot prepared, and gives a monitor of it sooner than a program that is executed: see `alveole_process_template`.
#[derive(Debug)]
pub struct MonitorTemplate {
    /// Where it is asked.
    pub socket: PathBuf,
    /// The descriptors that the monitor's words name.
    pub descriptors: Vec<RawFd>,
}

/// The monitor, which ends with this.
pub(crate) struct Monitor {
    process: Process,
    said: PathBuf,
    console: PathBuf,
    console_keeper: thread::JoinHandle<()>,
    /// Goes after the monitor.
    _held: Vec<Box<dyn Send>>,
}

/// The monitor's process.
enum Process {
    /// A child of ours.
    Child(Child),
    /// A child of a template.
    Copy(Copy),
}

impl Process {
    fn how_ended(&mut self) -> Option<HowEnded> {
        match self {
            Self::Child(child) => match child.try_wait() {
                Ok(None) => None,
                Ok(Some(status)) => Some(how(status)),
                Err(_) => Some(HowEnded::Unknown),
            },
            Self::Copy(copy) => copy.try_wait(),
        }
    }

    fn kill(&mut self) {
        match self {
            Self::Child(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            Self::Copy(copy) => {
                copy.kill();
                copy.wait();
            }
        }
    }
}

fn how(status: ExitStatus) -> HowEnded {
    match (status.code(), status.signal()) {
        (Some(code), _) => HowEnded::Code(code),
        (_, Some(signal)) => HowEnded::Signal(signal),
        _ => HowEnded::Unknown,
    }
}

impl Monitor {
    /// Starts it: by the `template`, if there is one, and where that does not give one, by itself.
    pub(crate) fn start(
        vm: &Vm,
        command: Command,
        template: Option<&MonitorTemplate>,
        held: Vec<Box<dyn Send>>,
    ) -> io::Result<Self> {
        let said = vm.at("monitor");
        let words = File::create(&said)?;
        let (console, output) = pipe()?;
        let copied = template.and_then(|template| {
            let copied = copy_of(template, &command, &output, &words);
            copied.map_err(|e| log::warn!("{e}")).ok()
        });
        let process = match copied {
            Some(copy) => Process::Copy(copy),
            None => Process::Child(execute(command, output, words)?),
        };
        let (path, vm) = (vm.at("console"), vm.clone());
        let kept = path.clone();
        let console_keeper = thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                keep_console(console, &path, |process| vm.note(Happened::Oom { process }));
            })?;
        Ok(Self {
            process,
            said,
            console: kept,
            console_keeper,
            _held: held,
        })
    }

    /// Its process's number.
    pub(crate) fn id(&self) -> u32 {
        match &self.process {
            Process::Child(child) => child.id(),
            Process::Copy(copy) => copy.pid(),
        }
    }

    /// Its process, by a descriptor: no other can be meant.
    pub(crate) fn pidfd(&self) -> Option<OwnedFd> {
        match &self.process {
            Process::Child(child) => {
                let pid = rustix::process::Pid::from_child(child);
                pidfd_open(pid, PidfdFlags::empty()).ok()
            }
            Process::Copy(copy) => copy.pidfd().try_clone_to_owned().ok(),
        }
    }

    /// Whether it has ended as its guest's kernel panicked.
    pub(crate) fn says_panic(&mut self) -> bool {
        self.process.how_ended() == Some(HowEnded::Code(PANICKED))
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.how_ended().is_some()
    }

    /// Waits for its end, and kills it if that does not come.
    pub(crate) fn end(&mut self, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.has_ended() {
            if Instant::now() > until {
                self.process.kill();
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// How it ended, in its own words.
    pub(crate) fn last_words(&mut self) -> String {
        let status = match self.process.how_ended() {
            Some(HowEnded::Code(code)) => format!("exit status {code}"),
            Some(HowEnded::Signal(signal)) => format!("signal {signal}"),
            Some(HowEnded::Unknown) => "unknown status".into(),
            None => "it still runs".into(),
        };
        let said = fs::read(&self.said).unwrap_or_default();
        let said =
            String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD_BYTES)..]).into_owned();
        // It says in one line, the last, how it ended.
        let said = said
            .lines()
            .rfind(|l| !l.trim().is_empty())
            .unwrap_or_default();
        if said.is_empty() {
            return status;
        }
        format!("{status}: {said}")
    }

    /// Of a guest that has ended: the last line on its console, or that of the agent, where it says why.
    pub(crate) fn last_of_console(&self) -> Option<String> {
        let until = Instant::now() + CONSOLE_PATIENCE;
        while !self.console_keeper.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        let said = fs::read(&self.console).ok()?;
        last_line(&said[said.len().saturating_sub(TOLD_LINES_BYTES)..])
    }
}

/// The last line of the agent's, or the last one of all, as it can be shown.
fn last_line(console: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(console);
    let lines = || text.lines().map(str::trim).filter(|l| !l.is_empty());
    let line = lines()
        .filter_map(|l| l.find(AGENT_WORD).map(|at| &l[at..]))
        .next_back()
        .or_else(|| lines().next_back())?;
    Some(plain(line, TOLD_BYTES))
}

/// The first characters of what a guest said, and nothing that a terminal would obey.
fn plain(text: &str, most: usize) -> String {
    let shown = text.chars().take(most);
    shown
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// A monitor that the template makes.
fn copy_of(
    template: &MonitorTemplate,
    command: &Command,
    output: &PipeWriter,
    words: &File,
) -> Result<Copy, AskError> {
    let nothing = File::open("/dev/null").map_err(|source| AskError::Descriptor { source })?;
    let mut descriptors = vec![
        (0, nothing.as_fd()),
        (1, output.as_fd()),
        (2, words.as_fd()),
    ];
    for number in &template.descriptors {
        // SAFETY: the caller holds them, as the monitor would otherwise inherit them.
        descriptors.push((*number, unsafe { BorrowedFd::borrow_raw(*number) }));
    }
    let args: Vec<_> = command.get_args().collect();
    Copy::ask(&template.socket, &args, &descriptors)
}

fn execute(mut command: Command, output: PipeWriter, words: File) -> io::Result<Child> {
    command.stdin(Stdio::null()).stdout(output).stderr(words);
    // SAFETY: one system call, nothing is allocated.
    unsafe {
        command.pre_exec(|| {
            // A keeper that is killed leaves no guest behind.
            set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
    command.spawn()
}

/// What the guest writes to its console, as far as that is kept. A guest can write for ever, and a disk may be full: it goes on.
fn keep_console(mut from: impl Read, path: &Path, mut oom: impl FnMut(String)) {
    let mut buffer = [0; 4096];
    let mut look = OomLook::default();
    let mut file = File::create(path);
    let mut size = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if size >= MAX_CONSOLE_BYTES {
            let _ = fs::rename(path, path.with_extension("1"));
            file = File::create(path);
            size = 0;
        }
        if let Ok(file) = &mut file {
            let _ = file.write_all(&buffer[..count]);
        }
        size += count as u64;
        look.at(&buffer[..count], &mut oom);
    }
}

/// Looks for a guest's want of memory in what its kernel says (mm/oom_kill.c, `__oom_kill_process`; an error, which `quiet` does not hush).
#[derive(Default)]
struct OomLook {
    line: Vec<u8>,
    seen: u32,
}

impl OomLook {
    fn at(&mut self, bytes: &[u8], oom: &mut impl FnMut(String)) {
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < MAX_LOOKED_AT_BYTES {
                    self.line.push(*byte);
                }
                continue;
            }
            if self.seen < MAX_OOM_EVENTS
                && let Some(process) = killed_for_memory(&self.line)
            {
                self.seen += 1;
                oom(process);
            }
            self.line.clear();
        }
    }
}

/// `12 (name)`, of a line that ends with `Out of memory: Killed process 12 (name) total-vm:...`, or that of a cgroup.
fn killed_for_memory(line: &[u8]) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let (before, after) = line.split_once(": Killed process ")?;
    let before = before.to_ascii_lowercase();
    if !before.contains("out of memory") {
        return None;
    }
    let process = after.split(" total-vm:").next()?.trim();
    Some(plain(process, 64))
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.process.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_a_console_is_what_the_agent_says() {
        let agent = b"[    0.5] x\r\nalveole-agent: cannot load the module '/modules/a': no\r\n[    1.2] reboot: Power down\r\n";
        assert_eq!(
            last_line(agent).unwrap(),
            "alveole-agent: cannot load the module '/modules/a': no"
        );
        // Nothing that a terminal would obey.
        let kernel = b"[    0.5] x\r\n\x1b[31m[    1.2] Kernel panic\r\n\r\n";
        assert_eq!(last_line(kernel).unwrap(), " [31m[    1.2] Kernel panic");
        assert_eq!(last_line(b"\r\n\xff"), Some("\u{fffd}".into()));
        assert_eq!(last_line(b"\r\n"), None);
        let long = vec![b'a'; 5000];
        assert_eq!(last_line(&long).unwrap().len(), TOLD_BYTES);
    }

    #[test]
    fn a_guest_out_of_memory_is_found_on_its_console_and_cannot_fill_a_disk_by_it() {
        let mut found = Vec::new();
        let mut look = OomLook::default();
        let console = "[    1.5] a: Killed process 1 (x)\r\n\
            [    2.5] Out of memory: Killed process 12 (two words) total-vm:1kB, anon-rss:1kB\r\n\
            [    3.5] Memory cgroup out of memory: Killed process 13 (b\x1b[2J) total-vm:1kB\r\n\
            out of memory\n: Killed process 1 (a)\n";
        // However it comes in.
        for byte in console.as_bytes() {
            look.at(&[*byte], &mut |process| found.push(process));
        }
        assert_eq!(found, ["12 (two words)", "13 (b [2J)"]);
        let line = "Out of memory: Killed process 1 (a)\n".repeat(100);
        look.at(line.as_bytes(), &mut |process| found.push(process));
        assert_eq!(found.len(), MAX_OOM_EVENTS as usize);
        let endless = vec![b'x'; 1 << 20];
        look.at(&endless, &mut |process| found.push(process));
        assert!(look.line.len() <= MAX_LOOKED_AT_BYTES);
    }
}
