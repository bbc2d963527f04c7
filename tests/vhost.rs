//! The network device with queues that the host's kernel serves (vhost-net), on every transport, with a driver and a
//! switch of real taps: what a guest cannot be made to do, and what only the owner can. Needs root and /dev/vhost-net.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests of disks use the rest")]
mod carriers;

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use alveole_guest_memory::GuestBuffers;
use alveole_net_link::{
    Frame, HEADER_BYTES, LinkError, LinkQueue, LinkSpec, NetLink, Received, VhostSpec, open,
    open_with_vhost,
};
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Buffer, Driver, Stage, Subject, conformance};
use alveole_virtio_net::{NetConfig, NetError, NetHandle, VirtioNet};
use alveole_virtio_pci::testing::PciAccess;
use carriers::TRANSPORTS;
use nix::sched::{CloneFlags, unshare};

const RX: u16 = 0;
const TX: u16 = 1;
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const NO_OFFLOADS: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
const NODE: &str = "/dev/vhost-net";

fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().append(true).create(true).open(path);
        log.unwrap().write_all(line.as_bytes()).unwrap();
    }
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "ip {words}: {said}");
}

/// One more port of the bridge.
fn add_tap(name: &str, flags: &str) {
    ip(&format!("tuntap add dev {name} mode tap{flags} vnet_hdr"));
    let quiet = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    let _ = std::fs::write(quiet, "1");
    ip(&format!("link set {name} master br0 up"));
}

