//! The unix socket that clients connect to: made before the sandbox, removed at the end.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::MAX_SOCKET_PATH_BYTES;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path is too long for the address of a unix socket.
    #[error(
        "cannot listen on {path:?}: the path has {len} bytes, that of a unix socket has at most \
         {MAX_SOCKET_PATH_BYTES}; choose a shorter directory, or a path relative to where this program is started"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// There is something.
    #[error("cannot listen on {path:?}: {what}")]
    Exists {
        /// The path.
        path: PathBuf,
        /// What is there, and what to do.
        what: &'static str,
    },
    /// The host.
    #[error("cannot listen on {path:?}: {source}{}", cure(source))]
    Host {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

fn cure(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; does its directory exist?",
        io::ErrorKind::PermissionDenied => "; may this user write to its directory?",
        io::ErrorKind::NotADirectory => "; a part of the path is no directory",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a directory that can be written to",
        io::ErrorKind::InvalidInput => "; give it a path without a zero byte",
        _ => "",
    }
}

/// A socket that listens. Its path is removed with it.
#[derive(Debug)]
pub struct ApiSocket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of what we made: somebody may have put another in its place since.
    made: (u64, u64),
}

impl ApiSocket {
    /// Makes the socket. What is there already stays, and is an error: another program may listen there.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let len = path.as_os_str().as_bytes().len();
        if len > MAX_SOCKET_PATH_BYTES {
            return Err(SocketError::TooLong {
                path: path.to_owned(),
                len,
            });
        }
        let failed = |source| SocketError::Host {
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => SocketError::Exists {
                path: path.to_owned(),
                what: what_is_at(path),
            },
            _ => failed(e),
        })?;
        listener.set_nonblocking(true).map_err(failed)?;
        let facts = fs::symlink_metadata(path).map_err(failed)?;
        Ok(Self {
            listener,
            // The process may change its directory before the end.
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            made: (facts.dev(), facts.ino()),
        })
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|facts| (facts.dev(), facts.ino()) == self.made);
        if is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn what_is_at(path: &Path) -> &'static str {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|facts| facts.file_type().is_socket());
    if !is_socket {
        return "a file that is no socket is there; choose another path, or remove it";
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            "a socket is there on which nobody listens, as a killed program leaves it; remove it"
        }
        _ => "another program listens there; choose another path, or end that program",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_told_with_its_cure() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let told = |path: &Path| ApiSocket::bind(path).unwrap_err().to_string();

        let first = ApiSocket::bind(&at("s")).unwrap();
        assert!(told(&at("s")).contains("another program listens there"));
        drop(UnixListener::bind(at("stale")).unwrap());
        assert!(told(&at("stale")).contains("nobody listens"));
        fs::write(at("file"), "x").unwrap();
        assert!(told(&at("file")).contains("no socket is there"));
        assert!(told(&at("no/s")).contains("does its directory exist?"));
        assert!(told(&at("file/s")).contains("no directory"));
        assert!(told(Path::new("")).contains("cannot listen on"));
        let long = "x".repeat(MAX_SOCKET_PATH_BYTES + 1);
        assert!(told(Path::new(&long)).contains("has 108 bytes"));

        drop(first);
        assert!(!at("s").exists());
        assert!(at("stale").exists() && at("file").exists());
    }

    #[test]
    fn only_what_we_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let socket = ApiSocket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "of somebody else").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
