//! Which memory belongs to a snapshot's state: what the state says of it, and the mark behind the pages.
//!
//! The monitor writes both (alveole-machine, `snapshot/state.rs`), and checks them where it reads memory itself. Of memory that others serve
//! it knows nothing, so whoever serves it checks them.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use alveole_saved_state::{FormatError, MAX_FILE_BYTES, StateFile};
use serde::Deserialize;

use crate::{Memory, PackedError};

/// The section of the state, and its version.
const SECTION: &str = "memory";
const VERSION: u32 = 1;
/// What the mark begins with; the id follows, in hexadecimal digits.
const MARK: &[u8] = b"ALVEOLE guest memory 1\0\n";

/// Why memory is not a snapshot's.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// The state cannot be read.
    #[error("cannot read the state {path:?}: {why}")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It is of several files.
    #[error(
        "the snapshot's memory is in {0} files, each with what has changed since the one before: make one of them first"
    )]
    Layers(usize),
    /// Another memory.
    #[error("it is not the memory that belongs to the snapshot: {0}")]
    Other(String),
    /// It cannot be read.
    #[error(transparent)]
    Memory(#[from] PackedError),
}

/// What a state says of its memory.
#[derive(Debug, Clone, Deserialize)]
pub struct SavedMemory {
    ranges: Vec<Range>,
    /// The files that have it, the oldest first.
    pub layers: Vec<Layer>,
}

#[derive(Debug, Clone, Deserialize)]
struct Range {
    size_bytes: u64,
}

/// A memory file that a state names.
#[derive(Debug, Clone, Deserialize)]
pub struct Layer {
    /// Where it was written.
    pub path: PathBuf,
    /// What its mark says.
    pub id: String,
}

impl SavedMemory {
    /// Reads what the state at `path` says.
    ///
    /// # Errors
    /// It cannot be read, or is no state, or a newer one.
    pub fn of_state(path: &Path) -> Result<Self, MarkError> {
        let wrong = |why: String| MarkError::State {
            path: path.to_owned(),
            why,
        };
        let unread = |e: io::Error| wrong(e.to_string());
        let format = |e: FormatError| wrong(e.to_string());
        let mut bytes = Vec::new();
        File::open(path)
            .map_err(unread)?
            .take(MAX_FILE_BYTES as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(unread)?;
        let mut state = StateFile::read(&bytes).map_err(format)?;
        let section = state.take(SECTION).map_err(format)?;
        section
            .unpack(SECTION, VERSION)
            .map_err(|e| wrong(e.to_string()))
    }

    /// Looks whether `memory` is all that the state needs.
    ///
    /// # Errors
    /// It is another one's, or one of several, or cannot be read.
    pub fn check(&self, memory: &mut Memory) -> Result<(), MarkError> {
        let [Layer { id, .. }] = &self.layers[..] else {
            return Err(MarkError::Layers(self.layers.len()));
        };
        let sizes = self.ranges.iter().map(|range| range.size_bytes);
        let wanted = sizes.fold(0, u64::saturating_add);
        if memory.pages_bytes() != wanted {
            return Err(MarkError::Other(format!(
                "it has {} bytes, {wanted} are needed",
                memory.pages_bytes()
            )));
        }
        let tail = memory.tail()?;
        let found = tail.strip_prefix(MARK);
        let Some(found) = found else {
            return Err(MarkError::Other("it has no mark behind its pages".into()));
        };
        if found != id.as_bytes() {
            return Err(MarkError::Other(format!(
                "its id is {}, that of the snapshot's is {id}",
                String::from_utf8_lossy(found)
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use alveole_saved_state::SavedState;
    use serde_json::json;

    use super::*;

    fn memory(tail: &[u8]) -> Memory {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        file.write_all(tail).unwrap();
        Memory::open(file, 0).unwrap()
    }

    fn state(layers: usize, version: u32) -> tempfile::NamedTempFile {
        let layer = json!({"path": "/x/memory", "id": "0123456789abcdef", "map": [[0, 2]]});
        let said =
            json!({"ranges": [{"start": 0, "size_bytes": 8192}], "layers": vec![layer; layers]});
        let mut state = StateFile::new("test");
        state.add(SavedState::pack(SECTION, version, &said));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&state.to_bytes()).unwrap();
        file
    }

    #[test]
    fn memory_of_another_snapshot_is_told_from_its_own() {
        let mark = |id: &str| [MARK, id.as_bytes()].concat();
        let saved = SavedMemory::of_state(state(1, VERSION).path()).unwrap();
        saved.check(&mut memory(&mark("0123456789abcdef"))).unwrap();
        for (tail, part) in [
            (mark("fedcba9876543210"), "its id is fedcba9876543210"),
            (mark(""), "its id is ,"),
            (b"something".to_vec(), "no mark"),
            (Vec::new(), "no mark"),
            (vec![1; 4096], "12288 bytes, 8192 are needed"),
        ] {
            let why = saved.check(&mut memory(&tail)).unwrap_err().to_string();
            assert!(why.contains(part), "{why}");
        }
        let chain = SavedMemory::of_state(state(2, VERSION).path()).unwrap();
        let why = chain.check(&mut memory(&mark("0123456789abcdef")));
        assert!(matches!(why, Err(MarkError::Layers(2))), "{why:?}");
    }

    #[test]
    fn a_state_that_is_none_is_named() {
        for bytes in [&b"nothing"[..], b""] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(bytes).unwrap();
            let why = SavedMemory::of_state(file.path()).unwrap_err().to_string();
            assert!(why.contains(file.path().to_str().unwrap()), "{why}");
        }
        let newer = state(1, 99);
        let why = SavedMemory::of_state(newer.path()).unwrap_err().to_string();
        assert!(why.contains("99"), "{why}");
    }
}
