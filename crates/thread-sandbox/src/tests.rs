//! What the filters decide, asked of the compiled BPF itself, and what the build refuses.
//!
//! The filters run here in a small interpreter; `tests/roles.rs` runs them in the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use libc::sock_filter;

use crate::policy::{self, NEVER, ONLY_FILES, Policy, Test};
use crate::{Role, compile, compose, filters};

const PID: u32 = 4711;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const TRAP: u32 = libc::SECCOMP_RET_TRAP | compose::OURS as u32;
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

/// The kernel's `seccomp_data`, as 32-bit words.
fn data(arch: u32, call: u32, args: [u64; 6]) -> [u32; 16] {
    let mut words = [0; 16];
    (words[0], words[1]) = (call, arch);
    for (at, arg) in args.iter().enumerate() {
        words[4 + 2 * at] = *arg as u32;
        words[5 + 2 * at] = (*arg >> 32) as u32;
    }
    words
}

/// Runs the instructions that our filters have.
fn answer(filter: &[sock_filter], data: [u32; 16]) -> u32 {
    run(filter, data).0
}

/// As [`answer`], and how many instructions it took.
fn run(filter: &[sock_filter], data: [u32; 16]) -> (u32, usize) {
    let (mut at, mut a) = (0, 0_u32);
    for steps in 1.. {
        let i = &filter[at];
        let jump = |holds: bool| usize::from(if holds { i.jt } else { i.jf });
        at += 1 + match i.code {
            0x20 => {
                a = data[i.k as usize / 4];
                0
            }
            0x54 => {
                a &= i.k;
                0
            }
            0x05 => i.k as usize,
            0x15 => jump(a == i.k),
            0x35 => jump(a >= i.k),
            0x06 => return (i.k, steps),
            other => panic!("instruction {other:#x} is not in the interpreter"),
        };
    }
    unreachable!("a filter answers")
}

fn folder() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../resources/seccomp/x86_64"
    ))
}

fn role_of(role: Role) -> policy::Role {
    match role {
        Role::Control => policy::Role::Control,
        Role::Devices => policy::Role::Devices,
        Role::Vcpu => policy::Role::Vcpu,
        Role::Api => policy::Role::Api,
        Role::Files => policy::Role::Files,
        Role::Pages => policy::Role::Pages,
    }
}

fn args_that_fit(rule: &policy::Rule) -> [u64; 6] {
    let mut args = [0; 6];
    for c in &rule.args {
        args[usize::from(c.index)] = match c.test {
            Test::Is(value) => u64::from(value),
            Test::IsOwnProcess => u64::from(PID),
            Test::Lacks(bits) => u64::from(!bits),
        };
    }
    args
}

#[test]
fn every_role_allows_what_its_rules_name_and_nothing_else() {
    let policy = Policy::read(folder()).unwrap();
    for role in Role::ALL {
        let filter = compose::filter(&[filters::base(role)], PID);
        assert!(
            filter.len() < compose::MAX_INSTRUCTIONS / 4,
            "{role}: {}",
            filter.len()
        );
        let rules = policy.of_role(role_of(role));
        let named: BTreeSet<u32> = rules.iter().map(|r| r.number as u32).collect();
        for rule in &rules {
            let args = args_that_fit(rule);
            let asked = |args| answer(&filter, data(X86_64, rule.number as u32, args));
            assert_eq!(asked(args), ALLOW, "{role}: {}", rule.syscall);
            for c in &rule.args {
                let mut wrong = args;
                wrong[usize::from(c.index)] = match c.test {
                    Test::Lacks(bits) => u64::from(bits),
                    _ => 0xdead_beef,
                };
                assert_eq!(asked(wrong), TRAP, "{role}: {}", rule.syscall);
            }
        }
        for call in (0..1024).filter(|call| !named.contains(call)) {
            assert_eq!(
                answer(&filter, data(X86_64, call, [0; 6])),
                TRAP,
                "{role}: {call}"
            );
        }
        for call in 0..1024 {
            let x32 = data(X86_64, call | 0x4000_0000, [0; 6]);
            assert_eq!(answer(&filter, x32), TRAP, "{role}: x32 {call}");
            let i386 = data(I386, call, [0; 6]);
            assert_eq!(answer(&filter, i386), libc::SECCOMP_RET_KILL_PROCESS);
        }
    }
}

