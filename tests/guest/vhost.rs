//! Network interfaces whose queues the host's kernel serves (vhost-net): a guest cannot tell them from others, whatever
//! its driver and the host do.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde_json::json;
use tempfile::TempDir;

use super::network::{HOST, LONG, connect, pattern, prepared, sha256, tap, tap_with};
use crate::harness::images::{output, path};
use crate::harness::{End, Running, Vm, skip};

const NODE: &str = "/dev/vhost-net";

/// Whether there is a vhost-net here, and it said so where not. Opening the node loads its module.
#[track_caller]
pub(super) fn has_vhost() -> bool {
    match File::options().read(true).write(true).open(NODE) {
        Ok(_) => true,
        Err(e) => {
            skip(&format!("{NODE}: {e}"));
            false
        }
    }
}

/// A guest on `tap0` whose queues the host's kernel serves.
#[track_caller]
fn guest(dir: &Path, transport: &str, script: &str) -> Option<Vm> {
    if !has_vhost() {
        return None;
    }
    let interface = json!({"guest_mac": "02:77:00:00:00:02", "vhost": true});
    prepared(dir, transport, interface, script)
}

/// Bytes to the guest at `port`, which says their sum.
fn send(vm: &mut Running, port: u16, bytes: &[u8]) {
    let mut to = connect(&format!("10.77.0.2:{port}"));
    to.write_all(bytes).unwrap();
    drop(to);
    vm.wait_for("sum ");
}

/// Asserts that the kernel has served, and how it has interrupted.
#[track_caller]
fn assert_served(end: &End, transport: &str, queues: u64) {
    let starts = end.counter("vhost_starts");
    assert!(starts >= queues, "{starts} queues were lent: {end}");
    assert_eq!(end.counter("rx_frames"), 0, "frames came by: {end}");
    let interrupts = end.counter("vhost_interrupts");
    if transport == "pci" {
        // By messages, but for what a driver has masked for a moment.
        assert!(interrupts < 50, "{interrupts} went by our thread: {end}");
    } else {
        // A register says what they are for.
        assert!(
            interrupts > 20,
            "only {interrupts} went by our thread: {end}"
        );
    }
}

/// Ping, and long transfers over TCP both ways that arrive whole.
fn moves_everything(transport: &str, memory_mib: u64) {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let script = format!(
        "ping -c 3 -W 10 {HOST} >/dev/null; echo \"ping $?\"\n\
         ping -c 2 -W 10 -s 20000 {HOST} >/dev/null; echo \"ping $?\"\n\
         nc -l -p 9001 >/tmp/in </dev/null; echo \"sum $(sha256sum /tmp/in | cut -c 1-64)\"\n\
         nc -l -p 9002 </tmp/in; echo sent\n\
         read -r _"
    );
    let Some(vm) = guest(dir.path(), transport, &script) else {
        return;
    };
    let mut vm = vm.memory_mib(memory_mib).boot();
    vm.wait_for("up");
    let bytes = pattern(LONG);
    send(&mut vm, 9001, &bytes);
    let mut from = connect("[fd77::2]:9002");
    let mut back = Vec::new();
    from.read_to_end(&mut back).unwrap();
    assert!(back == bytes, "{} bytes came back", back.len());
    drop(from);
    vm.wait_for("sent");
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    assert_eq!(end.said("ping "), ["0", "0"], "{end}");
    assert_eq!(end.said("sum "), [sha256(&bytes, dir.path())], "{end}");
    assert_served(&end, transport, 2);
}

#[test]
fn everything_arrives_by_mmio() {
    moves_everything("mmio", 256);
}

#[test]
fn everything_arrives_by_pci() {
    moves_everything("pci", 256);
}

/// A kernel gives out its highest memory first: buffers lie behind the hole, rings perhaps too.
#[test]
fn everything_arrives_where_memory_has_a_hole() {
    moves_everything("pci", 3500);
}

