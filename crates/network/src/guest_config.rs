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
use std::str::FromStr;

use ipnet::IpNet;

use crate::Error;
use crate::kernel::Kernel;
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

impl FromStr for DeviceConfig {
    type Err = Error;

    /// Reads the word, as [`Self::word`] writes it.
    ///
    /// # Errors
    ///
    /// It is not such a word. Unknown keys are none.
    fn from_str(word: &str) -> Result<Self, Error> {
        let malformed = |why: &str| Error::word("word about a network device", word, why);
        let rest = word
            .strip_prefix("alveole.net=")
            .ok_or_else(|| malformed("it begins with alveole.net=MAC"))?;
        let mut parts = rest.split(',');
        let mut device = Self {
            mac: parts.next().unwrap_or_default().parse()?,
            addresses: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            search: None,
            mtu: None,
        };
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            let bad = |_| malformed(&format!("{key}={value} is none"));
            match key {
                "ip" => device.addresses.push(
                    value
                        .parse()
                        .map_err(|_| malformed(&format!("ip={value} is no ADDRESS/LENGTH")))?,
                ),
                "gw" => device.gateways.push(value.parse().map_err(bad)?),
                "dns" => device.dns.push(value.parse().map_err(bad)?),
                "search" => device.search = Some(value.into()),
                "mtu" => {
                    let mtu = value.parse();
                    device.mtu =
                        Some(mtu.map_err(|_| {
                            malformed(&format!("mtu={value} is no number of bytes"))
                        })?);
                }
                _ => {}
            }
        }
        Ok(device)
    }
}

/// Sets up the devices of the machine that this runs in: a guest's agent calls it, no host. Loopback is brought up, too. No device waits for anything:
/// neither for DHCP nor for IPv6 to find out whether an address, which was given to it alone, is somebody else's.
///
/// # Errors
///
/// A device that is not there, or what the kernel says. The devices before it are set up then.
pub fn apply(devices: &[DeviceConfig]) -> Result<(), Error> {
    let mut kernel = Kernel::open()?;
    kernel.up("lo")?;
    let mut led_out = [false; 2];
    for device in devices {
        let name = kernel.named(device.mac)?;
        configure(&mut kernel, &name, device, &mut led_out)?;
    }
    Ok(())
}

/// What a device of a guest is, and what it is to be from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The hardware address that it has, or its name.
    pub is: String,
    /// What it is to be.
    pub becomes: DeviceConfig,
}

impl Change {
    /// The hardware address by which the device is meant, where it is not meant by its name.
    #[must_use]
    pub fn mac(&self) -> Option<Mac> {
        self.is.parse().ok()
    }
}

/// Makes devices others than they were: other hardware addresses, and none of the addresses and routes from before. The neighbours are told, by
/// an ARP request and an unsolicited neighbour advertisement, which the kernel sends as a device comes up. Connections by the old
/// addresses are dead from then on. As [`apply`], for the guest that this runs in; a change that was made before is made again.
///
/// # Errors
///
/// A device that is not there: nothing was changed then. Or what the kernel says: the devices after it are down then, as
/// what they were may be somebody else's by now.
pub fn renew(changes: &[Change]) -> Result<(), Error> {
    let mut kernel = Kernel::open()?;
    // All are found before one of them has an address that another one had.
    let mut names = Vec::new();
    for change in changes {
        names.push(find(&mut kernel, change)?);
    }
    for (name, change) in names.iter().zip(changes) {
        kernel.down(name)?;
        kernel.set_mac(name, change.becomes.mac)?;
        for address in kernel.addresses_of(name)? {
            kernel.remove_address(name, &address)?;
        }
    }
    let mut led_out = [false; 2];
    // A device that stays as it is may be the one that leads out.
    for family in kernel.default_routes()? {
        led_out[usize::from(family)] = true;
    }
    for (name, change) in names.iter().zip(changes) {
        for setting in ["ipv4/conf/{}/arp_notify", "ipv6/conf/{}/ndisc_notify"] {
            let path = format!("/proc/sys/net/{}", setting.replace("{}", name));
            let _ = std::fs::write(path, "1");
        }
        configure(&mut kernel, name, &change.becomes, &mut led_out)?;
    }
    Ok(())
}

fn find(kernel: &mut Kernel, change: &Change) -> Result<String, Error> {
    let Some(mac) = change.mac() else {
        kernel.exists(&change.is)?;
        return Ok(change.is.clone());
    };
    match kernel.named(mac) {
        Ok(name) => Ok(name),
        // It is that already.
        Err(e) => kernel.named(change.becomes.mac).map_err(|_| e),
    }
}

/// `led_out`: whether there is a default route already, for IPv4 and for IPv6.
fn configure(
    kernel: &mut Kernel,
    name: &str,
    device: &DeviceConfig,
    led_out: &mut [bool; 2],
) -> Result<(), Error> {
    // A kernel without IPv6 has no such settings.
    for setting in ["accept_ra", "accept_dad"] {
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), "0");
    }
    if let Some(mtu) = device.mtu {
        kernel.set_mtu(name, mtu)?;
    }
    // Before it is up: the kernel tells the neighbours of those that a device has as it comes up.
    for address in &device.addresses {
        kernel.add_address(name, address)?;
    }
    kernel.up(name)?;
    for gateway in &device.gateways {
        // Of several networks the first leads out.
        let led_out = &mut led_out[usize::from(gateway.is_ipv6())];
        if !std::mem::replace(led_out, true) {
            kernel.add_default_route(name, *gateway)?;
        }
    }
    Ok(())
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
        assert_eq!(device.word().parse::<DeviceConfig>().unwrap(), device);
        let line = command_line(&"web1".parse().unwrap(), &[device]);
        let documented: Vec<&str> = include_str!("guest_config.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("//! "))
            .filter(|l| l.starts_with("alveole."))
            .collect();
        assert_eq!(line, documented.join(" "));
    }

    #[test]
    fn what_is_no_word_is_refused_and_what_is_new_passed_over() {
        for word in [
            "",
            "net=02:00:00:00:00:01",
            "alveole.net=",
            "alveole.net=02:00:00:00:00:01,ip=10.0.0.1/33",
            "alveole.net=02:00:00:00:00:01,gw=somewhere",
            "alveole.net=02:00:00:00:00:01,mtu=-1",
        ] {
            let error = word.parse::<DeviceConfig>().unwrap_err().to_string();
            assert!(
                error.contains("word about a network device") || error.contains("MAC address"),
                "{error}"
            );
        }
        let newer = "alveole.net=02:00:00:00:00:01,flag,colour=blue,mtu=1400";
        assert_eq!(newer.parse::<DeviceConfig>().unwrap().mtu, Some(1400));
    }
}
