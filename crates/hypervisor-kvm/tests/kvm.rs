//! The port against a real KVM, where there is one: tiny guests that need no kernel.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::Instant;

use alveole_guest_memory::{GuestRam, MemoryPlan};
use alveole_hypervisor::{CpuExit, InitialState, MsrChange, MsrRefusal, Partition, VirtualCpu};
use alveole_hypervisor_kvm::{KvmPartition, ProbeVerdict, probe};

fn skip(test: &str) -> bool {
    if std::path::Path::new("/dev/kvm").exists() {
        return false;
    }
    let line = format!("SKIPPED {test}: no /dev/kvm on this machine\n");
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
    true
}

/// A processor in 32-bit mode at 0x1000, where `code` is.
fn guest(code: &[u8]) -> (KvmPartition, GuestRam, Box<dyn VirtualCpu>) {
    let ram = GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap();
    ram.write(0x1000, code).unwrap();
    ram.write(0x500 + 16, &0x00cf_9b00_0000_ffff_u64.to_le_bytes())
        .unwrap();
    ram.write(0x500 + 24, &0x00cf_9300_0000_ffff_u64.to_le_bytes())
        .unwrap();
    let mut partition = KvmPartition::new().unwrap();
    partition.map_ram(&ram).unwrap();
    let mut cpu = partition.create_cpu(0).unwrap();
    let state = InitialState::Protected32 {
        eip: 0x1000,
        ebx: 7,
        gdt_addr: 0x500,
        gdt_size_bytes: 32,
    };
    cpu.configure(&partition.supported_cpuid().unwrap(), &state)
        .unwrap();
    (partition, ram, cpu)
}

#[test]
fn the_probe_comes_to_a_verdict() {
    if skip("the_probe_comes_to_a_verdict") {
        return;
    }
    let verdict = probe().unwrap();
    eprintln!("{verdict}");
    assert!(!matches!(verdict, ProbeVerdict::Broken(_)), "{verdict}");
}

#[test]
fn port_and_memory_exits_carry_their_values() {
    if skip("port_and_memory_exits_carry_their_values") {
        return;
    }
    // in al, 0x60; mov [0xd0000000], al; out 0x80, ax; hlt
    let (_partition, _ram, mut cpu) =
        guest(&[0xe4, 0x60, 0xa2, 0, 0, 0, 0xd0, 0x66, 0xe7, 0x80, 0xf4]);
    match cpu.run().unwrap() {
        CpuExit::PortRead {
            port: 0x60,
            size_bytes: 1,
            data,
        } => data[0] = 0x5a,
        other => panic!("{other:?}"),
    }
    match cpu.run().unwrap() {
        CpuExit::MmioWrite {
            addr: 0xd000_0000,
            data,
        } => assert_eq!(data, [0x5a]),
        other => panic!("{other:?}"),
    }
    match cpu.run().unwrap() {
        CpuExit::PortWrite {
            port: 0x80,
            size_bytes: 2,
            data,
        } => assert_eq!(data[0], 0x5a),
        other => panic!("{other:?}"),
    }
    assert_eq!(cpu.position().general[1], 7, "ebx keeps what it was given");
}

