//! The last steps: processes, limits, rights, and the program.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, exit};

use rustix::io::Errno;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getpid, kill_process, setrlimit, setsid, waitpid,
};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};
use rustix::time::{ClockId, clock_gettime};

use crate::cgroup::Entrance;
use crate::cli::{Args, Limits};
use crate::failure::{Failure, OrFail};

/// Longest message that a process without a terminal leaves behind.
const MAX_MESSAGE_BYTES: u64 = 64 << 10;

/// A program about to be started, from within its jail.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) args: &'a Args,
    pub(crate) program: PathBuf,
    pub(crate) pid_file: File,
    pub(crate) cgroups: Vec<Entrance>,
    /// /dev/null of the host, if it becomes the program's input and output.
    pub(crate) null: Option<File>,
    /// When the jailer was started.
    pub(crate) start_us: u64,
}

/// Times of this process, in microseconds.
pub(crate) fn monotonic_us() -> u64 {
    clock_us(ClockId::Monotonic)
}

fn cpu_us() -> u64 {
    clock_us(ClockId::ProcessCPUTime)
}

fn clock_us(id: ClockId) -> u64 {
    let now = clock_gettime(id);
    now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000
}

/// Whether this process is its session's leader.
fn leads_its_session() -> bool {
    // Not rustix's getsid: it takes the 0 of a leader outside of this process namespace for impossible.
    // SAFETY: neither call has a precondition.
    unsafe { libc::getsid(0) == libc::getpid() }
}

/// Which process this is after a fork.
enum Side {
    Parent(Pid),
    Child,
}

fn fork() -> Result<Side, Failure> {
    // SAFETY: there is one thread, so the child is whole.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child),
        number => match Pid::from_raw(number).filter(|_| number > 0) {
            Some(pid) => Ok(Side::Parent(pid)),
            None => Err(Failure::new(
                "make a process",
                io::Error::last_os_error(),
                "raise the limit of processes (ulimit -u, pids.max)",
            )),
        },
    }
}

impl Launch<'_> {
    /// Starts the program: in this process, or in another one if it is to be detached or have a process namespace
    /// of its own. Returns when it runs there.
    ///
    /// # Errors
    /// It could not be started, wherever that was found out.
    pub(crate) fn start(&mut self) -> Result<(), Failure> {
        if !self.args.daemonize && !self.args.new_pid_ns {
            self.write_pid(getpid())?;
            return Err(self.become_program(0));
        }
        let (mut told, tell) = io::pipe().or_fail(
            || "make a pipe".into(),
            "raise the limit of open files (ulimit -n)",
        )?;
        let child = if self.args.daemonize {
            self.detach(&tell)?
        } else {
            self.isolate(0, &tell)?
        };
        drop(tell);
        // It ends when each process that holds the other side has become the program, or has ended.
        let mut message = String::new();
        let read = (&mut told)
            .take(MAX_MESSAGE_BYTES)
            .read_to_string(&mut message);
        let started = read.is_ok() && message.is_empty();
        if !started || self.args.daemonize {
            // It has ended: the program runs in another one.
            let _ = waitpid(Some(child), WaitOptions::empty());
        }
        if started {
            return Ok(());
        }
        Err(Failure::told(message))
    }

    /// Goes on in a process that has no terminal and can get none: it is in a session of its own, but does not lead it.
    fn detach(&mut self, tell: &PipeWriter) -> Result<Pid, Failure> {
        let mut spent = cpu_us();
        if let Side::Parent(child) = fork()? {
            return Ok(child);
        }
        let result = setsid().or_fail(
            || "make a session (setsid)".into(),
            "is this a bug of the jailer?",
        );
        if let Err(failure) = result {
            end(tell, &failure);
        }
        spent += cpu_us();
        match fork() {
            Ok(Side::Parent(_)) => exit(0),
            Err(failure) => end(tell, &failure),
            Ok(Side::Child) => {}
        }
        let failure = match self.go_on_detached(spent, tell) {
            Ok(()) => exit(0),
            Err(failure) => failure,
        };
        end(tell, &failure)
    }

    fn go_on_detached(&mut self, spent_us: u64, tell: &PipeWriter) -> Result<(), Failure> {
        if let Some(null) = &self.null {
            dup2_stdin(null)
                .and_then(|()| dup2_stdout(null))
                .and_then(|()| dup2_stderr(null))
                .or_fail(
                    || "put /dev/null on 0, 1 and 2".into(),
                    "is this a bug of the jailer?",
                )?;
        }
        if self.args.new_pid_ns {
            return self.isolate(spent_us, tell).map(drop);
        }
        self.write_pid(getpid())?;
        Err(self.become_program(spent_us))
    }

    /// Starts the program as the first process of a namespace.
    fn isolate(&mut self, spent_us: u64, tell: &PipeWriter) -> Result<Pid, Failure> {
        // SAFETY: there is one thread, and its descriptors stay shared with nobody.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.or_fail(
            || "make a process namespace".into(),
            "run the jailer as root; is /proc/sys/user/max_pid_namespaces reached?",
        )?;
        // The end of a session's leader hangs up on all in it, and this process ends soon.
        let leads = leads_its_session();
        let spent_us = spent_us + cpu_us();
        match fork()? {
            Side::Parent(child) => {
                if let Err(failure) = self.write_pid(child) {
                    let _ = kill_process(child, Signal::KILL);
                    return Err(failure);
                }
                Ok(child)
            }
            Side::Child => {
                if leads && let Err(e) = setsid() {
                    end(
                        tell,
                        &Failure::new("make a session (setsid)", e, "is this a bug of the jailer?"),
                    );
                }
                let failure = self.become_program(spent_us);
                end(tell, &failure)
            }
        }
    }

    fn enter_cgroups(&self) -> Result<(), Failure> {
        self.cgroups.iter().try_for_each(Entrance::enter)
    }

    fn write_pid(&mut self, pid: Pid) -> Result<(), Failure> {
        write!(self.pid_file, "{}", pid.as_raw_nonzero()).or_fail(
            || "write the file with the process number".into(),
            "is the disk full?",
        )
    }

    /// Returns why not.
    fn become_program(&self, spent_us: u64) -> Failure {
        if let Err(failure) = set_limits(self.args.limits).and_then(|()| self.enter_cgroups()) {
            // As long as there is the right to: what is in a cgroup keeps it from being removed again.
            self.cgroups.iter().for_each(Entrance::leave);
            return failure;
        }
        if let Err(failure) = drop_rights(self.args.uid, self.args.gid) {
            return failure;
        }
        let error = Command::new(&self.program)
            .args(arguments(self.args, self.start_us, cpu_us(), spent_us))
            .env_clear()
            .exec();
        Failure::new(
            format!("start {:?} in the jail", self.program),
            error,
            "is the program whole, and are there memory and processes (ulimit, cgroup) for it?",
        )
    }
}

