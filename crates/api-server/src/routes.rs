//! What is served: one table of methods and paths, and how each makes a command of a body.
//!
//! Deliberately does not know: HTTP's framing, when a command may be carried out.

use alveole_vm_config::{
    Action, Body, DriveUpdate, LinkState, MachineConfigUpdate, NetworkInterfaceUpdate, StateChange,
};
use alveole_vm_control::{Command, Refusal};
use serde_json::Value;

/// Characters of a path that a message shows.
const SHOWN_CHARS: usize = 80;

/// What a request is made a command of.
enum Take {
    /// Nothing: it has no body.
    Nothing(fn() -> Command),
    /// Nothing but the form of answer that it accepts.
    Accept(fn(&str) -> Command),
    /// Its body.
    Body(fn(&[u8]) -> Result<Command, Refusal>),
    /// Its body, and the name in its path.
    Named(fn(&[u8], &str) -> Result<Command, Refusal>),
    /// It is in the contract; what it concerns is not in this program yet.
    NotBuilt(&'static str),
}

/// The last part of a path that names a device.
const NAME: &str = "{id}";

const BALLOON: &str = "the balloon device is";
const PMEM: &str = "persistent memory devices are";
const HOTPLUG: &str = "memory hotplug is";
const UNPLUG: &str = "taking devices out of a running guest is";

const ROUTES: &[(&str, &str, Take)] = {
    use Take::{Accept, Body, Named, NotBuilt, Nothing};
    &[
        ("GET", "/", Nothing(|| Command::GetInstance)),
        ("GET", "/version", Nothing(|| Command::GetVersion)),
        ("GET", "/vm/config", Nothing(|| Command::GetConfig)),
        ("PATCH", "/vm", Body(|b| of(b, state_change))),
        ("PUT", "/actions", Body(|b| of(b, action))),
        (
            "PUT",
            "/boot-source",
            Body(|b| of(b, Command::PutBootSource)),
        ),
        (
            "GET",
            "/machine-config",
            Nothing(|| Command::GetMachineConfig),
        ),
        (
            "PUT",
            "/machine-config",
            Body(|b| of(b, Command::PutMachineConfig)),
        ),
        ("PATCH", "/machine-config", Body(patch_machine_config)),
        ("PUT", "/cpu-config", Body(|b| of(b, Command::PutCpuConfig))),
        ("PUT", "/drives/{id}", Named(put_drive)),
        ("PATCH", "/drives/{id}", Named(patch_drive)),
        ("DELETE", "/drives/{id}", NotBuilt(UNPLUG)),
        ("PUT", "/network-interfaces/{id}", Named(put_interface)),
        ("PATCH", "/network-interfaces/{id}", Named(patch_interface)),
        ("DELETE", "/network-interfaces/{id}", NotBuilt(UNPLUG)),
        ("PUT", "/network-interfaces/{id}/link", Named(put_link)),
        ("PUT", "/vsock", Body(|b| of(b, Command::PutVsock))),
        ("PUT", "/entropy", Body(|b| of(b, Command::PutEntropy))),
        ("PUT", "/serial", Body(|b| of(b, Command::PutSerial))),
        ("PUT", "/logger", Body(|b| of(b, Command::PutLogger))),
        ("PUT", "/metrics", Body(|b| of(b, Command::PutMetrics))),
        ("GET", "/metrics", Accept(metrics)),
        ("GET", "/mmds", Nothing(|| Command::GetMetadata)),
        ("PUT", "/mmds", Body(|b| value(b, Command::PutMetadata))),
        ("PATCH", "/mmds", Body(|b| value(b, Command::PatchMetadata))),
        (
            "PUT",
            "/mmds/config",
            Body(|b| of(b, Command::PutMetadataConfig)),
        ),
        ("GET", "/balloon", NotBuilt(BALLOON)),
        ("PUT", "/balloon", NotBuilt(BALLOON)),
        ("PATCH", "/balloon", NotBuilt(BALLOON)),
        ("GET", "/balloon/statistics", NotBuilt(BALLOON)),
        ("PATCH", "/balloon/statistics", NotBuilt(BALLOON)),
        ("PATCH", "/balloon/hinting/start", NotBuilt(BALLOON)),
        ("GET", "/balloon/hinting/status", NotBuilt(BALLOON)),
        ("PATCH", "/balloon/hinting/stop", NotBuilt(BALLOON)),
        ("PUT", "/pmem/{id}", NotBuilt(PMEM)),
        ("PATCH", "/pmem/{id}", NotBuilt(PMEM)),
        ("DELETE", "/pmem/{id}", NotBuilt(PMEM)),
        ("GET", "/hotplug/memory", NotBuilt(HOTPLUG)),
        ("PUT", "/hotplug/memory", NotBuilt(HOTPLUG)),
        ("PATCH", "/hotplug/memory", NotBuilt(HOTPLUG)),
        (
            "PUT",
            "/snapshot/create",
            Body(|b| of(b, Command::CreateSnapshot)),
        ),
        (
            "PUT",
            "/snapshot/load",
            Body(|b| of(b, |load| Command::LoadSnapshot(Box::new(load)))),
        ),
    ]
};

/// The command that a request asks for.
///
/// # Errors
/// There is no such path or method, or the body is wrong: what, why and what to do.
pub(crate) fn command(
    method: &str,
    path: &str,
    accept: &str,
    body: &[u8],
) -> Result<Command, Refusal> {
    let asked: Vec<&str> = parts(path).collect();
    let mut others = Vec::new();
    for (route_method, pattern, take) in ROUTES {
        let Some(name) = matched(pattern, &asked) else {
            continue;
        };
        if *route_method != method {
            others.push(*route_method);
            continue;
        }
        let has_body = !body.trim_ascii().is_empty();
        return match take {
            Take::NotBuilt(what) => Err(Refusal::NotBuilt(what)),
            Take::Nothing(_) | Take::Accept(_) if has_body => failed(format!(
                "{method} {}: this request has no body; send none",
                shown(path)
            )),
            Take::Nothing(make) => Ok(make()),
            Take::Accept(make) => Ok(make(accept)),
            Take::Body(_) | Take::Named(_) if !has_body => failed(format!(
                "{method} {}: the body is empty; send what is to be set as JSON, with its Content-Length",
                shown(path)
            )),
            Take::Body(make) => make(body),
            Take::Named(make) => make(body, name),
        };
    }
    if !others.is_empty() {
        return failed(format!(
            "there is no {} {}: this path takes {}",
            shown(method),
            shown(path),
            others.join(", ")
        ));
    }
    let mut known: Vec<&str> = ROUTES.iter().map(|(_, pattern, _)| *pattern).collect();
    known.dedup();
    failed(format!(
        "there is no {} {}: the paths are {}",
        shown(method),
        shown(path),
        known.join(", ")
    ))
}

/// The parts of a path. Slashes in front and one at the end do not count.
fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.trim_start_matches('/').split_terminator('/')
}

