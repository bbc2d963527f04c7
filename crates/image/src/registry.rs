//! A registry, by the distribution specification: manifests and blobs, and who may have them.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::{Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::credentials::{self, Credentials};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::limits::MAX_JSON;
use crate::oci::{DOCKER_LIST, DOCKER_MANIFEST, Descriptor, INDEX, MANIFEST};
use crate::reference::{DEFAULT_REGISTRY, Reference};

const CONNECT: Duration = Duration::from_secs(30);
/// Longest silence of a registry.
const SILENCE: Duration = Duration::from_secs(60);
/// Most of an error's text that is shown.
const MAX_WORDS: u64 = 4096;

pub(crate) struct Registry {
    agent: Agent,
    /// As people write it.
    name: String,
    repository: String,
    /// `https://HOST/v2/REPOSITORY/`
    base: String,
    is_plain: bool,
    credentials: Option<Credentials>,
    /// What requests carry once the registry has asked for it.
    authorization: Mutex<Option<String>>,
}

#[derive(Deserialize)]
struct Token {
    #[serde(alias = "access_token")]
    token: Option<String>,
}

impl Registry {
    /// Speaks to the registry of an image: by TLS, but plainly to one of this host that does not know TLS, as docker does.
    pub(crate) fn of(name: &Reference) -> Result<Self, ImageError> {
        let credentials = credentials::of(name.registry())?;
        Self::connect(
            name.registry(),
            name.repository(),
            &name.familiar(),
            credentials,
        )
    }

    fn connect(
        registry: &str,
        repository: &str,
        what: &str,
        credentials: Option<Credentials>,
    ) -> Result<Self, ImageError> {
        let host = match registry {
            DEFAULT_REGISTRY => "registry-1.docker.io",
            host => host,
        };
        let mut plain = None;
        if is_loopback(host) {
            let agent = agent(false)?;
            // One that speaks TLS answers 400 to this.
            let answer = agent.get(format!("http://{host}/v2/")).call();
            let answer = answer.map_err(|e| no_answer(registry, what, &e))?;
            plain = (answer.status() != StatusCode::BAD_REQUEST).then_some(agent);
        }
        let is_plain = plain.is_some();
        let scheme = if is_plain { "http" } else { "https" };
        Ok(Self {
            agent: match plain {
                Some(plain) => plain,
                None => agent(true)?,
            },
            name: registry.into(),
            repository: repository.into(),
            base: match repository {
                "" => format!("{scheme}://{host}/v2/"),
                repository => format!("{scheme}://{host}/v2/{repository}/"),
            },
            is_plain,
            credentials,
            authorization: Mutex::new(None),
        })
    }

