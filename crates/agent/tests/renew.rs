//! A guest that becomes somebody else: an agent in namespaces of its own (network, names, mounts), with an `/etc` of its own, so that nothing of
//! this machine changes. A clock has no namespace: `tests/guest/agent.rs` sets one.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/sessions.rs uses the rest")]
mod served;

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use alveole_agent_client::AgentError;
use alveole_agent_protocol::{Exit, HookRun, Renewal, Renewed, RenewedInterface};
use served::Agent;

fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("ALVEOLE_SKIP_LOG") {
        let log = File::options().create(true).append(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
    }
}

/// An agent that owns its network, its name and its `/etc`.
fn alone(test: &str) -> Option<Agent> {
    let words = ["unshare", "--net", "--uts", "--mount", "--"];
    let can = Command::new(words[0])
        .args(&words[1..])
        .args(["ip", "link"])
        .stdout(Stdio::null())
        .status();
    if !can.is_ok_and(|status| status.success()) {
        skip(
            test,
            "only root can make namespaces, with unshare (util-linux) and ip (iproute2)",
        );
        return None;
    }
    let agent = Agent::start_by(&words);
    said(
        &agent,
        "mount -t tmpfs tmpfs /etc && mount -t tmpfs tmpfs /var/lib && mount -t tmpfs tmpfs /run && ip link set lo up",
    );
    Some(agent)
}

/// The output of a script that succeeds.
#[track_caller]
fn said(agent: &Agent, script: &str) -> String {
    let (exit, output, errors) = agent.sh(script);
    assert_eq!(exit, Exit::Code(0), "{script}: {output}{errors}");
    output.trim_end().to_owned()
}

fn parts(renewed: &Renewed) -> Vec<(&str, bool)> {
    let parts = renewed.parts.iter();
    parts
        .map(|part| (part.part.as_str(), part.failed.is_none()))
        .collect()
}

fn failed<'a>(renewed: &'a Renewed, part: &str) -> &'a str {
    let found = renewed.parts.iter().find(|p| p.part == part).unwrap();
    found.failed.as_deref().unwrap()
}

const ID: &str = "00112233445566778899aabbccddeeff";

#[test]
fn names_and_random_numbers_are_new_ones() {
    let Some(agent) = alone("names_and_random_numbers_are_new_ones") else {
        return;
    };
    // A file of the image that leads elsewhere, as D-Bus's does, and one that does not.
    said(
        &agent,
        "ln -s /nowhere /etc/machine-id && mkdir /var/lib/dbus && echo old >/var/lib/dbus/machine-id && \
         printf '127.0.0.1\\tlocalhost\\n# mine\\n' >/etc/hosts",
    );
    let before = said(&agent, "hostname");
    let renewal = Renewal {
        entropy: (0..=255).collect(),
        hostname: Some("clone-7.front".into()),
        machine_id: Some(ID.to_uppercase()),
        ..Renewal::default()
    };
    let boot_id = || said(&agent, "cat /proc/sys/kernel/random/boot_id");
    let mut boot_ids = vec![boot_id()];
    // A second time it is what it is.
    for _ in 0..2 {
        let renewed = agent.guest().renew(&renewal).unwrap();
        assert_eq!(
            parts(&renewed),
            [
                ("entropy", true),
                ("hostname", true),
                ("machine-id", true),
                ("boot-id", true)
            ],
            "{renewed:?}"
        );
        assert_eq!(renewed.failures(), Vec::<String>::new());
        assert!(
            renewed.parts.iter().all(|part| part.remark.is_none()),
            "{renewed:?}"
        );
        let new = boot_id();
        assert!(!boot_ids.contains(&new) && new.len() == 36, "{new}");
        assert_eq!(new, boot_id(), "another one with each look");
        boot_ids.push(new);
        assert_eq!((renewed.clock_off_ns, renewed.hooks.len()), (None, 0));
    }
    assert_ne!(before, "clone-7.front");
    assert_eq!(
        said(&agent, "hostname; cat /etc/hostname"),
        "clone-7.front\nclone-7.front"
    );
    assert_eq!(
        said(&agent, "cat /etc/hosts"),
        "127.0.0.1\tlocalhost\n# mine\n127.0.1.1\tclone-7.front"
    );
    assert_eq!(
        said(&agent, "cat /etc/machine-id /var/lib/dbus/machine-id"),
        format!("{ID}\n{ID}")
    );
    let other = Renewal {
        hostname: Some("other".into()),
        ..Renewal::default()
    };
    agent.guest().renew(&other).unwrap();
    assert_eq!(
        said(&agent, "cat /etc/hosts"),
        "127.0.0.1\tlocalhost\n# mine\n127.0.1.1\tother"
    );
}

