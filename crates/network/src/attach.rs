//! VMs plugged into networks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use ipnet::IpNet;

use crate::Error;
use crate::file::names_known;
use crate::guest_config::DeviceConfig;
use crate::lease::{self, Lease, Port, Process};
use crate::networks::{Networks, Session};
use crate::plan::alias;
use crate::spec::NetworkSpec;
use crate::state::NetworkState;
use crate::tap;
use crate::words::{InterfaceName, Mac, NetworkName, VmName};
use alveole_egress_rules::Egress;
use alveole_egress_rules::Rule;

/// Names that are tried for an interface before giving up.
const MOST_NAMES: u64 = 64;

/// What a VM is plugged in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plug<'a> {
    /// A new tap (or macvtap) with so many queues, that goes with its descriptors.
    Tap {
        /// One descriptor each.
        queues: u16,
        /// The user who may open it by name.
        owner: u32,
        /// Lets it stay until [`Networks::detach`].
        persist: bool,
    },
    /// An interface that somebody else made and removes, a veth for instance.
    Interface(&'a InterfaceName),
}

/// How a VM is plugged in.
#[derive(Clone, Debug)]
pub struct Attach<'a> {
    /// By what.
    pub plug: Plug<'a>,
    /// Its hardware address; else one is made of the names.
    pub mac: Option<Mac>,
    /// The process whose end is the VM's: when it is gone, so is what the VM has here. None: until it is detached.
    pub process: Option<u32>,
    /// Its own rules, asked before the network's.
    pub rules: Vec<Rule>,
    /// What happens to what none of them names, without asking the network's.
    pub egress: Option<Egress>,
}

/// A VM plugged into a network.
#[derive(Debug)]
pub struct Attachment {
    /// The network.
    pub network: NetworkName,
    /// The VM, and its host name.
    pub hostname: VmName,
    /// The interface on this host.
    pub interface: InterfaceName,
    /// The tap's queues; none for an interface of somebody else.
    pub queues: Vec<OwnedFd>,
    /// The guest's hardware address.
    pub mac: Mac,
    /// The guest's addresses.
    pub addresses: Vec<IpNet>,
    /// Its default routes.
    pub gateways: Vec<IpAddr>,
    /// Its resolvers.
    pub dns: Vec<IpAddr>,
    /// The domain of its network.
    pub search: Option<String>,
    /// Its MTU, in bytes.
    pub mtu: u32,
}

impl Attachment {
    /// What the guest is to set up.
    #[must_use]
    pub fn device_config(&self) -> DeviceConfig {
        DeviceConfig {
            mac: self.mac,
            addresses: self.addresses.clone(),
            gateways: self.gateways.clone(),
            dns: self.dns.clone(),
            search: self.search.clone(),
            mtu: Some(self.mtu),
        }
    }
}

impl Networks {
    /// Plugs a VM in and gives what it is to know. A VM that is plugged in already is plugged in anew if it is gone.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchNetwork`], [`Error::NoAddress`], [`Error::Word`] for a MAC that is taken,
    /// [`Error::Conflict`] if a VM of that name runs; what the host refuses. Then nothing is left of it.
    pub fn attach(
        &self,
        network: &NetworkName,
        vm: &VmName,
        attach: &Attach<'_>,
    ) -> Result<Attachment, Error> {
        let mut session = Session::open(&self.folders, true)?;
        let done = session.attach(network, vm, attach);
        if done.is_err() && session.began {
            session.unplug(network, vm);
            if let Err(e) = session.reconcile(&[], &mut Some(&mut |_| ())) {
                log::warn!("of VM '{vm}' on network '{network}' something is left: {e}");
            }
        }
        done
    }

    /// Unplugs a VM; its addresses stay its own until others need them. One that is not plugged in is no error.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchNetwork`]; what the host refuses.
    pub fn detach(&self, network: &NetworkName, vm: &VmName) -> Result<(), Error> {
        self.end(network, vm, false)
    }

    /// Unplugs a VM and gives its addresses back: it is gone for good.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchNetwork`]; what the host refuses.
    pub fn release(&self, network: &NetworkName, vm: &VmName) -> Result<(), Error> {
        self.end(network, vm, true)
    }

    fn end(&self, network: &NetworkName, vm: &VmName, forget: bool) -> Result<(), Error> {
        let mut session = Session::open(&self.folders, true)?;
        if !session.networks.contains_key(network) {
            return Err(Error::NoSuchNetwork(network.to_string()));
        }
        session.unplug(network, vm);
        if let Some(network) = session.networks.get_mut(network) {
            network.leases.retain(|l| !forget || l.vm != *vm);
            session.state.save(network)?;
        }
        session.reconcile(&[], &mut Some(&mut |_| ())).map(drop)
    }
}

