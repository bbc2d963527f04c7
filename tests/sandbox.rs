//! The real program around a running guest: every thread is confined, a refused system call ends the
//! process with its name, each end of a guest is told apart, and no access of a guest breaks anything.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/bad_input.rs uses the rest")]
mod tiny_guest;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal::{SIGINT, SIGTERM};
use nix::sys::termios::tcgetattr;
use tiny_guest::code::kernel_of_size;
use tiny_guest::{
    Bench, Running, filters, hang, no_kvm, out, power_off, print, skipped, start_on, terminal,
};

/// Maps 1 GiB of guest addresses at 0xc0000000, where there is no RAM, by page tables at 0x102000:
/// ```text
///       mov edi, 0x102000; mov eax, 0xc0000083; mov ecx, 512
/// next: mov [rdi], rax; add rdi, 8; add rax, 0x200000; dec ecx; jnz next
///       mov qword [0xa018], 0x102003; mov rax, cr3; mov cr3, rax
/// ```
const MAP_THE_HOLE: &[u8] = b"\xbf\0\x20\x10\0\xb8\x83\0\0\xc0\xb9\0\x02\0\0\
    \x48\x89\x07\x48\x83\xc7\x08\x48\x05\0\0\x20\0\xff\xc9\x75\xef\
    \x48\xc7\x04\x25\x18\xa0\0\0\x03\x20\x10\0\x0f\x20\xd8\x0f\x22\xd8";

/// Starts a guest with this console and waits until all its processors are there.
fn start<'a>(bench: &'a Bench, cpus: usize, console: &str) -> Running<'a> {
    start_with(bench, cpus, &["--console", console])
}

fn start_with<'a>(bench: &'a Bench, cpus: usize, words: &[&str]) -> Running<'a> {
    let mut running = bench.start(words);
    let id = running.id();
    let last = format!("vcpu {}", cpus - 1);
    let there = running.wait_until(|| {
        let threads = threads(id);
        threads.len() == cpus + 2
            && threads.values().any(|t| t.name == last)
            && threads.values().all(|t| t.has("Seccomp:", "2"))
    });
    assert!(there, "{}", running.said());
    running
}

struct Thread {
    name: String,
    status: String,
}

impl Thread {
    fn has(&self, field: &str, value: &str) -> bool {
        self.status
            .lines()
            .any(|l| l.strip_prefix(field).is_some_and(|v| v.trim() == value))
    }
}

/// The threads of a process, by number.
fn threads(id: u32) -> BTreeMap<u32, Thread> {
    let tasks = fs::read_dir(format!("/proc/{id}/task"))
        .into_iter()
        .flatten();
    let read = |path: &Path| {
        let number = path.file_name()?.to_str()?.parse().ok()?;
        let text = |file| fs::read_to_string(path.join(file)).ok();
        Some((
            number,
            Thread {
                name: text("comm")?.trim().into(),
                status: text("status")?,
            },
        ))
    };
    let all = tasks.filter_map(|task| read(&task.ok()?.path()));
    // KVM's own workers are listed too; they run in the kernel only.
    all.filter(|(_, thread)| !thread.name.starts_with("kvm-"))
        .collect()
}

#[test]
fn every_thread_is_confined() {
    if no_kvm("every_thread_is_confined") {
        return;
    }
    let bench = Bench::new(&hang());
    bench.describe("kernel", 3, 64);
    let running = start(&bench, 3, "none");
    let threads = threads(running.id());
    let mut names: Vec<_> = threads.values().map(|t| t.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["alveole-vmm", "devices", "vcpu 0", "vcpu 1", "vcpu 2"]
    );
    for thread in threads.values() {
        assert!(thread.has("Seccomp:", "2"), "{}: no filter", thread.name);
        assert!(
            thread.has("NoNewPrivs:", "1"),
            "{}: may gain rights",
            thread.name
        );
        assert!(
            thread.has("Seccomp_filters:", "1"),
            "{}: {}",
            thread.name,
            thread.status
        );
    }
    running.signal(SIGINT);
    running.end().assert(130, &[]);
}

