//! Serves a memory file to monitors, by one thread that waits for all of them.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use alveole_thread_sandbox::{Role, SandboxError};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::PAGE_BYTES;
use crate::client::{Client, Parting};
use crate::memory::Memory;
use crate::pack::CHUNK_BYTES;

/// Most monitors at once: each has two descriptors, of which a process usually may have 1024. Others wait in the socket until one has ended.
const MAX_CLIENTS: usize = 256;
/// Most lines about clients. Abused by whoever may connect, and does so again and again.
const MAX_LINES: u32 = 1000;
/// How long the only client may take to come. Whoever was to start it may be gone.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);
/// So long nobody is taken when one could not be: descriptors are used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How memory is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serving {
    /// For the first client alone, and until its end.
    pub once: bool,
    /// What is put in for a fault at most: a power of two of pages, in bytes.
    pub at_once_bytes: u64,
}

impl Default for Serving {
    fn default() -> Self {
        Self {
            once: false,
            at_once_bytes: CHUNK_BYTES,
        }
    }
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// What is put in at once.
    #[error("{0} bytes cannot be put in at once: say a power of two from 4096 to 1048576")]
    AtOnce(u64),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Nobody came.
    #[error("no monitor has asked for memory within {FIRST_PATIENCE:?}")]
    Nobody,
    /// The only client was served wrongly.
    #[error("the monitor is not served: {0}")]
    Client(String),
    /// The host.
    #[error("cannot wait for monitors: {0}")]
    Wait(#[source] io::Error),
}

/// Serves `memory` to whoever connects, and tells about those that are refused. It enters its sandbox first: from then on this thread can do nothing else.
///
/// # Errors
/// It cannot enter its sandbox, or wait. With [`Serving::once`] also if nobody comes, or that client cannot be served.
pub fn serve(
    listener: UnixListener,
    memory: &mut Memory,
    serving: Serving,
    mut tell: impl FnMut(&str),
) -> Result<(), ServeError> {
    let at_once = serving.at_once_bytes;
    if !at_once.is_power_of_two() || !(PAGE_BYTES..=1 << 20).contains(&at_once) {
        return Err(ServeError::AtOnce(at_once));
    }
    // Whoever waits in it may be gone when it is taken.
    listener.set_nonblocking(true).map_err(ServeError::Wait)?;
    alveole_thread_sandbox::enter(Role::Pages, "pages")?;
    let mut listener = Some(listener);
    let mut clients: Vec<Client> = Vec::new();
    let mut lines = 0;
    let first_until = Instant::now() + FIRST_PATIENCE;
    let mut paused_until = None;
    loop {
        let now = Instant::now();
        paused_until = paused_until.filter(|until| *until > now);
        let takes = clients.len() < MAX_CLIENTS && paused_until.is_none();
        let open = listener.as_ref().filter(|_| takes);
        let mut due: Option<Duration> = paused_until.map(|until| until - now);
        if serving.once && clients.is_empty() {
            due = Some(first_until.saturating_duration_since(now));
        }
        let dues = clients.iter().filter_map(|client| client.due(now));
        due = dues.chain(due).min();
        let (ready, listener_ready) = wait(&clients, open, due)?;
        let mut parted = Vec::new();
        for (index, (client, Ready { stream, faults })) in clients.iter_mut().zip(ready).enumerate()
        {
            let mut done = Ok(());
            if stream.intersects(PollFlags::HUP | PollFlags::ERR) && faults.is_empty() {
                done = Err(Parting::Ended);
            } else if faults.intersects(PollFlags::ERR | PollFlags::NVAL) {
                // It has made it one whose reading waits, which poll(2) tells so.
                let why = "its userfaultfd cannot be waited for any more";
                done = Err(Parting::Refused(why.into()));
            } else if stream.contains(PollFlags::IN) {
                done = client.hear(memory);
            }
            done = done.and_then(|()| client.look_after(memory, at_once));
            if let Err(why) = done {
                parted.push((index, why));
            }
        }
        for (index, why) in parted.into_iter().rev() {
            clients.swap_remove(index);
            match why {
                Parting::Refused(why) if serving.once => return Err(ServeError::Client(why)),
                Parting::Refused(why) if lines < MAX_LINES => {
                    lines += 1;
                    tell(&format!("a monitor is not served any more: {why}"));
                }
                _ => {}
            }
        }
        if serving.once && clients.is_empty() && listener.is_none() {
            return Ok(());
        }
        if serving.once && clients.is_empty() && Instant::now() >= first_until {
            return Err(ServeError::Nobody);
        }
        if !listener_ready {
            continue;
        }
        match listener.as_ref().map(UnixListener::accept) {
            Some(Ok((stream, _))) => {
                clients.push(Client::new(stream));
                if serving.once {
                    listener = None;
                }
            }
            Some(Err(e)) if e.kind() != io::ErrorKind::WouldBlock => {
                paused_until = Some(Instant::now() + ACCEPT_PAUSE);
            }
            _ => {}
        }
    }
}

/// What there is to do for a client.
struct Ready {
    stream: PollFlags,
    faults: PollFlags,
}

/// Waits until there is something to do: for each client, and for the listener.
fn wait(
    clients: &[Client],
    listener: Option<&UnixListener>,
    due: Option<Duration>,
) -> Result<(Vec<Ready>, bool), ServeError> {
    let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(clients.len() * 2 + 1);
    for client in clients {
        let (stream, faults) = (client.stream(), client.faults());
        match faults {
            // Only its hanging up, which is always told.
            Some(faults) => {
                fds.push(PollFd::from_borrowed_fd(stream, PollFlags::empty()));
                fds.push(PollFd::from_borrowed_fd(faults, PollFlags::IN));
            }
            None => fds.push(PollFd::from_borrowed_fd(stream, PollFlags::IN)),
        }
    }
    if let Some(listener) = listener {
        fds.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
    }
    let due = due.map(|due| Timespec {
        tv_sec: due.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: due.subsec_nanos().into(),
    });
    match rustix::event::poll(&mut fds, due.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(ServeError::Wait(e.into())),
    }
    let mut flags = fds.iter().map(PollFd::revents);
    let mut next = || flags.next().unwrap_or(PollFlags::empty());
    let ready = clients
        .iter()
        .map(|client| Ready {
            stream: next(),
            faults: match client.faults() {
                Some(_) => next(),
                None => PollFlags::empty(),
            },
        })
        .collect();
    Ok((ready, !next().is_empty()))
}
