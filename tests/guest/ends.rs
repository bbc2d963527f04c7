//! The ways in which a guest ends are told apart, by exit code and by one line.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{End, Vm, patience};

/// One line, and it names the processor and where it stood.
#[track_caller]
fn assert_one_line(end: &End, begins: &str) {
    end.assert_line(begins);
    assert_eq!(end.stderr.lines().count(), 1, "more than one line: {end}");
    let line = end.line();
    assert!(
        line.contains("vCPU ") && line.contains("0x"),
        "no place: {line}"
    );
}

/// The driver of the keyboard writes to port 0x64, too.
pub(crate) const NO_KEYBOARD: &str = "initcall_blacklist=i8042_init";

#[test]
fn power_off() {
    let Some(vm) = Vm::any() else { return };
    let end = vm.init_does("poweroff").boot().wait();
    assert_one_line(end.assert_code(0), "the guest powered off (vCPU ");
}

/// However the kernel goes about it. Distribution kernels, built for EFI, end up in real mode where a
/// PC's firmware is; others use the reset register of the tables.
#[test]
fn reboot() {
    let Some(vm) = Vm::any() else { return };
    let vm = vm.cmdline(NO_KEYBOARD);
    let end = vm.init_does("reboot").boot().wait();
    assert_one_line(end.assert_code(0), "the guest asked for a reset (vCPU ");
    // Not by the keyboard controller that kernels fall back to.
    assert_eq!(end.counter("exits_port_write_0x64"), 0, "{end}");
}

#[test]
fn reboot_by_the_tables() {
    let Some(vm) = Vm::any() else { return };
    let vm = vm.cmdline(NO_KEYBOARD).cmdline("reboot=acpi,force");
    let vm = vm.init_does("reboot");
    let end = vm.boot().wait();
    assert_one_line(end.assert_code(0), "the guest asked for a reset (vCPU ");
    assert_eq!(end.counter("exits_port_write_0x64"), 0, "{end}");
    assert!(end.line().contains("in 64-bit mode"), "{end}");
}

#[test]
fn reboot_by_the_keyboard_controller() {
    let Some(vm) = Vm::any() else { return };
    let vm = vm.cmdline(NO_KEYBOARD).cmdline("reboot=k");
    let end = vm.init_does("reboot").boot().wait();
    assert_one_line(end.assert_code(0), "the guest asked for a reset (vCPU ");
    assert!(end.counter("exits_port_write_0x64") >= 1, "{end}");
}

#[test]
fn triple_fault() {
    let Some(vm) = Vm::any() else { return };
    let end = vm.cmdline("reboot=t").init_does("reboot").boot().wait();
    end.assert_code(5).assert_line("vCPU ");
    assert!(end.line().contains("triple fault"), "{end}");
    assert!(end.line().contains("0x"), "no place: {end}");
}

const PANICKED: &str = "the guest's kernel panicked: Kernel panic - not syncing: ";

#[test]
fn panic_told_by_the_panic_port() {
    let Some(vm) = Vm::stock_elf() else { return };
    let end = vm.init_does("panic").boot().wait();
    end.assert_code(4);
    assert_one_line(&end, &format!("{PANICKED}sysrq triggered crash (vCPU "));
    // Once to ask what it can do, once to tell.
    assert_eq!(end.counter("exits_port_write_0x505"), 1, "{end}");
}

/// Without the driver of the panic port. Kernels that cannot crash on request panic because init ends.
#[test]
fn panic_told_by_the_console() {
    let Some(vm) = Vm::any() else { return };
    let vm = vm.cmdline("module_blacklist=pvpanic,pvpanic_mmio");
    let end = vm.init_does("panic").boot().wait();
    assert_one_line(end.assert_code(4), PANICKED);
    assert_eq!(end.counter("exits_port_write_0x505"), 0, "{end}");
}

/// A kernel that was not told to reboot stands still after a panic; nobody shall wait for it for ever.
#[test]
fn a_panic_that_stands_still_ends_too() {
    let Some(vm) = Vm::stock_elf() else { return };
    let end = vm.cmdline("panic=0").init_does("panic").boot().wait();
    assert_one_line(end.assert_code(4), PANICKED);
}

#[test]
fn the_power_button_ends_a_guest_in_good_order() {
    let Some(vm) = Vm::stock_elf() else { return };
    let vm = vm.option("--on-sigterm").option("power-button");
    let mut vm = vm.init_does("sleep").boot();
    vm.wait_for("alveole-guest: power-button event");
    vm.signal(Signal::SIGTERM);
    vm.wait_for("alveole-guest: power button pressed");
    let end = vm.wait();
    assert_one_line(end.assert_code(0), "the guest powered off (vCPU ");
}

#[test]
fn a_second_sigterm_ends_a_guest_that_does_not_listen() {
    let Some(vm) = Vm::any() else { return };
    let vm = vm.option("--on-sigterm").option("power-button");
    let mut vm = vm.init_does("shell").boot();
    vm.wait_for_boot();
    vm.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(300));
    let asked = Instant::now();
    vm.signal(Signal::SIGTERM);
    let end = vm.wait();
    end.assert_code(143).assert_line("ended by signal 15");
    assert!(asked.elapsed() < patience(3), "{:?}", asked.elapsed());
}

#[test]
fn signals_end_it_at_once() {
    let signals = [
        (Signal::SIGTERM, 15, 143),
        (Signal::SIGINT, 2, 130),
        (Signal::SIGHUP, 1, 156),
    ];
    for (signal, number, code) in signals {
        let Some(vm) = Vm::any() else { return };
        let mut vm = vm.init_does("shell").boot();
        vm.wait_for_boot();
        vm.signal(signal);
        let end = vm.wait();
        end.assert_code(code);
        end.assert_line(&format!("ended by signal {number}"));
    }
}
