//! `--net WHAT[,option]...`: a guest's network interfaces, plugged in before this process becomes the VMM.
//!
//! What carries their frames is open by then, and goes over exec by its descriptors: taps and `passt` end with the
//! VMM, however it ends.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;

use alveole_network::guest_config::DeviceConfig;
use alveole_network::user::{Published, USUAL_MTU, UserNetwork, UserRequest};
use alveole_network::{
    Attach, Attachment, Destination, Egress, Folders, Here, InterfaceName, Mac, NetworkName,
    Networks, Plug, Rule, VmName, WordError,
};
use alveole_vm_config::{EgressDefault, LinkKind, NetworkInterface};
use anyhow::{Context, bail};
use clap::{Arg, ArgAction, ArgMatches};
use ipnet::IpNet;
use rustix::io::FdFlags;

const EXPECTED: &str = "write user, NETWORK, tap=IF, macvtap=IF or none, and then ,mac=ADDRESS, ,mtu=BYTES, ,queues=N or ,vhost";

/// What people say about a guest's networks.
#[derive(clap::Args)]
pub(crate) struct NetworkArgs {
    // Not as a comment: rustdoc would take the brackets for links.
    #[arg(
        long,
        value_name = "WHAT[,OPTION]...",
        help = "Network interface: `user` (no rights needed, by passt), the name of a network (alveole net ls), \
                tap=IF or macvtap=IF (an interface of this host), or `none`; \
                then what is special about it: [,mac=ADDRESS][,mtu=BYTES][,queues=N][,vhost]; repeatable \
                [default: user, where passt is installed]"
    )]
    net: Vec<Net>,

    #[arg(
        short = 'p',
        long,
        value_name = "[ADDRESS:]PORT:GUESTPORT[/tcp|/udp]",
        help = "A port of this host that leads to one of the guest (with --net user); without ADDRESS on 127.0.0.1; repeatable"
    )]
    pub(crate) publish: Vec<Published>,

    /// The VM's name: on its networks, by which other guests find it, and its host name [vm-PID]
    #[arg(long)]
    name: Option<VmName>,

    /// What the guest calls itself [the name]
    #[arg(long, value_name = "NAME")]
    hostname: Option<VmName>,

    #[command(flatten)]
    rules: OwnRules,

    /// What happens to what neither --allow nor --deny names, open or closed [the network's rules; without one open]
    #[arg(long, value_name = "WHAT")]
    egress: Option<Egress>,

    /// Where networks are kept, as `alveole net --state-dir` has it
    #[arg(long, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
}

/// The VM's own rules, in the order of the command line: the first that fits decides.
#[derive(Debug, Default)]
struct OwnRules(Vec<Rule>);

impl clap::Args for OwnRules {
    fn augment_args(command: clap::Command) -> clap::Command {
        let rule = |action: &'static str, help: &'static str| {
            Arg::new(action)
                .long(action)
                .value_name("RULE")
                .action(ArgAction::Append)
                .value_parser(move |text: &str| format!("{action},{text}").parse::<Rule>())
                .help(help)
        };
        command
            .arg(rule(
                "allow",
                "What the guest may talk to outside of its networks, before their rules are asked; in user mode and on tap= and \
                 macvtap= the monitor keeps it, and this host is then reached by to=host only: \
                 to=any|outside|host|NETWORK|CIDR[,protocol=tcp|udp|icmp][,port=N[-M]]...; of --allow and --deny the \
                 first match decides; repeatable",
            ))
            .arg(rule("deny", "What it may not, in the same words; repeatable"))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for OwnRules {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut rules = Self::default();
        rules.update_from_arg_matches(matches)?;
        Ok(rules)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let mut placed: Vec<(usize, Rule)> = Vec::new();
        for action in ["allow", "deny"] {
            let places = matches.indices_of(action).into_iter().flatten();
            let rules = matches.get_many::<Rule>(action).into_iter().flatten();
            placed.extend(places.zip(rules.cloned()));
        }
        placed.sort_by_key(|(place, _)| *place);
        self.0 = placed.into_iter().map(|(_, rule)| rule).collect();
        Ok(())
    }
}

/// What carries an interface's frames.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Carrier {
    None,
    User,
    Network(NetworkName),
    Tap(InterfaceName),
    Macvtap(InterfaceName),
}

