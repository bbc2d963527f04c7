//! Reads and checks the policy files; `resources/seccomp/README.md` describes them.
//!
//! Deliberately does not know: BPF, the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use syscalls::x86_64::Sysno;

/// What no role may have, with or without conditions: each is a way out of the cell.
pub(crate) const NEVER: &[&str] = &[
    // Another program, process or thread; a thread made after start-up is one that nobody planned.
    "execve",
    "execveat",
    "fork",
    "vfork",
    "clone",
    "clone3",
    // Somebody else's memory and registers.
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "process_madvise",
    "pidfd_getfd",
    // New files: everything is opened before the sandbox is entered.
    "open",
    "openat",
    "openat2",
    "creat",
    "open_by_handle_at",
    "memfd_create",
    "userfaultfd",
    // The sandbox itself, and its report.
    "prctl",
    "seccomp",
    "arch_prctl",
    "modify_ldt",
    // Parts of the kernel that filters cannot see into, or that few have looked at.
    "bpf",
    "io_uring_setup",
    "perf_event_open",
    "keyctl",
    "add_key",
    "request_key",
    "init_module",
    "finit_module",
    "kexec_load",
    "mount",
    "unshare",
    "setns",
    "pivot_root",
    "chroot",
    "personality",
    // Executable memory by ways that have no PROT_EXEC to look for.
    "pkey_mprotect",
    "shmat",
    "remap_file_pages",
];

/// What of these the thread that opens files for a running machine may have, and nobody else: a client of the API puts
/// another image into a drive, or saves the guest. That thread makes nothing of any byte of a guest, and exists only where there is somebody to ask.
pub(crate) const ONLY_FILES: &[&str] = &["openat", "io_uring_setup", "clone"];

/// A process that saves guest memory while the guest goes on, under the same filter: nothing else may be made. These
/// flags make no thread, share no memory and enter no namespace.
const FORKS: &str = "clone";
/// CLONE_PIDFD | CLONE_FILES, and no signal at the end.
pub(crate) const FORK_FLAGS: u32 = 0x1400;

/// Calls that make memory executable when argument 2 says so: only without that bit.
const MAPS_MEMORY: &[&str] = &["mmap", "mprotect"];
const PROT_EXEC: u32 = 4;

/// A crashed thread gives its signal the default action back, to die of it. Of any other signal this would
/// take away the report of refused calls, or the kick of a vCPU.
const SETS_SIGNALS: &str = "rt_sigaction";
/// SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV.
pub(crate) const CRASH_SIGNALS: [u32; 5] = [4, 6, 7, 8, 11];

/// Without these a refused call could not be reported, or a thread could not end.
const REPORT_NEEDS: &[&str] = &["write", "exit_group", "rt_sigreturn"];

/// What a thread is for. The file names are the names in lower case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Control,
    Devices,
    Vcpu,
    Api,
    Files,
    Pages,
}

impl Role {
    pub(crate) const ALL: [Self; 6] = [
        Self::Control,
        Self::Devices,
        Self::Vcpu,
        Self::Api,
        Self::Files,
        Self::Pages,
    ];

    fn file(self) -> &'static str {
        match self {
            Self::Control => "control.json",
            Self::Devices => "devices.json",
            Self::Vcpu => "vcpu.json",
            Self::Api => "api.json",
            Self::Files => "files.json",
            Self::Pages => "pages.json",
        }
    }
}

/// One allowed call.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub(crate) syscall: String,
    pub(crate) number: i64,
    /// All must hold; none: the call is allowed whatever its arguments.
    pub(crate) args: Vec<Condition>,
    /// `file: rule 3 (ioctl)`.
    place: String,
}

/// A condition on one argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    pub(crate) index: u8,
    pub(crate) test: Test,
}

/// What an argument must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Test {
    Is(u32),
    IsOwnProcess,
    /// None of these bits is set.
    Lacks(u32),
}

/// A rule as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    syscall: String,
    #[serde(default)]
    args: Vec<WrittenCondition>,
    why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenCondition {
    index: u8,
    is: Option<String>,
    lacks: Option<String>,
    means: String,
}

