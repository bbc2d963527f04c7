//! The one tap over which every VMM is measured. Made by `ip`, gone with its value.

use std::process::Command;

use anyhow::{Context, bail};

/// A network that nobody else has: of 172.16.0.0/12, private by RFC 1918.
const HOST: &str = "172.31.77.1";
pub(super) const GUEST: &str = "172.31.77.2";
pub(super) const PREFIX: u8 = 24;
/// Locally administered.
pub(super) const GUEST_MAC: &str = "06:00:ac:1f:4d:02";

pub(super) struct Tap {
    pub(super) name: String,
}

impl Tap {
    pub(super) fn make() -> anyhow::Result<Self> {
        let name = format!("albench{}", std::process::id() % 10_000_000);
        ip(&format!("tuntap add dev {name} mode tap vnet_hdr"))?;
        let tap = Self { name };
        ip(&format!("address add {HOST}/{PREFIX} dev {}", tap.name))?;
        ip(&format!("link set dev {} up", tap.name))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Err(e) = ip(&format!("link delete dev {}", self.name)) {
            eprintln!("alveole-bench: {e:#}");
        }
    }
}

fn ip(words: &str) -> anyhow::Result<()> {
    let said = Command::new("ip")
        .args(words.split_whitespace())
        .output()
        .context("cannot run ip (package iproute2)")?;
    if !said.status.success() {
        let why = String::from_utf8_lossy(&said.stderr);
        bail!(
            "ip {words}: {}; a tap is made by root, or in a network namespace of one's own (unshare -rn)",
            why.trim()
        );
    }
    Ok(())
}
