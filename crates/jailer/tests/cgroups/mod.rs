//! Where this host has its cgroups. Shared by the tests of the program alone and of the monitor in a jail.

use std::fs;
use std::path::PathBuf;

/// Where this controller is: version, folder.
pub(crate) fn controller(name: &str) -> Option<(u32, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let lines = || mounts.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    let v1 = lines().find(|l| l[2] == "cgroup" && l[3].split(',').any(|o| o == name));
    if let Some(line) = v1 {
        return Some((1, line[1].into()));
    }
    let v2 = lines().find(|l| l[2] == "cgroup2")?;
    let has = fs::read_to_string(format!("{}/cgroup.controllers", v2[1])).unwrap();
    has.split_whitespace()
        .any(|c| c == name)
        .then(|| (2, v2[1].into()))
}
