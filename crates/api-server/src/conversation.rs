//! What is said on one connection, from bytes to commands and back: pure, bounded, one request after the other.
//!
//! Deliberately does not know: sockets, time, who else is connected.

use alveole_vm_control::{Answer, Command, Refusal};
use serde::Serialize;

use crate::http::{self, Head};
use crate::{MAX_HEAD_BYTES, routes};

/// Buffers that are larger than this are given back when they are empty.
const KEPT_BYTES: usize = 4 << 10;

/// Where a conversation stands.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// The next bytes are a head.
    Head,
    /// The next bytes are the body of this head.
    Body(Head),
    /// The next so many bytes belong to a body that was refused.
    Skip(u64),
    /// A command is out; its answer comes next.
    Waiting(Waiting),
    /// Nothing more is read: what is still to be written is the end.
    Over,
}

/// What is known of the request that is being answered.
#[derive(Debug, PartialEq, Eq)]
struct Waiting {
    method: String,
    path: String,
    keeps_alive: bool,
}

/// One connection's talk.
#[derive(Debug)]
pub(crate) struct Conversation {
    max_body_bytes: usize,
    stage: Stage,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of the output that are written.
    written: usize,
    /// The client sends nothing more.
    ended: bool,
}

impl Conversation {
    pub(crate) fn new(max_body_bytes: usize) -> Self {
        Self {
            max_body_bytes,
            stage: Stage::Head,
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            ended: false,
        }
    }

    /// How many bytes may be read now. None while a request is being answered: a client that does not read its
    /// answers, or asks faster than it is answered, waits.
    pub(crate) fn room(&self) -> usize {
        match self.stage {
            _ if self.ended || !self.output().is_empty() => 0,
            Stage::Waiting(_) | Stage::Over => 0,
            _ => (MAX_HEAD_BYTES + self.max_body_bytes).saturating_sub(self.input.len()),
        }
    }