/// Tells the process that waits why there is no program, and ends this one.
fn end(mut tell: &PipeWriter, failure: &Failure) -> ! {
    let _ = tell.write_all(failure.to_string().as_bytes());
    exit(1)
}

/// What the program is given: as Firecracker's jailer gives it. Times are in microseconds: when the jailer started, on
/// the monotonic clock; what this process has used of a processor; what the jailer's processes have, this one included.
fn arguments(args: &Args, start_us: u64, own_us: u64, before_us: u64) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["--id".into(), args.id.clone().into()];
    for (name, value) in [
        ("--start-time-us", start_us),
        ("--start-time-cpu-us", own_us),
        ("--parent-cpu-time-us", before_us + own_us),
    ] {
        words.extend([name.into(), value.to_string().into()]);
    }
    words.extend(args.program_args.iter().cloned());
    words
}

fn set_limits(limits: Limits) -> Result<(), Failure> {
    let set = |resource, value: u64| {
        let most = Some(value).filter(|v| *v != u64::MAX);
        setrlimit(
            resource,
            Rlimit {
                current: most,
                maximum: most,
            },
        )
    };
    if let Some(bytes) = limits.file_size_bytes {
        set(Resource::Fsize, bytes).or_fail(
            || format!("set --resource-limit fsize={bytes}"),
            "run the jailer as root",
        )?;
    }
    set(Resource::Nofile, limits.no_file).or_fail(
        || format!("set --resource-limit no-file={}", limits.no_file),
        "run the jailer as root; the host's most is in /proc/sys/fs/nr_open",
    )
}

/// Capabilities that Linux can number.
const CAPABILITIES: u32 = 64;

/// Becomes this user, for good: without a right of root's, other groups, or a way to gain any.
fn drop_rights(uid: u32, gid: u32) -> Result<(), Failure> {
    let act = || format!("become user {uid} and group {gid}");
    let cure = "run the jailer as root; are user and group known in this user namespace?";
    clear_ambient_capability_set().or_fail(act, cure)?;
    for number in 0..CAPABILITIES {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            // The kernel knows no such one.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(e) => return Err(e).or_fail(act, cure),
        }
    }
    set_thread_groups(&[]).or_fail(act, cure)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_res_gid(gid, gid, gid).or_fail(act, cure)?;
    set_thread_res_uid(uid, uid, uid).or_fail(act, cure)?;
    // User 0 still has them.
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).or_fail(act, cure)?;
    set_no_new_privs(true).or_fail(act, cure)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Request, parse};

    #[test]
    fn the_program_is_given_what_firecrackers_is() {
        let line = "--id vm-1 --exec-file e --uid 1 --gid 1 -- --config-file vm.json --no-api";
        let Request::Run(args) = parse(line.split_whitespace().map(OsString::from)).unwrap() else {
            panic!()
        };
        let words = arguments(&args, 1_000_000, 20, 300);
        let want = "--id vm-1 --start-time-us 1000000 --start-time-cpu-us 20 --parent-cpu-time-us 320 \
             --config-file vm.json --no-api";
        assert_eq!(
            words,
            want.split_whitespace()
                .map(OsString::from)
                .collect::<Vec<_>>()
        );
    }

    #[test]
    fn clocks_run() {
        let (time, used) = (monotonic_us(), cpu_us());
        while cpu_us() == used {}
        assert!(monotonic_us() > time);
    }
}
