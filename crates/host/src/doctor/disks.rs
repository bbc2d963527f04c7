//! What disks of guests can be served by.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use alveole_block_store::{Cache, Engine, OpenError, OpenOptions, io_uring_available, open};
use rustix::fs::{Mode, OFlags};

use super::{Finding, calls, missing, ok, read, warn};

/// Large enough for the blocks of every file system; takes no room.
const TRIED_BYTES: u64 = 1 << 20;

pub(super) fn io_uring() -> Finding {
    judge_io_uring(
        io_uring_available(),
        calls::try_io_uring,
        read("/proc/sys/kernel/io_uring_disabled").as_deref(),
    )
}

/// `tried` makes a ring without anything special: what the kernel says to that is the way to the cure.
fn judge_io_uring(
    available: Result<(), String>,
    tried: impl FnOnce() -> io::Result<()>,
    disabled: Option<&str>,
) -> Finding {
    let Err(reason) = available else {
        return ok("disks are served through it (engine=io_uring)");
    };
    let error = tried().err().and_then(|e| e.raw_os_error());
    let cure = match (error, disabled) {
        (Some(libc::ENOSYS), _) => {
            "run a kernel with CONFIG_IO_URING, or let it through the sandbox around this process"
        }
        (Some(libc::EPERM), Some("1")) => {
            "join the group whose number is sysctl kernel.io_uring_group, or sudo sysctl \
             kernel.io_uring_disabled=0"
        }
        (Some(libc::EPERM), Some("2")) => "sudo sysctl kernel.io_uring_disabled=0",
        (Some(libc::EPERM), _) => {
            "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
        }
        (Some(libc::ENOMEM), _) => "raise the limit on locked memory (ulimit -l)",
        (Some(_), _) => "see io_uring_setup(2)",
        (None, _) => "run a later kernel",
    };
    missing(
        format!("disks are served by plain calls, one request at a time (engine=sync): {reason}"),
        cure,
    )
}

pub(super) fn direct_io() -> Finding {
    judge_direct_io(try_direct_io())
}

/// The size of the blocks in which a file of the current folder can be used directly.
fn try_direct_io() -> Result<u32, Refused> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    // It has no name, and is gone when it is closed.
    let file = rustix::fs::open(".", flags, Mode::RUSR | Mode::WUSR)
        .and_then(|file| rustix::fs::ftruncate(&file, TRIED_BYTES).map(|()| file))
        .map_err(|e| Refused::File(e.into()))?;
    let options = OpenOptions {
        cache: Cache::Direct,
        engine: Engine::Sync,
        ..OpenOptions::default()
    };
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match open(Path::new(&path), &options) {
        Ok(store) => Ok(store.geometry().block_size_bytes),
        Err(OpenError::Direct { why, .. }) => Err(Refused::Direct(why)),
        Err(e) => Err(Refused::Other(e.to_string())),
    }
}

/// Why there is no direct I/O.
enum Refused {
    /// No file could be made.
    File(io::Error),
    Direct(String),
    Other(String),
}

fn judge_direct_io(tried: Result<u32, Refused>) -> Finding {
    match tried {
        Ok(block) => ok(format!(
            "images in this folder can be used with cache=direct, in blocks of {block} bytes"
        )),
        Err(Refused::File(e)) => warn(
            format!("cannot be tried in this folder: {e}"),
            "run this in the folder of the images",
        ),
        Err(Refused::Direct(why)) => missing(
            format!("images in this folder cannot be used with cache=direct: {why}"),
            "use cache=writeback (the default), or keep images on ext4 or XFS",
        ),
        Err(Refused::Other(why)) => warn(
            format!("cannot be tried in this folder: {why}"),
            "nothing, if cache=writeback (the default) is used",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn io_uring_tells_the_engine_and_what_forbids_it() {
        let (status, finding, cure) = judge_io_uring(Ok(()), || unreachable!(), Some("1"));
        assert_eq!((status, cure), (Status::Ok, None));
        assert!(finding.contains("engine=io_uring"), "{finding}");
        for (errno, sysctl, word) in [
            (Some(libc::ENOSYS), None, "CONFIG_IO_URING"),
            (Some(libc::EPERM), Some("2"), "io_uring_disabled=0"),
            (Some(libc::EPERM), Some("1"), "group"),
            (Some(libc::EPERM), Some("0"), "seccomp"),
            (Some(libc::EPERM), None, "seccomp"),
            (Some(libc::ENOMEM), Some("0"), "ulimit -l"),
            (Some(libc::EMFILE), Some("0"), "io_uring_setup(2)"),
            (None, None, "later kernel"),
        ] {
            let tried = || errno.map_or(Ok(()), |n| Err(io::Error::from_raw_os_error(n)));
            let (status, finding, cure) = judge_io_uring(Err("because".into()), tried, sysctl);
            assert_eq!(status, Status::Missing);
            assert!(
                finding.contains("engine=sync") && finding.ends_with("because"),
                "{finding}"
            );
            assert!(cure.as_ref().unwrap().contains(word), "{word}: {cure:?}");
        }
    }

    #[test]
    fn direct_io_is_there_or_says_what_else_there_is() {
        let (status, finding, _) = judge_direct_io(Ok(4096));
        assert_eq!(status, Status::Ok);
        assert!(finding.contains("4096"), "{finding}");
        let (status, finding, cure) = judge_direct_io(Err(Refused::Direct("no".into())));
        assert_eq!(status, Status::Missing);
        assert!(finding.ends_with(": no"), "{finding}");
        assert!(cure.unwrap().contains("cache=writeback"));
        let read_only = Refused::File(io::Error::from_raw_os_error(libc::EROFS));
        assert_eq!(judge_direct_io(Err(read_only)).0, Status::Warn);
        let other = Refused::Other("x".into());
        assert_eq!(judge_direct_io(Err(other)).0, Status::Warn);
    }
}
