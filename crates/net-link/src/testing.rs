//! Links without a host, for tests: real sockets, so that what a device does is seen by a real kernel.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{NetLink, Offloads, socket};

/// A link of `pairs` queues with a header on each frame and all offloads, and its other ends: each datagram is a
/// `virtio_net_hdr_v1` and a frame.
#[must_use]
pub fn pair(pairs: u16) -> (NetLink, Vec<UnixDatagram>) {
    let (links, ends): (Vec<_>, Vec<_>) = (0..pairs)
        .map(|_| {
            let (ours, theirs) = UnixDatagram::pair().unwrap();
            (link(ours, "pair"), theirs)
        })
        .unzip();
    (join(links), ends)
}

/// A link without a header, and its other end.
#[must_use]
pub fn plain_pair() -> (NetLink, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let link = socket::datagrams("plain pair".into(), ours.into(), false).unwrap();
    (link, theirs)
}

/// A link of `pairs` queues that gives back what it gets.
#[must_use]
pub fn loopback(pairs: u16) -> NetLink {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let links = (0..pairs).map(|_| {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("alveole-loopback-{}-{number}", std::process::id());
        let addr = SocketAddr::from_abstract_name(name).unwrap();
        let socket = UnixDatagram::bind_addr(&addr).unwrap();
        socket.connect_addr(&addr).unwrap();
        link(socket, "loopback")
    });
    join(links.collect())
}

fn link(socket: UnixDatagram, name: &str) -> NetLink {
    socket::datagrams(name.into(), socket.into(), true).unwrap()
}

fn join(links: Vec<NetLink>) -> NetLink {
    let mut links = links.into_iter();
    let mut all = links.next().unwrap();
    all.facts.offloads = Offloads::ALL;
    for link in links {
        all.queues.extend(link.queues);
    }
    all
}