/// Hosts that start Firecracker without filters start this with them.
/// Where hosts give huge pages unasked, one of them would be a monitor's largest part, and clearing it the longest of a thread's start.
#[test]
fn nothing_of_a_monitor_is_as_large_as_a_huge_page_but_guest_memory() {
    const HUGE_PAGE_BYTES: u64 = 2 << 20;
    if no_kvm("nothing_of_a_monitor_is_as_large_as_a_huge_page_but_guest_memory") {
        return;
    }
    let bench = Bench::new(&hang());
    let mut running = start(&bench, 1, "none");
    let maps = fs::read_to_string(format!("/proc/{}/maps", running.id())).unwrap();
    let address = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let mut large = Vec::new();
    for line in maps.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (start, end) = fields[0].split_once('-').unwrap();
        let is_anonymous = fields[1].starts_with("rw-p") && fields[4] == "0";
        if is_anonymous && address(end) - address(start) >= HUGE_PAGE_BYTES {
            large.push(line);
        }
    }
    assert_eq!(large.len(), 1, "guest memory alone:\n{maps}");
    running.signal(SIGTERM);
    running.child.wait().unwrap();
}

#[test]
fn a_wish_for_no_filters_is_understood_and_they_stay() {
    if no_kvm("a_wish_for_no_filters_is_understood_and_they_stay") {
        return;
    }
    let bench = Bench::new(&hang());
    // It waits until every thread has its filter.
    let running = start_with(&bench, 1, &["--console", "none", "--no-seccomp"]);
    running.signal(SIGINT);
    running
        .end()
        .assert(130, &["--no-seccomp: the filters stay"]);
}

/// Filters of the user's own come on top of each thread's.
#[test]
fn a_filter_that_allows_everything_runs_a_guest() {
    if no_kvm("a_filter_that_allows_everything_runs_a_guest") {
        return;
    }
    let words = &["--console", "none", "--seccomp-filter", "all.bpf"];
    let bench = Bench::new(&hang());
    let all = filters::file(&filters::same_for_all(&filters::allow()));
    bench.write("all.bpf", &all);
    let mut running = start_with(&bench, 1, words);
    // A thread has its own filter first, for a moment that one alone.
    let id = running.id();
    let both = || {
        let threads = threads(id);
        threads.values().all(|t| t.has("Seccomp_filters:", "2"))
    };
    assert!(running.wait_until(both), "{}", running.said());
    running.signal(SIGINT);
    running.end().assert(130, &[]);
    let bench = Bench::new(&power_off());
    bench.write("all.bpf", &all);
    bench.start(words).end().assert(0, &["powered off"]);
}

#[test]
fn what_a_filter_of_the_users_refuses_ends_the_vm_as_it_says() {
    if no_kvm("what_a_filter_of_the_users_refuses_ends_the_vm_as_it_says") {
        return;
    }
    let bench = Bench::new(&hang());
    let words = &["--console", "none", "--seccomp-filter", "f"];
    let end = |thread: &str, call, action| {
        let program = filters::refuse(call, action);
        bench.write("f", &filters::file(&filters::only_for(thread, &program)));
        bench.start(words).end()
    };
    for (thread, told, call, name) in [
        (
            "vcpu",
            "thread \"vcpu 0\" (role vcpu)",
            libc::SYS_ioctl,
            "ioctl (16)",
        ),
        (
            "vmm",
            "thread \"devices\" (role devices)",
            libc::SYS_epoll_wait,
            "epoll_wait (232)",
        ),
    ] {
        let ended = end(thread, call, libc::SECCOMP_RET_TRAP);
        let words = [told, "a system call that --seccomp-filter refuses: ", name];
        ended.assert(148, &words);
        assert_eq!(ended.said.lines().count(), 1, "{ended:?}");
    }
    // Killed by the kernel, which says nothing.
    let ended = end("vcpu", libc::SYS_ioctl, libc::SECCOMP_RET_KILL_PROCESS);
    assert_eq!(ended.status.signal(), Some(libc::SIGSYS), "{ended:?}");
    // The call fails, and whoever made it says so: KVM_RUN.
    let refused = libc::SECCOMP_RET_ERRNO | 95;
    let ended = end("vcpu", libc::SYS_ioctl, refused);
    ended.assert(1, &["Operation not supported", "vCPU 0"]);
}

