//! The planner on hosts that are made up: what it wants, and that it gets there from wherever it was killed.

use proptest::prelude::*;

use super::*;
use crate::lease::{Port, take};
use crate::spec::NetworkRequest;

fn network(name: &str, change: impl FnOnce(&mut NetworkRequest)) -> NetworkState {
    let mut request = NetworkRequest::default();
    change(&mut request);
    NetworkState::new(request.check(&name.parse().unwrap()).unwrap())
}

fn bridge(name: &str, subnet: &str, vlan: Option<u32>) -> NetworkState {
    network(name, |r| {
        r.mode = Some("bridge".into());
        r.subnet = vec![subnet.into()];
        r.vlan = vlan;
        r.parent = vlan.map(|_| "eth1".into());
    })
}

fn desired(networks: impl IntoIterator<Item = NetworkState>) -> Desired {
    let networks = networks
        .into_iter()
        .map(|n| (n.spec.name.clone(), n))
        .collect();
    Desired::new(networks, Path::new("/run/x"))
}

fn host() -> Observed {
    let up = Link {
        up: true,
        mtu: 1500,
        ..Link::default()
    };
    let eth0 = Link {
        addresses: vec!["192.0.2.2/24".parse().unwrap()],
        ..up.clone()
    };
    Observed {
        links: [("eth0".to_owned(), eth0), ("eth1".to_owned(), up)].into(),
        routes: vec![Route {
            to: "192.0.2.0/24".parse().unwrap(),
            over: Some("eth0".into()),
        }],
        settings: [
            (FORWARD4.to_owned(), "0".to_owned()),
            (FORWARD6.to_owned(), "0".to_owned()),
        ]
        .into(),
        ..Observed::default()
    }
}

/// What a step does, as the kernel does it.
fn simulate(step: &Step, host: &mut Observed) {
    match step {
        Step::KeepSetting { key, before } => {
            host.before
                .entry(key.clone())
                .or_insert_with(|| before.clone());
        }
        Step::Set { key, value } => {
            host.settings.insert(key.clone(), value.clone());
        }
        Step::ForgetSetting { key } => {
            host.before.remove(key);
        }
        Step::LoadRules(rules) => host.rules = Some(rules.digest.clone()),
        Step::RemoveRules => host.rules = None,
        Step::MakeBridge { name, mtu, .. } => {
            let link = Link {
                kind: "bridge".into(),
                group: OUR_GROUP,
                mtu: *mtu,
                ..Link::default()
            };
            assert!(
                host.links.insert(name.clone(), link).is_none(),
                "{name} is there already"
            );
        }
        Step::MakeVlan { name, parent, id } => {
            assert!(host.links[parent].up);
            let link = Link {
                kind: "vlan".into(),
                group: OUR_GROUP,
                mtu: host.links[parent].mtu,
                parent: Some(parent.clone()),
                vlan: Some(*id),
                ..Link::default()
            };
            assert!(
                host.links.insert(name.clone(), link).is_none(),
                "{name} is there already"
            );
        }
        Step::Alias { link, text } => host.links.get_mut(link).unwrap().alias = Some(text.clone()),
        Step::Mtu { link, mtu } => host.links.get_mut(link).unwrap().mtu = *mtu,
        Step::Quiet { link } => assert!(host.links.contains_key(link)),
        Step::Join { link, bridge } => {
            assert!(
                host.links[bridge].kind == "bridge" && host.rules.is_some(),
                "a port without a filter"
            );
            host.links.get_mut(link).unwrap().master = Some(bridge.clone());
        }
        Step::Leave { link } => host.links.get_mut(link).unwrap().master = None,
        Step::Up { link } => host.links.get_mut(link).unwrap().up = true,
        Step::AddAddress { link, address } => {
            assert!(host.rules.is_some(), "an address without a filter");
            host.links.get_mut(link).unwrap().addresses.push(*address);
            host.routes.push(Route {
                to: address.trunc(),
                over: Some(link.clone()),
            });
        }
        Step::RemoveLink { link } => {
            assert_eq!(
                host.links.remove(link).unwrap().group,
                OUR_GROUP,
                "{link} is not ours"
            );
            host.routes.retain(|r| r.over.as_deref() != Some(link));
            for port in host
                .links
                .values_mut()
                .filter(|l| l.master.as_ref() == Some(link))
            {
                port.master = None;
            }
        }
        Step::StartResolver { network, answers } | Step::ReloadResolver { network, answers } => {
            assert!(!host.links[network.as_str()].addresses.is_empty());
            host.resolvers.insert(
                network.clone(),
                Some(Running {
                    answers: answers.clone(),
                }),
            );
        }
        Step::StopResolver { network } => {
            host.resolvers.remove(network);
        }
    }
}

