//! Thread roles and their seccomp filters.
//!
//! A thread calls [`enter`] as its first act and from then on can make only the system calls that the
//! policy of its [`Role`] names, in `resources/seccomp`. The policies are compiled while building; what
//! happens at run time is one copy of a static table and two system calls. Filters are on in debug
//! builds and in tests too: a sandbox that is off while developing is never finished.
//!
//! A refused call is not made. The thread gets SIGSYS, and the handler says on standard error which
//! thread wanted which call, then ends the process with [`REFUSED_EXIT_CODE`].
//!
//! Why a trap and not a kill: a killed process cannot say what it wanted, and a policy that nobody can
//! debug is soon switched off. It gives an attacker nothing: the call is never made, and masking or
//! ignoring SIGSYS does not help, since the kernel forces the signal (`force_sig`) and then ends the
//! process itself, though without our line. Calls in the 32-bit ABI end the process at once.
//!
//! Deliberately does not know: what the threads do, which devices a machine has, how the terminal is
//! restored.

#![expect(
    unsafe_code,
    reason = "filters and signal handlers are installed by raw system calls"
)]

mod compose;
mod extra;
mod filters;
mod report;

// The build's own parts are tested here: a build script has no tests.
#[cfg(test)]
#[path = "../build/compile.rs"]
mod compile;
#[cfg(test)]
#[path = "../build/policy.rs"]
mod policy;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;

pub use extra::{
    ExtraFilters, ExtraFiltersError, MAX_EXTRA_FILTERS_BYTES, MAX_EXTRA_INSTRUCTIONS,
    set_extra_filters,
};
pub use report::{install_refusal_report, set_report_log};

/// The exit code of a process that was refused a system call. It is the one Firecracker uses.
pub const REFUSED_EXIT_CODE: i32 = 148;

/// Bytes of a thread's stack. Less than a huge page of the host: where those are given unasked (transparent_hugepage=always), the first touch of a
/// stack of Rust's usual 2 MiB takes, and clears, all of it.
pub const STACK_BYTES: usize = 1 << 20;

/// What a thread is for, and so which system calls it may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The main thread after start-up: owns the machine, waits for threads and for commands.
    Control,
    /// The epoll loop that hosts device workers.
    Devices,
    /// Runs one vCPU.
    Vcpu,
    /// Serves the API socket.
    Api,
    /// Opens files for a running machine, where clients can ask for that.
    Files,
    /// Serves the memory of snapshots to monitors, in a process of its own.
    Pages,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 6] = [
        Self::Control,
        Self::Devices,
        Self::Vcpu,
        Self::Api,
        Self::Files,
        Self::Pages,
    ];

    /// The name that messages and policy files use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Devices => "devices",
            Self::Vcpu => "vcpu",
            Self::Api => "api",
            Self::Files => "files",
            Self::Pages => "pages",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a thread could not enter its sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A thread has one role for life.
    #[error("cannot confine thread \"{thread}\" to role {role}: it has role {now} already")]
    AlreadyConfined {
        /// The thread.
        thread: String,
        /// The role it was to have.
        role: Role,
        /// The role it has.
        now: Role,
    },
    /// No policy file has this name.
    #[error(
        "cannot confine thread \"{thread}\": there is no seccomp fragment for device \"{device}\"; \
         add resources/seccomp/x86_64/devices.d/{device}.json"
    )]
    UnknownDevice {
        /// The thread.
        thread: String,
        /// The device.
        device: String,
    },
    /// Base and fragments together are more than the kernel takes.
    #[error(
        "cannot confine thread \"{thread}\": its filter has {instructions} instructions, the kernel \
         takes {limit}; take rules out of resources/seccomp"
    )]
    TooLong {
        /// The thread.
        thread: String,
        /// Length of the filter.
        instructions: usize,
        /// What the kernel takes.
        limit: usize,
    },
    /// The kernel has no seccomp filters, or another sandbox around this process forbids them.
    #[error("cannot confine thread \"{thread}\" with {call}; the host must allow seccomp filters")]
    Kernel {
        /// The thread.
        thread: String,
        /// The system call that failed.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// There can be one hook.
    #[error("the report of refused calls is installed already; install it once, in main")]
    ReportInstalledTwice,
    /// The signal handler could not be set.
    #[error("cannot install the report of refused calls with sigaction(SIGSYS)")]
    ReportHandler(#[source] io::Error),
}

/// Confines the calling thread to the system calls of `role`, and of these to what [`set_extra_filters`] leaves, for good. Threads it makes would inherit
/// the filter, but no role can make one. [`Role::Control`] is entered when all is built: what that needed goes back to the host.
///
/// # Errors
/// The thread is confined already, or the kernel refuses the filter. The thread must then not go on.
pub fn enter(role: Role, thread_name: &str) -> Result<(), SandboxError> {
    enter_with(role, thread_name, &[])
}

/// As [`enter`], plus what the fragments of `devices` add for this role: names of files in
/// `resources/seccomp/x86_64/devices.d`, without `.json`.
///
/// # Errors
/// As [`enter`]; or a device has no fragment, or too many are put together.
pub fn enter_with(role: Role, thread_name: &str, devices: &[&str]) -> Result<(), SandboxError> {
    let thread = || thread_name.to_owned();
    if let Some(now) = report::role_of_this_thread() {
        return Err(SandboxError::AlreadyConfined {
            thread: thread(),
            role,
            now,
        });
    }
    let mut blocks = vec![filters::base(role)];
    for device in devices {
        blocks.push(filters::fragment(device, role).ok_or_else(|| {
            SandboxError::UnknownDevice {
                thread: thread(),
                device: (*device).to_owned(),
            }
        })?);
    }
    let filter = compose::filter(&blocks, std::process::id());
    if filter.len() > compose::MAX_INSTRUCTIONS {
        return Err(SandboxError::TooLong {
            thread: thread(),
            instructions: filter.len(),
            limit: compose::MAX_INSTRUCTIONS,
        });
    }
    keep_malloc_from_files();
    if role == Role::Control {
        // SAFETY: gives free pages of the heap back to the host, under the allocator's own lock.
        unsafe { libc::malloc_trim(0) };
    }
    report::install_handler()?;
    report::name_this_thread(role, thread_name);
    // Ours refuses to be followed by another one, so it comes last.
    let extra = extra::of_role(role);
    let installed = compose::forbid_new_rights()
        .and_then(|()| extra.map_or(Ok(()), compose::install))
        .and_then(|()| compose::install(&filter));
    installed.map_err(|(call, source)| {
        report::forget_this_thread();
        SandboxError::Kernel {
            thread: thread(),
            call,
            source,
        }
    })
}

/// Before glibc gives the end of a thread's heap back, it opens /proc/sys/vm/overcommit_memory to see how: a large
/// `free` at the wrong moment would be a refused call. With this threshold it does not come to that. Blocks over
/// 128 KiB have mappings of their own, which still go back to the host at once.
fn keep_malloc_from_files() {
    // SAFETY: sets one number of the allocator, under its own lock.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) };
}

/// Has all threads take memory from one heap. glibc would give each a heap of its own when it first takes some, which are eight
/// system calls and two pages of memory for a thread of ours that never takes much. To be called before there are threads.
pub fn share_heap() {
    // SAFETY: sets one number of the allocator, under its own lock.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// The devices that have a fragment in this build.
#[must_use]
pub fn known_devices() -> &'static [&'static str] {
    filters::DEVICES
}
