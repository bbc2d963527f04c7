//! Tap and macvtap interfaces (Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::message::{Carrier, MessageQueue};
use crate::{HEADER_BYTES, LinkError, LinkFacts, LinkQueue, NetLink, Offloads};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const IFF_TUN: i32 = 0x0001;
const IFF_TAP: i32 = 0x0002;
const IFF_MULTI_QUEUE: i32 = 0x0100;
const IFF_ATTACH_QUEUE: i32 = 0x0200;
const IFF_DETACH_QUEUE: i32 = 0x0400;
const IFF_NO_PI: i32 = 0x1000;
const IFF_VNET_HDR: i32 = 0x4000;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

const TUN_PATH: &str = "/dev/net/tun";

/// What one queue of a tap is asked besides frames.
pub(crate) struct TapQueue {
    active: bool,
    /// The link has several queues.
    is_one_of_many: bool,
}

impl TapQueue {
    pub(crate) fn set_offloads(&self, fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
        set_offloads(fd, offloads)
    }

    pub(crate) fn set_active(&mut self, fd: BorrowedFd<'_>, active: bool) -> io::Result<()> {
        if !self.is_one_of_many || self.active == active {
            return Ok(());
        }
        let flag = if active {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        let mut request = empty_request();
        request.ifr_ifru.ifru_flags = flag as i16;
        ioctl(fd, TUNSETQUEUE, &raw mut request)?;
        self.active = active;
        Ok(())
    }
}

/// Opens `pairs` queues of the tap `name`.
pub(crate) fn open_tap(name: &str, pairs: u16) -> Result<NetLink, LinkError> {
    let request = request_for(name)?;
    let several = if pairs > 1 { " multi_queue" } else { "" };
    if index_of(name).is_none() {
        return Err(LinkError::Missing {
            name: name.to_owned(),
            cure: format!(
                "ip tuntap add dev {name} mode tap{several} vnet_hdr user $USER && ip link set {name} up"
            ),
        });
    }
    // A tap made for several queues wants the flag also from who opens one.
    let wanted = if pairs > 1 { IFF_MULTI_QUEUE } else { 0 };
    let first = match attach(request, wanted) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            let other = attach(request, wanted ^ IFF_MULTI_QUEUE);
            match other {
                Ok(_) if pairs > 1 => {
                    return Err(LinkError::OneQueue {
                        name: name.to_owned(),
                        pairs,
                    });
                }
                Ok(fd) => Ok((fd, IFF_MULTI_QUEUE)),
                Err(_) => Err(e),
            }
        }
        Ok(fd) => Ok((fd, wanted)),
        Err(e) => Err(e),
    };
    let (first, flag) = first.map_err(|e| attach_error(name, e))?;
    let mut fds = vec![OwnedFd::from(first)];
    for _ in 1..pairs {
        let fd = attach(request, flag).map_err(|e| attach_error(name, e))?;
        fds.push(fd.into());
    }
    finish(&format!("tap {name}"), Some(name), fds, true, None)
}

/// Takes descriptors of a tap that somebody else has opened.
pub(crate) fn take_tap(fds: Vec<OwnedFd>, pairs: u16) -> Result<NetLink, LinkError> {
    if fds.len() != usize::from(pairs) {
        return Err(LinkError::Pairs {
            link: "a tap by descriptors".into(),
            has: fds.len(),
            pairs,
        });
    }
    let mut names = Vec::new();
    let mut has_header = true;
    for fd in &fds {
        let name = format!("descriptor {}", fd.as_raw_fd());
        let not_a_tap = |why: String| LinkError::NotATap {
            name: name.clone(),
            why,
        };
        let mut request = empty_request();
        ioctl(fd.as_fd(), TUNGETIFF, &raw mut request)
            .map_err(|e| not_a_tap(format!("it is no attached tap ({e})")))?;
        // SAFETY: TUNGETIFF fills the flags; all bits of them are a number.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff;
        let interface = name_in(&request);
        if flags & IFF_TUN != 0 {
            return Err(not_a_tap(format!(
                "{interface} is a tun, which carries no Ethernet frames"
            )));
        }
        // IFF_NO_PI cannot be asked for: its bit is also IFF_NOFILTER, which the kernel sets here.
        has_header &= flags & IFF_VNET_HDR != 0;
        names.push(interface);
    }
    let Some(name) = names.first() else {
        return Err(LinkError::Pairs {
            link: "a tap by descriptors".into(),
            has: 0,
            pairs,
        });
    };
    if let Some(other) = names.iter().find(|other| *other != name) {
        return Err(LinkError::NotATap {
            name: format!("descriptors of {name} and {other}"),
            why: "they are two interfaces".into(),
        });
    }
    let name = name.clone();
    for fd in &fds {
        set_nonblocking(fd.as_fd()).map_err(|source| LinkError::Step {
            link: format!("tap {name}"),
            what: "make its descriptor non-blocking",
            source,
        })?;
    }
    // The interface may be in another network namespace by now: what is asked by its name may fail.
    let interface = index_of(&name).map(|_| name.as_str());
    finish(&format!("tap {name}"), interface, fds, has_header, None)
}

