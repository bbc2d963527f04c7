//! The bounded queue between the UART and the console.
//!
//! vCPU threads push single bytes, the event loop takes them in chunks. A push wakes the loop only
//! when the loop has gone to rest: in a stream it looks once more a moment after it has emptied the queue, by
//! itself, so that a stream of bytes costs two wake-ups and not one for each. For a byte now and then it does not: looking
//! for more would be a second wake-up each time.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::{OUTPUT_BUFFER_BYTES, STALL_BUDGET_MS, SerialCounters};

/// Room that must be free before a queue that has dropped takes bytes again, so that the marks in the
/// output stay rare.
const RESUME_ROOM_BYTES: usize = 4096;

/// What stands in the output where bytes are missing.
pub(crate) fn dropped_mark(bytes: u64) -> String {
    format!("\r\n[alveole: {bytes} bytes dropped]\r\n")
}

/// What becomes of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is queued for the console.
    Queued,
    /// There is no console, as configured.
    Unwanted,
    /// The console is gone.
    Lost,
}

pub(crate) struct OutQueue {
    state: Mutex<State>,
    room: Condvar,
    /// Whether a push would not find room: lets a vCPU skip the lock.
    full: AtomicBool,
    bell: Arc<EventFd>,
    counters: Arc<SerialCounters>,
}

struct State {
    bytes: VecDeque<u8>,
    fate: Fate,
    /// The loop is awake for us, or will look by itself.
    awake: bool,
    /// A vCPU has waited in vain; nothing has moved since.
    stuck: bool,
    waiting: u32,
    /// Bytes dropped since the last mark.
    dropped: u64,
}

impl State {
    fn takes(&self) -> bool {
        let free = OUTPUT_BUFFER_BYTES.saturating_sub(self.bytes.len());
        free >= if self.dropped > 0 {
            RESUME_ROOM_BYTES
        } else {
            1
        }
    }

    fn mark_what_is_missing(&mut self) {
        if self.dropped > 0 {
            self.bytes.extend(dropped_mark(self.dropped).as_bytes());
            self.dropped = 0;
        }
    }
}

impl OutQueue {
    pub(crate) fn new(bell: Arc<EventFd>, counters: Arc<SerialCounters>, fate: Fate) -> Self {
        let state = State {
            bytes: VecDeque::new(),
            fate,
            awake: false,
            stuck: false,
            waiting: 0,
            dropped: 0,
        };
        Self {
            state: Mutex::new(state),
            room: Condvar::new(),
            full: AtomicBool::new(false),
            bell,
            counters,
        }
    }

    /// Waits for room, at most the stall budget. Called by a vCPU without the UART's lock.
    pub(crate) fn wait_for_room(&self) {
        if !self.full.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.lock();
        if state.stuck || state.fate != Fate::Queued || state.takes() {
            return;
        }
        self.counters.stalls.inc();
        state.waiting += 1;
        let budget = Duration::from_millis(STALL_BUDGET_MS);
        let no_room = |s: &mut State| s.fate == Fate::Queued && !s.takes();
        let waited = self.room.wait_timeout_while(state, budget, no_room);
        let (mut state, result) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state.stuck = result.timed_out();
    }

    /// Queues one byte, or drops it. Never waits.
    pub(crate) fn push(&self, byte: u8) {
        let mut state = self.lock();
        match state.fate {
            Fate::Queued => {}
            Fate::Unwanted => return self.counters.bytes_out.inc(),
            Fate::Lost => return self.counters.bytes_dropped.inc(),
        }
        if !state.takes() {
            state.dropped += 1;
            self.counters.bytes_dropped.inc();
            return;
        }
        state.mark_what_is_missing();
        state.bytes.push_back(byte);
        self.counters.bytes_out.inc();
        self.full.store(!state.takes(), Ordering::Relaxed);
        if !state.awake {
            state.awake = true;
            drop(state);
            self.counters.wakeups.inc();
            // Fails only with the counter at its maximum: the loop has been woken already.
            let _ = self.bell.write(1);
        }
    }

    /// Moves bytes from the front of the queue into `chunk`; how many. Finding none puts the loop to
    /// rest if `rest_if_empty`: the next push wakes it.
    pub(crate) fn take(&self, chunk: &mut [u8], rest_if_empty: bool) -> usize {
        let mut state = self.lock();
        if state.bytes.is_empty() {
            state.mark_what_is_missing();
        }
        let len = state.bytes.len().min(chunk.len());
        for (to, from) in chunk.iter_mut().zip(state.bytes.drain(..len)) {
            *to = from;
        }
        if len == 0 {
            state.awake &= !rest_if_empty;
            return 0;
        }
        state.stuck = false;
        self.full.store(!state.takes(), Ordering::Relaxed);
        self.wake_waiting(&state);
        len
    }

