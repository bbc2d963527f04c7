//! The rules of the house that a compiler does not know, read from `cargo metadata` and the tree:
//! knowledge flows one way, one owner per fact, the VMM stays small. `crates/README.md` explains them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// The layers, lowest first. An arrow may only point to a lower layer.
const LAYERS: [&[&str]; 6] = [
    &[
        "guest-memory",
        "io-bus",
        "interrupts",
        "vm-config",
        "counters",
        "thread-sandbox",
        "acpi",
        "rate-limiter",
        "qcow2",
        "agent-protocol",
        "egress-rules",
        "erofs",
        "saved-state",
        "process-template",
    ],
    &[
        "hypervisor",
        "hypervisor-kvm",
        "event-loop",
        "boot-loader",
        "block-store",
        "net-link",
    ],
    &[
        "vcpu",
        "virtio",
        "pci",
        "mmds",
        "egress-filter",
        "metrics",
        "vm-control",
    ],
    &[
        "serial",
        "board-devices",
        "virtio-mmio",
        "virtio-pci",
        "virtio-blk",
        "virtio-net",
        "virtio-rng",
        "virtio-vsock",
    ],
    &[
        "machine",
        "api-server",
        "host",
        "network",
        "agent-client",
        "guest-kernel",
        "instance",
        "image",
        "page-server",
    ],
    &["vmm", "cli", "jailer", "bench", "agent"],
];

/// Arrows inside a layer, each with its reason.
const SIDEWAYS: [(&str, &str, &str); 2] = [
    (
        "hypervisor-kvm",
        "hypervisor",
        "an implementation knows the port that it implements",
    ),
    (
        "instance",
        "agent-client",
        "who keeps a guest speaks with its agent",
    ),
];

/// Who may name which external crate: one owner per fact.
const OWNERS: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["hypervisor-kvm"]),
    ("kvm-bindings", &["hypervisor-kvm"]),
    ("event-manager", &["event-loop"]),
    ("vm-memory", &["guest-memory"]),
    ("linux-loader", &["boot-loader"]),
    ("acpi_tables", &["acpi"]),
    ("vm-superio", &["serial"]),
    ("virtio-queue", &["virtio"]),
    ("seccompiler", &["thread-sandbox"]),
    ("bitcode", &["thread-sandbox"]),
    ("io-uring", &["block-store"]),
    ("httparse", &["api-server", "mmds", "instance"]),
    ("miniz_oxide", &["qcow2"]),
    ("ruzstd", &["qcow2", "guest-kernel", "image"]),
    ("zstd", &["page-server"]),
    ("ureq", &["image"]),
    ("ratatui", &["cli"]),
    ("tar", &["image", "agent", "guest-kernel", "cli"]),
    ("flate2", &["image", "guest-kernel"]),
    ("smoltcp", &["mmds"]),
    ("netlink-sys", &["network"]),
    ("netlink-packet-core", &["network"]),
    ("netlink-packet-route", &["network"]),
];

/// Second versions that tests alone bring, and why; no program may link them.
const IN_TESTS_ONLY: &[(&str, &str, &str)] = &[(
    "miniz_oxide",
    "0.8",
    "imago, by which qcow2's tests judge its engine, has not moved to 0.9",
)];

/// Crates that may hold unsafe code, and why.
const UNSAFE: &[(&str, &str)] = &[
    ("guest-memory", "maps guest RAM"),
    (
        "hypervisor-kvm",
        "issues ioctls and reads the page shared with the kernel",
    ),
    ("thread-sandbox", "installs filters and a signal handler"),
    (
        "block-store",
        "hands guest RAM to the kernel and issues the calls of block devices",
    ),
    (
        "net-link",
        "hands guest RAM to the kernel and issues the calls of tap interfaces",
    ),
    ("serial", "restores the terminal from signal handlers"),
    ("host", "asks the kernel what it offers by raw system calls"),
    (
        "process-template",
        "forks, and gives descriptors to the copy by number",
    ),
    (
        "jailer",
        "forks, and takes descriptors by number from whoever started it",
    ),
    (
        "network",
        "makes taps by ioctl and takes rights from helpers before they start",
    ),
    (
        "instance",
        "has monitors end with their keepers before they start",
    ),
    (
        "page-server",
        "puts pages into guests' memory by ioctls of userfaultfd",
    ),
    (
        "agent",
        "makes processes somebody else's before their programs start",
    ),
];

/// What the VMM must never link, and why.
const NOT_IN_THE_VMM: [(&str, &str); 14] = [
    ("tokio", "no async runtime in the guest-facing process"),
    ("ratatui", "what people look at is another process's"),
    ("clap", "half a megabyte for a dozen options"),
    ("anyhow", "errors are typed below the programs"),
    ("alveole-host", "host-side work lives in another process"),
    ("alveole-image", "host-side work lives in another process"),
    (
        "rustls",
        "no network of the host in the guest-facing process",
    ),
    ("zstd", "memory is unpacked by who serves it"),
    (
        "alveole-page-server",
        "host-side work lives in another process",
    ),
    ("alveole-erofs", "host-side work lives in another process"),
    ("alveole-network", "host-side work lives in another process"),
    ("alveole-cli", "host-side work lives in another process"),
    ("alveole-jailer", "it has root's rights, the VMM none"),
    ("libloading", "no code is loaded at run time"),
];

