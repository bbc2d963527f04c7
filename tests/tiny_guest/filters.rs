//! Files for `--seccomp-filter`, in the form of Firecracker's seccompiler-bin up to 1.14.

/// Instructions of 64 bits: code, jt, jf and k of `struct sock_filter`, from the lowest bit.
pub(crate) type Program = Vec<u64>;

/// Ends a filter with this answer.
const fn answer(action: u32) -> u64 {
    0x06 | (action as u64) << 32
}

/// Refuses nothing.
pub(crate) fn allow() -> Program {
    vec![answer(libc::SECCOMP_RET_ALLOW)]
}

/// Answers `call` with `action` and allows the rest.
pub(crate) fn refuse(call: libc::c_long, action: u32) -> Program {
    let call = u64::try_from(call).unwrap();
    // ld [0], the call's number; jeq #call, 0, 1
    let test = 0x15 | 1 << 24 | call << 32;
    vec![0x20, test, answer(action), answer(libc::SECCOMP_RET_ALLOW)]
}

/// All threads with the same one.
pub(crate) fn same_for_all(program: &Program) -> Vec<(&'static str, Program)> {
    ["vmm", "api", "vcpu"]
        .map(|name| (name, program.clone()))
        .into()
}

/// As [`allow`] for all threads but one.
pub(crate) fn only_for(thread: &str, program: &Program) -> Vec<(&'static str, Program)> {
    let mut all = same_for_all(&allow());
    for (name, of) in &mut all {
        if *name == thread {
            of.clone_from(program);
        }
    }
    all
}

/// The file.
pub(crate) fn file(programs: &[(&str, Program)]) -> Vec<u8> {
    let number = |n: usize| (n as u64).to_le_bytes();
    let mut bytes = number(programs.len()).to_vec();
    for (name, program) in programs {
        bytes.extend(number(name.len()));
        bytes.extend(name.bytes());
        bytes.extend(number(program.len()));
        bytes.extend(program.iter().flat_map(|word| word.to_le_bytes()));
    }
    bytes
}
