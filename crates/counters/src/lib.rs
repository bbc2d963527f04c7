//! Counters owned by their component, gathered by name.
//!
//! A component keeps its [`Counter`]s in a struct of its own, says their names through [`CounterSet`],
//! and is registered in the [`Registry`] when the machine is built. Nothing here is global: two
//! machines in one process never see each other's numbers.
//!
//! Deliberately does not know: who counts what, how the numbers are written, how often.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows, raised from any thread. It wraps after 2^64 events.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts `events` more.
    pub fn add(&self, events: u64) {
        // A counter orders nothing: whoever reads it wants a number, not what happened before it.
        self.0.fetch_add(events, Ordering::Relaxed);
    }

    /// Counts one more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something took, as counts by powers of two. Raised from any thread by two atomic additions.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

/// A histogram counts up to 2^10 ns (1 us), 2^11 ns and so on up to 2^31 ns (2.1 s), and what took longer.
const FIRST_BUCKET_BITS: u32 = 10;
const BUCKETS: usize = 23;

/// What a histogram has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Upper bounds in nanoseconds, ascending, and how many took no longer than each of them.
    pub upto: Vec<(u64, u64)>,
    /// How many there were.
    pub count: u64,
    /// How long they took together, in nanoseconds.
    pub sum_ns: u64,
}

impl Histogram {
    /// A histogram that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Something took so long.
    pub fn observe(&self, time: Duration) {
        self.observe_many(time, 1);
    }

