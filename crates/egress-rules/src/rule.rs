//! What guests may talk to: rules for what leaves a network, or one guest in user mode.
//!
//! A rule belongs to the network, or the guest, that the traffic comes from. Rules are asked in their order, the first one
//! that fits decides, and where none fits the network's `egress` does. Answers to what was allowed always
//! pass. Guests of one network see each other in any case.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{NetworkName, VmName, WordError};

/// Most rules of one network or guest: they are gone through for each new connection, or frame.
pub const MOST_RULES: usize = 1024;
/// Most port ranges of one rule.
pub const MOST_PORTS: usize = 64;

/// What a rule does with what fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Lets it pass.
    Allow,
    /// Drops it.
    Deny,
}

/// Where traffic goes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Destination {
    /// Anything but this host itself.
    Any,
    /// Anything that is neither this host nor another network of guests.
    Outside,
    /// This host itself.
    Host,
    /// Another network of guests.
    Network(NetworkName),
    /// Addresses.
    Cidr(IpNet),
}

/// What it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// Ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    /// The first one, not 0.
    pub first: u16,
    /// The last one.
    pub last: u16,
}

/// What happens to traffic out of a network that no rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// It may go to the world, never to other networks of guests.
    Open,
    /// It is refused.
    Closed,
}

impl FromStr for Egress {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        match text {
            "open" => Ok(Self::Open),
            "closed" => Ok(Self::Closed),
            _ => Err(WordError::new("egress", text, "it is open or closed")),
        }
    }
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Closed => "closed",
        })
    }
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What it does.
    pub action: Action,
    /// Where the traffic goes to.
    pub to: Destination,
    /// What it speaks; anything if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Ports it goes to (needs TCP or UDP); all if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Ports>,
    /// Of which VM it is; of all if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
}

impl Rule {
    /// Checks what types do not.
    ///
    /// # Errors
    ///
    /// [`WordError`] for ports without a protocol that has them, or too many.
    pub fn check(&self) -> Result<(), WordError> {
        if !self.ports.is_empty() && !matches!(self.protocol, Some(Protocol::Tcp | Protocol::Udp)) {
            return Err(WordError::new(
                "rule",
                &self.to_string(),
                "only tcp and udp have ports: add protocol=tcp or protocol=udp",
            ));
        }
        if self.ports.len() > MOST_PORTS {
            let why = format!("{MOST_PORTS} ports or ranges are the most: make it several rules");
            return Err(WordError::new("rule", &self.to_string(), why));
        }
        Ok(())
    }
}

/// A rule as `alveole net create --rule` takes it: `allow,to=10.0.0.0/8,protocol=tcp,port=80,port=8000-8080`.
impl FromStr for Rule {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        const WHAT: &str = "rule";
        let mut words = text.split(',');
        let action = match words.next() {
            Some("allow") => Action::Allow,
            Some("deny") => Action::Deny,
            _ => {
                return Err(WordError::new(
                    WHAT,
                    text,
                    "begin with allow or deny: allow,to=10.0.0.0/8,protocol=tcp,port=443",
                ));
            }
        };
        let mut rule = Self {
            action,
            to: Destination::Any,
            protocol: None,
            ports: Vec::new(),
            vm: None,
        };
        for word in words {
            match word.split_once('=') {
                Some(("to", to)) => rule.to = to.parse()?,
                Some(("protocol", protocol)) => rule.protocol = Some(protocol.parse()?),
                Some(("port", ports)) => rule.ports.push(ports.parse()?),
                Some(("vm", vm)) => rule.vm = Some(vm.parse()?),
                _ => {
                    let why = format!("'{word}' is none of to=, protocol=, port=, vm=");
                    return Err(WordError::new(WHAT, text, why));
                }
            }
        }
        rule.check()?;
        Ok(rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        })?;
        write!(f, ",to={}", self.to)?;
        if let Some(protocol) = self.protocol {
            write!(f, ",protocol={protocol}")?;
        }
        for ports in &self.ports {
            write!(f, ",port={ports}")?;
        }
        if let Some(vm) = &self.vm {
            write!(f, ",vm={vm}")?;
        }
        Ok(())
    }
}

