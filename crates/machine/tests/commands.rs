//! What clients ask of a machine, on the scripted hypervisor: random commands against a model of what they do, and
//! everything that can be put into a drive, behind the real filters.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/whole_machine.rs uses the rest")]
mod scripted;

use std::fs;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use alveole_block_store::{Format, tools};
use alveole_hypervisor::fake::{FakePartition, Step};
use alveole_machine::{Desk, End, Event, Files, Identity, Mailbox};
use alveole_mmds::Metadata;
use alveole_vm_config::{
    Drive, DriveUpdate, Entropy, MachineConfigUpdate, RateLimiter, Serial, TokenBucket, VmConfig,
};
use alveole_vm_control::{Answer, Command, Refusal, Reply, Request, State, permit};
use proptest::prelude::*;
use scripted::{PATIENCE, machine_with};
use tempfile::TempDir;

type Outcome = Result<Answer, Refusal>;

/// A machine that runs in a thread of its own, with a drive `a` over the file `one`.
struct Bench {
    dir: TempDir,
    mailbox: Mailbox,
    partition: FakePartition,
    ended: mpsc::Receiver<(End, usize, TempDir)>,
}

fn drive(dir: &Path) -> Drive {
    Drive {
        drive_id: "a".into(),
        path_on_host: dir.join("one"),
        ..Drive::default()
    }
}

impl Bench {
    fn new(cpus: u8) -> Self {
        Self::running(cpus, Vec::new())
    }

    /// Its processors do what the scripts say, and then spin.
    fn running(cpus: u8, scripts: Vec<Vec<Step>>) -> Self {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("one"), vec![1; 1 << 20]).unwrap();
        fs::write(dir.path().join("two"), vec![2; 2 << 20]).unwrap();
        let (mailbox, events) = Mailbox::new();
        let (tell, ended) = mpsc::channel();
        let folder = tempfile::tempdir_in(dir.path()).unwrap();
        let drive = drive(dir.path());
        let to_machine = mailbox.clone();
        let partition = FakePartition::new(scripts);
        let scripted = partition.clone();
        std::thread::spawn(move || {
            let mut described = VmConfig::default();
            let change = |config: &mut VmConfig| {
                config.drives = vec![drive];
                config.entropy = Some(Entropy::default());
                described = config.clone();
            };
            let mut machine = machine_with(&folder, cpus, scripted, &to_machine, change).unwrap();
            let identity = Identity {
                id: "x".into(),
                app_name: "test".into(),
                version: "0".into(),
                api_version: "1".into(),
                began: Instant::now(),
            };
            let files = Files::start(&to_machine).unwrap();
            machine.answer_clients(
                Desk::new(identity, described, Arc::new(Metadata::new(100))),
                Some(files),
            );
            let mut ticks = 0;
            let end = machine.run(&events, PATIENCE, &mut |_| {
                ticks += 1;
                Ok(())
            });
            drop(machine);
            // The folder goes with it: this thread may not remove it.
            tell.send((end, ticks, folder)).unwrap();
        });
        Self {
            dir,
            mailbox,
            partition,
            ended,
        }
    }

    /// Sends a command; the answer comes through the channel.
    fn send(&self, command: Command) -> mpsc::Receiver<Outcome> {
        let (to, from) = mpsc::channel();
        let reply = Reply::new(move |outcome| to.send(outcome).unwrap());
        self.mailbox
            .send(Event::Request(Request { command, reply }));
        from
    }

    fn ask(&self, command: Command) -> Outcome {
        self.send(command).recv_timeout(PATIENCE).unwrap()
    }

    fn state(&self) -> State {
        match self.ask(Command::GetInstance) {
            Ok(Answer::Instance(info)) => info.state,
            other => panic!("{other:?}"),
        }
    }

    fn config(&self) -> VmConfig {
        match self.ask(Command::GetConfig) {
            Ok(Answer::Config(config)) => *config,
            other => panic!("{other:?}"),
        }
    }

    fn put(&self, path: &Path) -> Outcome {
        self.ask(Command::PatchDrive(DriveUpdate {
            drive_id: "a".into(),
            path_on_host: Some(path.into()),
            rate_limiter: None,
        }))
    }

    /// Ends it; how often counters were written.
    fn end(self) -> usize {
        self.mailbox.send(Event::Signal(2));
        let (end, ticks, _folder) = self.ended.recv_timeout(PATIENCE).unwrap();
        assert_eq!(end, End::Signal(2));
        ticks
    }
}

