//! Processors and partitions of a real KVM, where there is one, taken out and put into fresh ones over a copy of the memory.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::{Duration, Instant};

use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_hypervisor::state::{CpuState, PartitionState, RestoredClock};
use alveole_hypervisor::{CpuExit, CpuidEntry, InitialState, NotedFrom, Partition, VirtualCpu};
use alveole_hypervisor_kvm::KvmPartition;
use alveole_thread_sandbox::{Role, enter};
use serde_json::Value;

const RAM_BYTES: u64 = 1 << 20;
const CODE_ADDR: u64 = 0x1000;
const HANDLER_ADDR: u64 = 0x2000;
const GDT_ADDR: u64 = 0x500;
/// Where programs find a number that a test chose.
const PARAMETER_ADDR: u64 = 0x600;
const IDT_POINTER_ADDR: u64 = 0x700;
const IDT_ADDR: u64 = 0x800;
/// Where programs leave what they count.
const COUNT_ADDR: u64 = 0x8000;
const VECTOR: u64 = 0x40;
/// Longest wait for something that a guest does, the lab's slowness included.
const PATIENCE: Duration = Duration::from_secs(20);

const TSC: u32 = 0x10;
const SYSENTER_ESP: u32 = 0x175;
const TSC_DEADLINE: u32 = 0x6e0;

fn skip(test: &str) -> bool {
    if std::path::Path::new("/dev/kvm").exists() {
        return false;
    }
    skipped(test, "no /dev/kvm on this machine");
    true
}

fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        use std::io::Write;
        let mut log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}

/// Fields are dropped in order: the processor before the partition, and that before the memory.
struct Guest {
    cpu: Box<dyn VirtualCpu>,
    partition: KvmPartition,
    ram: GuestRam,
}

fn cpuid(partition: &KvmPartition) -> Vec<CpuidEntry> {
    let mut cpuid = partition.supported_cpuid().unwrap();
    for entry in cpuid.iter_mut().filter(|e| e.leaf == 1) {
        // The TSC deadline timer, which KVM offers by a capability.
        entry.ecx |= 1 << 24;
    }
    cpuid
}

/// A partition over `ram` whose processor is as it was made.
fn blank(ram: GuestRam) -> Guest {
    let mut partition = KvmPartition::new().unwrap();
    partition.map_ram(&ram).unwrap();
    let cpu = partition.create_cpu(0).unwrap();
    cpu.kick().bind_to_this_thread();
    Guest {
        cpu,
        partition,
        ram,
    }
}

/// A processor in 32-bit mode at the beginning of `code`, without paging.
fn guest(code: &[u8]) -> Guest {
    let ram = GuestRam::map(&MemoryPlan::around_hole(RAM_BYTES).unwrap()).unwrap();
    ram.write(CODE_ADDR, code).unwrap();
    for (slot, descriptor) in [(2, 0x00cf_9b00_0000_ffff_u64), (3, 0x00cf_9300_0000_ffff)] {
        ram.write_plain(GDT_ADDR + slot * 8, &descriptor).unwrap();
    }
    let mut guest = blank(ram);
    let start = InitialState::Protected32 {
        eip: CODE_ADDR as u32,
        ebx: 7,
        gdt_addr: GDT_ADDR,
        gdt_size_bytes: 32,
    };
    guest
        .cpu
        .configure(&cpuid(&guest.partition), &start)
        .unwrap();
    guest
}

/// The same, with a stack, the local APIC switched on, and a handler for [`VECTOR`] that counts and tells port 0x81.
fn guest_with_interrupts(code: &[u8], parameter: u32) -> Guest {
    let prologue = [
        0xbc, 0x00, 0x70, 0x00, 0x00, // mov esp, 0x7000
        0x0f, 0x01, 0x1d, 0x00, 0x07, 0x00, 0x00, // lidt [IDT_POINTER_ADDR]
        0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00,
        0x00, // mov dword [0xfee000f0], 0x1ff
    ];
    let handler = [
        0xff, 0x05, 0x00, 0x80, 0x00, 0x00, // inc dword [COUNT_ADDR]
        0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0x00, 0x00, 0x00,
        0x00, // mov dword [0xfee000b0], 0
        0xe6, 0x81, // out 0x81, al
        // Not by iret, which a KVM without hardware virtualisation behind it does not know in this mode.
        0x83, 0xc4, 0x0c, // add esp, 12
        0xfb, // sti
        0xf4, // 1: hlt
        0xeb, 0xfd, // jmp 1b
    ];
    let guest = guest(&[&prologue[..], code].concat());
    let ram = &guest.ram;
    ram.write(HANDLER_ADDR, &handler).unwrap();
    let gate = HANDLER_ADDR | 0x10 << 16 | 0x8e00 << 32;
    ram.write_plain(IDT_ADDR + VECTOR * 8, &gate).unwrap();
    ram.write_plain(IDT_POINTER_ADDR, &0x7ff_u16).unwrap();
    ram.write_plain(IDT_POINTER_ADDR + 2, &(IDT_ADDR as u32))
        .unwrap();
    ram.write_plain(PARAMETER_ADDR, &parameter).unwrap();
    guest
}

