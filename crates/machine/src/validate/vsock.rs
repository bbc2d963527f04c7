//! The rules of the socket device. Whether the socket can be made is the host's to say.

use std::os::unix::ffi::OsStrExt;

use alveole_virtio_vsock::{MAX_GUEST_CID, MAX_PATH_BYTES, MIN_GUEST_CID, VsockConfig};
use alveole_vm_config::Vsock;

use crate::validate::Invalid;

pub(super) fn validate(vsock: &Vsock, broken: &mut Vec<Invalid>) -> Option<VsockConfig> {
    let before = broken.len();
    let cid = u32::try_from(vsock.guest_cid)
        .ok()
        .filter(|cid| (MIN_GUEST_CID..=MAX_GUEST_CID).contains(cid));
    if cid.is_none() {
        broken.push(Invalid::GuestCid(vsock.guest_cid));
    }
    let path = &vsock.uds_path;
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        broken.push(Invalid::NoUdsPath);
    } else if bytes.contains(&0) {
        broken.push(Invalid::UdsPathWithZero(path.clone()));
    } else if bytes.len() > MAX_PATH_BYTES {
        broken.push(Invalid::LongUdsPath {
            path: path.clone(),
            len: bytes.len(),
        });
    }
    let is_fine = broken.len() == before;
    Some(VsockConfig {
        guest_cid: cid.filter(|_| is_fine)?,
        uds_path: path.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate as validate_all;
    use alveole_vm_config::VmConfig;

    fn told(guest_cid: u64, uds_path: &str) -> Vec<String> {
        let mut config = VmConfig::default();
        config.boot_source.kernel_image_path = "k".into();
        config.vsock = Some(Vsock {
            guest_cid,
            uds_path: uds_path.into(),
            vsock_id: None,
        });
        match validate_all(&config) {
            Ok(valid) => {
                let vsock = valid.vsock.unwrap();
                assert_eq!(u64::from(vsock.guest_cid), guest_cid);
                assert_eq!(vsock.uds_path.to_str(), Some(uds_path));
                Vec::new()
            }
            Err(broken) => broken.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn every_broken_rule_has_its_message() {
        let long = "x".repeat(MAX_PATH_BYTES);
        for (cid, path) in [(MIN_GUEST_CID, "v.sock"), (MAX_GUEST_CID, "v"), (3, &long)] {
            assert_eq!(told(cid.into(), path), Vec::<String>::new());
        }
        for cid in [
            0,
            1,
            2,
            u64::from(u32::MAX),
            u64::from(u32::MAX) + 4,
            u64::MAX,
        ] {
            let broken = told(cid, "v");
            assert!(
                broken[0].contains(&format!("guest_cid {cid}:")),
                "{broken:?}"
            );
        }
        let broken = told(2, "");
        assert_eq!(broken.len(), 2);
        assert!(broken[1].contains("empty uds_path"), "{broken:?}");
        assert!(told(3, "a\0b")[0].contains("zero byte"));
        let broken = told(3, &(long + "x"));
        assert!(broken[0].contains("97 bytes: it may have 96"), "{broken:?}");
        assert!(broken[0].contains("shorter directory"), "{broken:?}");
    }
}
