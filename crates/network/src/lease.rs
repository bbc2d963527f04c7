//! Addresses of VMs on a network: stable for a name, returned when the VM is gone.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::spec::NetworkSpec;
use crate::words::{InterfaceName, Mac, VmName};
use alveole_egress_rules::Egress;
use alveole_egress_rules::Rule;

/// Most addresses that are kept for VMs that do not run: who starts VMs under ever new names must not make
/// the state grow without end.
pub(crate) const MOST_IDLE: usize = 256;
/// Most VMs on one network: each costs the kernel a port and a chain of its filter.
pub(crate) const MOST_VMS: u32 = 4096;

/// What a VM has on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Whose it is.
    pub vm: VmName,
    /// Its hardware address.
    pub mac: Mac,
    /// Its IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<Ipv6Addr>,
    /// Its own rules, asked before the network's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// What happens to what none of its own rules names, without asking the network's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// Where it is plugged in; none while it does not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<Port>,
}

/// The interface that stands for a VM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its name.
    pub interface: InterfaceName,
    /// Whether it was made by us (then it is removed by us).
    pub ours: bool,
    /// The process whose end is the VM's; none: until somebody detaches it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
}

/// A process, told from a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it started, in ticks since boot (proc(5), stat field 22).
    pub started: u64,
}

impl Process {
    /// The process with that id, if there is one.
    #[must_use]
    pub fn find(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, which is anything, ends with the last parenthesis; state is the first field after it.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        if fields.next()? == "Z" {
            return None;
        }
        let started = fields.nth(18)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::find(self.pid) == Some(*self)
    }
}

impl Port {
    /// Whether whoever is plugged in is still there.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.process.is_none_or(|process| process.is_alive())
    }
}

/// Numbers of the addresses that guests may have: 0 is the subnet, 1 this host.
fn numbers(spec: &NetworkSpec) -> std::ops::RangeInclusive<u32> {
    let of = |bits: u8, reserved: u32| {
        2u32.checked_pow(bits.into())
            .map_or(u32::MAX, |n| n - 1 - reserved)
    };
    let v4 = spec.v4.map_or(u32::MAX, |net| of(32 - net.prefix_len(), 1));
    let v6 = spec
        .v6
        .map_or(u32::MAX, |net| of(128 - net.prefix_len(), 0));
    2..=v4.min(v6).min(0xffff)
}

/// Gives `vm` what it has on this network: what it had, or something free, found from its name, so that it is
/// the same again wherever that is possible. The number of an address is the same in both subnets.
///
/// # Errors
///
/// [`Error::Word`] for a MAC that another VM has, [`Error::NoAddress`] if none is free, [`Error::Conflict`] for
/// more than [`MOST_VMS`].
pub(crate) fn take<'a>(
    spec: &NetworkSpec,
    leases: &'a mut Vec<Lease>,
    vm: &VmName,
    mac: Option<Mac>,
) -> Result<&'a mut Lease, Error> {
    if let Some(mac) = mac {
        // An address that an idle VM had is free for who asks for it by name.
        leases.retain(|l| l.mac != mac || l.vm == *vm || l.port.is_some());
        if mac == spec.bridge_mac() {
            return Err(Error::word(
                "MAC address",
                &mac.to_string(),
                "this host has it on this network",
            ));
        }
        if let Some(other) = leases.iter().find(|l| l.mac == mac && l.vm != *vm) {
            let why = format!(
                "VM '{}' has it on network '{}': two of the same cannot be told apart",
                other.vm, spec.name
            );
            return Err(Error::word("MAC address", &mac.to_string(), why));
        }
    }
    if let Some(at) = leases.iter().position(|l| l.vm == *vm) {
        if let Some(mac) = mac {
            leases[at].mac = mac;
        }
        return Ok(&mut leases[at]);
    }
    if leases.iter().filter(|l| l.port.is_some()).count() >= MOST_VMS as usize {
        return Err(Error::conflict(
            &spec.name,
            format!("{MOST_VMS} VMs are the most on one network"),
        ));
    }
    let number = match free_number(spec, leases, vm) {
        Some(number) => number,
        // Those that do not run give way, the longest idle first.
        None => {
            let idle = leases.iter().position(|l| l.port.is_none());
            if let Some(idle) = idle {
                leases.remove(idle);
            }
            free_number(spec, leases, vm).ok_or_else(|| Error::NoAddress {
                network: spec.name.to_string(),
                vm: vm.to_string(),
                subnet: spec
                    .v4
                    .map_or_else(|| spec.v6.map(|n| n.to_string()), |n| Some(n.to_string()))
                    .unwrap_or_default(),
            })?
        }
    };
    let mac = mac.unwrap_or_else(|| {
        (0..)
            .map(|salt| Mac::of(spec.name.as_str(), vm.as_str(), salt))
            .find(|mac| *mac != spec.bridge_mac() && !leases.iter().any(|l| l.mac == *mac))
            .expect("there are more addresses than VMs")
    });
    leases.push(Lease {
        vm: vm.clone(),
        mac,
        v4: spec
            .v4
            .map(|net| Ipv4Addr::from(u32::from(net.network()) + number)),
        v6: spec
            .v6
            .map(|net| Ipv6Addr::from(u128::from(net.network()) + u128::from(number))),
        rules: Vec::new(),
        egress: None,
        port: None,
    });
    Ok(leases.last_mut().expect("pushed just now"))
}

