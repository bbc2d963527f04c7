//! Whole machines on the scripted hypervisor: no KVM, no kernel, every end and every order of events.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod scripted;

use std::fs;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use alveole_hypervisor::fake::{self, FakePartition, Step};
use alveole_hypervisor::{CpuidEntry, InitialState, StuckReason, find_leaf};
use alveole_machine::{End, Event, Mailbox};
use alveole_serial::ConsoleEvent;
use alveole_vm_config::{Body, CpuConfig, CpuConfigSource, CpuTemplate, Drive, Entropy};
use proptest::prelude::*;
use scripted::code::{CODE_ADDR, kernel_of_size};
use scripted::{Outcome, PATIENCE, machine, machine_with, run_on};
use tempfile::TempDir;

/// The ports of the machine that scripts use.
const SERIAL: u16 = 0x3f8;
const PANIC: u16 = 0x505;
const POWER: u16 = 0x600;
const RESET: u16 = 0x602;
const KEYBOARD: u16 = 0x64;
const GENERATION_ID: u64 = 0xf_0000;
const BOOT_TIMER: u64 = 0xc000_0000;

fn power_off() -> Step {
    Step::PortWrite(POWER, vec![0x34])
}

fn reset() -> Step {
    Step::PortWrite(RESET, vec![1])
}

fn panic() -> Step {
    Step::PortWrite(PANIC, vec![1])
}

/// Builds and runs a machine whose processor `i` plays `scripts[i]`, and sends it `events`.
fn run(scripts: Vec<Vec<Step>>, events: Vec<Event>) -> Outcome {
    let cpus = u8::try_from(scripts.len()).unwrap();
    run_on(cpus, FakePartition::new(scripts), events)
}

// ---- what the guest finds ----

#[test]
fn a_guest_finds_its_tables_its_features_and_its_first_state() {
    let partition = FakePartition::new(vec![vec![power_off()]]);
    let outcome = run_on(3, partition.clone(), Vec::new());
    assert!(
        matches!(outcome.end, End::PowerOff { cpu: 0, .. }),
        "{outcome:?}"
    );

    let ram = partition.ram().unwrap();
    let mut code = [0];
    ram.read(CODE_ADDR, &mut code).unwrap();
    assert_eq!(code, [0xf4], "the kernel lies where it wants to be");

    let configured = partition.configured();
    let ids: Vec<u32> = configured.iter().map(|(id, ..)| *id).collect();
    assert_eq!(ids, [0, 1, 2]);
    let InitialState::Long64 { rip, rsi, .. } = configured[0].2 else {
        panic!("{:?}", configured[0].2);
    };
    assert_eq!(rip, CODE_ADDR);
    for (id, cpuid, state) in &configured {
        assert_eq!(
            *id == 0,
            *state != InitialState::WaitForStartup,
            "processor {id}"
        );
        let features = find_leaf(cpuid, 1, 0).unwrap();
        assert_eq!(features.ebx >> 24, *id, "leaf 1 has the APIC id");
        let topology = find_leaf(cpuid, 0xb, 0).unwrap();
        assert_eq!(topology.edx, *id, "leaf 0xb has the x2APIC id");
    }

    // boot_params.acpi_rsdp_addr leads to the tables.
    let mut addr = [0; 8];
    ram.read(rsi + 0x70, &mut addr).unwrap();
    let mut rsdp = [0; 36];
    ram.read(u64::from_le_bytes(addr), &mut rsdp).unwrap();
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(
        rsdp.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)),
        0,
        "checksum"
    );
    let xsdt = u64::from_le_bytes(rsdp[24..32].try_into().unwrap());
    let mut head = [0; 36];
    ram.read(xsdt, &mut head).unwrap();
    assert_eq!(&head[..4], b"XSDT");
    let mut entries = vec![0; u32::from_le_bytes(head[4..8].try_into().unwrap()) as usize - 36];
    ram.read(xsdt + 36, &mut entries).unwrap();
    let mut names: Vec<[u8; 4]> = entries
        .chunks_exact(8)
        .map(|entry| {
            let mut name = [0; 4];
            ram.read(u64::from_le_bytes(entry.try_into().unwrap()), &mut name)
                .unwrap();
            name
        })
        .collect();
    names.sort_unstable();
    assert_eq!(names, [*b"APIC", *b"FACP"]);

    let mut lines: Vec<u32> = partition.lines().into_iter().map(|(gsi, _)| gsi).collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [1, 3, 4, 5],
        "keyboard, generation id, serial port and power button"
    );
}

