//! What a guest may send by an interface.

use std::net::IpAddr;

use alveole_egress_filter::Policy;
use alveole_egress_rules::{Egress, MOST_RULES, Rule, parse_cidr};
use alveole_vm_config::{EgressDefault, NetworkInterface};

use crate::validate::Invalid;

/// Most addresses of a list: they are gone through for each frame.
const MAX_ADDRESSES: usize = 1024;

/// The policy of `interface`; none where it lets anything pass.
pub(super) fn validate(interface: &NetworkInterface, broken: &mut Vec<Invalid>) -> Option<Policy> {
    let egress = interface.egress.as_ref()?;
    let before = broken.len();
    let mut wrong = |why: String| {
        broken.push(Invalid::Egress {
            id: interface.iface_id.clone(),
            why,
        });
    };
    for (what, list, most) in [
        ("rules", &egress.rules, MOST_RULES),
        ("host", &egress.host, MAX_ADDRESSES),
        ("guests", &egress.guests, MAX_ADDRESSES),
        ("resolvers", &egress.resolvers, MAX_ADDRESSES),
    ] {
        if list.len() > most {
            let count = list.len();
            wrong(format!(
                "{what} has {count} entries, and {most} are the most"
            ));
            return None;
        }
    }
    let mut rules = Vec::new();
    for text in &egress.rules {
        match text.parse::<Rule>() {
            Ok(rule) => rules.push(rule),
            Err(e) => wrong(e.to_string()),
        }
    }
    let mut addresses = |what: &'static str, list: &[String]| {
        let mut all = Vec::new();
        for text in list {
            match parse_cidr(what, text) {
                Ok(net) => all.push(net),
                Err(e) => wrong(e.to_string()),
            }
        }
        all
    };
    let host = addresses("host", &egress.host);
    let guests = addresses("guests", &egress.guests);
    let mut resolvers: Vec<IpAddr> = Vec::new();
    for text in &egress.resolvers {
        match text.parse() {
            Ok(address) => resolvers.push(address),
            Err(_) => wrong(format!("resolvers '{text}': write an address, 192.0.2.53")),
        }
    }
    let default = match egress.default {
        EgressDefault::Open => Egress::Open,
        EgressDefault::Closed => Egress::Closed,
    };
    // Rules for the host would be complained of as well: one complaint for one mistake.
    if host.len() < egress.host.len() {
        return None;
    }
    let policy = match Policy::new(&rules, default, &host, &guests, &resolvers) {
        Ok(policy) => policy,
        Err(all) => {
            for e in all {
                wrong(e.to_string());
            }
            return None;
        }
    };
    let lets_all_pass =
        rules.is_empty() && default == Egress::Open && host.is_empty() && guests.is_empty();
    (broken.len() == before && !lets_all_pass).then_some(policy)
}
