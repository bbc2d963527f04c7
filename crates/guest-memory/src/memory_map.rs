//! Which pages a memory file holds, and which of several files is the newest for each. Pure arithmetic.
//!
//! A memory file has page `n` of RAM at offset `n * 4096`, all ranges of RAM one after the other (Firecracker's
//! memory files are laid out the same way). What is a hole in the file is either a page of zeroes or one that the
//! file does not have, because it did not change: only the map tells these apart.

use serde::{Deserialize, Serialize};

use crate::{MAX_SIZE_BYTES, PAGE_SIZE, PageSet};

/// Most pages RAM can have.
const MAX_PAGES: u64 = MAX_SIZE_BYTES / PAGE_SIZE;
/// Most files that make up one memory. A chain that grows by one with each snapshot must be flattened before.
pub const MAX_LAYERS: usize = 256;

/// What a run of pages holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageKind {
    /// The bytes that are in the file.
    Data,
    /// Zeroes; the file has a hole there.
    Zero,
}

/// Pages in a row that a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// First page, counted through all ranges of RAM.
    pub first_page: u64,
    /// How many pages, at least one.
    pub pages: u64,
    /// What they hold.
    pub kind: PageKind,
}

impl PageRun {
    fn end(&self) -> u64 {
        self.first_page.saturating_add(self.pages)
    }
}

/// Why a map is none.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryMapError {
    /// A run of no page.
    #[error("run {index} of the memory map, at page {first_page}, has no page")]
    Empty {
        /// Which run.
        index: usize,
        /// Where it is.
        first_page: u64,
    },
    /// A run that ends behind all memory.
    #[error(
        "run {index} of the memory map, pages {first_page}+{pages}, ends behind page {MAX_PAGES}, the last that a guest can have"
    )]
    TooFar {
        /// Which run.
        index: usize,
        /// Its first page.
        first_page: u64,
        /// Its pages.
        pages: u64,
    },
    /// A run that begins before the one before it has ended.
    #[error(
        "run {index} of the memory map begins at page {first_page}, the one before it ends at page {before}: runs must be in order and not overlap"
    )]
    Overlap {
        /// Which run.
        index: usize,
        /// Its first page.
        first_page: u64,
        /// Where the one before it ends.
        before: u64,
    },
    /// A map of more memory than there is.
    #[error(
        "the memory map of layer {layer} names page {page}, the guest has {pages} pages of memory"
    )]
    Outside {
        /// Which layer, the oldest being 0.
        layer: usize,
        /// Last page it names.
        page: u64,
        /// Pages there are.
        pages: u64,
    },
    /// A page that no file has.
    #[error(
        "no memory file holds page {page}: the oldest of a chain must hold all {pages}; is the first file of the chain missing?"
    )]
    Missing {
        /// The first such page.
        page: u64,
        /// Pages there are.
        pages: u64,
    },
    /// Too many files.
    #[error("{0} memory files make up one memory, at most {MAX_LAYERS} can: flatten the chain")]
    Layers(usize),
}

/// Which pages a memory file holds: runs in order that do not overlap. Read from a file that anybody may have
/// written, it is checked, and no larger than what was read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<PageRun>", into = "Vec<PageRun>")]
pub struct MemoryMap {
    runs: Vec<PageRun>,
}

impl TryFrom<Vec<PageRun>> for MemoryMap {
    type Error = MemoryMapError;

    fn try_from(runs: Vec<PageRun>) -> Result<Self, MemoryMapError> {
        let mut before = 0;
        for (index, run) in runs.iter().enumerate() {
            let PageRun {
                first_page, pages, ..
            } = *run;
            if pages == 0 {
                return Err(MemoryMapError::Empty { index, first_page });
            }
            if run.end() > MAX_PAGES {
                return Err(MemoryMapError::TooFar {
                    index,
                    first_page,
                    pages,
                });
            }
            if first_page < before {
                return Err(MemoryMapError::Overlap {
                    index,
                    first_page,
                    before,
                });
            }
            before = run.end();
        }
        Ok(Self { runs })
    }
}

impl From<MemoryMap> for Vec<PageRun> {
    fn from(map: MemoryMap) -> Self {
        map.runs
    }
}

