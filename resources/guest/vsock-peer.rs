//! The guest's end of vsock, for tests and benches. It says on standard output what it does.
//!
//!     vsock-peer serve PORT               take connections, for ever
//!     vsock-peer send PORT BYTES          to the host: so many bytes, and compare checksums
//!     vsock-peer receive PORT BYTES       from the host
//!     vsock-peer echo PORT COUNT ROUNDS   so many connections at once, each of them so often
//!     vsock-peer halves PORT              end one direction, then read the other to its end
//!     vsock-peer tcp-echo PORT            not vsock: send everything of each connection back, for ever
//!     vsock-peer udp-echo PORT            the same with datagrams
//!     vsock-peer udp-ask ADDRESS TEXT     the other end of that: say what comes back, for which it waits for 3 s
//!
//! Who connects says in nine bytes what is to come: a letter and a number (little endian).
//! `s`: so many bytes follow; the answer is their checksum. `r`: answer with so many bytes and their checksum.
//! `e`: send everything back until the end. `h`: read to the end, then answer with how many bytes there were.
//! `t`: so many bytes follow, at which nobody looks; the answer is their number; again and again until the end.
//! `g`: send bytes until nobody takes them.
//!
//! It needs nothing but the kernel: `rustc --edition 2024 -O -C target-feature=+crt-static` makes a program of it. The checksum is
//! that of the standard library's hasher: both ends are made by the same compiler. It does not know which monitor it runs under;
//! `tests/guest/vsock.rs` is the other end.

use std::ffi::c_int;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::FromRawFd;
use std::process::exit;
use std::thread;
use std::time::{Duration, Instant};

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: c_int = 1;
const SOCK_CLOEXEC: c_int = 0o2_000_000;
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;
const SHUT_WR: c_int = 1;
/// Bytes of one read or write.
const PIECE: usize = 256 << 10;

/// `struct sockaddr_vm` (Linux include/uapi/linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const Address, len: u32) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept(fd: c_int, address: *mut Address, len: *mut u32) -> c_int;
    fn connect(fd: c_int, address: *const Address, len: u32) -> c_int;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn address(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK, reserved: 0, port, cid, flags: 0, zero: [0; 3] }
}

fn stream_socket() -> io::Result<c_int> {
    // SAFETY: takes no pointers.
    checked(unsafe { socket(AF_VSOCK.into(), SOCK_STREAM | SOCK_CLOEXEC, 0) })
}

fn file(fd: c_int) -> File {
    // SAFETY: the descriptor was just made, and is nobody else's.
    unsafe { File::from_raw_fd(fd) }
}

fn reach(port: u32) -> io::Result<(File, c_int)> {
    let fd = stream_socket()?;
    let address = address(HOST, port);
    // SAFETY: the address is whole and lives until the call returns.
    checked(unsafe { connect(fd, &raw const address, size_of::<Address>() as u32) })?;
    Ok((file(fd), fd))
}

/// Bytes without a pattern, after which they begin again; a prime number of them, so that no piece of another size
/// falls on the same ones.
fn bytes() -> Vec<u8> {
    let mut word = 88_172_645_463_325_252u64;
    let mut bytes = Vec::new();
    while bytes.len() < 1_000_003 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.push((word >> 32) as u8);
    }
    bytes
}

fn write_all(to: &mut impl Write, len: u64) -> io::Result<u64> {
    let (mut sum, bytes) = (DefaultHasher::new(), bytes());
    let (mut left, mut at) = (len, 0);
    while left > 0 {
        let now = &bytes[at..bytes.len().min(at + left.min(PIECE as u64) as usize)];
        to.write_all(now)?;
        sum.write(now);
        left -= now.len() as u64;
        at = (at + now.len()) % bytes.len();
    }
    Ok(sum.finish())
}

fn read_all(from: &mut impl Read, len: u64) -> io::Result<u64> {
    let (mut sum, mut piece) = (DefaultHasher::new(), vec![0; PIECE]);
    let mut left = len;
    while left > 0 {
        let room = left.min(PIECE as u64) as usize;
        let got = from.read(&mut piece[..room])?;
        if got == 0 {
            return Err(io::Error::other(format!("the end came {left} bytes early")));
        }
        sum.write(&piece[..got]);
        left -= got as u64;
    }
    Ok(sum.finish())
}

fn read_number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn order(stream: &mut impl Write, what: u8, number: u64) -> io::Result<()> {
    let mut bytes = vec![what];
    bytes.extend(number.to_le_bytes());
    stream.write_all(&bytes)
}

fn send_back(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut piece = vec![0; 4096];
    loop {
        let got = stream.read(&mut piece)?;
        if got == 0 {
            return Ok(());
        }
        stream.write_all(&piece[..got])?;
    }
}

fn obey(mut stream: File) -> io::Result<()> {
    let mut what = [0];
    stream.read_exact(&mut what)?;
    let number = read_number(&mut stream)?;
    match what[0] {
        b's' => {
            let sum = read_all(&mut stream, number)?;
            stream.write_all(&sum.to_le_bytes())
        }
        b'r' => {
            let sum = write_all(&mut stream, number)?;
            stream.write_all(&sum.to_le_bytes())
        }
        b'e' => send_back(&mut stream),
        b'h' => {
            let len = io::copy(&mut stream, &mut io::sink())?;
            stream.write_all(&len.to_le_bytes())
        }
        b't' => {
            let mut piece = vec![0; PIECE];
            loop {
                let mut left = number;
                while left > 0 {
                    let room = left.min(PIECE as u64) as usize;
                    let got = stream.read(&mut piece[..room])?;
                    if got == 0 {
                        return Ok(());
                    }
                    left -= got as u64;
                }
                stream.write_all(&number.to_le_bytes())?;
            }
        }
        b'g' => {
            let piece = vec![0x5a; PIECE];
            while stream.write_all(&piece).is_ok() {}
            Ok(())
        }
        other => Err(io::Error::other(format!("no such order: {other}"))),
    }
}