/// One interface as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Net {
    carrier: Carrier,
    mac: Option<Mac>,
    mtu: Option<u32>,
    queues: Option<u16>,
    /// The host's kernel serves the queues.
    vhost: bool,
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let said = |e: alveole_network::Error| e.to_string();
        let carrier = match words.next().unwrap_or_default() {
            "" => return Err(format!("it names no network; {EXPECTED}")),
            "none" => Carrier::None,
            "user" => Carrier::User,
            word => match word.split_once('=') {
                Some(("tap", name)) => Carrier::Tap(name.parse().map_err(said)?),
                Some(("macvtap", name)) => Carrier::Macvtap(name.parse().map_err(said)?),
                Some(_) => return Err(format!("{word:?} is no kind of network; {EXPECTED}")),
                None => Carrier::Network(word.parse().map_err(|e: WordError| e.to_string())?),
            },
        };
        let mut net = Self {
            carrier,
            mac: None,
            mtu: None,
            queues: None,
            vhost: false,
        };
        for word in words {
            match word.split_once('=') {
                _ if net.carrier == Carrier::None => {
                    return Err(
                        "without a network there is nothing to set: write --net none".into(),
                    );
                }
                None if word == "vhost" && net.carrier == Carrier::User => {
                    return Err(
                        "the host's kernel serves taps, and user mode has none: leave vhost out"
                            .into(),
                    );
                }
                None if word == "vhost" => net.vhost = true,
                Some(("mac", mac)) => net.mac = Some(mac.parse().map_err(said)?),
                Some(("mtu", _)) if matches!(net.carrier, Carrier::Network(_)) => {
                    return Err(
                        "the MTU is the network's, for all on it: alveole net create --mtu sets it"
                            .into(),
                    );
                }
                Some(("mtu", mtu)) => {
                    let bytes = mtu.parse().ok().filter(|mtu| (68..=65_535).contains(mtu));
                    let refusal = || format!("{mtu:?} is no MTU: it is 68 to 65535 bytes");
                    net.mtu = Some(bytes.ok_or_else(refusal)?);
                }
                Some(("queues", _)) if net.carrier == Carrier::User => {
                    return Err("user mode has one queue: leave queues= out".into());
                }
                Some(("queues", queues)) => {
                    let number = queues.parse().ok().filter(|n| (1..=64).contains(n));
                    let refusal = || format!("{queues:?} is no number of queues: it is 1 to 64");
                    net.queues = Some(number.ok_or_else(refusal)?);
                }
                _ => return Err(format!("{word:?} is no option of a network; {EXPECTED}")),
            }
        }
        Ok(net)
    }
}

/// What was made of the words, and begun: user mode starts while this process asks the host what it can.
pub(crate) struct Begun<'a> {
    args: &'a NetworkArgs,
    nets: Vec<Net>,
    name: VmName,
    /// Nobody asked for it: without it the guest has no network, and that is no error.
    by_default: bool,
    user: Option<UserNetwork>,
}

/// Interfaces that are plugged in.
#[derive(Debug, Default)]
pub(crate) struct Plugged {
    /// For the VMM.
    pub(crate) interfaces: Vec<NetworkInterface>,
    /// For the guest's command line; empty if there is nothing to say.
    pub(crate) words: String,
    /// What the VMM is to inherit.
    pub(crate) descriptors: Vec<OwnedFd>,
}

impl NetworkArgs {
    /// The VM's name, if it was given one.
    pub(crate) fn name(&self) -> Option<String> {
        self.name.as_ref().map(ToString::to_string)
    }

