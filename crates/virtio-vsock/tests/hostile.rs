//! Guests that lie, programs of the host that do not keep to the protocol, and paths that cannot be listened at.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(unreachable_pub, reason = "shared by the tests of this crate")]
mod guest;

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use alveole_virtio::testing::{Buffer, Stage};
use alveole_virtio_vsock::{
    ANSWER_TIMEOUT, CLOSE_TIMEOUT, HEADER_BYTES, Header, MAX_CONNECTIONS, MAX_GREETINGS,
    MAX_PATH_BYTES, MAX_PENDING_RESETS, VirtioVsock, VsockConfig, op,
};
use guest::{CID, EVENT, Guest, Host, Link, PATIENCE, RX, TX, is_closed, read_ok};

#[track_caller]
fn wait_until(mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
}

/// Open descriptors of this process. Other tests run beside this one; it is a bound, not a count.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

// ---- guests

#[test]
fn what_belongs_to_no_connection_is_reset() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let link = Link::new(1024, 80);
    let request = link.header(op::REQUEST);
    let cases = [
        // Nobody listens there.
        request,
        // Operations of no connection, known and unknown.
        link.header(op::RESPONSE),
        link.shutdown(3),
        link.data(0),
        link.header(op::CREDIT_UPDATE),
        link.header(op::CREDIT_REQUEST),
        link.header(0),
        link.header(8),
        link.header(u16::MAX),
        // Types (section 5.10.6.4): none, seqpacket, unknown.
        Header { kind: 0, ..request },
        Header { kind: 2, ..request },
        Header {
            kind: 0xffff,
            ..request
        },
        // Contexts: of another guest, of the hypervisor, too large by a half; from somebody else.
        Header {
            dst_cid: 9,
            ..request
        },
        Header {
            dst_cid: 0,
            ..request
        },
        Header {
            dst_cid: 1 << 32 | 2,
            ..request
        },
        Header {
            src_cid: 9,
            ..request
        },
        Header {
            src_cid: 1 << 32 | u64::from(CID),
            ..request
        },
    ];
    for header in cases {
        guest.send(header, &[]);
        let reset = guest.expect(op::RST);
        assert_eq!(
            (reset.src_cid, reset.src_port, reset.dst_port, reset.kind),
            (header.dst_cid, 80, 1024, header.kind),
            "{header:?}"
        );
        assert_eq!(reset.dst_cid, header.src_cid);
    }
    // Or they would go on for ever.
    guest.send(link.header(op::RST), &[]);
    guest.send(
        Header {
            kind: 7,
            ..link.header(op::RST)
        },
        &[],
    );
    assert!(guest.hears_nothing());
}

#[test]
fn a_connection_ends_by_what_no_driver_may_send() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let link = Link::new(1024, 80);
    let cases: [(&str, Vec<(Header, usize)>); 9] = [
        ("a request again", vec![(link.header(op::REQUEST), 0)]),
        (
            "an answer that nobody waits for",
            vec![(link.header(op::RESPONSE), 0)],
        ),
        ("no operation", vec![(link.header(0), 0)]),
        ("an unknown operation", vec![(link.header(9), 0)]),
        (
            "data after its end",
            vec![(link.shutdown(2), 0), (link.data(1), 1)],
        ),
        (
            "the end is not taken back",
            vec![
                (link.shutdown(2), 0),
                (link.shutdown(0), 0),
                (link.data(1), 1),
            ],
        ),
        ("data that is not there", vec![(link.data(100), 99)]),
        (
            "data of 4 GiB",
            vec![(
                Header {
                    len: u32::MAX,
                    ..link.data(0)
                },
                100,
            )],
        ),
        ("only a header of data", vec![(link.data(1), 0)]),
    ];
    for (name, packets) in cases {
        guest.open(1024, 80);
        let (mut stream, _) = listener.accept().unwrap();
        for (header, len) in packets {
            guest.send(header, &vec![1; len]);
        }
        let (reset, _) = guest.recv();
        assert_eq!(reset.op, op::RST, "{name}");
        assert!(link.is_of(&reset), "{name}");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let left = stream.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(left, 0, "{name}: nothing of it reaches the host");
        assert!(guest.hears_nothing(), "{name}");
    }
    // What carries no data is not held to its length, and the buffer may be longer than the data.
    guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    let odd = Header {
        len: 1 << 20,
        ..link.header(op::CREDIT_REQUEST)
    };
    guest.send(odd, &[]);
    guest.expect(op::CREDIT_UPDATE);
    guest.send(link.data(2), b"hidden");
    guest.send(link.data(0), &[]);
    guest.send(link.shutdown(2), &[]);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi");
}

