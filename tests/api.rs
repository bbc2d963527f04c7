//! The API of the real program: what the contract says of every path, before and after the start; what is wrong and
//! when it is told; who asks strangely; and what is left behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod api_client;
#[expect(dead_code, reason = "tests/bad_input.rs uses the rest")]
mod tiny_guest;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use api_client::{Client, read_response};
use nix::sys::signal::Signal::{SIGINT, SIGTERM};
use serde_json::{Value, json};
use tiny_guest::{Bench, Running, hang, no_kvm, power_off, print, skipped};
use yaml_rust2::YamlLoader;

/// The host or a file cannot give what is needed.
const HOST: i32 = 1;

/// A guest that says "up" and then sleeps.
fn up() -> Vec<u8> {
    [print("up\n"), hang()].concat()
}

fn socket(bench: &Bench) -> PathBuf {
    bench.file("api")
}

/// Starts the program with an API and nothing else.
fn start<'a>(bench: &'a Bench, more: &[&str]) -> Running<'a> {
    let arguments = [&["--api-sock", "api", "--console", "none"], more].concat();
    bench.start_command(bench.command(&arguments))
}

/// Describes a machine on the kernel of the bench.
fn describe(client: &mut Client) {
    client.done(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": "kernel"}),
    );
    let machine = json!({"vcpu_count": 2, "mem_size_mib": 64});
    client.done("PUT", "/machine-config", machine);
}

fn start_guest(client: &mut Client) {
    client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
}

fn state(client: &mut Client) -> String {
    client.get("/")["state"].as_str().unwrap().to_owned()
}

fn change(client: &mut Client, state: &str) {
    client.done("PATCH", "/vm", json!({ "state": state }));
}

