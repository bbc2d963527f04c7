//! Sessions with an agent that runs on this host as its user, at a unix socket: everything but what only the first process
//! of a guest does, which `tests/guest/agent.rs` has.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod served;

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use alveole_agent_client::{AgentError, Controls, Streams};
use alveole_agent_protocol::{
    Answer, CopyIn, CopyOut, Decoder, Exit, Frame, Process, Refusal, Request, Stream, WindowSize,
    from_json,
};
use served::{Agent, Kept, PATIENCE, sh};

#[test]
fn exits_streams_and_environment_are_exact() {
    let agent = Agent::start();
    let (exit, output, errors) = agent.sh("echo out; echo err >&2; exit 7");
    assert_eq!(
        (exit, &*output, &*errors),
        (Exit::Code(7), "out\n", "err\n")
    );
    assert_eq!(agent.sh("kill -9 $$").0, Exit::Signal(9));
    assert_eq!(agent.sh("kill -9 $$").0.status(), 137);
    let process = Process {
        env: vec![
            ("A".into(), "1 2".into()),
            ("PATH".into(), "/usr/bin:/bin".into()),
        ],
        cwd: "/usr".into(),
        ..sh("echo \"$A\" \"$PATH\" \"$PWD\" \"$HOME\"; env | wc -l")
    };
    let (_, output, _) = agent.run(&process, None).unwrap();
    let home = format!("1 2 /usr/bin:/bin /usr {}", home());
    assert_eq!(output.lines().next(), Some(&*home));
    // PWD and _ (and OLDPWD, or not) are the shell's.
    let count: usize = output.lines().nth(1).unwrap().parse().unwrap();
    assert!(
        (4..=7).contains(&count),
        "somebody else's environment: {output}"
    );
}

fn home() -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let root = passwd.lines().find(|l| l.starts_with("root:")).unwrap();
    root.split(':').nth(5).unwrap().to_owned()
}

