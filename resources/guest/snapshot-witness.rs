//! What runs in a guest of which snapshots are taken, and finds out whether anything is lost, repeated or torn.
//!
//!     snapshot-witness works ADDRESS:PORT VSOCK-PORT PAUSE-MS   everything below at once, until /stop is there
//!     snapshot-witness stamps MIB THREADS PAUSE-US              writes memory page after page, for ever
//!
//! `works` keeps /status, a line of names and numbers, and says `wrong: ...` on standard output:
//!
//! - timers: sleeps until given moments, and a timer of the kernel's whose expirations are counted; the clock never goes back, on no
//!   processor, no sleep ends early, and no expiration is missing (`ticks`, `expirations`);
//! - processor: integers, floating point and 2 MiB of memory give the same again and again (`cpu`);
//! - TCP: records to the host and from it on one connection, which must never break (`tcp_out`, `tcp_in`);
//! - vsock: the same on a connection that may be reset, and is made anew (`vsock_out`, `vsock_in`, `resets`). First each end says in two
//!   numbers how many records it has received and how many it has begun to send; what was not received is sent again, in order.
//!
//! A record is its number and what follows from that, as little-endian words: `record` says what.
//!
//! `stamps`: each thread has pages of its own and writes them in order, round and round, every word of a page with the number of the
//! write; then it adds one to a number that all threads share. So what memory is at one instant can be told from what it never was:
//! `tests/guest/instants.rs` says how, and `tests/guest/rounds.rs` is the other end of the connections.
//!
//! It needs nothing but the kernel: `rustc --edition 2024 -O -C target-feature=+crt-static` makes a program of it. It does not know
//! which monitor it runs under, nor when a snapshot is taken.

use std::ffi::{c_int, c_long};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::exit;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: c_int = 1;
const HOST: u32 = 2;
const CLOCK_MONOTONIC: c_int = 1;
const TIMER_ABSTIME: c_int = 1;

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

#[repr(C)]
struct Time {
    seconds: i64,
    nanoseconds: c_long,
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(fd: c_int, address: *const Address, len: u32) -> c_int;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn clock_gettime(clock: c_int, time: *mut Time) -> c_int;
    fn clock_nanosleep(clock: c_int, flags: c_int, until: *const Time, left: *mut Time) -> c_int;
    fn timerfd_create(clock: c_int, flags: c_int) -> c_int;
    fn timerfd_settime(fd: c_int, flags: c_int, new: *const [Time; 2], old: *mut [Time; 2]) -> c_int;
}

/// How long who works rests.
static PAUSE_MS: AtomicU64 = AtomicU64::new(0);

fn pause_ms() -> u64 {
    PAUSE_MS.load(Ordering::Relaxed)
}

fn pause() {
    thread::sleep(Duration::from_millis(pause_ms()));
}

/// What is shown of one kind of work.
static COUNTS: [(&str, AtomicU64); 10] = [
    ("ticks", AtomicU64::new(0)),
    ("expirations", AtomicU64::new(0)),
    ("cpu", AtomicU64::new(0)),
    ("tcp_out", AtomicU64::new(0)),
    ("tcp_in", AtomicU64::new(0)),
    ("tcp_ended", AtomicU64::new(0)),
    ("vsock_out", AtomicU64::new(0)),
    ("vsock_in", AtomicU64::new(0)),
    ("resets", AtomicU64::new(0)),
    ("wrong", AtomicU64::new(0)),
];

fn count(name: &str) -> &'static AtomicU64 {
    let known = COUNTS.iter().find(|(n, _)| *n == name);
    &known.unwrap_or(&COUNTS[COUNTS.len() - 1]).1
}

fn wrong(what: &str) {
    count("wrong").fetch_add(1, Ordering::SeqCst);
    println!("wrong: {what}");
}

