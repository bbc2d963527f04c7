//! Names and addresses as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Longest name of an interface (IFNAMSIZ of the kernel, without the closing zero).
pub(crate) const MOST_INTERFACE_NAME: usize = 15;
/// Longest name of a VM: a label of the domain name system (RFC 1035, section 2.3.4).
pub(crate) const MOST_VM_NAME: usize = 63;

/// Words that rules have for something else than a network.
const RESERVED: [&str; 4] = ["outside", "host", "any", "user"];

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                $check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self, Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

word!(
    /// A network's name, which its bridge has as well: 1 to 15 of `a-z`, `0-9` and `-`, a letter first.
    NetworkName,
    check_network
);
word!(
    /// An interface of this host: 1 to 15 bytes without space, `/` and `:`.
    InterfaceName,
    check_interface
);
word!(
    /// A VM's name, which is its host name, too: 1 to 63 of `a-z`, `0-9` and `-`, no `-` at the ends (RFC 1123).
    VmName,
    check_vm
);

fn check_network(text: &str) -> Result<(), Error> {
    const WHAT: &str = "network name";
    if text.len() > MOST_INTERFACE_NAME {
        return Err(Error::word(
            WHAT,
            text,
            format!(
                "it is {} bytes long, and {MOST_INTERFACE_NAME} are the most (its bridge is called so)",
                text.len()
            ),
        ));
    }
    check_label(WHAT, text)?;
    if !text.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(Error::word(WHAT, text, "begin with a letter, a to z"));
    }
    if RESERVED.contains(&text) {
        return Err(Error::word(
            WHAT,
            text,
            "this word has another meaning in rules: choose another name",
        ));
    }
    Ok(())
}

fn check_vm(text: &str) -> Result<(), Error> {
    const WHAT: &str = "VM name";
    if text.len() > MOST_VM_NAME {
        let why = format!(
            "it is {} bytes long, and {MOST_VM_NAME} are the most",
            text.len()
        );
        return Err(Error::word(WHAT, text, why));
    }
    check_label(WHAT, text)
}

/// A label of a domain name.
fn check_label(what: &'static str, text: &str) -> Result<(), Error> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() {
        return Err(Error::word(what, text, "give one"));
    }
    if let Some(bad) = text.chars().find(|c| !good(*c)) {
        let why = format!(
            "'{}' may not be in it: use a to z, 0 to 9 and -",
            bad.escape_default()
        );
        return Err(Error::word(what, text, why));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(Error::word(what, text, "'-' may be neither first nor last"));
    }
    Ok(())
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
    fn names_of_networks() {
        for good in ["a", "front", "abcdefghijklmno", "web-2"] {
            assert_eq!(good.parse::<NetworkName>().unwrap().as_str(), good);
        }
        refused::<NetworkName>("abcdefghijklmnop", "16 bytes");
        refused::<NetworkName>("", "give one");
        refused::<NetworkName>("../x", "'.'");
        refused::<NetworkName>("Front", "'F'");
        refused::<NetworkName>("1st", "letter");
        refused::<NetworkName>("-a", "first nor last");
        refused::<NetworkName>("outside", "another meaning");
    }

    #[test]
    fn names_of_vms_and_interfaces() {
        assert!("1".parse::<VmName>().is_ok());
        refused::<VmName>(&"x".repeat(64), "64 bytes");
        refused::<VmName>("a.b", "'.'");
        refused::<VmName>("a\nb", "'\\n'".trim_matches('\''));
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
