//! `alveole net`: networks of guests on this host.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use alveole_network::{
    Folders, NetworkName, NetworkRequest, Networks, Report, Rule, Step, read_file,
};
use clap::{Subcommand, ValueEnum};

#[derive(clap::Args)]
#[command(after_help = "\
Changing networks needs CAP_NET_ADMIN (sudo); looking at them needs no rights, and a guest with --net user none at all.")]
pub(crate) struct NetArgs {
    /// Where networks are kept [/var/lib/alveole and /run/alveole; for others than root $XDG_STATE_HOME and $XDG_RUNTIME_DIR]
    #[arg(long, global = true, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a network; what was left of an earlier try is finished
    Create(CreateArgs),
    /// Show all networks
    Ls {
        /// For people or for programs
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Show one network: what it should be, what is missing, whose addresses are whose
    Inspect {
        /// The network
        name: String,
        /// For people or for programs
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Remove networks, and all that was made for them
    Rm {
        /// The networks
        #[arg(required = true)]
        names: Vec<String>,
        /// Also if VMs are on them, which are cut off
        #[arg(long)]
        force: bool,
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Bring up all networks that a file describes, or change their rules
    Up {
        /// A file as resources/machines/three-tier/network.toml
        file: PathBuf,
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove all networks that a file describes
    Down {
        /// The file that `up` was given
        file: PathBuf,
        /// Also if VMs are on them, which are cut off
        #[arg(long)]
        force: bool,
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Do what is left to do after a crash, a reboot or others' changes
    Repair {
        /// Only show what would be done
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(clap::Args)]
struct CreateArgs {
    /// 1 to 15 of a-z, 0-9 and -; its bridge is called so
    name: String,

    /// nat: guests reach the world by this host's addresses; bridge: they are on the parent's network;
    /// isolated: no way out; macvtap: neighbours of the parent, past this host's filter
    #[arg(long, default_value = "nat")]
    mode: String,

    /// Addresses of guests, once for IPv4 and once for IPv6; the first one is this host's [nat, isolated: chosen]
    #[arg(long, value_name = "CIDR")]
    subnet: Vec<String>,

    /// 802.1Q tag on the parent, 1 to 4094
    #[arg(long, value_name = "ID")]
    vlan: Option<u32>,

    /// Interface of this host that leads to the world
    #[arg(long, value_name = "IF")]
    parent: Option<String>,

    /// 1280 to 65521
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u32>,

    /// What happens to what no rule names: open or closed [nat: open, else closed]
    #[arg(long, value_name = "WHAT")]
    egress: Option<String>,

    // Not as a comment: rustdoc would take the brackets for links.
    #[arg(
        long = "rule",
        value_name = "RULE",
        help = "What guests may talk to outside of their network, first match decides: \
                allow|deny[,to=any|outside|host|NETWORK|CIDR][,protocol=tcp|udp|icmp][,port=N[-M]]...[,vm=NAME]"
    )]
    rules: Vec<String>,

    /// Without a resolver and DHCP server (dnsmasq) of its own
    #[arg(long)]
    no_dns: bool,

    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Text,
    Json,
}

pub(crate) fn net(args: &NetArgs) -> anyhow::Result<ExitCode> {
    let folders = args
        .state_dir
        .as_ref()
        .map_or_else(Folders::usual, |folder| Folders::below(folder));
    let networks = Networks::new(folders);
    match &args.command {
        Command::Create(args) => create(&networks, args)?,
        Command::Ls { format } => {
            let reports = networks.list()?;
            crate::print(&match format {
                Format::Text => table(&reports),
                Format::Json => json(&reports)?,
            })?;
        }
        Command::Inspect { name, format } => {
            let name: NetworkName = name.parse()?;
            let report = networks
                .list()?
                .into_iter()
                .find(|report| report.spec.name == name);
            let report =
                report.ok_or_else(|| alveole_network::Error::NoSuchNetwork(name.to_string()))?;
            crate::print(&match format {
                Format::Text => page(&report),
                Format::Json => json(&report)?,
            })?;
        }
        Command::Rm {
            names,
            force,
            dry_run,
        } => {
            let names = names
                .iter()
                .map(|name| name.parse())
                .collect::<Result<Vec<_>, _>>()?;
            go(*dry_run, |watch| networks.remove(&names, *force, watch))?;
        }
        Command::Up { file, dry_run } => {
            let file = read_file(file)?;
            go(*dry_run, |watch| networks.up(&file, watch))?;
        }
        Command::Down {
            file,
            force,
            dry_run,
        } => {
            // What is down already need not be taken down.
            let there = networks.list()?;
            let names: Vec<NetworkName> = read_file(file)?
                .networks
                .into_keys()
                .filter(|name| there.iter().any(|r| r.spec.name == *name))
                .collect();
            go(*dry_run, |watch| networks.remove(&names, *force, watch))?;
        }
        Command::Repair { dry_run } => go(*dry_run, |watch| networks.repair(watch))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn create(networks: &Networks, args: &CreateArgs) -> anyhow::Result<()> {
    let name: NetworkName = args.name.parse()?;
    let rules = args
        .rules
        .iter()
        .map(|rule| rule.parse())
        .collect::<Result<Vec<Rule>, _>>()?;
    let request = NetworkRequest {
        mode: Some(args.mode.clone()),
        subnet: args.subnet.clone(),
        vlan: args.vlan,
        parent: args.parent.clone(),
        mtu: args.mtu,
        egress: args.egress.clone(),
        no_dns: args.no_dns,
        rules,
    };
    go(args.dry_run, |watch| {
        networks.create(&name, &request, watch)
    })
}

/// Does it, or shows the plan.
fn go(
    dry_run: bool,
    work: impl FnOnce(Option<alveole_network::Watch<'_>>) -> Result<Vec<Step>, alveole_network::Error>,
) -> anyhow::Result<()> {
    if !dry_run {
        work(Some(&mut |_| ()))?;
        return Ok(());
    }
    let mut text = String::new();
    let steps = work(None)?;
    if steps.is_empty() {
        text.push_str("nothing to do\n");
    }
    for step in &steps {
        let _ = writeln!(text, "{step}");
    }
    for step in &steps {
        if let Step::LoadRules(rules) = step {
            let _ = write!(text, "\nthe tables:\n{}", rules.text);
        }
    }
    crate::print(&text)
}

fn json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn subnets(report: &Report) -> String {
    let v4 = report.spec.v4.map(|net| net.to_string());
    let v6 = report.spec.v6.map(|net| net.to_string());
    let both: Vec<String> = v4.into_iter().chain(v6).collect();
    if both.is_empty() {
        "-".into()
    } else {
        both.join(" ")
    }
}

fn uplink(report: &Report) -> String {
    match (&report.spec.parent, report.spec.vlan) {
        (None, _) => "-".into(),
        (Some(parent), None) => parent.to_string(),
        (Some(parent), Some(id)) => format!("{parent} VLAN {id}"),
    }
}

fn table(reports: &[Report]) -> String {
    if reports.is_empty() {
        return "no networks: alveole net create NAME makes one\n".into();
    }
    let mut text = format!(
        "{:<15} {:<9} {:<10} {:<22} {:>3}  SUBNETS\n",
        "NAME", "MODE", "STATE", "UPLINK", "VMS"
    );
    for report in reports {
        let running = report.vms.iter().filter(|vm| vm.port.is_some()).count();
        let _ = writeln!(
            text,
            "{:<15} {:<9} {:<10} {:<22} {running:>3}  {}",
            report.spec.name.as_str(),
            report.spec.mode.to_string(),
            report.state,
            uplink(report),
            subnets(report)
        );
    }
    text
}

fn page(report: &Report) -> String {
    let spec = &report.spec;
    let mut text = String::new();
    let mut line = |what: &str, value: &str| {
        let _ = writeln!(text, "{what:<9} {value}");
    };
    line("network", spec.name.as_str());
    line("state", report.state);
    for missing in &report.missing {
        line("missing", missing);
    }
    line("mode", &spec.mode.to_string());
    line("uplink", &uplink(report));
    line("subnets", &subnets(report));
    for gateway in &report.gateway {
        line("gateway", &gateway.to_string());
    }
    if spec.has_resolver() {
        line("names", &format!("VM.{}", spec.domain()));
    }
    line("MTU", &spec.mtu.to_string());
    line("egress", &spec.egress.to_string());
    for rule in &spec.rules {
        line("rule", &rule.to_string());
    }
    for vm in &report.vms {
        let addresses = [vm.v4.map(|a| a.to_string()), vm.v6.map(|a| a.to_string())];
        let addresses: Vec<String> = addresses.into_iter().flatten().collect();
        let port = vm.port.as_ref().map_or_else(
            || "not running".to_owned(),
            |port| port.interface.to_string(),
        );
        line(
            "VM",
            &format!("{} {} {} {port}", vm.vm, vm.mac, addresses.join(" ")),
        );
        for rule in &vm.rules {
            line("", &rule.to_string());
        }
        if let Some(egress) = vm.egress {
            line("", &format!("egress {egress}"));
        }
    }
    text
}
