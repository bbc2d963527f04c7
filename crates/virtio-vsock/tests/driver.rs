//! The device as a driver and programs of the host meet it, without a transport.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(unreachable_pub, reason = "shared by the tests of this crate")]
mod guest;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Buffer, Driver, Stage, Subject, conformance};
use alveole_virtio_vsock::{
    Header, MAX_CREDIT_BYTES, PACKETS_PER_TURN, VirtioVsock, VsockConfig, op,
};
use guest::{CID, EVENT, Guest, Host, Link, PATIENCE, ROOM, TX, is_closed, read_ok};

/// Devices whose connections to port 7 all reach one program, which sends back what it gets.
struct Echoes {
    host: Host,
    made: Mutex<u32>,
}

impl Echoes {
    fn new() -> Self {
        let host = Host::new();
        let listener = UnixListener::bind(host.path().with_extension("echo")).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
            }
        });
        Self {
            host,
            made: Mutex::new(0),
        }
    }
}

impl Subject for Echoes {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let mut made = self.made.lock().unwrap();
        *made += 1;
        let path = self.host.path().with_extension(made.to_string());
        let mut port = path.clone().into_os_string();
        port.push("_7");
        std::os::unix::fs::symlink(self.host.path().with_extension("echo"), port).unwrap();
        let config = VsockConfig {
            guest_cid: CID,
            uds_path: path,
        };
        Box::new(VirtioVsock::new(&config).unwrap())
    }

    /// By requests of one buffer each, whose answers come in the order of their buffers.
    fn exercise(&self, driver: &mut Driver) {
        let link = Link::new(1000, 7);
        let room = [Buffer::In(44), Buffer::In(5)];
        let has_streams = driver.features() & 0b101 != 0b100;
        let mut say = |header: Header, data: &[u8]| {
            let head = driver.submit(0, &room);
            let packet = [&header.to_bytes(), data].concat();
            assert_eq!(driver.request(TX, &[Buffer::Out(&packet)]).len, 0);
            let used = driver.wait(0);
            assert_eq!(used.head, head);
            let header = Header::from_bytes(used.bytes[..44].try_into().unwrap());
            (header.op, used.bytes[44..].to_vec(), used.len)
        };
        let answer = say(link.header(op::REQUEST), &[]).0;
        if !has_streams {
            // Section 5.10.3.2.
            assert_eq!(answer, op::RST);
            return;
        }
        assert_eq!(answer, op::RESPONSE);
        let echo = say(link.data(5), b"hello");
        assert_eq!(echo, (op::RW, b"hello".to_vec(), 49));
        assert_eq!(say(link.shutdown(3), &[]).0, op::RST);
    }

    fn victim_queue(&self) -> u16 {
        TX
    }
}

#[test]
fn the_device_conforms() {
    conformance(&Echoes::new(), &|stage, device| stage.direct(device));
}

#[test]
fn the_guest_connects_and_both_sides_end_in_turn() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(link.data(7), b"request");
    guest.send(link.shutdown(2), &[]);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "request");
    // The other half is open.
    let answer: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    stream.write_all(&answer).unwrap();
    assert!(link.read(&mut guest, answer.len()) == answer);
    drop(stream);
    // Nobody has anything to say any more.
    let end = guest.expect(op::SHUTDOWN);
    assert_eq!((end.flags, end.kind), (3, 1));
    guest.send(link.header(op::RST), &[]);
    assert!(guest.hears_nothing());
    let counters = guest.handle.counters();
    assert_eq!(
        (counters.from_guest.get(), counters.bytes_to_guest.get()),
        (1, 100_000)
    );
    assert_eq!((counters.bad_packets.get(), counters.ended.get()), (0, 1));
}

#[test]
fn the_host_connects_and_both_sides_end_in_turn() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let mut stream = host.connect(52);
    // What follows the line at once is the guest's.
    stream.write_all(b"early").unwrap();
    let mut link = guest.accept();
    assert_eq!(link.local, 52);
    assert!(link.port >= 1 << 30, "{link:?}");
    assert_eq!(read_ok(&stream), link.port);
    assert_eq!(link.read(&mut guest, 5), b"early");
    stream.write_all(b"last").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(link.read(&mut guest, 4), b"last");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 2, "it still reads");
    guest.send(link.data(6), b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    guest.send(link.shutdown(3), &[]);
    guest.expect(op::RST);
    assert!(is_closed(&mut stream));
    // Its ports are free: a packet of it belongs to nobody.
    guest.send(link.data(1), b"x");
    guest.expect(op::RST);
}