    /// What the guest calls itself, if it is not its name.
    pub(crate) fn hostname(&self) -> Option<String> {
        self.hostname.as_ref().map(ToString::to_string)
    }

    /// The words about networks on a command line, in their order, but for the name: what a VM is started by again.
    pub(crate) fn words(matches: &ArgMatches) -> Vec<String> {
        let mut placed = Vec::new();
        for (id, long) in [
            ("net", "net"),
            ("publish", "publish"),
            ("hostname", "hostname"),
            ("allow", "allow"),
            ("deny", "deny"),
            ("egress", "egress"),
            ("state_dir", "state-dir"),
        ] {
            let places = matches.indices_of(id).into_iter().flatten();
            let values = matches.get_raw(id).into_iter().flatten();
            placed.extend(
                places
                    .zip(values)
                    .map(|(place, value)| (place, format!("--{long}={}", value.to_string_lossy()))),
            );
        }
        placed.sort();
        placed.into_iter().map(|(_, word)| word).collect()
    }

    /// That the guest has a network by which its ports can be published.
    pub(crate) fn check_can_publish(&self, word: &str) -> anyhow::Result<()> {
        if self.net.is_empty() || self.net.iter().any(|net| net.carrier == Carrier::User) {
            return Ok(());
        }
        let cure = match self.net.iter().find_map(Net::network) {
            Some(network) => format!(
                "a guest on a network has an address of its own to connect to (alveole net inspect {network} shows it)"
            ),
            None => "add --net user".to_owned(),
        };
        bail!("{word} cannot be published without --net user: {cure}")
    }

    /// Checks what belongs together, and starts what takes a moment. `leads_out`: whether this host is one of which
    /// guests can expect a way to the world; else none is looked for by default.
    pub(crate) fn begin(&self, leads_out: bool) -> anyhow::Result<Begun<'_>> {
        self.check()?;
        let by_default = self.net.is_empty() && self.publish.is_empty();
        let mut nets = self.net.clone();
        if nets.is_empty() && (leads_out || !by_default) {
            nets.push(Net {
                carrier: Carrier::User,
                mac: None,
                mtu: None,
                queues: None,
                vhost: false,
            });
        }
        nets.retain(|net| net.carrier != Carrier::None);
        let name = match &self.name {
            Some(name) => name.clone(),
            None => format!("vm-{}", std::process::id()).parse()?,
        };
        let user = nets.iter().find(|net| net.carrier == Carrier::User);
        let user = user.map(|net| {
            let request = UserRequest {
                published: self.publish.clone(),
                mtu: net.mtu.unwrap_or(USUAL_MTU),
                mac: net.mac,
            };
            UserNetwork::start(&name, &request)
        });
        let user = match user.transpose() {
            Ok(user) => user,
            Err(e) if by_default => {
                hint(&e);
                nets.clear();
                None
            }
            Err(e) => return Err(e.into()),
        };
        Ok(Begun {
            args: self,
            nets,
            name,
            by_default,
            user,
        })
    }

    fn check(&self) -> anyhow::Result<()> {
        for (at, net) in self.net.iter().enumerate() {
            if self.net[..at].iter().any(|n| n.carrier == net.carrier) {
                bail!(
                    "--net {} is given twice: one interface there is what a guest can have",
                    net.carrier
                );
            }
        }
        let has = |carrier| self.net.iter().any(|net| net.carrier == carrier);
        if has(Carrier::None) && self.net.len() > 1 {
            bail!("--net none and another --net contradict each other: leave one out");
        }
        let user = self.net.is_empty() || has(Carrier::User);
        let port = self.publish.first().map(|port| format!("-p {port}"));
        port.map_or(Ok(()), |word| self.check_can_publish(&word))?;
        if self.rules.0.is_empty() && self.egress.is_none() {
            return Ok(());
        }
        if has(Carrier::None) {
            bail!(
                "--allow, --deny and --egress are for what a guest sends, and with --net none it sends nothing: leave one out"
            );
        }
        let by_the_vmm = |net: &&Net| net.network().is_none();
        if let Some(net) = self.net.iter().filter(by_the_vmm).find(|net| net.vhost) {
            bail!(
                "--allow, --deny and --egress cannot be kept with --net {},vhost: the host's kernel serves the queues and asks \
                 no rules; leave vhost out",
                net.carrier
            );
        }
        let of = match self.net.iter().find(by_the_vmm) {
            Some(net) => &net.carrier,
            None if user => &Carrier::User,
            None => return Ok(()),
        };
        let named = |rule: &&Rule| matches!(rule.to, Destination::Network(_)) || rule.vm.is_some();
        if let Some(rule) = self.rules.0.iter().find(named) {
            let what = if rule.vm.is_some() {
                "the rules of one VM are its own: leave vm= out"
            } else {
                "only networks know each other by name: write its addresses (alveole net inspect shows them)"
            };
            let rule = rule.to_string().replacen(',', " ", 1);
            bail!("--{rule} cannot be kept with --net {of}: {what}");
        }
        Ok(())
    }

    /// What of this a guest in the lab cannot have, and why: the lab has neither a way out nor this host's
    /// interfaces.
    pub(crate) fn refused_in_lab(&self) -> Option<String> {
        if let Some(port) = self.publish.first() {
            return Some(format!(
                "-p {port}: nobody outside of the lab reaches a port in it"
            ));
        }
        let refused = |net: &&Net| {
            matches!(
                net.carrier,
                Carrier::User | Carrier::Tap(_) | Carrier::Macvtap(_)
            )
        };
        let net = &self.net.iter().find(refused)?.carrier;
        Some(match net {
            Carrier::User => "--net user: the lab has no way to the world".to_owned(),
            _ => format!("--net {net}: interfaces of this host are not in the lab"),
        })
    }
}

