//! `alveole doctor` and the words that show the way, as people start them.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn alveole(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_alveole"))
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_report_for_programs_is_complete() {
    let output = alveole(&["doctor", "--format", "json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let keys: HashSet<_> = checks
        .iter()
        .map(|check| check["key"].as_str().unwrap())
        .collect();
    assert_eq!(keys.len(), checks.len());
    for key in [
        "kernel",
        "processors",
        "memory",
        "cpu_virtualisation",
        "kvm_device",
        "kvm_access",
        "kvm_guest",
        "kvm_capabilities",
        "seccomp",
        "landlock",
        "cgroup",
        "io_uring",
        "direct_io",
        "userfaultfd",
        "tun",
        "vhost_net",
        "vhost_vsock",
        "thp",
        "hugetlb",
        "nofile",
        "memlock",
        "lab",
    ] {
        assert!(keys.contains(key), "{key} is gone; programs read it");
    }
    for check in checks {
        let status = check["status"].as_str().unwrap();
        assert!(["ok", "warn", "missing"].contains(&status));
        assert!(check["required"].is_boolean());
        assert_eq!(status == "ok", check["cure"].is_null(), "{check}");
    }
    let here = checks
        .iter()
        .filter(|check| check["required"] == true)
        .all(|check| check["status"] == "ok");
    assert_eq!(report["guests"] == "here", here);
    assert_eq!(output.status.code(), Some(i32::from(!here)));
    let device = checks
        .iter()
        .find(|check| check["key"] == "kvm_device")
        .unwrap();
    assert_eq!(device["status"] == "ok", Path::new("/dev/kvm").exists());
}

#[test]
fn the_report_for_people_has_a_line_for_each_check_and_a_last_word() {
    let json: Value =
        serde_json::from_slice(&alveole(&["doctor", "--format", "json"]).stdout).unwrap();
    let output = alveole(&["doctor"]);
    let text = stdout(&output);
    assert!(!text.contains('\x1b'), "colours in a pipe");
    let lines: Vec<_> = text.lines().collect();
    let checks = json["checks"].as_array().unwrap();
    assert_eq!(lines.len(), checks.len() + 2);
    for (line, check) in lines.iter().zip(checks) {
        assert!(line.contains(check["title"].as_str().unwrap()), "{line}");
        assert_eq!(line.contains("  -> "), !line.starts_with("ok "), "{line}");
    }
    assert_eq!(Some(lines[lines.len() - 1]), json["summary"].as_str());
    assert!(output.stderr.is_empty());
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let status = Command::new("sh")
        .arg("-c")
        .arg("{ \"$0\" doctor; echo \"status $?\" >&2; } | true")
        .arg(env!("CARGO_BIN_EXE_alveole"))
        .output()
        .unwrap();
    let text = String::from_utf8(status.stderr).unwrap();
    assert!(text == "status 0\n" || text == "status 1\n", "{text}");
}

#[test]
fn alone_it_shows_where_to_start() {
    let output = alveole(&[]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    assert!(
        text.contains("alveole doctor") && text.contains("alveole run -it"),
        "{text}"
    );
    assert!(text.lines().count() <= 10);
}

#[test]
fn version_and_help_are_there() {
    let version = alveole(&["--version"]);
    assert_eq!(
        stdout(&version),
        format!("alveole {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = alveole(&["run", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    for word in [
        "--kernel",
        "--append",
        "256M",
        "console=ttyS0 reboot=k panic=-1",
        "Ctrl-A",
    ] {
        assert!(stdout(&help).contains(word), "{word}");
    }
}

#[test]
fn completions_and_man_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let output = alveole(&["generate", "completions", shell]);
        let text = stdout(&output);
        assert!(
            output.status.success() && text.contains("alveole"),
            "{shell}"
        );
        assert!(text.contains("exec") && text.contains("restart"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    assert!(alveole(&["generate", "man", path]).status.success());
    for page in ["alveole.1", "alveole-run.1", "alveole-image-pull.1"] {
        let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
        assert!(text.contains(".SH NAME"), "{page}");
    }
    let nowhere = alveole(&["generate", "man", "/no/such/folder"]);
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/no/such/folder"));
}
