//! Disks: a guest boots from one, and sees it as it was described.

use std::fs::File;

use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{bytes, ext4, path, root_files, tool};
use crate::harness::{End, Vm};

fn root(read_only: bool) -> serde_json::Value {
    json!({"is_root_device": true, "is_read_only": read_only})
}

#[test]
fn a_root_of_ext4_boots_and_keeps_what_is_written() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let root_dir = root_files(
        dir.path(),
        "echo 'alveole-guest: root' $(cat /mark 2>/dev/null || echo fresh); echo kept >/mark",
    );
    let image = dir.path().join("root.img");
    if !ext4(&image, &root_dir, 16) {
        return;
    }
    let end = vm.disk(&image, root(false)).boot().wait();
    end.assert_code(0);
    assert_eq!(end.said("alveole-guest: root "), ["fresh"], "{end}");
    let end = Vm::any().unwrap().disk(&image, root(false)).boot().wait();
    assert_eq!(end.said("alveole-guest: root "), ["kept"], "{end}");
    assert!(tool("e2fsck", &["-fn", path(&image)]));
}

#[test]
fn a_root_of_squashfs_boots_and_stays_as_it_was() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let root_dir = root_files(
        dir.path(),
        "echo 'alveole-guest: root' $(awk '$2==\"/\"{t=$3} END{print t}' /proc/mounts)",
    );
    let image = dir.path().join("root.squashfs");
    if !tool(
        "mksquashfs",
        &[path(&root_dir), path(&image), "-quiet", "-noappend"],
    ) {
        return;
    }
    let before = bytes(&image);
    let end = vm.disk(&image, root(true)).boot().wait();
    end.assert_code(0);
    assert_eq!(end.said("alveole-guest: root "), ["squashfs"], "{end}");
    assert!(before == bytes(&image));
}

#[test]
fn a_root_of_erofs_boots() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let root_dir = root_files(
        dir.path(),
        "echo 'alveole-guest: root' $(awk '$2==\"/\"{t=$3} END{print t}' /proc/mounts)",
    );
    let image = dir.path().join("root.erofs");
    if !tool("mkfs.erofs", &[path(&image), path(&root_dir)]) {
        return;
    }
    let end = vm.disk(&image, root(true)).boot().wait();
    end.assert_code(0);
    assert_eq!(end.said("alveole-guest: root "), ["erofs"], "{end}");
}

/// Runs `script` in a guest whose root is a small read-only disk (`vda`); the disks of `vm` follow.
#[track_caller]
fn run_with(disks: impl FnOnce(Vm) -> Vm, script: &str) -> Option<End> {
    let vm = Vm::any()?;
    let dir = TempDir::new().unwrap();
    let root_dir = root_files(dir.path(), script);
    let image = dir.path().join("root.squashfs");
    if !tool(
        "mksquashfs",
        &[path(&root_dir), path(&image), "-quiet", "-noappend"],
    ) {
        return None;
    }
    let end = disks(vm.disk(&image, root(true))).boot().wait();
    end.assert_code(0);
    Some(end)
}

#[test]
fn the_guest_sees_what_the_disk_is() {
    let dir = TempDir::new().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    File::create(&one).unwrap().set_len(3 << 20).unwrap();
    // The last 100 bytes are no sector.
    File::create(&two)
        .unwrap()
        .set_len((1 << 20) + 100)
        .unwrap();
    let disks = |vm: Vm| {
        let unsafe_one = json!({"is_read_only": true, "num_queues": 1, "cache_type": "Unsafe"});
        vm.cpus(2).disk(&one, json!({})).disk(&two, unsafe_one)
    };
    let script = "cd /sys/block; for d in vdb vdc; do \
        echo disk $d $(cat $d/size $d/ro) queues $(ls $d/mq | wc -l) $(cat $d/queue/write_cache) \
        discard $(test $(cat $d/queue/discard_max_bytes) -gt 0; echo $?); done; \
        echo random $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c); \
        (echo x >/dev/vdc) 2>/dev/null || echo refused";
    let Some(end) = run_with(disks, script) else {
        return;
    };
    assert_eq!(
        end.said("disk "),
        [
            "vdb 6144 0 queues 2 write back discard 0",
            "vdc 2048 1 queues 1 write through discard 1"
        ],
        "{end}"
    );
    assert_eq!(end.said("random "), ["16"], "{end}");
    assert_eq!(end.said("refused").len(), 1, "{end}");
}

#[test]
fn two_monitors_do_not_write_one_image() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut first = vm.disk(&image, json!({})).init_does("shell").boot();
    first.wait_for_boot();
    let second = Vm::any().unwrap().disk(&image, json!({})).boot().wait();
    second.assert_code(152);
    let holder = first.pid().to_string();
    assert!(second.stderr.contains(&holder), "{second}");
    first.type_in("exit\n");
    first.wait().assert_code(0);
    // Reading is shared.
    let only_read = || {
        Vm::any()
            .unwrap()
            .disk(&image, json!({"is_read_only": true}))
    };
    let mut first = only_read().init_does("shell").boot();
    first.wait_for_boot();
    only_read().boot().wait().assert_code(0);
    first.type_in("exit\n");
    first.wait().assert_code(0);
}

#[test]
fn a_root_by_pci_has_an_interrupt_for_each_queue() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disks = |vm: Vm| vm.cpus(2).option("--enable-pci").disk(&image, json!({}));
    let script = "for cpu in 0 1; do taskset $((cpu + 1)) dd if=/dev/vdb of=/dev/null bs=64k iflag=direct 2>/dev/null; done; \
        echo queues $(grep -c 'PCI-MSI.*req' /proc/interrupts); \
        echo lines $(grep -c 'IO-APIC.*virtio' /proc/interrupts); \
        echo random $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c)";
    let Some(end) = run_with(disks, script) else {
        return;
    };
    assert_eq!(end.said("queues "), ["4"], "two disks of two queues: {end}");
    assert_eq!(end.said("lines "), ["0"], "{end}");
    assert_eq!(end.said("random "), ["16"], "{end}");
}

#[test]
fn an_overlay_of_a_root_boots_and_leaves_its_base_alone() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let script =
        "echo 'alveole-guest: root' $(cat /mark 2>/dev/null || echo fresh); echo kept >/mark";
    let root_dir = root_files(dir.path(), script);
    let base = dir.path().join("root.img");
    if !ext4(&base, &root_dir, 16) {
        return;
    }
    let before = bytes(&base);
    let overlays = ["a.qcow2", "b.qcow2"].map(|name| dir.path().join(name));
    for overlay in &overlays {
        alveole_block_store::tools::create_overlay(
            overlay,
            &base,
            alveole_block_store::Format::Raw,
        )
        .unwrap();
    }
    drop(vm);
    for (overlay, mark, transport) in [
        (&overlays[0], "fresh", "--enable-pci"),
        (&overlays[0], "kept", "--boot-timer"),
        (&overlays[1], "fresh", "--enable-pci"),
    ] {
        let vm = Vm::any().unwrap().option(transport);
        let end = vm.disk(overlay, root(false)).boot().wait();
        end.assert_code(0);
        assert_eq!(end.said("alveole-guest: root "), [mark], "{end}");
    }
    assert!(before == bytes(&base), "the base was written");
    for overlay in &overlays {
        assert!(tool("qemu-img", &["check", "-q", path(overlay)]));
    }
}