fn limiter(size: u64) -> RateLimiter {
    RateLimiter {
        bandwidth: None,
        ops: Some(TokenBucket {
            size,
            one_time_burst: None,
            refill_time: 100,
        }),
    }
}

fn any_command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::Pause),
        Just(Command::Pause),
        Just(Command::Resume),
        Just(Command::Resume),
        Just(Command::Start),
        Just(Command::SendCtrlAltDel),
        Just(Command::FlushMetrics),
        Just(Command::GetInstance),
        Just(Command::GetMachineConfig),
        Just(Command::GetMetadata),
        any::<bool>().prop_map(|open_metrics| Command::GetMetrics { open_metrics }),
        Just(Command::PutSerial(Serial::default())),
        Just(Command::PutEntropy(Entropy::default())),
        Just(Command::PatchMachineConfig(MachineConfigUpdate::default())),
        (0..3u64).prop_map(|size| Command::PatchDrive(DriveUpdate {
            drive_id: "a".into(),
            path_on_host: None,
            rate_limiter: Some(limiter(size)),
        })),
        Just(Command::PatchDrive(DriveUpdate {
            drive_id: "none".into(),
            ..DriveUpdate::default()
        })),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_commands_do_what_the_table_says(
        commands in prop::collection::vec(any_command(), 1..60),
        cpus in 1..4u8,
    ) {
        let bench = Bench::new(cpus);
        // All at once: they are carried out in this order nevertheless.
        let answers: Vec<_> = commands.iter().map(|c| bench.send(c.clone())).collect();
        let (mut state, mut flushes, mut pauses) = (State::Running, 0, 0);
        for (command, answer) in commands.iter().zip(answers) {
            let answer = answer.recv_timeout(PATIENCE).unwrap();
            let permitted = permit(state, command);
            if let Err(refusal) = permitted {
                prop_assert_eq!(answer, Err(refusal));
                continue;
            }
            match command {
                Command::GetMetadata => {
                    prop_assert_eq!(answer, Ok(Answer::Metadata(serde_json::json!({}))));
                }
                Command::GetMetrics { .. } => match answer {
                    Ok(Answer::Text { text, .. }) => {
                        let line = format!("alveole_machine_state{{state=\"{state}\"}} 1\n");
                        prop_assert!(text.contains(&line), "{}", text);
                    }
                    other => prop_assert!(false, "{:?}", other),
                },
                Command::PatchDrive(update) if update.drive_id == "none" => {
                    prop_assert!(matches!(answer, Err(Refusal::Failed(_))));
                }
                Command::GetInstance => match answer {
                    Ok(Answer::Instance(info)) => prop_assert_eq!(info.state, state),
                    other => prop_assert!(false, "{:?}", other),
                },
                _ => prop_assert!(answer.is_ok(), "{:?}: {:?}", command, answer),
            }
            match command {
                Command::Pause => {
                    pauses += usize::from(state == State::Running);
                    state = State::Paused;
                }
                Command::Resume => state = State::Running,
                Command::FlushMetrics => flushes += 1,
                _ => {}
            }
        }
        prop_assert_eq!(bench.state(), state);
        // Each processor, each time.
        prop_assert_eq!(bench.partition.pauses(), pauses * usize::from(cpus));
        prop_assert_eq!(bench.end(), flushes + 1);
    }
}

