//! What may go where.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use alveole_egress_rules::{Action, Destination, Egress, Ports, Protocol, Rule, WordError};
use ipnet::IpNet;

use crate::frame::{Packet, Transport};

const DNS_PORT: u16 = 53;
/// A DHCP client asks from the first to the second (RFC 2131, section 4.1; RFC 8415, section 7.2).
const DHCP4_PORTS: (u16, u16) = (68, 67);
const DHCP6_PORTS: (u16, u16) = (546, 547);
/// Relays and servers (RFC 8415, section 7.1).
const ALL_DHCP6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
/// What has crossed no router (RFC 4861, section 6.1).
const NEVER_ROUTED: u8 = 255;

/// Types of ICMPv6 (RFC 4861, section 4; RFC 2710, section 3; RFC 3810, section 5.2).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const NEIGHBOUR_SOLICITATION: u8 = 135;
pub(crate) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LISTENER_REPORTS: [u8; 3] = [131, 132, 143];

/// What a guest may send by one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Compiled>,
    is_open: bool,
    host: Vec<Addresses>,
    guests: Vec<Addresses>,
    resolvers: Vec<IpAddr>,
}

/// Addresses of one family, from the first to the last.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Addresses {
    V4(RangeInclusive<u32>),
    V6(RangeInclusive<u128>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Where {
    Any,
    Outside,
    Host,
    In(Addresses),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Compiled {
    allows: bool,
    to: Where,
    protocol: Option<Protocol>,
    ports: Vec<Ports>,
}

/// What the policy says of a packet, before it is asked whether it is an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Pass,
    /// Unless it is an answer.
    Refuse,
    /// Answer or not.
    Never,
}

impl Policy {
    /// Rules that are asked in their order, and what happens to what none of them names.
    ///
    /// `host` is what the word means in rules: addresses that rules for `any`, `outside` and addresses leave out, and that only
    /// rules for `host` can open. `guests` is the other networks of guests, which `outside` leaves out and [`Egress::Open`] does not
    /// open. Names may always be asked of `resolvers`, by UDP and TCP on port 53.
    ///
    /// # Errors
    /// A rule names a network or a VM, which mean nothing to one interface, or `host` while that has no addresses; or it is too long.
    /// All such rules are told.
    pub fn new(
        rules: &[Rule],
        egress: Egress,
        host: &[IpNet],
        guests: &[IpNet],
        resolvers: &[IpAddr],
    ) -> Result<Self, Vec<WordError>> {
        let mut wrong = Vec::new();
        let mut compiled = Vec::new();
        for rule in rules {
            match compile(rule, !host.is_empty()) {
                Ok(rule) => compiled.push(rule),
                Err(e) => wrong.push(e),
            }
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Self {
            rules: compiled,
            is_open: egress == Egress::Open,
            host: host.iter().map(Addresses::from).collect(),
            guests: guests.iter().map(Addresses::from).collect(),
            resolvers: resolvers.to_vec(),
        })
    }

    pub(crate) fn judge(&self, packet: &Packet) -> Verdict {
        let to = packet.destination;
        if is_never_on_the_wire(to) || speaks_for_the_network(packet) {
            return Verdict::Never;
        }
        if finds_the_network(packet) || self.asks_for_names(packet) {
            return Verdict::Pass;
        }
        let is_host = within(&self.host, to);
        let is_guests = within(&self.guests, to);
        let fits = |rule: &&Compiled| {
            let there = match &rule.to {
                Where::Any => !is_host,
                Where::Outside => !is_host && !is_guests,
                Where::Host => is_host,
                Where::In(addresses) => !is_host && addresses.contain(to),
            };
            there && rule.speaks(packet.transport)
        };
        let allows = match self.rules.iter().find(fits) {
            Some(rule) => rule.allows,
            None => self.is_open && !is_host && !is_guests,
        };
        if allows {
            Verdict::Pass
        } else {
            Verdict::Refuse
        }
    }

    fn asks_for_names(&self, packet: &Packet) -> bool {
        let (Transport::Tcp { to, .. } | Transport::Udp { to, .. }) = packet.transport else {
            return false;
        };
        to == DNS_PORT && self.resolvers.contains(&packet.destination)
    }
}

fn compile(rule: &Rule, has_host: bool) -> Result<Compiled, WordError> {
    rule.check()?;
    let wrong = |why: &str| {
        Err(WordError {
            what: "rule",
            value: rule.to_string(),
            why: why.to_owned(),
        })
    };
    if rule.vm.is_some() {
        return wrong("it is of the one guest in any case: leave vm= out");
    }
    let to = match &rule.to {
        Destination::Any => Where::Any,
        Destination::Outside => Where::Outside,
        Destination::Host if has_host => Where::Host,
        Destination::Host => {
            return wrong(
                "nobody has said which addresses the host has: name them, or leave the rule out",
            );
        }
        Destination::Network(_) => {
            return wrong(
                "an interface knows no networks by name: write the addresses, to=10.1.0.0/24",
            );
        }
        Destination::Cidr(net) => Where::In(net.into()),
    };
    Ok(Compiled {
        allows: rule.action == Action::Allow,
        to,
        protocol: rule.protocol,
        ports: rule.ports.clone(),
    })
}

impl Compiled {
    fn speaks(&self, transport: Transport) -> bool {
        let port = match (self.protocol, transport) {
            (None, _) | (Some(Protocol::Icmp), Transport::Icmp { .. }) => return true,
            (Some(Protocol::Tcp), Transport::Tcp { to, .. })
            | (Some(Protocol::Udp), Transport::Udp { to, .. }) => to,
            _ => return false,
        };
        let has = |ports: &Ports| (ports.first..=ports.last).contains(&port);
        self.ports.is_empty() || self.ports.iter().any(has)
    }
}

impl From<&IpNet> for Addresses {
    fn from(net: &IpNet) -> Self {
        match net {
            IpNet::V4(net) => Self::V4(net.network().into()..=net.broadcast().into()),
            IpNet::V6(net) => Self::V6(net.network().into()..=net.broadcast().into()),
        }
    }
}

impl Addresses {
    fn contain(&self, address: IpAddr) -> bool {
        match (self, address) {
            (Self::V4(range), IpAddr::V4(address)) => range.contains(&address.into()),
            (Self::V6(range), IpAddr::V6(address)) => range.contains(&address.into()),
            _ => false,
        }
    }
}

fn within(all: &[Addresses], address: IpAddr) -> bool {
    all.iter().any(|addresses| addresses.contain(address))
}

/// Addresses that mean the sender itself (RFC 1122, section 3.2.1.3; RFC 4291, section 2.5), and IPv4 written as IPv6: a socket of
/// the host would take either for what it is not here.
fn is_never_on_the_wire(to: IpAddr) -> bool {
    match to {
        IpAddr::V4(to) => to.is_loopback() || to.octets().first() == Some(&0),
        IpAddr::V6(to) => to.is_loopback() || to.is_unspecified() || to.to_ipv4_mapped().is_some(),
    }
}

/// What only those say who rule a network: addresses and routes.
fn speaks_for_the_network(packet: &Packet) -> bool {
    match packet.transport {
        Transport::Udp { from, .. } => from == DHCP4_PORTS.1 || from == DHCP6_PORTS.1,
        Transport::Icmp { kind, .. } => {
            packet.destination.is_ipv6() && matches!(kind, ROUTER_ADVERTISEMENT | REDIRECT)
        }
        _ => false,
    }
}

/// What a guest needs to find its neighbours, routers and addresses, as long as it stays on the link: any server could be
/// written to in its words otherwise.
fn finds_the_network(packet: &Packet) -> bool {
    match (packet.transport, packet.destination) {
        (Transport::Udp { from, to }, IpAddr::V4(destination)) => {
            (from, to) == DHCP4_PORTS && destination == Ipv4Addr::BROADCAST
        }
        (Transport::Udp { from, to }, IpAddr::V6(destination)) => {
            (from, to) == DHCP6_PORTS && destination == ALL_DHCP6
        }
        (Transport::Icmp { kind, .. }, IpAddr::V6(destination)) => match kind {
            ROUTER_SOLICITATION | NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {
                packet.hop_limit == NEVER_ROUTED
                    && (is_link_multicast(destination) || destination.is_unicast_link_local())
            }
            kind => LISTENER_REPORTS.contains(&kind) && is_link_multicast(destination),
        },
        _ => false,
    }
}

fn is_link_multicast(address: Ipv6Addr) -> bool {
    address.octets().first_chunk() == Some(&[0xff, 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Content, read};
    use crate::link::tests::{Build, icmp6, packet, tcp, udp};

    fn policy(rules: &[&str], egress: Egress) -> Policy {
        let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let nets =
            |nets: &[&str]| -> Vec<IpNet> { nets.iter().map(|n| n.parse().unwrap()).collect() };
        Policy::new(
            &rules,
            egress,
            &nets(&["192.0.2.1/32", "2001:db8::1/128"]),
            &nets(&["10.7.0.0/24", "fd07::/64"]),
            &["192.0.2.53".parse().unwrap(), "192.0.2.1".parse().unwrap()],
        )
        .unwrap()
    }

    fn judged(policy: &Policy, frame: &Build) -> Verdict {
        let frame = frame.bytes();
        let Ok(Content::Packet(packet)) = read(&frame, frame.len()) else {
            panic!("not read")
        };
        policy.judge(&packet)
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let rules = [
            "deny,to=10.1.0.0/16",
            "allow,to=10.0.0.0/8,protocol=tcp,port=443,port=8000-8080",
            "allow,to=fd00::/8,protocol=icmp",
            "deny,to=any,protocol=udp",
            "allow,to=198.51.100.7",
        ];
        let closed = policy(&rules, Egress::Closed);
        let open = policy(&rules, Egress::Open);
        use Verdict::{Pass, Refuse};
        for (frame, by_closed, by_open) in [
            (tcp("10.1.2.3", 443), Refuse, Refuse),
            (tcp("10.2.2.3", 443), Pass, Pass),
            (tcp("10.2.2.3", 7999), Refuse, Pass),
            (tcp("10.2.2.3", 8000), Pass, Pass),
            (tcp("10.2.2.3", 8080), Pass, Pass),
            (tcp("10.2.2.3", 8081), Refuse, Pass),
            (udp("10.2.2.3", 443), Refuse, Refuse),
            (udp("198.51.100.7", 1), Refuse, Refuse),
            (tcp("198.51.100.7", 1), Pass, Pass),
            (tcp("198.51.100.8", 1), Refuse, Pass),
            (tcp("fd00::1", 443), Refuse, Pass),
            (icmp6("fd00::1", 128, 64), Pass, Pass),
            (icmp6("2001:db8::2", 128, 64), Refuse, Pass),
            // GRE: a rule without a protocol is for all of them.
            (packet("198.51.100.7", 47, &[0; 4]), Pass, Pass),
            (packet("198.51.100.8", 47, &[0; 4]), Refuse, Pass),
        ] {
            assert_eq!(judged(&closed, &frame), by_closed, "{frame:?}");
            assert_eq!(judged(&open, &frame), by_open, "{frame:?}");
        }
    }

    #[test]
    fn the_host_and_other_guests_are_opened_by_their_own_words() {
        use Verdict::{Pass, Refuse};
        for (rules, host, guest, world) in [
            (&[][..], Refuse, Refuse, Pass),
            (&["allow,to=any"], Refuse, Pass, Pass),
            (&["allow,to=outside"], Refuse, Refuse, Pass),
            (&["allow,to=192.0.2.0/24"], Refuse, Refuse, Pass),
            (&["allow,to=host"], Pass, Refuse, Pass),
            (
                &["allow,to=host,protocol=tcp,port=81"],
                Refuse,
                Refuse,
                Pass,
            ),
            (
                &["allow,to=10.7.0.0/24", "deny,to=any"],
                Refuse,
                Pass,
                Refuse,
            ),
        ] {
            let policy = policy(rules, Egress::Open);
            for (to, want) in [
                ("192.0.2.1", host),
                ("2001:db8::1", host),
                ("10.7.0.9", guest),
                ("192.0.2.9", world),
            ] {
                if to.starts_with("2001") || !rules.is_empty() || want == host {
                    assert_eq!(judged(&policy, &tcp(to, 80)), want, "{rules:?} {to}");
                }
            }
            // Names are asked of resolvers in any case, and of nobody else.
            assert_eq!(judged(&policy, &udp("192.0.2.53", 53)), Pass);
            assert_eq!(judged(&policy, &tcp("192.0.2.1", 53)), Pass);
        }
        let closed = policy(&[], Egress::Closed);
        assert_eq!(judged(&closed, &udp("192.0.2.54", 53)), Refuse);
        assert_eq!(judged(&closed, &udp("192.0.2.53", 54)), Refuse);
    }

    #[test]
    fn the_network_is_found_and_not_ruled() {
        use Verdict::{Never, Pass, Refuse};
        let closed = policy(&[], Egress::Closed);
        let open = policy(&["allow,to=any", "allow,to=host"], Egress::Open);
        let dhcp = |to: &str, from, port| udp(to, port).source_port(from);
        for (frame, want) in [
            (dhcp("255.255.255.255", 68, 67), Pass),
            (dhcp("ff02::1:2", 546, 547), Pass),
            // Words of DHCP to a server of the world would be a way out.
            (dhcp("198.51.100.1", 68, 67), Refuse),
            (dhcp("2001:db8::9", 546, 547), Refuse),
            (dhcp("255.255.255.255", 69, 67), Refuse),
            (icmp6("ff02::2", 133, 255), Pass),
            (icmp6("ff02::1:ff00:1", 135, 255), Pass),
            (icmp6("fe80::1", 136, 255), Pass),
            (icmp6("ff02::1:ff00:1", 135, 254), Refuse),
            (icmp6("2001:db8::9", 136, 255), Refuse),
            (icmp6("ff02::16", 143, 1), Pass),
            (icmp6("2001:db8::9", 143, 1), Refuse),
            (icmp6("ff02::1", 134, 255), Never),
            (icmp6("fe80::1", 137, 255), Never),
            (dhcp("255.255.255.255", 67, 68), Never),
            (dhcp("fe80::1", 547, 546), Never),
        ] {
            assert_eq!(judged(&closed, &frame), want, "{frame:?}");
            let by_open = if want == Never { Never } else { Pass };
            assert_eq!(judged(&open, &frame), by_open, "{frame:?}");
        }
        // A socket of the host would take these for itself, or for IPv4.
        for to in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "::1",
            "::ffff:10.2.2.3",
        ] {
            assert_eq!(judged(&open, &tcp(to, 80)), Never, "{to}");
        }
    }

    #[test]
    fn rules_that_mean_nothing_to_an_interface_are_all_told() {
        let rules: Vec<Rule> = [
            "allow,to=back",
            "allow,to=any,vm=web",
            "deny,to=any",
            "allow,to=host",
        ]
        .iter()
        .map(|rule| rule.parse().unwrap())
        .collect();
        let wrong = Policy::new(&rules, Egress::Open, &[], &[], &[]).unwrap_err();
        let told: Vec<String> = wrong.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 3, "{told:?}");
        for (line, parts) in told.iter().zip([
            ["allow,to=back", "write the addresses"],
            ["vm=web", "leave vm= out"],
            ["allow,to=host", "which addresses the host has"],
        ]) {
            assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        }
    }
}
