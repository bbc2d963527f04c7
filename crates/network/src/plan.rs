//! The difference between what should be and what is, as a list of steps: pure, so that it can be shown before it is
//! done, and tested without rights.
//!
//! There is no list of undone steps: whoever fails or was killed after any step plans again, for the network to be or
//! not to be, and the difference is what is left to do or to take back. Interfaces are known as ours by the group
//! that they are made with ([`OUR_GROUP`]) and by name and kind; one that is not ours is an error, never touched.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use ipnet::IpNet;

use crate::Error;
use crate::kernel::OUR_GROUP;
use crate::resolver::{Answers, Running, answers};
use crate::rules::{Ruleset, ruleset};
use crate::spec::{NetworkSpec, overlaps};
use crate::state::{NetworkState, SettingsBefore};
use crate::words::{InterfaceName, Mac, NetworkName};

pub(crate) const FORWARD4: &str = "net/ipv4/ip_forward";
pub(crate) const FORWARD6: &str = "net/ipv6/conf/all/forwarding";

/// An interface of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// What kind of virtual interface (`bridge`, `vlan`, `tun`, ...); empty for hardware.
    pub kind: String,
    /// Its group; 0 for most.
    pub group: u32,
    /// What it is for, in words.
    pub alias: Option<String>,
    /// The bridge that it is a port of.
    pub master: Option<String>,
    /// The interface that it lies on.
    pub parent: Option<String>,
    /// Its 802.1Q tag.
    pub vlan: Option<u16>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses, but for link-local ones.
    pub addresses: Vec<IpNet>,
}

/// A route of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// To where; not the default one.
    pub to: IpNet,
    /// Over which interface.
    pub over: Option<String>,
}

/// What is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Interfaces by name.
    pub links: BTreeMap<String, Link>,
    /// Routes of the main table.
    pub routes: Vec<Route>,
    /// Our filter: none, or by its digest (empty: there are tables, but damaged).
    pub rules: Option<String>,
    /// Whether filters could not be looked at, for want of `nft` or of the right.
    pub blind: bool,
    /// Settings of the kernel, by their path below `/proc/sys`, that may have to change.
    pub settings: BTreeMap<String, String>,
    /// What we changed them from.
    pub before: SettingsBefore,
    /// Interfaces that have a default route by router advertisements and would lose it when this host forwards.
    pub advertised: BTreeSet<String>,
    /// Whether somebody else filters or translates what passes this host.
    pub others_forward: bool,
    /// Resolvers that run, or (`None`) have left files.
    pub resolvers: BTreeMap<NetworkName, Option<Running>>,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// All networks, without those that go.
    pub networks: BTreeMap<NetworkName, NetworkState>,
    /// What each resolver is to say.
    pub answers: BTreeMap<NetworkName, Answers>,
}

/// One step. What each does is told by its [`fmt::Display`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are what the words of `Display` name"
)]
pub enum Step {
    KeepSetting {
        key: String,
        before: String,
    },
    Set {
        key: String,
        value: String,
    },
    ForgetSetting {
        key: String,
    },
    LoadRules(Ruleset),
    RemoveRules,
    MakeBridge {
        name: String,
        mac: Mac,
        mtu: u32,
    },
    MakeVlan {
        name: String,
        parent: String,
        id: u16,
    },
    Alias {
        link: String,
        text: String,
    },
    Mtu {
        link: String,
        mtu: u32,
    },
    Quiet {
        link: String,
    },
    Join {
        link: String,
        bridge: String,
    },
    Leave {
        link: String,
    },
    Up {
        link: String,
    },
    AddAddress {
        link: String,
        address: IpNet,
    },
    RemoveLink {
        link: String,
    },
    StartResolver {
        network: NetworkName,
        answers: Answers,
    },
    ReloadResolver {
        network: NetworkName,
        answers: Answers,
    },
    StopResolver {
        network: NetworkName,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeepSetting { key, before } => write!(f, "remember that {key} is {before}"),
            Self::Set { key, value } => write!(f, "set {key} to {value}"),
            Self::ForgetSetting { key } => write!(f, "forget what {key} was"),
            Self::LoadRules(rules) => write!(
                f,
                "replace the nftables tables 'alveole' (inet, bridge) by {}",
                rules.digest
            ),
            Self::RemoveRules => f.write_str("remove the nftables tables 'alveole' (inet, bridge)"),
            Self::MakeBridge { name, mac, mtu } => {
                write!(f, "make bridge {name} (MAC {mac}, MTU {mtu})")
            }
            Self::MakeVlan { name, parent, id } => write!(f, "make {name}, VLAN {id} on {parent}"),
            Self::Alias { link, text } => write!(f, "mark {link} as \"{text}\""),
            Self::Mtu { link, mtu } => write!(f, "set the MTU of {link} to {mtu}"),
            Self::Quiet { link } => write!(f, "let {link} have no IPv6 address of this host"),
            Self::Join { link, bridge } => write!(f, "make {link} a port of bridge {bridge}"),
            Self::Leave { link } => write!(f, "take {link} out of its bridge"),
            Self::Up { link } => write!(f, "bring {link} up"),
            Self::AddAddress { link, address } => write!(f, "give {link} the address {address}"),
            Self::RemoveLink { link } => write!(f, "remove {link}"),
            Self::StartResolver { network, .. } => {
                write!(f, "start the resolver and DHCP server of network {network}")
            }
            Self::ReloadResolver { network, .. } => {
                write!(f, "tell the resolver of network {network} its guests")
            }
            Self::StopResolver { network } => {
                write!(f, "end the resolver and DHCP server of network {network}")
            }
        }
    }
}

