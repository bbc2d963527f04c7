//! Ports of guests that are published on this host: what an image exposes, on free ones, and what is shown of all.

use alveole_instance::{Record, Vm};
use alveole_network::user::{MOST_PUBLISHED, Published, Transport};
use anyhow::Context;
use serde_json::json;

use crate::hint;
use crate::interfaces::NetworkArgs;

/// The words for each port that the image exposes and nobody published by himself, on free ports of this host.
pub(super) fn exposed_on_free(
    network: &NetworkArgs,
    exposed: &[String],
) -> anyhow::Result<Vec<String>> {
    network.check_can_publish("--publish-all: ports")?;
    let mut wanted = Vec::new();
    for word in exposed {
        // Others wrote it.
        let Some((ports, transport)) = understood(word) else {
            hint(&format!(
                "the image exposes {word:?}, which is not published: it is no port of tcp or udp"
            ));
            continue;
        };
        for port in ports {
            let said = |p: &Published| (p.guest_port, p.transport) == (port, transport);
            // They are refused; an image may expose all that there are, again and again.
            if wanted.len() > MOST_PUBLISHED {
                break;
            }
            if !wanted.contains(&(port, transport)) && !network.publish.iter().any(said) {
                wanted.push((port, transport));
            }
        }
    }
    let chosen =
        Published::on_free_ports(&wanted).context("cannot publish all ports of the image")?;
    Ok(chosen.iter().map(ToString::to_string).collect())
}

/// `PORT[-PORT][/tcp|/udp]`.
fn understood(word: &str) -> Option<(std::ops::RangeInclusive<u16>, Transport)> {
    let (ports, transport) = match word.split_once('/') {
        None => (word, Transport::Tcp),
        Some((ports, "tcp")) => (ports, Transport::Tcp),
        Some((ports, "udp")) => (ports, Transport::Udp),
        Some(_) => return None,
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let number = |digits: &str| digits.parse::<u16>().ok().filter(|port| *port != 0);
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some((first..=last, transport))
}

/// The words for a start: where a chosen port is somebody else's by now, another one, which is written down.
pub(super) fn still_free(vm: &Vm) -> anyhow::Result<Vec<String>> {
    let before = parsed(&vm.record.published_free);
    if before.iter().all(Published::is_free) {
        return Ok(vm.record.published_free.clone());
    }
    let wanted: Vec<_> = before.iter().map(|p| (p.guest_port, p.transport)).collect();
    let others = Published::on_free_ports(&wanted)?;
    let now: Vec<_> = before
        .iter()
        .zip(&others)
        .map(|(old, other)| if old.is_free() { old } else { other }.to_string())
        .collect();
    vm.change(|record| {
        record.published_free.clone_from(&now);
        anyhow::Ok(())
    })?;
    Ok(now)
}

fn parsed(words: &[String]) -> Vec<Published> {
    words.iter().filter_map(|word| word.parse().ok()).collect()
}

/// All that a VM publishes while it runs.
pub(super) fn published(record: &Record) -> Vec<Published> {
    let said = record.network.iter();
    let mut all: Vec<Published> = said
        .filter_map(|word| word.strip_prefix("--publish=")?.parse().ok())
        .collect();
    all.extend(parsed(&record.published_free));
    all.sort_by_key(|p| (p.guest_port, p.transport.to_string(), p.host));
    all
}

/// For people.
pub(super) fn shown(ports: &[Published]) -> String {
    let one = |p: &Published| format!("{}->{}/{}", p.host, p.guest_port, p.transport);
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// For programs.
pub(super) fn as_json(ports: &[Published]) -> serde_json::Value {
    ports
        .iter()
        .map(|p| {
            json!({
                "host_address": p.host.ip().to_string(), "host_port": p.host.port(),
                "guest_port": p.guest_port, "protocol": p.transport.to_string(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::tests::parse;

    fn exposed(words: &[&str], exposed: &[&str]) -> anyhow::Result<Vec<Published>> {
        let exposed: Vec<_> = exposed.iter().map(|word| (*word).to_owned()).collect();
        exposed_on_free(&parse(words).network, &exposed).map(|words| parsed(&words))
    }

    #[test]
    fn each_exposed_port_is_published_once_on_a_port_of_its_own() {
        let words = [
            "80",
            "80/tcp",
            "53/udp",
            "8000-8002/tcp",
            "443/tcp",
            "x",
            "0",
            "9/sctp",
            "3-1",
        ];
        let all = exposed(&["-p", "18443:443"], &words).unwrap();
        let guest: Vec<_> = all
            .iter()
            .map(|p| (p.guest_port, p.transport.to_string()))
            .collect();
        let guest: Vec<_> = guest.iter().map(|(port, t)| (*port, t.as_str())).collect();
        assert_eq!(
            guest,
            [
                (80, "tcp"),
                (53, "udp"),
                (8000, "tcp"),
                (8001, "tcp"),
                (8002, "tcp")
            ]
        );
        let mut hosts: Vec<_> = all
            .iter()
            .filter(|p| p.transport == Transport::Tcp)
            .map(|p| p.host)
            .collect();
        hosts.sort();
        hosts.dedup();
        assert_eq!(hosts.len(), 4);
        assert!(all.iter().all(|p| p.host.ip().is_loopback() && p.is_free()));
    }

    #[test]
    fn what_cannot_be_published_is_said() {
        for net in ["none", "tap=t", "front"] {
            let e = exposed(&["--net", net], &["80"]).unwrap_err().to_string();
            assert!(
                e.contains("--publish-all") && e.contains("--net user"),
                "{e}"
            );
        }
        let e = exposed(&[], &["1-65535"]).unwrap_err();
        assert!(format!("{e:#}").contains("are the most"), "{e:#}");
    }

    #[test]
    fn published_ports_in_words() {
        let ports = parsed(&["127.0.0.1:8080:80/tcp".into(), "[::1]:53:5353/udp".into()]);
        assert_eq!(shown(&ports), "127.0.0.1:8080->80/tcp, [::1]:53->5353/udp");
        assert_eq!(
            as_json(&ports)[1],
            json!({"host_address": "::1", "host_port": 53, "guest_port": 5353, "protocol": "udp"})
        );
    }
}
