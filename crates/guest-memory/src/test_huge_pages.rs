//! For tests: pages of hugetlbfs, which a host has none of unless somebody asks for them.

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::HugePagePool;
use crate::test_server::skip;

const TOTAL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// The pool is the host's: tests of one process change it one after the other.
static CHANGING: Mutex<()> = Mutex::new(());

/// Pages that the pool has more, for as long as this lives.
#[derive(Debug)]
pub struct MorePages(u64);

impl MorePages {
    /// Has the host make `count` pages of 2 MiB more than are free. If it does not, says aloud and counts that `test` is skipped.
    #[must_use]
    pub fn make(test: &str, count: u64) -> Option<Self> {
        match change(|total| total.saturating_add(count)) {
            Ok(()) => {}
            Err(why) => {
                skip(
                    test,
                    &format!("this host makes no huge pages of 2 MiB: {why}"),
                );
                return None;
            }
        }
        let more = Self(count);
        let free = HugePagePool::read().map_or(0, |pool| pool.free);
        if free < count {
            drop(more);
            let why = format!("the host made {free} huge pages of 2 MiB, {count} are needed");
            skip(test, &why);
            return None;
        }
        Some(more)
    }
}

impl Drop for MorePages {
    fn drop(&mut self) {
        let _ = change(|total| total.saturating_sub(self.0));
    }
}

/// Sets how many pages the pool has.
fn change(to: impl FnOnce(u64) -> u64) -> io::Result<()> {
    let _alone = CHANGING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = Path::new(TOTAL);
    let total: u64 = std::fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    std::fs::write(path, to(total).to_string())
}