#[test]
fn a_host_that_has_gone_is_told_at_once() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(link.read(&mut guest, 3), b"bye");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 3);
    // What the guest sent before it knew is nobody's fault.
    guest.send(link.data(4), b"late");
    guest.send(link.shutdown(3), &[]);
    guest.expect(op::RST);
    // One that leaves bytes unread behind breaks the connection.
    let link = guest.open(1025, 80);
    let (stream, _) = listener.accept().unwrap();
    guest.send(link.data(6), b"unread");
    wait_until(|| guest.handle.counters().bytes_from_guest.get() == 10);
    drop(stream);
    guest.expect(op::RST);
}

#[test]
fn a_guest_that_receives_no_more_is_told_to_the_host() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let link = guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(link.shutdown(1), &[]);
    wait_until(|| stream.write_all(b"x").is_err());
    guest.send(link.data(2), b"hi");
    let mut got = [0; 2];
    stream.read_exact(&mut got).unwrap();
    drop(stream);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 3);
    guest.send(link.header(op::RST), &[]);
}

#[test]
fn a_host_that_reads_no_more_is_told_to_the_guest() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    stream.shutdown(Shutdown::Read).unwrap();
    guest.send(link.data(2), b"hi");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 1);
    stream.write_all(b"but it speaks").unwrap();
    assert_eq!(link.read(&mut guest, 13), b"but it speaks");
}

/// Section 5.10.6.5, and the issue of a program that reads slowly: what the guest sent before it closed arrives.
#[test]
fn what_a_guest_has_left_behind_reaches_a_slow_host() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = Link::new(1024, 80);
    guest.send(link.header(op::REQUEST), &[]);
    let response = guest.expect(op::RESPONSE);
    let (mut stream, _) = listener.accept().unwrap();
    // All the credit there is, beyond what the socket takes.
    let bytes: Vec<u8> = (0..response.buf_alloc).map(|i| (i % 253) as u8).collect();
    for piece in bytes.chunks(60_000) {
        guest.send(link.data(piece.len()), piece);
    }
    guest.send(link.shutdown(3), &[]);
    loop {
        let (header, _) = guest.recv();
        if header.op == op::RST {
            break;
        }
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    assert!(guest.handle.counters().bytes_kept.get() > 0);
    // The same ports again, while the host still reads.
    link = guest.open(link.local, 80);
    let (mut second, _) = listener.accept().unwrap();
    guest.send(link.data(3), b"new");
    let mut new = [0; 3];
    second.read_exact(&mut new).unwrap();
    assert_eq!(&new, b"new");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert!(back == bytes);
}

