//! Ranges of guest RAM for system calls that read and write it directly, without a copy in between.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::{AccessError, GuestRam};

/// Most ranges one system call takes (`IOV_MAX`, Linux include/uapi/linux/uio.h). More are handed over in
/// several calls.
pub const MAX_IOVECS: usize = 1024;

/// Ranges of one guest's RAM in the order in which bytes go through them: checked once, then handed to
/// `preadv`, `pwritev` or an io_uring as they are.
///
/// The guest may change what lies in them at any time; nothing here gives a reference to it. The RAM
/// stays mapped for as long as this value lives.
#[derive(Debug)]
pub struct GuestBuffers {
    ram: GuestRam,
    iovecs: Vec<libc::iovec>,
    len_bytes: u64,
}

// SAFETY: the pointers lead into a mapping that `ram` keeps alive and that belongs to no thread; they are
// followed only by the kernel and by volatile copies, which any thread may make.
unsafe impl Send for GuestBuffers {}
// SAFETY: as above; a shared reference changes nothing in this value.
unsafe impl Sync for GuestBuffers {}

impl GuestBuffers {
    /// No range yet.
    #[must_use]
    pub fn new(ram: &GuestRam) -> Self {
        Self {
            ram: ram.clone(),
            iovecs: Vec::new(),
            len_bytes: 0,
        }
    }

    /// Adds `len` bytes from guest address `addr` on. What follows the last range directly in host memory
    /// becomes one with it.
    ///
    /// # Errors
    /// Part of the range is not RAM, or all ranges together pass 2^63 bytes. Nothing is added.
    pub fn push(&mut self, addr: u64, len: u64) -> Result<(), AccessError> {
        if len == 0 {
            return Ok(());
        }
        let outside = AccessError::Outside { addr, len };
        let total = self.len_bytes.checked_add(len).filter(|n| *n >> 63 == 0);
        let (Some(total), Ok(size), true) =
            (total, usize::try_from(len), self.ram.contains(addr, len))
        else {
            return Err(outside);
        };
        let ptr = self
            .ram
            .as_vm_memory()
            .get_host_address(GuestAddress(addr))
            .map_err(|_| outside)?;
        self.append(ptr, size);
        self.len_bytes = total;
        Ok(())
    }

    fn append(&mut self, ptr: *mut u8, size: usize) {
        if let Some(last) = self.iovecs.last_mut()
            && last.iov_base as usize + last.iov_len == ptr as usize
        {
            last.iov_len += size;
            return;
        }
        self.iovecs.push(libc::iovec {
            iov_base: ptr.cast(),
            iov_len: size,
        });
    }

