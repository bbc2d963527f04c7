//! Block devices that are made of others, and media that are only read: partitions, volumes of the device mapper (which is
//! what LVM makes), ISO images.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use alveole_block_store::{
    BlockStore, Cache, Format, OpenError, OpenOptions, Operation, RamStore, open,
};
use alveole_guest_memory::GuestBuffers;
use support::{
    Loop, Rig, engines, file, folder, one, one_of, pattern, queue, ram, reader, skip, with,
};

const WRITE: Operation = Operation::Write { durable: false };
const SECTOR: u64 = 512;

/// Writes and reads all over `device` with every engine and cache; `size_bytes` is what it should hold.
fn used_as_a_disk(device: &Path, size_bytes: u64) {
    let mut content = pattern(size_bytes as usize, 5);
    fs::write(device, &content).unwrap();
    for engine in engines() {
        for cache in [Cache::Writeback, Cache::Direct] {
            let options = OpenOptions {
                cache,
                ..with(engine)
            };
            let store = open(device, &options).unwrap();
            assert_eq!(store.geometry().size_bytes, size_bytes);
            let mut rig = Rig::new(store, 2, 8, content);
            for n in 0..200_u64 {
                let at = n * 7919 % (size_bytes / SECTOR - 16) * SECTOR;
                let operation = match n % 7 {
                    0 => Operation::Read,
                    1 => Operation::WriteZeroes {
                        may_unmap: n % 2 == 0,
                    },
                    _ => WRITE,
                };
                rig.submit((n % 2) as usize, operation, at, (n % 16 + 1) * SECTOR, 0);
            }
            rig.settle();
            rig.submit(0, Operation::Flush, 0, 0, 0);
            assert!(rig.read_all() == rig.model, "{engine:?} {cache:?}");
            // Not one byte further.
            let mut buffers = GuestBuffers::new(&rig.ram);
            buffers.push(0, SECTOR).unwrap();
            one(&mut *rig.queues[0], WRITE, size_bytes, buffers).unwrap_err();
            content = rig.model;
        }
    }
}

#[test]
fn a_partition_is_a_disk_of_its_own() {
    let test = "a_partition_is_a_disk_of_its_own";
    let folder = folder();
    const FIRST: u64 = 2048;
    const SECTORS: u64 = 2048;
    let path = file(folder.path(), "disk", 3 << 20);
    let mut disk = fs::read(&path).unwrap();
    // One entry of a partition table: type Linux, first sector, number of sectors; then the mark of such a table.
    disk[446..510].fill(0);
    disk[446 + 4] = 0x83;
    disk[454..458].copy_from_slice(&(FIRST as u32).to_le_bytes());
    disk[458..462].copy_from_slice(&(SECTORS as u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&path, &disk).unwrap();
    let device = match Loop::new(&path, &["-P"]) {
        Ok(device) => device,
        Err(reason) => {
            skip(test, &reason);
            return;
        }
    };
    let partition = PathBuf::from(format!("{}p1", device.0.display()));
    if !appears(&partition) {
        skip(test, "no node for the partition of a loop device");
        return;
    }
    used_as_a_disk(&partition, SECTORS * SECTOR);
    let geometry = open(&partition, &reader()).unwrap().geometry();
    assert!(geometry.rotational.is_some(), "sysfs says it of the disk");
    // What lies around it is as it was.
    drop(device);
    let after = fs::read(&path).unwrap();
    let (start, end) = (
        (FIRST * SECTOR) as usize,
        ((FIRST + SECTORS) * SECTOR) as usize,
    );
    assert!(after[..start] == disk[..start] && after[end..] == disk[end..]);
    assert!(after[start..end] != disk[start..end]);
}

/// Device nodes come a moment after their devices.
fn appears(node: &Path) -> bool {
    (0..100).any(|_| {
        let there = fs::metadata(node).is_ok();
        if !there {
            thread::sleep(Duration::from_millis(20));
        }
        there
    })
}

/// A device of the device mapper, taken away at the end: its name, its node.
struct Mapped(String, PathBuf);

impl Mapped {
    /// `table`: lines of first sector, number of sectors, target and its arguments.
    fn new(name: &str, table: &str) -> Result<Self, String> {
        let _ = Command::new("modprobe").arg("dm-mod").output();
        let name = format!("alveole-{name}-{}", std::process::id());
        dmsetup(&["create", &name], table)?;
        let minor = dmsetup(&["info", "-c", "--noheadings", "-o", "minor", &name], "")?;
        // The kernel's own node: names are made by udev, where there is one.
        let mapped = Self(name, format!("/dev/dm-{}", minor.trim()).into());
        if !appears(&mapped.1) {
            return Err("no node for a device of the device mapper".into());
        }
        Ok(mapped)
    }

    fn node(&self) -> &Path {
        &self.1
    }

    /// Puts another table under the open device, as `lvextend` does.
    fn change(&self, table: &str) {
        dmsetup(&["suspend", &self.0], "").unwrap();
        dmsetup(&["load", &self.0], table).unwrap();
        dmsetup(&["resume", &self.0], "").unwrap();
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // Rings of the kernel close their files at their ease.
        let _ = dmsetup(&["remove", "--retry", &self.0], "");
    }
}

fn dmsetup(words: &[&str], input: &str) -> Result<String, String> {
    // No udev in a lab or a container to wait for.
    let child = Command::new("dmsetup")
        .args(["--noudevsync", "--noudevrules"])
        .args(words)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|e| format!("no dmsetup (package dmsetup): {e}"))?;
    // It may end without having read.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout).unwrap());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = said.lines().next().unwrap_or_default().to_owned();
    Err(format!("no device mapper: {said}"))
}

