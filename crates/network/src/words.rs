//! Names and addresses as people write them.

use std::fmt;
use std::str::FromStr;

pub use alveole_egress_rules::{NetworkName, VmName};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Longest name of an interface (IFNAMSIZ of the kernel, without the closing zero).
pub(crate) const MOST_INTERFACE_NAME: usize = 15;

/// An interface of this host: 1 to 15 bytes without space, `/` and `:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        check_interface(text)?;
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> Self {
        name.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn check_interface(text: &str) -> Result<(), Error> {
    const WHAT: &str = "interface";
    if text.is_empty() || text.len() > MOST_INTERFACE_NAME {
        let why = format!(
            "names of interfaces are 1 to {MOST_INTERFACE_NAME} bytes long: `ip link` shows them"
        );
        return Err(Error::word(WHAT, text, why));
    }
    let bad = |c: char| c.is_whitespace() || c.is_control() || "/:\"\\".contains(c);
    if text == "." || text == ".." || text.chars().any(bad) {
        return Err(Error::word(
            WHAT,
            text,
            "no interface can be called so: `ip link` shows them",
        ));
    }
    Ok(())
}

/// The address of an Ethernet device: unicast.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// The six bytes, first on the wire first.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The address that belongs to a VM on a network: made of both names, in the range that anybody may
    /// use (second bit of the first byte, IEEE 802), so that it stays the same for ever.
    /// `salt` gives another one where that is taken.
    #[must_use]
    pub fn of(network: &str, vm: &str, salt: u64) -> Self {
        let hash = crate::hash(&[network, vm, &salt.to_string()]).to_be_bytes();
        Self([0x02, hash[1], hash[2], hash[3], hash[4], hash[5]])
    }
}

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        const WHAT: &str = "MAC address";
        let malformed = || {
            Error::word(
                WHAT,
                text,
                "write six bytes in hexadecimal: 02:00:00:00:00:01",
            )
        };
        let parts: Vec<&str> = text.split(':').collect();
        let mut bytes = [0; 6];
        if parts.len() != bytes.len() {
            return Err(malformed());
        }
        for (byte, part) in bytes.iter_mut().zip(parts) {
            if part.len() != 2 || !part.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if bytes[0] & 1 != 0 {
            return Err(Error::word(
                WHAT,
                text,
                "it is a multicast address: a device's has an even first byte",
            ));
        }
        if bytes == [0; 6] {
            return Err(Error::word(WHAT, text, "no device can have this one"));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: FromStr<Err = Error> + fmt::Debug>(text: &str, word: &str) {
        let said = text.parse::<T>().unwrap_err().to_string();
        assert!(said.contains(word), "{text:?}: {said}");
        assert!(said.contains(text), "{text:?} is not in: {said}");
    }

    #[test]
    fn names_of_interfaces() {
        assert!("eth0.10".parse::<InterfaceName>().is_ok());
        refused::<InterfaceName>("abcdefghijklmnop", "15 bytes");
        refused::<InterfaceName>("a/b", "no interface");
        refused::<InterfaceName>("..", "no interface");
        refused::<InterfaceName>("a\"b", "no interface");
    }

    #[test]
    fn macs() {
        let mac: Mac = "02:aB:00:00:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:ab:00:00:00:01");
        refused::<Mac>("03:00:00:00:00:01", "multicast");
        refused::<Mac>("ff:ff:ff:ff:ff:ff", "multicast");
        refused::<Mac>("00:00:00:00:00:00", "no device");
        for malformed in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:1",
            "02-00-00-00-00-01",
            "02:00:00:00:00:+1",
        ] {
            refused::<Mac>(malformed, "six bytes");
        }
    }

    #[test]
    fn macs_of_vms_stay_and_differ() {
        let network = "front";
        assert_eq!(Mac::of(network, "a", 0), Mac::of(network, "a", 0));
        assert_ne!(Mac::of(network, "a", 0), Mac::of(network, "b", 0));
        assert_ne!(Mac::of(network, "a", 0), Mac::of(network, "a", 1));
        assert_eq!(Mac::of(network, "a", 0).bytes()[0], 2);
    }
}
