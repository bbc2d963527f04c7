//! All networks of this host: made, changed, removed, and VMs plugged into them.
//!
//! Every change goes the same way: the state is written, then the difference to what is is made up
//! ([`plan`]). Whoever comes next after a crash does what is left.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;

use crate::Error;
use crate::file::{NetworkFile, go_together, names_known};
use crate::host;
use crate::kernel::Kernel;
use crate::lease::{self, Lease, Port};
use crate::plan::{Desired, Observed, Step, plan};
use crate::spec::{NetworkRequest, NetworkSpec, choose_subnets};
use crate::state::{Folders, NetworkState, State, look};
use crate::words::{InterfaceName, NetworkName, VmName};

/// Called before each step.
pub type Watch<'a> = &'a mut dyn FnMut(&Step);

/// The networks of a state directory.
#[derive(Clone, Debug)]
pub struct Networks {
    pub(crate) folders: Folders,
}

/// A network as it is.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What it should be.
    #[serde(flatten)]
    pub spec: NetworkSpec,
    /// `up`; `incomplete`: what should be is not all there; `blocked`: and something of this host is in the way.
    pub state: &'static str,
    /// What is missing, or in the way.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// This host's addresses on it.
    pub gateway: Vec<IpAddr>,
    /// VMs that have addresses on it.
    pub vms: Vec<Lease>,
}

impl Networks {
    /// Those kept in these folders.
    #[must_use]
    pub fn new(folders: Folders) -> Self {
        Self { folders }
    }

    /// Makes a network, or finishes one that was made with the same words before. With `watch` none, only
    /// shows the steps.
    ///
    /// # Errors
    ///
    /// Anything in [`Error`]; what was begun is taken back.
    pub fn create(
        &self,
        name: &NetworkName,
        request: &NetworkRequest,
        watch: Option<Watch<'_>>,
    ) -> Result<Vec<Step>, Error> {
        let mut session = Session::open(&self.folders, watch.is_some())?;
        let mut spec = request.check(name)?;
        if let Some(network) = session.networks.get(name) {
            let there = &network.spec;
            if request.subnet.is_empty() {
                (spec.v4, spec.v6) = (there.v4, there.v6);
            }
            if *there != spec {
                let why = format!(
                    "it is there already, with another {}: `alveole net rm {name}` first",
                    difference(there, &spec)
                );
                return Err(Error::conflict(name, why));
            }
        } else {
            session.choose(&mut spec)?;
            names_known(&spec.rules, |n| {
                n == name || session.networks.contains_key(n)
            })?;
            for other in session.networks.values() {
                go_together(&spec, &other.spec)?;
            }
        }
        session.establish(vec![spec], watch)
    }

    /// Brings all networks of a file up, and changes those that are there where that is possible while
    /// guests run: rules, egress, names.
    ///
    /// # Errors
    ///
    /// Anything in [`Error`]; networks that were begun are taken back.
    pub fn up(&self, file: &NetworkFile, watch: Option<Watch<'_>>) -> Result<Vec<Step>, Error> {
        let mut session = Session::open(&self.folders, watch.is_some())?;
        let mut specs = Vec::new();
        for spec in file.networks.values() {
            let mut spec = spec.clone();
            if let Some(network) = session.networks.get(&spec.name) {
                let there = &network.spec;
                if !spec.has_addresses() && there.mode == spec.mode {
                    (spec.v4, spec.v6) = (there.v4, there.v6);
                }
                let fixed = NetworkSpec {
                    rules: spec.rules.clone(),
                    egress: spec.egress,
                    dns: spec.dns,
                    ..there.clone()
                };
                if fixed != spec {
                    let why = format!(
                        "it is there already, with another {}: `alveole net rm {}` first",
                        difference(&fixed, &spec),
                        spec.name
                    );
                    return Err(Error::conflict(&spec.name, why));
                }
            } else {
                session.choose(&mut spec)?;
            }
            names_known(&spec.rules, |n| {
                file.networks.contains_key(n) || session.networks.contains_key(n)
            })?;
            specs.push(spec);
        }
        for spec in &specs {
            for other in specs
                .iter()
                .chain(session.networks.values().map(|n| &n.spec))
                .filter(|o| o.name != spec.name)
            {
                go_together(spec, other)?;
            }
        }
        session.establish(specs, watch)
    }

    /// Removes networks, with all that was made for them and nothing else. With `watch` none, only shows the steps.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchNetwork`]; [`Error::Conflict`] if VMs are plugged in, unless `force`; what the host refuses.
    pub fn remove(
        &self,
        names: &[NetworkName],
        force: bool,
        mut watch: Option<Watch<'_>>,
    ) -> Result<Vec<Step>, Error> {
        let mut session = Session::open(&self.folders, watch.is_some())?;
        for name in names {
            let network = session
                .networks
                .get_mut(name)
                .ok_or_else(|| Error::NoSuchNetwork(name.to_string()))?;
            let plugged: Vec<&str> = network
                .leases
                .iter()
                .filter(|l| l.port.is_some())
                .map(|l| l.vm.as_str())
                .collect();
            if !plugged.is_empty() && !force {
                let why = format!(
                    "VMs are on it: {}; stop them, or say --force to cut them off",
                    plugged.join(", ")
                );
                return Err(Error::conflict(name, why));
            }
            network.removing = true;
            if watch.is_some() {
                session.state.save(network)?;
            }
        }
        session.reconcile(&[], &mut watch)
    }

