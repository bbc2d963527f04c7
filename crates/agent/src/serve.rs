//! Where sessions come from.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use alveole_agent_protocol::AGENT_PORT;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::parked::Parked;
use crate::reaper::Reaper;
use crate::session::{self, Shared};

/// More sessions at once are refused. Each has a thread.
const MAX_SESSIONS: usize = 1024;

/// Starts what all sessions need.
pub(crate) fn shared() -> Result<Arc<Shared>, String> {
    let shared = Arc::new(Shared {
        reaper: Reaper::default(),
        hidden: OnceLock::new(),
        names: Mutex::default(),
        parked: Parked::default(),
    });
    let reaping = Arc::clone(&shared);
    thread::Builder::new()
        .name("reaper".into())
        .spawn(move || reaping.reaper.run())
        .map_err(|e| format!("cannot start a thread: {e}"))?;
    Ok(shared)
}

/// Serves sessions at a unix socket.
pub(crate) fn unix(path: &Path) -> Result<Infallible, String> {
    // Orphans come to us, as they do to the first process.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| format!("cannot become the parent of orphans: {e}"))?;
    let listener = UnixListener::bind(path).map_err(|e| {
        format!(
            "cannot listen at '{}': {e}; is another agent there?",
            path.display()
        )
    })?;
    let shared = shared()?;
    loop {
        match listener.accept() {
            Ok((connection, _)) => begin(connection.into(), &shared, false),
            Err(e) => pause(&e),
        }
    }
}

/// Serves sessions of the host.
pub(crate) fn vsock(shared: &Arc<Shared>) -> Result<Infallible, String> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, AGENT_PORT)
        .map_err(|e| format!("cannot listen at port {AGENT_PORT} of vsock: {e}"))?;
    loop {
        match listener.accept() {
            // A guest's own processes have other ways, and are not all root.
            Ok((connection, from)) if from.cid() == VMADDR_CID_HOST => {
                begin(connection.into(), shared, false);
            }
            Ok(_) => {}
            Err(e) => pause(&e),
        }
    }
}

/// Serves a session in a thread of its own.
pub(crate) fn begin(connection: OwnedFd, shared: &Arc<Shared>, first: bool) {
    static SESSIONS: AtomicUsize = AtomicUsize::new(0);
    if SESSIONS.fetch_add(1, Ordering::Relaxed) >= MAX_SESSIONS {
        SESSIONS.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let shared = Arc::clone(shared);
    let started = thread::Builder::new()
        .name("session".into())
        .spawn(move || {
            if let Err(e) = session::serve(connection, &shared, first) {
                eprintln!("alveole-agent: a session broke off: {e}");
            }
            SESSIONS.fetch_sub(1, Ordering::Relaxed);
        });
    if started.is_err() {
        SESSIONS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// After an error that says that there is too much of something, which others give back.
fn pause(error: &std::io::Error) {
    eprintln!("alveole-agent: cannot take a connection: {error}");
    thread::sleep(Duration::from_millis(100));
}
