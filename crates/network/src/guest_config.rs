//! What a guest is to set up by itself, as words of its kernel's command line.
//!
//! One word for each network, one for the host name:
//!
//! ```text
//! alveole.net=02:5d:3e:11:90:0a,ip=10.0.10.5/24,ip=fd00:10::5/64,gw=10.0.10.1,gw=fd00:10::1,dns=10.0.10.1,search=front.internal,mtu=1500
//! alveole.hostname=web1
//! ```
//!
//! The word begins with the hardware address of the device that it is for; the others are `key=value`, in any order, and
//! unknown keys are passed over. `ip` (address and prefix length), `gw` (default route) and `dns` come
//! zero or more times, IPv4 and IPv6; `search` (domain for short names) and `mtu` at most once. The default
//! route and its family are of the first word that has a `gw` of that family. No value holds a comma or
//! space. It is the command line, as every guest has one from its first instruction on, whatever its
//! initramfs is. `resources/guest/init` carries it out.

use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::words::{Mac, VmName};

/// What a guest is to set up on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The device's hardware address.
    pub mac: Mac,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// Default routes.
    pub gateways: Vec<IpAddr>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
    /// The domain in which short names are looked up.
    pub search: Option<String>,
    /// Its MTU, in bytes.
    pub mtu: Option<u32>,
}

impl DeviceConfig {
    /// The word for the guest's command line.
    #[must_use]
    pub fn word(&self) -> String {
        let mut word = format!("alveole.net={}", self.mac);
        for address in &self.addresses {
            let _ = write!(word, ",ip={address}");
        }
        for gateway in &self.gateways {
            let _ = write!(word, ",gw={gateway}");
        }
        for dns in &self.dns {
            let _ = write!(word, ",dns={dns}");
        }
        if let Some(search) = &self.search {
            let _ = write!(word, ",search={search}");
        }
        if let Some(mtu) = self.mtu {
            let _ = write!(word, ",mtu={mtu}");
        }
        word
    }
}

/// All words for a guest's command line, with spaces between.
#[must_use]
pub fn command_line(hostname: &VmName, devices: &[DeviceConfig]) -> String {
    let words = devices
        .iter()
        .map(DeviceConfig::word)
        .chain([format!("alveole.hostname={hostname}")]);
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_is_as_documented() {
        let device = DeviceConfig {
            mac: "02:5d:3e:11:90:0a".parse().unwrap(),
            addresses: vec![
                "10.0.10.5/24".parse().unwrap(),
                "fd00:10::5/64".parse().unwrap(),
            ],
            gateways: vec!["10.0.10.1".parse().unwrap(), "fd00:10::1".parse().unwrap()],
            dns: vec!["10.0.10.1".parse().unwrap()],
            search: Some("front.internal".into()),
            mtu: Some(1500),
        };
        let line = command_line(&"web1".parse().unwrap(), &[device]);
        let documented: Vec<&str> = include_str!("guest_config.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("//! "))
            .filter(|l| l.starts_with("alveole."))
            .collect();
        assert_eq!(line, documented.join(" "));
    }
}
