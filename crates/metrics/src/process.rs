//! What the host's kernel knows of this process: opened before the sandbox closes, read afterwards.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Longest file that is read: `smaps_rollup` has some 30 lines.
const MOST_BYTES: usize = 8192;

/// Files of `/proc` about this process and its threads. Where there is no `/proc`, as in a jail, there are none.
#[derive(Debug, Default)]
pub struct Process {
    statm: Option<File>,
    smaps_rollup: Option<File>,
    threads: Vec<Thread>,
    page_bytes: u64,
}

#[derive(Debug)]
struct Thread {
    id: u32,
    /// A thread that was just made has not given itself a name yet.
    name: File,
    times: File,
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
    /// Its number, as names may be given twice.
    pub id: u32,
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
        let mut threads = Vec::new();
        for entry in fs::read_dir(own.join("task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let at = entry.path();
            let id = entry.file_name().to_str().and_then(|id| id.parse().ok());
            let open = |name| File::open(at.join(name));
            if let (Some(id), Ok(name), Ok(times)) = (id, open("comm"), open("schedstat")) {
                threads.push(Thread { id, name, times });
            }
        }
        threads.sort_by_key(|thread| thread.id);
        Self {
            statm: File::open(own.join("statm")).ok(),
            smaps_rollup: File::open(own.join("smaps_rollup")).ok(),
            threads,
            page_bytes,
        }
    }

    /// Reads them. Needs no system call but `pread64`.
    #[must_use]
    pub fn read(&self) -> ProcessFacts {
        let statm = self.statm.as_ref().and_then(|file| text(file).ok());
        let rollup = self.smaps_rollup.as_ref().and_then(|file| text(file).ok());
        let threads = self.threads.iter().filter_map(|thread| {
            let times = text(&thread.times).ok()?;
            let mut numbers = times.split_whitespace().map_while(|n| n.parse().ok());
            Some(ThreadFacts {
                name: text(&thread.name).ok()?.trim_end().to_owned(),
                id: thread.id,
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

fn text(file: &File) -> io::Result<String> {
    let mut bytes = vec![0; MOST_BYTES];
    // Such a file is made as a whole by the first read.
    let len = file.read_at(&mut bytes, 0)?;
    bytes.truncate(len);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::TryRecvError;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_thread_that_works_is_seen_to() {
        let (told, tell) = std::sync::mpsc::channel::<()>();
        let (begins, begun) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("at work".into())
            .spawn(move || {
                begins.send(()).unwrap();
                let _ = tell.recv();
                // However little of a busy host it gets.
                while tell.try_recv() == Err(TryRecvError::Empty) {}
            })
            .unwrap();
        // From then on it has its name.
        begun.recv().unwrap();
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
