//! The console on a real pseudo-terminal. The machine runs in a child process (this test program
//! once more, told by an environment variable), so that it can be killed in every way there is.
#![expect(
    unsafe_code,
    reason = "pseudo-terminals, signals and crashes on purpose"
)]
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::ptr::null_mut;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use alveole_event_loop::EventLoop;
use alveole_interrupts::IrqLine;
use alveole_io_bus::BusDevice;
use alveole_serial::*;

const PATIENCE: Duration = Duration::from_secs(20);
const ROLE: &str = "ALVEOLE_SERIAL_TEST_ROLE";
const REPORT: &str = "ALVEOLE_SERIAL_TEST_REPORT";

struct Guest(Uart, ConsoleHandle);

impl Guest {
    fn print(&mut self, text: &str) {
        for byte in text.bytes() {
            let _ = self.0.write(0, &[byte]);
        }
    }
    fn receive(&mut self) -> Option<u8> {
        let mut byte = [0];
        let _ = self.0.read(5, &mut byte);
        if byte[0] & 1 == 0 {
            return None;
        }
        let _ = self.0.read(0, &mut byte);
        Some(byte[0])
    }
}

/// The child: a guest that says "ready", then echoes in capitals, until its role is up.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let (tell, told) = channel();
    let console = Console::open(&ConsoleTarget::Terminal, {
        Box::new(move |e| tell.send(e).unwrap())
    });
    if std::io::stdin().is_terminal() {
        let second = Console::open(&ConsoleTarget::Terminal, Box::new(|_| {}));
        assert!(matches!(second.err(), Some(SerialError::TerminalTaken)));
    }
    let (uart, worker, handle) = console.unwrap().into_parts(IrqLine::new().unwrap());
    let mut host = EventLoop::new().unwrap();
    host.attach(Box::new(worker)).unwrap();
    thread::spawn(move || host.run().unwrap());
    let mut guest = Guest(uart, handle);
    guest.print("ready\r\n");
    guest.1.flush(PATIENCE);
    match role.as_str() {
        "echo" => {}
        "segv" => {
            // SAFETY: none; the crash is the purpose.
            unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(1) };
        }
        "overflow" => drop(recurse(1)),
        // SAFETY: takes no pointers.
        "abort" => unsafe { libc::abort() },
        "panic" => panic!("on purpose"),
        "exit" => std::process::exit(7),
        "flood" => {
            let begun = Instant::now();
            (0..20_000).for_each(|n| guest.print(&format!("line {n} {:80}\r\n", "")));
            let stalls = guest.1.counters().stalls.get();
            report(&format!(
                "flooded in {} ms, {stalls} stalls",
                begun.elapsed().as_millis()
            ));
        }
        "deaf" => thread::sleep(PATIENCE),
        other => panic!("unknown role {other}"),
    }
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        while let Some(byte) = guest.receive() {
            guest.print(&char::from(byte).to_ascii_uppercase().to_string());
        }
        match told.recv_timeout(Duration::from_millis(1)) {
            Ok(ConsoleEvent::Quit) => {
                guest.print("bye\r\n");
                guest.1.flush(PATIENCE);
                guest.1.close();
                report("quit");
                std::process::exit(0);
            }
            Ok(ConsoleEvent::PowerButton) => guest.print("[button]"),
            Ok(ConsoleEvent::TerminalLost) => {
                guest.print("nobody hears this");
                guest.1.flush(PATIENCE);
                report(&format!(
                    "lost, dropped {}",
                    guest.1.counters().bytes_dropped.get()
                ));
                std::process::exit(0);
            }
            Err(_) => {}
        }
    }
}

fn report(text: &str) {
    fs::write(std::env::var(REPORT).unwrap(), text).unwrap();
}

#[expect(unconditional_recursion, reason = "overflows the stack on purpose")]
fn recurse(n: u64) -> [u64; 64] {
    let mut frame = [n; 64];
    frame[1] = std::hint::black_box(recurse(n + 1))[0];
    frame
}

/// A terminal with a machine on it.
struct Terminal {
    master: File,
    slave: OwnedFd,
    before: libc::termios,
    child: Child,
    dir: tempfile::TempDir,
    seen: String,
}

