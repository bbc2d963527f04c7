//! Network devices of the host that guests can be tied to.

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Finding, calls, can_write, capable, missing, ok, read, warn};

const TUN_PATH: &str = "/dev/net/tun";
/// What a guest's network device wants of the driver (if_tun.h).
const IFF_TAP: u32 = 0x2;
const IFF_VNET_HDR: u32 = 0x4000;
/// The right to make and configure network devices (capabilities(7)).
const CAP_NET_ADMIN: u32 = 12;

pub(super) fn tun() -> Finding {
    let features = File::options()
        .read(true)
        .write(true)
        .open(TUN_PATH)
        .and_then(|tun| calls::tun_features(&tun));
    let status = read("/proc/self/status").unwrap_or_default();
    judge_tun(features, capable(&status, CAP_NET_ADMIN))
}

fn judge_tun(features: io::Result<u32>, net_admin: bool) -> Finding {
    let features = match features {
        Ok(features) => features,
        Err(e) => {
            return match e.kind() {
                io::ErrorKind::NotFound => missing(
                    format!("there is no {TUN_PATH}"),
                    "sudo modprobe tun (in a container: give it the device)",
                ),
                io::ErrorKind::PermissionDenied => missing(
                    format!("no permission to open {TUN_PATH}"),
                    format!(
                        "sudo chmod 666 {TUN_PATH} (as distributions have it; a tap still needs rights)"
                    ),
                ),
                _ => missing(
                    format!("cannot open {TUN_PATH}: {e}"),
                    "sudo modprobe tun, or run a kernel with CONFIG_TUN",
                ),
            };
        }
    };
    if features & (IFF_TAP | IFF_VNET_HDR) != IFF_TAP | IFF_VNET_HDR {
        return missing(
            format!("this kernel's tun has features {features:#x}, without tap or packet headers"),
            "run a newer kernel",
        );
    }
    if !net_admin {
        return warn(
            "works, for taps that somebody made for this user (no CAP_NET_ADMIN here)",
            "have them made: sudo ip tuntap add dev tap0 mode tap user $USER",
        );
    }
    ok("taps can be made")
}

pub(super) fn vhost_net() -> Finding {
    vhost("/dev/vhost-net", "vhost_net")
}

pub(super) fn vhost_vsock() -> Finding {
    vhost("/dev/vhost-vsock", "vhost_vsock")
}

/// Not opened: that would load the module.
fn vhost(path: &str, module: &str) -> Finding {
    judge_vhost(path, module, Path::new(path).exists(), can_write(path))
}

fn judge_vhost(path: &str, module: &str, exists: bool, accessible: bool) -> Finding {
    if !exists {
        missing(
            format!("there is no {path} (guests do without)"),
            format!("sudo modprobe {module}"),
        )
    } else if !accessible {
        missing(
            format!("no permission on {path} (guests do without)"),
            format!("sudo setfacl -m u:$USER:rw {path}"),
        )
    } else {
        ok(format!("{path} is accessible"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn tun_is_judged_by_what_it_answers() {
        let all = IFF_TAP | IFF_VNET_HDR | 1;
        assert_eq!(judge_tun(Ok(all), true).0, Status::Ok);
        assert_eq!(judge_tun(Ok(all), false).0, Status::Warn);
        assert_eq!(judge_tun(Ok(IFF_TAP), true).0, Status::Missing);
        assert_eq!(judge_tun(Ok(0), true).0, Status::Missing);
        for (errno, word) in [
            (libc::ENOENT, "modprobe"),
            (libc::EACCES, "chmod"),
            (libc::ENODEV, "CONFIG_TUN"),
        ] {
            let (status, _, cure) = judge_tun(Err(io::Error::from_raw_os_error(errno)), true);
            assert_eq!(status, Status::Missing);
            assert!(cure.unwrap().contains(word));
        }
    }

    #[test]
    fn vhost_needs_the_node_and_the_right() {
        let judge = |exists, accessible| judge_vhost("/dev/v", "v", exists, accessible);
        assert_eq!(judge(true, true).0, Status::Ok);
        assert!(judge(false, false).2.unwrap().contains("modprobe v"));
        assert!(judge(true, false).2.unwrap().contains("setfacl"));
    }
}
