//! Names of images, as docker has them: `[REGISTRY/]NAME[:TAG][@DIGEST]`.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;
use crate::error::ImageError;

/// Registry of names without one.
pub const DEFAULT_REGISTRY: &str = "docker.io";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// Name of an image, complete: with registry, and with tag or digest.
///
/// The grammar is that of `distribution/reference`: a first part with a dot, a port, capitals or `localhost` is a registry; else the
/// registry is `docker.io`, where names without a folder belong to `library/`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Host of the registry, with the port if one was said.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Name within the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Digest, if the name has one; it then decides, whatever the tag.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What a registry is asked for: the digest, or the tag.
    #[must_use]
    pub fn version(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".into(),
        }
    }

    /// As people write it: without what goes without saying.
    #[must_use]
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let prefix = format!("{DEFAULT_REGISTRY}/");
        match full.strip_prefix(&prefix) {
            Some(rest) => rest.strip_prefix("library/").unwrap_or(rest).to_owned(),
            None => full,
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let wrong = |why| ImageError::Reference {
            name: text.to_owned(),
            why,
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = digest
                    .parse()
                    .map_err(|_| wrong("behind @ stands sha256: and 64 digits from 0 to f"))?;
                (rest, Some(digest))
            }
            None => (text, None),
        };
        // A colon behind the last slash begins a tag; one before it, a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if let Some(tag) = tag {
            let good = tag
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
            if tag.is_empty() || tag.len() > MAX_TAG || !good || tag.starts_with(['.', '-']) {
                return Err(wrong(
                    "a tag is of letters, digits, _, . and -, begins with none of the last two and has at most 128",
                ));
            }
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path.to_owned()),
            _ if name.contains('/') => (DEFAULT_REGISTRY, name.to_owned()),
            _ => (DEFAULT_REGISTRY, format!("library/{name}")),
        };
        // Its old name.
        let registry = if registry == "index.docker.io" {
            DEFAULT_REGISTRY
        } else {
            registry
        };
        let path = match registry {
            DEFAULT_REGISTRY if !path.contains('/') => format!("library/{path}"),
            _ => path,
        };
        if !is_host(registry) {
            return Err(wrong(
                "the registry is no host name, or has a port that is no number",
            ));
        }
        if name.is_empty() || !path.split('/').all(is_part) {
            return Err(wrong(
                "a name is of small letters and digits, with single . or _, __ or - between them",
            ));
        }
        if registry.len() + 1 + path.len() > MAX_NAME {
            return Err(wrong("a name has at most 255 characters"));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest"),
            (tag, _) => tag,
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository: path,
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

fn is_registry(part: &str) -> bool {
    part == "localhost" || part.contains(['.', ':']) || part.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            let good = address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':');
            if !good || address.is_empty() {
                return false;
            }
            ("address", port.strip_prefix(':'))
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    host.split('.').all(label) && port.is_none_or(|p| p.parse::<u16>().is_ok())
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_part(part: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    if !bytes.first().is_some_and(|b| is_word(*b)) || !bytes.last().is_some_and(|b| is_word(*b)) {
        return false;
    }
    part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|between| {
            matches!(between, "" | "." | "_" | "__") || between.bytes().all(|b| b == b'-')
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_docker_does() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (given, full, short) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("me/tool", "docker.io/me/tool:latest", "me/tool:latest"),
            (
                "docker.io/debian",
                "docker.io/library/debian:latest",
                "debian:latest",
            ),
            ("index.docker.io/me/x:1", "docker.io/me/x:1", "me/x:1"),
            (
                "ghcr.io/a/b/c:v1.0",
                "ghcr.io/a/b/c:v1.0",
                "ghcr.io/a/b/c:v1.0",
            ),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
            (
                "localhost:5000/x",
                "localhost:5000/x:latest",
                "localhost:5000/x:latest",
            ),
            ("[::1]:5000/x:y", "[::1]:5000/x:y", "[::1]:5000/x:y"),
            ("Host/x", "Host/x:latest", "Host/x:latest"),
            (
                "a__b-c---d.e_f",
                "docker.io/library/a__b-c---d.e_f:latest",
                "a__b-c---d.e_f:latest",
            ),
        ] {
            let name: Reference = given.parse().unwrap();
            assert_eq!(
                (name.to_string().as_str(), name.familiar().as_str()),
                (full, short),
                "{given}"
            );
        }
        let name: Reference = format!("x@{digest}").parse().unwrap();
        assert_eq!(name.to_string(), format!("docker.io/library/x@{digest}"));
        assert_eq!(name.version(), digest);
        let name: Reference = format!("x:1@{digest}").parse().unwrap();
        assert_eq!(
            (name.version(), name.familiar()),
            (digest.clone(), format!("x:1@{digest}"))
        );
    }

    #[test]
    fn other_things_are_no_names() {
        let long = "a".repeat(250);
        let long_tag = format!("a:{}", "t".repeat(129));
        for bad in [
            "",
            ":",
            "a:",
            "a@",
            "a@sha256:12",
            "A",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a b",
            "a:b c",
            "a:.b",
            "../a",
            "localhost:port/a",
            "localhost:70000/a",
            "ä",
            "-h.io/a",
            &long,
            &long_tag,
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
