//! A vCPU thread from start to stop on the scripted hypervisor, inside its real sandbox.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use alveole_counters::CounterSet;
use alveole_hypervisor::fake::{FakePartition, Step};
use alveole_hypervisor::{CpuState, Partition, StuckReason, VirtualCpu};
use alveole_io_bus::{BusBuilder, BusDevice, MachineRequest, Outcome};
use alveole_vcpu::{AccessKind, Buses, EndReason, Order, Report, ReportKind, Vcpu, VcpuHandle};

/// Reads give the offset plus one; a write of 0xee asks for a reset, 0xbb says booted.
struct Board(Arc<Mutex<Vec<u8>>>);

impl BusDevice for Board {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Outcome {
        into.fill(offset as u8 + 1);
        Outcome::Done
    }
    fn write(&mut self, _: u64, from: &[u8]) -> Outcome {
        self.0.lock().unwrap().extend_from_slice(from);
        match from[0] {
            0xee => Outcome::Asks(MachineRequest::Reset),
            0xbb => Outcome::Asks(MachineRequest::Booted),
            _ => Outcome::Done,
        }
    }
}

struct Rig {
    partition: FakePartition,
    vcpu: VcpuHandle,
    reports: Receiver<Report>,
    written: Arc<Mutex<Vec<u8>>>,
}

fn rig(script: Vec<Step>) -> Rig {
    rig_of(0, script)
}

fn rig_of(index: u32, script: Vec<Step>) -> Rig {
    let partition = FakePartition::new(vec![script]);
    let cpu = partition.create_cpu(0).unwrap();
    rig_with(index, partition, cpu)
}

fn rig_with(index: u32, partition: FakePartition, cpu: Box<dyn VirtualCpu>) -> Rig {
    let written = Arc::new(Mutex::new(Vec::new()));
    let mut ports = BusBuilder::new();
    ports
        .place(
            "board",
            0x10,
            4,
            Arc::new(Mutex::new(Board(written.clone()))),
        )
        .unwrap();
    let mut memory = BusBuilder::new();
    memory
        .place(
            "board",
            0xc000_0000,
            8,
            Arc::new(Mutex::new(Board(written.clone()))),
        )
        .unwrap();
    let (sender, reports) = channel();
    let vcpu = Vcpu {
        index,
        cpu,
        buses: Buses {
            ports: ports.freeze(),
            memory: memory.freeze(),
        },
        sandbox: Vec::new(),
        report: Box::new(move |r| sender.send(r).unwrap()),
    };
    Rig {
        partition,
        vcpu: vcpu.start().unwrap(),
        reports,
        written,
    }
}

impl Rig {
    fn next(&self) -> ReportKind {
        self.reports
            .recv_timeout(Duration::from_secs(10))
            .expect("no report in 10 s")
            .kind
    }

