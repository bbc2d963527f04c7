//! Sockets of the host: the one that listens, and those of connections that the guest begins.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen, recv,
    send, socket,
};
use nix::sys::stat::{Mode, fchmod};

use crate::{MAX_GUEST_CID, MAX_PATH_BYTES, MIN_GUEST_CID};

/// How many clients may wait to be taken.
const BACKLOG: i32 = 1024;

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A reserved context.
    #[error(
        "guest_cid {0} is reserved: give the guest one from {MIN_GUEST_CID} to {MAX_GUEST_CID}"
    )]
    ReservedCid(u32),
    /// The path does not fit a socket address.
    #[error(
        "the vsock path {} has {len} bytes: it may have {MAX_PATH_BYTES}, so that it and \"_4294967295\" fit the \
         address of a unix socket; choose a shorter directory", path.display()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// The path cannot be one.
    #[error(
        "the vsock path {path:?} is empty or has a zero byte: name a file that does not exist yet"
    )]
    NoPath {
        /// The path.
        path: PathBuf,
    },
    /// A running process listens there.
    #[error(
        "the vsock socket {} belongs to a running process, perhaps another VM: stop it or choose another path",
        path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else at the path, and it is not ours to remove.
    #[error(
        "{} exists and is not a socket: remove it or choose another path for the vsock device",
        path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("cannot {act} the vsock socket {}: {source}{}", path.display(), cure(source))]
    Socket {
        /// What was tried.
        act: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no descriptor left.
    #[error(
        "cannot make a descriptor for the vsock device: {0}; raise the limit on open files (ulimit -n)"
    )]
    Descriptor(#[source] io::Error),
}

fn cure(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(n) if n == Errno::ENOENT as i32 => "; make its directory first",
        Some(n) if n == Errno::ENOTDIR as i32 => "; a part of the path is no directory",
        Some(n) if n == Errno::EACCES as i32 || n == Errno::EPERM as i32 => {
            "; choose a directory that this user may write to"
        }
        Some(n) if n == Errno::EROFS as i32 => "; choose a directory that can be written to",
        Some(n) if n == Errno::EMFILE as i32 => "; raise the limit on open files (ulimit -n)",
        _ => "",
    }
}

/// Where clients of the host connect, and beside it where programs of the host listen.
#[derive(Debug)]
pub(crate) struct HostSocket {
    path: PathBuf,
    /// The same, wherever the process is by the end.
    file: PathBuf,
    listener: UnixListener,
    /// Device and inode of the socket file we made, until it is removed.
    made: Mutex<Option<(u64, u64)>>,
}

/// What came of an attempt to reach a program of the host.
#[derive(Debug)]
pub(crate) enum Dialled {
    Connected(UnixStream),
    /// Its queue of connections is full: try the same socket again.
    Full(OwnedFd),
}

impl HostSocket {
    /// Listens at `path`, for this user alone. A socket on which nobody listens any more is replaced.
    pub(crate) fn listen(path: &Path) -> Result<Self, VsockError> {
        let bytes = path.as_os_str().as_bytes();
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(VsockError::NoPath { path: path.into() });
        }
        if bytes.len() > MAX_PATH_BYTES {
            return Err(VsockError::PathTooLong {
                path: path.into(),
                len: bytes.len(),
            });
        }
        let failed = |act, source| VsockError::Socket {
            act,
            path: path.into(),
            source,
        };
        remove_stale(path)?;
        let socket = new_socket().map_err(|e| failed("make", e.into()))?;
        // The mode of the unbound socket becomes the mode of the file: no moment in which others may connect.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|e| failed("make private", e.into()))?;
        let address = UnixAddr::new(path).map_err(|e| failed("name", e.into()))?;
        bind(socket.as_raw_fd(), &address).map_err(|e| failed("make", e.into()))?;
        let backlog = Backlog::new(BACKLOG).map_err(|e| failed("listen on", e.into()))?;
        listen(&socket, backlog).map_err(|e| failed("listen on", e.into()))?;
        let meta = fs::symlink_metadata(path).map_err(|e| failed("look at", e))?;
        Ok(Self {
            path: path.into(),
            file: std::path::absolute(path).unwrap_or_else(|_| path.into()),
            listener: UnixListener::from(socket),
            made: Mutex::new(Some((meta.dev(), meta.ino()))),
        })
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Reaches for the program that listens for the guest's `port`. Does not wait.
    pub(crate) fn dial(&self, port: u32) -> Result<Dialled, Errno> {
        self.dial_with(new_socket()?, port)
    }

    /// As [`Self::dial`], with a socket that could not connect before.
    pub(crate) fn dial_with(&self, socket: OwnedFd, port: u32) -> Result<Dialled, Errno> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let address = UnixAddr::new(path.as_os_str())?;
        loop {
            match connect(socket.as_raw_fd(), &address) {
                Ok(()) => return Ok(Dialled::Connected(UnixStream::from(socket))),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Dialled::Full(socket)),
                Err(e) => return Err(e),
            }
        }
    }

    /// Removes the socket's file, if it is still the one we made. Nobody can connect any more.
    pub(crate) fn remove(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = made.take()
            && fs::symlink_metadata(&self.file).is_ok_and(|m| (m.dev(), m.ino()) == made)
        {
            // What cannot be removed is found stale by the next one.
            let _ = fs::remove_file(&self.file);
        }
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

fn new_socket() -> Result<OwnedFd, Errno> {
    socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )
}

/// Removes a socket that a process left behind which ended without removing it.
fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let failed = |act, source| VsockError::Socket {
        act,
        path: path.into(),
        source,
    };
    let meta = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta.map_err(|e| failed("look at", e))?,
    };
    if !meta.file_type().is_socket() {
        return Err(VsockError::NotASocket { path: path.into() });
    }
    let probe = new_socket().map_err(|e| failed("make", e.into()))?;
    let address = UnixAddr::new(path).map_err(|e| failed("name", e.into()))?;
    match connect(probe.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => {
            fs::remove_file(path).map_err(|e| failed("replace the stale", e))
        }
        Err(e) if e != Errno::EAGAIN => Err(failed("look whether anybody has", e.into())),
        // Connected, or its queue of connections is full: it lives.
        _ => Err(VsockError::InUse { path: path.into() }),
    }
}

/// Looks at what a client has said, and leaves it there. None where it has gone.
pub(crate) fn peek<'a>(stream: &UnixStream, into: &'a mut [u8]) -> Option<&'a [u8]> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(stream.as_raw_fd(), into, flags) {
        Ok(0) => None,
        Ok(len) => into.get(..len),
        Err(Errno::EAGAIN | Errno::EINTR) => Some(&[]),
        Err(_) => None,
    }
}

/// Takes `into.len()` bytes that [`peek`] has shown.
pub(crate) fn skip(stream: &UnixStream, into: &mut [u8]) -> bool {
    recv(stream.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT) == Ok(into.len())
}

/// Sends a short text to a peer that has room for it.
pub(crate) fn say(stream: &UnixStream, text: &str) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    send(stream.as_raw_fd(), text.as_bytes(), flags) == Ok(text.len())
}

/// Whether the peer reads no more: an empty message is refused then (unix(7), EPIPE).
pub(crate) fn reads_no_more(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    matches!(
        send(stream.as_raw_fd(), &[], flags),
        Err(Errno::EPIPE | Errno::ECONNRESET)
    )
}
