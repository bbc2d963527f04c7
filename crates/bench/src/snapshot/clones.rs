//! Many copies of one snapshot: as many processes, started by as many threads as the host has processors, and what they take.
//!
//! Does not know how a copy is made.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::life::{Arrivals, Files, Process, Shape};
use super::table::{Case, Place, Row};
use super::{Plan, Samples, milliseconds};
use crate::vmm::Vmm;

/// How often all copies together beat: the more there are the calmer is each, so that processors are left to those that start.
const BEATS_A_SECOND: u64 = 1000;
/// How long copies run before their memory is looked at.
const REST: Duration = Duration::from_secs(1);

/// A copy that runs.
struct Clone {
    process: Process,
    /// User and system time of its threads when the load was answered.
    cpu: Duration,
}

/// Has a guest of `mib` copied, each of `counts` times, by a snapshot in `folder`.
pub(super) fn measure(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    counts: &[u64],
    folder: &Path,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let arrivals = Arrivals::new()?;
    let files = Files::new(folder, "clones");
    for &count in counts {
        let shape = Shape {
            memory_mib: mib,
            window_mib: 1,
            pause_us: u32::try_from(count * 1_000_000 / BEATS_A_SECOND)?,
            tracks_pages: false,
        };
        let mut guest = Process::boot(plan, vmm, &shape, &arrivals).context("boot")?;
        guest.take_full(&files).context("full snapshot")?;
        drop(guest);
        let case = Case {
            place: Place::Clones,
            number: count,
        };
        let mut add = |row, value| samples.push((case, row, value));
        many(plan, vmm, &files, usize::try_from(count)?, &mut add)
            .with_context(|| format!("{count} copies"))?;
    }
    Ok(())
}

fn many(
    plan: &Plan,
    vmm: &Vmm,
    files: &Files,
    count: usize,
    add: &mut dyn FnMut(Row, f64),
) -> anyhow::Result<()> {
    let workers = thread::available_parallelism()?.get().min(count);
    let next = AtomicUsize::new(0);
    let arrivals: Vec<_> = (0..workers)
        .map(|_| Arrivals::new())
        .collect::<Result<_, _>>()?;
    let some = |arrivals: &Arrivals| -> anyhow::Result<Vec<Clone>> {
        let mut clones = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(clones);
            }
            let folder = plan.scratch.join(format!("clone{number}"));
            let mut process = Process::start(plan, vmm, &folder, arrivals)?;
            process.load(files)?;
            let cpu = cpu(process.run.id())?;
            clones.push(Clone { process, cpu });
        }
    };
    let start = Instant::now();
    let clones: anyhow::Result<Vec<Vec<Clone>>> = thread::scope(|scope| {
        let threads: Vec<_> = arrivals
            .iter()
            .map(|arrivals| scope.spawn(|| some(arrivals)))
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            let panicked = |_| anyhow::anyhow!("a thread that starts copies panicked");
            thread.join().map_err(panicked)?
        };
        threads.into_iter().map(join).collect()
    });
    let mut clones: Vec<_> = clones?.into_iter().flatten().collect();
    let answered = start.elapsed();
    for clone in &mut clones {
        clone.process.beat()?;
    }
    let beaten = start.elapsed();
    let used = || -> anyhow::Result<Duration> {
        let times = clones.iter().map(|clone| cpu(clone.process.run.id()));
        times.sum()
    };
    let (before, from) = (used()?, Instant::now());
    thread::sleep(REST);
    let rested = from.elapsed();
    let running = used()?.saturating_sub(before);
    let mut memory = Memory::default();
    for clone in &clones {
        let file = format!("/proc/{}/smaps_rollup", clone.process.run.id());
        let text = fs::read_to_string(&file)
            .map_err(|e| anyhow::anyhow!(clone.process.run.failure(&format!("{file}: {e}"))))?;
        memory.add(&text)?;
    }
    let starts: Duration = clones.iter().map(|clone| clone.cpu).sum();
    let each = |value: f64| value / count as f64;
    let mib = |kib: u64| each(kib as f64 / 1024.0);
    add(Row::Cpu, each(milliseconds(starts)));
    add(
        Row::Running,
        each(milliseconds(running) / rested.as_secs_f64()),
    );
    add(Row::AllAnswered, milliseconds(answered));
    add(Row::AllBeaten, milliseconds(beaten));
    add(Row::Pss, mib(memory.pss));
    add(Row::Unique, mib(memory.private));
    add(Row::Anonymous, mib(memory.anonymous));
    Ok(())
}

/// Time on a processor of all threads that a process has, by the first field of their `schedstat`: in ticks, as in `stat`, a start
/// takes none.
fn cpu(process: u32) -> anyhow::Result<Duration> {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may end while the directory is read.
        let Ok(text) = fs::read_to_string(task?.path().join("schedstat")) else {
            continue;
        };
        let nanoseconds = text
            .split_whitespace()
            .next()
            .and_then(|word| word.parse().ok());
        sum += Duration::from_nanos(nanoseconds.context("schedstat is not understood")?);
    }
    if sum.is_zero() {
        bail!(
            "/proc/{process}/task/*/schedstat counts nothing: the host's kernel is built without it"
        );
    }
    Ok(sum)
}

/// What some processes take, in KiB.
#[derive(Debug, Default, PartialEq)]
struct Memory {
    pss: u64,
    /// Mapped by nobody else; of a single process pages of the file, too.
    private: u64,
    /// Pages of no file: what was changed, and the program's own.
    anonymous: u64,
}

impl Memory {
    /// Adds a process by its `smaps_rollup`, proc_pid_smaps(5).
    fn add(&mut self, text: &str) -> anyhow::Result<()> {
        let field = |name: &str| -> anyhow::Result<u64> {
            let mut lines = text.lines();
            let found = lines.find_map(|line| {
                let kib = line.strip_prefix(name)?.strip_prefix(':')?.trim();
                kib.strip_suffix(" kB")?.parse().ok()
            });
            found.with_context(|| format!("no {name} in smaps_rollup"))
        };
        self.pss += field("Pss")?;
        self.private += field("Private_Clean")? + field("Private_Dirty")?;
        self.anonymous += field("Anonymous")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_processes_is_summed() {
        let text = "55d0-7ffe ---p 00000000 00:00 0    [rollup]\nRss:      900 kB\nPss:      400 kB\n\
                    Pss_Dirty:      30 kB\nPrivate_Clean:     8 kB\nPrivate_Dirty:    30 kB\n\
                    Anonymous:       20 kB\n";
        let mut memory = Memory::default();
        memory.add(text).unwrap();
        memory.add(text).unwrap();
        let want = Memory {
            pss: 800,
            private: 76,
            anonymous: 40,
        };
        assert_eq!(memory, want);
        assert!(memory.add("Pss: 1 kB\n").is_err());
        let own = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        memory.add(&own).unwrap();
        assert!(memory.anonymous > 40);
    }

    #[test]
    fn time_of_all_threads_is_summed() {
        let before = cpu(std::process::id()).unwrap();
        let until = Instant::now() + Duration::from_millis(20);
        while Instant::now() < until {}
        assert!(cpu(std::process::id()).unwrap() > before);
    }
}