/// Data whose address is not memory ends its connection; a header whose address is not, the whole ring.
#[test]
fn buffers_outside_memory_are_noticed() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let link = guest.open(1024, 80);
    let _stream = listener.accept().unwrap();
    let header = link.data(16).to_bytes();
    let outside = Buffer::Raw(Stage::RAM_BYTES - 8, 16, false);
    guest.driver.submit(TX, &[Buffer::Out(&header), outside]);
    guest.expect(op::RST);
    let end = Stage::RAM_BYTES;
    let short = [0; HEADER_BYTES - 1];
    let cases: [(u16, &[Buffer<'_>]); 9] = [
        (TX, &[Buffer::Out(&short)]),
        (TX, &[Buffer::In(100)]),
        (TX, &[Buffer::Raw(end - 20, 44, false)]),
        (TX, &[Buffer::Raw(u64::MAX - 20, 44, false)]),
        (RX, &[Buffer::In(HEADER_BYTES as u32)]),
        (RX, &[Buffer::In(7)]),
        (RX, &[Buffer::Out(&header), Buffer::In(100)]),
        (RX, &[Buffer::Raw(end - 20, 100, true)]),
        (RX, &[Buffer::Raw(u64::MAX - 20, 100, true)]),
    ];
    for (queue, buffers) in cases {
        guest.driver.start();
        guest.driver.submit(queue, buffers);
        if queue == RX {
            // It is looked at when it is wanted.
            let request = link.header(op::REQUEST).to_bytes();
            guest.driver.submit(TX, &[Buffer::Out(&request)]);
        }
        assert!(guest.driver.wait_for_needs_reset(PATIENCE), "{buffers:?}");
        // Clients wait meanwhile, and nobody spins.
        let _client = host.client();
    }
    guest.driver.start();
    let room = guest.driver.submit(RX, &[Buffer::In(44), Buffer::In(1)]);
    let request = link.header(op::REQUEST).to_bytes();
    // Cut anywhere.
    let (a, b) = request.split_at(13);
    guest.driver.request(TX, &[Buffer::Out(a), Buffer::Out(b)]);
    assert_eq!(guest.driver.wait(RX).head, room);
    listener.accept().unwrap();
}

/// Section 5.10.6.1: packets are read as long as there is room for answers, and from then on when there is again.
#[test]
fn a_guest_without_receive_buffers_is_bounded() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::new(&stage, host.device());
    // Programs of the host send meanwhile, and clients come.
    let link = Link::new(1024, 80);
    guest.send(link.header(op::REQUEST), &[]);
    let (stream, _) = listener.accept().unwrap();
    let mut writer = stream.try_clone().unwrap();
    thread::spawn(move || while writer.write_all(&[1; 1 << 16]).is_ok() {});
    let clients: Vec<_> = (0..20).map(|port| host.connect(port)).collect();
    let nonsense = Link::new(5, 5).header(op::CREDIT_UPDATE);
    let mut sent = 0;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        if guest.try_send(nonsense, &[]) {
            sent += 1;
        }
    }
    // Those that were read, and those that wait in the test's 64 buffers.
    assert_eq!(sent, MAX_PENDING_RESETS + 64);
    let counters = guest.handle.counters().clone();
    assert_eq!(counters.bytes_to_guest.get(), 0);
    assert!(counters.no_buffer.get() > 0);
    // Everything is answered once there are buffers, and the connection goes on.
    guest.give_rooms(16, 4096);
    let (mut resets, mut requests, mut bytes) = (0, 0, 0);
    while resets < sent || requests < clients.len() || bytes < 100_000 {
        let (header, data) = guest.recv();
        match header.op {
            op::RST => resets += 1,
            op::REQUEST => requests += 1,
            op::RW => bytes += data.len(),
            op::RESPONSE | op::CREDIT_REQUEST => {}
            _ => panic!("{header:?}"),
        }
    }
    assert_eq!(resets, sent);
    stream.shutdown(std::net::Shutdown::Both).unwrap();
}

