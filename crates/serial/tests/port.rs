//! The whole serial port but the terminal: a guest's accesses on one side, a real file or socket on
//! the other, a real event loop in between.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use alveole_event_loop::{EventLoop, LoopHandle, WorkerId};
use alveole_interrupts::IrqLine;
use alveole_io_bus::{BusDevice, Outcome};
use alveole_saved_state::Saves;
use alveole_serial::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A machine that is nothing but its console.
struct Machine {
    uart: Uart,
    handle: ConsoleHandle,
    irq: IrqLine,
    looping: LoopHandle,
    worker: WorkerId,
    thread: Option<JoinHandle<()>>,
}

impl Machine {
    fn with(target: &ConsoleTarget) -> Self {
        let console = Console::open(target, Box::new(|_| {})).unwrap();
        let irq = IrqLine::new().unwrap();
        let (uart, worker, handle) = console.into_parts(irq.clone());
        let mut host = EventLoop::new().unwrap();
        let worker = host.attach(Box::new(worker)).unwrap();
        let looping = host.handle();
        let thread = thread::spawn(move || host.run().unwrap());
        Self {
            uart,
            handle,
            irq,
            looping,
            worker,
            thread: Some(thread),
        }
    }

    fn write(&mut self, port: u64, byte: u8) {
        assert_eq!(self.uart.write(port, &[byte]), Outcome::Done);
    }

    fn print(&mut self, text: &[u8]) {
        text.iter().for_each(|&b| self.write(0, b));
    }

    fn read(&mut self, port: u64) -> u8 {
        let mut byte = [0];
        assert_eq!(self.uart.read(port, &mut byte), Outcome::Done);
        byte[0]
    }

    /// Reads as a guest does: while the line status says that there is something.
    fn receive(&mut self, len: usize) -> Vec<u8> {
        let until = Instant::now() + PATIENCE;
        let mut got = Vec::new();
        while got.len() < len && Instant::now() < until {
            if self.read(5) & 1 == 1 {
                got.push(self.read(0));
            } else {
                thread::sleep(Duration::from_micros(100));
            }
        }
        got
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.looping.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn expect(stream: &mut UnixStream, want: &[u8]) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = vec![0; want.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(want));
}

fn file(path: &Path) -> ConsoleTarget {
    ConsoleTarget::File {
        path: path.to_path_buf(),
        start: FileStart::Truncate,
        limit_bytes: None,
    }
}

#[test]
fn output_reaches_the_file_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut m = Machine::with(&file(&path));
    for line in 0..100 {
        m.print(format!("line {line}\n").as_bytes());
    }
    eventually("the last line", || {
        fs::read_to_string(&path).unwrap().ends_with("line 99\n")
    });
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 100);
    let counters = m.handle.counters();
    assert_eq!(counters.bytes_out.get(), fs::metadata(&path).unwrap().len());
    assert!(counters.wakeups.get() < 50, "{}", counters.wakeups.get());
}

#[test]
fn flush_works_with_and_without_the_loop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut m = Machine::with(&file(&path));
    m.print(b"first ");
    assert_eq!(m.handle.flush(PATIENCE), 0);
    assert_eq!(fs::read_to_string(&path).unwrap(), "first ");
    let worker = m.looping.detach(m.worker).unwrap();
    m.print(b"second ");
    assert_eq!(m.handle.flush(PATIENCE), 0);
    m.print(b"third ");
    m.looping.attach(worker).unwrap();
    eventually("the third", || {
        fs::read_to_string(&path).unwrap() == "first second third "
    });
}

#[test]
fn a_full_disk_costs_output_and_nothing_else() {
    let mut m = Machine::with(&file(Path::new("/dev/full")));
    let begun = Instant::now();
    m.print(&vec![b'x'; 2 * OUTPUT_BUFFER_BYTES]);
    assert_eq!(m.handle.flush(PATIENCE), 0);
    assert!(begun.elapsed() < PATIENCE);
    let counters = m.handle.counters();
    assert_eq!(counters.bytes_dropped.get(), 2 * OUTPUT_BUFFER_BYTES as u64);
}

