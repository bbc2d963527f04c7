//! The API of the real program against its contract, as a tool reads it that others wrote: schemathesis makes requests
//! of every path that is described, right ones and wrong ones, and looks at what is answered.
//!
//! `ALVEOLE_TEST_SCHEMATHESIS` names its program `schemathesis`; `tools/test` installs it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[expect(dead_code, reason = "tests/api.rs uses the rest")]
mod api_client;
#[expect(dead_code, reason = "tests/bad_input.rs uses the rest")]
mod tiny_guest;

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use api_client::Client;
use nix::sys::signal::Signal::SIGINT;
use serde_json::json;
use tiny_guest::{Bench, hang, no_kvm, print, skipped};

/// What is looked at in each answer. `type_of_a_body` is ours (`contract/hooks.py`).
const CHECKS: &str = "not_a_server_error,status_code_conformance,type_of_a_body,response_headers_conformance,\
                      response_schema_conformance,negative_data_rejection";
/// Requests of each operation that are made at random, beside those that cover its description. Always the same ones.
const RANDOM_REQUESTS: &str = "20";

/// The program, or none, which is said loudly.
fn schemathesis(test: &str) -> Option<PathBuf> {
    let Some(program) = std::env::var_os("ALVEOLE_TEST_SCHEMATHESIS") else {
        skipped(test, "ALVEOLE_TEST_SCHEMATHESIS is not set");
        return None;
    };
    let program = PathBuf::from(program);
    assert!(program.exists(), "ALVEOLE_TEST_SCHEMATHESIS: {program:?}");
    Some(program)
}

/// The tool speaks TCP only: carries each connection to the socket at `path`, until the process ends.
fn relay_to(path: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // The machine may have ended; the client sees the end of its connection then.
            let Ok(server) = UnixStream::connect(&path) else {
                continue;
            };
            carry(client, server);
        }
    });
    address
}

/// Carries bytes both ways until both are at their ends.
fn carry(client: TcpStream, server: UnixStream) {
    let (mut from_client, mut to_client) = (client.try_clone().unwrap(), client);
    let (mut from_server, mut to_server) = (server.try_clone().unwrap(), server);
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
}

/// Runs the tool on a description in `resources/openapi` against the API at `socket`.
#[track_caller]
fn check(program: &Path, description: &str, socket: PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(program)
        .arg("run")
        .arg(root.join("resources/openapi").join(description))
        .args(["--url", &format!("http://{}", relay_to(socket))])
        .args(["--checks", CHECKS, "--max-examples", RANDOM_REQUESTS])
        .args(["--phases", "examples,coverage,fuzzing", "--seed", "1"])
        .args(["--generation-database", "none", "--continue-on-failure"])
        .args(["--warnings", "off", "--no-color", "--no-shrink"])
        .env("SCHEMATHESIS_HOOKS", "hooks")
        .env("PYTHONPATH", root.join("tests/contract"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(tempfile::tempdir().unwrap().path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for line in said.lines() {
        if line.contains("Tested:") || line.contains("generated") {
            println!("{description}: {}", line.trim());
        }
    }
    // A tool that checked nothing has found nothing.
    assert!(said.contains("generated"), "{said}");
}

#[test]
fn a_machine_in_the_making_keeps_the_contract() {
    let Some(program) = schemathesis("a_machine_in_the_making_keeps_the_contract") else {
        return;
    };
    let bench = Bench::new(&hang());
    let mut running = start(&bench);
    let mut client = Client::at(&bench.file("api"));
    for description in ["firecracker.yaml", "alveole.yaml"] {
        check(&program, description, bench.file("api"));
    }
    assert_eq!(client.get("/")["state"], "Not started");
    assert!(running.child.try_wait().unwrap().is_none());
    running.signal(SIGINT);
    assert_eq!(running.end().code(), Some(130));
}

#[test]
fn a_machine_that_runs_keeps_the_contract() {
    let test = "a_machine_that_runs_keeps_the_contract";
    let Some(program) = schemathesis(test) else {
        return;
    };
    if no_kvm(test) {
        return;
    }
    let bench = Bench::new(&[print("up\n"), hang()].concat());
    bench.sparse("disk", 1 << 20);
    let mut running = start(&bench);
    let mut client = Client::at(&bench.file("api"));
    let kernel = json!({"kernel_image_path": "kernel"});
    client.done("PUT", "/boot-source", kernel);
    let drive = json!({"drive_id": "0", "path_on_host": "disk", "is_root_device": false});
    client.done("PUT", "/drives/0", drive);
    client.done("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    for description in ["firecracker.yaml", "alveole.yaml"] {
        check(&program, description, bench.file("api"));
    }
    assert!(running.child.try_wait().unwrap().is_none());
    client.done("PATCH", "/vm", json!({"state": "Resumed"}));
    running.signal(SIGINT);
    assert_eq!(running.end().code(), Some(130));
}

/// The program with an API, in a directory in which the tool may have it make files.
fn start(bench: &Bench) -> tiny_guest::Running<'_> {
    bench.start_command(bench.command(&["--api-sock", "api", "--console", "none"]))
}