fn through_json<T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug>(
    state: &T,
) -> T {
    let text = serde_json::to_string(state).unwrap();
    let back = serde_json::from_str(&text).unwrap();
    assert!(*state == back, "it changes on its way through a file");
    back
}

impl Guest {
    fn saved(&mut self) -> (CpuState, PartitionState) {
        (self.cpu.save().unwrap(), self.partition.save().unwrap())
    }

    fn copy_of_ram(&self) -> GuestRam {
        let copy = GuestRam::map(&MemoryPlan::around_hole(RAM_BYTES).unwrap()).unwrap();
        let mut bytes = vec![0; RAM_BYTES as usize];
        self.ram.read(0, &mut bytes).unwrap();
        copy.write(0, &bytes).unwrap();
        copy
    }

    /// The guest in a fresh partition, by way of files.
    fn moved(mut self) -> Guest {
        let (cpu, partition) = self.saved();
        let mut moved = blank(self.copy_of_ram());
        drop(self);
        moved.cpu.restore(&through_json(&cpu)).unwrap();
        moved
            .partition
            .restore(&through_json(&partition), RestoredClock::AsSaved)
            .unwrap();
        moved
    }

    /// Runs until what the last exit asked for has got into the processor, and no further.
    fn settle(&mut self) {
        let kick = self.cpu.kick();
        kick.kick();
        assert_eq!(self.cpu.run().unwrap(), CpuExit::Interrupted);
        kick.clear();
    }

    /// Runs for `time`, or until the guest wants something.
    fn run_for(&mut self, time: Duration) -> Option<u16> {
        let kick = self.cpu.kick();
        kick.bind_to_this_thread();
        let (done, told) = std::sync::mpsc::channel::<()>();
        let waker = std::thread::spawn({
            let kick = kick.clone();
            move || {
                if told.recv_timeout(time).is_err() {
                    kick.kick();
                }
            }
        });
        let port = match self.cpu.run().unwrap() {
            CpuExit::Interrupted => None,
            CpuExit::PortWrite { port, .. } => Some(port),
            other => panic!("{other:?}"),
        };
        let _ = done.send(());
        waker.join().unwrap();
        kick.clear();
        port
    }

    fn word(&self, addr: u64) -> u32 {
        self.ram.read_plain(addr).unwrap()
    }
}

fn msr(state: &CpuState, index: u32) -> Option<u64> {
    let mut msrs = state.msrs.iter();
    msrs.find(|(i, _)| *i == index).map(|(_, value)| *value)
}

#[test]
fn a_guest_that_counts_loses_and_repeats_nothing() {
    if skip("a_guest_that_counts_loses_and_repeats_nothing") {
        return;
    }
    let mut guest = guest(&[
        0x41, // 1: inc ecx
        0xff, 0x05, 0x00, 0x80, 0x00, 0x00, // inc dword [COUNT_ADDR]
        0xeb, 0xf7, // jmp 1b
    ]);
    let mut before = 0;
    for round in 0..20 {
        let start = Instant::now();
        // On a busy machine the time may be over before the guest has run at all.
        while guest.word(COUNT_ADDR) == before {
            assert_eq!(guest.run_for(Duration::from_millis(3 + round % 5)), None);
            assert!(start.elapsed() < PATIENCE, "round {round}: it stands still");
        }
        before = guest.word(COUNT_ADDR);
        guest = guest.moved();
        assert_eq!(guest.word(COUNT_ADDR), before, "round {round}");
        let in_register = guest.cpu.save().unwrap().registers.rcx;
        assert!(
            in_register.wrapping_sub(u64::from(before)) <= 1,
            "round {round}: {in_register} {before}"
        );
    }
}

#[test]
fn accesses_happen_once_wherever_the_guest_is_stopped() {
    if skip("accesses_happen_once_wherever_the_guest_is_stopped") {
        return;
    }
    let mut guest = guest(&[
        0x41, // 1: inc ecx
        0x89, 0xc8, // mov eax, ecx
        0xe7, 0x80, // out 0x80, eax
        0xe5, 0x60, // in eax, 0x60
        0x89, 0x04, 0x8d, 0x00, 0x80, 0x00, 0x00, // mov [COUNT_ADDR + ecx * 4], eax
        0xeb, 0xf0, // jmp 1b
    ]);
    let answer_to = |number: u32| number.wrapping_mul(0x0101_0101) ^ 0x5a5a_5a5a;
    for number in 1..=30_u32 {
        match guest.cpu.run().unwrap() {
            CpuExit::PortWrite {
                port: 0x80, data, ..
            } => assert_eq!(data, number.to_le_bytes()),
            other => panic!("{number}: {other:?}"),
        }
        if number % 3 == 0 {
            guest.settle();
            guest = guest.moved();
        }
        match guest.cpu.run().unwrap() {
            CpuExit::PortRead {
                port: 0x60, data, ..
            } => data.copy_from_slice(&answer_to(number).to_le_bytes()),
            other => panic!("{number}: {other:?}"),
        }
        if number % 3 == 1 {
            guest.settle();
            guest = guest.moved();
            let in_register = guest.cpu.save().unwrap().registers.rax;
            assert_eq!(in_register, u64::from(answer_to(number)));
        }
    }
    for number in 1..30 {
        let stored = guest.word(COUNT_ADDR + 4 * u64::from(number));
        assert_eq!(stored, answer_to(number), "{number}");
    }
}

