//! The console on a unix socket: one client at a time, with a scrollback for those who come late.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use alveole_event_loop::{Interest, Ready};

use super::{Got, ROLES, Role, Watches, Wrote, retry};
use crate::{SCROLLBACK_BYTES, SOCKET_PATH_MAX_BYTES, SerialError, sys};

/// What a second client is told.
const BUSY: &[u8] = b"busy: another client is attached to this console\r\n";
/// Clients taken in one go. Abused by a program on the host that connects in a loop: the others on the
/// event loop get their turn in between.
const ACCEPTS_PER_EVENT: usize = 8;

pub(crate) struct SocketConsole {
    path: PathBuf,
    /// Device and inode of the socket file we made, until it is removed.
    made: Option<(u64, u64)>,
    listener: UnixListener,
    client: Option<Client>,
    /// Done with, but perhaps still watched.
    aside: Vec<Client>,
    scrollback: VecDeque<u8>,
}

struct Client {
    stream: UnixStream,
    /// Scrollback that it has not got yet.
    backlog: VecDeque<u8>,
    readable: bool,
    reads_open: bool,
    writes_open: bool,
}

impl SocketConsole {
    pub(crate) fn open(path: &Path) -> Result<Self, SerialError> {
        let len = path.as_os_str().as_bytes().len();
        if len > SOCKET_PATH_MAX_BYTES {
            return Err(SerialError::SocketPathTooLong {
                path: path.to_path_buf(),
                len,
            });
        }
        let failed = |act| {
            let path = path.to_path_buf();
            move |source| SerialError::Socket { act, path, source }
        };
        remove_stale(path)?;
        let socket = sys::unix_socket().map_err(failed("create"))?;
        sys::bind_and_listen(&socket, path.as_os_str()).map_err(failed("listen on"))?;
        let meta = fs::symlink_metadata(path).map_err(failed("look at"))?;
        Ok(Self {
            // The process may change its directory before the end.
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()),
            made: Some((meta.dev(), meta.ino())),
            listener: UnixListener::from(socket),
            client: None,
            aside: Vec::new(),
            scrollback: VecDeque::new(),
        })
    }

    pub(crate) fn write_own(&mut self) -> bool {
        let Some(client) = &mut self.client else {
            return true;
        };
        while client.writes_open && !client.backlog.is_empty() {
            let mut backlog = std::mem::take(&mut client.backlog);
            match client.write(backlog.as_slices().0) {
                Some(0) => {
                    client.backlog = backlog;
                    return false;
                }
                Some(len) => {
                    backlog.drain(..len);
                    client.backlog = backlog;
                }
                None => {}
            }
        }
        self.put_aside_if_done();
        true
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Wrote {
        let len = match &mut self.client {
            Some(client) if client.writes_open => match client.write(bytes) {
                Some(0) => return Wrote::Blocked,
                Some(len) => len,
                None => bytes.len(),
            },
            _ => bytes.len(),
        };
        self.remember(bytes.get(..len).unwrap_or(bytes));
        self.put_aside_if_done();
        Wrote::Taken(len)
    }

    pub(crate) fn read(&mut self, into: &mut [u8]) -> Got {
        let Some(client) = &mut self.client else {
            return Got::Nothing;
        };
        if !client.readable || !client.reads_open || into.is_empty() {
            return Got::Nothing;
        }
        match retry(|| client.stream.read(into)) {
            Ok(len) if len > 0 => return Got::Bytes(len),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => client.readable = false,
            _ => client.reads_open = false,
        }
        self.put_aside_if_done();
        Got::Nothing
    }

    pub(crate) fn watches(&self, want_input: bool, blocked: bool) -> Watches {
        let mut watches = [None; ROLES];
        watches[Role::Listener as usize] = Some((self.listener.as_raw_fd(), Interest::READABLE));
        // A client that has hung up would report it for ever; what it left is read without asking.
        if let Some(client) = self.client.as_ref().filter(|c| c.writes_open) {
            let mut interest = Interest::NONE;
            if want_input && client.reads_open {
                interest = interest | Interest::READABLE;
            }
            if blocked {
                interest = interest | Interest::WRITABLE;
            }
            watches[Role::Input as usize] = Some((client.stream.as_raw_fd(), interest));
        }
        watches
    }

    pub(crate) fn on_ready(&mut self, role: Role, ready: Ready) {
        match role {
            Role::Listener => self.accept(),
            Role::Input => {
                if let Some(client) = &mut self.client {
                    client.readable |= ready.readable() || ready.hung_up();
                    client.writes_open &= !ready.hung_up() && !ready.error();
                }
                self.put_aside_if_done();
            }
            Role::Output => {}
        }
    }

    pub(crate) fn reap(&mut self) {
        self.aside.clear();
    }

    /// Removes the socket file, if it is still the one we made.
    pub(crate) fn close(&mut self) {
        if let Some(made) = self.made.take()
            && fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == made)
        {
            // What cannot be removed is found stale by the next one.
            let _ = fs::remove_file(&self.path);
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTS_PER_EVENT {
            let Ok((stream, _)) = retry(|| self.listener.accept()) else {
                return;
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            // One that has hung up makes room, even if the guest has not read all it sent.
            self.aside.extend(self.client.take_if(|c| !c.writes_open));
            if self.client.is_some() {
                let _ = (&stream).write(BUSY);
                continue;
            }
            self.client = Some(Client {
                stream,
                backlog: self.scrollback.clone(),
                readable: false,
                reads_open: true,
                writes_open: true,
            });
        }
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.scrollback.extend(bytes);
        let too_many = self.scrollback.len().saturating_sub(SCROLLBACK_BYTES);
        self.scrollback.drain(..too_many);
    }

    /// A client is done with when it can neither be written to nor has anything left to read.
    fn put_aside_if_done(&mut self) {
        let done = self
            .client
            .as_ref()
            .is_some_and(|c| !c.writes_open && !c.reads_open);
        if done {
            self.aside.extend(self.client.take());
        }
    }
}

impl Client {
    /// Some bytes, none if it would wait, or `None` if nobody reads any more.
    fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        match retry(|| self.stream.write(bytes)) {
            Ok(len) => Some(len),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Some(0),
            Err(_) => {
                self.writes_open = false;
                // What it sent before it went is still the guest's.
                self.readable = true;
                None
            }
        }
    }
}

/// Removes the socket file of a process that is gone; refuses anything else.
fn remove_stale(path: &Path) -> Result<(), SerialError> {
    let failed = |act| {
        let path = path.to_path_buf();
        move |source| SerialError::Socket { act, path, source }
    };
    let meta = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta.map_err(failed("look at"))?,
    };
    if !meta.file_type().is_socket() {
        return Err(SerialError::NotASocket {
            path: path.to_path_buf(),
        });
    }
    let probe: OwnedFd = sys::unix_socket().map_err(failed("create"))?;
    match sys::connect(&probe, path.as_os_str()) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("replace the stale"))
        }
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(failed("probe")(e)),
        // Connected, or its backlog is full: it lives.
        _ => Err(SerialError::SocketInUse {
            path: path.to_path_buf(),
        }),
    }
}