/// The words on an interface of a network, for people.
pub(crate) fn alias(name: &NetworkName) -> String {
    format!("alveole network {name}")
}

/// Whether it is ours, of that kind.
fn is_ours(link: &Link, kind: &str) -> bool {
    link.group == OUR_GROUP && link.kind == kind
}

/// What is to be done, and what cannot be.
#[derive(Debug, Default)]
pub struct Plan {
    /// In order. What would let packets pass unfiltered comes after what filters.
    pub steps: Vec<Step>,
    /// Networks in whose way something of this host is: their steps are not among the others.
    pub problems: Vec<(NetworkName, Error)>,
}

/// The steps from what is to what should be.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let steps = &mut plan.steps;
    for name in observed.resolvers.keys() {
        if !desired.answers.contains_key(name) {
            steps.push(Step::StopResolver {
                network: name.clone(),
            });
        }
    }
    let keep = kept_links(desired);
    // A bridge lets its ports go; a VLAN goes with nothing else.
    let gone = observed.links.iter().filter(|(name, link)| {
        link.group == OUR_GROUP && keep.get(*name).is_none_or(|kind| *kind != link.kind)
    });
    steps.extend(gone.map(|(name, _)| Step::RemoveLink { link: name.clone() }));
    let rules = ruleset(desired.networks.values());
    if let Some(rules) = &rules
        && observed.rules.as_ref() != Some(&rules.digest)
    {
        steps.push(Step::LoadRules(rules.clone()));
    }
    settings(desired, observed, steps);
    if rules.is_none() && observed.rules.is_some() {
        steps.push(Step::RemoveRules);
    }
    for network in desired.networks.values() {
        let mut own = Vec::new();
        match links(&network.spec, observed, &mut own)
            .and_then(|()| ports(network, observed, &mut own))
        {
            Ok(()) => {
                plan.steps.append(&mut own);
                plan.steps
                    .extend(resolver(&network.spec.name, desired, observed));
            }
            Err(e) => plan.problems.push((network.spec.name.clone(), e)),
        }
    }
    plan
}

/// Our interfaces that stay, with their kinds.
fn kept_links(desired: &Desired) -> BTreeMap<String, &'static str> {
    let mut keep = BTreeMap::new();
    for NetworkState { spec, leases, .. } in desired.networks.values() {
        if spec.has_bridge() {
            keep.insert(spec.name.to_string(), "bridge");
        }
        if let Some(uplink) = spec.uplink().filter(|_| spec.vlan.is_some()) {
            keep.insert(uplink.into(), "vlan");
        }
        let kind = if spec.has_bridge() { "tun" } else { "macvtap" };
        for port in leases
            .iter()
            .filter_map(|l| l.port.as_ref())
            .filter(|p| p.ours)
        {
            keep.insert(port.interface.to_string(), kind);
        }
    }
    keep
}

fn settings(desired: &Desired, observed: &Observed, steps: &mut Vec<Step>) {
    let needs: Vec<(bool, bool)> = desired
        .networks
        .values()
        .map(NetworkState::needs_forwarding)
        .collect();
    let needs4 = needs.iter().any(|n| n.0);
    let needs6 = needs.iter().any(|n| n.1);
    let mut want = |key: &str, value: &str| {
        let Some(now) = observed.settings.get(key) else {
            return;
        };
        if now == value {
            return;
        }
        if !observed.before.contains_key(key) {
            steps.push(Step::KeepSetting {
                key: key.into(),
                before: now.clone(),
            });
        }
        steps.push(Step::Set {
            key: key.into(),
            value: value.into(),
        });
    };
    if needs4 {
        want(FORWARD4, "1");
    }
    if needs6 {
        // Else the kernel drops the host's own default route when it begins to forward.
        for interface in &observed.advertised {
            want(&accept_ra(interface), "2");
        }
        want(FORWARD6, "1");
    }
    for (key, before) in &observed.before {
        let needed = if key == FORWARD4 { needs4 } else { needs6 };
        if needed {
            continue;
        }
        let ours = if key == FORWARD4 || key == FORWARD6 {
            "1"
        } else {
            "2"
        };
        let now = observed.settings.get(key);
        // Somebody may have come to rely on it; then it stays, and is theirs.
        if !observed.others_forward && now.is_some_and(|now| now == ours && now != before) {
            steps.push(Step::Set {
                key: key.clone(),
                value: before.clone(),
            });
        }
        steps.push(Step::ForgetSetting { key: key.clone() });
    }
}