#[test]
fn every_machine_has_a_generation_id_of_its_own_and_is_told_of_a_new_one() {
    let partition = FakePartition::new(Vec::new());
    let id = |partition: &FakePartition| {
        let mut id = [0; 16];
        partition
            .ram()
            .unwrap()
            .read(GENERATION_ID, &mut id)
            .unwrap();
        id
    };
    let dir = TempDir::new().unwrap();
    let built = |partition: &FakePartition| {
        machine_with(&dir, 1, partition.clone(), &Mailbox::new().0, |_| {}).unwrap()
    };
    let machine = built(&partition);
    let first = id(&partition);
    assert_ne!(first, [0; 16]);
    let other = FakePartition::new(Vec::new());
    drop(built(&other));
    assert_ne!(id(&other), first);

    machine
        .generation()
        .renew(&partition.ram().unwrap())
        .unwrap();
    assert_ne!(id(&partition), first);
    machine.generation().announce();
    let lines = partition.lines();
    let (_, line) = lines.iter().find(|(gsi, _)| *gsi == 3).unwrap();
    assert_eq!(line.take_edges(), 1);
}

/// A machine of `cpus` processors whose description has this `cpu-config`.
fn build_with_cpu_config(partition: &FakePartition, cpus: u8, text: &str) -> Result<(), String> {
    let dir = TempDir::new().unwrap();
    let cpu_config = CpuConfig::from_json_bytes(text.as_bytes(), "body").unwrap();
    let built = machine_with(&dir, cpus, partition.clone(), &Mailbox::new().0, |config| {
        config.cpu_config = Some(CpuConfigSource::Here(cpu_config));
    });
    built.map(drop).map_err(|e| {
        assert!(e.blames_description(), "{e}");
        e.to_string()
    })
}

#[test]
fn every_processor_says_what_the_description_wants() {
    let partition = FakePartition::new(Vec::new());
    let text = r#"{
      "kvm_capabilities": ["121", "7", "!7", "!8"],
      "cpuid_modifiers": [
        { "leaf": "1", "subleaf": "0", "flags": 0, "modifiers": [
          { "register": "edx", "bitmap": "0b0xxxxxxxxx" },
          { "register": "ebx", "bitmap": "0b00000000000000000000000011111111" },
          { "register": "ecx", "bitmap": "0b0xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" } ] }
      ],
      "msr_modifiers": [
        { "addr": "0x10a", "bitmap": "0b1xx0xxxxxxxx" },
        { "addr": "0x3a", "bitmap": "0bx" }
      ]
    }"#;
    build_with_cpu_config(&partition, 3, text).unwrap();
    let configured = partition.configured();
    assert_eq!(configured.len(), 3);
    for (id, cpuid, _) in configured {
        let one = find_leaf(&cpuid, 1, 0).unwrap();
        assert_eq!(one.edx & (1 << 9), 0, "supported, and cleared");
        assert_eq!(one.ebx, id << 24 | 3 << 16 | 0xff, "its place is its own");
        assert_eq!(one.ecx >> 31, 0, "added by us, and cleared");
        assert_ne!(one.ecx & (1 << 21), 0, "added by us, and not named");
        let [(capabilities, before), _] = fake::MSRS;
        assert_eq!((capabilities, before), (0x10a, 0xff00));
        assert_eq!(partition.msr(id, 0x10a), Some(0xfe00));
        assert_eq!(partition.msr(id, 0x3a), Some(1), "named, and left");
        assert_eq!(partition.msr(id, 0x8b), None);
    }
}

/// A host whose processors have every feature, of this maker and model.
fn host(maker: &[u8; 12], eax: u32) -> FakePartition {
    let part = |at: usize| u32::from_le_bytes(maker[at..at + 4].try_into().unwrap());
    let all = |leaf, subleaf| CpuidEntry {
        leaf,
        subleaf,
        subleaf_matters: matches!(leaf, 7 | 0xd),
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
    };
    let leaves = [
        (7, 0),
        (0xd, 0),
        (0xd, 1),
        (0x8000_0001, 0),
        (0x8000_0008, 0),
    ];
    let mut cpuid = vec![
        CpuidEntry {
            eax: 0xd,
            ebx: part(0),
            edx: part(4),
            ecx: part(8),
            ..all(0, 0)
        },
        CpuidEntry { eax, ..all(1, 0) },
    ];
    cpuid.extend(leaves.map(|(leaf, subleaf)| all(leaf, subleaf)));
    FakePartition::new(Vec::new()).supporting(cpuid)
}