#[test]
fn what_cannot_be_is_told_and_keeps_nothing_else_from_being_done() {
    let Some(agent) = alone("what_cannot_be_is_told_and_keeps_nothing_else_from_being_done") else {
        return;
    };
    let renewal = Renewal {
        entropy: vec![1; 513],
        // No clock of Linux goes so far.
        unix_ns: Some(u64::MAX),
        hostname: Some("two\nlines".into()),
        machine_id: Some("0".repeat(32)),
        interfaces: vec![RenewedInterface {
            is: "eth7".into(),
            becomes: "alveole.net=02:00:00:00:00:07".into(),
        }],
        hooks_ms: Some(1000),
    };
    let before = said(&agent, "hostname; ls /etc");
    let renewed = agent.guest().renew(&renewal).unwrap();
    assert_eq!(
        parts(&renewed),
        [
            ("entropy", false),
            ("clock", false),
            ("hostname", false),
            ("machine-id", false),
            ("boot-id", true),
            ("network", false),
            ("hooks", true),
        ]
    );
    for (part, word) in [
        ("entropy", "513"),
        ("clock", "18446744073709551615"),
        ("hostname", "two\\nlines"),
        ("machine-id", "all of them zero"),
        ("network", "eth7"),
    ] {
        assert!(failed(&renewed, part).contains(word), "{renewed:?}");
    }
    assert_eq!(renewed.failures().len(), 5);
    assert_eq!(renewed.clock_off_ns, None);
    assert_eq!(said(&agent, "hostname; ls /etc"), before);
    // Nothing asked, nothing done.
    let nothing = agent.guest().renew(&Renewal::default()).unwrap();
    assert_eq!(nothing, Renewed::default());
}

/// An interface, and its neighbour in another namespace.
fn linked(agent: &Agent) {
    said(
        agent,
        "ip netns add there && ip link add eth0 address 02:00:00:00:00:01 type veth peer name eth0 netns there && \
         ip -n there addr add 10.9.0.1/24 dev eth0 && ip -n there addr add fd09::1/64 dev eth0 nodad && ip -n there link set eth0 up",
    );
}

fn interface(is: &str, becomes: &str) -> Renewal {
    Renewal {
        interfaces: vec![RenewedInterface {
            is: is.into(),
            becomes: becomes.into(),
        }],
        ..Renewal::default()
    }
}

