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

/// The counters of one component.
pub trait CounterSet {
    /// Name of the component, unique in its machine: `"serial"`, `"vcpu 0"`.
    fn name(&self) -> &str;
    /// Calls `f` with the name and count of each counter, always in the same order.
    fn visit(&self, f: &mut dyn FnMut(&str, u64));
}

/// What was gathered from one component: its name, then each counter by name.
pub type Gathered = (String, Vec<(String, u64)>);

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
