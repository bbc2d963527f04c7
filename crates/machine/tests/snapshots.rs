//! Snapshots on the scripted hypervisor: what is saved is restored, those of every released version are loaded, and what a hostile
//! hand has made of one is refused with words.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/whole_machine.rs uses the rest")]
mod scripted;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use alveole_block_store::Format;
use alveole_block_store::tools::create_overlay;
use alveole_guest_memory::test_huge_pages::MorePages;
use alveole_guest_memory::test_server::{TestServer, may_serve};
use alveole_guest_memory::{HostPages, MAX_LAYERS};
use alveole_hypervisor::fake::{FakePartition, Step};
use alveole_machine::{
    Desk, End, Event, Files, Flatten, Flattened, HostResources, Identity, Machine, Mailbox,
    Options, SNAPSHOT_VERSION, Snapshot, Transport, Verified, flatten, restore, validate, verify,
};
use alveole_mmds::Metadata;
use alveole_saved_state::{SavedState, StateFile};
use alveole_serial::{Console, ConsoleTarget};
use alveole_vm_config::{
    BackingPlace, DiskFormat, Drive, DriveCopy, DriveOverride, Entropy, HugePages, LinkKind,
    MemoryBackend, MemoryBackendType, NetworkInterface, NetworkOverride, SnapshotCreate,
    SnapshotLoad, SnapshotType, VmConfig, Vsock, VsockOverride,
};
use alveole_vm_control::{Answer, Command, Refusal, Reply, Request, State};
use proptest::prelude::*;
use scripted::{PATIENCE, machine_of};
use serde_json::Value;
use tempfile::TempDir;

const PAGE: u64 = 4096;
/// RAM of the machine, in bytes.
const RAM: u64 = 64 << 20;
const HUGE_PAGE: u64 = 2 << 20;
/// The scratch register of the serial port, and the keyboard controller's ports.
const SCRATCH: u16 = 0x3f8 + 7;
/// Set to write the snapshots of this version anew.
const UPDATE: &str = "ALVEOLE_UPDATE_GOLDEN";

type Outcome = Result<Answer, Refusal>;

/// A machine that runs in a thread of its own.
struct Bench {
    mailbox: Mailbox,
    ended: mpsc::Receiver<(End, Option<TempDir>)>,
}

fn desk(config: VmConfig) -> Desk {
    let identity = Identity {
        id: "x".into(),
        app_name: "Alveole".into(),
        version: "0".into(),
        api_version: "1".into(),
        began: Instant::now(),
    };
    Desk::new(identity, config, Arc::new(Metadata::new(100)))
}

impl Bench {
    /// One with every kind of device that needs nothing of the host, on `transport`, whose processors do what the scripts say.
    fn new(dir: &Path, transport: Transport, tracks: bool, scripts: Vec<Vec<Step>>) -> Self {
        Self::with(dir, transport, tracks, scripts, |_| ())
    }

    /// The same, of which `more` says more.
    fn with(
        dir: &Path,
        transport: Transport,
        tracks: bool,
        scripts: Vec<Vec<Step>>,
        more: impl FnOnce(&mut VmConfig),
    ) -> Self {
        let (mailbox, events) = Mailbox::new();
        let to_machine = mailbox.clone();
        let image = dir.join("disk");
        let uds_path = dir.join("v");
        if !image.exists() {
            fs::write(&image, vec![7; 1 << 20]).unwrap();
        }
        let folder = TempDir::new().unwrap();
        let mut described = VmConfig::default();
        let options = Options {
            transport,
            ..Options::default()
        };
        let change = |config: &mut VmConfig| {
            config.machine_config.track_dirty_pages = tracks;
            config.drives = vec![Drive {
                drive_id: "a".into(),
                path_on_host: image,
                ..Drive::default()
            }];
            config.entropy = Some(Entropy::default());
            config.vsock = Some(Vsock {
                guest_cid: 3,
                uds_path,
                ..Vsock::default()
            });
            more(config);
            described = config.clone();
        };
        let partition = FakePartition::new(scripts);
        let machine = machine_of(&folder, 2, partition, &to_machine, options, change).unwrap();
        Self::run(machine, described, mailbox, events, Some(folder))
    }

    fn run(
        mut machine: Machine,
        described: VmConfig,
        mailbox: Mailbox,
        events: mpsc::Receiver<Event>,
        folder: Option<TempDir>,
    ) -> Self {
        let (tell, ended) = mpsc::channel();
        machine.answer_clients(desk(described), Some(Files::start(&mailbox).unwrap()));
        std::thread::spawn(move || {
            let end = machine.run(&events, PATIENCE, &mut |_| Ok(()));
            drop(machine);
            tell.send((end, folder)).unwrap();
        });
        Self { mailbox, ended }
    }

    fn ask(&self, command: Command) -> Outcome {
        let (to, from) = mpsc::channel();
        let reply = Reply::new(move |outcome| drop(to.send(outcome)));
        self.mailbox
            .send(Event::Request(Request { command, reply }));
        from.recv_timeout(PATIENCE).unwrap()
    }

    fn state(&self) -> State {
        match self.ask(Command::GetInstance) {
            Ok(Answer::Instance(info)) => info.state,
            other => panic!("{other:?}"),
        }
    }

    fn snapshot(&self, dir: &Path, name: &str, kind: SnapshotType, live: bool) -> Outcome {
        self.ask(Command::CreateSnapshot(SnapshotCreate {
            snapshot_path: dir.join(format!("{name}.state")),
            mem_file_path: dir.join(format!("{name}.memory")),
            snapshot_type: kind,
            live,
            ..SnapshotCreate::default()
        }))
    }

    /// A full snapshot, with copies of disks.
    fn with_disks(&self, dir: &Path, name: &str, live: bool, drives: &[(&str, &str)]) -> Outcome {
        self.ask(Command::CreateSnapshot(SnapshotCreate {
            snapshot_path: dir.join(format!("{name}.state")),
            mem_file_path: dir.join(format!("{name}.memory")),
            live,
            sync: false,
            drives: drives
                .iter()
                .map(|(id, path)| DriveCopy {
                    drive_id: (*id).into(),
                    path_on_host: dir.join(path),
                })
                .collect(),
            ..SnapshotCreate::default()
        }))
    }

    fn end(self) {
        self.mailbox.send(Event::Signal(2));
        let (end, _folder) = self.ended.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(end, End::Signal(2)), "{end:?}");
    }
}

fn load(dir: &Path, name: &str) -> SnapshotLoad {
    SnapshotLoad {
        snapshot_path: dir.join(format!("{name}.state")),
        mem_backend: Some(MemoryBackend {
            backend_type: MemoryBackendType::File,
            backend_path: dir.join(format!("{name}.memory")),
        }),
        drive_overrides: vec![DriveOverride {
            drive_id: "a".into(),
            path_on_host: dir.join("disk"),
            ..DriveOverride::default()
        }],
        vsock_override: Some(VsockOverride {
            uds_path: dir.join("w"),
        }),
        ..SnapshotLoad::default()
    }
}

/// The machine that `load` names, on `partition`.
fn restored(
    load: &SnapshotLoad,
    partition: &FakePartition,
    mailbox: &Mailbox,
) -> Result<(Machine, VmConfig), String> {
    let snapshot = Snapshot::open(load).map_err(|e| e.to_string())?;
    let config = snapshot.config().clone();
    let valid = validate(&config).map_err(|broken| format!("{broken:?}"))?;
    let metadata = Arc::new(Metadata::new(0));
    let resources = HostResources::open_devices(&valid, &metadata).map_err(|e| e.to_string())?;
    let console = Console::open(&ConsoleTarget::None, Box::new(|_| ())).unwrap();
    let machine = restore(
        &valid,
        resources,
        console,
        Box::new(partition.clone()),
        Vec::new(),
        mailbox,
        Options::default(),
        snapshot,
    );
    Ok((machine.map_err(|e| e.to_string())?, config))
}