#[test]
fn an_interface_is_another_one_and_its_neighbours_hear_of_it() {
    let Some(agent) = alone("an_interface_is_another_one_and_its_neighbours_hear_of_it") else {
        return;
    };
    linked(&agent);
    let become_it = |is: &str, becomes: &str| {
        let renewed = agent.guest().renew(&interface(is, becomes)).unwrap();
        assert_eq!(parts(&renewed), [("network", true)], "{renewed:?}");
        renewed
    };
    become_it(
        "eth0",
        "alveole.net=02:00:00:00:00:02,ip=10.9.0.5/24,ip=10.9.0.6/24,ip=fd09::5/64,gw=10.9.0.1,gw=fd09::1,dns=10.9.0.1,search=front.internal,mtu=1400",
    );
    assert_eq!(
        said(&agent, "cat /etc/resolv.conf"),
        "nameserver 10.9.0.1\nsearch front.internal"
    );
    assert_eq!(
        (mac(&agent, "eth0"), mtu(&agent, "eth0")),
        ("02:00:00:00:00:02".into(), "1400".into())
    );
    // The neighbour knows who has these addresses.
    said(
        &agent,
        "ip netns exec there ping -c1 -W5 10.9.0.5 && ip netns exec there ping -c1 -W5 fd09::5",
    );
    assert_eq!(neighbour(&agent, "10.9.0.5"), "02:00:00:00:00:02");

    // The same addresses by another device: nobody asks the neighbour, it is told.
    become_it(
        "02:00:00:00:00:02",
        "alveole.net=02:00:00:00:00:03,ip=10.9.0.5/24,ip=fd09::5/64,gw=10.9.0.1,gw=fd09::1,dns=10.9.0.1,mtu=1500",
    );
    for address in ["10.9.0.5", "fd09::5"] {
        let until = Instant::now() + Duration::from_secs(5);
        while neighbour(&agent, address) != "02:00:00:00:00:03" {
            assert!(
                Instant::now() < until,
                "{address} is still at {}",
                neighbour(&agent, address)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    // Others: nothing of the ones before is left.
    let renewed = become_it(
        "02:00:00:00:00:03",
        "alveole.net=02:00:00:00:00:04,ip=10.9.0.77/24,gw=10.9.0.1",
    );
    assert_eq!(renewed.parts[0].remark, None);
    let addresses = said(
        &agent,
        "ip -o addr show dev eth0 scope global | sed 's/.*inet6* \\([^ ]*\\).*/\\1/'",
    );
    assert_eq!(addresses, "10.9.0.77/24");
    let own = said(
        &agent,
        "ip -o -6 addr show dev eth0 scope link | sed 's/.*inet6* \\([^ ]*\\).*/\\1/'",
    );
    assert_eq!(own, "fe80::ff:fe00:4/64");
    assert_eq!(
        said(&agent, "ip route show default; ip -6 route show default"),
        "default via 10.9.0.1 dev eth0"
    );
    said(&agent, "ip netns exec there ping -c1 -W5 10.9.0.77");
    let own = said(&agent, "hostname");
    assert_eq!(
        said(&agent, "tail -n1 /etc/hosts"),
        format!("10.9.0.77\t{own}")
    );
    // Asked again, as by a host that has not heard the answer.
    become_it(
        "02:00:00:00:00:03",
        "alveole.net=02:00:00:00:00:04,ip=10.9.0.78/24,gw=10.9.0.1",
    );
    said(&agent, "ip netns exec there ping -c1 -W5 10.9.0.78");
}

// `/sys` has the devices of the namespace that it was mounted in.
fn mac(agent: &Agent, device: &str) -> String {
    said(
        agent,
        &format!("ip -o link show dev {device} | sed 's/.*ether \\([^ ]*\\).*/\\1/'"),
    )
}

fn mtu(agent: &Agent, device: &str) -> String {
    said(
        agent,
        &format!("ip -o link show dev {device} | sed 's/.*mtu \\([^ ]*\\).*/\\1/'"),
    )
}

/// Whom the neighbour has at an address.
fn neighbour(agent: &Agent, address: &str) -> String {
    said(
        agent,
        &format!("ip -n there neigh show {address} | sed -n 's/.*lladdr \\([^ ]*\\).*/\\1/p'"),
    )
}

/// Two devices change their addresses; a third stays and leads out; resolvers that somebody has chosen stay.
#[test]
fn devices_may_swap_and_what_others_chose_stays() {
    let Some(agent) = alone("devices_may_swap_and_what_others_chose_stays") else {
        return;
    };
    said(
        &agent,
        "for n in 1 2 3; do ip link add d$n address 02:00:00:00:00:0$n type veth peer name p$n; ip link set p$n up; done; \
         ip link set d3 up && ip addr add 10.3.0.2/24 dev d3 && ip route add default via 10.3.0.1",
    );
    let swap = |becomes: [&str; 2]| Renewal {
        interfaces: ["02:00:00:00:00:01", "02:00:00:00:00:02"]
            .into_iter()
            .zip(becomes)
            .map(|(is, becomes)| RenewedInterface {
                is: is.into(),
                becomes: becomes.into(),
            })
            .collect(),
        ..Renewal::default()
    };
    said(&agent, "echo nameserver 9.9.9.9 >/etc/resolv.conf");
    let renewed = agent
        .guest()
        .renew(&swap([
            "alveole.net=02:00:00:00:00:02,ip=10.1.0.2/24,gw=10.1.0.1,dns=10.1.0.1",
            "alveole.net=02:00:00:00:00:01,ip=10.2.0.2/24",
        ]))
        .unwrap();
    assert_eq!(parts(&renewed), [("network", true)], "{renewed:?}");
    let remark = renewed.parts[0].remark.as_deref().unwrap();
    assert!(remark.contains("resolv.conf"), "{remark}");
    assert_eq!(said(&agent, "cat /etc/resolv.conf"), "nameserver 9.9.9.9");
    assert_eq!(
        (mac(&agent, "d1"), mac(&agent, "d2")),
        ("02:00:00:00:00:02".into(), "02:00:00:00:00:01".into())
    );
    assert_eq!(
        said(&agent, "ip route show default"),
        "default via 10.3.0.1 dev d3"
    );
    // One that is not there: the other is as it was.
    let mut absent = swap([
        "alveole.net=02:00:00:00:00:0a,ip=10.1.0.9/24",
        "alveole.net=02:00:00:00:00:0b",
    ]);
    absent.interfaces[1].is = "02:00:00:00:00:99".into();
    let renewed = agent.guest().renew(&absent).unwrap();
    assert!(
        failed(&renewed, "network").contains("02:00:00:00:00:99"),
        "{renewed:?}"
    );
    assert_eq!(
        said(
            &agent,
            "ip -o -4 addr show dev d1 | sed 's/.*inet6* \\([^ ]*\\).*/\\1/'"
        ),
        "10.1.0.2/24"
    );
}

#[test]
fn hooks_run_in_order_and_within_their_time() {
    let Some(agent) = alone("hooks_run_in_order_and_within_their_time") else {
        return;
    };
    let hook = |name: &str, script: &str| {
        said(
            &agent,
            &format!(
                "mkdir -p /etc/alveole/renew.d && cd /etc/alveole/renew.d && cat >{name} <<'END' && chmod +x {name}\n#!/bin/sh\n{script}\nEND"
            ),
        );
    };
    let run = |hooks_ms| {
        let renewal = Renewal {
            hostname: Some("hooked".into()),
            hooks_ms: Some(hooks_ms),
            ..Renewal::default()
        };
        agent.guest().renew(&renewal).unwrap()
    };
    // None at all.
    let renewed = run(1000);
    assert_eq!(parts(&renewed), [("hostname", true), ("hooks", true)]);
    assert_eq!(renewed.hooks, []);

    hook("20-second", "echo second >&2; exit 3");
    hook("10-first", "echo first $(hostname)");
    hook("30-much", "yes | head -c 100000; sleep 60 & echo behind");
    hook(".hidden", "echo hidden");
    hook("40-text", "");
    said(
        &agent,
        "chmod -x /etc/alveole/renew.d/40-text; mkdir /etc/alveole/renew.d/50-folder",
    );
    said(
        &agent,
        "cd /etc/alveole/renew.d; printf '#!/no/such\\n' >15-bad; chmod +x 15-bad",
    );
    let renewed = run(30_000);
    let ran = |name: &str, code, output: &str| HookRun {
        name: name.into(),
        exit: Some(Exit::Code(code)),
        output: output.into(),
    };
    assert_eq!(
        renewed.hooks[..2],
        [
            ran("10-first", 0, "first hooked\n"),
            ran("20-second", 3, "second\n")
        ]
    );
    assert_eq!(renewed.hooks.len(), 3);
    let much = &renewed.hooks[2];
    assert_eq!((much.exit, much.output.len()), (Some(Exit::Code(0)), 4096));
    assert!(failed(&renewed, "hooks").contains("15-bad"), "{renewed:?}");
    assert_eq!(renewed.failures().len(), 2);

    // One that does not end takes nobody's time but its own and that of those after it.
    hook("15-bad", "echo so far; sleep 1000 & wait");
    let begun = Instant::now();
    let renewed = run(300);
    assert!(begun.elapsed() < Duration::from_secs(20));
    let slow = renewed.hooks.last().unwrap();
    assert_eq!(
        (slow.name.as_str(), slow.exit, slow.output.as_str()),
        ("15-bad", None, "so far\n")
    );
    assert!(failed(&renewed, "hooks").contains("20-second"));
    // With all that it had started.
    assert_eq!(agent.sh("pgrep -xf 'sleep 1000'").0, Exit::Code(1));
}

#[test]
fn two_at_once_are_one_after_the_other() {
    let Some(agent) = alone("two_at_once_are_one_after_the_other") else {
        return;
    };
    said(
        &agent,
        "mkdir -p /etc/alveole/renew.d && printf '#!/bin/sh\\ntouch /etc/began; until [ -e /etc/go ]; do sleep 0.01; done' \
         >/etc/alveole/renew.d/x && chmod +x /etc/alveole/renew.d/x",
    );
    let waits = Renewal {
        hooks_ms: Some(20_000),
        ..Renewal::default()
    };
    let (guest, renewal) = (agent.guest(), waits.clone());
    let first = std::thread::spawn(move || guest.renew(&renewal));
    said(&agent, "until [ -e /etc/began ]; do sleep 0.01; done");
    let Err(AgentError::Refused(refusal)) = agent.guest().renew(&waits) else {
        panic!("two at once");
    };
    assert!(refusal.text.contains("another session"), "{refusal:?}");
    said(&agent, "touch /etc/go");
    let renewed = first.join().unwrap().unwrap();
    assert_eq!(renewed.hooks[0].exit, Some(Exit::Code(0)));
}
