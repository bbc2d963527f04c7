//! Waiting costs nothing. Measured in a process in which no other test runs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use alveole_api_server::{ApiSocket, ApiThread, DEFAULT_MAX_BODY_BYTES};
use alveole_vm_control::Request;

const PAUSE: &str = "PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}";
const WATCHED: Duration = Duration::from_millis(300);

/// Processor time of the API's thread so far.
fn used() -> Duration {
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        if fs::read_to_string(task.join("comm")).unwrap() == "api\n" {
            let stat = fs::read_to_string(task.join("schedstat")).unwrap();
            let nanos = stat.split_whitespace().next().unwrap().parse().unwrap();
            return Duration::from_nanos(nanos);
        }
    }
    panic!("there is no thread `api`");
}

#[test]
fn clients_that_go_or_ask_more_before_they_are_answered_keep_nobody_busy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api");
    let (tell, told) = mpsc::channel::<Request>();
    let send = Box::new(move |request| tell.send(request).unwrap());
    let socket = ApiSocket::bind(&path).unwrap();
    let max = DEFAULT_MAX_BODY_BYTES;
    let _api = ApiThread::start(socket, max, send, Vec::new(), |why| panic!("{why}")).unwrap();
    let ask = |text: &str| {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(text.as_bytes()).unwrap();
        (client, told.recv_timeout(Duration::from_secs(30)).unwrap())
    };
    let (mut more, first) = ask(PAUSE);
    more.write_all(PAUSE.as_bytes()).unwrap();
    let (gone, second) = ask(PAUSE);
    drop(gone);
    let (shut, third) = ask(PAUSE);
    shut.shutdown(std::net::Shutdown::Write).unwrap();
    let before = used();
    std::thread::sleep(WATCHED);
    let spent = used() - before;
    assert!(spent < WATCHED / 10, "{spent:?} of {WATCHED:?}");
    drop((first, second, third));
}