    /// The manifest or index that a version (a tag or digest) stands for.
    pub(crate) fn manifest(&self, version: &str) -> Result<(Descriptor, Vec<u8>), ImageError> {
        let what = format!("{} {version}", self.repository);
        let accept = [INDEX, MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
        let mut answer = self.get(
            &what,
            &format!("manifests/{version}"),
            &[("accept", &accept)],
        )?;
        let media_type = answer
            .headers()
            .get("content-type")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let media_type = media_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        let mut bytes = Vec::new();
        let read = answer
            .body_mut()
            .as_reader()
            .take(MAX_JSON + 1)
            .read_to_end(&mut bytes);
        read.map_err(|e| self.refused(&what, &format!("its answer broke off: {e}")))?;
        if bytes.len() as u64 > MAX_JSON {
            return Err(self.refused(&what, "its manifest is larger than any should be"));
        }
        let digest = Digest::of(&bytes);
        if let Ok(expected) = version.parse::<Digest>()
            && expected != digest
        {
            return Err(ImageError::Digest {
                what: format!("the manifest {what} of {}", self.name),
                expected: expected.to_string(),
                found: digest.to_string(),
            });
        }
        let descriptor = Descriptor::new(&media_type, digest, bytes.len() as u64);
        if !descriptor.is_index() && !descriptor.is_manifest() {
            return Err(self.refused(&what, &format!("what it gives is of the type {media_type:?}, which is no image (of the first, withdrawn kind neither)")));
        }
        Ok((descriptor, bytes))
    }

    /// A blob from an offset on; whether the registry gives it from there, or from its start.
    pub(crate) fn blob(
        &self,
        digest: &Digest,
        from: u64,
    ) -> Result<(bool, impl Read + use<>), ImageError> {
        let what = format!("{} {digest}", self.repository);
        let path = format!("blobs/{digest}");
        let range = format!("bytes={from}-");
        let headers: &[(&str, &str)] = if from > 0 { &[("range", &range)] } else { &[] };
        let answer = self.get(&what, &path, headers)?;
        let resumed = answer.status() == StatusCode::PARTIAL_CONTENT;
        Ok((
            resumed,
            answer
                .into_body()
                .into_with_config()
                .limit(u64::MAX)
                .reader(),
        ))
    }

    fn get(
        &self,
        what: &str,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Result<Response<Body>, ImageError> {
        let url = format!("{}{path}", self.base);
        let mut asked = false;
        loop {
            let mut request = self.agent.get(&url);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let authorization = self
                .authorization
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(value) = &authorization {
                request = request.header("authorization", value);
            }
            let answer = request.call().map_err(|e| self.failed(what, &e))?;
            match answer.status() {
                StatusCode::UNAUTHORIZED if !asked => {
                    asked = true;
                    let value = self.authorize(what, &answer)?;
                    *self
                        .authorization
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner) = Some(value);
                }
                StatusCode::RANGE_NOT_SATISFIABLE if !headers.is_empty() => {
                    return self.get(what, path, &[]);
                }
                status if status.is_success() => return Ok(answer),
                status => return Err(self.words(what, status, answer)),
            }
        }
    }

    /// Does what the registry wants before it gives something.
    fn authorize(&self, what: &str, answer: &Response<Body>) -> Result<String, ImageError> {
        let wanted: Vec<&str> = answer
            .headers()
            .get_all("www-authenticate")
            .iter()
            .filter_map(|v| v.to_str().ok())
            .collect();
        let is = |scheme: &'static str| {
            let rest = move |text: &&str| {
                text.get(..scheme.len())
                    .is_some_and(|s| s.eq_ignore_ascii_case(scheme))
            };
            wanted
                .iter()
                .copied()
                .find(rest)
                .map(|text| &text[scheme.len()..])
        };
        if let Some(parameters) = is("bearer ") {
            return self.bearer(what, parameters);
        }
        match &self.credentials {
            Some(Credentials::Password { user, password }) if is("basic").is_some() => Ok(basic(user, password)),
            _ => Err(self.refused(what, &format!("it wants to know who you are: `alveole image login {0}` tells it, as do `docker login {0}` and `podman login {0}`", self.name))),
        }
    }