#[test]
fn the_guest_finds_its_registers_again() {
    if skip("the_guest_finds_its_registers_again") {
        return;
    }
    let mut guest = guest(&[
        0x0f, 0x20, 0xe0, // mov eax, cr4
        0x0d, 0x00, 0x06, 0x00, 0x00, // or eax, OSFXSR | OSXMMEXCPT
        0x0f, 0x22, 0xe0, // mov cr4, eax
        0xf3, 0x0f, 0x6f, 0x1d, 0x00, 0x80, 0x00, 0x00, // movdqu xmm3, [0x8000]
        0xe6, 0x80, // out 0x80, al
        0xf3, 0x0f, 0x7f, 0x1d, 0x10, 0x80, 0x00, 0x00, // movdqu [0x8010], xmm3
        0xb9, 0x75, 0x01, 0x00, 0x00, // mov ecx, SYSENTER_ESP
        0x0f, 0x32, // rdmsr
        0xa3, 0x20, 0x80, 0x00, 0x00, // mov [0x8020], eax
        0x0f, 0x21, 0xc8, // mov eax, dr1
        0xa3, 0x24, 0x80, 0x00, 0x00, // mov [0x8024], eax
        0xe6, 0x80, // out 0x80, al
        0xf4, // hlt
    ]);
    let vector = *b"all sixteen byte";
    guest.ram.write(0x8000, &vector).unwrap();
    assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    guest.settle();
    let (mut state, _) = guest.saved();
    state.debug.addresses[1] = 0x1234_5678;
    for entry in state.msrs.iter_mut().filter(|(i, _)| *i == SYSENTER_ESP) {
        entry.1 = 0xdead_0001;
    }
    let mut moved = blank(guest.copy_of_ram());
    moved.cpu.restore(&state).unwrap();
    assert_eq!(moved.run_for(PATIENCE), Some(0x80));
    let mut stored = [0; 16];
    moved.ram.read(0x8010, &mut stored).unwrap();
    assert_eq!(stored, vector);
    assert_eq!(moved.word(0x8020), 0xdead_0001);
    assert_eq!(moved.word(0x8024), 0x1234_5678);
}

/// Where two states of one processor differ, but for its counter, which goes on by itself.
fn differences(a: &CpuState, b: &CpuState) -> Vec<String> {
    let flat = |state: &CpuState| {
        let mut state = state.clone();
        state.msrs.retain(|(index, _)| *index != TSC);
        let mut all = Vec::new();
        flatten("", &serde_json::to_value(state).unwrap(), &mut all);
        all
    };
    let (a, b) = (flat(a), flat(b));
    assert_eq!(a.len(), b.len());
    let differ = a.into_iter().zip(b).filter(|(a, b)| a != b);
    differ.map(|(a, b)| format!("{a} | {b}")).collect()
}

fn flatten(path: &str, value: &Value, into: &mut Vec<String>) {
    match value {
        Value::Array(list) => {
            for (at, element) in list.iter().enumerate() {
                flatten(&format!("{path}[{at}]"), element, into);
            }
        }
        Value::Object(fields) => {
            for (name, field) in fields {
                flatten(&format!("{path}.{name}"), field, into);
            }
        }
        other => into.push(format!("{path} {other}")),
    }
}

#[test]
fn what_is_put_in_comes_out_again() {
    if skip("what_is_put_in_comes_out_again") {
        return;
    }
    let mut guest = guest(&[0xf4]);
    let (mut state, partition) = guest.saved();
    state.registers.r15 = u64::MAX - 1;
    state.registers.rflags = 0x246;
    state.debug.addresses = [1, 2 << 32, 3, 0xffff_8000_0000_0000];
    state.debug.dr7 = 0x401;
    // XMM7 and the components in use: x87 and SSE.
    state.xsave[160 + 7 * 16..][..16].copy_from_slice(&[0xa5; 16]);
    state.xsave[512] |= 3;
    for (index, value) in &mut state.msrs {
        match *index {
            // AMD's processors keep 32 bits of it.
            SYSENTER_ESP => *value = 0x8000_1000,
            // IA32_PAT, another order of the same types.
            0x277 => *value = 0x0007_0106_0007_0406,
            // LSTAR, KERNEL_GS_BASE.
            0xc000_0082 | 0xc000_0102 => *value = 0xffff_ffff_8100_0000,
            _ => {}
        }
    }
    state.events.nmi_pending = 1;
    state.events.nmi_masked = 1;
    state.mp_state = 3; // It halts.
    let mut moved = blank(guest.copy_of_ram());
    moved.cpu.restore(&state).unwrap();
    moved
        .partition
        .restore(&partition, RestoredClock::AsSaved)
        .unwrap();
    let (again, partition_again) = moved.saved();
    assert_eq!(differences(&again, &through_json(&state)), [""; 0]);
    let chips = |s: &PartitionState| (s.pics, s.io_apic.clone());
    assert_eq!(chips(&partition_again), chips(&partition));
}