/// The thread of the API needs no guest.
#[test]
fn a_filter_of_the_users_confines_the_api() {
    let bench = Bench::new(&hang());
    let refuse = |call| {
        filters::file(&filters::only_for(
            "api",
            &filters::refuse(call, libc::SECCOMP_RET_TRAP),
        ))
    };
    bench.write("f", &refuse(libc::SYS_accept4));
    let arguments = ["--api-sock", "api", "--seccomp-filter", "f"];
    let mut running = bench.start_command(bench.command(&arguments));
    assert!(running.wait_until(|| bench.file("api").exists()));
    // Refused itself, if the socket is there before it listens.
    while UnixStream::connect(bench.file("api")).is_err() {
        assert!(running.child.try_wait().unwrap().is_none());
    }
    let ended = running.end();
    // The socket stays: who is refused a call removes nothing.
    assert_eq!(ended.status.code(), Some(148), "{ended:?}");
    for word in [
        "thread \"api\" (role api)",
        "--seccomp-filter refuses: accept4 (288)",
    ] {
        assert!(ended.said.contains(word), "{ended:?}");
    }
}

/// Makes the thread called `name` make system call `number` with `args`, from outside: where it waits
/// in a call, it makes that one instead.
fn inject(id: u32, name: &str, number: u32, args: [u64; 3]) {
    let [a, b, c] = args;
    let script = format!(
        "import gdb
for t in gdb.selected_inferior().threads():
    if t.name == {name:?}: t.switch()
assert gdb.selected_thread().name == {name:?}
assert bytes(gdb.selected_inferior().read_memory(int(gdb.parse_and_eval('$rip')) - 2, 2)) == b'\\x0f\\x05'
for line in ['handle SIGSYS nostop noprint pass', 'handle SIG34 nostop noprint pass',
    'set $orig_rax = -1', 'set $rdi = {a}', 'set $rsi = {b}', 'set $rdx = {c}', 'set $rip = $rip - 2',
    'set $rax = {number}', 'continue']: gdb.execute(line)
"
    );
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("inject.py");
    fs::write(&path, script).unwrap();
    let mut gdb = Command::new("timeout");
    gdb.args(["30", "gdb", "-nx", "-batch", "-p", &id.to_string(), "-x"])
        .arg(path);
    let output = gdb.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("exited with code 0224"),
        "{name} {number}: {said}\n{errors}"
    ); // 148
}

fn no_gdb(test: &str) -> bool {
    let missing = !Command::new("gdb")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success());
    if missing {
        skipped(
            test,
            "no gdb on this machine; the roles are tested in crates/thread-sandbox",
        );
    }
    missing
}

