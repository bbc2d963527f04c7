//! Networks under load and trouble: nothing is lost that need not be, a cable that comes and goes harms no connection,
//! and a guest that takes nothing costs its host nothing.

use std::io::Write;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::network::{HOST, LONG, boot, connect, ip, pattern, prepared_with, sha256, tap};
use super::vhost::has_vhost;
use crate::harness::images::{add_program, ext4, output, root_files};
use crate::harness::{Vm, skip};

/// Most segments that may be sent again, of a million. Nothing on the way loses frames: a tap holds more than a window of
/// TCP, and the guest's ring makes it wait. Without faults none is sent again on a machine at ease (0 of two
/// millions), and 0 to 40 of a few hundred thousand in the lab; a host that is software,
/// and busy, now and then keeps a processor from running for longer than TCP waits for an answer (200 ms), and a window of
/// a few dozen segments is sent again for nothing. One lost frame in a thousand, what a broken ring would give, is ten times this.
const MOST_AGAIN_PPM: f64 = 100.0;
/// That much is borne in any case: a window or two.
const AGAIN_AT_LEAST: f64 = 90.0;

/// Where iperf3 is; none, and said so, where it is not.
#[track_caller]
pub(super) fn iperf3() -> Option<&'static str> {
    let place = "/usr/bin/iperf3";
    if !Path::new(place).exists() {
        skip("iperf3 is not installed");
        return None;
    }
    Some(place)
}

/// What the host's iperf3 reports of a run against the guest's.
pub(super) fn report(words: &[&str]) -> Value {
    let all = [&["--client", "10.77.0.2", "--json"], words].concat();
    let text = output("iperf3", &all);
    serde_json::from_str(&text).unwrap()
}

/// TCP at full speed both ways, one connection and eight: what was sent arrives, and (almost) nothing is sent again.
fn sends_nothing_again(transport: &str, vhost: bool) {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() || vhost && !has_vhost() {
        return;
    }
    let Some(program) = iperf3() else { return };
    // Its port, 5201, in the kernel's table of what listens.
    let script = format!(
        "{program} --server --daemon; until grep -q ':1451 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done\n\
         echo serves; read -r _"
    );
    let interface = json!({"vhost": vhost});
    let add = |root: &Path| add_program(root, program);
    let Some(vm) = prepared_with(dir.path(), transport, interface, &script, add) else {
        return;
    };
    let mut vm = vm.boot();
    vm.wait_for("serves");
    for words in [
        &["--time", "2"][..],
        &["--time", "2", "--parallel", "8"],
        &["--time", "2", "--reverse"],
        &["--time", "2", "--parallel", "8", "--reverse"],
    ] {
        let said = report(words);
        let end = &said["end"];
        let of = |what: &str, field: &str| {
            let figure = end[what][field].as_f64();
            figure.unwrap_or_else(|| panic!("no {what}.{field}: {said}"))
        };
        let (sent, received) = (of("sum_sent", "bytes"), of("sum_received", "bytes"));
        let again = of("sum_sent", "retransmits");
        let segments = sent / 1448.0;
        println!(
            "{transport} {words:?}: {:.0} Mbit/s, {again} of {segments:.0} segments sent again",
            received * 8.0 / 2e6
        );
        assert!(received > 1e6, "{words:?}: {said}");
        let most = (segments * MOST_AGAIN_PPM / 1e6).max(AGAIN_AT_LEAST);
        assert!(again <= most, "{again} segments sent again: {words:?}");
    }
    vm.type_in("\n");
    vm.wait().assert_code(0);
}

#[test]
fn full_speed_loses_nothing_by_mmio() {
    sends_nothing_again("mmio", false);
}

#[test]
fn full_speed_loses_nothing_by_pci() {
    sends_nothing_again("pci", false);
}

#[test]
fn full_speed_loses_nothing_where_the_kernel_serves() {
    sends_nothing_again("pci", true);
}

/// The host's end of the cable goes down and comes back while a connection is at work, again and again: it goes on, and
/// what was sent arrives whole. (What the owner can do in process, `NetHandle::set_link`, is tested with the device.)
#[test]
fn a_connection_outlives_its_cable() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let script = "nc -l -p 9001 >/tmp/in </dev/null; echo \"sum $(sha256sum /tmp/in | cut -c 1-64)\"\nread -r _";
    let Some(mut vm) = boot(dir.path(), "pci", 1500, script) else {
        return;
    };
    vm.wait_for("up");
    let bytes = pattern(LONG);
    let mut to = connect("10.77.0.2:9001");
    for (number, part) in bytes.chunks(LONG / 4).enumerate() {
        to.write_all(part).unwrap();
        if number < 3 {
            output("ip", &["link", "set", "tap0", "down"]);
            thread::sleep(Duration::from_millis(100));
            output("ip", &["link", "set", "tap0", "up"]);
        }
    }
    drop(to);
    vm.wait_for("sum ");
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    assert_eq!(end.said("sum "), [sha256(&bytes, dir.path())], "{end}");
}