#[test]
fn a_processor_that_waits_to_be_started_waits_again() {
    if skip("a_processor_that_waits_to_be_started_waits_again") {
        return;
    }
    let guest = guest(&[0xf4]);
    let mut second = guest.partition.create_cpu(1).unwrap();
    let cpuid = cpuid(&guest.partition);
    second
        .configure(&cpuid, &InitialState::WaitForStartup)
        .unwrap();
    let state = second.save().unwrap();
    assert_eq!(state.mp_state, 1, "KVM_MP_STATE_UNINITIALIZED");
    let fresh = blank(guest.copy_of_ram());
    let mut moved = fresh.partition.create_cpu(1).unwrap();
    moved.restore(&state).unwrap();
    assert_eq!(differences(&moved.save().unwrap(), &state), [""; 0]);
    assert_eq!(state.cpuid, cpuid);
}

#[test]
fn an_interrupt_that_waits_comes_once() {
    if skip("an_interrupt_that_waits_comes_once") {
        return;
    }
    let mut guest = guest_with_interrupts(
        &[
            0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x40, 0x40, 0x04,
            0x00, // send VECTOR to itself
            0xe6, 0x80, // out 0x80, al
            0xfb, // sti
            0xf4, // 1: hlt
            0xeb, 0xfd, // jmp 1b
        ],
        0,
    );
    assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    guest.settle();
    let mut moved = guest.moved();
    assert_eq!(moved.run_for(PATIENCE), Some(0x81));
    assert_eq!(moved.word(COUNT_ADDR), 1);
    moved.settle();
    let mut moved = moved.moved();
    assert_eq!(moved.run_for(Duration::from_millis(100)), None, "no second");
    assert_eq!(moved.word(COUNT_ADDR), 1);
}

#[test]
fn an_interrupt_of_a_device_survives_in_the_controllers() {
    if skip("an_interrupt_of_a_device_survives_in_the_controllers") {
        return;
    }
    let mut guest = guest_with_interrupts(
        &[
            0xc7, 0x05, 0x50, 0x03, 0xe0, 0xfe, 0x00, 0x00, 0x01,
            0x00, // nothing from the PIC
            0xc7, 0x05, 0x00, 0x00, 0xc0, 0xfe, 0x1a, 0x00, 0x00, 0x00, // select: input 5
            0xc7, 0x05, 0x10, 0x00, 0xc0, 0xfe, 0x40, 0x00, 0x00, 0x00, // sends VECTOR
            0xc7, 0x05, 0x00, 0x00, 0xc0, 0xfe, 0x1b, 0x00, 0x00,
            0x00, // select its upper half
            0xe6, 0x80, // out 0x80, al
            0xfb, // sti
            0xf4, // 1: hlt
            0xeb, 0xfd, // jmp 1b
        ],
        0,
    );
    let line = guest.partition.irq_line(5).unwrap();
    assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    guest.settle();
    line.pulse();
    // The kernel's worker carries it from the line to the local APIC.
    let arrived = |state: &CpuState| state.lapic[0x220] & 1 != 0;
    let start = Instant::now();
    while !arrived(&guest.cpu.save().unwrap()) {
        assert!(start.elapsed() < PATIENCE, "the interrupt does not arrive");
    }
    let mut moved = guest.moved();
    let (_, partition) = moved.saved();
    assert_eq!(partition.io_apic.redirections[5] & 0xff, VECTOR);
    assert_eq!(partition.io_apic.selected_register, 0x1b);
    assert_eq!(moved.run_for(PATIENCE), Some(0x81));
    // The line of the new partition reaches the same input.
    let line = moved.partition.irq_line(5).unwrap();
    line.pulse();
    assert_eq!(moved.run_for(PATIENCE), Some(0x81));
    assert_eq!(moved.word(COUNT_ADDR), 2);
}

#[test]
fn a_timer_that_runs_fires_in_the_new_partition() {
    if skip("a_timer_that_runs_fires_in_the_new_partition") {
        return;
    }
    const NS: u32 = 1_500_000_000;
    let mut guest = guest_with_interrupts(
        &[
            0xc7, 0x05, 0xe0, 0x03, 0xe0, 0xfe, 0x0b, 0x00, 0x00, 0x00, // divide by 1: ns
            0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x40, 0x00, 0x00, 0x00, // once, by VECTOR
            0xa1, 0x00, 0x06, 0x00, 0x00, // mov eax, [PARAMETER_ADDR]
            0xa3, 0x80, 0x03, 0xe0, 0xfe, // mov [0xfee00380], eax
            0xe6, 0x80, // out 0x80, al
            0xfb, // sti
            0xf4, // 1: hlt
            0xeb, 0xfd, // jmp 1b
        ],
        NS,
    );
    assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    assert_eq!(guest.run_for(Duration::from_millis(30)), None);
    let (state, _) = guest.saved();
    let left = u32::from_le_bytes(state.lapic[0x390..0x394].try_into().unwrap());
    assert!(left > 0 && left < NS, "{left} ns left");
    // Outside, time goes by that the guest does not see.
    std::thread::sleep(Duration::from_millis(400));
    let mut moved = blank(guest.copy_of_ram());
    moved.cpu.restore(&state).unwrap();
    let start = Instant::now();
    assert_eq!(moved.run_for(PATIENCE), Some(0x81));
    let waited = start.elapsed().as_nanos();
    assert!(
        waited + 20_000_000 > u128::from(left),
        "{waited} of {left} ns"
    );
    assert_eq!(moved.word(COUNT_ADDR), 1);
}