fn told(load: &SnapshotLoad) -> String {
    let partition = FakePartition::new(Vec::new());
    match restored(load, &partition, &Mailbox::new().0) {
        Ok(_) => String::new(),
        Err(why) => why,
    }
}

/// Writes a register, and RAM in two places.
fn script() -> Vec<Vec<Step>> {
    vec![vec![
        Step::PortWrite(SCRATCH, vec![0x5a]),
        Step::RamWrite(5 * PAGE, vec![0xab; 10_000]),
        Step::RamWrite(RAM - PAGE, vec![0xcd; 4096]),
    ]]
}

fn pause(bench: &Bench) {
    assert_eq!(bench.ask(Command::Pause), Ok(Answer::Done));
}

/// A snapshot of a machine that has done [`script`].
fn taken(dir: &Path, name: &str, transport: Transport) {
    let bench = Bench::new(dir, transport, false, script());
    // Scripts are played before the first kick is noticed.
    while bench.state() != State::Running {}
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    let outcome = bench.snapshot(dir, name, SnapshotType::Full, false);
    assert_eq!(outcome, Ok(Answer::Done));
    bench.end();
}

/// Asserts that the snapshot of [`taken`] goes on on another partition as it was.
fn goes_on(load: &SnapshotLoad) {
    let (mailbox, events) = Mailbox::new();
    let reads = vec![vec![Step::PortRead(SCRATCH, 1)]];
    let partition = FakePartition::new(reads);
    let (machine, config) = restored(load, &partition, &mailbox).unwrap();
    let (_, clock) = partition.restored().unwrap();
    assert_eq!(clock, Default::default());
    for cpu in 0..2 {
        let state = partition.restored_cpu(cpu).unwrap();
        assert!(!state.cpuid.is_empty());
    }
    let ram = partition.ram().unwrap();
    let mut bytes = vec![0; 10_000];
    ram.read(5 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, vec![0xab; 10_000]);
    ram.read(RAM - PAGE, &mut bytes[..4096]).unwrap();
    assert_eq!(bytes[..4096], [0xcd; 4096]);
    let bench = Bench::run(machine, config, mailbox, events, None);
    assert_eq!(bench.state(), State::Paused);
    assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    let until = Instant::now() + PATIENCE;
    while partition.reads().is_empty() {
        assert!(Instant::now() < until, "it does not go on");
        std::thread::yield_now();
    }
    assert_eq!(partition.reads(), [[0x5a]], "the scratch register");
    bench.end();
}

#[test]
fn a_machine_goes_on_as_it_was() {
    for transport in [Transport::Mmio, Transport::Pci] {
        let dir = TempDir::new().unwrap();
        taken(dir.path(), "s", transport);
        goes_on(&load(dir.path(), "s"));
        // And it can be saved anew, over the files that it runs from.
        let (mailbox, events) = Mailbox::new();
        let partition = FakePartition::new(Vec::new());
        let (machine, config) = restored(&load(dir.path(), "s"), &partition, &mailbox).unwrap();
        let bench = Bench::run(machine, config, mailbox, events, None);
        let outcome = bench.snapshot(dir.path(), "s", SnapshotType::Full, false);
        assert_eq!(outcome, Ok(Answer::Done));
        bench.end();
        goes_on(&load(dir.path(), "s"));
    }
}

#[test]
fn a_running_machine_is_saved_live_or_not_at_all() {
    let dir = TempDir::new().unwrap();
    let bench = Bench::new(dir.path(), Transport::Pci, false, script());
    let refused = bench.snapshot(dir.path(), "s", SnapshotType::Full, false);
    let why = refused.unwrap_err().to_string();
    assert!(
        why.contains("the guest runs") && why.contains("live"),
        "{why}"
    );
    std::thread::sleep(std::time::Duration::from_millis(50));
    let taken = bench.snapshot(dir.path(), "s", SnapshotType::Full, true);
    let Ok(Answer::Snapshot(taken)) = taken else {
        panic!("{taken:?}");
    };
    assert!(
        taken.stood_still_us > 0 && taken.memory_bytes > 0,
        "{taken:?}"
    );
    assert_eq!(bench.state(), State::Running);
    bench.end();
    goes_on(&load(dir.path(), "s"));
}

#[test]
fn a_snapshot_that_fails_leaves_the_machine_and_the_files_as_they_were() {
    let dir = TempDir::new().unwrap();
    let bench = Bench::new(dir.path(), Transport::Mmio, true, script());
    pause(&bench);
    fs::write(dir.path().join("s.state"), "an older one").unwrap();
    fs::create_dir(dir.path().join("s.memory")).unwrap();
    for live in [false, true] {
        let outcome = bench.snapshot(dir.path(), "s", SnapshotType::Full, live);
        let why = outcome.unwrap_err().to_string();
        assert!(
            why.contains("s.memory") && why.contains("no plain file"),
            "{why}"
        );
    }
    let nowhere = dir.path().join("nowhere");
    let outcome = bench.snapshot(&nowhere, "s", SnapshotType::Full, false);
    let why = outcome.unwrap_err().to_string();
    assert!(why.contains("nowhere") && why.contains("folder"), "{why}");
    let one = SnapshotCreate {
        snapshot_path: dir.path().join("one"),
        mem_file_path: dir.path().join("one"),
        ..SnapshotCreate::default()
    };
    let why = bench.ask(Command::CreateSnapshot(one)).unwrap_err();
    assert!(why.to_string().contains("different names"), "{why}");
    assert_eq!(
        fs::read_to_string(dir.path().join("s.state")).unwrap(),
        "an older one"
    );
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().flatten().collect();
    let hidden = names
        .iter()
        .filter(|n| n.file_name().as_encoded_bytes().starts_with(b"."));
    assert_eq!(hidden.count(), 0, "half-made files: {names:?}");
    assert_eq!(bench.state(), State::Paused);
    assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    bench.end();
}

#[test]
fn images_of_disks_are_copied_with_the_memory() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    // A hole of 8 MiB behind what is there.
    fs::write(path.join("disk"), vec![7; 1 << 20]).unwrap();
    let image = File::options().write(true).open(path.join("disk")).unwrap();
    image.set_len(9 << 20).unwrap();
    let bench = Bench::new(path, Transport::Pci, true, script());
    std::thread::sleep(std::time::Duration::from_millis(50));
    let taken = bench.with_disks(path, "live", true, &[("a", "live.disk")]);
    let Ok(Answer::Snapshot(taken)) = taken else {
        panic!("{taken:?}");
    };
    assert!(
        taken.disks_us > 0 && taken.disks_us < taken.stood_still_us,
        "{taken:?}"
    );
    pause(&bench);
    for kind in [SnapshotType::Full, SnapshotType::Diff] {
        // Anew, over the copies that are there.
        image
            .write_all_at(format!("{kind:?}").as_bytes(), 5000)
            .unwrap();
        let create = SnapshotCreate {
            snapshot_path: path.join("s.state"),
            mem_file_path: path.join(format!("{kind:?}.memory")),
            snapshot_type: kind,
            drives: vec![DriveCopy {
                drive_id: "a".into(),
                path_on_host: path.join("s.disk"),
            }],
            ..SnapshotCreate::default()
        };
        assert_eq!(bench.ask(Command::CreateSnapshot(create)), Ok(Answer::Done));
        let (disk, copy) = (fs::read(path.join("disk")), fs::read(path.join("s.disk")));
        assert!(disk.unwrap() == copy.unwrap(), "{kind:?}");
        let meta = fs::metadata(path.join("s.disk")).unwrap();
        assert!(meta.blocks() * 512 < 2 << 20, "the hole is one of the copy");
        assert_eq!(meta.mode() & 0o777, 0o600);
    }
    bench.end();
    assert!(kinds(&path.join("s.state")).contains(&"drives".to_owned()));
    // The copy is what the machine goes on with, and an older program may leave out where it is.
    let load = SnapshotLoad {
        drive_overrides: vec![DriveOverride {
            drive_id: "a".into(),
            path_on_host: path.join("live.disk"),
            ..DriveOverride::default()
        }],
        ..load(path, "live")
    };
    goes_on(&load);
    // Over the copy lies an image for each clone.
    let overlay = path.join("clone.qcow2");
    create_overlay(&overlay, &path.join("live.disk"), Format::Raw).unwrap();
    let over = |format, backing| SnapshotLoad {
        drive_overrides: vec![DriveOverride {
            drive_id: "a".into(),
            path_on_host: overlay.clone(),
            format,
            backing,
        }],
        ..load.clone()
    };
    goes_on(&over(Some(DiskFormat::Qcow2), Some(BackingPlace::Anywhere)));
    goes_on(&over(None, None));
    let raw = told(&over(Some(DiskFormat::Raw), None));
    assert!(raw.contains("its disk had 9437184 bytes"), "{raw}");
    let odd = told(&over(Some(DiskFormat::Raw), Some(BackingPlace::Anywhere)));
    assert!(odd.contains("RawBacking"), "{odd}");
}