    /// From here on output goes nowhere. What is queued is dropped too.
    pub(crate) fn lose(&self) {
        let mut state = self.lock();
        state.fate = Fate::Lost;
        self.counters.bytes_dropped.add(state.bytes.len() as u64);
        state.bytes = VecDeque::new();
        state.dropped = 0;
        self.full.store(false, Ordering::Relaxed);
        self.wake_waiting(&state);
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    fn wake_waiting(&self, state: &State) {
        // Waking nobody is a system call too.
        if state.waiting > 0 {
            self.room.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn queue() -> OutQueue {
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        OutQueue::new(bell, Arc::default(), Fate::Queued)
    }

    fn write(queue: &OutQueue, byte: u8) {
        queue.wait_for_room();
        queue.push(byte);
    }

    #[test]
    fn a_stream_of_bytes_is_one_wakeup() {
        let queue = queue();
        let mut chunk = [0; 8];
        (0..100).for_each(|b| queue.push(b));
        while queue.take(&mut chunk, false) > 0 {}
        (0..100).for_each(|b| queue.push(b));
        assert_eq!(
            queue.counters.wakeups.get(),
            1,
            "the loop has not gone to rest"
        );
        while queue.take(&mut chunk, true) > 0 {}
        queue.push(1);
        assert_eq!(queue.counters.wakeups.get(), 2);
        assert_eq!(queue.bell.read().unwrap(), 2);
    }

    #[test]
    fn nobody_reads_costs_one_stall_and_bounded_memory() {
        let queue = queue();
        let begun = Instant::now();
        for _ in 0..OUTPUT_BUFFER_BYTES + 100_000 {
            write(&queue, b'x');
        }
        let took = begun.elapsed();
        assert_eq!(queue.counters.stalls.get(), 1);
        assert!(took >= Duration::from_millis(STALL_BUDGET_MS), "{took:?}");
        assert!(
            took < Duration::from_millis(STALL_BUDGET_MS * 20),
            "{took:?}"
        );
        assert_eq!(queue.len(), OUTPUT_BUFFER_BYTES);
        assert_eq!(queue.counters.bytes_dropped.get(), 100_000);

        // When somebody reads again, the mark stands where the bytes are missing.
        let mut chunk = vec![0; RESUME_ROOM_BYTES];
        assert_eq!(queue.take(&mut chunk, true), RESUME_ROOM_BYTES);
        write(&queue, b'y');
        let mut rest = vec![0; OUTPUT_BUFFER_BYTES * 2];
        let len = queue.take(&mut rest, true);
        let want = dropped_mark(100_000) + "y";
        assert!(rest[..len].ends_with(want.as_bytes()));
        assert!(len <= OUTPUT_BUFFER_BYTES);
    }

    #[test]
    fn a_mark_is_delivered_at_the_end_too() {
        let queue = queue();
        (0..=OUTPUT_BUFFER_BYTES).for_each(|_| queue.push(b'x'));
        let mut rest = vec![0; OUTPUT_BUFFER_BYTES];
        assert_eq!(queue.take(&mut rest, true), OUTPUT_BUFFER_BYTES);
        let len = queue.take(&mut rest, true);
        assert_eq!(&rest[..len], dropped_mark(1).as_bytes());
        assert_eq!(queue.take(&mut rest, true), 0);
    }

    #[test]
    fn a_slow_reader_loses_nothing() {
        const TOTAL: usize = OUTPUT_BUFFER_BYTES * 2;
        let queue = Arc::new(queue());
        let reads = queue.clone();
        let reader = thread::spawn(move || {
            let (mut chunk, mut got) = (vec![0; 16 * 1024], 0);
            // So slow that the writer has to wait, however busy this machine is.
            while reads.counters.stalls.get() == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            while got < TOTAL {
                thread::sleep(Duration::from_millis(5));
                got += reads.take(&mut chunk, false);
            }
            got
        });
        (0..TOTAL).for_each(|_| write(&queue, b'x'));
        assert_eq!(reader.join().unwrap(), TOTAL);
        assert_eq!(queue.counters.bytes_dropped.get(), 0);
        assert!(queue.counters.stalls.get() > 0);
    }

    #[test]
    fn losing_the_console_frees_a_waiting_vcpu() {
        let queue = Arc::new(queue());
        (0..OUTPUT_BUFFER_BYTES).for_each(|_| queue.push(b'x'));
        let loses = queue.clone();
        let other = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            loses.lose();
        });
        write(&queue, b'y');
        other.join().unwrap();
        assert_eq!(queue.len(), 0);
        assert_eq!(
            queue.counters.bytes_dropped.get(),
            OUTPUT_BUFFER_BYTES as u64 + 1
        );
    }
}