#[test]
fn neither_side_sends_more_than_the_other_has_room_for() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = Link::new(1024, 80);
    link.room = 1000;
    guest.send(link.header(op::REQUEST), &[]);
    let response = guest.expect(op::RESPONSE);
    let (mut stream, _) = listener.accept().unwrap();
    // To the guest: its room, a question for more, and silence.
    stream.write_all(&[7; 5000]).unwrap();
    let (header, data) = guest.recv();
    assert_eq!((header.op, data.len()), (op::RW, 1000));
    guest.expect(op::CREDIT_REQUEST);
    assert!(guest.hears_nothing());
    assert_eq!(guest.handle.counters().no_credit.get(), 1);
    // An answer without room is no reason to ask again; packets can overtake each other, and lie.
    guest.send(link.header(op::CREDIT_UPDATE), &[]);
    link.fwd_cnt = 1001;
    guest.send(link.header(op::CREDIT_UPDATE), &[]);
    link.fwd_cnt = u32::MAX;
    guest.send(link.header(op::CREDIT_UPDATE), &[]);
    assert!(guest.hears_nothing());
    link.fwd_cnt = 400;
    guest.send(link.header(op::CREDIT_UPDATE), &[]);
    let (header, data) = guest.recv();
    assert_eq!((header.op, data.len()), (op::RW, 400));
    guest.expect(op::CREDIT_REQUEST);
    link.fwd_cnt = 1400;
    link.room = 100_000;
    guest.send(link.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(link.read(&mut guest, 3600), [7; 3600]);
    // From the guest: what it may send, and a byte more.
    guest.send(link.header(op::CREDIT_REQUEST), &[]);
    let told = guest.expect(op::CREDIT_UPDATE);
    assert_eq!(
        (told.buf_alloc, told.fwd_cnt),
        (response.buf_alloc, response.fwd_cnt)
    );
    let piece = vec![1; 60_000];
    let mut sent: u32 = 0;
    let mut fwd_cnt = told.fwd_cnt;
    let free = |sent: u32, fwd_cnt| told.buf_alloc - sent.wrapping_sub(fwd_cnt);
    loop {
        // The host reads nothing: what is forwarded is what its socket holds.
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            fwd_cnt = header.fwd_cnt;
        }
        let len = free(sent, fwd_cnt).min(60_000);
        if len == 0 {
            if guest.hears_nothing() {
                break;
            }
            continue;
        }
        guest.send(link.data(len as usize), &piece[..len as usize]);
        sent += len;
    }
    guest.send(link.header(op::CREDIT_REQUEST), &[]);
    let (header, _) = guest.recv();
    let left = free(sent, header.fwd_cnt);
    assert!(left < response.buf_alloc, "{left}");
    for piece in vec![1; left as usize].chunks(60_000) {
        guest.send(link.data(piece.len()), piece);
    }
    assert!(guest.hears_nothing());
    guest.send(link.data(1), b"x");
    guest.expect(op::RST);
    assert_eq!(guest.handle.counters().bad_packets.get(), 1);
    assert!(is_closed_after(&mut stream));
}

/// Reads to the end.
fn is_closed_after(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_to_end(&mut Vec::new()).is_ok()
}

#[track_caller]
fn wait_until(mut is_so: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn connections_do_not_hold_each_other_up() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    // One whose program does not read and writes without end, and for whose bytes the guest has room.
    let mut greedy = guest.open(1, 80);
    let (stream, _) = listener.accept().unwrap();
    greedy.room = 1 << 30;
    guest.send(greedy.header(op::CREDIT_UPDATE), &[]);
    let mut writer = stream.try_clone().unwrap();
    thread::spawn(move || while writer.write_all(&[1; 1 << 16]).is_ok() {});
    for _ in 0..MAX_CREDIT_BYTES / 60_000 {
        guest.send(greedy.data(60_000), &[2; 60_000]);
    }
    // One for whose bytes the guest has no room.
    let mut starved = Link::new(2, 80);
    starved.room = 0;
    guest.send(starved.header(op::REQUEST), &[]);
    let (mut wanting, _) = listener.accept().unwrap();
    wanting.write_all(b"no room").unwrap();
    // Another one is served as if it were alone: its answers come within a few turns.
    let link = Link::new(3, 80);
    guest.send(link.header(op::REQUEST), &[]);
    let (mut quick, _) = listener.accept().unwrap();
    quick.set_read_timeout(Some(PATIENCE)).unwrap();
    let until_mine = |guest: &mut Guest, wanted: u16| {
        for others in 0.. {
            let (header, data) = guest.recv();
            assert!(!starved.is_of(&header) || header.op != op::RW);
            if link.is_of(&header) && header.op == wanted {
                return (data, others);
            }
        }
        unreachable!()
    };
    until_mine(&mut guest, op::RESPONSE);
    for round in 0..50u8 {
        guest.send(link.data(1), &[round]);
        let mut got = [0];
        quick.read_exact(&mut got).unwrap();
        assert_eq!(got, [round]);
        quick.write_all(&[round]).unwrap();
        let (data, others) = until_mine(&mut guest, op::RW);
        assert_eq!(data, [round]);
        // Full buffers that were on the way, what fits between two looks for news (of which the answer's may be the
        // last of a few), and turns of sixteen.
        let turns = 5 * (PACKETS_PER_TURN + 16) as usize;
        assert!(others <= 128 + turns, "{others} packets of others first");
    }
    stream.shutdown(Shutdown::Both).unwrap();
}