#[test]
fn a_disk_that_cannot_be_copied_leaves_everything_as_it_was() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    fs::write(path.join("fixed"), vec![1; 4096]).unwrap();
    let used = path.join("fixed");
    let bench = Bench::with(path, Transport::Mmio, false, script(), |config| {
        config.drives.push(Drive {
            drive_id: "b".into(),
            path_on_host: used,
            is_read_only: true,
            ..Drive::default()
        });
    });
    pause(&bench);
    for (drives, part) in [
        (&[("c", "x")][..], "no such drive; it has a, b"),
        (&[("a", "x"), ("a", "y")], "\"a\" twice"),
        (&[("b", "x")], "drive \"b\" is read-only"),
        (&[("a", "s.memory")], "both mem_file_path and path_on_host"),
        (&[("a", "s.state")], "both snapshot_path and path_on_host"),
        (&[("a", "disk")], "disk\" is an image in use: process"),
        (&[("a", "fixed")], "fixed\" is an image in use: process"),
        (&[("a", "no/x")], "drive \"a\": "),
    ] {
        let why = bench.with_disks(path, "s", false, drives).unwrap_err();
        let why = why.to_string();
        assert!(why.contains(part), "{why} / {part}");
    }
    let over = bench.ask(Command::CreateSnapshot(SnapshotCreate {
        snapshot_path: path.join("s.state"),
        mem_file_path: path.join("disk"),
        ..SnapshotCreate::default()
    }));
    let why = over.unwrap_err().to_string();
    assert!(why.contains("is an image in use"), "{why}");
    let mut names: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["disk", "fixed", "v"]);
    assert_eq!(bench.state(), State::Paused);
    bench.end();
}

/// Takes a full snapshot of a guest that has written to this address, where nothing was before; it does that last.
fn take_behind(bench: &Bench, dir: &Path, name: &str, address: u64) {
    let until = Instant::now() + PATIENCE;
    loop {
        pause(bench);
        let taken = bench.snapshot(dir, name, SnapshotType::Full, false);
        assert_eq!(taken, Ok(Answer::Done));
        let mut byte = [0];
        let memory = File::open(dir.join(format!("{name}.memory"))).unwrap();
        memory.read_exact_at(&mut byte, address).unwrap();
        if byte[0] != 0 {
            return;
        }
        assert!(Instant::now() < until, "the guest did not come so far");
        assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    }
}

/// Interrupt lines of the serial port and the keyboard.
const SERIAL_LINE: u32 = 4;
const KEYBOARD_LINE: u32 = 1;

#[test]
fn interrupts_that_were_on_their_way_are_raised_again() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    let script = vec![vec![
        // Interrupts of the transmitter are wanted, and one is due.
        Step::PortWrite(0x3f8 + 1, vec![2]),
        Step::PortWrite(0x3f8, b"x".to_vec()),
        // The keyboard's interrupt is on, and it has an answer.
        Step::PortWrite(0x64, vec![0x60]),
        Step::PortWrite(0x60, vec![1]),
        Step::PortWrite(0x60, vec![0xee]),
        Step::RamWrite(5000 * PAGE, vec![1]),
    ]];
    let bench = Bench::new(path, Transport::Mmio, false, script);
    take_behind(&bench, path, "s", 5000 * PAGE);
    bench.end();
    let partition = FakePartition::new(Vec::new());
    let machine = restored(&load(path, "s"), &partition, &Mailbox::new().0);
    let (machine, _) = machine.unwrap();
    let lines = partition.lines();
    for number in [SERIAL_LINE, KEYBOARD_LINE] {
        let (_, line) = lines.iter().find(|(gsi, _)| *gsi == number).unwrap();
        assert!(line.take_edges() > 0, "line {number}");
    }
    drop(machine);
}

/// The pages of a working set, from its file.
fn working_set(path: &Path) -> Vec<(u64, u64)> {
    let mut file = StateFile::read(&fs::read(path).unwrap()).unwrap();
    let set: Value = serde_json::from_slice(&file.take("working set").unwrap().bytes).unwrap();
    serde_json::from_value(set["runs"].clone()).unwrap()
}

#[test]
fn what_a_guest_touches_first_is_recorded_and_read_ahead() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    taken(path, "s", Transport::Pci);
    taken(path, "other", Transport::Pci);
    let set_path = path.join("s.set");
    let of = |name: &str, ms| SnapshotLoad {
        working_set_path: Some(set_path.clone()),
        working_set_ms: ms,
        resume_vm: true,
        ..load(path, name)
    };
    // Touches a page, far from all that others do, and runs for ever.
    let run = |load: &SnapshotLoad, page: u64, until: &dyn Fn() -> bool| {
        let (mailbox, events) = Mailbox::new();
        let script = vec![vec![
            Step::RamWrite(page * PAGE, vec![1]),
            Step::PortRead(SCRATCH, 1),
        ]];
        let partition = FakePartition::new(script);
        let (machine, config) = restored(load, &partition, &mailbox).unwrap();
        let bench = Bench::run(machine, config, mailbox, events, None);
        let patience = Instant::now() + PATIENCE;
        while partition.reads().is_empty() || !until() {
            assert!(Instant::now() < patience, "it is not recorded");
            std::thread::yield_now();
        }
        bench.end();
    };
    let has = |page: u64| {
        let set = working_set(&set_path);
        set.iter()
            .any(|(first, pages)| (*first..first + pages).contains(&page))
    };
    run(&of("s", Some(500)), 8000, &|| set_path.exists());
    assert!(has(8000) && !has(9000), "{:?}", working_set(&set_path));
    let first = fs::read(&set_path).unwrap();
    run(&of("s", None), 9000, &|| true);
    assert_eq!(fs::read(&set_path).unwrap(), first, "it is used, and stays");
    // Of another snapshot it is made anew; that of a guest which ends soon, at its end.
    run(&of("other", None), 9000, &|| true);
    assert!(has(9000) && !has(8000), "{:?}", working_set(&set_path));

    // What is none is not written over, and a hostile one is none.
    let refused = |load: &SnapshotLoad, part: &str| {
        let why = told(load);
        assert!(why.contains(part), "{why} / {part}");
    };
    let good = fs::read(&set_path).unwrap();
    fs::write(&set_path, &good[..good.len() - 1]).unwrap();
    refused(&of("s", None), "working_set_path");
    fs::write(&set_path, "my thesis").unwrap();
    refused(&of("s", None), "name another file, or remove it");
    assert_eq!(fs::read(&set_path).unwrap(), b"my thesis");
    fs::write(&set_path, &good).unwrap();
    with_section(&set_path, "working set", |section| {
        let text = String::from_utf8(section.bytes.clone()).unwrap();
        let at = text.find("\"runs\":[[").unwrap();
        section.bytes = format!("{}\"runs\":[[{},{}]]}}", &text[..at], u64::MAX, u64::MAX).into();
    });
    run(&of("other", None), 9000, &|| true);
    let without = SnapshotLoad {
        working_set_path: None,
        ..of("s", Some(1))
    };
    refused(&without, "working_set_ms is given without working_set_path");
    let hidden = fs::read_dir(path).unwrap().flatten();
    let hidden = hidden.filter(|n| n.file_name().as_encoded_bytes().starts_with(b"."));
    assert_eq!(hidden.count(), 0);
}

