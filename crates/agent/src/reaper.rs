//! Who has ended. The first process of a guest is the parent of all whose parents are gone: it must take each one's
//! end from the kernel, and tell those who wait for one of their own.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use alveole_agent_protocol::Exit;
use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// The processes of sessions that have not ended.
#[derive(Default)]
pub(crate) struct Reaper {
    state: Mutex<State>,
    started: Condvar,
}

#[derive(Default)]
struct State {
    waiting: HashMap<i32, Waiting>,
    /// Counts processes started: one more than a moment ago means that there is something to wait for.
    started: u64,
}

/// Who is told of a process's end: the pipe's other end is closed when `exit` is there.
struct Waiting {
    exit: Arc<OnceLock<Exit>>,
    _told_by_closing: OwnedFd,
}

/// A process of a session.
pub(crate) struct Watched {
    pub(crate) pid: Pid,
    pub(crate) exit: Arc<OnceLock<Exit>>,
    /// Readable (at its end) when `exit` is there.
    pub(crate) ended: OwnedFd,
}

impl Reaper {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process and watches it. `start` must start exactly one.
    pub(crate) fn watch(&self, start: impl FnOnce() -> io::Result<Pid>) -> io::Result<Watched> {
        let (ended, told_by_closing) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let exit = Arc::new(OnceLock::new());
        // The lock is held meanwhile, so that a process that ends at once is not somebody's unknown.
        let mut state = self.state();
        let pid = start()?;
        state.waiting.insert(
            pid.as_raw_nonzero().get(),
            Waiting {
                exit: Arc::clone(&exit),
                _told_by_closing: told_by_closing,
            },
        );
        state.started += 1;
        self.started.notify_one();
        Ok(Watched { pid, exit, ended })
    }

    /// Sends a signal to a process of a session. Its number cannot be another's: it is free only when it was taken out of the table.
    pub(crate) fn signal(&self, pid: Pid, signal: Signal) -> io::Result<()> {
        let state = self.state();
        if !state.waiting.contains_key(&pid.as_raw_nonzero().get()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(kill_process(pid, signal)?)
    }

    /// Kills a process of a session that leads a group (all that are started here do), and all of its group. As safe as [`Self::signal`].
    pub(crate) fn kill_group(&self, leader: Pid) -> io::Result<()> {
        let state = self.state();
        if !state.waiting.contains_key(&leader.as_raw_nonzero().get()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(kill_process_group(leader, Signal::KILL)?)
    }

    /// Takes ends from the kernel for ever.
    pub(crate) fn run(&self) {
        loop {
            let before = self.state().started;
            // Looked at, not taken: what is in the table is taken under the lock.
            let seen = waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
            match seen.map(|status| status.pid()) {
                Ok(Some(pid)) => self.reap(pid),
                Err(Errno::ECHILD) => {
                    let state = self.state();
                    let _unused = self
                        .started
                        .wait_while(state, |state| state.started == before)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                _ => {}
            }
        }
    }

    fn reap(&self, pid: nix::unistd::Pid) {
        let mut state = self.state();
        let status = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        let exit = match status {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32 as u8),
            _ => return,
        };
        if let Some(waiting) = state.waiting.remove(&pid.as_raw()) {
            let _ = waiting.exit.set(exit);
        }
    }
}
