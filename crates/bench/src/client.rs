//! A client of Firecracker's API on one connection; knows HTTP as far as that takes.
//!
//! Does not know what is asked.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::run;

/// A connection to the API.
pub(crate) struct Client {
    stream: UnixStream,
    /// What has been read and belongs to no answer yet.
    read: Vec<u8>,
}

impl Client {
    /// Waits until somebody listens. `arrival` becomes readable when the socket is there: who looked for it again and again would
    /// take the processor from the process that is measured.
    pub(crate) fn connect(
        socket: &Path,
        arrival: &impl AsFd,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let until = Instant::now() + patience;
        run::wait_readable(arrival, until);
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(patience))?;
                    return Ok(Self {
                        stream,
                        read: Vec::new(),
                    });
                }
                Err(error) if Instant::now() >= until => {
                    bail!("nobody listens at {}: {error}", socket.display())
                }
                // Between bind and listen are a few microseconds.
                Err(_) => thread::yield_now(),
            }
        }
    }

    /// Asks, waits for the answer, and says how long that took.
    pub(crate) fn ask(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.send(method, path, body)?;
        self.receive().with_context(|| format!("{method} {path}"))?;
        Ok(start.elapsed())
    }

    pub(crate) fn send(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<()> {
        let length = match body.len() {
            0 => String::new(),
            len => format!("Content-Length: {len}\r\n"),
        };
        let text = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}");
        Ok(self.stream.write_all(text.as_bytes())?)
    }

    /// Reads one answer; its body.
    pub(crate) fn receive(&mut self) -> anyhow::Result<String> {
        let mut piece = [0; 16 << 10];
        loop {
            if let Some((head_bytes, body_bytes, status)) = head(&self.read)
                && self.read.len() >= head_bytes + body_bytes
            {
                let body = &self.read[head_bytes..head_bytes + body_bytes];
                let body = String::from_utf8_lossy(body).into_owned();
                if !(200..300).contains(&status) {
                    bail!("status {status}: {body}");
                }
                self.read.drain(..head_bytes + body_bytes);
                return Ok(body);
            }
            let len = self.stream.read(&mut piece)?;
            if len == 0 {
                bail!("the connection was closed");
            }
            self.read.extend_from_slice(&piece[..len]);
        }
    }
}

/// Length of the head, of the body behind it, and the status; nothing while it is not complete.
fn head(text: &[u8]) -> Option<(usize, usize, u16)> {
    let end = text.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(text.get(..end)?).ok()?;
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_it = name.eq_ignore_ascii_case("content-length");
        is_it.then(|| value.trim().parse().ok())?
    });
    Some((end + 4, length.unwrap_or(0), status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_when_they_are_complete() {
        let text = b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-length: 5\r\n\r\nhello";
        let end = text.len() - 5;
        for len in 0..end {
            assert_eq!(head(&text[..len]), None, "{len}");
        }
        assert_eq!(head(text), Some((end, 5, 200)));
        assert_eq!(head(b"HTTP/1.1 204 \r\n\r\nHT"), Some((17, 0, 204)));
    }
}
