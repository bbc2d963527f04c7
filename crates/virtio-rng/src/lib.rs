//! The virtio entropy device (virtio 1.3, section 5.4).
//!
//! Fills what the driver offers with bytes of the host's `getrandom`. How much a request takes and how much
//! all of them take in a time is bounded: entropy costs the host CPU, and a guest asks as often as it likes.
//!
//! Deliberately does not know: which transport carries the device, which thread serves it.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alveole_counters::{Counter, CounterSet};
use alveole_event_loop::{Event, EventLoopError, Interest, Ops, Token, Worker};
use alveole_guest_memory::GuestBuffers;
use alveole_rate_limiter::{Limits, RateLimiter};
use alveole_virtio::{
    BrokenRing, Chain, Identity, LiveQueue, Progress, QueueWorker, RestoreError, SavedState,
    StartError, StartKit, VirtioDevice,
};
use vmm_sys_util::timerfd::TimerFd;

/// Type of an entropy device (section 5).
const DEVICE_ID: u16 = 4;
/// Size of its one queue.
pub const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets. Abused by a guest that offers its whole memory and keeps a thread of
/// the host busy with it. Drivers take less (section 5.4.6.1: "one or more bytes") and ask again.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// Which kind of device a saved state is of, and its newest version.
const KIND: &str = "virtio-rng";
const VERSION: u32 = 1;
/// How long a request waits when the host gives nothing. A request is never answered without bytes (section
/// 5.4.6.2).
const RETRY: Duration = Duration::from_millis(100);
/// Most requests served before other workers of the same loop have their turn.
const REQUESTS_PER_TURN: u32 = 64;

const DOORBELL: Token = Token(0);
const TIMER: Token = Token(1);

/// What the device counts.
#[derive(Debug, Default)]
pub struct RngCounters {
    /// Requests served.
    pub requests: Counter,
    /// Bytes given.
    pub bytes: Counter,
    /// Times the rate limiter held a request back.
    pub throttled: Counter,
    /// Times the host gave nothing, and the request was left for later.
    pub errors: Counter,
}

impl CounterSet for RngCounters {
    fn name(&self) -> &str {
        "rng"
    }

    fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
        let Self {
            requests,
            bytes,
            throttled,
            errors,
        } = self;
        f("requests", requests.get());
        f("bytes", bytes.get());
        f("throttled", throttled.get());
        f("errors", errors.get());
    }
}

/// What outlives a stop.
struct Kept {
    limiter: RateLimiter,
    timer: TimerFd,
    bytes: Box<[u8]>,
}

/// The entropy device.
pub struct VirtioRng {
    kept: Arc<Mutex<Kept>>,
    counters: Arc<RngCounters>,
    source: Source,
}

/// Fills bytes with entropy, or says that there is none at the moment.
pub type Source = fn(&mut [u8]) -> io::Result<()>;

impl VirtioRng {
    /// With these bounds, over the host's `getrandom`.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(limits: Limits) -> io::Result<Self> {
        Self::with_source(limits, |bytes| {
            getrandom::fill(bytes).map_err(|e| io::Error::other(e.to_string()))
        })
    }

    /// Over another source.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn with_source(limits: Limits, source: Source) -> io::Result<Self> {
        Ok(Self {
            source,
            kept: Arc::new(Mutex::new(Kept {
                limiter: RateLimiter::new(limits, Instant::now()),
                timer: TimerFd::new()?,
                bytes: vec![0; MAX_REQUEST_BYTES].into(),
            })),
            counters: Arc::default(),
        })
    }

    /// What the device counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<RngCounters> {
        &self.counters
    }
}

impl VirtioDevice for VirtioRng {
    fn identity(&self) -> Identity {
        Identity {
            name: "virtio-rng",
            device_id: DEVICE_ID,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config_len: 0,
        }
    }

    fn read_config(&self, _: u32, _: &mut [u8]) {}

    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn start(&mut self, kit: StartKit) -> Result<Vec<Box<dyn QueueWorker>>, StartError> {
        Ok(kit
            .queues
            .into_iter()
            .map(|queue| {
                Box::new(RngWorker {
                    queue,
                    kept: self.kept.clone(),
                    counters: self.counters.clone(),
                    source: self.source,
                }) as Box<dyn QueueWorker>
            })
            .collect())
    }

