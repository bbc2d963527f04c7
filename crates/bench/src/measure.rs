//! Takes the samples: which runs there are, in which order, and what is read off each.
//!
//! Does not know command lines of VMMs, nor how results are shown.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::MARKER;
use crate::results::{Column, Measure};
use crate::run::Run;
use crate::vmm::{Arguments, Guest, Then};
use crate::{metrics, smaps, trace};

/// Guest RAM of the memory measure, as in the peers' published figures.
const MEMORY_GUEST_MIB: u64 = 256;
/// How long after init memory is looked at: a booted guest is at rest by then.
const MEMORY_REST: Duration = Duration::from_millis(1500);
/// Memory varies little; each look at it takes seconds.
const MOST_MEMORY_ROUNDS: u32 = 5;
/// How often the trace is looked at: it disturbs what is traced.
const TRACE_POLL: Duration = Duration::from_millis(20);
/// Kernel threads that show among a process's own.
const KERNELS_OWN_THREADS: &str = "kvm-nx-lpage-re";

/// What to do, how often.
pub(crate) struct Plan {
    /// As all guests are but for arguments, memory and end.
    pub(crate) guest: Guest,
    pub(crate) sets: Vec<Arguments>,
    pub(crate) rounds: u32,
    /// Neither a warm-up round nor what takes long.
    pub(crate) smoke: bool,
    pub(crate) strace: bool,
    pub(crate) timeout: Duration,
    /// For telling how far it is.
    pub(crate) started: Instant,
    /// For files of the runs.
    pub(crate) scratch: PathBuf,
}

/// One way of looking at a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Times(Arguments),
    Trace,
    Calls,
    Memory,
    Metrics,
}

impl Plan {
    /// Takes all samples of all `columns`.
    pub(crate) fn run(&self, columns: &mut [Column]) {
        for column in &mut *columns {
            if let Some(mib) = self.stripped_mib(&column.vmm.path) {
                column.add(Measure::Binary, mib);
            }
        }
        if !self.smoke {
            self.rounds(columns, Look::Times(self.sets[0]), 1, false);
        }
        for &set in &self.sets {
            self.rounds(columns, Look::Times(set), self.rounds, true);
        }
        let few = self.rounds.min(MOST_MEMORY_ROUNDS);
        self.rounds(columns, Look::Memory, few, true);
        if self.strace {
            self.rounds(columns, Look::Trace, self.rounds, true);
        }
        if self.strace && !self.smoke {
            self.rounds(columns, Look::Calls, 1, true);
        }
        self.rounds(columns, Look::Metrics, self.rounds, true);
    }

    /// Looks at all VMMs `rounds` times, each round starting one further along.
    fn rounds(&self, columns: &mut [Column], look: Look, rounds: u32, keep: bool) {
        for round in 0..rounds as usize {
            let what = if keep { "" } else { ", warm-up" };
            let (at_s, number) = (self.started.elapsed().as_secs(), round + 1);
            eprintln!("alveole-bench: {at_s} s: {look:?}{what}, round {number} of {rounds}");
            for place in 0..columns.len() {
                let index = (round + place) % columns.len();
                let column = &mut columns[index];
                if column.attempts.given_up() || (look == Look::Metrics && !column.is_ours()) {
                    continue;
                }
                let outcome = match self.look(column, look) {
                    Err(what) if column.vmm.learn(&what) => self.look(column, look),
                    outcome => outcome,
                };
                let outcome = outcome.map(|sample| {
                    if keep {
                        sample
                            .into_iter()
                            .for_each(|(measure, value)| column.add(measure, value));
                    }
                });
                if let Err(what) = &outcome {
                    eprintln!(
                        "alveole-bench: {} FAILED: {look:?}: {what}",
                        column.vmm.name
                    );
                }
                column
                    .attempts
                    .note(outcome.map_err(|what| format!("{look:?}: {what}")));
            }
        }
    }