#[test]
fn a_deadline_stays_where_it_is_on_the_guests_own_counter() {
    if skip("a_deadline_stays_where_it_is_on_the_guests_own_counter") {
        return;
    }
    const TICKS: u32 = 4_000_000_000;
    let mut guest = guest_with_interrupts(
        &[
            0xc7, 0x05, 0x20, 0x03, 0xe0, 0xfe, 0x40, 0x00, 0x04, 0x00, // by deadline, VECTOR
            0x0f, 0x31, // rdtsc
            0x03, 0x05, 0x00, 0x06, 0x00, 0x00, // add eax, [PARAMETER_ADDR]
            0x83, 0xd2, 0x00, // adc edx, 0
            0xb9, 0xe0, 0x06, 0x00, 0x00, // mov ecx, TSC_DEADLINE
            0x0f, 0x30, // wrmsr
            0xe6, 0x80, // out 0x80, al
            0xfb, // sti
            0xf4, // 1: hlt
            0xeb, 0xfd, // jmp 1b
        ],
        TICKS,
    );
    assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    assert_eq!(guest.run_for(Duration::from_millis(20)), None);
    let (state, _) = guest.saved();
    let deadline = msr(&state, TSC_DEADLINE).unwrap();
    let counter = msr(&state, TSC).unwrap();
    assert!(deadline > counter, "{deadline} {counter}");
    std::thread::sleep(Duration::from_millis(200));
    let mut moved = blank(guest.copy_of_ram());
    moved.cpu.restore(&state).unwrap();
    assert_eq!(
        msr(&moved.cpu.save().unwrap(), TSC_DEADLINE),
        Some(deadline)
    );
    assert_eq!(moved.run_for(PATIENCE), Some(0x81));
    assert_eq!(moved.word(COUNT_ADDR), 1);
    let counter = msr(&moved.cpu.save().unwrap(), TSC).unwrap();
    assert!(counter >= deadline, "not before: {counter} {deadline}");
}

/// Young guests are the interesting ones: KVM takes a counter that is less than a second off for one that is to be
/// synchronised with the partition's.
#[test]
fn the_time_stamp_counter_goes_on_where_it_stood() {
    if skip("the_time_stamp_counter_goes_on_where_it_stood") {
        return;
    }
    let mut guest = guest(&[0xf4]);
    let (state, _) = guest.saved();
    let khz = u64::from(state.tsc_khz.unwrap_or(1_000_000));
    if msr(&state, TSC).unwrap() > 60_000 * khz {
        skipped(
            "the_time_stamp_counter_goes_on_where_it_stood",
            "this KVM shows its guests the host's counter",
        );
        return;
    }
    for ms in [1, 500, 900, 2_000, 3_600_000] {
        let saved = ms * khz;
        let mut state = state.clone();
        for entry in state.msrs.iter_mut().filter(|(i, _)| *i == TSC) {
            entry.1 = saved;
        }
        let fresh = blank(guest.copy_of_ram());
        let mut cpus: Vec<_> = (1..3)
            .map(|i| fresh.partition.create_cpu(i).unwrap())
            .collect();
        let start = Instant::now();
        for cpu in &mut cpus {
            cpu.restore(&state).unwrap();
        }
        let counters = cpus
            .iter_mut()
            .map(|c| msr(&c.save().unwrap(), TSC).unwrap());
        let counters: Vec<_> = counters.collect();
        let gone_by = u64::try_from(start.elapsed().as_micros()).unwrap() * khz / 1000;
        for counter in counters {
            assert!(counter >= saved, "{ms} ms: {counter} is before {saved}");
            let most = saved + gone_by + 10 * khz;
            assert!(counter <= most, "{ms} ms: {counter} is after {most}");
        }
    }
}

