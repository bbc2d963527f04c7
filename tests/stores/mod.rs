//! A store in memory that takes its time, fails, or looks otherwise, and keeps a record of what was asked.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use alveole_block_store::{
    BlockStore, Completion, Geometry, Operation, RamStore, Request, StoreError, StoreQueue,
};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// What a store was asked, and what it has done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A request came.
    Asked(Operation),
    /// It was given back.
    Done(Operation),
}

/// The store. Clones share bytes and record.
#[derive(Clone)]
pub(crate) struct TestStore {
    /// Where the bytes are.
    pub(crate) ram: RamStore,
    /// How long each request takes.
    pub(crate) delay: Duration,
    /// Whether requests fail.
    pub(crate) fails: bool,
    /// Whether it gives space back.
    pub(crate) discard: bool,
    /// See [`Self::take_record`].
    pub(crate) record: Arc<Mutex<Vec<Event>>>,
}

impl TestStore {
    /// A store of zeroes that answers at once.
    pub(crate) fn new(size_bytes: usize) -> Self {
        Self {
            ram: RamStore::new(size_bytes),
            delay: Duration::ZERO,
            fails: false,
            discard: true,
            record: Arc::default(),
        }
    }

    /// What happened since the last call.
    pub(crate) fn take_record(&self) -> Vec<Event> {
        std::mem::take(&mut self.record.lock().unwrap())
    }

    fn say(&self, event: Event) {
        self.record.lock().unwrap().push(event);
    }
}

impl BlockStore for TestStore {
    fn geometry(&self) -> Geometry {
        let geometry = self.ram.geometry();
        Geometry {
            discard: geometry.discard && self.discard,
            ..geometry
        }
    }

    fn engine_name(&self) -> &'static str {
        "test"
    }

    fn open_queues(
        &self,
        count: usize,
        depth: u32,
    ) -> Result<Vec<Box<dyn StoreQueue>>, StoreError> {
        let queues = self.ram.open_queues(count, depth)?.into_iter();
        Ok(queues
            .map(|inner| {
                let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK);
                Box::new(TestQueue {
                    store: self.clone(),
                    inner,
                    waiting: VecDeque::new(),
                    operations: Vec::new(),
                    timer: timer.unwrap(),
                }) as Box<dyn StoreQueue>
            })
            .collect())
    }

    fn refresh(&self) -> Result<Geometry, StoreError> {
        Ok(self.geometry())
    }

    fn resize(&self, size_bytes: u64) -> Result<Geometry, StoreError> {
        self.ram.resize(size_bytes)?;
        Ok(self.geometry())
    }

    fn identity(&self) -> String {
        self.ram.identity()
    }
}

struct TestQueue {
    store: TestStore,
    inner: Box<dyn StoreQueue>,
    /// When each is done.
    waiting: VecDeque<(Instant, Request)>,
    /// By tag.
    operations: Vec<(u64, Operation)>,
    timer: TimerFd,
}

impl TestQueue {
    fn give_back(&mut self, now: Instant, done: &mut Vec<Completion>) {
        let mut some = Vec::new();
        while self.waiting.front().is_some_and(|(due, _)| *due <= now) {
            let (_, request) = self.waiting.pop_front().unwrap();
            self.operations.push((request.tag, request.operation));
            self.inner.submit(request);
            self.inner.kick(&mut some);
        }
        for mut completion in some {
            let at = self.operations.iter().position(|o| o.0 == completion.tag);
            let (_, operation) = self.operations.swap_remove(at.unwrap());
            self.store.say(Event::Done(operation));
            if self.store.fails {
                completion.result = Err(io::Error::other("the test wants it so"));
            }
            done.push(completion);
        }
        if let Some((due, _)) = self.waiting.front() {
            let wait = due.saturating_duration_since(now);
            let wait = TimeSpec::from_duration(wait.max(Duration::from_nanos(1)));
            let once = Expiration::OneShot(wait);
            self.timer.set(once, TimerSetTimeFlags::empty()).unwrap();
        }
    }
}

impl StoreQueue for TestQueue {
    fn submit(&mut self, request: Request) {
        self.store.say(Event::Asked(request.operation));
        let due = Instant::now() + self.store.delay;
        self.waiting.push_back((due, request));
    }

    fn kick(&mut self, done: &mut Vec<Completion>) {
        self.give_back(Instant::now(), done);
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.timer.as_fd())
    }

    fn collect(&mut self, done: &mut Vec<Completion>) {
        self.give_back(Instant::now(), done);
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn drain(&mut self, done: &mut Vec<Completion>) {
        if let Some((due, _)) = self.waiting.back() {
            let due = *due;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.give_back(due, done);
        }
    }

    fn geometry(&self) -> Geometry {
        self.store.geometry()
    }
}