impl Net {
    fn network(&self) -> Option<&NetworkName> {
        match &self.carrier {
            Carrier::Network(name) => Some(name),
            _ => None,
        }
    }

    fn interface(&self, at: usize) -> NetworkInterface {
        let mut interface = NetworkInterface {
            iface_id: format!("net{at}"),
            guest_mac: self.mac.map(|mac| mac.to_string()),
            mtu: self.mtu.map(u64::from),
            num_queue_pairs: self.queues.map(u64::from),
            vhost: self.vhost,
            ..NetworkInterface::default()
        };
        match &self.carrier {
            Carrier::Tap(name) => interface.host_dev_name = name.to_string(),
            Carrier::Macvtap(name) => {
                interface.host_dev_name = name.to_string();
                interface.link = LinkKind::Macvtap;
            }
            _ => interface.link = LinkKind::Fd,
        }
        interface
    }
}

impl std::fmt::Display for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::User => f.write_str("user"),
            Self::Network(name) => name.fmt(f),
            Self::Tap(name) => write!(f, "tap={name}"),
            Self::Macvtap(name) => write!(f, "macvtap={name}"),
        }
    }
}

fn hint(why: &alveole_network::Error) {
    crate::hint(&format!(
        "the guest has no network: {why}; --net none says that none is meant"
    ));
}