/// The name in a path that fits `pattern`: empty where the pattern has none.
fn matched<'a>(pattern: &str, asked: &[&'a str]) -> Option<&'a str> {
    let wanted: Vec<&str> = parts(pattern).collect();
    if wanted.len() != asked.len() {
        return None;
    }
    let mut name = "";
    for (want, part) in wanted.iter().zip(asked) {
        if *want == NAME {
            name = part;
        } else if want != part {
            return None;
        }
    }
    Some(name)
}

/// A part of a request as a message shows it.
pub(crate) fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_CHARS).collect();
    if shown.len() < text.len() {
        shown.push_str("...");
    }
    shown
}

fn failed<T>(why: String) -> Result<T, Refusal> {
    Err(Refusal::Failed(why))
}

fn read<T: Body>(body: &[u8]) -> Result<T, Refusal> {
    T::from_json_bytes(body, "body").map_err(|e| Refusal::Failed(e.to_string()))
}

fn of<T: Body>(body: &[u8], make: impl FnOnce(T) -> Command) -> Result<Command, Refusal> {
    read(body).map(make)
}

/// Metadata are an object, so that they have names to be read by.
fn value(body: &[u8], make: impl FnOnce(Value) -> Command) -> Result<Command, Refusal> {
    match serde_json::from_slice(body) {
        Ok(value @ Value::Object(_)) => Ok(make(value)),
        Ok(_) => failed(
            "the body is no JSON object: give the metadata names, as {\"latest\": ...}".into(),
        ),
        Err(e) => failed(format!("the body is not JSON: {e}")),
    }
}

