//! A guest at work with everything it has goes through snapshots and new processes, at random moments, and into forks: nothing is
//! lost, and nothing is repeated.
//!
//! `resources/guest/snapshot-witness.rs` works in it and says what it does; fio writes and verifies its disk; this is the other end of
//! the connections. TCP connections must survive: host and tap stay. Those of the socket device are reset by contract, the guest must be
//! told, and both ends say anew how far they are.
//!
//! A guest that goes on after its snapshot has a future that the loaded one does not have. Nobody outside may have seen it: its tap is down
//! from before the snapshot, and its disk is a copy, which the monitor makes at the instant of memory. Of records on vsock, those that came after the snapshot are taken again.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::network::{HOST, MAC, ip, tap};
use crate::harness::images::{fio_root, output, path};
use crate::harness::{Running, Vm, in_the_lab, patience};

/// Ports of the host's ends.
const TCP: u16 = 9001;
const VSOCK: u32 = 80;
/// A round of this many is a fork as well.
const FORK_EVERY: u32 = 10;
/// The first of them.
const FIRST_FORK: u32 = 1;
/// Most memory files of one chain.
const MOST_LAYERS: usize = 5;
const DISK_BYTES: u64 = 16 << 20;

/// How many rounds each test goes through. More are a matter of patience: nothing about them is different.
fn rounds() -> u32 {
    let said = std::env::var("ALVEOLE_TEST_ROUNDS").ok();
    let usual = if in_the_lab() { 3 } else { 12 };
    said.map_or(usual, |text| text.parse().expect("a number of rounds"))
}

/// How long who works rests between two steps. Where its processors are software, a guest works in less of a hurry.
fn pause() -> Duration {
    Duration::from_millis(if in_the_lab() { 20 } else { 2 })
}

// The other end of the connections -----------------------------------------------------------

const RECORD: usize = 4096;
/// Who sends: the guest or the host.
const GUEST_SENDS: u64 = 1;
const HOST_SENDS: u64 = 2;

