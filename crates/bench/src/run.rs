//! Runs one process and watches it: when a byte comes out, when it ends; never for longer than agreed.
//!
//! Every process is the leader of a group of its own, which is killed when the run is dropped, and
//! when this program is told to end. Does not know what it runs.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// The leaders of the groups that run now.
static RUNNING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// `USER_HZ`: part of the ABI of /proc.
const TICKS_PER_SECOND: f64 = 100.0;

/// How much of what a failed process said is told.
const MOST_WORDS: usize = 400;

/// Makes an order to end leave neither a process nor one of `folders` behind.
///
/// # Errors
/// No handler can be installed.
pub(crate) fn end_on_signals(folders: Vec<PathBuf>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            for &leader in running().iter() {
                kill_group(leader);
            }
            for folder in &folders {
                let _ = fs::remove_dir_all(folder);
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// A panic leaves the set as it was before or behind a change of one leader.
fn running() -> MutexGuard<'static, BTreeSet<u32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kill_group(leader: u32) {
    if let Some(pid) = i32::try_from(leader).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// User and system time of all threads, past ones too.
pub(crate) fn cpu_seconds(process: u32) -> Result<f64, String> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))
        .map_err(|e| format!("the monitor is gone: {e}"))?;
    ticks(&stat)
        .map(|ticks| ticks as f64 / TICKS_PER_SECOND)
        .ok_or_else(|| "/proc/PID/stat is not understood".into())
}

/// utime and stime of proc(5), fields 14 and 15.
fn ticks(stat: &str) -> Option<u64> {
    // The name of the program, in brackets, may hold anything; the state after it is field 3.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(14 - 3);
    let mut field = || fields.next()?.parse::<u64>().ok();
    Some(field()? + field()?)
}

/// A process under observation.
pub(crate) struct Run {
    child: Child,
    /// Just before it was started.
    start: Instant,
    deadline: Instant,
    stderr: PathBuf,
    /// The last of what came out, for whoever asks what went wrong.
    said: Vec<u8>,
    /// What came after the last line that was asked for.
    pending: Vec<u8>,
    output: Option<std::process::ChildStdout>,
    ended: bool,
    faults: Option<u64>,
}