impl MemoryMap {
    /// The map of a file that holds `held`, of which `data` are in the file and the others zeroes.
    pub(crate) fn of_sets(held: &PageSet, data: &PageSet) -> Self {
        let mut map = Self::default();
        let mut data_runs = data.runs().peekable();
        for run in held.runs() {
            let mut at = run.start;
            while let Some(next) = data_runs.next_if(|d| d.start < run.end) {
                map.add(at, next.start, PageKind::Zero);
                map.add(next.start, next.end, PageKind::Data);
                at = next.end;
            }
            map.add(at, run.end, PageKind::Zero);
        }
        map
    }

    fn add(&mut self, first_page: u64, end: u64, kind: PageKind) {
        if end > first_page {
            self.runs.push(PageRun {
                first_page,
                pages: end - first_page,
                kind,
            });
        }
    }

    /// The runs, in order.
    #[must_use]
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// How many pages of `kind` there are.
    #[must_use]
    pub fn pages_of(&self, kind: PageKind) -> u64 {
        let of_kind = self.runs.iter().filter(|r| r.kind == kind);
        of_kind.map(|r| r.pages).sum()
    }
}

/// Pages in a row whose newest content one layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerRun {
    /// Which layer, the oldest being 0.
    pub layer: usize,
    /// Which pages, and what they are there.
    pub run: PageRun,
}

/// For each of `pages` pages the newest of `layers` (oldest first) that holds it, in order and without a gap.
///
/// # Errors
/// More than [`MAX_LAYERS`] layers, a page that is not in RAM, or one that no layer holds.
pub fn newest_of_layers(
    pages: u64,
    layers: &[&MemoryMap],
) -> Result<Vec<LayerRun>, MemoryMapError> {
    if layers.len() > MAX_LAYERS {
        return Err(MemoryMapError::Layers(layers.len()));
    }
    let mut merged: Vec<LayerRun> = Vec::new();
    for (layer, map) in layers.iter().enumerate() {
        if let Some(last) = map.runs.last().filter(|last| last.end() > pages) {
            return Err(MemoryMapError::Outside {
                layer,
                page: last.end() - 1,
                pages,
            });
        }
        merged = overlaid(&merged, layer, &map.runs);
    }
    let mut at = 0;
    for LayerRun { run, .. } in &merged {
        if run.first_page != at {
            break;
        }
        at = run.end();
    }
    if at != pages {
        return Err(MemoryMapError::Missing { page: at, pages });
    }
    Ok(merged)
}