/// Runs `test` in a network namespace in which a bridge has the ports `tap0` and `peer`; frames come back from the
/// second with their addresses exchanged.
fn on_a_switch(name: &'static str, flags: &'static str, test: fn()) {
    if let Err(e) = File::options().read(true).write(true).open(NODE) {
        return skip(name, &format!("{NODE}: {e}"));
    }
    let thread = thread::spawn(move || {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNET) {
            return skip(name, &format!("no network namespace: {e}; run it as root"));
        }
        ip("link add name br0 type bridge");
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/br0/disable_ipv6", "1");
        ip("link set br0 up");
        add_tap("tap0", flags);
        add_tap("peer", "");
        let peer = LinkSpec::Tap {
            name: "peer".into(),
        };
        let mut peer = open(peer, 1).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let echo = thread::spawn(move || echo(peer.queues[0].as_mut(), &until));
        test();
        over.store(true, Ordering::SeqCst);
        echo.join().unwrap();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn echo(queue: &mut dyn LinkQueue, over: &AtomicBool) {
    let ram = Stage::new();
    let nothing = GuestBuffers::new(ram.ram());
    let mut room = vec![0; 1 << 16];
    while !over.load(Ordering::SeqCst) {
        let Received::Frame(len) = queue.receive_kept(&mut room).unwrap() else {
            thread::sleep(Duration::from_micros(200));
            continue;
        };
        let bytes = &mut room[..len as usize];
        let (to, from) = bytes[HEADER_BYTES..].split_at_mut(6);
        if from[..6] == GUEST {
            to.swap_with_slice(&mut from[..6]);
            let frame = Frame {
                start: bytes,
                rest: &nothing,
            };
            queue.send(frame).unwrap();
        }
    }
}

fn link(pairs: u16) -> NetLink {
    let start = Instant::now();
    loop {
        let spec = LinkSpec::Tap {
            name: "tap0".into(),
        };
        match open_with_vhost(spec, pairs, VhostSpec::Node) {
            // The last one's tap is open for as long as a program that another test starts has it.
            Err(e) if start.elapsed() > Duration::from_secs(10) => panic!("{e}"),
            Err(_) => thread::sleep(Duration::from_millis(1)),
            Ok(link) => return link,
        }
    }
}

fn config() -> NetConfig {
    NetConfig {
        mac: Some(GUEST),
        ..NetConfig::new("net")
    }
}

fn device(pairs: u16) -> (Box<dyn VirtioDevice>, NetHandle) {
    let device = VirtioNet::new(&config(), link(pairs)).unwrap();
    let handle = device.handle();
    (Box::new(device), handle)
}

fn frame(len: usize, tag: u8) -> Vec<u8> {
    let mut bytes = [PEER, GUEST].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.extend((bytes.len()..len).map(|at| (at % 251) as u8 ^ tag));
    bytes
}

fn send(driver: &mut Driver, frame: &[u8]) {
    let used = driver.request(TX, &[Buffer::Out(&NO_OFFLOADS), Buffer::Out(frame)]);
    assert_eq!(used.len, 0);
}

/// Sends a frame and waits until it has come back.
fn there_and_back(driver: &mut Driver, len: usize, tag: u8) {
    let bytes = frame(len, tag);
    driver.submit(RX, &[Buffer::In(1600)]);
    send(driver, &bytes);
    loop {
        let used = driver.wait(RX);
        let got = &used.bytes[HEADER_BYTES..used.len as usize];
        if got[..12] == [GUEST, PEER].concat() {
            assert_eq!(got[12..], bytes[12..], "frame {tag}");
            return;
        }
        // The bridge's own.
        driver.submit(RX, &[Buffer::In(1600)]);
    }
}

/// Each on a tap that is free: there may be two at a time.
struct Nic;

impl Subject for Nic {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let free = |number: u32| {
            let name = format!("nic{number}");
            open_with_vhost(LinkSpec::Tap { name }, 1, VhostSpec::Node)
        };
        let mut numbers = 0..;
        let link = loop {
            let number = numbers.next().unwrap();
            match free(number) {
                Err(LinkError::Busy { .. }) => {}
                Err(LinkError::Missing { .. }) => {
                    add_tap(&format!("nic{number}"), "");
                    break free(number).unwrap();
                }
                other => break other.unwrap(),
            }
        };
        Box::new(VirtioNet::new(&config(), link).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        there_and_back(driver, 60, 1);
        there_and_back(driver, 1514, 2);
    }

    // The kernel looks for buffers only when it has a frame.
    fn victim_queue(&self) -> u16 {
        TX
    }
}

#[test]
fn the_device_conforms_on_every_transport() {
    on_a_switch("the_device_conforms_on_every_transport", "", || {
        for (name, carry) in TRANSPORTS {
            println!("by {name}");
            conformance(&Nic, &carry);
        }
    });
}

#[test]
fn a_cable_that_is_out_loses_frames_of_both_sides() {
    on_a_switch("a_cable_that_is_out_loses_frames_of_both_sides", "", || {
        for (_, carry) in TRANSPORTS {
            let stage = Stage::new();
            let (device, handle) = device(1);
            let mut driver = Driver::new(carry(&stage, device), stage.ram());
            driver.start();
            there_and_back(&mut driver, 100, 1);
            for round in 1..=5 {
                handle.set_link(false);
                // Dropped, and given back.
                for tag in 0..20 {
                    send(&mut driver, &frame(200, tag));
                }
                assert_eq!(handle.counters().tx_link_down.get(), 20 * round);
                handle.set_link(true);
                there_and_back(&mut driver, 300, round as u8);
            }
            assert!(handle.counters().vhost_starts.get() >= 12);
            assert!(!handle.change_rx_limits(alveole_rate_limiter::Limits::default()));
        }
    });
}

/// The state of a device that the kernel serves is one of ours: positions go over, and no frame is lost or doubled.
#[test]
fn a_device_moves_with_its_driver_at_work() {
    on_a_switch("a_device_moves_with_its_driver_at_work", "", || {
        for (_, carry) in TRANSPORTS {
            let stage = Stage::new();
            let mut driver = Driver::new(carry(&stage, device(1).0), stage.ram());
            driver.start();
            for tag in 0..10 {
                there_and_back(&mut driver, 100, tag);
                let mut saved = None;
                driver.access().with_control(&mut |control| {
                    control.pause();
                    saved = control.save();
                    if tag % 2 == 0 {
                        control.resume();
                    }
                });
                if tag % 2 == 0 {
                    continue;
                }
                // The other one first gives the tap up.
                let nothing = Stage::new();
                driver.move_to(nothing.direct(placeholder()));
                let mut moved = carry(&stage, device(1).0);
                moved.with_control(&mut |control| {
                    control.restore(saved.as_ref().unwrap()).unwrap();
                    control.resume();
                });
                driver.move_to(moved);
            }
        }
    });
}

/// Some device, where one is to be named.
fn placeholder() -> Box<dyn VirtioDevice> {
    let limits = alveole_rate_limiter::Limits::default();
    Box::new(alveole_virtio_rng::VirtioRng::new(limits).unwrap())
}

/// What a driver masks while the kernel sends it itself is pending, and sent once when it is unmasked.
#[test]
fn a_masked_message_waits_also_where_the_kernel_sends() {
    on_a_switch(
        "a_masked_message_waits_also_where_the_kernel_sends",
        "",
        || {
            let stage = Stage::new();
            let (device, handle) = device(1);
            let access = PciAccess::new(&stage, device);
            // Vector 0 tells of the configuration, the queues follow.
            let vector = usize::from(RX) + 1;
            let mut look = access.share(&stage, placeholder());
            look.structures.clear();
            look.probe();
            let mut driver = Driver::new(Box::new(access), stage.ram());
            let offered = driver.access().device_features();
            // Told of each frame.
            driver.start_with(offered & !alveole_virtio::features::EVENT_IDX);
            let wait_for = |what: &dyn Fn() -> bool| {
                let start = Instant::now();
                while !what() {
                    assert!(start.elapsed() < Duration::from_secs(10), "nothing came");
                    thread::yield_now();
                }
            };
            for round in 1..=5 {
                there_and_back(&mut driver, 100, round);
                wait_for(&|| look.take(vector));
                let by_us = handle.counters().vhost_interrupts.get();
                look.mask(vector, true);
                while look.take(vector) {}
                there_and_back(&mut driver, 100, round);
                wait_for(&|| look.pending().contains(&vector));
                assert!(
                    handle.counters().vhost_interrupts.get() > by_us,
                    "by our thread"
                );
                assert!(!look.take(vector), "nothing is sent while it is masked");
                look.mask(vector, false);
                assert!(look.take(vector) && look.pending().is_empty());
                while look.take(vector) {}
                let by_us = handle.counters().vhost_interrupts.get();
                there_and_back(&mut driver, 100, round);
                wait_for(&|| look.take(vector));
                assert_eq!(
                    handle.counters().vhost_interrupts.get(),
                    by_us,
                    "by the kernel"
                );
            }
        },
    );
}

#[test]
fn what_the_kernel_does_not_do_is_refused() {
    on_a_switch(
        "what_the_kernel_does_not_do_is_refused",
        " multi_queue",
        || {
            let error = |config: &NetConfig, pairs| {
                let e: NetError = VirtioNet::new(config, link(pairs)).err().unwrap();
                e.to_string()
            };
            let bucket = alveole_rate_limiter::Bucket {
                size: 1,
                one_time_burst: 0,
                refill_time: Duration::from_secs(1),
            };
            let limits = alveole_rate_limiter::Limits {
                ops: Some(bucket),
                bandwidth: None,
            };
            let limited = NetConfig {
                tx_limits: limits,
                ..config()
            };
            let filtered = NetConfig {
                source_mac_filter: true,
                ..config()
            };
            let small = NetConfig {
                mtu: Some(1400),
                ..config()
            };
            for (config, words) in [
                (limited, "rate limiting"),
                (filtered, "filtering"),
                (small, "ip link set dev NAME mtu 1400"),
            ] {
                let said = error(&config, 2);
                assert!(said.contains(words) && said.contains("vhost out"), "{said}");
            }
            let one = vec![
                File::options()
                    .read(true)
                    .write(true)
                    .open(NODE)
                    .unwrap()
                    .into(),
            ];
            let spec = LinkSpec::Tap {
                name: "tap0".into(),
            };
            let e = open_with_vhost(spec, 2, VhostSpec::Fds(one)).err().unwrap();
            assert!(e.to_string().contains("one for each pair"), "{e}");
            let fd: std::os::fd::OwnedFd = File::options()
                .read(true)
                .write(true)
                .open(NODE)
                .unwrap()
                .into();
            let twice = vec![fd.try_clone().unwrap(), fd];
            let spec = LinkSpec::Tap {
                name: "tap0".into(),
            };
            let e = open_with_vhost(spec, 2, VhostSpec::Fds(twice))
                .err()
                .unwrap();
            assert!(e.to_string().contains("already"), "{e}");
        },
    );
}
