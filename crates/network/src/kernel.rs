//! This host's interfaces, addresses and routes, by netlink (rtnetlink(7)).
//!
//! A blocking socket and the message types of the `netlink-packet-route` crate: one request, one answer, no
//! runtime.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVtap, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    MacVtapMode,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::Error;
use crate::plan::{Link, Route};
use crate::words::Mac;

/// The group of all interfaces that are ours (`ip link show group 1634498156` shows them): "alvl" in ASCII. It is given
/// as an interface is made, so that none is ever without.
pub const OUR_GROUP: u32 = 0x616c_766c;

/// Dumps that others' changes interrupt are begun anew, so many times.
const MOST_DUMPS: usize = 16;
/// Room for one answer of the kernel, which keeps to less.
const ANSWER_BYTES: usize = 64 << 10;

/// A connection to the kernel's networking, in the network namespace where it was opened.
#[derive(Debug)]
pub(crate) struct Kernel {
    socket: Socket,
    sequence: u32,
}

/// What the kernel says of interfaces and routes.
pub(crate) struct Seen {
    pub(crate) links: BTreeMap<String, Link>,
    pub(crate) routes: Vec<Route>,
    /// Interfaces with default routes from router advertisements.
    pub(crate) advertised: Vec<String>,
}

impl Kernel {
    pub(crate) fn open() -> Result<Self, Error> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        let socket = open().map_err(|e| Error::kernel("ask the kernel about its interfaces", e))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends one request and gives what answers it.
    fn ask(
        &mut self,
        message: &RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let dump = flags & NLM_F_DUMP == NLM_F_DUMP;
        for _ in 0..MOST_DUMPS {
            if let Some(answers) = self.ask_once(message.clone(), flags)? {
                return Ok(answers);
            }
            debug_assert!(dump);
        }
        Err(io::Error::other("interfaces change all the time"))
    }

