//! Raw mode of the terminal, given back on every way out of the process.
//!
//! | way out | who gives it back |
//! |---|---|
//! | the owner closes the console, or drops it | [`RawMode`]'s drop |
//! | `exit`, return from `main` | an `atexit` function |
//! | panic | a panic hook, before the message is printed |
//! | SIGTERM, SIGINT, SIGHUP, SIGQUIT where nobody else handles them | our handler, then the default |
//! | SIGSEGV, SIGBUS, SIGILL, SIGABRT, SIGFPE, SIGSYS | our handler, then whoever was there before |
//! | a handler that somebody else installs later | that one calls [`restore_terminal`] |
//! | SIGKILL, a seccomp action that kills | nobody can; `stty sane` |
//!
//! Statics, because a signal handler reaches nothing else.
#![expect(unsafe_code, reason = "signal handlers and the statics that they read")]

use std::cell::UnsafeCell;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::ptr::{null, null_mut};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t, termios};

use crate::{SerialError, sys};

/// Signals that end the process and that a program may want to handle itself.
const ENDING: [c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
/// Signals of a crash.
const CRASHING: [c_int; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGABRT,
    libc::SIGFPE,
    libc::SIGSYS,
];

/// No terminal is in raw mode.
const FREE: i32 = -1;
/// Somebody is about to enter raw mode.
const CLAIMED: i32 = -2;

/// The terminal in raw mode. Its descriptor is ours alone and never closed, so that a handler never
/// meets a number that belongs to somebody else.
static RAW_FD: AtomicI32 = AtomicI32::new(FREE);
static SAVED: Written<termios> = Written::new();
static BEFORE: [Written<libc::sigaction>; CRASHING.len()] = [const { Written::new() }; 6];

/// A value that is written before handlers can run and only read afterwards.
struct Written<T>(UnsafeCell<MaybeUninit<T>>);

// SAFETY: `SAVED` is written only between claiming and publishing `RAW_FD` and read only when it is
// published; each of `BEFORE` is written once, before its handler is installed.
unsafe impl<T> Sync for Written<T> {}

impl<T> Written<T> {
    const fn new() -> Self {
        Self(UnsafeCell::new(MaybeUninit::uninit()))
    }
}

/// Gives a terminal in raw mode the settings it had before. Async-signal-safe, and may be called any
/// number of times: for everybody's signal handlers and panic hooks. Makes one system call, `ioctl`
/// (`TCSETS`), and only if a terminal is in raw mode. Keeps `errno`.
pub fn restore_terminal() {
    let fd = RAW_FD.load(Ordering::Acquire);
    if fd < 0 {
        return;
    }
    // SAFETY: this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    // SAFETY: `SAVED` was written before `RAW_FD` was published.
    let saved = unsafe { (*SAVED.0.get()).assume_init_ref() };
    // A terminal that is gone needs nothing any more.
    let _ = sys::set_terminal(fd, saved);
    // SAFETY: as above.
    unsafe { *errno = kept };
}

/// The terminal is in raw mode as long as this lives.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    pub(crate) fn enter(terminal: BorrowedFd<'_>) -> Result<Self, SerialError> {
        let claimed = RAW_FD
            .compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if !claimed {
            return Err(SerialError::TerminalTaken);
        }
        Self::enter_claimed(terminal).map_err(|source| {
            RAW_FD.store(FREE, Ordering::Release);
            SerialError::Terminal {
                act: "set raw mode",
                stream: "input",
                source,
            }
        })
    }

    fn enter_claimed(terminal: BorrowedFd<'_>) -> std::io::Result<Self> {
        let saved = sys::terminal_settings(terminal)?;
        let own = terminal.try_clone_to_owned()?;
        // SAFETY: nobody reads it while `RAW_FD` is claimed, and only we have claimed it.
        unsafe { (*SAVED.0.get()).write(saved) };
        static ONCE: Once = Once::new();
        ONCE.call_once(watch_ways_out);
        // First published, then changed: a crash in between restores what is there.
        let fd = own.into_raw_fd();
        RAW_FD.store(fd, Ordering::Release);
        sys::set_terminal(fd, &sys::make_raw(&saved))?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
        RAW_FD.store(FREE, Ordering::Release);
    }
}