fn settle(desired: &Desired, host: &mut Observed) {
    let planned = plan(desired, host);
    assert!(planned.problems.is_empty(), "{:?}", planned.problems);
    for step in &planned.steps {
        simulate(step, host);
    }
    let again = plan(desired, host);
    assert!(
        again.steps.is_empty(),
        "not done after all steps: {:?}",
        again.steps
    );
}

fn shown(desired: &Desired, host: &Observed) -> Vec<String> {
    let planned = plan(desired, host);
    assert!(planned.problems.is_empty(), "{:?}", planned.problems);
    planned
        .steps
        .iter()
        .map(ToString::to_string)
        .filter(|s| !s.contains("nftables"))
        .collect()
}

#[test]
fn a_vlan_on_a_bridge() {
    let tier = bridge("front", "10.0.10.0/24", Some(10));
    let mac = tier.spec.bridge_mac();
    assert_eq!(
        shown(&desired([tier]), &host()),
        [
            format!("make bridge front (MAC {mac}, MTU 1500)").as_str(),
            "mark front as \"alveole network front\"",
            "give front the address 10.0.10.1/24",
            "make eth1.10, VLAN 10 on eth1",
            "let eth1.10 have no IPv6 address of this host",
            "mark eth1.10 as \"alveole network front\"",
            "set the MTU of eth1.10 to 1500",
            "make eth1.10 a port of bridge front",
            "bring eth1.10 up",
            "bring front up",
            "start the resolver and DHCP server of network front",
        ]
    );
}

#[test]
fn forwarding_is_put_back_unless_others_need_it() {
    let nat = desired([network("a", |r| {
        r.subnet = vec!["10.0.1.0/24".into(), "fd00:1::/64".into()];
    })]);
    for others in [false, true] {
        let mut here = host();
        here.advertised.insert("eth0".into());
        here.settings.insert(accept_ra("eth0"), "1".into());
        let before = here.clone();
        settle(&nat, &mut here);
        assert_eq!(
            (
                here.settings[FORWARD4].as_str(),
                here.settings[FORWARD6].as_str()
            ),
            ("1", "1")
        );
        assert_eq!(here.settings[&accept_ra("eth0")], "2");
        here.others_forward = others;
        settle(&desired([]), &mut here);
        if others {
            assert_eq!(here.settings[FORWARD4], "1");
            assert!(here.before.is_empty());
        } else {
            assert_eq!(here, before);
        }
    }
    // Who found it on leaves it on.
    let mut here = host();
    here.settings.insert(FORWARD4.into(), "1".into());
    settle(&nat, &mut here);
    settle(&desired([]), &mut here);
    assert_eq!(here.settings[FORWARD4], "1");
}

#[test]
fn what_is_not_ours_is_in_the_way() {
    let says = |network: NetworkState, change: &dyn Fn(&mut Observed)| {
        let mut here = host();
        change(&mut here);
        let planned = plan(&desired([network]), &here);
        assert_eq!(planned.problems.len(), 1, "{:?}", planned.steps);
        assert!(
            !planned
                .steps
                .iter()
                .any(|s| matches!(s, Step::MakeBridge { .. } | Step::Join { .. }))
        );
        planned.problems[0].1.to_string()
    };
    let nothing = |_: &mut Observed| ();
    let vlan = || bridge("front", "10.0.10.0/24", Some(10));
    let link = |name: &str, link: Link| {
        let name = name.to_owned();
        move |here: &mut Observed| drop(here.links.insert(name.clone(), link.clone()))
    };
    let foreign = Link {
        kind: "bridge".into(),
        ..Link::default()
    };
    let on = |parent: &str| {
        let parent = parent.to_owned();
        network("front", |r| {
            (r.mode, r.parent) = (Some("bridge".into()), Some(parent));
        })
    };
    let tagged = Link {
        kind: "vlan".into(),
        parent: Some("eth1".into()),
        vlan: Some(10),
        ..Link::default()
    };
    let down = Link {
        mtu: 1500,
        ..Link::default()
    };
    let taken = Link {
        up: true,
        mtu: 1500,
        master: Some("virbr0".into()),
        ..Link::default()
    };
    for (said, word) in [
        (
            says(vlan(), &link("front", foreign.clone())),
            "not made by alveole",
        ),
        (
            says(vlan(), &link("eth1.10", foreign)),
            "would be called 'eth1.10'",
        ),
        (says(vlan(), &link("dmz", tagged)), "as 'dmz'"),
        (says(vlan(), &link("eth1", down)), "'eth1' is down"),
        (
            says(vlan(), &|here| drop(here.links.remove("eth1"))),
            "no interface 'eth1'",
        ),
        (says(on("eth0"), &nothing), "has the address 192.0.2.2/24"),
        (says(on("eth1"), &link("eth1", taken)), "port of 'virbr0'"),
        (
            says(
                on("lo"),
                &link(
                    "lo",
                    Link {
                        up: true,
                        mtu: 65536,
                        ..Link::default()
                    },
                ),
            ),
            "leads nowhere",
        ),
        (
            says(bridge("front", "192.0.0.0/16", None), &nothing),
            "192.0.2.0/24 over eth0",
        ),
        (
            says(
                network("front", |r| {
                    (r.mode, r.parent, r.mtu) =
                        (Some("bridge".into()), Some("eth1".into()), Some(9000));
                }),
                &nothing,
            ),
            "say --mtu 1500",
        ),
    ] {
        assert!(
            said.contains(word) && said.contains("'front'"),
            "{word}: {said}"
        );
    }
}

