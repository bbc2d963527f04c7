//! A pair of queues that the host's kernel serves itself: vhost-net (Linux include/uapi/linux/vhost.h,
//! drivers/vhost/net.c). The kernel reads and writes the rings and moves frames between guest memory and a tap; nobody
//! here is woken for them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use alveole_guest_memory::{GuestRam, RamRange};

use crate::inherited::duplicate_all;
use crate::tap::{self, ioctl};
use crate::{LinkError, LinkQueue};

const GET_FEATURES: libc::c_ulong = 0x8008_af00;
const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0xaf01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const GET_VRING_BASE: libc::c_ulong = 0xc008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// What the kernel must know of what a driver may agree to (virtio 1.3, sections 5.1.3 and 6): VIRTIO_NET_F_MRG_RXBUF,
/// INDIRECT_DESC, EVENT_IDX, VERSION_1. Offloads are between tap and driver. All kernels since 3.19 know these.
const FEATURES: u64 = 1 << 15 | 1 << 28 | 1 << 29 | 1 << 32;
/// Most ranges of guest memory: what every kernel takes (`max_mem_regions` of its module vhost).
const MAX_RANGES: usize = 64;
/// In place of a descriptor: none.
const NOTHING: i32 = -1;
const PATH: &str = "/dev/vhost-net";

/// What opens the host's vhost-net for a link.
#[derive(Debug)]
pub enum VhostSpec {
    /// `/dev/vhost-net`.
    Node,
    /// Descriptors of it that somebody else opened and nobody has used: one for each pair of queues.
    Fds(Vec<OwnedFd>),
}

impl VhostSpec {
    /// Descriptors that the process was started with, by their numbers with commas between them. They are duplicated.
    ///
    /// # Errors
    /// What is no number, or no open descriptor.
    pub fn inherited(numbers: &str) -> Result<Self, LinkError> {
        duplicate_all(numbers).map(Self::Fds)
    }
}

/// One of the two rings of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// To the guest.
    Rx,
    /// From the guest.
    Tx,
}

impl Ring {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Rx, Self::Tx];

    /// Its place in a pair, which is also the kernel's number.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Rx => 0,
            Self::Tx => 1,
        }
    }
}

/// A ring as its driver has set it up, and who is told of what. All addresses are the guest's.
pub struct RingPlan<'a> {
    /// Number of descriptors.
    pub size: u16,
    /// Where the descriptor table is.
    pub descriptors_addr: u64,
    /// Where the available ring is.
    pub available_addr: u64,
    /// Where the used ring is.
    pub used_addr: u64,
    /// The next entry of the available ring. That of the used ring stands in guest memory.
    pub next_avail: u16,
    /// The eventfd that the driver's doorbell writes.
    pub kick: &'a dyn AsRawFd,
    /// The eventfd that is written to interrupt the driver.
    pub call: &'a dyn AsRawFd,
    /// The eventfd that is written when the kernel gives the ring up.
    pub error: &'a dyn AsRawFd,
}

/// Index and value (`struct vhost_vring_state`), or index and descriptor (`struct vhost_vring_file`).
#[repr(C)]
struct IndexAnd<T> {
    index: u32,
    value: T,
}

#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRange {
    guest_addr: u64,
    size_bytes: u64,
    host_addr: u64,
    flags: u64,
}

#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    ranges: [MemoryRange; MAX_RANGES],
}

/// One pair of queues in the kernel's hands, or ready to be. Never holds guest memory but while a ring runs.
pub struct VhostNet {
    file: OwnedFd,
    tap: OwnedFd,
    running: [bool; 2],
    /// How far each ring came.
    positions: [u16; 2],
    /// Mapped for as long as the kernel may look there.
    ram: Option<GuestRam>,
}

/// Opens one for each queue of a tap or macvtap, and becomes the owner of each: the kernel makes a thread for it, in
/// this process since Linux 6.4.
pub(crate) fn open(
    spec: VhostSpec,
    link: &str,
    queues: &[Box<dyn LinkQueue>],
) -> Result<Vec<VhostNet>, LinkError> {
    let files = match spec {
        VhostSpec::Node => queues
            .iter()
            .map(|_| open_node())
            .collect::<Result<_, _>>()?,
        VhostSpec::Fds(fds) => fds,
    };
    if files.len() != queues.len() {
        return Err(LinkError::VhostFds {
            link: link.to_owned(),
            has: files.len(),
            pairs: queues.len(),
        });
    }
    let pairs = files.into_iter().zip(queues);
    pairs
        .map(|(file, queue)| VhostNet::new(file, link, queue.readable_fd()))
        .collect()
}

fn open_node() -> Result<OwnedFd, LinkError> {
    let path = Path::new(PATH);
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map(OwnedFd::from).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => LinkError::Permission {
            what: format!("open {PATH}"),
            source,
            cure: format!("let the user that runs this have it: chown $USER {PATH}; or leave vhost out"),
        },
        _ => LinkError::Node {
            path: path.to_owned(),
            source,
            cure: "load the module: modprobe vhost_net; where the kernel has none, leave vhost out",
        },
    })
}