    fn bearer(&self, what: &str, parameters: &str) -> Result<String, ImageError> {
        let parameters = parse_parameters(parameters);
        let get = |key: &str| {
            parameters
                .iter()
                .find(|(k, _)| k == key)
                .map(|(_, v)| v.as_str())
        };
        let realm = get("realm")
            .ok_or_else(|| self.refused(what, "it wants a token and does not say from where"))?;
        // Whoever can read along could use what is sent there.
        let is_safe =
            realm.starts_with("https://") || self.is_plain && realm.starts_with("http://");
        if !is_safe {
            return Err(self.refused(
                what,
                &format!("it wants a token from {realm}, which is no https address"),
            ));
        }
        // Whoever only says who they are wants nothing.
        let usual = match self.repository.as_str() {
            "" => String::new(),
            repository => format!("repository:{repository}:pull"),
        };
        let scope = get("scope").map_or(usual, str::to_owned);
        let service = get("service").unwrap_or_default();
        let failed = |e: &ureq::Error| self.failed(&format!("a token for {what}"), e);
        let answer = match &self.credentials {
            Some(Credentials::Identity(token)) => self
                .agent
                .post(realm)
                .send_form([
                    ("grant_type", "refresh_token"),
                    ("service", service),
                    ("scope", &scope),
                    ("client_id", "alveole"),
                    ("refresh_token", token),
                ])
                .map_err(|e| failed(&e))?,
            other => {
                let mut request = self.agent.get(realm).query("service", service);
                if !scope.is_empty() {
                    request = request.query("scope", &scope);
                }
                if let Some(Credentials::Password { user, password }) = other {
                    request = request.header("authorization", basic(user, password));
                }
                request.call().map_err(|e| failed(&e))?
            }
        };
        if !answer.status().is_success() {
            return Err(self.words(&format!("a token for {what}"), answer.status(), answer));
        }
        let mut bytes = Vec::new();
        let read = answer
            .into_body()
            .into_reader()
            .take(MAX_JSON)
            .read_to_end(&mut bytes);
        read.map_err(|e| self.refused(what, &format!("its token broke off: {e}")))?;
        let token = serde_json::from_slice::<Token>(&bytes)
            .ok()
            .and_then(|t| t.token);
        let token = token.ok_or_else(|| self.refused(what, "the token that it gave is none"))?;
        Ok(format!("Bearer {token}"))
    }

    /// What an answer that is none says, with a cure.
    fn words(&self, what: &str, status: StatusCode, answer: Response<Body>) -> ImageError {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<One>,
        }
        #[derive(Deserialize)]
        struct One {
            #[serde(default)]
            message: String,
        }
        let mut text = Vec::new();
        // Only words.
        let _ = answer
            .into_body()
            .into_reader()
            .take(MAX_WORDS)
            .read_to_end(&mut text);
        let said = serde_json::from_slice::<Errors>(&text)
            .ok()
            .and_then(|e| e.errors.into_iter().next())
            .map(|e| e.message);
        let said = said
            .filter(|s| !s.is_empty())
            .map(|s| format!(" ({s:?})"))
            .unwrap_or_default();
        let cure = match status {
            StatusCode::NOT_FOUND => {
                "there is no such image; look at the name and the tag".to_owned()
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.credentials.is_some() => {
                "it is not there, or whom you are logged in as may not have it".to_owned()
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                format!(
                    "it is not there, or not for everybody; `alveole image login {0}` or `docker login {0}` may help",
                    self.name
                )
            }
            StatusCode::TOO_MANY_REQUESTS => {
                "it was asked too often; try again later, or log in".to_owned()
            }
            _ => "try again later".to_owned(),
        };
        self.refused(what, &format!("status {}{said}: {cure}", status.as_u16()))
    }

    fn failed(&self, what: &str, error: &ureq::Error) -> ImageError {
        no_answer(&self.name, what, error)
    }

    /// As people write it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn refused(&self, what: &str, why: &str) -> ImageError {
        ImageError::Registry {
            registry: self.name.clone(),
            what: what.into(),
            why: why.into(),
        }
    }
}

/// Logs in: checks a password with the registry, and keeps it where `credentials::of` finds it. Gives where that is, and whether the registry
/// asked at all.
///
/// # Errors
/// The registry does not take them, or is not there; they cannot be kept.
pub fn log_in(registry: &str, user: &str, password: &str) -> Result<(String, bool), ImageError> {
    check_name(registry)?;
    if user.is_empty() || user.contains(':') || password.is_empty() {
        return Err(ImageError::Format(
            "a user's name is not empty and has no colon, and a password is not empty".into(),
        ));
    }
    let given = Credentials::Password {
        user: user.into(),
        password: password.into(),
    };
    let with = Registry::connect(registry, "", "a login", Some(given))?;
    let refused = |e: ImageError| match e {
        ImageError::Registry { why, .. }
            if why.starts_with("status 401") || why.starts_with("status 403") =>
        {
            ImageError::Format(format!(
                "cannot log in to {registry} as {user:?}: it does not take that name and password; look at both (some registries want a token instead of the password)"
            ))
        }
        other => other,
    };
    with.get("a login", "", &[]).map_err(refused)?;
    let asked = with
        .authorization
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_some();
    Ok((credentials::keep(registry, user, password)?, asked))
}

