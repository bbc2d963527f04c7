//! Unix sockets as links.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;

use crate::message::{Carrier, MessageQueue};
use crate::stream::StreamQueue;
use crate::{LinkError, LinkFacts, LinkQueue, NetLink, Offloads};

/// What we ask for as a socket's buffer: room for a few of the longest frames. The host gives what it allows.
const BUFFER_BYTES: i32 = 1 << 20;

pub(crate) fn open_stream(path: &Path) -> Result<NetLink, LinkError> {
    let socket = UnixStream::connect(path).map_err(|source| LinkError::Socket {
        what: "connect to",
        path: path.to_owned(),
        source,
        cure: "start the program that listens there (passt, QEMU) first",
    })?;
    stream(format!("stream {}", path.display()), socket.into())
}

pub(crate) fn take_stream(fd: OwnedFd) -> Result<NetLink, LinkError> {
    check(fd.as_fd(), libc::SOCK_STREAM, "connected stream socket")?;
    stream(format!("stream descriptor {}", fd.as_raw_fd()), fd)
}

pub(crate) fn open_datagram(local: &Path, remote: &Path) -> Result<NetLink, LinkError> {
    let socket = UnixDatagram::bind(local).map_err(|source| LinkError::Socket {
        what: "bind",
        path: local.to_owned(),
        source,
        cure: "remove what is left there of a program that has ended",
    })?;
    socket.connect(remote).map_err(|source| {
        // What was bound here is nobody's.
        let _ = std::fs::remove_file(local);
        LinkError::Socket {
            what: "connect to",
            path: remote.to_owned(),
            source,
            cure: "start the program that has this socket first",
        }
    })?;
    datagrams(
        format!("datagrams {}", remote.display()),
        socket.into(),
        false,
    )
}

pub(crate) fn take_datagram(fd: OwnedFd) -> Result<NetLink, LinkError> {
    check(fd.as_fd(), libc::SOCK_DGRAM, "connected datagram socket")?;
    datagrams(
        format!("datagrams descriptor {}", fd.as_raw_fd()),
        fd,
        false,
    )
}

fn stream(name: String, fd: OwnedFd) -> Result<NetLink, LinkError> {
    enlarge(fd.as_fd());
    let queue = StreamQueue::new(fd).map_err(|source| step(&name, source))?;
    Ok(one_queue(name, Offloads::NONE, Box::new(queue)))
}

pub(crate) fn datagrams(name: String, fd: OwnedFd, has_header: bool) -> Result<NetLink, LinkError> {
    enlarge(fd.as_fd());
    let queue = MessageQueue::new(fd, Carrier::Datagrams, has_header)
        .map_err(|source| step(&name, source))?;
    let offloads = if has_header {
        Offloads::ALL
    } else {
        Offloads::NONE
    };
    Ok(one_queue(name, offloads, Box::new(queue)))
}

fn step(name: &str, source: io::Error) -> LinkError {
    LinkError::Step {
        link: name.to_owned(),
        what: "duplicate its descriptor",
        source,
    }
}

fn one_queue(name: String, offloads: Offloads, queue: Box<dyn LinkQueue>) -> NetLink {
    NetLink {
        facts: LinkFacts {
            name,
            offloads,
            mtu: None,
            mac: None,
        },
        queues: vec![queue],
        vhost: Vec::new(),
    }
}

/// Asks for larger buffers. A link works with small ones, too.
fn enlarge(fd: BorrowedFd<'_>) {
    for what in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
        let size = BUFFER_BYTES;
        // SAFETY: the option is a number, of which the call gets address and size.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                what,
                (&raw const size).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        };
    }
}

fn check(fd: BorrowedFd<'_>, kind: i32, wanted: &'static str) -> Result<(), LinkError> {
    let (mut found, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the option is a number, of which the call gets address and size.
    let asked = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut found).cast(),
            &raw mut len,
        )
    };
    // SAFETY: all zeroes is an address of no family.
    let mut peer: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: the call writes an address of at most `len` bytes.
    let peered = unsafe { libc::getpeername(fd.as_raw_fd(), (&raw mut peer).cast(), &raw mut len) };
    if asked < 0 || found != kind || peered < 0 {
        return Err(LinkError::Descriptor {
            fd: fd.as_raw_fd(),
            wanted,
        });
    }
    Ok(())
}
