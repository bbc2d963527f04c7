//! A descriptor chain as a packet (section 5.10.6). Reads guest memory, does nothing else.

use alveole_guest_memory::{GuestBuffers, GuestRam};
use alveole_virtio::{Chain, Segment};

/// Length of a packet's header.
pub const HEADER_BYTES: usize = 44;

/// VIRTIO_VSOCK_TYPE_STREAM
pub(crate) const STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE as a bit of a packet's flags: its sender receives no more.
pub(crate) const NO_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: its sender sends no more.
pub(crate) const NO_SEND: u32 = 2;

/// What a packet is for: VIRTIO_VSOCK_OP_ and its like.
pub mod op {
    /// Begins a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts it.
    pub const RESPONSE: u16 = 2;
    /// Refuses or aborts it.
    pub const RST: u16 = 3;
    /// Says that its sender sends or receives no more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells its sender's buffer space.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the receiver's.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`. All numbers as they came: whoever uses one checks it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Context of the sender.
    pub src_cid: u64,
    /// Context of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Length of the data, in bytes.
    pub len: u32,
    /// Type of the socket; 1 is a stream.
    pub kind: u16,
    /// What the packet is for; see [`op`].
    pub op: u16,
    /// What that takes.
    pub flags: u32,
    /// Bytes that the sender has room for in all.
    pub buf_alloc: u32,
    /// Bytes that it has consumed, counted without end.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header that these bytes are.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut fields = Fields(bytes);
        Self {
            src_cid: u64::from_le_bytes(fields.next()),
            dst_cid: u64::from_le_bytes(fields.next()),
            src_port: u32::from_le_bytes(fields.next()),
            dst_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            kind: u16::from_le_bytes(fields.next()),
            op: u16::from_le_bytes(fields.next()),
            flags: u32::from_le_bytes(fields.next()),
            buf_alloc: u32::from_le_bytes(fields.next()),
            fwd_cnt: u32::from_le_bytes(fields.next()),
        }
    }

    /// The bytes that this header is.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut places = bytes.iter_mut();
        for field in fields {
            for (byte, place) in field.iter().zip(&mut places) {
                *place = *byte;
            }
        }
        bytes
    }

    /// The answer to a packet that belongs to no connection.
    pub(crate) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The fields of a header that are left.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        // The fields are as long as the header.
        let Some((field, rest)) = self.0.split_first_chunk::<N>() else {
            return [0; N];
        };
        self.0 = rest;
        *field
    }
}

/// Why a chain is no packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadPacket {
    /// There is not even a header: the ring is broken.
    NoHeader(&'static str),
    /// Its data is not there: shorter than its header says, or not in guest memory.
    NoData(Header),
}

/// Reads a packet that the guest sends. The ranges of its data go into `data`, which is emptied before. Only
/// [`op::RW`] has data; what other packets carry is ignored.
///
/// The header is copied once. A chain may be cut into descriptors in any way (section 2.7.4).
///
/// # Errors
/// See [`BadPacket`].
pub fn read_packet(
    chain: &Chain,
    ram: &GuestRam,
    data: &mut GuestBuffers,
) -> Result<Header, BadPacket> {
    data.clear();
    let header = read_header(chain.readable(), ram)?;
    if header.op != op::RW {
        return Ok(header);
    }
    push_all(
        data,
        chain.readable(),
        HEADER_BYTES as u64,
        header.len.into(),
    )
    .ok_or(BadPacket::NoData(header))?;
    Ok(header)
}

fn read_header(segments: &[Segment], ram: &GuestRam) -> Result<Header, BadPacket> {
    let mut bytes = [0; HEADER_BYTES];
    let mut rest: &mut [u8] = &mut bytes;
    for segment in segments {
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
        let (now, later) = rest.split_at_mut(len.min(rest.len()));
        if !now.is_empty() {
            ram.read(segment.addr, now)
                .map_err(|_| BadPacket::NoHeader("its header is not in guest memory"))?;
        }
        rest = later;
    }
    if !rest.is_empty() {
        return Err(BadPacket::NoHeader("its header is cut off"));
    }
    Ok(Header::from_bytes(&bytes))
}

/// Adds `len` bytes of the segments, `skip` bytes into them. None where some are not there.
pub(crate) fn push_all(
    buffers: &mut GuestBuffers,
    segments: &[Segment],
    skip: u64,
    len: u64,
) -> Option<()> {
    let (mut skip, mut left) = (skip, len);
    for segment in segments {
        let size = u64::from(segment.len);
        if left == 0 {
            break;
        }
        if skip >= size {
            skip = skip.saturating_sub(size);
            continue;
        }
        let now = size.saturating_sub(skip).min(left);
        buffers.push(segment.addr.checked_add(skip)?, now).ok()?;
        left = left.saturating_sub(now);
        skip = 0;
    }
    (left == 0).then_some(())
}

/// What a fuzzer calls: reads the chain, and sees that what came of it can be used.
///
/// # Panics
/// A header does not come back from its bytes, or there is more or less data than it says.
#[cfg_attr(
    not(test),
    expect(
        clippy::panic,
        reason = "a fuzzer wants to be told of what must not be"
    )
)]
pub fn fuzz_parse(chain: &Chain, ram: &GuestRam) {
    let mut data = GuestBuffers::new(ram);
    let Ok(header) = read_packet(chain, ram, &mut data) else {
        return;
    };
    if Header::from_bytes(&header.to_bytes()) != header {
        panic!("{header:?} does not come back from its bytes");
    }
    let len = if header.op == op::RW {
        u64::from(header.len)
    } else {
        0
    };
    if data.len_bytes() != len {
        panic!("{header:?} has {} bytes of data", data.len_bytes());
    }
    let mut one = [0];
    if let Some(last) = len.checked_sub(1) {
        data.copy_to(last, &mut one);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_its_fields_where_the_specification_says() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|i| i as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(
            (header.src_port, header.dst_port),
            (0x1312_1110, 0x1716_1514)
        );
        assert_eq!((header.len, header.kind), (0x1b1a_1918, 0x1d1c));
        assert_eq!((header.op, header.flags), (0x1f1e, 0x2322_2120));
        assert_eq!(
            (header.buf_alloc, header.fwd_cnt),
            (0x2726_2524, 0x2b2a_2928)
        );
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn a_reset_goes_back_where_the_packet_came_from() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 10,
            dst_port: 20,
            len: 7,
            kind: 9,
            op: op::RW,
            flags: 5,
            buf_alloc: 100,
            fwd_cnt: 50,
        };
        let reset = header.reset();
        assert_eq!(
            (
                reset.src_cid,
                reset.dst_cid,
                reset.src_port,
                reset.dst_port,
                reset.kind
            ),
            (2, 3, 20, 10, 9)
        );
        assert_eq!((reset.op, reset.len, reset.flags), (op::RST, 0, 0));
    }
}
