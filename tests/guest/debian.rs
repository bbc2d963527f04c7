//! A real Debian as the root file system, from every kind of disk that people put one on.

use std::fs;
use std::path::Path;

use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{DebianRoot, Qcow2, as_raw, output, path, sum};
use crate::harness::{End, Vm, skip};

/// Debian's own first process reports, and powers off in its own order;
const SYSTEMD: &str = "debian_report";
/// the report alone, which is quicker.
const REPORT: &str = "init=/usr/local/sbin/debian-report";

/// Boots a Debian from `image` and checks what it says of itself.
#[track_caller]
fn boot(debian: &DebianRoot, image: &Path, transport: &str, how: &str, root: &str) -> End {
    let read_only = root.ends_with("ro");
    let mut vm = Vm::any().unwrap().cpus(2).cmdline(how);
    if transport == "pci" {
        vm = vm.option("--enable-pci");
    }
    let drive = json!({"is_root_device": true, "is_read_only": read_only});
    let end = vm.disk(image, drive).boot().wait();
    end.assert_code(0);
    let init = if how == SYSTEMD {
        "systemd"
    } else {
        "debian-report"
    };
    assert_eq!(end.said("debian: init "), [init], "{end}");
    let release = debian.fact("os-release");
    let release: Vec<_> = release.lines().collect();
    assert!(release.contains(&"ID=debian"), "{release:?}");
    assert_eq!(end.said("debian: os-release "), release, "{end}");
    let packages = debian.fact("packages");
    assert_eq!(end.said("debian: packages "), [packages.trim()], "{end}");
    assert_eq!(end.said("debian: root "), [root], "{end}");
    assert_eq!(end.said("debian: verify dpkg "), ["0"], "{end}");
    end
}

/// What a guest says that it wrote, and the one after it that it found.
#[track_caller]
fn mark<'a>(end: &'a End, label: &str) -> &'a str {
    let said = end.said(&format!("debian: {label} "));
    assert_eq!(said.len(), 1, "{label}: {end}");
    said[0]
}

#[test]
fn a_debian_root_boots_from_a_raw_disk() {
    let (Some(_), Some(debian)) = (Vm::any(), DebianRoot::find()) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let image = debian.copy(dir.path());
    let end = boot(&debian, &image, "pci", REPORT, "ext4 rw");
    assert_eq!(mark(&end, "mark"), "fresh");
    output("e2fsck", &["-fn", path(&image)]);
}

#[test]
fn a_debian_root_boots_from_squashfs_and_from_erofs() {
    let (Some(_), Some(debian)) = (Vm::any(), DebianRoot::find()) else {
        return;
    };
    for (file_system, transport) in [("squashfs", "mmio"), ("erofs", "pci")] {
        let image = debian.image(file_system);
        let before = sum(&image);
        let root = format!("{file_system} ro");
        boot(&debian, &image, transport, REPORT, &root);
        assert_eq!(sum(&image), before, "{file_system} was written");
    }
}

#[test]
fn a_debian_root_boots_from_an_overlay_and_its_base_stays_as_it_was() {
    let (Some(_), Some(debian)) = (Vm::any(), DebianRoot::find()) else {
        return;
    };
    let alveole = Path::new(env!("CARGO_BIN_EXE_alveole-vmm")).with_file_name("alveole");
    if !alveole.exists() {
        skip("alveole is not built (cargo build -p alveole-cli)");
        return;
    }
    let dir = TempDir::new().unwrap();
    let base = debian.copy(dir.path());
    let before = sum(&base);
    let overlay = dir.path().join("guest.qcow2");
    let args = ["disk", "overlay", path(&base), path(&overlay)];
    output(path(&alveole), &args);
    let first = boot(&debian, &overlay, "mmio", SYSTEMD, "ext4 rw");
    assert_eq!(mark(&first, "mark"), "fresh");
    let again = boot(&debian, &overlay, "pci", REPORT, "ext4 rw");
    assert_eq!(mark(&again, "mark"), mark(&first, "wrote"), "{again}");
    assert_eq!(sum(&base), before, "the base was written");
    output("e2fsck", &["-fn", path(&as_raw(&overlay, Qcow2))]);
}

/// What a client means by the three keys: services are stopped, the root is put away, the machine restarts.
#[test]
fn ctrl_alt_del_has_systemd_restart_in_good_order() {
    // Others have no virtual terminals, whose part of the kernel takes the keys.
    let (Some(vm), Some(debian)) = (Vm::stock_elf(), DebianRoot::find()) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    let image = debian.copy(dir.path());
    let script = dir.path().join("script");
    let mut text = b"#!/bin/sh\necho debian: waits; trap 'echo debian: stopped; exit 0' TERM; while :; do sleep 0.2; done\nexit 0\n".to_vec();
    text.resize(4096, b'\n');
    fs::write(&script, text).unwrap();
    let vm = vm.cpus(2).cmdline(SYSTEMD).option("--enable-pci");
    let vm = vm.disk(&image, json!({"is_root_device": true}));
    let mut guest = vm
        .disk(&script, json!({"is_read_only": true}))
        .by_api()
        .boot();
    guest.wait_for("debian: waits");
    let keys = json!({"action_type": "SendCtrlAltDel"});
    guest.client().done("PUT", "/actions", keys);
    let end = guest.wait();
    end.assert_code(0)
        .assert_line("the guest asked for a reset (vCPU ");
    assert!(end.console.contains("debian: stopped"), "{end}");
    // Nothing to recover: it was unmounted, not cut off.
    let state = output("dumpe2fs", &["-h", path(&image)]);
    assert!(!state.contains("needs_recovery"), "{state}");
}
