//! A descriptor chain as a request (section 5.2.6). Reads guest memory, does nothing else.

use alveole_block_store::SECTOR_BYTES;
use alveole_guest_memory::{GuestBuffers, GuestRam};
use alveole_virtio::{Chain, Segment};

use crate::{MAX_RANGE_SECTORS, MAX_RANGES};

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
const UNMAP: u32 = 1;

/// What a driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN
    Read,
    /// VIRTIO_BLK_T_OUT
    Write,
    /// VIRTIO_BLK_T_FLUSH
    Flush,
    /// VIRTIO_BLK_T_GET_ID
    GetId,
    /// VIRTIO_BLK_T_DISCARD
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES
    WriteZeroes,
}

/// A range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The space may be given back.
    pub may_unmap: bool,
}

/// A request that can be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParsedRequest {
    /// What.
    pub kind: Kind,
    /// First byte on the disk.
    pub offset: u64,
    /// Bytes of data: for [`Kind::GetId`] the room for it.
    pub len: u64,
    /// Where the status byte goes.
    pub status_addr: u64,
}

/// Why a chain is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadRequest {
    /// There is no way to answer: the ring is broken.
    NoAnswer(&'static str),
    /// VIRTIO_BLK_S_IOERR at this address.
    IoError(u64),
    /// VIRTIO_BLK_S_UNSUPP at this address.
    Unsupported(u64),
}

impl ParsedRequest {
    /// Reads a chain. The data's buffers go into `buffers`, the ranges into `ranges`; both are emptied
    /// before. `capacity_bytes` bounds every range.
    ///
    /// The header is copied once. A chain may be cut into descriptors in any way (section 2.7.4).
    ///
    /// # Errors
    /// See [`BadRequest`].
    pub fn read(
        chain: &Chain,
        ram: &GuestRam,
        capacity_bytes: u64,
        buffers: &mut GuestBuffers,
        ranges: &mut Vec<Range>,
    ) -> Result<Self, BadRequest> {
        buffers.clear();
        ranges.clear();
        let (status_addr, room) = status_byte(chain, ram)?;
        let mut header = [0; HEADER_BYTES];
        if copy(chain.readable(), ram, 0, &mut header)? < HEADER_BYTES {
            return Err(BadRequest::NoAnswer("its header is cut off"));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let io_error = BadRequest::IoError(status_addr);
        let parsed = |kind, offset, len| Self {
            kind,
            offset,
            len,
            status_addr,
        };
        let data_out = chain.readable_bytes().saturating_sub(HEADER_BYTES as u64);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            IN => {
                push_all(buffers, chain.writable(), 0, room).ok_or(io_error)?;
                let offset = on_disk(sector, room, capacity_bytes).ok_or(io_error)?;
                Ok(parsed(Kind::Read, offset, room))
            }
            OUT => {
                push_all(buffers, chain.readable(), HEADER_BYTES as u64, data_out)
                    .ok_or(io_error)?;
                let offset = on_disk(sector, data_out, capacity_bytes).ok_or(io_error)?;
                Ok(parsed(Kind::Write, offset, data_out))
            }
            FLUSH => Ok(parsed(Kind::Flush, 0, 0)),
            GET_ID => {
                push_all(buffers, chain.writable(), 0, room).ok_or(io_error)?;
                Ok(parsed(Kind::GetId, 0, room))
            }
            kind @ (DISCARD | WRITE_ZEROES) => {
                let kind = if kind == DISCARD {
                    Kind::Discard
                } else {
                    Kind::WriteZeroes
                };
                let len = read_ranges(
                    kind,
                    chain,
                    ram,
                    data_out,
                    capacity_bytes,
                    status_addr,
                    ranges,
                )?;
                Ok(parsed(kind, 0, len))
            }
            _ => Err(BadRequest::Unsupported(status_addr)),
        }
    }
}

/// Address of the last byte that may be written, and how many bytes may be written before it.
fn status_byte(chain: &Chain, ram: &GuestRam) -> Result<(u64, u64), BadRequest> {
    let last = chain.writable().iter().rfind(|segment| segment.len > 0);
    let Some(last) = last else {
        return Err(BadRequest::NoAnswer("it has no room for the status"));
    };
    let addr = last
        .addr
        .checked_add(u64::from(last.len).saturating_sub(1))
        .filter(|addr| ram.contains(*addr, 1))
        .ok_or(BadRequest::NoAnswer(
            "its status byte is not in guest memory",
        ))?;
    Ok((addr, chain.writable_bytes().saturating_sub(1)))
}

