//! One descriptor chain, copied out of guest memory once.

use alveole_guest_memory::VmMemory;
use virtio_queue::DescriptorChain;

use crate::BrokenRing;

/// Most descriptors in one chain. Abused by a guest that makes an indirect table of 65535 entries for each
/// of its descriptors: walking them would keep a thread from its other queues. As many as one `preadv`
/// takes, a header and a status byte.
pub const MAX_CHAIN_SEGMENTS: usize = 1026;

/// One buffer of a chain. The address is the guest's word: whoever uses it checks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A request as the driver made it available: what the device may read, then what it may write. Reused
/// from request to request, so that the hot path does not allocate.
#[derive(Debug, Default, Clone)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
}

impl Chain {
    /// An empty chain, to be filled by [`crate::LiveQueue::pop`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The index of its first descriptor: its name when it is completed.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read, in order.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or(&[])
    }

    /// What the device may write, in order.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or(&[])
    }

    /// Sum of the readable segments, in bytes; a chain is at most 2^32 long (section 2.7.5.2).
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        sum(self.readable())
    }

    /// Sum of the writable segments, in bytes.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        sum(self.writable())
    }

    /// Copies the descriptors of `from`.
    pub(crate) fn fill(&mut self, from: DescriptorChain<&VmMemory>) -> Result<(), BrokenRing> {
        self.head = from.head_index();
        self.segments.clear();
        self.readable = 0;
        let head = self.head;
        let mut goes_on = true;
        for descriptor in from {
            if self.segments.len() == MAX_CHAIN_SEGMENTS {
                return Err(BrokenRing::LongChain { head });
            }
            let is_writable = descriptor.is_write_only();
            if !is_writable {
                // Section 2.7.4.2: what the device writes comes last.
                if self.readable != self.segments.len() {
                    return Err(BrokenRing::MixedChain { head });
                }
                self.readable = self.readable.saturating_add(1);
            }
            self.segments.push(Segment {
                addr: descriptor.addr().0,
                len: descriptor.len(),
            });
            goes_on = descriptor.has_next();
        }
        // The walk ends early where a descriptor is outside memory or the table, where indirect tables
        // are nested or odd, where the chain is a circle, and where it passes 2^32 bytes.
        if goes_on {
            return Err(BrokenRing::EndlessChain { head });
        }
        Ok(())
    }
}

fn sum(segments: &[Segment]) -> u64 {
    segments
        .iter()
        .fold(0, |sum: u64, s| sum.saturating_add(u64::from(s.len)))
}
