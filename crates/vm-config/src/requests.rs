//! The bodies of API requests: parts of a description that stand alone, and what changes one.
//!
//! They are read by the same reader as a whole description, so that what is said about a wrong body is what is
//! said about a wrong file.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::Serialize;

use crate::cpu::{self, CpuConfig};
use crate::error::ConfigError;
use crate::object::{self, Leaf, Object};
use crate::read;
use crate::snapshots::{self, SnapshotCreate, SnapshotLoad};
use crate::types::{
    BootSource, CpuTemplate, Drive, Entropy, HugePages, Logger, MachineConfig, Metrics,
    NetworkInterface, RateLimiter, Serial, Vsock,
};

/// What the body of a request says.
pub trait Body: Sized {
    /// Reads it. `name` is only used in messages.
    ///
    /// # Errors
    /// The bytes are too many, not UTF-8, no JSON, or not this JSON; then everything that is wrong is listed.
    fn from_json_bytes(bytes: &[u8], name: &str) -> Result<Self, ConfigError>;
}

macro_rules! bodies {
    ($($type:ty: $read:path,)*) => {$(
        impl Body for $type {
            fn from_json_bytes(bytes: &[u8], name: &str) -> Result<Self, ConfigError> {
                let text = crate::text_of(bytes, name)?;
                object::read_document(text, name, $read)
            }
        }
    )*};
}

bodies! {
    BootSource: read::boot_source,
    MachineConfig: read::machine_config,
    MachineConfigUpdate: machine_config_update,
    Drive: read::drive,
    DriveUpdate: drive_update,
    NetworkInterface: read::network_interface,
    NetworkInterfaceUpdate: network_interface_update,
    LinkState: link_state,
    Vsock: read::vsock,
    Entropy: read::entropy,
    Serial: read::serial,
    Logger: read::logger,
    Metrics: read::metrics,
    MmdsConfig: mmds_config,
    CpuConfig: cpu::cpu_config,
    Action: action,
    StateChange: state_change,
    SnapshotCreate: snapshots::create,
    SnapshotLoad: snapshots::load,
}

/// Changes processors and memory before the guest is started; what is absent stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MachineConfigUpdate {
    /// Number of vCPUs.
    pub vcpu_count: Option<u8>,
    /// Size of guest RAM, in MiB.
    pub mem_size_mib: Option<u64>,
    /// Whether the guest sees two threads per core. Only `false` is built.
    pub smt: Option<bool>,
    /// Whether pages the guest writes are remembered for diff snapshots.
    pub track_dirty_pages: Option<bool>,
    /// Which CPU features are hidden from the guest.
    pub cpu_template: Option<CpuTemplate>,
    /// Which host pages back guest RAM.
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigUpdate {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// `of`, changed.
    #[must_use]
    pub fn applied_to(&self, of: &MachineConfig) -> MachineConfig {
        MachineConfig {
            vcpu_count: self.vcpu_count.unwrap_or(of.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(of.mem_size_mib),
            smt: self.smt.unwrap_or(of.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(of.track_dirty_pages),
            cpu_template: self.cpu_template.or(of.cpu_template),
            huge_pages: self.huge_pages.unwrap_or(of.huge_pages),
        }
    }
}

/// Changes a disk of a running guest; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriveUpdate {
    /// The disk's name.
    pub drive_id: String,
    /// What lies behind it from now on; the same path once more: its size is looked at again.
    pub path_on_host: Option<PathBuf>,
    /// Bounds from now on. A bucket of size 0, or with a refill time of 0, bounds no more.
    pub rate_limiter: Option<RateLimiter>,
}

/// Changes the bounds of a network interface of a running guest; what is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkInterfaceUpdate {
    /// The interface's name.
    pub iface_id: String,
    /// Bounds on what the guest receives.
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Bounds on what the guest sends.
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Whether the cable of a network interface is in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkState {
    /// It is.
    pub up: bool,
}

/// How the metadata service is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MmdsConfig {
    /// Which protocol guests speak.
    pub version: MmdsVersion,
    /// The network interfaces through which it is reached.
    pub network_interfaces: Vec<String>,
    /// Its address; none: 169.254.169.254.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether it answers in the text form of the EC2 instance metadata service.
    pub imds_compat: bool,
}

/// Which protocol guests speak to the metadata service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum MmdsVersion {
    /// Plain requests.
    #[default]
    V1,
    /// Requests with the token of a session.
    V2,
}

/// Something to do at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// Start the guest.
    #[default]
    InstanceStart,
    /// Write the counters out now.
    FlushMetrics,
    /// Ask the guest to shut down.
    SendCtrlAltDel,
}

/// The state that a running guest is to have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StateChange {
    /// Its processors stand still.
    #[default]
    Paused,
    /// They run.
    Resumed,
}

fn machine_config_update(body: &mut Object<'_>) -> MachineConfigUpdate {
    MachineConfigUpdate {
        vcpu_count: body.optional("vcpu_count"),
        mem_size_mib: body.optional("mem_size_mib"),
        smt: read::smt(body),
        track_dirty_pages: body.optional("track_dirty_pages"),
        cpu_template: read::template(body),
        huge_pages: read::huge_pages(body),
    }
}

fn drive_update(body: &mut Object<'_>) -> DriveUpdate {
    DriveUpdate {
        drive_id: body.required("drive_id"),
        path_on_host: body.optional("path_on_host"),
        rate_limiter: body.section("rate_limiter", read::rate_limiter),
    }
}

