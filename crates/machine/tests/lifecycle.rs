//! The life of machines on the scripted hypervisor, as clients of the API drive it: random sequences of commands, signals
//! and ends of the guest. Every answer is the one that the state calls for, every end is legal, and nothing is left.
//! Counted in a process in which no other test runs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/whole_machine.rs uses the rest")]
mod scripted;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use alveole_hypervisor::fake::{FakePartition, Step};
use alveole_machine::{Desk, End, Event, Files, Identity, Mailbox, validate};
use alveole_mmds::Metadata;
use alveole_vm_config::{
    Drive, DriveUpdate, Entropy, MachineConfig, MachineConfigUpdate, NetworkInterfaceUpdate,
    RateLimiter, TokenBucket, VmConfig, Vsock,
};
use alveole_vm_control::{Answer, Command, Refusal, Reply, Request, State, permit};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use scripted::{PATIENCE, machine_with};
use serde_json::json;
use tempfile::TempDir;

const SEQUENCES: u32 = 2000;
const POWER: u16 = 0x600;

/// What happens to a machine.
#[derive(Debug, Clone)]
enum Act {
    /// A client asks.
    Ask(Ask),
    /// A signal comes.
    Signal(i32),
}

/// What a client asks; commands themselves name paths that are only known in a test's directory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ask {
    Instance,
    Config,
    Metrics,
    PutMetadata,
    Pause,
    Resume,
    CtrlAltDel,
    Flush,
    Limit { size: u64 },
    PutIn { second: bool },
    PutInNothing,
    UnknownDrive,
    UnknownInterface,
    Start,
    PutDrive { id: u8, root: bool },
    PutVcpus(u8),
    PatchMemory(u64),
    PutVsock(u32),
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        2 => Just(Ask::Instance),
        1 => Just(Ask::Config),
        1 => Just(Ask::Metrics),
        1 => Just(Ask::PutMetadata),
        6 => Just(Ask::Pause),
        6 => Just(Ask::Resume),
        1 => Just(Ask::CtrlAltDel),
        1 => Just(Ask::Flush),
        1 => (0u64..3000).prop_map(|size| Ask::Limit { size }),
        2 => any::<bool>().prop_map(|second| Ask::PutIn { second }),
        1 => Just(Ask::PutInNothing),
        1 => Just(Ask::UnknownDrive),
        1 => Just(Ask::UnknownInterface),
        1 => Just(Ask::Start),
        1 => (0u8..4, any::<bool>()).prop_map(|(id, root)| Ask::PutDrive { id, root }),
        1 => prop::sample::select(vec![0u8, 1, 2, 64, 65, 255]).prop_map(Ask::PutVcpus),
        1 => prop::sample::select(vec![0u64, 63, 64, 128, u64::MAX]).prop_map(Ask::PatchMemory),
        1 => prop::sample::select(vec![0u32, 2, 3, u32::MAX]).prop_map(Ask::PutVsock),
    ]
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        30 => ask().prop_map(Act::Ask),
        1 => Just(Act::Signal(15)),
        1 => Just(Act::Signal(2)),
    ];
    prop::collection::vec(act, 0..16)
}

fn drive(id: &str, path: PathBuf, root: bool) -> Drive {
    Drive {
        drive_id: id.into(),
        path_on_host: path,
        is_root_device: root,
        ..Drive::default()
    }
}

