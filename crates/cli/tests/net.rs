//! `alveole net` as people type it, in a network namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::process::Command;

use support::{in_namespaces, skip};

const ALVEOLE: &str = env!("CARGO_BIN_EXE_alveole");

/// Exit status, standard output, standard error.
fn net(state: &std::path::Path, words: &str) -> (Option<i32>, String, String) {
    let done = Command::new(ALVEOLE)
        .arg("net")
        .args(words.split_whitespace())
        .arg("--state-dir")
        .arg(state)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (done.status.code(), text(&done.stdout), text(&done.stderr))
}

#[test]
fn errors_are_one_line_and_name_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    for (words, word) in [
        ("create abcdefghijklmnop", "16 bytes"),
        ("create a --mode routed", "nat, bridge"),
        ("create a --subnet 10.0.0.1/24", "10.0.0.0/24"),
        ("create a --mode bridge --parent eth0 --vlan 0", "1 to 4094"),
        (
            "create a --mode bridge --parent eth0 --vlan 4095",
            "1 to 4094",
        ),
        ("create a --mode bridge --vlan 5", "--parent"),
        ("create a --mtu 100", "1280"),
        ("create a --rule allow,port=1", "tcp"),
        ("create a --egress ajar", "open or closed"),
        ("inspect nothing", "no network 'nothing'"),
        ("rm ../a", "'.'"),
        ("up /no/such/file", "/no/such/file"),
    ] {
        let (code, _, said) = net(folder.path(), words);
        assert_eq!(code, Some(1), "{words}: {said}");
        assert!(
            said.contains(word) && said.lines().count() == 1,
            "{words}: {said}"
        );
    }
}

#[test]
fn nothing_is_shown_as_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (code, said, _) = net(folder.path(), "ls");
    assert!(
        code == Some(0) && said.contains("alveole net create"),
        "{said}"
    );
    let (_, said, _) = net(folder.path(), "ls --format json");
    assert_eq!(said, "[]\n");
}

/// From the first word to the last, as a script: made, shown, planned, removed.
#[test]
fn a_network_from_create_to_rm() {
    const TEST: &str = "a_network_from_create_to_rm";
    let Some(mut separate) = in_namespaces(TEST) else {
        return;
    };
    if !std::path::Path::new("/usr/sbin/nft").exists()
        || !std::path::Path::new("/usr/sbin/dnsmasq").exists()
    {
        return skip(
            TEST,
            "there is no nft or dnsmasq: install nftables and dnsmasq-base",
        );
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let script = "
        set -e
        net() { word=$1; shift; \"$ALVEOLE\" net \"$word\" \"$@\" --state-dir \"$STATE\"; }
        net create web --subnet 10.7.0.0/24 --dry-run
        ! ip link show web 2>/dev/null
        net create web --subnet 10.7.0.0/24 --rule deny,to=192.168.0.0/16
        net create web --subnet 10.7.0.0/24 --rule deny,to=192.168.0.0/16
        net ls
        net inspect web
        net inspect web --format json
        ! net create web --subnet 10.8.0.0/24
        net repair --dry-run
        net rm web
        ! ip link show web 2>/dev/null
        net ls
        ! nft list table inet alveole 2>/dev/null
        echo all done";
    let done = separate
        .args(["bash", "-c", script])
        .env("ALVEOLE", ALVEOLE)
        .env("STATE", folder.path())
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    for word in [
        "make bridge web",
        "chain from_web",
        "web             nat       up",
        "rule      deny,to=192.168.0.0/16",
        "\"gateway\": [\n    \"10.7.0.1\"",
        "another subnet",
        "nothing to do",
        "no networks",
        "all done",
    ] {
        assert!(said.contains(word), "'{word}' is missing: {said}");
    }
    assert!(done.status.success());
}
