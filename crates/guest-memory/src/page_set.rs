//! Sets of pages of one guest's RAM. Pure arithmetic; touches no memory of a guest.
//!
//! Pages are counted through all ranges as if these lay one after the other: with RAM below the 32-bit hole
//! and behind it, the first page behind the hole follows the last one below it.

use std::ops::Range;

/// Why a set of pages cannot be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PageSetError {
    /// Not one bitmap for each range of RAM.
    #[error("{given} bitmaps of pages for {ranges} ranges of guest memory: give one for each")]
    Ranges {
        /// How many there are.
        given: usize,
        /// How many ranges there are.
        ranges: usize,
    },
    /// A bitmap that is too short for its range.
    #[error(
        "the bitmap of range {range} has {given} words of 64 pages, its {pages} pages need {}",
        pages.div_ceil(64)
    )]
    Short {
        /// Which range.
        range: usize,
        /// Words that are there.
        given: usize,
        /// Pages of the range.
        pages: u64,
    },
    /// A page behind the end of RAM.
    #[error("pages {first}+{count} are not all among the {pages} pages of guest memory")]
    Outside {
        /// First page.
        first: u64,
        /// How many.
        count: u64,
        /// Pages there are.
        pages: u64,
    },
}

/// Which pages of one guest's RAM: one bit for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    /// Bit `n % 64` of word `n / 64` is page `n`; bits behind the last page are clear.
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// No page of a RAM of `pages` pages ([`crate::GuestRam::pages`]).
    #[must_use]
    pub fn none(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            words: vec![0; words],
            pages,
        }
    }

    /// All pages of a RAM of `pages` pages.
    #[must_use]
    pub fn all(pages: u64) -> Self {
        let mut set = Self::none(pages);
        set.words.fill(u64::MAX);
        set.clear_tail();
        set
    }

    /// Makes one set of a bitmap for each range, in order: bit `n % 64` of word `n / 64` is page `n` of the range,
    /// as `KVM_GET_DIRTY_LOG` gives them (Linux Documentation/virt/kvm/api.rst). `range_pages` are the pages of
    /// each range. Bits behind the end of a range are ignored.
    ///
    /// # Errors
    /// Not one bitmap for each range, or one is too short.
    pub fn from_bitmaps(range_pages: &[u64], bitmaps: &[Vec<u64>]) -> Result<Self, PageSetError> {
        if range_pages.len() != bitmaps.len() {
            return Err(PageSetError::Ranges {
                given: bitmaps.len(),
                ranges: range_pages.len(),
            });
        }
        let mut set = Self::none(range_pages.iter().sum());
        let mut first = 0;
        for (range, (pages, words)) in range_pages.iter().zip(bitmaps).enumerate() {
            if (words.len() as u64) < pages.div_ceil(64) {
                return Err(PageSetError::Short {
                    range,
                    given: words.len(),
                    pages: *pages,
                });
            }
            set.insert_words(first, *pages, words);
            first += pages;
        }
        Ok(set)
    }

    /// Makes a set of runs of pages, in any order.
    ///
    /// # Errors
    /// A run is not among the `pages` pages. The set is small whatever the runs say.
    pub fn from_runs(
        pages: u64,
        runs: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<Self, PageSetError> {
        let mut set = Self::none(pages);
        for run in runs {
            if run.end > pages || run.start > run.end {
                return Err(PageSetError::Outside {
                    first: run.start,
                    count: run.end.saturating_sub(run.start),
                    pages,
                });
            }
            set.insert(run);
        }
        Ok(set)
    }

    /// How many pages the RAM has, in the set or not.
    #[must_use]
    pub fn ram_pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Whether `page` is in it.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|w| w >> (page % 64) & 1 == 1)
    }

    /// Whether one of `pages` is in it.
    #[must_use]
    pub fn touches(&self, pages: &Range<u64>) -> bool {
        self.next(pages.start, true)
            .is_some_and(|page| page < pages.end)
    }

    /// How many of `pages`, which begin and end at multiples of 64 or behind the last one, are in it.
    pub(crate) fn count_in(&self, pages: &Range<u64>) -> u64 {
        let words = self.words.get(self.words_of(pages)).unwrap_or_default();
        words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Adds those of `pages`, which begin and end at multiples of 64 or behind the last one, that are in `other`.
    pub(crate) fn insert_of(&mut self, other: &Self, pages: &Range<u64>) {
        for at in self.words_of(pages) {
            self.words[at] |= other.words.get(at).copied().unwrap_or_default();
        }
    }

    fn words_of(&self, pages: &Range<u64>) -> Range<usize> {
        let end = ((pages.end / 64) as usize).min(self.words.len());
        (pages.start / 64) as usize..end
    }

    /// Adds pages; what is behind the end of RAM is ignored.
    pub fn insert(&mut self, run: Range<u64>) {
        let end = run.end.min(self.pages);
        let mut at = run.start;
        while at < end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let now = (64 - bit).min(end - at);
            self.words[word] |= (u64::MAX >> (64 - now)) << bit;
            at += now;
        }
    }

    /// Takes pages out.
    pub fn remove(&mut self, run: Range<u64>) {
        let end = run.end.min(self.pages);
        let mut at = run.start;
        while at < end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let now = (64 - bit).min(end - at);
            self.words[word] &= !((u64::MAX >> (64 - now)) << bit);
            at += now;
        }
    }

    /// Adds all pages of `other`, which is of the same RAM.
    ///
    /// # Panics
    /// It is of a RAM of another size: a mistake of the caller.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of different RAM");
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// The runs of pages in it: in order, none empty, none touching the next. Allocates nothing.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            let end = self.next(start, false).unwrap_or(self.pages);
            at = end;
            Some(start..end)
        })
    }

    /// As [`Self::runs`], of those among `pages`.
    pub fn runs_in(&self, pages: &Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let (mut at, last) = (pages.start, pages.end.min(self.pages));
        std::iter::from_fn(move || {
            let start = self.next(at, true).filter(|start| *start < last)?;
            let end = self.next(start, false).unwrap_or(last).min(last);
            at = end;
            Some(start..end)
        })
    }

    /// The first page from `from` on that is in the set, or (`wanted` false) that is not.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let flip = if wanted { 0 } else { u64::MAX };
        let mut word = (from / 64) as usize;
        let mut bits = (self.words[word] ^ flip) & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = self.words.get(word)? ^ flip;
        }
        let page = word as u64 * 64 + u64::from(bits.trailing_zeros());
        (page < self.pages).then_some(page)
    }

    /// Adds what is set among the first `pages` bits of `words`, at page `first` on.
    pub(crate) fn insert_words(&mut self, first: u64, pages: u64, words: &[u64]) {
        let (into, shift) = ((first / 64) as usize, first % 64);
        let used = pages.div_ceil(64);
        for (i, word) in (0..used).zip(words) {
            let left = pages - i * 64;
            let word = if left < 64 {
                word & (u64::MAX >> (64 - left))
            } else {
                *word
            };
            if word == 0 {
                continue;
            }
            let at = into + i as usize;
            self.words[at] |= word << shift;
            // Nothing is carried where no page is left to carry: the word behind may not exist.
            if shift != 0 && word >> (64 - shift) != 0 {
                self.words[at + 1] |= word >> (64 - shift);
            }
        }
        self.clear_tail();
    }

    fn clear_tail(&mut self) {
        if let (Some(last), tail @ 1..) = (self.words.last_mut(), self.pages % 64) {
            *last &= u64::MAX >> (64 - tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_what_was_put_in(bits in proptest::collection::vec(any::<bool>(), 1..400)) {
            let mut set = PageSet::none(bits.len() as u64);
            for (page, _) in (0..).zip(&bits).filter(|(_, b)| **b) {
                set.insert(page..page + 1);
            }
            let mut back = vec![false; bits.len()];
            let mut end = None;
            for run in set.runs() {
                prop_assert!(run.start < run.end && end.is_none_or(|e| e < run.start));
                end = Some(run.end);
                back[run.start as usize..run.end as usize].fill(true);
            }
            prop_assert_eq!(&back, &bits);
            prop_assert_eq!(set.count(), bits.iter().filter(|b| **b).count() as u64);
            prop_assert_eq!(set.is_empty(), set.count() == 0);
            let (low, high) = (bits.len() as u64 / 3, bits.len() as u64 * 2 / 3);
            let within: Vec<u64> = set.runs_in(&(low..high)).flatten().collect();
            let want: Vec<u64> = set.runs().flatten().filter(|p| (low..high).contains(p)).collect();
            prop_assert_eq!(within, want);
            let again = PageSet::from_runs(set.ram_pages(), set.runs()).unwrap();
            prop_assert_eq!(&again, &set);
            for (page, bit) in (0..).zip(&bits) {
                prop_assert_eq!(set.contains(page), *bit);
            }
            let runs: Vec<_> = set.runs().collect();
            for run in runs {
                set.remove(run);
            }
            prop_assert!(set.is_empty());
        }

        #[test]
        fn bitmaps_of_ranges_are_laid_one_behind_the_other(
            sizes in proptest::collection::vec(1u64..200, 1..4),
            seed in any::<u64>(),
        ) {
            let mut random = seed;
            let mut want = PageSet::none(sizes.iter().sum());
            let mut bitmaps = Vec::new();
            let mut first = 0;
            for pages in &sizes {
                let words: Vec<u64> = (0..pages.div_ceil(64)).map(|_| {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    random ^ random << 32
                }).collect();
                for page in 0..*pages {
                    if words[(page / 64) as usize] >> (page % 64) & 1 == 1 {
                        want.insert(first + page..first + page + 1);
                    }
                }
                first += pages;
                bitmaps.push(words);
            }
            prop_assert_eq!(PageSet::from_bitmaps(&sizes, &bitmaps).unwrap(), want);
        }
    }

    #[test]
    fn all_is_all_and_nothing_behind_it() {
        for pages in [1, 63, 64, 65, 128, 1000] {
            let all = PageSet::all(pages);
            assert_eq!(all.count(), pages);
            assert!(all.runs().eq(std::iter::once(0..pages)));
            let mut none = PageSet::none(pages);
            assert_eq!(none.runs().count(), 0);
            none.insert(0..u64::MAX);
            assert_eq!(none, all);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        let e = PageSet::from_bitmaps(&[65], &[vec![1]]).unwrap_err();
        assert!(e.to_string().contains("65 pages need 2"), "{e}");
        let e = PageSet::from_bitmaps(&[65], &[]).unwrap_err();
        assert!(e.to_string().contains("0 bitmaps"), "{e}");
        #[expect(clippy::reversed_empty_ranges, reason = "what a file may say")]
        for run in [0..11, 10..12, u64::MAX..u64::MAX, 5..3] {
            let e = PageSet::from_runs(10, [run]).unwrap_err();
            assert!(e.to_string().contains("10 pages of guest memory"), "{e}");
        }
    }
}