/// Every method and path of the contract, a body, and the status before and after the start.
fn contract() -> Vec<(&'static str, &'static str, Value, u16, u16)> {
    let none = Value::Null;
    let limiter = json!({"bandwidth": {"size": 1000, "refill_time": 100}});
    vec![
        ("GET", "/", none.clone(), 200, 200),
        ("GET", "/version", none.clone(), 200, 200),
        ("GET", "/vm/config", none.clone(), 200, 200),
        ("GET", "/machine-config", none.clone(), 200, 200),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 64}),
            204,
            400,
        ),
        (
            "PATCH",
            "/machine-config",
            json!({"vcpu_count": 1}),
            204,
            400,
        ),
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": "kernel"}),
            204,
            400,
        ),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "a", "path_on_host": "disk", "is_root_device": false}),
            204,
            400,
        ),
        (
            "PUT",
            "/vsock",
            json!({"guest_cid": 3, "uds_path": "vsock"}),
            204,
            400,
        ),
        (
            "PUT",
            "/entropy",
            json!({"rate_limiter": limiter}),
            204,
            400,
        ),
        (
            "PUT",
            "/serial",
            json!({"serial_out_path": "serial"}),
            204,
            400,
        ),
        (
            "PUT",
            "/logger",
            json!({"log_path": "log", "level": "Info"}),
            204,
            400,
        ),
        (
            "PUT",
            "/metrics",
            json!({"metrics_path": "metrics"}),
            204,
            400,
        ),
        (
            "PATCH",
            "/drives/a",
            json!({"drive_id": "a", "rate_limiter": limiter}),
            400,
            204,
        ),
        (
            "PATCH",
            "/drives/a",
            json!({"drive_id": "a", "path_on_host": "disk"}),
            400,
            204,
        ),
        (
            "PATCH",
            "/network-interfaces/a",
            json!({"iface_id": "a"}),
            400,
            400,
        ),
        (
            "PUT",
            "/network-interfaces/a/link",
            json!({"up": true}),
            400,
            400,
        ),
        ("PATCH", "/vm", json!({"state": "Paused"}), 400, 204),
        ("PATCH", "/vm", json!({"state": "Resumed"}), 400, 204),
        (
            "PUT",
            "/actions",
            json!({"action_type": "FlushMetrics"}),
            400,
            204,
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "SendCtrlAltDel"}),
            400,
            204,
        ),
        ("PUT", "/cpu-config", json!({}), 204, 400),
        ("GET", "/mmds", none.clone(), 200, 200),
        ("PUT", "/mmds", json!({"a": 1}), 204, 204),
        ("PATCH", "/mmds", json!({"a": 1}), 204, 204),
        // Parts that do not exist yet.
        (
            "PUT",
            "/mmds/config",
            json!({"network_interfaces": []}),
            400,
            400,
        ),
        ("GET", "/balloon", none.clone(), 400, 400),
        (
            "PUT",
            "/balloon",
            json!({"amount_mib": 1, "deflate_on_oom": true}),
            400,
            400,
        ),
        ("PATCH", "/balloon", json!({"amount_mib": 1}), 400, 400),
        ("GET", "/balloon/statistics", none.clone(), 400, 400),
        (
            "PATCH",
            "/balloon/statistics",
            json!({"stats_polling_interval_s": 1}),
            400,
            400,
        ),
        ("PATCH", "/balloon/hinting/start", json!({}), 400, 400),
        ("GET", "/balloon/hinting/status", none.clone(), 400, 400),
        ("PATCH", "/balloon/hinting/stop", none.clone(), 400, 400),
        (
            "PUT",
            "/pmem/a",
            json!({"id": "a", "path_on_host": "disk"}),
            400,
            400,
        ),
        ("PATCH", "/pmem/a", json!({"id": "a"}), 400, 400),
        ("GET", "/hotplug/memory", none.clone(), 400, 400),
        (
            "PUT",
            "/hotplug/memory",
            json!({"total_size_mib": 1024}),
            400,
            400,
        ),
        (
            "PATCH",
            "/hotplug/memory",
            json!({"requested_size_mib": 128}),
            400,
            400,
        ),
        (
            "PUT",
            "/snapshot/create",
            json!({"mem_file_path": "m", "snapshot_path": "s"}),
            400,
            400,
        ),
        (
            "PUT",
            "/snapshot/load",
            json!({"mem_file_path": "m", "snapshot_path": "s"}),
            400,
            400,
        ),
        // What is in no contract.
        ("GET", "/nope", none.clone(), 400, 400),
        (
            "POST",
            "/actions",
            json!({"action_type": "FlushMetrics"}),
            400,
            400,
        ),
        ("DELETE", "/drives/a", none.clone(), 400, 400),
        ("PUT", "/actions", none, 400, 400),
        ("GET", "/version", json!({}), 400, 400),
        (
            "PUT",
            "/actions",
            json!({"action_type": "Explode"}),
            400,
            400,
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "FlushMetrics", "more": 1}),
            400,
            400,
        ),
    ]
}

