//! The service: what is answered to a request.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::data::{Data, NoValue};
use crate::http::{Answer, Method, Request};
use crate::token::{TTL_SECONDS, Tokens};
use crate::{DEFAULT_ADDRESS, DataError, Form, MetadataCounters};

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN_HEADERS: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TTL_HEADERS: [&str; 2] = [
    "x-metadata-token-ttl-seconds",
    "x-aws-ec2-metadata-token-ttl-seconds",
];

/// How a guest reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// Whoever asks is answered.
    #[default]
    V1,
    /// Who has asked for a token is answered.
    V2,
}

/// What is set before the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataConfig {
    /// How a guest reads.
    pub version: Version,
    /// Where it finds the service.
    pub address: Ipv4Addr,
    /// Answers in the form of EC2's service whatever a guest accepts.
    pub imds_compat: bool,
}

impl Default for MetadataConfig {
    fn default() -> Self {
        Self {
            version: Version::V1,
            address: DEFAULT_ADDRESS,
            imds_compat: false,
        }
    }
}

/// The data, and who may read them: shared by their owner and the interfaces through which they are read.
#[derive(Debug)]
pub struct Metadata {
    inner: Mutex<Inner>,
    counters: Arc<MetadataCounters>,
}

#[derive(Debug)]
struct Inner {
    config: MetadataConfig,
    data: Data,
    tokens: Tokens,
}

impl Metadata {
    /// A service without data, which will hold at most so many bytes of JSON.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            inner: Mutex::new(Inner {
                config: MetadataConfig::default(),
                data: Data::new(limit_bytes),
                tokens: Tokens::default(),
            }),
            counters: Arc::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> &Arc<MetadataCounters> {
        &self.counters
    }

    /// Sets what is set before the guest runs.
    pub fn configure(&self, config: MetadataConfig) {
        self.inner().config = config;
    }

    /// What was set.
    #[must_use]
    pub fn config(&self) -> MetadataConfig {
        self.inner().config
    }

    /// The data; null before there are any.
    #[must_use]
    pub fn get(&self) -> Value {
        self.inner().data.get()
    }

    /// Sets the data.
    ///
    /// # Errors
    /// [`DataError::TooLong`]; then they are what they were.
    pub fn put(&self, document: Value) -> Result<(), DataError> {
        self.inner().data.put(document)
    }

    /// Merges a patch into the data (RFC 7396).
    ///
    /// # Errors
    /// [`DataError`]; then they are what they were.
    pub fn patch(&self, patch: &Value) -> Result<(), DataError> {
        self.inner().data.patch(patch)
    }

    /// What a guest is answered.
    pub(crate) fn answer(&self, request: &Request<'_>, now: Instant) -> Answer {
        let answer = match request.method {
            Method::Get => self.read(request, now),
            Method::Put => self.give_token(request, now),
            Method::Other => Answer {
                header: Some(("Allow", "GET, PUT".into())),
                ..Answer::text(405, "only GET, and PUT for a token, are answered here")
            },
        };
        self.count(&answer);
        answer
    }

    pub(crate) fn count(&self, answer: &Answer) {
        if answer.status == 200 {
            self.counters.requests_served.inc();
        } else {
            self.counters.requests_refused.inc();
        }
    }

    fn read(&self, request: &Request<'_>, now: Instant) -> Answer {
        let inner = self.inner();
        let refusal = match request.header_text(&TOKEN_HEADERS) {
            None => {
                self.counters.rx_no_token.inc();
                Some(
                    "there is no token in the request: PUT /latest/api/token gives one, and X-metadata-token shows it",
                )
            }
            Some(token) if !inner.tokens.is_good(token, now) => {
                self.counters.rx_invalid_token.inc();
                Some("the token is not good, or not any more: PUT /latest/api/token gives one")
            }
            Some(_) => None,
        };
        if let Some(why) = refusal.filter(|_| inner.config.version == Version::V2) {
            return Answer::text(401, why);
        }
        let accepts = request.header_text(&["accept"]).unwrap_or("");
        let wants_json = accepts
            .split([',', ';'])
            .any(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
        let is_json = wants_json && !inner.config.imds_compat;
        let form = if is_json { Form::Json } else { Form::Imds };
        match inner.data.read(request.path, form) {
            Ok(body) => Answer {
                is_json,
                ..Answer::text(200, body)
            },
            Err(NoValue::NotFound) => {
                Answer::text(404, format!("there is nothing at {}", request.path))
            }
            Err(NoValue::NotSupported) => Answer::text(
                501,
                "what is there is neither a text nor an object: ask for it with Accept: application/json",
            ),
        }
    }

    fn give_token(&self, request: &Request<'_>, now: Instant) -> Answer {
        // Who forwards requests of others must not get tokens for them.
        if request.header(&["x-forwarded-for"]).is_some() {
            return Answer::text(400, "a request with X-Forwarded-For gets no token");
        }
        let is_same = request
            .path
            .split('/')
            .filter(|name| !name.is_empty())
            .eq(TOKEN_PATH.split('/').filter(|name| !name.is_empty()));
        if !is_same {
            return Answer::text(
                404,
                format!("there is nothing to be put at {}", request.path),
            );
        }
        let Some((name, _)) = request.header(&TTL_HEADERS) else {
            return Answer::text(
                400,
                "say how long the token is to live: X-metadata-token-ttl-seconds",
            );
        };
        let asked = request.header_text(&TTL_HEADERS).unwrap_or("");
        let Some(ttl) = asked.parse().ok().filter(|ttl| TTL_SECONDS.contains(ttl)) else {
            let (least, most) = (TTL_SECONDS.start(), TTL_SECONDS.end());
            return Answer::text(
                400,
                format!("{name} is a number of seconds from {least} to {most}"),
            );
        };
        let token = self
            .inner()
            .tokens
            .create(Duration::from_secs(u64::from(ttl)), now);
        match token {
            Ok(token) => {
                self.counters.tokens_created.inc();
                let name = TTL_HEADERS
                    .into_iter()
                    .find(|known| known.eq_ignore_ascii_case(name));
                Answer {
                    header: name.map(|name| (name, ttl.to_string())),
                    ..Answer::text(200, token)
                }
            }
            Err(_) => Answer::text(503, "the host has no random bytes at the moment"),
        }
    }
}

