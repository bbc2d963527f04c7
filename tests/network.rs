//! Networks of guests on a real kernel: made and removed without a trace, killed at every step, who reaches whom,
//! who cannot pretend to be whom. Each test has a network namespace of its own; other namespaces stand in for
//! guests and for the world (`network/space.rs`).

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[path = "network/space.rs"]
mod space;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use alveole_network::user::{UserNetwork, UserRequest};
use alveole_network::{
    Attach, Egress, Folders, NetworkFile, NetworkName, NetworkRequest, NetworkSpec, Networks, Plug,
    read_file,
};

use space::{Guest, Machine, ROLE, alone, ok, play, role, run, same_as, skip, trace};

/// Nothing by itself: what other processes of this program do.
#[test]
fn plays_a_role() {
    let Ok(words) = std::env::var(ROLE) else {
        return;
    };
    match words.split_once(' ') {
        Some(("step", rest)) => step(rest),
        _ => play(&words),
    }
}

fn networks(folder: &Path) -> Networks {
    Networks::new(Folders::below(folder))
}

fn name(text: &str) -> NetworkName {
    text.parse().unwrap()
}

fn request(mode: &str, subnets: &[&str]) -> NetworkRequest {
    NetworkRequest {
        mode: Some(mode.into()),
        subnet: subnets.iter().map(|s| (*s).to_owned()).collect(),
        ..NetworkRequest::default()
    }
}

fn create(networks: &Networks, network: &str, request: &NetworkRequest) {
    networks
        .create(&name(network), request, Some(&mut |_| ()))
        .unwrap();
}

fn remove(networks: &Networks, names: &[&str]) {
    let names: Vec<_> = names.iter().map(|n| name(n)).collect();
    networks.remove(&names, false, Some(&mut |_| ())).unwrap();
}

fn all_up(networks: &Networks, count: usize) {
    let list = networks.list().unwrap();
    assert_eq!(list.len(), count);
    for network in list {
        assert_eq!(
            (network.state, network.missing.len()),
            ("up", 0),
            "{}: {:?}",
            network.spec.name,
            network.missing
        );
    }
}

/// The world: a machine at the other end of `eth0`, through which the default routes lead.
fn world() -> Machine {
    let world = Machine::new();
    ok(
        "ip",
        &format!(
            "link add eth0 type veth peer name eth0 netns {}",
            world.pid()
        ),
    );
    ok("ip", "addr add 192.0.2.2/24 dev eth0");
    ok("ip", "addr add 2001:db8::2/64 dev eth0 nodad");
    ok("ip", "link set eth0 up");
    world.ok("ip addr add 192.0.2.1/24 dev eth0");
    world.ok("ip addr add 198.51.100.7/32 dev lo");
    world.ok("ip addr add 2001:db8::1/64 dev eth0 nodad");
    world.ok("ip link set eth0 up");
    ok("ip", "route add default via 192.0.2.1");
    ok("ip", "route add default via 2001:db8::1");
    wait_for_carrier("eth0");
    world
}