#[test]
fn no_console_is_no_work() {
    let mut m = Machine::with(&ConsoleTarget::None);
    m.print(b"Kernel panic - not syncing: test\r\n");
    assert_eq!(m.handle.flush(Duration::ZERO), 0);
    assert_eq!(m.handle.counters().wakeups.get(), 0);
    assert_eq!(
        m.handle.last_panic_line().unwrap(),
        "Kernel panic - not syncing: test"
    );
}

#[test]
fn a_late_client_gets_the_scrollback_and_then_talks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // More than is kept.
    m.print(&vec![b'-'; SCROLLBACK_BYTES]);
    m.print(b"login: ");
    m.handle.flush(PATIENCE);
    let mut client = UnixStream::connect(&path).unwrap();
    let mut want = vec![b'-'; SCROLLBACK_BYTES - 7];
    want.extend(b"login: ");
    expect(&mut client, &want);
    client.write_all(b"root\r").unwrap();
    assert_eq!(m.receive(5), b"root\r");
    m.print(b"# ");
    expect(&mut client, b"# ");

    let mut second = UnixStream::connect(&path).unwrap();
    let mut told = String::new();
    second.set_read_timeout(Some(PATIENCE)).unwrap();
    second.read_to_string(&mut told).unwrap();
    assert!(told.starts_with("busy"), "{told}");

    drop(client);
    m.print(b"more\n");
    m.handle.flush(PATIENCE);
    let attach = || {
        let mut third = UnixStream::connect(&path).unwrap();
        third.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut first = [0; 4];
        third.read_exact(&mut first).unwrap();
        &first != b"busy"
    };
    eventually("room for another client", attach);
}

#[test]
fn a_client_that_only_sends_is_heard_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    let text: Vec<u8> = (0..30_000u32).map(|n| (n % 251) as u8).collect();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&text).unwrap();
    drop(client);
    assert_eq!(m.receive(text.len()), text);
    assert_eq!(m.handle.counters().bytes_in.get(), text.len() as u64);
}

#[test]
fn a_client_that_has_nothing_to_say_still_listens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    thread::sleep(Duration::from_millis(20));
    m.print(b"hello");
    expect(&mut client, b"hello");
}

#[test]
fn a_client_that_does_not_read_stalls_the_guest_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    m.print(b"hi");
    expect(&mut client, b"hi");
    let begun = Instant::now();
    // The queue, the socket's own buffer, and as much again.
    m.print(&vec![b'x'; 4 * OUTPUT_BUFFER_BYTES]);
    let took = begun.elapsed();
    let counters = m.handle.counters().clone();
    assert!(counters.stalls.get() <= 3, "{}", counters.stalls.get());
    assert!(
        took < Duration::from_millis(STALL_BUDGET_MS * 20),
        "{took:?}"
    );
    assert!(counters.bytes_dropped.get() > 0);
    // It wakes up: the mark is where the bytes are missing, and the guest is heard again.
    let dropped = counters.bytes_dropped.get();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut chunk = [0; 4096];
        while !got.ends_with(b"end") {
            let len = client.read(&mut chunk).unwrap();
            got.extend(&chunk[..len]);
        }
        got
    });
    thread::sleep(Duration::from_millis(100));
    m.print(b"end");
    let got = reader.join().unwrap();
    let mark = format!("\r\n[alveole: {dropped} bytes dropped]\r\n");
    assert_eq!(
        got.len() + dropped as usize,
        4 * OUTPUT_BUFFER_BYTES + 3 + mark.len()
    );
    assert!(got.ends_with((mark + "end").as_bytes()));
}

#[test]
fn a_guest_that_does_not_read_holds_back_the_sender() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    client
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut sent = 0;
    while let Ok(len) = client.write(&[b'x'; 4096]) {
        sent += len;
    }
    assert!(sent > INPUT_BUFFER_BYTES);
    let rounds = m.looping.counters().rounds.get();
    thread::sleep(Duration::from_millis(50));
    assert!(
        m.looping.counters().rounds.get() < rounds + 5,
        "the loop does not spin"
    );
    assert_eq!(m.receive(sent).len(), sent);
}