/// The driver goes and comes back, the tap goes down and comes back up, and nothing is stuck.
fn survives_changes(transport: &str) {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let script = format!(
        "driver=/sys/bus/virtio/drivers/virtio_net\n\
         device=$(basename $(readlink /sys/class/net/eth0/device))\n\
         for n in 1 2 3; do\n\
           echo $device >$driver/unbind; echo $device >$driver/bind; ip link set eth0 up\n\
           ip addr add 10.77.0.2/24 dev eth0\n\
           ping -c 2 -W 10 {HOST} >/dev/null; echo \"ping $?\"\n\
         done\n\
         echo bound; read -r _\n\
         ping -c 2 -W 10 {HOST} >/dev/null; echo \"ping $?\"\n\
         nc -l -p 9001 >/tmp/in </dev/null; echo \"sum $(sha256sum /tmp/in | cut -c 1-64)\"\n\
         read -r _"
    );
    let Some(vm) = guest(dir.path(), transport, &script) else {
        return;
    };
    let mut vm = vm.boot();
    vm.wait_for("bound");
    for state in ["down", "up", "down", "up"] {
        output("ip", &["link", "set", "tap0", state]);
        thread::sleep(Duration::from_millis(200));
    }
    // Gone with the interface.
    output("ip", &["address", "replace", "10.77.0.1/24", "dev", "tap0"]);
    vm.type_in("\n");
    vm.wait_for("ping ");
    let bytes = pattern(LONG / 4);
    send(&mut vm, 9001, &bytes);
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    assert_eq!(end.said("ping "), ["0"; 4], "{end}");
    assert_eq!(end.said("sum "), [sha256(&bytes, dir.path())], "{end}");
    // One driver after the other, each with two queues.
    assert_served(&end, transport, 8);
}

#[test]
fn drivers_and_taps_come_and_go_by_mmio() {
    survives_changes("mmio");
}

#[test]
fn drivers_and_taps_come_and_go_by_pci() {
    survives_changes("pci");
}

/// A guest that restarts ends its monitor; the next one finds tap and kernel free.
#[test]
fn a_guest_restarts_on_the_same_tap() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let script = format!("ping -c 2 -W 10 {HOST} >/dev/null; echo \"ping $?\"; sync; reboot -f");
    for _ in 0..2 {
        let _ = std::fs::remove_dir_all(dir.path().join("root"));
        let Some(vm) = guest(dir.path(), "pci", &script) else {
            return;
        };
        let end = vm.boot().wait();
        end.assert_code(0)
            .assert_line("the guest asked for a reset (vCPU ");
        assert_eq!(end.said("ping "), ["0"], "{end}");
    }
}

/// Every pair of queues has its own, interrupts move between processors while frames come, and the driver may use
/// fewer pairs.
#[test]
fn several_pairs_are_served_while_interrupts_move() {
    let dir = TempDir::new().unwrap();
    if tap_with(1500, " multi_queue").is_none() || !has_vhost() {
        return;
    }
    let script = "( while :; do for cpu in 1 2; do for irq in $(grep virtio /proc/interrupts | cut -d : -f 1); do \
           echo $cpu >/proc/irq/$irq/smp_affinity; done 2>/dev/null; done; done ) &\n\
         mover=$!\n\
         for port in 9001 9002 9003 9004; do nc -l -p $port >/tmp/in$port </dev/null & done\n\
         echo listens; for n in 1 2 3 4; do read -r _; done; kill $mover; wait\n\
         for port in 9001 9002 9003 9004; do echo \"sum $(sha256sum /tmp/in$port | cut -c 1-64)\"; done\n\
         read -r _";
    let interface = json!({"vhost": true, "num_queue_pairs": 2});
    let Some(vm) = prepared(dir.path(), "pci", interface, script) else {
        return;
    };
    let mut vm = vm.cpus(2).boot();
    vm.wait_for("listens");
    let bytes = pattern(LONG / 4);
    let senders: Vec<_> = (9001..=9004)
        .map(|port| {
            let bytes = bytes.clone();
            // Of the same network: a namespace is the thread's, and its children's.
            thread::spawn(move || {
                let mut to = connect(&format!("10.77.0.2:{port}"));
                to.write_all(&bytes).unwrap();
            })
        })
        .collect();
    for sender in senders {
        sender.join().unwrap();
        vm.type_in("\n");
    }
    vm.wait_for("sum ");
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    let sum = sha256(&bytes, dir.path());
    assert_eq!(end.said("sum "), [&sum; 4].map(String::as_str), "{end}");
    assert_eq!(
        end.counter("vhost_starts"),
        4,
        "two pairs of two queues: {end}"
    );
}