impl FromStr for Destination {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        Ok(match text {
            "any" => Self::Any,
            "outside" => Self::Outside,
            "host" => Self::Host,
            _ if text.contains(['/', '.', ':']) => Self::Cidr(parse_cidr("destination", text)?),
            _ => Self::Network(text.parse()?),
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Outside => f.write_str("outside"),
            Self::Host => f.write_str("host"),
            Self::Network(name) => name.fmt(f),
            Self::Cidr(cidr) => cidr.fmt(f),
        }
    }
}

impl FromStr for Protocol {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "icmp" => Ok(Self::Icmp),
            _ => Err(WordError::new("protocol", text, "it is tcp, udp or icmp")),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        })
    }
}

impl FromStr for Ports {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |digits: &str| {
            digits
                .parse::<u16>()
                .ok()
                .filter(|n| *n != 0 && !digits.starts_with('+'))
        };
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self { first, last }),
            _ => Err(WordError::new(
                "port",
                text,
                "give a number from 1 to 65535, or a range of them: 80 or 8000-8080",
            )),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

macro_rules! as_text {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = WordError;

            fn try_from(text: String) -> Result<Self, WordError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    )*};
}
as_text!(Destination, Ports);

/// Addresses as people write them: a network with its length (`10.0.0.0/8`), or one address. `what` it is for, messages
/// say.
///
/// # Errors
/// It is none, or has bits beyond its length.
pub fn parse_cidr(what: &'static str, text: &str) -> Result<IpNet, WordError> {
    let wrong = |why: String| WordError::new(what, text, why);
    let cidr = if text.contains('/') {
        text.parse::<IpNet>().map_err(|_| {
            wrong("write an address and its length: 10.1.0.0/24 or fd00:1::/64".into())
        })?
    } else {
        text.parse::<IpAddr>()
            .map(IpNet::from)
            .map_err(|_| wrong("write addresses as 10.1.0.0/24 or fd00:1::/64".into()))?
    };
    if cidr.addr() != cidr.network() {
        return Err(wrong(format!(
            "it has bits beyond its length: is {} meant?",
            cidr.trunc()
        )));
    }
    Ok(cidr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in [
            "allow,to=any",
            "deny,to=10.0.0.0/8",
            "allow,to=fd00::/8,protocol=icmp",
            "allow,to=back,protocol=tcp,port=5432",
            "deny,to=outside,protocol=udp,port=53,port=8000-8080,vm=web1",
            "allow,to=host",
        ] {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), text);
            let json = serde_json::to_string(&rule).unwrap();
            assert_eq!(serde_json::from_str::<Rule>(&json).unwrap(), rule, "{json}");
        }
    }

    #[test]
    fn wrong_rules_are_refused_by_what_is_wrong() {
        for (text, word) in [
            ("", "allow or deny"),
            ("permit,to=any", "allow or deny"),
            ("allow,to=10.0.0.1/8", "10.0.0.0/8"),
            ("allow,to=10.0.0/8", "10.1.0.0/24"),
            ("allow,to=10.0.0.0/33", "10.1.0.0/24"),
            ("allow,port=80", "only tcp and udp"),
            ("allow,protocol=icmp,port=80", "only tcp and udp"),
            ("allow,protocol=tcp,port=0", "1 to 65535"),
            ("allow,protocol=tcp,port=65536", "1 to 65535"),
            ("allow,protocol=tcp,port=90-80", "1 to 65535"),
            ("allow,protocol=tcp,port=+80", "1 to 65535"),
            ("allow,protocol=sctp", "tcp, udp or icmp"),
            ("allow,from=x", "'from=x'"),
            ("allow,to=no_such", "'_'"),
        ] {
            let said = text.parse::<Rule>().unwrap_err().to_string();
            assert!(said.contains(word), "{text}: {said}");
        }
    }
}
