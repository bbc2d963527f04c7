//! The system calls that std does not offer, made safe one by one.
#![expect(
    unsafe_code,
    reason = "poll, recv, send, socket and terminal calls of libc"
)]

use std::ffi::OsStr;
use std::io;
use std::mem::{MaybeUninit, offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use libc::{c_int, c_short};

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn check_len(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether a read (or a write) of `fd` would not wait. A hang-up counts: the call then says so.
pub(crate) fn is_ready(fd: BorrowedFd<'_>, to_write: bool) -> bool {
    let events: c_short = if to_write {
        libc::POLLOUT
    } else {
        libc::POLLIN
    };
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd for the time of the call.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

/// Receives without waiting, whatever the socket's flags are.
pub(crate) fn recv_now(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    let (at, len) = (into.as_mut_ptr().cast(), into.len());
    // SAFETY: `at` and `len` are those of a slice that is ours for the time of the call.
    check_len(unsafe { libc::recv(fd.as_raw_fd(), at, len, libc::MSG_DONTWAIT) })
}

/// Sends without waiting and without SIGPIPE, whatever the socket's flags are.
pub(crate) fn send_now(fd: BorrowedFd<'_>, from: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and length are those of a live slice, which is only read.
    check_len(unsafe { libc::send(fd.as_raw_fd(), from.as_ptr().cast(), from.len(), flags) })
}

/// A unix stream socket that does not wait, not bound or connected yet.
pub(crate) fn unix_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: the call above gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Connects `socket` to a path. A listener with a full backlog gives `EAGAIN`.
pub(crate) fn connect(socket: &OwnedFd, path: &OsStr) -> io::Result<()> {
    let (addr, len) = address(path)?;
    // SAFETY: `addr` is a whole sockaddr_un and `len` no more than its size.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const addr).cast(), len) })?;
    Ok(())
}

/// Binds `socket` to a path that only this user can open, and listens.
pub(crate) fn bind_and_listen(socket: &OwnedFd, path: &OsStr) -> io::Result<()> {
    let (addr, len) = address(path)?;
    let fd = socket.as_raw_fd();
    // The mode of the unbound socket becomes the mode of the file: no moment in which others may
    // connect, and no umask of the whole process changed.
    // SAFETY: takes no pointers.
    check(unsafe { libc::fchmod(fd, 0o600) })?;
    // SAFETY: `addr` is a whole sockaddr_un and `len` no more than its size.
    check(unsafe { libc::bind(fd, (&raw const addr).cast(), len) })?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::listen(fd, 8) })?;
    Ok(())
}

fn address(path: &OsStr) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all zeroes is a valid sockaddr_un.
    let mut addr: libc::sockaddr_un = unsafe { zeroed() };
    addr.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let path = path.as_bytes();
    if path.len() >= addr.sun_path.len() || path.contains(&0) {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, &from) in addr.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    // The final zero belongs to the length.
    let len = offset_of!(libc::sockaddr_un, sun_path) + path.len() + 1;
    debug_assert!(len <= size_of::<libc::sockaddr_un>());
    Ok((addr, len as libc::socklen_t))
}

/// The settings of a terminal.
pub(crate) fn terminal_settings(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: `settings` has room for a termios.
    check(unsafe { libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) })?;
    // SAFETY: the call above succeeded and so has filled it.
    Ok(unsafe { settings.assume_init() })
}

/// Changes the settings of a terminal at once. Async-signal-safe. Not with `tcsetattr`: glibc's reads the
/// settings back (`TCGETS`), which a confined thread may not do.
pub(crate) fn set_terminal(fd: c_int, settings: &libc::termios) -> io::Result<()> {
    // SAFETY: `settings` is a live termios, which is only read; the kernel's own is the first part of it.
    check(unsafe { libc::ioctl(fd, libc::TCSETS, &raw const *settings) })?;
    Ok(())
}

/// Keys reach the guest one by one and unchanged. Output processing stays as it was, so that log lines
/// of ours on the same terminal do not form stairs.
pub(crate) fn make_raw(settings: &libc::termios) -> libc::termios {
    let mut raw = *settings;
    // SAFETY: `raw` is a live termios.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    raw.c_oflag = settings.c_oflag;
    raw
}

/// Whether this process may read from the terminal: it is in the foreground, or not in the terminal's
/// session at all.
pub(crate) fn in_foreground(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: neither call takes a pointer.
    let (foreground, ours) = unsafe { (libc::tcgetpgrp(fd.as_raw_fd()), libc::getpgrp()) };
    foreground < 0 || foreground == ours
}
