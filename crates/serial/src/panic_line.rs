//! Remembers what a guest's kernel said when it panicked.
//!
//! Only a hint: anything in a guest that can write to the console can say the same.

use std::sync::{Arc, Mutex, PoisonError};

const SAYS: &[u8] = b"Kernel panic - not syncing";
/// Bytes kept of one line. Abused by a guest that never ends its line.
const LINE_BYTES: usize = 256;

#[derive(Debug, Clone, Default)]
pub(crate) struct PanicLine(Arc<Mutex<Option<String>>>);

impl PanicLine {
    pub(crate) fn get(&self) -> Option<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, said: String) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
    }
}

/// Sees each byte of output: one store per byte, one search per line.
#[derive(Debug)]
pub(crate) struct LineWatch {
    line: [u8; LINE_BYTES],
    len: usize,
    found: PanicLine,
}

impl LineWatch {
    pub(crate) fn new(found: PanicLine) -> Self {
        Self {
            line: [0; LINE_BYTES],
            len: 0,
            found,
        }
    }

    pub(crate) fn see(&mut self, byte: u8) {
        if byte == b'\n' {
            self.end_of_line();
            self.len = 0;
        } else if let Some(slot) = self.line.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
    }

    fn end_of_line(&self) {
        let line = self.line.get(..self.len).unwrap_or_default();
        let Some(at) = line.windows(SAYS.len()).position(|w| w == SAYS) else {
            return;
        };
        let (before, said) = line.split_at(at);
        // "---[ end Kernel panic - not syncing: why ]---" repeats what was said before it.
        if before.ends_with(b"---[ end ") && self.found.get().is_some() {
            return;
        }
        let printable = |&b: &u8| {
            if (b' '..=b'~').contains(&b) {
                char::from(b)
            } else {
                '?'
            }
        };
        let said: String = said.trim_ascii_end().iter().map(printable).collect();
        self.found.set(said);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(output: &[u8]) -> Option<String> {
        let found = PanicLine::default();
        let mut watch = LineWatch::new(found.clone());
        output.iter().for_each(|&b| watch.see(b));
        found.get()
    }

    #[test]
    fn the_line_is_found_without_its_time_stamp() {
        let output = b"ok\r\n[    0.1] Kernel panic - not syncing: VFS: no root\r\n\
                       [    0.2] ---[ end Kernel panic - not syncing: VFS: no root ]---\r\n";
        assert_eq!(
            after(output).unwrap(),
            "Kernel panic - not syncing: VFS: no root"
        );
    }

    #[test]
    fn other_output_is_not_a_panic() {
        assert_eq!(after(b"Kernel panic\nnot syncing\n"), None);
        assert_eq!(after(b"Kernel panic - not syncing: unfinished"), None);
        assert_eq!(after(&[b'x'; 10_000]), None);
    }

    #[test]
    fn control_characters_do_not_reach_the_log() {
        let said = after(b"Kernel panic - not syncing: \x1b[2J\xff\n").unwrap();
        assert_eq!(said, "Kernel panic - not syncing: ?[2J?");
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut output = b"Kernel panic - not syncing: ".to_vec();
        output.extend([b'A'; 9000]);
        output.push(b'\n');
        assert_eq!(after(&output).unwrap().len(), LINE_BYTES);
    }
}