#[test]
fn a_network_in_trouble_does_not_hold_others_up() {
    let mut here = host();
    here.links.remove("eth1");
    let planned = plan(
        &desired([
            bridge("a", "10.0.1.0/24", Some(1)),
            bridge("b", "10.0.2.0/24", None),
        ]),
        &here,
    );
    assert_eq!(planned.problems[0].0.as_str(), "a");
    assert!(
        planned
            .steps
            .iter()
            .any(|s| matches!(s, Step::StartResolver { network, .. } if network.as_str() == "b"))
    );
}

#[test]
fn a_bridge_that_somebody_removed_comes_back_with_its_ports() {
    let mut state = bridge("a", "10.0.1.0/24", None);
    let lease = take(&state.spec, &mut state.leases, &"vm".parse().unwrap(), None).unwrap();
    lease.port = Some(Port {
        interface: "tap0".parse().unwrap(),
        ours: true,
        process: None,
    });
    let mut here = host();
    here.links.insert(
        "tap0".into(),
        Link {
            kind: "tun".into(),
            group: OUR_GROUP,
            mtu: 1500,
            ..Link::default()
        },
    );
    let all = desired([state]);
    settle(&all, &mut here);
    assert_eq!(here.links["tap0"].master.as_deref(), Some("a"));
    let made = here.clone();
    simulate(&Step::RemoveLink { link: "a".into() }, &mut here);
    settle(&all, &mut here);
    assert_eq!(here.links, made.links);
    here.rules = None;
    settle(&all, &mut here);
}

/// Some networks of one host, with guests.
fn networks() -> impl Strategy<Value = Vec<NetworkState>> {
    proptest::collection::vec((0..4u8, any::<bool>(), 0..3usize), 0..4).prop_map(|kinds| {
        let make = |(n, (kind, rule, guests)): (usize, (u8, bool, usize))| {
            let mut state = network(&format!("net{n}"), |r| {
                r.mode = Some(["nat", "bridge", "isolated", "bridge"][usize::from(kind)].into());
                r.subnet = vec![format!("10.0.{n}.0/24"), format!("fd00:{n}::/64")];
                if kind == 3 {
                    (r.parent, r.vlan) = (Some("eth1".into()), Some(n as u32 + 1));
                }
                if rule && kind != 2 {
                    r.rules = vec!["allow,to=outside".parse().unwrap()];
                }
            });
            for guest in 0..guests {
                let vm = format!("vm{guest}").parse().unwrap();
                let lease = take(&state.spec, &mut state.leases, &vm, None).unwrap();
                lease.port = Some(Port {
                    interface: format!("tap{n}-{guest}").parse().unwrap(),
                    ours: true,
                    process: None,
                });
            }
            state
        };
        kinds.into_iter().enumerate().map(make).collect()
    })
}

fn plug_in(networks: &[NetworkState], host: &mut Observed) {
    for port in networks
        .iter()
        .flat_map(|n| &n.leases)
        .filter_map(|l| l.port.as_ref())
    {
        let tap = Link {
            kind: "tun".into(),
            group: OUR_GROUP,
            mtu: 1500,
            ..Link::default()
        };
        host.links.entry(port.interface.to_string()).or_insert(tap);
    }
}

proptest! {
    /// Killed after any step on the way from some networks to others, whoever plans again gets there; and removing
    /// all gives the host back as it was.
    #[test]
    fn from_anywhere_to_anywhere(first in networks(), second in networks(), killed in 0..60usize) {
        let untouched = host();
        let mut here = untouched.clone();
        plug_in(&first, &mut here);
        let planned = plan(&desired(first.clone()), &here);
        prop_assert!(planned.problems.is_empty());
        for step in planned.steps.iter().take(killed) {
            simulate(step, &mut here);
        }
        plug_in(&second, &mut here);
        // A name can be a bridge of another kind of network now: those are removed before (Networks::create).
        settle(&desired(second), &mut here);
        let planned = plan(&desired([]), &here);
        for step in planned.steps.iter().take(killed) {
            simulate(step, &mut here);
        }
        settle(&desired([]), &mut here);
        prop_assert_eq!(here, untouched);
    }
}