fn serve(port: u32) -> io::Result<()> {
    let listener = stream_socket()?;
    let address = address(ANY, port);
    // SAFETY: the address is whole and lives until the call returns.
    checked(unsafe { bind(listener, &raw const address, size_of::<Address>() as u32) })?;
    // SAFETY: takes no pointers.
    checked(unsafe { listen(listener, 1024) })?;
    println!("vsock-peer: serves {port}");
    loop {
        // SAFETY: both pointers may be null (accept(2)).
        let fd = checked(unsafe { accept(listener, std::ptr::null_mut(), std::ptr::null_mut()) })?;
        let stream = file(fd);
        thread::spawn(move || {
            if let Err(e) = obey(stream) {
                println!("vsock-peer: an order failed: {e}");
            }
        });
    }
}

fn compare(ours: u64, theirs: u64, what: &str, len: u64, start: Instant) -> io::Result<()> {
    if ours != theirs {
        return Err(io::Error::other(format!("{what}: checksums differ")));
    }
    println!("vsock-peer: {what} {len} sum {ours:016x} in {} ms", start.elapsed().as_millis());
    Ok(())
}

fn send(port: u32, len: u64) -> io::Result<()> {
    let (mut stream, _) = reach(port)?;
    let start = Instant::now();
    order(&mut stream, b's', len)?;
    let ours = write_all(&mut stream, len)?;
    compare(ours, read_number(&mut stream)?, "sent", len, start)
}

fn receive(port: u32, len: u64) -> io::Result<()> {
    let (mut stream, _) = reach(port)?;
    let start = Instant::now();
    order(&mut stream, b'r', len)?;
    let ours = read_all(&mut stream, len)?;
    compare(ours, read_number(&mut stream)?, "received", len, start)
}

fn echo(port: u32, count: u64, rounds: u64) -> io::Result<()> {
    let mut streams = Vec::new();
    for _ in 0..count {
        let (mut stream, _) = reach(port)?;
        order(&mut stream, b'e', 0)?;
        streams.push(stream);
    }
    let start = Instant::now();
    for round in 0..rounds {
        for (at, stream) in (0u64..).zip(&mut streams) {
            stream.write_all(&(at ^ round << 32).to_le_bytes())?;
        }
        for (at, stream) in (0u64..).zip(&mut streams) {
            if read_number(stream)? != at ^ round << 32 {
                return Err(io::Error::other(format!("connection {at} answers for another")));
            }
        }
    }
    println!("vsock-peer: echoed {} in {} ms", count * rounds, start.elapsed().as_millis());
    Ok(())
}

fn halves(port: u32) -> io::Result<()> {
    let (mut stream, fd) = reach(port)?;
    order(&mut stream, b'h', 0)?;
    stream.write_all(&[7; 100_000])?;
    // SAFETY: takes no pointers.
    checked(unsafe { shutdown(fd, SHUT_WR) })?;
    println!("vsock-peer: the host read {}", read_number(&mut stream)?);
    Ok(())
}

fn tcp_echo(port: u16) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("vsock-peer: takes connections");
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        thread::spawn(move || {
            if let Err(e) = send_back(&mut stream) {
                println!("vsock-peer: a connection failed: {e}");
            }
        });
    }
}

fn udp_echo(port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("vsock-peer: takes datagrams");
    let mut datagram = [0; 2048];
    loop {
        // What is told of an earlier answer is no reason to end.
        if let Ok((len, from)) = socket.recv_from(&mut datagram) {
            let _ = socket.send_to(&datagram[..len], from);
        }
    }
}

fn udp_ask(address: &str, text: &str) -> io::Result<()> {
    let address: SocketAddr = address.parse().map_err(io::Error::other)?;
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    socket.connect(address)?;
    socket.send(text.as_bytes())?;
    let mut answer = [0; 2048];
    let len = socket.recv(&mut answer)?;
    println!("vsock-peer: answered {}", String::from_utf8_lossy(&answer[..len]));
    Ok(())
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).and_then(|w| w.parse::<u64>().ok()).unwrap_or_default();
    let port = number(1) as u32;
    let done = match words.first().map(String::as_str) {
        Some("serve") => serve(port),
        Some("send") => send(port, number(2)),
        Some("receive") => receive(port, number(2)),
        Some("echo") => echo(port, number(2), number(3)),
        Some("halves") => halves(port),
        Some("tcp-echo") => tcp_echo(port as u16),
        Some("udp-echo") => udp_echo(port as u16),
        Some("udp-ask") if words.len() == 3 => udp_ask(&words[1], &words[2]),
        _ => Err(io::Error::other("say serve, send, receive, echo, halves, tcp-echo, udp-echo or udp-ask")),
    };
    if let Err(e) = done {
        println!("vsock-peer: failed: {e}");
        exit(1);
    }
}
