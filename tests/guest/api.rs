//! Real guests that clients of the API start, pause, limit and give other disks while they work.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{ext4, output, path, root_files, tool};
use crate::harness::{Running, Vm, patience};

/// Starts a guest by the API that runs `script` from a small read-only root; `disk` is its `/dev/vdb`.
#[track_caller]
fn start(vm: Vm, dir: &Path, script: &str, disk: &Path) -> Option<Running> {
    let root = root_files(dir, script);
    let image = dir.join("root.squashfs");
    if !tool(
        "mksquashfs",
        &[path(&root), path(&image), "-quiet", "-noappend"],
    ) {
        return None;
    }
    let vm = vm.disk(
        &image,
        json!({"is_root_device": true, "is_read_only": true}),
    );
    Some(vm.disk(disk, json!({})).by_api().boot())
}

/// A disk of 16 MiB that begins with `text`.
fn disk(dir: &Path, name: &str, text: &str) -> PathBuf {
    let file = dir.join(name);
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(16 << 20, b'.');
    fs::write(&file, bytes).unwrap();
    file
}

/// Writes and reads a disk over and over, round the caches of the guest.
const ROUNDS: &str = "
    dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null
    sum=$(sha256sum </tmp/data)
    intact=0
    echo rounds begin
    for round in 1 2 3 4 5 6 7 8 9 10 11 12; do
        dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        [ \"$(dd if=/dev/vdb bs=64k count=64 2>/dev/null | sha256sum)\" = \"$sum\" ] && intact=$((intact + 1))
    done
    echo rounds intact $intact
";

#[track_caller]
fn paused_at_work(vm: Option<Vm>, options: &[&str]) {
    let Some(mut vm) = vm else { return };
    for option in options {
        vm = vm.option(option);
    }
    let dir = TempDir::new().unwrap();
    let image = disk(dir.path(), "disk", "");
    let Some(mut guest) = start(vm.cpus(2), dir.path(), ROUNDS, &image) else {
        return;
    };
    guest.wait_for("rounds begin");
    let mut client = guest.client();
    let (begun, mut pauses, mut longest) = (Instant::now(), 0, 0.0_f64);
    while !guest.has_shown("rounds intact") {
        let start = Instant::now();
        client.done("PATCH", "/vm", json!({"state": "Paused"}));
        longest = longest.max(start.elapsed().as_secs_f64());
        pauses += 1;
        if pauses % 10 == 1 {
            assert_eq!(client.get("/")["state"], "Paused");
        }
        client.done("PATCH", "/vm", json!({"state": "Resumed"}));
        // It works most of the time, however slow this machine is.
        std::thread::sleep((start.elapsed() * 2).max(Duration::from_millis(5)));
        assert!(
            begun.elapsed() < patience(120),
            "it does not come to an end"
        );
    }
    println!(
        "paused {pauses} times at work, the longest took {:.1} ms",
        longest * 1e3
    );
    let end = guest.wait();
    end.assert_code(0);
    assert_eq!(
        end.said("rounds intact "),
        ["12"],
        "after {pauses} pauses: {end}"
    );
    assert!(pauses >= 5, "{pauses} pauses: {end}");
}

#[test]
fn a_guest_that_is_paused_at_work_loses_nothing() {
    paused_at_work(Vm::any(), &[]);
}

#[test]
fn nor_does_one_whose_devices_are_on_pci() {
    paused_at_work(Vm::any(), &["--enable-pci"]);
}

#[test]
fn nor_does_one_whose_disks_share_a_thread() {
    paused_at_work(Vm::any(), &["--disk-threads", "shared"]);
}

#[test]
fn a_guest_that_is_paused_stands_still() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let image = disk(dir.path(), "disk", "");
    let script = "n=0; while :; do n=$((n + 1)); echo tick $n; done";
    let Some(mut guest) = start(vm, dir.path(), script, &image) else {
        return;
    };
    guest.wait_for("tick 10");
    let mut client = guest.client();
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    // What was printed before is still written.
    std::thread::sleep(Duration::from_millis(300));
    let before = guest.shown();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.shown(), before);
    client.done("PATCH", "/vm", json!({"state": "Resumed"}));
    guest.wait_for("tick");
    assert!(guest.shown() >= before);
    // A paused machine ends as any other.
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    guest.signal(Signal::SIGINT);
    guest.wait().assert_code(130);
}

