//! Sockets between the host and a guest: everything arrives, in order, both ways, and nothing is left behind.
//!
//! `resources/guest/vsock-peer.rs` is the other end, and says what is spoken.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use tempfile::TempDir;

use crate::harness::{Running, Vm, in_the_lab, patience};

/// The port at which the guest serves, and the one at which the host does.
const GUEST: u32 = 52;
const HOST: u32 = 80;

/// How many bytes go through. Programs that are not optimized, in a lab that is software, take minutes for a gigabyte.
fn many() -> u64 {
    const GIGABYTE: u64 = 1_000_000_000;
    if in_the_lab() && cfg!(debug_assertions) {
        GIGABYTE / 10
    } else {
        GIGABYTE
    }
}

/// Seconds for a gigabyte, before patience.
const LONG: u64 = 120;

/// A guest that serves, and the host's side of its device.
struct Peers {
    dir: TempDir,
    vm: Running,
}

impl Peers {
    #[track_caller]
    fn start(change: impl FnOnce(Vm) -> Vm) -> Option<Self> {
        let vm = Vm::any()?;
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("v.sock");
        let mut vm = change(vm).vsock(&path).init_does("shell").boot();
        vm.wait_for_boot();
        vm.type_in(&format!("stty -echo; vsock-peer serve {GUEST} &\n"));
        vm.wait_for(&format!("vsock-peer: serves {GUEST}"));
        Some(Self { dir, vm })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    fn client(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(patience(LONG))).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        stream
    }

    /// A connection to the guest that was taken.
    #[track_caller]
    fn connect(&self, port: u32) -> UnixStream {
        let stream = self.client(port);
        let mut line = String::new();
        BufReader::with_capacity(1, &stream)
            .read_line(&mut line)
            .unwrap();
        assert!(line.starts_with("OK "), "{line:?}");
        stream
    }

    /// Serves the guest's connections as the guest serves ours, but that both checksums are compared there.
    fn serve(&self) {
        let path = self.dir.path().join(format!("v.sock_{HOST}"));
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                thread::spawn(move || obey(stream));
            }
        });
    }

    /// Has the guest run its program, and waits for what it says.
    #[track_caller]
    fn guest_says(&mut self, words: &str, said: &str) {
        self.vm.type_in(&format!("vsock-peer {words}\n"));
        self.vm.wait_for(said);
    }

    /// Ends the guest, and sees that nothing is left.
    fn end(mut self) -> crate::harness::End {
        let path = self.path();
        assert!(path.exists());
        self.vm.type_in("exit\n");
        let end = self.vm.wait();
        end.assert_code(0);
        assert!(!path.exists(), "the socket goes with its machine");
        end
    }
}

fn order(stream: &mut UnixStream, what: u8, number: u64) {
    let mut bytes = vec![what];
    bytes.extend(number.to_le_bytes());
    stream.write_all(&bytes).unwrap();
}