#[test]
fn a_refused_call_names_itself_its_thread_and_its_role() {
    let test = "a_refused_call_names_itself_its_thread_and_its_role";
    if no_kvm(test) || no_gdb(test) {
        return;
    }
    const KVM_RUN: u64 = 0xae80;
    const KVM_CREATE_VM: u64 = 0xae01;
    // What another role may do, and what none may: so each thread is in its own.
    for (thread, told, number, args, call) in [
        (
            "alveole-vmm",
            "\"control\" (role control)",
            257,
            [0, 0, 0],
            "openat (257)",
        ),
        (
            "alveole-vmm",
            "\"control\" (role control)",
            232,
            [0, 0, 0],
            "epoll_wait (232)",
        ),
        (
            "alveole-vmm",
            "\"control\" (role control)",
            16,
            [0, KVM_RUN, 0],
            "ioctl (16)",
        ),
        (
            "devices",
            "\"devices\" (role devices)",
            41,
            [1, 1, 0],
            "socket (41)",
        ),
        (
            "devices",
            "\"devices\" (role devices)",
            16,
            [0, KVM_RUN, 0],
            "ioctl (16)",
        ),
        (
            "devices",
            "\"devices\" (role devices)",
            234,
            [1, 2, 34],
            "tgkill (234)",
        ),
        (
            "vcpu 0",
            "\"vcpu 0\" (role vcpu)",
            59,
            [0, 0, 0],
            "execve (59)",
        ),
        (
            "vcpu 0",
            "\"vcpu 0\" (role vcpu)",
            16,
            [0, KVM_CREATE_VM, 0],
            "ioctl (16)",
        ),
        ("vcpu 1", "\"vcpu 1\" (role vcpu)", 0, [0, 0, 0], "read (0)"),
    ] {
        let bench = Bench::new(&hang());
        bench.describe("kernel", 2, 64);
        let running = start(&bench, 2, "none");
        inject(running.id(), thread, number, args);
        let ended = running.end();
        let last = ended.said.lines().last().unwrap_or_default();
        for word in ["alveole-vmm: thread ", told, "refuses: ", call] {
            assert!(
                last.contains(word),
                "{thread} {number}: no {word:?} in {last:?}"
            );
        }
        assert_eq!(ended.said.lines().count(), 1, "{}", ended.said);
    }
}

#[test]
fn a_refused_call_gives_the_terminal_back() {
    let test = "a_refused_call_gives_the_terminal_back";
    if no_kvm(test) || no_gdb(test) {
        return;
    }
    for thread in ["alveole-vmm", "devices", "vcpu 0"] {
        let bench = Bench::new(&[print("up\n"), hang()].concat());
        let (mut master, slave) = terminal();
        let before = tcgetattr(&slave).unwrap();
        let running = start_on(&bench, &slave, &mut master);
        assert_ne!(tcgetattr(&slave).unwrap(), before);
        inject(running.id(), thread, 257, [0, 0, 0]);
        let ended = running.end();
        assert!(ended.said.contains("openat (257)"), "{ended:?}");
        assert_eq!(tcgetattr(&slave).unwrap(), before, "{thread}");
    }
}

// ---- ends ----

/// Code in parts, the exit code, what is said.
type End<'a> = (&'a [Vec<u8>], i32, &'a [&'a str]);

#[test]
fn every_end_of_a_guest_is_told_apart() {
    if no_kvm("every_end_of_a_guest_is_told_apart") {
        return;
    }
    let panic = || out(0x505, 1);
    let panic_line = || print("Kernel panic - not syncing: out of tea\n");
    let reset = || [out(0x602, 1), hang()].concat();
    let keyboard = || [out(0x64, 0xfe), hang()].concat();
    let triple_fault = || vec![0x0f, 0x0b]; // ud2 without an IDT
    let ends: [End<'_>; 11] = [
        (
            &[power_off()],
            0,
            &[
                "the guest powered off",
                "vCPU 0 at rip 0x100",
                "64-bit mode",
            ],
        ),
        (&[reset()], 0, &["asked for a reset", "vCPU 0 at rip 0x100"]),
        (
            &[keyboard()],
            0,
            &["asked for a reset", "vCPU 0 at rip 0x100"],
        ),
        (
            &[triple_fault()],
            5,
            // Not where: AMD leaves no state behind, and KVM resets the vCPU before it tells.
            &["vCPU 0", "triple fault", "at rip 0x"],
        ),
        (
            &[panic(), reset()],
            4,
            &["kernel panicked", "did not say why", "vCPU 0"],
        ),
        (
            &[panic_line(), keyboard()],
            4,
            &["kernel panicked", "out of tea", "vCPU 0"],
        ),
        (
            &[panic_line(), panic(), triple_fault()],
            4,
            &["kernel panicked", "out of tea"],
        ),
        (
            &[panic_line(), panic(), hang()],
            4,
            &["kernel panicked", "out of tea"],
        ), // after its grace
        (&[out(0x505, 2), power_off()], 0, &["powered off"]), // a crash kernel took over
        (&[out(0x600, 0x14), power_off()], 0, &["powered off"]), // the type without the enable bit
        (
            &[out(0x602, 0), out(0x64, 0xfd), power_off()],
            0,
            &["powered off"],
        ), // no reset
    ];
    for (parts, code, words) in ends {
        let bench = Bench::new(&parts.concat());
        let ended = bench.run();
        ended.assert(code, words);
        assert_eq!(ended.said.lines().count(), 1, "one line: {ended:?}");
    }
}