/// Logs out: forgets what is kept for a registry. Says whether there was something.
///
/// # Errors
/// A file or helper cannot be used.
pub fn log_out(registry: &str) -> Result<bool, ImageError> {
    check_name(registry)?;
    credentials::forget(registry)
}

/// That it is a registry's host, by the grammar of images' names.
fn check_name(registry: &str) -> Result<(), ImageError> {
    let name = format!("{registry}/x").parse::<Reference>();
    if name.is_ok_and(|name| name.registry() == registry && !registry.contains('/')) {
        return Ok(());
    }
    Err(ImageError::Format(format!(
        "{registry:?} is no registry: write its host as images' names have it, HOST[:PORT], without https://; docker.io is Docker's"
    )))
}

fn no_answer(registry: &str, what: &str, error: &ureq::Error) -> ImageError {
    let said = error.to_string();
    let cure = match error {
        ureq::Error::HostNotFound => "; look at the name, and at this host's network",
        // Rustls' errors come as those of the connection.
        _ if said.contains("certificate") => {
            "; if you trust who signed it, name a file with their certificate by SSL_CERT_FILE"
        }
        _ => "",
    };
    ImageError::Registry {
        registry: registry.into(),
        what: what.into(),
        why: format!("no answer: {said}{cure}"),
    }
}

fn agent(tls: bool) -> Result<Agent, ImageError> {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("alveole/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(CONNECT))
        .timeout_recv_response(Some(SILENCE))
        .timeout_per_read(Some(SILENCE));
    // What this host trusts, as for other programs. The plain agent may be redirected to TLS.
    let found = rustls_native_certs::load_native_certs();
    let certificates: Vec<Certificate<'static>> = found
        .certs
        .iter()
        .map(|c| Certificate::from_der(c).to_owned())
        .collect();
    if tls && certificates.is_empty() {
        let why = found
            .errors
            .first()
            .map_or(String::new(), |e| format!(" ({e})"));
        return Err(ImageError::Format(format!(
            "no authorities are known that could vouch for a registry{why}: install the package ca-certificates, or name a file by SSL_CERT_FILE"
        )));
    }
    let roots = RootCerts::Specific(Arc::new(certificates));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls_config = TlsConfig::builder()
        .root_certs(roots)
        .unversioned_rustls_crypto_provider(provider)
        .build();
    config = config.tls_config(tls_config).https_only(tls);
    Ok(config.build().into())
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|a| a.is_loopback())
}

/// `key="value",key=value` of a challenge.
fn parse_parameters(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = text.trim_start_matches([' ', ',']);
    while let Some((key, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.push((key.trim().to_ascii_lowercase(), value.to_owned()));
        rest = after.trim_start_matches([' ', ',']);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let found = parse_parameters(
            r#"realm="https://auth.io/token",service=reg, Scope="repository:a/b:pull,push""#,
        );
        let pairs: Vec<(&str, &str)> = found
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            pairs,
            [
                ("realm", "https://auth.io/token"),
                ("service", "reg"),
                ("scope", "repository:a/b:pull,push")
            ]
        );
        assert!(parse_parameters("").is_empty());
        assert_eq!(parse_parameters(r#"realm="open"#)[0].1, "open");
    }

    #[test]
    fn only_this_host_is_spoken_to_plainly() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.8.9.1",
            "[::1]:80",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example.org",
            "10.0.0.1",
            "registry-1.docker.io",
            "127.0.0.1.nip.io",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