/// How an interface takes router advertisements.
pub(crate) fn accept_ra(interface: &str) -> String {
    format!("net/ipv6/conf/{interface}/accept_ra")
}

fn links(spec: &NetworkSpec, observed: &Observed, steps: &mut Vec<Step>) -> Result<(), Error> {
    let conflict = |why: String| Error::conflict(&spec.name, why);
    if let Some(parent) = &spec.parent {
        parent_fits(spec, parent, observed).map_err(conflict)?;
    }
    let uplink = spec.uplink();
    let uplink = uplink.as_ref().map(InterfaceName::as_str);
    let made = observed.links.get(spec.name.as_str());
    if spec.has_bridge() {
        let name = || spec.name.to_string();
        match made {
            Some(link) if !is_ours(link, "bridge") => {
                return Err(conflict(format!(
                    "an interface '{}' is there already and was not made by alveole: choose another name",
                    spec.name
                )));
            }
            Some(_) => {}
            None => steps.push(Step::MakeBridge {
                name: name(),
                mac: spec.bridge_mac(),
                mtu: spec.mtu,
            }),
        }
        finish(
            spec,
            spec.name.as_str(),
            made.or(Some(&Link {
                mtu: spec.mtu,
                ..Link::default()
            })),
            steps,
        );
        for address in spec.bridge_addresses() {
            if made.is_none_or(|link| !link.addresses.contains(&address)) {
                free(spec, &address, observed).map_err(conflict)?;
                steps.push(Step::AddAddress {
                    link: name(),
                    address,
                });
            }
        }
    }
    if let (Some(parent), Some(id), Some(uplink)) = (&spec.parent, spec.vlan, uplink) {
        let there = observed.links.get(uplink);
        if there.is_none() {
            steps.push(Step::MakeVlan {
                name: uplink.into(),
                parent: parent.to_string(),
                id,
            });
            steps.push(Step::Quiet {
                link: uplink.into(),
            });
        }
        finish(spec, uplink, there, steps);
        if spec.has_bridge() {
            join(spec, uplink, there, steps);
        }
        up(uplink, there, steps);
    } else if let Some(uplink) = uplink
        && spec.has_bridge()
    {
        join(spec, uplink, observed.links.get(uplink), steps);
    }
    if spec.has_bridge() {
        up(spec.name.as_str(), made, steps);
    }
    Ok(())
}

/// Marks one of ours and sets its MTU.
fn finish(spec: &NetworkSpec, link: &str, there: Option<&Link>, steps: &mut Vec<Step>) {
    let text = alias(&spec.name);
    if there.is_none_or(|l| l.alias.as_ref() != Some(&text)) {
        steps.push(Step::Alias {
            link: link.into(),
            text,
        });
    }
    if there.is_none_or(|l| l.mtu != spec.mtu) {
        steps.push(Step::Mtu {
            link: link.into(),
            mtu: spec.mtu,
        });
    }
}

fn join(spec: &NetworkSpec, link: &str, there: Option<&Link>, steps: &mut Vec<Step>) {
    if there.is_none_or(|l| l.master.as_deref() != Some(spec.name.as_str())) {
        steps.push(Step::Join {
            link: link.into(),
            bridge: spec.name.to_string(),
        });
    }
}

fn up(link: &str, there: Option<&Link>, steps: &mut Vec<Step>) {
    if there.is_none_or(|l| !l.up) {
        steps.push(Step::Up { link: link.into() });
    }
}

