//! One monitor whose memory is served: it says where that is, then touches pages, then hangs up.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::PAGE_BYTES;
use crate::memory::{Content, Memory};
use crate::message::{self, MAX_MESSAGE_BYTES, MappedRange};
use crate::packed::runs;
use crate::uffd::{Event, Put, Uffd};

/// How long a client may take to say where its memory is. Abused by one that says nothing.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(10);
/// Most faults that wait until pages are taken away elsewhere. Abused by a client with many threads.
const MAX_WAITING: usize = 4096;
/// Descriptors that one message may bring, to be closed again.
const MOST_DESCRIPTORS: usize = 4;

/// Why a client is served no longer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// It hung up.
    Ended,
    /// It did something wrong, or memory is damaged.
    Refused(String),
}

fn refused<T>(why: impl Into<String>) -> Result<T, Parting> {
    Err(Parting::Refused(why.into()))
}

pub(crate) struct Client {
    stream: UnixStream,
    state: State,
}

enum State {
    /// It has not said all yet.
    Greeting {
        message: Vec<u8>,
        uffd: Option<OwnedFd>,
        until: Instant,
    },
    Served(Served),
}

struct Served {
    uffd: Uffd,
    ranges: Vec<Range>,
    /// Faults that could not be answered yet.
    waiting: VecDeque<u64>,
}

struct Range {
    mapped: MappedRange,
    /// A bit for each page that was given back; none before the first.
    removed: Vec<u64>,
}

impl Range {
    fn end(&self) -> u64 {
        self.mapped.host_addr + self.mapped.size
    }

    fn page(&self, host_addr: u64) -> usize {
        ((host_addr - self.mapped.host_addr) / PAGE_BYTES) as usize
    }

    fn is_removed(&self, page: usize) -> bool {
        let word = self.removed.get(page / 64);
        word.is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Notes the part of `start..end` that is of this range.
    fn remove(&mut self, start: u64, end: u64) {
        let (start, end) = (start.max(self.mapped.host_addr), end.min(self.end()));
        if start >= end {
            return;
        }
        if self.removed.is_empty() {
            let pages = (self.mapped.size / PAGE_BYTES) as usize;
            self.removed = vec![0; pages.div_ceil(64)];
        }
        for page in self.page(start)..self.page(end - 1) + 1 {
            self.removed[page / 64] |= 1 << (page % 64);
        }
    }
}

impl Client {
    /// One that has just connected.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            state: State::Greeting {
                message: Vec::new(),
                uffd: None,
                until: Instant::now() + MESSAGE_PATIENCE,
            },
        }
    }

    pub(crate) fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Where its faults are told, once it has said where its memory is.
    pub(crate) fn faults(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Greeting { .. } => None,
            State::Served(served) => Some(served.uffd.as_fd()),
        }
    }

    /// When it has to be looked after again though nothing happens.
    pub(crate) fn due(&self, now: Instant) -> Option<Duration> {
        match &self.state {
            State::Greeting { until, .. } => Some(until.saturating_duration_since(now)),
            // Nothing tells when whoever takes pages away has gone on.
            State::Served(served) => {
                (!served.waiting.is_empty()).then_some(Duration::from_millis(1))
            }
        }
    }

    /// Takes what it says. With the last of it, it is served.
    pub(crate) fn hear(&mut self, memory: &Memory) -> Result<(), Parting> {
        let State::Greeting { message, uffd, .. } = &mut self.state else {
            // Nothing more is said; its hanging up is told otherwise.
            return Ok(());
        };
        let (got, came) = receive(&self.stream, message)?;
        if came.len() + usize::from(uffd.is_some()) > 1 {
            return refused("it sent more than one descriptor");
        }
        if let Some(fd) = came.into_iter().next() {
            *uffd = Some(fd);
        }
        if got == 0 {
            return Err(Parting::Ended);
        }
        let ranges = match message::read(message, memory.pages_bytes()) {
            Ok(Some(ranges)) => ranges,
            Ok(None) if message.len() > MAX_MESSAGE_BYTES => {
                return refused(format!(
                    "what it says of its memory is longer than {MAX_MESSAGE_BYTES} bytes"
                ));
            }
            Ok(None) => return Ok(()),
            Err(why) => return Err(Parting::Refused(why)),
        };
        let Some(fd) = uffd.take() else {
            return refused("it sent no userfaultfd with what it says of its memory");
        };
        self.state = State::Served(Served {
            uffd: Uffd::of_client(fd).map_err(Parting::Refused)?,
            ranges: ranges
                .into_iter()
                .map(|mapped| Range {
                    mapped,
                    removed: Vec::new(),
                })
                .collect(),
            waiting: VecDeque::new(),
        });
        Ok(())
    }

    /// Looks after it: faults that can be answered are.
    pub(crate) fn look_after(&mut self, memory: &mut Memory, at_once: u64) -> Result<(), Parting> {
        match &mut self.state {
            State::Greeting { until, .. } if Instant::now() >= *until => refused(format!(
                "it has not said where its memory is within {MESSAGE_PATIENCE:?}"
            )),
            State::Greeting { .. } => Ok(()),
            State::Served(served) => served.answer(memory, at_once),
        }
    }
}