#[test]
fn the_guests_clock_stands_still_or_takes_the_time_that_went_by() {
    if skip("the_guests_clock_stands_still_or_takes_the_time_that_went_by") {
        return;
    }
    const SECOND_NS: u64 = 1_000_000_000;
    let mut guest = guest(&[0xf4]);
    let (_, mut state) = guest.saved();
    state.clock.ns = 1_000 * SECOND_NS;
    let restored = |state: &PartitionState, clock| {
        let fresh = blank(guest.copy_of_ram());
        fresh.partition.restore(state, clock).unwrap();
        fresh.partition.save().unwrap().clock.ns / SECOND_NS
    };
    assert!((1_000..1_010).contains(&restored(&state, RestoredClock::AsSaved)));
    state.clock.realtime_ns -= 3_600 * SECOND_NS;
    assert!((1_000..1_010).contains(&restored(&state, RestoredClock::AsSaved)));
    assert!((4_600..4_620).contains(&restored(&state, RestoredClock::AdvanceByWallTime)));
    // The host's clock went back: the guest's does not.
    state.clock.realtime_ns += 7_200 * SECOND_NS;
    assert!((1_000..1_010).contains(&restored(&state, RestoredClock::AdvanceByWallTime)));
}

fn pages(bitmaps: &[Vec<u64>]) -> Vec<usize> {
    let [bitmap] = bitmaps else {
        panic!("{} ranges", bitmaps.len());
    };
    assert_eq!(bitmap.len(), RAM_BYTES as usize / 4096 / 64);
    let all = 0..64 * bitmap.len();
    all.filter(|page| bitmap[page / 64] >> (page % 64) & 1 != 0)
        .collect()
}

#[test]
fn exactly_the_pages_that_were_written_are_told() {
    if skip("exactly_the_pages_that_were_written_are_told") {
        return;
    }
    let mut guest = guest(&[
        0xe6, 0x80, // 1: out 0x80, al
        0xa3, 0x00, 0x00, 0x02, 0x00, // mov [0x20000], eax
        0xa3, 0x08, 0x50, 0x04, 0x00, // mov [0x45008], eax
        0xe6, 0x80, // out 0x80, al
        0xa3, 0xf8, 0x5f, 0x04, 0x00, // mov [0x45ff8], eax
        0xe6, 0x80, // out 0x80, al
        0xa3, 0xfe, 0x6f, 0x04, 0x00, // mov [0x46ffe], eax: two pages
        0xeb, 0xe4, // jmp 1b
    ]);
    // KVM tells a page that it maps for the first time, though it be only for its code: so that has happened before.
    assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    let e = guest.partition.take_dirty(&guest.ram).unwrap_err();
    assert!(e.to_string().contains("were written pages tracked"), "{e}");
    guest
        .partition
        .track_dirty(&guest.ram, NotedFrom::Now)
        .unwrap();
    let next = |guest: &mut Guest| {
        assert_eq!(guest.run_for(PATIENCE), Some(0x80));
        pages(&guest.partition.take_dirty(&guest.ram).unwrap())
    };
    assert_eq!(next(&mut guest), [0x20, 0x45]);
    // What the host writes is the host's to note.
    guest.ram.write(0x30000, &[1]).unwrap();
    assert_eq!(next(&mut guest), [0x45]);
    assert_eq!(next(&mut guest), [0x46, 0x47]);
    assert_eq!(next(&mut guest), [0x20, 0x45], "a second time");
    guest.partition.untrack_dirty(&guest.ram).unwrap();
    guest.partition.take_dirty(&guest.ram).unwrap_err();
    guest
        .partition
        .track_dirty(&guest.ram, NotedFrom::Now)
        .unwrap();
    assert_eq!(next(&mut guest), [0x45], "begins anew");
}

/// The first time all may be told, and nothing that comes after it is missed: neither by pages that the guest has written before, nor by others.
#[test]
fn pages_that_are_noted_from_the_first_taking_on_are_told_after_it() {
    if skip("pages_that_are_noted_from_the_first_taking_on_are_told_after_it") {
        return;
    }
    let mut guest = guest(&[
        0xa3, 0x00, 0x00, 0x02, 0x00, // 1: mov [0x20000], eax
        0xe6, 0x80, // out 0x80, al
        0xa3, 0x08, 0x50, 0x04, 0x00, // mov [0x45008], eax
        0xe6, 0x80, // out 0x80, al
        0xeb, 0xf0, // jmp 1b
    ]);
    let next = |guest: &mut Guest| assert_eq!(guest.run_for(PATIENCE), Some(0x80));
    for _ in 0..3 {
        next(&mut guest);
    }
    for _ in 0..2 {
        let (partition, ram) = (&guest.partition, &guest.ram);
        partition.track_dirty(ram, NotedFrom::FirstTake).unwrap();
        let first = pages(&partition.take_dirty(ram).unwrap());
        let all: u64 = ram
            .mapped_ranges()
            .map(|(range, _)| range.size_bytes / 4096)
            .sum();
        assert!(first.is_empty() || first.len() as u64 == all, "{first:x?}");
        next(&mut guest);
        assert_eq!(
            pages(&guest.partition.take_dirty(&guest.ram).unwrap()),
            [0x45]
        );
        next(&mut guest);
        assert_eq!(
            pages(&guest.partition.take_dirty(&guest.ram).unwrap()),
            [0x20]
        );
        next(&mut guest);
        next(&mut guest);
        let both = pages(&guest.partition.take_dirty(&guest.ram).unwrap());
        assert_eq!(both, [0x20, 0x45]);
        // Ended before anything was taken, it begins as if it had not been.
        guest.partition.untrack_dirty(&guest.ram).unwrap();
        let (partition, ram) = (&guest.partition, &guest.ram);
        partition.track_dirty(ram, NotedFrom::FirstTake).unwrap();
        partition.untrack_dirty(ram).unwrap();
        partition.track_dirty(ram, NotedFrom::Now).unwrap();
        assert!(pages(&partition.take_dirty(ram).unwrap()).is_empty());
        partition.untrack_dirty(ram).unwrap();
        next(&mut guest);
        next(&mut guest);
    }
}