/// Opens `pairs` queues of the macvtap `name`.
pub(crate) fn open_macvtap(name: &str, pairs: u16) -> Result<NetLink, LinkError> {
    let mut request = request_for(name)?;
    let Some(index) = index_of(name) else {
        return Err(LinkError::Missing {
            name: name.to_owned(),
            cure: format!(
                "ip link add link PARENT name {name} type macvtap mode bridge && ip link set {name} up"
            ),
        });
    };
    let path = PathBuf::from(format!("/dev/tap{index}"));
    let flag = if pairs > 1 { IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flag) as i16;
    let mut fds = Vec::new();
    for _ in 0..pairs {
        let file = open_node(
            &path,
            "is it a macvtap? its node is made by udev; without that: mknod it with the numbers in \
             /sys/class/net/NAME/macvtap/tapN/dev",
        )?;
        let mut request = request;
        ioctl(file.as_fd(), TUNSETIFF, &raw mut request).map_err(|source| LinkError::Step {
            link: format!("macvtap {name}"),
            what: "set its flags (TUNSETIFF)",
            source,
        })?;
        fds.push(OwnedFd::from(file));
    }
    let mac = mac_of(name).map_err(|source| LinkError::Step {
        link: format!("macvtap {name}"),
        what: "read its address (SIOCGIFHWADDR)",
        source,
    })?;
    finish(&format!("macvtap {name}"), Some(name), fds, true, Some(mac))
}

/// Sets what all kinds have in common.
fn finish(
    link: &str,
    interface: Option<&str>,
    fds: Vec<OwnedFd>,
    has_header: bool,
    mac: Option<[u8; 6]>,
) -> Result<NetLink, LinkError> {
    let step = |what| {
        move |source| LinkError::Step {
            link: link.to_owned(),
            what,
            source,
        }
    };
    let mut offloads = Offloads::NONE;
    let is_one_of_many = fds.len() > 1;
    let mut queues: Vec<Box<dyn LinkQueue>> = Vec::new();
    for fd in fds {
        if has_header {
            let mut size = HEADER_BYTES as i32;
            ioctl(fd.as_fd(), TUNSETVNETHDRSZ, &raw mut size).map_err(step(
                "set the length of the frames' header (TUNSETVNETHDRSZ)",
            ))?;
            offloads = probe_offloads(fd.as_fd());
        }
        let tap = TapQueue {
            active: true,
            is_one_of_many,
        };
        let mut queue = MessageQueue::new(fd, Carrier::Tap(tap), has_header)
            .map_err(step("duplicate its descriptor"))?;
        if !queues.is_empty() {
            queue
                .set_active(false)
                .map_err(step("put a queue aside (TUNSETQUEUE)"))?;
        }
        queues.push(Box::new(queue));
    }
    if let Some(name) = interface
        && let Ok(flags) = flags_of(name)
        && i32::from(flags) & libc::IFF_UP == 0
    {
        log::warn!("{link} is down: no frame will pass until: ip link set {name} up");
    }
    let mtu = interface.and_then(|name| mtu_of(name).ok());
    Ok(NetLink {
        facts: LinkFacts {
            name: link.to_owned(),
            offloads,
            mtu: mtu.and_then(|mtu| u16::try_from(mtu).ok()),
            mac,
        },
        queues,
        vhost: Vec::new(),
    })
}

