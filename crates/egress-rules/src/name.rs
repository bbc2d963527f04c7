//! Names as rules have them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::WordError;

/// Longest name of a network: that of its bridge (IFNAMSIZ of the kernel, without the closing zero).
const MOST_NETWORK_NAME: usize = 15;
/// Longest name of a VM: a label of the domain name system (RFC 1035, section 2.3.4).
const MOST_VM_NAME: usize = 63;

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
            type Err = WordError;

            fn from_str(text: &str) -> Result<Self, WordError> {
                $check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = WordError;

            fn try_from(text: String) -> Result<Self, WordError> {
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
    /// A VM's name, which is its host name, too: 1 to 63 of `a-z`, `0-9` and `-`, no `-` at the ends (RFC 1123).
    VmName,
    check_vm
);

fn check_network(text: &str) -> Result<(), WordError> {
    const WHAT: &str = "network name";
    if text.len() > MOST_NETWORK_NAME {
        return Err(WordError::new(
            WHAT,
            text,
            format!(
                "it is {} bytes long, and {MOST_NETWORK_NAME} are the most (its bridge is called so)",
                text.len()
            ),
        ));
    }
    check_label(WHAT, text)?;
    if !text.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Err(WordError::new(WHAT, text, "begin with a letter, a to z"));
    }
    if RESERVED.contains(&text) {
        return Err(WordError::new(
            WHAT,
            text,
            "this word has another meaning in rules: choose another name",
        ));
    }
    Ok(())
}

fn check_vm(text: &str) -> Result<(), WordError> {
    const WHAT: &str = "VM name";
    if text.len() > MOST_VM_NAME {
        let why = format!(
            "it is {} bytes long, and {MOST_VM_NAME} are the most",
            text.len()
        );
        return Err(WordError::new(WHAT, text, why));
    }
    check_label(WHAT, text)
}

/// A label of a domain name.
fn check_label(what: &'static str, text: &str) -> Result<(), WordError> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if text.is_empty() {
        return Err(WordError::new(what, text, "give one"));
    }
    if let Some(bad) = text.chars().find(|c| !good(*c)) {
        let why = format!(
            "'{}' may not be in it: use a to z, 0 to 9 and -",
            bad.escape_default()
        );
        return Err(WordError::new(what, text, why));
    }
    if text.starts_with('-') || text.ends_with('-') {
        return Err(WordError::new(
            what,
            text,
            "'-' may be neither first nor last",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: FromStr<Err = WordError> + fmt::Debug>(text: &str, word: &str) {
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
    fn names_of_vms() {
        assert!("1".parse::<VmName>().is_ok());
        refused::<VmName>(&"x".repeat(64), "64 bytes");
        refused::<VmName>("a.b", "'.'");
        refused::<VmName>("a\nb", "'\\n'".trim_matches('\''));
    }
}
