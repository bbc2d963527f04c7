//! Processes whose sessions broke off and that wait for others. In a copy of a guest all connections are gone at once, and its
//! main process is to go on.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::session::Lasting;

/// By their numbers: those that a session may leave behind, and those that one has.
#[derive(Default)]
pub(crate) struct Parked {
    processes: Mutex<HashMap<u32, Option<Lasting>>>,
    changed: Condvar,
}

impl Parked {
    fn processes(&self) -> MutexGuard<'_, HashMap<u32, Option<Lasting>>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A process has begun that may come here.
    pub(crate) fn expect(&self, pid: u32) {
        self.processes().insert(pid, None);
    }

    /// It waits from now on.
    pub(crate) fn put(&self, pid: u32, lasting: Lasting) {
        self.processes().insert(pid, Some(lasting));
        self.changed.notify_all();
    }

    /// It was told to the end.
    pub(crate) fn forget(&self, pid: u32) {
        self.processes().remove(&pid);
    }

    /// The process, when its session has broken off; none: nobody expects it, or its session does not break off within `patience`.
    pub(crate) fn take(&self, pid: u32, patience: Duration) -> Option<Lasting> {
        let (mut processes, _) = self
            .changed
            .wait_timeout_while(self.processes(), patience, |processes| {
                matches!(processes.get(&pid), Some(None))
            })
            .unwrap_or_else(PoisonError::into_inner);
        processes.get_mut(&pid)?.take()
    }
}
