use std::fs::File;
use std::num::NonZeroU64;

use rustix::fs::{Advice, fadvise};

/// So much is written before the host is asked to write it out: each time costs a system call and the start of a few writes.
const STEP: u64 = 8 << 20;

/// Has the host write a file out while more is written to it from its start to its end, so that the wait for all of it in the end is short.
/// It promises nothing: only a sync does.
#[derive(Debug, Default)]
pub struct WriteOut {
    asked: u64,
}

impl WriteOut {
    /// Tells that the file is written up to `end`, an offset in bytes.
    pub fn written(&mut self, file: &File, end: u64) {
        let len = end.saturating_sub(self.asked);
        if len < STEP {
            return;
        }
        // Linux begins to write what of the range is dirty, and then drops what of it is clean, which nothing is yet (mm/fadvise.c).
        // sync_file_range(2) would say it plainer, and takes `unsafe`. A host that does not understand is as good.
        let _ = fadvise(file, self.asked, NonZeroU64::new(len), Advice::DontNeed);
        self.asked = end;
    }
}