fn is_over() -> bool {
    Path::new("/stop").exists()
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

// Time ----------------------------------------------------------------------------------------

/// The latest time that anybody has seen.
static LATEST_NS: AtomicU64 = AtomicU64::new(0);

fn now_ns() -> u64 {
    let before = LATEST_NS.load(Ordering::SeqCst);
    let mut time = Time { seconds: 0, nanoseconds: 0 };
    // SAFETY: writes one `Time`.
    unsafe { clock_gettime(CLOCK_MONOTONIC, &raw mut time) };
    let now = time.seconds as u64 * 1_000_000_000 + time.nanoseconds as u64;
    if now < before {
        wrong(&format!("the clock went back from {before} to {now} ns"));
    }
    LATEST_NS.fetch_max(now, Ordering::SeqCst);
    now
}

fn time(ns: u64) -> Time {
    Time { seconds: (ns / 1_000_000_000) as i64, nanoseconds: (ns % 1_000_000_000) as c_long }
}

fn ticks() {
    loop {
        let until_ns = now_ns() + 2 * pause_ms() * 1_000_000;
        let until = time(until_ns);
        // SAFETY: reads one `Time`; what is left need not be told.
        let slept = unsafe { clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &raw const until, std::ptr::null_mut()) };
        let now = now_ns();
        if slept == 0 && now < until_ns {
            wrong(&format!("slept until {now} ns, not until {until_ns}"));
        }
        count("ticks").fetch_add(1, Ordering::SeqCst);
    }
}

/// A timer that expires again and again: as often as the time that went by says, neither more nor less.
fn expirations() -> io::Result<()> {
    let period_ns = 5 * pause_ms() * 1_000_000;
    // SAFETY: takes no pointers.
    let fd = checked(unsafe { timerfd_create(CLOCK_MONOTONIC, 0) })?;
    // SAFETY: the descriptor was just made, and is nobody else's.
    let mut timer = unsafe { File::from_raw_fd(fd) };
    let start = now_ns() + period_ns;
    let setting = [time(period_ns), time(start)];
    // SAFETY: reads two times; the old setting need not be told.
    checked(unsafe { timerfd_settime(fd, TIMER_ABSTIME, &raw const setting, std::ptr::null_mut()) })?;
    let most = |now: u64| if now < start { 0 } else { (now - start) / period_ns + 1 };
    let mut all = 0;
    loop {
        let before = now_ns();
        let mut bytes = [0; 8];
        timer.read_exact(&mut bytes)?;
        all += u64::from_le_bytes(bytes);
        let after = now_ns();
        // The kernel's own idea of when the timer is due is finer than a period by far, not exact.
        if all + 1 < most(before) || all > most(after) + 1 {
            wrong(&format!("{all} expirations, not {} to {}", most(before), most(after)));
        }
        count("expirations").store(all, Ordering::SeqCst);
    }
}

// Processor -----------------------------------------------------------------------------------

fn mix(number: u64) -> u64 {
    let mut word = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn processor() {
    let compute = || {
        let (mut word, mut numbers) = (1, [1.0_f64, 1.5, 2.5, 3.5]);
        for _ in 0..20_000 {
            word = mix(word);
            for number in &mut numbers {
                *number = (*number * 1.000_3 + 0.125).sqrt() + 1.0;
            }
        }
        (word, numbers.map(f64::to_bits))
    };
    let first = compute();
    let mut memory = vec![0u64; 1 << 18];
    for generation in 1u64.. {
        if compute() != first {
            wrong("the processor computed something else");
        }
        for (at, word) in (0u64..).zip(&mut memory) {
            *word = generation << 32 | at;
        }
        now_ns();
        if (0u64..).zip(&memory).any(|(at, word)| *word != generation << 32 | at) {
            wrong("memory is not what was written");
        }
        count("cpu").fetch_add(1, Ordering::SeqCst);
        pause();
    }
}

// Connections ---------------------------------------------------------------------------------

const RECORD: usize = 4096;

/// What record `number` is: its number, and words that follow from it and from who sends.
fn record(number: u64, sender: u64) -> Vec<u8> {
    let words = (1..RECORD as u64 / 8).map(|at| mix(number << 10 ^ at ^ sender << 62));
    std::iter::once(number).chain(words).flat_map(u64::to_le_bytes).collect()
}

/// The guest sends as this, the host as 2.
const GUEST: u64 = 1;

/// Reads a record, which must be this one. None at the end, which is only between two.
fn take_record(from: &mut impl Read, number: u64, what: &str) -> io::Result<Option<()>> {
    let mut bytes = [0; RECORD];
    let got = from.read(&mut bytes)?;
    if got == 0 {
        return Ok(None);
    }
    from.read_exact(&mut bytes[got..])?;
    if bytes[..] != record(number, 2) {
        let said = u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]]);
        wrong(&format!("{what}: a record that says {said} is not record {number}"));
    }
    Ok(Some(()))
}

