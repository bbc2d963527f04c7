//! Every role tries what it may not do, in a process of its own: this program runs itself again with the
//! name of a case in the environment, and looks at how that process ends.

#![expect(unsafe_code, reason = "the cases make raw system calls")]
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_long;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};
use std::{env, io, process, ptr, thread};

use alveole_thread_sandbox::{
    ExtraFilters, REFUSED_EXIT_CODE, Role, SandboxError, enter, enter_with, install_refusal_report,
    known_devices, set_extra_filters, set_report_log,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

const CASE: &str = "ALVEOLE_SANDBOX_CASE";

/// A call that no role may make, and how the report names it.
struct Probe {
    name: &'static str,
    told: &'static str,
    number: c_long,
    args: [c_long; 6],
}

const fn probe(name: &'static str, told: &'static str, number: c_long, args: [c_long; 6]) -> Probe {
    Probe {
        name,
        told,
        number,
        args,
    }
}

const RWX: c_long = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as c_long;
const ANON: c_long = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as c_long;
const SIGRTMIN: c_long = 34;
const NONE: [c_long; 6] = [0; 6];

const FORBIDDEN: &[Probe] = &[
    probe(
        "openat",
        "openat (257)",
        libc::SYS_openat,
        [-100, 0, 0, 0, 0, 0],
    ),
    probe("open", "open (2)", libc::SYS_open, NONE),
    probe("execve", "execve (59)", libc::SYS_execve, NONE),
    probe(
        "socket",
        "socket (41)",
        libc::SYS_socket,
        [1, 1, 0, 0, 0, 0],
    ),
    probe("connect", "connect (42)", libc::SYS_connect, NONE),
    probe("ptrace", "ptrace (101)", libc::SYS_ptrace, NONE),
    probe(
        "writev-vm",
        "process_vm_writev (311)",
        libc::SYS_process_vm_writev,
        NONE,
    ),
    probe("fork", "fork (57)", libc::SYS_fork, NONE),
    probe("clone3", "clone3 (435)", libc::SYS_clone3, NONE),
    probe("prctl", "prctl (157)", libc::SYS_prctl, NONE),
    probe("seccomp", "seccomp (317)", libc::SYS_seccomp, NONE),
    probe(
        "sigaction",
        "rt_sigaction (13)",
        libc::SYS_rt_sigaction,
        NONE,
    ),
    probe("kill", "kill (62)", libc::SYS_kill, NONE),
    probe(
        "kvm-create",
        "ioctl (16)",
        libc::SYS_ioctl,
        [9, 0xae01, 0, 0, 0, 0],
    ),
    probe(
        "tiocsti",
        "ioctl (16)",
        libc::SYS_ioctl,
        [0, 0x5412, 0, 0, 0, 0],
    ),
    probe(
        "mmap-exec",
        "mmap (9)",
        libc::SYS_mmap,
        [0, 4096, RWX, ANON, -1, 0],
    ),
    probe(
        "mprotect-exec",
        "mprotect (10)",
        libc::SYS_mprotect,
        [0, 4096, RWX, 0, 0, 0],
    ),
    probe(
        "tgkill-init",
        "tgkill (234)",
        libc::SYS_tgkill,
        [1, 1, SIGRTMIN, 0, 0, 0],
    ),
    probe(
        "x32-getpid",
        "x32 getpid (39)",
        0x4000_0000 | libc::SYS_getpid,
        NONE,
    ),
    probe("no-such", "unknown (9999)", 9999, NONE),
];

/// What of these the role that opens files may do.
const MAY_FILES: &[&str] = &["openat"];

/// Calls that only some roles may make.
fn refused_to(role: Role) -> Vec<Probe> {
    let run = probe(
        "kvm-run",
        "ioctl (16)",
        libc::SYS_ioctl,
        [-1, 0xae80, 0, 0, 0, 0],
    );
    let wait = probe(
        "epoll",
        "epoll_wait (232)",
        libc::SYS_epoll_wait,
        [-1, 0, 0, 0, 0, 0],
    );
    let accept = probe(
        "accept4",
        "accept4 (288)",
        libc::SYS_accept4,
        [-1, 0, 0, 0, 0, 0],
    );
    let read = probe("read", "read (0)", libc::SYS_read, [-1, 0, 0, 0, 0, 0]);
    match role {
        Role::Vcpu => vec![read, wait, accept],
        Role::Devices => vec![run, accept],
        Role::Control => vec![run, read, wait, accept],
        Role::Api => vec![run],
        Role::Files => vec![run, wait, accept],
        Role::Pages => vec![run, wait],
    }
}

fn syscall(number: c_long, args: [c_long; 6]) -> c_long {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the cases either are refused before they are made, or are harmless.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

fn hook() {
    // SAFETY: writes a constant.
    unsafe { libc::write(1, b"hook\n".as_ptr().cast(), 5) };
}

/// Not a test of its own: what the other tests run in a process of its own.
#[test]
fn child() {
    let Ok(case) = env::var(CASE) else { return };
    let (role, what) = case.split_once(' ').unwrap();
    let role = Role::ALL.into_iter().find(|r| r.name() == role).unwrap();
    let what = what.to_owned();
    match what.as_str() {
        "no-hook" => {}
        "hook-refused" => install_refusal_report(|| {
            syscall(libc::SYS_socket, NONE);
        })
        .unwrap(),
        _ => {
            install_refusal_report(hook).unwrap();
            let again = install_refusal_report(hook);
            assert!(matches!(again, Err(SandboxError::ReportInstalledTwice)));
        }
    }
    if what == "log" {
        set_report_log(1);
    }
    if what.starts_with("extra-") {
        set_extra_filters(extra_filters(role)).unwrap();
    }
    let thread = thread::Builder::new().name(format!("{role} 0"));
    let done = thread.spawn(move || {
        enter(role, &format!("{role} 0")).unwrap();
        act(role, &what);
    });
    done.unwrap().join().unwrap();
    process::exit(0);
}

fn act(role: Role, what: &str) {
    let probes = refused_to(role);
    if let Some(p) = FORBIDDEN.iter().chain(&probes).find(|p| p.name == what) {
        syscall(p.number, p.args);
        process::exit(7);
    }
    match what {
        "daily" => daily(role),
        "log" | "hook-refused" | "no-hook" => {
            syscall(libc::SYS_openat, NONE);
        }
        "extra-yield" => thread::yield_now(),
        "extra-socket" => {
            syscall(libc::SYS_socket, NONE);
        }
        "extra-seccomp" => {
            syscall(libc::SYS_seccomp, NONE);
        }
        "extra-other" => daily(role),
        "masked" => {
            // SAFETY: the sets are complete before they are used.
            unsafe {
                let mut set = std::mem::zeroed();
                libc::sigfillset(&raw mut set);
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            }
            syscall(libc::SYS_execve, NONE);
        }
        "int80" => {
            // SAFETY: asks for the process id in the 32-bit ABI; only rax changes.
            unsafe {
                std::arch::asm!("int 0x80", inout("rax") 20_u64 => _,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _);
            }
        }
        "spawn" => {
            let _ = thread::spawn(|| ()).join();
        }
        "abort" => {
            // SAFETY: no preconditions.
            unsafe { libc::abort() }
        }
        "panic" => panic!("a mistake of ours"),
        "twice" => match enter(Role::Api, "again") {
            Err(SandboxError::AlreadyConfined { now, .. }) if now == role => {}
            other => panic!("{other:?}"),
        },
        "kick" => {
            // SAFETY: no preconditions.
            let (pid, tid) = unsafe { (libc::getpid(), libc::gettid()) };
            syscall(
                libc::SYS_tgkill,
                [pid.into(), tid.into(), SIGRTMIN, 0, 0, 0],
            );
        }
        other => panic!("no case {other}"),
    }
}

/// As Firecracker's seccompiler-bin makes them: the filter for this role's thread refuses two calls, of which the role may make one;
/// those of the other threads refuse what every thread does all the time.
fn extra_filters(role: Role) -> ExtraFilters {
    let own = match role {
        Role::Control | Role::Devices | Role::Files | Role::Pages => "vmm",
        Role::Api => "api",
        Role::Vcpu => "vcpu",
    };
    let program = |name: &str| -> Vec<u64> {
        let (calls, refused) = match (name == own, env::var(CASE).unwrap().ends_with("other")) {
            (true, false) => (
                vec![libc::SYS_sched_yield, libc::SYS_socket],
                SeccompAction::Trap,
            ),
            (true, true) => (vec![libc::SYS_socket], SeccompAction::Trap),
            (false, _) => (
                vec![libc::SYS_write, libc::SYS_futex],
                SeccompAction::KillProcess,
            ),
        };
        let rules = calls.into_iter().map(|call| (call, vec![])).collect();
        let arch = env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap();
        let program: BpfProgram = filter.try_into().unwrap();
        let word = |i: &seccompiler::sock_filter| {
            u64::from(i.code) | u64::from(i.jt) << 16 | u64::from(i.jf) << 24 | u64::from(i.k) << 32
        };
        program.iter().map(word).collect()
    };
    let map: BTreeMap<_, _> = ["vmm", "api", "vcpu"]
        .map(|name| (name, program(name)))
        .into();
    ExtraFilters::from_bytes(&bitcode::serialize(&map).unwrap()).unwrap()
}

/// What every thread does all the time.
fn daily(role: Role) {
    static LOCK: Mutex<u64> = Mutex::new(0);
    let mut kept = Vec::new();
    for size in [24, 4096, 200_000, 40 << 20] {
        let mut block = vec![1_u8; size];
        block.reserve(size * 2);
        kept.push(block);
    }
    kept.pop();
    kept.shrink_to_fit();
    *LOCK.lock().unwrap() += 1;
    let names: HashMap<_, _> = [("a", 1), ("b", 2)].into();
    assert_eq!(names["b"], 2);
    let begun = Instant::now();
    thread::sleep(Duration::from_millis(2));
    assert!(begun.elapsed() >= Duration::from_millis(2));
    let (to, from) = mpsc::channel::<u8>();
    assert!(from.recv_timeout(Duration::from_millis(1)).is_err());
    drop(to);
    thread::yield_now();
    eprintln!("{role} is well");
    println!("{role} is well");
    io::stdout().flush().unwrap();
    let refusals = refused_to(role);
    for p in [Role::Vcpu, Role::Devices, Role::Api]
        .into_iter()
        .flat_map(refused_to)
    {
        if !refusals.iter().any(|r| r.name == p.name) && p.name != "kvm-run" {
            assert_eq!(syscall(p.number, p.args), -1, "{}", p.name);
        }
    }
}

fn run(role: Role, what: &str) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture", "--quiet"]);
    command
        .env(CASE, format!("{role} {what}"))
        .env("RUST_BACKTRACE", "0");
    command.output().unwrap()
}

fn last_line(stream: &[u8]) -> String {
    let text = String::from_utf8_lossy(stream);
    text.lines().last().unwrap_or_default().to_owned()
}

#[test]
fn every_role_is_refused_what_it_may_not_do_and_says_so() {
    for role in Role::ALL {
        let own = refused_to(role);
        let may = |p: &&Probe| role == Role::Files && MAY_FILES.contains(&p.name);
        for p in FORBIDDEN.iter().filter(|p| !may(p)).chain(&own) {
            let out = run(role, p.name);
            let line = last_line(&out.stderr);
            assert_eq!(
                out.status.code(),
                Some(REFUSED_EXIT_CODE),
                "{role} {}: {line}",
                p.name
            );
            let start = format!(
                "alveole-vmm: thread \"{role} 0\" (role {role}) made a system call that its sandbox \
                 refuses: {}, arguments {:#x} ",
                p.told, p.args[0]
            );
            assert!(line.starts_with(&start), "{role} {}: {line}", p.name);
            assert!(line.ends_with("; the VM ends here"), "{line}");
            assert_eq!(last_line(&out.stdout), "hook", "{role} {}", p.name);
        }
    }
}

#[test]
fn every_role_may_do_its_daily_work() {
    for role in Role::ALL {
        let out = run(role, "daily");
        assert!(out.status.success(), "{role}: {out:?}");
        assert_eq!(last_line(&out.stderr), format!("{role} is well"));
    }
}

#[test]
fn no_role_can_make_a_thread() {
    for role in Role::ALL {
        let out = run(role, "spawn");
        // glibc blocks every signal around clone, so the kernel ends the process without our line.
        assert_eq!(out.status.signal(), Some(libc::SIGSYS), "{role}: {out:?}");
    }
}

#[test]
fn masking_the_signal_does_not_help() {
    for role in Role::ALL {
        let out = run(role, "masked");
        assert_eq!(out.status.signal(), Some(libc::SIGSYS), "{role}: {out:?}");
    }
}

#[test]
fn the_32_bit_abi_ends_the_process() {
    for role in Role::ALL {
        let out = run(role, "int80");
        // A kernel without the 32-bit ABI answers with SIGSEGV before any filter is asked.
        let signal = out.status.signal();
        assert!(
            matches!(signal, Some(libc::SIGSYS | libc::SIGSEGV)),
            "{role}: {out:?}"
        );
    }
}

#[test]
fn the_report_also_goes_to_the_log() {
    let out = run(Role::Vcpu, "log");
    assert_eq!(out.status.code(), Some(REFUSED_EXIT_CODE));
    assert!(String::from_utf8_lossy(&out.stdout).contains(&last_line(&out.stderr)));
}

#[test]
fn a_hook_that_is_refused_itself_still_ends_the_process() {
    let out = run(Role::Vcpu, "hook-refused");
    assert_eq!(out.status.code(), Some(REFUSED_EXIT_CODE), "{out:?}");
    assert!(
        last_line(&out.stderr).contains("refuses: openat (257)"),
        "{out:?}"
    );
}

#[test]
fn a_panic_and_an_abort_keep_their_own_voice() {
    for role in Role::ALL {
        let out = run(role, "abort");
        assert_eq!(out.status.signal(), Some(libc::SIGABRT), "{role}: {out:?}");
        let out = run(role, "panic");
        assert_ne!(
            out.status.code(),
            Some(REFUSED_EXIT_CODE),
            "{role}: {out:?}"
        );
        assert!(String::from_utf8_lossy(&out.stderr).contains("a mistake of ours"));
    }
}

#[test]
fn a_role_is_for_life() {
    assert!(run(Role::Devices, "twice").status.success());
}

#[test]
fn only_control_kicks() {
    for role in Role::ALL {
        let out = run(role, "kick");
        if role == Role::Control {
            // Nobody has set a handler here, so the signal arrives and kills.
            assert_eq!(out.status.signal(), Some(SIGRTMIN as i32), "{out:?}");
        } else {
            assert_eq!(
                out.status.code(),
                Some(REFUSED_EXIT_CODE),
                "{role}: {out:?}"
            );
        }
    }
}

#[test]
fn filters_of_the_users_only_take_rights_away() {
    for role in Role::ALL {
        for (what, told) in [
            ("extra-yield", "--seccomp-filter refuses: sched_yield (24)"),
            // Both refuse it.
            ("extra-socket", "its sandbox refuses: socket (41)"),
            // What let our filter be put on top of the user's is gone with it.
            ("extra-seccomp", "its sandbox refuses: seccomp (317)"),
        ] {
            let out = run(role, what);
            assert_eq!(
                out.status.code(),
                Some(REFUSED_EXIT_CODE),
                "{role}: {out:?}"
            );
            let line = last_line(&out.stderr);
            assert!(line.contains(told), "{role} {what}: {line}");
        }
        // Those of other threads do not concern it.
        let out = run(role, "extra-other");
        assert!(out.status.success(), "{role}: {out:?}");
    }
}

#[test]
fn without_a_hook_a_refused_call_is_named_too() {
    let out = run(Role::Vcpu, "no-hook");
    assert_eq!(out.status.code(), Some(REFUSED_EXIT_CODE), "{out:?}");
    assert!(
        last_line(&out.stderr).contains("refuses: openat (257)"),
        "{out:?}"
    );
}

#[test]
fn a_device_without_a_fragment_is_named() {
    assert!(known_devices().iter().all(|device| !device.is_empty()));
    let error = enter_with(Role::Vcpu, "vcpu 0", &["no-such"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot confine thread \"vcpu 0\": there is no seccomp fragment for device \"no-such\"; add \
         resources/seccomp/x86_64/devices.d/no-such.json"
    );
}