#[test]
fn hundreds_of_connections_at_once() {
    const MANY: u32 = 600;
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let server = thread::spawn(move || {
        let streams: Vec<_> = (0..MANY / 2)
            .map(|_| listener.accept().unwrap().0)
            .collect();
        for mut stream in streams {
            thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
        }
    });
    let clients: Vec<_> = (0..MANY / 2).map(|i| host.connect(10_000 + i)).collect();
    let mut links: Vec<Link> = (0..MANY / 2).map(|i| Link::new(1000 + i, 80)).collect();
    for link in &links {
        guest.send(link.header(op::REQUEST), &[]);
    }
    let mut answered = 0;
    while answered < MANY / 2 || (links.len() as u32) < MANY {
        let (header, _) = guest.recv();
        match header.op {
            op::RESPONSE => answered += 1,
            op::REQUEST => {
                let link = Link::new(header.dst_port, header.src_port);
                guest.send(link.header(op::RESPONSE), &[]);
                links.push(link);
            }
            _ => panic!("{header:?}"),
        }
    }
    server.join().unwrap();
    let clients: Vec<_> = clients
        .into_iter()
        .map(|mut stream| {
            read_ok(&stream);
            thread::spawn(move || {
                let mut message = [0; 4];
                while stream.read_exact(&mut message).is_ok() {
                    stream.write_all(&message).unwrap();
                }
            })
        })
        .collect();
    for round in 0..5u32 {
        for link in &links {
            let message = (link.local ^ link.port ^ round).to_le_bytes();
            guest.send(link.data(4), &message);
        }
        let mut echoed = 0;
        while echoed < links.len() {
            let (header, data) = guest.recv();
            assert_eq!(header.op, op::RW, "{header:?}");
            let message = header.dst_port ^ header.src_port ^ round;
            assert_eq!(data, message.to_le_bytes());
            echoed += 1;
        }
    }
    // A guest that takes no answers is not heard.
    let mut closed = 0;
    for link in &links {
        guest.send(link.shutdown(3), &[]);
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::RST);
            closed += 1;
        }
    }
    for _ in closed..links.len() {
        guest.expect(op::RST);
    }
    for client in clients {
        client.join().unwrap();
    }
    let counters = guest.handle.counters();
    assert_eq!(counters.from_guest.get(), u64::from(MANY / 2));
    assert_eq!(counters.from_host.get(), u64::from(MANY / 2));
    assert_eq!(counters.ended.get(), u64::from(MANY));
    assert_eq!(counters.bad_packets.get(), 0);
}

/// Connections live as long as the driver does not reset the device: through a pause, and through resets of single
/// queues, with what came meanwhile.
#[test]
fn connections_outlive_a_pause_and_a_queue_reset() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    guest.driver.access().with_control(&mut |c| c.pause());
    stream.write_all(b"while you slept").unwrap();
    let waiting = host.connect(9);
    assert!(guest.hears_nothing());
    guest.driver.access().with_control(&mut |c| c.resume());
    assert_eq!(link.read(&mut guest, 15), b"while you slept");
    let taken = guest.accept();
    assert_eq!(read_ok(&waiting), taken.port);
    for queue in [EVENT, TX, 0] {
        let max = guest.driver.access().queue_max_size(queue);
        guest.driver.access().reset_queue(queue);
        if queue == 0 {
            stream.write_all(b"nowhere to put it").unwrap();
            thread::sleep(Duration::from_millis(20));
        }
        guest.driver.add_queue(queue, max);
        if queue == 0 {
            guest.give_rooms(8, 4096);
            assert_eq!(link.read(&mut guest, 17), b"nowhere to put it");
        }
        guest.send(link.data(3), b"abc");
        let mut got = [0; 3];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"abc");
        stream.write_all(b"def").unwrap();
        assert_eq!(link.read(&mut guest, 3), b"def");
    }
    // The device's reset ends them.
    guest.driver.start();
    assert!(is_closed(&mut stream));
}