#[test]
fn a_limit_is_put_on_a_disk_at_work_and_taken_off() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let image = disk(dir.path(), "disk", "");
    // One MiB: three seconds with the limit.
    let script = "
        now() { awk '{ print int($1 * 100) }' /proc/uptime; }
        while :; do
            echo 3 >/proc/sys/vm/drop_caches
            start=$(now)
            dd if=/dev/vdb of=/dev/null bs=64k count=16 2>/dev/null
            [ $(($(now) - start)) -gt 200 ] && echo slow || echo quick
        done";
    let Some(mut guest) = start(vm, dir.path(), script, &image) else {
        return;
    };
    guest.wait_for("quick");
    let mut client = guest.client();
    let limit = |size: u64, refill_time: u64| {
        json!({
            "drive_id": "disk1",
            "rate_limiter": {"bandwidth": {"size": size, "refill_time": refill_time}},
        })
    };
    client.done("PATCH", "/drives/disk1", limit(256 << 10, 1000));
    guest.wait_for("slow");
    client.done("PATCH", "/drives/disk1", limit(0, 0));
    guest.wait_for("quick");
    guest.signal(Signal::SIGINT);
    guest.wait().assert_code(130);
}

#[test]
fn another_image_is_put_into_a_drive_at_work() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let first = disk(dir.path(), "first", "content one");
    let second = disk(dir.path(), "second", "content two");
    let more = fs::File::options().append(true).open(&second).unwrap();
    more.set_len(17 << 20).unwrap();
    let script = "
        while :; do
            echo 3 >/proc/sys/vm/drop_caches
            echo \"$(head -c 11 /dev/vdb) of $(cat /sys/block/vdb/size)\"
        done";
    let Some(mut guest) = start(vm, dir.path(), script, &first) else {
        return;
    };
    let put = |image: &Path| json!({"drive_id": "disk1", "path_on_host": image});
    let mut client = guest.client();
    guest.wait_for("content one of 32768");
    for _ in 0..3 {
        client.done("PATCH", "/drives/disk1", put(&second));
        guest.wait_for("content two of 34816");
        client.done("PATCH", "/drives/disk1", put(&first));
        guest.wait_for("content one of 32768");
    }
    // A file that has grown: the same path once more.
    let grown = fs::File::options().append(true).open(&first).unwrap();
    grown.set_len(18 << 20).unwrap();
    client.done("PATCH", "/drives/disk1", put(&first));
    guest.wait_for("content one of 36864");
    // While it stands still.
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    client.done("PATCH", "/drives/disk1", put(&second));
    client.done("PATCH", "/vm", json!({"state": "Resumed"}));
    guest.wait_for("content two of 34816");
    guest.signal(Signal::SIGINT);
    guest.wait().assert_code(130);
}

/// The guest sees the cable go out and in; nothing passes meanwhile, and everything afterwards.
#[test]
fn a_cable_is_pulled_and_put_back() {
    if crate::network::tap(1500).is_none() {
        return;
    }
    let Some(vm) = Vm::any() else { return };
    let vm = vm
        .tap("tap0", json!({"guest_mac": "02:77:00:00:00:02"}))
        .takes_commands()
        .by_api();
    let mut guest = vm.option("--enable-pci").boot();
    guest.wait_for_commands();
    let (status, said) = guest.ask(
        "ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0 && ping -c 1 -W 10 10.77.0.1",
    );
    assert_eq!(status, 0, "{said}");
    let mut client = guest.client();
    let told = client.refused("PUT", "/network-interfaces/eth7/link", json!({"up": false}));
    assert!(told.contains("it has net0"), "{told}");
    for round in 0..3 {
        client.done("PUT", "/network-interfaces/net0/link", json!({"up": false}));
        let seen = "for i in 1 2 3 4 5 6 7 8 9 10; do [ $(cat /sys/class/net/eth0/carrier) = ";
        let (status, _) = guest.ask(&format!(
            "{seen}0 ] && break; sleep 0.2; done; [ $i != 10 ]"
        ));
        assert_eq!(
            status, 0,
            "round {round}: the guest does not see that the cable is out"
        );
        assert_ne!(guest.ask("ping -c 1 -W 1 10.77.0.1").0, 0, "round {round}");
        client.done("PUT", "/network-interfaces/net0/link", json!({"up": true}));
        let (status, _) = guest.ask(&format!(
            "{seen}1 ] && break; sleep 0.2; done; [ $i != 10 ]"
        ));
        assert_eq!(
            status, 0,
            "round {round}: the guest does not see that the cable is in"
        );
        let (status, said) = guest.ask("ping -c 3 -W 10 10.77.0.1");
        assert_eq!(status, 0, "round {round}: {said}");
    }
    guest.leave().assert_code(0);
}

