//! The console's side of the serial port: moves output to the back end and input to the UART.
//!
//! Driven by the worker on the event loop, and by `flush` on whatever thread ends the machine; both
//! under one lock, which is never held while waiting.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, Got, Wrote};
use crate::out_queue::OutQueue;
use crate::uart::Registers;
use crate::{INPUT_BUFFER_BYTES, STREAM, SerialCounters};

const CHUNK_BYTES: usize = 4096;
/// Chunks moved in one go. Abused by a guest that floods its console: the other workers on the loop
/// get their turn after these.
const CHUNKS_PER_TURN: usize = 16;

pub(crate) struct Port {
    pub(crate) backend: Backend,
    queue: Arc<OutQueue>,
    counters: Arc<SerialCounters>,
    chunk: Chunk,
    input: VecDeque<u8>,
    /// When the loop last found output.
    found: Option<Instant>,
}

/// Output taken from the queue and not written yet.
struct Chunk {
    bytes: [u8; CHUNK_BYTES],
    from: usize,
    to: usize,
}

/// How far output has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// There is nothing; the next byte wakes the loop.
    AtRest,
    /// All of a stream is written; look again in a moment.
    Empty,
    /// There is more.
    More,
    /// The console takes nothing for now.
    Blocked,
}

impl Port {
    pub(crate) fn new(
        backend: Backend,
        queue: Arc<OutQueue>,
        counters: Arc<SerialCounters>,
    ) -> Self {
        let chunk = Chunk {
            bytes: [0; CHUNK_BYTES],
            from: 0,
            to: 0,
        };
        Self {
            backend,
            queue,
            counters,
            chunk,
            input: VecDeque::new(),
            found: None,
        }
    }

    /// Moves output as far as it goes without waiting.
    pub(crate) fn drain(&mut self) -> Drained {
        if !self.backend.write_own() {
            return Drained::Blocked;
        }
        let (mut wrote, mut is_stream) = (false, false);
        for _ in 0..CHUNKS_PER_TURN {
            if self.chunk.from == self.chunk.to {
                self.chunk.from = 0;
                self.chunk.to = self.queue.take(&mut self.chunk.bytes, !is_stream);
                if self.chunk.to == 0 {
                    return if is_stream {
                        Drained::Empty
                    } else {
                        Drained::AtRest
                    };
                }
            }
            if !wrote {
                wrote = true;
                let before = self.found.replace(Instant::now());
                is_stream = before.is_some_and(|before| before.elapsed() < STREAM);
            }
            let bytes = self
                .chunk
                .bytes
                .get(self.chunk.from..self.chunk.to)
                .unwrap_or_default();
            match self.backend.write(bytes) {
                Wrote::Taken(len) => self.chunk.from += len,
                Wrote::Dropped(len) => {
                    self.chunk.from += len;
                    self.counters.bytes_dropped.add(len as u64);
                }
                Wrote::Blocked => return Drained::Blocked,
                Wrote::Lost => {
                    self.counters.bytes_dropped.add(bytes.len() as u64);
                    self.chunk.from = self.chunk.to;
                    self.queue.lose();
                }
            }
        }
        Drained::More
    }

    /// Moves input as far as it goes without waiting; whether there is more.
    pub(crate) fn feed(&mut self, registers: &Registers) -> bool {
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..CHUNKS_PER_TURN {
            while !self.input.is_empty() {
                let taken = registers.receive(self.input.as_slices().0, &self.counters);
                self.input.drain(..taken);
                if taken == 0 {
                    break;
                }
            }
            let room = INPUT_BUFFER_BYTES.saturating_sub(self.input.len());
            // A guest that hangs must not keep a person from the keys that end it: what it has no
            // room for is read all the same, and dropped, as on a real serial line.
            let len = if self.backend.must_read() {
                CHUNK_BYTES
            } else {
                room.min(CHUNK_BYTES)
            };
            match self.backend.read(chunk.get_mut(..len).unwrap_or_default()) {
                Got::Bytes(len) => {
                    self.input.extend(chunk.iter().take(len.min(room)));
                    self.counters
                        .input_dropped
                        .add(len.saturating_sub(room) as u64);
                }
                Got::Nothing => return false,
            }
        }
        true
    }

    pub(crate) fn wants_input(&self) -> bool {
        self.input.len() < INPUT_BUFFER_BYTES
    }

    /// Bytes of output that wait to be written.
    pub(crate) fn waiting(&self) -> usize {
        self.chunk.to - self.chunk.from + self.queue.len()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::out_queue::Fate;

    #[test]
    fn a_stream_keeps_the_loop_awake_and_a_single_byte_does_not() {
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let queue = Arc::new(OutQueue::new(bell, Arc::default(), Fate::Queued));
        let mut port = Port::new(Backend::None, queue.clone(), Arc::default());
        assert_eq!(port.drain(), Drained::AtRest);
        for _ in 0..3 {
            queue.push(b'x');
            assert_eq!(port.drain(), Drained::AtRest);
            thread::sleep(STREAM * 2);
        }
        // However busy this machine is: somewhere two bytes come at once.
        let mut is_stream = false;
        for _ in 0..1000 {
            queue.push(b'x');
            is_stream |= port.drain() == Drained::Empty;
        }
        assert!(is_stream);
        assert_eq!(port.drain(), Drained::AtRest);
    }
}
