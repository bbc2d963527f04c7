//! What a network is to be: as people ask for it ([`NetworkRequest`]), and checked ([`NetworkSpec`]).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::words::{InterfaceName, Mac, NetworkName};
use alveole_egress_rules::{Action, Destination, Egress, MOST_RULES, Rule, parse_cidr};

/// Least MTU: what IPv6 asks for (RFC 8200, section 5).
pub(crate) const LEAST_MTU: u32 = 1280;
/// Largest MTU of a tap device: 65,535 bytes less an Ethernet header.
pub(crate) const MOST_MTU: u32 = 65_521;
/// MTU where nothing else is said.
pub(crate) const USUAL_MTU: u32 = 1500;

/// How a network is tied to the rest of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A bridge whose guests reach the world by this host's addresses.
    Nat,
    /// A bridge, with an interface of this host (or a VLAN on one) as a port if there is a parent.
    Bridge,
    /// A bridge without a way out.
    Isolated,
    /// Guests as neighbours of the parent interface, without a bridge.
    Macvtap,
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "nat" => Ok(Self::Nat),
            "bridge" => Ok(Self::Bridge),
            "isolated" => Ok(Self::Isolated),
            "macvtap" => Ok(Self::Macvtap),
            _ => Err(Error::word(
                "mode",
                text,
                "it is nat, bridge, isolated or macvtap",
            )),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nat => "nat",
            Self::Bridge => "bridge",
            Self::Isolated => "isolated",
            Self::Macvtap => "macvtap",
        })
    }
}

/// A network as people ask for it, on the command line or in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkRequest {
    /// `nat` (if not said), `bridge`, `isolated` or `macvtap`.
    pub mode: Option<String>,
    /// At most one IPv4 and one IPv6 subnet. None: chosen for nat and isolated; somebody else's matter for
    /// bridge and macvtap.
    #[serde(default)]
    pub subnet: Vec<String>,
    /// 802.1Q tag on the parent.
    pub vlan: Option<u32>,
    /// The interface of this host.
    pub parent: Option<String>,
    /// 1280 to 65521.
    pub mtu: Option<u32>,
    /// `open` or `closed`; if not said, open for nat and closed else.
    pub egress: Option<String>,
    /// Without a resolver and DHCP server of the network's own.
    #[serde(default)]
    pub no_dns: bool,
    /// In the order in which they are asked.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// A network as it is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name, and its bridge's.
    pub name: NetworkName,
    /// How it is tied to the world.
    pub mode: Mode,
    /// IPv4 addresses of guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<Ipv4Net>,
    /// IPv6 addresses of guests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Net>,
    /// The interface of this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<InterfaceName>,
    /// 802.1Q tag, 1 to 4094.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Of bridge and guests.
    pub mtu: u32,
    /// What happens to what no rule names.
    pub egress: Egress,
    /// Whether it has a resolver and DHCP server of its own.
    pub dns: bool,
    /// In the order in which they are asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

impl NetworkRequest {
    /// Checks all that can be checked without looking at this host.
    ///
    /// # Errors
    ///
    /// [`Error::Word`] for a value that cannot be, [`Error::Conflict`] for values that do not go together.
    pub fn check(&self, name: &NetworkName) -> Result<NetworkSpec, Error> {
        let conflict = |why: String| Error::conflict(name, why);
        let mode: Mode = self.mode.as_deref().unwrap_or("nat").parse()?;
        let (v4, v6) = subnets(name, &self.subnet)?;
        let parent = self
            .parent
            .as_deref()
            .map(str::parse::<InterfaceName>)
            .transpose()?;
        let vlan = self.vlan.map(vlan_id).transpose()?;
        match (mode, &parent, vlan) {
            (Mode::Nat | Mode::Isolated, Some(_), _) | (Mode::Nat | Mode::Isolated, _, Some(_)) => {
                return Err(conflict(format!(
                    "mode {mode} has neither parent nor VLAN: use mode bridge or macvtap"
                )));
            }
            (Mode::Macvtap, None, _) => {
                return Err(conflict(
                    "mode macvtap needs --parent, the interface whose neighbours guests become"
                        .into(),
                ));
            }
            (Mode::Bridge, None, Some(id)) => {
                return Err(conflict(format!(
                    "VLAN {id} of what? add --parent, the interface that carries it"
                )));
            }
            _ => {}
        }
        let mtu = self.mtu.unwrap_or(USUAL_MTU);
        if !(LEAST_MTU..=MOST_MTU).contains(&mtu) {
            return Err(Error::word(
                "MTU",
                &mtu.to_string(),
                format!("it is {LEAST_MTU} to {MOST_MTU}"),
            ));
        }
        let egress = match &self.egress {
            Some(text) => text.parse()?,
            None if mode == Mode::Nat => Egress::Open,
            None => Egress::Closed,
        };
        if mode == Mode::Isolated && egress == Egress::Open {
            return Err(conflict(
                "mode isolated has no way out: leave egress open away, or use mode nat".into(),
            ));
        }
        let spec = NetworkSpec {
            name: name.clone(),
            mode,
            v4,
            v6,
            parent,
            vlan,
            mtu,
            egress,
            dns: !self.no_dns,
            rules: self.rules.clone(),
        };
        spec.check_rules(&spec.rules)?;
        Ok(spec)
    }
}