/// Prometheus names the form of OpenMetrics first; everybody else gets the older one.
fn metrics(accept: &str) -> Command {
    Command::GetMetrics {
        open_metrics: accept.contains("application/openmetrics-text"),
    }
}

fn action(action: Action) -> Command {
    match action {
        Action::InstanceStart => Command::Start,
        Action::FlushMetrics => Command::FlushMetrics,
        Action::SendCtrlAltDel => Command::SendCtrlAltDel,
    }
}

fn state_change(change: StateChange) -> Command {
    match change {
        StateChange::Paused => Command::Pause,
        StateChange::Resumed => Command::Resume,
    }
}

fn patch_machine_config(body: &[u8]) -> Result<Command, Refusal> {
    let update: MachineConfigUpdate = read(body)?;
    if update.is_empty() {
        return failed(
            "the body changes nothing: name a field of the machine's configuration".into(),
        );
    }
    Ok(Command::PatchMachineConfig(update))
}

/// The name in the path and the one in the body are the same.
fn same(what: &str, path: &str, body: &str) -> Result<(), Refusal> {
    if path == body {
        return Ok(());
    }
    failed(format!(
        "the path names {what} {:?}, the body {:?}: give both the same name",
        shown(path),
        shown(body)
    ))
}

fn put_drive(body: &[u8], name: &str) -> Result<Command, Refusal> {
    let drive: alveole_vm_config::Drive = read(body)?;
    same("drive", name, &drive.drive_id)?;
    Ok(Command::PutDrive(Box::new(drive)))
}

fn patch_drive(body: &[u8], name: &str) -> Result<Command, Refusal> {
    let update: DriveUpdate = read(body)?;
    same("drive", name, &update.drive_id)?;
    if update.path_on_host.is_none() && update.rate_limiter.is_none() {
        return failed("the body changes nothing: name path_on_host or rate_limiter".into());
    }
    Ok(Command::PatchDrive(update))
}

fn put_interface(body: &[u8], name: &str) -> Result<Command, Refusal> {
    let interface: alveole_vm_config::NetworkInterface = read(body)?;
    same("network interface", name, &interface.iface_id)?;
    Ok(Command::PutNetworkInterface(Box::new(interface)))
}

fn put_link(body: &[u8], name: &str) -> Result<Command, Refusal> {
    let LinkState { up } = read(body)?;
    Ok(Command::SetLink {
        iface_id: name.to_owned(),
        up,
    })
}

fn patch_interface(body: &[u8], name: &str) -> Result<Command, Refusal> {
    let update: NetworkInterfaceUpdate = read(body)?;
    same("network interface", name, &update.iface_id)?;
    Ok(Command::PatchNetworkInterface(update))
}

#[cfg(test)]
mod documentation;

#[cfg(test)]
mod tests {
    use super::*;

