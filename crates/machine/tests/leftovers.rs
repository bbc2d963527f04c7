//! What is left of a machine: nothing. Counted in a process in which no other test runs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/whole_machine.rs uses the rest")]
mod scripted;

use std::fs;
use std::time::{Duration, Instant};

use alveole_hypervisor::fake::{FakePartition, Step};
use alveole_machine::{Event, Mailbox};
use scripted::{machine, run_on};
use tempfile::TempDir;

/// Threads and open files of this process.
fn held() -> (usize, usize) {
    let count = |dir| fs::read_dir(dir).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// That threads and open files are back at `before`. A thread that was waited for may still be seen for
/// a moment.
#[track_caller]
fn assert_back_at(before: (usize, usize), what: &str) {
    let until = Instant::now() + Duration::from_secs(5);
    while held() != before {
        assert!(
            Instant::now() < until,
            "after {what}: {:?}, before: {before:?}",
            held()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn no_thread_and_no_file_is_left() {
    let before = held();
    let refused = |cpu| FakePartition::new(Vec::new()).refusing_cpu(cpu);
    for cpu in [0, 1, 7] {
        let dir = TempDir::new().unwrap();
        let (mailbox, _events) = Mailbox::new();
        assert!(machine(&dir, 8, refused(cpu), &mailbox).is_err());
        assert_back_at(before, "a refused processor");
    }
    {
        let dir = TempDir::new().unwrap();
        let (mailbox, _events) = Mailbox::new();
        let partition = FakePartition::new(Vec::new());
        drop(machine(&dir, 8, partition, &mailbox).unwrap());
    }
    assert_back_at(before, "a machine that never ran");
    for step in [
        Step::TripleFault,
        Step::Fail,
        Step::PortWrite(0x600, vec![0x34]),
    ] {
        let mut scripts = vec![Vec::new(); 8];
        scripts[5] = vec![step.clone()];
        run_on(8, FakePartition::new(scripts), Vec::new());
        assert_back_at(before, &format!("{step:?}"));
    }
    run_on(64, FakePartition::new(Vec::new()), vec![Event::Signal(2)]);
    assert_back_at(before, "a signal");
}
