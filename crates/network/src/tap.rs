//! Taps: interfaces whose other end is a file descriptor (Linux, Documentation/networking/tuntap.rst).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::Error;
use crate::words::InterfaceName;

const TUN: &str = "/dev/net/tun";
/// Most queues of a tap (MAX_TAP_QUEUES of the kernel).
pub(crate) const MOST_QUEUES: u16 = 256;

const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
/// _IOW('T', number, int)
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNSETOWNER: libc::Ioctl = 0x4004_54cc;
/// _IOWR('T', number, int)
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// The header of each frame (virtio 1.3, section 5.1.6).
const VNET_HEADER_BYTES: libc::c_int = 12;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// Makes a tap with virtio headers and one descriptor for each queue. It goes with its last descriptor.
pub(crate) fn make(name: &InterfaceName, queues: u16, owner: u32) -> Result<Vec<OwnedFd>, Error> {
    all(queues, || {
        let file = open(TUN, name.as_str())?;
        set(&file, TUNSETOWNER, owner)?;
        Ok(file)
    })?
    .map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => Error::conflict(
            name,
            format!("the tap '{name}' is in use by another process"),
        ),
        Some(libc::ENOENT | libc::ENODEV) => {
            Error::kernel(format!("make the tap {name}: {TUN} (modprobe tun)"), e)
        }
        _ => Error::kernel(format!("make the tap {name}"), e),
    })
}

/// Opens the queues of a macvtap, which has a device node of its own.
pub(crate) fn open_macvtap(index: u32, queues: u16) -> Result<Vec<OwnedFd>, Error> {
    let path = format!("/dev/tap{index}");
    all(queues, || open(&path, ""))?.map_err(|e| Error::file("open the macvtap", &path, e))
}

/// All queues, or why they are not to be had; the outer error: there cannot be so many.
fn all(
    queues: u16,
    open: impl Fn() -> io::Result<File>,
) -> Result<io::Result<Vec<OwnedFd>>, Error> {
    if queues == 0 || queues > MOST_QUEUES {
        return Err(Error::word(
            "number of queues",
            &queues.to_string(),
            format!("it is 1 to {MOST_QUEUES}"),
        ));
    }
    Ok((0..queues).map(|_| open().map(OwnedFd::from)).collect())
}

/// One queue by its node: of the tap `name`, which is made if need be; a macvtap's node says which it is.
fn open(node: &str, name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(node)?;
    let mut request = Request {
        name: [0; 16],
        // Multi-queue even for one, so that whoever opens it by name need not ask.
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes a `struct ifreq`, which `request` is in size
    // and layout.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    let mut length: libc::c_int = VNET_HEADER_BYTES;
    // SAFETY: the descriptor is open, and TUNSETVNETHDRSZ reads an `int`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw mut length) })?;
    Ok(file)
}

/// Lets a tap stay when its last descriptor is closed.
pub(crate) fn persist(file: &OwnedFd) -> io::Result<()> {
    set(file, TUNSETPERSIST, 1)
}

fn set(file: &impl AsRawFd, what: libc::Ioctl, value: u32) -> io::Result<()> {
    // SAFETY: the descriptor is open, and both requests take their argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), what, libc::c_ulong::from(value)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