    /// So many took so long each.
    pub fn observe_many(&self, time: Duration, count: u64) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // Of 2^n and less, but more than 2^(n-1): n.
        let bits = u64::BITS.saturating_sub(ns.saturating_sub(1).leading_zeros());
        let at = usize::try_from(bits.saturating_sub(FIRST_BUCKET_BITS)).unwrap_or(BUCKETS);
        let bucket = self.buckets.get(at).or(self.buckets.last());
        if let Some(bucket) = bucket {
            bucket.fetch_add(count, Ordering::Relaxed);
        }
        self.sum_ns
            .fetch_add(ns.saturating_mul(count), Ordering::Relaxed);
    }

    /// What was seen so far. Each number is read on its own.
    #[must_use]
    pub fn observed(&self) -> Observed {
        let mut count = 0u64;
        let mut upto = Vec::with_capacity(BUCKETS);
        for (at, bucket) in (FIRST_BUCKET_BITS..).zip(&self.buckets) {
            count = count.saturating_add(bucket.load(Ordering::Relaxed));
            upto.push((1u64.checked_shl(at).unwrap_or(u64::MAX), count));
        }
        // The last one is for whatever took longer.
        upto.pop();
        Observed {
            upto,
            count,
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

/// The counters of one component.
pub trait CounterSet {
    /// Name of the component, unique in its machine: `"serial"`, `"vcpu 0"`.
    fn name(&self) -> &str;
    /// Calls `f` with the name and count of each counter, always in the same order.
    fn visit(&self, f: &mut dyn FnMut(&str, u64));
    /// Calls `f` with the name of each histogram and what it has seen, always in the same order.
    fn visit_histograms(&self, f: &mut dyn FnMut(&str, Observed)) {
        let _ = f;
    }
}

/// What was gathered from one component: its name, then each counter by name.
pub type Gathered = (String, Vec<(String, u64)>);

/// What was gathered from the histograms of one component.
pub type GatheredHistograms = (String, Vec<(String, Observed)>);

/// The counter sets of one machine. Filled while it is built, then only read.
#[derive(Default)]
pub struct Registry {
    sets: Vec<Arc<dyn CounterSet + Send + Sync>>,
}

impl Registry {
    /// A registry without sets.
    #[must_use]
    pub const fn new() -> Self {
        Self { sets: Vec::new() }
    }

    /// Adds the counters of one component.
    ///
    /// # Panics
    /// Another set has this name: names come from the wiring, never from a guest or a user.
    pub fn register(&mut self, set: Arc<dyn CounterSet + Send + Sync>) {
        let name = set.name();
        assert!(
            self.sets.iter().all(|known| known.name() != name),
            "counter set {name:?} is registered twice; each component needs a name of its own"
        );
        self.sets.push(set);
    }

    /// Reads every counter, set by set in the order of registration. Each number is read on its own:
    /// two of them need not be from the same instant.
    #[must_use]
    pub fn gather(&self) -> Vec<Gathered> {
        self.sets
            .iter()
            .map(|set| {
                let mut counts = Vec::new();
                set.visit(&mut |name, count| counts.push((name.to_owned(), count)));
                (set.name().to_owned(), counts)
            })
            .collect()
    }
}

impl Registry {
    /// Reads every histogram, as [`Self::gather`] does; sets without any are left out.
    #[must_use]
    pub fn gather_histograms(&self) -> Vec<GatheredHistograms> {
        let sets = self.sets.iter().map(|set| {
            let mut seen = Vec::new();
            set.visit_histograms(&mut |name, observed| seen.push((name.to_owned(), observed)));
            (set.name().to_owned(), seen)
        });
        sets.filter(|(_, seen)| !seen.is_empty()).collect()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.sets.iter().map(|set| set.name()))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Serial {
        name: &'static str,
        bytes: Counter,
        dropped: Counter,
    }

    impl Serial {
        fn named(name: &'static str) -> Arc<Self> {
            Arc::new(Self {
                name,
                bytes: Counter::new(),
                dropped: Counter::new(),
            })
        }
    }

    impl CounterSet for Serial {
        fn name(&self) -> &str {
            self.name
        }
        fn visit(&self, f: &mut dyn FnMut(&str, u64)) {
            let Self {
                name: _,
                bytes,
                dropped,
            } = self;
            f("bytes", bytes.get());
            f("dropped", dropped.get());
        }
    }

    #[test]
    fn a_histogram_counts_by_powers_of_two() {
        let histogram = Histogram::new();
        for ns in [0, 1, 1024, 1025, 2048, 1 << 31, (1 << 31) + 1] {
            histogram.observe(Duration::from_nanos(ns));
        }
        histogram.observe_many(Duration::MAX, 2);
        let seen = histogram.observed();
        assert_eq!(seen.upto.first(), Some(&(1024, 3)));
        assert_eq!(seen.upto.get(1), Some(&(2048, 5)));
        assert_eq!(seen.upto.get(2), Some(&(4096, 5)));
        assert_eq!(seen.upto.last(), Some(&(1 << 31, 6)));
        assert_eq!(seen.count, 9);
        assert!(seen.upto.is_sorted_by_key(|(bound, _)| *bound));
    }

    #[test]
    fn a_registry_gathers_the_counts_of_its_sets_by_name() {
        let (first, second) = (Serial::named("serial"), Serial::named("serial 2"));
        let mut registry = Registry::new();
        registry.register(first.clone());
        registry.register(second);
        first.bytes.add(40);
        first.bytes.inc();
        first.dropped.inc();
        let named = |bytes, dropped| vec![("bytes".into(), bytes), ("dropped".into(), dropped)];
        assert_eq!(
            registry.gather(),
            [
                ("serial".into(), named(41, 1)),
                ("serial 2".into(), named(0, 0))
            ]
        );
        assert_eq!(format!("{registry:?}"), r#"["serial", "serial 2"]"#);
    }

    #[test]
    fn counts_from_many_threads_are_all_kept() {
        let count = Counter::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| count.inc()));
            }
        });
        assert_eq!(count.get(), 40_000);
    }

    #[test]
    #[should_panic(expected = "counter set \"serial\" is registered twice")]
    fn a_name_is_registered_once() {
        let mut registry = Registry::new();
        registry.register(Serial::named("serial"));
        registry.register(Serial::named("serial"));
    }
}