    /// None: a dump was interrupted.
    fn ask_once(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let malformed =
            |e: &dyn std::fmt::Display| io::Error::other(format!("malformed answer: {e}"));
        let (mut answers, mut whole) = (Vec::new(), true);
        let mut buffer = Vec::with_capacity(ANSWER_BYTES);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                done => done?,
            };
            let mut rest = &buffer[..];
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if length < 16 || length > rest.len() {
                    return Err(malformed(&format!("length {length}")));
                }
                let (one, after) = rest.split_at(length);
                rest = after
                    .get(length.next_multiple_of(4) - length..)
                    .unwrap_or_default();
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(one)
                    .map_err(|e| malformed(&e))?;
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Done(_) => return Ok(whole.then_some(answers)),
                    NetlinkPayload::Error(e) => {
                        return match e.code {
                            None => Ok(Some(answers)),
                            Some(code) => Err(io::Error::from_raw_os_error(-code.get())),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    fn change(
        &mut self,
        act: &str,
        message: &RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), Error> {
        self.ask(message, NLM_F_ACK | flags)
            .map(drop)
            .map_err(|e| Error::kernel(act, e))
    }

    /// The index of an interface.
    fn index(&self, act: &str, name: &str) -> Result<u32, Error> {
        rustix::net::netdevice::name_to_index(&self.socket, name)
            .map_err(|e| Error::kernel(act, e.into()))
    }

    /// All interfaces and routes.
    pub(crate) fn look(&mut self) -> Result<Seen, Error> {
        const ACT: &str = "ask the kernel about its interfaces";
        let failed = |e| Error::kernel(ACT, e);
        let messages = self
            .ask(
                &RouteNetlinkMessage::GetLink(LinkMessage::default()),
                NLM_F_DUMP,
            )
            .map_err(failed)?;
        let mut names = BTreeMap::new();
        let mut links = Vec::new();
        for message in messages {
            let RouteNetlinkMessage::NewLink(message) = message else {
                continue;
            };
            let index = message.header.index;
            let (name, link, above) = link(message);
            names.insert(index, name.clone());
            links.push((name, link, above));
        }
        let named = |index: Option<u32>| index.and_then(|i| names.get(&i).cloned());
        let mut links: BTreeMap<String, Link> = links
            .into_iter()
            .map(|(name, link, (master, parent))| {
                let link = Link {
                    master: named(master),
                    parent: named(parent),
                    ..link
                };
                (name, link)
            })
            .collect();
        let messages = self
            .ask(
                &RouteNetlinkMessage::GetAddress(AddressMessage::default()),
                NLM_F_DUMP,
            )
            .map_err(failed)?;
        for message in messages {
            let RouteNetlinkMessage::NewAddress(message) = message else {
                continue;
            };
            let link = names
                .get(&message.header.index)
                .and_then(|name| links.get_mut(name));
            if let (Some(link), Some(address)) = (link, address(&message)) {
                link.addresses.push(address);
            }
        }
        let (mut routes, mut advertised) = (Vec::new(), Vec::new());
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            for message in self
                .ask(&RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)
                .map_err(failed)?
            {
                let RouteNetlinkMessage::NewRoute(message) = message else {
                    continue;
                };
                if message.header.table != RouteHeader::RT_TABLE_MAIN
                    || message.header.kind != RouteType::Unicast
                {
                    continue;
                }
                let over = message.attributes.iter().find_map(|a| match a {
                    RouteAttribute::Oif(index) => names.get(index).cloned(),
                    _ => None,
                });
                match destination(&message) {
                    Some(to) => routes.push(Route { to, over }),
                    None if message.header.protocol == RouteProtocol::Ra => advertised.extend(over),
                    None => {}
                }
            }
        }
        Ok(Seen {
            links,
            routes,
            advertised,
        })
    }

    /// Where packets go to that this host takes for itself.
    pub(crate) fn local_addresses(&mut self) -> Result<Vec<IpNet>, Error> {
        const ACT: &str = "ask the kernel for its own addresses";
        let mut own = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let routes = self
                .ask(&RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)
                .map_err(|e| Error::kernel(ACT, e))?;
            own.extend(routes.iter().filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Local => {
                    routed_to(route)
                }
                _ => None,
            }));
        }
        Ok(own)
    }

    fn make(
        &mut self,
        act: &str,
        kind: InfoKind,
        data: Option<InfoData>,
        attributes: Vec<LinkAttribute>,
    ) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        let mut info = vec![LinkInfo::Kind(kind)];
        info.extend(data.map(LinkInfo::Data));
        message.attributes = attributes;
        message.attributes.push(LinkAttribute::Group(OUR_GROUP));
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.change(
            act,
            &RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    pub(crate) fn make_bridge(&mut self, name: &str, mac: Mac, mtu: u32) -> Result<(), Error> {
        let attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Address(mac.bytes().to_vec()),
            LinkAttribute::Mtu(mtu),
        ];
        self.make(
            &format!("make bridge {name}"),
            InfoKind::Bridge,
            None,
            attributes,
        )
    }

    pub(crate) fn make_vlan(&mut self, name: &str, parent: &str, id: u16) -> Result<(), Error> {
        let act = format!("make {name}, VLAN {id} on {parent}");
        let parent = self.index(&act, parent)?;
        let attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Link(parent),
        ];
        self.make(
            &act,
            InfoKind::Vlan,
            Some(InfoData::Vlan(vec![InfoVlan::Id(id)])),
            attributes,
        )
    }

    /// Makes a macvtap in bridge mode, so that guests on one parent see each other, and gives its index.
    pub(crate) fn make_macvtap(
        &mut self,
        name: &str,
        parent: &str,
        mac: Mac,
        mtu: u32,
    ) -> Result<u32, Error> {
        let act = format!("make {name}, a macvtap on {parent}");
        let parent = self.index(&act, parent)?;
        let attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Link(parent),
            LinkAttribute::Address(mac.bytes().to_vec()),
            LinkAttribute::Mtu(mtu),
        ];
        let data = InfoData::MacVtap(vec![InfoMacVtap::Mode(MacVtapMode::Bridge)]);
        self.make(&act, InfoKind::MacVtap, Some(data), attributes)?;
        self.index(&act, name)
    }

    fn set(
        &mut self,
        act: &str,
        link: &str,
        attributes: Vec<LinkAttribute>,
        up: bool,
    ) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = self.index(act, link)?;
        if up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        message.attributes = attributes;
        self.change(act, &RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Marks an interface as ours that could not be made so.
    pub(crate) fn claim(&mut self, link: &str) -> Result<(), Error> {
        self.set(
            &format!("mark {link}"),
            link,
            vec![LinkAttribute::Group(OUR_GROUP)],
            false,
        )
    }

    pub(crate) fn set_alias(&mut self, link: &str, text: &str) -> Result<(), Error> {
        self.set(
            &format!("mark {link}"),
            link,
            vec![LinkAttribute::IfAlias(text.into())],
            false,
        )
    }

    pub(crate) fn set_mtu(&mut self, link: &str, mtu: u32) -> Result<(), Error> {
        self.set(
            &format!("set the MTU of {link} to {mtu}"),
            link,
            vec![LinkAttribute::Mtu(mtu)],
            false,
        )
    }

    pub(crate) fn join(&mut self, link: &str, bridge: &str) -> Result<(), Error> {
        let act = format!("make {link} a port of bridge {bridge}");
        let bridge = self.index(&act, bridge)?;
        self.set(&act, link, vec![LinkAttribute::Controller(bridge)], false)
    }

    pub(crate) fn leave(&mut self, link: &str) -> Result<(), Error> {
        self.set(
            &format!("take {link} out of its bridge"),
            link,
            vec![LinkAttribute::Controller(0)],
            false,
        )
    }

    pub(crate) fn up(&mut self, link: &str) -> Result<(), Error> {
        self.set(&format!("bring {link} up"), link, Vec::new(), true)
    }

    /// Removes an interface; one that is gone is no error.
    pub(crate) fn remove(&mut self, link: &str) -> Result<(), Error> {
        let act = format!("remove {link}");
        let mut message = LinkMessage::default();
        message.header.index = match self.index(&act, link) {
            Ok(index) => index,
            Err(e) if is_absent(&e) => return Ok(()),
            Err(e) => return Err(e),
        };
        match self.change(&act, &RouteNetlinkMessage::DelLink(message), 0) {
            Err(e) if is_absent(&e) => Ok(()),
            done => done,
        }
    }

    /// Gives an interface an address that holds at once: nobody else is on a bridge of ours before its guests are.
    pub(crate) fn add_address(&mut self, link: &str, address: &IpNet) -> Result<(), Error> {
        let act = format!("give {link} the address {address}");
        let mut message = AddressMessage::default();
        message.header.index = self.index(&act, link)?;
        message.header.prefix_len = address.prefix_len();
        message.header.scope = AddressScope::Universe;
        message.attributes = vec![
            AddressAttribute::Address(address.addr()),
            AddressAttribute::Local(address.addr()),
        ];
        match address {
            IpNet::V4(net) => {
                message.header.family = AddressFamily::Inet;
                message
                    .attributes
                    .push(AddressAttribute::Broadcast(net.broadcast()));
            }
            IpNet::V6(_) => {
                message.header.family = AddressFamily::Inet6;
                message.header.flags = AddressHeaderFlags::Nodad;
                message
                    .attributes
                    .push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
        }
        self.change(
            &act,
            &RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }
}

/// What a guest does for itself.
impl Kernel {
    /// Whether there is an interface of this name; the error says that there is none.
    pub(crate) fn exists(&mut self, link: &str) -> Result<(), Error> {
        self.index(&format!("look for the network device {link}"), link)
            .map(drop)
    }

    pub(crate) fn down(&mut self, link: &str) -> Result<(), Error> {
        let act = format!("take {link} down");
        let mut message = LinkMessage::default();
        message.header.index = self.index(&act, link)?;
        message.header.change_mask = LinkFlags::Up;
        self.change(&act, &RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Gives an interface, which must be down, another hardware address.
    pub(crate) fn set_mac(&mut self, link: &str, mac: Mac) -> Result<(), Error> {
        self.set(
            &format!("give {link} the hardware address {mac}"),
            link,
            vec![LinkAttribute::Address(mac.bytes().to_vec())],
            false,
        )
    }

    /// The addresses of an interface, without those that it has by itself.
    pub(crate) fn addresses_of(&mut self, link: &str) -> Result<Vec<IpNet>, Error> {
        let act = format!("ask the kernel for the addresses of {link}");
        let index = self.index(&act, link)?;
        let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self
            .ask(&all, NLM_F_DUMP)
            .map_err(|e| Error::kernel(act, e))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                    address(&message)
                }
                _ => None,
            })
            .collect())
    }

    /// Takes an address from an interface; one that is gone, as others go with the first of their network, is no error.
    pub(crate) fn remove_address(&mut self, link: &str, address: &IpNet) -> Result<(), Error> {
        let act = format!("take the address {address} from {link}");
        let mut message = AddressMessage::default();
        message.header.index = self.index(&act, link)?;
        message.header.prefix_len = address.prefix_len();
        message.header.family = match address {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        };
        message.attributes = vec![AddressAttribute::Local(address.addr())];
        match self.change(&act, &RouteNetlinkMessage::DelAddress(message), 0) {
            Err(Error::Kernel { source, .. })
                if source.raw_os_error() == Some(libc::EADDRNOTAVAIL) =>
            {
                Ok(())
            }
            done => done,
        }
    }

    /// Of each default route, whether it is one of IPv6.
    pub(crate) fn default_routes(&mut self) -> Result<Vec<bool>, Error> {
        let act = "ask the kernel for its routes";
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let routes = self
                .ask(&RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)
                .map_err(|e| Error::kernel(act, e))?;
            for route in routes {
                let RouteNetlinkMessage::NewRoute(route) = route else {
                    continue;
                };
                let leads_out = route.header.table == RouteHeader::RT_TABLE_MAIN
                    && route.header.kind == RouteType::Unicast
                    && route.header.destination_prefix_length == 0;
                if leads_out {
                    found.push(family == AddressFamily::Inet6);
                }
            }
        }
        Ok(found)
    }

    /// The interface with this hardware address.
    pub(crate) fn named(&mut self, mac: Mac) -> Result<String, Error> {
        let act = "look for the network devices";
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self
            .ask(&message, NLM_F_DUMP)
            .map_err(|e| Error::kernel(act, e))?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link.attributes),
            _ => None,
        });
        let mut seen = Vec::new();
        for attributes in links {
            let (mut name, mut address) = (String::new(), Vec::new());
            for attribute in attributes {
                match attribute {
                    LinkAttribute::IfName(text) => name = text,
                    LinkAttribute::Address(bytes) => address = bytes,
                    _ => {}
                }
            }
            if address == mac.bytes() {
                return Ok(name);
            }
            seen.push(name);
        }
        let why = format!(
            "there is none with the address {mac}, only {}: is its driver there?",
            seen.join(", ")
        );
        Err(Error::kernel(
            act,
            io::Error::new(io::ErrorKind::NotFound, why),
        ))
    }

    /// Sends what is for nobody else to a gateway on the link.
    pub(crate) fn add_default_route(&mut self, link: &str, gateway: IpAddr) -> Result<(), Error> {
        let act = format!("make {gateway} the gateway of {link}");
        let mut message = RouteMessage::default();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        let (family, address) = match gateway {
            IpAddr::V4(address) => (AddressFamily::Inet, RouteAddress::Inet(address)),
            IpAddr::V6(address) => (AddressFamily::Inet6, RouteAddress::Inet6(address)),
        };
        message.header.address_family = family;
        message.attributes = vec![
            RouteAttribute::Gateway(address),
            RouteAttribute::Oif(self.index(&act, link)?),
        ];
        self.change(
            &act,
            &RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }
}

