//! Requests and answers by TCP, as netperf's TCP_RR: one byte there, one byte back, then the next. Each is a packet of its own
//! both ways, so that the time is that of the whole way and of two interrupts.
//!
//! Does not know which VMM lies between; `vsock-peer tcp-echo` in the guest sends back.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// Where the guest listens: what RFC 862 calls echo.
pub(super) const PORT: u16 = 7;
/// How long a guest may take until it listens, and then to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Round trips before those that count: the connection has its window by then, and the neighbours know each other.
const WARM: usize = 100;

/// Round-trip times in microseconds, in order of length.
pub(super) fn round_trips(address: &str, seconds: u32) -> Result<Vec<f64>, String> {
    trips(address, PORT, Duration::from_secs(seconds.into()))
        .map_err(|e| format!("TCP to {address} port {PORT}: {e}"))
}

fn trips(address: &str, port: u16, length: Duration) -> std::io::Result<Vec<f64>> {
    let mut stream = connect(address, port)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut byte, mut times) = ([0], Vec::new());
    for _ in 0..WARM {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    let start = Instant::now();
    while start.elapsed() < length {
        let sent = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        times.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

fn connect(address: &str, port: u16) -> std::io::Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect((address, port)) {
            Err(e) if start.elapsed() > PATIENCE => return Err(e),
            // It does not listen yet.
            Err(_) => thread::sleep(Duration::from_millis(20)),
            Ok(stream) => return Ok(stream),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn answers_are_timed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() {
                stream.write_all(&byte).unwrap();
            }
        });
        let times = trips("127.0.0.1", port, Duration::from_millis(200)).unwrap();
        assert!(times.len() > 10 && times.is_sorted() && times[0] > 0.0);
    }

    #[test]
    fn the_guest_listens_where_we_ask() {
        let script = include_str!("../../../../resources/guest/bench-net");
        assert!(script.contains(&format!("vsock-peer tcp-echo {PORT} ")));
    }
}
