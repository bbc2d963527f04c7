//! What a guest is told of a packet that is refused: that it is administratively prohibited (RFC 1812, section 5.2.7.1; RFC 4443,
//! section 3.1), at once, instead of waiting in vain.

use std::net::IpAddr;

use crate::frame::{ETHERNET_BYTES, ICMP, ICMP6, IPV6_BYTES, Packet, Transport};

const UNREACHABLE: [u8; 2] = [3, 13];
const UNREACHABLE6: [u8; 2] = [1, 1];
/// How much of the packet is quoted: an IPv4 header and 8 bytes (RFC 792), an IPv6 header and some more.
const QUOTED: usize = 28;
const QUOTED6: usize = 64;
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST6: u8 = 128;

/// The frame that tells the guest, as if it came from where the packet was to go; none for what must not be answered (RFC 1122,
/// section 3.2.2: errors, groups). `head` is how the refused frame began.
pub(crate) fn tell(head: &[u8], packet: &Packet) -> Option<Vec<u8>> {
    let (to_hardware, rest) = head.split_first_chunk::<6>()?;
    let (from_hardware, _) = rest.split_first_chunk::<6>()?;
    let is_group = to_hardware.first()? & 1 != 0;
    let asks = match packet.transport {
        Transport::Tcp { .. } | Transport::Udp { .. } => true,
        Transport::Icmp { kind, .. } if packet.destination.is_ipv4() => kind == ECHO_REQUEST,
        Transport::Icmp { kind, .. } => kind == ECHO_REQUEST6,
        Transport::Other(_) => false,
    };
    let has_no_sender = packet.source.is_unspecified() || packet.source.is_multicast();
    if is_group || !asks || has_no_sender || packet.destination.is_multicast() {
        return None;
    }
    let kind = head.get(12..ETHERNET_BYTES)?;
    let mut frame = [from_hardware, to_hardware.as_slice(), kind].concat();
    let quoted = head.get(ETHERNET_BYTES..)?;
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let quoted = quoted.get(..QUOTED)?;
            let message = message(UNREACHABLE, &[], quoted);
            let total = u16::try_from(message.len().saturating_add(20)).ok()?;
            let [t0, t1] = total.to_be_bytes();
            let mut header = vec![0x45, 0, t0, t1, 0, 0, 0, 0, 64, ICMP, 0, 0];
            header.extend(destination.octets());
            header.extend(source.octets());
            let [s0, s1] = sum(&header);
            header.splice(10..12, [s0, s1]);
            frame.extend(header);
            frame.extend(message);
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let quoted = quoted.get(..QUOTED6.min(quoted.len()))?;
            let len = u16::try_from(quoted.len().saturating_add(8)).ok()?;
            let [l0, l1] = len.to_be_bytes();
            let addresses = [destination.octets(), source.octets()].concat();
            // RFC 8200, section 8.1.
            let pseudo = [&addresses, [0, 0, l0, l1, 0, 0, 0, ICMP6].as_slice()].concat();
            let message = message(UNREACHABLE6, &pseudo, quoted);
            let mut header = Vec::with_capacity(IPV6_BYTES);
            header.extend([0x60, 0, 0, 0, l0, l1, ICMP6, 64]);
            header.extend(addresses);
            frame.extend(header);
            frame.extend(message);
        }
        _ => return None,
    }
    Some(frame)
}

/// A message with its checksum, which is over `pseudo`, too.
fn message([kind, code]: [u8; 2], pseudo: &[u8], quoted: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend(quoted);
    let [s0, s1] = sum(&[pseudo, &message].concat());
    message.splice(2..4, [s0, s1]);
    message
}

/// The Internet checksum (RFC 1071).
pub(crate) fn sum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        let [high, low] = [word.first(), word.get(1)].map(|b| b.copied().unwrap_or(0));
        sum = sum.wrapping_add(u32::from(u16::from_be_bytes([high, low])));
    }
    // Of no more than some hundred words, so that two turns carry all.
    for _ in 0..2 {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