fn build_with_template(partition: &FakePartition, template: CpuTemplate) -> Result<(), String> {
    let dir = TempDir::new().unwrap();
    let built = machine_with(&dir, 2, partition.clone(), &Mailbox::new().0, |config| {
        config.machine_config.cpu_template = Some(template);
    });
    built.map(drop).map_err(|e| {
        assert!(e.blames_description(), "{e}");
        e.to_string()
    })
}

/// The features that Firecracker's templates take away, and the register that two of them set, on the processors that they are for.
#[test]
fn every_processor_says_what_a_template_of_a_name_wants() {
    const AVX512F: u32 = 1 << 16;
    const AVX2: u32 = 1 << 5;
    const MPX_STATE: u32 = 3 << 3;
    const TSX: u32 = 1 << 4 | 1 << 11;
    const CASCADE_LAKE: u32 = 0x5_0657;
    for (template, maker, eax) in [
        (CpuTemplate::C3, b"GenuineIntel", CASCADE_LAKE),
        (CpuTemplate::T2, b"GenuineIntel", CASCADE_LAKE),
        (CpuTemplate::T2S, b"GenuineIntel", CASCADE_LAKE),
        (CpuTemplate::T2CL, b"GenuineIntel", CASCADE_LAKE),
        (CpuTemplate::T2A, b"AuthenticAMD", 0xa0_0f11),
    ] {
        let partition = host(maker, eax);
        build_with_template(&partition, template).unwrap();
        let configured = partition.configured();
        assert_eq!(configured.len(), 2);
        for (id, cpuid, _) in configured {
            let [one, seven, states] =
                [(1, 0), (7, 0), (0xd, 0)].map(|(l, s)| find_leaf(&cpuid, l, s).unwrap());
            assert_eq!(one.ebx >> 24, id, "its place is its own");
            // Of one family and model, whatever the host is: Ivy Bridge for C3, else Haswell.
            let model = if template == CpuTemplate::C3 {
                0x306e4
            } else {
                0x306f2
            };
            assert_eq!(one.eax & 0x0fff_0fff, model, "{template:?}");
            assert_eq!(seven.ebx & (AVX512F | TSX), 0, "{template:?}");
            let avx2 = template != CpuTemplate::C3;
            assert_eq!(seven.ebx & AVX2 != 0, avx2, "{template:?}");
            assert_eq!(states.eax & MPX_STATE, 0, "{template:?}");
            // What it held was 0xff00.
            let capabilities = match template {
                CpuTemplate::T2S => Some(0x0c0a_0c4c),
                // Bits 9 to 12 of it are cleared.
                CpuTemplate::T2CL => Some(0xe100),
                _ => None,
            };
            assert_eq!(partition.msr(id, 0x10a), capabilities, "{template:?}");
        }
    }
}

#[test]
fn a_template_for_another_processor_than_the_hosts_is_refused_before_any_is_made() {
    let partition = host(b"AuthenticAMD", 0xa0_0f11);
    let why = build_with_template(&partition, CpuTemplate::T2).unwrap_err();
    assert!(
        why.contains("T2 is for Skylake (family 6,")
            && why.contains("\"AuthenticAMD\" of family 25"),
        "{why}"
    );
    assert!(partition.configured().is_empty());
    build_with_template(&partition, CpuTemplate::None).unwrap();
}

#[test]
fn everything_that_the_host_cannot_give_is_told_at_once() {
    let partition = FakePartition::new(Vec::new());
    let text = r#"{
      "kvm_capabilities": ["121", "7", "4294967295"],
      "cpuid_modifiers": [
        { "leaf": "0x7", "subleaf": "1", "flags": 1, "modifiers": [] },
        { "leaf": "0x1", "subleaf": "0", "flags": 0, "modifiers": [] }
      ],
      "msr_modifiers": [
        { "addr": "0x10", "bitmap": "0bx" },
        { "addr": "0x10a", "bitmap": "0b1" },
        { "addr": "0x3a", "bitmap": "0b0" }
      ]
    }"#;
    assert_eq!(
        build_with_cpu_config(&partition, 2, text).unwrap_err(),
        "cpu-config cannot be had on this host: the hypervisor lacks capability 7, which kvm_capabilities ask for; the \
         hypervisor lacks capability 4294967295, which kvm_capabilities ask for; CPUID leaf 0x7, subleaf 0x1 cannot be \
         changed: the hypervisor of this host has no such leaf; model-specific register 0x10 cannot be changed: the \
         hypervisor of this host has no such register; model-specific register 0x3a cannot be set to 0x0: the hypervisor \
         of this host refuses that value; take out what it names, or run the guest on a host that has it"
    );
    // No second processor was made for it.
    assert_eq!(partition.configured().len(), 1);

    let capabilities: Vec<String> = (1000..5000).map(|n| n.to_string()).collect();
    let text = format!("{{\"kvm_capabilities\": {capabilities:?}}}");
    let why = build_with_cpu_config(&partition, 1, &text).unwrap_err();
    assert!(
        why.contains("capability 1031,") && !why.contains("1032"),
        "{why}"
    );
    assert!(why.contains("; and 3968 more; take out"), "{why}");
}

