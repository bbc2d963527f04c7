//! Links over descriptors that the process was started with.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::{LinkError, LinkSpec};

impl LinkSpec {
    /// The link behind descriptors by their numbers, with commas between them: those of a tap's or macvtap's queues,
    /// or of one connected unix socket. They are duplicated; their numbers stay as they are.
    ///
    /// # Errors
    /// What is no number, no open descriptor, or a socket of another kind.
    pub fn inherited(numbers: &str) -> Result<Self, LinkError> {
        let fds = duplicate_all(numbers)?;
        let Some(first) = fds.first() else {
            return Err(not_inherited(numbers));
        };
        match socket_type(first) {
            None => Ok(Self::TapFds(fds)),
            Some(kind) => {
                let [only] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| not_inherited(numbers))?;
                match kind {
                    libc::SOCK_STREAM => Ok(Self::StreamFd(only)),
                    libc::SOCK_DGRAM => Ok(Self::DatagramFd(only)),
                    _ => Err(not_inherited(numbers)),
                }
            }
        }
    }
}

/// Copies of all descriptors whose numbers stand there, with commas between them.
pub(crate) fn duplicate_all(numbers: &str) -> Result<Vec<OwnedFd>, LinkError> {
    numbers.split(',').map(duplicate).collect()
}

fn not_inherited(numbers: &str) -> LinkError {
    LinkError::NotInherited {
        numbers: numbers.to_owned(),
    }
}

fn duplicate(number: &str) -> Result<OwnedFd, LinkError> {
    let failed = || not_inherited(number);
    let fd: i32 = number.parse().map_err(|_| failed())?;
    // SAFETY: takes no pointer, and harms no descriptor, whatever its number.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(failed());
    }
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// The kind of socket; none for what is no socket.
fn socket_type(fd: &OwnedFd) -> Option<i32> {
    let mut kind: i32 = 0;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: both pointers lead to values of the length that is given.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut kind).cast(),
            &raw mut len,
        )
    };
    if done < 0 {
        debug_assert!(io::Error::last_os_error().raw_os_error() == Some(libc::ENOTSOCK));
        return None;
    }
    Some(kind)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn the_kind_is_found_out() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let of = |fd: i32| LinkSpec::inherited(&fd.to_string()).unwrap();
        assert!(matches!(of(stream.as_raw_fd()), LinkSpec::StreamFd(_)));
        assert!(matches!(of(datagram.as_raw_fd()), LinkSpec::DatagramFd(_)));
        // Whether it is a tap is asked when it is opened.
        let two = format!("{0},{0}", null.as_raw_fd());
        match LinkSpec::inherited(&two).unwrap() {
            LinkSpec::TapFds(fds) => assert_eq!(fds.len(), 2),
            other => panic!("{other:?}"),
        }
        let sockets = format!("{},{}", stream.as_raw_fd(), datagram.as_raw_fd());
        for wrong in ["", "x", "-1", "999999", "3,", &sockets] {
            let said = LinkSpec::inherited(wrong).unwrap_err().to_string();
            assert!(said.contains("started with"), "{wrong}: {said}");
        }
    }
}
