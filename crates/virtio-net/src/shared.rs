//! What device, workers and owner share.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use alveole_net_link::Offloads;
use alveole_rate_limiter::{Limits, RateLimiter};
use alveole_virtio::ConfigIrq;

use crate::NetCounters;
use crate::config_space::{self, Abilities, GUEST_OFFLOADS};

/// Most log lines about errors of the link. Abused by a guest that sends for ever what the host refuses.
const MAX_ERROR_LINES: u32 = 10;

pub(crate) struct Shared {
    pub(crate) abilities: Abilities,
    /// The address that the owner has given.
    own_mac: [u8; 6],
    /// The address that the guest has.
    mac: Mutex<[u8; 6]>,
    pub(crate) source_mac_filter: bool,
    link_is_up: AtomicBool,
    is_announcing: AtomicBool,
    /// Agreed upon; 0 before.
    features: AtomicU64,
    /// What the driver has set by command, and whether it has.
    offload_bits: Mutex<Option<u64>>,
    /// What the guest takes at the moment, as bits.
    effective_bits: AtomicU64,
    pairs: AtomicU16,
    pub(crate) rx_limit: Limit,
    pub(crate) tx_limit: Limit,
    config_irq: Mutex<Option<ConfigIrq>>,
    error_lines: AtomicU32,
    pub(crate) counters: Arc<NetCounters>,
}

/// A rate limiter that costs nothing where it bounds nothing.
pub(crate) struct Limit {
    limiter: Mutex<RateLimiter>,
    is_limited: AtomicBool,
}

impl Limit {
    pub(crate) fn new(limits: Limits) -> Self {
        let limiter = RateLimiter::new(limits, Instant::now());
        Self {
            is_limited: AtomicBool::new(!limiter.is_unlimited()),
            limiter: Mutex::new(limiter),
        }
    }

    /// Takes a frame from the limiter, or says how long to wait.
    pub(crate) fn take(&self, bytes: u64) -> Result<(), Duration> {
        if !self.is_limited.load(Ordering::Relaxed) {
            return Ok(());
        }
        lock(&self.limiter).take(bytes, Instant::now())
    }

    pub(crate) fn change(&self, limits: Limits) {
        let mut limiter = lock(&self.limiter);
        limiter.change(limits, Instant::now());
        self.is_limited
            .store(!limiter.is_unlimited(), Ordering::Relaxed);
    }
}

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(
        abilities: Abilities,
        mac: [u8; 6],
        source_mac_filter: bool,
        limits: [Limits; 2],
        counters: NetCounters,
    ) -> Self {
        let [rx_limits, tx_limits] = limits;
        Self {
            abilities,
            own_mac: mac,
            mac: Mutex::new(mac),
            source_mac_filter,
            link_is_up: AtomicBool::new(true),
            is_announcing: AtomicBool::new(false),
            features: AtomicU64::new(0),
            offload_bits: Mutex::new(None),
            effective_bits: AtomicU64::new(0),
            pairs: AtomicU16::new(1),
            rx_limit: Limit::new(rx_limits),
            tx_limit: Limit::new(tx_limits),
            config_irq: Mutex::new(None),
            error_lines: AtomicU32::new(0),
            counters: Arc::new(counters),
        }
    }

    pub(crate) fn name(&self) -> &str {
        alveole_counters::CounterSet::name(&*self.counters)
    }

    // ---- the configuration space

    pub(crate) fn connect(&self, irq: ConfigIrq) {
        *lock(&self.config_irq) = Some(irq);
    }

    fn config_changed(&self) {
        if let Some(irq) = lock(&self.config_irq).as_ref() {
            irq.raise();
        }
    }

    pub(crate) fn config_bytes(&self) -> [u8; config_space::LEN as usize] {
        config_space::bytes(
            self.mac(),
            self.link_is_up(),
            self.is_announcing(),
            self.abilities.pairs,
            self.abilities.mtu,
        )
    }

    pub(crate) fn link_is_up(&self) -> bool {
        self.link_is_up.load(Ordering::Acquire)
    }

    /// Whether it was otherwise before.
    pub(crate) fn set_link(&self, up: bool) -> bool {
        let changed = self.link_is_up.swap(up, Ordering::AcqRel) != up;
        if changed {
            self.config_changed();
        }
        changed
    }

    /// As [`Self::set_link`], of what the driver knows already.
    pub(crate) fn restore_link(&self, up: bool) {
        self.link_is_up.store(up, Ordering::Release);
    }

    pub(crate) fn is_announcing(&self) -> bool {
        self.is_announcing.load(Ordering::Acquire)
    }

    pub(crate) fn set_announcing(&self, announcing: bool) {
        self.is_announcing.store(announcing, Ordering::Release);
        if announcing {
            self.config_changed();
        }
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        *lock(&self.mac)
    }

    pub(crate) fn set_mac(&self, mac: [u8; 6]) {
        *lock(&self.mac) = mac;
    }

    // ---- what the driver has agreed to, and set by command

    pub(crate) fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.features() & feature != 0
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
        self.update_offloads();
    }

    pub(crate) fn offload_bits(&self) -> Option<u64> {
        *lock(&self.offload_bits)
    }

    pub(crate) fn set_offload_bits(&self, bits: Option<u64>) {
        *lock(&self.offload_bits) = bits;
        self.update_offloads();
    }

    fn update_offloads(&self) {
        let agreed = self.features() & GUEST_OFFLOADS;
        let bits = self.offload_bits().map_or(agreed, |bits| bits & agreed);
        self.effective_bits.store(bits, Ordering::Release);
    }

    /// What the guest takes at the moment.
    pub(crate) fn guest_offloads(&self) -> Offloads {
        config_space::guest_offloads(self.effective_bits.load(Ordering::Acquire))
    }

    pub(crate) fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Acquire)
    }

    pub(crate) fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Release);
    }

    pub(crate) fn is_active(&self, pair: u16) -> bool {
        pair < self.pairs()
    }

    /// What a reset undoes.
    pub(crate) fn reset(&self) {
        // Exhaustive, so that a new field has to decide.
        let Self {
            abilities: _,
            own_mac,
            mac,
            source_mac_filter: _,
            link_is_up: _,
            is_announcing,
            features,
            offload_bits,
            effective_bits,
            pairs,
            rx_limit: _,
            tx_limit: _,
            config_irq: _,
            error_lines: _,
            counters: _,
        } = self;
        *lock(mac) = *own_mac;
        is_announcing.store(false, Ordering::Release);
        features.store(0, Ordering::Release);
        *lock(offload_bits) = None;
        effective_bits.store(0, Ordering::Release);
        pairs.store(1, Ordering::Release);
    }

    /// Says in the log what the link answered, unless there is too much of it.
    pub(crate) fn say(&self, what: &str, e: &std::io::Error) {
        let line = self.error_lines.fetch_add(1, Ordering::Relaxed);
        if line < MAX_ERROR_LINES {
            log::warn!("{}: {what}: {e}", self.name());
            if line == MAX_ERROR_LINES - 1 {
                log::warn!("{}: further errors are only counted", self.name());
            }
        }
    }
}
