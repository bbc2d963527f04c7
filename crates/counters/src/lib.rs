//! Counters owned by their component, gathered by name.
