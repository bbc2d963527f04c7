//! The guest becomes somebody else: it is a copy, or goes on from an earlier moment. It is done part by part; one that fails keeps no other
//! from being done.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::TryLockError;
use std::time::{Duration, Instant};

use alveole_agent_protocol::{
    HookRun, MAX_HOOKS_MS, Process, Renewal, Renewed, RenewedInterface, RenewedPart,
};
use alveole_network::guest_config::{self, Change};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::clock::{now_ns, set_clock};
use crate::names::Names;
use crate::process::{self, Running};
use crate::reaper::Reaper;
use crate::session::Shared;
use crate::{boot_id, entropy};

/// Where hooks are: an image brings them, or its user puts them there.
const HOOKS: &str = "/etc/alveole/renew.d";
/// More hooks are not run. With [`MAX_OUTPUT_BYTES`] it bounds the answer, which is one message.
const MAX_HOOKS: usize = 64;
/// What is kept of all that hooks write; the rest is thrown away.
const MAX_OUTPUT_BYTES: usize = 32 << 10;
/// Of one hook, so that the first does not take all.
const MAX_HOOK_OUTPUT_BYTES: usize = 4 << 10;
/// How often what a hook has left is read after its end: what it has started may go on writing.
const MAX_LAST_READS: usize = 16;
/// After a hook was killed.
const KILLED_PATIENCE: Duration = Duration::from_secs(2);

/// What became of one part: what else is to be said, or why it failed.
type Done = Result<Option<String>, String>;

/// Makes the guest what is asked.
///
/// # Errors
///
/// Nothing was done: it is being done already.
pub(crate) fn renew(request: &Renewal, shared: &Shared) -> Result<Renewed, String> {
    let mut names = match shared.names.try_lock() {
        Ok(names) => names,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => {
            return Err(
                "another session makes the guest somebody else right now: wait for its end".into(),
            );
        }
    };
    let Renewal {
        entropy,
        unix_ns,
        hostname,
        machine_id,
        interfaces,
        hooks_ms,
    } = request;
    let mut renewed = Renewed::default();
    if !entropy.is_empty() {
        tell(
            &mut renewed,
            "entropy",
            entropy::add(entropy).map(|()| None),
        );
    }
    if let Some(unix_ns) = *unix_ns {
        let off_ns = now_ns().saturating_sub(unix_ns.into());
        let set = set_clock(unix_ns);
        if set.is_ok() {
            renewed.clock_off_ns = Some(i64::try_from(off_ns).unwrap_or(i64::MAX));
        }
        tell(&mut renewed, "clock", set.map(|()| None));
    }
    if let Some(hostname) = hostname {
        let done = names.rename(hostname).map(|()| None);
        tell(&mut renewed, "hostname", done);
    }
    if let Some(id) = machine_id {
        let done = names.set_machine_id(id).map(|()| None);
        tell(&mut renewed, "machine-id", done);
        // No reason to have no copy.
        tell(&mut renewed, "boot-id", Ok(boot_id::renew().err()));
    }
    if !interfaces.is_empty() {
        let done = network(interfaces, &mut names);
        tell(&mut renewed, "network", done);
    }
    if let Some(limit_ms) = *hooks_ms {
        let limit = Duration::from_millis(limit_ms.min(MAX_HOOKS_MS).into());
        let done = hooks(limit, &shared.reaper, &mut renewed.hooks);
        tell(&mut renewed, "hooks", done.map(|()| None));
    }
    Ok(renewed)
}

fn tell(renewed: &mut Renewed, part: &str, done: Done) {
    let (failed, remark) = match done {
        Ok(remark) => (None, remark),
        Err(text) => (Some(text), None),
    };
    renewed.parts.push(RenewedPart {
        part: part.into(),
        failed,
        remark,
    });
}