/// What this kernel's tap can do: USO came with Linux 6.2. Nothing is left switched on.
fn probe_offloads(fd: BorrowedFd<'_>) -> Offloads {
    let without_uso = Offloads {
        uso4: false,
        uso6: false,
        ..Offloads::ALL
    };
    let csum = Offloads {
        csum: true,
        ..Offloads::NONE
    };
    let can = [Offloads::ALL, without_uso, csum]
        .into_iter()
        .find(|offloads| set_offloads(fd, *offloads).is_ok())
        .unwrap_or(Offloads::NONE);
    // What cannot be switched off was not switched on.
    let _ = set_offloads(fd, Offloads::NONE);
    can
}

fn set_offloads(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let Offloads {
        csum,
        tso4,
        tso6,
        ecn,
        uso4,
        uso6,
    } = offloads;
    let mut bits = 0;
    // Without checksums the kernel refuses all others.
    if csum {
        for (wanted, bit) in [
            (true, TUN_F_CSUM),
            (tso4, TUN_F_TSO4),
            (tso6, TUN_F_TSO6),
            (ecn && (tso4 || tso6), TUN_F_TSO_ECN),
            // The kernel takes both or none.
            (uso4 && uso6, TUN_F_USO4 | TUN_F_USO6),
        ] {
            if wanted {
                bits |= bit;
            }
        }
    }
    // SAFETY: this request takes a number, no pointer.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD as _, bits) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn attach(mut request: libc::ifreq, extra: i32) -> io::Result<File> {
    let file = open_read_write(Path::new(TUN_PATH))?;
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | extra) as i16;
    ioctl(file.as_fd(), TUNSETIFF, &raw mut request)?;
    Ok(file)
}

fn attach_error(name: &str, source: io::Error) -> LinkError {
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::E2BIG) => LinkError::Busy {
            name: name.to_owned(),
        },
        Some(libc::EPERM | libc::EACCES) => LinkError::Permission {
            what: format!("open tap {name}"),
            source,
            cure: format!(
                "make it over to the user that runs this: ip tuntap add dev {name} mode tap vnet_hdr user $USER; \
                 and see that {TUN_PATH} is writable"
            ),
        },
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => LinkError::Node {
            path: TUN_PATH.into(),
            source,
            cure: "load the module: modprobe tun",
        },
        Some(libc::EINVAL) => LinkError::NotATap {
            name: name.to_owned(),
            why: "it is an interface of another kind, or a tun".into(),
        },
        _ => LinkError::Step {
            link: format!("tap {name}"),
            what: "attach to it (TUNSETIFF)",
            source,
        },
    }
}

fn open_read_write(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

fn open_node(path: &Path, cure: &'static str) -> Result<File, LinkError> {
    open_read_write(path).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => LinkError::Permission {
            what: format!("open {}", path.display()),
            source,
            cure: format!(
                "make it over to the user that runs this: chown $USER {}",
                path.display()
            ),
        },
        _ => LinkError::Node {
            path: path.to_owned(),
            source,
            cure,
        },
    })
}

/// Whether frames of this tap or macvtap go behind a header.
pub(crate) fn has_header(fd: BorrowedFd<'_>) -> bool {
    let mut request = empty_request();
    if ioctl(fd, TUNGETIFF, &raw mut request).is_err() {
        return false;
    }
    // SAFETY: TUNGETIFF fills the flags; all bits of them are a number.
    i32::from(unsafe { request.ifr_ifru.ifru_flags }) & IFF_VNET_HDR != 0
}

/// A request that names nothing.
fn empty_request() -> libc::ifreq {
    // SAFETY: all zeroes is a request without a name, whose union holds numbers in all its forms that are used.
    unsafe { std::mem::zeroed() }
}

