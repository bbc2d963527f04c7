//! Starts the monitor in a jail: a root of its own, the rights of nobody, bounded resources. The command line is that of
//! Firecracker's jailer.
//!
//! `cli` reads the words; `program`, `cgroup` and `jail` find out what is to be made, and make it; `launch` does what
//! cannot be taken back. Until then whatever was made goes again if a step fails (`undo`).
//!
//! Deliberately does not know: what the program that it starts is or does, who prepares files for it, who removes the
//! jail when it has ended.

mod cgroup;
mod cli;
#[expect(
    unsafe_code,
    reason = "descriptors by number, which Rust takes for somebody's"
)]
mod descriptors;
mod failure;
#[expect(
    unsafe_code,
    reason = "unshare could take descriptors from other threads; there are none"
)]
mod jail;
#[expect(unsafe_code, reason = "fork, and unshare again")]
mod launch;
mod program;
mod undo;

use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::AsFd;

use cli::{Args, Request};
use failure::{Failure, OrFail};
use launch::{Launch, monotonic_us};
use program::Program;
use undo::Undo;

fn main() -> ExitCode {
    let start_us = monotonic_us();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Request::Help) => print(cli::HELP),
        Ok(Request::Version) => print(concat!("alveole-jailer ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Request::Run(args)) => match run(&args, start_us) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => failed(&failure.to_string()),
        },
        Err(text) => failed(&format!("{text}; see alveole-jailer --help")),
    }
}

/// Starts the program; returns only if it runs in another process.
fn run(args: &Args, start_us: u64) -> Result<(), Failure> {
    descriptors::keep_only(&args.pass_fds)?;
    let program = Program::open(&args.exec_file)?;
    let cgroups = cgroup::plan(args, &program.name, &|path: &Path| fs::read_to_string(path))?;
    let plan = jail::Plan::new(args, program)?;
    if let Some(netns) = &args.netns {
        join_netns(netns)?;
    }
    let null = args.daemonize.then(open_null).transpose()?;

    let mut undo = Undo::new();
    let jail = plan.make(&mut undo)?;
    let cgroups = cgroup::make(&cgroups, &mut undo)?;
    jail.enter()?;
    let mut launch = Launch {
        args,
        program: plan.program_inside(),
        pid_file: jail.pid_file,
        cgroups,
        null,
        start_us,
    };
    launch.start()?;
    undo.keep();
    Ok(())
}

fn join_netns(path: &Path) -> Result<(), Failure> {
    let act = || format!("join network namespace --netns {path:?}");
    let cure = "run the jailer as root; make one (ip netns add NAME) and give /run/netns/NAME, or /proc/PID/ns/net of a process in it";
    // Whatever is there, opening it does not wait.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).or_fail(act, cure)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).or_fail(act, cure)
}

fn open_null() -> Result<File, Failure> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .or_fail(|| "open /dev/null".into(), "mount devtmpfs on /dev")
}

fn failed(text: &str) -> ExitCode {
    say(text);
    ExitCode::FAILURE
}

/// Prints one message for people on standard error; a standard error that is gone is no reason to fail.
pub(crate) fn say(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().write_all(format!("alveole-jailer: {text}\n").as_bytes());
}

fn print(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