/// The keys where a driver has its interrupt switched on, else the power button, and never both.
#[test]
fn ctrl_alt_del_is_one_event_that_the_guest_can_hear() {
    const KEYBOARD_GSI: u32 = 1;
    const POWER_BUTTON_GSI: u32 = 5;
    let told = |bench: &Bench| {
        let lines = bench.partition.lines();
        let edges = |gsi: u32| {
            let (_, line) = lines.iter().find(|(g, _)| *g == gsi).unwrap();
            line.take_edges()
        };
        (edges(KEYBOARD_GSI), edges(POWER_BUTTON_GSI))
    };
    let bench = Bench::new(1);
    for _ in 0..3 {
        assert_eq!(bench.ask(Command::SendCtrlAltDel), Ok(Answer::Done));
        assert_eq!(told(&bench), (0, 1));
    }
    bench.end();

    // A driver that reads nothing.
    let driver = vec![
        Step::PortWrite(0x64, vec![0x60]),
        Step::PortWrite(0x60, vec![0x65]),
        Step::PortRead(0x64, 1),
    ];
    let bench = Bench::running(1, vec![driver]);
    let until = Instant::now() + PATIENCE;
    while bench.partition.reads().is_empty() {
        assert!(Instant::now() < until, "the script does not run");
        std::thread::yield_now();
    }
    assert_eq!(bench.ask(Command::SendCtrlAltDel), Ok(Answer::Done));
    assert_eq!(told(&bench), (1, 0));
    let Err(Refusal::Failed(why)) = bench.ask(Command::SendCtrlAltDel) else {
        panic!("keys beyond those that fit");
    };
    assert!(why.contains("has not read the keys"), "{why}");
    assert_eq!(told(&bench), (0, 0));
    // A press waits while the machine is paused, as it does for a guest that is slow.
    assert_eq!(bench.ask(Command::Pause), Ok(Answer::Done));
    assert!(bench.ask(Command::SendCtrlAltDel).is_err());
    bench.end();
}

#[test]
fn everything_that_can_be_put_into_a_drive_is() {
    let bench = Bench::new(1);
    let at = |name: &str| bench.dir.path().join(name);
    tools::create_qcow2(&at("base.qcow2"), 4 << 20, 16).unwrap();
    tools::create_overlay(&at("over.qcow2"), &at("base.qcow2"), Format::Qcow2).unwrap();
    tools::create_raw(&at("raw"), 3 << 20).unwrap();
    for name in ["two", "over.qcow2", "raw", "base.qcow2", "one", "one"] {
        let told = bench.put(&at(name));
        assert_eq!(told, Ok(Answer::Done), "{name}");
        assert_eq!(bench.config().drives[0].path_on_host, at(name));
    }
    bench.end();
}

#[test]
fn what_cannot_be_put_into_a_drive_is_told_and_changes_nothing() {
    let bench = Bench::new(1);
    let at = |name: &str| bench.dir.path().join(name);
    fs::write(at("no.qcow2"), "no image").unwrap();
    fifo(&at("fifo"));
    tools::create_qcow2(&at("used.qcow2"), 1 << 20, 16).unwrap();
    let options = alveole_block_store::OpenOptions {
        format: Format::Qcow2,
        ..Default::default()
    };
    let before = bench.config();
    for (name, why) in [
        ("none", "check the name"),
        (".", "a directory"),
        ("fifo", "a FIFO"),
        ("no.qcow2", "as qcow2"),
    ] {
        let told = bench.put(&at(name)).unwrap_err().to_string();
        assert!(told.starts_with("cannot change drive \"a\": "), "{told}");
        assert!(told.contains(why), "{told} / {why}");
    }
    let used = alveole_block_store::open(&at("used.qcow2"), &options).unwrap();
    let told = bench.put(&at("used.qcow2")).unwrap_err().to_string();
    assert!(told.contains("has it open to write"), "{told}");
    drop(used);
    assert_eq!(bench.config(), before);
    bench.end();
}

#[test]
fn a_client_whose_machine_ends_is_told() {
    let bench = Bench::new(1);
    bench.mailbox.send(Event::Signal(2));
    let answer = bench.send(Command::GetConfig);
    let told = answer.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(told.to_string().contains("has ended"), "{told}");
}

/// A named pipe.
fn fifo(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status();
    assert!(made.unwrap().success());
}
