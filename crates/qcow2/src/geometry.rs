//! Where things lie: the arithmetic of clusters and tables. Everything here is total.

/// Host offsets in tables have 56 bits.
pub(crate) const MOST_HOST_OFFSET: u64 = 1 << 56;
/// Entries of a slice of an L2 table: what is read and cached at once.
const MOST_SLICE_BITS: u32 = 9;

/// The two numbers that shape an image. `cluster_bits` is 9..=21, `refcount_order` at most 6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
}

impl Geometry {
    pub(crate) fn cluster_size(self) -> u64 {
        1_u64.wrapping_shl(self.cluster_bits)
    }

    pub(crate) fn cluster_len(self) -> usize {
        1_usize.wrapping_shl(self.cluster_bits)
    }

    /// Which cluster `offset` lies in.
    pub(crate) fn index(self, offset: u64) -> u64 {
        offset.wrapping_shr(self.cluster_bits)
    }

    /// How far into its cluster `offset` lies.
    pub(crate) fn within(self, offset: u64) -> u64 {
        offset & !self.mask()
    }

    pub(crate) fn floor(self, offset: u64) -> u64 {
        offset & self.mask()
    }

    /// The next boundary at or after `offset`; the last one there is if it would wrap.
    pub(crate) fn ceil(self, offset: u64) -> u64 {
        match self.within(offset) {
            0 => offset,
            _ => self
                .floor(offset)
                .checked_add(self.cluster_size())
                .unwrap_or(self.mask()),
        }
    }

    /// Offset of cluster `index`.
    pub(crate) fn offset(self, index: u64) -> u64 {
        index.saturating_mul(self.cluster_size())
    }

    /// How many clusters hold `bytes`.
    pub(crate) fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    pub(crate) fn is_aligned(self, offset: u64) -> bool {
        self.within(offset) == 0
    }

    fn mask(self) -> u64 {
        u64::MAX.wrapping_shl(self.cluster_bits)
    }

    fn l2_bits(self) -> u32 {
        self.cluster_bits.saturating_sub(3)
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(self) -> u64 {
        1_u64.wrapping_shl(self.l2_bits())
    }

    /// Which L1 entry guest cluster `cluster` belongs to.
    pub(crate) fn l1_index(self, cluster: u64) -> u64 {
        cluster.wrapping_shr(self.l2_bits())
    }

    /// Which entry of its L2 table guest cluster `cluster` has.
    pub(crate) fn l2_index(self, cluster: u64) -> u64 {
        cluster & self.l2_entries().wrapping_sub(1)
    }

    /// How many L1 entries a disk of `bytes` needs.
    pub(crate) fn l1_entries(self, bytes: u64) -> u64 {
        self.clusters(bytes).div_ceil(self.l2_entries())
    }

    fn slice_bits(self) -> u32 {
        self.l2_bits().min(MOST_SLICE_BITS)
    }

    pub(crate) fn slice_entries(self) -> u64 {
        1_u64.wrapping_shl(self.slice_bits())
    }

    /// Which slice guest cluster `cluster` belongs to.
    pub(crate) fn slice(self, cluster: u64) -> u64 {
        cluster.wrapping_shr(self.slice_bits())
    }

    pub(crate) fn slice_index(self, cluster: u64) -> usize {
        crate::bytes::index(cluster & self.slice_entries().wrapping_sub(1))
    }

    /// First guest cluster of a slice.
    pub(crate) fn slice_start(self, slice: u64) -> u64 {
        slice.wrapping_shl(self.slice_bits())
    }

    /// Counts in a refcount block.
    pub(crate) fn block_entries(self) -> u64 {
        1_u64.wrapping_shl(
            self.cluster_bits
                .saturating_add(3)
                .saturating_sub(self.refcount_order),
        )
    }

    /// The highest count that a refcount entry holds.
    pub(crate) fn most_references(self) -> u64 {
        let bits = 1_u32.wrapping_shl(self.refcount_order);
        u64::MAX.wrapping_shr(64_u32.saturating_sub(bits))
    }
}
