//! Once a store and its queues are open, the system calls of the disk's fragment are all that they need.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::path::Path;
use std::process::Command;

use alveole_block_store::tools::create_overlay;
use alveole_block_store::{
    Cache, Engine, Format, OpenOptions, Operation, io_uring_available, open,
};
use alveole_guest_memory::GuestBuffers;
use alveole_thread_sandbox::{Role, enter_with};
use support::{Rig, file, folder, one, one_of, pattern, skip};

const SIZE: usize = 1 << 20;

/// All that a device asks of its queues.
fn work(rig: &mut Rig) {
    for n in 0..300_u64 {
        let operation = match n % 8 {
            0 => Operation::WriteZeroes { may_unmap: true },
            1 => Operation::WriteZeroes { may_unmap: false },
            2 => Operation::Write { durable: true },
            3 | 4 => Operation::Read,
            _ => Operation::Write { durable: false },
        };
        let (sector, sectors) = (n * 37 % 2000, n % 17 + 1);
        let cut = if n % 3 == 0 { 700 } else { 0 };
        rig.submit(
            (n % 2) as usize,
            operation,
            sector * 512,
            sectors * 512,
            cut,
        );
        if n % 5 == 0 {
            rig.kick((n % 2) as usize);
        }
        if n % 50 == 0 {
            rig.submit(0, Operation::Flush, 0, 0, 0);
        }
    }
    assert!(rig.read_all() == rig.model);
    let none = GuestBuffers::new(&rig.ram);
    one_of(&mut *rig.queues[0], Operation::Discard, 0, 256 << 10, none).unwrap();
    let none = GuestBuffers::new(&rig.ram);
    one(&mut *rig.queues[1], Operation::Flush, 0, none).unwrap();
    rig.store.refresh().unwrap();
}

/// The process that is confined: by its name, since a refused call ends it.
#[test]
fn confined() {
    let Ok(kind) = std::env::var("ALVEOLE_TEST_CONFINED") else {
        return;
    };
    let words: Vec<_> = kind.split(' ').collect();
    let [role, engine, cache, format, path] = words[..] else {
        panic!("{kind}");
    };
    let options = OpenOptions {
        engine: if engine == "sync" {
            Engine::Sync
        } else {
            Engine::IoUring
        },
        cache: if cache == "direct" {
            Cache::Direct
        } else {
            Cache::Writeback
        },
        format: if format == "raw" {
            Format::Raw
        } else {
            Format::Qcow2
        },
        ..OpenOptions::default()
    };
    let store = open(Path::new(path), &options).unwrap();
    let mut rig = Rig::new(store, 2, 8, pattern(SIZE, 1));
    if role == "devices" {
        enter_with(Role::Devices, "test", &["virtio-block"]).unwrap();
        work(&mut rig);
    } else {
        // Control takes the queues back with something in flight, resizes, and closes.
        for n in 0..10 {
            rig.submit(0, Operation::Write { durable: false }, n * 4096, 4096, 0);
        }
        enter_with(Role::Control, "test", &["virtio-block"]).unwrap();
        rig.settle();
        rig.store.resize(2 * SIZE as u64).unwrap();
    }
    drop(rig);
    println!("\nall done");
}

#[test]
fn the_fragment_of_the_disk_is_enough() {
    let test = "the_fragment_of_the_disk_is_enough";
    let mut engines = vec!["sync"];
    match io_uring_available() {
        Ok(()) => engines.push("uring"),
        Err(reason) => skip(test, &reason),
    }
    for role in ["devices", "control"] {
        for engine in &engines {
            for cache in ["writeback", "direct"] {
                for format in ["raw", "qcow2"] {
                    let folder = folder();
                    let base = file(folder.path(), "base", SIZE);
                    let path = if format == "raw" {
                        base
                    } else {
                        let path = folder.path().join("overlay");
                        create_overlay(&path, &base, Format::Raw).unwrap();
                        path
                    };
                    let kind = format!("{role} {engine} {cache} {format} {}", path.display());
                    let output = Command::new(std::env::current_exe().unwrap())
                        .args(["--nocapture", "--exact", "confined"])
                        .env("ALVEOLE_TEST_CONFINED", &kind)
                        .output()
                        .unwrap();
                    let told = String::from_utf8_lossy(&output.stderr);
                    if told.contains("Direct {") {
                        skip(test, "no direct I/O here");
                        continue;
                    }
                    let said = String::from_utf8_lossy(&output.stdout);
                    assert!(said.contains("all done"), "{kind}: {said}{told}");
                }
            }
        }
    }
}