/// All policy files of one processor architecture.
#[derive(Debug)]
pub(crate) struct Policy {
    every_thread: Vec<Rule>,
    roles: BTreeMap<Role, Vec<Rule>>,
    /// What each device adds to which roles, by name of its file.
    pub(crate) devices: Vec<(String, BTreeMap<Role, Vec<Rule>>)>,
}

const EVERY_THREAD: &str = "every-thread.json";
const DEVICES_FOLDER: &str = "devices.d";

impl Policy {
    /// Reads a folder such as `resources/seccomp/x86_64`.
    pub(crate) fn read(folder: &Path) -> Result<Self, String> {
        let mut files = names(folder)?;
        let mut take = |name: &str, role| {
            files.retain(|known| known != name);
            let text = read(&folder.join(name))?;
            let written = serde_json::from_str(&text).map_err(|e| format!("{name}: {e}"))?;
            rules(name, role, written)
        };
        let every_thread = take(EVERY_THREAD, None)?;
        let mut roles = BTreeMap::new();
        for role in Role::ALL {
            roles.insert(role, take(role.file(), Some(role))?);
        }
        files.retain(|known| known != DEVICES_FOLDER);
        if let Some(stray) = files.first() {
            return Err(format!(
                "{stray}: there is no such role; the files are {EVERY_THREAD}, {} and the folder \
                 {DEVICES_FOLDER}",
                Role::ALL.map(Role::file).join(", ")
            ));
        }

        let mut devices = Vec::new();
        let folder = folder.join(DEVICES_FOLDER);
        for name in names(&folder)? {
            let file = format!("{DEVICES_FOLDER}/{name}");
            let device = name
                .strip_suffix(".json")
                .ok_or_else(|| format!("{file}: the name of a fragment is <device>.json"))?;
            let text = read(&folder.join(&name))?;
            let written: BTreeMap<Role, Vec<WrittenRule>> =
                serde_json::from_str(&text).map_err(|e| format!("{file}: {e}"))?;
            let mut by_role = BTreeMap::new();
            for (role, written) in written {
                by_role.insert(role, rules(&file, Some(role), written)?);
            }
            devices.push((device.to_owned(), by_role));
        }
        let policy = Self {
            every_thread,
            roles,
            devices,
        };
        policy.check()?;
        Ok(policy)
    }

    /// The rules that a thread of this role has without any device.
    pub(crate) fn of_role(&self, role: Role) -> Vec<&Rule> {
        let own = self.roles.get(&role).into_iter().flatten();
        self.every_thread.iter().chain(own).collect()
    }