fn vlan_id(id: u32) -> Result<u16, Error> {
    u16::try_from(id)
        .ok()
        .filter(|id| (1..=4094).contains(id))
        .ok_or_else(|| {
            Error::word(
                "VLAN",
                &id.to_string(),
                "it is 1 to 4094 (0 and 4095 are reserved by IEEE 802.1Q)",
            )
        })
}

fn subnets(
    name: &NetworkName,
    given: &[String],
) -> Result<(Option<Ipv4Net>, Option<Ipv6Net>), Error> {
    const WHAT: &str = "subnet";
    let (mut v4, mut v6) = (None, None);
    for text in given {
        let wrong = |why: &str| Error::word(WHAT, text, why);
        match parse_cidr(WHAT, text)? {
            IpNet::V4(net) => {
                if !(8..=29).contains(&net.prefix_len()) {
                    return Err(wrong(
                        "its length is 8 to 29: this host and some guests must fit in",
                    ));
                }
                let at = net.addr();
                if at.is_loopback()
                    || at.is_multicast()
                    || at.is_link_local()
                    || at.octets()[0] == 0
                    || at.octets()[0] >= 240
                {
                    return Err(wrong(
                        "these addresses have another meaning: take some of 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16",
                    ));
                }
                if v4.replace(net).is_some() {
                    return Err(Error::conflict(
                        name,
                        "one IPv4 and one IPv6 subnet are the most",
                    ));
                }
            }
            IpNet::V6(net) => {
                if !(64..=120).contains(&net.prefix_len()) {
                    return Err(wrong("its length is 64 to 120, usually 64"));
                }
                let at = net.addr();
                if at.is_loopback()
                    || at.is_multicast()
                    || at.is_unicast_link_local()
                    || at.is_unspecified()
                    || at.to_ipv4_mapped().is_some()
                {
                    return Err(wrong(
                        "these addresses have another meaning: take some of fd00::/8",
                    ));
                }
                if v6.replace(net).is_some() {
                    return Err(Error::conflict(
                        name,
                        "one IPv4 and one IPv6 subnet are the most",
                    ));
                }
            }
        }
    }
    Ok((v4, v6))
}

impl NetworkSpec {
    /// Checks rules, of the network or of a VM on it.
    ///
    /// # Errors
    ///
    /// [`Error::Word`] for a rule that cannot be, [`Error::Conflict`] for one that this network cannot enforce.
    pub fn check_rules(&self, rules: &[Rule]) -> Result<(), Error> {
        if rules.len() > MOST_RULES {
            return Err(Error::conflict(
                &self.name,
                format!("{} rules, and {MOST_RULES} are the most", rules.len()),
            ));
        }
        for rule in rules {
            rule.check()?;
            let wrong = |why: &str| Err(Error::word("rule", &rule.to_string(), why));
            if self.mode == Mode::Macvtap {
                return wrong(
                    "mode macvtap goes past this host's filter, so that it cannot be enforced: use mode bridge",
                );
            }
            if rule.to == Destination::Network(self.name.clone()) {
                return wrong(
                    "guests of one network see each other in any case: rules are for what leaves it",
                );
            }
            if self.mode == Mode::Isolated
                && rule.action == Action::Allow
                && rule.to != Destination::Host
            {
                return wrong("mode isolated has no way out: use mode bridge without a parent");
            }
        }
        Ok(())
    }

    /// Whether it is a bridge.
    #[must_use]
    pub fn has_bridge(&self) -> bool {
        self.mode != Mode::Macvtap
    }

    /// Whether this host gives out its addresses.
    #[must_use]
    pub fn has_addresses(&self) -> bool {
        self.v4.is_some() || self.v6.is_some()
    }

    /// This host's address on it, the first of the subnet.
    #[must_use]
    pub fn gateway4(&self) -> Option<Ipv4Addr> {
        self.v4
            .map(|net| Ipv4Addr::from(u32::from(net.network()) + 1))
    }