#[test]
fn the_cable_of_a_loaded_machine_is_where_it_was_or_is_said_to_be() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    let (ours, _far) = UnixDatagram::pair().unwrap();
    let descriptor = |socket: &UnixDatagram| socket.as_raw_fd().to_string();
    let number = descriptor(&ours);
    let bench = Bench::with(path, Transport::Pci, false, script(), |config| {
        config.network_interfaces.push(NetworkInterface {
            iface_id: "n".into(),
            host_dev_name: number,
            link: LinkKind::Fd,
            ..NetworkInterface::default()
        });
    });
    let set = |bench: &Bench, up| {
        let iface_id = "n".to_owned();
        assert_eq!(
            bench.ask(Command::SetLink { iface_id, up }),
            Ok(Answer::Done)
        );
    };
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    let plugged = bench.snapshot(path, "in", SnapshotType::Full, false);
    assert_eq!(plugged, Ok(Answer::Done));
    set(&bench, false);
    let unplugged = bench.snapshot(path, "out", SnapshotType::Full, false);
    assert_eq!(unplugged, Ok(Answer::Done));
    bench.end();
    let (other, _far) = UnixDatagram::pair().unwrap();
    for (name, anew, is_in) in [
        ("in", None, true),
        ("out", None, false),
        ("in", Some(false), false),
        ("in", Some(true), true),
        ("out", Some(true), true),
    ] {
        let load = SnapshotLoad {
            network_overrides: anew
                .map(|link_up| NetworkOverride {
                    iface_id: "n".into(),
                    host_dev_name: descriptor(&other),
                    link: Some(LinkKind::Fd),
                    link_up,
                    ..NetworkOverride::default()
                })
                .into_iter()
                .collect(),
            ..load(path, name)
        };
        let (mailbox, events) = Mailbox::new();
        let partition = FakePartition::new(Vec::new());
        let (machine, config) = restored(&load, &partition, &mailbox).unwrap();
        let interface = machine.interfaces()[0].clone();
        assert_eq!(interface.link_is_up(), is_in, "{name} {anew:?}");
        let bench = Bench::run(machine, config, mailbox, events, None);
        assert_eq!(bench.state(), State::Paused);
        set(&bench, !is_in);
        assert_eq!(interface.link_is_up(), !is_in, "{name}, paused");
        assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
        set(&bench, is_in);
        assert_eq!(interface.link_is_up(), is_in, "{name}, running");
        bench.end();
    }
}

#[test]
fn a_diff_builds_upon_what_was_before() {
    let dir = TempDir::new().unwrap();
    let mut first = script();
    first[0].push(Step::Compute);
    first[0].push(Step::RamWrite(9 * PAGE, vec![0xee; 1]));
    first[0].push(Step::RamWrite(5 * PAGE, vec![0; 4096]));
    let bench = Bench::new(dir.path(), Transport::Pci, true, first);
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    let path = dir.path();
    assert_eq!(
        bench.snapshot(path, "full", SnapshotType::Full, false),
        Ok(Answer::Done)
    );
    assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    // One that fails takes nothing away from the next.
    assert!(
        bench
            .snapshot(&path.join("nowhere"), "d", SnapshotType::Diff, false)
            .is_err()
    );
    assert_eq!(
        bench.snapshot(path, "diff", SnapshotType::Diff, false),
        Ok(Answer::Done)
    );
    bench.end();
    let blocks = |name: &str| {
        let meta = fs::metadata(path.join(name)).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&meta)
    };
    assert!(blocks("diff.memory") < blocks("full.memory"));
    let partition = FakePartition::new(Vec::new());
    drop(restored(&load(path, "diff"), &partition, &Mailbox::new().0).unwrap());
    let ram = partition.ram().unwrap();
    let mut bytes = [0; 4096];
    ram.read(9 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes[0], 0xee);
    ram.read(5 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096], "a page that became zero");
    ram.read(6 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, [0xab; 4096], "a page of the snapshot before");
    // Moved together, they are found; without the first, that is told.
    let moved = TempDir::new().unwrap();
    for name in ["full.memory", "diff.memory", "diff.state", "disk"] {
        fs::rename(path.join(name), moved.path().join(name)).unwrap();
    }
    assert_eq!(told(&load(moved.path(), "diff")), "");
    fs::remove_file(moved.path().join("full.memory")).unwrap();
    let why = told(&load(moved.path(), "diff"));
    assert!(
        why.contains("full.memory") && why.contains("is the path right?"),
        "{why}"
    );
}

#[test]
fn a_diff_into_the_file_that_it_would_build_upon_has_all_of_memory() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    let mut steps = script();
    steps[0].push(Step::Compute);
    steps[0].push(Step::RamWrite(9 * PAGE, vec![0xe0; 3 * 4096]));
    let bench = Bench::new(path, Transport::Pci, true, steps);
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    let take = |name, kind| bench.snapshot(path, name, kind, false);
    assert_eq!(take("0", SnapshotType::Full), Ok(Answer::Done));
    let memory = |name: &str| {
        let mut bytes = fs::read(path.join(name)).unwrap();
        bytes.truncate(usize::try_from(RAM).unwrap());
        bytes
    };
    let before = memory("0.memory");
    assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    let over = SnapshotCreate {
        snapshot_path: path.join("over.state"),
        mem_file_path: path.join("0.memory"),
        snapshot_type: SnapshotType::Diff,
        ..SnapshotCreate::default()
    };
    assert_eq!(bench.ask(Command::CreateSnapshot(over)), Ok(Answer::Done));
    assert_eq!(take("diff", SnapshotType::Diff), Ok(Answer::Done));
    assert_eq!(take("full", SnapshotType::Full), Ok(Answer::Done));
    bench.end();
    assert!(memory("0.memory") != before);
    assert!(memory("0.memory") == memory("full.memory"));
    // Both can be loaded: the diff behind it builds upon the new one.
    let mut by_name = load(path, "over");
    by_name.mem_backend.as_mut().unwrap().backend_path = path.join("0.memory");
    assert_eq!(told(&by_name), "");
    assert_eq!(told(&load(path, "diff")), "");
}

/// A full snapshot "0" and two diffs, "1" and "2", of a guest that goes on writing.
fn chain(dir: &Path) {
    let mut steps = script();
    for page in [9, 5000] {
        steps[0].push(Step::Compute);
        steps[0].push(Step::RamWrite(page * PAGE, vec![0xe0; 3 * 4096]));
        // One that becomes zero.
        steps[0].push(Step::RamWrite(6 * PAGE, vec![0; 4096]));
    }
    let bench = Bench::new(dir, Transport::Pci, true, steps);
    for (name, kind) in [
        ("0", SnapshotType::Full),
        ("1", SnapshotType::Diff),
        ("2", SnapshotType::Diff),
    ] {
        std::thread::sleep(std::time::Duration::from_millis(50));
        pause(&bench);
        assert_eq!(bench.snapshot(dir, name, kind, false), Ok(Answer::Done));
        assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    }
    bench.end();
}

/// All memory of a snapshot but the two pages that each load writes: the generation id's and the clock's.
fn all_memory(load: &SnapshotLoad) -> Vec<u8> {
    let partition = FakePartition::new(Vec::new());
    drop(restored(load, &partition, &Mailbox::new().0).unwrap());
    let mut bytes = vec![0; usize::try_from(RAM).unwrap()];
    partition.ram().unwrap().read(0, &mut bytes).unwrap();
    let at = usize::try_from(GENERATION_PAGE * PAGE).unwrap();
    bytes[at..at + 2 * 4096].fill(0);
    bytes
}

