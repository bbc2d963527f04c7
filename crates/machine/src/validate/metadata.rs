//! Rules for the metadata service.

use std::net::Ipv4Addr;

use alveole_mmds::{DEFAULT_ADDRESS, MetadataConfig, Version};
use alveole_vm_config::{MmdsConfig, MmdsVersion};

use crate::validate::{Invalid, ValidInterface, shown};

/// The metadata service of a machine, and through which interfaces it is reached.
#[derive(Debug, Clone)]
pub(crate) struct ValidMetadata {
    pub(crate) config: MetadataConfig,
    pub(crate) interfaces: Vec<String>,
}

pub(super) fn validate(
    config: &MmdsConfig,
    interfaces: &[ValidInterface],
    broken: &mut Vec<Invalid>,
) -> ValidMetadata {
    let address = config.ipv4_address.unwrap_or(DEFAULT_ADDRESS);
    if !is_usable(address) {
        broken.push(Invalid::MetadataAddress(address));
    }
    if config.network_interfaces.is_empty() {
        broken.push(Invalid::NoMetadataInterface);
    }
    for id in &config.network_interfaces {
        match interfaces.iter().find(|interface| interface.id == *id) {
            None => broken.push(Invalid::MetadataInterface {
                id: shown(id),
                known: interfaces.iter().map(|i| shown(&i.id)).collect(),
            }),
            Some(interface) if interface.vhost => broken.push(Invalid::Vhost {
                id: id.clone(),
                field: "the metadata service",
                why: "it sees none of the guest's frames",
            }),
            Some(_) => {}
        }
    }
    ValidMetadata {
        config: MetadataConfig {
            version: match config.version {
                MmdsVersion::V1 => Version::V1,
                MmdsVersion::V2 => Version::V2,
            },
            address,
            imds_compat: config.imds_compat,
        },
        interfaces: config.network_interfaces.clone(),
    }
}

/// RFC 3927, section 2.1: the first and the last 256 addresses are reserved.
fn is_usable(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    (a, b) == (169, 254) && (1..=254).contains(&c)
}