    fn told(method: &str, path: &str, body: &str) -> String {
        command(method, path, "", body.as_bytes())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn every_route_that_is_built_makes_its_command() {
        let drive = r#"{"drive_id":"a","path_on_host":"x","is_root_device":false}"#;
        let interface = r#"{"iface_id":"a","host_dev_name":"t"}"#;
        let made: Vec<Command> = [
            ("GET", "/", ""),
            ("GET", "", ""),
            ("GET", "/version/", ""),
            ("GET", "/vm/config", " \r\n"),
            ("PATCH", "/vm", r#"{"state":"Paused"}"#),
            ("PATCH", "/vm", r#"{"state":"Resumed"}"#),
            ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
            ("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#),
            ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#),
            ("PUT", "/boot-source", r#"{"kernel_image_path":"k"}"#),
            ("GET", "//machine-config", ""),
            (
                "PUT",
                "/machine-config",
                r#"{"vcpu_count":1,"mem_size_mib":64}"#,
            ),
            ("PATCH", "/machine-config", r#"{"vcpu_count":1}"#),
            ("PUT", "/cpu-config", "{}"),
            ("PUT", "/drives/a", drive),
            (
                "PATCH",
                "/drives/a",
                r#"{"drive_id":"a","path_on_host":"x"}"#,
            ),
            ("PUT", "/network-interfaces/a", interface),
            ("PATCH", "/network-interfaces/a", r#"{"iface_id":"a"}"#),
            ("PUT", "/network-interfaces/a/link", r#"{"up":false}"#),
            ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#),
            ("PUT", "/entropy", "{}"),
            ("PUT", "/serial", "{}"),
            ("PUT", "/logger", "{}"),
            ("PUT", "/metrics", r#"{"metrics_path":"m"}"#),
            ("GET", "/metrics", ""),
            ("GET", "/mmds", ""),
            ("PUT", "/mmds", r#"{"a":1}"#),
            ("PATCH", "/mmds", r#"{"a":null}"#),
            ("PUT", "/mmds/config", r#"{"network_interfaces":[]}"#),
            (
                "PUT",
                "/snapshot/create",
                r#"{"snapshot_path":"s","mem_file_path":"m"}"#,
            ),
            ("PUT", "/snapshot/load", r#"{"snapshot_path":"s"}"#),
        ]
        .into_iter()
        .map(|(method, path, body)| {
            command(method, path, "", body.as_bytes())
                .unwrap_or_else(|e| panic!("{method} {path}: {e}"))
        })
        .collect();
        // All there are, and `/` twice by another spelling.
        let kinds: std::collections::HashSet<_> = made.iter().map(std::mem::discriminant).collect();
        assert_eq!((made.len(), kinds.len()), (31, 30));
    }

    #[test]
    fn every_path_and_method_of_the_table_is_its_own() {
        let mut seen = std::collections::HashSet::new();
        for (method, path, take) in ROUTES {
            assert!(
                seen.insert((method, path)),
                "{method} {path} is there twice"
            );
            let named = matches!(take, Take::Named(_));
            assert_eq!(
                named,
                path.contains(NAME) && !matches!(take, Take::NotBuilt(_)),
                "{method} {path}"
            );
            if let Take::NotBuilt(what) = take {
                let text = told(method, &path.replace(NAME, "x"), "");
                assert!(
                    text.starts_with(what) && text.contains("not built yet"),
                    "{text}"
                );
            }
        }
    }

    #[test]
    fn what_is_wrong_with_a_request_is_told() {
        let many = "x".repeat(300);
        for ((method, path, body), part) in [
            (
                ("GET", "/nope", ""),
                "there is no GET /nope: the paths are /, /version,",
            ),
            (("GET", &many, ""), "xxx...: the paths are"),
            (
                ("POST", "/machine-config", "{}"),
                "this path takes GET, PUT, PATCH",
            ),
            (("GET", "/version/x", ""), "there is no GET /version/x"),
            (("GET", "/version?x=1", ""), "there is no GET /version?x=1"),
            (("GET", "/drives/../version", ""), "there is no"),
            (("PUT", "/drives", "{}"), "/drives/{id}"),
            (("GET", "/version", "x"), "this request has no body"),
            (("PUT", "/actions", ""), "the body is empty"),
            (("PUT", "/actions", " \n"), "the body is empty"),
            (("PATCH", "/machine-config", "{}"), "changes nothing"),
            (
                ("PATCH", "/drives/a", r#"{"drive_id":"a"}"#),
                "changes nothing",
            ),
            (
                ("PUT", "/boot-source", "{}"),
                "\"kernel_image_path\": this field is required",
            ),
            (("PUT", "/mmds", "{"), "the body is not JSON"),
            (("PUT", "/mmds", "[1]"), "no JSON object"),
            (("PATCH", "/mmds", "null"), "no JSON object"),
            (
                ("PATCH", "/drives/a", r#"{"drive_id":"b"}"#),
                "the path names drive \"a\", the body \"b\"",
            ),
            (
                ("PATCH", "/network-interfaces/a", r#"{"iface_id":"b"}"#),
                "the path names network interface \"a\", the body \"b\"",
            ),
        ] {
            let text = told(method, path, body);
            assert!(text.contains(part), "{text} / {part}");
            assert!(text.len() < 700, "{text}");
        }
    }
}
