//! The device, and its owner's handle on it.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alveole_block_store::{BlockStore, Cache, Geometry, StoreError, StoreQueue};
use alveole_rate_limiter::{Limits, RateLimiter};
use alveole_virtio::{
    ConfigIrq, Identity, QueueWorker, RestoreError, SavedState, StartError, StartKit, VirtioDevice,
};
use vmm_sys_util::timerfd::TimerFd;

use crate::config_space::{self, CONFIG_WCE, FLUSH, WRITEBACK_OFFSET};
use crate::lane::{Flights, Lane, Scratch};
use crate::state::{BlkStateV1, KIND, VERSION};
use crate::worker::BlkWorker;
use crate::{BlkCounters, ID_BYTES, QUEUE_SIZE};

/// Type of a block device (section 5).
const DEVICE_ID: u16 = 2;
/// Most log lines about errors of the host. Abused by a guest that writes to a full disk for ever.
const MAX_ERROR_LINES: u32 = 10;

/// How a disk is to be.
#[derive(Debug, Clone)]
pub struct BlkConfig {
    /// Name for people and counters.
    pub name: String,
    /// What the guest reads as the disk's identity, cut off after [`ID_BYTES`]; none: of the store.
    pub id: Option<String>,
    /// Number of queues: one for each processor is best.
    pub queues: u16,
    /// Size of each queue; a power of two.
    pub queue_size: u16,
    /// What the store does with flushes: decides whether they are offered.
    pub cache: Cache,
    /// Bounds on bytes and operations.
    pub limits: Limits,
}

impl BlkConfig {
    /// One queue, write-back, without bounds.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            id: None,
            queues: 1,
            queue_size: QUEUE_SIZE,
            cache: Cache::Writeback,
            limits: Limits::default(),
        }
    }
}

/// Why there is no disk, or why it cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The store.
    #[error("disk {name}: {source}")]
    Store {
        /// Which disk.
        name: String,
        /// What it said.
        source: StoreError,
    },
    /// The host.
    #[error(
        "disk {name}: cannot make a timer: {source}; raise the limit on open files (ulimit -n)"
    )]
    Timer {
        /// Which disk.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// The queues.
    #[error(
        "disk {name}: {queues} queues of {size}: give it 1 or more, each a power of two up to {}",
        alveole_virtio::MAX_QUEUE_SIZE
    )]
    Queues {
        /// Which disk.
        name: String,
        /// How many were asked for.
        queues: u16,
        /// Of which size.
        size: u16,
    },
    /// A medium for another kind of disk.
    #[error(
        "disk {name}: a {new} medium cannot take the place of a {old} one: the guest has agreed to what it can do"
    )]
    OtherMedium {
        /// Which disk.
        name: String,
        /// What it is.
        old: &'static str,
        /// What is offered.
        new: &'static str,
    },
}

/// What device, workers and owner share.
pub(crate) struct Shared {
    store: Mutex<Arc<dyn BlockStore>>,
    geometry: Mutex<Geometry>,
    size_bytes: AtomicU64,
    read_only: AtomicBool,
    writeback: AtomicBool,
    limiter: Mutex<RateLimiter>,
    is_limited: AtomicBool,
    id: Mutex<[u8; ID_BYTES]>,
    /// The identity is the medium's, not one that was given.
    id_of_medium: bool,
    error_lines: AtomicU32,
    config_irq: Mutex<Option<ConfigIrq>>,
    pub(crate) counters: Arc<BlkCounters>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    pub(crate) fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    pub(crate) fn id(&self) -> [u8; ID_BYTES] {
        *lock(&self.id)
    }

    pub(crate) fn counters_name(&self) -> &str {
        alveole_counters::CounterSet::name(&*self.counters)
    }

    /// Takes a request from the limiter, or says how long to wait.
    pub(crate) fn limit(&self, bytes: u64, now: impl FnOnce() -> Instant) -> Result<(), Duration> {
        if !self.is_limited.load(Ordering::Relaxed) {
            return Ok(());
        }
        lock(&self.limiter).take(bytes, now())
    }