impl Run {
    /// Starts `program`. Its stdin stays open and silent; `stderr` is a file to write.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(
        program: &OsStr,
        arguments: &[OsString],
        stderr: &Path,
        timeout: Duration,
    ) -> anyhow::Result<Self> {
        let errors =
            File::create(stderr).with_context(|| format!("cannot write {}", stderr.display()))?;
        let mut command = Command::new(program);
        command.args(arguments).process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let start = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        running().insert(child.id());
        let output = child.stdout.take();
        Ok(Self {
            child,
            start,
            deadline: start + timeout,
            stderr: stderr.to_path_buf(),
            said: Vec::new(),
            pending: Vec::new(),
            output,
            ended: false,
            faults: None,
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How many page faults all its threads had; known when it has ended.
    pub(crate) fn faults(&self) -> Option<u64> {
        self.faults
    }

    /// Waits for `marker` in the output; how long after the start it came.
    ///
    /// # Errors
    /// The process ended or the time was over before.
    pub(crate) fn wait_for(&mut self, marker: u8) -> Result<Duration, String> {
        self.wait_for_many(marker, 1)
    }

    /// Waits until `marker` has come so often in what was not read before; how long after the start that was.
    ///
    /// # Errors
    /// The process ended or the time was over before.
    pub(crate) fn wait_for_many(
        &mut self,
        marker: u8,
        count_wanted: usize,
    ) -> Result<Duration, String> {
        let mut seen = 0;
        loop {
            let Some(output) = &mut self.output else {
                let (_, how) = self.wait_for_end()?;
                return Err(self.failure(&format!("ended ({how}) before its guest's init ran")));
            };
            if !wait_readable(output, self.deadline) {
                return Err(self.failure("time-out before its guest's init ran"));
            }
            let mut some = [0; 4096];
            let count = output.read(&mut some).unwrap_or(0);
            let now = self.start.elapsed();
            if count == 0 {
                self.output = None;
            }
            self.keep(&some[..count]);
            seen += some[..count].iter().filter(|&&byte| byte == marker).count();
            if seen >= count_wanted {
                return Ok(now);
            }
        }
    }

    /// Reads what has come, so that what comes next is new and nobody waits for room.
    pub(crate) fn drain(&mut self) {
        while let Some(output) = &mut self.output
            && wait_readable(output, Instant::now())
        {
            let mut some = [0; 4096];
            match output.read(&mut some) {
                Ok(count @ 1..) => self.keep(&some[..count]),
                _ => self.output = None,
            }
        }
    }

    /// Waits for the next line of the output.
    ///
    /// # Errors
    /// The process ended or the time was over before.
    pub(crate) fn line(&mut self) -> Result<String, String> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                self.keep(&line);
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let Some(output) = &mut self.output else {
                let rest = std::mem::take(&mut self.pending);
                self.keep(&rest);
                let (_, how) = self.wait_for_end()?;
                return Err(self.failure(&format!("ended ({how}) before its guest was done")));
            };
            if !wait_readable(output, self.deadline) {
                let rest = std::mem::take(&mut self.pending);
                self.keep(&rest);
                return Err(self.failure("time-out before its guest was done"));
            }
            let mut some = [0; 4096];
            let count = output.read(&mut some).unwrap_or(0);
            if count == 0 {
                self.output = None;
            }
            self.pending.extend_from_slice(&some[..count]);
        }
    }

    /// Asks `look` every `period` until it finds what it looks for, or the process has ended.
    ///
    /// # Errors
    /// The process ended or the time was over before, and what `look` said last.
    pub(crate) fn poll<T>(
        self,
        period: Duration,
        mut look: impl FnMut() -> Result<T, String>,
    ) -> Result<T, String> {
        let pidfd = self.pidfd()?;
        loop {
            let ended = wait_readable(&pidfd, Instant::now() + period);
            match look() {
                Ok(found) => return Ok(found),
                Err(what) if ended => return Err(self.failure(&format!("ended: {what}"))),
                Err(what) if Instant::now() >= self.deadline => {
                    return Err(self.failure(&format!("time-out: {what}")));
                }
                Err(_) => {}
            }
        }
    }

    /// Waits until something else is readable.
    ///
    /// # Errors
    /// The process ended or the time was over before; `what` is what was waited for.
    pub(crate) fn wait_for_other(&mut self, other: &impl AsFd, what: &str) -> Result<(), String> {
        let pidfd = self.pidfd()?;
        let mut fds = [
            PollFd::new(other, PollFlags::IN),
            PollFd::new(&pidfd, PollFlags::IN),
        ];
        if !wait_any(&mut fds, self.deadline) {
            return Err(self.failure(&format!("time-out before {what}")));
        }
        if fds[0].revents().is_empty() {
            return Err(self.failure(&format!("ended before {what}")));
        }
        Ok(())
    }

    /// Waits for the end of the process; how long after the start it came, and how.
    ///
    /// # Errors
    /// The time was over before.
    pub(crate) fn wait_for_end(&mut self) -> Result<(Duration, ExitStatus), String> {
        let pidfd = self.pidfd()?;
        loop {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            if let Some(output) = &self.output {
                fds.push(PollFd::new(output, PollFlags::IN));
            }
            if !wait_any(&mut fds, self.deadline) {
                return Err(self.failure("time-out before the process ended"));
            }
            if !fds[0].revents().is_empty() {
                let after = self.start.elapsed();
                // Until it is waited for, the kernel keeps its account.
                let stat = fs::read_to_string(format!("/proc/{}/stat", self.id()));
                self.faults = stat.ok().and_then(|stat| faults(&stat));
                return match self.reap() {
                    Some(status) => Ok((after, status)),
                    None => Err("cannot wait for the process".into()),
                };
            }
            let mut some = [0; 4096];
            let count = self
                .output
                .as_mut()
                .and_then(|output| output.read(&mut some).ok());
            match count {
                Some(count @ 1..) => self.keep(&some[..count]),
                _ => self.output = None,
            }
        }
    }

    /// A sentence on what went wrong, with what the process said last.
    pub(crate) fn failure(&self, what: &str) -> String {
        let errors = fs::read_to_string(&self.stderr).unwrap_or_default();
        let output = String::from_utf8_lossy(&self.said);
        let mut text = String::new();
        for said in [output.trim(), errors.trim()] {
            let skip = said.chars().count().saturating_sub(MOST_WORDS);
            let tail: String = said.chars().skip(skip).collect();
            if !tail.is_empty() {
                let one_line = tail.split_whitespace().collect::<Vec<_>>().join(" ");
                text += &format!(
                    "; said: {}",
                    one_line.replace(|c: char| c.is_control(), "?")
                );
            }
        }
        format!("{what}{text}")
    }

    /// Readable when the process has ended.
    fn pidfd(&self) -> Result<OwnedFd, String> {
        let pid = Pid::from_child(&self.child);
        pidfd_open(pid, PidfdFlags::empty()).map_err(|e| format!("pidfd_open: {e}"))
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.said.extend_from_slice(bytes);
        let surplus = self.said.len().saturating_sub(4096);
        self.said.drain(..surplus);
    }

    /// Also ends what it left behind in its group, whose number is surely its own until now.
    fn reap(&mut self) -> Option<ExitStatus> {
        kill_group(self.child.id());
        running().remove(&self.child.id());
        let status = self.child.wait().ok();
        self.ended = status.is_some();
        status
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.ended {
            self.reap();
        }
    }
}