fn tcp(address: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    let mut out = stream.try_clone()?;
    let sender = thread::spawn(move || -> io::Result<()> {
        let sent = count("tcp_out");
        while !is_over() {
            out.write_all(&record(sent.load(Ordering::SeqCst), GUEST))?;
            sent.fetch_add(1, Ordering::SeqCst);
            pause();
        }
        out.shutdown(Shutdown::Write)
    });
    let received = count("tcp_in");
    while take_record(&mut stream, received.load(Ordering::SeqCst), "TCP")?.is_some() {
        received.fetch_add(1, Ordering::SeqCst);
    }
    sender.join().map_err(|_| io::Error::other("the sender panicked"))??;
    count("tcp_ended").store(1, Ordering::SeqCst);
    Ok(())
}

fn vsock_connect(port: u32) -> io::Result<(File, c_int)> {
    // SAFETY: takes no pointers.
    let fd = checked(unsafe { socket(AF_VSOCK.into(), SOCK_STREAM, 0) })?;
    // SAFETY: the descriptor was just made, and is nobody else's.
    let stream = unsafe { File::from_raw_fd(fd) };
    let address = Address { family: AF_VSOCK, reserved: 0, port, cid: HOST, flags: 0, zero: [0; 3] };
    // SAFETY: the address is whole and lives until the call returns.
    checked(unsafe { connect(fd, &raw const address, size_of::<Address>() as u32) })?;
    Ok((stream, fd))
}

/// One connection, until it is reset.
fn vsock(mut stream: File, fd: c_int) -> io::Result<()> {
    let (sent, received) = (count("vsock_out"), count("vsock_in"));
    for number in [received, sent] {
        stream.write_all(&number.load(Ordering::SeqCst).to_le_bytes())?;
    }
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes)?;
    let (theirs, _) = bytes.split_at(8);
    let resume_at = u64::from_le_bytes([
        theirs[0], theirs[1], theirs[2], theirs[3], theirs[4], theirs[5], theirs[6], theirs[7],
    ]);
    if resume_at > sent.load(Ordering::SeqCst) {
        wrong(&format!("vsock: the host has {resume_at} records, {} were sent", sent.load(Ordering::SeqCst)));
    }
    let mut out = stream.try_clone()?;
    let sender = thread::spawn(move || -> io::Result<()> {
        let mut number = resume_at;
        // What was begun once is sent to the end.
        while !is_over() || number < sent.load(Ordering::SeqCst) {
            // Begun, therefore sent: how much of it arrives only the other end knows.
            sent.fetch_max(number + 1, Ordering::SeqCst);
            let written = out.write_all(&record(number, GUEST));
            if written.is_err() {
                // SAFETY: takes no pointers. The other half waits in a read.
                unsafe { shutdown(fd, 2) };
                return written;
            }
            number += 1;
            pause();
        }
        Ok(())
    });
    let result = loop {
        match take_record(&mut stream, received.load(Ordering::SeqCst), "vsock") {
            Ok(Some(())) => received.fetch_add(1, Ordering::SeqCst),
            Ok(None) => break Ok(()),
            Err(e) => break Err(e),
        };
    };
    // SAFETY: takes no pointers.
    unsafe { shutdown(fd, 2) };
    let sender = sender.join().map_err(|_| io::Error::other("the sender panicked"))?;
    result.and(sender)
}

