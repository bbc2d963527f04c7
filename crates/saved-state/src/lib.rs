//! Saved states: bytes that name their kind and version, and the file that holds them. The form of the file, and what later
//! versions promise, stands in this crate's README.
//!
//! Deliberately does not know: what is saved, where files lie.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::panic,
        clippy::expect_used
    )
)]

mod file;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use file::{FormatError, HEADER_BYTES, Header, MAX_FILE_BYTES, MAX_SECTIONS, StateFile};

/// The state of a part of a machine as bytes that name their kind and version. May come from a hostile file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// What this is a state of.
    pub kind: String,
    /// Version of its form.
    pub version: u32,
    /// The state itself.
    pub bytes: Vec<u8>,
}

impl SavedState {
    /// A state of this kind and version. `state` is a plain structure of numbers, texts and lists.
    #[must_use]
    pub fn pack(kind: &str, version: u32, state: &impl Serialize) -> Self {
        Self {
            kind: kind.to_owned(),
            version,
            // Such structures have nothing that could fail; no bytes at all would be refused by unpack.
            bytes: serde_json::to_vec(state).unwrap_or_default(),
        }
    }

    /// What was packed.
    ///
    /// # Errors
    /// It is of another kind or version, or no such structure.
    pub fn unpack<T: DeserializeOwned>(&self, kind: &str, version: u32) -> Result<T, RestoreError> {
        if self.kind != kind {
            return Err(RestoreError::Kind {
                wanted: kind.to_owned(),
                found: self.kind.clone(),
            });
        }
        if self.version != version {
            return Err(RestoreError::Version {
                kind: kind.to_owned(),
                found: self.version,
                known: version,
            });
        }
        serde_json::from_slice(&self.bytes).map_err(|e| RestoreError::Invalid {
            kind: kind.to_owned(),
            why: e.to_string(),
        })
    }
}

/// A part of a machine that has a state of its own, beside those behind a transport. The processors are paused.
pub trait Saves: Send {
    /// The state.
    fn save(&self) -> SavedState;

    /// Takes a saved state over. For a part that was just made.
    ///
    /// # Errors
    /// The state is of another kind or version, or not one that this part can have. The part is then of no more use.
    fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError>;
}

/// Why a saved state was refused.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum RestoreError {
    /// The state is of another device.
    #[error("the saved state is of a {found}, not of a {wanted}")]
    Kind {
        /// What the device is.
        wanted: String,
        /// What the state says.
        found: String,
    },
    /// The state is of a version that this program does not know.
    #[error("the saved state of {kind} has version {found}; this program knows up to {known}")]
    Version {
        /// The kind of device.
        kind: String,
        /// What the state says.
        found: u32,
        /// What is known.
        known: u32,
    },
    /// A value that no device of this kind can have.
    #[error("the saved state of {kind} is not valid: {why}")]
    Invalid {
        /// The kind of device.
        kind: String,
        /// What is wrong.
        why: String,
    },
    /// The device is being served.
    #[error("a device takes a saved state over only before its driver has started it")]
    Running,
}