fn is_absent(error: &Error) -> bool {
    matches!(error, Error::Kernel { source, .. } if source.raw_os_error() == Some(libc::ENODEV))
}

/// An interface's name, what it is, and the indices of bridge and parent.
fn link(message: LinkMessage) -> (String, Link, (Option<u32>, Option<u32>)) {
    let mut link = Link {
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    let (mut name, mut master, mut parent) = (String::new(), None, None);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text,
            LinkAttribute::IfAlias(text) => link.alias = Some(text),
            LinkAttribute::Group(group) => link.group = group,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(index) => master = Some(index),
            LinkAttribute::Link(index) => parent = Some(index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Vlan(data)) => {
                            link.vlan = data.iter().find_map(|d| match d {
                                InfoVlan::Id(id) => Some(*id),
                                _ => None,
                            });
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    (name, link, (master, parent))
}

fn address(message: &AddressMessage) -> Option<IpNet> {
    if message.header.scope == AddressScope::Link {
        return None;
    }
    // Of a point-to-point interface, `Address` is the other end.
    let find = |local: bool| {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    IpNet::new(
        find(true).or_else(|| find(false))?,
        message.header.prefix_len,
    )
    .ok()
}

/// Where a route leads to; none where it names nothing, as a default route.
fn routed_to(message: &RouteMessage) -> Option<IpNet> {
    let address = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })?;
    IpNet::new(address, message.header.destination_prefix_length).ok()
}

/// Where a route leads to that is this host's own; none for a default route.
fn destination(message: &RouteMessage) -> Option<IpNet> {
    let net = routed_to(message)?;
    // Every interface has fe80::/64, and many ff00::/8.
    let common = match net {
        IpNet::V6(net) => net.addr().is_unicast_link_local() || net.addr().is_multicast(),
        IpNet::V4(_) => false,
    };
    (net.prefix_len() > 0 && !common).then_some(net)
}