fn network_interface_update(body: &mut Object<'_>) -> NetworkInterfaceUpdate {
    NetworkInterfaceUpdate {
        iface_id: body.required("iface_id"),
        rx_rate_limiter: body.section("rx_rate_limiter", read::rate_limiter),
        tx_rate_limiter: body.section("tx_rate_limiter", read::rate_limiter),
    }
}

fn link_state(body: &mut Object<'_>) -> LinkState {
    LinkState {
        up: body.required("up"),
    }
}

pub(crate) fn mmds_config(body: &mut Object<'_>) -> MmdsConfig {
    MmdsConfig {
        version: body.optional("version").unwrap_or_default(),
        network_interfaces: body.required("network_interfaces"),
        ipv4_address: body.optional("ipv4_address"),
        imds_compat: body.optional("imds_compat").unwrap_or_default(),
    }
}

fn action(body: &mut Object<'_>) -> Action {
    body.required("action_type")
}

fn state_change(body: &mut Object<'_>) -> StateChange {
    body.required("state")
}

impl Leaf for Vec<String> {
    const EXPECTED: &'static str = "an array of strings";

    fn from_json(raw: &str) -> Option<Self> {
        serde_json::from_str(raw).ok()
    }
}

impl Leaf for Ipv4Addr {
    const EXPECTED: &'static str = "a string with an IPv4 address, as \"169.254.169.254\"";

    fn from_json(raw: &str) -> Option<Self> {
        let text: String = serde_json::from_str(raw).ok()?;
        text.parse().ok()
    }
}

read::words! { MmdsVersion, "one of \"V1\", \"V2\"",
"V1" => MmdsVersion::V1, "V2" => MmdsVersion::V2, }
read::words! { Action, "one of \"InstanceStart\", \"FlushMetrics\", \"SendCtrlAltDel\"",
"InstanceStart" => Action::InstanceStart, "FlushMetrics" => Action::FlushMetrics,
"SendCtrlAltDel" => Action::SendCtrlAltDel, }
read::words! { StateChange, "one of \"Paused\", \"Resumed\"",
"Paused" => StateChange::Paused, "Resumed" => StateChange::Resumed, }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenBucket;

    fn body<T: Body>(text: &str) -> Result<T, String> {
        T::from_json_bytes(text.as_bytes(), "body").map_err(|e| e.to_string())
    }

    #[test]
    fn bodies_are_read_as_the_parts_of_a_file() {
        let source: BootSource = body(r#"{"kernel_image_path": "k"}"#).unwrap();
        assert_eq!(source.kernel_image_path.to_str(), Some("k"));
        let update: DriveUpdate =
            body(r#"{"drive_id": "a", "rate_limiter": {"ops": {"size": 0, "refill_time": 0}}}"#)
                .unwrap();
        let off = TokenBucket::default();
        let limiter = RateLimiter {
            bandwidth: None,
            ops: Some(off),
        };
        assert_eq!(update.rate_limiter, Some(limiter));
        assert_eq!(update.path_on_host, None);
        let mmds: MmdsConfig = body(
            r#"{"network_interfaces": ["a"], "ipv4_address": "169.254.1.2", "version": "V2"}"#,
        )
        .unwrap();
        assert_eq!(mmds.ipv4_address, Some(Ipv4Addr::new(169, 254, 1, 2)));
        assert_eq!(mmds.version, MmdsVersion::V2);
        for (name, action) in [
            ("InstanceStart", Action::InstanceStart),
            ("FlushMetrics", Action::FlushMetrics),
            ("SendCtrlAltDel", Action::SendCtrlAltDel),
        ] {
            assert_eq!(body(&format!(r#"{{"action_type": "{name}"}}"#)), Ok(action));
        }
        assert_eq!(body(r#"{"state": "Resumed"}"#), Ok(StateChange::Resumed));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let update: MachineConfigUpdate = body(r#"{"vcpu_count": 3, "smt": false}"#).unwrap();
        assert!(!update.is_empty());
        let before = MachineConfig {
            mem_size_mib: 77,
            ..MachineConfig::default()
        };
        let after = update.applied_to(&before);
        assert_eq!((after.vcpu_count, after.mem_size_mib), (3, 77));
        assert!(body::<MachineConfigUpdate>("{}").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_with_a_body_is_said() {
        for (wrong, part) in [
            (
                body::<Action>(r#"{"action_type": "Explode"}"#).unwrap_err(),
                "one of \"InstanceStart\"",
            ),
            (
                body::<Action>(r#"{"action_type": "FlushMetrics", "x": 1}"#).unwrap_err(),
                "unknown field \"x\"",
            ),
            (
                body::<StateChange>("{}").unwrap_err(),
                "\"state\": this field is required",
            ),
            (body::<StateChange>("[]").unwrap_err(), "expected an object"),
            (
                body::<StateChange>("{").unwrap_err(),
                "body:1:1: this is not JSON",
            ),
            (
                body::<MmdsConfig>(r#"{"network_interfaces": [], "ipv4_address": "here"}"#)
                    .unwrap_err(),
                "IPv4 address",
            ),
            (
                body::<MachineConfigUpdate>(r#"{"smt": true}"#).unwrap_err(),
                "not built yet",
            ),
        ] {
            assert!(wrong.contains(part), "{wrong} / {part}");
        }
    }
}
