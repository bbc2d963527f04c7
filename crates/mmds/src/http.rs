//! Requests and answers as bytes: as much of HTTP/1 (RFC 9112) as the clients of a metadata service speak.

use crate::MAX_REQUEST_BYTES;

/// Most lines of a head.
const MAX_HEADERS: usize = 32;

/// What a client may want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Put,
    Other,
}

/// A whole request.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    /// Without a host in front of it and without what follows a question mark.
    pub(crate) path: &'a str,
    headers: Vec<(&'a str, &'a [u8])>,
    /// Whether the connection stays after the answer.
    pub(crate) keeps: bool,
    /// Bytes of it, body included.
    pub(crate) len: usize,
}

/// What the beginning of a stream is.
#[derive(Debug)]
pub(crate) enum Parsed<'a> {
    /// More is needed.
    Partial,
    Request(Request<'a>),
    /// It can be no request; nothing that follows can be understood.
    Bad(Answer),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) is_json: bool,
    pub(crate) body: String,
    /// One more line of the head.
    pub(crate) header: Option<(&'static str, String)>,
}

impl Answer {
    pub(crate) fn text(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            is_json: false,
            body: body.into(),
            header: None,
        }
    }

    pub(crate) fn bytes(&self, keeps: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Content Too Large",
            501 => "Not Implemented",
            503 => "Service Unavailable",
            _ => "Bad Request",
        };
        let kind = if self.is_json {
            "application/json"
        } else {
            "text/plain"
        };
        let more = self
            .header
            .as_ref()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .unwrap_or_default();
        let connection = if keeps { "keep-alive" } else { "close" };
        format!(
            "HTTP/1.1 {} {reason}\r\nServer: Alveole MMDS\r\nConnection: {connection}\r\nContent-Type: {kind}\r\n{more}Content-Length: {}\r\n\r\n{}",
            self.status,
            self.body.len(),
            self.body
        )
        .into_bytes()
    }
}

impl<'a> Request<'a> {
    /// The first header of one of these names, in lower case.
    pub(crate) fn header(&self, names: &[&str]) -> Option<(&'a str, &'a [u8])> {
        let found = self.headers.iter();
        found
            .copied()
            .find(|(name, _)| names.iter().any(|wanted| name.eq_ignore_ascii_case(wanted)))
    }

    pub(crate) fn header_text(&self, names: &[&str]) -> Option<&'a str> {
        let (_, value) = self.header(names)?;
        std::str::from_utf8(value).ok().map(str::trim)
    }
}

/// Reads the request at the beginning of `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let bad = |status, why: &str| Parsed::Bad(Answer::text(status, why));
    let mut room = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut room);
    let head_len = match head.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() >= MAX_REQUEST_BYTES => {
            return bad(413, "the request is too long");
        }
        Ok(httparse::Status::Partial) => return Parsed::Partial,
        Err(httparse::Error::TooManyHeaders) => {
            return bad(413, "the request has too many headers");
        }
        Err(e) => return bad(400, &format!("this is no HTTP request: {e}")),
    };
    let (Some(method), Some(target), Some(version)) = (head.method, head.path, head.version) else {
        return bad(400, "this is no HTTP request");
    };
    let headers = head.headers.iter().map(|h| (h.name, h.value)).collect();
    let mut request = Request {
        method: match method {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            _ => Method::Other,
        },
        path: path(target),
        headers,
        keeps: false,
        len: head_len,
    };
    if request.header(&["transfer-encoding"]).is_some() {
        return bad(
            400,
            "bodies in chunks are not read here: say Content-Length",
        );
    }
    let body = match request.header_text(&["content-length"]) {
        None if request.header(&["content-length"]).is_none() => 0,
        text => {
            let digits = text.filter(|t| !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit()));
            match digits.map(str::parse::<usize>) {
                Some(Ok(len)) => len,
                Some(Err(_)) => return bad(413, "the body is too long"),
                None => return bad(400, "Content-Length is no number"),
            }
        }
    };
    request.len = head_len.saturating_add(body);
    if request.len > MAX_REQUEST_BYTES {
        return bad(413, "the request is too long");
    }
    if request.len > bytes.len() {
        return Parsed::Partial;
    }
    let says = |word: &str| {
        let value = request.header_text(&["connection"]).unwrap_or("");
        value
            .split(',')
            .any(|w| w.trim().eq_ignore_ascii_case(word))
    };
    request.keeps = if version == 0 {
        says("keep-alive")
    } else {
        !says("close")
    };
    Parsed::Request(request)
}

/// `http://host/a?b` is `/a`.
fn path(target: &str) -> &str {
    let target = target.split(['?', '#']).next().unwrap_or("");
    let Some(rest) = target.strip_prefix("http://") else {
        return target;
    };
    rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Request<'_> {
        match parse(text.as_bytes()) {
            Parsed::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    fn status(text: &str) -> u16 {
        match parse(text.as_bytes()) {
            Parsed::Bad(answer) => answer.status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_read_whole_and_one_at_a_time() {
        let text = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-TTL:  5 \r\ncontent-length: 3\r\n\r\nabcGET / HT";
        for cut in 0..text.len() - 9 {
            assert!(
                matches!(parse(&text.as_bytes()[..cut]), Parsed::Partial),
                "{cut}"
            );
        }
        let request = request(text);
        assert_eq!(request.method, Method::Put);
        assert_eq!(request.path, "/latest/api/token");
        assert_eq!(request.header_text(&["x-other", "x-ttl"]), Some("5"));
        assert_eq!(request.len, text.len() - 8);
        assert!(request.keeps);
    }

    #[test]
    fn targets_are_paths() {
        for (target, expected) in [
            ("/a/b", "/a/b"),
            ("http://169.254.169.254/a", "/a"),
            ("http://169.254.169.254", "/"),
            ("/a?b=/c", "/a"),
        ] {
            assert_eq!(
                request(&format!("GET {target} HTTP/1.1\r\n\r\n")).path,
                expected
            );
        }
    }

    #[test]
    fn who_keeps_the_connection() {
        for (version, header, keeps) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: TE, Close\r\n", false),
            ("1.0", "", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
        ] {
            let text = format!("GET / HTTP/{version}\r\n{header}\r\n");
            assert_eq!(request(&text).keeps, keeps, "{text}");
        }
    }

    #[test]
    fn what_is_no_request_is_told_so() {
        assert_eq!(status("\0\0\0\0\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/3.0\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), 400);
        assert_eq!(
            status("GET / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n"),
            413
        );
        assert_eq!(
            status("GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n"),
            413
        );
        assert_eq!(
            status("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            400
        );
        assert_eq!(
            status(&format!(
                "GET /{} HTTP/1.1\r\n",
                "a".repeat(MAX_REQUEST_BYTES)
            )),
            413
        );
        let many = "a: b\r\n".repeat(MAX_HEADERS + 1);
        assert_eq!(status(&format!("GET / HTTP/1.1\r\n{many}\r\n")), 413);
    }
}