impl VhostNet {
    fn new(file: OwnedFd, link: &str, tap: BorrowedFd<'_>) -> Result<Self, LinkError> {
        let step = |what| {
            move |source| LinkError::Step {
                link: link.to_owned(),
                what,
                source,
            }
        };
        if !tap::has_header(tap) {
            return Err(LinkError::NotATap {
                name: link.to_owned(),
                why: "it was opened without IFF_VNET_HDR, which vhost needs".into(),
            });
        }
        let mut features = 0u64;
        let fd = file.as_raw_fd();
        ioctl(file.as_fd(), GET_FEATURES, &raw mut features).map_err(|_| {
            LinkError::Descriptor {
                fd,
                wanted: "vhost-net (/dev/vhost-net)",
            }
        })?;
        if features & FEATURES != FEATURES {
            return Err(LinkError::VhostFeatures {
                fd,
                lacks: FEATURES & !features,
            });
        }
        set_owner(file.as_fd()).map_err(|source| match source.raw_os_error() {
            Some(libc::EBUSY) => LinkError::VhostOwned { fd },
            _ => step("make vhost-net this process's own (VHOST_SET_OWNER)")(source),
        })?;
        Ok(Self {
            file,
            tap: tap
                .try_clone_to_owned()
                .map_err(step("duplicate its descriptor"))?,
            running: [false; 2],
            positions: [0; 2],
            ram: None,
        })
    }

    /// Whether the kernel serves `ring`.
    #[must_use]
    pub fn is_running(&self, ring: Ring) -> bool {
        self.running[ring.index()]
    }

    /// The next entry of the available ring, as of the last [`Self::stop`].
    #[must_use]
    pub fn position(&self, ring: Ring) -> u16 {
        self.positions[ring.index()]
    }

    /// Lets the kernel serve `ring` from now on, under the features that the driver has agreed to. Whatever waits in it
    /// is looked at with the next write to `kick`.
    ///
    /// # Errors
    /// A part of the ring is not in guest memory; or the kernel refuses: the tap is gone, or has no memory left.
    pub fn start(
        &mut self,
        ring: Ring,
        plan: &RingPlan<'_>,
        features: u64,
        ram: &GuestRam,
    ) -> io::Result<()> {
        let size = u64::from(plan.size);
        let host_addr = |addr, len| {
            host_addr(ram, addr, len).ok_or_else(|| {
                io::Error::other(format!("{addr:#x}+{len:#x} is not in guest memory"))
            })
        };
        // Virtio 1.3, sections 2.7.5, 2.7.6 and 2.7.8, with the two bytes of the event index.
        let mut addrs = VringAddr {
            index: ring.index() as u32,
            flags: 0,
            descriptors: host_addr(plan.descriptors_addr, size * 16)?,
            used: host_addr(plan.used_addr, size * 8 + 6)?,
            available: host_addr(plan.available_addr, size * 2 + 6)?,
            log: 0,
        };
        if self.running == [false; 2] {
            self.set_up(features & FEATURES, ram)?;
        }
        self.set(SET_VRING_NUM, ring, u32::from(plan.size))?;
        self.set(SET_VRING_BASE, ring, u32::from(plan.next_avail))?;
        ioctl(self.file.as_fd(), SET_VRING_ADDR, &raw mut addrs)?;
        self.set(SET_VRING_ERR, ring, plan.error.as_raw_fd())?;
        self.set(SET_VRING_CALL, ring, plan.call.as_raw_fd())?;
        self.set(SET_VRING_KICK, ring, plan.kick.as_raw_fd())?;
        // From here on the kernel may look into memory, whatever comes of the call.
        self.running[ring.index()] = true;
        let started = self.set(NET_SET_BACKEND, ring, self.tap.as_raw_fd());
        if started.is_err() {
            let _ = self.stop(ring);
        }
        started
    }

    /// Has the kernel interrupt by another eventfd. No interrupt goes by the former one when this returns.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_call(&self, ring: Ring, call: &dyn AsRawFd) -> io::Result<()> {
        self.set(SET_VRING_CALL, ring, call.as_raw_fd())
    }

    /// Takes `ring` back; when this returns, the kernel neither reads nor writes it. How far it came, as
    /// [`Self::position`] says it from now on. Nothing for a ring that does not run.
    ///
    /// # Errors
    /// The kernel refuses; the ring counts as running still.
    pub fn stop(&mut self, ring: Ring) -> io::Result<()> {
        if !self.is_running(ring) {
            return Ok(());
        }
        self.set(NET_SET_BACKEND, ring, NOTHING)?;
        let mut state = IndexAnd {
            index: ring.index() as u32,
            value: 0u32,
        };
        ioctl(self.file.as_fd(), GET_VRING_BASE, &raw mut state)?;
        self.set(SET_VRING_KICK, ring, NOTHING)?;
        self.set(SET_VRING_CALL, ring, NOTHING)?;
        // Of a split ring it is the index alone.
        self.positions[ring.index()] = (state.value & 0xffff) as u16;
        self.running[ring.index()] = false;
        // The kernel wrote frames and rings, and does not say where.
        if let Some(ram) = &self.ram {
            ram.mark_all_written();
        }
        if self.running == [false; 2] {
            self.ram = None;
        }
        Ok(())
    }

    fn set_up(&mut self, features: u64, ram: &GuestRam) -> io::Result<()> {
        let mut features = features;
        let mut table = memory_table(ram)?;
        ioctl(self.file.as_fd(), SET_FEATURES, &raw mut features)?;
        ioctl(self.file.as_fd(), SET_MEM_TABLE, &raw mut table)?;
        self.ram = Some(ram.clone());
        Ok(())
    }

    fn set<T>(&self, what: libc::c_ulong, ring: Ring, value: T) -> io::Result<()> {
        let mut argument = IndexAnd {
            index: ring.index() as u32,
            value,
        };
        ioctl(self.file.as_fd(), what, &raw mut argument)
    }
}

