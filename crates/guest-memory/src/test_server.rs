//! For tests: a thread that serves RAM as another process would.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::served::{abi, ioctl, open_userfaultfd};

/// Serves the RAM of one guest. It goes away when it is dropped.
pub struct TestServer {
    /// Closed, it ends the thread.
    end: Option<UnixStream>,
    thread: Option<JoinHandle<io::Result<()>>>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    asked: AtomicU64,
    served: AtomicU64,
    message: Mutex<String>,
}

/// Whether this process may have its pages served. If not, says aloud and counts that `test` is skipped.
#[must_use]
pub fn may_serve(test: &str) -> bool {
    let Err(why) = open_userfaultfd() else {
        return true;
    };
    skip(test, &why.to_string());
    false
}

/// Says aloud, and counts, that `test` is skipped.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(path);
        let _ = log.and_then(|mut log| log.write_all(line.as_bytes()));
    }
}

impl TestServer {
    /// Listens at `socket` and serves whoever connects first with what `pages` says of each page of the memory file, counted and as
    /// large as it is told that pages are; of which it says nothing, nobody is ever given.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(
        socket: &Path,
        pages: impl Fn(u64) -> Option<Vec<u8>> + Send + 'static,
    ) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let (end, until) = UnixStream::pair()?;
        let state = Arc::new(State::default());
        let of_thread = state.clone();
        let thread = std::thread::spawn(move || serve(&listener, &until, &pages, &of_thread));
        Ok(Self {
            end: Some(end),
            thread: Some(thread),
            state,
        })
    }

    /// How many pages it was asked for.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.state.asked.load(Ordering::Acquire)
    }

    /// How many pages it has put in.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.state.served.load(Ordering::Acquire)
    }

    /// What it was told of RAM.
    #[must_use]
    pub fn message(&self) -> String {
        let message = self.state.message.lock();
        message.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Dies.
    pub fn stop(self) {}
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits until one of the two can be read; false when it is `until`.
fn wait(fd: RawFd, until: &UnixStream) -> bool {
    let entry = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [entry(fd), entry(until.as_raw_fd())];
    // SAFETY: an array of as many entries as are said.
    unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
    fds[1].revents == 0
}

fn serve(
    listener: &UnixListener,
    until: &UnixStream,
    pages: &dyn Fn(u64) -> Option<Vec<u8>>,
    state: &State,
) -> io::Result<()> {
    if !wait(listener.as_raw_fd(), until) {
        return Ok(());
    }
    let (stream, _) = listener.accept()?;
    // Whoever connects may say nothing.
    if !wait(stream.as_raw_fd(), until) {
        return Ok(());
    }
    let (message, uffd) = receive(&stream)?;
    // Nothing in it but names, punctuation and five numbers a range.
    let numbers: Vec<u64> = message
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect();
    *state.message.lock().unwrap_or_else(PoisonError::into_inner) = message;
    while wait(uffd.as_raw_fd(), until) {
        let mut event = [0u8; 32];
        // SAFETY: an event has 32 bytes (struct uffd_msg).
        let got = unsafe { libc::read(uffd.as_raw_fd(), event.as_mut_ptr().cast(), event.len()) };
        if got != 32 || event[0] != abi::EVENT_PAGEFAULT {
            continue;
        }
        let mut addr = [0; 8];
        addr.copy_from_slice(&event[16..24]);
        let addr = u64::from_ne_bytes(addr);
        let range = numbers
            .chunks_exact(5)
            .find(|r| (r[0]..r[0] + r[1]).contains(&addr));
        let Some(range) = range else { continue };
        let page_size = range[3];
        let addr = addr / page_size * page_size;
        state.asked.fetch_add(1, Ordering::AcqRel);
        let Some(page) = pages((addr - range[0] + range[2]) / page_size) else {
            continue;
        };
        // struct uffdio_copy: where to, where from, how much, mode, what was copied.
        let mut copy = [addr, page.as_ptr() as u64, page.len() as u64, 0, 0];
        // Counted first: who waits goes on at once.
        state.served.fetch_add(1, Ordering::AcqRel);
        ioctl(&uffd, abi::IOC_COPY, &mut copy)?;
    }
    Ok(())
}

/// One message, and the descriptor that comes with it.
fn receive(stream: &UnixStream) -> io::Result<(String, OwnedFd)> {
    #[repr(C, align(8))]
    struct Room([u8; 64]);
    let (mut room, mut bytes) = (Room([0; 64]), vec![0u8; 65536]);
    let mut iovec = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: a message header of zeroes is valid; it, its range and its control data live until the call returns. A descriptor
    // that came belongs to nobody else.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iovec;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut room.0).cast();
        message.msg_controllen = room.0.len() as _;
        let got = libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC);
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() {
            return Err(io::Error::other("no descriptor came"));
        }
        let fd: RawFd = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast());
        bytes.truncate(got);
        let text = String::from_utf8(bytes).map_err(io::Error::other)?;
        Ok((text, OwnedFd::from_raw_fd(fd)))
    }
}
