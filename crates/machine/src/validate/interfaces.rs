//! The rules of network interfaces.

use alveole_egress_filter::Policy;
use alveole_rate_limiter::Limits;
use alveole_vm_config::{LinkKind, NetworkInterface, VmConfig};

use crate::validate::drives::limits;
use crate::validate::{Invalid, MAX_CPUS, egress, is_id, shown};

/// Smallest and largest packet that a guest can be told (virtio 1.3, section 5.1.4.1).
const MTU: std::ops::RangeInclusive<u64> = 68..=65_535;
/// Longest name of an interface of the host (`IFNAMSIZ` of Linux, without its end).
const MAX_IF_NAME_BYTES: usize = 15;

/// A network interface that keeps all rules.
#[derive(Debug, Clone)]
pub(crate) struct ValidInterface {
    pub(crate) id: String,
    pub(crate) host_dev_name: String,
    pub(crate) link: LinkKind,
    /// None: a random one.
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) mtu: Option<u16>,
    pub(crate) rx_limits: Limits,
    pub(crate) tx_limits: Limits,
    pub(crate) queue_pairs: u16,
    pub(crate) anti_spoofing: bool,
    pub(crate) vhost: bool,
    pub(crate) vhost_fds: Option<String>,
    /// None: the guest may send anything.
    pub(crate) egress: Option<Policy>,
}

/// Checks all interfaces.
pub(super) fn validate(config: &VmConfig, broken: &mut Vec<Invalid>) -> Vec<ValidInterface> {
    let all = &config.network_interfaces;
    let mut valid: Vec<ValidInterface> = Vec::new();
    for (index, interface) in all.iter().enumerate() {
        let earlier = all.get(..index).unwrap_or(&[]);
        check(index, interface, earlier, broken);
        let mac = mac(interface, broken);
        if let Some(mac) = mac
            && let Some(first) = valid.iter().find(|other| other.mac == Some(mac))
        {
            broken.push(Invalid::SameMac {
                first: first.id.clone(),
                second: interface.iface_id.clone(),
                mac: interface.guest_mac.clone().unwrap_or_default(),
            });
        }
        let egress = egress::validate(interface, broken);
        valid.push(of(interface, mac, egress));
    }
    valid
}

fn check(
    index: usize,
    interface: &NetworkInterface,
    earlier: &[NetworkInterface],
    broken: &mut Vec<Invalid>,
) {
    let id = &interface.iface_id;
    if id.is_empty() {
        broken.push(Invalid::NoInterfaceId(index));
    } else if !is_id(id) {
        broken.push(Invalid::InterfaceId(shown(id)));
    } else if earlier.iter().any(|other| other.iface_id == *id) {
        broken.push(Invalid::SameInterfaceId(id.clone()));
    }
    check_host_name(interface, broken);
    check_vhost(interface, broken);
    if let Some(mtu) = interface.mtu
        && !MTU.contains(&mtu)
    {
        broken.push(Invalid::Mtu {
            id: id.clone(),
            mtu,
        });
    }
    if let Some(pairs) = interface.num_queue_pairs
        && !(1..=u64::from(MAX_CPUS)).contains(&pairs)
    {
        broken.push(Invalid::QueuePairs {
            id: id.clone(),
            pairs,
        });
    }
}

/// What goes with queues that the host's kernel serves.
fn check_vhost(interface: &NetworkInterface, broken: &mut Vec<Invalid>) {
    let NetworkInterface {
        iface_id: id,
        vhost_fds: fds,
        ..
    } = interface;
    let bad_fds = match fds {
        Some(_) if !interface.vhost => Some("without vhost nobody uses them; set vhost to true"),
        Some(fds) if fds.split(',').any(|fd| fd.parse::<u16>().is_err()) => Some(
            "not the numbers of descriptors with commas between them: give those that this program is started with",
        ),
        _ => None,
    };
    if let Some(why) = bad_fds {
        broken.push(Invalid::VhostFds {
            id: id.clone(),
            fds: fds.iter().flat_map(|fds| fds.chars()).take(128).collect(),
            why,
        });
    }
    if !interface.vhost {
        return;
    }
    const NO_LIMITS: &str = "bounds nothing";
    for (given, field, why) in [
        (
            interface.rx_rate_limiter.is_some(),
            "rx_rate_limiter",
            NO_LIMITS,
        ),
        (
            interface.tx_rate_limiter.is_some(),
            "tx_rate_limiter",
            NO_LIMITS,
        ),
        (
            interface.anti_spoofing,
            "anti_spoofing",
            "looks at no addresses",
        ),
        (interface.egress.is_some(), "egress", "asks no rules"),
        (
            interface.link == LinkKind::Stream,
            "link \"stream\"",
            "has frames of taps and macvtaps only",
        ),
    ] {
        if given {
            broken.push(Invalid::Vhost {
                id: id.clone(),
                field,
                why,
            });
        }
    }
}

