//! The configuration space (section 5.1.4) and the features (5.1.3).

use alveole_net_link::Offloads;

pub(crate) const CSUM: u64 = 1;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(crate) const MTU: u64 = 1 << 3;
pub(crate) const MAC: u64 = 1 << 5;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const GUEST_TSO6: u64 = 1 << 8;
pub(crate) const GUEST_ECN: u64 = 1 << 9;
pub(crate) const HOST_TSO4: u64 = 1 << 11;
pub(crate) const HOST_TSO6: u64 = 1 << 12;
pub(crate) const HOST_ECN: u64 = 1 << 13;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const STATUS: u64 = 1 << 16;
pub(crate) const CTRL_VQ: u64 = 1 << 17;
pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(crate) const MQ: u64 = 1 << 22;
pub(crate) const CTRL_MAC_ADDR: u64 = 1 << 23;
pub(crate) const GUEST_USO4: u64 = 1 << 54;
pub(crate) const GUEST_USO6: u64 = 1 << 55;
pub(crate) const HOST_USO: u64 = 1 << 56;

/// What VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET may switch.
pub(crate) const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

/// Up to the MTU.
pub(crate) const LEN: u32 = 12;

/// What a device is made of, as far as features tell.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    pub(crate) offloads: Offloads,
    pub(crate) pairs: u16,
    pub(crate) mtu: Option<u16>,
    pub(crate) can_change_mac: bool,
}

impl Abilities {
    pub(crate) fn features(&self) -> u64 {
        let Offloads {
            csum,
            tso4,
            tso6,
            ecn,
            uso4,
            uso6,
        } = self.offloads;
        let mut features = MAC | STATUS | CTRL_VQ | GUEST_ANNOUNCE | MRG_RXBUF;
        for (has, bits) in [
            (self.mtu.is_some(), MTU),
            (self.pairs > 1, MQ),
            (self.can_change_mac, CTRL_MAC_ADDR),
            (csum, CSUM | GUEST_CSUM | CTRL_GUEST_OFFLOADS),
            // Section 5.1.3.1: the others need checksums.
            (csum && tso4, HOST_TSO4 | GUEST_TSO4),
            (csum && tso6, HOST_TSO6 | GUEST_TSO6),
            (csum && ecn && (tso4 || tso6), HOST_ECN | GUEST_ECN),
            (csum && uso4, GUEST_USO4),
            (csum && uso6, GUEST_USO6),
            (csum && uso4 && uso6, HOST_USO),
        ] {
            if has {
                features |= bits;
            }
        }
        features
    }
}

/// What the driver's feature bits, or the command's, let the link do.
pub(crate) fn guest_offloads(bits: u64) -> Offloads {
    // A driver that takes segments without checksums breaks a rule (section 5.1.3.1): it gets neither.
    if bits & GUEST_CSUM == 0 {
        return Offloads::NONE;
    }
    Offloads {
        csum: true,
        tso4: bits & GUEST_TSO4 != 0,
        tso6: bits & GUEST_TSO6 != 0,
        ecn: bits & GUEST_ECN != 0,
        uso4: bits & GUEST_USO4 != 0,
        uso6: bits & GUEST_USO6 != 0,
    }
}

/// All of it, as it is now.
pub(crate) fn bytes(
    mac: [u8; 6],
    link_is_up: bool,
    is_announcing: bool,
    pairs: u16,
    mtu: Option<u16>,
) -> [u8; LEN as usize] {
    let mut status = 0;
    if link_is_up {
        status |= STATUS_LINK_UP;
    }
    if is_announcing {
        status |= STATUS_ANNOUNCE;
    }
    let [m0, m1, m2, m3, m4, m5] = mac;
    let [s0, s1] = u16::to_le_bytes(status);
    let [p0, p1] = pairs.to_le_bytes();
    let [t0, t1] = mtu.unwrap_or(0).to_le_bytes();
    [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, t0, t1]
}