fn command(ask: Ask, dir: &Path) -> Command {
    let put_in = |name: &str| {
        Command::PatchDrive(DriveUpdate {
            drive_id: "a".into(),
            path_on_host: Some(dir.join(name)),
            rate_limiter: None,
        })
    };
    match ask {
        Ask::Instance => Command::GetInstance,
        Ask::Config => Command::GetConfig,
        Ask::Metrics => Command::GetMetrics { open_metrics: true },
        Ask::PutMetadata => Command::PutMetadata(json!({"a": 1})),
        Ask::Pause => Command::Pause,
        Ask::Resume => Command::Resume,
        Ask::CtrlAltDel => Command::SendCtrlAltDel,
        Ask::Flush => Command::FlushMetrics,
        Ask::Limit { size } => Command::PatchDrive(DriveUpdate {
            drive_id: "a".into(),
            path_on_host: None,
            rate_limiter: Some(RateLimiter {
                bandwidth: None,
                ops: Some(TokenBucket {
                    size,
                    one_time_burst: None,
                    refill_time: 100,
                }),
            }),
        }),
        Ask::PutIn { second } => put_in(if second { "two" } else { "one" }),
        Ask::PutInNothing => put_in("none"),
        Ask::UnknownDrive => Command::PatchDrive(DriveUpdate {
            drive_id: "nobody".into(),
            ..DriveUpdate::default()
        }),
        Ask::UnknownInterface => Command::PatchNetworkInterface(NetworkInterfaceUpdate {
            iface_id: "nobody".into(),
            ..NetworkInterfaceUpdate::default()
        }),
        Ask::Start => Command::Start,
        Ask::PutDrive { id, root } => {
            // The last one names a file that is not there.
            let path = dir.join(["one", "two", "one", "none"][usize::from(id)]);
            Command::PutDrive(Box::new(drive(&id.to_string(), path, root)))
        }
        Ask::PutVcpus(vcpu_count) => Command::PutMachineConfig(MachineConfig {
            vcpu_count,
            mem_size_mib: 64,
            ..MachineConfig::default()
        }),
        Ask::PatchMemory(mib) => Command::PatchMachineConfig(MachineConfigUpdate {
            mem_size_mib: Some(mib),
            ..MachineConfigUpdate::default()
        }),
        Ask::PutVsock(guest_cid) => Command::PutVsock(Vsock {
            guest_cid: guest_cid.into(),
            uds_path: dir.join("vsock"),
            ..Vsock::default()
        }),
    }
}

fn desk(config: VmConfig) -> Desk {
    let identity = Identity {
        id: "random".into(),
        app_name: "test".into(),
        version: "0".into(),
        api_version: "0".into(),
        began: Instant::now(),
    };
    Desk::new(identity, config, Arc::new(Metadata::new(1000)))
}

/// A machine in the making takes what is asked or stays as it was, and can be built at any time.
fn describe(asked: &[Act], dir: &Path) -> Result<(), TestCaseError> {
    let mut config = VmConfig::default();
    config.boot_source.kernel_image_path = "kernel".into();
    let mut desk = desk(config);
    for act in asked {
        let Act::Ask(ask) = act else { continue };
        let command = command(*ask, dir);
        // For the program, not for the desk.
        if matches!(command, Command::Start) {
            continue;
        }
        let permitted = permit(State::NotStarted, &command).is_ok();
        let before = desk.config().clone();
        let outcome = desk.carry_out(State::NotStarted, command);
        if let Err(refusal) = outcome {
            prop_assert_eq!(desk.config(), &before, "{}", refusal);
            prop_assert!(!refusal.to_string().contains("bug"), "{}", refusal);
        } else {
            prop_assert!(permitted);
        }
        prop_assert!(validate(desk.config()).is_ok(), "after {:?}", ask);
    }
    Ok(())
}

/// Asks, and waits for the answer.
fn answer(mailbox: &Mailbox, command: Command) -> Result<Answer, Refusal> {
    let (tell, told) = mpsc::channel();
    let reply = Reply::new(move |outcome| drop(tell.send(outcome)));
    mailbox.send(Event::Request(Request { command, reply }));
    told.recv_timeout(PATIENCE)
        .expect("a client waits for ever")
}