#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use crate::http::{Parsed, parse};
    let metadata = Metadata::new(1000);
    let document = serde_json::json!({"latest": {"a": {"b": "c", "n": [1, {"x": null}]}}});
    metadata.put(document).unwrap_or_default();
    let answer = match parse(bytes) {
        Parsed::Partial => return,
        Parsed::Request(request) => {
            assert!(request.len <= bytes.len());
            metadata.answer(&request, Instant::now())
        }
        Parsed::Bad(answer) => answer,
    };
    let text = answer.bytes(true);
    let mut room = [httparse::EMPTY_HEADER; 16];
    let mut head = httparse::Response::new(&mut room);
    assert!(head.parse(&text).is_ok_and(|status| status.is_complete()));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::{Parsed, parse};

    fn metadata(version: Version) -> Metadata {
        let metadata = Metadata::new(1000);
        metadata.configure(MetadataConfig {
            version,
            ..MetadataConfig::default()
        });
        metadata
            .put(json!({"latest": {"meta-data": {"id": "i-1", "n": 5}}}))
            .unwrap();
        metadata
    }

    fn ask(metadata: &Metadata, text: &str) -> Answer {
        match parse(text.as_bytes()) {
            Parsed::Request(request) => metadata.answer(&request, Instant::now()),
            other => panic!("{other:?}"),
        }
    }

    fn get(metadata: &Metadata, path: &str, headers: &str) -> (u16, String) {
        let answer = ask(metadata, &format!("GET {path} HTTP/1.1\r\n{headers}\r\n"));
        (answer.status, answer.body)
    }

    #[test]
    fn version_1_asks_for_no_token_but_counts() {
        let metadata = metadata(Version::V1);
        let expected = (200, "i-1".to_owned());
        assert_eq!(get(&metadata, "/latest/meta-data/id", ""), expected);
        let wrong = "X-metadata-token: nonsense\r\n";
        assert_eq!(get(&metadata, "/latest/meta-data/id", wrong), expected);
        assert_eq!(metadata.counters().rx_no_token.get(), 1);
        assert_eq!(metadata.counters().rx_invalid_token.get(), 1);
    }

    #[test]
    fn version_2_answers_who_has_a_token() {
        let metadata = metadata(Version::V2);
        assert_eq!(get(&metadata, "/latest", "").0, 401);
        for (ttl, aws) in [
            ("X-metadata-token-ttl-seconds", "X-metadata-token"),
            (
                "x-aws-ec2-metadata-token-ttl-seconds",
                "X-aws-ec2-metadata-token",
            ),
        ] {
            let answer = ask(
                &metadata,
                &format!("PUT //latest/api/token/ HTTP/1.1\r\n{ttl}: 60\r\n\r\n"),
            );
            assert_eq!(answer.status, 200);
            let (name, seconds) = answer.header.clone().unwrap();
            assert!(name.eq_ignore_ascii_case(ttl) && seconds == "60");
            let (status, body) = get(&metadata, "/latest", &format!("{aws}: {}\r\n", answer.body));
            assert_eq!((status, body.as_str()), (200, "meta-data/"));
        }
        assert_eq!(get(&metadata, "/latest", "X-metadata-token: x\r\n").0, 401);
    }

    #[test]
    fn tokens_are_refused_to_who_asks_wrongly() {
        let metadata = metadata(Version::V2);
        let put = |path: &str, headers: &str| {
            ask(&metadata, &format!("PUT {path} HTTP/1.1\r\n{headers}\r\n")).status
        };
        let path = "/latest/api/token";
        assert_eq!(put(path, ""), 400);
        for ttl in ["0", "21601", "-1", "x", "", "4294967297"] {
            assert_eq!(
                put(path, &format!("X-metadata-token-ttl-seconds: {ttl}\r\n")),
                400,
                "{ttl}"
            );
        }
        let good = "X-metadata-token-ttl-seconds: 1\r\n";
        assert_eq!(put(path, good), 200);
        assert_eq!(
            put(path, &format!("X-Forwarded-For: 1.2.3.4\r\n{good}")),
            400
        );
        assert_eq!(put("/latest", good), 404);
        let other = ask(&metadata, "POST /latest HTTP/1.1\r\n\r\n");
        assert_eq!(other.status, 405);
        assert_eq!(other.header, Some(("Allow", "GET, PUT".into())));
    }

    #[test]
    fn the_form_is_what_is_accepted_unless_ec2_is_imitated() {
        let metadata = metadata(Version::V1);
        let json = "Accept: text/html, application/json;q=0.9\r\n";
        assert_eq!(get(&metadata, "/latest/meta-data/id", json).1, "\"i-1\"");
        assert_eq!(get(&metadata, "/latest/meta-data/n", json).1, "5");
        assert_eq!(
            get(&metadata, "/latest/meta-data/n", "Accept: */*\r\n").0,
            501
        );
        assert_eq!(get(&metadata, "/nothing", json).0, 404);
        metadata.configure(MetadataConfig {
            imds_compat: true,
            ..MetadataConfig::default()
        });
        assert_eq!(get(&metadata, "/latest/meta-data/id", json).1, "i-1");
    }
}
