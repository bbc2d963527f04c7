//! Locks of image files, in the way of QEMU: whoever uses an image with either keeps the other off.
//!
//! Byte 100 + n of the file is locked by who uses right n, byte 200 + n by who does not let others use right n; all
//! locks are shared ones of the open file, so that many may hold the same. After taking its own, each looks
//! whether somebody else holds what it cannot go together with. (QEMU's block/file-posix.c; its rights are in
//! include/block/block-common.h.)

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::{OpenError, sys};

const USED: u64 = 100;
const NOT_SHARED: u64 = 200;
/// To read what was written and not be surprised.
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

const READER: &[u64] = &[CONSISTENT_READ];
const WRITER: &[u64] = &[CONSISTENT_READ, WRITE, RESIZE];
/// What nobody lets others do, be it to write or to read.
const ALONE: &[u64] = &[WRITE, RESIZE];

/// Most processes that are looked through for the holder of a lock: a name in a message is not worth more.
const MAX_PROCESSES: usize = 100_000;

/// How long to wait for a holder that cannot be seen. When a process is killed, its ring lives on until what it had in
/// flight has landed, and the lock with it: only then may somebody else write.
const MAX_WAIT: Duration = Duration::from_secs(2);
const ROUND: Duration = Duration::from_millis(2);

/// How long to wait for a holder that can be seen. A process that starts another one lends it its open files, locks
/// included, until that executes its program: an image that was just closed may be held for that moment.
const PATIENCE: Duration = Duration::from_millis(250);

/// Locks `file` for as long as it is open anywhere, rings of the kernel included.
pub(crate) fn lock(file: &File, path: &Path, write: bool) -> Result<(), OpenError> {
    let start = Instant::now();
    loop {
        let error = match try_lock(file, path, write) {
            Err(Conflict) => holders(file),
            Ok(()) => return Ok(()),
        };
        let patience = if error.is_none() { MAX_WAIT } else { PATIENCE };
        if start.elapsed() < patience {
            sys::unlock(file);
            thread::sleep(ROUND);
            continue;
        }
        return Err(OpenError::Locked {
            path: path.to_owned(),
            access: if write { "writing" } else { "reading" },
            by_us: error.as_ref().is_some_and(|holders| holders.by_us),
            holder: error.map_or_else(
                || "it is in use by a process that cannot be seen from here".to_owned(),
                |holders| holders.told,
            ),
        });
    }
}

/// Locks a file that is open to write for whoever has it open here alone, until it is closed; false: somebody else has a lock
/// of it. Not for images, whose locks say how they are used.
///
/// # Errors
/// It cannot be locked here.
pub fn lock_alone(file: &File) -> io::Result<bool> {
    match sys::lock_whole(file) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Somebody else has it.
struct Conflict;

fn try_lock(file: &File, path: &Path, write: bool) -> Result<(), Conflict> {
    let uses = if write { WRITER } else { READER };
    let ours = uses
        .iter()
        .map(|right| USED + right)
        .chain(ALONE.iter().map(|right| NOT_SHARED + right));
    for byte in ours {
        if let Err(e) = sys::lock_byte_shared(file, byte) {
            return cannot(path, &e);
        }
    }
    let against = uses
        .iter()
        .map(|right| NOT_SHARED + right)
        .chain(ALONE.iter().map(|right| USED + right));
    for byte in against {
        match sys::byte_is_locked(file, byte) {
            Ok(false) => {}
            Ok(true) => return Err(Conflict),
            Err(e) => return cannot(path, &e),
        }
    }
    Ok(())
}

fn cannot(path: &Path, error: &io::Error) -> Result<(), Conflict> {
    // Somebody holds an exclusive lock, which QEMU and we never take.
    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
        return Err(Conflict);
    }
    log::warn!(
        "{}: cannot be locked here ({error}): nobody is kept from writing to it at the same time",
        path.display()
    );
    Ok(())
}

/// Who holds locks of a file.
struct Holders {
    told: String,
    /// This process is among them.
    by_us: bool,
}

/// Who holds locks of the file besides this open file, from what /proc says of the files of each process:
/// locks of open files name nobody.
fn holders(file: &File) -> Option<Holders> {
    let inode = &kernel_name(file)?;
    let (mut found, mut by_us) = (Vec::new(), false);
    for process in fs::read_dir("/proc").ok()?.flatten().take(MAX_PROCESSES) {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let folder = process.path();
        let Ok(descriptors) = fs::read_dir(folder.join("fdinfo")) else {
            continue;
        };
        let mine = pid == std::process::id();
        let writes = descriptors.flatten().filter_map(|descriptor| {
            // Our own try is not what is in the way.
            let number = descriptor.file_name();
            if mine && number.to_str() == Some(&own_number(file)) {
                return None;
            }
            rights(&fs::read_to_string(descriptor.path()).ok()?, inode)
        });
        if let Some(writes) = writes.reduce(|a, b| a || b) {
            let command = fs::read_to_string(folder.join("comm")).unwrap_or_default();
            by_us |= mine;
            let (command, how) = (command.trim(), if writes { "write" } else { "read" });
            let this = if mine { ", this process itself" } else { "" };
            found.push(format!(
                "process {pid} ({command}{this}) has it open to {how}"
            ));
        }
    }
    (!found.is_empty()).then(|| Holders {
        told: found.join(", "),
        by_us,
    })
}

/// Device and inode as the kernel prints them with locks: `fe:00:131`. Where a file system lies over others (overlayfs,
/// btrfs) these are not what stat(2) says, so what is said of our own locks comes first.
fn kernel_name(file: &File) -> Option<String> {
    // `lock:  1: OFDLCK ADVISORY READ -1 fe:00:131 100 100`
    let own = fs::read_to_string(format!("/proc/self/fdinfo/{}", own_number(file)));
    let own = own.unwrap_or_default();
    let mut lines = own.lines().filter(|l| l.starts_with("lock:"));
    if let Some(place) = lines.find_map(|l| l.split_whitespace().rev().nth(2)) {
        return Some(place.to_owned());
    }
    let facts = file.metadata().ok()?;
    let (major, minor) = (libc::major(facts.dev()), libc::minor(facts.dev()));
    Some(format!("{major:02x}:{minor:02x}:{}", facts.ino()))
}

fn own_number(file: &File) -> String {
    use std::os::fd::AsRawFd;
    file.as_raw_fd().to_string()
}

/// Whether one open file locks rights of the inode: `Some(true)` where it is for writing.
fn rights(fdinfo: &str, inode: &str) -> Option<bool> {
    let mut found = None;
    for line in fdinfo.lines().filter(|l| l.starts_with("lock:")) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [.., place, first, last] = words[..] else {
            continue;
        };
        if place != inode {
            continue;
        }
        let first: u64 = first.parse().unwrap_or(0);
        // Neighbouring locks of one kind are told as one range.
        let last: u64 = last.parse().unwrap_or(u64::MAX);
        let write = USED + WRITE;
        found = Some(found == Some(true) || (first..=last).contains(&write));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_says_who_writes() {
        let info = "pos:\t0\nflags:\t02100002\nlock:\t1: OFDLCK ADVISORY  READ -1 fe:00:131 100 101\n\
                    lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:131 203 203\n";
        assert_eq!(rights(info, "fe:00:131"), Some(true));
        assert_eq!(rights(info, "fe:00:13"), None);
        let reader = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:131 100 100\n";
        assert_eq!(rights(reader, "fe:00:131"), Some(false));
        assert_eq!(rights("lock: x\nlock:\n", "fe:00:131"), None);
    }
}