    fn saved(&self) -> Result<CpuState, String> {
        match self.next() {
            ReportKind::Saved(saved) => *saved,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn nothing_runs_before_the_order() {
    let mut rig = rig(vec![Step::PortWrite(0x10, vec![0xee])]);
    assert!(rig.reports.recv_timeout(Duration::from_millis(50)).is_err());
    assert!(rig.vcpu.first_run().is_none());
    rig.vcpu.order(Order::Run);
    assert!(matches!(rig.next(), ReportKind::Asked(MachineRequest::Reset, p) if p.known));
    assert!(rig.vcpu.first_run().is_some());
    rig.vcpu.stop();
}

#[test]
fn accesses_are_answered_element_by_element_and_counted() {
    let mut rig = rig(vec![
        Step::PortRead(0x11, 2),
        Step::PortRead(0x999, 4),
        Step::MmioRead(0xc000_0003, 1),
        Step::PortWriteString(0x10, vec![1, 2, 3]),
        Step::MmioWrite(0xdead_0000, vec![9]),
        Step::PortWrite(0x10, vec![0xee]),
    ]);
    rig.vcpu.order(Order::Run);
    assert!(matches!(
        rig.next(),
        ReportKind::Asked(MachineRequest::Reset, _)
    ));
    rig.vcpu.stop();
    assert_eq!(rig.partition.reads(), [vec![2, 2], vec![0xff; 4], vec![4]]);
    assert_eq!(*rig.written.lock().unwrap(), [1, 2, 3, 0xee]);
    let counts = rig.vcpu.counts().accesses();
    let of = |kind, addr| {
        counts
            .iter()
            .find(|a| (a.kind, a.addr) == (kind, addr))
            .unwrap()
            .count
    };
    assert_eq!(of(AccessKind::PortWrite, 0x10), 2);
    assert_eq!(of(AccessKind::PortRead, 0x999), 1);
    assert_eq!(of(AccessKind::MmioWrite, 0xdead_0000), 1);
}

#[test]
fn booted_lets_the_guest_go_on() {
    let mut rig = rig(vec![
        Step::MmioWrite(0xc000_0000, vec![0xbb]),
        Step::PortWrite(0x10, vec![0xee]),
    ]);
    rig.vcpu.order(Order::Run);
    assert!(matches!(
        rig.next(),
        ReportKind::Asked(MachineRequest::Booted, _)
    ));
    assert!(matches!(
        rig.next(),
        ReportKind::Asked(MachineRequest::Reset, _)
    ));
    rig.vcpu.stop();
}

#[test]
fn ends_are_told_apart_and_wait_for_the_stop() {
    let stuck = StuckReason::Emulation {
        instruction: vec![0x0f, 0x0b],
    };
    for (step, want) in [
        (Step::TripleFault, EndReason::TripleFault),
        (Step::Stuck(stuck.clone()), EndReason::Stuck(stuck)),
    ] {
        let mut rig = rig(vec![step]);
        rig.vcpu.order(Order::Run);
        match rig.next() {
            ReportKind::Ended(reason, position) => assert!(reason == want && position.known),
            other => panic!("{other:?}"),
        }
        rig.vcpu.stop();
    }
    let rig = rig(vec![Step::Fail]);
    rig.vcpu.order(Order::Run);
    assert!(matches!(
        rig.next(),
        ReportKind::Ended(EndReason::HostError(_), _)
    ));
}

#[test]
fn an_order_to_run_interrupts_nobody() {
    let mut rig = rig(vec![Step::PortWrite(0x10, vec![0xbb])]);
    rig.vcpu.order(Order::Run);
    let booted = rig.next();
    assert!(matches!(
        booted,
        ReportKind::Asked(MachineRequest::Booted, _)
    ));
    rig.vcpu.order(Order::Pause);
    assert!(matches!(rig.next(), ReportKind::Paused));
    rig.vcpu.stop();
    let mut interrupted = None;
    rig.vcpu.counts().visit(&mut |name, count| {
        if name == "exits_interrupted" {
            interrupted = Some(count);
        }
    });
    assert_eq!(interrupted, Some(1), "by the order to pause");
}

#[test]
fn pause_and_resume_a_computing_guest_a_thousand_times() {
    let mut rig = rig(vec![]);
    for _ in 0..1000 {
        rig.vcpu.order(Order::Run);
        rig.vcpu.order(Order::Pause);
        assert!(matches!(rig.next(), ReportKind::Paused));
    }
    rig.vcpu.stop();
    rig.vcpu.stop();
    assert!(
        rig.reports.try_recv().is_err(),
        "a stopped processor is silent"
    );
}

#[test]
fn a_paused_processor_tells_its_state_and_another_goes_on_from_there() {
    let mut first = rig(vec![
        Step::PortWrite(0x10, vec![1]),
        Step::PortRead(0x11, 1),
        Step::PortWrite(0x10, vec![0xbb]),
    ]);
    // Before it has run, too: it waits for orders from the start.
    first.vcpu.order(Order::Save);
    assert_eq!(first.saved().unwrap().registers.rax, 0);
    first.vcpu.order(Order::Run);
    let booted = first.next();
    assert!(matches!(
        booted,
        ReportKind::Asked(MachineRequest::Booted, _)
    ));
    first.vcpu.order(Order::Pause);
    assert!(matches!(first.next(), ReportKind::Paused));
    first.vcpu.order(Order::Save);
    let state = first.saved().unwrap();
    assert_eq!(state.registers.rax, 3, "steps that were played");
    assert_eq!(
        first.partition.reads(),
        [[2]],
        "the read was completed before"
    );
    // Twice is once, and it goes on as if nothing had been.
    first.vcpu.order(Order::Save);
    assert_eq!(first.saved().unwrap(), state);
    first.vcpu.order(Order::Run);
    first.vcpu.stop();

    let partition = FakePartition::new(vec![vec![Step::PortWrite(0x10, vec![0xee])]]);
    let mut cpu = partition.create_cpu(0).unwrap();
    cpu.restore(&state).unwrap();
    let mut second = rig_with(0, partition, cpu);
    second.vcpu.order(Order::Run);
    assert!(matches!(
        second.next(),
        ReportKind::Asked(MachineRequest::Reset, _)
    ));
    second.vcpu.stop();
    assert_eq!(second.partition.restored_cpu(0).unwrap(), state);
}

#[test]
fn a_processor_that_runs_or_has_ended_is_not_saved() {
    let mut running = rig(vec![]);
    running.vcpu.order(Order::Run);
    running.vcpu.order(Order::Save);
    assert_eq!(running.saved().unwrap_err(), "it runs; pause it first");
    // It runs on: an order to pause finds it so.
    running.vcpu.order(Order::Pause);
    assert!(matches!(running.next(), ReportKind::Paused));
    running.vcpu.order(Order::Save);
    running.saved().unwrap();
    running.vcpu.stop();

    for last in [
        Step::PortWrite(0x10, vec![0xee]),
        Step::TripleFault,
        Step::Fail,
    ] {
        let mut ended = rig(vec![last.clone()]);
        ended.vcpu.order(Order::Run);
        ended.next();
        ended.vcpu.order(Order::Save);
        let why = ended.saved().unwrap_err();
        assert!(why.contains("cannot go on"), "{last:?}: {why}");
        ended.vcpu.stop();
    }
}

#[test]
fn a_dropped_machine_leaves_no_thread() {
    let threads = || {
        let all = std::fs::read_dir("/proc/self/task").unwrap();
        all.filter(|t| {
            let comm = t.as_ref().unwrap().path().join("comm");
            std::fs::read_to_string(comm).is_ok_and(|c| c.trim() == "vcpu 77")
        })
        .count()
    };
    let rig = rig_of(77, vec![]);
    rig.vcpu.order(Order::Run);
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while threads() == 0 {
        // The thread gives itself its name.
        assert!(
            std::time::Instant::now() < deadline,
            "no thread called vcpu 77"
        );
    }
    drop(rig);
    // The kernel wakes who joins a thread a moment before the thread is gone from /proc.
    while threads() != 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "vcpu 77 outlives its machine"
        );
    }
}
