//! What a worker is, and what it may ask of the loop while it is called.

use std::any::Any;
use std::collections::HashMap;
use std::ops::BitOr;
use std::os::fd::{AsRawFd, RawFd};

use event_manager::{Error as ManagerError, EventOps, EventSet, Events, SubscriberId};

use crate::EventLoopError;

/// Something that works when one of its descriptors is ready. See the contract in the crate's head.
pub trait Worker: Any + Send {
    /// A name for messages.
    fn name(&self) -> &'static str;

    /// Watches the first descriptors. Called once at each attach, on the thread that hosts the loop
    /// (or on the caller's before the loop runs).
    ///
    /// # Errors
    /// Whatever keeps the worker from working. It is handed back and nothing stays watched.
    fn start(&mut self, ops: &mut Ops<'_>) -> Result<(), EventLoopError>;

    /// One descriptor is ready. Events of one round that the worker has just unwatched do not arrive.
    fn on_event(&mut self, event: Event, ops: &mut Ops<'_>);
}

impl dyn Worker {
    /// Gives the worker back as what it was when it was attached.
    ///
    /// # Errors
    /// It is not a `W`; the worker comes back unchanged.
    pub fn downcast<W: Worker>(self: Box<Self>) -> Result<Box<W>, Box<Self>> {
        if (&*self as &dyn Any).is::<W>() {
            let any: Box<dyn Any> = self;
            // Checked on the line above; there is no other way to keep the worker on a miss.
            Ok(any.downcast().unwrap_or_else(|_| unreachable!()))
        } else {
            Err(self)
        }
    }
}

/// Names one attached worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkerId(pub(crate) SubscriberId);

/// A worker's own name for one of its descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// What to be told about a descriptor. Hang-up and error are always told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest(u32);

impl Interest {
    /// Only hang-up and error.
    pub const NONE: Self = Self(0);
    /// There is something to read, or the end.
    pub const READABLE: Self = Self(1);
    /// A write would not wait.
    pub const WRITABLE: Self = Self(2);
    /// Tell once per change, not as long as it lasts. On an eventfd: once per write, so that a
    /// doorbell needs no read.
    pub const EDGE: Self = Self(4);

    fn event_set(self) -> EventSet {
        let mut set = EventSet::empty();
        for (bit, flag) in [
            (Self::READABLE, EventSet::IN),
            (Self::WRITABLE, EventSet::OUT),
            (Self::EDGE, EventSet::EDGE_TRIGGERED),
        ] {
            if self.0 & bit.0 != 0 {
                set |= flag;
            }
        }
        set
    }
}

impl BitOr for Interest {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What a descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready(EventSet);

impl Ready {
    /// There is something to read, or the end.
    #[must_use]
    pub fn readable(self) -> bool {
        self.0.contains(EventSet::IN)
    }
    /// A write would not wait.
    #[must_use]
    pub fn writable(self) -> bool {
        self.0.contains(EventSet::OUT)
    }
    /// The other side is gone. There may be bytes left to read.
    #[must_use]
    pub fn hung_up(self) -> bool {
        self.0.contains(EventSet::HANG_UP)
    }
    /// The descriptor is in error.
    #[must_use]
    pub fn error(self) -> bool {
        self.0.contains(EventSet::ERROR)
    }
}

/// One descriptor is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Which one.
    pub token: Token,
    /// For what.
    pub ready: Ready,
}

/// What a worker may ask of the loop while it is called.
pub struct Ops<'a> {
    worker: &'static str,
    inner: &'a mut dyn Watcher,
    watched: &'a mut Watched,
    leave: &'a mut bool,
}

impl<'a> Ops<'a> {
    pub(crate) fn new(
        worker: &'static str,
        inner: &'a mut dyn Watcher,
        watched: &'a mut Watched,
        leave: &'a mut bool,
    ) -> Self {
        Self {
            worker,
            inner,
            watched,
            leave,
        }
    }