/// Most external packages in the VMM's dependency tree.
const MOST_EXTERNAL_PACKAGES: usize = 60;
/// Longest `README.md` of the repository: who reads on finds the rest from there.
const MOST_README_LINES: usize = 150;
/// Longest `src/main.rs`: it wires, it does not work.
const MOST_MAIN_LINES: usize = 200;
/// Longest source file, tests left out.
const MOST_FILE_LINES: usize = 700;

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .exec()
        .unwrap()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Our packages by their short name: `alveole-vcpu` is `vcpu`.
fn ours(metadata: &Metadata) -> BTreeMap<String, &Package> {
    metadata
        .workspace_packages()
        .into_iter()
        .map(|p| (short(&p.name).to_owned(), p))
        .collect()
}

fn short(name: &str) -> &str {
    name.strip_prefix("alveole-").unwrap_or(name)
}

fn layer_of(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

#[test]
fn every_crate_has_a_layer_and_its_folders_name() {
    let metadata = metadata();
    for (name, package) in ours(&metadata) {
        assert!(
            layer_of(&name).is_some(),
            "{name} is in no layer: add it to LAYERS"
        );
        let folder = package.manifest_path.parent().unwrap().file_name().unwrap();
        let full = format!("alveole-{name}");
        assert!(
            package.name.as_str() == full && (folder == name || name == "vmm"),
            "package {} lives in folder {folder}: packages are called alveole-<folder>",
            package.name
        );
    }
    for name in LAYERS.iter().flat_map(|l| l.iter()) {
        let exists = ours(&metadata).contains_key(*name);
        assert!(
            exists || *name == "bench",
            "LAYERS names {name}, which does not exist"
        );
    }
}

#[test]
fn no_arrow_runs_up() {
    let metadata = metadata();
    let ours = ours(&metadata);
    let mut arrows = 0;
    for (from, package) in &ours {
        for to in package
            .dependencies
            .iter()
            .filter(|d| d.kind != DependencyKind::Development)
        {
            let to = short(&to.name);
            if !ours.contains_key(to) {
                continue;
            }
            arrows += 1;
            let down = layer_of(to) < layer_of(from);
            let declared = SIDEWAYS.iter().any(|(f, t, _)| f == from && *t == to);
            assert!(
                down || declared,
                "{from} depends on {to}, which is not below it"
            );
        }
    }
    assert!(
        arrows > 20,
        "only {arrows} arrows were seen: is the graph read rightly?"
    );
}

#[test]
fn each_fact_has_one_owner() {
    let metadata = metadata();
    for (name, package) in ours(&metadata) {
        for dependency in package
            .dependencies
            .iter()
            .filter(|d| d.kind != DependencyKind::Development)
        {
            if let Some((_, owners)) = OWNERS.iter().find(|(c, _)| *c == dependency.name) {
                assert!(
                    owners.contains(&name.as_str()),
                    "{name} depends on {}, which belongs to {owners:?} alone",
                    dependency.name
                );
            }
        }
    }
}

#[test]
fn one_version_of_each_rust_vmm_crate() {
    let metadata = metadata();
    let mut versions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let in_tests_only = |package: &Package| {
        IN_TESTS_ONLY.iter().any(|(name, version, _)| {
            package.name.as_str() == *name
                && package
                    .version
                    .to_string()
                    .starts_with(&format!("{version}."))
        })
    };
    for package in metadata.packages.iter().filter(|p| !in_tests_only(p)) {
        let name = package.name.as_str();
        if OWNERS.iter().any(|(c, _)| *c == name) || name == "vmm-sys-util" {
            versions
                .entry(name)
                .or_default()
                .insert(package.version.to_string());
        }
    }
    assert!(versions.len() >= OWNERS.len(), "{versions:?}");
    for (name, seen) in versions {
        assert_eq!(seen.len(), 1, "{name} is in the tree in versions {seen:?}");
    }
}

#[test]
fn the_fake_hypervisor_is_for_tests_only() {
    let metadata = metadata();
    for (name, package) in ours(&metadata) {
        for d in package
            .dependencies
            .iter()
            .filter(|d| d.kind != DependencyKind::Development)
        {
            assert!(
                !d.features.iter().any(|f| f == "fake"),
                "{name} switches {}'s fake on",
                d.name
            );
        }
    }
}

/// What a build of `packages` links, as lines of `name vVERSION`.
fn linked(packages: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "-e", "normal"])
        .args(["--prefix", "none", "--no-dedupe", "-f", "{p}"])
        .args(packages)
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let words = |line: &str| {
        let words: Vec<_> = line.split_whitespace().take(2).collect();
        words.join(" ")
    };
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.map(words).collect()
}

