//! Links over unix sockets: framing, parts of frames, what cannot be opened.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan, PAGE_SIZE};
use alveole_net_link::{
    Frame, HEADER_BYTES, LinkQueue, LinkSpec, MAX_FRAME_BYTES, NetLink, Offloads, Received, Sent,
    open,
};

const HEADER: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

fn ram() -> GuestRam {
    GuestRam::map(&MemoryPlan::around_hole(4 << 20).unwrap()).unwrap()
}

/// `len` bytes of guest memory in parts that are no neighbours.
fn parts(ram: &GuestRam, len: usize, part: usize) -> GuestBuffers {
    let mut buffers = GuestBuffers::new(ram);
    let (mut addr, mut left) = (0x1000u64, len);
    while left > 0 {
        let now = part.min(left);
        buffers.push(addr, now as u64).unwrap();
        addr += now as u64 + 16;
        left -= now;
    }
    buffers
}

fn content(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| ((at * 7 + seed * 13) % 251) as u8)
        .collect()
}

fn in_guest(ram: &GuestRam, bytes: &[u8], part: usize) -> GuestBuffers {
    let buffers = parts(ram, bytes.len(), part);
    buffers.copy_from(0, bytes);
    buffers
}

fn received(into: &GuestBuffers, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    into.copy_to(0, &mut bytes);
    assert_eq!(bytes[..10], [0; 10], "no offloads");
    bytes.split_off(HEADER_BYTES)
}

/// Whether a head shows how a frame begins, behind a header without offloads.
#[track_caller]
fn assert_begins(head: &[u8], frame: &[u8]) {
    if let Some((header, shown)) = head.split_at_checked(HEADER_BYTES) {
        let known = shown.len().min(frame.len());
        assert_eq!(header, HEADER);
        assert!(shown[..known] == frame[..known]);
    }
}

