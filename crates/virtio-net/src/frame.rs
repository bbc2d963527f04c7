//! A descriptor chain as a frame to be sent (section 5.1.6.2). Reads guest memory, does nothing else.

use alveole_guest_memory::{GuestBuffers, GuestRam};
use alveole_net_link::{HEADER_BYTES, MAX_FRAME_BYTES};
use alveole_virtio::Chain;

use crate::config_space::{CSUM, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_USO};

/// Length of an Ethernet header: nothing shorter is a frame.
const ETHERNET_BYTES: usize = 14;
/// What is copied of a frame whose source is looked at.
const WITH_ADDRESSES: usize = HEADER_BYTES + ETHERNET_BYTES;

const NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What a driver may ask for, by the features it has agreed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRules {
    /// The features agreed upon.
    pub features: u64,
    /// The only source address, if there is only one.
    pub source: Option<[u8; 6]>,
}

/// A frame that can be sent. Its rest lies in the buffers that were filled with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParsedFrame {
    start: [u8; WITH_ADDRESSES],
    start_len: usize,
    /// Length without the header, in bytes.
    pub len_bytes: u64,
}

/// Why a chain is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadFrame {
    /// It is no frame, or its header lies: why.
    Malformed(&'static str),
    /// It comes from another address than the guest's.
    Spoofed,
}

impl ParsedFrame {
    /// Header, and perhaps addresses, as they are to be sent: copied once, checked, and without what the device does
    /// not know (section 5.1.6.2.2).
    #[must_use]
    pub fn start(&self) -> &[u8] {
        self.start.get(..self.start_len).unwrap_or(&[])
    }

    /// Reads a chain. What is not copied goes into `rest`, which is emptied before. A chain may be cut into descriptors
    /// in any way (section 2.7.4).
    ///
    /// # Errors
    /// See [`BadFrame`].
    pub fn read(
        chain: &Chain,
        ram: &GuestRam,
        rules: &FrameRules,
        rest: &mut GuestBuffers,
    ) -> Result<Self, BadFrame> {
        rest.clear();
        let malformed = BadFrame::Malformed;
        if !chain.writable().is_empty() {
            return Err(malformed("it has buffers to be written"));
        }
        let all = chain.readable_bytes();
        let len_bytes = all.saturating_sub(HEADER_BYTES as u64);
        if len_bytes < ETHERNET_BYTES as u64 {
            return Err(malformed("it is shorter than its headers"));
        }
        if len_bytes > MAX_FRAME_BYTES as u64 {
            return Err(malformed("it is longer than any frame"));
        }
        let start_len = if rules.source.is_some() {
            WITH_ADDRESSES
        } else {
            HEADER_BYTES
        };
        let mut start = [0; WITH_ADDRESSES];
        let mut left = start.get_mut(..start_len).unwrap_or(&mut []);
        for segment in chain.readable() {
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let (now, later) = left.split_at_mut(len.min(left.len()));
            if !now.is_empty() {
                ram.read(segment.addr, now)
                    .map_err(|_| malformed("it is not in guest memory"))?;
            }
            let done = now.len() as u64;
            // Within the segment, whose end is checked by the push; an address that wraps is no memory.
            rest.push(
                segment.addr.wrapping_add(done),
                u64::from(segment.len).saturating_sub(done),
            )
            .map_err(|_| malformed("it is not in guest memory"))?;
            left = later;
        }
        let [
            h0,
            h1,
            h2,
            h3,
            h4,
            h5,
            h6,
            h7,
            h8,
            h9,
            h10,
            h11,
            addresses @ ..,
        ] = start;
        let header = checked(
            [h0, h1, h2, h3, h4, h5, h6, h7, h8, h9, h10, h11],
            len_bytes,
            rules.features,
        )?;
        if let Some(own) = rules.source
            && addresses.get(6..12) != Some(&own[..])
        {
            return Err(BadFrame::Spoofed);
        }
        for (place, byte) in start.iter_mut().zip(header) {
            *place = byte;
        }
        Ok(Self {
            start,
            start_len,
            len_bytes,
        })
    }
}