fn watch_ways_out() {
    // SAFETY: the function is async-signal-safe and never unwinds.
    unsafe { libc::atexit(at_exit) };
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore_terminal();
        previous(info);
    }));
    for signal in ENDING {
        if action_of(signal).is_some_and(|a| a.sa_sigaction == libc::SIG_DFL) {
            // Reset by the kernel, because a confined thread may not do it.
            install(signal, on_ending, libc::SA_RESETHAND);
        }
    }
    for (signal, before) in CRASHING.into_iter().zip(&BEFORE) {
        if let Some(action) = action_of(signal) {
            // SAFETY: our handler for this signal, its only reader, is installed below.
            unsafe { (*before.0.get()).write(action) };
            install(signal, on_crashing, 0);
        }
    }
    // In the background (stopped, then continued there) giving the terminal back must not stop us.
    // SAFETY: SIG_IGN is a valid disposition.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
}

fn action_of(signal: c_int) -> Option<libc::sigaction> {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { zeroed() };
    // SAFETY: `action` is ours; nothing is changed.
    let result = unsafe { libc::sigaction(signal, null(), &raw mut action) };
    (result == 0).then_some(action)
}

fn install(
    signal: c_int,
    handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void),
    flags: c_int,
) {
    // SAFETY: all zeroes is a valid sigaction.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    // The alternate stack: a stack that has overflown has no room for a handler.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | flags;
    // SAFETY: `action` is whole and its handler has the signature that SA_SIGINFO asks for.
    unsafe { libc::sigaction(signal, &raw const action, null_mut()) };
}

extern "C" fn at_exit() {
    restore_terminal();
}

extern "C" fn on_ending(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    restore_terminal();
    // It has its default action again, and comes when the handler returns, which unblocks it.
    // SAFETY: takes no pointers.
    unsafe { libc::raise(signal) };
}

extern "C" fn on_crashing(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    restore_terminal();
    let found = CRASHING
        .iter()
        .position(|&s| s == signal)
        .and_then(|at| BEFORE.get(at));
    let Some(before) = found else {
        return die_of(signal);
    };
    // SAFETY: it was written before this handler was installed.
    let before = unsafe { (*before.0.get()).assume_init_ref() };
    if before.sa_sigaction == libc::SIG_DFL || before.sa_sigaction == libc::SIG_IGN {
        return die_of(signal);
    }
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let is_fault = unsafe { (*info).si_code > 0 };
    match signal {
        // The refused call is not repeated on return, so the one before us is called from here.
        libc::SIGSYS => {
            let handler = before.sa_sigaction as *const ();
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                type Three = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
                // SAFETY: SA_SIGINFO says that the handler has this signature.
                let handler: Three = unsafe { std::mem::transmute(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO the handler has this signature.
                let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
                handler(signal);
            }
        }
        // The faulting instruction runs again on return and meets the one before us: std's check for
        // a stack overflow, most likely.
        libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE if is_fault => {
            // SAFETY: an action that sigaction gave us.
            unsafe { libc::sigaction(signal, before, null_mut()) };
        }
        // Sent by somebody: would not come again by itself.
        _ => die_of(signal),
    }
}

/// Ends the process by `signal` as if nobody had handled it: at once when the handler returns, which
/// unblocks the signal.
fn die_of(signal: c_int) {
    // SAFETY: all zeroes is SIG_DFL without flags.
    let action: libc::sigaction = unsafe { zeroed() };
    // SAFETY: `action` is whole.
    unsafe { libc::sigaction(signal, &raw const action, null_mut()) };
    // SAFETY: takes no pointers.
    unsafe { libc::raise(signal) };
}
