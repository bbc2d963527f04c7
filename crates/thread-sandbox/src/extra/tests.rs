//! Files as both generations of seccompiler-bin write them, whole, cut and wrong; what a filter does to a thread is in `tests/roles.rs`.

use std::collections::BTreeMap;

use proptest::prelude::*;
use seccompiler::{SeccompAction, SeccompFilter};

use super::*;

/// A filter that answers `refused` with `action` and allows everything else, as instructions of 64 bits.
fn compiled(refused: &[i64], action: SeccompAction) -> Vec<u64> {
    let rules = refused.iter().map(|call| (*call, vec![])).collect();
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch).unwrap();
    let program: seccompiler::BpfProgram = filter.try_into().unwrap();
    let word = |i: &seccompiler::sock_filter| {
        u64::from(i.code) | u64::from(i.jt) << 16 | u64::from(i.jf) << 24 | u64::from(i.k) << 32
    };
    program.iter().map(word).collect()
}

fn any_filter() -> Vec<u64> {
    compiled(&[libc::SYS_openat], SeccompAction::Trap)
}

/// As seccompiler-bin wrote it up to Firecracker 1.14.
fn old_form(programs: &[(&str, Vec<u64>)]) -> Vec<u8> {
    let mut bytes = (programs.len() as u64).to_le_bytes().to_vec();
    for (name, program) in programs {
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend(name.bytes());
        bytes.extend((program.len() as u64).to_le_bytes());
        bytes.extend(program.iter().flat_map(|word| word.to_le_bytes()));
    }
    bytes
}

/// As it writes it since Firecracker 1.15.
fn new_form(programs: &[(&str, Vec<u64>)]) -> Vec<u8> {
    let map: BTreeMap<&str, Vec<u64>> = programs.iter().cloned().collect();
    bitcode::serialize(&map).unwrap()
}

fn three() -> Vec<(&'static str, Vec<u64>)> {
    ["vmm", "api", "vcpu"]
        .map(|name| (name, any_filter()))
        .into()
}

fn told(bytes: &[u8]) -> String {
    ExtraFilters::from_bytes(bytes).unwrap_err().to_string()
}

#[test]
fn both_forms_are_read() {
    let mut programs = three();
    programs[2].1 = compiled(&[1, 2, 3], SeccompAction::Errno(1));
    // Names without regard to case, as Firecracker reads them.
    programs[1].0 = "Api";
    for bytes in [old_form(&programs), new_form(&programs)] {
        let read = ExtraFilters::from_bytes(&bytes).unwrap();
        for (role, name) in [
            (Role::Control, "vmm"),
            (Role::Devices, "vmm"),
            (Role::Files, "vmm"),
            (Role::Pages, "vmm"),
            (Role::Api, "Api"),
            (Role::Vcpu, "vcpu"),
        ] {
            let want = &programs.iter().find(|p| p.0 == name).unwrap().1;
            let (before, program) = read.of_role(role).split_at(compose::PASS_SECCOMP.len());
            assert_eq!(before.len(), 4);
            let words = program.iter().map(|i| {
                u64::from(i.code)
                    | u64::from(i.jt) << 16
                    | u64::from(i.jf) << 24
                    | u64::from(i.k) << 32
            });
            assert_eq!(&words.collect::<Vec<_>>(), want, "{role}");
        }
        read.check().unwrap();
    }
}

#[test]
fn a_file_cut_anywhere_is_called_so() {
    let whole = old_form(&three());
    for cut in 8..whole.len() {
        let text = told(&whole[..cut]);
        assert!(text.contains("is the file complete?"), "{cut}: {text}");
    }
    for cut in 0..8 {
        let text = told(&whole[..cut]);
        assert!(text.contains("seccompiler-bin"), "{cut}: {text}");
    }
    let whole = new_form(&three());
    for cut in 1..whole.len() {
        let text = told(&whole[..cut]);
        assert!(
            text.contains("compile the rules with it first"),
            "{cut}: {text}"
        );
    }
    for mut more in [old_form(&three()), new_form(&three())] {
        more.push(0);
        assert!(ExtraFilters::from_bytes(&more).is_err());
    }
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let long = vec![any_filter()[0]; MAX_EXTRA_INSTRUCTIONS + 1];
    let programs = [
        ("vcpu", vec![]),
        ("main", any_filter()),
        ("vmm", long),
        ("io\x1b[2J", any_filter()),
    ];
    for bytes in [old_form(&programs), new_form(&programs)] {
        let text = told(&bytes);
        for part in [
            "the filter of thread \"vcpu\" has no instruction",
            "there is no thread \"main\": the threads are vmm, api and vcpu",
            "there is no thread \"io\\u{1b}[2j\"",
            "the filter of thread \"vmm\" has 4093 instructions, the limit is 4092; take rules out",
            "there is no filter for thread \"api\"",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    let mut twice = three();
    twice.push(("VMM", any_filter()));
    for bytes in [old_form(&twice), new_form(&twice)] {
        assert!(told(&bytes).contains("thread \"vmm\" has two filters"));
    }
    assert!(told(b"").contains("the file is empty"));
    assert!(told(b"{\"vmm\": {}}").contains("compile the rules with it first"));
    assert!(told(&vec![0; MAX_EXTRA_FILTERS_BYTES + 1]).contains("more than 100000 bytes"));
    let many: Vec<_> = (0..9)
        .map(|at| (["a", "b", "c"][at % 3], any_filter()))
        .collect();
    assert!(told(&old_form(&many)).contains("more than 8 threads"));
    let mut no_text = old_form(&three());
    no_text[16] = 0xff;
    assert!(told(&no_text).contains("is no text"));
    // A length that no file has.
    let mut huge = old_form(&three());
    huge[19..27].fill(0xff);
    assert!(told(&huge).contains("18446744073709551615 more bytes should follow at byte 27"));
}

/// The kernel is asked, and the thread that asks stays as free as it was.
#[test]
fn programs_that_the_kernel_does_not_take() {
    let mut programs = three();
    programs[0].1 = vec![0xff];
    // A jump out of the program.
    programs[2].1 = vec![0x05 | 9 << 32, any_filter()[0]];
    let filters = ExtraFilters::from_bytes(&old_form(&programs)).unwrap();
    let text = filters.check().unwrap_err().to_string();
    for part in [
        "thread \"vmm\": seccomp(",
        "thread \"vcpu\": seccomp(",
        "Invalid argument",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("\"api\""), "{text}");
    // SAFETY: takes a number only.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_SECCOMP) }, 0);
    let mut longest = any_filter();
    let last = *longest.last().unwrap();
    longest = vec![last; MAX_EXTRA_INSTRUCTIONS];
    programs = three();
    programs[0].1 = longest;
    let filters = ExtraFilters::from_bytes(&old_form(&programs)).unwrap();
    filters.check().unwrap();
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = ExtraFilters::from_bytes(&bytes);
    }

    #[test]
    fn files_with_wrong_bytes_are_read_or_refused(
        new in any::<bool>(),
        wrong in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = if new { new_form(&three()) } else { old_form(&three()) };
        for (at, value) in wrong {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(filters) = ExtraFilters::from_bytes(&bytes) {
            let longest = filters.0.iter().map(Vec::len).max();
            prop_assert!(longest <= Some(compose::MAX_INSTRUCTIONS));
        }
    }
}