    /// Takes all ranges out; what is allocated stays for the next ones.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        self.len_bytes = 0;
    }

    /// Takes the first `count` bytes out, or all where there are fewer; what is allocated stays.
    pub fn drop_front(&mut self, count: u64) {
        let mut left = count.min(self.len_bytes);
        self.len_bytes -= left;
        let mut whole = 0;
        for iovec in &mut self.iovecs {
            if left < iovec.iov_len as u64 {
                // Less than the range is long, so that it cannot be cut.
                iovec.iov_base = iovec
                    .iov_base
                    .cast::<u8>()
                    .wrapping_add(left as usize)
                    .cast();
                iovec.iov_len -= left as usize;
                break;
            }
            left -= iovec.iov_len as u64;
            whole += 1;
        }
        self.iovecs.drain(..whole);
    }

    /// Makes this value what `of` is without its first `skip` bytes, or empty where there are fewer; what is allocated stays.
    pub fn set_rest(&mut self, of: &Self, skip: u64) {
        self.clear();
        self.ram.clone_from(&of.ram);
        self.iovecs.extend_from_slice(&of.iovecs);
        self.len_bytes = of.len_bytes;
        self.drop_front(skip);
    }

    /// All ranges together, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether there is no byte in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The ranges as system calls take them that only read RAM. To follow the pointers is unsafe, and the kernel's
    /// business.
    #[must_use]
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The ranges for system calls that fill them. They count as written from now on ([`GuestRam::track_writes`]), though they
    /// are filled later: whoever looks what was written waits for what is under way first.
    #[must_use]
    pub fn iovecs_to_fill(&self) -> &[libc::iovec] {
        for iovec in &self.iovecs {
            self.mark(iovec.iov_base.cast(), iovec.iov_len);
        }
        &self.iovecs
    }

    #[inline]
    fn mark(&self, ptr: *mut u8, size: usize) {
        self.ram.mark_written(ptr as u64, size as u64);
    }

    /// Whether every range starts and ends at a multiple of `align` in host memory (`O_DIRECT`).
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        self.iovecs
            .iter()
            .all(|v| (v.iov_base as usize).is_multiple_of(align) && v.iov_len.is_multiple_of(align))
    }

    /// The `len` bytes from byte `offset` on, as a value of its own.
    ///
    /// # Panics
    /// The part is not within this value: a mistake of the caller.
    #[must_use]
    pub fn part(&self, offset: u64, len: u64) -> Self {
        let mut part = Self::new(&self.ram);
        self.for_each_range(offset, len, |ptr, size| part.append(ptr, size));
        part.len_bytes = len;
        part
    }

    /// Copies `from` over the bytes from `offset` on.
    ///
    /// # Panics
    /// They do not fit: a mistake of the caller.
    pub fn copy_from(&self, offset: u64, from: &[u8]) {
        let mut rest = from;
        self.for_each_range(offset, from.len() as u64, |ptr, size| {
            let (now, later) = rest.split_at(size);
            self.mark(ptr, size);
            // SAFETY: the range was checked to be RAM when it was pushed, and `ram` keeps it mapped.
            unsafe { VolatileSlice::new(ptr, size) }.copy_from(now);
            rest = later;
        });
    }

    /// Copies the bytes from `offset` on into `into`.
    ///
    /// # Panics
    /// They are not all there: a mistake of the caller.
    pub fn copy_to(&self, offset: u64, into: &mut [u8]) {
        let mut done = 0;
        self.for_each_range(offset, into.len() as u64, |ptr, size| {
            // SAFETY: the range was checked to be RAM when it was pushed, and `ram` keeps it mapped.
            unsafe { VolatileSlice::new(ptr, size) }.copy_to(&mut into[done..done + size]);
            done += size;
        });
    }

    /// Makes the `len` bytes from `offset` on zero.
    ///
    /// # Panics
    /// They are not all there: a mistake of the caller.
    pub fn zero(&self, offset: u64, len: u64) {
        self.for_each_range(offset, len, |ptr, size| {
            self.mark(ptr, size);
            // SAFETY: the range was checked to be RAM when it was pushed, and `ram` keeps it mapped; the
            // guest may write there meanwhile, as it may during any device's write.
            unsafe { std::ptr::write_bytes(ptr, 0, size) };
        });
    }

    /// Fills all of it from `file` at `offset` (preadv(2)), in as many calls as it takes.
    ///
    /// # Errors
    /// What the host says; [`io::ErrorKind::UnexpectedEof`] where the file ends before.
    pub fn read_from_file(&self, file: &File, offset: u64) -> io::Result<()> {
        // All of them, before the first is filled.
        let _ = self.iovecs_to_fill();
        self.transfer(offset, |iovecs, at| {
            // SAFETY: every range is mapped for as long as `self` lives; the kernel may write there.
            unsafe {
                libc::preadv64(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len().try_into().unwrap_or(0),
                    at,
                )
            }
        })
    }

    /// Writes all of it to `file` at `offset` (pwritev(2)), in as many calls as it takes.
    ///
    /// # Errors
    /// What the host says.
    pub fn write_to_file(&self, file: &File, offset: u64) -> io::Result<()> {
        self.transfer(offset, |iovecs, at| {
            // SAFETY: every range is mapped for as long as `self` lives; the kernel only reads there.
            unsafe {
                libc::pwritev64(
                    file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len().try_into().unwrap_or(0),
                    at,
                )
            }
        })
    }

    fn transfer(
        &self,
        offset: u64,
        mut call: impl FnMut(&[libc::iovec], i64) -> isize,
    ) -> io::Result<()> {
        let at = |done: u64| {
            offset
                .checked_add(done)
                .and_then(|at| i64::try_from(at).ok())
                .ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidInput, "the offset passes 2^63")
                })
        };
        let mut done = 0;
        let mut rest = Vec::new();
        while done < self.len_bytes {
            let iovecs = if done == 0 {
                &self.iovecs
            } else {
                rest = self.part(done, self.len_bytes - done).iovecs;
                &rest
            };
            let now = &iovecs[..iovecs.len().min(MAX_IOVECS)];
            match u64::try_from(call(now, at(done)?)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => done += moved,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        drop(rest);
        Ok(())
    }

    /// Calls `each` with the host ranges of the `len` bytes from `offset` on.
    fn for_each_range(&self, offset: u64, len: u64, mut each: impl FnMut(*mut u8, usize)) {
        assert!(
            offset
                .checked_add(len)
                .is_some_and(|end| end <= self.len_bytes),
            "bytes {offset}+{len} of {}",
            self.len_bytes
        );
        let (mut skip, mut left) = (offset, len);
        for iovec in &self.iovecs {
            if left == 0 {
                break;
            }
            let size = iovec.iov_len as u64;
            if skip >= size {
                skip -= size;
                continue;
            }
            let now = (size - skip).min(left);
            // Within one range, so that neither cast nor sum can be cut.
            each(
                iovec.iov_base.cast::<u8>().wrapping_add(skip as usize),
                now as usize,
            );
            left -= now;
            skip = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryPlan;

    fn ram() -> GuestRam {
        GuestRam::map(&MemoryPlan::around_hole(1 << 20).unwrap()).unwrap()
    }

    #[test]
    fn ranges_are_checked_and_neighbours_become_one() {
        let mut b = GuestBuffers::new(&ram());
        b.push(0x1000, 16).unwrap();
        b.push(0x1010, 16).unwrap();
        b.push(0x3000, 0).unwrap();
        b.push(0x2000, 5).unwrap();
        assert_eq!((b.len_bytes(), b.iovecs().len()), (37, 2));
        for (addr, len) in [(0xf_ffff, 2), (1 << 20, 1), (u64::MAX, 2), (0, u64::MAX)] {
            let e = b.push(addr, len).unwrap_err();
            assert!(e.to_string().contains(&format!("{addr:#x}")), "{e}");
        }
        assert_eq!((b.len_bytes(), b.iovecs().len()), (37, 2));
        b.clear();
        assert!(b.is_empty());
    }

    #[test]
    fn a_chain_that_names_the_same_bytes_for_ever_does_not_wrap() {
        let mut b = GuestBuffers::new(&ram());
        b.len_bytes = (1 << 63) - 2;
        b.push(0, 1).unwrap();
        b.push(0, 1).unwrap_err();
    }

    #[test]
    fn parts_copies_and_zeroes_cross_ranges() {
        let ram = ram();
        let mut b = GuestBuffers::new(&ram);
        b.push(0x1000, 3).unwrap();
        b.push(0x2000, 4).unwrap();
        b.push(0x3000, 3).unwrap();
        b.copy_from(0, b"abcdefghij");
        let mut back = [0; 5];
        b.copy_to(2, &mut back);
        assert_eq!(&back, b"cdefg");
        let part = b.part(2, 6);
        assert_eq!((part.len_bytes(), part.iovecs().len()), (6, 3));
        part.zero(1, 4);
        let mut all = [0; 10];
        b.copy_to(0, &mut all);
        assert_eq!(&all, b"abc\0\0\0\0hij");
        assert!(!b.is_aligned(2) && b.is_aligned(1));
    }

    #[test]
    fn the_front_is_dropped_by_ranges_and_within_them() {
        let ram = ram();
        let mut b = GuestBuffers::new(&ram);
        b.push(0x1000, 3).unwrap();
        b.push(0x2000, 4).unwrap();
        b.push(0x3000, 3).unwrap();
        b.copy_from(0, b"abcdefghij");
        let left = |b: &GuestBuffers| {
            let mut all = vec![0; b.len_bytes() as usize];
            b.copy_to(0, &mut all);
            String::from_utf8(all).unwrap()
        };
        b.drop_front(0);
        b.drop_front(2);
        assert_eq!((left(&b).as_str(), b.iovecs().len()), ("cdefghij", 3));
        b.drop_front(1);
        assert_eq!((left(&b).as_str(), b.iovecs().len()), ("defghij", 2));
        b.drop_front(5);
        assert_eq!((left(&b).as_str(), b.iovecs().len()), ("ij", 1));
        b.push(0x4000, 1).unwrap();
        b.drop_front(u64::MAX);
        assert!(b.is_empty() && b.iovecs().is_empty());
    }

    #[test]
    fn the_rest_of_others_is_taken_over() {
        let ram = ram();
        let mut b = GuestBuffers::new(&ram);
        b.push(0x1000, 3).unwrap();
        b.push(0x2000, 4).unwrap();
        b.copy_from(0, b"abcdefg");
        let mut rest = GuestBuffers::new(&ram);
        rest.push(0x5000, 9).unwrap();
        for (skip, want) in [(0, "abcdefg"), (2, "cdefg"), (3, "defg"), (7, ""), (8, "")] {
            rest.set_rest(&b, skip);
            let mut all = vec![0; rest.len_bytes() as usize];
            rest.copy_to(0, &mut all);
            assert_eq!(String::from_utf8(all).unwrap(), want);
        }
        assert_eq!(b.len_bytes(), 7);
    }

    #[test]
    fn files_are_read_and_written_in_place_however_many_ranges_there_are() {
        let ram = ram();
        let file = tempfile::tempfile().unwrap();
        let mut b = GuestBuffers::new(&ram);
        // Every second page, so that nothing merges; more than one call takes.
        let mut addr = 0;
        for _ in 0..3 * MAX_IOVECS {
            b.push(addr, 7).unwrap();
            addr += 16;
        }
        let bytes: Vec<u8> = (0..b.len_bytes()).map(|i| (i % 251) as u8).collect();
        b.copy_from(0, &bytes);
        b.write_to_file(&file, 100).unwrap();
        b.zero(0, b.len_bytes());
        b.read_from_file(&file, 100).unwrap();
        let mut back = vec![0; bytes.len()];
        b.copy_to(0, &mut back);
        assert!(back == bytes);
        let e = b.read_from_file(&file, 101).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
        b.read_from_file(&file, u64::MAX).unwrap_err();
    }
}