#[test]
fn a_hundred_thousand_attempts_cost_nothing_that_stays() {
    const ATTEMPTS: u32 = 100_000;
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let before = descriptors();
    // To nobody.
    let (mut sent, mut refused) = (0, 0);
    while refused < ATTEMPTS {
        if sent < ATTEMPTS && guest.try_send(Link::new(sent, 81).header(op::REQUEST), &[]) {
            sent += 1;
        }
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::RST);
            refused += 1;
        }
    }
    assert!(
        descriptors() <= before + 200,
        "{} descriptors",
        descriptors()
    );
    assert_eq!(guest.handle.counters().refused.get(), u64::from(ATTEMPTS));
    // To somebody who takes them, and never closed: as many as there may be.
    let taker = thread::spawn(move || {
        let mut taken = Vec::new();
        while taken.len() < MAX_CONNECTIONS.min(soft_limit()) {
            taken.push(listener.accept().unwrap().0);
        }
        (listener, taken)
    });
    let (mut opened, mut refused) = (0, 0);
    for port in 0..ATTEMPTS / 10 {
        guest.send(Link::new(port, 80).header(op::REQUEST), &[]);
        while let Some((header, _)) = guest.poll() {
            match header.op {
                op::RESPONSE => opened += 1,
                op::RST => refused += 1,
                _ => panic!("{header:?}"),
            }
        }
    }
    let (_listener, taken) = taker.join().unwrap();
    while opened + refused < ATTEMPTS as usize / 10 {
        match guest.recv().0.op {
            op::RESPONSE => opened += 1,
            _ => refused += 1,
        }
    }
    assert_eq!(opened, taken.len());
    // A client of the host is turned away, too, and the others live.
    if opened == MAX_CONNECTIONS {
        assert!(is_closed(&mut host.connect(1)));
    }
    guest.send(Link::new(0, 80).data(5), b"alive");
    let mut got = [0; 5];
    (&taken[0]).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"alive");
    // One that ends makes room for another.
    guest.send(Link::new(1, 80).header(op::RST), &[]);
    guest.send(Link::new(1, 80).header(op::REQUEST), &[]);
    guest.expect(op::RESPONSE);
}

/// How many connections this process can have both ends of.
fn soft_limit() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|l| l.starts_with("Max open files"));
    let soft = line.unwrap().split_whitespace().nth(3).unwrap();
    soft.parse::<usize>()
        .unwrap_or(usize::MAX)
        .saturating_sub(400)
        / 2
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let mut stream = host.connect(52);
    let start = Instant::now();
    guest.expect(op::REQUEST);
    let gone = host.connect(53);
    guest.expect(op::REQUEST);
    drop(gone);
    let reset = guest.expect(op::RST);
    assert_eq!(reset.dst_port, 53, "one that has gone is not waited for");
    assert!(is_closed(&mut stream));
    assert!(start.elapsed() >= ANSWER_TIMEOUT - Duration::from_millis(100));
    assert_eq!(guest.expect(op::RST).dst_port, 52);
    // A late answer belongs to nobody.
    guest.send(Link::new(52, reset.src_port).header(op::RESPONSE), &[]);
    guest.expect(op::RST);
    // Nor is one that never acknowledges an end.
    let stream = host.connect(52);
    let link = guest.accept();
    read_ok(&stream);
    drop(stream);
    let start = Instant::now();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 3);
    let (header, _) = guest.recv();
    assert!(header.op == op::RST && link.is_of(&header));
    assert!(start.elapsed() >= CLOSE_TIMEOUT - Duration::from_millis(500));
    assert_eq!(guest.handle.counters().timeouts.get(), 2);
    // A refusal ends the client's connection.
    let mut stream = host.connect(52);
    let request = guest.expect(op::REQUEST);
    guest.send(Link::new(52, request.src_port).header(op::RST), &[]);
    assert!(is_closed(&mut stream));
}

/// A program of the host whose queue of connections is full is not a program that is not there.
#[test]
fn a_busy_program_of_the_host_is_waited_for() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    // The smallest queue there is.
    relisten(&listener);
    let mut guest = Guest::ready(&stage, &host);
    for port in 0..10 {
        guest.send(Link::new(port, 80).header(op::REQUEST), &[]);
    }
    thread::sleep(Duration::from_millis(100));
    let streams: Vec<_> = (0..10).map(|_| listener.accept().unwrap().0).collect();
    for _ in &streams {
        guest.expect(op::RESPONSE);
    }
    // One that never comes to it is given up.
    for port in 10..20 {
        guest.send(Link::new(port, 80).header(op::REQUEST), &[]);
    }
    let answers: Vec<_> = (0..10).map(|_| guest.recv().0.op).collect();
    assert!(answers.contains(&op::RST) && answers.contains(&op::RESPONSE));
    assert!(guest.handle.counters().timeouts.get() > 0);
    // While it waits, the guest may think better of it.
    guest.send(Link::new(30, 80).header(op::REQUEST), &[]);
    guest.send(Link::new(30, 80).header(op::RST), &[]);
    assert!(guest.hears_nothing());
}