#[test]
fn a_volume_is_a_disk_that_grows_and_fails_and_heals() {
    let test = "a_volume_is_a_disk_that_grows_and_fails_and_heals";
    let folder = folder();
    let loops = ["a", "b"].map(|name| Loop::new(&file(folder.path(), name, 1 << 20), &[]));
    let [first, second] = match loops {
        [Ok(first), Ok(second)] => [first, second],
        [Err(reason), _] | [_, Err(reason)] => {
            skip(test, &reason);
            return;
        }
    };
    let (a, b) = (first.0.display(), second.0.display());
    // As a logical volume that spans two disks, and begins within one.
    let spans = format!("0 1024 linear {a} 1024\n1024 1024 linear {b} 0\n");
    let volume = match Mapped::new("volume", &spans) {
        Ok(volume) => volume,
        Err(reason) => {
            skip(test, &reason);
            return;
        }
    };
    used_as_a_disk(volume.node(), 2048 * SECTOR);

    let store = open(volume.node(), &OpenOptions::default()).unwrap();
    let told = open(volume.node(), &OpenOptions::default());
    let told = told.err().unwrap().to_string();
    assert!(
        told.contains(&format!("process {}", std::process::id())),
        "{told}"
    );
    store.resize(4096).unwrap_err();
    let ram = ram();
    let mut queue = queue(&store);
    let at = |at: u64, operation, queue: &mut dyn alveole_block_store::StoreQueue| {
        let mut buffers = GuestBuffers::new(&ram);
        buffers.push(0, 4096).unwrap();
        one(queue, operation, at, buffers).map(|_| ())
    };
    // Grown under the guest: nobody sees it before somebody looks.
    at(2048 * SECTOR, WRITE, &mut *queue).unwrap_err();
    volume.change(&format!("{spans}2048 1024 linear {b} 1024\n"));
    at(2048 * SECTOR, WRITE, &mut *queue).unwrap_err();
    assert_eq!(store.refresh().unwrap().size_bytes, 3072 * SECTOR);
    at(2048 * SECTOR, WRITE, &mut *queue).unwrap();
    one_of(&mut *queue, Operation::Flush, 0, 0, GuestBuffers::new(&ram)).unwrap();

    // Part of it fails, where the page cache holds nothing yet: an error there, and nowhere else; then it is back.
    volume.change(&format!("0 1024 linear {a} 1024\n1024 2048 error\n"));
    let e = at(1536 * SECTOR, Operation::Read, &mut *queue).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(5), "EIO, and not {e}");
    at(0, WRITE, &mut *queue).unwrap();
    volume.change(&format!("{spans}2048 1024 linear {b} 1024\n"));
    at(1536 * SECTOR, Operation::Read, &mut *queue).unwrap();
    drop((queue, store));
}

#[test]
fn a_device_is_not_copied_and_a_store_without_a_file_neither() {
    let test = "a_device_is_not_copied_and_a_store_without_a_file_neither";
    let folder = folder();
    let path = file(folder.path(), "image", 1 << 20);
    let into = fs::File::create(folder.path().join("copy")).unwrap();
    let told = RamStore::new(4096).copy_image(&into).unwrap_err();
    assert!(told.to_string().contains("no file of the host"), "{told}");
    let device = match Loop::new(&path, &[]) {
        Ok(device) => device,
        Err(reason) => {
            skip(test, &reason);
            return;
        }
    };
    let store = open(&device.0, &OpenOptions::default()).unwrap();
    for outcome in [store.may_copy_image(), store.copy_image(&into)] {
        let told = outcome.unwrap_err().to_string();
        assert!(
            told.contains("is a block device: pause the guest"),
            "{told}"
        );
    }
    assert_eq!(into.metadata().unwrap().len(), 0);
}

