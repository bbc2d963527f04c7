//! The documents of the OCI image specification, as far as they are used; docker's are the same but for media types.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

use crate::digest::Digest;
use crate::error::ImageError;

pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Names an image in the index of a layout.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The same, with registry and repository, as containerd writes it.
pub(crate) const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Points to content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size.
    pub size: u64,
    /// For which machine it is, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Notes, such as a name.
    #[serde(
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }

    pub(crate) fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), INDEX | DOCKER_LIST)
    }

    pub(crate) fn is_manifest(&self) -> bool {
        matches!(self.media_type.as_str(), MANIFEST | DOCKER_MANIFEST)
    }

    /// Refuses a layer that is none that can be unpacked.
    pub(crate) fn check_layer(&self) -> Result<(), ImageError> {
        let kind = self.media_type.as_str();
        let known = [LAYER, DOCKER_LAYER].iter().any(|known| {
            kind.strip_prefix(known)
                .is_some_and(|rest| matches!(rest, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
        });
        if known || kind.is_empty() {
            return Ok(());
        }
        Err(ImageError::Format(format!(
            "layer {} is of the type {kind:?}, which cannot be unpacked: tar is taken, plain or with gzip or zstd \
             (encrypted and foreign layers are not)",
            self.digest
        )))
    }
}

/// A machine and its system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// As Go has it: `amd64`, `arm64`, ...
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Of the architecture: `v8`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// That of this machine.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            architecture: architecture.into(),
            os: "linux".into(),
            variant: None,
        }
    }

    pub(crate) fn serves(&self, wanted: &Self) -> bool {
        self.architecture == wanted.architecture
            && self.os == wanted.os
            && wanted
                .variant
                .as_ref()
                .is_none_or(|wanted| self.variant.as_ref() == Some(wanted))
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let mut parts = text.split('/');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if !os.is_empty() && !architecture.is_empty() =>
            {
                Ok(Self {
                    architecture: architecture.into(),
                    os: os.into(),
                    variant: variant.map(Into::into),
                })
            }
            _ => Err(ImageError::Format(format!(
                "{text:?} is no platform: it is OS/ARCHITECTURE, such as linux/amd64"
            ))),
        }
    }
}

/// Several images, mostly one for each platform.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    #[serde(default)]
    pub(crate) manifests: Vec<Descriptor>,
}

impl Index {
    /// The image for a platform.
    pub(crate) fn choose(&self, name: &str, wanted: &Platform) -> Result<&Descriptor, ImageError> {
        let usable = || {
            self.manifests
                .iter()
                .filter(|m| m.is_manifest() || m.is_index())
        };
        let fitting = |d: &&Descriptor| d.platform.as_ref().is_some_and(|p| p.serves(wanted));
        if let Some(found) = usable().find(fitting) {
            return Ok(found);
        }
        // One alone may do without.
        let mut without = usable().filter(|d| d.platform.is_none());
        if let (Some(only), None, 1) = (without.next(), without.next(), self.manifests.len()) {
            return Ok(only);
        }
        let available: Vec<String> = usable()
            .filter_map(|d| d.platform.as_ref())
            // Attestations.
            .filter(|p| p.os != "unknown")
            .map(ToString::to_string)
            .collect();
        Err(ImageError::Platform {
            name: name.into(),
            wanted: wanted.to_string(),
            available: if available.is_empty() {
                "no platform".into()
            } else {
                available.join(", ")
            },
        })
    }
}

/// Configuration and layers of one image.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    pub(crate) schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) media_type: Option<String>,
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// The configuration of an image.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Configuration {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) created: Option<String>,
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) config: RunConfig,
    pub(crate) rootfs: RootFs,
}

impl Configuration {
    /// That of these layers for a platform, which says nothing else.
    pub(crate) fn of(platform: &Platform, diff_ids: Vec<Digest>) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            variant: platform.variant.clone(),
            rootfs: RootFs {
                kind: "layers".into(),
                diff_ids,
            },
            ..Self::default()
        }
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RootFs {
    #[serde(rename = "type", default)]
    pub(crate) kind: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) diff_ids: Vec<Digest>,
}