fn number(stream: &mut UnixStream) -> u64 {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn obey(mut stream: UnixStream) {
    let mut what = [0];
    stream.read_exact(&mut what).unwrap();
    let len = number(&mut stream);
    match what[0] {
        b's' => {
            let sum = read_all(&mut stream, len);
            stream.write_all(&sum.to_le_bytes()).unwrap();
        }
        b'r' => {
            let sum = write_all(&mut stream, len);
            stream.write_all(&sum.to_le_bytes()).unwrap();
        }
        b'h' => {
            let len = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
            stream.write_all(&len.to_le_bytes()).unwrap();
        }
        _ => drop(std::io::copy(&mut stream.try_clone().unwrap(), &mut stream)),
    }
}

/// Bytes of one read or write.
const PIECE: usize = 256 << 10;

/// Bytes without a pattern, after which they begin again; a prime number of them, so that no piece of another size
/// falls on the same ones.
fn bytes() -> Vec<u8> {
    let mut word = 1u64;
    let next = |_| {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (word >> 56) as u8
    };
    (0..1_000_003).map(next).collect()
}

fn read_all(stream: &mut UnixStream, len: u64) -> u64 {
    let (mut piece, mut left, mut sum) = (vec![0; PIECE], len, DefaultHasher::new());
    while left > 0 {
        let now = &mut piece[..left.min(PIECE as u64) as usize];
        stream.read_exact(now).unwrap();
        sum.write(now);
        left -= now.len() as u64;
    }
    sum.finish()
}

fn write_all(stream: &mut UnixStream, len: u64) -> u64 {
    let (bytes, mut sum) = (bytes(), DefaultHasher::new());
    let (mut left, mut at) = (len, 0);
    while left > 0 {
        let end = bytes.len().min(at + left.min(PIECE as u64) as usize);
        let now = &bytes[at..end];
        stream.write_all(now).unwrap();
        sum.write(now);
        left -= now.len() as u64;
        at = end % bytes.len();
    }
    sum.finish()
}

#[test]
fn a_gigabyte_each_way_when_the_host_connects() {
    let Some(peers) = Peers::start(|vm| vm.cpus(2).option("--enable-pci")) else {
        return;
    };
    let len = many();
    let mut stream = peers.connect(GUEST);
    order(&mut stream, b's', len);
    let ours = write_all(&mut stream, len);
    assert_eq!(number(&mut stream), ours, "to the guest");
    let mut stream = peers.connect(GUEST);
    order(&mut stream, b'r', len);
    let ours = read_all(&mut stream, len);
    assert_eq!(number(&mut stream), ours, "from the guest");
    drop(stream);
    let end = peers.end();
    assert!(
        end.metrics["vsock"]["bytes_to_guest"].as_u64() >= Some(len),
        "{end}"
    );
    assert_eq!(
        end.metrics["vsock"]["bad_packets"].as_u64(),
        Some(0),
        "{end}"
    );
}

#[test]
fn a_gigabyte_each_way_when_the_guest_connects() {
    let Some(mut peers) = Peers::start(|vm| vm) else {
        return;
    };
    let len = many();
    peers.serve();
    peers.guest_says(
        &format!("send {HOST} {len}"),
        &format!("vsock-peer: sent {len} sum"),
    );
    peers.guest_says(
        &format!("receive {HOST} {len}"),
        &format!("vsock-peer: received {len} sum"),
    );
    peers.end();
}

#[test]
fn hundreds_of_connections_at_once() {
    const MANY: usize = 300;
    let Some(mut peers) = Peers::start(|vm| vm.cpus(2)) else {
        return;
    };
    peers.serve();
    let mut ours: Vec<_> = (0..MANY).map(|_| peers.connect(GUEST)).collect();
    for stream in &mut ours {
        order(stream, b'e', 0);
    }
    peers
        .vm
        .type_in(&format!("vsock-peer echo {HOST} {MANY} 10\n"));
    for round in 0..10u64 {
        for (at, stream) in (0u64..).zip(&mut ours) {
            stream.write_all(&(at ^ round << 32).to_le_bytes()).unwrap();
        }
        for (at, stream) in (0u64..).zip(&mut ours) {
            assert_eq!(number(stream), at ^ round << 32);
        }
    }
    peers
        .vm
        .wait_for(&format!("vsock-peer: echoed {} in", MANY * 10));
    drop(ours);
    let end = peers.end();
    let counters = &end.metrics["vsock"];
    assert_eq!(counters["from_host"].as_u64(), Some(MANY as u64), "{end}");
    assert_eq!(counters["from_guest"].as_u64(), Some(MANY as u64), "{end}");
    assert_eq!(counters["bad_packets"].as_u64(), Some(0), "{end}");
}

#[test]
fn each_direction_ends_by_itself_and_nobody_there_is_told() {
    let Some(mut peers) = Peers::start(|vm| vm.option("--enable-pci")) else {
        return;
    };
    peers.serve();
    let mut stream = peers.connect(GUEST);
    order(&mut stream, b'h', 0);
    stream.write_all(&[1; 12_345]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(number(&mut stream), 12_345);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "and then its own end");
    peers.guest_says(
        &format!("halves {HOST}"),
        "vsock-peer: the host read 100000",
    );
    // Nobody serves there.
    assert_eq!(peers.client(GUEST + 1).read(&mut [0]).unwrap_or(0), 0);
    peers.guest_says(
        &format!("send {} 1", HOST + 1),
        "vsock-peer: failed: Connection reset by peer",
    );
    // A guest that ends with connections open.
    let mut left = peers.connect(GUEST);
    order(&mut left, b'e', 0);
    peers.end();
    assert_eq!(left.read(&mut [0]).unwrap_or(0), 0);
}

/// The socket of a monitor that was killed does not keep the next one from its path.
#[test]
fn a_killed_monitor_leaves_a_path_that_can_be_used_again() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("v.sock");
    let mut running = vm.vsock(&path).init_does("sleep").boot();
    running.wait_for_boot();
    running.signal(nix::sys::signal::Signal::SIGKILL);
    running.wait();
    assert!(path.exists());
    let Some(vm) = Vm::any() else { return };
    vm.vsock(&path).boot().wait().assert_code(0);
    assert!(fs::symlink_metadata(&path).is_err());
}