#[test]
fn a_guest_that_moves_is_told_that_its_connections_are_gone() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let link = guest.open(1024, 80);
    let (mut stream, _) = listener.accept().unwrap();
    let mut saved = None;
    guest.driver.access().with_control(&mut |control| {
        control.pause();
        saved = control.save();
    });
    let elsewhere = Host::new();
    let elsewhere_listener = elsewhere.listen(80);
    let twin = VirtioVsock::new(&VsockConfig {
        guest_cid: 99,
        ..elsewhere.config()
    });
    let mut twin = stage.direct(Box::new(twin.unwrap()));
    twin.with_control(&mut |control| {
        control.restore(saved.as_ref().unwrap()).unwrap();
        control.resume();
    });
    guest.driver.move_to(twin);
    assert!(is_closed(&mut stream), "the old device is gone");
    // It had no buffer for the event; it is told when it has.
    let event = guest.driver.request(EVENT, &[Buffer::In(4)]);
    assert_eq!((event.len, event.bytes), (4, vec![0; 4]));
    let mut cid = [0; 8];
    guest.driver.access().read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 99);
    let of_99 = |header: Header| Header {
        src_cid: 99,
        ..header
    };
    guest.send(of_99(link.data(1)), b"x");
    guest.expect(op::RST);
    guest.send(of_99(Link::new(5, 80).header(op::REQUEST)), &[]);
    guest.expect(op::RESPONSE);
    let _taken = elsewhere_listener.accept().unwrap();
    // Once.
    guest.driver.submit(EVENT, &[Buffer::In(4)]);
    assert!(guest.hears_nothing());
    assert!(guest.driver.poll(EVENT).is_none());
}

#[test]
fn a_guest_that_moves_is_given_nothing_until_it_has_ended_its_connections() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let _before = host.connect(1024);
    let before = guest.expect(op::REQUEST).src_port;
    for _ in 0..3 {
        guest.driver.submit(EVENT, &[Buffer::In(4)]);
    }
    let mut saved = None;
    guest.driver.access().with_control(&mut |control| {
        control.pause();
        saved = control.save();
    });
    let elsewhere = Host::new();
    let twin = VirtioVsock::new(&elsewhere.config()).unwrap();
    let mut twin = stage.direct(Box::new(twin));
    let _client = elsewhere.connect(1024);
    twin.with_control(&mut |control| {
        control.restore(saved.as_ref().unwrap()).unwrap();
        control.resume();
    });
    guest.driver.move_to(twin);
    let until = std::time::Instant::now() + PATIENCE;
    let told = loop {
        assert!(std::time::Instant::now() < until, "it is not told");
        if let Some(told) = guest.driver.poll(EVENT) {
            break told;
        }
    };
    assert_eq!(told.bytes, vec![0; 4]);
    assert!(
        guest.poll().is_none(),
        "a packet before the event is done with"
    );
    guest.driver.submit(EVENT, &[Buffer::In(4)]);
    let after = guest.expect(op::REQUEST).src_port;
    assert_ne!(before, after, "the guest has that connection still");
    // One that never offers the buffer again waits a moment, and not for ever.
    let mut saved = None;
    guest.driver.access().with_control(&mut |control| {
        control.pause();
        saved = control.save();
    });
    let third = Host::new();
    let twin = VirtioVsock::new(&third.config()).unwrap();
    let mut twin = stage.direct(Box::new(twin));
    twin.with_control(&mut |control| {
        control.restore(saved.as_ref().unwrap()).unwrap();
        control.resume();
    });
    guest.driver.move_to(twin);
    let _client = third.connect(1024);
    guest.expect(op::REQUEST);
}

// ---- much of it ----

/// Bytes whose place can be told from their value, but for shifts by this many.
const PERIOD: usize = 65_521;
const LEN: usize = 1_000_000_000;