#[test]
fn the_guest_reaches_its_serial_port_and_nothing_where_nothing_is() {
    let partition = FakePartition::new(vec![vec![
        Step::PortWriteString(SERIAL, b"hello ".to_vec()),
        Step::PortWrite(SERIAL, b"w".to_vec()),
        Step::PortRead(SERIAL + 5, 1), // line status: room for output
        Step::PortRead(0x1234, 4),
        Step::MmioRead(0xd000_0000, 8),
        Step::PortWrite(0x1234, vec![0; 4]),
        Step::MmioWrite(0xd000_0000, vec![0; 8]),
        power_off(),
    ]]);
    let outcome = run_on(1, partition.clone(), Vec::new());
    assert_eq!(outcome.console, "hello w");
    let reads = partition.reads();
    assert_eq!(reads[0][0] & 0x60, 0x60);
    assert_eq!(reads[1..], [vec![0xff; 4], vec![0xff; 8]]);
}

/// The command line that the kernel of a machine with two disks and an entropy device gets.
fn cmdline_of(args: &str) -> String {
    let dir = TempDir::new().unwrap();
    let partition = FakePartition::new(vec![vec![power_off()]]);
    let drives = ["a", "b"].map(|name| {
        let path_on_host = dir.path().join(name);
        fs::write(&path_on_host, [0; 4096]).unwrap();
        Drive {
            drive_id: name.into(),
            path_on_host,
            ..Drive::default()
        }
    });
    let machine = machine_with(&dir, 1, partition.clone(), &Mailbox::new().0, |config| {
        config.boot_source.boot_args = Some(args.into());
        config.drives = drives.into();
        config.entropy = Some(Entropy::default());
    });
    machine.unwrap();
    let ram = partition.ram().unwrap();
    let InitialState::Long64 { rsi, .. } = partition.configured()[0].2 else {
        panic!("a kernel that is entered elsewhere");
    };
    // boot_params.hdr.cmd_line_ptr
    let mut addr = [0; 4];
    ram.read(rsi + 0x228, &mut addr).unwrap();
    let mut line = [0; 512];
    ram.read(u32::from_le_bytes(addr).into(), &mut line)
        .unwrap();
    let text = line.split(|byte| *byte == 0).next().unwrap();
    String::from_utf8(text.to_vec()).unwrap()
}

#[test]
fn a_kernel_that_reads_no_tables_is_told_of_its_virtio_devices() {
    let told = cmdline_of("quiet acpi=off");
    let devices: Vec<_> = told
        .split(' ')
        .filter(|word| word.starts_with("virtio_mmio"))
        .collect();
    assert_eq!(
        devices,
        [
            "virtio_mmio.device=0x1000@0xc0001000:6",
            "virtio_mmio.device=0x1000@0xc0002000:7",
            "virtio_mmio.device=0x1000@0xc0003000:8",
        ],
        "{told}"
    );
    // Whoever finds them in the tables is not told a second time, and the user's word counts.
    let told = cmdline_of("quiet");
    assert!(!told.contains("virtio_mmio"), "{told}");
    let told = cmdline_of("acpi=off virtio_mmio.device=4K@0xc0002000:7");
    assert_eq!(told.matches("virtio_mmio").count(), 1, "{told}");
}

// ---- ends ----

