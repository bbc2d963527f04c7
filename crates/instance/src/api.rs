//! What a VM's monitor is asked by its API: HTTP/1.1 on a unix socket, one request on a connection.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use crate::{InstanceError, Vm};

/// The most of an answer that is read: counters of a large machine are some 100 KiB. What is at the other end may be a guest's by now.
const MAX_ANSWER_BYTES: usize = 4 << 20;
const MAX_HEADERS: usize = 32;

/// A running VM's monitor.
#[derive(Clone, Debug)]
pub struct MonitorApi<'a> {
    vm: &'a Vm,
    patience: Duration,
}

/// A whole answer.
struct Answer {
    status: u16,
    body: String,
}

impl<'a> MonitorApi<'a> {
    /// That of this VM. Each answer has `patience`, however slowly it comes.
    #[must_use]
    pub fn new(vm: &'a Vm, patience: Duration) -> Self {
        Self { vm, patience }
    }

    /// The body of what is at this path.
    ///
    /// # Errors
    ///
    /// The VM does not run, or its monitor refuses or does not answer.
    pub fn get(&self, path: &str) -> Result<String, InstanceError> {
        self.ask("GET", path, "")
    }

    /// Changes what is at this path.
    ///
    /// # Errors
    ///
    /// The VM does not run, or its monitor refuses or does not answer.
    pub fn patch(&self, path: &str, body: &Value) -> Result<(), InstanceError> {
        self.ask("PATCH", path, &body.to_string()).map(drop)
    }

    /// Does, or sets, what is at this path, and gives what the monitor says of it.
    ///
    /// # Errors
    ///
    /// The VM does not run, or its monitor refuses or does not answer.
    pub fn put(&self, path: &str, body: &Value) -> Result<String, InstanceError> {
        self.ask("PUT", path, &body.to_string())
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<String, InstanceError> {
        let fail = |why: String| InstanceError::Monitor {
            name: self.vm.name.clone(),
            request: format!("{method} {path}"),
            why,
        };
        let until = Instant::now() + self.patience;
        let stream = self.connected().map_err(|e| match e.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                InstanceError::DoesNotRun(self.vm.name.clone())
            }
            ErrorKind::WouldBlock => fail("too many wait for it already".into()),
            _ => fail(format!("cannot connect: {e}")),
        })?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = exchange(stream, request.as_bytes(), until).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => fail(format!(
                "no answer within {} s: it is stopped, or hangs",
                self.patience.as_secs_f32()
            )),
            _ => fail(e.to_string()),
        })?;
        if (200..300).contains(&answer.status) {
            return Ok(answer.body);
        }
        let said: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        let why = said["fault_message"].as_str();
        Err(fail(why.map_or_else(
            || format!("status {}", answer.status),
            str::to_owned,
        )))
    }

    /// Connects without waiting for a monitor that takes no connections.
    fn connected(&self) -> std::io::Result<UnixStream> {
        let address = SocketAddrUnix::new(self.vm.socket("api"))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(stream)
    }
}

fn exchange(
    mut stream: impl Read + Write + SetPatience,
    request: &[u8],
    until: Instant,
) -> std::io::Result<Answer> {
    stream.wait_until(until)?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 16 << 10];
    loop {
        if let Some(whole) = whole(&answer)? {
            return Ok(whole);
        }
        stream.wait_until(until)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(std::io::Error::other("it ended amid its answer")),
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if answer.len() > MAX_ANSWER_BYTES {
            return Err(std::io::Error::other(format!(
                "its answer is longer than {MAX_ANSWER_BYTES} bytes"
            )));
        }
    }
}

/// What can be told how long to wait.
trait SetPatience {
    fn wait_until(&self, until: Instant) -> std::io::Result<()>;
}

impl SetPatience for UnixStream {
    fn wait_until(&self, until: Instant) -> std::io::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.set_read_timeout(Some(left))?;
        self.set_write_timeout(Some(left))
    }
}

/// The answer, when all of it is there.
fn whole(bytes: &[u8]) -> std::io::Result<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(e) => {
            return Err(std::io::Error::other(format!("its answer is no HTTP: {e}")));
        }
    };
    let length = response
        .headers
        .iter()
        .find(|h| h.name.eq_ignore_ascii_case("content-length"));
    let length = match length {
        None => 0,
        Some(header) => std::str::from_utf8(header.value)
            .ok()
            .and_then(|text| text.trim().parse::<usize>().ok())
            .filter(|length| *length <= MAX_ANSWER_BYTES)
            .ok_or_else(|| std::io::Error::other("its answer has no length that can be"))?,
    };
    let Some(body) = bytes.get(head..head + length) else {
        return Ok(None);
    };
    Ok(Some(Answer {
        status: response.code.unwrap_or_default(),
        body: String::from_utf8_lossy(body).into_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::folder::test_vm;

    /// Serves one connection with these bytes, in pieces, and keeps it open.
    fn answered(answer: &'static [u8], piece: usize) -> Result<String, InstanceError> {
        let dir = tempfile::tempdir().unwrap();
        let vm = test_vm(dir.path());
        let listener = UnixListener::bind(vm.socket("api")).unwrap();
        thread::scope(|scope| {
            let server = scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                let count = stream.read(&mut request).unwrap();
                assert!(request[..count].starts_with(b"GET /metrics HTTP/1.1\r\n"));
                for piece in answer.chunks(piece) {
                    // The client goes when it has what it wants.
                    let _ = stream.write_all(piece);
                    thread::sleep(Duration::from_millis(1));
                }
                stream
            });
            let api = MonitorApi::new(&vm, Duration::from_millis(300));
            let result = api.get("/metrics");
            drop(server.join().unwrap());
            result
        })
    }

    #[test]
    fn answers_are_taken_whole_and_by_their_length() {
        let answer = b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 5\r\n\r\nhellobehind";
        for piece in [1, 7, 1000] {
            assert_eq!(answered(answer, piece).unwrap(), "hello");
        }
        assert_eq!(
            answered(b"HTTP/1.1 204 No Content\r\n\r\n", 100).unwrap(),
            ""
        );
    }

    #[test]
    fn whatever_comes_instead_is_told() {
        let cases: [(&[u8], &str); 5] = [
            (
                b"HTTP/1.1 400 Bad\r\nContent-Length: 23\r\n\r\n{\"fault_message\":\"why\"}",
                "GET /metrics of the monitor of 'web': why",
            ),
            (b"HTTP/1.1 503 Busy\r\n\r\n", "status 503"),
            (b"something else\r\n\r\n", "no HTTP"),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
                "no length",
            ),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
                "no answer within 0.3 s",
            ),
        ];
        for (answer, expected) in cases {
            let said = answered(answer, 1000).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn a_monitor_that_is_not_there_or_takes_nobody_is_told_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let vm = test_vm(dir.path());
        let api = MonitorApi::new(&vm, Duration::from_secs(60));
        let gone = api.get("/").unwrap_err();
        assert!(matches!(gone, InstanceError::DoesNotRun(_)), "{gone}");
        let listener = UnixListener::bind(vm.socket("api")).unwrap();
        // Fill what waits to be accepted.
        let mut waiting = Vec::new();
        let begun = Instant::now();
        while let Ok(stream) = api.connected() {
            waiting.push(stream);
            assert!(waiting.len() < 100_000);
        }
        let busy = api.get("/").unwrap_err().to_string();
        assert!(busy.contains("too many wait"), "{busy}");
        assert!(begun.elapsed() < Duration::from_secs(30));
        drop(listener);
    }
}