#[test]
fn every_path_and_method_answers_as_the_contract_says() {
    if no_kvm("every_path_and_method_answers_as_the_contract_says") {
        return;
    }
    let bench = Bench::new(&up());
    bench.sparse("disk", 1 << 20);
    let running = start(&bench, &[]);
    let mut client = Client::at(&socket(&bench));
    let ask_all = |client: &mut Client, after: bool| {
        for (method, path, body, before_start, after_start) in contract() {
            let want = if after { after_start } else { before_start };
            let response = client.ask(method, path, &body);
            let when = if after { "after" } else { "before" };
            assert_eq!(
                response.status, want,
                "{method} {path} {body} {when} the start: {response:?}"
            );
            match want {
                204 => assert!(response.body.is_null(), "{response:?}"),
                200 => {
                    assert!(response.body.is_object(), "{response:?}");
                    assert!(response.head.contains("Content-Type: application/json\r\n"));
                }
                _ => assert!(response.fault().len() > 10, "{response:?}"),
            }
            assert!(response.head.contains("Connection: keep-alive\r\n"));
        }
    };
    ask_all(&mut client, false);
    // Another serial device than the console of the command line; a second set of counters.
    let twice = client.refused("PUT", "/metrics", json!({"metrics_path": "other"}));
    assert!(twice.contains("written to a file already"), "{twice}");
    start_guest(&mut client);
    ask_all(&mut client, true);
    let again = client.refused("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    assert!(again.contains("has been started already"), "{again}");
    assert_eq!(state(&mut client), "Running");
    running.signal(SIGTERM);
    running.signal(SIGINT);
    let ended = running.end();
    assert!(ended.said.contains("ended by signal"), "{ended:?}");
    assert_eq!(ended.left, ["log", "metrics"], "{ended:?}");
    let log = fs::read_to_string(bench.file("log")).unwrap();
    assert!(log.contains("PATCH /vm: done"), "{log}");
    // One by FlushMetrics, one at the end.
    let counters = fs::read_to_string(bench.file("metrics")).unwrap();
    assert_eq!(counters.lines().count(), 2, "{counters}");
    assert!(counters.contains("\"drive a\""), "{counters}");
}

#[test]
fn a_machine_is_told_as_it_was_described_and_is() {
    if no_kvm("a_machine_is_told_as_it_was_described_and_is") {
        return;
    }
    let bench = Bench::new(&up());
    bench.sparse("one", 1 << 20);
    bench.sparse("two", 2 << 20);
    let running = start(&bench, &["--id", "cell-7"]);
    let mut client = Client::at(&socket(&bench));
    let info = client.get("/");
    assert_eq!(info["id"], "cell-7");
    assert_eq!(info["state"], "Not started");
    assert!(info["vmm_version"].is_string() && info["app_name"].is_string());
    assert!(client.get("/version")["firecracker_version"].is_string());
    let machine = client.get("/machine-config");
    assert_eq!(
        (&machine["vcpu_count"], &machine["mem_size_mib"]),
        (&json!(1), &json!(128))
    );
    describe(&mut client);
    client.done("PATCH", "/machine-config", json!({"vcpu_count": 1}));
    let drive =
        |path: &str| json!({"drive_id": "a", "path_on_host": path, "is_root_device": false});
    client.done("PUT", "/drives/a", drive("two"));
    // The same name once more sets it anew.
    client.done("PUT", "/drives/a", drive("one"));
    start_guest(&mut client);
    assert_eq!(state(&mut client), "Running");
    for state_now in ["Paused", "Paused", "Resumed", "Resumed", "Paused"] {
        change(&mut client, state_now);
        let told = state_now.replace("Resumed", "Running");
        assert_eq!(state(&mut client), told);
    }
    let limiter = json!({
        "bandwidth": {"size": 1000, "refill_time": 100},
        "ops": {"size": 10, "one_time_burst": 5, "refill_time": 100},
    });
    client.done(
        "PATCH",
        "/drives/a",
        json!({"drive_id": "a", "path_on_host": "two", "rate_limiter": limiter}),
    );
    // A bucket of nothing bounds no more, the other stays.
    let off = json!({"ops": {"size": 0, "refill_time": 0}});
    client.done(
        "PATCH",
        "/drives/a",
        json!({"drive_id": "a", "rate_limiter": off}),
    );
    let config = client.get("/vm/config");
    let drive = &config["drives"][0];
    assert_eq!(drive["path_on_host"], "two", "{config}");
    assert_eq!(
        drive["rate_limiter"],
        json!({"bandwidth": {"size": 1000, "refill_time": 100}}),
        "{config}"
    );
    assert_eq!(config["machine-config"], client.get("/machine-config"));
    assert_eq!(config["machine-config"]["vcpu_count"], 1);
    assert_eq!(config["boot-source"]["kernel_image_path"], "kernel");
    for (body, why) in [
        (
            json!({"drive_id": "a", "path_on_host": "none"}),
            "check the name",
        ),
        (json!({"drive_id": "a", "path_on_host": "/"}), "a directory"),
        (
            json!({"drive_id": "a", "path_on_host": ""}),
            "empty path_on_host",
        ),
    ] {
        let told = client.refused("PATCH", "/drives/a", body);
        assert!(told.contains(why), "{told}");
    }
    assert_eq!(
        client.get("/vm/config"),
        config,
        "what is refused leaves no trace"
    );
    let told = client.refused(
        "PATCH",
        "/drives/b",
        json!({"drive_id": "b", "path_on_host": "two"}),
    );
    assert!(told.contains("has no such drive; it has a"), "{told}");
    running.signal(SIGINT);
    running.end().assert(130, &["ended by signal 2"]);
}

#[test]
fn what_is_wrong_is_told_at_once_and_leaves_no_trace() {
    let bench = Bench::new(&up());
    bench.sparse("disk", 1 << 20);
    let running = start(&bench, &[]);
    let mut client = Client::at(&socket(&bench));
    let drive = |id: &str, more: Value| {
        let mut drive = json!({"drive_id": id, "path_on_host": "disk", "is_root_device": false});
        drive
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        drive
    };
    let long = "x".repeat(300);
    describe(&mut client);
    client.done(
        "PUT",
        "/drives/root",
        drive("root", json!({"is_root_device": true})),
    );
    let before = client.get("/vm/config");
    for (path, body, why) in [
        (
            "/boot-source",
            json!({"kernel_image_path": "none"}),
            "is the path right?",
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": ""}),
            "name the kernel to boot",
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": "kernel", "initrd_path": "/"}),
            "directory",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 0, "mem_size_mib": 64}),
            "vcpu_count is 0",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 65, "mem_size_mib": 64}),
            "at most 64",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 256, "mem_size_mib": 64}),
            "from 0 to 255",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1}),
            "\"mem_size_mib\": this field is required",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": -1}),
            "from 0 up",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 0}),
            "at least 64 MiB",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 18446744073709551615u64}),
            "mem_size_mib is",
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 64, "smt": true}),
            "not built",
        ),
        ("/machine-config", json!([1]), "expected an object"),
        (
            "/drives/a",
            drive("a", json!({"path_on_host": "none"})),
            "check the name",
        ),
        (
            "/drives/a",
            drive("a", json!({"is_root_device": true})),
            "both the root device",
        ),
        (
            "/drives/a",
            drive("b", json!({})),
            "give both the same name",
        ),
        (
            "/drives/a",
            drive("a", json!({"size": 3})),
            "unknown field \"size\"",
        ),
        (
            "/drives/a%2Fb",
            drive("a%2Fb", json!({})),
            "a name has at most 64",
        ),
        (
            &format!("/drives/{long}"),
            drive(&long, json!({})),
            "a name has at most 64",
        ),
        (
            "/drives/..",
            drive("..", json!({"path_on_host": "../none"})),
            "check the name",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "no-such-tap-at-all"}),
            "15 bytes",
        ),
        (
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "tap0", "guest_mac": "01:00:00:00:00:00"}),
            "one of a group",
        ),
        (
            "/vsock",
            json!({"guest_cid": 2, "uds_path": "v"}),
            "guest_cid 2",
        ),
        (
            "/logger",
            json!({"log_path": "/none/log"}),
            "does its directory exist?",
        ),
        ("/logger", json!({"level": "Loud"}), "one of Off"),
        (
            "/metrics",
            json!({"metrics_path": "/none/m"}),
            "does its directory exist?",
        ),
    ] {
        let told = client.refused("PUT", path, body);
        assert!(told.contains(why), "{path}: {told} / {why}");
    }
    for (text, why) in [
        ("{\"vcpu_count\": 1", "not JSON"),
        (
            "{\"vcpu_count\": 1, \"vcpu_count\": 2, \"mem_size_mib\": 64}",
            "given twice",
        ),
        ("\u{0}", "not JSON"),
        ("null", "expected an object"),
    ] {
        let response = client.send("PUT", "/machine-config", text);
        assert_eq!(response.status, 400, "{response:?}");
        assert!(response.fault().contains(why), "{response:?}");
    }
    assert_eq!(client.get("/vm/config"), before);
    running.signal(SIGTERM);
    running.end().assert(143, &["ended by signal 15"]);
}