#[test]
fn memory_in_huge_pages_is_the_same_and_does_not_depend_on_the_files() {
    let dir = TempDir::new().unwrap();
    chain(dir.path());
    let mapped = load(dir.path(), "2");
    let read = SnapshotLoad {
        huge_pages: Some(HugePages::Transparent),
        ..mapped.clone()
    };
    assert!(all_memory(&mapped) == all_memory(&read));
    let partition = FakePartition::new(Vec::new());
    let _machine = restored(&read, &partition, &Mailbox::new().0).unwrap();
    for name in ["0", "1", "2"] {
        let memory = dir.path().join(format!("{name}.memory"));
        let file = File::options().write(true).open(memory).unwrap();
        file.set_len(0).unwrap();
    }
    let mut bytes = [0; 4096];
    partition.ram().unwrap().read(5 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, [0xab; 4096]);
    let gone = told(&read);
    assert!(gone.contains("memory"), "{gone}");
}

#[test]
fn memory_in_pages_of_hugetlbfs_is_the_same_from_files_and_from_a_server() {
    let test = "memory_in_pages_of_hugetlbfs_is_the_same_from_files_and_from_a_server";
    if !may_serve(test) {
        return;
    }
    let Some(_more) = MorePages::make(test, RAM / HUGE_PAGE) else {
        return;
    };
    let dir = TempDir::new().unwrap();
    chain(dir.path());
    let mapped = load(dir.path(), "2");
    let want = all_memory(&mapped);
    let read = SnapshotLoad {
        huge_pages: Some(HugePages::Hugetlb2M),
        ..mapped.clone()
    };
    assert!(all_memory(&read) == want);
    let partition = FakePartition::new(Vec::new());
    let machine = restored(&read, &partition, &Mailbox::new().0).unwrap();
    assert_eq!(partition.ram().unwrap().host_pages(), HostPages::Huge2M);
    drop((machine, partition));
    let backend_path = dir.path().join("u");
    let served = want.clone();
    let server = TestServer::start(&backend_path, move |page| {
        let at = usize::try_from(page * HUGE_PAGE).unwrap();
        Some(served[at..at + usize::try_from(HUGE_PAGE).unwrap()].to_vec())
    });
    let by_server = SnapshotLoad {
        mem_backend: Some(MemoryBackend {
            backend_type: MemoryBackendType::Uffd,
            backend_path,
        }),
        ..read
    };
    let server = server.unwrap();
    let partition = FakePartition::new(Vec::new());
    // It is served for as long as there is a machine.
    let machine = restored(&by_server, &partition, &Mailbox::new().0).unwrap();
    let ram = partition.ram().unwrap();
    for page in
        (0..RAM / PAGE).filter(|page| !(GENERATION_PAGE..GENERATION_PAGE + 2).contains(page))
    {
        let mut bytes = [0; 4096];
        ram.read(page * PAGE, &mut bytes).unwrap();
        let at = usize::try_from(page * PAGE).unwrap();
        assert!(bytes == want[at..at + 4096], "page {page} differs");
    }
    assert_eq!(server.served(), RAM / HUGE_PAGE);
    drop(machine);
}

#[test]
fn a_chain_becomes_one_snapshot_with_the_same_memory() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    chain(path);
    let named = |name: &str, ending: &str| path.join(format!("{name}.{ending}"));
    let mut into = Flatten {
        state: named("2", "state"),
        memory: None,
        into_state: named("flat", "state"),
        into_memory: named("1", "memory"),
    };
    let why = flatten(&into).unwrap_err();
    assert!(why.contains("builds upon"), "{why}");
    into.into_memory = named("flat", "memory");
    let Flattened {
        memory_bytes: bytes,
        memory_id,
    } = flatten(&into).unwrap();
    let file = fs::read(named("flat", "memory")).unwrap();
    assert!(file.ends_with(memory_id.as_bytes()) && memory_id.len() == 32);
    let want = all_memory(&load(path, "2"));
    let first_bytes = [5, 6, 9, 5000].map(|page: usize| want[page * 4096]);
    assert_eq!(first_bytes, [0xab, 0, 0xe0, 0xe0]);
    let flat = all_memory(&load(path, "flat"));
    let pages = flat.chunks(4096).zip(want.chunks(4096)).enumerate();
    let other: Vec<_> = pages
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page)
        .collect();
    assert_eq!(
        other,
        Vec::<usize>::new(),
        "pages that are not those of the chain"
    );
    let used = fs::metadata(named("flat", "memory")).unwrap().blocks() * 512;
    assert!(used <= bytes + (64 << 10), "{used} bytes for {bytes}");
    assert!(bytes < RAM / 2, "{bytes}");
    // Over its own state, too: then the chain is not needed.
    into.into_state = named("2", "state");
    into.into_memory = named("once more", "memory");
    flatten(&into).unwrap();
    for name in ["0", "1", "2"] {
        fs::remove_file(named(name, "memory")).unwrap();
    }
    let mut once_more = load(path, "2");
    once_more.mem_backend = load(path, "once more").mem_backend;
    assert!(all_memory(&once_more) == want);
    assert!(all_memory(&load(path, "flat")) == want);
    // And what is not whole stays as it is.
    fs::remove_file(named("once more", "memory")).unwrap();
    let before = fs::read(named("2", "state")).unwrap();
    into.into_memory = named("new", "memory");
    let why = flatten(&into).unwrap_err();
    assert!(why.contains("once more.memory"), "{why}");
    assert_eq!(fs::read(named("2", "state")).unwrap(), before);
    assert!(!named("new", "memory").exists());
}

#[test]
fn a_snapshot_is_verified_without_a_machine() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    chain(path);
    let state = path.join("2.state");
    let verified = verify(&state, None);
    assert_eq!(verified.wrong, Vec::<String>::new());
    let found = verified.found.join("\n");
    for part in [
        "2.state: form 1, of Alveole 0",
        "2 processors, 64 MiB, 1 drives",
        "section \"cpu 1\": version 1",
        "0.memory: full, ",
        "2.memory: diff, ",
        "of 16384 pages",
        "drive a: ",
    ] {
        assert!(found.contains(part), "{found} / {part}");
    }
    let wrong = |memory: Option<&Path>, parts: &[&str]| {
        let Verified { wrong, .. } = verify(&state, memory);
        assert_eq!(wrong.len(), parts.len(), "{wrong:?}");
        for (line, part) in wrong.iter().zip(parts) {
            assert!(line.contains(part), "{line} / {part}");
        }
    };
    let (first, other) = (path.join("0.memory"), path.join("1.memory"));
    wrong(Some(&other), &["1.memory\" is not the memory that belongs"]);
    fs::rename(&first, path.join("away")).unwrap();
    fs::remove_file(path.join("disk")).unwrap();
    // All that is wrong is told.
    wrong(None, &["0.memory", "drive \"a\""]);
    fs::rename(path.join("away"), &first).unwrap();
    fs::write(path.join("disk"), "x").unwrap();
    File::options()
        .write(true)
        .open(&other)
        .unwrap()
        .set_len(RAM)
        .unwrap();
    wrong(None, &["1.memory\" is not the memory that belongs"]);
    let good = fs::read(&state).unwrap();
    for (kind, parts) in [
        ("cpu 1", &["no section \"cpu 1\""][..]),
        ("partition", &["no section \"partition\""]),
        ("memory", &["no section \"memory\""]),
        ("machine", &["no section \"machine\""]),
    ] {
        with_section(&state, kind, |section| section.kind = "other".into());
        let Verified { wrong, .. } = verify(&state, None);
        assert!(
            wrong.iter().any(|line| line.contains(parts[0])),
            "{wrong:?}"
        );
        fs::write(&state, &good).unwrap();
    }
    // Of a byte that is another one, wherever: it is told.
    for at in (0..good.len()).step_by(97) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&state, &bad).unwrap();
        assert!(!verify(&state, None).wrong.is_empty(), "byte {at}");
    }
    fs::write(&state, &good[..good.len() / 2]).unwrap();
    wrong(None, &["2.state"]);
    assert!(!verify(&path.join("none"), None).wrong.is_empty());
}

