//! Kernels boot, whatever file they come in, and the boot is timed and counted.

use std::fs;
use std::time::Duration;

use crate::harness::{End, Vm};

fn assert_booted_linux(end: &End) {
    end.assert_code(0);
    end.assert_line("the guest powered off (vCPU ");
    let uname = end.said("alveole-guest: uname ");
    assert!(
        matches!(uname[..], [line] if line.starts_with("Linux guest ")),
        "{uname:?}: {end}"
    );
}

/// `type_of_loader` of the boot protocol as the guest shows it.
fn bootloader(end: &End) -> u32 {
    let said = end.said("inspect: bootloader ");
    said.first().expect("the guest says it").parse().unwrap()
}

/// What Linux calls a loader that started it through the PVH entry (arch/x86/platform/pvh/enlighten.c).
const LOADER_PVH: u32 = 0xb0;

#[test]
fn a_stock_bzimage_boots_and_powers_off() {
    let Some(vm) = Vm::stock() else { return };
    assert_booted_linux(&vm.memory_mib(128).boot().wait());
}

#[test]
fn the_elf_file_in_it_boots_by_the_64_bit_entry() {
    let Some(vm) = Vm::stock_elf() else { return };
    let end = vm.init_does("run:/bin/inspect").boot().wait();
    assert_booted_linux(&end);
    assert_ne!(bootloader(&end), LOADER_PVH, "{end}");
}

/// An ELF kernel that does not say it is Linux, but that it can be entered as PVH, is entered so.
#[test]
fn an_elf_file_with_nothing_but_the_pvh_note_boots_by_that() {
    let Some(vm) = Vm::stock_elf() else { return };
    let mut kernel = fs::read(vm.kernel_path()).unwrap();
    disown_linux_notes(&mut kernel);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinux");
    fs::write(&path, kernel).unwrap();
    let vm = vm.kernel(&path).init_does("run:/bin/inspect");
    let end = vm.boot().wait();
    assert_booted_linux(&end);
    assert_eq!(bootloader(&end), LOADER_PVH, "{end}");
}

/// Gives the ELF notes whose owner is `Linux` another owner. (ELF-64: gABI chapters 4 and 5.)
fn disown_linux_notes(elf: &mut [u8]) {
    const PT_NOTE: u64 = 4;
    let number = |elf: &[u8], at: usize, size: usize| {
        let bytes = elf[at..at + size].iter().rev();
        bytes.fold(0_u64, |n, &b| n << 8 | u64::from(b))
    };
    let place = |n: u64| usize::try_from(n).unwrap();
    let (headers, size) = (place(number(elf, 32, 8)), place(number(elf, 54, 2)));
    let mut disowned = 0;
    for index in 0..place(number(elf, 56, 2)) {
        let header = headers + index * size;
        if number(elf, header, 4) != PT_NOTE {
            continue;
        }
        let mut at = place(number(elf, header + 8, 8));
        let end = at + place(number(elf, header + 32, 8));
        while at + 12 <= end {
            let (owner, content) = (place(number(elf, at, 4)), place(number(elf, at + 4, 4)));
            if elf[at + 12..].starts_with(b"Linux\0") {
                elf[at + 12] = b'l';
                disowned += 1;
            }
            at += 12 + owner.next_multiple_of(4) + content.next_multiple_of(4);
        }
    }
    assert!(disowned > 0, "a Linux kernel has notes of its own");
}

#[test]
fn the_boot_timer_tells_times_that_can_be_true() {
    let Some(vm) = Vm::any() else { return };
    let end = vm.option("--boot-timer").boot().wait();
    end.assert_code(0);
    let told = end
        .stderr
        .lines()
        .find_map(|l| l.strip_prefix("alveole-vmm: boot timer: process start to "))
        .unwrap_or_else(|| panic!("no boot timer: {end}"));
    let ms = |label: &str| -> f64 {
        let (_, rest) = told.split_once(label).unwrap_or_else(|| panic!("{told}"));
        rest.split_once(" ms").unwrap().0.trim().parse().unwrap()
    };
    let (first, init) = (ms("first guest instruction"), ms("guest init"));
    assert!(0.0 < first && first < init, "{told}");
    let elapsed = end.elapsed.as_secs_f64() * 1000.0;
    assert!(init < elapsed, "{told}, but all was over in {elapsed} ms");

    let in_metrics = |name: &str| end.metrics["boot"][name].as_f64().unwrap() / 1000.0;
    assert!((in_metrics("first_instruction_us") - first).abs() < 0.1);
    assert!((in_metrics("init_us") - init).abs() < 0.1);
    // Each byte on the console is a write to its first register; the timer is written once.
    let bytes = u64::try_from(end.console.len()).unwrap();
    assert!(end.counter("exits_port_write_0x3f8") >= bytes, "{end}");
    assert_eq!(end.counter("exits_mmio_write_0xc0000000"), 1);
    assert!(end.counter("bytes_out") >= bytes);
}

#[test]
fn without_boot_timer_nothing_is_told() {
    let Some(vm) = Vm::any() else { return };
    let end = vm.boot().wait();
    end.assert_code(0);
    assert_eq!(end.stderr.lines().count(), 1, "{end}");
    assert!(end.elapsed > Duration::ZERO);
}
