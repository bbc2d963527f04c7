//! One epoll thread that hosts workers.
//!
//! A [`Worker`] owns file descriptors and is called on the loop's thread when one of them is ready. A
//! worker is attached, runs, and is handed back by detach: whoever owns the machine moves it in and
//! out, nobody shares it. Other threads speak to the loop through a [`LoopHandle`].
//!
//! Deliberately does not know: what a worker works for, queues, devices, time. A worker that needs a
//! clock watches a timerfd of its own. This is the only crate that names epoll.
//!
//! # The contract of a worker
//! - **Never wait.** Everybody on the loop waits with you.
//! - **Level-triggered means: take what is there or stop watching.** A worker that leaves a watched
//!   descriptor readable is called again at once, for ever: it costs a whole core. The loop cannot
//!   tell this from honest load, so it only makes it visible ([`LoopCounters::rounds`] runs away); use
//!   [`Interest::EDGE`] where a doorbell needs no read at all.
//! - **A hang-up cannot be masked.** epoll reports `HUP` and `ERR` whatever the interest is. Unwatch a
//!   descriptor that has hung up. The loop itself stops watching one after
//!   [`MAX_HANGUP_REPORTS`] ignored reports and says so in the log.
//! - **Unwatch before closing.** epoll watches the open file, not its number: closed here but open
//!   elsewhere (a duplicate, an inherited copy) it would go on reporting under a number that belongs
//!   to somebody else by then. Detaching and leaving unwatch everything by themselves.

mod mailbox;
mod run;
mod worker;

pub use mailbox::LoopHandle;
pub use run::{EventLoop, LoopCounters};
pub use worker::{Event, Interest, Ops, Ready, Token, Worker, WorkerId};

/// How often a worker may be told of a hang-up on one descriptor before the loop stops watching it.
/// Abused by a worker with a bug: the peer of a socket hangs up, the worker neither unwatches nor
/// closes, and the thread spins. Large enough for a worker that drains a full socket in small bites.
pub const MAX_HANGUP_REPORTS: u32 = 10_000;

/// Why the loop did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// The epoll instance or the loop's own eventfd could not be made.
    #[error("cannot create the event loop: {0}; raise the limit of open files (ulimit -n)")]
    Create(String),
    /// A descriptor could not be watched.
    #[error("cannot watch descriptor {fd} (token {token}) of worker {worker}: {why}")]
    Watch {
        /// Name of the worker.
        worker: &'static str,
        /// Token it asked for.
        token: u32,
        /// The descriptor.
        fd: i32,
        /// What epoll said; `EPERM` means a kind of file that is always ready (a regular file).
        why: String,
        /// Whether the file is of a kind that epoll does not take because it is always ready.
        always_ready: bool,
    },
    /// A token that is not watched.
    #[error("worker {worker} watches nothing under token {token}")]
    UnknownToken {
        /// Name of the worker.
        worker: &'static str,
        /// The token.
        token: u32,
    },
    /// No such worker: it left by itself or was detached before.
    #[error("worker {0:?} is not attached: it has left, or was detached before")]
    UnknownWorker(WorkerId),
    /// The loop has ended.
    #[error("the event loop has stopped and takes no more orders")]
    Stopped,
    /// A worker called a function that waits for the loop it runs on.
    #[error("attach and detach wait for the event loop and cannot be called on its own thread")]
    WouldDeadlock,
    /// epoll failed while waiting.
    #[error("cannot wait for events: {0}; this is a bug of the monitor, please report it")]
    Wait(String),
}