    /// Does what is left to do after a crash, a reboot or others' changes.
    ///
    /// # Errors
    ///
    /// What the host refuses.
    pub fn repair(&self, mut watch: Option<Watch<'_>>) -> Result<Vec<Step>, Error> {
        let mut session = Session::open(&self.folders, watch.is_some())?;
        session.reconcile(&[], &mut watch)
    }

    /// All networks as they are. Takes no lock and needs no rights.
    ///
    /// # Errors
    ///
    /// [`Error::DamagedState`], [`Error::File`], and if the kernel tells nothing.
    pub fn list(&self) -> Result<Vec<Report>, Error> {
        let mut networks = look(&self.folders)?;
        for network in networks.values_mut() {
            for lease in &mut network.leases {
                lease.port = lease.port.take().filter(Port::is_live);
            }
        }
        let observed = host::observe(&mut Kernel::open()?, Default::default(), &self.folders.run)?;
        let desired = Desired::new(networks.clone(), &self.folders.run);
        let plan = plan(&desired, &observed);
        Ok(networks
            .into_values()
            .map(|network| report(network, &plan, &observed))
            .collect())
    }
}

/// What differs between two networks, in the words of the command line.
fn difference(a: &NetworkSpec, b: &NetworkSpec) -> String {
    let pairs = [
        ("mode", a.mode != b.mode),
        ("subnet", (a.v4, a.v6) != (b.v4, b.v6)),
        ("parent", a.parent != b.parent),
        ("VLAN", a.vlan != b.vlan),
        ("MTU", a.mtu != b.mtu),
        ("egress", a.egress != b.egress),
        ("DNS", a.dns != b.dns),
        ("list of rules", a.rules != b.rules),
    ];
    let names: Vec<&str> = pairs.iter().filter(|p| p.1).map(|p| p.0).collect();
    names.join(", ")
}

fn report(network: NetworkState, plan: &crate::plan::Plan, observed: &Observed) -> Report {
    let spec = network.spec;
    let name = &spec.name;
    let problem = plan
        .problems
        .iter()
        .find(|(of, _)| of == name)
        .map(|(_, e)| e.to_string());
    let uplink = spec.uplink();
    let concerns = |step: &&Step| match step {
        Step::MakeBridge { name: link, .. }
        | Step::MakeVlan { name: link, .. }
        | Step::Mtu { link, .. }
        | Step::Up { link }
        | Step::AddAddress { link, .. } => {
            link == name.as_str() || uplink.as_ref().is_some_and(|u| link == u.as_str())
        }
        Step::Join { bridge, .. } => bridge == name.as_str(),
        Step::StartResolver { network, .. } => network == name,
        // A network without a bridge has no filter.
        Step::LoadRules(_) => spec.has_bridge() && !observed.blind,
        _ => false,
    };
    let mut missing: Vec<String> = plan
        .steps
        .iter()
        .filter(concerns)
        .map(ToString::to_string)
        .collect();
    let state = match (&problem, network.removing || !missing.is_empty()) {
        (Some(_), _) => "blocked",
        (None, true) => "incomplete",
        (None, false) => "up",
    };
    if network.removing {
        missing = vec!["its removal was not finished: alveole net repair".into()];
    }
    missing.extend(problem);
    let gateway = spec.bridge_addresses().iter().map(IpNet::addr).collect();
    Report {
        spec,
        state,
        missing,
        gateway,
        vms: network.leases,
    }
}

/// The state directory under lock, and a connection to the kernel.
pub(crate) struct Session {
    pub(crate) state: State,
    pub(crate) kernel: Kernel,
    pub(crate) networks: BTreeMap<NetworkName, NetworkState>,
    /// Interfaces of others that were plugged in and are to be let go.
    leaving: Vec<InterfaceName>,
    /// Whether something of an attachment may have been done.
    pub(crate) began: bool,
}

impl Session {
    pub(crate) fn open(folders: &Folders, changes: bool) -> Result<Self, Error> {
        if changes {
            let rights = capabilities(None)
                .map_err(|e| Error::kernel("ask for the rights of this process", e.into()))?;
            if !rights.effective.contains(CapabilitySet::NET_ADMIN) {
                return Err(Error::kernel(
                    "change networks of this host",
                    rustix::io::Errno::PERM.into(),
                ));
            }
        }
        let state = State::lock(folders)?;
        let mut session = Self {
            kernel: Kernel::open()?,
            networks: state.networks()?,
            state,
            leaving: Vec::new(),
            began: false,
        };
        session.drop_dead()?;
        Ok(session)
    }