fn request_for(name: &str) -> Result<libc::ifreq, LinkError> {
    let mut request = empty_request();
    let why = if name.is_empty() {
        Some("it is empty")
    } else if name.len() >= request.ifr_name.len() {
        Some("it is too long")
    } else if name.contains(['/', ' ', '\t', '\n', '\0']) || name == "." || name == ".." {
        Some("it has a character that no name has")
    } else if name.contains('%') {
        // The kernel would take it for a pattern.
        Some("it has a '%'")
    } else {
        None
    };
    if let Some(why) = why {
        return Err(LinkError::Name {
            name: name.to_owned(),
            why,
        });
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

fn name_in(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|c| *c as u8);
    let bytes: Vec<u8> = bytes.take_while(|b| *b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn index_of(name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: the name is a string that ends in a zero.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

fn mtu_of(name: &str) -> io::Result<i32> {
    let request = ask(name, libc::SIOCGIFMTU as libc::c_ulong)?;
    // SAFETY: SIOCGIFMTU fills this form; all bits of it are a number.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}

fn flags_of(name: &str) -> io::Result<i16> {
    let request = ask(name, libc::SIOCGIFFLAGS as libc::c_ulong)?;
    // SAFETY: SIOCGIFFLAGS fills this form; all bits of it are a number.
    Ok(unsafe { request.ifr_ifru.ifru_flags })
}

fn mac_of(name: &str) -> io::Result<[u8; 6]> {
    let request = ask(name, libc::SIOCGIFHWADDR as libc::c_ulong)?;
    // SAFETY: SIOCGIFHWADDR fills this form; all bits of it are numbers.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data;
    let mut mac = [0; 6];
    for (place, byte) in mac.iter_mut().zip(data) {
        *place = byte as u8;
    }
    Ok(mac)
}

/// Asks the host about an interface by its name (netdevice(7)).
fn ask(name: &str, what: libc::c_ulong) -> io::Result<libc::ifreq> {
    let mut request = request_for(name).map_err(io::Error::other)?;
    let socket =
        std::net::UdpSocket::bind("0.0.0.0:0").or_else(|_| std::net::UdpSocket::bind("[::]:0"))?;
    ioctl(socket.as_fd(), what, &raw mut request)?;
    Ok(request)
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this call takes numbers only.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this call takes numbers only.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An ioctl whose argument is of the type that the request takes.
pub(crate) fn ioctl<T>(
    fd: BorrowedFd<'_>,
    what: libc::c_ulong,
    argument: *mut T,
) -> io::Result<()> {
    // SAFETY: every caller passes a pointer to a live value of the type that its request reads and fills.
    if unsafe { libc::ioctl(fd.as_raw_fd(), what as _, argument) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_has_are_refused_before_the_host_is_asked() {
        for (name, why) in [
            ("", "empty"),
            ("a-name-of-16-ch.", "too long"),
            ("a/b", "character"),
            ("tap%d", "%"),
        ] {
            let e = open_tap(name, 1).err().unwrap().to_string();
            assert!(e.contains(why) && e.contains(&format!("{name:?}")), "{e}");
        }
        assert_eq!(
            name_in(&request_for("a-name-of-15-ch").unwrap()),
            "a-name-of-15-ch"
        );
    }

    #[test]
    fn a_missing_interface_comes_with_the_command_that_makes_it() {
        let e = open_tap("no-such-tap0", 4).err().unwrap().to_string();
        assert!(
            e.contains("ip tuntap add dev no-such-tap0 mode tap multi_queue"),
            "{e}"
        );
        let e = open_macvtap("no-such-tap0", 1).err().unwrap().to_string();
        assert!(e.contains("type macvtap"), "{e}");
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = File::open("/dev/null").unwrap();
        let number = file.as_raw_fd();
        let e = take_tap(vec![file.into()], 1).err().unwrap().to_string();
        assert!(e.contains(&format!("descriptor {number}")), "{e}");
        let e = take_tap(Vec::new(), 1).err().unwrap().to_string();
        assert!(e.contains("0 pair(s)"), "{e}");
    }
}