/// What API.md says of them, which is made of the description, is what the program does.
#[test]
fn limits_that_are_described_are_kept() {
    let bench = Bench::new(&up());
    let _running = start(&bench, &[]);
    let mut client = Client::at(&socket(&bench));
    let ours =
        YamlLoader::load_from_str(include_str!("../resources/openapi/alveole.yaml")).unwrap();
    let theirs =
        YamlLoader::load_from_str(include_str!("../resources/openapi/firecracker.yaml")).unwrap();
    for (definition, path, body, fields) in [
        (
            "MachineConfiguration",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 64}),
            &["vcpu_count", "mem_size_mib"][..],
        ),
        (
            "Drive",
            "/drives/a",
            json!({"drive_id": "a", "path_on_host": "kernel", "is_root_device": false}),
            &["num_queues", "serial"],
        ),
        (
            "NetworkInterface",
            "/network-interfaces/a",
            json!({"iface_id": "a", "host_dev_name": "none"}),
            &["num_queue_pairs", "mtu"],
        ),
        (
            "Vsock",
            "/vsock",
            json!({"guest_cid": 3, "uds_path": "v.sock"}),
            &["guest_cid"],
        ),
    ] {
        for field in fields {
            let limit = |key: &str| {
                let extension = format!("Alveole{definition}");
                let ours = &ours[0]["definitions"][extension.as_str()]["properties"][*field][key];
                let theirs = &theirs[0]["definitions"][definition]["properties"][*field][key];
                ours.as_i64().or(theirs.as_i64())
            };
            let mut fault = |value: Value| {
                let mut body = body.clone();
                body[*field] = value;
                client.ask("PUT", path, &body).fault().to_owned()
            };
            let word = |length: i64| json!("x".repeat(length.try_into().unwrap()));
            let (least, most, make): (_, _, fn(i64) -> Value) = match limit("maxLength") {
                Some(most) => (limit("minLength"), Some(most), word),
                None => (limit("minimum"), limit("maximum"), |n| json!(n)),
            };
            assert!(least.is_some(), "{definition}.{field}");
            for (inside, outside) in [(least, least.map(|n| n - 1)), (most, most.map(|n| n + 1))] {
                let (Some(inside), Some(outside)) = (inside, outside) else {
                    continue;
                };
                let told = fault(make(inside));
                assert!(!told.contains(field), "{field} {inside}: {told}");
                let told = fault(make(outside));
                assert!(told.contains(field), "{field} {outside}: {told}");
            }
        }
    }
}

