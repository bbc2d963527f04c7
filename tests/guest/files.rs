//! The files that a guest boots from are shared, and stay as they are.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

use crate::harness::Vm;

fn sum(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(&fs::read(path).unwrap());
    hasher.finish()
}

#[test]
fn two_guests_at_once_share_one_kernel_and_leave_it_as_it_was() {
    two_guests_at_once("share");
}

#[test]
fn two_guests_at_once_copy_one_kernel_and_leave_it_as_it_was() {
    two_guests_at_once("copy");
}

/// Mapped copy-on-write or copied: the default is one or the other, by what the host's KVM is.
fn two_guests_at_once(kernel_memory: &str) {
    let vm = || Vm::any().map(|vm| vm.option("--kernel-memory").option(kernel_memory));
    let (Some(one), Some(two)) = (vm(), vm()) else {
        return;
    };
    let paths = [one.kernel_path().to_owned(), one.initrd_path().to_owned()];
    let before = paths.each_ref().map(|p| sum(p));
    let mut one = one.init_does("shell").boot();
    let mut two = two.init_does("shell").boot();
    one.wait_for_boot();
    two.wait_for_boot();
    // What one writes into its copy of the initrd's file system, the other does not see.
    one.type_in("echo mine >/etc/mark; cat /etc/mark\n");
    one.wait_for("\nmine");
    two.type_in("cat /etc/mark || echo none-$((3 * 3))\n");
    two.wait_for("none-9");
    for mut vm in [one, two] {
        vm.type_in("exit\n");
        vm.wait().assert_code(0);
    }
    assert_eq!(
        before,
        paths.each_ref().map(|p| sum(p)),
        "{paths:?} changed"
    );
}
