//! A guest is paused and resumed again and again while fio verifies what it writes and iperf3 fills the network both ways:
//! nothing is lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::network::{MAC, UP, tap};
use super::traffic::{iperf3, report};
use crate::harness::images::{Raw, add_program, empty, ext4, root_files};
use crate::harness::{Vm, patience, skip};

/// How often, unless `ALVEOLE_TEST_PAUSES` says otherwise.
const ROUNDS: u32 = 100;
/// How often in a row the guest's iperf3 may not listen: longer than that it is dead.
const MOST_REFUSED: u32 = 100;
const FIO: &str = "/usr/bin/fio";

/// Serves iperf3, and has fio write and verify until a line is typed.
fn script(iperf3: &str) -> String {
    format!(
        "dmesg -n 1\n{UP}
        {iperf3} --server --daemon; until grep -q ':1451 ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
        verify() {{
            {FIO} --name=job --filename=/dev/vdb --ioengine=libaio --direct=1 --iodepth=16 --bs=4k --rw=randwrite \
                --size=4m --verify=crc32c --verify_fatal=1 --do_verify=1 --eta=never --output=/tmp/report
        }}
        {{
            runs=0
            while [ ! -e /tmp/stop ]; do verify || {{ cat /tmp/report; echo fio failed; break; }}; runs=$((runs + 1)); done
            echo \"verified $runs\"
        }} &
        echo serves
        read -r _
        touch /tmp/stop
        wait"
    )
}

/// Has iperf3 send, in turn to the guest and from it, until `stop`; what was received.
fn load(stop: &AtomicBool) -> f64 {
    let (mut received, mut refused) = (0.0, 0);
    for words in [&["--time", "2"][..], &["--time", "2", "--reverse"]]
        .into_iter()
        .cycle()
    {
        let said = report(words);
        // Between two runs the server listens to nobody for a moment, a long one where its processor stands still: who
        // comes then is refused or reset before anything is sent.
        let connected = said["start"]["connected"].as_array();
        if said["error"].is_string()
            && connected.is_none_or(Vec::is_empty)
            && refused < MOST_REFUSED
        {
            refused += 1;
            thread::sleep(Duration::from_millis(100));
            continue;
        }
        assert_eq!(said["error"], Value::Null, "{said}");
        refused = 0;
        let bytes = said["end"]["sum_received"]["bytes"].as_f64().unwrap();
        assert!(bytes > 0.0, "{said}");
        received += bytes;
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    received
}

#[track_caller]
fn paused_under_load(transport: &str) {
    let dir = TempDir::new().unwrap();
    if tap(1500).is_none() {
        return;
    }
    let (Some(vm), Some(iperf3), Some(disk)) = (Vm::any(), iperf3(), empty(dir.path(), Raw, 16))
    else {
        return;
    };
    if !Path::new(FIO).exists() {
        return skip("fio is not installed");
    }
    let root = root_files(dir.path(), &script(iperf3));
    add_program(&root, FIO);
    add_program(&root, iperf3);
    let image = dir.path().join("root.ext4");
    if !ext4(&image, &root, 160) {
        return;
    }
    let is_root = json!({"is_root_device": true, "is_read_only": true});
    let vm = vm.cpus(2).disk(&image, is_root).disk(&disk, json!({}));
    let vm = vm.tap("tap0", json!({"guest_mac": MAC})).by_api();
    let mut guest = match transport {
        "pci" => vm.option("--enable-pci").boot(),
        _ => vm.boot(),
    };
    guest.wait_for("serves");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let load = thread::spawn(move || load(&stopped));

    let rounds = std::env::var("ALVEOLE_TEST_PAUSES").map_or(ROUNDS, |n| n.parse().unwrap());
    let mut client = guest.client();
    let (begun, mut longest) = (Instant::now(), Duration::ZERO);
    for round in 0..rounds {
        let start = Instant::now();
        client.done("PATCH", "/vm", json!({"state": "Paused"}));
        longest = longest.max(start.elapsed());
        // Now and then for as long as timers of TCP take to notice.
        if round % 20 == 19 {
            thread::sleep(Duration::from_millis(300));
        }
        client.done("PATCH", "/vm", json!({"state": "Resumed"}));
        // It works most of the time, however slow this machine is.
        thread::sleep(
            (start.elapsed() * 2).clamp(Duration::from_millis(5), Duration::from_millis(200)),
        );
        assert!(
            begun.elapsed() < patience(60 + u64::from(rounds)),
            "round {round}"
        );
    }
    stop.store(true, Ordering::Relaxed);
    let received = load.join().unwrap();
    guest.type_in("\n");
    guest.wait_for("verified");
    let end = guest.wait();
    end.assert_code(0);
    let verified = end.said("verified ");
    println!(
        "{transport}: {rounds} pauses, the longest took {:.1} ms; {:.0} MB by iperf3; fio verified {verified:?} x 4 MiB",
        longest.as_secs_f64() * 1e3,
        received / 1e6
    );
    let runs: u32 = verified.first().and_then(|n| n.parse().ok()).unwrap_or(0);
    assert!(runs > 0, "{end}");
    assert!(end.said("fio failed").is_empty(), "{end}");
}

#[test]
fn a_hundred_pauses_under_load_lose_nothing_by_mmio() {
    paused_under_load("mmio");
}

#[test]
fn a_hundred_pauses_under_load_lose_nothing_by_pci() {
    paused_under_load("pci");
}
