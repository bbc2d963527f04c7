//! The filter of this host's kernel for all networks, as text for `nft` (nft(8)).
//!
//! Two tables, both called `alveole` and both ours alone: of family `inet` for what passes this host or goes to
//! it, of family `bridge` for what comes out of each port. They are a pure function of all networks, and
//! are replaced as a whole in one transaction, so that no packet ever meets half of them. They name
//! interfaces by name: they are there before an interface is, and stay without harm when one goes.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::net::Ipv6Addr;

use ipnet::IpNet;

use crate::lease::Lease;
use crate::spec::{Mode, NetworkSpec};
use crate::state::NetworkState;
use crate::words::NetworkName;
use alveole_egress_rules::Egress;
use alveole_egress_rules::{Action, Destination, Protocol, Rule};

/// The name of our tables.
pub const TABLE: &str = "alveole";
/// An empty chain whose name tells which text was loaded.
pub(crate) const MARK: &str = "loaded_";

/// What removes our tables, whether they are there or not.
pub(crate) const REMOVE: &str = "\
add table inet alveole
delete table inet alveole
add table bridge alveole
delete table bridge alveole
";

/// What `nft` is to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    /// The text.
    pub text: String,
    /// Tells it from other ones.
    pub digest: String,
}

/// The filter for these networks; none if none has a bridge.
#[must_use]
pub fn ruleset<'a>(networks: impl IntoIterator<Item = &'a NetworkState>) -> Option<Ruleset> {
    let networks: Vec<&NetworkState> = networks
        .into_iter()
        .filter(|n| n.spec.has_bridge())
        .collect();
    if networks.is_empty() {
        return None;
    }
    let bridges: Vec<&NetworkName> = networks.iter().map(|n| &n.spec.name).collect();
    let ours = set(bridges.iter().map(|n| format!("\"{n}\"")));
    let mut body = Text::default();
    routed(&mut body, &networks, &ours);
    ports(&mut body, &networks);
    let digest = format!("{:016x}", crate::hash(&[&body.0]));
    let mut text = String::from(REMOVE);
    // An empty chain beside the others.
    let mark = format!("table inet {TABLE} {{\n\tchain {MARK}{digest} {{\n\t}}\n");
    text.push_str(
        &body
            .0
            .replacen(&format!("table inet {TABLE} {{\n"), &mark, 1),
    );
    Some(Ruleset { text, digest })
}

/// Lines, indented by what they are in.
#[derive(Default)]
struct Text(String);

impl Text {
    fn table(&mut self, family: &str) {
        self.line(0, format_args!("table {family} {TABLE} {{"));
    }

    fn chain(&mut self, name: impl Display, rules: &[String]) {
        self.line(1, format_args!("chain {name} {{"));
        for rule in rules {
            self.line(2, rule);
        }
        self.line(1, "}");
    }

    fn line(&mut self, depth: usize, text: impl Display) {
        let _ = writeln!(self.0, "{}{text}", "\t".repeat(depth));
    }
}

fn set(items: impl IntoIterator<Item = String>) -> String {
    let items: Vec<String> = items.into_iter().collect();
    format!("{{ {} }}", items.join(", "))
}

const ANSWERS: &str = "ct state established,related accept";
/// Who is refused learns it at once instead of waiting in vain.
const REFUSE: &str = "reject with icmpx type admin-prohibited";