fn check_host_name(interface: &NetworkInterface, broken: &mut Vec<Invalid>) {
    let name = &interface.host_dev_name;
    let why = match interface.link {
        _ if name.is_empty() => "is empty: name what carries its frames on the host",
        LinkKind::Tap | LinkKind::Macvtap if name.len() > MAX_IF_NAME_BYTES => {
            "is longer than the 15 bytes that an interface's name can have"
        }
        LinkKind::Tap | LinkKind::Macvtap
            if name == "."
                || name == ".."
                || name
                    .bytes()
                    .any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace() || b == 0) =>
        {
            "has a character that no interface's name has: give the name that `ip link` shows"
        }
        LinkKind::Fd if name.split(',').any(|fd| fd.parse::<u16>().is_err()) => {
            "is not the number of a descriptor: give one that this program is started with"
        }
        _ => return,
    };
    broken.push(Invalid::HostDevName {
        id: interface.iface_id.clone(),
        name: name.chars().take(128).collect(),
        why,
    });
}

/// The guest's hardware address, if it is given and can be one.
fn mac(interface: &NetworkInterface, broken: &mut Vec<Invalid>) -> Option<[u8; 6]> {
    let text = interface.guest_mac.as_ref()?;
    let parsed = parse_mac(text);
    let why = match parsed {
        None => "it has six pairs of hexadecimal digits with ':' between them",
        Some([first, ..]) if first & 1 != 0 => {
            "it is one of a group: the lowest bit of its first byte must be 0"
        }
        Some([0, 0, 0, 0, 0, 0]) => "no interface has that one",
        Some(mac) => return Some(mac),
    };
    broken.push(Invalid::GuestMac {
        id: interface.iface_id.clone(),
        mac: text.chars().take(64).collect(),
        why,
    });
    None
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn of(
    interface: &NetworkInterface,
    mac: Option<[u8; 6]>,
    egress: Option<Policy>,
) -> ValidInterface {
    let bounds = |limiter: &Option<alveole_vm_config::RateLimiter>| {
        limiter.as_ref().map(limits).unwrap_or_default()
    };
    let pairs = interface.num_queue_pairs.unwrap_or(1);
    let pairs = u16::try_from(pairs).unwrap_or(1).max(1);
    ValidInterface {
        id: interface.iface_id.clone(),
        host_dev_name: interface.host_dev_name.clone(),
        link: interface.link,
        mac,
        mtu: interface
            .mtu
            .map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX)),
        rx_limits: bounds(&interface.rx_rate_limiter),
        tx_limits: bounds(&interface.tx_rate_limiter),
        queue_pairs: pairs,
        anti_spoofing: interface.anti_spoofing,
        vhost: interface.vhost,
        vhost_fds: interface.vhost_fds.clone(),
        egress,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate as validate_all;

    fn interface(id: &str) -> NetworkInterface {
        NetworkInterface {
            iface_id: id.into(),
            host_dev_name: "tap0".into(),
            ..NetworkInterface::default()
        }
    }

    fn told(interfaces: Vec<NetworkInterface>) -> Vec<String> {
        let mut config = VmConfig::default();
        config.boot_source.kernel_image_path = "k".into();
        config.network_interfaces = interfaces;
        let broken = validate_all(&config).map_or_else(|broken| broken, |_| Vec::new());
        broken.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_plain_interface_is_fine() {
        assert_eq!(told(vec![interface("eth0"), interface("eth1")]), [""; 0]);
    }

    #[test]
    fn vhost_goes_with_what_the_kernel_does() {
        use alveole_vm_config::RateLimiter;
        let vhost = || NetworkInterface {
            vhost: true,
            ..interface("v")
        };
        let fds = |fds: &str| NetworkInterface {
            vhost_fds: Some(fds.into()),
            ..vhost()
        };
        let limiter = Some(RateLimiter::default());
        assert_eq!(told(vec![vhost()]), [""; 0]);
        assert_eq!(told(vec![fds("20,21")]), [""; 0]);
        for (one, parts) in [
            (
                NetworkInterface {
                    rx_rate_limiter: limiter,
                    ..vhost()
                },
                ["vhost and rx_rate_limiter", "bounds nothing"],
            ),
            (
                NetworkInterface {
                    tx_rate_limiter: limiter,
                    ..vhost()
                },
                ["vhost and tx_rate_limiter", "or vhost out"],
            ),
            (
                NetworkInterface {
                    anti_spoofing: true,
                    ..vhost()
                },
                ["vhost and anti_spoofing", "no addresses"],
            ),
            (
                NetworkInterface {
                    link: LinkKind::Stream,
                    ..vhost()
                },
                ["vhost and link \"stream\"", "taps and macvtaps"],
            ),
            (
                NetworkInterface {
                    vhost: false,
                    ..fds("20")
                },
                ["vhost_fds \"20\"", "set vhost to true"],
            ),
            (fds("20,x"), ["vhost_fds \"20,x\"", "not the numbers"]),
            (fds(""), ["vhost_fds \"\"", "not the numbers"]),
        ] {
            let lines = told(vec![one]);
            assert_eq!(lines.len(), 1, "{lines:?}");
            for part in parts {
                assert!(lines[0].contains(part), "{lines:?} / {part}");
            }
        }
    }

    #[test]
    fn rules_for_what_is_sent_are_all_looked_at() {
        use alveole_vm_config::{Egress, EgressDefault};
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect();
        let with = |rules: &[&str], host: &[&str], resolvers: &[&str]| NetworkInterface {
            egress: Some(Egress {
                rules: texts(rules),
                default: EgressDefault::Closed,
                host: texts(host),
                guests: Vec::new(),
                resolvers: texts(resolvers),
            }),
            ..interface("e")
        };
        assert_eq!(
            told(vec![with(
                &["allow,to=host", "deny,to=any"],
                &["192.0.2.1"],
                &["192.0.2.53"]
            )]),
            [""; 0]
        );
        let lines = told(vec![with(
            &["allow,to=back", "permit", "allow,port=80", "allow,to=host"],
            &[],
            &["dns"],
        )]);
        for (line, part) in lines.iter().zip([
            "allow or deny",
            "only tcp and udp",
            "resolvers 'dns'",
            "write the addresses",
            "which addresses the host has",
        ]) {
            assert!(
                line.contains("\"e\" has egress") && line.contains(part),
                "{lines:?}"
            );
        }
        assert_eq!(lines.len(), 5, "{lines:?}");
        let lines = told(vec![with(&["allow,to=host"], &["192.0.2.1/24"], &[])]);
        assert!(
            lines.len() == 1 && lines[0].contains("192.0.2.0/24"),
            "{lines:?}"
        );
        let many = vec!["deny,to=any"; 1025];
        let lines = told(vec![with(&many, &[], &[])]);
        assert!(
            lines.len() == 1 && lines[0].contains("1024 are the most"),
            "{lines:?}"
        );
        let by_kernel = NetworkInterface {
            vhost: true,
            ..with(&[], &[], &[])
        };
        let lines = told(vec![by_kernel]);
        assert!(
            lines.len() == 1 && lines[0].contains("leave egress or vhost out"),
            "{lines:?}"
        );
    }

    #[test]
    fn what_lets_all_pass_is_no_filter() {
        use alveole_vm_config::{Egress, EgressDefault};
        for (default, is_filter) in [(EgressDefault::Open, false), (EgressDefault::Closed, true)] {
            let mut config = VmConfig::default();
            config.boot_source.kernel_image_path = "k".into();
            config.network_interfaces = vec![NetworkInterface {
                egress: Some(Egress {
                    default,
                    ..Egress::default()
                }),
                ..interface("e")
            }];
            let valid = validate_all(&config).unwrap();
            assert_eq!(valid.interfaces[0].egress.is_some(), is_filter);
        }
    }

    #[test]
    fn every_broken_rule_has_its_message() {
        let mac = |mac: &str| NetworkInterface {
            guest_mac: Some(mac.into()),
            ..interface(&format!("m{}", mac.len()))
        };
        let host = |name: &str, link| NetworkInterface {
            host_dev_name: name.into(),
            link,
            ..interface("h")
        };
        let mtu = |mtu| NetworkInterface {
            mtu: Some(mtu),
            ..interface("u")
        };
        let pairs = |pairs| NetworkInterface {
            num_queue_pairs: Some(pairs),
            ..interface("q")
        };
        for (one, part) in [
            (interface(""), "network-interfaces[0].iface_id is empty"),
            (interface("a b"), "iface_id \"a b\": a name has"),
            (host("", LinkKind::Tap), "is empty"),
            (host("a-name-of-16-by.", LinkKind::Tap), "15 bytes"),
            (host("a/b", LinkKind::Macvtap), "a character"),
            (host("x", LinkKind::Fd), "number of a descriptor"),
            (mac("01:00:5e:00:00:01"), "one of a group"),
            (mac("00:00:00:00:00:00"), "no interface has that one"),
            (mac("02:00:00:00:00"), "six pairs"),
            (mac("02:00:00:00:00:0g"), "six pairs"),
            (mac("02:00:00:00:00:00:00"), "six pairs"),
            (mac("+2:00:00:00:00:00"), "six pairs"),
            (mtu(67), "mtu 67"),
            (mtu(65_536), "mtu 65536"),
            (pairs(0), "num_queue_pairs 0"),
            (pairs(65), "num_queue_pairs 65"),
        ] {
            let lines = told(vec![one]);
            assert!(
                lines.len() == 1 && lines[0].contains(part),
                "{lines:?} / {part}"
            );
        }
        assert!(told(vec![host("/run/a.sock", LinkKind::Stream)]).is_empty());
        let twice = told(vec![interface("a"), interface("a")]);
        assert!(twice[0].contains("\"a\" is given to two"), "{twice:?}");
        let same = told(vec![
            NetworkInterface {
                guest_mac: Some("02:00:00:00:00:AA".into()),
                ..interface("a")
            },
            NetworkInterface {
                guest_mac: Some("02:00:00:00:00:aa".into()),
                ..interface("b")
            },
        ]);
        assert!(same[0].contains("have the same guest_mac"), "{same:?}");
    }
}