/// Whether a network can lie on that interface; else why not.
fn parent_fits(
    spec: &NetworkSpec,
    parent: &InterfaceName,
    observed: &Observed,
) -> Result<(), String> {
    let Some(link) = observed.links.get(parent.as_str()) else {
        return Err(format!(
            "there is no interface '{parent}' to be its parent: `ip link` shows what is there"
        ));
    };
    if parent.as_str() == "lo" {
        return Err("'lo' leads nowhere: give an Ethernet interface as parent".into());
    }
    if !link.up {
        return Err(format!(
            "its parent '{parent}' is down: `ip link set {parent} up`"
        ));
    }
    if link.mtu < spec.mtu {
        return Err(format!(
            "its MTU is {} and that of its parent '{parent}' {}: say --mtu {}",
            spec.mtu, link.mtu, link.mtu
        ));
    }
    if let (Some(id), Some(uplink)) = (spec.vlan, spec.uplink()) {
        let same = |(_, l): &(&String, &Link)| {
            l.kind == "vlan" && l.vlan == Some(id) && l.parent.as_deref() == Some(parent.as_str())
        };
        match observed.links.iter().find(same) {
            Some((name, l)) if name != uplink.as_str() || l.group != OUR_GROUP => {
                return Err(format!(
                    "VLAN {id} of '{parent}' is there already, as '{name}', and was not made by alveole: \
                     remove that, or use it: --parent {name} without --vlan"
                ));
            }
            Some(_) => {}
            None if observed.links.contains_key(uplink.as_str()) => {
                return Err(format!(
                    "its VLAN would be called '{uplink}', and an interface of that name is there already: rename that"
                ));
            }
            None => {}
        }
        return Ok(());
    }
    if !spec.has_bridge() {
        return Ok(());
    }
    if let Some(master) = link
        .master
        .as_ref()
        .filter(|m| m.as_str() != spec.name.as_str())
    {
        return Err(format!(
            "'{parent}' is a port of '{master}' already: an interface can be one of one bridge only"
        ));
    }
    if let Some(address) = link.addresses.first() {
        return Err(format!(
            "'{parent}' has the address {address}, which a port of a bridge cannot use: this host would lose its \
             connection. Use a VLAN (--vlan), mode macvtap, or an interface without addresses"
        ));
    }
    Ok(())
}

/// Whether a subnet is free on this host; else why not.
fn free(spec: &NetworkSpec, address: &IpNet, observed: &Observed) -> Result<(), String> {
    let net = address.trunc();
    let route = observed
        .routes
        .iter()
        .find(|r| overlaps(&r.to, &net) && r.over.as_deref() != Some(spec.name.as_str()));
    match route {
        None => Ok(()),
        Some(route) => Err(format!(
            "its subnet {net} overlaps the route {} over {} of this host: take another --subnet",
            route.to,
            route.over.as_deref().unwrap_or("several interfaces")
        )),
    }
}

fn ports(network: &NetworkState, observed: &Observed, steps: &mut Vec<Step>) -> Result<(), Error> {
    let spec = &network.spec;
    for lease in &network.leases {
        let Some(port) = &lease.port else { continue };
        let name = port.interface.as_str();
        let Some(link) = observed.links.get(name) else {
            // Ours is made when the VM is plugged in, and goes with it.
            if port.ours {
                continue;
            }
            return Err(Error::conflict(
                &spec.name,
                format!("there is no interface '{name}' for VM '{}'", lease.vm),
            ));
        };
        if port.ours {
            finish(spec, name, Some(link), steps);
            if link.alias.is_none() {
                steps.push(Step::Quiet { link: name.into() });
            }
        }
        if !spec.has_bridge() {
            up(name, Some(link), steps);
            continue;
        }
        if let Some(master) = link
            .master
            .as_ref()
            .filter(|m| m.as_str() != spec.name.as_str() && !port.ours)
        {
            return Err(Error::conflict(
                &spec.name,
                format!(
                    "'{name}' of VM '{}' is a port of '{master}' already",
                    lease.vm
                ),
            ));
        }
        join(spec, name, Some(link), steps);
        up(name, Some(link), steps);
    }
    Ok(())
}

fn resolver(name: &NetworkName, desired: &Desired, observed: &Observed) -> Option<Step> {
    let answers = desired.answers.get(name)?.clone();
    let network = name.clone();
    match observed.resolvers.get(name) {
        Some(Some(running)) if running.answers == answers => None,
        Some(Some(running)) if running.answers.can_become(&answers) => {
            Some(Step::ReloadResolver { network, answers })
        }
        _ => Some(Step::StartResolver { network, answers }),
    }
}

impl NetworkState {
    /// Whether packets from it may pass this host: IPv4, IPv6. Own rules of VMs count, too.
    #[must_use]
    pub fn needs_forwarding(&self) -> (bool, bool) {
        let mut spec = self.spec.clone();
        spec.rules
            .extend(self.leases.iter().flat_map(|l| l.rules.iter().cloned()));
        spec.needs_forwarding()
    }
}

impl Desired {
    /// What these networks are to be.
    #[must_use]
    pub fn new(networks: BTreeMap<NetworkName, NetworkState>, run: &Path) -> Self {
        let answers = networks
            .values()
            .filter_map(|n| {
                let others = networks.values().filter(|o| o.spec.name != n.spec.name);
                Some((n.spec.name.clone(), answers(n, others, run)?))
            })
            .collect();
        Self { networks, answers }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