/// A machine that notes nothing from its beginning, and writes a page whenever it is looked at.
fn writing_on(dir: &Path) -> Bench {
    let mut steps = script();
    for page in 1..=80 {
        steps[0].push(Step::Compute);
        let bytes = vec![u8::try_from(page).unwrap(); 4096];
        steps[0].push(Step::RamWrite((100 + page) * PAGE, bytes));
    }
    Bench::new(dir, Transport::Pci, false, steps)
}

fn create(dir: &Path, name: &str, kind: SnapshotType, live: bool) -> SnapshotCreate {
    SnapshotCreate {
        snapshot_path: dir.join(format!("{name}.state")),
        mem_file_path: dir.join(format!("{name}.memory")),
        snapshot_type: kind,
        live,
        sync: false,
        ..SnapshotCreate::default()
    }
}

/// The ids of the memory files that the snapshot in this folder is made of.
fn layer_ids(dir: &Path, name: &str) -> Vec<String> {
    let state = fs::read(dir.join(format!("{name}.state"))).unwrap();
    let memory = StateFile::read(&state).unwrap().take("memory").unwrap();
    let memory: Value = serde_json::from_slice(&memory.bytes).unwrap();
    let layers = memory["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["id"].as_str().unwrap().to_owned())
        .collect()
}

fn pages_of(dir: &Path, name: &str, layer: usize) -> u64 {
    let state = fs::read(dir.join(format!("{name}.state"))).unwrap();
    let runs = data_runs_of(&state, layer);
    runs.iter().map(|(_, pages)| pages).sum()
}

#[test]
fn what_is_written_may_be_noted_from_a_snapshot_on() {
    for live in [false, true] {
        let dir = TempDir::new().unwrap();
        let path = dir.path();
        let bench = writing_on(path);
        std::thread::sleep(std::time::Duration::from_millis(50));
        let (full, diff) = (SnapshotType::Full, SnapshotType::Diff);
        let take = |create: SnapshotCreate| {
            if !live {
                pause(&bench);
            }
            let outcome = bench.ask(Command::CreateSnapshot(create));
            if !live {
                assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            outcome
        };
        let tracks = |create: SnapshotCreate| SnapshotCreate {
            track_dirty_pages: true,
            ..create
        };
        let passing = |create: SnapshotCreate| SnapshotCreate {
            is_base: false,
            ..create
        };
        let why = take(passing(tracks(create(path, "0", full, live)))).unwrap_err();
        assert!(why.to_string().contains("is_base"), "{why}");
        // One that fails begins nothing: the next has all.
        take(tracks(create(&path.join("nowhere"), "0", full, live))).unwrap_err();
        take(create(path, "all", diff, live)).unwrap();
        assert_eq!(layer_ids(path, "all").len(), 1);
        take(tracks(create(path, "0", diff, live))).unwrap();
        // This is in the next one, too.
        take(passing(create(path, "passing", diff, live))).unwrap();
        take(create(path, "1", diff, live)).unwrap();
        pause(&bench);
        let last = bench.ask(Command::CreateSnapshot(create(path, "2", diff, live)));
        let whole = passing(create(path, "whole", full, live));
        bench.ask(Command::CreateSnapshot(whole)).unwrap();
        let ids = layer_ids(path, "2");
        assert_eq!(ids.len(), 3);
        assert_eq!(ids[..2], layer_ids(path, "1"));
        assert_eq!(ids[..1], layer_ids(path, "0"));
        assert_eq!(ids[..1], layer_ids(path, "passing")[..1]);
        if let Ok(Answer::Snapshot(last)) = last {
            assert_eq!(last.memory_ids, ids);
        }
        bench.end();
        let pages = [0, 1, 2].map(|layer| pages_of(path, "2", layer));
        println!("live {live}: {pages:?} pages");
        assert!(pages[0] > 4 && pages[1] > 0, "{pages:?}");
        assert!(pages[1] < 20 && pages[2] < 20, "{pages:?}");
        let want = all_memory(&load(path, "whole"));
        assert!(want[105 * 4096] == 5, "it has not written");
        assert!(all_memory(&load(path, "2")) == want);
    }
}

#[test]
fn a_chain_is_no_longer_than_one_that_can_be_loaded() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    let bench = Bench::new(path, Transport::Pci, true, script());
    std::thread::sleep(std::time::Duration::from_millis(50));
    pause(&bench);
    let take =
        |name: &str, kind| bench.ask(Command::CreateSnapshot(create(path, name, kind, false)));
    for number in 0..MAX_LAYERS {
        take(&number.to_string(), SnapshotType::Diff).unwrap();
    }
    let why = take("one-more", SnapshotType::Diff)
        .unwrap_err()
        .to_string();
    assert!(why.contains("256 memory files"), "{why}");
    assert!(why.contains("flatten") && why.contains("Full"), "{why}");
    assert!(!path.join("one-more.memory").exists());
    take("full", SnapshotType::Full).unwrap();
    take("one-more", SnapshotType::Diff).unwrap();
    bench.end();
    assert_eq!(layer_ids(path, "one-more").len(), 2);
    let longest = (MAX_LAYERS - 1).to_string();
    assert_eq!(layer_ids(path, &longest).len(), MAX_LAYERS);
    assert_eq!(told(&load(path, &longest)), "");
}

/// Whoever keeps the files of a chain together, and calls all of them the same, adds their ids.
#[test]
fn files_of_a_chain_are_found_beside_the_state_by_their_ids() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    chain(path);
    let want = all_memory(&load(path, "2"));
    let ids = layer_ids(path, "2");
    let moved = path.join("moved");
    fs::create_dir(&moved).unwrap();
    for name in ["0", "1"] {
        let (from, id) = (
            format!("{name}.memory"),
            &ids[name.parse::<usize>().unwrap()],
        );
        fs::copy(path.join(&from), moved.join(format!("{from}-{id}"))).unwrap();
        // Another one has its name, where it was written and beside the state.
        for folder in [path, &moved] {
            fs::copy(path.join("2.memory"), folder.join(&from)).unwrap();
        }
    }
    for name in ["2.state", "2.memory", "disk"] {
        fs::copy(path.join(name), moved.join(name)).unwrap();
    }
    assert!(all_memory(&load(&moved, "2")) == want);
    let Verified { found, wrong } = verify(&moved.join("2.state"), None);
    assert_eq!(wrong, Vec::<String>::new());
    assert!(found.join("\n").contains(&ids[0]), "{found:?}");
    let into = Flatten {
        state: moved.join("2.state"),
        memory: None,
        into_state: moved.join("flat.state"),
        into_memory: moved.join("flat.memory"),
    };
    flatten(&into).unwrap();
    assert!(all_memory(&load(&moved, "flat")) == want);
    fs::remove_file(moved.join(format!("0.memory-{}", ids[0]))).unwrap();
    let why = told(&load(&moved, "2"));
    assert!(
        why.contains("0.memory") && why.contains("its id is"),
        "{why}"
    );
}

/// The page of the generation id.
const GENERATION_PAGE: u64 = 0xf0;