fn network(interfaces: &[RenewedInterface], names: &mut Names) -> Done {
    let change = |interface: &RenewedInterface| {
        Ok(Change {
            is: interface.is.clone(),
            becomes: interface.becomes.parse()?,
        })
    };
    let changes: Result<Vec<_>, alveole_network::Error> = interfaces.iter().map(change).collect();
    let changes = changes.map_err(|e| e.to_string())?;
    guest_config::renew(&changes).map_err(|e| e.to_string())?;
    names.move_to(&changes)
}

/// Runs all hooks, one after the other.
fn hooks(limit: Duration, reaper: &Reaper, runs: &mut Vec<HookRun>) -> Result<(), String> {
    let until = Instant::now() + limit;
    let found = match found_hooks() {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("cannot read the folder '{HOOKS}': {e}")),
    };
    if found.len() > MAX_HOOKS {
        return Err(format!(
            "there are {} executables in '{HOOKS}'; none was run, as at most {MAX_HOOKS} are",
            found.len()
        ));
    }
    let mut room = MAX_OUTPUT_BYTES;
    let mut wrong = Vec::new();
    for name in found {
        if Instant::now() >= until {
            wrong.push(format!(
                "the {} ms for hooks were over before '{name}' and those after it were started",
                limit.as_millis()
            ));
            break;
        }
        match hook(&name, until, room.min(MAX_HOOK_OUTPUT_BYTES), reaper) {
            Ok(run) => {
                room = room.saturating_sub(run.output.len());
                runs.push(run);
            }
            Err(text) => wrong.push(text),
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(wrong.join("; "))
}

/// The names of the executables, in order. One whose name is no text, or is hidden, is none.
fn found_hooks() -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(HOOKS)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // What a link leads to.
        let executable = fs::metadata(entry.path())
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
        if executable && !name.starts_with('.') {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

fn hook(name: &str, until: Instant, room: usize, reaper: &Reaper) -> Result<HookRun, String> {
    let process = Process {
        args: vec![format!("{HOOKS}/{name}")],
        ..Process::default()
    };
    let running = process::start(&process, reaper).map_err(|refusal| refusal.text)?;
    let Running {
        watched,
        output,
        errors,
        ..
    } = running;
    let broken = |e: io::Error| format!("cannot read what the hook '{name}' says: {e}");
    let mut streams = Vec::new();
    for stream in [Some(output), errors].into_iter().flatten() {
        process::nonblocking(&stream).map_err(broken)?;
        streams.push(stream);
    }
    let mut said = Vec::new();
    let mut in_time = true;
    while !wait(&watched.ended, &streams, until).map_err(broken)? {
        if Instant::now() >= until {
            in_time = false;
            break;
        }
        streams.retain(|stream| read(stream, room, &mut said));
    }
    if !in_time {
        let _ = reaper.kill_group(watched.pid);
        // So that the next one does not meet it.
        let gone = Instant::now() + KILLED_PATIENCE;
        while !wait(&watched.ended, &[], gone).map_err(broken)? && Instant::now() < gone {}
    }
    for _ in 0..MAX_LAST_READS {
        streams.retain(|stream| read(stream, room, &mut said));
    }
    Ok(HookRun {
        name: name.into(),
        exit: watched.exit.get().copied().filter(|_| in_time),
        output: String::from_utf8_lossy(&said).into_owned(),
    })
}

/// Waits until the hook has ended, which it says, or one of the streams has something, or the time is over.
fn wait(ended: &OwnedFd, streams: &[OwnedFd], until: Instant) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(ended, PollFlags::IN)];
    fds.extend(streams.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
    let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    match poll(&mut fds, left.as_ref()) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Reads once what there is, and keeps as much as there is room for. False: nothing comes any more.
fn read(stream: &OwnedFd, room: usize, said: &mut Vec<u8>) -> bool {
    let mut buffer = [0; MAX_HOOK_OUTPUT_BYTES];
    match rustix::io::read(stream, &mut buffer) {
        Ok(0) => false,
        Ok(count) => {
            let kept = count.min(room.saturating_sub(said.len()));
            said.extend_from_slice(&buffer[..kept]);
            true
        }
        Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}