impl Drop for VhostNet {
    /// Somebody else may have the file open, too: closing ours would not end it.
    fn drop(&mut self) {
        for ring in Ring::BOTH {
            if let Err(e) = self.stop(ring) {
                // The kernel goes on using the guest's memory: it must stay where it is.
                log::error!("vhost-net does not give a queue back: {e}");
                std::mem::forget(self.ram.take());
            }
        }
    }
}

fn set_owner(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this request takes no argument.
    if unsafe { libc::ioctl(fd.as_raw_fd(), SET_OWNER as _, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn memory_table(ram: &GuestRam) -> io::Result<MemoryTable> {
    let mut table = MemoryTable {
        count: 0,
        padding: 0,
        ranges: [MemoryRange::default(); MAX_RANGES],
    };
    let mut places = table.ranges.iter_mut();
    for (RamRange { start, size_bytes }, host_addr) in ram.mapped_ranges() {
        let place = places.next().ok_or_else(|| {
            io::Error::other(format!("guest memory has more than {MAX_RANGES} ranges"))
        })?;
        *place = MemoryRange {
            guest_addr: start,
            size_bytes,
            host_addr,
            flags: 0,
        };
        table.count += 1;
    }
    Ok(table)
}

/// Where guest memory is mapped here, if all of it is in one range.
fn host_addr(ram: &GuestRam, addr: u64, len: u64) -> Option<u64> {
    ram.mapped_ranges().find_map(|(range, host_addr)| {
        let offset = addr.checked_sub(range.start)?;
        let left = range.size_bytes.checked_sub(offset)?;
        (len <= left).then_some(host_addr + offset)
    })
}

#[cfg(test)]
mod tests {
    use alveole_guest_memory::MemoryPlan;

    use super::*;

    #[test]
    fn structures_are_as_long_as_their_requests_say() {
        // The length stands in 14 bits of the request, from bit 16 on.
        let len = |request: libc::c_ulong| (request >> 16) as usize & 0x3fff;
        assert_eq!(len(SET_VRING_NUM), size_of::<IndexAnd<u32>>());
        assert_eq!(len(SET_VRING_KICK), size_of::<IndexAnd<i32>>());
        assert_eq!(len(SET_VRING_ADDR), size_of::<VringAddr>());
        // Its ranges are not counted.
        assert_eq!(
            len(SET_MEM_TABLE),
            std::mem::offset_of!(MemoryTable, ranges)
        );
        assert_eq!(size_of::<MemoryRange>(), 32);
    }

    #[test]
    fn memory_on_both_sides_of_the_hole_is_told_and_found() {
        let plan = MemoryPlan::around_hole((3 << 30) + (8 << 20)).unwrap();
        let ram = GuestRam::map(&plan).unwrap();
        let mapped: Vec<_> = ram.mapped_ranges().collect();
        let table = memory_table(&ram).unwrap();
        assert_eq!(table.count, 2);
        for (told, (range, host)) in table.ranges.iter().zip(&mapped) {
            assert_eq!(told.guest_addr, range.start);
            assert_eq!(told.size_bytes, range.size_bytes);
            assert_eq!(told.host_addr, *host);
        }
        assert_eq!(host_addr(&ram, 4096, 16), Some(mapped[0].1 + 4096));
        assert_eq!(host_addr(&ram, (4 << 30) + 64, 16), Some(mapped[1].1 + 64));
        for (addr, len) in [
            ((3 << 30) - 8, 16),
            (3 << 30, 1),
            ((4u64 << 30) + (8 << 20) - 1, 2),
            (u64::MAX, 1),
            (0, u64::MAX),
        ] {
            assert_eq!(host_addr(&ram, addr, len), None, "{addr:#x}+{len:#x}");
        }
    }

    #[test]
    fn what_is_no_vhost_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let e = VhostSpec::inherited("999999").unwrap_err().to_string();
        assert!(e.contains("999999"), "{e}");
        let e = VhostNet::new(null.try_clone().unwrap().into(), "tap x", null.as_fd());
        let e = e.err().unwrap().to_string();
        assert!(e.contains("IFF_VNET_HDR"), "{e}");
    }
}
