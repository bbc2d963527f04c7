//! A way into the pure parts for fuzz targets: no socket, no thread.

use alveole_vm_control::Answer;

use crate::conversation::Conversation;
use crate::{DEFAULT_MAX_BODY_BYTES, MAX_HEAD_BYTES};

/// Says `bytes` on a connection, in pieces of the lengths that its first byte seeds, and answers every command.
///
/// # Panics
/// The conversation keeps more than its bounds, goes on after its end, or never comes to rest.
pub fn converse(bytes: &[u8]) {
    let Some((seed, mut rest)) = bytes.split_first() else {
        return;
    };
    let mut talk = Conversation::new(DEFAULT_MAX_BODY_BYTES);
    let mut piece = usize::from(*seed);
    let mut idle = 0;
    loop {
        let len = piece.min(talk.room()).min(rest.len());
        piece = (piece * 31 + 7) % 4096;
        let (now, later) = rest.split_at(len);
        talk.take(now);
        rest = later;
        if rest.is_empty() {
            talk.end_of_input();
        }
        let mut busy = len > 0;
        if talk.next_command().is_some() {
            busy = true;
            assert!(talk.is_waiting() && talk.room() == 0);
            talk.answer(&Ok(Answer::Done));
        } else if talk.is_over() {
            return;
        }
        assert!(talk.room() <= MAX_HEAD_BYTES + DEFAULT_MAX_BODY_BYTES);
        let written = talk.output().len();
        assert!(written < 64 << 10, "an answer of {written} bytes");
        busy |= written > 0;
        talk.wrote(written);
        idle = if busy { 0 } else { idle + 1 };
        assert!(idle < 4, "the conversation does not come to rest");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// Pieces that requests are made of, so that random ones get past the head.
    const PIECES: &[&str] = &[
        "GET ",
        "PUT ",
        "PATCH ",
        "/",
        "/vm",
        "/vm/config",
        "/drives/a",
        "/mmds",
        "/actions",
        " HTTP/1.1\r\n",
        " HTTP/1.0\r\n",
        "Content-Length: ",
        "2\r\n",
        "60000\r\n",
        "18\r\n",
        "Expect: 100-continue\r\n",
        "Connection: close\r\n",
        "\r\n",
        "{}",
        "{\"state\":\"Paused\"}",
        "{\"action_type\":\"FlushMetrics\"}",
        "\n",
        "\0",
        "é",
        "x",
    ];

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            super::converse(&bytes);
        }

        #[test]
        fn anything_like_requests_comes_to_an_end(
            seed in any::<u8>(),
            pieces in prop::collection::vec(prop::sample::select(PIECES), 0..200),
        ) {
            let mut bytes = vec![seed];
            bytes.extend(pieces.concat().bytes());
            super::converse(&bytes);
        }
    }
}
