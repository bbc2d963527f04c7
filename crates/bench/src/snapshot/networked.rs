//! Taps for a guest and its copies, and what is said of them: each guest has one interface, and nobody is behind it.
//!
//! Does not know what is measured.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// What guests with a network are told besides: the init of `tools/guest-initramfs` sets the interface up and runs the same program that is the
/// init of the others. No word of it is measured.
pub(super) const GUEST_ARGUMENTS: &str = concat!(
    " alveole.net=06:00:ac:1f:4e:02,ip=172.31.78.2/24",
    " alveole.do=run:/bin/bench-snapshot"
);
const GUEST_MAC: &str = "06:00:ac:1f:4e:02";
const INTERFACE: &str = "eth0";
pub(super) const INTERFACE_PATH: &str = "/network-interfaces/eth0";
/// The key of a load's body.
pub(super) const OVERRIDES: &str = "network_overrides";

/// The body of a `PUT` to [`INTERFACE_PATH`].
pub(super) fn interface(tap: &str) -> Value {
    json!({"iface_id": INTERFACE, "guest_mac": GUEST_MAC, "host_dev_name": tap})
}

/// What a load says of its network.
pub(super) fn overrides(tap: &str) -> Value {
    json!([{"iface_id": INTERFACE, "host_dev_name": tap}])
}

/// Taps that are up, gone with this.
pub(super) struct Taps {
    prefix: String,
    count: u64,
}

impl Taps {
    /// One for a guest, and `count` for its copies.
    pub(super) fn make(count: u64) -> anyhow::Result<Self> {
        let prefix = format!("als{}c", std::process::id() % 1_000_000);
        let taps = Self { prefix, count };
        let lines = taps.names().map(|name| {
            format!("tuntap add dev {name} mode tap vnet_hdr\nlink set dev {name} up\n")
        });
        ip(&lines.collect::<String>()).context(
            "taps are made by root, or in a network namespace of one's own (unshare -rn)",
        )?;
        Ok(taps)
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn of_guest(&self) -> String {
        format!("{}g", self.prefix)
    }

    pub(super) fn of_copy(&self, number: usize) -> String {
        format!("{}{number}", self.prefix)
    }

    fn names(&self) -> impl Iterator<Item = String> {
        let copies = (0..).take_while(|&number| number < self.count);
        let copies = copies.map(|number| format!("{}{number}", self.prefix));
        std::iter::once(self.of_guest()).chain(copies)
    }

    /// That somebody has opened the taps of the first `count` copies.
    pub(super) fn have_carriers(&self, count: usize) -> anyhow::Result<()> {
        for number in 0..count {
            let file = format!("/sys/class/net/{}/carrier", self.of_copy(number));
            let carrier = fs::read_to_string(&file).with_context(|| file.clone())?;
            if carrier.trim() != "1" {
                bail!("{file} is {}: copy {number} has no network", carrier.trim());
            }
        }
        Ok(())
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        let lines = self.names().map(|name| format!("link delete dev {name}\n"));
        if let Err(e) = ip(&lines.collect::<String>()) {
            eprintln!("alveole-bench: {e:#}");
        }
    }
}

/// Does what the lines say.
fn ip(lines: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip")
        .args(["-force", "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip (package iproute2)")?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(lines.as_bytes())?;
    }
    let said = child.wait_with_output()?;
    if !said.status.success() {
        let why = String::from_utf8_lossy(&said.stderr);
        bail!("ip: {}", why.lines().next().unwrap_or("no word"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_taps_fit_and_differ() {
        let taps = Taps {
            prefix: "als999999c".into(),
            count: 1000,
        };
        let names: std::collections::BTreeSet<_> = taps.names().collect();
        assert_eq!(names.len(), 1001);
        assert!(names.contains(&taps.of_copy(999)) && names.contains(&taps.of_guest()));
        // IFNAMSIZ, with the zero at its end.
        assert!(names.iter().all(|name| name.len() < 16));
        // None was made.
        std::mem::forget(taps);
    }

    #[test]
    fn the_guest_is_told_its_address() {
        assert!(GUEST_ARGUMENTS.contains(&format!(" alveole.net={GUEST_MAC},")));
    }
}