impl Served {
    fn answer(&mut self, memory: &mut Memory, at_once: u64) -> Result<(), Parting> {
        let events = match self.uffd.events() {
            Ok(events) => events,
            Err(e) => return refused(format!("its userfaultfd cannot be read: {e}")),
        };
        for event in events {
            match event {
                Event::Fault(_) if self.waiting.len() >= MAX_WAITING => {
                    return refused(format!("more than {MAX_WAITING} of its faults wait"));
                }
                Event::Fault(addr) => self.waiting.push_back(addr),
                // Before any fault: whoever touches such a page again is to find zeroes.
                Event::Remove(start, end) => {
                    for range in &mut self.ranges {
                        range.remove(start, end);
                    }
                }
                Event::Other(kind) => {
                    return refused(format!(
                        "it does with its memory what is not served (event {kind:#x} of userfaultfd)"
                    ));
                }
            }
        }
        for _ in 0..self.waiting.len() {
            let Some(addr) = self.waiting.pop_front() else {
                break;
            };
            match self.put_in(addr, memory, at_once)? {
                Ok(()) | Err(Put::Unmapped) => {}
                Err(Put::Changing) => {
                    self.waiting.push_front(addr);
                    break;
                }
                Err(Put::Gone) => return Err(Parting::Ended),
                Err(Put::Exists) => self.uffd.wake(addr),
                Err(Put::Failed(e)) => {
                    return refused(format!(
                        "nothing can be put into its memory at {addr:#x}: {e}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Puts in the page at `addr`, and those that come with it where none of them has been there.
    fn put_in(
        &self,
        addr: u64,
        memory: &mut Memory,
        at_once: u64,
    ) -> Result<Result<(), Put>, Parting> {
        let found = self
            .ranges
            .iter()
            .find(|r| (r.mapped.host_addr..r.end()).contains(&addr));
        let Some(range) = found else {
            return refused(format!(
                "it waits for the page at {addr:#x}, which it did not say is of its memory"
            ));
        };
        if range.is_removed(range.page(addr)) {
            return Ok(self.uffd.zero(addr, PAGE_BYTES as usize));
        }
        let MappedRange {
            host_addr, offset, ..
        } = range.mapped;
        let wanted = addr - host_addr + offset;
        let (window, content) = match memory.around(wanted, at_once) {
            Ok(found) => found,
            Err(e) => return refused(format!("memory cannot be had: {e}")),
        };
        // Of the window what is of this range.
        let from = window.start.max(offset);
        let to = window.end.min(offset + range.mapped.size);
        let host = |at: u64| at - offset + host_addr;
        let pages = range.page(host(from))..range.page(host(to - 1)) + 1;
        let bytes = match content {
            Content::Zeroes => None,
            Content::Bytes(bytes) => {
                let part = (from - window.start) as usize..(to - window.start) as usize;
                Some(&bytes[part])
            }
        };
        if !pages.clone().any(|page| range.is_removed(page)) {
            match self.put(host(from), (to - from) as usize, bytes) {
                // Some are there: it has been touched before, and what is there may have been written to. Or some are gone.
                Err(Put::Exists | Put::Unmapped) => {}
                done => return Ok(done),
            }
        }
        let page = PAGE_BYTES as usize;
        let alone = (wanted - from) as usize..(wanted - from) as usize + page;
        Ok(self.put(addr, page, bytes.map(|bytes| &bytes[alone])))
    }

    /// Puts in bytes, or zeroes where there are none. Pages of zeroes take no memory.
    fn put(&self, host_addr: u64, len: usize, bytes: Option<&[u8]>) -> Result<(), Put> {
        let Some(bytes) = bytes else {
            return self.uffd.zero(host_addr, len);
        };
        for run in runs(bytes) {
            let at = host_addr + run.bytes.start as u64;
            match run.zeroes {
                true => self.uffd.zero(at, run.bytes.len())?,
                false => self.uffd.copy(at, &bytes[run.bytes])?,
            }
        }
        Ok(())
    }
}

/// What is there to be read, behind what came before, and the descriptors that come with it. How many bytes; none: it has hung up.
fn receive(stream: &UnixStream, message: &mut Vec<u8>) -> Result<(usize, Vec<OwnedFd>), Parting> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let mut bytes = [0; 4096];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        flags,
    );
    let got = match got {
        Ok(got) => got.bytes,
        // Nothing is there after all.
        Err(Errno::AGAIN | Errno::INTR) => return Ok((1, Vec::new())),
        Err(_) => return Err(Parting::Ended),
    };
    message.extend(&bytes[..got]);
    let mut came = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = part {
            came.extend(fds);
        }
    }
    Ok((got, came))
}
