//! The console on each thing that it can be on, and the terminal given back on every way out.

use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::harness::{Console, End, Running, Vm, patience};

/// A shell on a terminal that was found raw.
fn shell_on_a_terminal() -> Option<Running> {
    let mut vm = Vm::any()?
        .init_does("shell")
        .console(Console::Terminal)
        .boot();
    vm.wait_for_boot();
    assert!(
        vm.settings().is_raw(),
        "the terminal is not raw: {:?}",
        vm.settings()
    );
    Some(vm)
}

#[track_caller]
fn assert_given_back(end: &End) {
    let (before, after) = end.terminal.as_ref().expect("it was on a terminal");
    assert!(!before.is_raw());
    assert_eq!(after, before, "the terminal was not given back: {end}");
}

#[test]
fn a_shell_on_a_terminal_answers_until_it_ends() {
    let Some(mut vm) = shell_on_a_terminal() else {
        return;
    };
    vm.type_in("echo $((6 * 7))-answer\n");
    vm.wait_for("42-answer");
    // Ctrl-C is the guest's: it ends what runs in the guest, not the monitor.
    vm.type_in("sleep 1000\n");
    vm.wait_for("sleep 1000");
    std::thread::sleep(Duration::from_millis(500));
    vm.type_in("\x03");
    vm.type_in("echo still-$((1 + 1))\n");
    vm.wait_for("still-2");
    vm.type_in("exit\n");
    let end = vm.wait();
    end.assert_code(0).assert_line("the guest powered off");
    assert_given_back(&end);
}

#[test]
fn keys_for_the_monitor() {
    let Some(mut vm) = shell_on_a_terminal() else {
        return;
    };
    vm.type_in("\x01c");
    vm.wait_for("[alveole] Ctrl-A x");
    vm.wait_for("[alveole] Ctrl-A c");
    vm.type_in("\x01x");
    let end = vm.wait();
    end.assert_code(0).assert_line("ended from the console");
    assert_given_back(&end);
}

#[test]
fn the_power_button_by_key() {
    let Some(vm) = Vm::stock_elf() else { return };
    let mut vm = vm.init_does("sleep").console(Console::Terminal).boot();
    vm.wait_for("alveole-guest: power-button event");
    vm.type_in("\x01p");
    let end = vm.wait();
    end.assert_code(0).assert_line("the guest powered off");
    assert_given_back(&end);
}

#[test]
fn the_terminal_is_given_back_when_signals_end_it() {
    let Some(vm) = shell_on_a_terminal() else {
        return;
    };
    vm.signal(Signal::SIGTERM);
    let end = vm.wait();
    end.assert_code(143);
    assert_given_back(&end);
}

#[test]
fn the_terminal_is_given_back_after_a_crash() {
    let Some(vm) = shell_on_a_terminal() else {
        return;
    };
    vm.signal(Signal::SIGSEGV);
    let end = vm.wait();
    assert_eq!(end.signal, Some(11), "{end}");
    assert_given_back(&end);
}

#[test]
fn the_terminal_is_given_back_when_the_guest_panics() {
    let Some(vm) = Vm::any() else { return };
    let end = vm
        .init_does("panic")
        .console(Console::Terminal)
        .boot()
        .wait();
    end.assert_code(4);
    assert_given_back(&end);
}

#[test]
fn a_terminal_that_vanishes_ends_the_guest() {
    let Some(mut vm) = shell_on_a_terminal() else {
        return;
    };
    vm.hang_up();
    let end = vm.wait();
    end.assert_code(156)
        .assert_line("the terminal of the console is gone");
}

#[test]
fn commands_come_through_a_pipe() {
    let Some(vm) = Vm::any() else { return };
    let mut vm = vm.init_does("shell").boot();
    vm.wait_for_boot();
    // Ctrl-A x is nothing special in a pipe.
    vm.type_in("echo piped-$((20 + 3))\n");
    vm.wait_for("piped-23");
    vm.type_in("exit\n");
    vm.wait().assert_code(0);
}

