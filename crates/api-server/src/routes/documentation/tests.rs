//! `API.md` is what is made, and the descriptions say what the program takes: which fields there are is asked of the readers of
//! bodies, which refuse one with an unknown field by naming all that are known.

use std::path::Path;
use std::{env, fs};

use alveole_vm_config::{
    Action, Body, BootSource, CpuConfig, Drive, DriveUpdate, Entropy, LinkState, Logger,
    MachineConfig, MachineConfigUpdate, Metrics, MmdsConfig, NetworkInterface,
    NetworkInterfaceUpdate, Serial, SnapshotCreate, SnapshotLoad, StateChange, VmConfig, Vsock,
};

use super::*;

/// Set to write the file instead of comparing it.
const UPDATE: &str = "ALVEOLE_UPDATE_API_MD";

/// What is said of a body that is wrong; nothing if it is right.
fn said<T: Body>(text: &str) -> String {
    let read = T::from_json_bytes(text.as_bytes(), "body");
    read.err().map(|e| e.to_string()).unwrap_or_default()
}

fn said_of_file(text: &str) -> String {
    let read = VmConfig::from_json(text, "body");
    read.err().map(|e| e.to_string()).unwrap_or_default()
}

/// Definitions, who reads them, a body in which one stands at the `@`, and how the place is called there.
type Read = (&'static str, fn(&str) -> String, &'static str, &'static str);

const READERS: &[Read] = &[
    ("FullVmConfiguration", said_of_file, "@", ""),
    ("BootSource", said::<BootSource>, "@", ""),
    ("MachineConfiguration", said::<MachineConfig>, "@", ""),
    ("CpuConfig", said::<CpuConfig>, "@", ""),
    (
        "CpuidLeafModifier",
        said::<CpuConfig>,
        r#"{"cpuid_modifiers": [@]}"#,
        "cpuid_modifiers[0].",
    ),
    (
        "CpuidRegisterModifier",
        said::<CpuConfig>,
        r#"{"cpuid_modifiers": [{"modifiers": [@]}]}"#,
        "cpuid_modifiers[0].modifiers[0].",
    ),
    (
        "MsrModifier",
        said::<CpuConfig>,
        r#"{"msr_modifiers": [@]}"#,
        "msr_modifiers[0].",
    ),
    ("Drive", said::<Drive>, "@", ""),
    ("PartialDrive", said::<DriveUpdate>, "@", ""),
    ("NetworkInterface", said::<NetworkInterface>, "@", ""),
    (
        "PartialNetworkInterface",
        said::<NetworkInterfaceUpdate>,
        "@",
        "",
    ),
    (
        "Egress",
        said::<NetworkInterface>,
        r#"{"egress": @}"#,
        "egress.",
    ),
    (
        "RateLimiter",
        said::<Entropy>,
        r#"{"rate_limiter": @}"#,
        "rate_limiter.",
    ),
    (
        "TokenBucket",
        said::<Entropy>,
        r#"{"rate_limiter": {"ops": @}}"#,
        "rate_limiter.ops.",
    ),
    ("Vsock", said::<Vsock>, "@", ""),
    ("EntropyDevice", said::<Entropy>, "@", ""),
    ("SerialDevice", said::<Serial>, "@", ""),
    ("Logger", said::<Logger>, "@", ""),
    ("Metrics", said::<Metrics>, "@", ""),
    ("MmdsConfig", said::<MmdsConfig>, "@", ""),
    ("InstanceActionInfo", said::<Action>, "@", ""),
    ("Vm", said::<StateChange>, "@", ""),
    ("SnapshotCreateParams", said::<SnapshotCreate>, "@", ""),
    (
        "DriveCopy",
        said::<SnapshotCreate>,
        r#"{"drives": [@]}"#,
        "drives[0].",
    ),
    ("SnapshotLoadParams", said::<SnapshotLoad>, "@", ""),
    (
        "MemoryBackend",
        said::<SnapshotLoad>,
        r#"{"mem_backend": @}"#,
        "mem_backend.",
    ),
    (
        "NetworkOverride",
        said::<SnapshotLoad>,
        r#"{"network_overrides": [@]}"#,
        "network_overrides[0].",
    ),
    (
        "VsockOverride",
        said::<SnapshotLoad>,
        r#"{"vsock_override": @}"#,
        "vsock_override.",
    ),
    (
        "DriveOverride",
        said::<SnapshotLoad>,
        r#"{"drive_overrides": [@]}"#,
        "drive_overrides[0].",
    ),
];

/// Definitions that no reader of ours reads: answers, values, and what may be anything.
const UNREAD: &[&str] = &[
    "Error",
    "InstanceInfo",
    "FirecrackerVersion",
    "MmdsContentsObject",
    "CpuTemplate",
];

/// The lines of `said` that are about `field`.
fn about<'a>(said: &'a str, field: &str) -> Vec<&'a str> {
    let field = format!("\"{field}\": ");
    said.lines().filter(|line| line.contains(&field)).collect()
}