fn settings(fd: i32) -> libc::termios {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: room for a termios; filled when it succeeds.
    unsafe {
        assert_eq!(libc::tcgetattr(fd, settings.as_mut_ptr()), 0);
        settings.assume_init()
    }
}

fn same(a: &libc::termios, b: &libc::termios) -> bool {
    (a.c_iflag, a.c_oflag, a.c_cflag, a.c_lflag, a.c_cc)
        == (b.c_iflag, b.c_oflag, b.c_cflag, b.c_lflag, b.c_cc)
}

impl Terminal {
    fn run(role: &str, controlling: bool) -> Self {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: both pointers are to ints of ours; the others may be null.
        let result = unsafe {
            libc::openpty(
                &raw mut master,
                &raw mut slave,
                null_mut(),
                null_mut(),
                null_mut(),
            )
        };
        assert_eq!(result, 0);
        // SAFETY: openpty gave us both; children must not inherit them by accident.
        let (master, slave) = unsafe {
            libc::fcntl(master, libc::F_SETFD, libc::FD_CLOEXEC);
            libc::fcntl(slave, libc::F_SETFD, libc::FD_CLOEXEC);
            (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave))
        };
        let before = settings(slave.as_raw_fd());
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(REPORT, dir.path().join("report"))
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(Stdio::null());
        if controlling {
            // SAFETY: both calls are async-signal-safe.
            unsafe {
                command.pre_exec(|| {
                    libc::setsid();
                    libc::ioctl(0, libc::TIOCSCTTY, 0);
                    Ok(())
                })
            };
        }
        let child = command.spawn().unwrap();
        Self {
            master,
            slave,
            before,
            child,
            dir,
            seen: String::new(),
        }
    }

    fn start(role: &str) -> Self {
        let mut terminal = Self::run(role, true);
        terminal.expect("ready\r");
        terminal
    }

    fn expect(&mut self, text: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            assert!(
                Instant::now() < until,
                "waiting for {text:?}, got {:?}",
                self.seen
            );
            self.look();
        }
    }

    fn look(&mut self) {
        let mut poll = libc::pollfd {
            fd: self.master.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, 10) } == 1 {
            let mut chunk = [0; 4096];
            let len = self.master.read(&mut chunk).unwrap_or(0);
            self.seen += &String::from_utf8_lossy(&chunk[..len]);
        }
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn is_raw(&self) -> bool {
        settings(self.slave.as_raw_fd()).c_lflag & (libc::ICANON | libc::ISIG | libc::ECHO) == 0
    }

    fn kill(&self, signal: i32) {
        // SAFETY: our own child, which has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    fn end(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            self.look();
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < until,
                "the child does not end; saw {:?}",
                self.seen
            );
        }
    }

    fn is_restored(&self) -> bool {
        same(&settings(self.slave.as_raw_fd()), &self.before)
    }

    fn report(&self) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            match fs::read_to_string(self.dir.path().join("report")) {
                Ok(text) if !text.is_empty() => return text,
                _ => assert!(Instant::now() < until, "no report"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn keys_reach_the_guest_and_ours_do_not() {
    let mut t = Terminal::start("echo");
    assert!(t.is_raw());
    t.type_keys(b"hello\x03");
    t.expect("HELLO\x03");
    t.type_keys(b"\x01c");
    t.expect("Ctrl-A x  end the machine at once\r");
    t.type_keys(b"\x01p");
    t.expect("[button]");
    t.type_keys(b"\x01a<");
    t.expect("\x01<");
    t.type_keys(b"\x01x");
    t.expect("bye\r");
    assert_eq!(t.end().code(), Some(0));
    assert!(t.is_restored());
    assert_eq!(t.report(), "quit");
}

#[test]
fn every_signal_gives_the_terminal_back() {
    for signal in [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGABRT,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGSYS,
    ] {
        let mut t = Terminal::start("echo");
        assert!(t.is_raw());
        t.kill(signal);
        assert_eq!(t.end().signal(), Some(signal));
        assert!(t.is_restored(), "signal {signal}");
    }
}

#[test]
fn every_crash_gives_the_terminal_back() {
    for (role, signal, code) in [
        ("segv", Some(libc::SIGSEGV), None),
        ("overflow", Some(libc::SIGABRT), None),
        ("abort", Some(libc::SIGABRT), None),
        ("panic", None, Some(101)),
        ("exit", None, Some(7)),
    ] {
        let mut t = Terminal::start(role);
        let status = t.end();
        assert_eq!((status.signal(), status.code()), (signal, code), "{role}");
        assert!(t.is_restored(), "{role}");
    }
}

#[test]
fn nobody_can_give_it_back_after_sigkill() {
    // The counter-proof: without it the tests above might pass for a terminal that was never raw.
    let mut t = Terminal::start("echo");
    t.kill(libc::SIGKILL);
    t.end();
    assert!(!t.is_restored());
}

#[test]
fn a_terminal_that_goes_away_leaves_the_guest_running() {
    // Not its controlling terminal: otherwise SIGHUP comes too, and that is the owner's to ignore.
    let mut t = Terminal::run("echo", false);
    t.expect("ready\r");
    let null = File::open("/dev/null").unwrap();
    drop(std::mem::replace(&mut t.master, null));
    assert_eq!(t.report(), "lost, dropped 17");
    assert_eq!(t.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_terminal_that_nobody_reads_does_not_stop_the_guest() {
    let mut t = Terminal::start("flood");
    // 1.8 MB, and nobody reads: the guest comes to its end all the same, in bounded time.
    let said = t.report();
    let ms: u128 = said.split(' ').nth(2).unwrap().parse().unwrap();
    assert!(ms < 5000, "{said}");
    t.type_keys(b"\x01x");
    t.expect("bytes dropped]\r");
    assert_eq!(t.end().code(), Some(0));
    assert!(t.is_restored());
}

#[test]
fn a_slow_terminal_loses_nothing() {
    let mut t = Terminal::run("flood", true);
    let until = Instant::now() + PATIENCE;
    while !t.seen.contains("line 19999 ") {
        assert!(Instant::now() < until);
        t.look();
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!t.seen.contains("bytes dropped]"));
    let lines = t.seen.lines().filter(|l| l.starts_with("line ")).count();
    assert_eq!(lines, 20_000);
    assert!(!t.report().ends_with(" 0 stalls"), "{}", t.report());
}

#[test]
fn a_guest_that_reads_nothing_does_not_keep_us_from_our_keys() {
    let mut t = Terminal::start("deaf");
    for _ in 0..40 {
        t.type_keys(&[b'x'; 4000]);
    }
    t.type_keys(b"\x01c");
    t.expect("Ctrl-A x");
}

/// Runs the child with these streams; gives what it wrote to standard output.
fn run_on(stdin: Stdio, role: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .env(REPORT, dir.path().join("report"))
        .stdin(stdin)
        .stdout(File::create(&path).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    let mut out = String::new();
    while Instant::now() < until && !out.contains("END") {
        thread::sleep(Duration::from_millis(5));
        out = fs::read_to_string(&path).unwrap();
    }
    let running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        running,
        "the end of input does not end the guest; saw {out:?}"
    );
    out
}

#[test]
fn input_may_be_a_file_or_a_pipe() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    // Longer than every buffer on the way; 0x01 is the guest's here.
    let text = "x".repeat(INPUT_BUFFER_BYTES + 10_000) + "\x01x end";
    fs::write(&path, &text).unwrap();
    let from_file = run_on(File::open(&path).unwrap().into(), "echo");
    let (reads, mut writes) = std::io::pipe().unwrap();
    let writer = thread::spawn(move || writes.write_all(text.as_bytes()).map(|()| text));
    let from_pipe = run_on(reads.into(), "echo");
    let text = writer.join().unwrap().unwrap();
    for out in [from_file, from_pipe] {
        assert!(
            out.contains(&text.to_ascii_uppercase()),
            "{} bytes",
            out.len()
        );
    }
}

#[test]
fn input_may_be_nothing() {
    // /dev/null: the guest runs on; nothing to wait for but its first words.
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(ROLE, "flood")
        .env(REPORT, dir.path().join("report"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    while !dir.path().join("report").exists() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}