#[test]
fn what_judges_us_in_tests_no_program_links() {
    let linked = linked(&["--workspace"]);
    assert!(linked.iter().any(|p| p.starts_with("clap v")));
    for (name, version, why) in IN_TESTS_ONLY {
        let package = format!("{name} v{version}.");
        assert!(
            !linked.iter().any(|p| p.starts_with(&package)),
            "a program links {package}: {why}"
        );
    }
    assert!(!linked.iter().any(|p| p.starts_with("imago v")));
}

#[test]
fn the_vmm_stays_small() {
    let linked = linked(&["-p", "alveole-vmm"]);
    let names: BTreeSet<&str> = linked
        .iter()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    for (name, why) in NOT_IN_THE_VMM {
        assert!(!names.contains(name), "the VMM links {name}: {why}");
    }
    let external = names.iter().filter(|n| !n.starts_with("alveole-")).count();
    println!("external packages in the VMM's tree: {external}");
    assert!(
        (10..=MOST_EXTERNAL_PACKAGES).contains(&external),
        "{external} external packages"
    );
}

#[test]
fn unsafe_code_stays_where_it_must_be() {
    let mut found = BTreeSet::new();
    for file in rust_files(&root().join("crates"))
        .iter()
        .chain(&rust_files(&root().join("src")))
    {
        let text = fs::read_to_string(file).unwrap();
        if is_test_file(file) || !text.contains("unsafe {") && !text.contains("unsafe impl") {
            continue;
        }
        let relative = file.strip_prefix(root()).unwrap();
        let name = relative.iter().nth(1).unwrap().to_str().unwrap().to_owned();
        assert!(
            UNSAFE.iter().any(|(c, _)| *c == name),
            "{} holds unsafe code; only {UNSAFE:?} may",
            relative.display()
        );
        found.insert(name);
    }
    assert!(
        found.contains("guest-memory"),
        "the scan finds nothing: {found:?}"
    );
}

#[test]
fn every_crate_says_what_it_is_and_what_it_does_not_know() {
    let metadata = metadata();
    for (name, package) in ours(&metadata) {
        let folder = package.manifest_path.parent().unwrap().as_std_path();
        let entry = ["src/lib.rs", "src/main.rs"].map(|f| folder.join(f));
        let entry = entry.iter().find(|f| f.exists()).unwrap();
        let text = fs::read_to_string(entry).unwrap();
        assert!(
            text.starts_with("//!"),
            "{}: no opening words",
            entry.display()
        );
        let head = text.lines().map_while(|l| l.strip_prefix("//!"));
        let head: Vec<_> = head.flat_map(str::split_whitespace).collect();
        let head = head.join(" ");
        let says = head.contains("does not know") || head.contains("Knows no");
        assert!(
            says,
            "{}: does not say what it deliberately does not know",
            entry.display()
        );
        assert!(folder.join("README.md").exists(), "{name} has no README.md");
    }
}

#[test]
fn the_readme_is_read_in_one_go() {
    let lines = fs::read_to_string(root().join("README.md"))
        .unwrap()
        .lines()
        .count();
    assert!(
        lines <= MOST_README_LINES,
        "README.md has {lines} lines, {MOST_README_LINES} are the most: move some to a crate's own"
    );
}

#[test]
fn files_stay_readable() {
    let main = fs::read_to_string(root().join("src/main.rs"))
        .unwrap()
        .lines()
        .count();
    assert!(main <= MOST_MAIN_LINES, "src/main.rs has {main} lines");
    for folder in ["src", "crates"] {
        for file in rust_files(&root().join(folder)) {
            let text = fs::read_to_string(&file).unwrap();
            let lines = text.lines().take_while(|l| *l != "#[cfg(test)]").count();
            assert!(
                lines <= MOST_FILE_LINES || is_test_file(&file),
                "{} has {lines} lines, {MOST_FILE_LINES} are the most",
                file.display()
            );
        }
    }
}

#[test]
fn every_seccomp_rule_says_why() {
    let folder = root().join("resources/seccomp/x86_64");
    let mut rules = 0;
    for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
        if entry.path().extension().is_none_or(|e| e != "json") {
            continue;
        }
        let text = fs::read_to_string(entry.path()).unwrap();
        let policy: serde_json::Value = serde_json::from_str(&text).unwrap();
        visit_rules(&policy, &mut |rule| {
            rules += 1;
            let why = rule["why"].as_str().unwrap_or_default();
            assert!(
                why.len() > 8,
                "{}: {rule} does not say why",
                entry.path().display()
            );
        });
    }
    assert!(rules > 30, "only {rules} rules were seen");
}

fn visit_rules(value: &serde_json::Value, f: &mut dyn FnMut(&serde_json::Value)) {
    match value {
        serde_json::Value::Array(items) => items.iter().for_each(|v| visit_rules(v, f)),
        serde_json::Value::Object(fields) if fields.contains_key("syscall") => f(value),
        serde_json::Value::Object(fields) => fields.values().for_each(|v| visit_rules(v, f)),
        _ => {}
    }
}

fn is_test_file(file: &Path) -> bool {
    file.components().any(|c| c.as_os_str() == "tests") || file.ends_with("tests.rs")
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            // What a fuzz target was built into is not ours.
            if !path.ends_with("target") {
                files.extend(rust_files(&path));
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}