/// `below` with the runs of a newer layer over it; both in order.
fn overlaid(below: &[LayerRun], layer: usize, newer: &[PageRun]) -> Vec<LayerRun> {
    let mut out = Vec::with_capacity(below.len() + newer.len());
    let mut first = 0;
    for old in below {
        let (mut at, end) = (old.run.first_page, old.run.end());
        let mut keep = |from: u64, to: u64| {
            if from < to {
                let run = PageRun {
                    first_page: from,
                    pages: to - from,
                    ..old.run
                };
                out.push(LayerRun { run, ..*old });
            }
        };
        while let Some(over) = newer.get(first).filter(|over| over.first_page < end) {
            keep(at, over.first_page);
            at = at.max(over.end());
            if over.end() > end {
                break;
            }
            first += 1;
        }
        keep(at, end);
    }
    out.extend(newer.iter().map(|run| LayerRun { layer, run: *run }));
    // Both parts are in order, which the sort makes use of.
    out.sort_by_key(|l| l.run.first_page);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(first_page: u64, pages: u64, kind: PageKind) -> PageRun {
        PageRun {
            first_page,
            pages,
            kind,
        }
    }

    /// Maps as files of snapshots have them, from what each page is there: 0 not held, 1 zero, 2 data.
    fn map_of(pages: &[u8]) -> MemoryMap {
        let mut held = PageSet::none(pages.len() as u64);
        let mut data = PageSet::none(pages.len() as u64);
        for (page, what) in (0..).zip(pages) {
            if *what > 0 {
                held.insert(page..page + 1);
            }
            if *what > 1 {
                data.insert(page..page + 1);
            }
        }
        MemoryMap::of_sets(&held, &data)
    }

    proptest! {
        #[test]
        fn a_map_is_what_it_was_made_of(pages in proptest::collection::vec(0u8..3, 1..300)) {
            let map = map_of(&pages);
            let mut back = vec![0; pages.len()];
            for run in map.runs() {
                let what = if run.kind == PageKind::Data { 2 } else { 1 };
                back[run.first_page as usize..run.end() as usize].fill(what);
            }
            prop_assert_eq!(&back, &pages);
            let json = serde_json::to_string(&map).unwrap();
            prop_assert_eq!(serde_json::from_str::<MemoryMap>(&json).unwrap(), map);
        }

        #[test]
        fn the_newest_layer_wins_on_each_page(
            base in proptest::collection::vec(1u8..3, 200),
            above in proptest::collection::vec(proptest::collection::vec(0u8..3, 200), 0..4),
        ) {
            let mut want: Vec<_> = base.iter().map(|what| (0, *what)).collect();
            for (layer, pages) in (1..).zip(&above) {
                for (page, what) in pages.iter().enumerate().filter(|(_, w)| **w > 0) {
                    want[page] = (layer, *what);
                }
            }
            let maps: Vec<_> = std::iter::once(&base).chain(&above).map(|p| map_of(p)).collect();
            let maps: Vec<_> = maps.iter().collect();
            let mut got = Vec::new();
            for LayerRun { layer, run } in newest_of_layers(200, &maps).unwrap() {
                prop_assert_eq!(run.first_page, got.len() as u64);
                let what = if run.kind == PageKind::Data { 2 } else { 1 };
                got.extend(std::iter::repeat_n((layer, what), run.pages as usize));
            }
            prop_assert_eq!(got, want);
        }

        #[test]
        fn no_map_is_read_that_is_none(
            runs in proptest::collection::vec((0u64..50, 0u64..5, any::<bool>()), 0..6),
        ) {
            let kind = |data| if data { PageKind::Data } else { PageKind::Zero };
            let runs: Vec<_> = runs.into_iter().map(|(f, n, d)| run(f, n, kind(d))).collect();
            let good = runs.iter().all(|r| r.pages > 0)
                && runs.windows(2).all(|w| w[0].end() <= w[1].first_page);
            prop_assert_eq!(MemoryMap::try_from(runs).is_ok(), good);
        }
    }

    #[test]
    fn hostile_maps_are_refused_in_words() {
        let read = |json: &str| {
            serde_json::from_str::<MemoryMap>(json)
                .unwrap_err()
                .to_string()
        };
        for (json, word) in [
            (
                r#"[{"first_page":3,"pages":0,"kind":"data"}]"#,
                "has no page",
            ),
            (
                r#"[{"first_page":3,"pages":4,"kind":"data"},{"first_page":6,"pages":1,"kind":"zero"}]"#,
                "not overlap",
            ),
            (
                r#"[{"first_page":9,"pages":1,"kind":"data"},{"first_page":2,"pages":1,"kind":"zero"}]"#,
                "in order",
            ),
            (
                r#"[{"first_page":18446744073709551615,"pages":18446744073709551615,"kind":"data"}]"#,
                "ends behind page",
            ),
            (
                r#"[{"first_page":0,"pages":4294967297,"kind":"data"}]"#,
                "ends behind page",
            ),
            (r#"[{"first_page":0,"pages":1,"kind":"secret"}]"#, "secret"),
        ] {
            let e = read(json);
            assert!(e.contains(word), "{e}");
        }
    }

    #[test]
    fn layers_that_make_no_memory_are_refused_in_words() {
        let full = MemoryMap::try_from(vec![run(0, 10, PageKind::Data)]).unwrap();
        let gap = MemoryMap::try_from(vec![run(0, 4, PageKind::Data), run(5, 5, PageKind::Zero)])
            .unwrap();
        let e = newest_of_layers(9, &[&full]).unwrap_err();
        assert!(e.to_string().contains("names page 9"), "{e}");
        let e = newest_of_layers(10, &[&gap]).unwrap_err();
        assert!(e.to_string().contains("holds page 4"), "{e}");
        assert_eq!(
            newest_of_layers(10, &[]).unwrap_err(),
            MemoryMapError::Missing { page: 0, pages: 10 }
        );
        newest_of_layers(10, &[&gap, &full]).unwrap();
        let many = vec![&full; MAX_LAYERS + 1];
        let e = newest_of_layers(10, &many).unwrap_err();
        assert!(e.to_string().contains("flatten"), "{e}");
    }
}
