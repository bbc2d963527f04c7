//! Says which system call was refused, then ends the process. Runs in a signal handler, so it takes no
//! lock, allocates nothing and calls only `write` and `_exit`, which every role has.
//!
//! A handler gets no argument of ours: what it must know lies in the few statics below, each written
//! before the first filter is entered, and in constants of the thread.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Write as _};
use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::compose::OURS;
use crate::extra;
use crate::filters::SYSCALL_NAMES;
use crate::{REFUSED_EXIT_CODE, Role, SandboxError};

/// Bytes of a thread's name that the report shows.
const NAME_LIMIT: usize = 32;
/// Bytes of the whole line; the longest possible one is shorter.
const LINE_LIMIT: usize = 512;
/// Marks a number of the x32 ABI (`__X32_SYSCALL_BIT`).
const X32: i32 = 0x4000_0000;
/// `si_code` of a SIGSYS that a filter has sent.
const SYS_SECCOMP: c_int = 1;

static INSTALLED: AtomicBool = AtomicBool::new(false);
static HOOK: OnceLock<fn()> = OnceLock::new();
static LOG: AtomicI32 = AtomicI32::new(-1);

#[derive(Clone, Copy)]
struct Confined {
    role: Role,
    name: [u8; NAME_LIMIT],
    len: usize,
}

thread_local! {
    // Constants without a destructor: reading them is one load, also in a signal handler.
    static CONFINED: Cell<Option<Confined>> = const { Cell::new(None) };
    static REPORTED: Cell<bool> = const { Cell::new(false) };
}

/// Gives the report of refused calls something to do before the process ends, such as restoring the
/// terminal. To be called once, in main, before the first thread enters its role; without it the report
/// is only written. `hook` runs after the line is written, in the refused thread and in a signal
/// handler: it must be async-signal-safe, and its system calls must be in every role's policy.
///
/// # Errors
/// There is a hook already, or the kernel refuses the signal handler.
pub fn install_refusal_report(hook: fn()) -> Result<(), SandboxError> {
    HOOK.set(hook)
        .map_err(|_| SandboxError::ReportInstalledTwice)?;
    install_handler()
}

/// Once per process; two threads at once set the same.
pub(crate) fn install_handler() -> Result<(), SandboxError> {
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = refused as *const () as usize;
    // NODEFER: a hook that is refused a call comes back here instead of ending without our exit code.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: `action` is complete and its handler has the signature that SA_SIGINFO asks for.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } != 0 {
        return Err(SandboxError::ReportHandler(io::Error::last_os_error()));
    }
    INSTALLED.store(true, Ordering::Release);
    Ok(())
}

/// Also writes the line of a refused call to `fd`, which must stay open as long as the process lives.
pub fn set_report_log(fd: RawFd) {
    LOG.store(fd, Ordering::Release);
}

pub(crate) fn role_of_this_thread() -> Option<Role> {
    CONFINED.get().map(|confined| confined.role)
}

pub(crate) fn forget_this_thread() {
    CONFINED.set(None);
}

/// Remembers what the report will call this thread. What could disturb a terminal becomes `?`.
pub(crate) fn name_this_thread(role: Role, thread_name: &str) {
    let mut name = [0; NAME_LIMIT];
    let plain = |b: u8| {
        if b == b' ' || b.is_ascii_graphic() {
            b
        } else {
            b'?'
        }
    };
    let len = name
        .iter_mut()
        .zip(thread_name.bytes())
        .map(|(to, from)| *to = plain(from))
        .count();
    CONFINED.set(Some(Confined { role, name, len }));
}

/// `_sigsys` in the kernel's `siginfo`, which libc does not spell out.
#[repr(C)]
struct SigSys {
    signo: c_int,
    errno: c_int,
    code: c_int,
    call_addr: *const c_void,
    syscall: c_int,
    arch: u32,
}

extern "C" fn refused(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: SA_SIGINFO promises a siginfo, which is larger than `SigSys`; both start alike.
    let info = unsafe { &*info.cast::<SigSys>() };
    if info.code != SYS_SECCOMP {
        // Somebody sent the signal by hand; it says nothing about this process.
        return;
    }
    if !REPORTED.replace(true) {
        // SAFETY: SA_SIGINFO promises a ucontext, which lives as long as the handler.
        let context = unsafe { &*context.cast::<libc::ucontext_t>() };
        // Where both filters refuse a call by the same means, the data are those of the last one, which is ours.
        let refuser = if extra::are_set() && info.errno != c_int::from(OURS) {
            "--seccomp-filter"
        } else {
            "its sandbox"
        };
        let line = Line::of(
            CONFINED.get().as_ref(),
            refuser,
            info.syscall,
            &arguments(context),
        );
        line.write_to(libc::STDERR_FILENO);
        let log = LOG.load(Ordering::Acquire);
        if log >= 0 {
            line.write_to(log);
        }
        if let Some(hook) = HOOK.get() {
            hook();
        }
    }
    // SAFETY: ends the process; nothing of it is used again.
    unsafe { libc::_exit(REFUSED_EXIT_CODE) };
}

/// The six registers that carry arguments.
fn arguments(context: &libc::ucontext_t) -> [u64; 6] {
    [
        libc::REG_RDI,
        libc::REG_RSI,
        libc::REG_RDX,
        libc::REG_R10,
        libc::REG_R8,
        libc::REG_R9,
    ]
    .map(|register| {
        let value = usize::try_from(register)
            .ok()
            .and_then(|at| context.uc_mcontext.gregs.get(at));
        value.copied().unwrap_or_default().cast_unsigned()
    })
}

/// One line in a buffer of its own; what does not fit is cut.
pub(crate) struct Line {
    bytes: [u8; LINE_LIMIT],
    len: usize,
}

impl Line {
    fn of(confined: Option<&Confined>, refuser: &str, call: i32, args: &[u64; 6]) -> Self {
        let mut line = Self {
            bytes: [0; LINE_LIMIT],
            len: 0,
        };
        // Writing to a buffer that cuts never fails.
        let _ = line.compose(confined, refuser, call, args);
        line
    }

    fn compose(
        &mut self,
        of: Option<&Confined>,
        refuser: &str,
        call: i32,
        args: &[u64; 6],
    ) -> fmt::Result {
        let (name, role) = match of {
            Some(c) => (c.name.get(..c.len).unwrap_or_default(), c.role.name()),
            None => (&b"?"[..], "inherited"),
        };
        let thread = std::str::from_utf8(name).unwrap_or("?");
        let abi = if call & X32 == 0 { "" } else { "x32 " };
        let number = call & !X32;
        let known = usize::try_from(number)
            .ok()
            .and_then(|at| SYSCALL_NAMES.get(at))
            .filter(|name| !name.is_empty());
        let what = known.unwrap_or(&"unknown");
        write!(
            self,
            "alveole-vmm: thread \"{thread}\" (role {role}) made a system call that {refuser} \
             refuses: {abi}{what} ({number}), arguments"
        )?;
        for arg in args {
            write!(self, " {arg:#x}")?;
        }
        self.write_str("; the VM ends here\n")
    }

    fn write_to(&self, fd: RawFd) {
        // SAFETY: the buffer is ours and `len` bytes of it are written. A reader that is gone or slow
        // cannot be helped from here.
        let _ = unsafe { libc::write(fd, self.bytes.as_ptr().cast(), self.len) };
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *to = from;
            self.len += 1;
        }
        Ok(())
    }
}
