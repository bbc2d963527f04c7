//! Why there is no link.

/// Why a link cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// To come.
    #[error("to come")]
    Skeleton,
}