#[test]
fn what_cannot_be_run_says_why() {
    let agent = Agent::start();
    let refusal = |process: &Process| match agent.run(process, None) {
        Err(AgentError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let with = |args: &[&str]| Process {
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        ..Process::default()
    };
    for (process, code, word) in [
        (with(&["no-such-program"]), Refusal::NOT_FOUND, "PATH"),
        (with(&["/no/such"]), Refusal::NOT_FOUND, "/no/such"),
        (
            with(&["/etc/passwd"]),
            Refusal::NOT_EXECUTABLE,
            "executable",
        ),
        (with(&[]), Refusal::FAILED, "no program"),
        (with(&[""]), Refusal::FAILED, "no program"),
        (
            Process {
                cwd: "/nowhere".into(),
                ..sh("true")
            },
            Refusal::NOT_FOUND,
            "/nowhere",
        ),
        (
            Process {
                cwd: "tmp".into(),
                ..sh("true")
            },
            Refusal::FAILED,
            "begin with /",
        ),
        (
            Process {
                user: "who-is-that".into(),
                ..sh("true")
            },
            Refusal::FAILED,
            "who-is-that",
        ),
    ] {
        let refusal = refusal(&process);
        assert_eq!(refusal.code, code, "{refusal:?}");
        assert!(refusal.text.contains(word), "{refusal:?}");
    }
}

/// 100 MB that are the same for everybody, without keeping them.
struct Pattern {
    at: u64,
    end: u64,
}

impl Pattern {
    const BYTES: u64 = 100_000_000;

    fn new() -> Self {
        Self {
            at: 0,
            end: Self::BYTES,
        }
    }
}

impl Read for Pattern {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap();
        let count = into.len().min(left);
        for byte in &mut into[..count] {
            *byte = (self.at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
            self.at += 1;
        }
        Ok(count)
    }
}

/// Compares what is written with the pattern.
struct Same {
    pattern: Pattern,
    end: mpsc::Sender<u64>,
}

impl Write for Same {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut expected = vec![0; bytes.len()];
        self.pattern.read_exact(&mut expected)?;
        assert!(bytes == expected, "not the same before {}", self.pattern.at);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Same {
    fn drop(&mut self) {
        let _ = self.end.send(self.pattern.at);
    }
}

#[test]
fn a_hundred_megabytes_there_and_back() {
    let agent = Agent::start();
    let (end, ended) = mpsc::channel();
    let streams = Streams {
        input: Some(Box::new(Pattern::new())),
        output: Some(Box::new(Same {
            pattern: Pattern::new(),
            end,
        })),
        errors: None,
    };
    let process = Process {
        input: true,
        ..sh("cat")
    };
    let exit = agent.guest().run(&process, streams, |_, _| {}).unwrap();
    assert_eq!(exit, Exit::Code(0));
    assert_eq!(ended.recv_timeout(PATIENCE).unwrap(), Pattern::BYTES);
}

/// Writes nothing until it is told to.
struct Stuck(mpsc::Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stream_that_nobody_reads_holds_up_no_other() {
    let agent = Agent::start();
    let (go, wait) = mpsc::channel();
    let errors = Kept::default();
    let streams = Streams {
        input: None,
        output: Some(Box::new(Stuck(wait))),
        errors: Some(Box::new(errors.clone())),
    };
    // More output than windows and pipes hold; the errors and the signal must pass it.
    let process = sh(
        "trap 'echo told >&2; exit 3' USR1; head -c 5000000 /dev/zero & i=0; \
         while [ $i -lt 1000 ]; do echo line $i >&2; i=$((i+1)); done; echo ready >&2; while :; do sleep 0.05; done",
    );
    let seen = errors.clone();
    let (begun, controls) = mpsc::channel::<Controls>();
    let watcher = thread::spawn(move || {
        let controls = controls.recv().unwrap();
        let until = Instant::now() + PATIENCE;
        while !seen.text().ends_with("ready\n") {
            assert!(Instant::now() < until, "the errors are held up");
            thread::sleep(Duration::from_millis(5));
        }
        controls.signal(10);
        while !seen.text().ends_with("told\n") {
            assert!(Instant::now() < until, "the signal is held up");
            thread::sleep(Duration::from_millis(5));
        }
        // Whoever reads it again gets the rest.
        drop(go);
    });
    let exit = agent
        .guest()
        .run(&process, streams, move |controls, _| {
            begun.send(controls).unwrap();
        })
        .unwrap();
    watcher.join().unwrap();
    assert_eq!(exit, Exit::Code(3));
    assert!(errors.text().starts_with("line 0\nline 1\n"));
}

#[test]
fn input_that_nobody_takes_is_no_reason_to_wait() {
    let agent = Agent::start();
    let process = Process {
        input: true,
        ..sh("exec <&-; sleep 0.1; echo done")
    };
    let (exit, output, _) = agent.run(&process, Some(Box::new(Pattern::new()))).unwrap();
    assert_eq!((exit, &*output), (Exit::Code(0), "done\n"));
    // Without input it is at its end at once.
    let (_, output, _) = agent.sh("wc -c");
    assert_eq!(output.trim(), "0");
}

#[test]
fn a_process_left_behind_does_not_keep_the_session() {
    let agent = Agent::start();
    let begun = Instant::now();
    let (exit, output, _) = agent.sh("sleep 1000 & echo $!");
    assert_eq!(exit, Exit::Code(0));
    assert!(begun.elapsed() < Duration::from_secs(20));
    let pid: i32 = output.trim().parse().unwrap();
    // Its parent is the agent now, which takes its end from the kernel.
    let stat = || fs::read_to_string(format!("/proc/{pid}/stat"));
    let parent = stat().unwrap();
    let parent = parent
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .to_owned();
    assert_eq!(parent, agent.child.id().to_string());
    assert_eq!(agent.sh(&format!("kill {pid}")).0, Exit::Code(0));
    let until = Instant::now() + PATIENCE;
    while stat().is_ok() {
        assert!(Instant::now() < until, "a zombie is left");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_goes_is_told_to_its_process() {
    let agent = Agent::start();
    let marker = agent.folder.path().join("hung-up");
    let script = format!(
        "trap 'echo yes >{}; exit' HUP; echo ready; while :; do sleep 0.02; done",
        marker.display()
    );
    break_off(&agent, &sh(&script), "ready\n");
    let until = Instant::now() + PATIENCE;
    while !marker.exists() {
        assert!(Instant::now() < until, "it was not told");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A client that says what it wants.
fn wish(agent: &Agent, request: &Request) -> UnixStream {
    let mut raw = UnixStream::connect(agent.socket()).unwrap();
    for message in [
        alveole_agent_protocol::to_json(&alveole_agent_protocol::Hello::ours()).unwrap(),
        alveole_agent_protocol::to_json(request).unwrap(),
    ] {
        let mut bytes = Vec::new();
        Frame::Message(message).encode(&mut bytes);
        raw.write_all(&bytes).unwrap();
    }
    raw
}

/// A client that goes when its process has said this; gives the process's number.
fn break_off(agent: &Agent, process: &Process, after: &str) -> u32 {
    let mut raw = wish(agent, &Request::Run(Box::new(process.clone())));
    let (mut decoder, mut said, mut number) = (Decoder::default(), Vec::new(), None);
    while !String::from_utf8_lossy(&said).contains(after) {
        let mut byte = [0];
        assert_eq!(raw.read(&mut byte).unwrap(), 1);
        decoder.push(&byte);
        match decoder.next().unwrap() {
            Some(Frame::Message(json)) => {
                if let Ok(Answer::Started { pid }) = from_json(&json, "answer") {
                    number = Some(pid);
                }
            }
            Some(Frame::Data(Stream::Output, bytes)) => said.extend(bytes),
            _ => {}
        }
    }
    number.unwrap()
}

#[test]
fn a_process_that_outlives_its_session_goes_on_in_another() {
    let agent = Agent::start();
    let go = agent.folder.path().join("go");
    let script = format!(
        "trap 'echo hung up; exit 1' HUP; echo ready; until [ -e {} ]; do sleep 0.02; done; \
         seq 1 200000; echo err >&2; read word; echo $word; exit 9",
        go.display()
    );
    let process = Process {
        input: true,
        outlives_session: true,
        ..sh(&script)
    };
    let pid = break_off(&agent, &process, "ready\n");
    fs::write(&go, "").unwrap();
    // It writes more than a pipe holds, and then more than a window.
    thread::sleep(Duration::from_millis(100));
    let (output, errors) = (Kept::default(), Kept::default());
    let streams = Streams {
        input: Some(Box::new(&b"word\n"[..])),
        output: Some(Box::new(output.clone())),
        errors: Some(Box::new(errors.clone())),
    };
    let told = std::cell::Cell::new(0);
    let exit = agent
        .guest()
        .rejoin(pid, streams, |_, pid| told.set(pid))
        .unwrap();
    assert_eq!((exit, told.get()), (Exit::Code(9), pid));
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(output.text() == expected + "word\n", "not what it wrote");
    assert_eq!(errors.text(), "err\n");
    // It is over, and nobody waits.
    let again = agent.guest().rejoin(pid, Streams::default(), |_, _| {});
    assert!(
        matches!(&again, Err(AgentError::Refused(r)) if r.code == Refusal::NOT_FOUND),
        "{again:?}"
    );
}

#[test]
fn one_that_ended_meanwhile_is_told_to_who_comes_back() {
    let agent = Agent::start();
    let process = Process {
        outlives_session: true,
        ..sh("echo ready; sleep 0.1; echo last; exit 3")
    };
    let pid = break_off(&agent, &process, "ready\n");
    thread::sleep(Duration::from_millis(300));
    for _ in 0..2 {
        // Who breaks off again takes nothing away.
        drop(wish(&agent, &Request::Rejoin { pid }));
    }
    let output = Kept::default();
    let streams = Streams {
        output: Some(Box::new(output.clone())),
        ..Streams::default()
    };
    let exit = agent.guest().rejoin(pid, streams, |_, _| {});
    // What was sent to somebody who went is gone with them; the exit is not.
    assert!(["last\n", ""].contains(&&*output.text()));
    match exit {
        Ok(exit) => assert_eq!(exit, Exit::Code(3)),
        Err(AgentError::Refused(r)) => assert_eq!(r.code, Refusal::NOT_FOUND),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn only_who_waits_can_be_rejoined() {
    let agent = Agent::start();
    let pid = break_off(&agent, &sh("echo ready; exec sleep 1000"), "ready\n");
    for pid in [pid, 1, 0, u32::MAX] {
        let refused = agent.guest().rejoin(pid, Streams::default(), |_, _| {});
        assert!(
            matches!(&refused, Err(AgentError::Refused(r)) if r.code == Refusal::NOT_FOUND),
            "{pid}: {refused:?}"
        );
    }
}

#[test]
fn a_terminal_is_one() {
    let agent = Agent::start();
    let output = Kept::default();
    let process = Process {
        terminal: Some(WindowSize {
            rows: 31,
            columns: 97,
        }),
        input: true,
        ..sh(
            "trap 'stty size; exit 4' WINCH; tty; stty size; echo $TERM; test -t 2 && echo all; echo ready; while :; do sleep 0.02; done",
        )
    };
    let streams = Streams {
        input: None,
        output: Some(Box::new(output.clone())),
        errors: None,
    };
    let seen = output.clone();
    let (begun, controls) = mpsc::channel::<Controls>();
    let resizer = thread::spawn(move || {
        let controls = controls.recv().unwrap();
        let until = Instant::now() + PATIENCE;
        while !seen.text().contains("ready") {
            assert!(Instant::now() < until, "not ready: {}", seen.text());
            thread::sleep(Duration::from_millis(5));
        }
        controls.resize(WindowSize {
            rows: 50,
            columns: 200,
        });
    });
    let exit = agent
        .guest()
        .run(&process, streams, move |controls, _| {
            begun.send(controls).unwrap();
        })
        .unwrap();
    resizer.join().unwrap();
    let text = output.text();
    assert_eq!(exit, Exit::Code(4), "{text}");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{text}");
    assert!(
        lines.contains(&"31 97") && lines.contains(&"50 200"),
        "{text}"
    );
    assert!(lines.contains(&"xterm") && lines.contains(&"all"), "{text}");
}

/// The last words of a process with a terminal come through the kernel's own queues.
#[test]
fn the_last_words_of_a_terminal_are_not_lost() {
    let agent = Agent::start();
    for round in 0..30 {
        let output = Kept::default();
        let process = Process {
            terminal: Some(WindowSize {
                rows: 24,
                columns: 80,
            }),
            ..sh("head -c 20000 /dev/zero | tr '\\0' x; echo; echo end")
        };
        let streams = Streams {
            output: Some(Box::new(output.clone())),
            ..Streams::default()
        };
        let exit = agent.guest().run(&process, streams, |_, _| {}).unwrap();
        assert_eq!(exit, Exit::Code(0));
        let text = output.text();
        assert!(
            text.ends_with("end\r\n"),
            "round {round}: lost at {}",
            text.len()
        );
        assert_eq!(text.matches('x').count(), 20000, "round {round}");
    }
}

#[test]
fn signals_by_number_reach_sessions_processes_only() {
    let agent = Agent::start();
    let (begun, pids) = mpsc::channel();
    let guest = agent.guest();
    let asker = thread::spawn(move || {
        let pid = pids.recv().unwrap();
        guest.signal(pid, 15).unwrap();
    });
    let process = sh("sleep 100");
    let exit = agent
        .guest()
        .run(&process, Streams::default(), move |_, pid| {
            begun.send(pid).unwrap();
        })
        .unwrap();
    asker.join().unwrap();
    assert_eq!(exit, Exit::Signal(15));
    for (pid, signal) in [
        (1, 15),
        (0, 9),
        (u32::MAX, 9),
        (std::process::id(), 9),
        (1, 0),
        (1, 200),
    ] {
        let error = agent.guest().signal(pid, signal).unwrap_err().to_string();
        assert!(error.contains("process"), "{error}");
    }
}

#[test]
fn trees_are_copied_whole_in_both_directions() {
    let agent = Agent::start();
    let from = tempfile::tempdir().unwrap();
    let tree = from.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/file"), "text").unwrap();
    fs::set_permissions(tree.join("a/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::symlink("../nowhere", tree.join("a/link")).unwrap();
    let sparse = fs::File::create(tree.join("a/b/sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, b"here", 1 << 29).unwrap();
    fs::write(tree.join(format!("a/{}", "n".repeat(200))), "long").unwrap();
    // Out ...
    let archive = from.path().join("archive");
    let out = |path: &Path, follow| {
        let streams = Streams {
            output: Some(Box::new(fs::File::create(&archive).unwrap())),
            ..Streams::default()
        };
        let request = Request::CopyOut(CopyOut {
            path: path.display().to_string(),
            follow,
        });
        agent.guest().copy(&request, streams)
    };
    out(&tree, false).unwrap();
    assert!(
        fs::metadata(&archive).unwrap().len() < 1 << 20,
        "holes are not copied"
    );
    // ... and in.
    let to = tempfile::tempdir().unwrap();
    let copy_in = |folder: &Path| {
        let streams = Streams {
            input: Some(Box::new(fs::File::open(&archive).unwrap())),
            ..Streams::default()
        };
        let request = Request::CopyIn(CopyIn {
            folder: folder.display().to_string(),
            keep_owners: true,
        });
        agent.guest().copy(&request, streams)
    };
    copy_in(to.path()).unwrap();
    let copy = to.path().join("tree/a");
    assert_eq!(fs::read_to_string(copy.join("file")).unwrap(), "text");
    assert_eq!(
        fs::metadata(copy.join("file")).unwrap().mode() & 0o7777,
        0o4751
    );
    assert_eq!(
        fs::read_link(copy.join("link")).unwrap(),
        Path::new("../nowhere")
    );
    assert_eq!(
        fs::read_to_string(copy.join("n".repeat(200))).unwrap(),
        "long"
    );
    let sparse = fs::File::open(copy.join("b/sparse")).unwrap();
    assert_eq!(sparse.metadata().unwrap().len(), 1 << 30);
    assert!(sparse.metadata().unwrap().blocks() < 1000, "holes are kept");
    let mut here = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&sparse, &mut here, 1 << 29).unwrap();
    assert_eq!(&here, b"here");
    // A link itself, or what it leads to.
    out(&tree.join("a/link"), false).unwrap();
    let error = out(&tree.join("a/link"), true).unwrap_err().to_string();
    assert!(
        error.contains("a/link") && error.contains("No such file"),
        "{error}"
    );
    let error = copy_in(Path::new("/no/such/folder"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/no/such/folder"), "{error}");
    // What is no archive.
    fs::write(&archive, "x".repeat(5000)).unwrap();
    let error = copy_in(to.path()).unwrap_err().to_string();
    assert!(error.contains("cannot copy into"), "{error}");
}

#[test]
fn how_it_does() {
    let agent = Agent::start();
    let metrics = agent.guest().metrics().unwrap();
    assert!(metrics.memory.total_bytes > 0 && metrics.cpus > 0);
}

#[test]
fn the_guest_is_set_up_once_by_its_own_connection() {
    let agent = Agent::start();
    let error = agent
        .session()
        .ask(&Request::Setup(Box::default()))
        .unwrap_err();
    assert!(error.to_string().contains("set up already"), "{error}");
}

#[test]
fn hundreds_at_once() {
    let agent = Agent::start();
    let threads: Vec<_> = (0..100)
        .map(|n| {
            let guest = agent.guest();
            thread::spawn(move || {
                let output = Kept::default();
                let streams = Streams {
                    output: Some(Box::new(output.clone())),
                    ..Streams::default()
                };
                let process = sh(&format!("sleep 0.2; echo {n}; exit {n}"));
                let exit = guest.run(&process, streams, |_, _| {}).unwrap();
                assert_eq!(exit, Exit::Code(n));
                assert_eq!(output.text(), format!("{n}\n"));
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Bytes that are no session end that session, and no other.
#[test]
fn what_is_no_session_ends_alone() {
    let agent = Agent::start();
    let hello = alveole_agent_protocol::to_json(&alveole_agent_protocol::Hello::ours()).unwrap();
    let mut with_hello = Vec::new();
    Frame::Message(hello).encode(&mut with_hello);
    let mut unknown = with_hello.clone();
    Frame::Message(br#"{"teleport":{}}"#.to_vec()).encode(&mut unknown);
    let mut early = with_hello.clone();
    Frame::Data(Stream::Input, vec![1]).encode(&mut early);
    let mut newer = Vec::new();
    Frame::Message(br#"{"protocol":9,"oldest":8,"version":"9"}"#.to_vec()).encode(&mut newer);
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 100],
        &[255; 4],
        &early,
        &newer,
        &unknown,
    ] {
        let mut raw = UnixStream::connect(agent.socket()).unwrap();
        raw.write_all(bytes).unwrap();
        let _ = raw.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = raw.read_to_end(&mut answer);
        let says = |word: &str| String::from_utf8_lossy(&answer).contains(word);
        assert!(says("protocol"), "{answer:?}");
        if bytes == unknown {
            assert!(says("unknown_request") && says("teleport"));
        }
    }
    assert_eq!(agent.sh("exit 5").0, Exit::Code(5));
}
