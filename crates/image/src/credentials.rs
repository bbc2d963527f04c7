//! Who somebody is to a registry: what `docker login`, `podman login` and `skopeo login` keep.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use crate::error::{Doing, ImageError};
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

/// Where credentials are kept, the first first: `$REGISTRY_AUTH_FILE`, `$XDG_RUNTIME_DIR/containers/auth.json`,
/// `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`.
fn files() -> Vec<PathBuf> {
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
    files.into_iter().flatten().collect()
}

fn unreadable(file: &Path, error: &serde_json::Error) -> ImageError {
    ImageError::Format(format!(
        "the credentials in {} cannot be read: {error}",
        file.display()
    ))
}

/// What is kept for a registry, if anything: in the first file that knows it.
pub(crate) fn of(registry: &str) -> Result<Option<Credentials>, ImageError> {
    for file in files() {
        let Ok(text) = std::fs::read(&file) else {
            continue;
        };
        let config: Config = serde_json::from_slice(&text).map_err(|e| unreadable(&file, &e))?;
        if let Some(found) = config.find(registry)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The name that a registry has in such files.
fn key(registry: &str) -> &str {
    match registry {
        DEFAULT_REGISTRY => DOCKER_HUB,
        other => other,
    }
}

fn is_same(written: &str, registry: &str) -> bool {
    host(written) == host(key(registry)) || written == registry
}

/// A file of credentials, with all that others keep in it.
struct Kept {
    path: PathBuf,
    all: serde_json::Map<String, serde_json::Value>,
    config: Config,
}

impl Kept {
    /// None: there is no such file.
    fn read(path: &Path) -> Result<Option<Self>, ImageError> {
        let text = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.doing(|| format!("read {}", path.display()))?,
        };
        let all = serde_json::from_slice(&text).map_err(|e| unreadable(path, &e))?;
        let config = serde_json::from_slice(&text).map_err(|e| unreadable(path, &e))?;
        Ok(Some(Self {
            // A link stays one.
            path: path.canonicalize().unwrap_or_else(|_| path.into()),
            all,
            config,
        }))
    }

    /// The helper that keeps a registry's credentials, and how it knows the registry.
    fn helper(&self, registry: &str) -> Option<(&str, String)> {
        let own = self
            .config
            .cred_helpers
            .iter()
            .find(|(written, _)| is_same(written, registry));
        let own = own.map(|(server, helper)| (helper.as_str(), server.clone()));
        own.or_else(|| {
            Some((
                self.config.creds_store.as_deref()?,
                key(registry).to_owned(),
            ))
        })
    }

    fn has(&self, registry: &str) -> bool {
        let helped = self
            .config
            .cred_helpers
            .keys()
            .any(|written| is_same(written, registry));
        helped
            || self
                .config
                .auths
                .keys()
                .any(|written| is_same(written, registry))
    }

    /// Sets or removes what the file itself has of a registry; says whether there was something.
    fn set(&mut self, registry: &str, auth: Option<serde_json::Value>) -> bool {
        let auths = self
            .all
            .entry("auths")
            .or_insert_with(|| serde_json::json!({}));
        let Some(auths) = auths.as_object_mut() else {
            return false;
        };
        let before = auths.len();
        auths.retain(|written, _| !is_same(written, registry));
        let had = auths.len() < before;
        if let Some(auth) = auth {
            auths.insert(key(registry).into(), auth);
        }
        had
    }

    /// As a whole or not at all, for its owner alone.
    fn write(&self) -> Result<(), ImageError> {
        let doing = || format!("write the credentials in {}", self.path.display());
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .doing(doing)?;
        // It has the mode 0600 from its first moment.
        let mut file = tempfile::NamedTempFile::new_in(folder).doing(doing)?;
        serde_json::to_writer_pretty(&mut file, &self.all).doing(doing)?;
        file.as_file().sync_all().doing(doing)?;
        file.persist(&self.path).map_err(|e| e.error).doing(doing)?;
        Ok(())
    }
}

/// Keeps a user's password for a registry, where [`of`] finds it: in the file that knows the registry already, else in docker's, which
/// outlives the session. Gives where.
pub(crate) fn keep(registry: &str, user: &str, password: &str) -> Result<String, ImageError> {
    let mut known = None;
    let files = files();
    for path in &files {
        known = known.or(Kept::read(path)?.filter(|kept| kept.has(registry)));
    }
    let usual = match std::env::var_os("REGISTRY_AUTH_FILE").filter(|v| !v.is_empty()) {
        Some(_) => files.first(),
        None => files.last(),
    };
    let usual = usual.ok_or_else(|| {
        ImageError::Format(
            "nobody knows where credentials are kept: set HOME, or REGISTRY_AUTH_FILE".into(),
        )
    })?;
    let mut kept = match known {
        Some(known) => known,
        None => Kept::read(usual)?.unwrap_or_else(|| Kept {
            path: usual.clone(),
            all: serde_json::Map::new(),
            config: Config::default(),
        }),
    };
    if let Some((helper, server)) = kept.helper(registry) {
        let said = serde_json::json!({"ServerURL": server, "Username": user, "Secret": password});
        call(helper, "store", &server, said.to_string().as_bytes())?;
        return Ok(format!("docker-credential-{helper}"));
    }
    let auth = STANDARD.encode(format!("{user}:{password}"));
    kept.set(registry, Some(serde_json::json!({ "auth": auth })));
    kept.write()?;
    Ok(kept.path.display().to_string())
}

/// Forgets what is kept for a registry, in all files and helpers. Says whether there was something.
pub(crate) fn forget(registry: &str) -> Result<bool, ImageError> {
    let mut had = false;
    for path in files() {
        let Some(mut kept) = Kept::read(&path)? else {
            continue;
        };
        if let Some((helper, server)) = kept.helper(registry)
            && ask(helper, &server)?.is_some()
        {
            call(helper, "erase", &server, server.as_bytes())?;
            had = true;
        }
        if kept.set(registry, None) {
            kept.write()?;
            had = true;
        }
    }
    Ok(had)
}

impl Config {
    fn find(&self, registry: &str) -> Result<Option<Credentials>, ImageError> {
        let key = key(registry);
        let same = |written: &str| is_same(written, registry);
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
    let Some(answer) = call(helper, "get", server, server.as_bytes())? else {
        return Ok(None);
    };
    let found: Helped = serde_json::from_slice(&answer).map_err(|e| {
        ImageError::Format(format!(
            "docker-credential-{helper}, which keeps the credentials for {server}, failed: {e}"
        ))
    })?;
    if found.username == "<token>" {
        return Ok(Some(Credentials::Identity(found.secret)));
    }
    Ok(Some(Credentials::Password {
        user: found.username,
        password: found.secret,
    }))
}

/// Has a helper do something. None: it knows nothing of the registry.
fn call(
    helper: &str,
    what: &str,
    server: &str,
    said: &[u8],
) -> Result<Option<Vec<u8>>, ImageError> {
    let program = format!("docker-credential-{helper}");
    let failed = |why: &str| {
        ImageError::Format(format!(
            "{program}, which keeps the credentials for {server}, failed: {why}"
        ))
    };
    let mut child = Command::new(&program)
        .arg(what)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(&e.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read what it is asked fails below.
        let _ = stdin.write_all(said);
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
    Ok(Some(output.stdout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_what_others_have_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, r#"{"auths":{"a.io":{"auth":"x"},"https://b.io/v2/":{"auth":"y"}},"detachKeys":"ctrl-e"}"#).unwrap();
        let mut kept = Kept::read(&path).unwrap().unwrap();
        assert!(kept.has("b.io") && !kept.has("c.io") && kept.helper("a.io").is_none());
        // However it was written, there is one of it.
        assert!(kept.set("b.io", Some(serde_json::json!({"auth": "z"}))));
        assert!(!kept.set("docker.io", Some(serde_json::json!({"auth": "d"}))));
        kept.write().unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
        assert_eq!(mode & 0o7777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = serde_json::json!({
            "auths": {"a.io": {"auth": "x"}, "b.io": {"auth": "z"}, DOCKER_HUB: {"auth": "d"}}, "detachKeys": "ctrl-e",
        });
        assert_eq!(found, expected);
    }

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