fn stream() -> (Box<dyn LinkQueue>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut link = open(LinkSpec::StreamFd(ours.into()), 1).unwrap();
    assert_eq!(link.facts.offloads, Offloads::NONE);
    (link.queues.pop().unwrap(), theirs)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn send(link: &mut dyn LinkQueue, start: &[u8], rest: &GuestBuffers) -> std::io::Result<Sent> {
    link.send(Frame { start, rest })
}

/// Waits for the next frame, however it comes.
fn next(link: &mut dyn LinkQueue, into: &GuestBuffers) -> Received {
    let start = Instant::now();
    loop {
        match link.receive(into).unwrap() {
            Received::WouldBlock => assert!(start.elapsed() < Duration::from_secs(10)),
            other => return other,
        }
    }
}

#[test]
fn a_stream_that_comes_byte_by_byte_is_the_same_frames() {
    let ram = ram();
    let (mut link, mut end) = stream();
    let into = parts(&ram, 5000, 700);
    for (number, len) in [60, 1, 14, 1514, 0, 4988].into_iter().enumerate() {
        let frame = content(len, number);
        for byte in framed(&frame) {
            assert_eq!(link.receive(&into).unwrap(), Received::WouldBlock);
            end.write_all(&[byte]).unwrap();
        }
        let Received::Frame(got) = next(link.as_mut(), &into) else {
            panic!("frame {number}")
        };
        assert_eq!(received(&into, got), frame);
    }
}

#[test]
fn frames_of_every_length_in_pieces_of_every_length_come_whole() {
    let ram = ram();
    let into = parts(&ram, HEADER_BYTES + MAX_FRAME_BYTES, 4096);
    for piece in [7, 4096, 4097, 65_536, 1 << 20] {
        let (mut link, mut end) = stream();
        let lens = [
            60,
            60,
            4092,
            4093,
            60,
            1514,
            9014,
            64,
            MAX_FRAME_BYTES,
            1,
            65_550,
            40_000,
            60,
        ];
        let frames: Vec<_> = (0..60).map(|n| content(lens[n % lens.len()], n)).collect();
        let wire: Vec<u8> = frames.iter().flat_map(|f| framed(f)).collect();
        let writer = std::thread::spawn(move || {
            for piece in wire.chunks(piece) {
                end.write_all(piece).unwrap();
            }
            end
        });
        for (number, frame) in frames.iter().enumerate() {
            // Guest memory and memory of ours in turn.
            if number % 5 == 4 {
                let mut kept = vec![1; HEADER_BYTES + MAX_FRAME_BYTES];
                let got = loop {
                    match link.receive_kept(&mut kept).unwrap() {
                        Received::Frame(got) => break got as usize,
                        other => assert_eq!(other, Received::WouldBlock),
                    }
                };
                assert_eq!(kept[..HEADER_BYTES], HEADER);
                assert!(kept[HEADER_BYTES..got] == frame[..], "frame {number}");
                continue;
            }
            // And with its beginning shown.
            let mut head = vec![1; [0, 12, 140, 6000][number % 4]];
            let got = loop {
                match link.receive_seen(&mut head, &into).unwrap() {
                    Received::Frame(got) => break got,
                    other => assert_eq!(other, Received::WouldBlock),
                }
            };
            assert!(
                received(&into, got) == *frame,
                "{number} in pieces of {piece}"
            );
            assert_begins(&head, frame);
        }
        drop(writer.join().unwrap());
        assert_eq!(next(link.as_mut(), &into), Received::Closed);
        assert_eq!(next(link.as_mut(), &into), Received::Closed);
    }
}

#[test]
fn what_is_too_long_for_the_guest_is_lost_and_the_next_frame_comes() {
    let ram = ram();
    let (mut link, mut end) = stream();
    let small = parts(&ram, HEADER_BYTES + 100, 50);
    for len in [101, 4200, 65_000] {
        end.write_all(&framed(&content(len, 1))).unwrap();
        end.write_all(&framed(&content(100, 2))).unwrap();
        assert_eq!(next(link.as_mut(), &small), Received::TooLong);
        assert_eq!(next(link.as_mut(), &small), Received::Frame(112));
        assert_eq!(received(&small, 112), content(100, 2));
    }
}

#[test]
fn a_stream_that_is_none_is_closed() {
    let ram = ram();
    let into = parts(&ram, 2000, 2000);
    for length in [MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
        let (mut link, mut end) = stream();
        end.write_all(&length.to_be_bytes()).unwrap();
        end.write_all(&[0; 100]).unwrap();
        let e = link.receive(&into).unwrap_err();
        assert!(e.to_string().contains(&length.to_string()), "{e}");
        assert_eq!(next(link.as_mut(), &into), Received::Closed);
    }
    let (mut link, end) = stream();
    drop(end);
    assert_eq!(next(link.as_mut(), &into), Received::Closed);
    let rest = in_guest(&ram, &content(3000, 1), 3000);
    let e = send(link.as_mut(), &HEADER, &rest).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::BrokenPipe);
    // Small ones are kept until they are flushed.
    let rest = in_guest(&ram, &content(60, 1), 60);
    send(link.as_mut(), &HEADER, &rest).unwrap();
    assert_eq!(link.flush().unwrap_err().kind(), ErrorKind::BrokenPipe);
    assert!(link.flush().unwrap());
}