fn free_number(spec: &NetworkSpec, leases: &[Lease], vm: &VmName) -> Option<u32> {
    let range = numbers(spec);
    if !spec.has_addresses() {
        return Some(0);
    }
    let number = |l: &Lease| match (l.v4, spec.v4, l.v6, spec.v6) {
        (Some(address), Some(net), _, _) => Some(u32::from(address) - u32::from(net.network())),
        (_, _, Some(address), Some(net)) => {
            u32::try_from(u128::from(address) - u128::from(net.network())).ok()
        }
        _ => None,
    };
    let taken: BTreeSet<u32> = leases.iter().filter_map(number).collect();
    let count = range.end() - range.start() + 1;
    let wanted = (crate::hash(&[vm.as_str()]) % u64::from(count)) as u32;
    (0..count)
        .map(|n| range.start() + (wanted + n) % count)
        .find(|number| !taken.contains(number))
}

/// Unplugs `vm` and keeps its addresses for its next start, those of the [`MOST_IDLE`] last ones.
pub(crate) fn idle(leases: &mut Vec<Lease>, vm: &VmName) -> Option<Port> {
    let at = leases.iter().position(|l| l.vm == *vm)?;
    let mut lease = leases.remove(at);
    let port = lease.port.take();
    lease.rules.clear();
    lease.egress = None;
    leases.push(lease);
    let idle = leases.iter().filter(|l| l.port.is_none()).count();
    if idle > MOST_IDLE {
        let oldest = leases.iter().position(|l| l.port.is_none())?;
        leases.remove(oldest);
    }
    port
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::NetworkRequest;

    fn spec(subnets: &[&str]) -> NetworkSpec {
        NetworkRequest {
            subnet: subnets.iter().map(|s| (*s).to_owned()).collect(),
            ..NetworkRequest::default()
        }
        .check(&"net".parse().unwrap())
        .unwrap()
    }

    fn vm(n: usize) -> VmName {
        format!("vm{n}").parse().unwrap()
    }

    fn plug(lease: &mut Lease) {
        lease.port = Some(Port {
            interface: "tap0".parse().unwrap(),
            ours: true,
            process: None,
        });
    }

    #[test]
    fn a_name_keeps_its_addresses_while_it_is_idle() {
        let spec = spec(&["10.0.0.0/24", "fd00::/64"]);
        let mut leases = Vec::new();
        let first = take(&spec, &mut leases, &vm(1), None).unwrap().clone();
        assert_eq!(
            u32::from(first.v4.unwrap()) & 0xff,
            u128::from(first.v6.unwrap()) as u32
        );
        plug(leases.last_mut().unwrap());
        assert!(idle(&mut leases, &vm(1)).is_some());
        take(&spec, &mut leases, &vm(2), None).unwrap();
        assert_eq!(*take(&spec, &mut leases, &vm(1), None).unwrap(), first);
        // And has the same when it was forgotten and nobody took it.
        let again = take(&spec, &mut Vec::new(), &vm(1), None).unwrap().clone();
        assert_eq!(again, first);
    }

    #[test]
    fn a_full_subnet_forgets_the_idle_and_then_refuses() {
        let spec = spec(&["10.0.0.0/29"]);
        let mut leases = Vec::new();
        for n in 0..5 {
            plug(take(&spec, &mut leases, &vm(n), None).unwrap());
        }
        let said = take(&spec, &mut leases, &vm(5), None)
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("10.0.0.0/29") && said.contains("vm5"),
            "{said}"
        );
        idle(&mut leases, &vm(3));
        take(&spec, &mut leases, &vm(5), None).unwrap();
        assert!(!leases.iter().any(|l| l.vm == vm(3)));
    }

    #[test]
    fn a_mac_that_runs_is_taken() {
        let spec = spec(&["10.0.0.0/24"]);
        let mut leases = Vec::new();
        let mac = "02:00:00:00:00:07".parse().unwrap();
        plug(take(&spec, &mut leases, &vm(1), Some(mac)).unwrap());
        let said = take(&spec, &mut leases, &vm(2), Some(mac))
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("vm1") && said.contains("02:00:00:00:00:07"),
            "{said}"
        );
        idle(&mut leases, &vm(1));
        assert_eq!(
            take(&spec, &mut leases, &vm(2), Some(mac)).unwrap().mac,
            mac
        );
        assert!(take(&spec, &mut leases, &vm(3), Some(spec.bridge_mac())).is_err());
    }

    #[test]
    fn the_idle_are_bounded() {
        let spec = spec(&["10.0.0.0/16"]);
        let mut leases = Vec::new();
        for n in 0..3 * MOST_IDLE {
            plug(take(&spec, &mut leases, &vm(n), None).unwrap());
            idle(&mut leases, &vm(n));
        }
        assert_eq!(leases.len(), MOST_IDLE);
    }

    #[test]
    fn a_process_is_told_from_a_later_one() {
        let me = Process::find(std::process::id()).unwrap();
        assert!(me.is_alive());
        let other = Process {
            started: me.started + 1,
            ..me
        };
        assert!(!other.is_alive());
    }

    proptest! {
        #[test]
        fn no_two_have_the_same(steps in proptest::collection::vec((0usize..12, any::<bool>()), 1..80), v6 in any::<bool>()) {
            let spec = if v6 { spec(&["10.0.0.0/29", "fd00::/64"]) } else { spec(&["10.0.0.0/29"]) };
            let mut leases: Vec<Lease> = Vec::new();
            for (n, start) in steps {
                if start {
                    if let Ok(lease) = take(&spec, &mut leases, &vm(n), None) {
                        plug(lease);
                    }
                } else {
                    idle(&mut leases, &vm(n));
                }
                let addresses: BTreeSet<_> = leases.iter().map(|l| l.v4.unwrap()).collect();
                prop_assert_eq!(addresses.len(), leases.len());
                for lease in &leases {
                    let address = lease.v4.unwrap();
                    prop_assert!(spec.v4.unwrap().contains(&address));
                    prop_assert!(address != spec.gateway4().unwrap() && address.octets()[3] != 0 && address.octets()[3] != 7);
                    prop_assert_eq!(lease.v6.is_some(), v6);
                }
            }
        }
    }
}
