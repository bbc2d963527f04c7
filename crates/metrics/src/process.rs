//! What the host's kernel knows of this process: opened before the sandbox closes, read afterwards.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::Path;

/// Longest file that is read: `smaps_rollup` has some 30 lines.
const MOST_BYTES: u64 = 8192;

/// Files of `/proc` about this process and its threads. Where there is no `/proc`, as in a jail, there are none.
#[derive(Debug, Default)]
pub struct Process {
    statm: Option<File>,
    smaps_rollup: Option<File>,
    threads: Vec<(String, File)>,
    page_bytes: u64,
}

/// What is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    /// In RAM, in bytes.
    pub resident_bytes: Option<u64>,
    /// The same with what is shared divided among those who share it, in bytes.
    pub proportional_bytes: Option<u64>,
    /// The threads that there were at the opening.
    pub threads: Vec<ThreadFacts>,
}

/// What is known of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadFacts {
    /// Its name.
    pub name: String,
    /// Time that it has run, in nanoseconds.
    pub cpu_ns: u64,
    /// Time that it was ready to run and did not, in nanoseconds.
    pub waiting_ns: u64,
}

impl Process {
    /// Opens what there is, for the threads that there are. `page_bytes`: how large a page is.
    #[must_use]
    pub fn open(page_bytes: u64) -> Self {
        let own = Path::new("/proc/self");
        let mut threads: Vec<(u32, String, File)> = Vec::new();
        for entry in fs::read_dir(own.join("task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let at = entry.path();
            let id = entry.file_name().to_str().and_then(|id| id.parse().ok());
            let name = fs::read_to_string(at.join("comm"));
            if let (Some(id), Ok(name), Ok(file)) = (id, name, File::open(at.join("schedstat"))) {
                threads.push((id, name.trim_end().to_owned(), file));
            }
        }
        threads.sort_by_key(|(id, _, _)| *id);
        Self {
            statm: File::open(own.join("statm")).ok(),
            smaps_rollup: File::open(own.join("smaps_rollup")).ok(),
            threads: threads
                .into_iter()
                .map(|(_, name, file)| (name, file))
                .collect(),
            page_bytes,
        }
    }

    /// Reads them. Needs no right but `lseek` and `read`.
    #[must_use]
    pub fn read(&self) -> ProcessFacts {
        let statm = self.statm.as_ref().and_then(|file| text(file).ok());
        let rollup = self.smaps_rollup.as_ref().and_then(|file| text(file).ok());
        let threads = self.threads.iter().filter_map(|(name, file)| {
            let text = text(file).ok()?;
            let mut numbers = text.split_whitespace().map_while(|n| n.parse().ok());
            Some(ThreadFacts {
                name: name.clone(),
                cpu_ns: numbers.next()?,
                waiting_ns: numbers.next()?,
            })
        });
        ProcessFacts {
            resident_bytes: statm.as_deref().and_then(|text| {
                let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
                Some(pages.saturating_mul(self.page_bytes))
            }),
            proportional_bytes: rollup.as_deref().and_then(|text| {
                let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
                let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
                Some(kib.saturating_mul(1024))
            }),
            threads: threads.collect(),
        }
    }
}

fn text(mut file: &File) -> io::Result<String> {
    file.rewind()?;
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_thread_that_works_is_seen_to() {
        let (told, tell) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("at work".into())
            .spawn(move || {
                let _ = tell.recv();
                let end = Instant::now() + Duration::from_millis(30);
                while Instant::now() < end {}
                tell.recv()
            })
            .unwrap();
        let process = Process::open(4096);
        let work = |facts: &ProcessFacts| {
            facts
                .threads
                .iter()
                .find(|t| t.name == "at work")
                .map(|t| t.cpu_ns)
        };
        let before = work(&process.read()).unwrap();
        told.send(()).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while work(&process.read()).unwrap() < before + 10_000_000 {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
        let facts = process.read();
        let resident = facts.resident_bytes.unwrap();
        assert!(resident > 1 << 20 && facts.proportional_bytes.unwrap() <= resident + (8 << 20));
        drop(told);
        let _ = thread.join();
        assert_eq!(
            work(&process.read()),
            None,
            "a thread that is gone is left out"
        );
    }
}
