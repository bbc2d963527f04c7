//! What a guest sees of its machine is what the machine was told to be.

use crate::harness::{End, Vm, in_the_lab};

/// What finding the keyboard, and leaving it at the end, may cost: 64 accesses were seen, where nothing is waited for.
const KEYBOARD_ACCESSES: u64 = 128;

fn inspect(vm: Vm) -> End {
    let end = vm.init_does("run:/bin/inspect").boot().wait();
    end.assert_code(0);
    assert_eq!(end.said("inspect: ").last(), Some(&"end"), "{end}");
    end
}

fn assert_topology(count: u32) {
    let Some(vm) = Vm::any() else { return };
    let end = inspect(
        vm.cpus(count)
            .memory_mib(if count > 8 { 1024 } else { 256 }),
    );
    assert_eq!(end.said("inspect: online "), [count.to_string()], "{end}");
    let all = if count == 1 {
        "0".into()
    } else {
        format!("0-{}", count - 1)
    };
    let mut seen = end.said("inspect: cpu ");
    let mut want: Vec<_> = (0..count)
        .map(|n| format!("{n} package 0 core {n} threads {n} cores {all}"))
        .collect();
    seen.sort_unstable();
    want.sort_unstable();
    assert_eq!(seen, want, "{end}");
}

#[test]
fn one_processor() {
    assert_topology(1);
}

#[test]
fn two_processors_are_two_cores() {
    assert_topology(2);
}

#[test]
fn three_processors_are_three_cores() {
    assert_topology(3);
}

#[test]
fn eight_processors_are_eight_cores() {
    assert_topology(8);
}

#[test]
fn sixty_four_processors_are_sixty_four_cores() {
    assert_topology(64);
}

/// `MemTotal` leaves out what the kernel's image and its page structures take.
fn assert_memory(vm: Vm, mib: u64, kernel_takes_mib: u64) -> End {
    let end = inspect(vm.memory_mib(mib));
    let kib = end.said("alveole-guest: memory-kib ");
    let seen = kib
        .first()
        .expect("the guest says it")
        .parse::<u64>()
        .unwrap()
        >> 10;
    let least = mib - kernel_takes_mib - mib / 50;
    assert!((least..=mib).contains(&seen), "{seen} MiB of {mib}: {end}");
    end
}

/// The guest's RAM in bytes: the sum of what `/proc/iomem` calls so.
fn ram_bytes(end: &End) -> u64 {
    let ranges = end.said("inspect: ram ");
    ranges
        .iter()
        .map(|range| {
            let (from, to) = range.split_once(' ').unwrap().0.split_once('-').unwrap();
            let at = |text| u64::from_str_radix(text, 16).unwrap();
            at(to) - at(from) + 1
        })
        .sum()
}

#[test]
fn little_memory_is_enough_for_a_stock_kernel() {
    let Some(vm) = Vm::stock_elf() else { return };
    assert_memory(vm, 80, 56);
}

#[test]
fn a_guest_of_128_mib() {
    let Some(vm) = Vm::any() else { return };
    let end = assert_memory(vm, 128, 48);
    let missing = (128 << 20) - ram_bytes(&end);
    // The first page, and the firmware's area below 1 MiB.
    assert!(missing <= 512 << 10, "{missing} bytes are missing: {end}");
}

#[test]
fn a_guest_of_5_gib_has_memory_beyond_the_hole() {
    let Some(vm) = Vm::any() else { return };
    let end = assert_memory(vm, 5 << 10, 200);
    let ram = end.said("inspect: ram ");
    assert!(ram.iter().any(|r| r.starts_with("100000000-")), "{ram:?}");
    let missing = (5 << 30) - ram_bytes(&end);
    assert!(missing <= 512 << 10, "{missing} bytes are missing: {end}");
}

/// Remarks of a kernel that are not about our machine.
fn is_excused(remark: &str) -> bool {
    // The guest has no PCI, and says so.
    let no_pci = remark.contains("PCI: Fatal: No config space access function found");
    // i8042 is looked for in the tables, and not found there: nothing was probed.
    let no_keyboard = remark.contains("i8042: PNP: No PS/2 controller found");
    // The lab's processors are software without XSETBV intercepts and without one common TSC; a guest of
    // another monitor says the same there.
    let lab = in_the_lab()
        && [
            "XSAVE consistency problem",
            "fpu__init_system_xstate",
            "Call Trace:",
            "TSC unstable",
            "Unstable clock",
            "srso.html",
        ]
        .iter()
        .any(|words| remark.contains(words));
    // Weaknesses of the host's processor, and what the kernel was compiled with against them.
    let processor = [
        "Speculative Return Stack Overflow: WARNING",
        "RDSEED32 is broken",
    ];
    no_pci || no_keyboard || lab || processor.iter().any(|words| remark.contains(words))
}

#[test]
fn a_guest_finds_its_devices_without_help() {
    let Some(vm) = Vm::any() else { return };
    let end = inspect(vm.cpus(2));
    let said = |label| end.said(label);
    let tables = said("inspect: table ");
    for table in ["APIC", "DSDT", "FACP"] {
        assert!(tables.contains(&table), "{tables:?}");
    }
    let pnp = said("inspect: pnp ");
    assert!(
        pnp.iter()
            .any(|l| l.starts_with("PNP0501 driver serial") && l.contains("ttyS0")),
        "the serial port is not known by its table: {pnp:?}"
    );
    let acpi = said("inspect: acpi ");
    assert!(acpi.contains(&"PNP0C0C"), "no power button: {acpi:?}");
    // Both names by which drivers look for it, as the kernel has understood them.
    assert!(
        acpi.contains(&"ALVE0001 for VM_GEN_COUNTER:VMGENCTR:"),
        "no generation id: {acpi:?}"
    );
    assert!(
        acpi.contains(&"AMZNC10C for VMCLOCK:"),
        "no VMClock: {acpi:?}"
    );
    let lines = said("inspect: line ");
    for line in ["5-edge ACPI:Ged", "3-edge ACPI:Ged"] {
        assert!(lines.contains(&line), "no {line}: {lines:?}");
    }
    let clocks = said("inspect: clocksources ");
    let clocks: Vec<_> = clocks.iter().flat_map(|l| l.split(' ')).collect();
    assert!(
        clocks.iter().any(|c| ["kvm-clock", "tsc"].contains(c)),
        "{clocks:?}"
    );
    let clock = said("inspect: clocksource ");
    assert!(["kvm-clock", "tsc"].contains(&clock[0]), "{clock:?}");
    let cmdline = said("inspect: cmdline ");
    for word in ["virtio_mmio", "acpi=", "noapic", "i8042", "8250"] {
        assert!(
            !cmdline[0].contains(word),
            "help on the command line: {cmdline:?}"
        );
    }
    let remarks: Vec<_> = said("inspect: remark ")
        .into_iter()
        .filter(|r| !is_excused(r))
        .collect();
    assert!(remarks.is_empty(), "the kernel remarked: {remarks:#?}");
    // The keyboard is known by its table and found by few accesses: its driver waits for nothing, and looks for no mouse.
    assert!(
        pnp.iter()
            .any(|l| l.starts_with("PNP0303 driver i8042 kbd")),
        "{pnp:?}"
    );
    let accesses: u64 = ["read", "write"]
        .iter()
        .flat_map(|act| ["0x60", "0x64"].map(|port| format!("exits_port_{act}_{port}")))
        .map(|name| end.counter(&name))
        .sum();
    assert!(
        (10..=KEYBOARD_ACCESSES).contains(&accesses),
        "{accesses}: {end}"
    );
}