    /// Takes bytes of the client, at most [`Self::room`].
    pub(crate) fn take(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The client sends nothing more. What it has sent is still answered.
    pub(crate) fn end_of_input(&mut self) {
        self.ended = true;
    }

    /// What is to be written.
    pub(crate) fn output(&self) -> &[u8] {
        self.output.get(self.written..).unwrap_or_default()
    }

    /// So many bytes of the output are written.
    pub(crate) fn wrote(&mut self, bytes: usize) {
        self.written += bytes;
        if self.written >= self.output.len() {
            self.written = 0;
            clear(&mut self.output);
        }
    }

    /// Whether there is nothing left to do, once [`Self::next_command`] has given none.
    pub(crate) fn is_over(&self) -> bool {
        let no_more =
            self.ended && matches!(self.stage, Stage::Head | Stage::Body(_) | Stage::Skip(_));
        (no_more || self.stage == Stage::Over) && self.output().is_empty()
    }

    /// Whether a command is out.
    pub(crate) fn is_waiting(&self) -> bool {
        matches!(self.stage, Stage::Waiting(_))
    }

    /// The next command, as far as the bytes so far have one. What is answered at once is put into the output;
    /// then, and while a command is out, there is none.
    pub(crate) fn next_command(&mut self) -> Option<Command> {
        loop {
            if !self.output().is_empty() && !matches!(self.stage, Stage::Body(_)) {
                return None;
            }
            match &self.stage {
                Stage::Head => self.read_head()?,
                Stage::Body(_) => match self.read_body()? {
                    Ok(command) => return Some(command),
                    Err(refusal) => self.answer(&Err(refusal)),
                },
                Stage::Skip(left) => {
                    let here = self.input.len();
                    let part = usize::try_from(*left).unwrap_or(usize::MAX).min(here);
                    let left = left.saturating_sub(part as u64);
                    self.drop_input(part);
                    self.stage = if left == 0 {
                        Stage::Head
                    } else {
                        Stage::Skip(left)
                    };
                    if left > 0 {
                        return None;
                    }
                }
                Stage::Waiting(_) | Stage::Over => return None,
            }
        }
    }

    /// Reads a head; nothing while it is not complete, or where it is answered at once.
    fn read_head(&mut self) -> Option<()> {
        let head = match http::head(&self.input) {
            Ok(None) => return None,
            Ok(Some(head)) => head,
            Err(why) => {
                self.respond(&Err(Refusal::Failed(why)), false);
                return None;
            }
        };
        self.drop_input(head.len);
        if head.body_bytes > self.max_body_bytes as u64 {
            let Head {
                method,
                path,
                body_bytes,
                ..
            } = head;
            let why = format!(
                "{method} {}: the body has {body_bytes} bytes, {} are taken; send less, or start this program with a \
                 larger --http-api-max-payload-size",
                routes::shown(&path),
                self.max_body_bytes
            );
            // Who asked for leave does not send the body now, or does: nobody knows where the next request begins.
            let keeps_alive = head.keeps_alive && !head.expects_continue;
            self.respond(&Err(Refusal::TooLarge(why)), keeps_alive);
            if keeps_alive {
                self.stage = Stage::Skip(body_bytes);
            }
            return None;
        }
        if head.expects_continue && head.body_bytes > self.input.len() as u64 {
            self.output
                .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        self.stage = Stage::Body(head);
        Some(())
    }

    /// Reads a body and says what is asked; nothing while it is not complete.
    fn read_body(&mut self) -> Option<Result<Command, Refusal>> {
        let Stage::Body(head) = &self.stage else {
            return None;
        };
        // Checked against the limit when the head was read.
        let len = usize::try_from(head.body_bytes).ok()?;
        let body = self.input.get(..len)?;
        let command = routes::command(&head.method, &head.path, &head.accept, body);
        let waiting = Waiting {
            method: head.method.clone(),
            path: head.path.clone(),
            // Clients do not expect a body with the answer to HEAD, which is refused with one.
            keeps_alive: head.keeps_alive && head.method != "HEAD",
        };
        self.drop_input(len);
        self.stage = Stage::Waiting(waiting);
        Some(command)
    }

    /// The answer to the command that is out.
    pub(crate) fn answer(&mut self, outcome: &Result<Answer, Refusal>) {
        let Stage::Waiting(waiting) = std::mem::replace(&mut self.stage, Stage::Over) else {
            return;
        };
        let Waiting {
            method,
            path,
            keeps_alive,
        } = waiting;
        match outcome {
            Ok(_) => log::info!("{method} {}: done", routes::shown(&path)),
            Err(why) => log::info!("{method} {}: refused: {why}", routes::shown(&path)),
        }
        self.respond(outcome, keeps_alive);
    }

    /// Ends the conversation with this.
    pub(crate) fn turn_away(&mut self, why: &str) {
        let body = fault(why);
        self.write("503 Service Unavailable", Some((JSON, &body)), false);
        self.stage = Stage::Over;
    }

    fn respond(&mut self, outcome: &Result<Answer, Refusal>, keeps_alive: bool) {
        self.stage = if keeps_alive {
            Stage::Head
        } else {
            Stage::Over
        };
        match outcome {
            Ok(Answer::Done) => self.write("204 No Content", None, keeps_alive),
            Ok(answer) => {
                let (kind, body) = body_of(answer);
                self.write("200 OK", Some((kind, &body)), keeps_alive);
            }
            Err(refusal) => {
                let status = match refusal {
                    Refusal::TooLarge(_) => "413 Payload Too Large",
                    Refusal::State { .. } | Refusal::NotBuilt(_) | Refusal::Failed(_) => {
                        "400 Bad Request"
                    }
                };
                let body = fault(&refusal.to_string());
                self.write(status, Some((JSON, &body)), keeps_alive);
            }
        }
    }

    fn write(&mut self, status: &str, body: Option<(&str, &str)>, keeps_alive: bool) {
        let connection = if keeps_alive { "keep-alive" } else { "close" };
        let mut head =
            format!("HTTP/1.1 {status}\r\nServer: Alveole API\r\nConnection: {connection}\r\n");
        if let Some((kind, body)) = body {
            let len = body.len();
            head.push_str(&format!(
                "Content-Type: {kind}\r\nContent-Length: {len}\r\n"
            ));
        }
        head.push_str("\r\n");
        self.output.extend_from_slice(head.as_bytes());
        let (_, body) = body.unwrap_or_default();
        self.output.extend_from_slice(body.as_bytes());
    }

    fn drop_input(&mut self, bytes: usize) {
        self.input.drain(..bytes.min(self.input.len()));
        if self.input.is_empty() {
            clear(&mut self.input);
        }
    }
}

const JSON: &str = "application/json";

fn clear(buffer: &mut Vec<u8>) {
    buffer.clear();
    if buffer.capacity() > KEPT_BYTES {
        *buffer = Vec::new();
    }
}

fn fault(text: &str) -> String {
    serde_json::json!({ "fault_message": text }).to_string()
}

/// What the answer is, as a media type, and its text.
fn body_of(answer: &Answer) -> (&'static str, String) {
    fn json<T: Serialize>(value: &T) -> String {
        // Fails for maps whose keys are no text and for numbers that JSON has not: there are none.
        serde_json::to_string(value).unwrap_or_default()
    }
    let text = match answer {
        Answer::Text { content_type, text } => return (content_type, text.clone()),
        Answer::Done => String::new(),
        Answer::Instance(info) => json(info),
        Answer::Version(version) => json(&serde_json::json!({ "firecracker_version": version })),
        Answer::Config(config) => json(config),
        Answer::MachineConfig(config) => json(config),
        Answer::Metadata(value) => json(value),
        Answer::Snapshot(taken) => json(taken),
    };
    (JSON, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk() -> Conversation {
        Conversation::new(100)
    }

    /// The commands that `text` has, each answered with [`Answer::Done`], and all that is written.
    fn say(talk: &mut Conversation, text: &[u8], piece: usize) -> (Vec<Command>, String) {
        let (mut commands, mut told) = (Vec::new(), Vec::new());
        let mut rest = text;
        loop {
            let len = piece.min(talk.room()).min(rest.len());
            talk.take(&rest[..len]);
            rest = &rest[len..];
            if let Some(command) = talk.next_command() {
                commands.push(command);
                assert_eq!(talk.room(), 0, "nothing is read while a command is out");
                assert_eq!(talk.next_command(), None);
                talk.answer(&Ok(Answer::Done));
            }
            let done = talk.output().is_empty() && len == 0;
            told.extend_from_slice(talk.output());
            talk.wrote(talk.output().len());
            if done {
                return (commands, String::from_utf8(told).unwrap());
            }
        }
    }

    const PAUSE: &str = "PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";
    const GET: &str = "GET /version HTTP/1.1\r\n\r\n";

    #[test]
    fn requests_in_a_row_are_carried_out_in_order_however_they_are_cut() {
        let text = format!("{PAUSE}{GET}\r\n{GET}{PAUSE}");
        for piece in 1..text.len() {
            let mut talk = talk();
            let (commands, told) = say(&mut talk, text.as_bytes(), piece);
            let want = [
                Command::Pause,
                Command::GetVersion,
                Command::GetVersion,
                Command::Pause,
            ];
            assert_eq!(commands, want, "{piece}");
            assert_eq!(told.matches("HTTP/1.1 204 No Content\r\n").count(), 4);
            assert!(!talk.is_over());
        }
    }

    #[test]
    fn who_asks_for_leave_gets_it() {
        let mut talk = talk();
        let head = "PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 18\r\n\r\n";
        let (commands, told) = say(&mut talk, head.as_bytes(), 1000);
        assert_eq!(commands, []);
        assert_eq!(told, "HTTP/1.1 100 Continue\r\n\r\n");
        let (commands, told) = say(&mut talk, b"{\"state\":\"Paused\"}", 1000);
        assert_eq!(commands, [Command::Pause]);
        assert!(told.starts_with("HTTP/1.1 204"), "{told}");
        // Not where the body is there already.
        let all = format!("{head}{{\"state\":\"Paused\"}}");
        let (commands, told) = say(&mut talk, all.as_bytes(), 1000);
        assert_eq!(commands, [Command::Pause]);
        assert!(told.starts_with("HTTP/1.1 204"), "{told}");
    }

    #[test]
    fn a_body_that_is_too_large_is_refused_and_skipped() {
        let large = format!(
            "PUT /mmds HTTP/1.1\r\nContent-Length: 101\r\n\r\n{}{GET}",
            "x".repeat(101)
        );
        for piece in [1, 7, 1000] {
            let mut talk = talk();
            let (commands, told) = say(&mut talk, large.as_bytes(), piece);
            assert!(told.starts_with("HTTP/1.1 413 "), "{told}");
            assert!(told.contains("101 bytes, 100 are taken"), "{told}");
            assert_eq!(commands, [Command::GetVersion], "{piece}");
        }
        let mut talk = talk();
        let huge = format!("PUT /mmds HTTP/1.1\r\nContent-Length: {}\r\n\r\n", u64::MAX);
        say(&mut talk, huge.as_bytes(), 1000);
        for _ in 0..1000 {
            say(&mut talk, &[b'x'; 1000], 1000);
            assert!(talk.input.capacity() <= MAX_HEAD_BYTES + 2000);
        }
        let mut talk = super::tests::talk();
        let asks = "PUT /mmds HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n";
        let (_, told) = say(&mut talk, asks.as_bytes(), 1000);
        assert!(
            told.contains("413") && told.contains("Connection: close"),
            "{told}"
        );
        assert!(talk.is_over());
    }

    #[test]
    fn what_is_no_request_ends_the_conversation() {
        let mut talk = talk();
        let (commands, told) = say(
            &mut talk,
            b"\x16\x03\x01 hello\r\n\r\nGET / HTTP/1.1\r\n\r\n",
            99,
        );
        assert_eq!(commands, []);
        assert!(told.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{told}");
        assert!(told.contains("Connection: close"), "{told}");
        assert!(told.contains("{\"fault_message\":\"this is not"), "{told}");
        assert!(talk.is_over());
    }

    #[test]
    fn a_refused_request_keeps_the_connection() {
        let mut talk = talk();
        let text = format!("POST /vm HTTP/1.1\r\n\r\n{GET}");
        let (commands, told) = say(&mut talk, text.as_bytes(), 1000);
        assert!(told.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{told}");
        assert_eq!(commands, [Command::GetVersion]);
    }

    #[test]
    fn a_client_that_sends_no_more_is_still_answered() {
        let mut talk = talk();
        talk.take(GET.as_bytes());
        talk.take(b"GET /vers");
        talk.end_of_input();
        assert!(talk.next_command().is_some());
        assert!(!talk.is_over());
        talk.answer(&Ok(Answer::Version("1".into())));
        assert!(!talk.is_over());
        let told = String::from_utf8(talk.output().to_vec()).unwrap();
        let length = "Content-Length: 27\r\n\r\n{\"firecracker_version\":\"1\"}";
        assert!(told.ends_with(length), "{told}");
        talk.wrote(told.len());
        assert_eq!(talk.next_command(), None);
        assert!(talk.is_over());
    }

    #[test]
    fn answers_have_their_bodies() {
        let mut talk = talk();
        for (answer, body) in [
            (Answer::Metadata(serde_json::json!({"a": 1})), "{\"a\":1}"),
            (
                Answer::MachineConfig(Default::default()),
                "{\"vcpu_count\":1,\"mem_size_mib\":128,\"smt\":false,\"track_dirty_pages\":false,\
                 \"huge_pages\":\"None\"}",
            ),
        ] {
            talk.take(GET.as_bytes());
            talk.next_command().unwrap();
            talk.answer(&Ok(answer));
            let told = String::from_utf8(talk.output().to_vec()).unwrap();
            assert!(told.starts_with("HTTP/1.1 200 OK\r\n"), "{told}");
            assert!(told.ends_with(&format!("\r\n\r\n{body}")), "{told}");
            talk.wrote(told.len());
        }
    }
}
