//! Compressed clusters: decoding that gives one cluster or an error, and the last few decoded.
//!
//! A hostile cluster cannot unpack to more than a cluster: the output buffer has that size, and decoding
//! ends where it is full. Zstandard frames that want a larger window than [`MOST_WINDOW_BYTES`] are
//! refused before memory is taken for it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use crate::bytes::wide;
use crate::geometry::Geometry;
use crate::header::Compression;

/// Most bytes of decoded clusters kept; at least one cluster is. A guest reads compressed clusters piece
/// by piece, and each would be decoded for every piece.
const MOST_CACHED_BYTES: usize = 4 << 20;
/// Most clusters kept: they are searched one by one.
const MOST_CACHED: usize = 16;
/// Largest window a Zstandard frame may ask for, in a hostile image: four times the largest cluster.
const MOST_WINDOW_BYTES: u64 = 8 << 20;

/// The last clusters decoded, newest last, by their L2 entry. Compressed data are never written here, so
/// an entry means the same bytes as long as some table holds it.
#[derive(Default)]
pub(crate) struct DecodedClusters {
    kept: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
}

impl DecodedClusters {
    pub(crate) fn get(&self, entry: u64) -> Option<Arc<[u8]>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().rev().find(|(e, _)| *e == entry);
        found.map(|(_, bytes)| Arc::clone(bytes))
    }

    pub(crate) fn put(&self, entry: u64, bytes: &Arc<[u8]>) {
        let most = MOST_CACHED_BYTES
            .checked_div(bytes.len())
            .unwrap_or(1)
            .clamp(1, MOST_CACHED);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while kept.len() >= most {
            kept.pop_front();
        }
        kept.push_back((entry, Arc::clone(bytes)));
    }

    pub(crate) fn clear(&self) {
        self.kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// Decodes one cluster.
pub(crate) fn decode(
    kind: Compression,
    geometry: Geometry,
    from: &[u8],
) -> Result<Vec<u8>, String> {
    let mut cluster = vec![0; geometry.cluster_len()];
    match kind {
        Compression::Zlib => inflate(from, &mut cluster)?,
        Compression::Zstd => unzstd(from, &mut cluster)?,
    }
    Ok(cluster)
}

fn inflate(from: &[u8], into: &mut [u8]) -> Result<(), String> {
    // The input ends at a sector, not where the data do: there may be more, and decoding stops when the
    // cluster is full.
    let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF | TINFL_FLAG_HAS_MORE_INPUT;
    let mut state = DecompressorOxide::new();
    let (status, _, made) = decompress(&mut state, from, into, 0, flags);
    let sound = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
    if made == into.len() && (sound || status == TINFLStatus::NeedsMoreInput) {
        return Ok(());
    }
    Err(format!(
        "deflate gave {made} of {} bytes ({status:?})",
        into.len()
    ))
}

fn unzstd(mut from: &[u8], into: &mut [u8]) -> Result<(), String> {
    let mut decoder = FrameDecoder::new();
    decoder.set_max_window_size(MOST_WINDOW_BYTES);
    decoder.init(&mut from).map_err(|e| e.to_string())?;
    let mut made = 0;
    while made < into.len() {
        let rest = into.get_mut(made..).unwrap_or_default();
        if !decoder.is_finished() {
            decoder
                .decode_blocks(&mut from, BlockDecodingStrategy::UptoBytes(rest.len()))
                .map_err(|e| e.to_string())?;
        }
        let n = std::io::Read::read(&mut decoder, rest).map_err(|e| e.to_string())?;
        made = made.saturating_add(n);
        if n == 0 && decoder.is_finished() {
            break;
        }
    }
    match made == into.len() {
        true => Ok(()),
        false => Err(format!("zstd gave {made} of {} bytes", wide(into.len()))),
    }
}