/// A monitor in a jail gets its vhost-net from outside, and needs no node.
#[test]
fn a_descriptor_from_outside_serves_as_well() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() || !has_vhost() {
        return;
    }
    let script = format!("ping -c 2 -W 10 {HOST} >/dev/null; echo \"ping $?\"");
    let interface = json!({"vhost": true, "vhost_fds": "9"});
    let Some(vm) = prepared(dir.path(), "pci", interface.clone(), &script) else {
        return;
    };
    let end = vm.inherits(9, Path::new(NODE)).boot().wait();
    end.assert_code(0);
    assert_eq!(end.said("ping "), ["0"], "{end}");
    assert_served(&end, "pci", 2);

    let _ = std::fs::remove_dir_all(dir.path().join("root"));
    let Some(vm) = prepared(dir.path(), "pci", interface, &script) else {
        return;
    };
    let end = vm.inherits(9, Path::new("/dev/null")).boot().wait();
    end.assert_code(152);
    assert!(end.stderr.contains("no vhost-net"), "{end}");
}

/// Each thread is confined; the kernel's own, which runs no code of ours, is as the one that asked for it was.
#[test]
fn a_served_guest_serves_the_host() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let web = TcpListener::bind((HOST, 8000)).unwrap();
    let script = format!("wget -q -O - http://{HOST}:8000/; echo \"wget $?\"; read -r _");
    let Some(vm) = guest(dir.path(), "mmio", &script) else {
        return;
    };
    let mut vm = vm.boot();
    let (mut client, _) = web.accept().unwrap();
    let mut request = [0; 1024];
    assert!(client.read(&mut request).unwrap() > 0);
    client
        .write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 12\r\n\r\nof-the-host\n")
        .unwrap();
    drop(client);
    vm.wait_for("wget ");
    let threads = vm.threads();
    assert!(
        threads.iter().any(|(name, _)| name.starts_with("net ")),
        "{threads:?}"
    );
    for (name, status) in &threads {
        let of_the_kernel = name.starts_with("vhost-") || name.starts_with("kvm-");
        assert!(
            of_the_kernel || status.contains("Seccomp:\t2"),
            "{name}: {status}"
        );
    }
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    assert_eq!(end.said("wget "), ["0"], "{end}");
}

/// What a monitor needs of `/dev`.
const NODES: [&str; 4] = ["kvm", "null", "urandom", "net/tun"];

/// Leaves this thread, and what it starts, these alone.
fn without_vhost(dir: &Path) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    output("mount", &["--make-rprivate", "/"]);
    let few = dir.join("dev");
    std::fs::create_dir_all(few.join("net")).unwrap();
    for node in NODES {
        let to = few.join(node);
        File::create(&to).unwrap();
        let from = Path::new("/dev").join(node);
        output("mount", &["--bind", path(&from), path(&to)]);
    }
    output("mount", &["--rbind", path(&few), "/dev"]);
}

#[test]
fn where_there_is_no_vhost_the_error_says_what_to_do() {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let interface = json!({"vhost": true});
    let Some(vm) = prepared(dir.path(), "pci", interface, "") else {
        return;
    };
    without_vhost(dir.path());
    let end = vm.boot().wait();
    // The directory goes with the test.
    output("umount", &["-l", "/dev"]);
    for node in NODES {
        output("umount", &[path(&dir.path().join("dev").join(node))]);
    }
    end.assert_code(152);
    for words in ["net0", NODE, "modprobe vhost_net", "leave vhost out"] {
        assert!(end.stderr.contains(words), "{words}: {end}");
    }
}