#[test]
fn what_a_load_has_written_is_in_the_next_diff() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    taken(path, "s", Transport::Pci);
    let load = SnapshotLoad {
        track_dirty_pages: true,
        ..load(path, "s")
    };
    let (mailbox, events) = Mailbox::new();
    let partition = FakePartition::new(Vec::new());
    let (machine, config) = restored(&load, &partition, &mailbox).unwrap();
    let bench = Bench::run(machine, config, mailbox, events, None);
    assert_eq!(
        bench.snapshot(path, "d", SnapshotType::Diff, false),
        Ok(Answer::Done)
    );
    bench.end();
    let runs = data_runs_of(&fs::read(path.join("d.state")).unwrap(), 1);
    let has = |page: u64| {
        runs.iter()
            .any(|(first, pages)| (*first..first + pages).contains(&page))
    };
    assert!(has(GENERATION_PAGE), "{runs:?}");
    assert!(!has(5), "nobody wrote that one: {runs:?}");
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path();
    taken(path, "a", Transport::Mmio);
    taken(path, "b", Transport::Mmio);
    let mixed = SnapshotLoad {
        mem_backend: load(path, "b").mem_backend,
        ..load(path, "a")
    };
    let expect = |load: &SnapshotLoad, part: &str| {
        let why = told(load);
        assert!(why.contains(part), "{why} / {part}");
    };
    expect(
        &mixed,
        "not the memory that belongs to the snapshot: its id is",
    );
    let state = SnapshotLoad {
        snapshot_path: path.join("a.memory"),
        ..load(path, "a")
    };
    expect(&state, "does not begin as one");
    let memory = File::options()
        .write(true)
        .open(path.join("a.memory"))
        .unwrap();
    memory.set_len(RAM - PAGE).unwrap();
    expect(&load(path, "a"), "it was cut");
    memory.set_len(RAM + 56).unwrap();
    expect(&load(path, "a"), "no mark");
    fs::remove_file(path.join("a.memory")).unwrap();
    expect(&load(path, "a"), "a.memory\": No such file");
    let uffd = SnapshotLoad {
        mem_backend: Some(MemoryBackend {
            backend_type: MemoryBackendType::Uffd,
            backend_path: path.join("u"),
        }),
        ..load(path, "b")
    };
    expect(&uffd, "u\", where a process is to serve guest memory");
    expect(&uffd, "there is no such socket");
    let drive = SnapshotLoad {
        drive_overrides: vec![DriveOverride {
            drive_id: "z".into(),
            path_on_host: "z".into(),
            ..DriveOverride::default()
        }],
        ..load(path, "b")
    };
    expect(&drive, "drive \"z\"; the snapshot has a");
    fs::write(path.join("disk"), vec![7; 1 << 19]).unwrap();
    expect(
        &load(path, "b"),
        "its disk had 1048576 bytes, this one has 524288",
    );
    fs::remove_file(path.join("disk")).unwrap();
    expect(&load(path, "b"), "disk");
}

/// The snapshot by this name, its memory served at `u` by a thread that has all pages but `withheld`.
fn load_served(dir: &Path, name: &str, withheld: Option<u64>) -> (SnapshotLoad, TestServer) {
    let backend_path = dir.join("u");
    let _ = fs::remove_file(&backend_path);
    let memory = File::open(dir.join(format!("{name}.memory"))).unwrap();
    let server = TestServer::start(&backend_path, move |page| {
        let mut bytes = vec![0; 4096];
        memory.read_exact_at(&mut bytes, page * PAGE).unwrap();
        (Some(page) != withheld).then_some(bytes)
    });
    let load = SnapshotLoad {
        mem_backend: Some(MemoryBackend {
            backend_type: MemoryBackendType::Uffd,
            backend_path,
        }),
        ..load(dir, name)
    };
    (load, server.unwrap())
}

/// A machine whose processor waits for a page that its server does not put in.
fn hanging(dir: &Path) -> (Bench, TestServer) {
    taken(dir, "s", Transport::Mmio);
    let (load, server) = load_served(dir, "s", Some(100));
    let (mailbox, events) = Mailbox::new();
    let script = vec![vec![Step::RamWrite(100 * PAGE, vec![1])]];
    let partition = FakePartition::new(script);
    let (machine, config) = restored(&load, &partition, &mailbox).unwrap();
    let asked = server.asked();
    let bench = Bench::run(machine, config, mailbox, events, None);
    assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
    let until = Instant::now() + PATIENCE;
    while server.asked() == asked {
        assert!(Instant::now() < until, "nobody asked for the page");
        std::thread::yield_now();
    }
    (bench, server)
}

#[test]
fn memory_that_another_process_serves_is_that_of_the_snapshot() {
    if !may_serve("memory_that_another_process_serves_is_that_of_the_snapshot") {
        return;
    }
    let dir = TempDir::new().unwrap();
    taken(dir.path(), "s", Transport::Pci);
    let (served, server) = load_served(dir.path(), "s", None);
    goes_on(&served);
    assert!(server.served() > 0);
    drop(server);
    // What nobody has touched is in a snapshot of it, too.
    for (name, live) in [("t", false), ("u2", true)] {
        let (served, server) = load_served(dir.path(), "s", None);
        let (mailbox, events) = Mailbox::new();
        let partition = FakePartition::new(Vec::new());
        let (machine, config) = restored(&served, &partition, &mailbox).unwrap();
        let bench = Bench::run(machine, config, mailbox, events, None);
        if live {
            assert_eq!(bench.ask(Command::Resume), Ok(Answer::Done));
        }
        let outcome = bench.snapshot(dir.path(), name, SnapshotType::Full, live);
        assert!(outcome.is_ok(), "{outcome:?}");
        assert_eq!(server.served(), RAM / PAGE);
        bench.end();
        goes_on(&load(dir.path(), name));
    }
}

#[test]
fn a_machine_ends_with_words_when_what_serves_its_memory_dies() {
    if !may_serve("a_machine_ends_with_words_when_what_serves_its_memory_dies") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (bench, server) = hanging(dir.path());
    server.stop();
    let (end, _) = bench.ended.recv_timeout(PATIENCE).unwrap();
    let End::HostError(why) = end else {
        panic!("{end:?}");
    };
    assert!(
        why.contains("the process that serves guest memory at"),
        "{why}"
    );
    assert!(why.contains("is gone; start it anew"), "{why}");
}

#[test]
fn a_page_that_never_comes_keeps_no_signal_from_ending_the_machine() {
    if !may_serve("a_page_that_never_comes_keeps_no_signal_from_ending_the_machine") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (bench, server) = hanging(dir.path());
    // Nor does a client who waits for a pause that cannot be.
    let (to, from) = mpsc::channel();
    let reply = Reply::new(move |outcome| drop(to.send(outcome)));
    let command = Command::Pause;
    bench
        .mailbox
        .send(Event::Request(Request { command, reply }));
    assert!(
        from.recv_timeout(std::time::Duration::from_millis(100))
            .is_err()
    );
    bench.end();
    drop(server);
}

#[test]
fn what_serves_memory_and_dies_before_there_is_a_machine_is_told() {
    if !may_serve("what_serves_memory_and_dies_before_there_is_a_machine_is_told") {
        return;
    }
    let dir = TempDir::new().unwrap();
    taken(dir.path(), "s", Transport::Mmio);
    let (served, server) = load_served(dir.path(), "s", None);
    let snapshot = Snapshot::open(&served).unwrap();
    server.stop();
    drop(snapshot);
    // It listens no more.
    assert!(told(&served).contains("nobody listens there"));
    // It dies when it is first asked for a page.
    fs::remove_file(dir.path().join("u")).unwrap();
    let server = TestServer::start(&dir.path().join("u"), |_| None).unwrap();
    let killer = std::thread::spawn(move || {
        while server.asked() == 0 {
            std::thread::yield_now();
        }
        server.stop();
    });
    let why = told(&served);
    assert!(why.contains("is gone; start it anew"), "{why}");
    killer.join().unwrap();
}

/// The state file of a snapshot with one section changed.
fn with_section(path: &Path, kind: &str, change: impl FnOnce(&mut SavedState)) {
    let mut file = StateFile::read(&fs::read(path).unwrap()).unwrap();
    let mut section = file.take(kind).unwrap();
    change(&mut section);
    file.add(section);
    fs::write(path, file.to_bytes()).unwrap();
}

