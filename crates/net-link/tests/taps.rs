//! Real tap and macvtap interfaces, in a network namespace of each test's own. Needs root and /dev/net/tun.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs::File;
use std::io::Write;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestBuffers, GuestRam, MemoryPlan};
use alveole_net_link::{
    Frame, HEADER_BYTES, LinkError, LinkQueue, LinkSpec, NetLink, Offloads, Received, Sent, open,
};

/// The guest's address; the host's is .1.
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PORT: u16 = 5000;

/// Says that `test` is skipped, where people and tools look.
fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let mut log = File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}

/// Runs `test` on a thread with a network namespace of its own, which is gone after it with all that is in it.
fn in_a_namespace(name: &'static str, test: fn()) {
    if !std::path::Path::new("/dev/net/tun").exists() {
        skip(name, "there is no /dev/net/tun");
        return;
    }
    if Command::new("ip").arg("-V").output().is_err() {
        skip(name, "there is no program ip");
        return;
    }
    let thread = std::thread::spawn(move || {
        // SAFETY: this call takes a number; the thread and the programs it starts have the namespace.
        #[expect(unsafe_code, reason = "unshare(2)")]
        let made = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        if made < 0 {
            let why = std::io::Error::last_os_error();
            skip(
                name,
                &format!("no network namespace: {why}; run it as root"),
            );
            return;
        }
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {words}: {said}");
}

/// A tap that is up, with the host at 10.9.0.1 and the guest known at 10.9.0.2.
fn make(name: &str, flags: &str) {
    ip(&format!("tuntap add dev {name} mode tap{flags}"));
    // So that nothing of the host's own comes between the frames.
    let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    let _ = std::fs::write(quiet, "1");
    ip(&format!("addr add 10.9.0.1/24 dev {name}"));
    ip(&format!("link set {name} up"));
    know_the_guest(name);
}

fn know_the_guest(name: &str) {
    ip(&format!(
        "neigh replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev {name}"
    ));
}

fn tap(name: &str, pairs: u16) -> Result<NetLink, LinkError> {
    open(LinkSpec::Tap { name: name.into() }, pairs)
}

/// Opens a tap that was just closed: a program that another test is just starting may have the descriptor for a moment.
fn tap_again(name: &str) -> NetLink {
    let start = Instant::now();
    loop {
        match tap(name, 1) {
            Err(LinkError::Busy { .. }) if start.elapsed() < Duration::from_secs(10) => {}
            other => return other.unwrap(),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn error(name: &str, pairs: u16) -> String {
    tap(name, pairs).err().unwrap().to_string()
}

fn ram() -> GuestRam {
    GuestRam::map(&MemoryPlan::around_hole(4 << 20).unwrap()).unwrap()
}

fn buffers(ram: &GuestRam, len: u64) -> GuestBuffers {
    let mut buffers = GuestBuffers::new(ram);
    let (mut addr, mut left) = (0x1000, len);
    while left > 0 {
        let now = left.min(1500);
        buffers.push(addr, now).unwrap();
        addr += now + 64;
        left -= now;
    }
    buffers
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| {
        sum + u32::from(pair[0]) * 256 + u32::from(*pair.get(1).unwrap_or(&0))
    })
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn mac_of(name: &str) -> [u8; 6] {
    let shown = Command::new("ip")
        .args(["-o", "link", "show", name])
        .output()
        .unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    let text = shown.split("link/ether ").nth(1).unwrap();
    let mut mac = [0; 6];
    for (place, part) in mac.iter_mut().zip(text[..17].split(':')) {
        *place = u8::from_str_radix(part, 16).unwrap();
    }
    mac
}

/// A UDP datagram from the guest to the host, its checksum left to the link: header and frame.
fn datagram(to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let udp_len = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let check = !folded(sum(&ip, 0));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    // The checksum of the pseudo header alone (section 5.1.6.2).
    let pseudo = folded(sum(&ip[12..20], 17 + u32::from(udp_len)));
    let mut frame = to.to_vec();
    frame.extend(GUEST_MAC);
    frame.extend([8, 0]);
    frame.extend(ip);
    for field in [PORT, PORT, udp_len, pseudo] {
        frame.extend(field.to_be_bytes());
    }
    frame.extend(payload);
    let mut header = vec![1, 0];
    for field in [42u16, 0, 34, 6, 0] {
        header.extend(field.to_le_bytes());
    }
    [header, frame].concat()
}

fn send(link: &mut dyn LinkQueue, ram: &GuestRam, bytes: &[u8]) {
    let (start, rest) = bytes.split_at(HEADER_BYTES);
    let guest = buffers(ram, rest.len() as u64);
    guest.copy_from(0, rest);
    let sent = link.send(Frame {
        start,
        rest: &guest,
    });
    assert_eq!(sent.unwrap(), Sent::Done);
}

/// The next frame of the host's that holds `payload`, if it comes soon; others are passed over.
fn look_for(link: &mut dyn LinkQueue, into: &GuestBuffers, payload: &[u8]) -> Option<Vec<u8>> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(100) {
        match link.receive(into).unwrap() {
            Received::Frame(len) => {
                let mut bytes = vec![0; len as usize];
                into.copy_to(0, &mut bytes);
                if bytes.ends_with(payload) {
                    return Some(bytes);
                }
            }
            Received::WouldBlock => std::thread::yield_now(),
            other => panic!("{other:?}"),
        }
    }
    None
}

/// Has the host send `payload` until it comes as a frame that ends in `end`: an interface that was just opened loses
/// what is sent before the host has noticed.
fn from_host(host: &UdpSocket, link: &mut dyn LinkQueue, payload: &[u8], end: &[u8]) -> Vec<u8> {
    let into = buffers(&ram(), 70_000);
    for _ in 0..100 {
        host.send_to(payload, ("10.9.0.2", PORT)).unwrap();
        if let Some(frame) = look_for(link, &into, end) {
            return frame;
        }
    }
    panic!("no such frame");
}

fn host() -> UdpSocket {
    let start = Instant::now();
    let host = loop {
        match UdpSocket::bind(("10.9.0.1", PORT)) {
            Ok(host) => break host,
            // The last one's descriptor lives on in a program that another test is just starting.
            Err(e) => assert!(start.elapsed() < Duration::from_secs(10), "{e}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    host.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    host
}

/// One datagram each way; what came back, with its header.
fn there_and_back(link: &mut dyn LinkQueue, mac: [u8; 6], len: usize) -> Vec<u8> {
    let ram = ram();
    let host = host();
    let payload: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
    send(link, &ram, &datagram(mac, &payload));
    let mut got = vec![0; 1 << 16];
    let n = host.recv(&mut got).unwrap();
    assert!(got[..n] == payload, "what the guest sent");
    from_host(&host, link, &payload, &payload)
}

#[test]
fn frames_pass_a_tap_in_both_directions() {
    in_a_namespace("frames_pass_a_tap_in_both_directions", || {
        make("tap0", " vnet_hdr");
        ip("link set tap0 mtu 9000");
        let mut link = tap("tap0", 1).unwrap();
        assert_eq!((link.facts.mtu, link.facts.mac), (Some(9000), None));
        let Offloads {
            csum, tso4, tso6, ..
        } = link.facts.offloads;
        assert!(csum && tso4 && tso6);
        let mac = mac_of("tap0");
        let queue = link.queues[0].as_mut();
        for len in [18, 1000, 8000] {
            let got = there_and_back(queue, mac, len);
            assert_eq!(got[..2], [0, 0], "no offloads were taken: it is all done");
        }
        // With offloads the checksum is left to the guest.
        queue.set_guest_offloads(Offloads::ALL).unwrap();
        assert_eq!(there_and_back(queue, mac, 1000)[0], 1);
        queue.set_guest_offloads(Offloads::NONE).unwrap();
        assert_eq!(there_and_back(queue, mac, 1000)[0], 0);
    });
}

#[test]
fn long_datagrams_are_cut_by_the_other_side() {
    const NAME: &str = "long_datagrams_are_cut_by_the_other_side";
    in_a_namespace(NAME, || {
        make("tap0", " vnet_hdr");
        let mut link = tap("tap0", 1).unwrap();
        if !link.facts.offloads.uso4 {
            skip(NAME, "this kernel's tap has no USO (Linux 6.2)");
            return;
        }
        let queue = link.queues[0].as_mut();
        let (ram, host) = (ram(), host());
        // From the guest: one call, thirty datagrams.
        let payload: Vec<u8> = (0..30_000).map(|i| (i / 1000) as u8).collect();
        let mut bytes = datagram(mac_of("tap0"), &payload);
        bytes[1] = 5;
        bytes[4..6].copy_from_slice(&1000u16.to_le_bytes());
        send(queue, &ram, &bytes);
        for number in 0..30 {
            let mut got = [0; 2000];
            assert_eq!(host.recv(&mut got).unwrap(), 1000);
            assert_eq!(got[..1000], [number; 1000]);
        }
        // To the guest: as it takes it.
        let size: libc::c_int = 1000;
        // SAFETY: the option is a number, of which the call gets address and size.
        #[expect(unsafe_code, reason = "setsockopt(2)")]
        let set = unsafe {
            libc::setsockopt(
                host.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const size).cast(),
                4,
            )
        };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        let into = buffers(&ram, 70_000);
        queue.set_guest_offloads(Offloads::ALL).unwrap();
        let whole = from_host(&host, queue, &payload, &payload);
        assert_eq!(whole[..2], [1, 5], "checksum and segments are left");
        assert_eq!(whole[4..6], 1000u16.to_le_bytes());
        queue.set_guest_offloads(Offloads::NONE).unwrap();
        for number in 0..30 {
            let part = match number {
                0 => from_host(&host, queue, &payload, &[0; 1000]),
                _ => look_for(queue, &into, &[number; 1000]).unwrap(),
            };
            assert_eq!(part.len(), HEADER_BYTES + 42 + 1000);
            assert_eq!(part[..2], [0, 0]);
        }
    });
}

#[test]
fn a_frame_that_does_not_fit_is_told_from_one_that_just_fits() {
    in_a_namespace(
        "a_frame_that_does_not_fit_is_told_from_one_that_just_fits",
        || {
            make("tap0", "");
            let mut link = tap("tap0", 1).unwrap();
            let queue = link.queues[0].as_mut();
            let ram = ram();
            let host = host();
            // What the host says of itself first.
            std::thread::sleep(Duration::from_millis(50));
            while queue.receive(&buffers(&ram, 4000)).unwrap() != Received::WouldBlock {}
            let all = (HEADER_BYTES + 42 + 500) as u64;
            for (room, want) in [
                (all, Received::Frame(all)),
                (all - 1, Received::TooLong),
                (20, Received::TooLong),
                (0, Received::TooLong),
            ] {
                host.send_to(&[7; 500], ("10.9.0.2", PORT)).unwrap();
                let into = buffers(&ram, room);
                assert_eq!(queue.receive(&into).unwrap(), want, "{room}");
                assert_eq!(queue.receive(&into).unwrap(), Received::WouldBlock);
            }
        },
    );
}

#[test]
fn taps_that_cannot_be_used_say_why_and_what_to_do() {
    in_a_namespace("taps_that_cannot_be_used_say_why_and_what_to_do", || {
        let e = error("tap0", 1);
        assert!(
            e.contains("no interface tap0") && e.contains("ip tuntap add"),
            "{e}"
        );
        make("tap0", " vnet_hdr");
        let e = error("tap0", 2);
        assert!(
            e.contains("without multi_queue") && e.contains("2 are wanted"),
            "{e}"
        );
        let held = tap("tap0", 1).unwrap();
        let e = error("tap0", 1);
        assert!(e.contains("tap0 is in use"), "{e}");
        drop(held);
        drop(tap_again("tap0"));
        ip("tuntap add dev tun0 mode tun");
        let e = error("tun0", 1);
        assert!(e.contains("tun0 cannot be used as a tap"), "{e}");
        let e = error("lo", 1);
        assert!(e.contains("lo cannot be used as a tap"), "{e}");
    });
}

#[test]
fn a_tap_of_another_user_is_refused_with_the_cure() {
    in_a_namespace("a_tap_of_another_user_is_refused_with_the_cure", || {
        make("tap0", " vnet_hdr user 4242");
        // SAFETY: these calls take numbers; the thread ends with the test.
        #[expect(unsafe_code, reason = "setresuid(2) of one thread")]
        let dropped = unsafe { libc::syscall(libc::SYS_setresuid, 4343, 4343, 4343) };
        assert_eq!(dropped, 0);
        let e = error("tap0", 1);
        assert!(e.contains("no permission to open tap tap0"), "{e}");
        assert!(e.contains("user $USER"), "{e}");
    });
}

#[test]
fn a_tap_of_several_queues_has_one_that_is_active() {
    in_a_namespace("a_tap_of_several_queues_has_one_that_is_active", || {
        make("tap0", " multi_queue vnet_hdr");
        // Also for one pair.
        drop(tap("tap0", 1).unwrap());
        let mut link = tap("tap0", 3).unwrap();
        let mac = mac_of("tap0");
        there_and_back(link.queues[0].as_mut(), mac, 100);
        // From here on frames may come by any of two.
        link.queues[1].set_active(true).unwrap();
        link.queues[1].set_active(true).unwrap();
        let ram = ram();
        let host = host();
        send(link.queues[1].as_mut(), &ram, &datagram(mac, &[9; 50]));
        let mut got = [0; 64];
        assert_eq!(host.recv(&mut got).unwrap(), 50);
        // The flow is steered to where it was seen last.
        from_host(&host, link.queues[1].as_mut(), &[8; 50], &[8; 50]);
        link.queues[1].set_active(false).unwrap();
        from_host(&host, link.queues[0].as_mut(), &[7; 50], &[7; 50]);
    });
}

const TUN: i16 = 1;
const TAP: i16 = 2;
const NO_PI: i16 = 0x1000;
const VNET_HDR: i16 = 0x4000;

/// A queue of tap `name`, opened as somebody else would.
fn foreign(name: &str, flags: i16) -> Vec<OwnedFd> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&flags.to_le_bytes());
    let start = Instant::now();
    loop {
        // SAFETY: TUNSETIFF takes a structure of 40 bytes with a name and flags.
        #[expect(unsafe_code, reason = "ioctl(2)")]
        let done = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
        if done == 0 {
            return vec![file.into()];
        }
        // As in `tap_again`.
        let e = std::io::Error::last_os_error();
        let busy = e.raw_os_error() == Some(libc::EBUSY);
        assert!(busy && start.elapsed() < Duration::from_secs(10), "{e}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_descriptor_of_a_tap_works_like_its_name() {
    in_a_namespace("a_descriptor_of_a_tap_works_like_its_name", || {
        make("tap0", "");
        let mac = mac_of("tap0");
        let by_fd = |fds| open(LinkSpec::TapFds(fds), 1);
        let mut link = by_fd(foreign("tap0", TAP | NO_PI | VNET_HDR)).unwrap();
        assert_eq!(link.facts.name, "tap tap0");
        assert_eq!(link.facts.mtu, Some(1500));
        there_and_back(link.queues[0].as_mut(), mac, 100);
        drop(link);
        // Without a header it has no offloads, and frames are whole.
        let mut link = by_fd(foreign("tap0", TAP | NO_PI)).unwrap();
        assert_eq!(link.facts.offloads, Offloads::NONE);
        let host = host();
        let got = from_host(&host, link.queues[0].as_mut(), &[5; 77], &[5; 77]);
        assert_eq!(got.len(), HEADER_BYTES + 42 + 77);
        drop(link);
        ip("tuntap add dev tun0 mode tun");
        let e = by_fd(foreign("tun0", TUN | NO_PI)).err().unwrap();
        assert!(e.to_string().contains("tun0 is a tun"), "{e}");
    });
}

#[test]
fn a_macvtap_has_the_address_of_its_interface() {
    const NAME: &str = "a_macvtap_has_the_address_of_its_interface";
    in_a_namespace(NAME, || {
        let made = Command::new("sh")
            .args([
                "-c",
                "ip link add veth0 type veth peer name veth1 && ip link set veth0 up && \
                 ip link set veth1 up && ip link add link veth0 name mv0 type macvtap mode bridge",
            ])
            .output()
            .unwrap();
        if !made.status.success() {
            skip(NAME, String::from_utf8_lossy(&made.stderr).trim());
            return;
        }
        ip("link set mv0 up");
        let spec = LinkSpec::Macvtap {
            interface: "mv0".into(),
        };
        match open(spec, 1) {
            Ok(mut link) => {
                assert_eq!(link.facts.mac, Some(mac_of("mv0")));
                let into = buffers(&ram(), 4000);
                while link.queues[0].receive(&into).unwrap() != Received::WouldBlock {}
            }
            // Its node is made by udev, which may run in no namespace.
            Err(e) => {
                assert!(e.to_string().contains("/dev/tap"), "{e}");
                skip(NAME, &e.to_string());
            }
        }
    });
}

#[test]
fn a_tap_that_is_down_loses_frames_and_says_so() {
    in_a_namespace("a_tap_that_is_down_loses_frames_and_says_so", || {
        make("tap0", "");
        let mut link = tap("tap0", 1).unwrap();
        ip("link set tap0 down");
        let guest = buffers(&ram(), 100);
        let sent = link.queues[0].send(Frame {
            start: &[0; HEADER_BYTES],
            rest: &guest,
        });
        assert_eq!(sent.unwrap_err().raw_os_error(), Some(libc::EIO));
        ip("link set tap0 up");
        know_the_guest("tap0");
        there_and_back(link.queues[0].as_mut(), mac_of("tap0"), 100);
        // Gone for good.
        ip("link del tap0");
        assert!(link.queues[0].receive(&guest).is_err());
    });
}