    /// Says in the log what the host answered, unless there is too much of it.
    pub(crate) fn say(&self, e: &io::Error) {
        let line = self.error_lines.fetch_add(1, Ordering::Relaxed);
        if line < MAX_ERROR_LINES {
            log::warn!("{}: the guest gets an I/O error: {e}", self.counters_name());
            if line == MAX_ERROR_LINES - 1 {
                log::warn!("{}: further errors are only counted", self.counters_name());
            }
        }
    }

    fn take_geometry(&self, geometry: Geometry) {
        *lock(&self.geometry) = geometry;
        self.size_bytes
            .store(geometry.size_bytes, Ordering::Release);
        self.read_only.store(geometry.read_only, Ordering::Relaxed);
        if let Some(irq) = lock(&self.config_irq).as_ref() {
            irq.raise();
        }
    }
}

/// The block device. See the crate's head.
pub struct VirtioBlk {
    shared: Arc<Shared>,
    lanes: Vec<Arc<Mutex<Lane>>>,
    queue_size: u16,
    honours_flush: bool,
}

/// A medium that is ready to be put in.
pub struct Medium {
    store: Arc<dyn BlockStore>,
    queues: Vec<Box<dyn StoreQueue>>,
    geometry: Geometry,
}

/// The owner's handle on a disk that a machine has. Clones share it.
#[derive(Clone)]
pub struct BlkHandle {
    shared: Arc<Shared>,
    lanes: Vec<Arc<Mutex<Lane>>>,
    queue_size: u16,
}

impl VirtioBlk {
    /// A disk over `store`. Opens one way to it for each queue, and everything else that it will need.
    ///
    /// # Errors
    /// The host is out of what a queue needs, or the queues are not possible.
    pub fn new(config: &BlkConfig, store: Arc<dyn BlockStore>) -> Result<Self, BlkError> {
        let name = &config.name;
        let size = config.queue_size;
        if config.queues == 0 || !size.is_power_of_two() || size > alveole_virtio::MAX_QUEUE_SIZE {
            return Err(BlkError::Queues {
                name: name.clone(),
                queues: config.queues,
                size,
            });
        }
        let queues = open_queues(name, &store, usize::from(config.queues), size)?;
        let lanes = queues
            .into_iter()
            .map(|store| {
                let timer = TimerFd::new().map_err(|e| BlkError::Timer {
                    name: name.clone(),
                    source: e.into(),
                })?;
                Ok(Arc::new(Mutex::new(Lane {
                    store,
                    next_store: None,
                    served: false,
                    timer,
                    throttled: false,
                    flights: Flights::default(),
                    scratch: Scratch::default(),
                })))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let geometry = store.geometry();
        let id_of_medium = config.id.is_none();
        let id = config.id.clone().unwrap_or_else(|| store.identity());
        let limiter = RateLimiter::new(config.limits, Instant::now());
        let shared = Shared {
            store: Mutex::new(store),
            geometry: Mutex::new(geometry),
            size_bytes: AtomicU64::new(geometry.size_bytes),
            read_only: AtomicBool::new(geometry.read_only),
            writeback: AtomicBool::new(true),
            is_limited: AtomicBool::new(!limiter.is_unlimited()),
            limiter: Mutex::new(limiter),
            id: Mutex::new(id_bytes(&id)),
            id_of_medium,
            error_lines: AtomicU32::new(0),
            config_irq: Mutex::new(None),
            counters: Arc::new(BlkCounters::new(name.clone())),
        };
        Ok(Self {
            shared: Arc::new(shared),
            lanes,
            queue_size: size,
            honours_flush: config.cache != Cache::Unsafe,
        })
    }

    /// A handle for the owner, to be taken before the device is given to a transport.
    #[must_use]
    pub fn handle(&self) -> BlkHandle {
        BlkHandle {
            shared: self.shared.clone(),
            lanes: self.lanes.clone(),
            queue_size: self.queue_size,
        }
    }
}

impl BlkHandle {
    /// What the disk counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<BlkCounters> {
        &self.shared.counters
    }

    /// What the disk looks like now.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        *lock(&self.shared.geometry)
    }

    /// Bounds the disk anew. What is not named stays; requests that wait are looked at again.
    pub fn change_limits(&self, limits: Limits) {
        let mut limiter = lock(&self.shared.limiter);
        limiter.change(limits, Instant::now());
        self.shared
            .is_limited
            .store(!limiter.is_unlimited(), Ordering::Relaxed);
        drop(limiter);
        // Who waits was told by the old limits for how long. Others ask the limiter before their next request.
        self.wake(|lane| lane.throttled);
    }

