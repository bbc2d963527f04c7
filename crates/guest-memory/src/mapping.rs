//! Ranges of RAM are mapped: where the host likes, of pages that it gives or has reserved.

use std::io;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::hugetlb::{HUGE_PAGE_BYTES, HostPages, HugePagePool};
use crate::ram::VmMemory;
use crate::{MapError, MemoryPlan, RamRange, WriteLog};

/// What the host gives in one piece where it can, as a length of host memory.
pub(crate) const HUGE_PAGE_LEN: usize = HUGE_PAGE_BYTES as usize;

/// How a range is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    /// In small pages.
    Small,
    /// In huge pages where the host gives them.
    Transparent,
    /// In reserved huge pages.
    Hugetlb,
}

/// Maps fresh, zeroed, anonymous memory for every range.
pub(crate) fn map_ranges(plan: &MemoryPlan, backing: Backing) -> Result<VmMemory, MapError> {
    let host_bytes = host_memory_bytes();
    let asked_bytes = plan.size_bytes();
    if asked_bytes > host_bytes {
        return Err(MapError::MoreThanHost {
            asked_bytes,
            host_bytes,
        });
    }
    if backing == Backing::Hugetlb {
        HostPages::Huge2M.check(plan)?;
    }
    let regions = plan
        .ranges()
        .iter()
        .map(|range| match backing {
            Backing::Hugetlb => map_huge_range(range, asked_bytes / HUGE_PAGE_BYTES),
            Backing::Small => map_range(range, libc::MADV_NOHUGEPAGE),
            Backing::Transparent => map_range(range, libc::MADV_HUGEPAGE),
        })
        .collect::<Result<Vec<_>, _>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(|e| MapError::Ranges(e.to_string()))
}

fn map_range(range: &RamRange, advice: i32) -> Result<GuestRegionMmap<WriteLog>, MapError> {
    let refused = |source| MapError::Refused {
        start: range.start,
        size_bytes: range.size_bytes,
        source,
    };
    let size = usize::try_from(range.size_bytes)
        .map_err(|e| refused(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
    let region = map_aligned(size).map_err(|e| match e {
        MmapRegionError::Mmap(io) => refused(io),
        other => refused(io::Error::other(other.to_string())),
    })?;
    // SAFETY: the range was mapped just above. Advice changes no content; a host without huge pages
    // refuses it, and small pages serve as well.
    unsafe { libc::madvise(region.as_ptr().cast(), size, advice) };
    in_guest(region, range)
}

/// Maps reserved huge pages. Without MAP_NORESERVE: who touches one that was not reserved, and is not there, gets SIGBUS.
fn map_huge_range(range: &RamRange, needed: u64) -> Result<GuestRegionMmap<WriteLog>, MapError> {
    let lacks = |source| MapError::NoHugePages {
        needed,
        pool: HugePagePool::read(),
        source,
    };
    let size = usize::try_from(range.size_bytes)
        .map_err(|e| lacks(io::Error::new(io::ErrorKind::InvalidInput, e)))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let region = MmapRegionBuilder::<WriteLog>::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .build()
        .map_err(|e| match e {
            MmapRegionError::Mmap(io) => lacks(io),
            other => lacks(io::Error::other(other.to_string())),
        })?;
    // SAFETY: the range was mapped just above; the advice changes no content.
    if unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_DONTFORK) } != 0 {
        return Err(lacks(io::Error::last_os_error()));
    }
    in_guest(region, range)
}

fn in_guest(
    region: MmapRegion<WriteLog>,
    range: &RamRange,
) -> Result<GuestRegionMmap<WriteLog>, MapError> {
    GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or_else(|| {
        MapError::Ranges(format!(
            "{:#x}+{:#x} wraps around",
            range.start, range.size_bytes
        ))
    })
}

/// Maps `size` bytes, if possible from the boundary of a huge page on: ranges start at such a boundary in
/// the guest, and only where both agree can host and hypervisor use huge pages.
fn map_aligned(size: usize) -> Result<MmapRegion<WriteLog>, MmapRegionError> {
    let map = |size| {
        MmapRegionBuilder::<WriteLog>::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
    };
    let is_aligned =
        |region: &MmapRegion<WriteLog>| (region.as_ptr() as usize).is_multiple_of(HUGE_PAGE_LEN);
    let mut region = map(size)?;
    // A mapping goes to the end of the highest gap that holds it. Kernels before 6.7, and later ones for
    // odd sizes, do not care for the boundary, so that gap is given an end that does: a larger mapping
    // finds it, and its tail stays while ours is made. Another thread's mapping may come between.
    for _ in 0..4 {
        if size < HUGE_PAGE_LEN || is_aligned(&region) {
            break;
        }
        drop(region);
        let larger = map(size + HUGE_PAGE_LEN)?;
        let end = larger.as_ptr() as usize + larger.size();
        let tail = (end - size) % HUGE_PAGE_LEN;
        drop(larger);
        let filler = Filler::map((end - tail) as *mut _, tail);
        region = map(size)?;
        drop(filler);
    }
    Ok(region)
}

/// Address space that is taken for a moment.
struct Filler(*mut libc::c_void, usize);

impl Filler {
    /// Takes `size` bytes at `addr`, if they are free.
    fn map(addr: *mut libc::c_void, size: usize) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: a fresh inaccessible mapping where nothing else is mapped; nobody uses its memory.
        let got = unsafe { libc::mmap(addr, size, libc::PROT_NONE, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            return None;
        }
        Some(Self(got, size))
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

/// RAM and swap of this host, in bytes (sysinfo(2)); without limit where the host does not say.
fn host_memory_bytes() -> u64 {
    // SAFETY: sysinfo is plain numbers, for which all zeroes is a value; the call fills it.
    let info = unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        if libc::sysinfo(&raw mut info) != 0 {
            return u64::MAX;
        }
        info
    };
    (info.totalram + info.totalswap).saturating_mul(u64::from(info.mem_unit))
}