/// The header as the link gets it.
fn checked(
    header: [u8; HEADER_BYTES],
    len_bytes: u64,
    features: u64,
) -> Result<[u8; HEADER_BYTES], BadFrame> {
    let malformed = BadFrame::Malformed;
    let [flags, gso, l0, l1, g0, g1, s0, s1, o0, o1, _, _] = header;
    let mut checked = [0; HEADER_BYTES];
    let [
        out_flags,
        out_gso,
        out_l0,
        out_l1,
        out_g0,
        out_g1,
        out_s0,
        out_s1,
        out_o0,
        out_o1,
        ..,
    ] = &mut checked;
    // Section 5.1.6.2.2: a hint, not to be relied upon; but the host refuses one that is longer than the frame.
    let hint = u64::from(u16::from_le_bytes([l0, l1])).min(len_bytes);
    [*out_l0, *out_l1] = u16::try_from(hint).unwrap_or(u16::MAX).to_le_bytes();
    let needs_csum = flags & NEEDS_CSUM != 0;
    if needs_csum {
        if features & CSUM == 0 {
            return Err(malformed("it wants a checksum, which was not agreed upon"));
        }
        let start = u64::from(u16::from_le_bytes([s0, s1]));
        let offset = u64::from(u16::from_le_bytes([o0, o1]));
        if start.saturating_add(offset).saturating_add(2) > len_bytes {
            return Err(malformed("its checksum lies outside"));
        }
        *out_flags = NEEDS_CSUM;
        [*out_s0, *out_s1, *out_o0, *out_o1] = [s0, s1, o0, o1];
    }
    if gso & !GSO_ECN == GSO_NONE {
        return Ok(checked);
    }
    let wanted = match gso & !GSO_ECN {
        GSO_TCPV4 => HOST_TSO4,
        GSO_TCPV6 => HOST_TSO6,
        GSO_UDP_L4 => HOST_USO,
        _ => return Err(malformed("it wants to be cut in a way that is not known")),
    };
    let ecn = if gso & GSO_ECN != 0 { HOST_ECN } else { 0 };
    if features & (wanted | ecn) != wanted | ecn {
        return Err(malformed(
            "it wants to be cut in a way that was not agreed upon",
        ));
    }
    // Section 5.1.6.2.1: what is to be cut needs checksums, and a size.
    if !needs_csum {
        return Err(malformed("it wants to be cut without checksums"));
    }
    if [g0, g1] == [0, 0] {
        return Err(malformed("it wants to be cut into nothing"));
    }
    *out_gso = gso;
    [*out_g0, *out_g1] = [g0, g1];
    Ok(checked)
}

/// What a fuzzer calls with any chain.
pub fn fuzz_frame(chain: &Chain, ram: &GuestRam, features: u64, source: Option<[u8; 6]>) {
    let mut rest = GuestBuffers::new(ram);
    let rules = FrameRules { features, source };
    if let Ok(frame) = ParsedFrame::read(chain, ram, &rules, &mut rest) {
        let all = rest.len_bytes().saturating_add(frame.start().len() as u64);
        assert_eq!(all, frame.len_bytes.saturating_add(HEADER_BYTES as u64));
        assert!(frame.len_bytes <= MAX_FRAME_BYTES as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = CSUM | HOST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_USO;

    fn header(
        flags: u8,
        gso: u8,
        hdr_len: u16,
        gso_size: u16,
        start: u16,
        offset: u16,
    ) -> [u8; 12] {
        let mut bytes = vec![flags, gso];
        for field in [hdr_len, gso_size, start, offset, 7] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.try_into().unwrap()
    }

    #[test]
    fn what_the_device_does_not_know_is_left_out() {
        let out = checked(header(0xfe, 0x80, 9000, 5, 6, 7), 60, ALL).unwrap();
        assert_eq!(
            out,
            header(0, 0, 60, 0, 0, 0).map(|b| if b == 7 { 0 } else { b })
        );
        let out = checked(
            header(0xff, GSO_TCPV4 | GSO_ECN, 54, 1448, 34, 16),
            3000,
            ALL,
        )
        .unwrap();
        let mut want = header(1, GSO_TCPV4 | GSO_ECN, 54, 1448, 34, 16);
        want[10] = 0;
        assert_eq!(out, want);
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let good = header(1, GSO_TCPV4, 54, 1448, 34, 16);
        checked(good, 3000, ALL).unwrap();
        for (what, bad, len, features) in [
            ("no size", header(1, GSO_TCPV4, 54, 0, 34, 16), 3000, ALL),
            (
                "no checksum",
                header(0, GSO_TCPV4, 54, 1448, 34, 16),
                3000,
                ALL,
            ),
            ("UFO", header(1, 3, 54, 1448, 34, 16), 3000, ALL),
            ("unknown", header(1, 0x7f, 54, 1448, 34, 16), 3000, ALL),
            ("start outside", header(1, 0, 0, 0, 59, 0), 60, ALL),
            ("offset outside", header(1, 0, 0, 0, 0, 59), 60, ALL),
            (
                "sum outside",
                header(1, 0, 0, 0, u16::MAX, u16::MAX),
                60,
                ALL,
            ),
            (
                "csum not agreed",
                header(1, 0, 0, 0, 34, 16),
                60,
                ALL & !CSUM,
            ),
            ("TSO4 not agreed", good, 3000, ALL & !HOST_TSO4),
            (
                "TSO6 not agreed",
                header(1, 4, 54, 1448, 34, 16),
                3000,
                ALL & !HOST_TSO6,
            ),
            (
                "USO not agreed",
                header(1, 5, 54, 1448, 34, 16),
                3000,
                ALL & !HOST_USO,
            ),
            (
                "ECN not agreed",
                header(1, 0x81, 54, 1448, 34, 16),
                3000,
                ALL & !HOST_ECN,
            ),
        ] {
            assert!(checked(bad, len, features).is_err(), "{what}");
        }
        checked(header(1, 0, 0, 0, 58, 0), 60, ALL).unwrap();
    }
}
