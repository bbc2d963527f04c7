//! What every store asks of a request before it looks at it any further.

use std::io;

use crate::{Geometry, Operation, Request, SECTOR_BYTES};

/// Refuses what does not fit the store: a guest asks for anything.
pub(crate) fn check(request: &Request, geometry: &Geometry) -> io::Result<()> {
    let wrong = |what: &str| {
        let (offset, len) = (request.offset, request.len);
        let text = format!("bytes {offset}+{len}: {what}");
        io::Error::new(io::ErrorKind::InvalidInput, text)
    };
    let buffers = match request.operation {
        Operation::Flush => return Ok(()),
        Operation::Read | Operation::Write { .. } => request.buffers.len_bytes() == request.len,
        Operation::Discard | Operation::WriteZeroes { .. } => true,
    };
    if !buffers {
        return Err(wrong("the buffers have another length"));
    }
    if !(request.offset | request.len).is_multiple_of(SECTOR_BYTES) {
        return Err(wrong("not a multiple of 512"));
    }
    if geometry.read_only && request.operation != Operation::Read {
        return Err(io::Error::new(
            io::ErrorKind::ReadOnlyFilesystem,
            "the store is read-only",
        ));
    }
    let end = request.offset.checked_add(request.len);
    if end.is_none_or(|end| end > geometry.size_bytes) {
        return Err(wrong("not within the store"));
    }
    Ok(())
}