fn works(address: &str, port: u32) {
    thread::spawn(ticks);
    thread::spawn(processor);
    thread::spawn(|| {
        if let Err(e) = expirations() {
            wrong(&format!("timer: {e}"));
        }
    });
    let address = address.to_owned();
    thread::spawn(move || {
        if let Err(e) = tcp(&address) {
            wrong(&format!("TCP: {e}"));
        }
    });
    thread::spawn(move || {
        loop {
            if let Ok((stream, fd)) = vsock_connect(port) {
                match vsock(stream, fd) {
                    // Who waits is told of the reset, who comes later finds no connection; an orderly end is none.
                    Err(e)
                        if matches!(
                            e.kind(),
                            ErrorKind::ConnectionReset | ErrorKind::NotConnected | ErrorKind::BrokenPipe
                        ) =>
                    {
                        count("resets").fetch_add(1, Ordering::SeqCst)
                    }
                    _ => 0,
                };
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    loop {
        let line: String = COUNTS.iter().map(|(name, n)| format!("{name} {} ", n.load(Ordering::SeqCst))).collect();
        // Whoever reads it has all of one line.
        if fs::write("/status.new", line).and_then(|()| fs::rename("/status.new", "/status")).is_err() {
            wrong("cannot write /status");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

// Memory --------------------------------------------------------------------------------------

/// Words of a page.
const WORDS: usize = 512;
/// First word of each page that a thread writes; then the thread and the place of the page among its own; then the number of the
/// write, in all others.
const STAMPED: u64 = 0x5374_616d_7065_6421;
/// First word of the page whose third counts all writes.
const COUNTED: u64 = 0x436f_756e_7465_6421;

#[repr(C, align(4096))]
struct Page([AtomicU64; WORDS]);

fn stamp(thread: u64, pages: &[Page], counter: &AtomicU64, pause: Duration) {
    for (at, page) in (0u64..).zip(pages) {
        page.0[1].store(thread << 32 | at, Ordering::Release);
        page.0[0].store(STAMPED, Ordering::Release);
    }
    let mut number = 0;
    loop {
        for page in pages {
            number += 1;
            // Releases are seen in their order.
            for word in &page.0[2..] {
                word.store(number, Ordering::Release);
            }
            counter.fetch_add(1, Ordering::SeqCst);
            if !pause.is_zero() {
                thread::sleep(pause);
            }
        }
        if number == pages.len() as u64 {
            println!("stamped by {thread}");
        }
    }
}

fn stamps(mib: usize, threads: usize, pause: Duration) {
    let page = || Page([const { AtomicU64::new(0) }; WORDS]);
    let counter: &Page = Box::leak(Box::new(page()));
    counter.0[0].store(COUNTED, Ordering::SeqCst);
    let each = mib * 256 / threads;
    for thread in 0..threads as u64 {
        let mut pages = Vec::with_capacity(each);
        pages.resize_with(each, page);
        let pages: &[Page] = Vec::leak(pages);
        thread::spawn(move || stamp(thread, pages, &counter.0[2], pause));
    }
    loop {
        thread::park();
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).and_then(|w| w.parse::<u64>().ok()).unwrap_or_default();
    match words.first().map(String::as_str) {
        Some("works") if number(3) > 0 => {
            PAUSE_MS.store(number(3), Ordering::Relaxed);
            works(&words[1], number(2) as u32);
        }
        Some("stamps") if number(1) > 0 && number(2) > 0 => {
            stamps(number(1) as usize, number(2) as usize, Duration::from_micros(number(3)));
        }
        _ => {
            println!("snapshot-witness: say works or stamps, as the head of its source says");
            exit(2);
        }
    }
}
