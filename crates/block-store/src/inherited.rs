//! Files by the number of a descriptor that the process was started with.
//!
//! Where `/dev/fd` and `/proc/self/fd` are there, opening a path in them opens the file once more, which asks for the
//! rights of whoever opens it. In a jail neither is there, and its user may have no right to the file: the descriptor
//! itself is all it has. So that is what such a path means here, whether the folder is there or not.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use crate::sys;

/// The paths, up to the number.
const FOLDERS: [&str; 2] = ["/dev/fd/", "/proc/self/fd/"];

/// The descriptor behind `path`, duplicated; `None` if that is an ordinary path.
///
/// # Errors
/// It is not open.
pub(crate) fn open(path: &Path) -> io::Result<Option<File>> {
    let Some(number) = number(path) else {
        return Ok(None);
    };
    sys::duplicate(number).map(Some).map_err(|e| match e.raw_os_error() {
        Some(libc::EBADF) => io::Error::other(format!(
            "descriptor {number} is not open; start the program with it (alveole-jailer: --pass-fd {number})"
        )),
        _ => e,
    })
}

fn number(path: &Path) -> Option<RawFd> {
    let path = path.to_str()?;
    let digits = FOLDERS
        .iter()
        .find_map(|folder| path.strip_prefix(folder))?;
    let number = digits.bytes().all(|b| b.is_ascii_digit());
    if number { digits.parse().ok() } else { None }
}

/// Sees to it that a descriptor can be used as it is asked for. Whether it does direct I/O is changed if need be, for
/// all that share it.
///
/// # Errors
/// It was opened in another way, and why that does not do.
pub(crate) fn prepare(file: &File, write: bool, direct: bool) -> io::Result<()> {
    let flags = sys::status_flags(file)?;
    let wrong = |how: &str, cure: &str| {
        Err(io::Error::other(format!(
            "its descriptor was opened {how}; {cure}"
        )))
    };
    if flags & libc::O_PATH != 0 {
        return wrong(
            "by its path alone (O_PATH)",
            "open it for reading and writing",
        );
    }
    match flags & libc::O_ACCMODE {
        libc::O_RDWR => {}
        libc::O_RDONLY if !write => {}
        libc::O_RDONLY => {
            return wrong(
                "for reading only",
                "open it for writing, too, or use it read-only",
            );
        }
        _ => return wrong("for writing only", "open it for reading, too"),
    }
    // The kernel would put each write at the end.
    if write && flags & libc::O_APPEND != 0 {
        return wrong(
            "to append to it",
            "open it without O_APPEND (in a shell: <> instead of >>)",
        );
    }
    if (flags & libc::O_DIRECT != 0) == direct {
        return Ok(());
    }
    sys::set_status_flags(file, flags ^ libc::O_DIRECT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_mean_a_descriptor() {
        let of = |path: &str| number(Path::new(path));
        assert_eq!(of("/dev/fd/7"), Some(7));
        assert_eq!(of("/proc/self/fd/12"), Some(12));
        for other in [
            "/dev/fd",
            "/dev/fd/",
            "/dev/fd/x",
            "/dev/fd/+7",
            "/dev/fd/7/",
            "/dev/fd/-1",
            "dev/fd/7",
            "/proc/1/fd/7",
            "/dev/fd/2147483648",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