#[test]
fn an_instruction_that_nobody_can_emulate_is_shown() {
    if no_kvm("an_instruction_that_nobody_can_emulate_is_shown") {
        return;
    }
    // Code in a hole: the processor cannot fetch it, and neither can KVM. mov eax, 0xd0000000; jmp rax
    let bench = Bench::new(&[MAP_THE_HOLE, b"\xb8\0\0\0\xd0\xff\xe0"].concat());
    let ended = bench.run();
    ended.assert(
        6,
        &[
            "vCPU 0 cannot go on at rip 0xd0000000",
            "registers:",
            "rax 0x00000000d0000000",
        ],
    );

    // Here a KVM that emulates ends; hardware goes on and powers off. popcnt ecx, eax
    let bench = Bench::new(&[b"\xb8\x55\0\0\0\xf3\x0f\xb8\xc8".to_vec(), power_off()].concat());
    let ended = bench.run();
    if ended.status.code() == Some(0) {
        let test = "an_instruction_that_nobody_can_emulate_is_shown (its bytes)";
        return skipped(test, "this KVM runs every instruction in hardware");
    }
    let words = [
        "cannot emulate the instruction f3 0f b8 c8",
        "rip 0x0000000000100005",
        "rax 0x0000000000000055",
    ];
    ended.assert(6, &words);
}

#[test]
fn the_boot_timer_is_told_once() {
    if no_kvm("the_boot_timer_is_told_once") {
        return;
    }
    // mov esi, 0xc0000000; mov byte [rsi], 123, twice
    let mark = b"\xbe\0\0\0\xc0\xc6\x06\x7b\xc6\x06\x7b";
    let bench = Bench::new(&[MAP_THE_HOLE, mark, &power_off()].concat());
    let ended = bench.start(&["--console", "none", "--boot-timer"]).end();
    ended.assert(
        0,
        &[
            "boot timer: process start to first guest instruction ",
            " ms, to guest init ",
        ],
    );
    assert_eq!(ended.said.matches("boot timer").count(), 1, "{ended:?}");
    // Without the option there is nothing at that address.
    let ended = bench.run();
    ended.assert(0, &["powered off"]);
    assert!(!ended.said.contains("boot timer"), "{ended:?}");
}

// ---- every access ----

/// Runs a guest that ends by powering off.
fn powers_off(code: &[u8]) {
    Bench::new(code).run().assert(0, &["powered off"]);
}

#[test]
fn every_port_in_every_width() {
    if no_kvm("every_port_in_every_width") {
        return;
    }
    // xor ecx, ecx
    // next: mov edx, ecx; xor eax, eax; out dx, al; xor eax, eax; out dx, ax; xor eax, eax; out dx, eax
    //       in al, dx; in ax, dx; in eax, dx; inc ecx; cmp ecx, 0x10000; jne next
    let code = b"\x31\xc9\x89\xca\x31\xc0\xee\x31\xc0\x66\xef\x31\xc0\xef\xec\x66\xed\xed\
        \xff\xc1\x81\xf9\0\0\x01\0\x75\xe6";
    powers_off(&[&code[..], &power_off()].concat());
}