#[test]
fn the_documentation_is_made_of_the_descriptions() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("API.md");
    let made = documentation();
    if env::var_os(UPDATE).is_some() {
        fs::write(&path, &made).unwrap();
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    let wrong = there
        .lines()
        .zip(made.lines())
        .position(|(there, made)| there != made);
    assert!(
        there == made,
        "{} is not what is made of resources/openapi, from line {} on: run again with {UPDATE}=1",
        path.display(),
        wrong.unwrap_or(there.lines().count().min(made.lines().count())) + 1
    );
}

#[test]
fn every_field_that_is_described_is_read_and_the_other_way_round() {
    let descriptions = Descriptions::read();
    for (name, said, body, place) in READERS {
        let said = |value: &str| said(&body.replace('@', value));
        let told = said(r#"{"zzz": 1}"#);
        let (_, known) = told
            .split_once("known are: ")
            .unwrap_or_else(|| panic!("{name}: {told}"));
        let known = known.lines().next().unwrap().split(", ");
        let fields = descriptions.fields(name);
        // What makes no sense on this architecture is not told as known.
        let refused = fields
            .iter()
            .filter(|f| f.refused.is_some())
            .map(|f| f.name);
        let read: BTreeSet<_> = known.chain(refused).collect();
        let described: BTreeSet<_> = fields.iter().map(|f| f.name).collect();
        assert_eq!(read, described, "{name}: read, and described");

        let told = said("{}");
        for field in &fields {
            let lines = about(&told, &format!("{place}{}", field.name));
            let is_missing = lines.iter().any(|line| line.contains("is required"));
            assert_eq!(
                is_missing, field.is_required,
                "{name}.{}: {told}",
                field.name
            );
        }
    }
    // `PATCH /machine-config` has the same body, of which nothing is required.
    let told = |said: fn(&str) -> String| {
        said(r#"{"zzz": 1}"#)
            .split_once("known are: ")
            .unwrap()
            .1
            .to_owned()
    };
    let (put, patch) = (
        told(said::<MachineConfig>),
        told(said::<MachineConfigUpdate>),
    );
    assert_eq!(put.lines().next(), patch.lines().next());
    assert!(told(said::<LinkState>).starts_with("up"));
}

#[test]
fn values_that_are_described_are_read_or_refused_as_it_says() {
    let descriptions = Descriptions::read();
    let mut choices = 0;
    for (name, said, body, place) in READERS {
        for field in descriptions.fields(name) {
            let told = |value: serde_json::Value| -> String {
                let value = serde_json::json!({ field.name: value }).to_string();
                let told = said(&body.replace('@', &value));
                about(&told, &format!("{place}{}", field.name)).concat()
            };
            let refused: Vec<_> = field.refused_values().into_iter().map(json).collect();
            for value in &refused {
                let told = told(value.clone());
                assert!(
                    !told.is_empty() && !told.contains("unknown field"),
                    "{name}.{} {value}: {told}",
                    field.name
                );
            }
            let mut values: Vec<_> = list(field.said("enum")).map(json).collect();
            if let Some(reference) = field.said("$ref").as_str() {
                values.extend(list(&descriptions.definition(name_of(reference))["enum"]).map(json));
            }
            let is_choice = !values.is_empty();
            if field.said("type").as_str() == Some("boolean") {
                values.extend([true.into(), false.into()]);
            }
            for value in values {
                choices += 1;
                let told = told(value.clone());
                if !refused.contains(&value) {
                    assert_eq!(told, "", "{name}.{} {value}", field.name);
                }
            }
            if is_choice {
                assert!(!told("zzz".into()).is_empty(), "{name}.{}", field.name);
            }
        }
    }
    assert!(choices > 40, "{choices}");
}

#[test]
fn every_definition_that_is_used_is_read_or_an_answer_and_what_extends_one_exists() {
    let descriptions = Descriptions::read();
    let read = READERS.iter().map(|(name, ..)| *name);
    let known: BTreeSet<_> = read
        .chain(UNREAD.iter().copied())
        .map(str::to_owned)
        .collect();
    assert_eq!(descriptions.used(), known);
    for (name, definition) in entries(&descriptions.ours["definitions"]) {
        if let Some(of) = definition["x-extends"].as_str() {
            assert!(
                !descriptions.is_ours(of),
                "{name} extends {of}, which the contract does not have"
            );
            for key in entries(&definition["x-refused"]).map(|(key, _)| key) {
                let fields = descriptions.fields(of);
                assert!(
                    fields.iter().any(|f| f.name == key),
                    "{name}: {of} has no {key}"
                );
            }
        }
    }
}

#[test]
fn every_route_is_in_a_description_and_the_other_way_round() {
    let descriptions = Descriptions::read();
    let described = descriptions.operations();
    assert!(described.iter().filter(|o| !o.is_ours).count() > 30);
    let all: BTreeSet<_> = described
        .iter()
        .map(|o| (o.method.to_uppercase(), route_of(o.path)))
        .collect();
    assert_eq!(all.len(), described.len(), "described twice");
    let routes = ROUTES
        .iter()
        .map(|(method, path, _)| ((*method).into(), (*path).into()));
    assert_eq!(routes.collect::<BTreeSet<_>>(), all);
}