    fn check(&self) -> Result<(), String> {
        for role in Role::ALL {
            let base = self.of_role(role);
            no_rule_twice(&base)?;
            for needed in REPORT_NEEDS {
                if !base
                    .iter()
                    .any(|r| r.syscall == *needed && r.args.is_empty())
                {
                    return Err(format!(
                        "{}: no rule allows {needed}, which the report of a refused call needs; add \
                         it to {EVERY_THREAD}",
                        role.file()
                    ));
                }
            }
            for (_, by_role) in &self.devices {
                let own = by_role.get(&role).into_iter().flatten();
                no_rule_twice(&base.iter().copied().chain(own).collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }
}

fn no_rule_twice(rules: &[&Rule]) -> Result<(), String> {
    for (at, rule) in rules.iter().enumerate() {
        let same_call = |other: &&&Rule| other.syscall == rule.syscall;
        if let Some(other) = rules[..at]
            .iter()
            .filter(same_call)
            .find(|o| o.args == rule.args || o.args.is_empty() || rule.args.is_empty())
        {
            return Err(format!(
                "{} and {} allow the same call; remove one",
                other.place, rule.place
            ));
        }
    }
    Ok(())
}

/// The rules of a file; without a role they are for all.
fn rules(file: &str, role: Option<Role>, written: Vec<WrittenRule>) -> Result<Vec<Rule>, String> {
    let written = written.into_iter().enumerate();
    written
        .map(|(at, rule)| rule_of(file, role, at + 1, rule))
        .collect()
}

fn rule_of(
    file: &str,
    role: Option<Role>,
    at: usize,
    written: WrittenRule,
) -> Result<Rule, String> {
    let WrittenRule { syscall, args, why } = written;
    let place = format!("{file}: rule {at} ({syscall})");
    let number = syscall
        .parse::<Sysno>()
        .map_err(|_| format!("{place}: there is no system call of this name on x86_64"))?
        .id();
    if why.trim().is_empty() {
        return Err(format!(
            "{place}: \"why\" is empty; name the caller that needs the call"
        ));
    }
    let opens_files = role == Some(Role::Files) && ONLY_FILES.contains(&syscall.as_str());
    if NEVER.contains(&syscall.as_str()) && !opens_files {
        return Err(format!(
            "{place}: no role may make this call (NEVER in build/policy.rs)"
        ));
    }
    let args = args
        .into_iter()
        .map(|arg| condition_of(&place, arg))
        .collect::<Result<Vec<_>, _>>()?;
    let no_exec = |c: &Condition| {
        c.index == 2 && matches!(c.test, Test::Lacks(bits) if bits & PROT_EXEC != 0)
    };
    if MAPS_MEMORY.contains(&syscall.as_str()) && !args.iter().any(no_exec) {
        return Err(format!(
            "{place}: memory may not become executable; add {{ \"index\": 2, \"lacks\": \"0x4\", \
             \"means\": \"PROT_EXEC\" }}"
        ));
    }
    let plain_fork = |c: &Condition| c.index == 0 && matches!(c.test, Test::Is(FORK_FLAGS));
    if syscall == FORKS && !args.iter().any(plain_fork) {
        return Err(format!(
            "{place}: only a process that saves guest memory may be made; add {{ \"index\": 0, \"is\": \"{FORK_FLAGS:#x}\", \
             \"means\": \"CLONE_PIDFD | CLONE_FILES\" }}"
        ));
    }
    let crash_only =
        |c: &Condition| c.index == 0 && matches!(c.test, Test::Is(n) if CRASH_SIGNALS.contains(&n));
    if syscall == SETS_SIGNALS && !args.iter().any(crash_only) {
        return Err(format!(
            "{place}: only a crash may change its signal; add {{ \"index\": 0, \"is\": N }} with one of {CRASH_SIGNALS:?}"
        ));
    }
    Ok(Rule {
        syscall,
        number: i64::from(number),
        args,
        place,
    })
}

fn condition_of(place: &str, written: WrittenCondition) -> Result<Condition, String> {
    let WrittenCondition {
        index,
        is,
        lacks,
        means,
    } = written;
    if index > 5 {
        return Err(format!(
            "{place}: argument {index} does not exist; they are 0 to 5"
        ));
    }
    if means.trim().is_empty() {
        return Err(format!(
            "{place}: \"means\" of argument {index} is empty; name the constant"
        ));
    }
    let test = match (is.as_deref(), lacks.as_deref()) {
        (Some("own process id"), None) => Test::IsOwnProcess,
        (Some(value), None) => Test::Is(number(place, value)?),
        (None, Some(bits)) => match number(place, bits)? {
            0 => {
                return Err(format!(
                    "{place}: \"lacks\" of argument {index} names no bit"
                ));
            }
            bits => Test::Lacks(bits),
        },
        _ => {
            return Err(format!(
                "{place}: argument {index} needs either \"is\" or \"lacks\""
            ));
        }
    };
    Ok(Condition { index, test })
}

fn number(place: &str, text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| {
        format!("{place}: {text:?} is no number below 2^32, decimal or with 0x in front")
    })
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

/// Names of what is in a folder, sorted; none if there is no such folder.
fn names(folder: &Path) -> Result<Vec<String>, String> {
    let told = |e: std::io::Error| format!("cannot list {}: {e}", folder.display());
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(told)? {
        names.push(
            entry
                .map_err(told)?
                .file_name()
                .to_string_lossy()
                .into_owned(),
        );
    }
    names.sort();
    Ok(names)
}

/// Names of the system calls by number; empty where there is none.
pub(crate) fn syscall_names() -> Vec<&'static str> {
    let mut names = Vec::new();
    for call in Sysno::iter() {
        let number = usize::try_from(call.id()).unwrap_or_default();
        names.resize(names.len().max(number + 1), "");
        names[number] = call.name();
    }
    names
}
