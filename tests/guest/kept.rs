//! Disks keep what they were given: across resets of the device, reboots, and the death of the monitor.
//!
//! fio writes and verifies by two processes on two processors, each with a queue of its own.

use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::harness::images::{Format, Qcow2, Raw, as_raw, bytes, empty, fio_root, scripted, sum};
use crate::harness::{Running, Vm};

/// How the guest reaches its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Mmio,
    Pci,
}

use Transport::{Mmio, Pci};

/// Boots a guest with `image` as `/dev/vdb`.
#[track_caller]
fn boot(transport: Transport, root: &Path, dir: &Path, image: &Path, script: &str) -> Running {
    let mut vm = Vm::any().unwrap().cpus(2);
    if transport == Pci {
        vm = vm.option("--enable-pci");
    }
    let script = format!("{WORDS}{script}");
    scripted(vm, root, dir, |vm| vm.disk(image, json!({})), &script).boot()
}

/// What scripts are made of. Two times 1 MiB from an offset in MiB are written and flushed, or verified.
const WORDS: &str = "
    job() {
        /usr/bin/fio --name=job --filename=/dev/vdb --ioengine=libaio --direct=1 --iodepth=16 --bs=4k \
            --rw=randwrite --numjobs=2 --size=1m --offset_increment=1m --cpus_allowed=0-1 \
            --cpus_allowed_policy=split --randseed=7 --eta=never --output=/tmp/report \"$@\"
    }
    checked() { at=$1; shift; job --verify=crc32c --verify_fatal=1 --offset=${at}m \"$@\" 2>/tmp/errors; }
    write() { checked $1 --do_verify=0 --end_fsync=1; echo \"write $1 $?\"; }
    verify() {
        checked $1 --verify_only; said=$?
        [ $said = 0 ] || sed 's/^/why: /' /tmp/errors
        echo \"verify $1 $said\"
    }
    completed() { read -r _ _ _ _ count _ </sys/block/vdb/stat; echo $count; }
    driver=/sys/bus/virtio/drivers/virtio_blk
    device=$(basename $(readlink -f /sys/block/vdb/device))
    unbind() { echo $device >$driver/unbind; [ ! -e /sys/block/vdb ]; echo \"unbind $?\"; }
    bind() { echo $device >$driver/bind; [ -b /dev/vdb ]; echo \"bind $?\"; }
    content() { echo \"content $(sha256sum </dev/vdb)\"; }
";

/// Whether there is what these tests need.
#[track_caller]
fn needs(dir: &Path, format: Format) -> Option<(&'static Path, std::path::PathBuf)> {
    Vm::any()?;
    Some((fio_root()?, empty(dir, format, 32)?))
}

#[track_caller]
fn resets_and_a_reboot(format: Format, transport: Transport) {
    let dir = TempDir::new().unwrap();
    let Some((root, image)) = needs(dir.path(), format) else {
        return;
    };
    let script = "
        write 0; unbind; bind; verify 0
        job --offset=8m --time_based --runtime=600 2>/tmp/errors &
        before=$(completed)
        until [ $(completed) -gt $((before + 100)) ]; do sleep 0.05; done
        unbind; wait $!; echo \"cut off $(test $? -ne 0; echo $?)\"
        bind; verify 0
        write 8
        echo \"queues $(ls /sys/block/vdb/mq | wc -l)\"
        stty -F /dev/console opost; reboot -f";
    let end = boot(transport, root, dir.path(), &image, script).wait();
    end.assert_code(0)
        .assert_line("the guest asked for a reset (vCPU ");
    let went: Vec<_> = end
        .console
        .lines()
        .filter(|l| !l.starts_with("alveole-guest: ") && !l.starts_with('['))
        .collect();
    let right = [
        "write 0 0",
        "unbind 0",
        "bind 0",
        "verify 0 0",
        "unbind 0",
        "cut off 0",
        "bind 0",
        "verify 0 0",
        "write 8 0",
        "queues 2",
    ];
    assert_eq!(went, right, "{end}");

    // What fio calls right, and that it would have found what is wrong.
    let script = "verify 0; verify 8
        dd if=/dev/zero of=/dev/vdb bs=4k seek=300 count=1 oflag=direct conv=fsync 2>/dev/null; verify 0";
    let end = boot(transport, root, dir.path(), &image, script).wait();
    end.assert_code(0);
    let verified = end.said("verify ");
    assert_eq!(verified[..2], ["0 0", "8 0"], "{end}");
    assert_ne!(verified[2], "0 0", "{end}");
    let raw = as_raw(&image, format);
    assert!(bytes(&raw)[300 << 12..301 << 12].iter().all(|b| *b == 0));
}

#[test]
fn fio_verifies_a_raw_disk_across_resets_by_mmio() {
    resets_and_a_reboot(Raw, Mmio);
}

#[test]
fn fio_verifies_a_raw_disk_across_resets_by_pci() {
    resets_and_a_reboot(Raw, Pci);
}

#[test]
fn fio_verifies_a_qcow2_across_resets_by_mmio() {
    resets_and_a_reboot(Qcow2, Mmio);
}

#[test]
fn fio_verifies_a_qcow2_across_resets_by_pci() {
    resets_and_a_reboot(Qcow2, Pci);
}

/// Where the two who say what they have flushed begin, in blocks of 4 KiB.
const FLUSHED_AT: [(&str, usize); 2] = [("one", 4096), ("two", 5120)];

#[track_caller]
fn a_killed_monitor(format: Format, transport: Transport) {
    let dir = TempDir::new().unwrap();
    let Some((root, image)) = needs(dir.path(), format) else {
        return;
    };
    // A region that was flushed; others that are being written: without a word, and block by block, each of
    // which is told when its flush is over.
    let [one, two] = FLUSHED_AT.map(|(name, at)| format!("flushing {name} {at} &"));
    let script = format!(
        "write 0
        flushing() {{
            for n in $(seq 1000); do
                yes $1 $n | head -c 4096 | dd of=/dev/vdb bs=4k seek=$(($2 + n)) conv=fsync 2>/dev/null && echo \"flushed $1 $n\"
            done
        }}
        job --offset=8m --time_based --runtime=600 --fsync=16 2>/tmp/errors &
        {one}
        {two}
        sleep 3600"
    );
    let mut first = boot(transport, root, dir.path(), &image, &script);
    for (name, _) in FLUSHED_AT {
        first.wait_for_anywhere(&format!("flushed {name} 10\n"));
    }
    first.signal(Signal::SIGKILL);
    let killed = first.wait();
    assert_eq!(killed.said("write "), ["0 0"], "{killed}");

    let end = boot(transport, root, dir.path(), &image, "verify 0; content").wait();
    end.assert_code(0);
    assert_eq!(end.said("verify "), ["0 0"], "{end}");
    let raw = as_raw(&image, format);
    let content = format!("{}  -", sum(&raw));
    assert_eq!(
        end.said("content "),
        [content.as_str()],
        "what QEMU reads: {end}"
    );
    let disk = bytes(&raw);
    for (name, at) in FLUSHED_AT {
        // The last line may have been cut.
        let mut said = killed.console.rsplit_once('\n').unwrap().0.lines();
        let label = format!("flushed {name} ");
        let flushed = said.by_ref().filter_map(|l| l.strip_prefix(&label));
        for n in flushed.map(|n| n.parse::<usize>().unwrap()) {
            let block = &disk[(at + n) << 12..][..4096];
            let line = format!("{name} {n}\n").into_bytes();
            assert!(
                block.chunks(line.len()).all(|c| line.starts_with(c)),
                "block {n} of {name}, whose flush was over, is gone: {killed}"
            );
        }
    }
}

#[test]
fn a_raw_disk_by_mmio_keeps_what_was_flushed_when_the_monitor_is_killed() {
    a_killed_monitor(Raw, Mmio);
}

#[test]
fn a_raw_disk_by_pci_keeps_what_was_flushed_when_the_monitor_is_killed() {
    a_killed_monitor(Raw, Pci);
}

#[test]
fn a_qcow2_by_mmio_keeps_what_was_flushed_when_the_monitor_is_killed() {
    a_killed_monitor(Qcow2, Mmio);
}

#[test]
fn a_qcow2_by_pci_keeps_what_was_flushed_when_the_monitor_is_killed() {
    a_killed_monitor(Qcow2, Pci);
}

#[test]
fn both_engines_keep_what_was_flushed_when_the_monitor_is_killed() {
    let dir = TempDir::new().unwrap();
    let Some(image) = Vm::any().and_then(|_| empty(dir.path(), Raw, 8)) else {
        return;
    };
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