#[test]
fn a_start_that_fails_can_be_tried_again() {
    if no_kvm("a_start_that_fails_can_be_tried_again") {
        return;
    }
    let bench = Bench::new(&power_off());
    bench.write("text", b"#!/bin/sh\n");
    let running = start(&bench, &[]);
    let mut client = Client::at(&socket(&bench));
    let start_it = json!({"action_type": "InstanceStart"});
    let told = client.refused("PUT", "/actions", start_it.clone());
    assert!(told.contains("PUT /boot-source first"), "{told}");
    describe(&mut client);
    for _ in 0..3 {
        client.done("PUT", "/boot-source", json!({"kernel_image_path": "text"}));
        let told = client.refused("PUT", "/actions", start_it.clone());
        assert!(told.starts_with("cannot start the guest: "), "{told}");
        assert!(told.contains("a script"), "{told}");
        assert_eq!(state(&mut client), "Not started");
    }
    client.done(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": "kernel"}),
    );
    client.done("PUT", "/actions", start_it);
    running.end().assert(0, &["the guest powered off"]);
}

#[test]
fn a_description_and_the_api_go_together() {
    if no_kvm("a_description_and_the_api_go_together") {
        return;
    }
    let bench = Bench::new(&up());
    let running = start(&bench, &["--config-file", "vm.json"]);
    let mut client = Client::at(&socket(&bench));
    assert_eq!(state(&mut client), "Running");
    let config = client.get("/vm/config");
    assert_eq!(config["boot-source"]["kernel_image_path"], "kernel");
    let told = client.refused(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": "kernel"}),
    );
    assert!(told.contains("has been started already"), "{told}");
    change(&mut client, "Paused");
    running.signal(SIGINT);
    running.end().assert(130, &["ended by signal 2"]);
    // One that is wrong ends it as without the API, and leaves no socket.
    bench.write("vm.json", b"{}");
    start(&bench, &["--config-file", "vm.json"])
        .end()
        .assert(152, &["boot-source"]);
    bench.describe("none", 1, 64);
    start(&bench, &["--config-file", "vm.json"])
        .end()
        .assert(152, &["is the path right?"]);
}

