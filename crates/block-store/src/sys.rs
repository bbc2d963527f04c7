//! The system calls that std does not have, one function each.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Most bytes of one transfer (`MAX_RW_COUNT` of Linux: 2 GiB less a page).
pub(crate) const MAX_TRANSFER: usize = 0x7fff_f000;

/// Host memory of one transfer. The pointers are only for the kernel.
#[derive(Clone, Copy)]
pub(crate) enum Ranges<'a> {
    One(*mut u8, usize),
    Many(&'a [libc::iovec]),
}

impl Ranges<'_> {
    fn with<T>(self, call: impl FnOnce(*const libc::iovec, libc::c_int) -> T) -> T {
        match self {
            Self::One(ptr, len) => {
                let one = libc::iovec {
                    iov_base: ptr.cast(),
                    iov_len: len,
                };
                call(&raw const one, 1)
            }
            // At most MAX_IOVECS, so that the cast keeps the value.
            Self::Many(iovecs) => call(iovecs.as_ptr(), iovecs.len() as libc::c_int),
        }
    }
}

fn transferred(n: libc::ssize_t) -> io::Result<u64> {
    u64::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// preadv(2).
///
/// # Safety
/// The ranges are mapped, and nobody minds what is written there.
pub(crate) unsafe fn read(file: &File, into: Ranges<'_>, offset: u64) -> io::Result<u64> {
    // SAFETY: the caller's promise.
    let n = into.with(|iovecs, count| unsafe {
        libc::preadv64(file.as_raw_fd(), iovecs, count, offset.cast_signed())
    });
    transferred(n)
}

/// pwritev2(2), with `RWF_DSYNC` where it is to last.
///
/// # Safety
/// The ranges are mapped.
pub(crate) unsafe fn write(
    file: &File,
    from: Ranges<'_>,
    offset: u64,
    durable: bool,
) -> io::Result<u64> {
    let fd = file.as_raw_fd();
    let at = offset.cast_signed();
    // SAFETY: the caller's promise.
    let n = from.with(|iovecs, count| unsafe {
        if durable {
            libc::pwritev2(fd, iovecs, count, at, libc::RWF_DSYNC)
        } else {
            libc::pwritev64(fd, iovecs, count, at)
        }
    });
    transferred(n)
}

/// fallocate(2).
pub(crate) fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: takes no pointer.
    let n = unsafe {
        libc::fallocate64(
            file.as_raw_fd(),
            mode,
            offset.cast_signed(),
            len.cast_signed(),
        )
    };
    done(n)
}

