//! Networks described together in one file of TOML: what `alveole net up` brings up.
//!
//! ```toml
//! [network.front]
//! mode = "bridge"
//! subnet = ["10.0.10.0/24", "fd00:10::/64"]
//! parent = "eth1"
//! vlan = 10
//! rules = [{ action = "allow", to = "back", protocol = "tcp", ports = ["5432"] }]
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::Error;
use crate::spec::{NetworkRequest, NetworkSpec, overlaps};
use crate::words::NetworkName;
use alveole_egress_rules::{Destination, Rule};

/// Largest file, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Networks that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkFile {
    /// Each checked, and checked to go together.
    pub networks: BTreeMap<NetworkName, NetworkSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    #[serde(default)]
    network: BTreeMap<NetworkName, NetworkRequest>,
}

/// Reads a file of networks.
///
/// # Errors
///
/// [`Error::File`] if it cannot be read, [`Error::Word`] or [`Error::Conflict`] for what it says.
pub fn read_file(path: &Path) -> Result<NetworkFile, Error> {
    let failed = |e| Error::file("read", path, e);
    let length = fs::metadata(path).map_err(failed)?.len();
    if length > MOST_BYTES {
        return Err(Error::word(
            "file",
            &path.display().to_string(),
            format!("it has {length} bytes, {MOST_BYTES} are the most"),
        ));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    parse(&text, &path.display().to_string())
}

fn parse(text: &str, file: &str) -> Result<NetworkFile, Error> {
    let wire: Wire = toml::from_str(text)
        .map_err(|e| Error::word("file", file, e.to_string().trim().to_owned()))?;
    if wire.network.is_empty() {
        return Err(Error::word(
            "file",
            file,
            "it describes no network: begin one with [network.NAME]",
        ));
    }
    let mut networks = BTreeMap::new();
    for (name, request) in wire.network {
        let spec = request.check(&name)?;
        networks.insert(name, spec);
    }
    for spec in networks.values() {
        for other in networks.values().filter(|other| other.name < spec.name) {
            go_together(spec, other)?;
        }
    }
    Ok(NetworkFile { networks })
}

/// Whether two networks can be on one host.
pub(crate) fn go_together(spec: &NetworkSpec, other: &NetworkSpec) -> Result<(), Error> {
    let nets = |s: &NetworkSpec| [s.v4.map(ipnet::IpNet::V4), s.v6.map(ipnet::IpNet::V6)];
    for net in nets(spec).into_iter().flatten() {
        if let Some(theirs) = nets(other)
            .into_iter()
            .flatten()
            .find(|theirs| overlaps(&net, theirs))
        {
            let why = format!(
                "its subnet {net} overlaps {theirs} of network '{}': take another --subnet",
                other.name
            );
            return Err(Error::conflict(&spec.name, why));
        }
    }
    // Macvtaps share their parent with each other, and with nobody else.
    let shared = !spec.has_bridge() && !other.has_bridge() && spec.vlan.is_none();
    if let (Some(uplink), Some(theirs)) = (spec.uplink(), other.uplink())
        && uplink == theirs
        && !shared
    {
        let why = format!(
            "network '{}' is on '{uplink}' already: give it another VLAN or parent",
            other.name
        );
        return Err(Error::conflict(&spec.name, why));
    }
    Ok(())
}

/// Whether each network that rules name is there.
pub(crate) fn names_known(
    rules: &[Rule],
    known: impl Fn(&NetworkName) -> bool,
) -> Result<(), Error> {
    for rule in rules {
        if let Destination::Network(name) = &rule.to
            && !known(name)
        {
            let why = format!(
                "there is no network '{name}': make it first, or bring both up from one file (alveole net up)"
            );
            return Err(Error::word("rule", &rule.to_string(), why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_what_it_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../resources/machines/three-tier/network.toml");
        let file = read_file(&path).unwrap();
        let vlans: Vec<_> = file
            .networks
            .values()
            .map(|s| (s.name.as_str(), s.vlan))
            .collect();
        assert_eq!(
            vlans,
            [
                ("back", Some(30)),
                ("front", Some(10)),
                ("middle", Some(20))
            ]
        );
    }

    #[test]
    fn wrong_files_are_refused_by_what_is_wrong() {
        for (text, word) in [
            ("", "no network"),
            ("[network.a]\nmode = \"nat\"\nmtu = \"big\"", "line 3"),
            ("[network.a]\ncolour = 1", "colour"),
            ("[network.Big]", "'B'"),
            (
                "[network.a]\nvlan = 4095\nmode = \"bridge\"\nparent = \"eth0\"",
                "1 to 4094",
            ),
            (
                "[network.a]\nrules = [{ action = \"allow\", to = \"any\", ports = [\"1\"] }]",
                "only tcp and udp",
            ),
            (
                "[network.a]\nsubnet = [\"10.0.0.0/8\"]\n[network.b]\nsubnet = [\"10.1.0.0/16\"]",
                "overlaps 10.0.0.0/8 of network 'a'",
            ),
            (
                "[network.a]\nmode = \"bridge\"\nparent = \"e\"\nvlan = 2\n[network.b]\nmode = \"bridge\"\nparent = \"e\"\nvlan = 2",
                "on 'e.2' already",
            ),
        ] {
            let said = parse(text, "x.toml").unwrap_err().to_string();
            assert!(said.contains(word), "{text}: {said}");
        }
    }
}
