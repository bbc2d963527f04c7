//! The ioctls and events of a userfaultfd that somebody else has made (ioctl_userfaultfd(2), Linux include/uapi/linux/userfaultfd.h).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

const COPY: u64 = 0xc028_aa03;
const ZEROPAGE: u64 = 0xc020_aa04;
const WAKE: u64 = 0x8010_aa02;
const NEW: u64 = 0xaa00;

const MESSAGE_BYTES: usize = 32;
/// Events that are read at once.
const MOST_EVENTS: usize = 64;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMOVE: u8 = 0x15;

/// What happened to the memory behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Somebody waits for the page with this address.
    Fault(u64),
    /// These addresses were given back: they read as zeroes from now on.
    Remove(u64, u64),
    /// Something that no monitor asked to be told of.
    Other(u8),
}

/// Why nothing, or not all, was put in.
#[derive(Debug)]
pub(crate) enum Put {
    /// A page is there already.
    Exists,
    /// It is not, or no longer, memory that is served: so nobody waits for it.
    Unmapped,
    /// Pages are being taken away: what is told of that has to be read first.
    Changing,
    /// The process behind it is at its end.
    Gone,
    /// Anything else.
    Failed(io::Error),
}

/// A userfaultfd.
pub(crate) struct Uffd(OwnedFd);

impl Uffd {
    /// Takes a descriptor that came from a client.
    pub(crate) fn of_client(fd: OwnedFd) -> Result<Self, String> {
        let uffd = Self(fd);
        // Of an address that nobody has: no other kind of descriptor knows the request (its type, 0xaa, is userfaultfd's own).
        let mut nowhere = [0_u64, crate::PAGE_BYTES];
        if let Err(Errno::NOTTY | Errno::BADF | Errno::NOSYS | Errno::OPNOTSUPP) =
            uffd.ioctl(WAKE, &mut nowhere)
        {
            return Err("the descriptor that it sent is no userfaultfd".into());
        }
        // A read must not wait, and poll(2) tells of nothing otherwise.
        let flags = rustix::fs::fcntl_getfl(&uffd.0).map_err(|e| e.to_string())?;
        rustix::fs::fcntl_setfl(&uffd.0, flags | OFlags::NONBLOCK).map_err(|e| e.to_string())?;
        Ok(uffd)
    }

    fn ioctl<const N: usize>(&self, request: u64, argument: &mut [u64; N]) -> Result<(), Errno> {
        // SAFETY: each request of this file is called with as many words as its structure has, which live until the call returns. What
        // they point at is read by the kernel and lives as long; it writes to the other process alone.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }

    /// Puts bytes, whole pages, to an address where no page is yet, and wakes who waits for one of them.
    pub(crate) fn copy(&self, host_addr: u64, bytes: &[u8]) -> Result<(), Put> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            // struct uffdio_copy: where to, where from, how much, mode, how much it was.
            let to = host_addr + done as u64;
            let mut copy = [to, rest.as_ptr() as u64, rest.len() as u64, 0, 0];
            let result = self.ioctl(COPY, &mut copy);
            done += outcome(result, copy[4], rest.len())?;
        }
        Ok(())
    }

    /// As [`Self::copy`], of zeroes; no memory is taken for them.
    pub(crate) fn zero(&self, host_addr: u64, len: usize) -> Result<(), Put> {
        let mut done = 0;
        while done < len {
            // struct uffdio_zeropage: where to, how much, mode, how much it was.
            let mut zero = [host_addr + done as u64, (len - done) as u64, 0, 0];
            let result = self.ioctl(ZEROPAGE, &mut zero);
            done += outcome(result, zero[3], len - done)?;
        }
        Ok(())
    }

    /// Has who waits for this page look again.
    pub(crate) fn wake(&self, host_addr: u64) {
        // It was put in before, so that there is a range with it.
        let _ = self.ioctl(WAKE, &mut [host_addr, crate::PAGE_BYTES]);
    }

    /// What happened since the last call; nothing: it is all read.
    pub(crate) fn events(&self) -> io::Result<Vec<Event>> {
        let mut bytes = [0_u8; MOST_EVENTS * MESSAGE_BYTES];
        let got = match rustix::io::read(&self.0, &mut bytes) {
            Ok(got) => got,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let messages = bytes[..got].chunks_exact(MESSAGE_BYTES);
        Ok(messages.map(event).collect())
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// struct uffd_msg.
fn event(message: &[u8]) -> Event {
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    match message[0] {
        EVENT_PAGEFAULT => Event::Fault(word(16) / crate::PAGE_BYTES * crate::PAGE_BYTES),
        EVENT_REMOVE => Event::Remove(word(8), word(16)),
        other => {
            if other == EVENT_FORK {
                // Reading it has given this process a descriptor, in the first four bytes of the argument.
                drop(adopted(word(8) as u32));
            }
            Event::Other(other)
        }
    }
}

fn adopted(fd: u32) -> Option<OwnedFd> {
    let fd = RawFd::try_from(fd).ok()?;
    // SAFETY: the kernel has just made it for this process, and nobody else knows its number.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How many bytes went, of a request that wanted `all`. The kernel says so, or a negative error number.
fn outcome(result: Result<(), Errno>, said: u64, all: usize) -> Result<usize, Put> {
    let went = said as i64;
    match result {
        Ok(()) => Ok(all),
        Err(Errno::AGAIN) if went > 0 => Ok(all.min(went as usize)),
        Err(Errno::AGAIN) => Err(Put::Changing),
        Err(Errno::EXIST) => Err(Put::Exists),
        Err(Errno::NOENT) => Err(Put::Unmapped),
        // ENOSPC: older kernels, of a process that is at its end.
        Err(Errno::SRCH | Errno::NOSPC) => Err(Put::Gone),
        Err(e) => Err(Put::Failed(e.into())),
    }
}

/// Whether processes of this user may have the page faults of a guest answered by another process.
///
/// # Errors
/// They may not: what the host said.
pub fn may_be_served() -> io::Result<()> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: plain numbers.
    let got = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let refused = io::Error::last_os_error();
    if let Some(fd) = u32::try_from(got).ok().and_then(adopted) {
        drop(fd);
        return Ok(());
    }
    let Ok(device) = File::open("/dev/userfaultfd") else {
        return Err(refused);
    };
    // SAFETY: the argument is a number, not an address.
    let got = unsafe { libc::ioctl(device.as_raw_fd(), NEW as _, flags) };
    let refused = io::Error::last_os_error();
    match u32::try_from(got).ok().and_then(adopted) {
        Some(_) => Ok(()),
        None => Err(refused),
    }
}
