//! A small client of the API, for tests: plain HTTP on a unix socket, one request after the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Nothing here takes longer, even in the lab.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client on one connection, which is made anew when the server closes it.
pub(crate) struct Client {
    path: PathBuf,
    stream: Option<UnixStream>,
}

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    /// `null` without a body.
    pub(crate) body: Value,
}

impl Response {
    /// What a refusal says; empty where it is none.
    pub(crate) fn fault(&self) -> &str {
        self.body["fault_message"].as_str().unwrap_or_default()
    }
}

impl Client {
    /// Waits until somebody listens at `path`.
    #[track_caller]
    pub(crate) fn at(path: &Path) -> Self {
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(path).is_err() {
            assert!(
                Instant::now() < until,
                "nobody listens at {}",
                path.display()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Self {
            path: path.to_owned(),
            stream: None,
        }
    }

    /// Asks; `null` sends no body.
    #[track_caller]
    pub(crate) fn ask(&mut self, method: &str, path: &str, body: &Value) -> Response {
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.send(method, path, &text)
    }

    /// Asks with any text for a body.
    #[track_caller]
    pub(crate) fn send(&mut self, method: &str, path: &str, body: &str) -> Response {
        let stream = self.stream.get_or_insert_with(|| {
            let stream = UnixStream::connect(&self.path).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        });
        let length = match body.len() {
            0 => String::new(),
            len => format!("Content-Length: {len}\r\n"),
        };
        let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        let response = read_response(stream);
        if response.head.contains("Connection: close") {
            self.stream = None;
        }
        response
    }

    pub(crate) fn get(&mut self, path: &str) -> Value {
        let response = self.ask("GET", path, &Value::Null);
        assert_eq!(response.status, 200, "GET {path}: {response:?}");
        response.body
    }

    /// Asks for something that has to be done.
    #[track_caller]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers write the body where they ask"
    )]
    pub(crate) fn done(&mut self, method: &str, path: &str, body: Value) {
        let response = self.ask(method, path, &body);
        assert_eq!(response.status, 204, "{method} {path} {body}: {response:?}");
    }

    /// Asks for something that has to be refused, and tells why it was.
    #[track_caller]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers write the body where they ask"
    )]
    pub(crate) fn refused(&mut self, method: &str, path: &str, body: Value) -> String {
        let response = self.ask(method, path, &body);
        assert_eq!(response.status, 400, "{method} {path} {body}: {response:?}");
        assert!(!response.fault().is_empty(), "{response:?}");
        response.fault().to_owned()
    }
}

/// Reads one response.
#[track_caller]
pub(crate) fn read_response(stream: &mut impl Read) -> Response {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        let len = stream.read(&mut byte).unwrap();
        assert_eq!(len, 1, "the end after {:?}", String::from_utf8_lossy(&head));
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|l| l.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |l| l.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    let body = match body.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&body).unwrap(),
    };
    Response { status, head, body }
}
