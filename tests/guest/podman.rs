//! What people run, as Debian has it: a program in Python; containers within a guest, by podman on its usual network, with nothing done
//! for it.

use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;

use super::images::Home;
use crate::harness::images::path;
use crate::harness::skip;

/// What podman is asked for in the guest. It reads the image from an archive, as starts are slow where processors are emulated; what
/// the container sees are its own memory limit and its way to the guest.
const SCRIPT: &str = "podman run --rm --memory 64m docker-archive:/archive sh -c \
    'echo inside; cat /sys/fs/cgroup/memory.max; ip route | grep default' && \
    podman image ls --quiet | wc -l && findmnt -no FSTYPE /var/lib/containers";

#[test]
fn podman_runs_in_a_guest() {
    let Some(root) = std::env::var_os("ALVEOLE_TEST_PODMAN").map(PathBuf::from) else {
        skip("ALVEOLE_TEST_PODMAN is not set");
        return;
    };
    let Some(home) = Home::new() else { return };
    if !home
        .dir
        .path()
        .join("home/data/kernels/test/modules.erofs")
        .exists()
    {
        skip("the kernel here has no modules");
        return;
    }
    home.does(&["image", "import", path(&home.files), "busybox"]);
    let archive = home.dir.path().join("archive.tar");
    home.does(&[
        "image",
        "export",
        "busybox",
        "--as",
        "docker",
        "-o",
        path(&archive),
    ]);
    let archive = format!("{}:/archive:ro", path(&archive));
    let words = [
        "run",
        "--rm",
        "--net",
        "none",
        "--memory",
        "768M",
        "--cpus",
        "2",
        "-v",
        "storage:/var/lib/containers",
        "-v",
        &archive,
        path(&root),
        "sh",
        "-c",
        SCRIPT,
    ];
    let output = home.output(&words);
    let said = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    let said: Vec<_> = said.lines().map(str::trim).collect();
    let [inside, limit, route, images, storage] = said[..] else {
        panic!("{said:?}: {errors}");
    };
    assert_eq!((inside, limit), ("inside", "67108864"), "{errors}");
    assert!(
        route.starts_with("default via 10.88.0.1 dev eth0"),
        "{route}"
    );
    assert_eq!((images, storage), ("1", "ext4"), "{errors}");
    assert!(output.status.success(), "{errors}");
}

/// Says what only an interpreter with its library can, and ends with a status of its own.
const PROGRAM: &str = "import os, sys
print(os.uname().nodename, sum(range(1000)), os.environ['WHO'], ''.join(sys.stdin).upper())
sys.stderr.write('to the errors')
sys.exit(42)";

#[test]
fn a_program_in_python_is_run_as_it_is_asked_for() {
    let Some(root) = std::env::var_os("ALVEOLE_TEST_PODMAN").map(PathBuf::from) else {
        skip("ALVEOLE_TEST_PODMAN is not set");
        return;
    };
    let Some(home) = Home::new() else { return };
    let mut words = vec!["run", "--rm", "-i", "--net", "none", "--hostname", "snake"];
    words.extend(["-e", "WHO=nobody", path(&root), "python3", "-c", PROGRAM]);
    let mut child = home
        .command(&words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"said").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    assert_eq!(output.stdout, b"snake 499500 nobody SAID\n", "{output:?}");
    assert!(output.stderr.ends_with(b"to the errors"), "{output:?}");
}