fn pattern() -> Vec<u8> {
    let mut x = 1u32;
    (0..2 * PERIOD)
        .map(|i| {
            if i == PERIOD {
                x = 1;
            }
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect()
}

#[test]
fn a_gigabyte_to_the_guest() {
    let (stage, host) = (Stage::new(), Host::new());
    let mut guest = Guest::ready(&stage, &host);
    let mut stream = host.connect(52);
    let mut link = guest.accept();
    read_ok(&stream);
    let writer = thread::spawn(move || {
        let pattern = pattern();
        let mut done = 0;
        while done < LEN {
            let len = PERIOD.min(LEN - done);
            let at = done % PERIOD;
            stream.write_all(&pattern[at..at + len]).unwrap();
            done += len;
        }
    });
    let pattern = pattern();
    let (mut done, mut told) = (0, 0);
    while done < LEN {
        let (header, data) = guest.recv();
        // A writer that has gone, while the guest has no room for the rest, is told of as one that reads no more.
        let reads_no_more = (header.op, header.flags) == (op::SHUTDOWN, 1);
        if header.op == op::CREDIT_REQUEST || reads_no_more {
            continue;
        }
        assert_eq!(header.op, op::RW, "{header:?}");
        let at = done % PERIOD;
        assert!(data == pattern[at..at + data.len()], "byte {done}");
        done += data.len();
        link.fwd_cnt = link.fwd_cnt.wrapping_add(header.len);
        if done - told > ROOM as usize / 4 {
            told = done;
            guest.send(link.header(op::CREDIT_UPDATE), &[]);
        }
    }
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 3);
    writer.join().unwrap();
    assert_eq!(done, LEN);
}

#[test]
fn a_gigabyte_from_the_guest() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let link = Link::new(1024, 80);
    guest.send(link.header(op::REQUEST), &[]);
    let (mut stream, _) = listener.accept().unwrap();
    let reader = thread::spawn(move || {
        let pattern = pattern();
        let mut piece = vec![0; PERIOD];
        let mut done = 0;
        loop {
            let len = stream.read(&mut piece).unwrap();
            if len == 0 {
                return done;
            }
            let at = done % PERIOD;
            assert!(piece[..len] == pattern[at..at + len], "byte {done}");
            done += len;
        }
    });
    let pattern = pattern();
    let response = guest.expect(op::RESPONSE);
    let (mut done, mut fwd_cnt) = (0usize, response.fwd_cnt);
    while done < LEN {
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            fwd_cnt = header.fwd_cnt;
        }
        let free = response.buf_alloc - (done as u32).wrapping_sub(fwd_cnt);
        let len = (free as usize).min(64 << 10).min(LEN - done).min(PERIOD);
        if len == 0 {
            thread::yield_now();
            continue;
        }
        let at = done % PERIOD;
        guest.send(link.data(len), &pattern[at..at + len]);
        done += len;
    }
    guest.send(link.shutdown(3), &[]);
    assert_eq!(reader.join().unwrap(), LEN);
}

// ---- clauses

/// Section 5.10.3.2.
#[test]
fn streams_are_implied_unless_it_was_agreed_that_they_are_not() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let offered = guest.driver.access().device_features();
    // Streams, no seqpackets, not implied; nothing else of the device's own.
    assert_eq!(offered & 0xff_ffff, 0b101);
    for (features, answer) in [
        (0b000, op::RESPONSE),
        (0b001, op::RESPONSE),
        (0b101, op::RESPONSE),
        (0b100, op::RST),
    ] {
        guest.driver.start_with(features);
        let request = Link::new(1, 80).header(op::REQUEST).to_bytes();
        guest.driver.submit(0, &[Buffer::In(44), Buffer::In(1)]);
        guest.driver.request(TX, &[Buffer::Out(&request)]);
        let used = guest.driver.wait(0);
        let header = Header::from_bytes(used.bytes[..44].try_into().unwrap());
        assert_eq!(header.op, answer, "features {features:#b}");
        if answer == op::RESPONSE {
            listener.accept().unwrap();
        }
    }
}

/// Section 5.10.6.3.2.
#[test]
fn every_packet_tells_of_our_room() {
    let (stage, host) = (Stage::new(), Host::new());
    let listener = host.listen(80);
    let mut guest = Guest::ready(&stage, &host);
    let mut link = Link::new(1024, 80);
    link.room = 5;
    let mut told = Vec::new();
    guest.send(link.header(op::REQUEST), &[]);
    told.push((guest.expect(op::RESPONSE), 0));
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(link.data(7), b"1234567");
    stream.read_exact(&mut [0; 7]).unwrap();
    stream.write_all(b"too much").unwrap();
    told.push((guest.expect(op::RW), 7));
    told.push((guest.expect(op::CREDIT_REQUEST), 7));
    guest.send(link.header(op::CREDIT_REQUEST), &[]);
    told.push((guest.expect(op::CREDIT_UPDATE), 7));
    link.fwd_cnt = 5;
    guest.send(link.header(op::CREDIT_UPDATE), &[]);
    told.push((guest.expect(op::RW), 7));
    drop(stream);
    told.push((guest.expect(op::SHUTDOWN), 7));
    guest.send(link.shutdown(3), &[]);
    told.push((guest.expect(op::RST), 7));
    let _client = host.connect(9);
    told.push((guest.expect(op::REQUEST), 0));
    for (header, fwd_cnt) in told {
        assert_eq!(
            (header.buf_alloc, header.fwd_cnt),
            (MAX_CREDIT_BYTES, fwd_cnt),
            "{header:?}"
        );
    }
}
