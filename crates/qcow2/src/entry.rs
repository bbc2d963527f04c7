//! One entry of an L1 or L2 table, and what is wrong with it.

use crate::geometry::{Geometry, MOST_HOST_OFFSET};

/// The cluster has one user only: it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (version 3).
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L2 entry says of a guest cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// The backing image has it.
    Unallocated,
    /// Zeroes, perhaps with a cluster kept for later.
    Zero { kept: Option<u64>, copied: bool },
    /// Plain data.
    Data { host: u64, copied: bool },
    /// Compressed data, anywhere in the file.
    Compressed { host: u64, size: u64 },
}

impl Entry {
    /// Reads an L2 entry. `host_end` is the length of the file: nothing may start there or later.
    pub(crate) fn read(
        raw: u64,
        geometry: Geometry,
        version: u32,
        host_end: u64,
    ) -> Result<Self, &'static str> {
        if raw == 0 {
            return Ok(Self::Unallocated);
        }
        if raw & COMPRESSED != 0 {
            return Self::read_compressed(raw, geometry, host_end);
        }
        let host = raw & OFFSET_MASK;
        let copied = raw & COPIED != 0;
        if raw & !(OFFSET_MASK | COPIED | ZERO) != 0 {
            return Err("reserved bits are set");
        }
        if !geometry.is_aligned(host) {
            return Err("the offset is not on a cluster boundary");
        }
        if host >= host_end && host != 0 {
            return Err("the cluster lies beyond the end of the file");
        }
        if raw & ZERO != 0 && version < 3 {
            return Err("version 2 has no zero clusters");
        }
        match (host, raw & ZERO != 0) {
            (0, _) if copied => Err("it claims cluster 0, where the header is"),
            (0, _) => Ok(Self::Zero {
                kept: None,
                copied: false,
            }),
            (host, true) => Ok(Self::Zero {
                kept: Some(host),
                copied,
            }),
            (host, false) => Ok(Self::Data { host, copied }),
        }
    }

    fn read_compressed(raw: u64, geometry: Geometry, host_end: u64) -> Result<Self, &'static str> {
        let size_bits = geometry.cluster_bits.saturating_sub(8);
        let offset_bits = 62_u32.saturating_sub(size_bits);
        let host = raw & 1_u64.wrapping_shl(offset_bits).wrapping_sub(1);
        let sectors = raw.wrapping_shr(offset_bits) & 1_u64.wrapping_shl(size_bits).wrapping_sub(1);
        let size = sectors
            .saturating_add(1)
            .saturating_mul(512)
            .saturating_sub(host & 511);
        if raw & COPIED != 0 {
            return Err("it is compressed and claims to be writable in place");
        }
        if host >= MOST_HOST_OFFSET {
            return Err("reserved bits are set");
        }
        if host < geometry.cluster_size() {
            return Err("the compressed data lie in the header");
        }
        if host >= host_end {
            return Err("the compressed data lie beyond the end of the file");
        }
        Ok(Self::Compressed { host, size })
    }
}

/// Reads an L1 entry: the L2 table's offset (0 if there is none) and whether it has one user only.
pub(crate) fn read_l1(
    raw: u64,
    geometry: Geometry,
    host_end: u64,
) -> Result<(u64, bool), &'static str> {
    let host = raw & OFFSET_MASK;
    if raw & !(OFFSET_MASK | COPIED) != 0 {
        return Err("reserved bits are set");
    }
    if !geometry.is_aligned(host) {
        return Err("the offset is not on a cluster boundary");
    }
    if host >= host_end && host != 0 {
        return Err("the table lies beyond the end of the file");
    }
    Ok((host, raw & COPIED != 0))
}

/// Reads an entry of the refcount table: the block's offset (0 if there is none).
pub(crate) fn read_refcount(
    raw: u64,
    geometry: Geometry,
    host_end: u64,
) -> Result<u64, &'static str> {
    if raw & 511 != 0 {
        return Err("reserved bits are set");
    }
    if !geometry.is_aligned(raw) {
        return Err("the offset is not on a cluster boundary");
    }
    if raw >= host_end && raw != 0 {
        return Err("the block lies beyond the end of the file");
    }
    Ok(raw)
}
