//! What a guest may say instead of what an agent says: each ends in an error that says so, soon, and holds no memory.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Guest, Streams};
use alveole_agent_protocol::{
    Answer, Exit, Frame, Hello, MAX_DATA_BYTES, Process, Refusal, Renewal, Stream, WINDOW_BYTES,
    to_json,
};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_millis(500);

/// A guest that does with each connection what it was told to. Its monitor passes on what it says.
struct Liar {
    dir: TempDir,
}

impl Liar {
    fn new(lie: impl Fn(UnixStream) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
        thread::spawn(move || {
            for connection in listener.incoming() {
                lie(connection.unwrap());
            }
        });
        Self { dir }
    }

    fn guest(&self) -> Guest {
        Guest::new(&self.dir.path().join("vsock"), PATIENCE)
    }

    #[track_caller]
    fn run(&self) -> Result<Exit, AgentError> {
        let begun = Instant::now();
        let streams = Streams {
            input: Some(Box::new(std::io::repeat(7))),
            output: Some(Box::new(std::io::sink())),
            errors: None,
        };
        let result = self.guest().run(&Process::default(), streams, |_, _| {});
        assert!(begun.elapsed() < Duration::from_secs(20), "it waits");
        result
    }

    #[track_caller]
    fn fails(&self, word: &str) {
        let error = self.run().unwrap_err().to_string();
        assert!(error.contains(word), "does not say {word:?}: {error}");
    }
}

fn message(message: &impl serde::Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    Frame::Message(to_json(message).unwrap()).encode(&mut bytes);
    bytes
}

