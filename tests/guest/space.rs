//! Disks and the host's room: it is given back, it runs out and comes again, it is taken away.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{
    DebianRoot, Qcow2, Raw, allocated_bytes, as_raw, bytes, empty, fio_root, output, path,
    scripted, sum, tool,
};
use crate::harness::{Vm, is_root, skip};

const MIB: u64 = 1 << 20;

/// A raw and a qcow2 image of `mib` MiB, which the guest will have as `/dev/vdb` and `/dev/vdc`.
#[track_caller]
fn both(dir: &Path, mib: u64) -> Option<[PathBuf; 2]> {
    Some([empty(dir, Raw, mib)?, empty(dir, Qcow2, mib)?])
}

fn add_both(vm: Vm, images: &[PathBuf; 2]) -> Vm {
    let vm = vm.disk(&images[0], json!({}));
    vm.disk(&images[1], json!({}))
}

/// What `qemu-img info` says an image takes of the host's disk.
#[track_caller]
fn said_to_take(image: &Path) -> u64 {
    let args = ["info", "-U", "--output=json", path(image)];
    let info: serde_json::Value = serde_json::from_str(&output("qemu-img", &args)).unwrap();
    info["actual-size"].as_u64().unwrap()
}

#[test]
fn a_file_system_is_made_filled_trimmed_and_sound() {
    let dir = TempDir::new().unwrap();
    let (Some(vm), Some(debian)) = (Vm::any(), DebianRoot::find()) else {
        return;
    };
    let Some(images) = both(dir.path(), 48) else {
        return;
    };
    let script = "
        for disk in vdb vdc; do
            mkfs.ext4 -q /dev/$disk; mkdir /tmp/$disk; mount /dev/$disk /tmp/$disk
            cp -a /usr/lib/x86_64-linux-gnu/perl-base /tmp/$disk/tree
            head -c 25165824 /dev/urandom >/tmp/$disk/file; sync -f /tmp/$disk
        done
        echo filled; read -r _
        for disk in vdb vdc; do
            rm /tmp/$disk/file; sync -f /tmp/$disk; fstrim /tmp/$disk; echo \"trim $disk $?\"
            diff -r /usr/lib/x86_64-linux-gnu/perl-base /tmp/$disk/tree; echo \"tree $disk $?\"
            umount /tmp/$disk; e2fsck -fn /dev/$disk >/tmp/said; echo \"fsck $disk $?\"
            echo \"content $disk $(sha256sum </dev/$disk)\"
        done";
    let vm = vm.cmdline("init=/usr/local/sbin/debian-report");
    let disks = |vm| add_both(vm, &images);
    let root = debian.image("squashfs");
    let mut vm = scripted(vm, &root, dir.path(), disks, script).boot();
    vm.wait_for("filled");
    let take = || {
        let [raw, qcow2] = [&images[0], &images[1]];
        [
            allocated_bytes(raw),
            allocated_bytes(qcow2),
            said_to_take(qcow2),
        ]
    };
    let full = take();
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    for disk in ["vdb", "vdc"] {
        for fact in ["trim", "tree", "fsck"] {
            let said = end.said(&format!("{fact} {disk} "));
            assert_eq!(said, ["0"], "{fact} {disk}: {end}");
        }
    }
    let trimmed = take();
    for (full, trimmed) in full.into_iter().zip(trimmed) {
        assert!(full > 24 * MIB, "it was not filled: {full} bytes; {end}");
        assert!(
            trimmed + 23 * MIB < full,
            "{full} bytes before, {trimmed} after; {end}"
        );
    }
    for (image, format, disk) in [(&images[0], Raw, "vdb"), (&images[1], Qcow2, "vdc")] {
        let raw = as_raw(image, format);
        let content = format!("{}  -", sum(&raw));
        assert_eq!(end.said(&format!("content {disk} ")), [content], "{end}");
        output("e2fsck", &["-fn", path(&raw)]);
    }
}

#[test]
fn a_trimmed_disk_gives_space_back_and_no_other() {
    let dir = TempDir::new().unwrap();
    let (Some(vm), Some(root)) = (Vm::any(), fio_root()) else {
        return;
    };
    let image = dir.path().join("disk");
    fs::write(&image, vec![0x55; 16 << 20]).unwrap();
    let before = allocated_bytes(&image);
    let script = "blkdiscard -o 4194304 -l 8388608 /dev/vdb && echo trimmed";
    let disks = |vm: Vm| vm.disk(&image, json!({}));
    let end = scripted(vm, root, dir.path(), disks, script).boot().wait();
    end.assert_code(0);
    assert_eq!(end.said("trimmed").len(), 1, "{end}");
    let after = allocated_bytes(&image);
    assert!(
        after + 7 * MIB <= before,
        "{before} bytes before, {after} after"
    );
    let left = bytes(&image);
    assert!(left[..4 << 20].iter().all(|b| *b == 0x55));
    assert!(left[12 << 20..].iter().all(|b| *b == 0x55));
}

