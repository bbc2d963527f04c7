//! The words in which people say what a guest may talk to.
//!
//! One [`Rule`] is `allow` or `deny`, a destination, a protocol and ports; what no rule names is left to [`Egress`]. Networks
//! of guests keep them by the host's kernel, interfaces of one machine by a filter in its monitor.
//!
//! Deliberately does not know: who keeps the rules, how, and which addresses `host` and a network's name stand for.

mod name;
mod rule;

pub use name::{NetworkName, VmName};
pub use rule::{
    Action, Destination, Egress, MOST_PORTS, MOST_RULES, Ports, Protocol, Rule, parse_cidr,
};

/// A word that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} '{value}': {why}")]
pub struct WordError {
    /// What the value stands for.
    pub what: &'static str,
    /// The value as it was given.
    pub value: String,
    /// Why not, and what to do.
    pub why: String,
}

impl WordError {
    fn new(what: &'static str, value: &str, why: impl Into<String>) -> Self {
        Self {
            what,
            value: value.to_owned(),
            why: why.into(),
        }
    }
}
