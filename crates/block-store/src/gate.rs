//! Keeps writes of parts of blocks apart from all other writes of the same file.
//!
//! With `O_DIRECT` a part of a block can only be written by reading the block, changing it and writing
//! it back. A write of the whole block in between would be lost. So who does that closes the gate, waits for the
//! writes in flight of all queues of the file, and opens it again. Guests do this only where they ignore
//! the block size that the device names.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::carrier::Carrier;

/// A queue's core, as the gate reaches it.
pub(crate) type SharedCarrier = Arc<Mutex<Carrier>>;

#[derive(Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    turn: Mutex<()>,
    carriers: Mutex<Vec<Weak<Mutex<Carrier>>>>,
}

impl Gate {
    /// Adds a queue of the file.
    pub(crate) fn add(&self, carrier: &SharedCarrier) {
        let mut all = lock(&self.carriers);
        all.retain(|c| c.strong_count() > 0);
        all.push(Arc::downgrade(carrier));
    }

    /// Whether a write must wait. Asked with the lock of the queue held: then either the write is seen
    /// by who closes the gate, or it sees the closed gate.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits until the gate is open. No lock of a queue may be held.
    pub(crate) fn wait(&self) {
        drop(lock(&self.turn));
    }

    /// Calls `alone` while no write of any queue is in flight. No lock of a queue may be held.
    pub(crate) fn pass_alone<T>(&self, alone: impl FnOnce() -> T) -> T {
        let turn = lock(&self.turn);
        self.closed.store(true, Ordering::SeqCst);
        let carriers: Vec<_> = lock(&self.carriers)
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for carrier in carriers {
            lock(&carrier).finish_all();
        }
        let result = alone();
        self.closed.store(false, Ordering::SeqCst);
        drop(turn);
        result
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

/// A queue whose thread panicked is no reason for another to do so.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