/// How a container of an image is run, if nobody says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// `USER[:GROUP]`, by name or number; empty is root.
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub user: String,
    /// `PORT[/PROTOCOL]` that the program serves.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub exposed_ports: Vec<String>,
    /// `NAME=VALUE`.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
    /// The program, with its first arguments.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Arguments behind the entrypoint, or the program if there is none; what a user says replaces them.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Directories whose content outlives a container.
    #[serde(
        deserialize_with = "keys",
        serialize_with = "as_keys",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub volumes: Vec<String>,
    /// Where the program starts; empty is `/`.
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub working_dir: String,
    /// Notes.
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub labels: BTreeMap<String, String>,
    /// Signal that asks the program to end, as name or number; empty is SIGTERM.
    #[serde(
        deserialize_with = "or_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub stop_signal: String,
}

/// Go writes `null` for what is empty.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Sets are objects with empty values.
fn keys<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let set: Option<BTreeMap<String, serde_json::Value>> = Option::deserialize(from)?;
    Ok(set.unwrap_or_default().into_keys().collect())
}

fn as_keys<S: serde::Serializer>(keys: &[String], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(keys.iter().map(|key| (key, serde_json::json!({}))))
}

/// Reads a document.
pub(crate) fn parse<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ImageError::Format(format!("{what} cannot be read: {e}")))
}

/// Writes a document; the same value gives the same bytes.
pub(crate) fn write<T: Serialize>(value: &T) -> Result<Vec<u8>, ImageError> {
    serde_json::to_vec(value)
        .map_err(|e| ImageError::Format(format!("a document cannot be written: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_as_docker_writes_them() {
        let text = r#"{"architecture":"amd64","os":"linux","config":{"Env":["PATH=/bin"],"Cmd":null,"Entrypoint":["/e"],
            "Volumes":{"/data":{}},"ExposedPorts":{"80/tcp":{}},"Labels":null,"User":"www:www","OnBuild":null,"Healthcheck":{}},
            "rootfs":{"type":"layers","diff_ids":null},"history":[]}"#;
        let found: Configuration = parse("it", text.as_bytes()).unwrap();
        assert_eq!(found.config.volumes, ["/data"]);
        assert_eq!(found.config.exposed_ports, ["80/tcp"]);
        assert_eq!(
            (found.config.cmd.len(), found.config.entrypoint[0].as_str()),
            (0, "/e")
        );
        let again: Configuration = parse("it", &write(&found).unwrap()).unwrap();
        assert_eq!(again.config, found.config);
    }

    #[test]
    fn layers_of_other_types_are_refused() {
        let layer = |kind: &str| Descriptor::new(kind, Digest::of(b""), 0).check_layer();
        for good in [
            LAYER,
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ] {
            layer(good).unwrap();
        }
        for bad in [
            "application/vnd.oci.image.layer.v1.tar+encrypted",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "text/html",
        ] {
            assert!(layer(bad).unwrap_err().to_string().contains(bad), "{bad}");
        }
    }

    #[test]
    fn the_platform_is_chosen_and_others_are_named() {
        let entry = |architecture: &str| Descriptor {
            platform: Some(Platform {
                architecture: architecture.into(),
                os: "linux".into(),
                variant: None,
            }),
            ..Descriptor::new(MANIFEST, Digest::of(architecture.as_bytes()), 1)
        };
        let index = Index {
            schema_version: 2,
            media_type: None,
            manifests: vec![entry("s390x"), entry("amd64")],
        };
        let wanted: Platform = "linux/amd64".parse().unwrap();
        assert_eq!(
            index.choose("x", &wanted).unwrap().digest,
            Digest::of(b"amd64")
        );
        let error = index
            .choose("x", &"linux/riscv64".parse().unwrap())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("nothing for linux/riscv64")
                && error.contains("linux/s390x, linux/amd64"),
            "{error}"
        );
    }
}
