//! Registries that lie, stutter and ask who is there. Real ones are in the tests of `alveole image`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "each test program uses some of it")]
mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use alveole_image::{Import, Limits, Quiet, Store};
use support::{disk_tree, file, layer, layout};

/// What a registry does besides its duty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Good,
    /// Layers break off after 100,000 bytes of each answer.
    Stutters,
    /// And it does not know ranges.
    StuttersAndForgets,
    /// A byte of each layer is another one.
    Exchanges,
    /// Layers have more bytes than announced.
    Floods,
    /// It wants a token.
    Asks,
    /// It wants a token from elsewhere.
    AsksFor(&'static str),
    /// It is out of order.
    Fails,
}

/// A registry with the image of a layout; gives its address and what it was asked.
fn serve(at: &Path, manner: Manner) -> (String, Arc<Mutex<Vec<String>>>) {
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(at.join("index.json")).unwrap()).unwrap();
    let manifest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let mut blobs = HashMap::new();
    for entry in std::fs::read_dir(at.join("blobs/sha256")).unwrap() {
        let entry = entry.unwrap();
        blobs.insert(
            format!("sha256:{}", entry.file_name().to_str().unwrap()),
            std::fs::read(entry.path()).unwrap(),
        );
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (log, host) = (Arc::clone(&asked), address.clone());
    let blobs = Arc::new(blobs);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (blobs, manifest, log, host) = (
                Arc::clone(&blobs),
                manifest.clone(),
                Arc::clone(&log),
                host.clone(),
            );
            std::thread::spawn(move || {
                while answer(
                    stream.as_ref().unwrap(),
                    &blobs,
                    &manifest,
                    manner,
                    &log,
                    &host,
                )
                .is_some()
                {}
            });
        }
    });
    (address, asked)
}

fn answer(
    mut stream: &TcpStream,
    blobs: &HashMap<String, Vec<u8>>,
    manifest: &str,
    manner: Manner,
    log: &Mutex<Vec<String>>,
    host: &str,
) -> Option<()> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        headers.iter().find_map(|h| {
            h.to_ascii_lowercase()
                .strip_prefix(&format!("{name}: "))
                .map(|_| h[name.len() + 2..].to_owned())
        })
    };
    log.lock()
        .unwrap()
        .push(format!("{first} {}", header("range").unwrap_or_default()));
    let path = first.split(' ').nth(1)?;
    let mut give = |status: &str, more: &str, body: &[u8], sent: usize| {
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\n{more}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(&body[..sent]).ok()?;
        if sent < body.len() {
            stream.shutdown(std::net::Shutdown::Both).ok()?;
            return None;
        }
        Some(())
    };
    let words = |body: &str| (body.to_owned().into_bytes(), body.len());
    if let Some(query) = path.strip_prefix("/token?") {
        assert!(
            query.contains("scope=repository") && query.contains("service=test"),
            "{query}"
        );
        let (body, len) = words(r#"{"access_token":"let-me-in"}"#);
        return give("200 OK", "", &body, len);
    }
    let realm = match manner {
        Manner::Asks => Some(format!("http://{host}/token")),
        Manner::AsksFor(realm) => Some(realm.to_owned()),
        _ => None,
    };
    if let Some(realm) = realm
        && header("authorization").as_deref() != Some("Bearer let-me-in")
    {
        return give(
            "401 Unauthorized",
            &format!("www-authenticate: Bearer realm=\"{realm}\",service=\"test\"\r\n"),
            b"",
            0,
        );
    }
    if path == "/v2/" {
        return give("200 OK", "", b"", 0);
    }
    if manner == Manner::Fails {
        let (body, len) = words(r#"{"errors":[{"code":"X","message":"the disks are on fire"}]}"#);
        return give("503 Service Unavailable", "", &body, len);
    }
    let name = path.rsplit('/').next()?;
    if path.contains("/manifests/") {
        let Some(body) = blobs.get(if name == "latest" { manifest } else { name }) else {
            return give("404 Not Found", "", b"", 0);
        };
        return give(
            "200 OK",
            "content-type: application/vnd.oci.image.manifest.v1+json\r\n",
            body,
            body.len(),
        );
    }
    let mut body = blobs[name].clone();
    if body.len() < 10_000 {
        return give("200 OK", "", &body, body.len());
    }
    let from: usize = header("range")
        .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
        .unwrap_or(0);
    match manner {
        Manner::Exchanges => body[700] ^= 1,
        Manner::Floods => body.extend([0; 100]),
        _ => {}
    }
    if from > 0 && manner != Manner::StuttersAndForgets {
        let rest = &body[from..];
        return give(
            "206 Partial Content",
            &format!(
                "content-range: bytes {from}-{}/{}\r\n",
                body.len() - 1,
                body.len()
            ),
            rest,
            rest.len().min(100_000),
        );
    }
    let sent = match manner {
        Manner::Stutters | Manner::StuttersAndForgets => 100_000,
        _ => body.len(),
    };
    give("200 OK", "", &body, sent)
}

struct Case {
    folder: tempfile::TempDir,
    store: Store,
    host: String,
    asked: Arc<Mutex<Vec<String>>>,
}

fn case(manner: Manner) -> Case {
    let folder = tempfile::tempdir().unwrap();
    layout(
        &folder.path().join("layout"),
        &[layer(&[file("a", vec![7; 250_000])])],
    );
    let (host, asked) = serve(&folder.path().join("layout"), manner);
    let store = Store::open(&folder.path().join("store")).unwrap();
    Case {
        folder,
        store,
        host,
        asked,
    }
}

impl Case {
    fn pull(&self) -> Result<alveole_image::Image, String> {
        let how = Import {
            name: None,
            platform: "linux/amd64".parse().unwrap(),
            limits: Limits::default(),
        };
        let name = format!("{}/me/x", self.host).parse().unwrap();
        self.store
            .pull(&name, &how, &Quiet)
            .map_err(|e| e.to_string())
    }

    fn times(&self, what: &str) -> usize {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .filter(|line| line.contains(what))
            .count()
    }
}

#[test]
fn a_pull_gets_what_is_missing_and_no_more() {
    let case = case(Manner::Good);
    let image = case.pull().unwrap();
    assert_eq!(disk_tree(&image.root_disk).len(), 2);
    assert_eq!(case.times("/blobs/"), 2);
    case.pull().unwrap();
    assert_eq!(case.times("/blobs/"), 2);
    assert_eq!(case.store.usage().unwrap().unfinished.count, 0);
}

#[test]
fn pulls_at_the_same_time_share_the_download() {
    let case = case(Manner::Good);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| case.pull().unwrap());
        }
    });
    assert_eq!(case.times("/blobs/"), 2, "{:?}", case.asked.lock().unwrap());
}