/// The kernel tries each filter with every call when a thread enters it, which is before a guest runs.
#[test]
fn a_call_is_found_by_few_comparisons() {
    for role in Role::ALL {
        let filter = compose::filter(&[filters::base(role)], PID);
        let steps = |call| run(&filter, data(X86_64, call, [0; 6])).1;
        // Architecture, number, some halvings of at most 128 calls, two comparisons, the end.
        let mean = (0..512).map(steps).sum::<usize>() / 512;
        assert!(mean <= 16, "{role}: {mean}");
    }
}

#[test]
fn no_role_has_a_way_out() {
    let policy = Policy::read(folder()).unwrap();
    let number = |name: &str| name.parse::<syscalls::x86_64::Sysno>().expect(name).id() as u32;
    for role in Role::ALL {
        let never = NEVER
            .iter()
            .filter(|name| role != Role::Files || !ONLY_FILES.contains(name))
            .map(|name| number(name));
        // With every fragment at once no role may have more than with the base alone.
        let fragments = filters::DEVICES
            .iter()
            .filter_map(|d| filters::fragment(d, role));
        let blocks: Vec<_> = [filters::base(role)].into_iter().chain(fragments).collect();
        let filter = compose::filter(&blocks, PID);
        for call in never {
            assert_eq!(
                answer(&filter, data(X86_64, call, [0; 6])),
                TRAP,
                "{role}: {call}"
            );
        }
        // A plain fork for `files`, no thread and no namespace for anybody.
        let clones = |flags: u64| answer(&filter, data(X86_64, 56, [flags, 0, 0, 0, 0, 0]));
        let fork = u64::from(policy::FORK_FLAGS);
        assert_eq!(clones(fork) == TRAP, role != Role::Files, "{role}");
        for bit in 0..32 {
            assert_eq!(clones(fork ^ 1 << bit), TRAP, "{role}: {bit}");
        }
        let sets = |signal| {
            data(
                X86_64,
                libc::SYS_rt_sigaction as u32,
                [signal, 1, 0, 8, 0, 0],
            )
        };
        for signal in (0..64).filter(|s| !policy::CRASH_SIGNALS.contains(s)) {
            assert_eq!(
                answer(&filter, sets(signal.into())),
                TRAP,
                "{role}: {signal}"
            );
        }
        for signal in policy::CRASH_SIGNALS {
            assert_ne!(
                answer(&filter, sets(signal.into())),
                TRAP,
                "{role}: {signal}"
            );
        }
        for call in [libc::SYS_mmap, libc::SYS_mprotect] {
            for prot in [
                libc::PROT_EXEC,
                libc::PROT_EXEC | libc::PROT_READ | libc::PROT_WRITE,
            ] {
                let asked = data(X86_64, call as u32, [0, 4096, prot as u64, 0, 0, 0]);
                assert_eq!(answer(&filter, asked), TRAP, "{role}");
            }
        }
        let other_process = [1, 1, 6, 0, 0, 0];
        let asked = data(X86_64, libc::SYS_tgkill as u32, other_process);
        assert_eq!(answer(&filter, asked), TRAP, "{role}");
        assert!(!policy.of_role(role_of(role)).is_empty());
    }
}

#[test]
fn names_of_system_calls_are_those_of_the_kernel() {
    assert_eq!(filters::SYSCALL_NAMES, policy::syscall_names());
    assert_eq!(filters::SYSCALL_NAMES[libc::SYS_openat as usize], "openat");
    assert_eq!(
        filters::SYSCALL_NAMES[libc::SYS_io_uring_setup as usize],
        "io_uring_setup"
    );
}

const EVERY: &str = r#"[
  { "syscall": "write", "why": "w" },
  { "syscall": "exit_group", "why": "w" },
  { "syscall": "rt_sigreturn", "why": "w" }
]"#;

/// A folder of policies in which each role has `EVERY` and nothing else, but for `files`.
fn policy_of(files: &[(&str, &str)]) -> Result<Policy, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("devices.d")).unwrap();
    fs::write(folder.path().join("every-thread.json"), EVERY).unwrap();
    for role in Role::ALL {
        fs::write(folder.path().join(format!("{role}.json")), "[]").unwrap();
    }
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    Policy::read(folder.path())
}