/// Minor and major faults in the text of a `/proc/PID/stat`.
fn faults(stat: &str) -> Option<u64> {
    // The name of the program, in brackets, may hold anything.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // The state is field 3 of proc(5), minor faults are field 10, major ones 12.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(field(10)? + field(12)?)
}

pub(crate) fn wait_readable(fd: &impl AsFd, deadline: Instant) -> bool {
    wait_any(&mut [PollFd::new(fd, PollFlags::IN)], deadline)
}

fn wait_any(fds: &mut [PollFd<'_>], deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(left) = Timespec::try_from(left) else {
            return false;
        };
        match poll(fds, Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn processor_time_of_a_process() {
        assert_eq!(ticks("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 20 30 x"), Some(50));
        assert!(cpu_seconds(std::process::id()).is_ok());
    }

    fn run(script: &str, timeout: Duration) -> (Run, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let words = ["-c".into(), script.into()];
        let run = Run::start("sh".as_ref(), &words, &dir.path().join("stderr"), timeout).unwrap();
        (run, dir)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_marker_then_the_end() {
        let (mut run, _dir) = run(
            "printf 'ab'; sleep 0.05; printf '\\002'; sleep 0.05; exit 3",
            LONG,
        );
        let marker = run.wait_for(2).unwrap();
        let (end, status) = run.wait_for_end().unwrap();
        assert!(marker < end, "{marker:?} {end:?}");
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn markers_are_counted_from_where_it_was_read() {
        let (mut run, _dir) = run(
            "printf 'xx'; read go; printf 'x'; read go; printf 'xx'; exec sleep 1000",
            LONG,
        );
        run.wait_for_many(b'x', 2).unwrap();
        run.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let until = Instant::now() + LONG;
        assert!(wait_readable(run.output.as_ref().unwrap(), until));
        run.drain();
        assert!(!wait_readable(run.output.as_ref().unwrap(), Instant::now()));
        run.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        run.wait_for_many(b'x', 2).unwrap();
        let leader = run.id();
        assert!(running().contains(&leader));
        drop(run);
        assert!(!running().contains(&leader));
    }

    #[test]
    fn faults_are_counted() {
        let stat = "7 (a) b) Z 1 7 7 0 -1 4228 5000 1 20 2 3 4";
        assert_eq!(faults(stat), Some(5020));
        assert_eq!(faults("7 (a) Z 1"), None);
        let (mut run, _dir) = run("exit 0", LONG);
        run.wait_for_end().unwrap();
        assert!(run.faults().unwrap() > 10);
    }

    #[test]
    fn no_marker_is_a_failure_that_quotes() {
        let (mut run, _dir) = run("echo out; echo err >&2; exit 1", LONG);
        let said = run.wait_for(2).unwrap_err();
        assert!(
            said.contains("exit status: 1") && said.contains("out; said: err"),
            "{said}"
        );
    }

    #[test]
    fn lines_come_one_by_one() {
        let (mut run, _dir) = run("printf 'a\\r\\nb'; sleep 0.05; echo c; echo err >&2", LONG);
        assert_eq!(run.line().as_deref(), Ok("a"));
        assert_eq!(run.line().as_deref(), Ok("bc"));
        let said = run.line().unwrap_err();
        assert!(
            said.contains("exit status: 0") && said.contains("err"),
            "{said}"
        );
    }

    #[test]
    fn polling_ends_with_a_find_the_end_or_the_time() {
        let period = Duration::from_millis(5);
        let (found, _dir) = run("sleep 1000", LONG);
        assert_eq!(found.poll(period, || Ok(7)), Ok(7));
        let (ends, _dir) = run("exit 0", LONG);
        let said = ends
            .poll(period, || Err::<(), _>("nothing".into()))
            .unwrap_err();
        assert!(said.starts_with("ended: nothing"), "{said}");
        let (late, _dir) = run("sleep 1000", Duration::from_millis(50));
        let said = late
            .poll(period, || Err::<(), _>("nothing".into()))
            .unwrap_err();
        assert!(said.starts_with("time-out: nothing"), "{said}");
    }

    #[test]
    fn time_is_limited_and_groups_are_killed() {
        let (mut run, _dir) = run("sleep 1000 & echo $!; wait", Duration::from_millis(200));
        let said = run.wait_for(2).unwrap_err();
        assert!(said.starts_with("time-out"), "{said}");
        let pid: i32 = String::from_utf8_lossy(&run.said).trim().parse().unwrap();
        assert!(run.wait_for_end().unwrap_err().starts_with("time-out"));
        drop(run);
        // Killed; it may be a zombie for a moment, until the first process takes it.
        let stat = format!("/proc/{pid}/stat");
        let gone = || fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
        let until = Instant::now() + LONG;
        while !gone() {
            assert!(Instant::now() < until, "{pid} lives");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