/// The interfaces, with their addresses, and the rules of this network namespace.
fn left() -> (Vec<String>, String) {
    let links = output("ip", &["-brief", "link"]);
    // Between them: whether there is a carrier, which the kernel tells some time later.
    let name_and_address = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        format!("{} {}", words[0], words[2])
    };
    let links = links.lines().map(name_and_address).collect();
    // Without a table there is nothing to be compared, and without the program none was made.
    let rules = Command::new("nft").args(["list", "ruleset"]).output();
    let rules = rules.map(|said| said.stdout).unwrap_or_default();
    (links, String::from_utf8(rules).unwrap())
}

/// Memory that a deaf guest may cost its monitor besides, in KiB: a frame that waits, and what malloc takes for it.
const MOST_GROWTH_KIB: u64 = 512;

/// A guest whose interface is down gives no new buffers, whatever comes. The host sends without end: the monitor does not
/// grow, a guest beside it is served, and the deaf one hears again when it wants to. Nothing is left behind.
#[test]
fn a_guest_that_takes_nothing_harms_nobody() {
    let (dir, other_dir) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    if tap(1500).is_none() {
        return;
    }
    for words in [
        "tuntap add dev tap1 mode tap vnet_hdr",
        "link set dev tap1 up",
        "address add 10.78.0.1/24 dev tap1",
        "neighbor replace 10.77.0.2 lladdr 02:77:00:00:00:02 dev tap0 nud permanent",
    ] {
        ip(words);
    }
    let before = left();
    let script = format!(
        "ip link set eth0 down; echo deaf; read -r _\n\
         ip link set eth0 up; ping -c 2 -W 10 {HOST} >/dev/null; echo \"hears $?\"; read -r _"
    );
    let Some(mut deaf) = boot(dir.path(), "pci", 1500, &script) else {
        return;
    };
    deaf.wait_for("deaf");
    let root = root_files(
        other_dir.path(),
        "dmesg -n 1; ip link set eth0 up; ip addr add 10.78.0.2/24 dev eth0; echo other; read -r _\n\
         ping -c 20 -i 0.05 -W 10 10.78.0.1 >/dev/null; echo \"beside $?\"; read -r _",
    );
    let image = other_dir.path().join("root.ext4");
    assert!(ext4(&image, &root, 16));
    let other = Vm::any().unwrap();
    let root = json!({"is_root_device": true, "is_read_only": true});
    let other = other.disk(&image, root).tap("tap1", json!({}));
    let mut other = other.option("--enable-pci").boot();
    other.wait_for("other");

    let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = [0x5a; 1400];
            while !over.load(Ordering::Relaxed) {
                // The interface's queue is full: that is the point.
                if socket.send_to(&bytes, ("10.77.0.2", 9)).is_ok() {
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        thread::sleep(Duration::from_millis(500));
        let first = deaf.own_kib();
        let at_first = sent.load(Ordering::Relaxed);
        other.type_in("\n");
        other.wait_for("beside ");
        thread::sleep(Duration::from_secs(2));
        let last = deaf.own_kib();
        let meanwhile = sent.load(Ordering::Relaxed) - at_first;
        over.store(true, Ordering::Relaxed);
        println!("{meanwhile} frames: {first} KiB before, {last} KiB after");
        assert!(meanwhile > 1000, "only {meanwhile} frames were sent");
        assert!(last <= first + MOST_GROWTH_KIB, "{first} KiB, then {last}");
    });
    deaf.type_in("\n");
    deaf.wait_for("hears ");
    for mut vm in [deaf, other] {
        vm.type_in("\n");
        let end = vm.wait();
        end.assert_code(0);
        let said = [end.said("hears "), end.said("beside ")].concat();
        assert_eq!(said, ["0"], "{end}");
        if !end.said("hears ").is_empty() {
            assert!(end.counter("rx_starved") > 0, "{end}");
        }
    }
    assert_eq!(left(), before);
}