    /// This host's address on it, the first of the subnet.
    #[must_use]
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.v6
            .map(|net| Ipv6Addr::from(u128::from(net.network()) + 1))
    }

    /// This host's addresses on its bridge.
    #[must_use]
    pub fn bridge_addresses(&self) -> Vec<IpNet> {
        if !self.has_bridge() {
            return Vec::new();
        }
        let net = |address: Option<IpAddr>, length: Option<u8>| IpNet::new(address?, length?).ok();
        [
            net(
                self.gateway4().map(IpAddr::V4),
                self.v4.map(|n| n.prefix_len()),
            ),
            net(
                self.gateway6().map(IpAddr::V6),
                self.v6.map(|n| n.prefix_len()),
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Whether its guests are to send what is not theirs to this host.
    #[must_use]
    pub fn routes(&self) -> bool {
        matches!(self.mode, Mode::Nat | Mode::Bridge)
    }

    /// Whether it has a resolver and DHCP server.
    #[must_use]
    pub fn has_resolver(&self) -> bool {
        self.dns && self.has_bridge() && self.has_addresses()
    }

    /// The domain of its guests' names. `internal` is reserved for such (ICANN, 2024).
    #[must_use]
    pub fn domain(&self) -> String {
        format!("{}.internal", self.name)
    }

    /// Whether packets from it may pass this host: IPv4, IPv6.
    #[must_use]
    pub fn needs_forwarding(&self) -> (bool, bool) {
        let passes = |rule: &Rule| rule.action == Action::Allow && rule.to != Destination::Host;
        let needs =
            self.has_bridge() && (self.egress == Egress::Open || self.rules.iter().any(passes));
        (needs && self.v4.is_some(), needs && self.v6.is_some())
    }

    /// The interface that is the bridge's port to the world, or the parent of macvtaps: the parent, or
    /// the VLAN on it, which is ours.
    #[must_use]
    pub fn uplink(&self) -> Option<InterfaceName> {
        let parent = self.parent.as_ref()?;
        let Some(id) = self.vlan else {
            return Some(parent.clone());
        };
        let usual = format!("{parent}.{id}");
        let name = usual.parse().ok().unwrap_or_else(|| {
            // Too long a name is shortened to one that stays the same.
            let hash = crate::hash(&[parent.as_str()]) & 0xffff_ffff;
            format!("v{hash:08x}.{id}")
                .parse()
                .expect("14 bytes at most")
        });
        Some(name)
    }

    /// The bridge's own hardware address. Without one it would change with each port that comes and goes.
    #[must_use]
    pub fn bridge_mac(&self) -> Mac {
        Mac::of(self.name.as_str(), "", 0)
    }
}

/// Subnets for those that get some without asking: free of what this host has.
///
/// # Errors
///
/// [`Error::Conflict`] if nothing is free.
pub(crate) fn choose_subnets(spec: &mut NetworkSpec, taken: &[IpNet]) -> Result<(), Error> {
    if spec.has_addresses() || !matches!(spec.mode, Mode::Nat | Mode::Isolated) {
        return Ok(());
    }
    let hash = crate::hash(&[spec.name.as_str()]);
    // 10.64.0.0/10, seldom used by others, in pieces of 256.
    spec.v4 = (0..0x4000u32)
        .map(|n| {
            let piece = (hash as u32).wrapping_add(n) & 0x3fff;
            Ipv4Net::new_assert(Ipv4Addr::from(0x0a40_0000 | piece << 8), 24)
        })
        .find(|net| !taken.iter().any(|t| overlaps(&IpNet::V4(*net), t)));
    // A unique local prefix (RFC 4193) needs no asking around: 40 bits of it are the name's.
    spec.v6 = (0..256u64)
        .map(|n| {
            let id = u128::from(hash.wrapping_add(n << 32) & 0xff_ffff_ffff);
            Ipv6Net::new_assert(Ipv6Addr::from(0xfd << 120 | id << 80), 64)
        })
        .find(|net| !taken.iter().any(|t| overlaps(&IpNet::V6(*net), t)));
    if spec.has_addresses() {
        return Ok(());
    }
    Err(Error::conflict(
        &spec.name,
        "no subnet is free: give one by --subnet",
    ))
}

/// Whether two nets have an address in common.
#[must_use]
pub(crate) fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut NetworkRequest)) -> Result<NetworkSpec, Error> {
        let mut request = NetworkRequest::default();
        change(&mut request);
        request.check(&"net".parse().unwrap())
    }

    #[test]
    fn wrong_requests_are_refused_by_what_is_wrong() {
        let text = |t: &str| Some(t.to_owned());
        type Change = Box<dyn Fn(&mut NetworkRequest)>;
        let cases: [(&str, Change); 22] = [
            ("nat, bridge", Box::new(move |r| r.mode = text("routed"))),
            ("1 to 4094", Box::new(|r| r.vlan = Some(0))),
            ("1 to 4094", Box::new(|r| r.vlan = Some(4095))),
            ("1 to 4094", Box::new(|r| r.vlan = Some(65537))),
            ("neither parent", Box::new(|r| r.vlan = Some(10))),
            ("neither parent", Box::new(move |r| r.parent = text("eth0"))),
            (
                "needs --parent",
                Box::new(move |r| r.mode = text("macvtap")),
            ),
            (
                "VLAN 7 of what",
                Box::new(move |r| (r.mode, r.vlan) = (text("bridge"), Some(7))),
            ),
            ("1280 to 65521", Box::new(|r| r.mtu = Some(1279))),
            ("1280 to 65521", Box::new(|r| r.mtu = Some(70_000))),
            ("open or closed", Box::new(move |r| r.egress = text("shut"))),
            (
                "no way out",
                Box::new(move |r| (r.mode, r.egress) = (text("isolated"), text("open"))),
            ),
            (
                "10.1.0.0/24",
                Box::new(|r| r.subnet = vec!["10.1.0.300/24".into()]),
            ),
            (
                "is 10.1.0.0/24 meant",
                Box::new(|r| r.subnet = vec!["10.1.0.3/24".into()]),
            ),
            (
                "8 to 29",
                Box::new(|r| r.subnet = vec!["10.1.0.0/30".into()]),
            ),
            ("8 to 29", Box::new(|r| r.subnet = vec!["10.1.0.0".into()])),
            (
                "another meaning",
                Box::new(|r| r.subnet = vec!["127.0.0.0/8".into()]),
            ),
            (
                "another meaning",
                Box::new(|r| r.subnet = vec!["fe80::/64".into()]),
            ),
            (
                "64 to 120",
                Box::new(|r| r.subnet = vec!["fd00::/48".into()]),
            ),
            (
                "are the most",
                Box::new(|r| r.subnet = vec!["10.1.0.0/24".into(), "10.2.0.0/24".into()]),
            ),
            (
                "past this host's filter",
                Box::new(move |r| {
                    (r.mode, r.parent) = (text("macvtap"), text("eth0"));
                    r.rules = vec!["allow,to=any".parse().unwrap()];
                }),
            ),
            (
                "see each other",
                Box::new(|r| r.rules = vec!["allow,to=net".parse().unwrap()]),
            ),
        ];
        for (n, (word, change)) in cases.iter().enumerate() {
            let said = request(change).unwrap_err().to_string();
            assert!(said.contains(word), "case {n}: {said}");
        }
    }

    #[test]
    fn defaults() {
        let spec = request(|_| ()).unwrap();
        assert_eq!(
            (spec.mode, spec.egress, spec.mtu),
            (Mode::Nat, Egress::Open, 1500)
        );
        let spec = request(|r| r.mode = Some("bridge".into())).unwrap();
        assert_eq!(spec.egress, Egress::Closed);
        assert_eq!(spec.needs_forwarding(), (false, false));
    }

    #[test]
    fn chosen_subnets_avoid_what_is_there() {
        let mut first = request(|_| ()).unwrap();
        choose_subnets(&mut first, &[]).unwrap();
        let taken = [first.v4.unwrap().into(), first.v6.unwrap().into()];
        let mut second = request(|_| ()).unwrap();
        choose_subnets(&mut second, &taken).unwrap();
        assert!(second.v4 != first.v4 && second.v4.is_some());
        assert!(second.v6 != first.v6 && second.v6.is_some());
        let mut third = request(|_| ()).unwrap();
        let all = ["0.0.0.0/1".parse().unwrap(), "fc00::/7".parse().unwrap()];
        assert!(choose_subnets(&mut third, &all).is_err());
    }

    #[test]
    fn a_vlan_has_the_usual_name_or_a_short_one() {
        let uplink = |parent: &str| {
            request(|r| {
                (r.mode, r.parent, r.vlan) =
                    (Some("bridge".into()), Some(parent.into()), Some(4094));
            })
            .unwrap()
            .uplink()
            .unwrap()
        };
        assert_eq!(uplink("eth0").as_str(), "eth0.4094");
        assert_eq!(uplink("enp0s31f6abcdef").as_str().len(), 14);
    }
}
