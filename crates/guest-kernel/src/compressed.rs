//! Files that may be compressed, told by their names: modules and the parts of packages.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

/// A module of a distribution has some hundred KiB; its debug information some MiB.
const MAX_MODULE_BYTES: u64 = 64 << 20;

/// Reads what `name` says `raw` is: `.gz`, `.xz`, `.zst`, or as it is.
pub(crate) fn open<'a>(name: &str, raw: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let raw = BufReader::new(raw);
    Ok(match name.rsplit('.').next() {
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(raw)),
        Some("xz") => Box::new(lzma_rust2::XzReader::new(raw, true)),
        Some("zst") => Box::new(
            ruzstd::decoding::StreamingDecoder::new(raw)
                .map_err(|e| io::Error::other(e.to_string()))?,
        ),
        _ => Box::new(raw),
    })
}

/// A module's own bytes.
pub(crate) fn module(path: &Path) -> io::Result<Vec<u8>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut bytes = Vec::new();
    open(&name, File::open(path)?)?
        .take(MAX_MODULE_BYTES + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MODULE_BYTES {
        return Err(io::Error::other(format!(
            "it has more than {MAX_MODULE_BYTES} bytes"
        )));
    }
    Ok(bytes)
}
