//! What each disk and network interface of a VM may carry: said when it is made, or while it runs.

use alveole_instance::{InstanceError, Limits, MonitorApi, Vm};
use alveole_vm_config::{RateLimiter, TokenBucket, VmConfig};
use serde_json::{Value, json};
use std::time::Duration;

use crate::size::Rate;

/// A monitor answers at once, unless its host is very busy.
const PATIENCE: Duration = Duration::from_secs(10);
/// A bucket holds what flows in so long: a pause is made good by a burst of it at most.
const REFILL_MS: u64 = 1000;

#[derive(clap::Args)]
pub(crate) struct LimitArgs {
    /// What each disk may read and write in a second: 20M; 0: no limit
    #[arg(long, value_name = "SIZE")]
    pub(super) disk_bandwidth: Option<Rate>,

    /// Requests to each disk in a second; 0: no limit
    #[arg(long, value_name = "N")]
    pub(super) disk_iops: Option<u64>,

    /// What each network interface may carry in a second, each way: 20M; 0: no limit
    #[arg(long, value_name = "SIZE")]
    pub(super) net_bandwidth: Option<Rate>,
}

impl LimitArgs {
    /// Whether anything is said.
    pub(crate) fn is_empty(&self) -> bool {
        self.disk_bandwidth.is_none() && self.disk_iops.is_none() && self.net_bandwidth.is_none()
    }

    /// Says what is said, and leaves the rest.
    pub(super) fn change(&self, limits: &mut Limits) {
        let some = |said: u64| Some(said).filter(|said| *said > 0);
        if let Some(rate) = self.disk_bandwidth {
            limits.disk_bytes_per_s = some(rate.bytes_per_s());
        }
        if let Some(operations) = self.disk_iops {
            limits.disk_operations_per_s = some(operations);
        }
        if let Some(rate) = self.net_bandwidth {
            limits.network_bytes_per_s = some(rate.bytes_per_s());
        }
    }
}

fn bucket(per_s: Option<u64>) -> Option<TokenBucket> {
    per_s.map(|size| TokenBucket {
        size,
        one_time_burst: None,
        refill_time: REFILL_MS,
    })
}

fn of_disks(limits: &Limits) -> RateLimiter {
    RateLimiter {
        bandwidth: bucket(limits.disk_bytes_per_s),
        ops: bucket(limits.disk_operations_per_s),
    }
}

fn of_interfaces(limits: &Limits) -> RateLimiter {
    RateLimiter {
        bandwidth: bucket(limits.network_bytes_per_s),
        ops: None,
    }
}

/// Puts limits on all disks and interfaces of a machine that is to be started.
pub(super) fn describe(limits: &Limits, machine: &mut VmConfig) {
    let bounded = |limiter: RateLimiter| Some(limiter).filter(|l| *l != RateLimiter::default());
    for drive in &mut machine.drives {
        drive.rate_limiter = bounded(of_disks(limits));
    }
    for interface in &mut machine.network_interfaces {
        interface.rx_rate_limiter = bounded(of_interfaces(limits));
        interface.tx_rate_limiter = bounded(of_interfaces(limits));
    }
}

/// As the API takes it: what is not bounded is said, too.
fn said(limiter: &RateLimiter, operations: bool) -> Value {
    let bucket = |bucket: Option<TokenBucket>| match bucket {
        Some(bucket) => json!({"size": bucket.size, "refill_time": bucket.refill_time}),
        None => json!({"size": 0, "refill_time": 0}),
    };
    let mut said = json!({"bandwidth": bucket(limiter.bandwidth)});
    if operations {
        said["ops"] = bucket(limiter.ops);
    }
    said
}

/// Changes the limits of the machine that runs, from those that it has. Where one of its devices refuses, the others are as before.
pub(super) fn apply(vm: &Vm, before: &Limits, after: &Limits) -> Result<(), InstanceError> {
    let api = MonitorApi::new(vm, PATIENCE);
    let machine: Value = serde_json::from_str(&api.get("/vm/config")?).unwrap_or_default();
    let ids = |devices: &str, id: &str| -> Vec<String> {
        let devices = machine[devices].as_array().into_iter().flatten();
        devices
            .filter_map(|device| device[id].as_str().map(str::to_owned))
            .collect()
    };
    let mut changes: Vec<(String, [Value; 2])> = Vec::new();
    if of_disks(before) != of_disks(after) {
        for id in ids("drives", "drive_id") {
            let body =
                |limits| json!({"drive_id": id, "rate_limiter": said(&of_disks(limits), true)});
            changes.push((format!("/drives/{id}"), [before, after].map(body)));
        }
    }
    if of_interfaces(before) != of_interfaces(after) {
        for id in ids("network-interfaces", "iface_id") {
            let body = |limits| {
                let limiter = said(&of_interfaces(limits), false);
                json!({"iface_id": id, "rx_rate_limiter": limiter, "tx_rate_limiter": limiter})
            };
            changes.push((
                format!("/network-interfaces/{id}"),
                [before, after].map(body),
            ));
        }
    }
    for (at, (path, [_, body])) in changes.iter().enumerate() {
        if let Err(e) = api.patch(path, body) {
            for (path, [before, _]) in &changes[..at] {
                if let Err(e) = api.patch(path, before) {
                    log::warn!("the limits of {path} stay changed: {e}");
                }
            }
            return Err(e);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use alveole_vm_config::{Drive, NetworkInterface};

    use super::*;

    #[test]
    fn limits_are_on_every_device_and_zero_takes_them_away() {
        let mut limits = Limits::default();
        let said = LimitArgs {
            disk_bandwidth: Some("2M".parse().unwrap()),
            disk_iops: Some(7),
            net_bandwidth: None,
        };
        said.change(&mut limits);
        let mut machine = VmConfig {
            drives: vec![Drive::default(), Drive::default()],
            network_interfaces: vec![NetworkInterface::default()],
            ..VmConfig::default()
        };
        describe(&limits, &mut machine);
        for drive in &machine.drives {
            let limiter = drive.rate_limiter.unwrap();
            assert_eq!(limiter.bandwidth.unwrap().size, 2 << 20);
            assert_eq!(limiter.ops.unwrap().size, 7);
        }
        let interface = &machine.network_interfaces[0];
        assert!(interface.rx_rate_limiter.is_none() && interface.tx_rate_limiter.is_none());
        let none = LimitArgs {
            disk_bandwidth: Some("0".parse().unwrap()),
            disk_iops: None,
            net_bandwidth: Some("1M".parse().unwrap()),
        };
        none.change(&mut limits);
        describe(&limits, &mut machine);
        let limiter = machine.drives[0].rate_limiter.unwrap();
        assert_eq!(limiter.bandwidth, None);
        assert_eq!(limiter.ops.unwrap().size, 7);
        let interface = &machine.network_interfaces[0];
        assert_eq!(
            interface.tx_rate_limiter.unwrap().bandwidth.unwrap().size,
            1 << 20
        );
        assert_eq!(
            super::said(&of_disks(&limits), true),
            json!({"bandwidth": {"size": 0, "refill_time": 0}, "ops": {"size": 7, "refill_time": 1000}})
        );
    }
}
