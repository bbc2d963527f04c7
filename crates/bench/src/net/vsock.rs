//! Sockets between the host and a guest: the unix socket that our monitor and some others make of them, and the orders of
//! `resources/guest/vsock-peer.rs` behind it. How fast bytes go each way, and how long one takes there and back.
//!
//! Does not know which VMM it speaks through.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

/// Where the guest listens.
pub(super) const PORT: u32 = 52;
/// Bytes after which the guest says that it has them.
const BLOCK: usize = 4 << 20;
/// Bytes of one read or write.
const PIECE: usize = 256 << 10;
/// Bytes of a round trip.
const SMALL: usize = 64;
/// How long a guest may take until it listens, and then to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection with this order given.
fn connect(path: &Path, order: u8, number: u64) -> Result<UnixStream, String> {
    let start = Instant::now();
    loop {
        match try_connect(path, order, number) {
            Err(e) if start.elapsed() > PATIENCE => {
                return Err(format!("vsock, {}: {e}", path.display()));
            }
            // It does not listen yet.
            Err(_) => thread::sleep(Duration::from_millis(20)),
            Ok(stream) => return Ok(stream),
        }
    }
}

fn try_connect(path: &Path, order: u8, number: u64) -> std::io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut line = String::new();
    // No more than the line: what follows is the guest's.
    BufReader::with_capacity(1, &stream).read_line(&mut line)?;
    if !line.starts_with("OK ") {
        return Err(std::io::Error::other(format!("it answers {line:?}")));
    }
    let mut bytes = vec![order];
    bytes.extend(number.to_le_bytes());
    stream.write_all(&bytes)?;
    Ok(stream)
}

/// Has `count` connections work at once for a while; what each gives.
fn at_once<T: Send>(
    path: &Path,
    count: u32,
    (order, number): (u8, u64),
    work: impl Fn(&mut UnixStream) -> std::io::Result<T> + Sync,
) -> Result<Vec<T>, String> {
    let streams = (0..count).map(|_| connect(path, order, number));
    let streams = streams.collect::<Result<Vec<_>, _>>()?;
    let (barrier, work) = (&Barrier::new(streams.len()), &work);
    thread::scope(|scope| {
        let workers: Vec<_> = streams
            .into_iter()
            .map(|mut stream| {
                scope.spawn(move || {
                    barrier.wait();
                    work(&mut stream).map_err(|e| format!("vsock: {e}"))
                })
            })
            .collect();
        let ended = workers.into_iter().map(|worker| {
            let ended = worker.join();
            ended.unwrap_or_else(|_| Err("vsock: a thread panicked".into()))
        });
        ended.collect()
    })
}

/// Bytes a second of all connections together.
pub(super) fn throughput(
    path: &Path,
    seconds: u32,
    connections: u32,
    from_guest: bool,
) -> Result<f64, String> {
    let length = Duration::from_secs(seconds.into());
    let order = if from_guest { b'g' } else { b't' };
    let rates = at_once(path, connections, (order, BLOCK as u64), |stream| {
        let start = Instant::now();
        let (mut piece, mut done) = (vec![0x5a; PIECE], 0u64);
        while start.elapsed() < length {
            if from_guest {
                let got = stream.read(&mut piece)?;
                if got == 0 {
                    return Err(std::io::Error::other("the guest has ended the connection"));
                }
                done += got as u64;
            } else {
                for _ in 0..BLOCK / PIECE {
                    stream.write_all(&piece)?;
                }
                let mut has_it = [0; 8];
                stream.read_exact(&mut has_it)?;
                done += BLOCK as u64;
            }
        }
        Ok(done as f64 / start.elapsed().as_secs_f64())
    })?;
    Ok(rates.iter().sum())
}

/// Round-trip times of all connections in microseconds, in order of length.
pub(super) fn round_trips(path: &Path, seconds: u32, connections: u32) -> Result<Vec<f64>, String> {
    let length = Duration::from_secs(seconds.into());
    let times = at_once(path, connections, (b'e', 0), |stream| {
        let start = Instant::now();
        let (mut bytes, mut times) = ([0x5a; SMALL], Vec::new());
        while start.elapsed() < length {
            let sent = Instant::now();
            stream.write_all(&bytes)?;
            stream.read_exact(&mut bytes)?;
            times.push(sent.elapsed().as_secs_f64() * 1e6);
        }
        Ok(times)
    })?;
    let mut times = times.concat();
    times.sort_by(f64::total_cmp);
    Ok(times)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Behaves as a monitor and `vsock-peer` do.
    fn peer(mut stream: UnixStream) -> std::io::Result<()> {
        let mut line = String::new();
        BufReader::with_capacity(1, &stream).read_line(&mut line)?;
        assert_eq!(line, format!("CONNECT {PORT}\n"));
        stream.write_all(b"OK 1073741824\n")?;
        let mut order = [0; 9];
        stream.read_exact(&mut order)?;
        let mut block = vec![0; BLOCK];
        loop {
            match order[0] {
                b't' => {
                    stream.read_exact(&mut block)?;
                    stream.write_all(&[0; 8])?;
                }
                b'g' => stream.write_all(&block[..PIECE])?,
                _ => {
                    stream.read_exact(&mut block[..SMALL])?;
                    stream.write_all(&block[..SMALL])?;
                }
            }
        }
    }

    #[test]
    fn every_order_is_timed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                thread::spawn(move || peer(stream.unwrap()));
            }
        });
        for from_guest in [false, true] {
            let rate = throughput(&path, 1, 2, from_guest).unwrap();
            assert!(rate > 1e6, "{rate}");
        }
        let times = round_trips(&path, 1, 3).unwrap();
        assert!(times.len() > 10 && times.is_sorted() && times[0] > 0.0);
    }

    #[test]
    fn guest_and_host_agree_on_the_orders() {
        let program = include_str!("../../../../resources/guest/vsock-peer.rs");
        for order in ["b'e' =>", "b't' =>", "b'g' =>"] {
            assert!(program.contains(order), "{order}");
        }
        let script = include_str!("../../../../resources/guest/bench-net");
        assert!(script.contains(&format!("vsock-peer serve {PORT}")));
    }
}
