//! What is said on the connection: packets (`SOCK_SEQPACKET`), the descriptors with them (unix(7), `SCM_RIGHTS`).
//!
//! | who | says |
//! |---|---|
//! | client | `0 1 2 9`, NUL, a word, NUL, a word, NUL ...: numbers of the descriptors that come along, and the words |
//! | template | `pid 4711`, with a pidfd; or `refused WHY` |
//! | template | `code 0` or `signal 9`, when the copy has ended |

use std::ffi::{OsStr, OsString};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Descriptors of copies have numbers below this.
pub const MAX_DESCRIPTORS: RawFd = 64;
/// Bytes of a request: as many as fit into a socket's buffer anywhere.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// What a copy is to be.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) words: Vec<OsString>,
    /// Each with the number that it is to have.
    pub(crate) descriptors: Vec<(RawFd, OwnedFd)>,
}

pub(crate) fn pack(numbers: &[RawFd], words: &[&OsStr]) -> Vec<u8> {
    let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    let mut packed = numbers.join(" ").into_bytes();
    for word in words {
        packed.push(0);
        packed.extend_from_slice(word.as_bytes());
    }
    packed
}

/// The request that came, or why it is none.
pub(crate) fn unpack(bytes: &[u8], descriptors: Vec<OwnedFd>) -> Result<Request, String> {
    let mut parts = bytes.split(|byte| *byte == 0);
    let numbers = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let mut all: Vec<RawFd> = Vec::new();
    for number in numbers.split_ascii_whitespace() {
        match number.parse() {
            Ok(number) if (0..MAX_DESCRIPTORS).contains(&number) && !all.contains(&number) => {
                all.push(number);
            }
            _ => {
                return Err(format!(
                    "{number:?} is no number of a descriptor: 0 to {}, each once",
                    MAX_DESCRIPTORS - 1
                ));
            }
        }
    }
    if all.len() != descriptors.len() {
        return Err(format!(
            "{} numbers for {} descriptors",
            all.len(),
            descriptors.len()
        ));
    }
    Ok(Request {
        words: parts
            .map(|word| OsString::from_vec(word.to_vec()))
            .collect(),
        descriptors: all.into_iter().zip(descriptors).collect(),
    })
}

/// Sends one packet, whole or not at all. A peer that is gone is an error, and no signal.
pub(crate) fn send(
    to: &OwnedFd,
    packet: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights };
    let packet = [IoSlice::new(packet)];
    loop {
        match sendmsg::<()>(
            to.as_raw_fd(),
            &packet,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        ) {
            Err(Errno::EINTR) => {}
            sent => return sent.map(drop),
        }
    }
}

/// What came in one packet.
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// The next packet; none: the peer is gone. A packet too long is cut, which its reader sees by its length.
pub(crate) fn receive(from: &OwnedFd, most: usize) -> Result<Option<Packet>, Errno> {
    let mut packet = vec![0; most + 1];
    let mut room = cmsg_space!([RawFd; MAX_DESCRIPTORS as usize]);
    let mut descriptors = Vec::new();
    let mut into = [IoSliceMut::new(&mut packet)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = loop {
        match recvmsg::<()>(from.as_raw_fd(), &mut into, Some(&mut room), flags) {
            Err(Errno::EINTR) => {}
            got => break got?,
        }
    };
    for message in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made them, for us alone.
            descriptors.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    let bytes = got.bytes;
    if bytes == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    packet.truncate(bytes);
    Ok(Some(Packet {
        bytes: packet,
        descriptors,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn some() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn words_come_as_they_were() {
        let words: Vec<&OsStr> = ["--a", "", "b c\n", "ä"].map(OsStr::new).into();
        let odd = OsStr::from_bytes(&[0xff, b'x']);
        let words = [words, vec![odd]].concat();
        let request = unpack(&pack(&[2, 9], &words), vec![some(), some()]).unwrap();
        assert_eq!(request.words, words);
        let numbers: Vec<_> = request.descriptors.iter().map(|(n, _)| *n).collect();
        assert_eq!(numbers, [2, 9]);
        assert!(unpack(&pack(&[], &[]), vec![]).unwrap().words.is_empty());
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (bytes, count) in [
            (&b"0 x"[..], 2),
            (b"64", 1),
            (b"-1", 1),
            (b"3 3", 2),
            (b"3", 2),
            (b"3", 0),
            (b"99999999999999999999", 1),
            (b"\xff", 1),
        ] {
            let descriptors = (0..count).map(|_| some()).collect();
            let why = unpack(bytes, descriptors).unwrap_err();
            assert!(why.contains("descriptor"), "{why}");
        }
    }
}
