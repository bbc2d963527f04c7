//! The monitor runs confined and needs no rights.

use nix::sys::signal::Signal;

use crate::harness::{Vm, kvm_is_open_to_all, skip};

#[test]
fn every_thread_of_a_running_monitor_is_confined() {
    let Some(vm) = Vm::any() else { return };
    let mut vm = vm.cpus(2).init_does("shell").boot();
    vm.wait_for_boot();
    let mut threads = vm.threads();
    // KVM's own worker, which Linux 6.13 and later show as a thread of the process: it runs no code of
    // ours and none of the guest's.
    threads.retain(|(name, _)| !name.starts_with("kvm-nx-lpage"));
    let mut names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["alveole-vmm", "devices", "vcpu 0", "vcpu 1"]);
    for (name, status) in &threads {
        for want in ["Seccomp:\t2", "NoNewPrivs:\t1"] {
            assert!(
                status.lines().any(|l| l == want),
                "{name}: no {want:?} in\n{status}"
            );
        }
    }
    vm.signal(Signal::SIGINT);
    vm.wait().assert_code(130);
}

#[test]
fn no_rights_are_needed_where_kvm_is_accessible() {
    if !kvm_is_open_to_all() {
        skip("/dev/kvm is not open to an unprivileged user here");
        return;
    }
    let Some(vm) = Vm::any() else { return };
    let mut vm = vm.run_by_nobody().init_does("shell").boot();
    vm.wait_for_boot();
    for (name, status) in vm.threads() {
        let line = status.lines().find(|l| l.starts_with("CapEff:")).unwrap();
        assert_eq!(line, "CapEff:\t0000000000000000", "{name}");
    }
    vm.type_in("exit\n");
    vm.wait().assert_code(0);
}