impl Begun<'_> {
    /// Plugs everything in.
    pub(crate) fn finish(mut self) -> anyhow::Result<Plugged> {
        if let Some(Err(e)) = self.user.as_mut().map(UserNetwork::wait_until_ready) {
            if !self.by_default {
                return Err(e.into());
            }
            hint(&e);
            self.user = None;
            self.nets.clear();
        }
        let folders = self.args.state_dir.as_ref();
        let folders = folders.map_or_else(Folders::usual, |folder| Folders::below(folder));
        let networks = Networks::new(folders);
        let mut attached = Vec::new();
        let done = self.plug(&networks, &mut attached);
        if done.is_err() {
            for network in attached {
                if let Err(e) = networks.detach(&network, &self.name) {
                    crate::hint(&format!("warning: {e}"));
                }
            }
        }
        done
    }

    fn plug(
        &mut self,
        networks: &Networks,
        attached: &mut Vec<NetworkName>,
    ) -> anyhow::Result<Plugged> {
        let mut plugged = Plugged::default();
        let mut devices: Vec<DeviceConfig> = Vec::new();
        for (at, net) in self.nets.iter().enumerate() {
            let mut interface = net.interface(at);
            let config = match &net.carrier {
                Carrier::None => None,
                Carrier::Tap(_) | Carrier::Macvtap(_) => {
                    interface.egress = self.egress(&[])?;
                    None
                }
                Carrier::User => {
                    let Some(user) = self.user.take() else {
                        continue;
                    };
                    let config = user.guest().clone();
                    let socket = user.release().context("user mode has no socket")?;
                    interface.host_dev_name = socket.as_raw_fd().to_string();
                    interface.egress = self.egress(&config.dns)?;
                    plugged.descriptors.push(socket);
                    Some(config)
                }
                Carrier::Network(name) => {
                    let attachment = self.attach(networks, name, net)?;
                    attached.push(name.clone());
                    let config = attachment.device_config();
                    let queues = attachment.queues.iter();
                    let queues: Vec<_> = queues.map(|fd| fd.as_raw_fd().to_string()).collect();
                    interface.host_dev_name = queues.join(",");
                    plugged.descriptors.extend(attachment.queues);
                    Some(config)
                }
            };
            if let Some(config) = config {
                interface.guest_mac = Some(config.mac.to_string());
                interface.mtu = config.mtu.map(u64::from);
                devices.push(config);
            }
            plugged.interfaces.push(interface);
        }
        plugged.words = self.words(&devices);
        Ok(plugged)
    }

    /// What the VMM is to keep of the guest's rules; none if there are none. With rules an interface has what a `nat` network
    /// has: this host is opened by its own word only.
    fn egress(&self, resolvers: &[IpAddr]) -> anyhow::Result<Option<alveole_vm_config::Egress>> {
        let args = self.args;
        if args.rules.0.is_empty() && args.egress.is_none() {
            return Ok(None);
        }
        let Here { host, guests } = Here::ask()?;
        let written = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect();
        Ok(Some(alveole_vm_config::Egress {
            rules: args.rules.0.iter().map(ToString::to_string).collect(),
            default: match args.egress {
                Some(Egress::Closed) => EgressDefault::Closed,
                Some(Egress::Open) | None => EgressDefault::Open,
            },
            host: written(&host),
            guests: written(&guests),
            resolvers: resolvers.iter().map(ToString::to_string).collect(),
        }))
    }

    fn attach(
        &self,
        networks: &Networks,
        name: &NetworkName,
        net: &Net,
    ) -> anyhow::Result<Attachment> {
        let attach = Attach {
            plug: Plug::Tap {
                queues: net.queues.unwrap_or(1),
                owner: rustix::process::getuid().as_raw(),
                persist: false,
            },
            mac: net.mac,
            // exec keeps it: it is the VMM's as well.
            process: Some(std::process::id()),
            rules: self.args.rules.0.clone(),
            egress: self.args.egress,
        };
        Ok(networks.attach(name, &self.name, &attach)?)
    }

    /// What the guest is told. A name that nobody gave it, and by which nobody finds it, is not worth a word.
    fn words(&self, devices: &[DeviceConfig]) -> String {
        let mut words: Vec<String> = devices.iter().map(DeviceConfig::word).collect();
        let named = self.args.name.is_some() || self.nets.iter().any(|net| net.network().is_some());
        let hostname = self.args.hostname.as_ref().or(named.then_some(&self.name));
        words.extend(hostname.map(|name| format!("alveole.hostname={name}")));
        words.join(" ")
    }
}