/// More calls than a comparison can jump over: all that a policy may name.
#[test]
fn each_of_many_calls_is_allowed_and_no_other() {
    let rule = |name: &str| format!(r#"{{ "syscall": "{name}", "why": "w" }}"#);
    let allowed: Vec<_> = policy::syscall_names()
        .into_iter()
        .filter(|name| policy_of(&[("devices.json", &format!("[{}]", rule(name)))]).is_ok())
        .collect();
    assert!(allowed.len() > 256, "{}", allowed.len());
    let rules: Vec<_> = allowed.iter().map(|name| rule(name)).collect();
    let policy = policy_of(&[("devices.json", &format!("[{}]", rules.join(",")))]).unwrap();
    let block = compile::block(&policy.of_role(policy::Role::Devices)).unwrap();
    let one = |i: &compile::Instruction| sock_filter {
        code: i.code,
        jt: i.jt,
        jf: i.jf,
        k: i.k,
    };
    let block: Vec<_> = block.iter().map(one).collect();
    let filter = compose::filter(&[&block], PID);
    for (number, name) in policy::syscall_names().into_iter().enumerate() {
        let everybodys = EVERY.contains(&format!("\"{name}\""));
        let want = if allowed.contains(&name) || everybodys {
            ALLOW
        } else {
            TRAP
        };
        assert_eq!(
            answer(&filter, data(X86_64, number as u32, [0; 6])),
            want,
            "{name}"
        );
    }
}

#[test]
fn a_fragment_adds_to_the_role_it_names_and_only_when_it_is_there() {
    let policy = policy_of(&[
        (
            "devices.json",
            r#"[{ "syscall": "ioctl", "args": [{ "index": 1, "is": "1", "means": "ONE" }], "why": "w" }]"#,
        ),
        (
            "devices.d/net.json",
            r#"{ "devices": [
                { "syscall": "readv", "why": "w" },
                { "syscall": "ioctl", "args": [{ "index": 1, "is": "0x2", "means": "TWO" }], "why": "w" },
                { "syscall": "tgkill", "args": [{ "index": 0, "is": "own process id", "means": "us" }], "why": "w" }
            ] }"#,
        ),
    ])
    .unwrap();
    let base = compile::block(&policy.of_role(policy::Role::Devices)).unwrap();
    let (name, roles) = &policy.devices[0];
    assert_eq!(name, "net");
    let rules: Vec<_> = roles[&policy::Role::Devices].iter().collect();
    let fragment = compile::block(&rules).unwrap();
    let ours = |block: Vec<compile::Instruction>| -> Vec<sock_filter> {
        let one = |i: compile::Instruction| sock_filter {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        };
        block.into_iter().map(one).collect()
    };
    let (base, fragment) = (ours(base), ours(fragment));
    let alone = compose::filter(&[&base], PID);
    let both = compose::filter(&[&base, &fragment], PID);
    let swapped = compose::filter(&[&fragment, &base], PID);
    let ioctl = libc::SYS_ioctl as u32;
    let pid = u64::from(PID);
    for (call, args, without, with) in [
        (libc::SYS_write as u32, [0; 6], ALLOW, ALLOW),
        (libc::SYS_readv as u32, [0; 6], TRAP, ALLOW),
        (ioctl, [0, 1, 0, 0, 0, 0], ALLOW, ALLOW),
        (ioctl, [0, 2, 0, 0, 0, 0], TRAP, ALLOW),
        (ioctl, [0, 3, 0, 0, 0, 0], TRAP, TRAP),
        (libc::SYS_tgkill as u32, [pid, 0, 0, 0, 0, 0], TRAP, ALLOW),
        (libc::SYS_tgkill as u32, [1, 0, 0, 0, 0, 0], TRAP, TRAP),
        (libc::SYS_openat as u32, [0; 6], TRAP, TRAP),
    ] {
        let asked = data(X86_64, call, args);
        assert_eq!(answer(&alone, asked), without, "{call} {args:?}");
        assert_eq!(answer(&both, asked), with, "{call} {args:?}");
        assert_eq!(answer(&swapped, asked), with, "{call} {args:?}");
    }
}