    fn look(&self, column: &mut Column, look: Look) -> Result<Vec<(Measure, f64)>, String> {
        match look {
            Look::Times(set) => self.times(column, set),
            Look::Trace => self.trace(column),
            Look::Calls => self.calls(column),
            Look::Memory => self.memory(column),
            Look::Metrics => self.metrics(column),
        }
    }

    fn times(&self, column: &Column, set: Arguments) -> Result<Vec<(Measure, f64)>, String> {
        let guest = Guest {
            arguments: set,
            ..self.guest.clone()
        };
        let mut run = self.start(column, &guest, &[], &[])?;
        let init = run.wait_for(MARKER)?;
        let exit = finish(&mut run)?;
        let (to_init, to_exit) = match set {
            Arguments::Fast => (Measure::InitFast, Measure::ExitFast),
            Arguments::Given => (Measure::InitGiven, Measure::ExitGiven),
        };
        let mut samples = vec![(to_init, ms(init)), (to_exit, ms(exit))];
        samples.extend(run.faults().map(|count| (Measure::Faults, count as f64)));
        Ok(samples)
    }

    /// Until the guest is entered, no further: every stop costs much where all is emulated.
    fn trace(&self, column: &Column) -> Result<Vec<(Measure, f64)>, String> {
        let options = ["-f", "--seccomp-bpf", "-e", "trace=ioctl,execve", "-ttt"];
        let (run, output) = self.under_strace(column, &options)?;
        let trace = run.poll(TRACE_POLL, || trace::parse(&read(&output)?))?;
        Ok(vec![
            (Measure::FirstRun, trace.first_run_ms),
            (Measure::IoctlsBefore, trace.ioctls_before as f64),
        ])
    }

    fn calls(&self, column: &Column) -> Result<Vec<(Measure, f64)>, String> {
        let (mut run, output) = self.under_strace(column, &["-f", "-c"])?;
        run.wait_for(MARKER)?;
        finish(&mut run)?;
        let text = read(&output)?;
        Ok(vec![
            (Measure::SystemCalls, trace::calls(&text, "total")? as f64),
            (Measure::Ioctls, trace::calls(&text, "ioctl")? as f64),
        ])
    }

    /// Starts a boot under strace; also returns the file which strace writes.
    fn under_strace(&self, column: &Column, options: &[&str]) -> Result<(Run, PathBuf), String> {
        let output = self.scratch.join("strace");
        let _ = fs::remove_file(&output);
        let mut words: Vec<OsString> = vec!["strace".into()];
        words.extend(options.iter().map(OsString::from));
        words.extend(["-o".into(), output.clone().into()]);
        Ok((self.start(column, &self.guest, &words, &[])?, output))
    }

    fn memory(&self, column: &Column) -> Result<Vec<(Measure, f64)>, String> {
        let guest = Guest {
            memory_mib: MEMORY_GUEST_MIB,
            then: Then::Wait,
            ..self.guest.clone()
        };
        let mut run = self.start(column, &guest, &[], &[])?;
        run.wait_for(MARKER)?;
        thread::sleep(MEMORY_REST);
        let process = PathBuf::from(format!("/proc/{}", run.id()));
        let (threads, filtered) = threads(&process.join("task"))
            .map_err(|e| run.failure(&format!("ended while its guest waited ({e})")))?;
        let mappings = smaps::parse(&read(&process.join("smaps"))?)?;
        let split = smaps::split(&mappings, MEMORY_GUEST_MIB << 20)?;
        let mib = |kib: u64| kib as f64 / 1024.0;
        Ok(vec![
            (Measure::Pss, mib(split.rest.pss)),
            (Measure::PrivateDirty, mib(split.rest.private_dirty)),
            (Measure::Rss, mib(split.rest.rss)),
            (Measure::GuestRss, mib(split.guest.rss)),
            (Measure::Threads, f64::from(threads)),
            (Measure::ThreadsFiltered, f64::from(filtered)),
        ])
    }