#[test]
fn a_console_in_a_file() {
    let Some(vm) = Vm::any() else { return };
    let mut vm = vm.console(Console::File).boot();
    vm.wait_for_boot();
    let end = vm.wait();
    end.assert_code(0);
    assert!(
        end.console.contains("reboot: Power down") || end.console.contains("Power down"),
        "{end}"
    );
}

#[test]
fn a_late_client_of_the_socket_sees_what_came_before_and_can_type() {
    let Some(vm) = Vm::any() else { return };
    let mut vm = vm
        .init_does("shell")
        .console(Console::Socket)
        .option("--boot-timer")
        .boot();
    // The boot timer tells when the guest is up, though nobody listens.
    vm.wait_for_stderr("boot timer:");
    let mut client = vm.attach();
    vm.wait_for("alveole-guest: uname Linux");
    vm.wait_for_boot();
    client.write_all(b"echo typed-$((2 * 21))\n").unwrap();
    vm.wait_for("typed-42");
    // It goes, and another one comes.
    client.shutdown(std::net::Shutdown::Both).unwrap();
    drop(client);
    let mut client = vm.attach();
    client.write_all(b"exit\n").unwrap();
    let end = vm.wait();
    end.assert_code(0);
}

#[test]
fn a_flood_that_nobody_reads_costs_no_memory_and_no_patience() {
    let Some(vm) = Vm::any() else { return };
    let mut vm = vm.init_does("flood").boot();
    vm.wait_for("alveole-guest: flood");
    vm.stop_reading();
    std::thread::sleep(Duration::from_millis(500));
    let before = vm.own_kib();
    std::thread::sleep(Duration::from_secs(6));
    let grown = vm.own_kib().saturating_sub(before);
    assert!(
        grown < 2048,
        "the monitor grew by {grown} KiB in 6 s, from {before}"
    );
    let asked = Instant::now();
    vm.signal(Signal::SIGTERM);
    let end = vm.wait();
    end.assert_code(143);
    // The monitor gives the reader two seconds to take what is left.
    assert!(
        asked.elapsed() < Duration::from_secs(2) + patience(3),
        "it took {:?}",
        asked.elapsed()
    );
    // As much as was written is with the reader, waits in the bounded queue, or was dropped.
    let written = end.counter("exits_port_write_0x3f8");
    let held = 512 << 10;
    assert!(
        end.counter("bytes_out") + end.counter("bytes_dropped") + held >= written,
        "{written} bytes were written: {end}"
    );
    assert!(written < held || end.counter("bytes_dropped") > 0, "{end}");
}

/// Accesses of the UART by a guest that writes so many bytes to its console, one at a time.
fn accesses_of_bytes(bytes: u64) -> Option<u64> {
    let mut vm = Vm::any()?.takes_commands().boot();
    vm.wait_for_commands();
    let beat =
        format!("i=0; while [ $i -lt {bytes} ]; do printf . ; usleep 3000; i=$((i + 1)); done");
    assert_eq!(vm.ask(&beat).0, 0);
    let end = vm.leave();
    end.assert_code(0);
    let ports = (0x3f8..0x400).map(|port| format!("_0x{port:x}"));
    let counters =
        ports.flat_map(|port| ["read", "write"].map(|act| format!("exits_port_{act}{port}")));
    let all: Vec<(String, u64)> = counters
        .map(|name| (name.clone(), end.counter(&name)))
        .collect();
    println!("{bytes} bytes: {all:?}");
    Some(all.iter().map(|(_, count)| count).sum())
}

/// Each access costs a guest that prints an exit. Linux needs eight for a byte alone: it enables the interrupt of the empty transmitter, asks which it is and
/// looks at line and modem, writes the byte, disables the interrupt, and asks twice whether there is more, as the byte has raised another.
#[test]
fn a_byte_on_the_console_takes_few_exits() {
    const BYTES: u64 = 400;
    let Some(none) = accesses_of_bytes(0) else {
        return;
    };
    let Some(some) = accesses_of_bytes(BYTES) else {
        return;
    };
    let each = some.saturating_sub(none) as f64 / BYTES as f64;
    assert!((1.0..9.0).contains(&each), "{each} accesses for each byte");
}