fn routed(out: &mut Text, networks: &[&NetworkState], ours: &str) {
    out.table("inet");
    let mut forward = vec!["type filter hook forward priority filter; policy accept;".to_owned()];
    let mut input = vec!["type filter hook input priority filter; policy accept;".to_owned()];
    let mut source = vec!["type nat hook postrouting priority srcnat; policy accept;".to_owned()];
    for NetworkState { spec, .. } in networks {
        let name = &spec.name;
        forward.push(format!("iifname \"{name}\" goto from_{name}"));
        input.push(format!("iifname \"{name}\" goto host_{name}"));
        if spec.mode == Mode::Nat {
            // Other networks of guests see guests by their own addresses.
            for net in subnets(spec) {
                source.push(format!(
                    "{} saddr {net} oifname != {ours} masquerade",
                    family(&net)
                ));
            }
        }
    }
    for NetworkState { spec, .. } in networks {
        forward.push(format!("oifname \"{0}\" goto to_{0}", spec.name));
    }
    out.chain("forward", &forward);
    out.chain("input", &input);
    if source.len() > 1 {
        out.chain("postrouting", &source);
    }
    for network in networks {
        let name = &network.spec.name;
        // Where a bridge asks this table about what stays on it (sysctl bridge-nf-call-iptables): that is not for
        // these rules to say.
        let mut from = vec![format!("oifname \"{name}\" accept"), ANSWERS.to_owned()];
        let (passing, to_host): (Vec<Scoped<'_>>, Vec<Scoped<'_>>) = all_rules(network)
            .partition(|rule| rule.rule.is_none_or(|r| r.to != Destination::Host));
        for rule in passing {
            from.extend(rule.lines(network, ours));
        }
        from.extend(end(network.spec.egress, "", ours));
        out.chain(format_args!("from_{name}"), &from);
        out.chain(
            format_args!("to_{name}"),
            &[ANSWERS.to_owned(), "drop".to_owned()],
        );
        let mut host = vec![ANSWERS.to_owned()];
        host.extend(services(&network.spec));
        for rule in to_host {
            host.extend(rule.lines(network, ours));
        }
        host.push(REFUSE.to_owned());
        out.chain(format_args!("host_{name}"), &host);
    }
    out.line(0, "}");
}

/// What this host does for its guests.
fn services(spec: &NetworkSpec) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(gateway) = spec.gateway4() {
        lines.push(format!("ip daddr {gateway} icmp type echo-request accept"));
        if spec.has_resolver() {
            lines.push(format!(
                "ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept"
            ));
            lines.push("meta nfproto ipv4 udp sport 68 udp dport 67 accept".into());
        }
    }
    if let Some(gateway) = spec.gateway6() {
        // Without these no neighbour is found (RFC 4861); packets from elsewhere have another hop limit.
        lines.push("ip6 hoplimit 255 icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept".into());
        lines.push(format!(
            "ip6 daddr {gateway} icmpv6 type echo-request accept"
        ));
        if spec.has_resolver() {
            lines.push(format!(
                "ip6 daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept"
            ));
            lines.push("meta nfproto ipv6 udp sport 546 udp dport 547 accept".into());
        }
    }
    lines
}

fn end(egress: Egress, of: &str, ours: &str) -> Vec<String> {
    match egress {
        Egress::Open => vec![
            format!("{of}oifname {ours} {REFUSE}"),
            format!("{of}accept"),
        ],
        Egress::Closed => vec![format!("{of}{REFUSE}")],
    }
}

/// A rule and of whom it speaks, or (without one) the end of a VM's own.
struct Scoped<'a> {
    rule: Option<&'a Rule>,
    lease: Option<&'a Lease>,
}

/// The rules of VMs, and then those of the network. One that names a VM without addresses names nobody.
fn all_rules(network: &NetworkState) -> impl Iterator<Item = Scoped<'_>> {
    let own = network
        .leases
        .iter()
        .filter(|l| l.port.is_some())
        .flat_map(|lease| {
            let rules = lease.rules.iter().map(move |rule| Scoped {
                rule: Some(rule),
                lease: Some(lease),
            });
            let end = lease.egress.is_some().then_some(Scoped {
                rule: None,
                lease: Some(lease),
            });
            rules.chain(end)
        });
    let shared = network.spec.rules.iter().filter_map(|rule| {
        let lease = match &rule.vm {
            None => None,
            Some(vm) => Some(network.leases.iter().find(|l| l.vm == *vm)?),
        };
        Some(Scoped {
            rule: Some(rule),
            lease,
        })
    });
    own.chain(shared)
}

impl Scoped<'_> {
    fn lines(&self, network: &NetworkState, ours: &str) -> Vec<String> {
        let sources: Vec<(Option<&str>, String)> = match self.lease {
            None => vec![(None, String::new())],
            Some(lease) => {
                let v4 = lease.v4.map(|a| (Some("ip"), format!("ip saddr {a} ")));
                let v6 = lease.v6.map(|a| (Some("ip6"), format!("ip6 saddr {a} ")));
                v4.into_iter().chain(v6).collect()
            }
        };
        let Some(rule) = self.rule else {
            let egress = self
                .lease
                .and_then(|l| l.egress)
                .unwrap_or(network.spec.egress);
            return sources
                .iter()
                .flat_map(|(_, source)| end(egress, source, ours))
                .collect();
        };
        let to = match &rule.to {
            Destination::Any | Destination::Host => (None, String::new()),
            Destination::Outside => (None, format!("oifname != {ours} ")),
            Destination::Network(name) => (None, format!("oifname \"{name}\" ")),
            Destination::Cidr(net) => (Some(family(net)), format!("{} daddr {net} ", family(net))),
        };
        let verdict = match rule.action {
            Action::Allow => "accept",
            Action::Deny => REFUSE,
        };
        sources
            .iter()
            .filter(|(source, _)| source.is_none() || to.0.is_none() || *source == to.0)
            .map(|(_, source)| format!("{source}{}{}{verdict}", to.1, what(rule)))
            .collect()
    }
}