    /// Watches `fd` under `token`.
    ///
    /// # Errors
    /// The descriptor is watched already (by anybody on this loop), the token is taken, or epoll does
    /// not take this kind of file: then `always_ready` is set.
    pub fn watch(
        &mut self,
        fd: &impl AsRawFd,
        token: Token,
        interest: Interest,
    ) -> Result<(), EventLoopError> {
        let fd = fd.as_raw_fd();
        if self.watched.0.contains_key(&token.0) {
            return Err(self.watch_error(fd, token, "the token is in use".into(), false));
        }
        let events = Events::with_data_raw(fd, token.0, interest.event_set());
        self.inner
            .add(events)
            .map_err(|e| self.manager_error(fd, token, &e))?;
        self.watched.0.insert(token.0, Watch { fd, hangups: 0 });
        Ok(())
    }

    /// Changes what to be told about the descriptor under `token`.
    ///
    /// # Errors
    /// The token is not watched, or epoll refuses.
    pub fn rewatch(&mut self, token: Token, interest: Interest) -> Result<(), EventLoopError> {
        let fd = self.watched_fd(token)?;
        let events = Events::with_data_raw(fd, token.0, interest.event_set());
        self.inner
            .modify(events)
            .map_err(|e| self.manager_error(fd, token, &e))
    }

    /// Stops watching the descriptor under `token`. Call it before the descriptor is closed.
    ///
    /// # Errors
    /// The token is not watched, or the descriptor was closed before (a bug of the worker).
    pub fn unwatch(&mut self, token: Token) -> Result<(), EventLoopError> {
        let fd = self.watched_fd(token)?;
        self.watched.0.remove(&token.0);
        self.inner
            .remove(Events::empty_raw(fd))
            .map_err(|e| self.manager_error(fd, token, &e))
    }

    /// Removes the worker from the loop and drops it, once this call and the events of this round are
    /// over.
    pub fn leave(&mut self) {
        *self.leave = true;
    }

    /// Counts a hang-up report; true when the worker has ignored one too many.
    pub(crate) fn hangup_is_ignored(&mut self, token: Token) -> bool {
        self.watched.0.get_mut(&token.0).is_some_and(|w| {
            w.hangups += 1;
            w.hangups > crate::MAX_HANGUP_REPORTS
        })
    }

    fn watched_fd(&self, token: Token) -> Result<RawFd, EventLoopError> {
        self.watched
            .0
            .get(&token.0)
            .map(|w| w.fd)
            .ok_or(EventLoopError::UnknownToken {
                worker: self.worker,
                token: token.0,
            })
    }

    fn manager_error(&self, fd: RawFd, token: Token, e: &ManagerError) -> EventLoopError {
        // epoll_ctl(2): EPERM says that the file does not support epoll, as a regular file.
        const EPERM: i32 = 1;
        let always_ready = matches!(e, ManagerError::Epoll(n) if n.errno() == EPERM);
        self.watch_error(fd, token, e.to_string(), always_ready)
    }

    fn watch_error(
        &self,
        fd: RawFd,
        token: Token,
        why: String,
        always_ready: bool,
    ) -> EventLoopError {
        EventLoopError::Watch {
            worker: self.worker,
            token: token.0,
            fd,
            why,
            always_ready,
        }
    }
}

/// The three calls of [`EventOps`]; a trait only so that [`Ops`] has one lifetime.
pub(crate) trait Watcher {
    fn add(&mut self, events: Events) -> Result<(), ManagerError>;
    fn modify(&mut self, events: Events) -> Result<(), ManagerError>;
    fn remove(&mut self, events: Events) -> Result<(), ManagerError>;
}

impl Watcher for EventOps<'_> {
    fn add(&mut self, events: Events) -> Result<(), ManagerError> {
        EventOps::add(self, events)
    }
    fn modify(&mut self, events: Events) -> Result<(), ManagerError> {
        EventOps::modify(self, events)
    }
    fn remove(&mut self, events: Events) -> Result<(), ManagerError> {
        EventOps::remove(self, events)
    }
}

/// The descriptors of one worker by token.
#[derive(Default)]
pub(crate) struct Watched(HashMap<u32, Watch>);

struct Watch {
    fd: RawFd,
    hangups: u32,
}

pub(crate) fn event_of(events: Events) -> Event {
    Event {
        token: Token(events.data()),
        ready: Ready(events.event_set()),
    }
}