#[test]
fn every_end_is_told_apart() {
    let line = Step::PortWriteString(SERIAL, b"Kernel panic - not syncing: no tea\n".to_vec());
    let stuck = || StuckReason::Emulation {
        instruction: vec![0x0f, 0x0b],
    };
    let is_panic = |end: &End, text: Option<&str>| {
        matches!(end, End::Panic { message, .. }
            if message.as_deref().is_some_and(|m| text.is_some_and(|t| m.contains(t))) || text.is_none() && message.is_none())
    };
    let end = |steps: Vec<Step>| run(vec![steps], Vec::new()).end;
    assert!(matches!(
        end(vec![power_off()]),
        End::PowerOff { cpu: 0, .. }
    ));
    assert!(matches!(end(vec![reset()]), End::Reboot { cpu: 0, .. }));
    assert!(matches!(
        end(vec![Step::PortWrite(KEYBOARD, vec![0xfe])]),
        End::Reboot { .. }
    ));
    assert!(matches!(
        end(vec![Step::TripleFault]),
        End::TripleFault { cpu: 0, .. }
    ));
    assert!(
        matches!(end(vec![Step::Stuck(stuck())]), End::Stuck { reason, .. } if reason == stuck())
    );
    assert!(matches!(end(vec![Step::Fail]), End::HostError(why) if why.contains("vCPU 0")));
    assert!(is_panic(&end(vec![panic(), reset()]), None));
    assert!(is_panic(&end(vec![panic(), Step::TripleFault]), None));
    assert!(is_panic(&end(vec![line.clone(), reset()]), Some("no tea")));
    assert!(is_panic(
        &end(vec![line.clone(), panic(), Step::TripleFault]),
        Some("no tea")
    ));
    // A guest that panicked and then switches itself off says so itself.
    assert!(matches!(end(vec![line, power_off()]), End::PowerOff { .. }));
    // The processor that asks is named.
    let outcome = run(vec![Vec::new(), Vec::new(), vec![power_off()]], Vec::new());
    assert!(
        matches!(outcome.end, End::PowerOff { cpu: 2, .. }),
        "{outcome:?}"
    );
}

#[test]
fn a_panic_without_a_reset_ends_after_its_grace() {
    let start = Instant::now();
    let outcome = run(vec![vec![panic()]], Vec::new());
    assert!(
        matches!(outcome.end, End::Panic { cpu: 0, .. }),
        "{outcome:?}"
    );
    assert!(
        start.elapsed() >= Duration::from_secs(9),
        "took {:?}",
        start.elapsed()
    );
}

#[test]
fn events_from_outside_end_it_or_do_not() {
    let spin = || vec![Vec::new(), Vec::new()];
    let console = Event::Console;
    let end = |events| run(spin(), events).end;
    assert_eq!(end(vec![console(ConsoleEvent::Quit)]), End::Quit);
    assert_eq!(
        end(vec![console(ConsoleEvent::TerminalLost)]),
        End::TerminalLost
    );
    for number in [1, 2, 3] {
        assert_eq!(end(vec![Event::Signal(number)]), End::Signal(number));
    }
    assert_eq!(
        end(vec![Event::Signal(15), Event::Signal(15)]),
        End::Signal(15)
    );
    assert_eq!(
        end(vec![Event::Signal(15), Event::Signal(2)]),
        End::Signal(2)
    );
    assert_eq!(
        end(vec![Event::LoopEnded("gone".into())]),
        End::HostError("gone".into())
    );

    // The power button is an interrupt for the guest: once each for the key and for the first SIGTERM.
    let partition = FakePartition::new(spin());
    let sent = vec![
        console(ConsoleEvent::PowerButton),
        Event::Signal(15),
        console(ConsoleEvent::Quit),
    ];
    assert_eq!(run_on(2, partition.clone(), sent).end, End::Quit);
    let lines = partition.lines();
    let (_, button) = lines.iter().find(|(gsi, _)| *gsi == 5).unwrap();
    assert_eq!(button.event_fd().read().unwrap(), 2);
}

#[test]
fn the_milestones_of_a_boot_are_kept() {
    let mark = || Step::MmioWrite(BOOT_TIMER, vec![123]);
    let outcome = run(vec![vec![mark(), mark(), power_off()]], Vec::new());
    let (first, booted) = (
        outcome.milestones.first_instruction,
        outcome.milestones.booted,
    );
    assert!(first.unwrap() <= booted.unwrap());
    assert_eq!(outcome.ticks, 2, "when it booted, and at the end");
    let outcome = run(
        vec![vec![Step::MmioWrite(BOOT_TIMER, vec![7]), power_off()]],
        Vec::new(),
    );
    assert!(outcome.milestones.booted.is_none());
    assert_eq!(outcome.ticks, 1);
}

// ---- nothing is left ----