/// A first process that is told of the three keys, as busybox's and systemd are.
const TAKES_KEYS: &str = "
    trap 'echo keys taken; sync; stty -F /dev/console opost; reboot -f' INT
    echo 0 >/proc/sys/kernel/ctrl-alt-del
    echo ready for keys
    while :; do sleep 0.1; done
";

#[test]
fn ctrl_alt_del_restarts_a_guest_in_good_order() {
    // Others have no virtual terminals, whose part of the kernel takes the keys.
    let Some(vm) = Vm::stock() else { return };
    let dir = TempDir::new().unwrap();
    let image = disk(dir.path(), "disk", "");
    let Some(mut guest) = start(vm, dir.path(), TAKES_KEYS, &image) else {
        return;
    };
    guest.wait_for("ready for keys");
    let keys = json!({"action_type": "SendCtrlAltDel"});
    guest.client().done("PUT", "/actions", keys);
    guest.wait_for("keys taken");
    let end = guest.wait();
    end.assert_code(0)
        .assert_line("the guest asked for a reset (vCPU ");
}

/// While it is paused, nothing happens; afterwards it takes them.
#[test]
fn ctrl_alt_del_waits_for_a_guest_that_is_paused() {
    let Some(vm) = Vm::stock() else { return };
    let dir = TempDir::new().unwrap();
    let image = disk(dir.path(), "disk", "");
    let vm = vm.cpus(2).option("--enable-pci");
    let Some(mut guest) = start(vm, dir.path(), TAKES_KEYS, &image) else {
        return;
    };
    guest.wait_for("ready for keys");
    let mut client = guest.client();
    client.done("PATCH", "/vm", json!({"state": "Paused"}));
    let keys = json!({"action_type": "SendCtrlAltDel"});
    client.done("PUT", "/actions", keys.clone());
    let told = client.refused("PUT", "/actions", keys);
    assert!(told.contains("has not read the keys"), "{told}");
    client.done("PATCH", "/vm", json!({"state": "Resumed"}));
    guest.wait_for("keys taken");
    guest
        .wait()
        .assert_code(0)
        .assert_line("the guest asked for a reset (vCPU ");
}

/// The driver of every kernel reads the keys, whatever it makes of them: one interrupt for each byte at least.
#[test]
fn a_guest_reads_the_keys() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let image = disk(dir.path(), "disk", "");
    let script = "
        trap : INT
        echo 0 >/proc/sys/kernel/ctrl-alt-del
        read_so_far() { awk '/i8042/ { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' /proc/interrupts; }
        before=$(read_so_far)
        echo ready for keys
        for press in 1 2 3; do
            while [ $(read_so_far) -lt $((before + 8 * press)) ]; do :; done
            echo press $press read
        done";
    let Some(mut guest) = start(vm, dir.path(), script, &image) else {
        return;
    };
    guest.wait_for("ready for keys");
    let mut client = guest.client();
    for press in 1..=3 {
        let keys = json!({"action_type": "SendCtrlAltDel"});
        client.done("PUT", "/actions", keys);
        guest.wait_for(&format!("press {press} read"));
    }
    guest.wait().assert_code(0);
}

#[test]
fn a_guest_without_a_keyboard_hears_the_power_button_instead() {
    let Some(vm) = Vm::stock_elf() else { return };
    let vm = vm.cmdline(crate::ends::NO_KEYBOARD).init_does("sleep");
    let mut guest = vm.by_api().boot();
    guest.wait_for("alveole-guest: power-button event");
    let keys = json!({"action_type": "SendCtrlAltDel"});
    guest.client().done("PUT", "/actions", keys);
    guest.wait_for("alveole-guest: power button pressed");
    let end = guest.wait();
    end.assert_code(0)
        .assert_line("the guest powered off (vCPU ");
}

