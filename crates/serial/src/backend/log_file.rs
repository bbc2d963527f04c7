//! The console in a file: output only.
//!
//! Also takes what behaves like one: a FIFO, which need not have its reader yet, or a device.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use alveole_event_loop::Interest;

use super::{ROLES, Role, Watches, Wrote, retry};
use crate::log_limit::LogLimit;
use crate::out_queue::dropped_mark;
use crate::{FileStart, SerialError};

pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    /// Bytes it may still grow by.
    room_bytes: u64,
    /// Bytes dropped since the last mark.
    dropped: u64,
    log: LogLimit,
}

impl LogFile {
    pub(crate) fn open(
        path: &Path,
        start: FileStart,
        limit_bytes: Option<u64>,
    ) -> Result<Self, SerialError> {
        let failed = |source| SerialError::File {
            path: path.to_path_buf(),
            source,
        };
        let file = Self::open_file(path, true).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        let mut size = meta.len();
        if start == FileStart::Truncate && meta.is_file() {
            file.set_len(0).map_err(failed)?;
            size = 0;
        }
        let room_bytes = limit_bytes.map_or(u64::MAX, |limit| limit.saturating_sub(size));
        Ok(Self {
            path: path.to_path_buf(),
            file,
            room_bytes,
            dropped: 0,
            log: LogLimit::default(),
        })
    }

    /// Looks whether it could be opened.
    pub(crate) fn try_open(path: &Path) -> Result<(), SerialError> {
        let there = |path: &Path| std::fs::metadata(path);
        let opened = match Self::open_file(path, false) {
            // It would be made.
            Err(e) if e.kind() == io::ErrorKind::NotFound => match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => there(folder).map(drop),
                _ => Ok(()),
            },
            other => other.map(drop),
        };
        opened.map_err(|source| SerialError::File {
            path: path.to_path_buf(),
            source,
        })
    }

    /// To append to, also when it is emptied first: whoever rotates the file by emptying it gets no hole.
    fn open_file(path: &Path, create: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options
            .create(create)
            .append(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        options.open(path).or_else(|e| match e.raw_os_error() {
            // A named pipe which nobody reads yet. As in Firecracker it is held open for reading, too: what is written
            // waits for its reader, and one that goes does not take it away.
            Some(libc::ENXIO) => options.read(true).open(path),
            _ => Err(e),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Wrote {
        if self.room_bytes == 0 {
            return self.drop_bytes(bytes.len(), &"its limit is reached");
        }
        if self.dropped > 0 && self.write_mark().is_err() {
            return self.drop_bytes(bytes.len(), &"there is still no room");
        }
        let fits = usize::try_from(self.room_bytes)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let fitting = bytes.get(..fits).unwrap_or_default();
        match retry(|| self.file.write(fitting)) {
            Ok(len) => {
                self.room_bytes -= len as u64;
                Wrote::Taken(len)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Wrote::Blocked,
            Err(e) => self.drop_bytes(bytes.len(), &e),
        }
    }

    pub(crate) fn watches(&self, blocked: bool) -> Watches {
        let mut watches = [None; ROLES];
        if blocked {
            watches[Role::Output as usize] = Some((self.file.as_raw_fd(), Interest::WRITABLE));
        }
        watches
    }

    fn drop_bytes(&mut self, len: usize, why: &dyn std::fmt::Display) -> Wrote {
        self.dropped += len as u64;
        if self.log.allows() {
            log::warn!(
                "console file {}: {why}; dropping the guest's output until it takes bytes again",
                self.path.display()
            );
        }
        Wrote::Dropped(len)
    }

    fn write_mark(&mut self) -> io::Result<()> {
        // A mark cut short on a full disk is only ugly.
        retry(|| self.file.write(dropped_mark(self.dropped).as_bytes()))?;
        self.dropped = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn append_and_truncate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for (start, want) in [
            (FileStart::Append, "x"),
            (FileStart::Append, "xx"),
            (FileStart::Truncate, "x"),
        ] {
            let mut file = LogFile::open(&path, start, None).unwrap();
            assert_eq!(file.write(b"x"), Wrote::Taken(1));
            assert_eq!(read(&path), want);
        }
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn the_limit_counts_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "1234").unwrap();
        let mut file = LogFile::open(&path, FileStart::Append, Some(6)).unwrap();
        assert_eq!(file.write(b"5678"), Wrote::Taken(2));
        assert_eq!(file.write(b"78"), Wrote::Dropped(2));
        assert_eq!(read(&path), "123456");
    }

    #[test]
    fn a_full_disk_drops() {
        let path = Path::new("/dev/full");
        let mut file = LogFile::open(path, FileStart::Truncate, None).unwrap();
        for _ in 0..10 {
            assert_eq!(file.write(b"hello"), Wrote::Dropped(5));
        }
        // The disk has room again.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        file.file = File::create(&path).unwrap();
        assert_eq!(file.write(b"hello"), Wrote::Taken(5));
        assert_eq!(read(&path), dropped_mark(50) + "hello");
    }

    #[test]
    fn a_directory_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let e = LogFile::open(dir.path(), FileStart::Append, None)
            .err()
            .unwrap();
        assert!(e.to_string().contains(dir.path().to_str().unwrap()), "{e}");
    }

    #[test]
    fn a_fifo_blocks_and_goes_on() {
        let (mut reads, writes) = io::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", writes.as_raw_fd());
        let mut file = LogFile::open(Path::new(&path), FileStart::Append, None).unwrap();
        while file.write(&[0; 4096]) != Wrote::Blocked {}
        assert!(file.watches(true)[Role::Output as usize].is_some());
        reads.read_exact(&mut [0; 4096]).unwrap();
        assert_eq!(file.write(&[0; 4096]), Wrote::Taken(4096));
        drop((reads, writes));
        assert_eq!(file.write(b"x"), Wrote::Dropped(1), "no reader");
    }
}