/// Lets the program that this process becomes have them.
pub(crate) fn keep_over_exec(descriptors: &[OwnedFd]) -> anyhow::Result<()> {
    for fd in descriptors {
        rustix::io::fcntl_setfd(fd, FdFlags::empty())
            .context("cannot hand a network interface to the VMM")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Net;
    use crate::run::tests::parse;

    #[test]
    fn vhost_is_for_taps() {
        for (words, vhost) in [
            ("front", false),
            ("front,vhost", true),
            ("tap=t,queues=2,vhost", true),
        ] {
            let net: Net = words.parse().unwrap();
            assert_eq!(net.interface(0).vhost, vhost, "{words}");
        }
        for (words, want) in [
            ("user,vhost", "leave vhost out"),
            ("front,vhost=1", "no option"),
            ("none,vhost", "nothing to set"),
        ] {
            let e = words.parse::<Net>().unwrap_err();
            assert!(e.contains(want), "{words}: {e}");
        }
    }

    #[test]
    fn rules_are_for_who_can_keep_them() {
        let said = |words: &str| {
            let words: Vec<&str> = words.split(' ').collect();
            parse(&words).network.check().map_err(|e| e.to_string())
        };
        for good in [
            "--allow to=host",
            "--net user --egress closed",
            "--net user --allow to=10.0.0.0/8,protocol=tcp,port=443 --deny to=outside",
            "--net tap=t --deny to=any",
            "--net macvtap=t --egress open",
            "--net front --allow to=back",
            "--net front,vhost --allow to=back",
            "--net user --net front --allow to=host",
        ] {
            assert_eq!(said(good), Ok(()), "{good}");
        }
        for (bad, parts) in [
            (
                "--net none --egress closed",
                ["it sends nothing", "leave one out"],
            ),
            (
                "--net tap=t,vhost --deny to=any",
                ["--net tap=t,vhost", "leave vhost out"],
            ),
            (
                "--net user --allow to=back",
                ["--allow to=back", "write its addresses"],
            ),
            ("--deny to=back", ["--net user", "write its addresses"]),
            (
                "--net front --net user --allow to=back",
                ["--net user", "write its addresses"],
            ),
            (
                "--net tap=t --deny to=any,vm=web",
                ["--deny to=any,vm=web", "leave vm= out"],
            ),
        ] {
            let e = said(bad).unwrap_err();
            assert!(parts.iter().all(|part| e.contains(part)), "{bad}: {e}");
        }
    }

    #[test]
    fn the_monitor_is_told_the_rules_and_their_words() {
        let words = [
            "--net",
            "user",
            "--deny",
            "to=10.0.0.0/8",
            "--allow",
            "to=host",
            "--egress",
            "closed",
        ];
        let (some, none) = (parse(&words), parse(&["--net", "user"]));
        let told = |run: &crate::run::RunArgs| {
            let begun = super::Begun {
                args: &run.network,
                nets: Vec::new(),
                name: "vm".parse().unwrap(),
                by_default: false,
                user: None,
            };
            begun.egress(&["192.0.2.53".parse().unwrap()]).unwrap()
        };
        let egress = told(&some).unwrap();
        assert_eq!(egress.rules, ["deny,to=10.0.0.0/8", "allow,to=host"]);
        assert_eq!(egress.default, alveole_vm_config::EgressDefault::Closed);
        assert!(
            egress.host.contains(&"127.0.0.0/8".to_owned()),
            "{egress:?}"
        );
        assert_eq!(egress.resolvers, ["192.0.2.53"]);
        assert_eq!(told(&none), None);
    }

    #[test]
    fn rules_keep_the_order_in_which_they_are_given() {
        let words = [
            "--deny",
            "to=10.1.0.0/16",
            "--allow",
            "to=10.0.0.0/8,protocol=tcp,port=443",
            "--deny",
            "to=any",
        ];
        let rules = parse(&words).network.rules.0;
        let told: Vec<_> = rules.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "deny,to=10.1.0.0/16",
                "allow,to=10.0.0.0/8,protocol=tcp,port=443",
                "deny,to=any"
            ]
        );
    }
}
