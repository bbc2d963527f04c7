//! Network interfaces: a guest reaches the host over a tap and is reached, and what goes through arrives whole.
//!
//! Each test has a network namespace of its own, so that nothing that it makes is left behind, and none of it is
//! seen by others.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{ext4, output, root_files};
use crate::harness::{End, Running, Vm, is_root, patience, skip};

pub(super) const HOST: &str = "10.77.0.1";
const HOST6: &str = "fd77::1";
pub(super) const MAC: &str = "02:77:00:00:00:02";
/// What a guest does first. Neighbours are not asked whether an address is theirs already: that takes a second.
pub(super) const UP: &str = "ip link set lo up; echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad; ip link set eth0 up; \
    ip addr add 10.77.0.2/24 dev eth0; ip addr add fd77::2/64 dev eth0; echo up";
/// Bytes of the long transfers.
pub(super) const LONG: usize = 48 << 20;

/// Enters a network namespace with a tap `tap0` in it. None, and said so, where that is not allowed.
#[track_caller]
pub(super) fn tap(mtu: u32) -> Option<()> {
    tap_with(mtu, "")
}

/// Runs `ip` with these words.
#[track_caller]
pub(super) fn ip(words: &str) {
    let words: Vec<_> = words.split(' ').collect();
    output("ip", &words);
}

/// As [`tap`], made with these flags of `ip tuntap` as well.
#[track_caller]
pub(super) fn tap_with(mtu: u32, flags: &str) -> Option<()> {
    if !is_root() {
        skip("taps are made by root");
        return None;
    }
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    for words in [
        "link set dev lo up".to_owned(),
        format!("tuntap add dev tap0 mode tap{flags} vnet_hdr"),
        format!("link set dev tap0 mtu {mtu} up"),
        format!("address add {HOST}/24 dev tap0"),
        format!("address add {HOST6}/64 dev tap0 nodad"),
    ] {
        ip(&words);
    }
    Some(())
}

/// A guest on `tap0` that runs `script` when its address is there.
#[track_caller]
pub(super) fn boot(dir: &Path, transport: &str, mtu: u32, script: &str) -> Option<Running> {
    let interface = json!({"guest_mac": MAC, "mtu": mtu});
    prepared(dir, transport, interface, script).map(Vm::boot)
}

/// The same with this interface, not started yet.
#[track_caller]
pub(super) fn prepared(
    dir: &Path,
    transport: &str,
    interface: serde_json::Value,
    script: &str,
) -> Option<Vm> {
    prepared_with(dir, transport, interface, script, |_| {})
}

/// The same, with what `add` puts into its root.
#[track_caller]
pub(super) fn prepared_with(
    dir: &Path,
    transport: &str,
    interface: serde_json::Value,
    script: &str,
    add: impl FnOnce(&Path),
) -> Option<Vm> {
    let vm = Vm::any()?;
    let root = root_files(dir, &format!("dmesg -n 1\n{UP}\n{script}"));
    add(&root);
    let image = dir.join("root.ext4");
    if !ext4(&image, &root, 32) {
        return None;
    }
    let vm = vm
        .disk(
            &image,
            json!({"is_root_device": true, "is_read_only": true}),
        )
        .tap("tap0", interface);
    Some(if transport == "pci" {
        vm.option("--enable-pci")
    } else {
        vm
    })
}

/// A pattern in which no piece is like another.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub(super) fn sha256(bytes: &[u8], dir: &Path) -> String {
    let file = dir.join("sum");
    std::fs::write(&file, bytes).unwrap();
    let said = output("sha256sum", &[file.to_str().unwrap()]);
    said.split_whitespace().next().unwrap().to_owned()
}