impl Session {
    fn attach(
        &mut self,
        name: &NetworkName,
        vm: &VmName,
        attach: &Attach<'_>,
    ) -> Result<Attachment, Error> {
        let links = self.kernel.look()?.links;
        let taken = |interface: &InterfaceName| links.contains_key(interface.as_str());
        let used = |interface: &InterfaceName, networks: &BTreeMap<NetworkName, NetworkState>| {
            let ports = networks
                .values()
                .flat_map(|n| &n.leases)
                .filter_map(|l| l.port.as_ref());
            ports.into_iter().any(|p| p.interface == *interface)
        };
        let interface = match attach.plug {
            Plug::Interface(interface) if used(interface, &self.networks) => {
                return Err(Error::conflict(
                    name,
                    format!("interface '{interface}' is a VM's already"),
                ));
            }
            Plug::Interface(interface) => interface.clone(),
            Plug::Tap { .. } => (0..MOST_NAMES)
                .filter_map(|salt| port_name(name, vm, salt).parse().ok())
                .find(|i| !taken(i) && !used(i, &self.networks))
                .ok_or_else(|| {
                    Error::conflict(name, format!("no name for the tap of VM '{vm}' is free"))
                })?,
        };
        let process = attach.process.map(|pid| {
            Process::find(pid).ok_or_else(|| {
                Error::word("process id", &pid.to_string(), "there is no such process")
            })
        });
        let process = process.transpose()?;
        names_known(&attach.rules, |n| self.networks.contains_key(n))?;
        let network = self
            .networks
            .get_mut(name)
            .ok_or_else(|| Error::NoSuchNetwork(name.to_string()))?;
        let spec = network.spec.clone();
        spec.check_rules(&attach.rules)?;
        if let Some(rule) = attach.rules.iter().find(|r| r.vm.is_some()) {
            let why = format!("it is of VM '{vm}' anyway: leave vm= out");
            return Err(Error::word("rule", &rule.to_string(), why));
        }
        if network
            .leases
            .iter()
            .any(|l| l.vm == *vm && l.port.is_some())
        {
            let why = format!(
                "a VM called '{vm}' is on it already: stop it, or give this one another name"
            );
            return Err(Error::conflict(name, why));
        }
        let lease = lease::take(&spec, &mut network.leases, vm, attach.mac)?;
        lease.rules = attach.rules.clone();
        lease.egress = attach.egress;
        lease.port = Some(Port {
            interface: interface.clone(),
            ours: matches!(attach.plug, Plug::Tap { .. }),
            process,
        });
        let lease = lease.clone();
        self.state.save(network)?;
        self.began = true;
        let targets = [name.clone()];
        // The filter first: it knows the port before there is one.
        self.reconcile(&targets, &mut Some(&mut |_| ()))?;
        let mut queues = Vec::new();
        if let Plug::Tap {
            queues: count,
            owner,
            persist,
        } = attach.plug
        {
            queues = if spec.has_bridge() {
                tap::make(&interface, count, owner)?
            } else {
                self.macvtap(&spec, &interface, lease.mac, count)?
            };
            self.kernel.claim(interface.as_str())?;
            self.reconcile(&targets, &mut Some(&mut |_| ()))?;
            if let Some(first) = queues.first().filter(|_| persist && spec.has_bridge()) {
                tap::persist(first)
                    .map_err(|e| Error::kernel(format!("let the tap {interface} stay"), e))?;
            }
        }
        Ok(attachment(&spec, lease, interface, queues))
    }

    fn macvtap(
        &mut self,
        spec: &NetworkSpec,
        name: &InterfaceName,
        mac: Mac,
        queues: u16,
    ) -> Result<Vec<OwnedFd>, Error> {
        let uplink = spec
            .uplink()
            .ok_or_else(|| Error::conflict(&spec.name, "it has no parent"))?;
        let index = self
            .kernel
            .make_macvtap(name.as_str(), uplink.as_str(), mac, spec.mtu)?;
        self.kernel.set_alias(name.as_str(), &alias(&spec.name))?;
        tap::open_macvtap(index, queues)
    }
}

/// The name of a VM's interface: `vm`, and what tells networks and VMs apart.
fn port_name(network: &NetworkName, vm: &VmName, salt: u64) -> String {
    let hash = crate::hash(&[network.as_str(), vm.as_str(), &salt.to_string()]);
    format!("vm{:012x}", hash & 0xffff_ffff_ffff)
}

fn attachment(
    spec: &NetworkSpec,
    lease: Lease,
    interface: InterfaceName,
    queues: Vec<OwnedFd>,
) -> Attachment {
    let v4 = lease
        .v4
        .zip(spec.v4)
        .and_then(|(a, net)| IpNet::new(a.into(), net.prefix_len()).ok());
    let v6 = lease
        .v6
        .zip(spec.v6)
        .and_then(|(a, net)| IpNet::new(a.into(), net.prefix_len()).ok());
    let host: Vec<IpAddr> = spec.bridge_addresses().iter().map(IpNet::addr).collect();
    Attachment {
        network: spec.name.clone(),
        hostname: lease.vm,
        interface,
        queues,
        mac: lease.mac,
        addresses: v4.into_iter().chain(v6).collect(),
        gateways: if spec.routes() {
            host.clone()
        } else {
            Vec::new()
        },
        dns: if spec.has_resolver() {
            host
        } else {
            Vec::new()
        },
        search: spec.has_resolver().then(|| spec.domain()),
        mtu: spec.mtu,
    }
}