#[test]
fn a_broken_download_goes_on() {
    let broken = case(Manner::Stutters);
    broken.pull().unwrap();
    assert_eq!(
        broken.times("bytes=100000-"),
        1,
        "{:?}",
        broken.asked.lock().unwrap()
    );
    assert_eq!(broken.times("bytes=200000-"), 1);
    // What an earlier pull left is used.
    let good = case(Manner::Good);
    let bytes = layer(&[file("a", vec![7; 250_000])]);
    let partial = good
        .store
        .path()
        .join("partial")
        .join(alveole_image::Digest::of(&bytes).hex());
    std::fs::write(partial, &bytes[..123_456]).unwrap();
    good.pull().unwrap();
    assert_eq!(good.times("bytes=123456-"), 1);
}

#[test]
fn a_registry_without_ranges_gives_up_in_words() {
    let case = case(Manner::StuttersAndForgets);
    let why = case.pull().unwrap_err();
    assert!(
        why.contains("broke off 5 times") && why.contains("next pull goes on"),
        "{why}"
    );
    assert_eq!(case.store.usage().unwrap().unfinished.count, 1);
    case.store.prune(&[], false).unwrap();
    assert_eq!(case.store.usage().unwrap().unfinished.count, 0);
}

#[test]
fn exchanged_and_overlong_layers_are_refused() {
    let exchanged = case(Manner::Exchanges);
    let why = exchanged.pull().unwrap_err();
    assert!(why.contains("damaged or was exchanged"), "{why}");
    // It would only be taken up again.
    assert_eq!(exchanged.store.usage().unwrap().unfinished.count, 0);
    assert!(exchanged.store.images().unwrap().is_empty());
    let why = case(Manner::Floods).pull().unwrap_err();
    assert!(why.contains("bytes that it had announced"), "{why}");
}

#[test]
fn tokens_are_fetched_only_from_where_nobody_reads_along() {
    let asks = case(Manner::Asks);
    asks.pull().unwrap();
    assert_eq!(asks.times("/token?"), 1);
    let why = case(Manner::AsksFor("ftp://evil/token"))
        .pull()
        .unwrap_err();
    assert!(
        why.contains("ftp://evil/token, which is no https address"),
        "{why}"
    );
}

#[test]
fn registries_words_are_passed_on() {
    let why = case(Manner::Fails).pull().unwrap_err();
    assert!(
        why.contains("status 503 (\"the disks are on fire\")"),
        "{why}"
    );
    let good = case(Manner::Good);
    let how = Import {
        name: None,
        platform: "linux/amd64".parse().unwrap(),
        limits: Limits::default(),
    };
    let name = format!("{}/me/x:other", good.host).parse().unwrap();
    let why = good
        .store
        .pull(&name, &how, &Quiet)
        .unwrap_err()
        .to_string();
    assert!(why.contains("status 404: there is no such image"), "{why}");
    let nobody = "127.0.0.1:1/x".parse().unwrap();
    let why = good
        .store
        .pull(&nobody, &how, &Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        why.contains("from 127.0.0.1:1: ") && why.contains("no answer"),
        "{why}"
    );
    let arm = Import {
        platform: "linux/arm64".parse().unwrap(),
        ..how
    };
    let name = format!("{}/me/x", good.host).parse().unwrap();
    let why = good
        .store
        .pull(&name, &arm, &Quiet)
        .unwrap_err()
        .to_string();
    assert!(why.contains("nothing for linux/arm64"), "{why}");
    assert_eq!(
        good.times("/blobs/"),
        1,
        "layers of another machine were downloaded"
    );
    drop(good.folder);
}