fn relisten(listener: &UnixListener) {
    nix::sys::socket::listen(listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
}

/// Packets of few ports and all kinds, mostly proper ones, in any order and with any credit, while programs of the host
/// come and go: connections break, the device does not.
#[test]
fn any_conversation_leaves_a_device_that_works() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            // Some read, some write, some do neither, some go at once.
            match i % 5 {
                0 => drop(stream),
                1 => drop(thread::spawn(move || stream.read_to_end(&mut Vec::new()))),
                2 => drop(thread::spawn(move || stream.write_all(&[3; 5000]))),
                3 => drop(thread::spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                })),
                _ => drop(stream.shutdown(std::net::Shutdown::Read)),
            }
        }
    });
    let mut guest = Guest::ready(&stage, &host);
    let mut seed = 1u32;
    let mut random = |below: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % below
    };
    let mut of_host: Vec<Link> = Vec::new();
    for round in 0..30_000 {
        let link = match (of_host.len() as u32, random(3)) {
            (n, 0) if n > 0 => of_host[random(n) as usize],
            _ => Link::new(random(8), 80 + random(2)),
        };
        let len = random(300);
        let header = Header {
            op: random(9) as u16,
            flags: random(5),
            len,
            buf_alloc: [0, 10, 1 << 18, u32::MAX][random(4) as usize],
            fwd_cnt: [0, len, random(u32::MAX), u32::MAX][random(4) as usize],
            ..link.header(0)
        };
        let there = [len, len, len, 0][random(4) as usize];
        guest.send(header, &vec![9; there as usize]);
        if round % 50 == 0 {
            drop(host.connect(random(10)));
        }
        while let Some((header, _)) = guest.poll() {
            if header.op == op::REQUEST {
                of_host.truncate(10);
                of_host.insert(0, Link::new(header.dst_port, header.src_port));
            }
        }
    }
    let counters = guest.handle.counters().clone();
    assert!(counters.from_guest.get() > 100 && counters.bad_packets.get() > 1000);
    for port in 0..8 {
        guest.send(Link::new(port, 80).header(op::RST), &[]);
    }
    let mut stream = host.connect(1000);
    let link = loop {
        let (header, _) = guest.recv();
        if header.op == op::REQUEST && header.dst_port == 1000 {
            break Link::new(1000, header.src_port);
        }
    };
    guest.send(link.header(op::RESPONSE), &[]);
    guest.send(link.data(4), b"fine");
    read_ok(&stream);
    let mut got = [0; 4];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"fine");
}

// ---- programs of the host

#[test]
fn clients_that_do_not_keep_to_the_protocol_are_turned_away() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let lines: [&[u8]; 8] = [
        b"CONNECT\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 52 53\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        &[0; 32],
        &[0xff; 4096],
        b"CONNECT 00000000000000000000000000000052",
    ];
    for line in lines {
        let mut client = host.client();
        // It may be gone before it has said everything.
        let _ = client.write_all(line);
        assert!(is_closed(&mut client), "{line:?}");
    }
    let mut cut = host.client();
    cut.write_all(b"CONN").unwrap();
    assert!(guest.hears_nothing());
    cut.write_all(b"ECT 5").unwrap();
    assert!(guest.hears_nothing());
    cut.write_all(b"2\nrest").unwrap();
    let mut link = guest.accept();
    read_ok(&cut);
    assert_eq!(link.local, 52);
    assert_eq!(link.read(&mut guest, 4), b"rest");
    // One that goes in the middle of a word.
    host.client().write_all(b"CONNECT 5").unwrap();
    let counters = guest.handle.counters().clone();
    wait_until(|| counters.turned_away.get() == lines.len() as u64 + 1);
}