    fn reset(&mut self) {}

    fn save(&self) -> SavedState {
        // What was given is forgotten; there is nothing to keep.
        SavedState::pack(KIND, VERSION, &())
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        saved.unpack(KIND, VERSION)
    }
}

struct RngWorker {
    queue: LiveQueue,
    kept: Arc<Mutex<Kept>>,
    counters: Arc<RngCounters>,
    source: Source,
}

impl RngWorker {
    fn serve(&mut self) -> Result<(), BrokenRing> {
        let kept = self.kept.clone();
        let mut kept = lock(&kept);
        let mut chain = Chain::new();
        let mut buffers = GuestBuffers::new(self.queue.ram());
        let mut budget = REQUESTS_PER_TURN;
        loop {
            while self.queue.pop(&mut chain)? {
                let Some(left) = budget.checked_sub(1) else {
                    self.queue.put_back();
                    self.queue.notify()?;
                    self.queue.doorbell().ring();
                    return Ok(());
                };
                budget = left;
                if let Err(wait) = self.give(&mut kept, &chain, &mut buffers)? {
                    self.queue.put_back();
                    self.queue.notify()?;
                    let wait = wait.max(Duration::from_nanos(1));
                    if kept.timer.reset(wait, None).is_err() {
                        self.queue.doorbell().ring();
                    }
                    return Ok(());
                }
            }
            self.queue.notify()?;
            if !self.queue.want_doorbell()? {
                return Ok(());
            }
        }
    }

    /// Serves one request, or says how long it has to wait.
    fn give(
        &mut self,
        kept: &mut Kept,
        chain: &Chain,
        buffers: &mut GuestBuffers,
    ) -> Result<Result<(), Duration>, BrokenRing> {
        let head = chain.head();
        if chain.writable_bytes() == 0 || !chain.readable().is_empty() {
            // Section 5.4.6.1: buffers must be device-writable, and not be empty.
            return Err(BrokenRing::NoRequest {
                head,
                why: "it is not an empty buffer for random bytes",
            });
        }
        buffers.clear();
        let mut left = MAX_REQUEST_BYTES as u64;
        for segment in chain.writable() {
            let len = u64::from(segment.len).min(left);
            buffers
                .push(segment.addr, len)
                .map_err(|_| BrokenRing::NoRequest {
                    head,
                    why: "its buffer is not in guest memory",
                })?;
            left = left.saturating_sub(len);
        }
        if let Err(wait) = kept.limiter.take(buffers.len_bytes(), Instant::now()) {
            self.counters.throttled.inc();
            return Ok(Err(wait));
        }
        // At most MAX_REQUEST_BYTES.
        let len = usize::try_from(buffers.len_bytes()).unwrap_or(0);
        let bytes = kept.bytes.get_mut(..len).unwrap_or(&mut []);
        if (self.source)(bytes).is_err() {
            self.counters.errors.inc();
            return Ok(Err(RETRY));
        }
        buffers.copy_from(0, bytes);
        // What was given is the guest's secret.
        bytes.fill(0);
        self.counters.bytes.add(len as u64);
        self.counters.requests.inc();
        self.queue
            .complete(head, u32::try_from(len).unwrap_or(u32::MAX))?;
        Ok(Ok(()))
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker for RngWorker {
    fn name(&self) -> &'static str {
        "virtio-rng"
    }

    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError> {
        let bell = self.queue.doorbell().event_fd();
        ops.watch(bell, DOORBELL, Interest::READABLE | Interest::EDGE)?;
        ops.watch(
            &lock(&self.kept).timer,
            TIMER,
            Interest::READABLE | Interest::EDGE,
        )
    }

    fn on_event(&mut self, _: Event, _: &mut Ops<'_>) {
        if !self.queue.is_broken()
            && let Err(why) = self.serve()
        {
            self.queue.fail(why);
        }
    }
}

impl QueueWorker for RngWorker {
    fn stop(self: Box<Self>) -> Vec<Progress> {
        let _ = lock(&self.kept).timer.clear();
        vec![self.queue.stop()]
    }

    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }
}