fn wait_for_carrier(link: &str) {
    let began = Instant::now();
    while !fs::read_to_string(format!("/sys/class/net/{link}/operstate"))
        .is_ok_and(|s| s.trim() == "up")
        && !ok("ip", &format!("link show {link}")).contains("state UP")
    {
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{link} does not come up"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn to(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

#[test]
fn networks_come_and_go_without_a_trace() {
    alone("networks_come_and_go_without_a_trace", |folder| {
        let _world = world();
        ok("ip", "link add trunk type veth peer name far");
        ok("ip", "link set trunk up");
        ok("ip", "link set far up");
        // Somebody else's rules stay as they are.
        ok("nft", "add table inet theirs");
        ok(
            "nft",
            "add chain inet theirs input { type filter hook input priority 0 ; }",
        );
        std::thread::sleep(Duration::from_millis(200));
        let before = trace();
        let networks = networks(folder);
        let mut on_trunk = request("bridge", &["10.7.0.0/24"]);
        on_trunk.parent = Some("trunk".into());
        create(&networks, "web", &request("nat", &[]));
        create(&networks, "lan", &on_trunk);
        create(
            &networks,
            "lone",
            &request("isolated", &["10.8.0.0/24", "fd08::/64"]),
        );
        all_up(&networks, 3);
        // Again, with the same words: nothing changes.
        for (network, request) in [("web", &request("nat", &[])), ("lan", &on_trunk)] {
            assert_eq!(
                networks
                    .create(&name(network), request, Some(&mut |_| ()))
                    .unwrap(),
                []
            );
        }
        assert_eq!(
            fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
                .unwrap()
                .trim(),
            "1"
        );
        // What others break is found and mended.
        ok("nft", "delete table inet alveole");
        ok("ip", "link del lone");
        assert_eq!(
            networks
                .list()
                .unwrap()
                .iter()
                .filter(|n| n.state == "incomplete")
                .count(),
            3
        );
        networks.repair(Some(&mut |_| ())).unwrap();
        all_up(&networks, 3);
        remove(&networks, &["web", "lan", "lone"]);
        assert!(networks.list().unwrap().is_empty());
        same_as(&before);
    });
}

/// One command in a process that kills itself before its nth step: `FOLDER COMMAND N`.
fn step(words: &str) {
    let mut words = words.split_whitespace();
    let networks = networks(Path::new(words.next().unwrap()));
    let command = words.next().unwrap();
    let mut left: u32 = words.next().unwrap().parse().unwrap();
    let mut watch = |_: &_| {
        if left == 0 {
            let me = std::process::id().to_string();
            run("kill", &format!("-9 {me}"));
            unreachable!("killed");
        }
        left -= 1;
    };
    match command {
        "create" => networks.create(&name("web"), &killed_request(), Some(&mut watch)),
        _ => networks.remove(&[name("web")], true, Some(&mut watch)),
    }
    .unwrap();
}

fn killed_request() -> NetworkRequest {
    request("nat", &["10.7.0.0/24", "fd07::/64"])
}

#[test]
fn a_command_killed_at_any_step_is_finished_by_the_next() {
    alone(
        "a_command_killed_at_any_step_is_finished_by_the_next",
        |folder| {
            let _world = world();
            let networks = networks(folder);
            // Whether it was killed; else it is done.
            let killed = |command: &str, n: u32| {
                let done = role(&format!("step {} {command} {n}", folder.display()))
                    .output()
                    .unwrap();
                let killed = done.status.signal() == Some(9);
                assert!(
                    killed || done.status.success(),
                    "{}",
                    String::from_utf8_lossy(&done.stdout)
                );
                killed
            };
            std::thread::sleep(Duration::from_millis(200));
            let before = trace();
            let mut steps = BTreeMap::new();
            for command in ["create", "remove"] {
                for next in ["create", "remove"] {
                    let mut n = 0;
                    loop {
                        if command == "remove" {
                            create(&networks, "web", &killed_request());
                        }
                        let was_killed = killed(command, n);
                        if next == "create" {
                            create(&networks, "web", &killed_request());
                            all_up(&networks, 1);
                        }
                        if networks.list().unwrap().len() == 1 {
                            remove(&networks, &["web"]);
                        }
                        same_as(&before);
                        assert!(
                            fs::read_dir(folder.join("networks"))
                                .unwrap()
                                .all(|f| f.unwrap().file_name() == "lock")
                        );
                        if !was_killed {
                            break;
                        }
                        n += 1;
                    }
                    steps.insert((command, next), n);
                }
            }
            println!("steps at which it was killed: {steps:?}");
            assert!(steps.values().all(|n| *n >= 6), "{steps:?}");
        },
    );
}

#[test]
fn nat_leads_out_and_nobody_in() {
    alone("nat_leads_out_and_nobody_in", |folder| {
        let world = world();
        let _web = world.serve(&[80, 81]);
        let networks = networks(folder);
        let before = trace();
        let mut web = request("nat", &["10.7.0.0/24", "fd07::/64"]);
        web.rules = vec![
            "deny,to=198.51.100.0/24".parse().unwrap(),
            "deny,to=outside,protocol=tcp,port=81".parse().unwrap(),
        ];
        create(&networks, "web", &web);
        let a = Guest::start(&networks, "a", &["web"]);
        let closed = Guest::with(&networks, "closed", &["web"], |attach| {
            attach.egress = Some(Egress::Closed);
            attach.rules = vec!["allow,to=192.0.2.1,protocol=tcp,port=80".parse().unwrap()];
        });
        let (world4, world6) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let other: IpAddr = "198.51.100.7".parse().unwrap();
        let us: IpAddr = "192.0.2.2".parse().unwrap();
        // The world sees this host.
        assert_eq!(
            a.machine.connect(&[
                to(world4, 80),
                to(world6, 80),
                to(world4, 81),
                to(other, 80)
            ]),
            [Some(us), Some("2001:db8::2".parse().unwrap()), None, None]
        );
        assert!(a.machine.pings(world4) && a.machine.pings(world6) && !a.machine.pings(other));
        assert_eq!(
            closed
                .machine
                .connect(&[to(world4, 80), to(world6, 80), to(world4, 81)]),
            [Some(us), None, None]
        );
        assert!(!closed.machine.pings(world4));
        // Guests of one network see each other, the world sees none, and this host's services are its own.
        let _a = a.machine.serve(&[80]);
        assert_eq!(
            closed.machine.connect(&[to(a.v4(), 80), to(a.v6(), 80)]),
            [Some(closed.v4()), Some(closed.v6())]
        );
        world.ok("ip route add 10.7.0.0/24 via 192.0.2.2");
        assert_eq!(world.connect(&[to(a.v4(), 80)]), [None]);
        let listener = std::net::TcpListener::bind("[::]:2222").unwrap();
        let gateway = a.on[0].gateways[0];
        assert_eq!(
            a.machine.connect(&[to(gateway, 2222), to(us, 2222)]),
            [None, None]
        );
        assert!(a.machine.pings(gateway));
        drop(listener);
        world.ok("ip route del 10.7.0.0/24");
        a.stop(&networks);
        closed.stop(&networks);
        remove(&networks, &["web"]);
        same_as(&before);
    });
}

#[test]
fn a_guest_cannot_pretend_to_be_another() {
    alone("a_guest_cannot_pretend_to_be_another", |folder| {
        let networks = networks(folder);
        create(
            &networks,
            "lan",
            &request("bridge", &["10.7.0.0/24", "fd07::/64"]),
        );
        let victim = Guest::start(&networks, "victim", &["lan"]);
        let bad = Guest::start(&networks, "bad", &["lan"]);
        let gateway = victim.on[0].gateways.clone();
        assert!(bad.machine.pings(victim.v4()) && bad.machine.pings(victim.v6()));
        assert!(bad.machine.pings(gateway[0]) && bad.machine.pings(gateway[1]));
        // Another address of its own choice, then that of another guest.
        for address in ["10.7.0.250/24".to_owned(), format!("{}/24", victim.v4())] {
            bad.machine.ok(&format!("ip addr add {address} dev eth0"));
            let from = address.split('/').next().unwrap();
            assert!(
                !bad.machine
                    .run(&format!("ping -n -c 1 -W 1 -I {from} {}", gateway[0]))
                    .0,
                "{from}"
            );
            bad.machine.ok(&format!("ip addr del {address} dev eth0"));
        }
        bad.machine.ok("ip addr add fd07::bad/64 dev eth0 nodad");
        assert!(
            !bad.machine
                .run(&format!("ping -n -c 1 -W 1 -I fd07::bad {}", gateway[1]))
                .0
        );
        bad.machine.ok("ip addr del fd07::bad/64 dev eth0");
        // Another hardware address.
        bad.machine.ok("ip link set eth0 address 02:00:00:00:00:99");
        assert!(!bad.machine.pings(gateway[0]) && !bad.machine.pings(victim.v6()));
        bad.machine
            .ok(&format!("ip link set eth0 address {}", bad.on[0].mac));
        assert!(bad.machine.pings(gateway[0]), "its own is good again");
        // The second of a kind is refused.
        let attach = Attach {
            plug: Plug::Tap {
                queues: 1,
                owner: 0,
                persist: false,
            },
            mac: Some(victim.on[0].mac),
            process: None,
            rules: Vec::new(),
            egress: None,
        };
        let said = networks
            .attach(&name("lan"), &"third".parse().unwrap(), &attach)
            .unwrap_err()
            .to_string();
        assert!(said.contains("'victim'"), "{said}");
        let again = Attach {
            mac: None,
            ..attach
        };
        let said = networks
            .attach(&name("lan"), &"victim".parse().unwrap(), &again)
            .unwrap_err()
            .to_string();
        assert!(said.contains("is on it already"), "{said}");
    });
}

#[test]
fn names_and_dhcp_say_the_same() {
    alone("names_and_dhcp_say_the_same", |folder| {
        let networks = networks(folder);
        create(
            &networks,
            "lan",
            &request("isolated", &["10.7.0.0/24", "fd07::/64"]),
        );
        let a = Guest::start(&networks, "a", &["lan"]);
        let b = Guest::start(&networks, "b", &["lan"]);
        let hex = |address: IpAddr| match address {
            IpAddr::V4(a) => a.octets().map(|b| format!("{b:02x}")).concat(),
            IpAddr::V6(a) => a.octets().map(|b| format!("{b:02x}")).concat(),
        };
        // It is told of new guests, and reads of them in its own time.
        let began = Instant::now();
        while a
            .machine
            .resolve(a.on[0].dns[0], "b.lan.internal", 1)
            .is_empty()
        {
            assert!(began.elapsed() < Duration::from_secs(10), "b is not known");
        }
        for server in a.on[0].dns.clone() {
            for asked in ["b", "b.lan.internal"] {
                assert!(
                    a.machine.resolve(server, asked, 1).ends_with(&hex(b.v4())),
                    "{asked} at {server}"
                );
                assert!(
                    a.machine.resolve(server, asked, 28).ends_with(&hex(b.v6())),
                    "{asked} at {server}"
                );
            }
            assert_eq!(a.machine.resolve(server, "nobody.lan.internal", 1), "");
        }
        // By DHCP a guest has what it was told.
        let script = folder.join("script");
        fs::write(&script, "#!/bin/sh\n[ $1 != bound ] || echo \"lease $ip/$mask router=$router dns=$dns mtu=$mtu domain=$domain\"\n").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        if Path::new("/bin/busybox").exists() || Path::new("/usr/bin/busybox").exists() {
            let own = b.v4();
            b.machine.ok(&format!("ip addr del {own}/24 dev eth0"));
            let said = b.machine.ok(&format!(
                "busybox udhcpc -n -q -f -i eth0 -O mtu -s {}",
                script.display()
            ));
            let lease = format!(
                "lease {own}/24 router= dns={} mtu=1500 domain=lan.internal",
                a.on[0].dns[0]
            );
            assert!(said.contains(&lease), "{said}");
        } else {
            skip(
                "names_and_dhcp_say_the_same",
                "there is no busybox to ask for an address",
            );
        }
        b.stop(&networks);
        let gone = |server| a.machine.resolve(server, "b.lan.internal", 1).is_empty();
        let began = Instant::now();
        while !gone(a.on[0].dns[0]) {
            assert!(
                began.elapsed() < Duration::from_secs(5),
                "its name is still known"
            );
        }
    });
}

#[test]
fn a_tap_comes_with_its_queues_and_goes_with_them() {
    alone("a_tap_comes_with_its_queues_and_goes_with_them", |folder| {
        if !Path::new("/dev/net/tun").exists() {
            run("modprobe", "tun");
        }
        if !Path::new("/dev/net/tun").exists() {
            return skip(
                "a_tap_comes_with_its_queues_and_goes_with_them",
                "there is no /dev/net/tun",
            );
        }
        let networks = networks(folder);
        create(
            &networks,
            "lan",
            &NetworkRequest {
                mtu: Some(9000),
                ..request("bridge", &["10.7.0.0/24"])
            },
        );
        let owner = 54_321;
        let attach = |persist, process| Attach {
            plug: Plug::Tap {
                queues: 2,
                owner,
                persist,
            },
            mac: None,
            process,
            rules: Vec::new(),
            egress: None,
        };
        let vm = "vm".parse().unwrap();
        let first = networks
            .attach(&name("lan"), &vm, &attach(false, None))
            .unwrap();
        let tap = first.interface.clone();
        let shown = ok("ip", &format!("-d link show {tap}"));
        for word in [
            "master lan",
            "mtu 9000",
            "multi_queue",
            "vnet_hdr",
            "persist off",
            "user 54321",
            "numqueues 2",
        ] {
            assert!(shown.contains(word), "{word}: {shown}");
        }
        assert_eq!(first.queues.len(), 2);
        let address = first.addresses.clone();
        let said = networks
            .remove(&[name("lan")], false, Some(&mut |_| ()))
            .unwrap_err()
            .to_string();
        assert!(said.contains("vm") && said.contains("--force"), "{said}");
        drop(first.queues);
        assert!(
            !run("ip", &format!("link show {tap}")).0,
            "the tap outlives its queues"
        );
        networks.detach(&name("lan"), &vm).unwrap();
        // One that stays, of a process that goes.
        let mut other = std::process::Command::new("sleep")
            .arg("infinity")
            .spawn()
            .unwrap();
        let second = networks
            .attach(&name("lan"), &vm, &attach(true, Some(other.id())))
            .unwrap();
        assert_eq!(second.addresses, address, "its addresses changed");
        drop(second.queues);
        assert!(run("ip", &format!("link show {tap}")).0, "it was to stay");
        other.kill().unwrap();
        other.wait().unwrap();
        networks.repair(Some(&mut |_| ())).unwrap();
        assert!(
            !run("ip", &format!("link show {tap}")).0,
            "it outlives its VM"
        );
        remove(&networks, &["lan"]);
    });
}

#[test]
fn many_commands_at_once() {
    alone("many_commands_at_once", |folder| {
        std::thread::sleep(Duration::from_millis(200));
        let before = trace();
        let networks = networks(folder);
        let tasks: Vec<_> = (0..8)
            .map(|n| {
                let networks = networks.clone();
                // Two of each, of which one finds it made.
                std::thread::spawn(move || {
                    create(&networks, &format!("net{}", n / 2), &request("nat", &[]));
                })
            })
            .collect();
        tasks.into_iter().for_each(|task| task.join().unwrap());
        all_up(&networks, 4);
        let subnets: Vec<_> = networks
            .list()
            .unwrap()
            .iter()
            .map(|n| n.spec.v4.unwrap())
            .collect();
        assert!(
            subnets
                .iter()
                .all(|a| subnets.iter().filter(|b| *b == a).count() == 1)
        );
        let tasks: Vec<_> = (0..4)
            .map(|n| {
                let networks = networks.clone();
                std::thread::spawn(move || remove(&networks, &[&format!("net{n}")]))
            })
            .collect();
        tasks.into_iter().for_each(|task| task.join().unwrap());
        same_as(&before);
    });
}

#[test]
fn what_is_in_the_way_is_named_and_nothing_is_begun() {
    alone(
        "what_is_in_the_way_is_named_and_nothing_is_begun",
        |folder| {
            let _world = world();
            ok("ip", "link add taken type bridge");
            std::thread::sleep(Duration::from_millis(200));
            let before = trace();
            let networks = networks(folder);
            let says = |network: &str, request: &NetworkRequest| {
                networks
                    .create(&name(network), request, Some(&mut |_| ()))
                    .unwrap_err()
                    .to_string()
            };
            let on = |parent: &str| NetworkRequest {
                parent: Some(parent.into()),
                ..request("bridge", &[])
            };
            let vlan = |parent: &str| NetworkRequest {
                vlan: Some(10),
                ..on(parent)
            };
            let ruled = NetworkRequest {
                rules: vec!["allow,to=nowhere".parse().unwrap()],
                ..request("nat", &[])
            };
            for (said, word) in [
                (
                    says("taken", &request("bridge", &[])),
                    "not made by alveole",
                ),
                (
                    says("lan", &request("bridge", &["192.0.2.0/25"])),
                    "192.0.2.0/24 over eth0",
                ),
                (says("lan", &on("eth0")), "192.0.2.2/24"),
                (says("lan", &vlan("no-such")), "no interface 'no-such'"),
                (says("lan", &vlan("taken")), "'taken' is down"),
                (says("lan", &ruled), "no network 'nowhere'"),
            ] {
                assert!(said.contains(word), "{said}");
            }
            same_as(&before);
            // Something that only the kernel knows: all that was begun is taken back.
            ok("mount", "--bind /dev/null /usr/sbin/nft");
            let said = says("lan", &request("nat", &[]));
            assert!(said.contains("nftables"), "{said}");
            ok("umount", "/usr/sbin/nft");
            ok("mount", "--bind /bin/false /usr/sbin/dnsmasq");
            let said = says("lan", &request("nat", &[]));
            assert!(said.contains("dnsmasq"), "{said}");
            ok("umount", "/usr/sbin/dnsmasq");
            same_as(&before);
            assert!(networks.list().unwrap().is_empty());
            // Without the right.
            let done = std::process::Command::new("setpriv")
                .args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin"])
                .arg(std::env::current_exe().unwrap())
                .args(["plays_a_role", "--exact", "--nocapture"])
                .env(ROLE, format!("step {} create 99", folder.display()))
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&done.stdout).into_owned()
                + &String::from_utf8_lossy(&done.stderr);
            assert!(!done.status.success() && said.contains("Kernel"), "{said}");
            same_as(&before);
        },
    );
}

/// The example; without its trunk where this kernel knows no VLANs.
fn three_tiers(with_trunk: bool) -> NetworkFile {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/machines/three-tier/network.toml");
    let mut file = read_file(&path).unwrap();
    if !with_trunk {
        for spec in file.networks.values_mut() {
            *spec = NetworkSpec {
                parent: None,
                vlan: None,
                ..spec.clone()
            };
        }
    }
    file
}

/// Who reaches whom, by TCP port and ping, in both families.
fn tiers_are_apart(networks: &Networks, world: &Machine) {
    const PORTS: [u16; 5] = [22, 443, 5432, 6379, 8080];
    let tiers = ["front", "middle", "back"];
    let guests: Vec<Guest> = tiers
        .iter()
        .map(|tier| Guest::start(networks, &format!("{tier}-1"), &[tier]))
        .collect();
    let both = Guest::start(networks, "both", &["front", "back"]);
    world.ok("ip route add 10.31.0.0/16 via 192.0.2.2");
    world.ok("ip route add fd31::/16 via 2001:db8::2");
    let mut serving: Vec<_> = guests
        .iter()
        .map(|guest| guest.machine.serve(&PORTS))
        .collect();
    serving.push(world.serve(&PORTS));
    serving.push(both.machine.serve(&PORTS));
    let world_at: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let allowed = |from: &str, to: &str, port: u16| {
        matches!(
            (from, to, port),
            ("front", "middle", 8080) | ("middle", "back", 5432 | 6379) | ("front", "world", 443)
        )
    };
    let mut tried = 0;
    let sources = tiers
        .iter()
        .zip(&guests)
        .map(|(tier, guest)| (*tier, &guest.machine))
        .chain([("world", world)]);
    for (from, machine) in sources {
        let targets = tiers
            .iter()
            .zip(&guests)
            .map(|(tier, guest)| (*tier, [guest.v4(), guest.v6()]))
            .chain([("world", world_at)]);
        for (to_tier, addresses) in targets.filter(|(t, _)| *t != from) {
            let asked: Vec<_> = addresses
                .iter()
                .flat_map(|a| PORTS.map(|port| to(*a, port)))
                .collect();
            let seen = machine.connect(&asked);
            for (target, seen) in asked.iter().zip(seen) {
                assert_eq!(
                    seen.is_some(),
                    allowed(from, to_tier, target.port()),
                    "{from} to {to_tier} at {target}"
                );
                tried += 1;
            }
            for address in addresses {
                let pings = (from, to_tier) == ("middle", "back");
                assert_eq!(
                    machine.pings(address),
                    pings,
                    "ping {from} to {to_tier} at {address}"
                );
                tried += 1;
            }
        }
    }
    println!("{tried} pairs tried");
    // One that is on two networks is on them, and its rules are those of the one that it sends over.
    let back = &guests[2];
    let on_back = both.on[1].addresses[0].addr();
    assert_eq!(
        both.machine.connect(&[
            to(back.v4(), 22),
            to(guests[1].v4(), 8080),
            to(guests[1].v4(), 22)
        ]),
        [Some(on_back), Some(both.v4()), None]
    );
    // Each gateway answers its own only.
    assert!(guests[0].machine.pings(guests[0].on[0].gateways[0]));
    assert!(!guests[0].machine.pings(guests[1].on[0].gateways[0]));
    // Names of other tiers where they may be reached.
    let dns = guests[0].on[0].dns[0];
    assert_ne!(
        guests[0]
            .machine
            .resolve(dns, "middle-1.middle.internal", 1),
        ""
    );
    assert_eq!(
        guests[0].machine.resolve(dns, "back-1.back.internal", 1),
        ""
    );
    drop(serving);
    world.ok("ip route del 10.31.0.0/16");
    world.ok("ip route del fd31::/16");
    both.stop(networks);
    guests.into_iter().for_each(|guest| guest.stop(networks));
}

#[test]
fn three_tiers_talk_as_their_file_says() {
    alone("three_tiers_talk_as_their_file_says", |folder| {
        let world = world();
        std::thread::sleep(Duration::from_millis(200));
        let before = trace();
        let networks = networks(folder);
        let mut file = three_tiers(false);
        networks.up(&file, Some(&mut |_| ())).unwrap();
        all_up(&networks, 3);
        // Answers to the outside come home through NAT, or by routes as here.
        tiers_are_apart(&networks, &world);
        // A changed rule holds, without a new network.
        if let Some(back) = file.networks.get_mut(&name("back")) {
            back.rules = vec!["allow,to=front,protocol=icmp".parse().unwrap()];
        }
        let steps = networks.up(&file, Some(&mut |_| ())).unwrap();
        assert!(
            !steps.is_empty() && steps.iter().all(|s| !s.to_string().contains("bridge back")),
            "{steps:?}"
        );
        let (front, back) = (
            Guest::start(&networks, "f", &["front"]),
            Guest::start(&networks, "b", &["back"]),
        );
        assert!(back.machine.pings(front.v4()) && !front.machine.pings(back.v4()));
        front.stop(&networks);
        back.stop(&networks);
        remove(&networks, &["front", "middle", "back"]);
        same_as(&before);
    });
}

#[test]
fn three_tiers_on_vlans_of_one_trunk() {
    const TEST: &str = "three_tiers_on_vlans_of_one_trunk";
    alone(TEST, |folder| {
        run("modprobe", "8021q");
        ok("ip", "link add trunk mtu 1600 type veth peer name far");
        if !run("ip", "link add link trunk name probe type vlan id 5").0 {
            return skip(TEST, "this kernel knows no VLANs (802.1Q)");
        }
        ok("ip", "link del probe");
        // The other host: it has the same tiers on the same trunk.
        let there = Machine::new();
        ok("ip", &format!("link set far netns {}", there.pid()));
        ok("ip", "link set trunk up");
        there.ok("ip link set far up");
        let world = world();
        std::thread::sleep(Duration::from_millis(500));
        let before = trace();
        let networks = networks(folder);
        let file = three_tiers(true);
        networks.up(&file, Some(&mut |_| ())).unwrap();
        all_up(&networks, 3);
        tiers_are_apart(&networks, &world);
        // Frames leave with their tag, and come in by it alone.
        let front = Guest::start(&networks, "f", &["front"]);
        for (id, tier) in [(10, 10), (20, 20)] {
            there.ok(&format!(
                "ip link add link far name far.{id} type vlan id {id}"
            ));
            there.ok(&format!("ip link set far.{id} up"));
            there.ok(&format!("ip addr add 10.31.{tier}.77/24 dev far.{id}"));
        }
        assert!(
            front
                .machine
                .pings("10.31.10.77".parse::<IpAddr>().unwrap()),
            "VLAN 10 does not reach front"
        );
        assert!(there.pings(front.v4()));
        there.ok("ip addr del 10.31.10.77/24 dev far.10");
        there.ok("ip addr add 10.31.10.78/24 dev far.20");
        assert!(!there.pings(front.v4()), "VLAN 20 reaches front");
        front.stop(&networks);
        remove(&networks, &["front", "middle", "back"]);
        same_as(&before);
    });
}

#[test]
fn macvtap_guests_are_neighbours_of_the_parent() {
    const TEST: &str = "macvtap_guests_are_neighbours_of_the_parent";
    alone(TEST, |folder| {
        run("modprobe", "macvtap");
        ok("ip", "link add parent type veth peer name far");
        ok("ip", "link set parent up");
        ok("ip", "link set far up");
        if !run("ip", "link add link parent name probe type macvtap").0 {
            return skip(TEST, "this kernel knows no macvtap");
        }
        ok("ip", "link del probe");
        std::thread::sleep(Duration::from_millis(300));
        let before = trace();
        let networks = networks(folder);
        create(
            &networks,
            "lan",
            &NetworkRequest {
                parent: Some("parent".into()),
                ..request("macvtap", &[])
            },
        );
        all_up(&networks, 1);
        let attach = Attach {
            plug: Plug::Tap {
                queues: 1,
                owner: 0,
                persist: false,
            },
            mac: None,
            process: None,
            rules: Vec::new(),
            egress: None,
        };
        let vm = "vm".parse().unwrap();
        let plugged = networks.attach(&name("lan"), &vm, &attach).unwrap();
        let shown = ok("ip", &format!("-d link show {}", plugged.interface));
        for word in [
            "macvtap mode bridge",
            &plugged.mac.to_string(),
            "alias alveole network lan",
        ] {
            assert!(shown.contains(word), "{word}: {shown}");
        }
        drop(plugged);
        networks.detach(&name("lan"), &vm).unwrap();
        remove(&networks, &["lan"]);
        same_as(&before);
    });
}

#[test]
fn user_mode_serves_a_guest_and_ends_with_it() {
    const TEST: &str = "user_mode_serves_a_guest_and_ends_with_it";
    alone(TEST, |_| {
        if !["/usr/bin/passt", "/bin/passt"]
            .iter()
            .any(|p| Path::new(p).exists())
        {
            return skip(TEST, "there is no passt: install passt");
        }
        let _world = world();
        let vm = "vm".parse().unwrap();
        let request = UserRequest {
            published: vec!["127.0.0.1:8080:80".parse().unwrap()],
            mtu: 65_520,
            mac: None,
        };
        let mut network = UserNetwork::start(&vm, &request).unwrap();
        network.wait_until_ready().unwrap();
        let pid = network.pid().unwrap();
        let mut socket = UnixStream::from(network.take_socket().unwrap());
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        // Whoever asks for the port makes it ask who the guest is.
        let asks = std::thread::spawn(|| {
            TcpStream::connect_timeout(&"127.0.0.1:8080".parse().unwrap(), Duration::from_secs(2))
        });
        // The guest asks who its gateway is (RFC 826).
        let mut arp = vec![0xff; 6];
        arp.extend(network.guest().mac.bytes());
        arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        arp.extend(network.guest().mac.bytes());
        arp.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
        send(&mut socket, &arp);
        let (mut answered, mut published) = (false, false);
        while !(answered && published) {
            let frame = receive(&mut socket);
            answered |= frame[12..14] == [8, 6]
                && frame[20..22] == [0, 2]
                && frame[28..32] == [10, 0, 2, 2];
            // TCP to port 80 of the guest.
            published |= frame[12..14] == [8, 0]
                && frame[23] == 6
                && frame[30..34] == [10, 0, 2, 15]
                && frame[36..38] == [0, 80];
        }
        let said = UserNetwork::start(&"other".parse().unwrap(), &request)
            .unwrap_err()
            .to_string();
        assert!(said.contains("127.0.0.1:8080/tcp"), "{said}");
        let socket: OwnedFd = socket.into();
        let rest = network.release();
        assert!(rest.is_none());
        drop(socket);
        let began = Instant::now();
        while fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|s| !s.contains("State:\tZ"))
        {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "passt outlives its guest"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = asks.join().unwrap();
        // A host that leads nowhere.
        ok("ip", "link del eth0");
        let mut nowhere = UserNetwork::start(&vm, &request).unwrap();
        let said = nowhere.wait_until_ready().unwrap_err().to_string();
        assert!(said.contains("default route"), "{said}");
    });
}

/// In one write: `passt` of 2023 loses its place if it reads a length alone.
fn send(socket: &mut UnixStream, frame: &[u8]) {
    use std::io::Write;
    let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
    socket.write_all(&[&length[..], frame].concat()).unwrap();
}

fn receive(socket: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    socket.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    socket.read_exact(&mut frame).unwrap();
    frame.resize(frame.len().max(64), 0);
    frame
}