/// Connects as soon as the guest listens.
pub(super) fn connect(addr: &str) -> TcpStream {
    let until = Instant::now() + patience(30);
    loop {
        match TcpStream::connect_timeout(&addr.parse().unwrap(), Duration::from_secs(2)) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < until, "{addr}: {e}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn reaches_and_is_reached(transport: &str) {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let web = TcpListener::bind((HOST, 8000)).unwrap();
    let script = format!(
        "ping -c 3 -W 10 {HOST} >/dev/null; echo \"ping $?\"\n\
         ping6 -c 3 -W 10 {HOST6} >/dev/null; echo \"ping6 $?\"\n\
         wget -q -O - http://{HOST}:8000/; echo \"wget $?\"\n\
         echo \"mac $(cat /sys/class/net/eth0/address)\"\n\
         mkdir /tmp/www; echo of-the-guest >/tmp/www/index.html; httpd -p 80 -h /tmp/www; echo serves\n\
         read -r _"
    );
    let Some(mut vm) = boot(dir.path(), transport, 1500, &script) else {
        return;
    };
    vm.wait_for("ping6");
    let (mut client, _) = web.accept().unwrap();
    let mut request = [0; 1024];
    assert!(client.read(&mut request).unwrap() > 0);
    client
        .write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 12\r\n\r\nof-the-host\n")
        .unwrap();
    drop(client);
    vm.wait_for("serves");
    let mut guest = connect("10.77.0.2:80");
    guest.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut page = String::new();
    guest.read_to_string(&mut page).unwrap();
    assert!(page.contains("of-the-guest"), "{page}");
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    for fact in ["ping ", "ping6 ", "wget "] {
        assert_eq!(end.said(fact), ["0"], "{end}");
    }
    assert_eq!(end.said("mac "), [MAC], "{end}");
    assert!(end.console.contains("of-the-host"), "{end}");
    assert!(end.counter("tx_frames") > 5, "{end}");
}

#[test]
fn a_guest_reaches_the_host_and_is_reached_by_mmio() {
    reaches_and_is_reached("mmio");
}

#[test]
fn a_guest_reaches_the_host_and_is_reached_by_pci() {
    reaches_and_is_reached("pci");
}

/// Long transfers both ways, over IPv4 and IPv6, arrive whole.
fn long_transfers(transport: &str, mtu: u32) -> Option<End> {
    let dir = TempDir::new().unwrap();
    tap(mtu)?;
    let script = "nc -l -p 9001 >/tmp/in </dev/null; echo \"sum $(sha256sum /tmp/in | cut -c 1-64)\"\n\
        nc -l -p 9002 </tmp/in; echo sent\n\
        echo \"mtu $(cat /sys/class/net/eth0/mtu)\"\n\
        ping -c 2 -W 10 -s 20000 10.77.0.1 >/dev/null; echo \"ping $?\"\n\
        read -r _";
    let mut vm = boot(dir.path(), transport, mtu, script)?;
    vm.wait_for("up");
    let bytes = pattern(LONG);
    let mut to = connect("10.77.0.2:9001");
    to.write_all(&bytes).unwrap();
    drop(to);
    vm.wait_for("sum ");
    let mut from = connect("[fd77::2]:9002");
    let mut back = Vec::new();
    from.read_to_end(&mut back).unwrap();
    assert!(back == bytes, "{} bytes came back", back.len());
    // The guest's nc waits for our end, too.
    drop(from);
    vm.wait_for("ping ");
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    assert_eq!(end.said("sum "), [sha256(&bytes, dir.path())], "{end}");
    assert_eq!(end.said("mtu "), [mtu.to_string()], "{end}");
    assert_eq!(end.said("ping "), ["0"], "{end}");
    Some(end)
}

#[test]
fn long_transfers_arrive_whole_in_few_long_frames() {
    let Some(end) = long_transfers("pci", 1500) else {
        return;
    };
    // The host's TCP leaves cutting to the other side: far fewer frames than 1500 bytes would make.
    let frames = end.counter("rx_frames");
    assert!(frames < (LONG / 1500) as u64 / 4, "{frames}: {end}");
}

#[test]
fn long_transfers_arrive_whole_by_mmio_in_jumbo_frames() {
    long_transfers("mmio", 9000);
}

#[test]
fn long_transfers_arrive_whole_in_the_longest_frames() {
    long_transfers("pci", 65_000);
}

#[test]
fn two_guests_on_one_bridge_reach_each_other() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    for words in [
        "link add name br0 type bridge",
        "link set dev br0 up",
        "address flush dev tap0",
        "link set dev tap0 master br0",
        "tuntap add dev tap1 mode tap vnet_hdr",
        "link set dev tap1 master br0 up",
    ] {
        ip(words);
    }
    let other_dir = TempDir::new().unwrap();
    let (Some(mut serving), Some(vm)) = (
        boot(
            dir.path(),
            "pci",
            1500,
            "mkdir /tmp/www; echo of-the-other >/tmp/www/index.html; httpd -p 80 -h /tmp/www; echo serves\nread -r _",
        ),
        Vm::any(),
    ) else {
        return;
    };
    serving.wait_for("serves");
    let root = root_files(
        other_dir.path(),
        "dmesg -n 1; ip link set eth0 up; ip addr add 10.77.0.3/24 dev eth0\n\
         wget -q -O - http://10.77.0.2/; echo \"wget $?\"",
    );
    let image = other_dir.path().join("root.ext4");
    assert!(ext4(&image, &root, 16));
    let end = vm
        .disk(
            &image,
            json!({"is_root_device": true, "is_read_only": true}),
        )
        .tap("tap1", json!({}))
        .option("--enable-pci")
        .boot()
        .wait();
    assert_eq!(end.said("wget "), ["0"], "{end}");
    assert!(end.console.contains("of-the-other"), "{end}");
    serving.type_in("\n");
    serving.wait().assert_code(0);
}

/// The monitor's network threads are behind their filter, and take no processor when nothing comes.
#[test]
fn an_idle_network_costs_nothing() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let Some(mut vm) = boot(dir.path(), "pci", 1500, "echo idle; read -r _") else {
        return;
    };
    vm.wait_for("idle");
    let ticks = || {
        let text = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "for t in /proc/{}/task/*; do grep -q '^net ' $t/comm && cut -d ' ' -f 14,15 $t/stat; done",
                vm.pid()
            ))
            .output()
            .unwrap()
            .stdout;
        let text = String::from_utf8(text).unwrap();
        assert!(!text.trim().is_empty(), "there is no thread `net ...`");
        let words = text.split_whitespace();
        words.map(|word| word.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = ticks();
    thread::sleep(Duration::from_secs(2));
    // Two of two hundred.
    assert!(ticks() - before <= 2, "the network's thread does not sleep");
    vm.type_in("\n");
    vm.wait().assert_code(0);
}