#[test]
fn a_string_write_keeps_its_width() {
    if skip("a_string_write_keeps_its_width") {
        return;
    }
    // mov esi, 0x1000; mov ecx, 4; mov dx, 0x3f8; rep outsb; hlt
    let (_partition, _ram, mut cpu) = guest(&[
        0xbe, 0, 0x10, 0, 0, 0xb9, 4, 0, 0, 0, 0x66, 0xba, 0xf8, 3, 0xf3, 0x6e, 0xf4,
    ]);
    let mut written = Vec::new();
    while written.len() < 4 {
        match cpu.run().unwrap() {
            CpuExit::PortWrite {
                port: 0x3f8,
                size_bytes: 1,
                data,
            } => {
                written.extend_from_slice(data);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(written, [0xbe, 0, 0x10, 0]);
}

#[test]
fn a_kick_ends_an_endless_loop_and_may_come_before_the_run() {
    if skip("a_kick_ends_an_endless_loop_and_may_come_before_the_run") {
        return;
    }
    let (_partition, _ram, mut cpu) = guest(&[0xeb, 0xfe]); // jmp self
    let kick = cpu.kick();
    kick.bind_to_this_thread();
    kick.kick();
    assert_eq!(cpu.run().unwrap(), CpuExit::Interrupted);
    kick.clear();
    let start = Instant::now();
    let other = cpu.kick();
    let helper = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        other.kick();
    });
    assert_eq!(cpu.run().unwrap(), CpuExit::Interrupted);
    assert!(
        start.elapsed().as_millis() >= 45,
        "the guest ran until it was kicked"
    );
    helper.join().unwrap();
    drop(cpu);
    kick.kick(); // a retired processor takes no harm
}

#[test]
fn a_triple_fault_is_told() {
    if skip("a_triple_fault_is_told") {
        return;
    }
    let (_partition, _ram, mut cpu) = guest(&[0x0f, 0x0b]); // ud2 without an IDT
    assert_eq!(cpu.run().unwrap(), CpuExit::TripleFault);
    assert!(cpu.position().known);
}

#[test]
fn a_missing_or_foreign_device_is_named() {
    let text = KvmPartition::with_device("/nonexistent/kvm")
        .err()
        .unwrap()
        .to_string();
    assert!(
        text.contains("/nonexistent/kvm does not exist") && text.contains("modprobe"),
        "{text}"
    );
    let text = KvmPartition::with_device("/dev/null")
        .err()
        .unwrap()
        .to_string();
    assert!(text.contains("/dev/null is no KVM"), "{text}");
}

/// The microcode revision: KVM gives a guest what it was given (Linux 4.18 and later).
const MICROCODE_REVISION: u32 = 0x8b;
const EFER: u32 = 0xc000_0080;

#[test]
fn a_changed_register_is_what_the_guest_reads() {
    if skip("a_changed_register_is_what_the_guest_reads") {
        return;
    }
    // mov ecx, 0x8b; rdmsr; out 0x80, eax; mov eax, edx; out 0x80, eax; hlt
    let (_partition, _ram, mut cpu) = guest(&[
        0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32, 0xe7, 0x80, 0x89, 0xd0, 0xe7, 0x80, 0xf4,
    ]);
    let change = |mask, value| MsrChange {
        index: MICROCODE_REVISION,
        mask,
        value,
    };
    let all = change(u64::MAX, 0x1122_3344_5566_7788);
    cpu.change_msrs(&[all]).unwrap();
    // What is not named stays; what is outside of the mask is not looked at.
    cpu.change_msrs(&[change(0xff, u64::MAX)]).unwrap();
    for word in [0x5566_77ff_u32, 0x1122_3344] {
        match cpu.run().unwrap() {
            CpuExit::PortWrite { data, .. } => assert_eq!(data, word.to_le_bytes()),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_register_that_is_refused_is_told_and_the_others_are_changed() {
    if skip("every_register_that_is_refused_is_told_and_the_others_are_changed") {
        return;
    }
    let (_partition, _ram, mut cpu) = guest(&[0xf4]);
    assert_eq!(cpu.kept_msrs(), [0; 0]);
    let change = |index, mask, value| MsrChange { index, mask, value };
    let refused = cpu
        .change_msrs(&[
            change(0xdead_beef, 0, 0),
            // A bit that means nothing.
            change(EFER, 2, 2),
            change(MICROCODE_REVISION, 0, 0),
        ])
        .unwrap_err();
    assert_eq!(
        refused,
        [
            MsrRefusal::Unknown(0xdead_beef),
            MsrRefusal::Value {
                index: EFER,
                value: 2
            },
        ]
    );
    assert_eq!(cpu.kept_msrs(), [MICROCODE_REVISION]);
}

#[test]
fn capabilities_are_known_by_their_numbers() {
    if skip("capabilities_are_known_by_their_numbers") {
        return;
    }
    const IMMEDIATE_EXIT: u32 = 136;
    let partition = KvmPartition::new().unwrap();
    assert!(partition.has_capability(IMMEDIATE_EXIT));
    for missing in [696_969, i32::MAX.cast_unsigned(), u32::MAX] {
        assert!(!partition.has_capability(missing), "{missing}");
    }
}