#[test]
fn sockets_that_cannot_be_had() {
    let bench = Bench::new(&up());
    let run = |path: &str| bench.run_with(&["--api-sock", path, "--console", "none"]);
    let other = Bench::new(&up());
    let first = start(&other, &[]);
    Client::at(&socket(&other));
    run(socket(&other).to_str().unwrap()).assert(HOST, &["another program listens there"]);
    first.signal(SIGTERM);
    first.end().assert(143, &["ended by signal 15"]);
    drop(UnixListener::bind(bench.file("stale")).unwrap());
    run("stale").assert(HOST, &["nobody listens", "remove it"]);
    run("kernel").assert(HOST, &["a file that is no socket"]);
    run("none/api").assert(HOST, &["does its directory exist?"]);
    let long = "x".repeat(108);
    run(&long).assert(HOST, &["has 108 bytes", "at most 107"]);
}

/// The memory of a process, in KiB.
fn resident_kib(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn open_files(id: u32) -> usize {
    fs::read_dir(format!("/proc/{id}/fd")).unwrap().count()
}

/// The soft limit is there for programs that use select(); connections of the socket device need more.
#[test]
fn it_may_open_as_many_files_as_the_host_allows() {
    if no_kvm("it_may_open_as_many_files_as_the_host_allows") {
        return;
    }
    let bench = Bench::new(&up()).through(&["prlimit", "--nofile=64:128"]);
    let running = start(&bench, &[]);
    drop(Client::at(&socket(&bench)));
    let limits = fs::read_to_string(format!("/proc/{}/limits", running.id())).unwrap();
    let line = limits.lines().find(|l| l.starts_with("Max open files"));
    let words: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(words[3..5], ["128", "128"], "{limits}");
    running.signal(SIGTERM);
    running.end().assert(143, &["ended by signal 15"]);
}

#[test]
fn ten_thousand_requests_leave_nothing_behind() {
    if no_kvm("ten_thousand_requests_leave_nothing_behind") {
        return;
    }
    let bench = Bench::new(&up());
    bench.sparse("one", 1 << 20);
    bench.sparse("two", 1 << 20);
    let running = start(&bench, &[]);
    let mut client = Client::at(&socket(&bench));
    describe(&mut client);
    let drive = json!({"drive_id": "a", "path_on_host": "one", "is_root_device": false});
    client.done("PUT", "/drives/a", drive);
    start_guest(&mut client);
    let limiter = json!({"ops": {"size": 100, "refill_time": 100}});
    let round = |client: &mut Client, index: usize| match index % 10 {
        0 => change(client, "Paused"),
        1 => change(client, "Resumed"),
        2 => client.done(
            "PATCH",
            "/drives/a",
            json!({"drive_id": "a", "rate_limiter": limiter}),
        ),
        3 if index % 100 == 3 => {
            let path = if index % 200 == 3 { "two" } else { "one" };
            client.done(
                "PATCH",
                "/drives/a",
                json!({"drive_id": "a", "path_on_host": path}),
            );
        }
        4 => drop(client.refused("GET", "/nope", Value::Null)),
        5 => {
            // A connection of its own.
            let mut other = Client::at(&socket(&bench));
            other.get("/");
        }
        _ => drop(client.get("/vm/config")),
    };
    for index in 0..1000 {
        round(&mut client, index);
    }
    let (memory, files) = (resident_kib(running.id()), open_files(running.id()));
    for index in 0..10_000 {
        round(&mut client, index);
    }
    let grown = resident_kib(running.id()).saturating_sub(memory);
    println!("10,000 requests: {grown} KiB more than after the first 1,000 ({memory} KiB)");
    assert!(grown < 512, "{grown} KiB more than {memory} KiB");
    assert!(open_files(running.id()) <= files + 1);
    running.signal(SIGINT);
    running.end().assert(130, &["ended by signal 2"]);
}

#[test]
fn every_thread_is_confined_those_of_clients_too() {
    if no_kvm("every_thread_is_confined_those_of_clients_too") {
        return;
    }
    let bench = Bench::new(&up());
    bench.sparse("disk", 1 << 20);
    let running = start(&bench, &[]);
    let mut client = Client::at(&socket(&bench));
    let threads = || {
        let tasks = fs::read_dir(format!("/proc/{}/task", running.id())).unwrap();
        let facts = tasks.map(|task| {
            let task = task.unwrap().path();
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            (name.trim().to_owned(), status.contains("Seccomp:\t2"))
        });
        // KVM's own workers are listed too; they run in the kernel only.
        let facts = facts.filter(|(name, _)| !name.is_empty() && !name.starts_with("kvm-"));
        let mut facts: Vec<_> = facts.collect();
        facts.sort();
        facts
    };
    let wait_for = |names: &[(&str, bool)]| {
        let want: Vec<_> = names.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect();
        let until = Instant::now() + Duration::from_secs(10);
        while threads() != want {
            assert!(Instant::now() < until, "{:?}, not {want:?}", threads());
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    // Before the start there is no guest that the main thread would have to be kept from.
    wait_for(&[("alveole-vmm", false), ("api", true)]);
    describe(&mut client);
    let drive = json!({"drive_id": "a", "path_on_host": "disk", "is_root_device": false});
    client.done("PUT", "/drives/a", drive);
    start_guest(&mut client);
    wait_for(&[
        ("alveole-vmm", true),
        ("api", true),
        ("devices", true),
        ("disk a", true),
        ("files", true),
        ("vcpu 0", true),
        ("vcpu 1", true),
    ]);
    running.signal(SIGINT);
    running.end().assert(130, &["ended by signal 2"]);
}

#[test]
fn counters_that_cannot_be_written_are_told_to_who_asks_for_them() {
    if no_kvm("counters_that_cannot_be_written_are_told_to_who_asks_for_them") {
        return;
    }
    let bench = Bench::new(&up());
    let running = start(&bench, &["--metrics-path", "/dev/full"]);
    let mut client = Client::at(&socket(&bench));
    describe(&mut client);
    start_guest(&mut client);
    let flush = json!({"action_type": "FlushMetrics"});
    for _ in 0..3 {
        let told = client.refused("PUT", "/actions", flush.clone());
        assert!(told.contains("is the disk full"), "{told}");
    }
    assert_eq!(state(&mut client), "Running");
    running.signal(SIGINT);
    running.end().assert(130, &["ended by signal 2"]);
}

#[test]
fn rude_clients_are_borne() {
    let bench = Bench::new(&up());
    let running = start(&bench, &["--http-api-max-payload-size", "1000"]);
    let mut client = Client::at(&socket(&bench));
    let connect = || UnixStream::connect(socket(&bench)).unwrap();
    // Half a request, for ever; a hundred of them.
    let halves: Vec<_> = (0..100)
        .map(|_| {
            let mut half = connect();
            half.write_all(b"PUT /actions HTTP/1.1\r\nContent-Le")
                .unwrap();
            half
        })
        .collect();
    assert_eq!(state(&mut Client::at(&socket(&bench))), "Not started");
    drop(halves);
    // Byte by byte.
    let mut slow = connect();
    for byte in b"GET /version HTTP/1.1\r\nX: y\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read_response(&mut slow).status, 200);
    // Many at once.
    let mut many = connect();
    many.write_all("GET /version HTTP/1.1\r\n\r\n".repeat(200).as_bytes())
        .unwrap();
    for _ in 0..200 {
        assert_eq!(read_response(&mut many).status, 200);
    }
    // Too much.
    let large = json!({"kernel_image_path": "x".repeat(1000)});
    let response = client.ask("PUT", "/boot-source", &large);
    assert_eq!(response.status, 413, "{response:?}");
    assert!(response.fault().contains("1000 are taken"), "{response:?}");
    assert_eq!(state(&mut client), "Not started");
    // No HTTP at all.
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"[..],
        b"hello\r\n\r\n",
    ] {
        let mut other = connect();
        other.write_all(bytes).unwrap();
        let mut told = String::new();
        other.read_to_string(&mut told).unwrap();
        assert!(told.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{told}");
        assert!(told.contains("Connection: close"), "{told}");
    }
    running.signal(SIGTERM);
    running.end().assert(143, &["ended by signal 15"]);
}

#[test]
fn clients_wait_where_there_are_no_descriptors_for_them() {
    // Enough to start, and for some clients.
    let bench = Bench::new(&up()).through(&["prlimit", "--nofile=16"]);
    let running = start(&bench, &["--level", "Debug"]);
    Client::at(&socket(&bench));
    let mut clients: Vec<_> = (0..12)
        .map(|_| {
            let mut client = UnixStream::connect(socket(&bench)).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            client.write_all(b"GET /version HTTP/1.1\r\n\r\n").unwrap();
            client
        })
        .collect();
    assert_eq!(read_response(&mut clients[0]).status, 200);
    let ticks = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", running.id())).unwrap();
        let after_name = stat.rsplit(')').next().unwrap();
        let fields = after_name.split_whitespace().skip(11).take(2);
        fields.map(|f| f.parse::<u64>().unwrap()).sum()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    assert!(
        ticks() - before < 20,
        "it spins: {} of 100 ticks",
        ticks() - before
    );
    // Whoever is answered goes, and so everybody gets a turn.
    for mut client in clients.drain(1..) {
        assert_eq!(read_response(&mut client).status, 200);
    }
    running.signal(SIGTERM);
    running.end().assert(143, &["ended by signal 15"]);
}

#[test]
fn curl_is_a_client() {
    let bench = Bench::new(&up());
    let running = start(&bench, &[]);
    Client::at(&socket(&bench));
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--unix-socket"]);
        command
            .arg(socket(&bench))
            .args(["--write-out", " %{http_code}"]);
        command.args(arguments).output()
    };
    let Ok(output) = curl(&["http://localhost/version"]) else {
        skipped("curl_is_a_client", "curl is not installed");
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.starts_with("{\"firecracker_version\":"), "{said}");
    assert!(said.ends_with(" 200"), "{said}");
    // curl asks for leave before it sends a body as large as this one.
    let large = format!("{{\"a\": \"{}\"}}", "x".repeat(2 << 20));
    bench.write("large", large.as_bytes());
    let from = format!("@{}", bench.file("large").display());
    for (arguments, status) in [
        (
            &["-X", "PUT", "http://localhost/mmds", "--data-binary", &from][..],
            " 413",
        ),
        (
            &["-X", "PUT", "http://localhost/entropy", "-d", "{}"],
            " 204",
        ),
        (
            &["-X", "PUT", "http://localhost/entropy", "-d", "{"],
            " 400",
        ),
        (
            &[
                "-X",
                "PUT",
                "http://localhost/entropy",
                "-d",
                "{}",
                "-H",
                "Expect: 100-continue",
            ],
            " 204",
        ),
    ] {
        let output = curl(arguments).unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.ends_with(status), "{arguments:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
    running.signal(SIGTERM);
    let ended = running.end();
    assert_eq!(ended.left, ["large"], "{ended:?}");
}
