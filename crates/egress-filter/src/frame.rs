//! The headers of a frame, read from a copy: Ethernet (IEEE 802.3), ARP by its type alone, IPv4 (RFC 791), IPv6 (RFC 8200), and the
//! beginning of TCP (RFC 9293), UDP (RFC 768), ICMP (RFC 792) and ICMPv6 (RFC 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use alveole_net_link::HEADER_BYTES;

use crate::MAX_EXTENSION_HEADERS;

pub(crate) const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES: usize = 20;
pub(crate) const IPV6_BYTES: usize = 40;
const TCP_BYTES: usize = 20;
/// Of UDP, ICMP and ICMPv6.
const SHORT_BYTES: usize = 8;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const TYPE_IPV6: u16 = 0x86dd;

pub(crate) const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
pub(crate) const ICMP6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// Fields of `virtio_net_hdr_v1` (virtio 1.3, section 5.1.6).
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    Arp,
    Packet(Packet),
}

/// What a packet's headers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packet {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) hop_limit: u8,
    pub(crate) transport: Transport,
    /// Where the transport's header begins in the frame.
    at: usize,
}

impl Packet {
    /// How an answer to it would look to a policy.
    pub(crate) fn answered(self) -> Self {
        let transport = match self.transport {
            Transport::Tcp { from, to, .. } => Transport::Tcp {
                from: to,
                to: from,
                opens: false,
            },
            Transport::Udp { from, to } => Transport::Udp { from: to, to: from },
            other => other,
        };
        Self {
            source: self.destination,
            destination: self.source,
            transport,
            ..self
        }
    }
}

/// What a packet speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp {
        from: u16,
        to: u16,
        /// It asks for a connection.
        opens: bool,
    },
    Udp {
        from: u16,
        to: u16,
    },
    /// ICMP or ICMPv6, as the address has it. The identifier is that of echoes.
    Icmp {
        kind: u8,
        id: u16,
    },
    Other(u8),
}

