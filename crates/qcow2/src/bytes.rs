//! Big-endian fields in untrusted bytes.

/// The `N` bytes at `at`; zeroes where there are fewer. Callers that must tell the two apart check the
/// length first.
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    if let Some(found) = at.checked_add(N).and_then(|end| bytes.get(at..end)) {
        value.copy_from_slice(found);
    }
    value
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(field(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

/// Puts `value` at `at`. Offsets are constants of the caller's; what passes the end is lost.
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(into) = at
        .checked_add(value.len())
        .and_then(|end| bytes.get_mut(at..end))
    {
        into.copy_from_slice(value);
    }
}

/// Table entries as they lie in a file, in the processor's order.
pub(crate) fn entries_of(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|c| u64::from_be_bytes(field(c, 0)))
}

/// Table entries as they lie in a file.
pub(crate) fn bytes_of(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|e| e.to_be_bytes()).collect()
}

/// Whether there is nothing but zeroes. Looks at blocks, which the compiler turns into vectors.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, b| all | b) == 0)
}

/// The widest index on this machine is a `u64`; what does not fit is out of every slice's bounds.
pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// A length as a file offset.
pub(crate) fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
