//! Why there is no jail.

use std::fmt;
use std::io;

/// What failed, why, and what to do about it.
#[derive(Debug)]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(
        act: impl fmt::Display,
        why: impl fmt::Display,
        cure: impl fmt::Display,
    ) -> Self {
        Self(format!("cannot {act}: {why}; {cure}"))
    }

    /// What another process of the jailer said of its own.
    pub(crate) fn told(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Puts words around an error of the system.
pub(crate) trait OrFail<T> {
    /// `act` completes "cannot ...", with the value in it; `cure` says what to do.
    fn or_fail(self, act: impl FnOnce() -> String, cure: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> OrFail<T> for Result<T, E> {
    fn or_fail(self, act: impl FnOnce() -> String, cure: &str) -> Result<T, Failure> {
        self.map_err(|e| Failure::new(act(), e.into(), cure))
    }
}
