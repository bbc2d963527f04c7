//! What `cpu-config` says of processors is what a guest finds, on each of them.

use serde_json::{Value, json};

use crate::harness::Vm;

const CPUS: usize = 2;
/// Both halves are the same: Intel's revision is the upper one, AMD's the lower.
const MICROCODE: u32 = 0x0a0b_0c0d;

/// Features of the first leaf that a kernel does without, by their bit of ECX.
const FEATURES: [(&str, u32); 6] = [
    ("pclmulqdq", 1),
    ("ssse3", 9),
    ("movbe", 22),
    ("aes", 25),
    ("rdrand", 30),
    ("x2apic", 21),
];

/// The lines of this name in what the kernel knows of its processors, one a processor.
fn known(vm: Vm, names: &[&str]) -> Vec<Vec<String>> {
    let mut vm = vm.cpus(CPUS.try_into().unwrap()).takes_commands().boot();
    vm.wait_for_commands();
    let all = names
        .iter()
        .map(|name| {
            let (status, lines) = vm.ask(&format!("grep '^{name}' /proc/cpuinfo"));
            assert_eq!(status, 0, "no {name}: {lines}");
            let value = |line: &str| line.split_once(": ").unwrap().1.trim().to_owned();
            lines.lines().map(value).collect()
        })
        .collect();
    vm.leave().assert_code(0);
    all
}

fn clears(feature: u32) -> Value {
    let bitmap: String = (0..32)
        .rev()
        .map(|bit| if bit == feature { '0' } else { 'x' })
        .collect();
    json!([{
        "leaf": "0x1", "subleaf": "0x0", "flags": 0,
        "modifiers": [{ "register": "ecx", "bitmap": format!("0b{bitmap}") }],
    }])
}

fn has(flags: &str, name: &str) -> bool {
    flags.split(' ').any(|flag| flag == name)
}

// A stock kernel: a KVM that runs only kernels that know it may answer their CPUID by itself.
#[test]
fn a_feature_that_is_cleared_is_gone() {
    let Some(plain) = Vm::stock_elf() else { return };
    let Some(changed) = Vm::stock_elf() else {
        return;
    };
    let before = known(plain, &["flags"]);
    let found = FEATURES.iter().find(|(name, _)| has(&before[0][0], name));
    let (name, bit) = found.expect("one of the features is there");
    let after = known(
        changed.cpu_config(json!({ "cpuid_modifiers": clears(*bit) })),
        &["flags", "apicid"],
    );
    assert_eq!([before[0].len(), after[0].len()], [CPUS; 2]);
    for (before, after) in before[0].iter().zip(&after[0]) {
        assert!(has(before, name), "{name} in {before}");
        assert!(!has(after, name), "{name} in {after}");
        let lost = |flag: &&str| !has(after, flag);
        let lost: Vec<_> = before.split(' ').filter(lost).collect();
        assert!(
            lost.len() <= 3,
            "what depends on it may go as well: {lost:?}"
        );
    }
    assert_eq!(after[1], ["0", "1"], "each keeps its place");
}

#[test]
fn a_register_that_is_set_is_read_on_every_processor() {
    let Some(vm) = Vm::any() else { return };
    let revision = format!("{MICROCODE:032b}");
    let bitmap = format!("0b{revision}{revision}");
    let vm = vm
        .by_api()
        .cpu_config(json!({ "msr_modifiers": [{ "addr": "0x8b", "bitmap": bitmap }] }));
    assert_eq!(
        known(vm, &["microcode"])[0],
        vec![format!("{MICROCODE:#x}"); CPUS]
    );
}