#[test]
fn what_is_sent_comes_out_framed_however_slowly_it_is_read() {
    let ram = ram();
    let (mut link, mut end) = stream();
    let lens = [
        60,
        1514,
        60,
        65_550,
        14,
        1600,
        1601,
        9014,
        MAX_FRAME_BYTES,
        100,
    ];
    let frames: Vec<_> = (0..400).map(|n| content(lens[n % lens.len()], n)).collect();
    let wire: Vec<u8> = frames.iter().flat_map(|f| framed(f)).collect();
    let reader = std::thread::spawn(move || {
        let mut got: Vec<u8> = Vec::new();
        let mut piece = vec![0; 10_007];
        while got.len() < wire.len() {
            let n = end.read(&mut piece).unwrap();
            assert!(n > 0);
            got.extend(&piece[..n]);
            if got.len().is_multiple_of(5) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        assert!(got == wire);
    });
    let mut blocked = 0;
    for (number, frame) in frames.iter().enumerate() {
        // Part of the frame in what was copied, as with a filter.
        let (own, guest) = frame.split_at(if number % 2 == 0 { 14 } else { 0 });
        let start = [&HEADER[..], own].concat();
        let rest = in_guest(&ram, guest, 3001);
        while send(link.as_mut(), &start, &rest).unwrap() != Sent::Done {
            blocked += 1;
            wait_writable(link.as_ref());
        }
    }
    while !link.flush().unwrap() {
        wait_writable(link.as_ref());
    }
    reader.join().unwrap();
    assert!(blocked > 0, "the socket was never full");
}

fn wait_writable(link: &dyn LinkQueue) {
    let mut poll = libc::pollfd {
        fd: link.writable_fd().as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one entry, that lives as long as the call.
    #[expect(unsafe_code, reason = "poll(2)")]
    let ready = unsafe { libc::poll(&raw mut poll, 1, 10_000) };
    assert_eq!(ready, 1, "the link never takes more");
}

#[test]
fn small_frames_share_a_call() {
    let ram = ram();
    let (mut link, mut end) = stream();
    let rest = in_guest(&ram, &content(60, 1), 60);
    for _ in 0..100 {
        assert_eq!(send(link.as_mut(), &HEADER, &rest).unwrap(), Sent::Done);
    }
    end.set_nonblocking(true).unwrap();
    let e = end.read(&mut [0; 8]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::WouldBlock);
    assert!(link.flush().unwrap());
    let mut got = vec![0; 1 << 16];
    assert_eq!(end.read(&mut got).unwrap(), 100 * 64);
}

#[test]
fn datagrams_are_frames_between_two_paths() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
    let theirs = UnixDatagram::bind(&b).unwrap();
    let spec = || LinkSpec::Datagram {
        local: a.clone(),
        remote: b.clone(),
    };
    let mut link = open(spec(), 1).unwrap();
    assert_eq!(link.facts.offloads, Offloads::NONE);
    let link = link.queues[0].as_mut();
    assert_ne!(
        link.readable_fd().as_raw_fd(),
        link.writable_fd().as_raw_fd()
    );
    let ram = ram();
    let rest = in_guest(&ram, &content(1500, 1), 300);
    send(link, &HEADER, &rest).unwrap();
    let mut got = [0; 2000];
    let len = theirs.recv(&mut got).unwrap();
    assert_eq!(got[..len], content(1500, 1));
    theirs.connect(&a).unwrap();
    theirs.send(&content(900, 2)).unwrap();
    theirs.send(&content(900, 3)).unwrap();
    theirs.send(&content(50, 4)).unwrap();
    let into = parts(&ram, HEADER_BYTES + 899, 100);
    assert_eq!(next(link, &into), Received::TooLong);
    let exact = parts(&ram, HEADER_BYTES + 900, 100);
    assert_eq!(next(link, &exact), Received::Frame(912));
    assert_eq!(received(&exact, 912), content(900, 3));
    let mut kept = [9; 100];
    assert_eq!(link.receive_kept(&mut kept).unwrap(), Received::Frame(62));
    assert_eq!(kept[12..62], content(50, 4));
    // The path is taken now.
    let e = open(spec(), 1).err().unwrap().to_string();
    assert!(
        e.contains(&a.display().to_string()) && e.contains("remove"),
        "{e}"
    );
}

#[test]
fn what_cannot_be_opened_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nobody");
    let error = |spec| -> String {
        let link: Result<NetLink, _> = open(spec, 1);
        link.err().unwrap().to_string()
    };
    let e = error(LinkSpec::Stream { path: path.clone() });
    assert!(
        e.contains("nobody") && e.contains("start the program"),
        "{e}"
    );
    let local = folder.path().join("ours");
    let e = error(LinkSpec::Datagram {
        local: local.clone(),
        remote: path.clone(),
    });
    assert!(e.contains("nobody"), "{e}");
    assert!(!local.exists(), "what was bound is taken away");
    let listener = UnixListener::bind(&path).unwrap();
    let e = open(LinkSpec::Stream { path }, 2)
        .err()
        .unwrap()
        .to_string();
    assert!(e.contains("1 pair(s)") && e.contains("2 are wanted"), "{e}");
    // A listener is no connection, a stream no datagrams, a file no socket.
    let fd: OwnedFd = listener.into();
    assert!(error(LinkSpec::StreamFd(fd)).contains("connected stream socket"));
    let (a, _b) = UnixStream::pair().unwrap();
    assert!(error(LinkSpec::DatagramFd(a.into())).contains("datagram"));
    let file = tempfile::tempfile().unwrap();
    let number = file.as_raw_fd();
    let e = error(LinkSpec::StreamFd(file.into()));
    assert!(e.contains(&format!("descriptor {number}")), "{e}");
}

