//! A guest reads its metadata, and its owner what the machine has counted.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::harness::{Running, Vm, skip};
use crate::network::tap;

/// A guest on a tap of its own, started by the API, that reaches the service.
fn start(version: &str, transport: &str) -> Option<Running> {
    tap(1500)?;
    let vm = Vm::any()?
        .tap("tap0", json!({"guest_mac": "02:77:00:00:00:02"}))
        .metadata(json!({"network_interfaces": ["net0"], "version": version}))
        .takes_commands()
        .by_api();
    let mut guest = match transport {
        "pci" => vm.option("--enable-pci").boot(),
        _ => vm.boot(),
    };
    guest.wait_for_commands();
    let (status, said) = guest.ask(
        "ip link set eth0 up && ip addr add 10.77.0.2/24 dev eth0 && ip route add 169.254.169.254 dev eth0",
    );
    assert_eq!(status, 0, "{said}");
    Some(guest)
}

/// What is answered to `request`, a line or more of HTTP/1.0.
fn http(guest: &mut Running, request: &str) -> String {
    let lines = request.replace('\n', "\\r\\n");
    let (status, said) = guest.ask(&format!(
        "printf '{lines}\\r\\n\\r\\n' | timeout 20 nc 169.254.169.254 80"
    ));
    assert_eq!(status, 0, "{said}");
    said.replace('\r', "")
}

fn reads_what_is_put(transport: &str) {
    let Some(mut guest) = start("V1", transport) else {
        return;
    };
    let mut client = guest.client();
    let fetch = "timeout 20 wget -q -O - http://169.254.169.254/latest/meta-data/";
    assert_ne!(
        guest.ask(&format!("{fetch}id")).0,
        0,
        "there is nothing yet"
    );
    let long = "0123456789abcdef".repeat(2000);
    let data = json!({"latest": {"meta-data": {"id": "i-1", "long": long, "more": {"a": "b"}}}});
    client.done("PUT", "/mmds", data.clone());
    assert_eq!(client.get("/mmds"), data);
    assert_eq!(guest.ask(&format!("{fetch}id")), (0, "i-1".into()));
    let (_, listed) = guest.ask(fetch);
    assert_eq!(listed.replace('\r', ""), "id\nlong\nmore/");
    // More than a frame, and more than is on its way at once.
    let (_, sum) = guest.ask(&format!("{fetch}long | wc -c"));
    assert_eq!(sum, long.len().to_string());
    client.done(
        "PATCH",
        "/mmds",
        json!({"latest": {"meta-data": {"id": "i-2", "long": null}}}),
    );
    assert_eq!(guest.ask(&format!("{fetch}id")), (0, "i-2".into()));
    assert_ne!(guest.ask(&format!("{fetch}long")).0, 0);
    // Whoever else is there is reached as before.
    let (status, said) = guest.ask("ping -c 1 -W 10 10.77.0.1");
    assert_eq!(status, 0, "{said}");
    guest.leave().assert_code(0);
}

#[test]
fn a_guest_reads_what_its_owner_puts_by_mmio() {
    reads_what_is_put("mmio");
}

#[test]
fn a_guest_reads_what_its_owner_puts_by_pci() {
    reads_what_is_put("pci");
}

#[test]
fn a_guest_of_version_2_needs_a_token() {
    let Some(mut guest) = start("V2", "pci") else {
        return;
    };
    let mut client = guest.client();
    client.done("PUT", "/mmds", json!({"latest": {"id": "i-1"}}));
    let refused = http(&mut guest, "GET /latest/id HTTP/1.0");
    assert!(refused.starts_with("HTTP/1.1 401 "), "{refused}");
    let given = http(
        &mut guest,
        "PUT /latest/api/token HTTP/1.0\nX-metadata-token-ttl-seconds: 300",
    );
    let token = given.rsplit('\n').next().unwrap();
    assert!(
        given.starts_with("HTTP/1.1 200 ") && token.len() == 64,
        "{given}"
    );
    let read = http(
        &mut guest,
        &format!("GET /latest/id HTTP/1.0\nX-metadata-token: {token}"),
    );
    assert!(read.ends_with("\n\ni-1"), "{read}");
    guest.leave().assert_code(0);
}

/// The text that Prometheus scrapes.
fn scrape(socket: &Path, accept: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    text.to_owned()
}

fn value(text: &str, sample: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(sample));
    line.unwrap_or_else(|| panic!("no {sample} in\n{text}"))
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn what_a_machine_counts_is_scraped() {
    let dir = tempfile::TempDir::new().unwrap();
    let image = dir.path().join("disk");
    std::fs::write(&image, vec![7; 4 << 20]).unwrap();
    let Some(vm) = Vm::any() else { return };
    let vm = vm.disk(&image, json!({})).takes_commands().by_api();
    let mut guest = vm.option("--enable-pci").boot();
    guest.wait_for_commands();
    let (status, said) = guest.ask("dd if=/dev/vda of=/dev/null bs=4k count=256 iflag=direct");
    assert_eq!(status, 0, "{said}");
    let text = scrape(&guest.file("api"), "*/*");
    let reads = value(
        &text,
        "alveole_drive_requests_total{drive=\"disk0\",operation=\"read\"}",
    );
    assert!(reads >= 256.0, "{reads}");
    let seen = value(
        &text,
        "alveole_drive_latency_seconds_count{drive=\"disk0\",operation=\"read\"}",
    );
    assert_eq!(seen, reads, "each read has a latency");
    assert_eq!(
        value(&text, "alveole_machine_state{state=\"Running\"}"),
        1.0
    );
    assert!(
        value(
            &text,
            "alveole_vcpu_exits_total{vcpu=\"0\",reason=\"port_write\"}"
        ) > 0.0
    );
    assert!(
        text.contains("alveole_thread_cpu_seconds_total{thread=\"vcpu 0\""),
        "{text}"
    );
    let resident = value(&text, "alveole_process_resident_memory_bytes");
    assert!(resident > (16 << 20).into(), "{resident}");
    assert!(
        !text.contains("A counter of this component."),
        "a counter has no family: {text}"
    );
    let mut samples: Vec<_> = text
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| l.rsplit_once(' ').unwrap().0)
        .collect();
    let all = samples.len();
    samples.sort_unstable();
    samples.dedup();
    assert_eq!(samples.len(), all, "a sample is there twice");
    let open = scrape(
        &guest.file("api"),
        "application/openmetrics-text;version=1.0.0",
    );
    assert!(open.ends_with("\n# EOF\n"));
    check(&text);
    guest.leave().assert_code(0);
}

/// What Prometheus' own checker thinks of it.
fn check(text: &str) {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        skip(
            "promtool is not installed (apt-get install prometheus): the text was read by this test alone",
        );
        return;
    };
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let out = promtool.wait_with_output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    assert!(
        out.status.success() && said.is_empty(),
        "{}",
        String::from_utf8_lossy(&said)
    );
}
