//! A descriptor chain as a control command (section 5.1.6.5). Reads guest memory, does nothing else.

use alveole_guest_memory::GuestRam;
use alveole_virtio::Chain;

/// Longest command that is known: class, command, eight bytes.
const MAX_COMMAND_BYTES: usize = 10;

const CLASS_MAC: u8 = 1;
const MAC_ADDR_SET: u8 = 1;
const CLASS_ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

/// What a driver commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// VIRTIO_NET_CTRL_MAC_ADDR_SET
    SetMac([u8; 6]),
    /// VIRTIO_NET_CTRL_ANNOUNCE_ACK
    AnnounceAck,
    /// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
    SetPairs(u16),
    /// VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
    SetOffloads(u64),
    /// Anything else, or one of these with another length.
    Unknown,
}

impl Command {
    /// Reads a chain: the command, and where its answer goes.
    ///
    /// # Errors
    /// There is no way to answer: why.
    pub fn read(chain: &Chain, ram: &GuestRam) -> Result<(Self, u64), &'static str> {
        let last = chain.writable().iter().rfind(|segment| segment.len > 0);
        let Some(last) = last else {
            return Err("it has no room for the answer");
        };
        // Section 5.1.6.5: the answer is the last byte.
        let ack_addr = last
            .addr
            .checked_add(u64::from(last.len).saturating_sub(1))
            .filter(|addr| ram.contains(*addr, 1))
            .ok_or("its answer is not in guest memory")?;
        let mut bytes = [0; MAX_COMMAND_BYTES];
        let len = usize::try_from(chain.readable_bytes()).unwrap_or(usize::MAX);
        let mut left = &mut bytes[..];
        for segment in chain.readable() {
            let len = usize::try_from(segment.len).unwrap_or(usize::MAX);
            let (now, later) = left.split_at_mut(len.min(left.len()));
            if !now.is_empty() && ram.read(segment.addr, now).is_err() {
                return Ok((Self::Unknown, ack_addr));
            }
            left = later;
        }
        let [class, command, data @ ..] = bytes;
        let [d0, d1, d2, d3, d4, d5, ..] = data;
        let command = match (class, command, len) {
            (CLASS_MAC, MAC_ADDR_SET, 8) => Self::SetMac([d0, d1, d2, d3, d4, d5]),
            (CLASS_ANNOUNCE, ANNOUNCE_ACK, 2) => Self::AnnounceAck,
            (CLASS_MQ, MQ_VQ_PAIRS_SET, 4) => Self::SetPairs(u16::from_le_bytes([d0, d1])),
            (CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET, 10) => {
                Self::SetOffloads(u64::from_le_bytes(data))
            }
            _ => Self::Unknown,
        };
        Ok((command, ack_addr))
    }
}

/// What a fuzzer calls with any chain.
pub fn fuzz_control(chain: &Chain, ram: &GuestRam) {
    if let Ok((_, ack_addr)) = Command::read(chain, ram) {
        assert!(ram.write(ack_addr, &[1]).is_ok());
    }
}
