//! The server with real sockets and real clients: many, slow, rude and gone ones. Another thread stands in for the
//! owner of a machine.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use alveole_api_server::{ApiSocket, ApiThread, MAX_CONNECTIONS};
use alveole_vm_control::{Answer, Command, Request};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
const MAX_BODY_BYTES: usize = 1000;

struct Bench {
    dir: TempDir,
    thread: ApiThread,
    requests: Receiver<Request>,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = ApiSocket::bind(&dir.path().join("api")).unwrap();
        let (to, requests) = mpsc::channel();
        let send = Box::new(move |request| {
            let _ = to.send(request);
        });
        let thread = ApiThread::start(socket, MAX_BODY_BYTES, send, Vec::new(), |why| {
            panic!("the API ended: {why}")
        });
        Self {
            dir,
            thread: thread.unwrap(),
            requests,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("api")
    }

    fn connect(&self) -> UnixStream {
        connect(&self.path())
    }

    /// Takes the next request.
    fn request(&self) -> Request {
        self.requests.recv_timeout(PATIENCE).unwrap()
    }

    /// Answers the next request.
    fn serve(&self) -> Command {
        let Request { command, reply } = self.request();
        reply.send(Ok(Answer::Done));
        command
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads until `text` is there.
fn read_until(stream: &mut UnixStream, text: &str) -> String {
    let mut all = Vec::new();
    let mut part = [0; 4096];
    loop {
        let seen = String::from_utf8_lossy(&all).into_owned();
        if seen.contains(text) {
            return seen;
        }
        match stream.read(&mut part) {
            Ok(len) if len > 0 => all.extend_from_slice(&part[..len]),
            end => panic!("{end:?} after {seen:?}, not {text:?}"),
        }
    }
}

const PAUSE: &str = "PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";
const RESUME: &str = "PATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{\"state\":\"Resumed\"}";
const DONE: &str = "HTTP/1.1 204 No Content\r\n";

#[test]
fn requests_in_a_row_are_answered_in_a_row() {
    let bench = Bench::new();
    let mut client = bench.connect();
    client
        .write_all([PAUSE, RESUME].concat().as_bytes())
        .unwrap();
    assert_eq!(bench.serve(), Command::Pause);
    // The second is out only after the first is answered.
    assert_eq!(bench.serve(), Command::Resume);
    let told = read_until(&mut client, "\r\n\r\nHTTP/1.1 204");
    assert_eq!(told.matches(DONE).count(), 2);
}

#[test]
fn one_client_that_waits_keeps_nobody_waiting() {
    let bench = Bench::new();
    let (mut first, mut second, mut half) = (bench.connect(), bench.connect(), bench.connect());
    half.write_all(&PAUSE.as_bytes()[..40]).unwrap();
    first.write_all(PAUSE.as_bytes()).unwrap();
    let waiting = bench.request();
    second.write_all(RESUME.as_bytes()).unwrap();
    assert_eq!(bench.serve(), Command::Resume);
    read_until(&mut second, DONE);
    waiting.reply.send(Ok(Answer::Done));
    read_until(&mut first, DONE);
    for byte in &PAUSE.as_bytes()[40..] {
        half.write_all(&[*byte]).unwrap();
    }
    assert_eq!(bench.serve(), Command::Pause);
    read_until(&mut half, DONE);
}

#[test]
fn who_is_gone_is_forgotten_and_who_sends_no_more_is_answered() {
    let bench = Bench::new();
    // Gone while its request is carried out.
    let mut gone = bench.connect();
    gone.write_all(PAUSE.as_bytes()).unwrap();
    let request = bench.request();
    drop(gone);
    std::thread::sleep(Duration::from_millis(50));
    request.reply.send(Ok(Answer::Done));
    // Gone with a request on the way: it was meant.
    let mut gone = bench.connect();
    gone.write_all(RESUME.as_bytes()).unwrap();
    drop(gone);
    assert_eq!(bench.serve(), Command::Resume);
    // Sends no more, and reads.
    let mut client = bench.connect();
    client.write_all(PAUSE.as_bytes()).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.serve(), Command::Pause);
    let mut told = String::new();
    client.read_to_string(&mut told).unwrap();
    assert!(told.starts_with(DONE), "{told}");
}

#[test]
fn silent_clients_make_room_and_busy_ones_do_not() {
    let bench = Bench::new();
    let mut silent: Vec<_> = (0..MAX_CONNECTIONS).map(|_| bench.connect()).collect();
    // The last one is known to be taken when its answer is there.
    silent[MAX_CONNECTIONS - 1]
        .write_all(PAUSE.as_bytes())
        .unwrap();
    bench.serve();
    read_until(&mut silent[MAX_CONNECTIONS - 1], DONE);
    let mut late = bench.connect();
    late.write_all(RESUME.as_bytes()).unwrap();
    assert_eq!(bench.serve(), Command::Resume);
    read_until(&mut late, DONE);
    let mut end = [0; 1];
    assert_eq!(silent[0].read(&mut end).unwrap(), 0, "the first made room");

    let bench = Bench::new();
    let mut busy: Vec<_> = (0..MAX_CONNECTIONS).map(|_| bench.connect()).collect();
    for client in &mut busy {
        client.write_all(PAUSE.as_bytes()).unwrap();
    }
    let requests: Vec<_> = busy.iter().map(|_| bench.request()).collect();
    let mut late = bench.connect();
    let mut told = String::new();
    late.read_to_string(&mut told).unwrap();
    assert!(
        told.starts_with("HTTP/1.1 503 Service Unavailable\r\n"),
        "{told}"
    );
    assert!(told.contains("try again later"), "{told}");
    for request in requests {
        request.reply.send(Ok(Answer::Done));
    }
    for client in &mut busy {
        read_until(client, DONE);
    }
}

#[test]
fn a_body_that_is_too_large_is_refused_while_it_is_sent() {
    let bench = Bench::new();
    let mut client = bench.connect();
    let len = 3 << 20;
    let head = format!("PUT /mmds HTTP/1.1\r\nContent-Length: {len}\r\n\r\n");
    client.write_all(head.as_bytes()).unwrap();
    client.write_all(&vec![b'x'; len]).unwrap();
    let told = read_until(&mut client, "fault_message");
    assert!(
        told.starts_with("HTTP/1.1 413 Payload Too Large\r\n"),
        "{told}"
    );
    // The connection goes on behind it.
    client.write_all(PAUSE.as_bytes()).unwrap();
    assert_eq!(bench.serve(), Command::Pause);
    read_until(&mut client, DONE);
}

#[test]
fn a_client_that_does_not_read_its_answers_is_not_asked_again() {
    let bench = Bench::new();
    let mut client = bench.connect();
    client.set_nonblocking(true).unwrap();
    // More than fits between two sockets.
    let ask = "GET /nope HTTP/1.1\r\n\r\n".repeat(1000);
    let mut sent = 0;
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        match client.write(ask.as_bytes()) {
            Ok(len) => sent += len,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    let stuck = client.write(ask.as_bytes());
    assert!(
        stuck.is_err(),
        "{sent} bytes are taken and no answer is read"
    );
    // Others do not notice.
    let mut other = bench.connect();
    other.write_all(PAUSE.as_bytes()).unwrap();
    bench.serve();
    read_until(&mut other, DONE);
}

#[test]
fn the_end_answers_what_is_out_and_removes_the_socket() {
    let mut bench = Bench::new();
    let mut client = bench.connect();
    client.write_all(PAUSE.as_bytes()).unwrap();
    let request = bench.request();
    // The machine is gone: its requests are dropped, and so answered.
    drop(request);
    bench.thread.stop();
    let mut told = String::new();
    client.read_to_string(&mut told).unwrap();
    assert!(told.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{told}");
    assert!(told.contains("the machine has ended"), "{told}");
    assert!(!bench.path().exists());
}