    /// Unplugs VMs whose process is gone.
    fn drop_dead(&mut self) -> Result<(), Error> {
        for network in self.networks.values_mut() {
            let dead: Vec<VmName> = network
                .leases
                .iter()
                .filter(|l| l.port.as_ref().is_some_and(|p| !p.is_live()))
                .map(|l| l.vm.clone())
                .collect();
            if dead.is_empty() {
                continue;
            }
            for vm in &dead {
                self.leaving.extend(
                    lease::idle(&mut network.leases, vm)
                        .filter(|p| !p.ours)
                        .map(|p| p.interface),
                );
            }
            self.state.save(network)?;
        }
        Ok(())
    }

    pub(crate) fn unplug(&mut self, network: &NetworkName, vm: &VmName) {
        if let Some(network) = self.networks.get_mut(network) {
            self.leaving.extend(
                lease::idle(&mut network.leases, vm)
                    .filter(|p| !p.ours)
                    .map(|p| p.interface),
            );
            if let Err(e) = self.state.save(network) {
                log::warn!("{e}");
            }
        }
    }

    fn observe(&mut self) -> Result<Observed, Error> {
        host::observe(
            &mut self.kernel,
            self.state.settings()?,
            self.state.run_folder(),
        )
    }

    fn choose(&mut self, spec: &mut NetworkSpec) -> Result<(), Error> {
        let seen = self.kernel.look()?;
        let mut taken: Vec<IpNet> = seen.routes.into_iter().map(|r| r.to).collect();
        for network in self.networks.values() {
            taken.extend(network.spec.v4.map(IpNet::V4));
            taken.extend(network.spec.v6.map(IpNet::V6));
        }
        choose_subnets(spec, &taken)
    }

    /// Makes networks be as they should; those that are new and cannot be are taken back.
    fn establish(
        &mut self,
        specs: Vec<NetworkSpec>,
        mut watch: Option<Watch<'_>>,
    ) -> Result<Vec<Step>, Error> {
        let names: Vec<NetworkName> = specs.iter().map(|s| s.name.clone()).collect();
        let mut new = Vec::new();
        for spec in specs {
            let name = spec.name.clone();
            let network = match self.networks.remove(&name) {
                Some(mut network) => {
                    (network.spec, network.removing) = (spec, false);
                    network
                }
                None => {
                    new.push(name.clone());
                    NetworkState::new(spec)
                }
            };
            self.networks.insert(name, network);
        }
        // What cannot be is said before anything is written.
        let observed = self.observe()?;
        let mut plan = plan(&self.desired(), &observed);
        if let Some(at) = plan
            .problems
            .iter()
            .position(|(name, _)| names.contains(name))
        {
            return Err(plan.problems.swap_remove(at).1);
        }
        if watch.is_some() {
            for name in &names {
                self.state.save(&self.networks[name])?;
            }
        }
        let done = self.reconcile(&names, &mut watch);
        if done.is_err() && watch.is_some() && !new.is_empty() {
            for name in &new {
                if let Some(network) = self.networks.get_mut(name) {
                    network.removing = true;
                    self.state.save(network)?;
                }
            }
            if let Err(e) = self.reconcile(&[], &mut Some(&mut |_| ())) {
                log::warn!(
                    "what was begun could not be taken back, `alveole net repair` tries again: {e}"
                );
            }
        }
        done
    }

    fn desired(&self) -> Desired {
        let stay = self.networks.iter().filter(|(_, n)| !n.removing);
        Desired::new(
            stay.map(|(name, n)| (name.clone(), n.clone())).collect(),
            self.state.run_folder(),
        )
    }

    /// Makes up the difference, or only shows it. What is in the way of `targets` is an error, of others a warning.
    pub(crate) fn reconcile(
        &mut self,
        targets: &[NetworkName],
        watch: &mut Option<Watch<'_>>,
    ) -> Result<Vec<Step>, Error> {
        let observed = self.observe()?;
        let mut plan = plan(&self.desired(), &observed);
        if let Some(at) = plan
            .problems
            .iter()
            .position(|(name, _)| targets.contains(name))
        {
            return Err(plan.problems.swap_remove(at).1);
        }
        for link in std::mem::take(&mut self.leaving) {
            let master = observed
                .links
                .get(link.as_str())
                .and_then(|l| l.master.as_deref());
            // Somebody may have put it elsewhere by now.
            if master.is_some_and(|m| self.networks.keys().any(|n| n.as_str() == m)) {
                plan.steps.insert(0, Step::Leave { link: link.into() });
            }
        }
        let Some(watch) = watch else {
            return Ok(plan.steps);
        };
        for (_, e) in plan.problems {
            log::warn!("{e}");
        }
        for step in &plan.steps {
            watch(step);
            host::apply(&mut self.kernel, &self.state, step)?;
        }
        let gone: Vec<NetworkName> = self
            .networks
            .iter()
            .filter(|(_, n)| n.removing)
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.state.forget(&name)?;
            self.networks.remove(&name);
        }
        Ok(plan.steps)
    }
}
