//! What goes wrong outside of requests.

use std::io;
use std::path::PathBuf;

/// Why an open store cannot do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A queue's part could not be made.
    #[error("cannot open a queue of depth {depth} to {path}: {what}: {source}")]
    Queue {
        /// The store.
        path: PathBuf,
        /// How deep the queue was to be.
        depth: u32,
        /// The step that failed.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// The host does not say how large the store is.
    #[error("cannot see how large {path} is: {source}")]
    Size {
        /// The store.
        path: PathBuf,
        /// What the host says.
        source: io::Error,
    },
    /// The store cannot have that size.
    #[error("cannot make {path} {size_bytes} bytes large: {reason}")]
    Resize {
        /// The store.
        path: PathBuf,
        /// The size asked for.
        size_bytes: u64,
        /// Why, and what to do.
        reason: String,
    },
}