#[test]
fn input_interrupts_a_guest_that_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    m.write(1, 1); // IER: received data available
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    let irq = m.irq.clone();
    eventually("an interrupt", || irq.take_edges() > 0);
    assert_eq!(m.read(2) & 0xf, 4, "IIR: received data available");
    assert_eq!(m.receive(1), b"x");
}

/// A driver reads some, and then asks whether that was all: Linux does, after 256 bytes.
#[test]
fn input_that_is_left_is_told_of_until_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    m.write(1, 1);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"abc").unwrap();
    eventually("input", || m.read(5) & 1 == 1);
    assert_eq!(m.receive(1), b"a");
    for _ in 0..2 {
        assert_eq!(m.read(2) & 0xf, 4, "IIR: received data available");
    }
    m.write(1, 0);
    assert_eq!(m.read(2) & 0xf, 1, "IIR: nobody asks for it");
    m.write(1, 1);
    assert_eq!(m.receive(2), b"bc");
    assert_eq!(m.read(2) & 0xf, 1, "IIR: no interrupt");
}

/// What Linux does for a byte: enable, ask, write, disable, ask again.
#[test]
fn an_empty_transmitter_is_told_of_while_that_is_enabled() {
    let dir = tempfile::tempdir().unwrap();
    let mut m = Machine::with(&file(&dir.path().join("console")));
    for _ in 0..2 {
        m.write(1, 2); // IER: transmitter empty
        assert_eq!(m.irq.take_edges(), 1, "each time that it is enabled");
        assert_eq!(m.read(2) & 0xf, 2, "IIR: transmitter empty");
        assert_eq!(m.read(2) & 0xf, 1, "IIR: it was told");
        m.write(0, b'x');
        assert_eq!(m.irq.take_edges(), 1, "the byte is gone");
        m.write(1, 0);
        assert_eq!(m.read(2) & 0xf, 1, "IIR: nobody asks for it");
        assert_eq!(m.irq.take_edges(), 0);
    }
    // Enabled again before anybody asked: told anew.
    m.write(1, 2);
    m.write(1, 0);
    m.write(1, 2);
    assert!(m.irq.take_edges() > 0);
    assert_eq!(m.read(2) & 0xf, 2, "IIR: transmitter empty");
    // The divisor latch is no interrupt enable register.
    m.write(0, b'x');
    m.write(3, 0x80);
    m.write(1, 0);
    m.write(3, 3);
    assert_eq!(m.read(2) & 0xf, 2, "IIR: transmitter empty");
}

/// A driver masks all while it writes a message, and has input told of when it is done.
#[test]
fn input_is_told_of_anew_when_the_transmitter_is_no_longer_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    m.write(1, 3);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"a").unwrap();
    eventually("input", || m.read(5) & 1 == 1);
    let _ = m.irq.take_edges();
    m.write(1, 1);
    assert!(m.irq.take_edges() > 0, "input is there");
    // A guest that is saved now has not been told yet.
    let saved = m.uart.save();
    let console = Console::open(&ConsoleTarget::None, Box::new(|_| {})).unwrap();
    let irq = IrqLine::new().unwrap();
    let (mut other, _worker, _handle) = console.into_parts(irq.clone());
    other.restore(&saved).unwrap();
    assert!(irq.take_edges() > 0, "a restored guest is told again");
    assert_eq!(m.read(2) & 0xf, 4, "IIR: received data available");
    m.write(1, 3);
    m.write(1, 0);
    assert_eq!(m.read(2) & 0xf, 1, "IIR: nobody asks for it");
    m.write(1, 1);
    assert!(m.irq.take_edges() > 0);
    assert_eq!(m.read(2) & 0xf, 4, "IIR: received data available");
    assert_eq!(m.receive(1), b"a");
}

#[test]
fn input_waits_for_the_end_of_loopback() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let mut m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    m.write(4, 0x10); // MCR: loop
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"abc").unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(m.read(5) & 1, 0);
    m.write(0, b'!');
    assert_eq!(m.receive(1), b"!");
    m.write(4, 0);
    assert_eq!(m.receive(3), b"abc");
}

fn open_error(target: &ConsoleTarget) -> SerialError {
    Console::open(target, Box::new(|_| {})).err().unwrap()
}