/// Copies what lies `skip` bytes into the segments into `into`; how much there was.
fn copy(
    segments: &[Segment],
    ram: &GuestRam,
    skip: u64,
    into: &mut [u8],
) -> Result<usize, BadRequest> {
    let mut skip = skip;
    let mut rest = into;
    let mut done: usize = 0;
    for segment in segments {
        let len = u64::from(segment.len);
        if skip >= len {
            skip = skip.saturating_sub(len);
            continue;
        }
        let left = usize::try_from(len.saturating_sub(skip)).unwrap_or(usize::MAX);
        let (now, later) = rest.split_at_mut(left.min(rest.len()));
        if now.is_empty() {
            break;
        }
        segment
            .addr
            .checked_add(skip)
            .and_then(|addr| ram.read(addr, now).ok())
            .ok_or(BadRequest::NoAnswer("its header is not in guest memory"))?;
        done = done.saturating_add(now.len());
        rest = later;
        skip = 0;
    }
    Ok(done)
}

/// Adds `len` bytes of the segments, `skip` bytes into them. None where some are not in memory.
fn push_all(buffers: &mut GuestBuffers, segments: &[Segment], skip: u64, len: u64) -> Option<()> {
    let (mut skip, mut left) = (skip, len);
    for segment in segments {
        let size = u64::from(segment.len);
        if skip >= size {
            skip = skip.saturating_sub(size);
            continue;
        }
        let now = size.saturating_sub(skip).min(left);
        buffers.push(segment.addr.checked_add(skip)?, now).ok()?;
        left = left.saturating_sub(now);
        skip = 0;
        if left == 0 {
            break;
        }
    }
    (left == 0).then_some(())
}

/// The first byte of a range in whole sectors within the disk.
fn on_disk(sector: u64, len: u64, capacity_bytes: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    let end = offset.checked_add(len)?;
    (len.is_multiple_of(SECTOR_BYTES) && end <= capacity_bytes).then_some(offset)
}

fn read_ranges(
    kind: Kind,
    chain: &Chain,
    ram: &GuestRam,
    data_len: u64,
    capacity_bytes: u64,
    status_addr: u64,
    ranges: &mut Vec<Range>,
) -> Result<u64, BadRequest> {
    let io_error = BadRequest::IoError(status_addr);
    let most = u64::from(MAX_RANGES).saturating_mul(RANGE_BYTES as u64);
    if data_len == 0 || data_len > most || !data_len.is_multiple_of(RANGE_BYTES as u64) {
        return Err(io_error);
    }
    let mut bytes = [0; MAX_RANGES as usize * RANGE_BYTES];
    let len = usize::try_from(data_len).map_err(|_| io_error)?;
    let bytes = bytes.get_mut(..len).ok_or(io_error)?;
    copy(chain.readable(), ram, HEADER_BYTES as u64, bytes).map_err(|_| io_error)?;
    let mut all: u64 = 0;
    let (entries, _) = bytes.as_chunks::<RANGE_BYTES>();
    for entry in entries {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *entry;
        let flags = u32::from_le_bytes(flags);
        // Section 5.2.6.2: unknown flags, and unmap where it means nothing.
        if flags & !UNMAP != 0 || (kind == Kind::Discard && flags != 0) {
            return Err(BadRequest::Unsupported(status_addr));
        }
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        if sectors > MAX_RANGE_SECTORS {
            return Err(io_error);
        }
        let len = u64::from(sectors).saturating_mul(SECTOR_BYTES);
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let offset = on_disk(sector, len, capacity_bytes).ok_or(io_error)?;
        if len > 0 {
            ranges.push(Range {
                offset,
                len,
                may_unmap: flags & UNMAP != 0,
            });
        }
        all = all.saturating_add(len);
    }
    Ok(all)
}

/// Reads any chain in any memory: what a fuzzer calls. Nothing may come of it but a value.
pub fn fuzz_parse(chain: &Chain, ram: &GuestRam, capacity_bytes: u64) {
    let mut buffers = GuestBuffers::new(ram);
    let mut ranges = Vec::new();
    let _ = ParsedRequest::read(chain, ram, capacity_bytes, &mut buffers, &mut ranges);
}
