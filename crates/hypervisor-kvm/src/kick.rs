//! Ends a KVM_RUN from another thread: `immediate_exit` in the shared page, then a signal.
//!
//! The flag closes the race that the signal alone has: a kick that comes just before the ioctl makes it
//! return at once.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use alveole_hypervisor::Kick;

/// Address of `kvm_run.immediate_exit` in a page shared with the kernel.
#[derive(Clone, Copy)]
struct Flag(NonNull<AtomicU8>);

// SAFETY: the flag is only used through atomic operations, and only while `Target::flag` is set, which
// ends before the page is unmapped (see `KvmKick::retire`).
unsafe impl Send for Flag {}

struct Target {
    flag: Option<Flag>,
    /// Thread id in this process, once a thread runs the processor.
    thread: Option<libc::pid_t>,
}

/// Kicks one processor.
pub(crate) struct KvmKick(Mutex<Target>);

impl KvmKick {
    /// # Safety
    /// `immediate_exit` stays valid until [`KvmKick::retire`] has been called.
    pub(crate) unsafe fn new(immediate_exit: *mut u8) -> Self {
        let flag = NonNull::new(immediate_exit.cast::<AtomicU8>()).map(Flag);
        Self(Mutex::new(Target { flag, thread: None }))
    }

    /// From here on a kick does nothing: the processor is going away.
    pub(crate) fn retire(&self) {
        *self.lock() = Target {
            flag: None,
            thread: None,
        };
    }

    fn lock(&self) -> MutexGuard<'_, Target> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for KvmKick {
    fn bind_to_this_thread(&self) {
        install_handler();
        // SAFETY: gettid has no preconditions.
        self.lock().thread = Some(unsafe { libc::gettid() });
    }

    fn kick(&self) {
        let target = self.lock();
        let Some(Flag(flag)) = target.flag else {
            return;
        };
        // SAFETY: the flag is set, hence the page is mapped, and stays so while the lock is held.
        unsafe { flag.as_ref() }.store(1, Ordering::SeqCst);
        let thread = target.thread;
        // The signal wakes a thread that asks for the lock next.
        drop(target);
        if let Some(thread) = thread {
            // SAFETY: plain system calls; the signal has a handler (installed when the thread was bound).
            // A thread that is gone gives ESRCH, which needs no answer; should its number be another one's of this process by now, a
            // call of that one is interrupted once.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    fn clear(&self) {
        if let Some(Flag(flag)) = self.lock().flag {
            // SAFETY: as in `kick`.
            unsafe { flag.as_ref() }.store(0, Ordering::SeqCst);
        }
    }
}

/// The signal that ends a run: the first free real-time signal.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        extern "C" fn noticed(_: libc::c_int) {}
        // SAFETY: the handler does nothing, so it is safe at any point. Without SA_RESTART, so that the
        // ioctl returns.
        let failed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = noticed as *const () as usize;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) != 0
        };
        assert!(
            !failed,
            "cannot install a handler for SIGRTMIN: {}",
            io::Error::last_os_error()
        );
    });
}