/// Why it cannot be said where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreadable {
    Malformed(&'static str),
    Fragment,
    Unknown(&'static str),
}

use Unreadable::{Fragment, Malformed, Unknown};

/// Reads the frame of `len` bytes that begins with `head`.
pub(crate) fn read(head: &[u8], len: usize) -> Result<Content, Unreadable> {
    match be16(head, 12).ok_or(Malformed("it is shorter than an Ethernet header"))? {
        TYPE_ARP => Ok(Content::Arp),
        TYPE_IPV4 => read_ipv4(head, len).map(Content::Packet),
        TYPE_IPV6 => read_ipv6(head, len).map(Content::Packet),
        _ => Err(Unknown("it is neither ARP nor IP")),
    }
}

fn read_ipv4(head: &[u8], len: usize) -> Result<Packet, Unreadable> {
    const SHORT: Unreadable = Malformed("it is shorter than an IPv4 header");
    let header: &[u8; IPV4_BYTES] = part(head, ETHERNET_BYTES).ok_or(SHORT)?;
    let [
        version,
        _,
        t0,
        t1,
        _,
        _,
        f0,
        f1,
        hop_limit,
        protocol,
        _,
        _,
        a @ ..,
    ] = *header;
    let [s0, s1, s2, s3, d0, d1, d2, d3] = a;
    match version {
        0x45 => {}
        // A source route among them would lead it elsewhere.
        0x46..=0x4f => return Err(Unknown("it has IPv4 options")),
        _ => return Err(Malformed("its IPv4 header is none")),
    }
    let total = usize::from(u16::from_be_bytes([t0, t1]));
    let payload = total
        .checked_sub(IPV4_BYTES)
        .ok_or(Malformed("its IPv4 length is less than a header"))?;
    if ETHERNET_BYTES.saturating_add(total) > len {
        return Err(Malformed("its IPv4 length is more than its own"));
    }
    const MORE_OR_OFFSET: u16 = 0x3fff;
    if u16::from_be_bytes([f0, f1]) & MORE_OR_OFFSET != 0 {
        return Err(Fragment);
    }
    let at = ETHERNET_BYTES.saturating_add(IPV4_BYTES);
    if protocol == ICMP6 {
        return Err(Malformed("it has ICMPv6 over IPv4"));
    }
    Ok(Packet {
        source: Ipv4Addr::new(s0, s1, s2, s3).into(),
        destination: Ipv4Addr::new(d0, d1, d2, d3).into(),
        hop_limit,
        transport: transport(head, at, payload, protocol)?,
        at,
    })
}

fn read_ipv6(head: &[u8], len: usize) -> Result<Packet, Unreadable> {
    const SHORT: Unreadable = Malformed("it is shorter than an IPv6 header");
    let header: &[u8; IPV6_BYTES] = part(head, ETHERNET_BYTES).ok_or(SHORT)?;
    let [version, _, _, _, l0, l1, mut next, hop_limit, ..] = *header;
    let address = |from| part::<16>(header, from).map(|bytes| Ipv6Addr::from(*bytes));
    let (source, destination) = address(8).zip(address(24)).ok_or(SHORT)?;
    if version >> 4 != 6 {
        return Err(Malformed("its IPv6 header is none"));
    }
    let mut payload = usize::from(u16::from_be_bytes([l0, l1]));
    let mut at = ETHERNET_BYTES.saturating_add(IPV6_BYTES);
    if at.saturating_add(payload) > len {
        return Err(Malformed("its IPv6 length is more than its own"));
    }
    let mut passed = 0;
    while let HOP_BY_HOP | DESTINATION_OPTIONS | ROUTING | FRAGMENT = next {
        match next {
            FRAGMENT => return Err(Fragment),
            // Its destination is the next stop only.
            ROUTING => return Err(Unknown("it has a route of its own")),
            _ if passed == MAX_EXTENSION_HEADERS => {
                return Err(Unknown("it has too many extension headers"));
            }
            _ => {}
        }
        passed = passed.saturating_add(1);
        let [after, units] = *part::<2>(head, at).ok_or(Unknown("its headers are too long"))?;
        let bytes = usize::from(units).saturating_add(1).saturating_mul(8);
        payload = payload
            .checked_sub(bytes)
            .ok_or(Malformed("an extension header is longer than its packet"))?;
        at = at.saturating_add(bytes);
        next = after;
    }
    if next == ICMP {
        return Err(Malformed("it has ICMP over IPv6"));
    }
    Ok(Packet {
        source: source.into(),
        destination: destination.into(),
        hop_limit,
        transport: transport(head, at, payload, next)?,
        at,
    })
}

/// The transport's header at `at`, of a packet with `payload` bytes from there on.
fn transport(
    head: &[u8],
    at: usize,
    payload: usize,
    protocol: u8,
) -> Result<Transport, Unreadable> {
    let bytes = header_bytes(protocol);
    if payload < bytes {
        return Err(Malformed("it is shorter than its transport's header"));
    }
    let header = at
        .checked_add(bytes)
        .and_then(|end| head.get(at..end))
        .ok_or(Unknown("its headers are too long"))?;
    let word = |at| be16(header, at).unwrap_or(0);
    Ok(match protocol {
        TCP => Transport::Tcp {
            from: word(0),
            to: word(2),
            opens: header
                .get(13)
                .is_some_and(|flags| flags & (TCP_SYN | TCP_ACK) == TCP_SYN),
        },
        UDP => Transport::Udp {
            from: word(0),
            to: word(2),
        },
        ICMP | ICMP6 => Transport::Icmp {
            kind: header.first().copied().unwrap_or(0),
            id: word(4),
        },
        _ => Transport::Other(protocol),
    })
}

fn header_bytes(protocol: u8) -> usize {
    match protocol {
        TCP => TCP_BYTES,
        UDP | ICMP | ICMP6 => SHORT_BYTES,
        _ => 0,
    }
}

/// Whether what a frame asks of the link (virtio 1.3, section 5.1.6.2) leaves its headers as they were read: a checksum is
/// written where the guest says, which could be an address.
pub(crate) fn leaves_headers(offloads: &[u8; HEADER_BYTES], content: &Content) -> bool {
    let [flags, gso, _, _, _, _, s0, s1, o0, o1, ..] = *offloads;
    let gso = gso & !GSO_ECN;
    if flags & NEEDS_CSUM == 0 {
        return gso == 0;
    }
    let Content::Packet(packet) = content else {
        return false;
    };
    let start = usize::from(u16::from_le_bytes([s0, s1]));
    let offset = usize::from(u16::from_le_bytes([o0, o1]));
    let (own_offset, bytes) = match packet.transport {
        Transport::Tcp { .. } => (16, TCP_BYTES),
        Transport::Udp { .. } => (6, SHORT_BYTES),
        Transport::Icmp { .. } => (2, SHORT_BYTES),
        Transport::Other(_) => (0, 0),
    };
    let is_own = start == packet.at && offset == own_offset && bytes > 0;
    let is_behind = start >= packet.at.saturating_add(bytes);
    match gso {
        0 => is_own || is_behind,
        GSO_TCPV4 => {
            is_own
                && packet.destination.is_ipv4()
                && matches!(packet.transport, Transport::Tcp { .. })
        }
        GSO_TCPV6 => {
            is_own
                && packet.destination.is_ipv6()
                && matches!(packet.transport, Transport::Tcp { .. })
        }
        GSO_UDP_L4 => is_own && matches!(packet.transport, Transport::Udp { .. }),
        _ => false,
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    part::<2>(bytes, at).map(|word| u16::from_be_bytes(*word))
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> Option<&[u8; N]> {
    bytes.get(at..)?.first_chunk()
}