fn mix(number: u64) -> u64 {
    let mut word = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// What a record is: its number, and words that follow from it and from who sends.
fn record(number: u64, sender: u64) -> Vec<u8> {
    let words = (1..RECORD as u64 / 8).map(|at| mix((number << 10) ^ at ^ (sender << 62)));
    std::iter::once(number)
        .chain(words)
        .flat_map(u64::to_le_bytes)
        .collect()
}

#[derive(Default)]
struct Peers {
    stop: AtomicBool,
    tcp_in: AtomicU64,
    tcp_out: AtomicU64,
    vsock_in: AtomicU64,
    vsock_out: AtomicU64,
    /// A guest may come that has sent less than was received: not less than this.
    rewound_to: Mutex<Option<u64>>,
    wrong: Mutex<Vec<String>>,
}

impl Peers {
    /// Listens on both ways.
    fn start(dir: &Path) -> Arc<Self> {
        let peers = Arc::new(Self::default());
        let listener = TcpListener::bind((HOST, TCP)).unwrap();
        let tcp = Arc::clone(&peers);
        thread::spawn(move || {
            if let Err(e) = tcp.serve_tcp(&listener) {
                tcp.wrong(format!("TCP: {e}"));
            }
        });
        let listener = UnixListener::bind(dir.join(format!("v.sock_{VSOCK}"))).unwrap();
        let vsock = Arc::clone(&peers);
        thread::spawn(move || {
            for stream in listener.incoming() {
                // It ends with its guest; how far both are counts, not why.
                let _ = vsock.serve_vsock(stream.unwrap());
            }
        });
        peers
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    fn serve_tcp(self: &Arc<Self>, listener: &TcpListener) -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut out = stream.try_clone()?;
        let peers = Arc::clone(self);
        let sender = thread::spawn(move || -> std::io::Result<()> {
            while !peers.stop.load(Ordering::SeqCst) {
                out.write_all(&record(peers.tcp_out.load(Ordering::SeqCst), HOST_SENDS))?;
                peers.tcp_out.fetch_add(1, Ordering::SeqCst);
                thread::sleep(pause());
            }
            out.shutdown(Shutdown::Write)
        });
        while self.take_record(&mut stream, &self.tcp_in, "TCP")? {}
        sender.join().unwrap()
    }

    /// Reads the next record; false at the end, which is between two.
    fn take_record(
        &self,
        from: &mut impl Read,
        received: &AtomicU64,
        what: &str,
    ) -> std::io::Result<bool> {
        let mut bytes = [0; RECORD];
        let got = from.read(&mut bytes)?;
        if got == 0 {
            return Ok(false);
        }
        from.read_exact(&mut bytes[got..])?;
        let number = received.load(Ordering::SeqCst);
        if bytes[..] != record(number, GUEST_SENDS) {
            let said = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            self.wrong(format!(
                "{what}: a record that says {said} is not record {number}"
            ));
        }
        received.fetch_add(1, Ordering::SeqCst);
        Ok(true)
    }

    fn serve_vsock(self: &Arc<Self>, mut stream: UnixStream) -> std::io::Result<()> {
        let mut number = [0; 8];
        stream.read_exact(&mut number)?;
        let theirs_received = u64::from_le_bytes(number);
        stream.read_exact(&mut number)?;
        let theirs_sent = u64::from_le_bytes(number);
        let (sent, received) = (
            self.vsock_out.load(Ordering::SeqCst),
            self.vsock_in.load(Ordering::SeqCst),
        );
        if theirs_received > sent {
            self.wrong(format!(
                "vsock: the guest has {theirs_received} records, {sent} were sent"
            ));
        }
        if received > theirs_sent {
            let least = *self.rewound_to.lock().unwrap();
            if least.is_none_or(|least| theirs_sent < least) {
                self.wrong(format!(
                    "vsock: {received} records came of a guest that says {theirs_sent} (least: {least:?})"
                ));
            }
            self.vsock_in.store(theirs_sent, Ordering::SeqCst);
        }
        for number in [
            self.vsock_in.load(Ordering::SeqCst),
            self.vsock_out.load(Ordering::SeqCst),
        ] {
            stream.write_all(&number.to_le_bytes())?;
        }
        let mut out = stream.try_clone()?;
        let peers = Arc::clone(self);
        let sender = thread::spawn(move || {
            let mut number = theirs_received;
            // What was begun once is sent to the end.
            while !peers.stop.load(Ordering::SeqCst)
                || number < peers.vsock_out.load(Ordering::SeqCst)
            {
                peers.vsock_out.fetch_max(number + 1, Ordering::SeqCst);
                if out.write_all(&record(number, HOST_SENDS)).is_err() {
                    return;
                }
                number += 1;
                thread::sleep(pause());
            }
        });
        while let Ok(true) = self.take_record(&mut stream, &self.vsock_in, "vsock") {}
        let _ = stream.shutdown(Shutdown::Both);
        sender.join().unwrap();
        Ok(())
    }

    fn counts(&self) -> [(&'static str, u64); 4] {
        let of = |count: &AtomicU64| count.load(Ordering::SeqCst);
        [
            ("tcp_out", of(&self.tcp_in)),
            ("tcp_in", of(&self.tcp_out)),
            ("vsock_out", of(&self.vsock_in)),
            ("vsock_in", of(&self.vsock_out)),
        ]
    }

    #[track_caller]
    fn assert_nothing_wrong(&self) {
        let wrong = self.wrong.lock().unwrap();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

// The guest ------------------------------------------------------------------------------------

/// What the guest does, line by line; each is asked.
fn begin(guest: &mut Running) {
    let (pause_ms, mib) = (pause().as_millis(), if in_the_lab() { 4 } else { 16 });
    let fio = format!(
        "chroot /root /usr/bin/fio --name=job --filename=/dev/vdb --ioengine=libaio --direct=1 --iodepth=16 --bs=16k \
        --rw=randwrite --rate={rate}m --fsync=64 --size={mib}m --verify=crc32c --verify_fatal=1 --do_verify=1 --eta=never --output=/tmp/report",
        rate = mib / 2
    );
    let verify = format!(
        "verify() {{ n=0; while [ ! -e /stop ]; do if {fio} >/root/tmp/said 2>&1; then n=$((n + 1)); echo $n >/verified; \
         else echo wrong: fio; cat /root/tmp/*; echo 1 >/fio_wrong; break; fi; done; echo 1 >/fio_ended; }}"
    );
    for line in [
        "ip link set lo up && ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0",
        "mount -t ext4 -o ro /dev/vda /root && mount -t tmpfs tmp /root/tmp && mount -t devtmpfs dev /root/dev && mount -t proc proc /root/proc",
        "for name in verified fio_wrong fio_ended; do echo 0 >/$name; done",
        &verify,
        &format!(
            "snapshot-witness works {HOST}:{TCP} {VSOCK} {pause_ms} & verify & until [ -e /status ]; do usleep 10000; done"
        ),
    ] {
        let (status, said) = guest.ask(line);
        assert_eq!(status, 0, "{line}: {said}");
    }
}

type Status = BTreeMap<String, u64>;

/// What the works in the guest say of themselves.
#[track_caller]
fn status(guest: &mut Running) -> Status {
    let (_, said) = guest.ask(
        "echo $(cat /status) verified $(cat /verified) fio_wrong $(cat /fio_wrong) fio_ended $(cat /fio_ended) \
         disk $(awk '{ print $1 + $5 }' /sys/block/vdb/stat)",
    );
    let words: Vec<&str> = said.split_whitespace().collect();
    let pair = |pair: &[&str]| Some((pair[0].to_owned(), pair.get(1)?.parse().ok()?));
    let status: Option<Status> = words.chunks(2).map(pair).collect();
    status.unwrap_or_else(|| panic!("no status: {said}"))
}

#[track_caller]
fn assert_all_right(status: &Status) {
    for wrong in ["wrong", "fio_wrong"] {
        assert_eq!(status[wrong], 0, "{status:?}");
    }
}

/// Waits until all of these have gone on.
#[track_caller]
fn wait_for_progress(guest: &mut Running, works: &[&str], since: &Status) -> Status {
    let until = Instant::now() + patience(60);
    loop {
        let now = status(guest);
        assert_all_right(&now);
        let still: Vec<_> = works.iter().filter(|w| now[**w] <= since[**w]).collect();
        if still.is_empty() {
            return now;
        }
        assert!(
            Instant::now() < until,
            "{still:?} stand still:\n{since:?}\n{now:?}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// Works that need nobody outside.
const OWN: &[&str] = &["ticks", "expirations", "cpu", "disk"];
const ALL: &[&str] = &[
    "ticks",
    "expirations",
    "cpu",
    "disk",
    "tcp_out",
    "tcp_in",
    "vsock_out",
    "vsock_in",
];

// Rounds ---------------------------------------------------------------------------------------

/// Marsaglia's xorshift of 64 bits.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn seed() -> u64 {
    let said = std::env::var("ALVEOLE_TEST_SEED").ok();
    said.map_or_else(
        || {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            now.unwrap().as_nanos() as u64 | 1
        },
        |text| text.parse().expect("a seed"),
    )
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Paused, and never resumed.
    Ends,
    /// Paused, and resumed.
    GoesOn,
    /// Never paused.
    Live,
}

struct Rounds {
    dir: TempDir,
    options: &'static [&'static str],
    random: Random,
    peers: Arc<Peers>,
    /// Memory files that what is loaded needs, the oldest first.
    chain: Vec<PathBuf>,
    done: BTreeMap<String, u32>,
    slowest: [Duration; 2],
}

impl Rounds {
    fn vm(&self) -> Vm {
        let vm = Vm::any().unwrap();
        self.options.iter().fold(vm, |vm, word| vm.option(word))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn count(&mut self, what: &str) {
        *self.done.entry(what.to_owned()).or_default() += 1;
    }

    /// Takes a snapshot of the guest, its disk with it, and ends its process.
    fn take(&mut self, guest: Running, round: u32, how: How, kind: &str) {
        let mut client = guest.client();
        if how != How::Ends {
            ip("link set dev tap0 down");
            let mut least = self.peers.rewound_to.lock().unwrap();
            least.get_or_insert(self.peers.vsock_in.load(Ordering::SeqCst));
        }
        if how != How::Live {
            client.done("PATCH", "/vm", json!({"state": "Paused"}));
        }
        let disk = if round == 0 {
            "disk".into()
        } else {
            format!("disk{}", round - 1)
        };
        let (disk, copy) = (self.file(&disk), self.file(&format!("disk{round}")));
        let memory = self.file(&format!("memory{round}"));
        let body = json!({
            "snapshot_type": kind,
            "live": how == How::Live,
            "snapshot_path": self.file(&format!("state{round}")),
            "mem_file_path": memory,
            "drives": [{"drive_id": "disk1", "path_on_host": copy}],
        });
        let start = Instant::now();
        let answer = client.ask("PUT", "/snapshot/create", &body);
        assert!(
            matches!(answer.status, 200 | 204),
            "round {round}: {answer:?}"
        );
        self.slowest[0] = self.slowest[0].max(start.elapsed());
        if how == How::GoesOn {
            client.done("PATCH", "/vm", json!({"state": "Resumed"}));
            thread::sleep(Duration::from_millis(self.random.below(300)));
        }
        assert!(!guest.has_shown("wrong: "), "round {round}: {guest:?}");
        if self.random.below(2) == 0 {
            guest.signal(Signal::SIGINT);
            guest.wait();
        } else {
            // Killed.
            drop(guest);
        }
        fs::remove_file(disk).unwrap();
        if kind == "Full" {
            for old in self.chain.drain(..) {
                fs::remove_file(old).unwrap();
            }
        }
        self.chain.push(memory);
        if how != How::Ends {
            ip("link set dev tap0 up");
        }
    }

    /// A guest of that round's snapshot, with this disk, tap and socket.
    fn load(&mut self, round: u32, disk: &Path, tap: &str, socket: &str) -> Running {
        let resumes = self.random.below(2) == 0;
        let body = json!({
            "snapshot_path": self.file(&format!("state{round}")),
            "mem_backend": {"backend_type": "File", "backend_path": self.file(&format!("memory{round}"))},
            "track_dirty_pages": true,
            "resume_vm": resumes,
            "drive_overrides": [{"drive_id": "disk1", "path_on_host": disk}],
            "network_overrides": [{"iface_id": "net0", "host_dev_name": tap}],
            "vsock_override": {"uds_path": self.file(socket)},
        });
        let start = Instant::now();
        let guest = self.vm().loads(body).boot();
        self.slowest[1] = self.slowest[1].max(start.elapsed());
        if !resumes {
            guest
                .client()
                .done("PATCH", "/vm", json!({"state": "Resumed"}));
        }
        guest
    }

    /// A second guest of the same snapshot, beside the first.
    fn fork(&mut self, round: u32) {
        let disk = self.file("disk-of-fork");
        let mut fork = self.load(round, &disk, "tap1", "fork.sock");
        let first = status(&mut fork);
        let last = wait_for_progress(&mut fork, OWN, &first);
        // Long enough for fio to have read back what was written before.
        let until = Instant::now() + patience(60);
        while status(&mut fork)["verified"] <= last["verified"] {
            assert!(Instant::now() < until, "fio verifies nothing: {last:?}");
            thread::sleep(Duration::from_millis(100));
        }
        assert_all_right(&status(&mut fork));
        assert!(!fork.has_shown("wrong: "), "{fork:?}");
        fork.signal(Signal::SIGINT);
        let end = fork.wait();
        assert!(!end.console.contains("wrong: "), "{end}");
        fs::remove_file(disk).unwrap();
        self.count("forks");
    }

    fn go(&mut self, mut guest: Running, rounds: u32) -> Running {
        let first = status(&mut guest);
        let mut known = wait_for_progress(&mut guest, ALL, &first);
        for round in 0..rounds {
            let last = round + 1 == rounds;
            thread::sleep(Duration::from_millis(self.random.below(700)));
            let how = [How::Ends, How::Live, How::GoesOn][self.random.below(3) as usize];
            let is_diff = !(self.chain.is_empty() || self.chain.len() >= MOST_LAYERS)
                && self.random.below(3) > 0;
            let kind = if is_diff { "Diff" } else { "Full" };
            println!("round {round}: {how:?} {kind}");
            self.count(&format!("{kind} {how:?}"));
            self.take(guest, round, how, kind);
            let forks = round % FORK_EVERY == FIRST_FORK;
            let disk = self.file(&format!("disk{round}"));
            if forks {
                output(
                    "cp",
                    &[
                        "--sparse=always",
                        path(&disk),
                        path(&self.file("disk-of-fork")),
                    ],
                );
            }
            guest = self.load(round, &disk, "tap0", "v.sock");
            if forks {
                self.fork(round);
            }
            // Now and then the next one comes at once, before TCP has noticed anything.
            if forks || last || self.random.below(2) == 0 {
                let works = [ALL, &["resets"]].concat();
                known = wait_for_progress(&mut guest, &works, &known);
                *self.peers.rewound_to.lock().unwrap() = None;
            }
            self.peers.assert_nothing_wrong();
        }
        guest
    }

    /// Has both ends stop, and compares what they sent with what they have received.
    fn finish(&self, mut guest: Running) -> Status {
        guest.ask("touch /stop");
        self.peers.stop.store(true, Ordering::SeqCst);
        let until = Instant::now() + patience(60);
        loop {
            let now = status(&mut guest);
            assert_all_right(&now);
            let is_even = self
                .peers
                .counts()
                .iter()
                .all(|(name, ours)| now[*name] == *ours);
            if is_even && now["tcp_ended"] == 1 && now["fio_ended"] == 1 {
                self.peers.assert_nothing_wrong();
                let end = guest.leave();
                end.assert_code(0);
                assert!(!end.console.contains("wrong: "), "{end}");
                return now;
            }
            assert!(
                Instant::now() < until,
                "not even: {now:?}, here {:?}",
                self.peers.counts()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn goes_through_rounds(transport: &str, options: &'static [&'static str]) {
    let (Some(vm), Some(root), Some(())) = (Vm::any(), fio_root(), tap(1500)) else {
        return;
    };
    for words in [
        "tuntap add dev tap1 mode tap vnet_hdr",
        "link set dev tap1 up",
    ] {
        ip(words);
    }
    let (seed, rounds) = (seed(), rounds());
    println!("{transport}: {rounds} rounds, ALVEOLE_TEST_SEED={seed}");
    let dir = TempDir::new().unwrap();
    let disk = dir.path().join("disk");
    fs::File::create(&disk)
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    let vm = options.iter().fold(vm, |vm, word| vm.option(word));
    let vm = vm.memory_mib(256).cpus(2).tracks_dirty_pages();
    let vm = vm.disk(root, json!({"is_read_only": true}));
    let vm = vm.disk(&disk, Value::Null);
    let vm = vm.tap("tap0", json!({"guest_mac": MAC}));
    let vm = vm.vsock(&dir.path().join("v.sock"));
    let peers = Peers::start(dir.path());
    let mut guest = vm.takes_commands().by_api().boot();
    guest.wait_for_commands();
    begin(&mut guest);
    let mut all = Rounds {
        dir,
        options,
        random: Random(seed),
        peers,
        chain: Vec::new(),
        done: BTreeMap::new(),
        slowest: [Duration::ZERO; 2],
    };
    let start = Instant::now();
    let guest = all.go(guest, rounds);
    let end = all.finish(guest);
    println!(
        "{transport}: {rounds} rounds (seed {seed}) in {:.1} s, {:?}; slowest snapshot and load {:?}; then {end:?}",
        start.elapsed().as_secs_f64(),
        all.done,
        all.slowest,
    );
}

#[test]
fn nothing_is_lost_or_repeated_in_many_rounds_by_mmio() {
    goes_through_rounds("mmio", &[]);
}

#[test]
fn nothing_is_lost_or_repeated_in_many_rounds_by_pci() {
    goes_through_rounds("pci", &["--enable-pci"]);
}