#[test]
fn the_build_refuses_a_policy_with_a_mistake_and_says_where() {
    let forks_threads = r#"[{ "syscall": "clone", "args": [{ "index": 0, "is": "0x3d0f00", "means": "m" }], "why": "w" }]"#;
    let told = policy_of(&[("files.json", forks_threads)]).unwrap_err();
    assert!(
        told.contains("only a process that saves guest memory"),
        "{told}"
    );
    let rule = |text: &str| policy_of(&[("vcpu.json", text)]).unwrap_err();
    for (text, told) in [
        (
            r#"[{ "syscall": "raed", "why": "w" }]"#,
            "vcpu.json: rule 1 (raed): there is no system call of this name on x86_64",
        ),
        (
            r#"[{ "syscall": "poll", "why": "w" }, { "syscall": "read", "why": " " }]"#,
            "vcpu.json: rule 2 (read): \"why\" is empty; name the caller that needs the call",
        ),
        (
            r#"[{ "syscall": "read", "why": "w" }, { "syscall": "read", "why": "v" }]"#,
            "vcpu.json: rule 1 (read) and vcpu.json: rule 2 (read) allow the same call; remove one",
        ),
        (
            r#"[{ "syscall": "write", "why": "w" }]"#,
            "every-thread.json: rule 1 (write) and vcpu.json: rule 1 (write) allow the same call; \
             remove one",
        ),
        (
            r#"[{ "syscall": "execve", "why": "w" }]"#,
            "vcpu.json: rule 1 (execve): no role may make this call (NEVER in build/policy.rs)",
        ),
        (
            r#"[{ "syscall": "clone", "why": "w" }]"#,
            "vcpu.json: rule 1 (clone): no role may make this call (NEVER in build/policy.rs)",
        ),
        (
            r#"[{ "syscall": "mmap", "why": "w" }]"#,
            "vcpu.json: rule 1 (mmap): memory may not become executable; add { \"index\": 2, \
             \"lacks\": \"0x4\", \"means\": \"PROT_EXEC\" }",
        ),
        (
            r#"[{ "syscall": "read", "args": [{ "index": 6, "is": "1", "means": "m" }], "why": "w" }]"#,
            "vcpu.json: rule 1 (read): argument 6 does not exist; they are 0 to 5",
        ),
        (
            r#"[{ "syscall": "read", "args": [{ "index": 0, "is": "one", "means": "m" }], "why": "w" }]"#,
            "vcpu.json: rule 1 (read): \"one\" is no number below 2^32, decimal or with 0x in front",
        ),
        (
            r#"[{ "syscall": "read", "args": [{ "index": 0, "means": "m" }], "why": "w" }]"#,
            "vcpu.json: rule 1 (read): argument 0 needs either \"is\" or \"lacks\"",
        ),
        (
            r#"[{ "syscall": "read", "args": [{ "index": 0, "lacks": "0", "means": "m" }], "why": "w" }]"#,
            "vcpu.json: rule 1 (read): \"lacks\" of argument 0 names no bit",
        ),
        (
            r#"[{ "syscall": "read", "args": [{ "index": 0, "is": "1", "means": "" }], "why": "w" }]"#,
            "vcpu.json: rule 1 (read): \"means\" of argument 0 is empty; name the constant",
        ),
    ] {
        assert_eq!(rule(text), told);
    }
    let told = rule(r#"[{ "syscall": "read" }]"#);
    assert!(
        told.starts_with("vcpu.json: missing field `why` at line 1 "),
        "{told}"
    );
    let told = rule(r#"[{ "syscall": "read", "because": "w" }]"#);
    assert!(
        told.starts_with("vcpu.json: unknown field `because`, expected one of "),
        "{told}"
    );
}

#[test]
fn the_build_refuses_stray_files_and_policies_that_cannot_report() {
    assert_eq!(
        policy_of(&[("gpu.json", "[]")]).unwrap_err(),
        "gpu.json: there is no such role; the files are every-thread.json, control.json, \
         devices.json, vcpu.json, api.json, files.json, pages.json and the folder devices.d"
    );
    let told = policy_of(&[("devices.d/net.json", r#"{ "gpu": [] }"#)]).unwrap_err();
    assert!(
        told.starts_with("devices.d/net.json: unknown variant `gpu`"),
        "{told}"
    );
    assert_eq!(
        policy_of(&[("devices.d/net.txt", "")]).unwrap_err(),
        "devices.d/net.txt: the name of a fragment is <device>.json"
    );
    assert_eq!(
        policy_of(&[("every-thread.json", "[]")]).unwrap_err(),
        "control.json: no rule allows write, which the report of a refused call needs; add it to \
         every-thread.json"
    );
    let again = r#"{ "vcpu": [{ "syscall": "write", "why": "w" }] }"#;
    assert_eq!(
        policy_of(&[("devices.d/net.json", again)]).unwrap_err(),
        "every-thread.json: rule 1 (write) and devices.d/net.json: rule 1 (write) allow the same \
         call; remove one"
    );
}
