//! What this host is, and the steps of a plan carried out on it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Error;
use crate::kernel::Kernel;
use crate::plan::{FORWARD4, FORWARD6, Observed, Step, accept_ra};
use crate::programs;
use crate::resolver;
use crate::rules::{MARK, REMOVE, TABLE};
use crate::state::{SettingsBefore, State};

const SETTINGS: &str = "/proc/sys";

/// Looks at this host.
pub(crate) fn observe(
    kernel: &mut Kernel,
    before: SettingsBefore,
    run: &Path,
) -> Result<Observed, Error> {
    let seen = kernel.look()?;
    let filters = filters();
    let mut observed = Observed {
        links: seen.links,
        routes: seen.routes,
        blind: filters.is_none(),
        rules: filters.as_ref().and_then(|chains| loaded(chains)),
        others_forward: filters.is_some_and(|chains| others_forward(&chains)) || old_iptables(),
        before,
        resolvers: resolver::observe(run).into_iter().collect(),
        ..Observed::default()
    };
    for interface in seen.advertised {
        // 2 already means what would have to be said.
        if setting(&accept_ra(&interface)).as_deref() == Some("1") {
            observed.advertised.insert(interface);
        }
    }
    let keys = [FORWARD4.to_owned(), FORWARD6.to_owned()].into_iter();
    let keys = keys
        .chain(observed.advertised.iter().map(|i| accept_ra(i)))
        .chain(observed.before.keys().cloned());
    observed.settings = keys
        .filter_map(|key| Some((key.clone(), setting(&key)?)))
        .collect();
    Ok(observed)
}

fn setting(key: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new(SETTINGS).join(key)).ok()?;
    Some(text.trim().to_owned())
}

fn set(key: &str, value: &str) -> Result<(), Error> {
    let path = Path::new(SETTINGS).join(key);
    fs::write(&path, value).map_err(|e| Error::kernel(format!("set {key} to {value}"), e))
}

/// All chains of nftables, without their rules; none where they cannot be seen.
fn filters() -> Option<Vec<Value>> {
    let nft = programs::find("nft")?;
    let done = Command::new(nft)
        .args(["-j", "list", "chains"])
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let listed: Value = serde_json::from_slice(&done.stdout).ok()?;
    let chains = listed["nftables"].as_array()?;
    Some(
        chains
            .iter()
            .filter_map(|item| item.get("chain"))
            .cloned()
            .collect(),
    )
}

/// The digest of what was loaded; empty if our tables are there without one.
fn loaded(chains: &[Value]) -> Option<String> {
    let mut ours = chains.iter().filter(|c| c["table"] == TABLE).peekable();
    ours.peek()?;
    let digest = ours
        .find_map(|c| c["name"].as_str()?.strip_prefix(MARK))
        .unwrap_or_default();
    Some(digest.to_owned())
}

/// Whether another table than ours filters or translates what passes this host, as those who forward do.
fn others_forward(chains: &[Value]) -> bool {
    let passes =
        |c: &Value| c["hook"] == "forward" || c["type"] == "nat" && c["hook"] == "postrouting";
    let routed = |c: &Value| matches!(c["family"].as_str(), Some("ip" | "ip6" | "inet"));
    chains
        .iter()
        .any(|c| c["table"] != TABLE && routed(c) && passes(c))
}

/// Whether the iptables from before nftables have tables.
fn old_iptables() -> bool {
    [
        "/proc/thread-self/net/ip_tables_names",
        "/proc/thread-self/net/ip6_tables_names",
    ]
    .iter()
    .any(|path| {
        let names = fs::read_to_string(path).unwrap_or_default();
        names.lines().any(|name| name == "nat" || name == "filter")
    })
}

fn load(text: &str) -> Result<(), Error> {
    let nft = programs::find("nft").ok_or(Error::NoProgram {
        program: "nft",
        package: "nftables",
    })?;
    let failed = |said: String| Error::Program {
        program: "nft",
        act: "change the tables 'alveole'".into(),
        said,
    };
    let run = || -> io::Result<std::process::Output> {
        let mut child = Command::new(nft)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends early says why.
            let _ = stdin.write_all(text.as_bytes());
        }
        child.wait_with_output()
    };
    let done = run().map_err(|e| failed(e.to_string()))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let first: Vec<&str> = said.lines().take(3).collect();
    Err(failed(format!(
        "{} (it needs CAP_NET_ADMIN and a kernel with nftables)",
        first.join(" ")
    )))
}

/// Does one step.
pub(crate) fn apply(kernel: &mut Kernel, state: &State, step: &Step) -> Result<(), Error> {
    let run = state.run_folder();
    match step {
        Step::KeepSetting { key, before } => change_settings(state, |settings| {
            settings
                .entry(key.clone())
                .or_insert_with(|| before.clone());
        }),
        Step::Set { key, value } => set(key, value),
        Step::ForgetSetting { key } => change_settings(state, |settings| {
            settings.remove(key);
        }),
        Step::LoadRules(rules) => load(&rules.text),
        Step::RemoveRules => load(REMOVE),
        Step::MakeBridge { name, mac, mtu } => kernel.make_bridge(name, *mac, *mtu),
        Step::MakeVlan { name, parent, id } => kernel.make_vlan(name, parent, *id),
        Step::Alias { link, text } => kernel.set_alias(link, text),
        Step::Mtu { link, mtu } => kernel.set_mtu(link, *mtu),
        // A host without IPv6 has no such setting, and nothing to be quiet about.
        Step::Quiet { link } => {
            let key = format!("net/ipv6/conf/{link}/disable_ipv6");
            setting(&key).map_or(Ok(()), |_| set(&key, "1"))
        }
        Step::Join { link, bridge } => kernel.join(link, bridge),
        Step::Leave { link } => kernel.leave(link),
        Step::Up { link } => kernel.up(link),
        Step::AddAddress { link, address } => kernel.add_address(link, address),
        Step::RemoveLink { link } => kernel.remove(link),
        Step::StartResolver { network, answers } => resolver::start(run, network, answers),
        Step::ReloadResolver { network, answers } => resolver::reload(run, network, answers),
        Step::StopResolver { network } => resolver::stop(run, network),
    }
}

fn change_settings(
    state: &State,
    change: impl FnOnce(&mut BTreeMap<String, String>),
) -> Result<(), Error> {
    let mut settings = state.settings()?;
    change(&mut settings);
    state.save_settings(&settings)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_of_others_are_told_from_ours() {
        let ours = json!({"family": "inet", "table": "alveole", "name": "forward", "type": "filter", "hook": "forward"});
        let mark = json!({"family": "inet", "table": "alveole", "name": "loaded_0123"});
        let docker = json!({"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter", "hook": "forward"});
        let firewall = json!({"family": "inet", "table": "filter", "name": "input", "type": "filter", "hook": "input"});
        assert_eq!(loaded(std::slice::from_ref(&firewall)), None);
        assert_eq!(loaded(std::slice::from_ref(&ours)), Some(String::new()));
        assert_eq!(loaded(&[ours.clone(), mark]), Some("0123".into()));
        assert!(!others_forward(&[ours.clone(), firewall]));
        assert!(others_forward(&[ours, docker]));
    }
}
