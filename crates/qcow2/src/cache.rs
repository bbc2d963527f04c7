//! Slices of L2 tables in memory: what makes a look-up cheap.
//!
//! A slice is up to 512 entries (4 KiB). It lives in one of four places of the set that its number
//! chooses, and each set has a lock of its own: look-ups share it, and never wait for the file unless the
//! slice is missing. The cache writes nothing late: an entry goes to the file first, under the set's
//! lock, so what is cached is what the file says.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use crate::bytes::index;
use crate::error::ImageError;
use crate::geometry::Geometry;

/// Most bytes of L2 tables in memory, an image. A guest that jumps over a large disk would otherwise have
/// all of them: 256 MiB for 2 TiB. This much covers 64 GiB at a time in clusters of 64 KiB.
pub(crate) const MOST_CACHED_BYTES: usize = 8 << 20;
const WAYS: usize = 4;
const SETS: usize = MOST_CACHED_BYTES / 4096 / WAYS;

struct Slot {
    slice: u64,
    entries: Box<[u64]>,
    /// Looked at since the hand went by.
    used: AtomicBool,
}

#[derive(Default)]
struct Set {
    slots: [Option<Slot>; WAYS],
    hand: usize,
}

impl Set {
    fn find(&self, slice: u64) -> Option<&Slot> {
        self.slots.iter().flatten().find(|s| s.slice == slice)
    }

    /// An empty place, or that of a slice nobody looked at for a round.
    fn place(&mut self) -> Option<&mut Option<Slot>> {
        let free = self.slots.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            for _ in 0..WAYS {
                self.hand = self.hand.wrapping_add(1) % WAYS;
                let slot = self.slots.get(self.hand).and_then(Option::as_ref);
                if !slot.is_some_and(|s| s.used.swap(false, Ordering::Relaxed)) {
                    break;
                }
            }
            self.hand
        });
        self.slots.get_mut(at)
    }
}

/// The cache of one image.
pub(crate) struct SliceCache {
    sets: Box<[RwLock<Set>]>,
    geometry: Geometry,
}

impl SliceCache {
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self {
            sets: (0..SETS).map(|_| RwLock::default()).collect(),
            geometry,
        }
    }

    #[expect(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        reason = "the set's number is taken modulo the sets, of which there are some"
    )]
    fn set(&self, slice: u64) -> &RwLock<Set> {
        &self.sets[index(slice) % self.sets.len()]
    }

    /// Shows the slice if it is here.
    pub(crate) fn peek<R>(&self, slice: u64, look: impl FnOnce(&[u64]) -> R) -> Option<R> {
        let set = self
            .set(slice)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let slot = set.find(slice)?;
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some(look(&slot.entries))
    }

    /// Shows the slice, after `load` has filled it if it is not here; `load` says whether there is one.
    /// Meanwhile nobody else changes it.
    pub(crate) fn load<R>(
        &self,
        slice: u64,
        load: impl FnOnce(&mut [u64]) -> Result<bool, ImageError>,
        look: impl FnOnce(Option<&[u64]>) -> R,
    ) -> Result<R, ImageError> {
        let mut set = self
            .set(slice)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = set.find(slice) {
            return Ok(look(Some(&slot.entries)));
        }
        let len = index(self.geometry.slice_entries());
        let mut entries = vec![0; len].into_boxed_slice();
        if !load(&mut entries)? {
            return Ok(look(None));
        }
        let result = look(Some(&entries));
        if let Some(place) = set.place() {
            *place = Some(Slot {
                slice,
                entries,
                used: AtomicBool::new(true),
            });
        }
        Ok(result)
    }

    /// Changes entries of a slice from `at` on: `write` puts them into the file, then the copy here
    /// follows. If the file fails, what it holds now is unknown and will be read again.
    pub(crate) fn update(
        &self,
        slice: u64,
        at: usize,
        entries: &[u64],
        write: impl FnOnce() -> Result<(), ImageError>,
    ) -> Result<(), ImageError> {
        let mut set = self
            .set(slice)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let written = write();
        for place in &mut set.slots {
            let Some(slot) = place.as_mut().filter(|s| s.slice == slice) else {
                continue;
            };
            let into = at
                .checked_add(entries.len())
                .and_then(|end| slot.entries.get_mut(at..end));
            match (&written, into) {
                (Ok(()), Some(into)) => into.copy_from_slice(entries),
                _ => *place = None,
            }
        }
        written
    }

    /// Forgets everything.
    pub(crate) fn clear(&self) {
        for set in &self.sets {
            *set.write().unwrap_or_else(PoisonError::into_inner) = Set::default();
        }
    }
}
