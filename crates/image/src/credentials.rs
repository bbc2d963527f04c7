//! Who somebody is to a registry: what `docker login`, `podman login` and `skopeo login` keep.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::error::ImageError;
use crate::reference::DEFAULT_REGISTRY;

/// Docker's name for its own registry in such files.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// A token that is exchanged for others.
    Identity(String),
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// What is kept for a registry, if anything: in the first of `$REGISTRY_AUTH_FILE`, `$XDG_RUNTIME_DIR/containers/auth.json`,
/// `$DOCKER_CONFIG/config.json` and `~/.docker/config.json` that knows it.
pub(crate) fn of(registry: &str) -> Result<Option<Credentials>, ImageError> {
    let path = |variable: &str, rest: &str| {
        let base = std::env::var_os(variable)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)?;
        Some(if rest.is_empty() {
            base
        } else {
            base.join(rest)
        })
    };
    let docker =
        path("DOCKER_CONFIG", "config.json").or_else(|| path("HOME", ".docker/config.json"));
    let files = [
        path("REGISTRY_AUTH_FILE", ""),
        path("XDG_RUNTIME_DIR", "containers/auth.json"),
        docker,
    ];
    for file in files.into_iter().flatten() {
        let Ok(text) = std::fs::read(&file) else {
            continue;
        };
        let config: Config = serde_json::from_slice(&text).map_err(|e| {
            ImageError::Format(format!(
                "the credentials in {} cannot be read: {e}",
                file.display()
            ))
        })?;
        if let Some(found) = config.find(registry)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

impl Config {
    fn find(&self, registry: &str) -> Result<Option<Credentials>, ImageError> {
        let key = if registry == DEFAULT_REGISTRY {
            DOCKER_HUB
        } else {
            registry
        };
        let same = |written: &str| host(written) == host(key) || written == registry;
        if let Some((server, helper)) = self.cred_helpers.iter().find(|(written, _)| same(written))
        {
            return ask(helper, server);
        }
        if let Some((_, auth)) = self.auths.iter().find(|(written, _)| same(written))
            && let Some(found) = auth.read()?
        {
            return Ok(Some(found));
        }
        match &self.creds_store {
            Some(helper) => ask(helper, key),
            None => Ok(None),
        }
    }
}

impl Auth {
    fn read(&self) -> Result<Option<Credentials>, ImageError> {
        if let Some(token) = self.identitytoken.as_ref().filter(|t| !t.is_empty()) {
            return Ok(Some(Credentials::Identity(token.clone())));
        }
        let damaged =
            || ImageError::Format("a registry's credentials are damaged: log in again".into());
        if let Some(auth) = self.auth.as_ref().filter(|a| !a.is_empty()) {
            let text = STANDARD.decode(auth.trim()).map_err(|_| damaged())?;
            let text = String::from_utf8(text).map_err(|_| damaged())?;
            let (user, password) = text
                .trim_end_matches('\0')
                .split_once(':')
                .ok_or_else(damaged)?;
            return Ok(Some(Credentials::Password {
                user: user.into(),
                password: password.into(),
            }));
        }
        match (&self.username, &self.password) {
            (Some(user), Some(password)) => Ok(Some(Credentials::Password {
                user: user.clone(),
                password: password.clone(),
            })),
            _ => Ok(None),
        }
    }
}

/// A registry's host in what is written for it.
fn host(written: &str) -> &str {
    let rest = written.split_once("://").map_or(written, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// Asks a credential helper, a program that docker's configuration names.
fn ask(helper: &str, server: &str) -> Result<Option<Credentials>, ImageError> {
    let program = format!("docker-credential-{helper}");
    let failed = |why: &str| {
        ImageError::Format(format!(
            "{program}, which keeps the credentials for {server}, failed: {why}"
        ))
    };
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(&e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read what it is asked fails below.
        let _ = stdin.write_all(server.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|e| failed(&e.to_string()))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        // The protocol's word for "none".
        if said.contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed(said.trim()));
    }
    let found: Helped =
        serde_json::from_slice(&output.stdout).map_err(|e| failed(&e.to_string()))?;
    if found.username == "<token>" {
        return Ok(Some(Credentials::Identity(found.secret)));
    }
    Ok(Some(Credentials::Password {
        user: found.username,
        password: found.secret,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_found_however_they_are_written() {
        let config: Config = serde_json::from_str(
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"bWU6cHc6MQ=="},"https://a.io/v2/":{"identitytoken":"t"},"b.io:5000":{"auth":"eDp5"},"c.io":{}}}"#,
        )
        .unwrap();
        let password = |user: &str, password: &str| {
            Some(Credentials::Password {
                user: user.into(),
                password: password.into(),
            })
        };
        assert_eq!(config.find("docker.io").unwrap(), password("me", "pw:1"));
        assert_eq!(
            config.find("a.io").unwrap(),
            Some(Credentials::Identity("t".into()))
        );
        assert_eq!(config.find("b.io:5000").unwrap(), password("x", "y"));
        assert_eq!(config.find("b.io").unwrap(), None);
        assert_eq!(config.find("c.io").unwrap(), None);
    }
}