#[test]
fn the_filters_of_the_threads_let_a_guest_be_saved() {
    if skip("the_filters_of_the_threads_let_a_guest_be_saved") {
        return;
    }
    let Guest {
        mut cpu,
        partition,
        ram,
    } = guest(&[0xf4]);
    let saver = std::thread::spawn(move || {
        enter(Role::Vcpu, "vcpu 0").unwrap();
        cpu.save().unwrap();
        cpu
    });
    let cpu = saver.join().unwrap();
    let control = std::thread::spawn(move || {
        enter(Role::Control, "control").unwrap();
        partition.save().unwrap();
        partition.track_dirty(&ram, NotedFrom::FirstTake).unwrap();
        partition.take_dirty(&ram).unwrap();
        partition.untrack_dirty(&ram).unwrap();
        (partition, ram)
    });
    let (partition, ram) = control.join().unwrap();
    drop((cpu, partition, ram));
}

#[test]
fn a_guest_with_guests_of_its_own_is_refused() {
    if skip("a_guest_with_guests_of_its_own_is_refused") {
        return;
    }
    const SVME: u64 = 1 << 12;
    let mut guest = guest(&[0xf4]);
    let (mut state, _) = guest.saved();
    state.special.efer |= SVME;
    let mut moved = blank(guest.copy_of_ram());
    // Only processors that have SVM, with a KVM that offers it, can hold the bit.
    if let Err(e) = moved.cpu.restore(&state) {
        assert!(e.to_string().contains("efer 0x1000"), "{e}");
        return;
    }
    match moved.cpu.save() {
        // It may use SVM and has no guest: nothing would be lost.
        Ok(again) => assert_eq!(again.special.efer & SVME, SVME),
        Err(e) => assert!(e.to_string().contains("guests of its own"), "{e}"),
    }
}

