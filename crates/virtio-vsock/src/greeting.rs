//! The first line of a client of the host: `CONNECT <port>\n`. Pure.

use crate::MAX_GREETING_BYTES;

/// What the first bytes of a client are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// The beginning of a line.
    Unfinished,
    /// It wants to this port of the guest; the line with its end takes so many bytes.
    Port(u32, usize),
    /// Nothing that we know.
    Nonsense,
}

/// Reads what has come so far. As Firecracker does, takes the word in any case and words apart by any blanks.
pub(crate) fn read(bytes: &[u8]) -> Greeting {
    let Some(end) = bytes.iter().position(|b| *b == b'\n') else {
        return if bytes.len() < MAX_GREETING_BYTES {
            Greeting::Unfinished
        } else {
            Greeting::Nonsense
        };
    };
    let line = bytes.get(..end).and_then(|l| std::str::from_utf8(l).ok());
    let mut words = line.unwrap_or("").split_ascii_whitespace();
    let (word, port, rest) = (words.next(), words.next(), words.next());
    match (word, port.map(str::parse), rest) {
        (Some(word), Some(Ok(port)), None) if word.eq_ignore_ascii_case("connect") => {
            Greeting::Port(port, end.saturating_add(1))
        }
        _ => Greeting::Nonsense,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_port_or_nonsense() {
        let port = |p, text: &str| Greeting::Port(p, text.len());
        for (bytes, greeting) in [
            ("", Greeting::Unfinished),
            ("CONNECT 52", Greeting::Unfinished),
            ("CONNECT 52\n", port(52, "CONNECT 52\n")),
            ("CONNECT 52\nhello", port(52, "CONNECT 52\n")),
            ("connect 0\r\n", port(0, "connect 0\r\n")),
            (
                "CONNECT 4294967295\r\n",
                port(u32::MAX, "CONNECT 4294967295\r\n"),
            ),
            ("CONNECT 4294967296\n", Greeting::Nonsense),
            ("CONNECT -1\n", Greeting::Nonsense),
            ("CONNECT 5 2\n", Greeting::Nonsense),
            ("CONNECT\n", Greeting::Nonsense),
            ("\n", Greeting::Nonsense),
            ("GET / HTTP/1.1\r\n", Greeting::Nonsense),
            (
                "CONNECT                        52\n",
                Greeting::Port(52, 34),
            ),
        ] {
            assert_eq!(read(bytes.as_bytes()), greeting, "{bytes:?}");
        }
        assert_eq!(read(&[b'x'; MAX_GREETING_BYTES]), Greeting::Nonsense);
        assert_eq!(read(&[b'x'; MAX_GREETING_BYTES - 1]), Greeting::Unfinished);
        assert_eq!(read(b"\xff\xfe\n"), Greeting::Nonsense);
    }
}
