//! Disks: a guest boots from one, and nothing that it was promised is lost.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::harness::{End, Vm, skip};

/// Makes the files of a small root file system whose init runs `script` and powers off.
fn root_files(dir: &Path, script: &str) -> PathBuf {
    let root = dir.join("root");
    for sub in ["bin", "sbin", "proc", "sys", "dev", "tmp", "mnt"] {
        fs::create_dir_all(root.join(sub)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"];
    let busybox = busybox.iter().find(|p| Path::new(p).exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let list = Command::new(busybox).arg("--list").output().unwrap().stdout;
    for name in String::from_utf8(list)
        .unwrap()
        .lines()
        .filter(|n| *n != "busybox")
    {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let init = root.join("sbin/init");
    let text = format!(
        "#!/bin/sh\nexport PATH=/bin\nmount -t proc proc /proc\n\
         mount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\nmount -t tmpfs tmp /tmp\n{script}\n\
         sync\nstty -F /dev/console opost\npoweroff -f\n"
    );
    fs::write(&init, text).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    root
}

/// Runs a tool of the host; false, with the skip told, where it is missing.
#[track_caller]
fn tool(name: &str, args: &[&str]) -> bool {
    match Command::new(name).args(args).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{name} {args:?}: {said}");
            true
        }
        Err(e) => {
            skip(&format!("{name}: {e}"));
            false
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An ext4 image of the files below `root`.
#[track_caller]
fn ext4(dir: &Path, root: &Path, mib: u64) -> Option<PathBuf> {
    let image = dir.join("root.img");
    File::create(&image).unwrap().set_len(mib << 20).unwrap();
    tool(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-d", path(root), path(&image)],
    )
    .then_some(image)
}

fn bytes(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

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
    let Some(image) = ext4(dir.path(), &root_dir, 16) else {
        return;
    };
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
fn a_flushed_write_survives_the_death_of_the_monitor() {
    let Some(vm) = Vm::any() else { return };
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    drop(vm);
    for engine in ["Sync", "Async"] {
        let vm = Vm::any()
            .unwrap()
            .disk(&image, json!({"io_engine": engine}));
        let mut vm = vm.init_does("shell").boot();
        vm.wait_for_boot();
        vm.type_in(&format!(
            "yes {engine} | head -c 4194304 | dd of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null; echo flushed-$((6 * 7))\n"
        ));
        vm.wait_for("flushed-42");
        vm.signal(Signal::SIGKILL);
        let _ = vm.wait();
        let word = format!("{engine}\n").into_bytes();
        let written = &bytes(&image)[..4 << 20];
        assert!(
            written.chunks(word.len()).all(|c| word.starts_with(c)),
            "{engine}"
        );
    }
}

#[test]
fn a_trimmed_disk_gives_space_back() {
    let dir = TempDir::new().unwrap();
    let image = dir.path().join("disk");
    fs::write(&image, vec![0x55; 16 << 20]).unwrap();
    let before = fs::metadata(&image).unwrap().blocks();
    let script = "blkdiscard -o 4194304 -l 8388608 /dev/vdb && echo trimmed";
    let Some(end) = run_with(|vm| vm.disk(&image, json!({})), script) else {
        return;
    };
    assert_eq!(end.said("trimmed").len(), 1, "{end}");
    let after = fs::metadata(&image).unwrap().blocks();
    assert!(
        after + (7 << 11) <= before,
        "{before} blocks before, {after} after"
    );
    let left = bytes(&image);
    assert!(left[..4 << 20].iter().all(|b| *b == 0x55));
    assert!(left[12 << 20..].iter().all(|b| *b == 0x55));
}

#[test]
fn a_full_host_is_an_io_error_and_the_guest_lives() {
    if !crate::harness::is_root() {
        skip("only root can mount a small file system");
        return;
    }
    let dir = TempDir::new().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    assert!(tool(
        "mount",
        &["-t", "tmpfs", "-o", "size=4m", "small", path(&small)]
    ));
    let image = small.join("disk");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    // What was written is given back in between, so that there is room again.
    let script = "write() { yes | head -c $1 | dd of=/dev/vdb bs=64k oflag=direct 2>/dev/null; echo wrote $1 $?; }; \
        write 8388608; blkdiscard /dev/vdb; write 1048576";
    let end = run_with(|vm| vm.disk(&image, json!({})), script);
    // The kernel lets go of a ring's files some time after the process has ended.
    assert!(tool("umount", &["--lazy", path(&small)]));
    let Some(end) = end else { return };
    assert_eq!(end.said("wrote "), ["8388608 1", "1048576 0"], "{end}");
    assert!(end.stderr.contains("No space left"), "{end}");
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
    let Some(base) = ext4(dir.path(), &root_dir, 16) else {
        return;
    };
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

/// An ext4 root that holds fio with its libraries.
#[track_caller]
fn fio_root(dir: &Path, script: &str) -> Option<PathBuf> {
    let root_dir = root_files(dir, script);
    let Some(fio) = ["/usr/bin/fio", "/usr/local/bin/fio"]
        .into_iter()
        .find(|p| Path::new(p).exists())
    else {
        skip("fio is not installed");
        return None;
    };
    let libraries = Command::new("ldd").arg(fio).output().unwrap().stdout;
    let libraries = String::from_utf8(libraries).unwrap();
    let files = libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .chain([fio]);
    for file in files {
        let copy = root_dir.join(file.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(file, copy).unwrap();
    }
    ext4(dir, &root_dir, 160)
}

const FIO: &str = "/usr/bin/fio --name=x --filename=/dev/vdb --rw=randwrite --bs=4k --size=8m --ioengine=libaio \
                   --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 --randseed=7 --output=/tmp/out";

#[test]
fn fio_verifies_what_it_wrote_and_what_a_killed_monitor_left() {
    if Vm::any().is_none() {
        return;
    }
    for (file, transport) in [("raw", "--boot-timer"), ("disk.qcow2", "--enable-pci")] {
        let dir = TempDir::new().unwrap();
        let script = format!(
            "if ! grep -q again /proc/cmdline; then {FIO} --do_verify=1 && \
             {FIO} --do_verify=0 --end_fsync=1; echo fio-wrote $?; sleep 3600; \
             else {FIO} --verify_only; echo fio-read $?; fi; grep -i err= /tmp/out"
        );
        let Some(root_image) = fio_root(dir.path(), &script) else {
            return;
        };
        let image = dir.path().join(file);
        if file == "raw" {
            File::create(&image).unwrap().set_len(16 << 20).unwrap();
        } else if !tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", path(&image), "16M"],
        ) {
            return;
        }
        let vm = || {
            let vm = Vm::any().unwrap().cpus(2).option(transport);
            vm.disk(&root_image, root(true)).disk(&image, json!({}))
        };
        let mut first = vm().boot();
        first.wait_for("fio-wrote 0");
        first.signal(Signal::SIGKILL);
        let _ = first.wait();
        let end = vm().cmdline("again").boot().wait();
        end.assert_code(0);
        assert_eq!(end.said("fio-read "), ["0"], "{file}: {end}");
        if file != "raw" {
            // Whoever opened it last has put the counts right.
            assert!(tool("qemu-img", &["check", "-q", path(&image)]));
        }
    }
}