#[test]
fn strings_to_and_from_every_low_port() {
    if no_kvm("strings_to_and_from_every_low_port") {
        return;
    }
    // cld; xor ebx, ebx
    // next: mov edx, ebx; mov edi, 0x101000; 3 times each: rep insb, rep insw, rep insd
    //       zero 64 bytes there; mov esi, 0x101000; 3 times each: rep outsb, rep outsw, rep outsd
    //       inc ebx; cmp ebx, 0x700; jb next
    let code =
        b"\xfc\x31\xdb\x89\xda\xbf\0\x10\x10\0\xb9\x03\0\0\0\xf3\x6c\xb9\x03\0\0\0\xf3\x66\x6d\
        \xb9\x03\0\0\0\xf3\x6d\xbf\0\x10\x10\0\x31\xc0\xb9\x10\0\0\0\xf3\xab\xbe\0\x10\x10\0\
        \xb9\x03\0\0\0\xf3\x6e\xb9\x03\0\0\0\xf3\x66\x6f\xb9\x03\0\0\0\xf3\x6f\
        \x83\xc3\x01\x81\xfb\0\x07\0\0\x72\xaf";
    powers_off(&[&code[..], &power_off()].concat());
}

#[test]
fn every_hole_in_every_width() {
    if no_kvm("every_hole_in_every_width") {
        return;
    }
    // mov esi, 0xc0000000
    // next: reads of 1, 2, 4 and 8 bytes, one unaligned, one across pages; the same as writes of zero
    //       add rsi, 0x200000; until 4 GiB
    let code = b"\xbe\0\0\0\xc0\x31\xc0\x8a\x06\x66\x8b\x06\x8b\x06\x48\x8b\x06\x8b\x46\x03\
        \x48\x8b\x86\xfd\x0f\0\0\x31\xc0\x88\x06\x66\x89\x06\x89\x06\x48\x89\x06\x89\x46\x03\
        \x48\x89\x86\xfd\x0f\0\0\x48\x81\xc6\0\0\x20\0\x48\xb8\0\0\0\0\x01\0\0\0\x48\x39\xc6\x75\xbe";
    powers_off(&[MAP_THE_HOLE, code, &power_off()].concat());
}

#[test]
fn a_guest_that_floods_its_console_is_ended_like_any_other() {
    if no_kvm("a_guest_that_floods_its_console_is_ended_like_any_other") {
        return;
    }
    // mov dx, 0x3f8; mov al, 'a'; out dx, al; jmp to the first
    let bench = Bench::new(b"\x66\xba\xf8\x03\xb0\x61\xee\xeb\xf7");
    // On a terminal that nobody reads, and on a full disk.
    let (_master, slave) = terminal();
    for console in ["stdio", "file:/dev/full"] {
        let mut command =
            bench.command(&["--config-file", "vm.json", "--no-api", "--console", console]);
        let end = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(end()).stdout(end());
        let mut running = bench.start_command(command);
        assert!(
            !running.ends_within(Duration::from_secs(1)),
            "{}",
            running.said()
        );
        running.signal(SIGTERM);
        assert!(
            running.ends_within(Duration::from_secs(10)),
            "{console}: does not end"
        );
        running.end().assert(143, &["ended by signal 15"]);
    }
}

#[test]
fn a_guest_that_writes_over_all_of_its_memory_hurts_only_itself() {
    if no_kvm("a_guest_that_writes_over_all_of_its_memory_hurts_only_itself") {
        return;
    }
    // cld; xor edi, edi; mov al, 0xcc; mov rcx, -1; rep stosb
    let bench = Bench::new(b"");
    let code = b"\xfc\x31\xff\xb0\xcc\x48\xc7\xc1\xff\xff\xff\xff\xf3\xaa";
    bench.write("kernel", &kernel_of_size(code, 60 << 20));
    let ended = bench.run();
    assert!(matches!(ended.status.code(), Some(5 | 6)), "{ended:?}");
}

// ---- terminals ----

#[test]
fn the_keys_that_end_it_work_while_the_guest_does_nothing() {
    if no_kvm("the_keys_that_end_it_work_while_the_guest_does_nothing") {
        return;
    }
    let bench = Bench::new(&[print("up\n"), vec![0xeb, 0xfe]].concat()); // jmp to itself
    let (mut master, slave) = terminal();
    let before = tcgetattr(&slave).unwrap();
    let running = start_on(&bench, &slave, &mut master);
    master
        .write_all(b"\x03\x1a\x1c keys for the guest \x01x")
        .unwrap();
    running.end().assert(0, &["ended from the console"]);
    assert_eq!(tcgetattr(&slave).unwrap(), before);
}