#[test]
fn socket_paths_are_taken_with_care() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let target = ConsoleTarget::Socket(path.clone());

    // Of a process that is gone.
    drop(UnixListener::bind(&path).unwrap());
    let m = Machine::with(&target);
    // Alive.
    assert!(matches!(
        open_error(&target),
        SerialError::SocketInUse { .. }
    ));
    drop(m);
    assert!(!path.exists(), "removed at the end");

    fs::write(&path, "precious").unwrap();
    assert!(matches!(
        open_error(&target),
        SerialError::NotASocket { .. }
    ));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

    let long = ConsoleTarget::Socket(PathBuf::from(format!("/tmp/{}", "x".repeat(103))));
    let e = open_error(&long);
    assert!(e.to_string().contains("108 bytes"), "{e}");
    assert!(matches!(e, SerialError::SocketPathTooLong { len: 108, .. }));
    let nowhere = ConsoleTarget::Socket(dir.path().join("no/such/dir.sock"));
    assert!(matches!(open_error(&nowhere), SerialError::Socket { .. }));
}

#[test]
fn a_socket_of_somebody_else_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let m = Machine::with(&ConsoleTarget::Socket(path.clone()));
    fs::remove_file(&path).unwrap();
    let _theirs = UnixListener::bind(&path).unwrap();
    drop(m);
    assert!(path.exists());
}

#[test]
fn a_socket_with_a_full_backlog_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    // Opened, but no loop takes clients.
    let console = Console::open(&ConsoleTarget::Socket(path.clone()), Box::new(|_| {})).unwrap();
    let clients: Vec<_> = (0..9)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    let e = open_error(&ConsoleTarget::Socket(path.clone()));
    assert!(matches!(e, SerialError::SocketInUse { .. }), "{e}");
    drop((console, clients));
    assert!(!path.exists());
}

mod property {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever a guest does to the registers, it gets an answer, and one byte at most is moved.
        #[test]
        fn any_access_is_answered(
            accesses in prop::collection::vec(
                (any::<bool>(), 0u64..12, prop::collection::vec(any::<u8>(), 0..9)), 0..400)
        ) {
            let console = Console::open(&ConsoleTarget::None, Box::new(|_| {})).unwrap();
            let irq = IrqLine::new().unwrap();
            let (mut uart, _worker, handle) = console.into_parts(irq);
            let mut sent = 0;
            for (write, offset, bytes) in &accesses {
                let fits = bytes.len() == 1 && *offset < UART_PORTS;
                let outcome = if *write {
                    sent += u64::from(fits && *offset == 0);
                    uart.write(*offset, bytes)
                } else {
                    uart.read(*offset, &mut bytes.clone())
                };
                prop_assert_eq!(outcome, if fits { Outcome::Done } else { Outcome::Refused });
            }
            prop_assert!(handle.counters().bytes_out.get() <= sent);
            prop_assert_eq!(uart.write(u64::MAX, &[0]), Outcome::Refused);
        }
    }
}

#[test]
fn registers_and_unread_input_go_on_in_another_port() {
    let open = || {
        let console = Console::open(&ConsoleTarget::None, Box::new(|_| {})).unwrap();
        console.into_parts(IrqLine::new().unwrap())
    };
    let (mut uart, _worker, _handle) = open();
    // Loop-back: what is sent is received.
    for (port, byte) in [(7, 0x5a), (1, 0x01), (4, 0x10), (0, b'x'), (0, b'y')] {
        assert_eq!(uart.write(port, &[byte]), Outcome::Done);
    }
    let (mut other, _other_worker, _other_handle) = open();
    other.restore(&uart.save()).unwrap();
    let mut read = |port| {
        let mut byte = [0];
        assert_eq!(other.read(port, &mut byte), Outcome::Done);
        byte[0]
    };
    assert_eq!((read(7), read(1), read(4)), (0x5a, 0x01, 0x10));
    assert_eq!((read(0), read(0)), (b'x', b'y'));
    let mut hostile = uart.save();
    hostile.bytes = String::from_utf8(hostile.bytes)
        .unwrap()
        .replace("\"input\":[", &format!("\"input\":[{}", "1,".repeat(65)))
        .into_bytes();
    let why = uart.restore(&hostile).unwrap_err().to_string();
    assert!(why.contains("FIFO"), "{why}");
}
