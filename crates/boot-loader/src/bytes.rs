//! Little-endian fields in untrusted bytes, and sizes for people.

use std::fmt;

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
    u16::from_le_bytes(field(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

/// Puts `value` at `at` in `page`. Offsets are constants of the caller's; what passes the end is lost.
pub(crate) fn put(page: &mut [u8], at: usize, value: &[u8]) {
    if let Some(into) = at
        .checked_add(value.len())
        .and_then(|end| page.get_mut(at..end))
    {
        into.copy_from_slice(value);
    }
}

/// A number of bytes as people say it, rounded up: what is asked for must be enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            n if n >= 1 << 20 => write!(f, "{} MiB", n.div_ceil(1 << 20)),
            n if n >= 1 << 10 => write!(f, "{} KiB", n.div_ceil(1 << 10)),
            n => write!(f, "{n} bytes"),
        }
    }
}