#[test]
fn a_machine_that_cannot_be_built_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let attempt = |cpus, partition: FakePartition| {
        let (mailbox, _events) = Mailbox::new();
        machine(&dir, cpus, partition, &mailbox)
            .err()
            .unwrap()
            .to_string()
    };
    let partition = FakePartition::new(Vec::new()).refusing_cpu(2);
    let why = attempt(4, partition.clone());
    assert!(why.contains("processor 2"), "{why}");
    assert_eq!(partition.configured().len(), 2);
    fs::write(dir.path().join("kernel"), kernel_of_size(&[0xf4], 65 << 20)).unwrap();
    let why = attempt(1, FakePartition::new(Vec::new()));
    assert!(why.contains("needs guest memory"), "{why}");
    // The partition is gone from the machine: only ours holds it. Its RAM is the test's own.
    assert!(partition.ram().is_some());
}

#[test]
fn a_machine_that_is_never_run_can_be_dropped() {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let dir = TempDir::new().unwrap();
        let (mailbox, _events) = Mailbox::new();
        drop(machine(&dir, 8, FakePartition::new(Vec::new()), &mailbox).unwrap());
        tell.send(()).unwrap();
    });
    told.recv_timeout(PATIENCE).expect("dropping it hangs");
}

// ---- at random ----

fn any_step() -> impl Strategy<Value = Step> {
    let port = prop_oneof![
        any::<u16>(),
        SERIAL..SERIAL + 8,
        0x60u16..0x65,
        Just(PANIC),
        POWER..POWER + 3,
    ];
    let addr = prop_oneof![any::<u64>(), BOOT_TIMER..BOOT_TIMER + 0x1000];
    let bytes = prop::sample::select(vec![1usize, 2, 4, 8]);
    let narrow = prop::sample::select(vec![1usize, 2, 4]);
    prop_oneof![
        4 => (port.clone(), narrow.clone()).prop_map(|(p, n)| Step::PortRead(p, n)),
        4 => (port.clone(), narrow, any::<u32>())
            .prop_map(|(p, n, v)| Step::PortWrite(p, v.to_le_bytes()[..n].to_vec())),
        2 => (port, prop::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(p, text)| Step::PortWriteString(p, text)),
        2 => (addr.clone(), bytes.clone()).prop_map(|(a, n)| Step::MmioRead(a, n)),
        2 => (addr, bytes, any::<u64>())
            .prop_map(|(a, n, v)| Step::MmioWrite(a, v.to_le_bytes()[..n].to_vec())),
        1 => Just(Step::TripleFault),
        1 => Just(Step::Fail),
        1 => Just(Step::Stuck(StuckReason::EntryRefused { hardware_reason: 7 })),
        1 => Just(power_off()),
        1 => Just(reset()),
    ]
}

/// What may come from outside: never the end of the loop.
fn any_event() -> impl Strategy<Value = u8> {
    0u8..5
}

fn event(kind: u8) -> Event {
    match kind {
        0 => Event::Console(ConsoleEvent::PowerButton),
        1 => Event::Console(ConsoleEvent::Quit),
        2 => Event::Console(ConsoleEvent::TerminalLost),
        3 => Event::Signal(15),
        _ => Event::Signal(2),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever the guest does and whatever comes from outside: the machine ends, and says how.
    #[test]
    fn any_guest_under_any_events_ends(
        scripts in prop::collection::vec(prop::collection::vec(any_step(), 0..24), 1..5),
        kinds in prop::collection::vec(any_event(), 0..4),
    ) {
        let last = u32::try_from(scripts.len()).unwrap();
        let mut sent: Vec<Event> = kinds.iter().map(|kind| event(*kind)).collect();
        sent.push(Event::Signal(3)); // or else a guest that does nothing never ends
        let outcome = run(scripts.clone(), sent);
        let legal = match &outcome.end {
            End::PowerOff { cpu, .. } | End::Reboot { cpu, .. } | End::Panic { cpu, .. }
            | End::TripleFault { cpu, .. } | End::Stuck { cpu, .. } => *cpu < last,
            End::HostError(why) => scripts.iter().flatten().any(|s| *s == Step::Fail) && why.contains("vCPU"),
            End::Quit => kinds.contains(&1),
            End::TerminalLost => kinds.contains(&2),
            End::Signal(15) => kinds.iter().filter(|k| **k == 3).count() > 1,
            End::Signal(number) => [2, 3].contains(number),
        };
        prop_assert!(legal, "{:?} after {:?}", outcome.end, kinds);
        prop_assert!(!outcome.end.to_string().is_empty());
    }
}