fn frames(frames: &[Frame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frames.iter().for_each(|frame| frame.encode(&mut bytes));
    bytes
}

/// The monitor's line, the agent's hello and a start, and then this.
fn after_the_start(then: Vec<u8>) -> Liar {
    Liar::new(move |mut connection| {
        let mut all = b"OK 1024\n".to_vec();
        all.extend(message(&Hello::ours()));
        all.extend(message(&Answer::Started { pid: 1 }));
        all.extend(&then);
        let _ = connection.write_all(&all);
        // It takes what comes, and is there for a while.
        let _ = connection.set_read_timeout(Some(Duration::from_secs(2)));
        let mut buffer = [0; 65536];
        while matches!(connection.read(&mut buffer), Ok(1..)) {}
    })
}

#[test]
fn a_monitor_or_agent_that_does_not_answer() {
    let liar = Liar::new(|connection| {
        thread::sleep(Duration::from_secs(2));
        drop(connection);
    });
    liar.fails("does not answer within 0.5 s");
    for line in ["", "NO\n", "OK", &"OK ".repeat(1000)] {
        let line = line.to_owned();
        let liar = Liar::new(move |mut connection| {
            let _ = connection.write_all(line.as_bytes());
        });
        let error = liar.run().unwrap_err();
        assert!(matches!(error, AgentError::NoAgent { .. }), "{error}");
    }
    // A byte now and then is no answer.
    let liar = Liar::new(|mut connection| {
        let _ = connection.write_all(b"OK 1024\n");
        for byte in message(&Hello::ours()) {
            if connection.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    liar.fails("does not answer within");
    let nobody = tempfile::tempdir().unwrap();
    let error = Guest::new(&nobody.path().join("vsock"), PATIENCE)
        .metrics()
        .unwrap_err();
    assert!(matches!(error, AgentError::Connect { .. }), "{error}");
}

/// Whoever makes a guest somebody else must know whether it has become that.
#[test]
fn an_agent_that_does_not_become_somebody_else() {
    let answers = |answer: Option<Answer>| {
        Liar::new(move |mut connection| {
            let mut all = b"OK 1024\n".to_vec();
            all.extend(message(&Hello::ours()));
            all.extend(answer.iter().flat_map(message));
            let _ = connection.write_all(&all);
            thread::sleep(Duration::from_secs(2));
        })
    };
    let renewal = Renewal {
        hooks_ms: Some(300),
        ..Renewal::default()
    };
    // An older one.
    let unknown = Answer::Refused(Refusal {
        code: Refusal::UNKNOWN_REQUEST.into(),
        text: "this agent does not understand it\x1b[2J".into(),
    });
    let error = answers(Some(unknown)).guest().renew(&renewal).unwrap_err();
    assert!(
        matches!(&error, AgentError::Refused(r) if r.code == Refusal::UNKNOWN_REQUEST),
        "{error}"
    );
    assert!(!error.to_string().contains('\x1b'), "{error}");
    let error = answers(Some(Answer::Done)).guest().renew(&renewal);
    assert!(matches!(error, Err(AgentError::Unexpected { .. })));
    // Its patience, and the hooks' time.
    let begun = Instant::now();
    let error = answers(None).guest().renew(&renewal).unwrap_err();
    assert!(error.to_string().contains("within 0.8 s"), "{error}");
    assert!(begun.elapsed() >= Duration::from_millis(800));
}

#[test]
fn an_agent_that_says_something_else() {
    let says = |bytes: Vec<u8>| {
        Liar::new(move |mut connection| {
            let mut all = b"OK 1024\n".to_vec();
            all.extend(&bytes);
            let _ = connection.write_all(&all);
            thread::sleep(Duration::from_secs(1));
        })
    };
    says(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()).fails("is not the agent's protocol");
    says(vec![1, 0, 0, 0, 255, 255, 255, 255]).fails("at most");
    says(message(&"hello")).fails("no hello");
    says(frames(&[Frame::Data(Stream::Output, vec![1])])).fails("bytes of a stream");
    let newer = Hello {
        protocol: 1000,
        oldest: 999,
        version: "\x1b[31m".into(),
    };
    says(message(&newer)).fails("up to date");
    let mut other = message(&Hello::ours());
    other.extend(message(&Answer::Done));
    says(other).fails("before the start");
    let mut refused = message(&Hello::ours());
    refused.extend(message(&Answer::Refused(Refusal {
        code: "\n".into(),
        text: "\x1b]0;title\x07no".into(),
    })));
    says(refused).fails("\u{fffd}]0;title\u{fffd}no");
}

#[test]
fn streams_that_lie() {
    let piece = || Frame::Data(Stream::Output, vec![0; MAX_DATA_BYTES]);
    // More than a window before anything could be given back: the writer is slow.
    let pieces = WINDOW_BYTES as usize / MAX_DATA_BYTES + 1;
    let mut many = Vec::new();
    for _ in 0..pieces * 50 {
        piece().encode(&mut many);
    }
    let liar = after_the_start(many);
    let (go, wait) = mpsc::channel::<()>();
    struct Slow(mpsc::Receiver<()>);
    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.recv_timeout(Duration::from_secs(5));
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let streams = Streams {
        input: None,
        output: Some(Box::new(Slow(wait))),
        errors: None,
    };
    let releasing = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(go);
    });
    let error = liar
        .guest()
        .run(&Process::default(), streams, |_, _| {})
        .unwrap_err();
    assert!(error.to_string().contains("window"), "{error}");
    releasing.join().unwrap();

    after_the_start(frames(&[Frame::Data(Stream::Input, vec![1])]))
        .fails("does not come from there");
    after_the_start(frames(&[
        Frame::End(Stream::Output),
        Frame::Data(Stream::Output, vec![1]),
    ]))
    .fails("has ended");
    // Nothing was sent, so that there is nothing to give back.
    let liar = after_the_start(frames(&[Frame::Credit(Stream::Input, 1)]));
    let error = liar
        .guest()
        .run(&Process::default(), Streams::default(), |_, _| {})
        .unwrap_err();
    assert!(error.to_string().contains("window"), "{error}");
    after_the_start(frames(&[Frame::Credit(Stream::Errors, 1)])).fails("window");
    after_the_start(message(&Answer::Done)).fails("another answer than an exit");
    after_the_start(message(&7)).fails("no answer");
    // Empty ones for ever cost nothing, and the end is seen.
    let mut empty = frames(&vec![Frame::Data(Stream::Output, Vec::new()); 100_000]);
    empty.extend(message(&Answer::Exited(Exit::Code(5))));
    assert_eq!(after_the_start(empty).run().unwrap(), Exit::Code(5));
}

#[test]
fn a_guest_that_ends_in_the_middle() {
    let liar = Liar::new(|mut connection| {
        let mut all = b"OK 1024\n".to_vec();
        all.extend(message(&Hello::ours()));
        all.extend(message(&Answer::Started { pid: 1 }));
        all.extend(frames(&[Frame::Data(Stream::Output, vec![b'x'; 100])]));
        let _ = connection.write_all(&all);
    });
    let error = liar.run().unwrap_err();
    assert!(matches!(error, AgentError::Ended), "{error}");
}
