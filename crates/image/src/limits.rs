//! What an image may cost. Layers come from strangers: a few bytes can ask for any number of files.

/// Longest path in a layer, in bytes (Linux's `PATH_MAX`).
pub(crate) const MAX_PATH: usize = 4096;
/// Deepest path, in names. Linux resolves no deeper one in a single call.
pub(crate) const MAX_DEPTH: usize = 1024;
/// Bytes of one extended header of tar (attributes, long names): it is read into memory.
pub(crate) const MAX_TAR_EXTENSION: u64 = 1 << 20;
/// Stretches of data in one sparse file.
pub(crate) const MAX_SPARSE_PARTS: usize = 1 << 20;
/// Symbolic links that are followed for one path, as Linux has it.
pub(crate) const MAX_LINKS_FOLLOWED: usize = 40;
/// Layers of one image; docker stops at 127.
pub(crate) const MAX_LAYERS: usize = 512;
/// Bytes of a manifest, an index or a configuration.
pub(crate) const MAX_JSON: u64 = 8 << 20;
/// A layer may unpack to so much whatever its size is, before its ratio counts.
pub(crate) const RATIO_COUNTS_FROM: u64 = 256 << 20;

/// Limits that whoever imports can raise, for an image that is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and whiteouts in all layers together (`--max-entries`).
    pub entries: u64,
    /// Bytes of the root disk (`--max-size`).
    pub disk_bytes: u64,
    /// Bytes that come out of one byte of a compressed layer (`--max-ratio`).
    pub ratio: u64,
    /// Device nodes (`--max-devices`).
    pub devices: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 2_000_000,
            disk_bytes: 256 << 30,
            ratio: 1_100,
            devices: 1_024,
        }
    }
}