/// What the guest of the guide does: takes its address, writes to its disk and waits for the end. Where its kernel takes no keys, it
/// restarts by itself when it has been reached.
const GUIDE: &str = "
    ip link set eth0 up && ip addr add 172.16.0.2/30 dev eth0
    echo by the guest >/written
    sync
    trap 'echo guide: keys taken; sync; stty -F /dev/console opost; reboot -f' INT
    echo 0 >/proc/sys/kernel/ctrl-alt-del
    [ -e /dev/tty0 ] && echo guide: waits for keys
    echo guide: ready
    while [ -e /dev/tty0 ] || [ $(awk '/^Icmp:/ && ++n == 2 { print $10 }' /proc/net/snmp) = 0 ]; do sleep 0.2; done
    sleep 1
    stty -F /dev/console opost
    reboot -f
";

/// Ends with the test, however that ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Firecracker's getting-started guide, with our program under the name of `firecracker`: the tap, the requests by curl in their order
/// and with their fields, a guest that is reached from the host; and then SendCtrlAltDel.
#[test]
fn the_first_steps_that_firecracker_teaches() {
    if crate::network::tap(1500).is_none() {
        return;
    }
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("root.ext4");
    if !ext4(&image, &root_files(dir.path(), GUIDE), 64) {
        return;
    }
    for words in [
        "link del tap0",
        "tuntap add dev tap0 mode tap",
        "addr add 172.16.0.1/30 dev tap0",
        "link set dev tap0 up",
    ] {
        crate::network::ip(words);
    }
    let program = dir.path().join("firecracker");
    symlink(env!("CARGO_BIN_EXE_alveole-vmm"), &program).unwrap();
    let console = dir.path().join("console");
    let output_file = fs::File::create(&console).unwrap();
    let child = Command::new(&program)
        .args(["--api-sock", "firecracker.socket", "--enable-pci"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stderr(output_file.try_clone().unwrap())
        .stdout(output_file)
        .spawn();
    let mut child = Ended(child.unwrap());
    let said = || String::from_utf8_lossy(&fs::read(&console).unwrap()).into_owned();
    let wait_for = |what: &str, holds: &mut dyn FnMut() -> bool| {
        let until = Instant::now() + patience(60);
        while !holds() {
            assert!(Instant::now() < until, "{what}: {}", said());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let socket = dir.path().join("firecracker.socket");
    wait_for("no socket", &mut || socket.exists());
    let put = |at: &str, body: serde_json::Value| {
        let body = body.to_string();
        let url = format!("http://localhost/{at}");
        let socket = path(&socket);
        let request = ["-X", "PUT", "--unix-socket", socket, "--data", &body, &url];
        let quiet = ["--silent", "--show-error", "--write-out", "%{http_code}"];
        let done = output("curl", &[&quiet[..], &request].concat());
        assert_eq!(done, "204", "{at} {body}: {}", said());
    };

    let log = json!({"log_path": "./firecracker.log", "level": "Debug", "show_level": true, "show_log_origin": true});
    put("logger", log);
    let args = format!("console=ttyS0 reboot=k panic=1 {}", vm.kernel_words());
    let mut boot = json!({"kernel_image_path": vm.kernel_path(), "boot_args": args});
    // The guide's kernel has the drivers of disks built in; a distribution's has not.
    boot["initrd_path"] = json!(vm.initrd_path());
    put("boot-source", boot);
    let root = json!({"drive_id": "rootfs", "path_on_host": "./root.ext4", "is_root_device": true, "is_read_only": false});
    put("drives/rootfs", root);
    let mac = "06:00:AC:10:00:02";
    let interface = json!({"iface_id": "net1", "guest_mac": mac, "host_dev_name": "tap0"});
    put("network-interfaces/net1", interface);
    put("actions", json!({"action_type": "InstanceStart"}));

    wait_for("not ready", &mut || said().contains("guide: ready"));
    output("ping", &["-c", "1", "-W", "20", "172.16.0.2"]);
    let keys = said().contains("guide: waits for keys");
    if keys {
        put("actions", json!({"action_type": "SendCtrlAltDel"}));
    }
    let mut status = None;
    wait_for("does not end", &mut || {
        status = child.0.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(0), "{}", said());
    assert_eq!(said().contains("guide: keys taken"), keys, "{}", said());
    assert!(!socket.exists(), "the socket is left");
    let written = output("debugfs", &["-R", "cat /written", path(&image)]);
    assert_eq!(written, "by the guest\n");
    let log = fs::read_to_string(dir.path().join("firecracker.log")).unwrap();
    assert!(log.contains("[anonymous-instance:"), "{log}");
}