fn what(rule: &Rule) -> String {
    match rule.protocol {
        None => String::new(),
        Some(Protocol::Icmp) => "meta l4proto { icmp, ipv6-icmp } ".into(),
        Some(protocol) if rule.ports.is_empty() => format!("meta l4proto {protocol} "),
        Some(protocol) => format!(
            "{protocol} dport {} ",
            set(rule.ports.iter().map(ToString::to_string))
        ),
    }
}

fn subnets(spec: &NetworkSpec) -> impl Iterator<Item = IpNet> {
    spec.v4
        .map(IpNet::V4)
        .into_iter()
        .chain(spec.v6.map(IpNet::V6))
}

fn family(net: &IpNet) -> &'static str {
    match net {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

/// What comes out of a port must be of whom the port is.
fn ports(out: &mut Text, networks: &[&NetworkState]) {
    let plugged: BTreeMap<&str, (&NetworkSpec, &Lease)> = networks
        .iter()
        .flat_map(|n| n.leases.iter().map(move |l| (&n.spec, l)))
        .filter_map(|(spec, lease)| Some((lease.port.as_ref()?.interface.as_str(), (spec, lease))))
        .collect();
    if plugged.is_empty() {
        return;
    }
    out.table("bridge");
    let guests = plugged
        .keys()
        .map(|port| format!("\"{port}\" : goto guest_{port}"));
    let first = [
        "type filter hook prerouting priority filter; policy accept;".to_owned(),
        format!("iifname vmap {}", set(guests)),
    ];
    out.chain("prerouting", &first);
    for (port, (spec, lease)) in &plugged {
        out.chain(format_args!("guest_{port}"), &guest(spec, lease));
    }
    out.line(0, "}");
}

fn guest(spec: &NetworkSpec, lease: &Lease) -> Vec<String> {
    let mut lines = vec![
        format!("ether saddr != {} drop", lease.mac),
        // Only this host gives out addresses and routes.
        "udp sport { 67, 547 } drop".to_owned(),
        "icmpv6 type { nd-router-advert, nd-redirect } drop".to_owned(),
    ];
    if !spec.has_addresses() {
        lines.push("ether type { ip, ip6, arp } accept".into());
        lines.push("drop".into());
        return lines;
    }
    if let Some(address) = lease.v4 {
        lines.extend([
            // 0.0.0.0 asks whether an address is free (RFC 5227), and for an address (RFC 2131).
            format!(
                "arp saddr ether {} arp saddr ip {{ 0.0.0.0, {address} }} accept",
                lease.mac
            ),
            format!("ip saddr {address} accept"),
            "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept".to_owned(),
        ]);
    }
    let own: Vec<Ipv6Addr> = lease.v6.into_iter().collect();
    // The target of an advertisement is its bytes 8 to 23 (RFC 4861, section 4.4); link-local ones begin with 1111111010.
    let others: String = own
        .iter()
        .map(|a| format!("@th,64,128 != 0x{:032x} ", u128::from(*a)))
        .collect();
    let sources = own
        .iter()
        .map(ToString::to_string)
        .chain(["::".to_owned(), "fe80::/10".to_owned()]);
    lines.extend([
        format!("icmpv6 type nd-neighbor-advert {others}@th,64,10 != 0x3fa drop"),
        format!("ip6 saddr {} accept", set(sources)),
        "drop".to_owned(),
    ]);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Port, take};
    use crate::spec::NetworkRequest;

    fn network(name: &str, mode: &str, subnets: &[&str], rules: &[&str]) -> NetworkState {
        let request = NetworkRequest {
            mode: Some(mode.into()),
            subnet: subnets.iter().map(|s| (*s).to_owned()).collect(),
            rules: rules.iter().map(|r| r.parse().unwrap()).collect(),
            ..NetworkRequest::default()
        };
        NetworkState::new(request.check(&name.parse().unwrap()).unwrap())
    }

    fn plug(network: &mut NetworkState, vm: &str, port: &str) {
        let lease = take(
            &network.spec,
            &mut network.leases,
            &vm.parse().unwrap(),
            None,
        )
        .unwrap();
        lease.port = Some(Port {
            interface: port.parse().unwrap(),
            ours: true,
            process: None,
        });
    }

    fn chain<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
        let start = format!("chain {name} {{");
        let lines = text.lines().map(str::trim);
        lines
            .skip_while(|l| *l != start)
            .skip(1)
            .take_while(|l| *l != "}")
            .collect()
    }

    #[test]
    fn tiers_are_closed_but_for_what_is_allowed() {
        let front = network(
            "front",
            "bridge",
            &["10.0.10.0/24"],
            &["allow,to=middle,protocol=tcp,port=8080"],
        );
        let middle = network("middle", "bridge", &["10.0.20.0/24", "fd00:20::/64"], &[]);
        let text = ruleset([&front, &middle]).unwrap().text;
        assert_eq!(
            chain(&text, "from_front"),
            [
                "oifname \"front\" accept",
                ANSWERS,
                "oifname \"middle\" tcp dport { 8080 } accept",
                REFUSE
            ]
        );
        assert_eq!(
            chain(&text, "from_middle"),
            ["oifname \"middle\" accept", ANSWERS, REFUSE]
        );
        assert!(!text.contains("masquerade"));
        assert!(!text.contains("table bridge alveole {"));
    }

    #[test]
    fn nat_goes_out_and_never_to_other_networks() {
        let a = network(
            "a",
            "nat",
            &["10.0.1.0/24", "fd00:1::/64"],
            &[
                "deny,to=192.168.0.0/16",
                "allow,to=host,protocol=tcp,port=80",
            ],
        );
        let b = network("b", "isolated", &["10.0.2.0/24"], &[]);
        let text = ruleset([&a, &b]).unwrap().text;
        let from = chain(&text, "from_a");
        assert_eq!(
            from[2..],
            [
                format!("ip daddr 192.168.0.0/16 {REFUSE}"),
                format!("oifname {{ \"a\", \"b\" }} {REFUSE}"),
                "accept".into(),
            ]
        );
        assert!(chain(&text, "host_a").contains(&"tcp dport { 80 } accept"));
        assert_eq!(chain(&text, "postrouting").len(), 3);
        assert_eq!(chain(&text, "from_b").last(), Some(&REFUSE));
    }

    #[test]
    fn a_vm_has_its_own_rules_first_and_only_by_its_own_addresses() {
        let mut a = network(
            "a",
            "nat",
            &["10.0.1.0/24"],
            &["deny,to=outside,vm=web", "deny,to=any,vm=nobody"],
        );
        plug(&mut a, "web", "tap0");
        plug(&mut a, "db", "tap1");
        a.leases[1].rules = vec![
            "allow,to=fd00::/8".parse().unwrap(),
            "allow,to=10.9.0.0/16".parse().unwrap(),
        ];
        a.leases[1].egress = Some(Egress::Closed);
        let text = ruleset([&a]).unwrap().text;
        let (web, db) = (a.leases[0].v4.unwrap(), a.leases[1].v4.unwrap());
        assert_eq!(
            chain(&text, "from_a")[2..5],
            [
                format!("ip saddr {db} ip daddr 10.9.0.0/16 accept"),
                format!("ip saddr {db} {REFUSE}"),
                format!("ip saddr {web} oifname != {{ \"a\" }} {REFUSE}"),
            ]
        );
        let guest = chain(&text, "guest_tap0");
        assert_eq!(guest[0], format!("ether saddr != {} drop", a.leases[0].mac));
        assert!(guest.contains(&format!("ip saddr {web} accept").as_str()));
        assert_eq!(guest.last(), Some(&"drop"));
    }

    #[test]
    fn the_digest_is_the_texts() {
        let a = network("a", "nat", &["10.0.1.0/24"], &[]);
        let b = network("a", "nat", &["10.0.2.0/24"], &[]);
        let (a, b) = (ruleset([&a]).unwrap(), ruleset([&b]).unwrap());
        assert_ne!(a.digest, b.digest);
        assert!(a.text.contains(&format!("chain {MARK}{} {{", a.digest)));
        assert!(ruleset([]).is_none());
    }
}