/// What is done to a state, and what the refusal says.
type Damage = (fn(&mut CpuState), &'static str);

#[test]
fn a_state_that_cannot_be_is_refused_by_name() {
    if skip("a_state_that_cannot_be_is_refused_by_name") {
        return;
    }
    let mut guest = guest(&[0xf4]);
    let (good, good_partition) = guest.saved();
    let damages: [Damage; 24] = [
        (|s| s.lapic.truncate(1023), "lapic is a list of 1023 bytes"),
        (|s| s.lapic.clear(), "lapic is a list of 0 bytes"),
        (|s| s.lapic.push(0), "lapic is a list of 1025 bytes"),
        (|s| s.xsave.truncate(4095), "xsave is 4095 bytes long"),
        (|s| s.xsave.clear(), "xsave is 0 bytes long"),
        (|s| s.xsave.resize(1 << 20, 0), "xsave is 1048576 bytes"),
        (|s| s.xsave.resize(60 << 10, 1), "xsave is 61440 bytes"),
        // XSTATE_BV: components that nobody has.
        (|s| s.xsave[519] = 0x7f, "KVM_SET_XSAVE"),
        (
            |s| s.msrs.resize(4000, (0x277, 0)),
            "msrs is a list of 4000 registers",
        ),
        (
            |s| s.msrs.push((0xdead_beef, 1)),
            "register 0xdeadbeef is 0x1",
        ),
        // EFER, with a bit that means nothing.
        (
            |s| s.msrs.push((0xc000_0080, 2)),
            "register 0xc0000080 is 0x2",
        ),
        (|s| s.xcrs.resize(17, (0, 1)), "xcrs is a list of 17"),
        (|s| s.xcrs = vec![(5, 1)], "xcrs: register 5 is 0x1"),
        (|s| s.xcrs = vec![(0, u64::MAX)], "KVM_SET_XCRS"),
        (
            |s| s.cpuid.resize(257, CpuidEntry::default()),
            "cpuid is a list of 257",
        ),
        (|s| s.mp_state = 77, "mp_state is 0x4d"),
        (|s| s.tsc_khz = Some(0), "tsc_khz is 0"),
        (|s| s.special.cs.kind = 16, "special.cs.kind is 0x10"),
        (
            |s| s.special.interrupt_bitmap = [1, 1, 0, 0],
            "interrupt_bitmap",
        ),
        (|s| s.special.cr4 = u64::MAX, "cr4 0xffffffffffffffff"),
        (
            |s| s.debug.dr7 = u64::MAX,
            "debug.dr7 is 0xffffffffffffffff",
        ),
        (
            |s| s.events.exception_vector = 32,
            "events.exception_vector",
        ),
        (|s| s.events.flags = u32::MAX, "KVM_SET_VCPU_EVENTS"),
        (
            |s| s.kept_msrs = vec![1; 1 << 20],
            "kept_msrs is a list of 1048576",
        ),
    ];
    for (damage, told) in damages {
        let mut state = good.clone();
        damage(&mut state);
        let mut moved = blank(guest.copy_of_ram());
        let restored = moved.cpu.restore(&state);
        let e = restored.expect_err(told).to_string();
        assert!(e.contains(told) && e.contains("processor 0"), "{told}: {e}");
    }
    for (damage, told) in [
        (
            (|s| s.io_apic.redirections.truncate(23)) as fn(&mut PartitionState),
            "io_apic.redirections is a list of 23",
        ),
        (|s| s.io_apic.redirections.push(0), "a list of 25 entries"),
        (|s| s.io_apic.irr = u32::MAX, "io_apic.irr is 0xffffffff"),
        (
            |s| s.pics[1].priority_add = 8,
            "pics[1].priority_add is 0x8",
        ),
    ] {
        let mut state = good_partition.clone();
        damage(&mut state);
        let restored = guest.partition.restore(&state, RestoredClock::AsSaved);
        let e = restored.unwrap_err().to_string();
        assert!(e.contains(told), "{told}: {e}");
    }
    // A register that this host lacks and nobody ever wrote, and one that holds the value already.
    let mut state = good.clone();
    state.msrs.push((0xdead_beef, 0));
    let mut moved = blank(guest.copy_of_ram());
    moved.cpu.restore(&state).unwrap();
}

#[test]
fn another_frequency_is_scaled_or_both_are_named() {
    if skip("another_frequency_is_scaled_or_both_are_named") {
        return;
    }
    let mut guest = guest(&[0xf4]);
    let (mut state, _) = guest.saved();
    let Some(host) = state.tsc_khz else { return };
    let almost = host + host / 10_000;
    for (saved, must_do) in [(host, true), (almost, true), (host / 2, false)] {
        state.tsc_khz = Some(saved);
        let mut moved = blank(guest.copy_of_ram());
        match moved.cpu.restore(&state) {
            Ok(()) if must_do => {}
            Ok(()) => assert_eq!(moved.cpu.save().unwrap().tsc_khz, Some(saved)),
            Err(e) => {
                let e = e.to_string();
                let both = e.contains(&saved.to_string()) && e.contains(&host.to_string());
                assert!(both && !must_do, "{saved}: {e}");
            }
        }
    }
}

/// Every number of a saved state made absurd, and every list cut, emptied and doubled: whoever forges a file gets an error,
/// or a guest that goes wrong, and no panic.
#[test]
fn no_forged_number_or_list_makes_a_restore_panic() {
    if skip("no_forged_number_or_list_makes_a_restore_panic") {
        return;
    }
    let mut guest = guest(&[0xf4]);
    let (cpu, partition) = guest.saved();
    let (mut refused, mut taken) = (0, 0);
    for forged in forgeries(&serde_json::to_value(&cpu).unwrap()) {
        let Ok(state) = serde_json::from_value::<CpuState>(forged) else {
            refused += 1;
            continue;
        };
        let mut moved = blank(guest.copy_of_ram());
        if moved.cpu.restore(&state).is_err() {
            refused += 1;
            continue;
        }
        taken += 1;
        // It may be saved again, and run for no time at all.
        let _ = moved.cpu.save();
        moved.cpu.kick().kick();
        let _ = moved.cpu.run();
    }
    assert!(refused > 50 && taken > 50, "{refused} {taken}");
    for forged in forgeries(&serde_json::to_value(&partition).unwrap()) {
        if let Ok(state) = serde_json::from_value::<PartitionState>(forged) {
            let fresh = blank(guest.copy_of_ram());
            let _ = fresh.partition.restore(&state, RestoredClock::AsSaved);
            let _ = fresh
                .partition
                .restore(&state, RestoredClock::AdvanceByWallTime);
        }
    }
}

/// Copies of `value`, each with one thing wrong. Of long lists only the first few elements are looked at.
fn forgeries(value: &Value) -> Vec<Value> {
    const LOOKED_AT: usize = 6;
    match value {
        Value::Number(_) => [0, 0xff, 0xffff_ffff, u64::MAX].map(Value::from).into(),
        Value::Null => vec![Value::from(u64::MAX)],
        Value::Array(list) => {
            let doubled = list.iter().chain(list).cloned().collect();
            let cut = list.iter().skip(1).cloned().collect();
            let mut all = vec![
                Value::Array(doubled),
                Value::Array(cut),
                Value::Array(vec![]),
            ];
            for (at, element) in list.iter().enumerate().take(LOOKED_AT) {
                for forged in forgeries(element) {
                    let mut list = list.clone();
                    list[at] = forged;
                    all.push(Value::Array(list));
                }
            }
            all
        }
        Value::Object(fields) => {
            let mut all = Vec::new();
            for (name, field) in fields {
                for forged in forgeries(field) {
                    let mut fields = fields.clone();
                    fields[name] = forged;
                    all.push(Value::Object(fields));
                }
            }
            all
        }
        other => vec![other.clone()],
    }
}
