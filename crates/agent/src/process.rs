//! Processes of sessions: who they are, where they start, what their streams lead to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use alveole_agent_protocol::{Process, Refusal, WindowSize};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::reaper::{Reaper, Watched};
use crate::user::{self, Identity};

/// Where programs are looked for if the environment does not say.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A process that runs, and this end of its streams. With a terminal, `input` and `output` are both the terminal.
pub(crate) struct Running {
    pub(crate) watched: Watched,
    pub(crate) input: Option<OwnedFd>,
    pub(crate) output: OwnedFd,
    pub(crate) errors: Option<OwnedFd>,
    /// To change its size.
    pub(crate) terminal: Option<OwnedFd>,
}

fn failed(text: String) -> Refusal {
    Refusal {
        code: Refusal::FAILED.into(),
        text,
    }
}

/// Starts a process.
pub(crate) fn start(process: &Process, reaper: &Reaper) -> Result<Running, Refusal> {
    let Some((program, arguments)) = process.args.split_first().filter(|(p, _)| !p.is_empty())
    else {
        return Err(failed(
            "no program to run: give a command, as the image has none".into(),
        ));
    };
    let identity = user::resolve(&process.user).map_err(failed)?;
    let cwd = working_folder(process, &identity)?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().current_dir(&cwd);
    let set = |name: &str| process.env.iter().any(|(n, _)| n == name);
    if !set("PATH") {
        command.env("PATH", USUAL_PATH);
    }
    if !set("HOME") {
        command.env("HOME", &identity.home);
    }
    if process.terminal.is_some() && !set("TERM") {
        command.env("TERM", "xterm");
    }
    command.envs(process.env.iter().map(|(name, value)| (name, value)));
    let act = |e: io::Error| failed(format!("cannot make the streams of '{program}': {e}"));
    let ends = match process.terminal {
        Some(size) => terminal(&mut command, size, &identity).map_err(act)?,
        None => pipes(&mut command, process.input).map_err(act)?,
    };
    let has_terminal = process.terminal.is_some();
    let Identity {
        uid, gid, groups, ..
    } = identity;
    let groups: Vec<Gid> = groups.into_iter().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    let become_it = move || {
        // Its own session: signals of its terminal go to it alone, and it can be told of the end of its client.
        setsid()?;
        if has_terminal {
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        // Groups first: who is somebody else may not choose groups.
        if may_choose_groups() {
            set_thread_groups(&groups)?;
        }
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: system calls alone, on values made before; nothing is allocated and no lock is taken.
    unsafe { command.pre_exec(become_it) };
    let watched = reaper
        .watch(|| {
            let child = command.spawn()?;
            Ok(Pid::from_child(&child))
        })
        .map_err(|e| why_not_started(program, &cwd, &e))?;
    // The command holds the process's ends of the streams, which would keep ours from ending.
    drop(command);
    Ok(Running {
        watched,
        input: ends.input,
        output: ends.output,
        errors: ends.errors,
        terminal: ends.terminal,
    })
}

/// Only root may, and an agent that serves somebody on a host (`serve`) is not always root.
fn may_choose_groups() -> bool {
    rustix::process::geteuid().is_root()
}

fn working_folder(process: &Process, identity: &Identity) -> Result<String, Refusal> {
    let cwd = match process.cwd.as_str() {
        "" => "/",
        given => given,
    };
    let path = Path::new(cwd);
    if !path.is_absolute() {
        return Err(failed(format!(
            "the working directory '{cwd}' does not begin with /"
        )));
    }
    if process.make_cwd && !path.exists() {
        let made = fs::create_dir_all(path)
            .and_then(|()| std::os::unix::fs::chown(path, Some(identity.uid), Some(identity.gid)));
        made.map_err(|e| failed(format!("cannot make the working directory '{cwd}': {e}")))?;
    }
    if path.is_dir() {
        return Ok(cwd.into());
    }
    Err(Refusal {
        code: Refusal::NOT_FOUND.into(),
        text: format!(
            "the working directory '{cwd}' is no directory in the guest: -w names another"
        ),
    })
}

fn why_not_started(program: &str, cwd: &str, error: &io::Error) -> Refusal {
    let (code, why) = match error.kind() {
        io::ErrorKind::NotFound if program.contains('/') => (
            Refusal::NOT_FOUND,
            "no such file in the guest, or what it is to be run by (its #! line, its dynamic linker) is not there".into(),
        ),
        io::ErrorKind::NotFound => (
            Refusal::NOT_FOUND,
            "no program of that name in the guest's PATH".into(),
        ),
        io::ErrorKind::PermissionDenied => (
            Refusal::NOT_EXECUTABLE,
            format!("{error}: is it executable, and may this user enter '{cwd}'?"),
        ),
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => (
            Refusal::NOT_EXECUTABLE,
            "it is no program of this processor, and has no #! line".into(),
        ),
        _ => (Refusal::FAILED, error.to_string()),
    };
    Refusal {
        code: code.into(),
        text: format!("cannot run '{program}': {why}"),
    }
}

struct Ends {
    input: Option<OwnedFd>,
    output: OwnedFd,
    errors: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

fn pipes(command: &mut Command, with_input: bool) -> io::Result<Ends> {
    let mut input = None;
    command.stdin(Stdio::null());
    if with_input {
        let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
        command.stdin(theirs);
        input = Some(ours);
    }
    let (output, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    command.stdout(theirs);
    let (errors, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    command.stderr(theirs);
    Ok(Ends {
        input,
        output,
        errors: Some(errors),
        terminal: None,
    })
}

fn terminal(command: &mut Command, size: WindowSize, identity: &Identity) -> io::Result<Ends> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(
        &ours,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    set_size(&ours, size)?;
    // So that the process, as that user, can open it again by its name.
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    if rustix::fs::fchown(&theirs, Some(uid), Some(gid)).is_ok() {
        rustix::fs::fchmod(&theirs, Mode::RUSR | Mode::WUSR | Mode::WGRP)?;
    }
    command.stdin(theirs.try_clone()?);
    command.stdout(theirs.try_clone()?);
    command.stderr(theirs);
    Ok(Ends {
        input: Some(ours.try_clone()?),
        output: ours.try_clone()?,
        errors: None,
        terminal: Some(ours),
    })
}

/// Tells a terminal its size.
pub(crate) fn set_size(terminal: &impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Makes a stream's end one that never waits.
pub(crate) fn nonblocking(fd: &impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}