    /// Looks at the size of the file or device again, and tells the guest if it has changed.
    ///
    /// # Errors
    /// The host does not say.
    pub fn refresh(&self) -> Result<Geometry, BlkError> {
        let store = lock(&self.shared.store).clone();
        let geometry = store.refresh().map_err(|e| self.store_error(e))?;
        self.changed(geometry);
        Ok(geometry)
    }

    /// Makes the disk `size_bytes` large, and tells the guest.
    ///
    /// # Errors
    /// The store cannot be resized.
    pub fn resize(&self, size_bytes: u64) -> Result<Geometry, BlkError> {
        let store = lock(&self.shared.store).clone();
        let geometry = store.resize(size_bytes).map_err(|e| self.store_error(e))?;
        self.changed(geometry);
        Ok(geometry)
    }

    /// What names the file or device behind the disk for as long as it does.
    #[must_use]
    pub fn medium_identity(&self) -> String {
        lock(&self.shared.store).identity()
    }

    /// Whether [`Self::copy_image`] can do anything.
    ///
    /// # Errors
    /// There is no image: the disk is a device of the host.
    pub fn may_copy_image(&self) -> Result<(), BlkError> {
        let store = lock(&self.shared.store).clone();
        store.may_copy_image().map_err(|e| self.store_error(e))
    }

    /// Copies the image file of the disk into the new and empty file `into`. The device stands still meanwhile.
    ///
    /// # Errors
    /// There is none, or the host cannot copy it.
    pub fn copy_image(&self, into: &File) -> Result<(), BlkError> {
        let store = lock(&self.shared.store).clone();
        store.copy_image(into).map_err(|e| self.store_error(e))
    }

    /// Puts another medium in. Requests in flight are finished on the old one; the guest is told of the new
    /// size.
    ///
    /// # Errors
    /// The new store gives no queues, or one is read-only and the other is not.
    pub fn change_medium(&self, store: Arc<dyn BlockStore>) -> Result<(), BlkError> {
        let medium = self.prepare_medium(store)?;
        self.put_in(medium);
        Ok(())
    }

    /// The first half of [`Self::change_medium`]: everything that needs the host. Another thread may do this, which
    /// may do more than the one that owns the machine.
    ///
    /// # Errors
    /// As of [`Self::change_medium`].
    pub fn prepare_medium(&self, store: Arc<dyn BlockStore>) -> Result<Medium, BlkError> {
        let kind = |read_only| if read_only { "read-only" } else { "writable" };
        let geometry = store.geometry();
        let old = self.geometry().read_only;
        if old != geometry.read_only {
            return Err(BlkError::OtherMedium {
                name: self.shared.counters_name().to_owned(),
                old: kind(old),
                new: kind(geometry.read_only),
            });
        }
        let name = self.shared.counters_name();
        let queues = open_queues(name, &store, self.lanes.len(), self.queue_size)?;
        Ok(Medium {
            store,
            queues,
            geometry,
        })
    }

    /// The second half of [`Self::change_medium`]: swaps a few values. `medium` is one that this disk prepared.
    pub fn put_in(&self, medium: Medium) {
        let Medium {
            store,
            queues,
            geometry,
        } = medium;
        for (lane, queue) in self.lanes.iter().zip(queues) {
            let mut lane = lock(lane);
            if lane.served {
                lane.next_store = Some(queue);
            } else {
                // Nothing is in flight. The old medium is let go of now, and not at a start that may never come.
                lane.store = queue;
            }
        }
        if self.shared.id_of_medium {
            *lock(&self.shared.id) = id_bytes(&store.identity());
        }
        *lock(&self.shared.store) = store;
        self.shared.take_geometry(geometry);
        self.wake(|_| true);
    }

    fn changed(&self, geometry: Geometry) {
        if geometry != self.geometry() {
            self.shared.take_geometry(geometry);
        }
    }

    /// Makes the workers of `which` queues look again.
    fn wake(&self, which: impl Fn(&Lane) -> bool) {
        for lane in &self.lanes {
            let mut lane = lock(lane);
            if which(&lane)
                && let Err(e) = lane.timer.reset(Duration::from_nanos(1), None)
            {
                log::warn!("{}: cannot wake a queue: {e}", self.shared.counters_name());
            }
        }
    }