#[test]
fn thousands_of_silent_clients_keep_nobody_out() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let counters = guest.handle.counters().clone();
    let mut silent: Vec<UnixStream> = Vec::new();
    for i in 1..=3000u64 {
        silent.push(host.client());
        if silent.len() > 2 * MAX_GREETINGS {
            // Those that were turned away; the test has not more descriptors than the device.
            silent.drain(..MAX_GREETINGS);
        }
        if i % 500 == 0 {
            let stream = host.connect(i as u32);
            let link = guest.accept();
            assert_eq!((read_ok(&stream), u64::from(link.local)), (link.port, i));
            guest.send(link.header(op::RST), &[]);
        }
    }
    wait_until(|| counters.turned_away.get() >= 3000 - 2 * MAX_GREETINGS as u64);
    // The last ones wait for their turn to speak.
    let last = silent.last_mut().unwrap();
    last.write_all(b"CONNECT 9\n").unwrap();
    guest.accept();
    read_ok(last);
}

// ---- paths

#[test]
fn a_path_that_cannot_be_listened_at_is_explained() {
    let host = Host::new();
    let make = |path: &Path, guest_cid| {
        let uds_path = path.into();
        VirtioVsock::new(&VsockConfig {
            guest_cid,
            uds_path,
        })
        .map(|_| ())
        .map_err(|e| e.to_string())
    };
    let file = host.path().with_extension("file");
    std::fs::write(&file, "precious").unwrap();
    let used = host.path().with_extension("used");
    let _used = UnixListener::bind(&used).unwrap();
    let deep = host.path().with_file_name("missing").join("v.sock");
    let under_file = file.join("v.sock");
    let fill = |len: usize| {
        let base = host.path().with_extension("");
        let base = base.to_str().unwrap().to_owned();
        let more = len - base.len();
        Path::new(&(base + &"x".repeat(more))).to_owned()
    };
    for (path, cid, parts) in [
        (Path::new(""), 3, vec!["\"\"", "empty", "name a file"]),
        (Path::new("a\0b"), 3, vec!["zero byte"]),
        (
            &fill(MAX_PATH_BYTES + 1),
            3,
            vec![
                "97 bytes",
                "it may have 96",
                "_4294967295",
                "shorter directory",
            ],
        ),
        (&file, 3, vec!["exists and is not a socket", "remove it"]),
        (
            &used,
            3,
            vec!["belongs to a running process", "choose another path"],
        ),
        (&deep, 3, vec!["No such file", "make its directory first"]),
        (&under_file, 3, vec!["is no directory"]),
        (
            &host.path(),
            0,
            vec!["guest_cid 0 is reserved", "from 3 to"],
        ),
        (&host.path(), 2, vec!["guest_cid 2 is reserved"]),
        (
            &host.path(),
            u32::MAX,
            vec!["guest_cid 4294967295 is reserved"],
        ),
    ] {
        let told = make(path, cid).unwrap_err();
        for part in parts {
            assert!(told.contains(part), "{told} / {part}");
        }
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    make(&fill(MAX_PATH_BYTES), u32::MAX - 1).unwrap();
    make(&host.path(), 3).unwrap();
}

#[test]
fn the_socket_is_private_and_goes_with_its_device() {
    let host = Host::new();
    let device = host.device();
    let meta = std::fs::symlink_metadata(host.path()).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    let handle = device.handle();
    handle.remove_socket();
    assert!(!host.path().exists());
    // What somebody else has put there since is his.
    std::fs::write(host.path(), "mine").unwrap();
    handle.remove_socket();
    drop((device, handle));
    assert!(host.path().exists());
    std::fs::remove_file(host.path()).unwrap();
    drop(host.device());
    assert!(!host.path().exists(), "removed by the last who holds it");
    // One that a killed process has left behind is replaced.
    drop(UnixListener::bind(host.path()).unwrap());
    drop(host.device());
}

/// An event buffer too small for an event breaks the event queue, when there is an event.
#[test]
fn an_event_needs_its_room() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    guest.driver.submit(EVENT, &[Buffer::In(3)]);
    let mut saved = None;
    guest.driver.access().with_control(&mut |control| {
        control.pause();
        saved = control.save();
    });
    let other = Host::new();
    let mut twin = stage.direct(Box::new(other.device()));
    twin.with_control(&mut |control| {
        control.restore(saved.as_ref().unwrap()).unwrap();
        control.resume();
    });
    guest.driver.move_to(twin);
    assert!(guest.driver.wait_for_needs_reset(PATIENCE));
}