#[test]
fn datagrams_show_how_they_begin_and_go_to_the_guest_whole() {
    let ram = ram();
    for has_header in [false, true] {
        let (mut link, end) = if has_header {
            let (link, mut ends) = alveole_net_link::testing::pair(1);
            (link, ends.remove(0))
        } else {
            alveole_net_link::testing::plain_pair()
        };
        for (number, len) in [60, 14, 128, 127, 129, 4000, 60].into_iter().enumerate() {
            let frame = content(len, number);
            let into = parts(&ram, HEADER_BYTES + 4000, 50 + number);
            into.zero(0, into.len_bytes());
            let header: &[u8] = if has_header { &HEADER } else { &[] };
            end.send(&[header, &frame].concat()).unwrap();
            let mut head = [1; HEADER_BYTES + 128];
            let got = link.queues[0].receive_seen(&mut head, &into).unwrap();
            assert_eq!(got, Received::Frame((HEADER_BYTES + len) as u64));
            assert!(
                received(&into, (HEADER_BYTES + len) as u64) == frame,
                "{len}"
            );
            assert_begins(&head, &frame);
        }
        // Less room than what is looked at.
        for (room, is_whole) in [(HEADER_BYTES + 60, true), (HEADER_BYTES + 59, false)] {
            end.send(&[if has_header { &HEADER[..] } else { &[] }, &content(60, 1)].concat())
                .unwrap();
            let into = parts(&ram, room, 30);
            let mut head = [1; HEADER_BYTES + 128];
            let got = link.queues[0].receive_seen(&mut head, &into).unwrap();
            assert_eq!(got == Received::Frame((HEADER_BYTES + 60) as u64), is_whole);
            assert_eq!(got == Received::TooLong, !is_whole);
        }
        let nothing = link.queues[0].receive_seen(&mut [0; 64], &parts(&ram, 100, 50));
        assert_eq!(nothing.unwrap(), Received::WouldBlock);
    }
}

/// A snapshot must hold what comes in from a network.
#[test]
fn pages_that_frames_are_written_to_are_known() {
    for len in [60, 1514, 20_000] {
        for is_seen in [false, true] {
            let (stream, mut stream_end) = stream();
            stream_end.write_all(&framed(&content(len, 1))).unwrap();
            let (mut messages, mut ends) = alveole_net_link::testing::pair(1);
            let message_end = ends.remove(0);
            message_end
                .send(&[&HEADER[..], &content(len, 1)].concat())
                .unwrap();
            let (mut plain, plain_end) = alveole_net_link::testing::plain_pair();
            plain_end.send(&content(len, 1)).unwrap();
            let messages = messages.queues.remove(0);
            let plain = plain.queues.remove(0);
            for mut link in [stream, messages, plain] {
                let ram = ram();
                ram.track_writes();
                let into = parts(&ram, HEADER_BYTES + len, 700);
                let got = if is_seen {
                    let mut head = [1; HEADER_BYTES + 128];
                    link.receive_seen(&mut head, &into).unwrap()
                } else {
                    link.receive(&into).unwrap()
                };
                assert_eq!(got, Received::Frame((HEADER_BYTES + len) as u64));
                let written = ram.take_written();
                let mut bytes = [0; PAGE_SIZE as usize];
                for page in 0..ram.pages() {
                    ram.read(page * PAGE_SIZE, &mut bytes).unwrap();
                    let changed = bytes.iter().any(|b| *b != 0);
                    assert!(!changed || written.contains(page), "page {page}");
                }
                assert!(!written.is_empty() && written.count() < 40);
            }
        }
    }
}