fn done(n: libc::c_int) -> io::Result<()> {
    if n == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The size of a file or block device, by lseek(2): one call for both.
pub(crate) fn size(file: &File) -> io::Result<u64> {
    // SAFETY: takes no pointer. All transfers name their offset, so nobody uses the position.
    let n = unsafe { libc::lseek64(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Has `into` share all extents of `from` (ioctl_ficlone(2)).
pub(crate) fn clone_file(from: &File, into: &File) -> io::Result<()> {
    // SAFETY: the request takes a descriptor by value.
    done(unsafe { libc::ioctl(into.as_raw_fd(), FICLONE as _, from.as_raw_fd()) })
}

/// Copies up to `len` bytes from and to `offset` inside the kernel (copy_file_range(2)), and says how many.
pub(crate) fn copy_range(from: &File, into: &File, offset: u64, len: usize) -> io::Result<usize> {
    let (mut read_at, mut write_at) = (offset.cast_signed(), offset.cast_signed());
    // SAFETY: the offsets are numbers of ours, which the call changes.
    let n = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut read_at,
            into.as_raw_fd(),
            &raw mut write_at,
            len,
            0,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// The first range of data from `offset` on (lseek(2), `SEEK_DATA` and `SEEK_HOLE`); `None`: there is none up to the end. Where the
/// file system does not know holes, all is data.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<std::ops::Range<u64>>> {
    let seek = |offset: libc::off64_t, whence| {
        // SAFETY: takes no pointer. All transfers name their offset, so nobody uses the position.
        let n = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
        u64::try_from(n).map_err(|_| io::Error::last_os_error())
    };
    let start = match seek(offset.cast_signed(), libc::SEEK_DATA) {
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        other => other?,
    };
    let end = seek(start.cast_signed(), libc::SEEK_HOLE)?;
    Ok(Some(start..end))
}

// include/uapi/linux/fs.h
const FICLONE: libc::c_ulong = 0x4004_9409;
const BLKROGET: libc::c_ulong = 0x125e;
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKPBSZGET: libc::c_ulong = 0x127b;

/// What a block device says of itself.
pub(crate) struct DeviceFacts {
    pub(crate) read_only: bool,
    pub(crate) logical: u32,
    pub(crate) physical: u32,
    pub(crate) optimal: u32,
}

pub(crate) fn device_facts(file: &File) -> io::Result<DeviceFacts> {
    let ask = |request: libc::c_ulong| {
        let mut value: libc::c_int = 0;
        // SAFETY: each of these requests writes one int.
        done(unsafe { libc::ioctl(file.as_raw_fd(), request as _, &raw mut value) })
            .map(|()| value.cast_unsigned())
    };
    Ok(DeviceFacts {
        read_only: ask(BLKROGET)? != 0,
        logical: ask(BLKSSZGET)?,
        physical: ask(BLKPBSZGET)?,
        optimal: ask(BLKIOOPT)?,
    })
}

/// Discards a range of a block device.
pub(crate) fn discard_blocks(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the request reads two u64.
    done(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD as _, range.as_ptr()) })
}

/// What direct I/O must be aligned to: in memory, and in the file. `Some((0, 0))`: there is none.
/// `None`: the kernel (before 6.1) or the file system does not say.
pub(crate) fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let mut facts = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string, and there is room for one `statx`.
    let n = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            facts.as_mut_ptr(),
        )
    };
    // SAFETY: all zeroes is a valid `statx`, whatever the kernel wrote of it.
    let facts = unsafe { facts.assume_init() };
    (n == 0 && facts.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((facts.stx_dio_mem_align, facts.stx_dio_offset_align))
}

/// An eventfd that never blocks.
pub(crate) fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointer.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another descriptor of what an open one stands for, by its number.
pub(crate) fn duplicate(number: RawFd) -> io::Result<File> {
    // SAFETY: takes no pointer, and harms no descriptor, whatever its number.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { File::from_raw_fd(copy) })
}

/// The flags that a file was opened with, as far as they are kept (`F_GETFL`).
pub(crate) fn status_flags(file: &File) -> io::Result<libc::c_int> {
    // SAFETY: takes no pointer.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags)
}

/// Changes those of them that can be.
pub(crate) fn set_status_flags(file: &File, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: takes no pointer.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) })
}

/// Makes an eventfd readable.
pub(crate) fn signal(event: &OwnedFd) {
    let one = 1_u64.to_ne_bytes();
    // SAFETY: reads 8 bytes that are there. A full counter is readable already.
    let _ = unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

/// A lock of one byte as fcntl(2) takes it.
fn byte_lock(kind: libc::c_int, at: u64) -> libc::flock {
    // SAFETY: all zeroes is a valid `flock`; its pid must be 0 for locks of open file descriptions.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = at.cast_signed();
    lock.l_len = 1;
    lock
}

/// Shares the lock of one byte, for as long as the file is open anywhere.
pub(crate) fn lock_byte_shared(file: &File, at: u64) -> io::Result<()> {
    let lock = byte_lock(libc::F_RDLCK, at);
    // SAFETY: reads one `flock`.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Locks all of the file for this open one alone, for as long as it is open anywhere. It is open to write.
pub(crate) fn lock_whole(file: &File) -> io::Result<()> {
    let mut lock = byte_lock(libc::F_WRLCK, 0);
    // To the end of the file and beyond.
    lock.l_len = 0;
    // SAFETY: reads one `flock`.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })
}

/// Takes all locks of this open file back.
pub(crate) fn unlock(file: &File) {
    let mut lock = byte_lock(libc::F_UNLCK, 0);
    // To the end of the file and beyond.
    lock.l_len = 0;
    // SAFETY: reads one `flock`.
    let _ = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
}

/// Whether somebody else holds a lock of this byte.
pub(crate) fn byte_is_locked(file: &File, at: u64) -> io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, at);
    // SAFETY: reads and writes one `flock`.
    done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}
