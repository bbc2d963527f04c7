//! The mapped RAM of one guest: a cheap handle, copies in and out by guest address.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::hugetlb::{self, HostPages, HugePagePool};
use crate::mapping::{Backing, HUGE_PAGE_LEN, map_ranges};
use crate::{MemoryMapError, MemoryPlan, PAGE_SIZE, PageSet, PlanError, RamRange, WriteLog};

/// The mapping as `vm-memory` has it: whatever is written through it is marked in the [`WriteLog`] of its range.
pub type VmMemory = GuestMemoryMmap<WriteLog>;

/// Why RAM could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The guest would be larger than the whole host.
    #[error(
        "guest memory of {} MiB is more than this host has ({} MiB of RAM and swap): ask for less",
        asked_bytes >> 20, host_bytes >> 20
    )]
    MoreThanHost {
        /// What was asked for.
        asked_bytes: u64,
        /// RAM plus swap of the host.
        host_bytes: u64,
    },
    /// The host refused the mapping.
    #[error("cannot map {} MiB of guest memory at guest address {start:#x}: {source}; \
             ask for less memory or raise the limit (ulimit -v, vm.overcommit_memory)", size_bytes >> 20)]
    Refused {
        /// First guest address of the range.
        start: u64,
        /// Its length.
        size_bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// A size that cannot be made of such pages.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The host has too few huge pages.
    #[error("{}", hugetlb::Lack { needed: *needed, pool, source })]
    NoHugePages {
        /// How many RAM is made of.
        needed: u64,
        /// What the host has.
        pool: Option<HugePagePool>,
        /// What the host said.
        source: io::Error,
    },
    /// A cgroup's limit.
    #[error(
        "the host reserved {needed} huge pages of 2 MiB for guest memory, and does not let this process have them: {source}; raise the limit of \
         its cgroup (hugetlb.2MB.max)"
    )]
    HugePagesLimited {
        /// How many RAM is made of.
        needed: u64,
        /// What the host said.
        source: io::Error,
    },
    /// What the process needs besides does not fit any more.
    #[error("guest memory fits, but not {} MiB of address space more that the monitor itself needs: {source}; \
             ask for less memory or raise the limit (ulimit -v)", room_bytes >> 20)]
    NoRoom {
        /// How much.
        room_bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The mapped ranges do not make an address space.
    #[error("cannot order the guest memory ranges: {0}")]
    Ranges(String),
    /// The maps of memory files are none, or do not make up this memory.
    #[error(transparent)]
    Maps(#[from] MemoryMapError),
    /// A memory file that cannot be mapped.
    #[error(
        "memory file {layer} of the snapshot is no plain file: devices and pipes cannot be mapped"
    )]
    NoPlainFile {
        /// Which, the oldest being 0.
        layer: usize,
    },
    /// A memory file that was cut, or is one of another guest.
    #[error(
        "memory file {layer} of the snapshot has {file_bytes} bytes, guest memory is {size_bytes}: was it cut, or is it another guest's?"
    )]
    ShortFile {
        /// Which, the oldest being 0.
        layer: usize,
        /// How long it is.
        file_bytes: u64,
        /// How long it must be.
        size_bytes: u64,
    },
    /// A memory file could not be put in place.
    #[error(
        "cannot place {len} bytes at offset {offset} of memory file {layer} of the snapshot: {source}"
    )]
    Layer {
        /// Which, the oldest being 0.
        layer: usize,
        /// Offset in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// Why an access to RAM failed.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Part of the range is not RAM.
    #[error("guest address {addr:#x}+{len:#x} is not inside guest memory")]
    Outside {
        /// First address of the access.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Reading the file that was to be placed in RAM failed.
    #[error("cannot read {len} bytes at offset {offset} of the file: {source}")]
    File {
        /// Offset in the file.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// A handle on the RAM of one guest. Clones share the mapping; the last one unmaps it.
#[derive(Debug, Clone)]
pub struct GuestRam {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    map: VmMemory,
    host_pages: HostPages,
    /// Whether somebody tracks writes: asked here by who does not write through `map`.
    is_tracking: AtomicBool,
    /// Whether somebody captures it: what a child inherits can be said once only.
    is_captured: AtomicBool,
    /// Pages that show a file's content until they are written.
    filed: Mutex<Vec<Range<u64>>>,
    /// The userfaultfd by which another process puts in the pages that nobody has touched yet: open for as long as they are mapped.
    served_by: Option<OwnedFd>,
}

/// One range of RAM, for this crate.
pub(crate) struct Region<'a> {
    pub(crate) log: &'a WriteLog,
    pub(crate) pages: u64,
    pub(crate) host_addr: u64,
    start: u64,
}

impl GuestRam {
    /// Maps fresh, zeroed, anonymous memory for every range of `plan`. Pages are taken from the host
    /// when first touched; huge ones where the host gives them.
    ///
    /// # Errors
    /// The plan is larger than the host's RAM and swap, or the host refuses the mapping.
    pub fn map(plan: &MemoryPlan) -> Result<Self, MapError> {
        Self::map_of(plan, HostPages::Anonymous)
    }

    /// As [`GuestRam::map`], of the pages that are said.
    ///
    /// # Errors
    /// As there; the size is not a whole number of such pages; the host has not as many to reserve, or this process may not have them.
    pub fn map_of(plan: &MemoryPlan, pages: HostPages) -> Result<Self, MapError> {
        let ram = match pages {
            HostPages::Anonymous => {
                Self::of_map(map_ranges(plan, Backing::Transparent)?, pages, None)
            }
            HostPages::Huge2M => Self::of_map(map_ranges(plan, Backing::Hugetlb)?, pages, None),
        };
        if pages == HostPages::Huge2M && hugetlb::may_be_limited() {
            ram.take_huge_pages()?;
        }
        Ok(ram)
    }

    /// RAM of a mapping, which somebody may serve through a userfaultfd.
    pub(crate) fn of_map(map: VmMemory, host_pages: HostPages, served_by: Option<OwnedFd>) -> Self {
        Self {
            shared: Arc::new(Shared {
                map,
                host_pages,
                is_tracking: AtomicBool::new(false),
                is_captured: AtomicBool::new(false),
                filed: Mutex::default(),
                served_by,
            }),
        }
    }

    /// Which pages of the host it is made of.
    #[must_use]
    pub fn host_pages(&self) -> HostPages {
        self.shared.host_pages
    }

    /// Takes all pages from the host now: a limit that is met later is a SIGBUS.
    pub(crate) fn take_huge_pages(&self) -> Result<(), MapError> {
        for (range, host_addr) in self.mapped_ranges() {
            let len = usize::try_from(range.size_bytes).unwrap_or_default();
            // SAFETY: the range is mapped; the advice changes no content.
            let got = unsafe { libc::madvise(host_addr as *mut _, len, libc::MADV_POPULATE_WRITE) };
            if got != 0 {
                return Err(MapError::HugePagesLimited {
                    needed: self.size_bytes() / hugetlb::HUGE_PAGE_BYTES,
                    source: io::Error::last_os_error(),
                });
            }
        }
        Ok(())
    }

    /// What another process puts pages in through, if it does.
    pub(crate) fn served_by(&self) -> Option<&OwnedFd> {
        self.shared.served_by.as_ref()
    }

    /// Looks whether `room_bytes` of address space are left, for stacks of threads and the heap: whoever meets the limit
    /// later can only abort.
    ///
    /// # Errors
    /// They are not.
    pub fn leaves_room(&self, room_bytes: u64) -> Result<(), MapError> {
        let size = usize::try_from(room_bytes).unwrap_or(usize::MAX);
        let mapped = MmapRegionBuilder::<()>::new(size)
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build();
        match mapped {
            Ok(_) => Ok(()),
            Err(MmapRegionError::Mmap(source)) => Err(MapError::NoRoom { room_bytes, source }),
            Err(other) => Err(MapError::NoRoom {
                room_bytes,
                source: io::Error::other(other.to_string()),
            }),
        }
    }

    /// The mapping as `vm-memory` sees it, for crates that speak to it directly.
    #[must_use]
    pub fn as_vm_memory(&self) -> &VmMemory {
        &self.shared.map
    }

    /// All RAM, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.shared.map.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Every range with the host address it is mapped at.
    pub fn mapped_ranges(&self) -> impl Iterator<Item = (RamRange, u64)> + '_ {
        self.shared.map.iter().map(|r| {
            let range = RamRange {
                start: r.start_addr().0,
                size_bytes: r.len(),
            };
            (range, r.as_ptr() as u64)
        })
    }

    /// All RAM, in pages: what a [`PageSet`] of it is made for.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.size_bytes() / PAGE_SIZE
    }

    /// Pages of each range, in order: what [`PageSet::from_bitmaps`] wants to know.
    #[must_use]
    pub fn range_pages(&self) -> Vec<u64> {
        self.regions().map(|region| region.pages).collect()
    }

    /// The ranges, in order.
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region<'_>> {
        self.shared.map.iter().map(|r| Region {
            log: MmapRegion::bitmap(r),
            pages: r.len() / PAGE_SIZE,
            start: r.start_addr().0,
            host_addr: r.as_ptr() as u64,
        })
    }

    pub(crate) fn is_tracking(&self) -> &AtomicBool {
        &self.shared.is_tracking
    }

    pub(crate) fn is_captured(&self) -> &AtomicBool {
        &self.shared.is_captured
    }

    /// The pages of each range, counted through all of them.
    pub(crate) fn page_ranges(&self) -> Vec<Range<u64>> {
        self.pieces(&(0..self.pages()), |_, _| ())
            .map(|(pages, ())| pages)
            .collect()
    }

    /// `pages` cut at the ends of ranges, each with its guest address.
    pub(crate) fn guest_pieces(
        &self,
        pages: &Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, u64)> {
        self.pieces(pages, |region, skip| region.start + skip)
    }

    /// `pages` cut at the ends of ranges, each with the address where it is mapped.
    pub(crate) fn host_pieces(
        &self,
        pages: &Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, u64)> {
        self.pieces(pages, |region, skip| region.host_addr + skip)
    }

    fn pieces<T>(
        &self,
        pages: &Range<u64>,
        place: impl Fn(&Region<'_>, u64) -> T,
    ) -> impl Iterator<Item = (Range<u64>, T)> {
        let (start, end) = (pages.start, pages.end);
        let mut first = 0;
        self.regions().filter_map(move |region| {
            let range = first..first + region.pages;
            first = range.end;
            let piece = start.max(range.start)..end.min(range.end);
            let skip = piece.start.saturating_sub(range.start) * PAGE_SIZE;
            (!piece.is_empty()).then(|| (piece, place(&region, skip)))
        })
    }

    /// Pages that are not zero where nobody has touched them: they show a file's content until they are written, or another process
    /// serves them.
    pub(crate) fn filed_pages(&self) -> PageSet {
        if self.served_by().is_some() {
            return PageSet::all(self.pages());
        }
        let mut set = PageSet::none(self.pages());
        let filed = self.shared.filed.lock();
        for pages in filed.unwrap_or_else(PoisonError::into_inner).iter() {
            set.insert(pages.clone());
        }
        set
    }

    /// Maps pages of `file` in place of the same pages of RAM, copy-on-write.
    pub(crate) fn map_file_pages(&self, file: &File, pages: &Range<u64>) -> io::Result<()> {
        for (piece, host_addr) in self.host_pieces(pages) {
            let len = (piece.end - piece.start) * PAGE_SIZE;
            self.map_over(file, piece.start * PAGE_SIZE, host_addr, len)?;
        }
        Ok(())
    }

    /// Whether `len` bytes from `addr` on are all RAM, in one range.
    #[must_use]
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.shared.map.iter().any(|r| {
            let start = r.start_addr().0;
            addr >= start && addr - start <= r.len() && len <= r.len() - (addr - start)
        })
    }

    /// Copies guest memory at `addr` into `into`.
    ///
    /// # Errors
    /// Part of the range is not RAM.
    pub fn read(&self, addr: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let len = into.len() as u64;
        self.shared
            .map
            .read_slice(into, GuestAddress(addr))
            .map_err(|_| AccessError::Outside { addr, len })
    }

    /// Copies `from` into guest memory at `addr`.
    ///
    /// # Errors
    /// Part of the range is not RAM.
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<(), AccessError> {
        let len = from.len() as u64;
        self.shared
            .map
            .write_slice(from, GuestAddress(addr))
            .map_err(|_| AccessError::Outside { addr, len })
    }

    /// Copies one plain value out of guest memory.
    ///
    /// # Errors
    /// Part of the value is not in RAM.
    pub fn read_plain<T: ByteValued + Default>(&self, addr: u64) -> Result<T, AccessError> {
        let mut value = T::default();
        self.read(addr, value.as_mut_slice())?;
        Ok(value)
    }

    /// Copies one plain value into guest memory.
    ///
    /// # Errors
    /// Part of the value is not in RAM.
    pub fn write_plain<T: ByteValued>(&self, addr: u64, value: &T) -> Result<(), AccessError> {
        self.write(addr, value.as_slice())
    }

    /// Places `len` bytes of `file` from `offset` on at `addr`.
    ///
    /// Whole pages whose file offset and guest address agree are mapped copy-on-write from the host's
    /// page cache: nothing is copied, and all guests started from one file share it until they write.
    /// The rest (edges, offsets that do not agree) is copied, and all of it where RAM is made of huge pages. The file should be replaced by rename, not
    /// overwritten, while a guest runs from it: pages not yet touched come from the file.
    ///
    /// # Errors
    /// The range is not RAM, or the file is shorter than asked or cannot be read.
    pub fn place_file(
        &self,
        file: &File,
        offset: u64,
        addr: u64,
        len: u64,
    ) -> Result<(), AccessError> {
        if !self.contains(addr, len) {
            return Err(AccessError::Outside { addr, len });
        }
        let have = file
            .metadata()
            .map_err(|source| AccessError::File {
                offset,
                len,
                source,
            })?
            .len();
        if offset.checked_add(len).is_none_or(|end| end > have) {
            let source = io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the file ends after {have} bytes"),
            );
            return Err(AccessError::File {
                offset,
                len,
                source,
            });
        }
        let head = addr.next_multiple_of(PAGE_SIZE) - addr;
        let pages = len.saturating_sub(head) & !(PAGE_SIZE - 1);
        let is_huge = self.host_pages() == HostPages::Huge2M;
        if is_huge || (addr ^ offset) & (PAGE_SIZE - 1) != 0 || pages == 0 {
            return self.copy_file(file, offset, addr, len);
        }
        self.copy_file(file, offset, addr, head)?;
        self.map_pages(file, offset + head, addr + head, pages)?;
        let done = head + pages;
        self.copy_file(file, offset + done, addr + done, len - done)
    }

    /// Copies `len` bytes of `file` from `offset` on to `addr`.
    ///
    /// # Errors
    /// The range is not RAM, or the file is shorter than asked or cannot be read.
    pub fn copy_file(
        &self,
        file: &File,
        offset: u64,
        addr: u64,
        len: u64,
    ) -> Result<(), AccessError> {
        if !self.contains(addr, len) {
            return Err(AccessError::Outside { addr, len });
        }
        if len == 0 {
            // The end of RAM is a fine place for nothing, but has no host address.
            return Ok(());
        }
        let ptr = self.host_ptr(addr, len)?;
        self.mark_written(ptr as u64, len);
        // SAFETY: `host_ptr` checked that the range is inside one mapping that lives as long as `self`.
        // No guest runs while its memory is being filled, and no other reference into RAM exists:
        // this crate hands out copies only.
        let into = unsafe {
            std::slice::from_raw_parts_mut(ptr, usize::try_from(len).unwrap_or_default())
        };
        read_in_parallel(file, into, offset).map_err(|source| AccessError::File {
            offset,
            len,
            source,
        })
    }

    fn map_pages(&self, file: &File, offset: u64, addr: u64, len: u64) -> Result<(), AccessError> {
        let ptr = self.host_ptr(addr, len)?;
        self.map_over(file, offset, ptr as u64, len)
            .map_err(|source| AccessError::File {
                offset,
                len,
                source,
            })
    }

    /// Maps `len` bytes of `file` over those at `host_addr`, which are whole pages of one range.
    fn map_over(&self, file: &File, offset: u64, host_addr: u64, len: u64) -> io::Result<()> {
        let file_offset = libc::off_t::try_from(offset)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        self.mark_written(host_addr, len);
        // Said before it is true: in between such a page is taken for one that may not be zero.
        let mut first = 0;
        for region in self.regions() {
            let into = host_addr.wrapping_sub(region.host_addr) / PAGE_SIZE;
            if host_addr >= region.host_addr && into < region.pages {
                let start = first + into;
                let filed = self.shared.filed.lock();
                filed
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(start..start + len / PAGE_SIZE);
            }
            first += region.pages;
        }
        // SAFETY: the range is page-aligned and inside one mapping of ours, so that MAP_FIXED replaces
        // nothing else; the region's owner still unmaps the whole range in the end.
        let got = unsafe {
            libc::mmap(
                host_addr as *mut libc::c_void,
                usize::try_from(len).unwrap_or_default(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                file_offset,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn host_ptr(&self, addr: u64, len: u64) -> Result<*mut u8, AccessError> {
        if !self.contains(addr, len) {
            return Err(AccessError::Outside { addr, len });
        }
        self.shared
            .map
            .get_host_address(GuestAddress(addr))
            .map_err(|_| AccessError::Outside { addr, len })
    }
}

/// Reads a file into memory, large ones with two threads: one core neither reads the page cache nor takes
/// fresh pages as fast as memory gives them, and a guest waits for this.
fn read_in_parallel(file: &File, into: &mut [u8], offset: u64) -> io::Result<()> {
    const WORTH_A_THREAD_BYTES: usize = 4 << 20;
    if into.len() < WORTH_A_THREAD_BYTES {
        return file.read_exact_at(into, offset);
    }
    // Halves meet at the boundary of a huge page, so that no page is asked for twice.
    let to_boundary =
        (into.as_ptr() as usize).next_multiple_of(HUGE_PAGE_LEN) - into.as_ptr() as usize;
    let middle = (to_boundary + ((into.len() / 2) & !(HUGE_PAGE_LEN - 1))).min(into.len());
    let (low, high) = into.split_at_mut(middle);
    let high_offset = offset + low.len() as u64;
    let helped = std::thread::scope(|scope| {
        let helper = std::thread::Builder::new()
            .name("loader".into())
            .spawn_scoped(scope, || file.read_exact_at(low, offset));
        file.read_exact_at(high, high_offset)?;
        // A host that gives no thread, or one that died, leaves the work to us.
        Ok::<_, io::Error>(helper.ok().and_then(|helper| helper.join().ok()))
    })?;
    helped.unwrap_or_else(|| file.read_exact_at(low, offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn ram(mib: u64) -> GuestRam {
        GuestRam::map(&MemoryPlan::around_hole(mib << 20).unwrap()).unwrap()
    }

    fn file_of(len: usize) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    #[test]
    fn copies_in_and_out_and_refuses_what_lies_outside() {
        let ram = ram(1);
        ram.write(0xffff0, &[7; 16]).unwrap();
        let mut back = [0; 16];
        ram.read(0xffff0, &mut back).unwrap();
        assert_eq!(back, [7; 16]);
        assert_eq!(ram.read_plain::<u32>(0xffff0).unwrap(), 0x0707_0707);
        for (addr, len) in [(0xffff1, 16), (1 << 20, 1), (u64::MAX, 2), (0, 2 << 20)] {
            assert!(!ram.contains(addr, len));
            let e = ram.write(addr, &vec![0; len as usize]).unwrap_err();
            assert!(e.to_string().contains(&format!("{addr:#x}")), "{e}");
        }
        assert!(ram.contains(1 << 20, 0));
    }

    #[test]
    fn more_than_the_host_is_refused_with_both_figures() {
        let plan = MemoryPlan::around_hole(16 << 40).unwrap();
        let e = GuestRam::map(&plan).unwrap_err();
        assert!(
            e.to_string()
                .contains("16777216 MiB is more than this host has"),
            "{e}"
        );
    }

    #[test]
    fn a_file_is_placed_byte_for_byte_whatever_its_alignment() {
        let (file, bytes) = file_of(20_000);
        for (offset, addr, len) in [
            (0, 0x1000, 20_000),
            (0, 0x1001, 20_000),
            (100, 0x3064, 12_345),
            (4096, 0x2000, 4096),
            (5, 0x2005, 10),
            (0, 0x5000, 0),
            (0, (1 << 20) - 8192, 8192),
        ] {
            let ram = ram(1);
            ram.place_file(&file, offset, addr, len).unwrap();
            let rest = u64::from(addr + len < 1 << 20);
            let mut back = vec![0; (len + rest) as usize];
            ram.read(addr, &mut back).unwrap();
            let (offset, len) = (offset as usize, len as usize);
            assert_eq!(back[..len], bytes[offset..offset + len]);
            assert!(
                back[len..].iter().all(|b| *b == 0),
                "what follows the file stays zero"
            );
        }
    }

    #[test]
    fn guest_writes_never_reach_the_file() {
        let (file, bytes) = file_of(8192);
        let (a, b) = (ram(1), ram(1));
        a.place_file(&file, 0, 0, 8192).unwrap();
        b.place_file(&file, 0, 0, 8192).unwrap();
        a.write(10, b"guest").unwrap();
        let mut back = vec![0; 8192];
        b.read(0, &mut back).unwrap();
        assert_eq!(back, bytes);
    }

    #[test]
    fn a_short_file_is_an_error_not_a_fault() {
        let (file, _) = file_of(5000);
        let e = ram(1).place_file(&file, 0, 0, 8192).unwrap_err();
        assert!(e.to_string().contains("ends after 5000 bytes"), "{e}");
        let e = ram(1).place_file(&file, u64::MAX, 0, 8).unwrap_err();
        assert!(matches!(e, AccessError::File { .. }));
        let e = ram(1).place_file(&file, 0, (1 << 20) - 8, 16).unwrap_err();
        assert!(matches!(e, AccessError::Outside { .. }));
    }

    #[test]
    fn huge_pages_are_possible_whatever_the_size() {
        for mib in [2, 64, 129, 255] {
            let ram = ram(mib);
            let (_, host_addr) = ram.mapped_ranges().next().unwrap();
            assert_eq!(host_addr % HUGE_PAGE_LEN as u64, 0, "{mib} MiB");
        }
    }

    #[test]
    fn ranges_report_where_they_are_mapped() {
        let plan = MemoryPlan::around_hole((3 << 30) + (8 << 20)).unwrap();
        let ram = GuestRam::map(&plan).unwrap();
        let ranges: Vec<_> = ram.mapped_ranges().collect();
        assert_eq!(
            ranges[1].0,
            RamRange {
                start: 4 << 30,
                size_bytes: 8 << 20
            }
        );
        assert!(ranges.iter().all(|(_, host)| host % PAGE_SIZE == 0));
        ram.write((4 << 30) + 5, b"high").unwrap();
        assert!(
            !ram.contains((3 << 30) - 4, 8),
            "a value never straddles the hole"
        );
        assert_eq!(ram.size_bytes(), plan.size_bytes());
    }
}
