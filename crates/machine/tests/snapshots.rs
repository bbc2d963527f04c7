//! Snapshots on the scripted hypervisor: what is saved is restored, those of every released version are loaded, and what a hostile
//! hand has made of one is refused with words.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/whole_machine.rs uses the rest")]
mod scripted;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use alveole_guest_memory::test_server::{TestServer, may_serve};
use alveole_hypervisor::fake::{FakePartition, Step};
use alveole_machine::{
    Desk, End, Event, Files, HostResources, Identity, Machine, Mailbox, Options, SNAPSHOT_VERSION,
    Snapshot, Transport, restore, validate,
};
use alveole_mmds::Metadata;
use alveole_saved_state::{SavedState, StateFile};
use alveole_serial::{Console, ConsoleTarget};
use alveole_vm_config::{
    Drive, DriveOverride, Entropy, MemoryBackend, MemoryBackendType, SnapshotCreate, SnapshotLoad,
    SnapshotType, VmConfig, Vsock, VsockOverride,
};
use alveole_vm_control::{Answer, Command, Refusal, Reply, Request, State};
use proptest::prelude::*;
use scripted::{PATIENCE, machine_of};
use serde_json::Value;
use tempfile::TempDir;

const PAGE: u64 = 4096;
/// RAM of the machine, in bytes.
const RAM: u64 = 64 << 20;
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
    let over = SnapshotCreate {
        snapshot_path: path.join("diff.state"),
        mem_file_path: path.join("full.memory"),
        snapshot_type: SnapshotType::Diff,
        live: false,
    };
    let why = bench
        .ask(Command::CreateSnapshot(over))
        .unwrap_err()
        .to_string();
    assert!(why.contains("builds upon"), "{why}");
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