    fn metrics(&self, column: &mut Column) -> Result<Vec<(Measure, f64)>, String> {
        let file = self.scratch.join("metrics");
        // It appends.
        let _ = fs::remove_file(&file);
        let more = [
            "--boot-timer".into(),
            "--metrics-path".into(),
            file.clone().into(),
        ];
        let mut run = self.start(column, &self.guest, &[], &more)?;
        run.wait_for(MARKER)?;
        finish(&mut run)?;
        let metrics = metrics::parse(&read(&file)?)?;
        for (name, count) in metrics.exits {
            column.exits.entry(name).or_default().push(count);
        }
        Ok(metrics
            .first_run_ms
            .map(|ms| (Measure::FirstRunOwn, ms))
            .into_iter()
            .collect())
    }

    /// Starts the VMM of `column`, behind the words `before`, with `more` arguments.
    fn start(
        &self,
        column: &Column,
        guest: &Guest,
        before: &[OsString],
        more: &[OsString],
    ) -> Result<Run, String> {
        let arguments = column
            .vmm
            .arguments(guest, &self.scratch)
            .map_err(|e| format!("{e:#}"))?;
        let mut words = before.to_vec();
        words.push(column.vmm.path.clone().into());
        words.extend(arguments);
        words.extend_from_slice(more);
        let stderr = self.scratch.join("stderr");
        Run::start(&words[0], &words[1..], &stderr, self.timeout).map_err(|e| format!("{e:#}"))
    }

    /// The size of a program without symbols; of the file as it is where there is no `strip`.
    fn stripped_mib(&self, program: &Path) -> Option<f64> {
        let stripped = self.scratch.join("stripped");
        let done = Command::new("strip")
            .arg("-o")
            .arg(&stripped)
            .arg(program)
            .output();
        let done = done.is_ok_and(|said| said.status.success());
        if !done {
            eprintln!(
                "alveole-bench: cannot strip {}: its size is as it is",
                program.display()
            );
        }
        let file = if done { &stripped } else { program };
        let bytes = fs::metadata(file).ok()?.len();
        let _ = fs::remove_file(&stripped);
        Some(bytes as f64 / f64::from(1 << 20))
    }
}

fn finish(run: &mut Run) -> Result<Duration, String> {
    let (after, status) = run.wait_for_end()?;
    if status.success() {
        Ok(after)
    } else {
        Err(run.failure(&format!("ended with {status}")))
    }
}

/// How many threads a process has, and how many of them have a seccomp filter.
fn threads(tasks: &Path) -> Result<(u32, u32), String> {
    let (mut all, mut filtered) = (0, 0);
    for task in fs::read_dir(tasks).map_err(|e| e.to_string())? {
        // A thread may end while the directory is read.
        let Ok(status) = task.map_or_else(Err, |t| fs::read_to_string(t.path().join("status")))
        else {
            continue;
        };
        if let Some(has_filter) = thread_status(&status) {
            all += 1;
            filtered += u32::from(has_filter);
        }
    }
    if all == 0 {
        Err("it has no threads".into())
    } else {
        Ok((all, filtered))
    }
}

/// Whether a thread has a filter, by its `status` file; nothing for one of the kernel's own.
fn thread_status(status: &str) -> Option<bool> {
    let field = |key: &str| {
        status
            .lines()
            .find_map(|line| Some(line.strip_prefix(key)?.strip_prefix(':')?.trim()))
    };
    let own = field("Name").is_some_and(|name| name.starts_with(KERNELS_OWN_THREADS));
    (!own).then(|| field("Seccomp") == Some("2"))
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_statuses() {
        let status = |name, seccomp| {
            format!("Name:\t{name}\nPid:\t7\nSeccomp:\t{seccomp}\nSeccomp_filters:\t1\n")
        };
        assert_eq!(thread_status(&status("fc_vcpu 0", 2)), Some(true));
        assert_eq!(thread_status(&status("vmm", 0)), Some(false));
        assert_eq!(thread_status(&status("kvm-nx-lpage-recovery-1", 0)), None);
        let (all, _) = threads(Path::new("/proc/self/task")).unwrap();
        assert!(all >= 1);
    }
}