    fn store_error(&self, source: StoreError) -> BlkError {
        BlkError::Store {
            name: self.shared.counters_name().to_owned(),
            source,
        }
    }
}

fn open_queues(
    name: &str,
    store: &Arc<dyn BlockStore>,
    count: usize,
    size: u16,
) -> Result<Vec<Box<dyn StoreQueue>>, BlkError> {
    store
        .open_queues(count, u32::from(size))
        .map_err(|source| BlkError::Store {
            name: name.to_owned(),
            source,
        })
}

/// The identity, cut off or filled up with zeroes (section 5.2.6.1).
fn id_bytes(id: &str) -> [u8; ID_BYTES] {
    let mut bytes = [0; ID_BYTES];
    for (place, byte) in bytes.iter_mut().zip(id.bytes()) {
        *place = byte;
    }
    bytes
}

impl VirtioDevice for VirtioBlk {
    fn identity(&self) -> Identity {
        let geometry = *lock(&self.shared.geometry);
        Identity {
            name: "virtio-blk",
            device_id: DEVICE_ID,
            features: config_space::features(&geometry, self.lanes.len(), self.honours_flush),
            queue_sizes: vec![self.queue_size; self.lanes.len()],
            config_len: config_space::LEN,
        }
    }

    fn connect(&mut self, config_irq: ConfigIrq) {
        *lock(&self.shared.config_irq) = Some(config_irq);
    }

    fn read_config(&self, at: u32, into: &mut [u8]) {
        let geometry = *lock(&self.shared.geometry);
        let queues = u16::try_from(self.lanes.len()).unwrap_or(u16::MAX);
        let bytes = config_space::bytes(&geometry, queues, self.shared.is_writeback());
        let from = bytes.iter().skip(usize::try_from(at).unwrap_or(usize::MAX));
        for (place, byte) in into.iter_mut().zip(from) {
            *place = *byte;
        }
    }

    fn write_config(&mut self, at: u32, from: &[u8]) {
        let skip = WRITEBACK_OFFSET.checked_sub(at).map(usize::try_from);
        if let Some(Ok(skip)) = skip
            && let Some(byte) = from.get(skip)
            && self.honours_flush
        {
            self.shared
                .writeback
                .store(byte & 1 != 0, Ordering::Relaxed);
        }
    }

    fn start(&mut self, kit: StartKit) -> Result<Vec<Box<dyn QueueWorker>>, StartError> {
        // Section 5.2.6.2: without flush, a completed write is a safe one.
        let write_through = kit.features & FLUSH == 0 && self.honours_flush;
        let longest_look = kit.longest_look;
        if write_through && kit.features & CONFIG_WCE != 0 {
            // Section 5.2.5.2: such a driver is shown write-through, too.
            self.shared.writeback.store(false, Ordering::Relaxed);
        }
        kit.queues
            .into_iter()
            .map(|queue| {
                let lane = self.lanes.get(usize::from(queue.index())).ok_or_else(|| {
                    let mut why = String::new();
                    let _ = write!(why, "there is no queue {}", queue.index());
                    StartError::Device(why)
                })?;
                let shared = self.shared.clone();
                let worker =
                    BlkWorker::new(queue, lane.clone(), shared, write_through, longest_look);
                Ok(Box::new(worker) as Box<dyn QueueWorker>)
            })
            .collect()
    }

    fn reset(&mut self) {
        let Self {
            shared,
            lanes: _,
            queue_size: _,
            honours_flush: _,
        } = self;
        shared.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> SavedState {
        let state = BlkStateV1 {
            writeback: self.shared.is_writeback(),
            size_bytes: self.shared.size_bytes(),
        };
        SavedState::pack(KIND, VERSION, &state)
    }

    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let BlkStateV1 {
            writeback,
            size_bytes,
        } = saved.unpack(KIND, VERSION)?;
        let have = self.shared.size_bytes();
        if size_bytes > have {
            return Err(RestoreError::Invalid {
                kind: KIND.into(),
                why: format!("its disk had {size_bytes} bytes, this one has {have}"),
            });
        }
        self.shared.writeback.store(writeback, Ordering::Relaxed);
        Ok(())
    }
}
