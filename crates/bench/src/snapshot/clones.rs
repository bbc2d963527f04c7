//! Many copies of one snapshot: as many processes, started by as many threads as the host has processors, and what they take.
//!
//! Does not know how a copy is made.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;

use super::life::{Arrivals, Files, Process, Shape};
use super::networked::{self, Taps};
use super::table::{Case, Place, Row};
use super::template::{Guest, Template};
use super::{Plan, Samples, milliseconds};
use crate::smaps;
use crate::vmm::{Kind, Vmm};

/// How often all copies together beat: the more there are the calmer is each, so that processors are left to those that start.
const BEATS_A_SECOND: u64 = 1000;
/// How long copies run before their memory is looked at.
const REST: Duration = Duration::from_secs(1);

/// A copy that runs.
struct Clone {
    process: Made,
    /// User and system time of its threads when the load was answered.
    cpu: Duration,
}

/// Its VMM.
enum Made {
    Executed(Process),
    Copied(Guest),
}

impl Made {
    fn id(&self) -> u32 {
        match self {
            Self::Executed(process) => process.run.id(),
            Self::Copied(guest) => guest.id(),
        }
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Executed(process) => process.beat().map(drop),
            Self::Copied(guest) => guest.beat(),
        }
    }
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
    for &count in counts {
        copies(plan, vmm, mib, count, None, folder, samples)
            .with_context(|| format!("{count} copies"))?;
    }
    Ok(())
}

/// Has a guest of `mib` with a network copied, for each tap but the guest's once, by a snapshot in `folder`.
pub(super) fn measure_networked(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    taps: &Taps,
    folder: &Path,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    copies(plan, vmm, mib, taps.count(), Some(taps), folder, samples)
}

fn copies(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    count: u64,
    taps: Option<&Taps>,
    folder: &Path,
    samples: &mut Samples,
) -> anyhow::Result<()> {
    let arrivals = Arrivals::new()?;
    let files = Files::new(folder, "clones");
    let shape = Shape {
        memory_mib: mib,
        // Idle, but for its beats: what else changes is what its kernel writes.
        window_mib: 0,
        beat_pages: 0,
        pause_us: u32::try_from(count * 1_000_000 / BEATS_A_SECOND)?,
        tracks_pages: false,
        tap: taps.map(Taps::of_guest),
    };
    let mut guest = Process::boot(plan, vmm, &shape, &arrivals).context("boot")?;
    guest.take_full(&files).context("full snapshot")?;
    drop(guest);
    let mut measure = |place, make: &Make<'_>| {
        let case = Case {
            place,
            number: count,
        };
        let mut add = |row, value| samples.push((case, row, value));
        many(make, taps, mib, usize::try_from(count)?, &mut add)
    };
    let (executed, templated) = match taps {
        None => (Place::Clones, Place::Templated),
        Some(_) => (Place::Networked, Place::NetworkedTemplated),
    };
    let folder = |number: usize| plan.scratch.join(format!("clone{number}"));
    let tap = |number: usize| taps.map(|taps| taps.of_copy(number));
    measure(executed, &|number, arrivals| {
        let mut process = Process::start(plan, vmm, &folder(number), arrivals)?;
        let more = tap(number).map_or(
            json!({}),
            |tap| json!({networked::OVERRIDES: networked::overrides(&tap)}),
        );
        process.load_with(&files, more)?;
        Ok(Made::Executed(process))
    })?;
    // Peers know no such thing.
    if vmm.kind == Kind::Alveole {
        let template = Template::start(plan, vmm, &files)?;
        measure(templated, &|number, arrivals| {
            let tap = tap(number);
            let folder = folder(number);
            let mut guest = Guest::start(plan, &template, &folder, tap.as_deref(), arrivals)?;
            guest.answered()?;
            Ok(Made::Copied(guest))
        })
        .context("of a template")?;
    }
    Ok(())
}

/// Makes the copy of this number, and waits until it answers.
type Make<'a> = dyn Fn(usize, &Arrivals) -> anyhow::Result<Made> + Sync + 'a;

fn many(
    make: &Make<'_>,
    taps: Option<&Taps>,
    mib: u64,
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
            let process = make(number, arrivals)?;
            let cpu = cpu(process.id())?;
            clones.push(Clone { process, cpu });
        }
    };
    let (start, host_before) = (Instant::now(), host_cpu()?);
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
    let host = host_cpu()?.saturating_sub(host_before);
    for clone in &mut clones {
        clone.process.beat()?;
    }
    let beaten = start.elapsed();
    if let Some(taps) = taps {
        taps.have_carriers(count)?;
    }
    let used = || -> anyhow::Result<Duration> {
        let times = clones.iter().map(|clone| cpu(clone.process.id()));
        times.sum()
    };
    let (before, from) = (used()?, Instant::now());
    thread::sleep(REST);
    let rested = from.elapsed();
    let running = used()?.saturating_sub(before);
    let mut memory = Memory::default();
    for clone in &clones {
        let file = format!("/proc/{}/smaps", clone.process.id());
        let text = fs::read_to_string(&file).with_context(|| format!("{file}: it has ended"))?;
        let mappings = smaps::parse(&text).map_err(anyhow::Error::msg)?;
        let split = smaps::split(&mappings, mib << 20).map_err(anyhow::Error::msg)?;
        memory.guest += split.guest;
        memory.rest += split.rest;
    }
    let starts: Duration = clones.iter().map(|clone| clone.cpu).sum();
    let each = |value: f64| value / count as f64;
    let mib = |kib: u64| each(kib as f64 / 1024.0);
    add(Row::Cpu, each(milliseconds(starts)));
    add(Row::HostCpu, milliseconds(host));
    add(
        Row::Running,
        each(milliseconds(running) / rested.as_secs_f64()),
    );
    add(Row::AllAnswered, milliseconds(answered));
    add(Row::AllBeaten, milliseconds(beaten));
    let (guest, rest) = (memory.guest, memory.rest);
    add(Row::Pss, mib(guest.pss + rest.pss));
    add(Row::Unique, mib(guest.private + rest.private));
    add(Row::GuestsOwn, mib(guest.anonymous));
    add(Row::VmmsOwn, mib(rest.anonymous));
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

/// Time on a processor of the whole host, in ticks of ten milliseconds: what the kernel does elsewhere for those who start, and what
/// starting them takes here.
fn host_cpu() -> anyhow::Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    busy(&text).context("/proc/stat is not understood")
}

/// The times of the first line of `/proc/stat` but those of an idle or stolen processor, and of guests, which are in the first two:
/// proc_stat(5).
fn busy(text: &str) -> Option<Duration> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map_while(|n| n.parse().ok())
        .collect();
    let busy = ticks.get(..3)?.iter().chain(ticks.get(5..7)?).sum::<u64>();
    Some(Duration::from_millis(busy * 10))
}

/// What some processes take, guest RAM and everything else.
#[derive(Debug, Default)]
struct Memory {
    guest: smaps::Use,
    rest: smaps::Use,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_the_host_is_without_that_of_idle_processors() {
        let text = "cpu  100 20 30 5000 600 7 8 9 50 5\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(busy(text), Some(Duration::from_millis(1650)));
        assert_eq!(busy("cpu  1 2 3\n"), None);
        assert!(host_cpu().unwrap() > Duration::ZERO);
    }

    #[test]
    fn time_of_all_threads_is_summed() {
        let before = cpu(std::process::id()).unwrap();
        let until = Instant::now() + Duration::from_millis(20);
        while Instant::now() < until {}
        assert!(cpu(std::process::id()).unwrap() > before);
    }
}