/// A small file system on the host; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    #[track_caller]
    fn mount(dir: &Path, size: &str) -> Option<Self> {
        if !is_root() {
            skip("only root can mount a small file system");
            return None;
        }
        let at = dir.join("small");
        fs::create_dir(&at).unwrap();
        let size = format!("size={size}");
        tool("mount", &["-t", "tmpfs", "-o", &size, "small", path(&at)]).then_some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // The kernel lets go of a ring's files some time after the process has ended.
        tool("umount", &["--lazy", path(&self.0)]);
    }
}

#[test]
fn a_full_host_is_an_io_error_until_there_is_room_again() {
    let (Some(_), Some(root)) = (Vm::any(), fio_root()) else {
        return;
    };
    for format in [Raw, Qcow2] {
        let dir = TempDir::new().unwrap();
        let Some(small) = Small::mount(dir.path(), "12m") else {
            return;
        };
        let Some(image) = empty(&small.0, format, 32) else {
            return;
        };
        let ballast = small.0.join("ballast");
        fs::write(&ballast, vec![1; 8 << 20]).unwrap();
        // What is tried again and again while there is no room must not cost the image a cluster each time.
        let script = "
            write() { yes $1 | head -c $2 | dd of=/dev/vdb bs=64k seek=$3 oflag=direct conv=fsync 2>/tmp/errors; echo \"wrote $1 $?\"; }
            write before 1048576 0
            write beyond 8388608 16
            for n in $(seq 40); do yes | head -c 65536 | dd of=/dev/vdb bs=64k seek=$((300 + n)) oflag=direct 2>/dev/null && echo room; done
            echo full; read -r _
            write after 6291456 16
            yes before | head -c 1048576 | cmp - /dev/vdb -n 1048576; echo \"same before $?\"
            yes after | head -c 6291456 >/tmp/after; dd if=/dev/vdb bs=64k skip=16 count=96 iflag=direct 2>/dev/null | cmp - /tmp/after; echo \"same after $?\"
            echo \"content $(sha256sum </dev/vdb)\"";
        let disks = |vm: Vm| vm.disk(&image, json!({}));
        let vm = Vm::any().unwrap();
        let mut vm = scripted(vm, root, dir.path(), disks, script).boot();
        vm.wait_for("full");
        fs::remove_file(&ballast).unwrap();
        vm.type_in("\n");
        let end = vm.wait();
        end.assert_code(0);
        let wrote = end.said("wrote ");
        assert_eq!(
            wrote,
            ["before 0", "beyond 1", "after 0"],
            "{format:?}: {end}"
        );
        assert!(end.said("room").is_empty(), "{format:?}: {end}");
        assert_eq!(
            end.said("same "),
            ["before 0", "after 0"],
            "{format:?}: {end}"
        );
        assert!(end.stderr.contains("No space left"), "{format:?}: {end}");
        // Said once for each cause, not for each of the guest's requests.
        assert!(end.stderr.lines().count() < 20, "{format:?}: {end}");
        let copy = dir.path().join(image.file_name().unwrap());
        fs::copy(&image, &copy).unwrap();
        let content = format!("{}  -", sum(&as_raw(&copy, format)));
        assert_eq!(end.said("content "), [content], "{format:?}: {end}");
    }
}

#[test]
fn an_image_that_shrinks_under_the_guest_is_an_io_error() {
    let dir = TempDir::new().unwrap();
    let (Some(vm), Some(root)) = (Vm::any(), fio_root()) else {
        return;
    };
    let Some(images) = both(dir.path(), 16) else {
        return;
    };
    let script = "
        at() { dd if=/dev/$1 of=/tmp/read bs=64k skip=$2 count=1 iflag=direct 2>/dev/null; echo \"read $1 $2 $?\"; }
        for disk in vdb vdc; do yes full | dd of=/dev/$disk bs=64k oflag=direct 2>/dev/null; done
        for disk in vdb vdc; do at $disk 0; at $disk 240; done
        echo shrink; read -r _
        for disk in vdb vdc; do at $disk 0; at $disk 240; done
        for n in $(seq 40); do dd if=/dev/vdb bs=64k skip=240 count=1 iflag=direct; done 2>/dev/null
        echo restored; read -r _
        for disk in vdb vdc; do at $disk 0; at $disk 240; done";
    let disks = |vm| add_both(vm, &images);
    let mut vm = scripted(vm, root, dir.path(), disks, script).boot();
    vm.wait_for("shrink");
    let set_lengths = |lengths: [u64; 2]| {
        for (image, length) in images.iter().zip(lengths) {
            let file = File::options().write(true).open(image).unwrap();
            file.set_len(length).unwrap();
        }
    };
    let full = [&images[0], &images[1]].map(|i| fs::metadata(i).unwrap().len());
    set_lengths([4 * MIB, full[1] / 2]);
    vm.type_in("\n");
    vm.wait_for("restored");
    set_lengths(full);
    vm.type_in("\n");
    let end = vm.wait();
    end.assert_code(0);
    let lived = ["vdb 0 0", "vdb 240 0", "vdc 0 0", "vdc 240 0"];
    let shrunk = ["vdb 0 0", "vdb 240 1", "vdc 0 0", "vdc 240 1"];
    let right = [lived, shrunk, lived].concat();
    assert_eq!(end.said("read "), right, "{end}");
    assert!(end.stderr.contains("has become shorter"), "{end}");
    assert!(end.stderr.lines().count() < 30, "{end}");
}