/// Runs a machine whose guest powers off after `pauses` pauses, under `asked`, to its end.
fn live(
    asked: &[Act],
    cpus: u8,
    pauses: Option<usize>,
    dir: &TempDir,
) -> Result<(), TestCaseError> {
    let path = dir.path();
    let mut script = Vec::new();
    if let Some(pauses) = pauses {
        script = vec![Step::Compute; pauses];
        script.push(Step::PortWrite(POWER, vec![0x34]));
    }
    let partition = FakePartition::new(vec![script]);
    let (mailbox, events) = Mailbox::new();
    let mut config = VmConfig::default();
    let mut machine = machine_with(dir, cpus, partition, &mailbox, |described| {
        described.drives = vec![drive("a", path.join("one"), false)];
        described.entropy = Some(Entropy::default());
        config = described.clone();
    })
    .unwrap();
    machine.answer_clients(desk(config), Some(Files::start(&mailbox).unwrap()));
    let (tell, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let end = machine.run(&events, PATIENCE, &mut |_| Ok(()));
        drop((machine, events));
        tell.send(end).unwrap();
    });

    let (mut state, mut sigterms, mut sigints, mut over) = (State::Running, 0, 0, false);
    for act in asked {
        let ask = match act {
            Act::Signal(number) => {
                mailbox.send(Event::Signal(*number));
                match number {
                    15 => sigterms += 1,
                    _ => sigints += 1,
                }
                over |= sigterms > 1 || sigints > 0;
                continue;
            }
            Act::Ask(ask) => *ask,
        };
        let command = command(ask, path);
        let permitted = permit(state, &command);
        let outcome = answer(&mailbox, command);
        // A guest that powers off does so when it likes.
        let ended = matches!(&outcome, Err(why) if why.to_string().contains("has ended"));
        if over || ended {
            prop_assert!(
                ended,
                "{:?} of a machine that has ended: {:?}",
                ask,
                outcome
            );
            prop_assert!(over || pauses.is_some(), "it ended by itself");
            over = true;
            continue;
        }
        if let Err(refusal) = permitted {
            prop_assert_eq!(outcome, Err(refusal));
            continue;
        }
        let impossible = [Ask::PutInNothing, Ask::UnknownDrive, Ask::UnknownInterface];
        prop_assert_eq!(
            outcome.is_err(),
            impossible.contains(&ask),
            "{:?}: {:?}",
            ask,
            outcome
        );
        match (ask, outcome) {
            (Ask::Pause, _) => state = State::Paused,
            (Ask::Resume, _) => state = State::Running,
            (Ask::Instance, Ok(Answer::Instance(info))) => prop_assert_eq!(info.state, state),
            (Ask::Config, Ok(Answer::Config(config))) => prop_assert!(validate(&config).is_ok()),
            _ => {}
        }
    }
    mailbox.send(Event::Signal(3));
    let end = told
        .recv_timeout(PATIENCE)
        .expect("the machine does not end");
    thread.join().unwrap();
    let legal = match end {
        End::PowerOff { cpu: 0, .. } => pauses.is_some(),
        End::Signal(15) => sigterms > 1,
        End::Signal(2) => sigints > 0,
        End::Signal(3) => true,
        _ => false,
    };
    prop_assert!(legal, "{:?}", end);
    Ok(())
}

/// Threads and open files of this process.
fn held() -> (usize, usize) {
    let count = |dir| fs::read_dir(dir).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

#[test]
fn any_sequence_of_commands_is_answered_and_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    for name in ["one", "two"] {
        fs::write(dir.path().join(name), [0; 8192]).unwrap();
    }
    let before = held();
    let config = Config {
        cases: SEQUENCES,
        failure_persistence: None,
        ..Config::default()
    };
    let sequences = (acts(), 1u8..4, prop::option::of(0usize..4));
    let ran = TestRunner::new(config).run(&sequences, |(asked, cpus, pauses)| {
        describe(&asked, dir.path())?;
        live(&asked, cpus, pauses, &dir)
    });
    if let Err(why) = ran {
        panic!("{why}");
    }
    // A thread that was waited for may still be seen for a moment.
    let until = Instant::now() + Duration::from_secs(5);
    while held() != before {
        assert!(Instant::now() < until, "{:?}, before: {before:?}", held());
        std::thread::sleep(Duration::from_millis(5));
    }
}
