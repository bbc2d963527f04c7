//! A template in a process of its own, `examples/template.rs`: copies have one thread, and tests have more.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use alveole_process_template::{AskError, Copy, HowEnded, MAX_DESCRIPTORS};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

struct Running {
    process: Child,
    socket: PathBuf,
    _dir: TempDir,
}

impl Running {
    fn start() -> Self {
        Self::with_input(Stdio::piped())
    }

    fn with_input(input: Stdio) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("template");
        // DIR/deps/copies-HASH and DIR/examples/template
        let program = std::env::current_exe().unwrap();
        let program = program
            .ancestors()
            .nth(2)
            .unwrap()
            .join("examples/template");
        let process = Command::new(&program)
            .arg(&socket)
            .stdin(input)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + PATIENCE;
        while !socket.exists() {
            assert!(Instant::now() < until, "it does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self {
            process,
            socket,
            _dir: dir,
        }
    }

    fn ask(
        &self,
        words: &[&str],
        descriptors: &[(RawFd, BorrowedFd<'_>)],
    ) -> Result<Copy, AskError> {
        let words: Vec<_> = words.iter().map(OsStr::new).collect();
        Copy::ask(&self.socket, &words, descriptors)
    }

    fn ends(&mut self) -> bool {
        within(|| self.process.try_wait().unwrap().is_some())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn within(mut holds: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    true
}

fn is_there(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

#[test]
fn copies_have_their_words_and_descriptors_and_say_how_they_ended() {
    let running = Running::start();
    for round in 0..3 {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (r, w) = std::io::pipe().unwrap();
        let what = format!("round {round}");
        let mut copy = running
            .ask(&["say", "9", &what], &[(9, w.as_fd()), (3, theirs.as_fd())])
            .unwrap();
        drop((w, theirs));
        let mut said = String::new();
        { r }.read_to_string(&mut said).unwrap();
        assert_eq!(copy.wait(), HowEnded::Code(0));
        // Of 9, what it was, and what was opened to write and to look.
        let rest = said.strip_prefix(&format!("{what} 7 ")).unwrap_or(&said);
        assert!(rest.starts_with("[3, ") && rest.contains(" 9"), "{said}");
        // The other end is in nobody's hand any more, not the template's either.
        let mut nothing = Vec::new();
        assert_eq!(ours.read_to_end(&mut nothing).unwrap(), 0);
    }
    let mut copy = running.ask(&["exit", "42"], &[]).unwrap();
    assert_eq!(copy.wait(), HowEnded::Code(42));
    assert_eq!(copy.try_wait(), Some(HowEnded::Code(42)));
    let mut copy = running.ask(&["abort"], &[]).unwrap();
    assert_eq!(copy.wait(), HowEnded::Signal(6));
    let mut copy = running.ask(&["sleep"], &[]).unwrap();
    assert_eq!(copy.try_wait(), None);
    copy.kill();
    assert_eq!(copy.wait(), HowEnded::Signal(9));
}

#[test]
fn a_copy_ends_with_who_asked_for_it_and_not_with_the_template() {
    let mut running = Running::start();
    let gone = running.ask(&["sleep"], &[]).unwrap();
    let mut stays = running.ask(&["sleep"], &[]).unwrap();
    let (first, second) = (gone.pid(), stays.pid());
    assert!(is_there(first) && is_there(second));
    drop(gone);
    assert!(within(|| !is_there(first)), "the kernel has not killed it");
    running.process.kill().unwrap();
    running.process.wait().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(is_there(second) && stays.try_wait().is_none());
    stays.kill();
    assert_eq!(stays.wait(), HowEnded::Unknown);
    assert!(matches!(
        running.ask(&["exit", "0"], &[]),
        Err(AskError::Connect { .. })
    ));
}

#[test]
fn a_template_whose_input_is_closed_ends_with_its_last_copy() {
    let mut running = Running::start();
    let mut copy = running.ask(&["sleep"], &[]).unwrap();
    drop(running.process.stdin.take());
    assert!(within(|| !running.socket.exists()), "it still listens");
    assert!(running.process.try_wait().unwrap().is_none());
    copy.kill();
    assert_eq!(copy.wait(), HowEnded::Signal(9));
    assert!(running.ends());
}

/// As a terminal that is gone. It says so for ever.
#[test]
fn the_end_of_an_input_that_is_no_pipe_ends_nothing_and_costs_nothing() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let running = Running::with_input(OwnedFd::from(theirs).into());
    drop(ours);
    std::thread::sleep(Duration::from_millis(500));
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", running.process.id())).unwrap();
    // utime and stime, fields 14 and 15 of proc(5), in hundredths of a second; the state after the name is field 3.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    let ticks: u64 = fields
        .skip(14 - 3)
        .take(2)
        .map(|t| t.parse::<u64>().unwrap())
        .sum();
    assert!(ticks < 20, "{ticks} of some 50");
    let mut copy = running.ask(&["exit", "5"], &[]).unwrap();
    assert_eq!(copy.wait(), HowEnded::Code(5));
}

#[test]
fn what_cannot_be_is_refused_and_the_next_is_served() {
    let running = Running::start();
    let null: OwnedFd = File::open("/dev/null").unwrap().into();
    let many = [(MAX_DESCRIPTORS, null.as_fd())];
    assert!(matches!(
        running.ask(&["exit", "0"], &many),
        Err(AskError::TooMuch)
    ));
    let twice = [(3, null.as_fd()), (3, null.as_fd())];
    let refused = running.ask(&["exit", "0"], &twice).unwrap_err().to_string();
    assert!(refused.contains("each once"), "{refused}");
    let long = "x".repeat(1 << 20);
    assert!(matches!(running.ask(&[&long], &[]), Err(AskError::TooMuch)));
    let mut copy = running.ask(&["exit", "3"], &[]).unwrap();
    assert_eq!(copy.wait(), HowEnded::Code(3));
}

#[test]
fn many_copies_at_once() {
    let running = Running::start();
    let mut all: Vec<_> = (0..40)
        .map(|number: i32| running.ask(&["exit", &number.to_string()], &[]).unwrap())
        .collect();
    for (number, copy) in (0..40).zip(&mut all) {
        assert_eq!(copy.wait(), HowEnded::Code(number));
    }
}