fn kinds(path: &Path) -> Vec<String> {
    let file = StateFile::read(&fs::read(path).unwrap()).unwrap();
    file.sections().map(|s| s.kind.clone()).collect()
}

#[test]
fn each_section_that_is_missing_newer_or_odd_is_named() {
    let dir = TempDir::new().unwrap();
    taken(dir.path(), "s", Transport::Pci);
    let load = load(dir.path(), "s");
    let path = &load.snapshot_path;
    let good = fs::read(path).unwrap();
    let all = kinds(path);
    assert!(all.len() > 10, "{all:?}");
    for kind in &all {
        with_section(path, kind, |section| section.version += 1);
        let why = told(&load);
        // The description's version is that of the API, whose fields say themselves what they are.
        assert!(
            why.contains("version") || kind == "description",
            "{kind}: {why}"
        );
        fs::write(path, &good).unwrap();

        with_section(path, kind, |section| section.kind = "other".into());
        let why = told(&load);
        assert!(
            why.contains(&format!("no section {kind:?}")),
            "{kind}: {why}"
        );
        fs::write(path, &good).unwrap();

        with_section(path, kind, |section| section.bytes = b"{\"x\": 1}".to_vec());
        let why = told(&load);
        assert!(why.contains('x') || why.contains(kind), "{kind}: {why}");
        fs::write(path, &good).unwrap();
    }
    let mut more = StateFile::read(&good).unwrap();
    more.add(SavedState::pack("device 99", 1, &1));
    fs::write(path, more.to_bytes()).unwrap();
    let why = told(&load);
    assert!(why.contains("device 99"), "{why}");
}

/// A guest that waits for an interrupt of its serial port would wait for ever.
#[test]
fn an_interrupt_that_the_guest_has_not_taken_is_raised_again() {
    let dir = TempDir::new().unwrap();
    taken(dir.path(), "s", Transport::Mmio);
    let load = load(dir.path(), "s");
    with_section(&load.snapshot_path, "serial", |section| {
        let mut uart: Value = serde_json::from_slice(&section.bytes).unwrap();
        // 16550: told when the transmitter is empty, and it is.
        (uart["ier"], uart["iir"]) = (2.into(), 2.into());
        section.bytes = serde_json::to_vec(&uart).unwrap();
    });
    let partition = FakePartition::new(Vec::new());
    let _machine = restored(&load, &partition, &Mailbox::new().0).unwrap();
    let raised = partition.lines().into_iter();
    let raised = raised.filter_map(|(gsi, line)| (line.take_edges() > 0).then_some(gsi));
    assert_eq!(raised.collect::<Vec<_>>(), [4]);
}

/// Replaces the `at`th number, text or list in `value`.
fn spoil(value: &mut Value, at: &mut usize, with: &Value) -> bool {
    if *at == 0 {
        *value = with.clone();
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(all) => all.iter_mut().any(|v| spoil(v, at, with)),
        Value::Object(all) => all.iter_mut().any(|(_, v)| spoil(v, at, with)),
        _ => false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever stands anywhere in a state: it is loaded or refused, and nothing panics.
    #[test]
    fn a_hostile_state_is_loaded_or_refused(section in 0usize..64, at in 0usize..4000, with in 0usize..9) {
        let dir = TempDir::new().unwrap();
        static GOOD: std::sync::OnceLock<(Vec<u8>, TempDir)> = std::sync::OnceLock::new();
        let (good, from) = GOOD.get_or_init(|| {
            let dir = TempDir::new().unwrap();
            taken(dir.path(), "s", Transport::Pci);
            (fs::read(dir.path().join("s.state")).unwrap(), dir)
        });
        let mut load = load(from.path(), "s");
        load.snapshot_path = dir.path().join("bad");
        load.vsock_override = Some(VsockOverride { uds_path: dir.path().join("v") });
        fs::write(&load.snapshot_path, good).unwrap();
        let all = kinds(&load.snapshot_path);
        let kind = &all[section % all.len()];
        let with = [
            Value::Null, 0.into(), 1.into(), (-1).into(), u64::MAX.into(), u32::MAX.into(), "x".into(),
            Value::Array(vec![0.into(); 70_000]), Value::Array(Vec::new()),
        ][with].clone();
        with_section(&load.snapshot_path, kind, |section| {
            let mut value: Value = serde_json::from_slice(&section.bytes).unwrap();
            let mut at = at;
            spoil(&mut value, &mut at, &with);
            section.bytes = serde_json::to_vec(&value).unwrap();
        });
        // What it says is for people; that it says anything, and lives, is what counts.
        let _ = told(&load);
    }
}

/// Where snapshots of released versions are.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/snapshots")
}

/// Which pages the memory file of a full snapshot has, from its state.
fn data_runs(state: &[u8]) -> Vec<(u64, u64)> {
    data_runs_of(state, 0)
}

/// Which pages a memory file has, from the state that names it as this layer.
fn data_runs_of(state: &[u8], layer: usize) -> Vec<(u64, u64)> {
    let mut file = StateFile::read(state).unwrap();
    let memory: Value = serde_json::from_slice(&file.take("memory").unwrap().bytes).unwrap();
    let runs = memory["layers"][layer]["map"].as_array().unwrap().clone();
    let number = |run: &Value, name: &str| run[name].as_u64().unwrap();
    runs.iter()
        .filter(|run| run["kind"] == "data")
        .map(|run| (number(run, "first_page"), number(run, "pages")))
        .collect()
}

/// A golden snapshot is its state, and of its memory the pages that are not zero, one after the other, and then the mark.
#[test]
fn snapshots_of_every_released_version_are_loaded() {
    if std::env::var_os(UPDATE).is_some() {
        for (name, transport) in [("mmio", Transport::Mmio), ("pci", Transport::Pci)] {
            let dir = TempDir::new().unwrap();
            taken(dir.path(), name, transport);
            let state = fs::read(dir.path().join(format!("{name}.state"))).unwrap();
            let memory = fs::read(dir.path().join(format!("{name}.memory"))).unwrap();
            let mut packed = Vec::new();
            for (first, pages) in data_runs(&state) {
                let at = usize::try_from(first * PAGE).unwrap();
                let len = usize::try_from(pages * PAGE).unwrap();
                packed.extend_from_slice(&memory[at..at + len]);
            }
            packed.extend_from_slice(&memory[usize::try_from(RAM).unwrap()..]);
            let to = golden().join(SNAPSHOT_VERSION);
            fs::create_dir_all(&to).unwrap();
            fs::write(to.join(format!("{name}.state")), state).unwrap();
            fs::write(to.join(format!("{name}.pages")), packed).unwrap();
        }
    }
    let mut seen = 0;
    for version in fs::read_dir(golden()).unwrap().flatten() {
        if !version.path().is_dir() {
            continue;
        }
        for name in ["mmio", "pci"] {
            let dir = TempDir::new().unwrap();
            let state = fs::read(version.path().join(format!("{name}.state"))).unwrap();
            let packed = fs::read(version.path().join(format!("{name}.pages"))).unwrap();
            let memory = File::create(dir.path().join(format!("{name}.memory"))).unwrap();
            let mut rest = &packed[..];
            for (first, pages) in data_runs(&state) {
                let (run, after) = rest.split_at(usize::try_from(pages * PAGE).unwrap());
                memory.write_all_at(run, first * PAGE).unwrap();
                rest = after;
            }
            memory.write_all_at(rest, RAM).unwrap();
            fs::write(dir.path().join(format!("{name}.state")), state).unwrap();
            fs::write(dir.path().join("disk"), vec![7; 1 << 20]).unwrap();
            goes_on(&load(dir.path(), name));
            seen += 1;
        }
    }
    assert!(seen >= 2, "there are none");
}
