//! Aligned memory that stands in for buffers which `O_DIRECT` does not take.

/// Bytes of one area: a longer transfer goes through several.
pub(crate) const AREA_BYTES: usize = 256 << 10;
/// Most areas of one queue: a guest whose buffers are all unaligned holds no more memory than this.
pub(crate) const MAX_AREAS: usize = 8;
/// Largest alignment that an area can have.
pub(crate) const MAX_ALIGNMENT: u32 = 16 << 10;

/// `AREA_BYTES` that start at a multiple of [`MAX_ALIGNMENT`].
#[derive(Debug)]
pub(crate) struct Area {
    bytes: Box<[u8]>,
    start: usize,
}

impl Area {
    pub(crate) fn new() -> Self {
        let bytes = vec![0_u8; AREA_BYTES + MAX_ALIGNMENT as usize].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(MAX_ALIGNMENT as usize);
        // `align_offset` may give up where it cannot know; it does not at run time.
        debug_assert!(start < MAX_ALIGNMENT as usize);
        Self {
            bytes,
            start: start.min(MAX_ALIGNMENT as usize),
        }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + AREA_BYTES]
    }

    pub(crate) fn shared_bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + AREA_BYTES]
    }
}

/// The areas of one queue: made when first needed, kept afterwards.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Vec<Area>,
    made: usize,
}

impl Pool {
    pub(crate) fn take(&mut self) -> Option<Area> {
        if let Some(area) = self.free.pop() {
            return Some(area);
        }
        (self.made < MAX_AREAS).then(|| {
            self.made += 1;
            Area::new()
        })
    }

    pub(crate) fn give_back(&mut self, area: Area) {
        self.free.push(area);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_aligned_and_bounded() {
        let mut pool = Pool::default();
        let mut areas: Vec<Area> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(areas.len(), MAX_AREAS);
        for area in &mut areas {
            assert_eq!(area.bytes().len(), AREA_BYTES);
            assert!((area.bytes().as_ptr() as usize).is_multiple_of(MAX_ALIGNMENT as usize));
        }
        pool.give_back(areas.pop().expect("there are some"));
        assert!(pool.take().is_some() && pool.take().is_none());
    }
}
