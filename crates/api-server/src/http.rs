//! The head of a request: its line and headers (RFC 9112), from bytes.
//!
//! Deliberately does not know: sockets, bodies, what is asked.

use crate::{MAX_HEAD_BYTES, MAX_HEADERS};

/// What a head says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) method: String,
    /// The path, without scheme and host where the client sent them too.
    pub(crate) path: String,
    pub(crate) body_bytes: u64,
    /// The client waits for leave to send its body (RFC 9110, section 10.1.1).
    pub(crate) expects_continue: bool,
    pub(crate) keeps_alive: bool,
    /// What form of answer the client accepts; empty: it does not say.
    pub(crate) accept: String,
    /// Length of the head itself.
    pub(crate) len: usize,
}

/// Reads a head; nothing while it is not complete.
///
/// # Errors
/// It is none: why, and what to do. Where the next request begins is not known then.
pub(crate) fn head(input: &[u8]) -> Result<Option<Head>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let within = input.get(..MAX_HEAD_BYTES).unwrap_or(input);
    let parsed = request.parse(within).map_err(|e| match e {
        httparse::Error::TooManyHeaders => {
            format!("the request has more than {MAX_HEADERS} headers; send fewer")
        }
        e => format!("this is not an HTTP/1.1 request: {e}"),
    })?;
    let httparse::Status::Complete(len) = parsed else {
        if input.len() >= MAX_HEAD_BYTES {
            return Err(format!(
                "the request's line and headers have more than {MAX_HEAD_BYTES} bytes; send fewer or shorter headers"
            ));
        }
        return Ok(None);
    };
    // Version 1.0 closes unless told otherwise (RFC 9112, section 9.3).
    let mut keeps_alive = request.version == Some(1);
    let mut expects_continue = false;
    let mut body_bytes = None;
    let mut accept = String::new();
    for header in request.headers.iter() {
        let value = header.value.trim_ascii();
        let has = |word: &str| {
            let mut words = value.split(|b| *b == b',');
            words.any(|w| w.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
        };
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let bytes = number(value).ok_or_else(|| {
                    format!(
                        "Content-Length {:?} is no number of bytes",
                        String::from_utf8_lossy(value)
                    )
                })?;
                if body_bytes.is_some_and(|other| other != bytes) {
                    return Err("the request has two different Content-Length; send one".into());
                }
                body_bytes = Some(bytes);
            }
            "transfer-encoding" if !has("identity") => {
                return Err(
                    "Transfer-Encoding is not understood: send the body whole, with Content-Length"
                        .into(),
                );
            }
            "accept" => accept = String::from_utf8_lossy(value).into_owned(),
            "expect" => expects_continue = has("100-continue"),
            "connection" if has("close") => keeps_alive = false,
            "connection" if has("keep-alive") => keeps_alive = true,
            _ => {}
        }
    }
    Ok(Some(Head {
        method: request.method.unwrap_or_default().to_owned(),
        path: path_of(request.path.unwrap_or_default()).to_owned(),
        body_bytes: body_bytes.unwrap_or(0),
        expects_continue,
        keeps_alive,
        accept,
        len,
    }))
}

/// Digits only: neither a sign nor a list, which others read differently.
fn number(value: &[u8]) -> Option<u64> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok()?;
    digits.then(|| text.parse().ok())?
}

/// The path of a target in absolute form (RFC 9112, section 3.2.2), or the target.
fn path_of(target: &str) -> &str {
    let Some(rest) = target.strip_prefix("http://") else {
        return target;
    };
    rest.find('/')
        .map_or("/", |at| rest.get(at..).unwrap_or("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_when_it_is_complete() {
        let text = b"PUT http://localhost/drives/a HTTP/1.1\r\nHost: x\r\ncontent-LENGTH: 3\r\n\
                     Expect: 100-Continue\r\nAccept: a/b\r\nConnection: Keep-Alive, close\r\n\r\nabc";
        let end = text.len() - 3;
        for len in 0..end {
            assert_eq!(head(&text[..len]), Ok(None), "{len}");
        }
        let want = Head {
            method: "PUT".into(),
            path: "/drives/a".into(),
            body_bytes: 3,
            expects_continue: true,
            keeps_alive: false,
            accept: "a/b".into(),
            len: end,
        };
        assert_eq!(head(&text[..end]), Ok(Some(want.clone())));
        assert_eq!(head(text), Ok(Some(want)));
    }

    #[test]
    fn connections_stay_open_as_the_version_says() {
        for (text, keeps) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", true),
            ("GET http://h HTTP/1.1\r\n\r\n", true),
        ] {
            let head = head(text.as_bytes()).unwrap().unwrap();
            assert_eq!(head.keeps_alive, keeps, "{text}");
            assert_eq!(head.path, "/");
        }
    }

    #[test]
    fn what_is_no_head_is_told() {
        let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(MAX_HEAD_BYTES));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "X: y\r\n".repeat(MAX_HEADERS + 1)
        );
        for (text, part) in [
            ("\x01\r\n\r\n", "not an HTTP/1.1 request"),
            ("GET / HTTP/2.0\r\n\r\n", "not an HTTP/1.1 request"),
            ("GET /\r\n\r\n", "not an HTTP/1.1 request"),
            (
                "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                "\"-1\" is no number",
            ),
            (
                "GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
                "\"+1\" is no number",
            ),
            (
                "GET / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
                "is no number",
            ),
            ("GET / HTTP/1.1\r\nContent-Length:\r\n\r\n", "is no number"),
            (
                "GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
                "is no number",
            ),
            (
                "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                "two different",
            ),
            (
                "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                "send the body whole",
            ),
            (&long, "more than 8192 bytes"),
            (&many, "more than 64 headers"),
        ] {
            let e = head(text.as_bytes()).unwrap_err();
            assert!(e.contains(part), "{text:.60}: {e}");
        }
    }
}