#[test]
fn a_volume_of_lvm_is_a_disk() {
    let test = "a_volume_of_lvm_is_a_disk";
    let folder = folder();
    let path = folder.path().join("pv");
    fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let device = match Loop::new(&path, &[]) {
        Ok(device) => device,
        Err(reason) => {
            skip(test, &reason);
            return;
        }
    };
    let _ = Command::new("modprobe").arg("dm-mod").output();
    let name = format!("alveole{}", std::process::id());
    // Only this disk, whatever else the host has; and no udev to wait for.
    let config = format!(
        "devices {{ filter=[\"a|^{}$|\",\"r|.*|\"] use_devicesfile=0 obtain_device_list_from_udev=0 }} \
         activation {{ udev_sync=0 udev_rules=0 }}",
        device.0.display()
    );
    let lvm = |words: &[&str]| -> Result<(), String> {
        let output = Command::new("lvm")
            .args([words[0], "--config", &config])
            .args(&words[1..])
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .output()
            .map_err(|e| format!("no lvm (package lvm2): {e}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or_default();
        output
            .status
            .success()
            .then_some(())
            .ok_or_else(|| format!("no LVM here: {said}"))
    };
    let made = lvm(&["pvcreate", "-q", device.0.to_str().unwrap()])
        .and_then(|()| lvm(&["vgcreate", "-q", &name, device.0.to_str().unwrap()]))
        .and_then(|()| {
            lvm(&[
                "lvcreate", "-q", "-y", "-Zn", "-Wn", "-L4m", "-n", "root", &name,
            ])
        });
    if let Err(reason) = made {
        skip(test, &reason);
        return;
    }
    let volume = PathBuf::from(format!("/dev/mapper/{name}-root"));
    let used = std::panic::catch_unwind(|| {
        assert!(appears(&volume), "no node for the volume");
        used_as_a_disk(&volume, 4 << 20);
        // Grown while a guest has it.
        let store = open(&volume, &OpenOptions::default()).unwrap();
        lvm(&["lvextend", "-q", "-L8m", &format!("{name}/root")]).unwrap();
        assert_eq!(store.refresh().unwrap().size_bytes, 8 << 20);
    });
    let mut gone = Err(String::new());
    for _ in 0..50 {
        gone = lvm(&["vgremove", "-q", "-y", &name]);
        if gone.is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    used.unwrap();
    gone.unwrap();
}

#[test]
fn a_loop_device_that_grows_is_seen() {
    let test = "a_loop_device_that_grows_is_seen";
    let folder = folder();
    let path = file(folder.path(), "disk", 1 << 20);
    let device = match Loop::new(&path, &[]) {
        Ok(device) => device,
        Err(reason) => {
            skip(test, &reason);
            return;
        }
    };
    let store = open(&device.0, &OpenOptions::default()).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(2 << 20).unwrap();
    let told = Command::new("losetup").arg("-c").arg(&device.0).status();
    assert!(told.unwrap().success());
    assert_eq!(store.geometry().size_bytes, 1 << 20);
    assert_eq!(store.refresh().unwrap().size_bytes, 2 << 20);
}

#[test]
fn an_iso_image_is_read() {
    let test = "an_iso_image_is_read";
    let folder = folder();
    let content = folder.path().join("content");
    fs::create_dir(&content).unwrap();
    let told = pattern(300_000, 7);
    fs::write(content.join("told"), &told).unwrap();
    let iso = folder.path().join("medium.iso");
    let made = Command::new("genisoimage")
        .args(["-quiet", "-R", "-V", "ALVEOLE", "-o"])
        .args([&iso, &content])
        .output();
    match made {
        Err(e) => {
            skip(test, &format!("no genisoimage (package genisoimage): {e}"));
            return;
        }
        Ok(output) => assert!(output.status.success(), "{output:?}"),
    }
    let all = fs::read(&iso).unwrap();
    // The primary volume descriptor, in block 16 of 2048 bytes (ECMA-119, 8.4).
    assert_eq!(&all[16 * 2048 + 1..16 * 2048 + 6], b"CD001");
    assert_eq!(Format::by_name(&iso), Format::Raw);
    fs::set_permissions(&iso, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    for engine in engines() {
        for cache in [Cache::Writeback, Cache::Direct] {
            let options = OpenOptions {
                cache,
                read_only: true,
                ..with(engine)
            };
            let store = match open(&iso, &options) {
                Err(e @ OpenError::Direct { .. }) => {
                    skip(test, &e.to_string());
                    continue;
                }
                other => other.unwrap(),
            };
            let geometry = store.geometry();
            assert!(geometry.read_only && !geometry.discard && !geometry.write_zeroes);
            assert_eq!(geometry.size_bytes, all.len() as u64);
            // Two guests at once.
            let other = open(&iso, &options).unwrap();
            let mut rig = Rig::new(store, 1, 8, all.clone());
            assert!(rig.read_all() == all);
            let at = all.windows(512).position(|w| w == &told[..512]).unwrap();
            assert!(at.is_multiple_of(2048));
            let mut buffers = GuestBuffers::new(&rig.ram);
            buffers.push(0, 512).unwrap();
            for operation in [
                WRITE,
                Operation::Discard,
                Operation::WriteZeroes { may_unmap: true },
            ] {
                let part = buffers.part(0, 512);
                let e = one_of(&mut *rig.queues[0], operation, 0, 512, part).unwrap_err();
                assert_eq!(e.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            }
            drop(other);
        }
    }
    assert!(fs::read(&iso).unwrap() == all);
}
