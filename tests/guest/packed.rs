//! Snapshots whose memory is packed: copies have theirs from a process that unpacks it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use alveole_guest_memory::test_server::may_serve;

use super::forks::{counts, exec, ticks};
use super::images::Home;
use super::interrupted::processes;
use crate::harness::images::{path, tool};

const HASH: &str = "cat /dev/shm/noise /dev/shm/zeroes | sha256sum";

fn refused(home: &Home, words: &[&str]) -> String {
    let output = home.output(words);
    assert!(!output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// The processes that serve memory.
fn servers(home: &Home) -> Vec<i32> {
    let all = processes(home).into_iter();
    all.filter(|(_, line)| line.contains("memory serve"))
        .map(|(pid, _)| pid)
        .collect()
}

fn memory_file(home: &Home, snapshot: &str, name: &str) -> PathBuf {
    let snapshots = home.dir.path().join("home/state/snapshots");
    snapshots.join(snapshot).join(name)
}

/// Waits until a VM has ended, and gives what it ended of.
fn end(home: &Home, name: &str) -> String {
    home.wait_until(60, "end", || home.state(name) != "running");
    home.does(&["inspect", name])
}

#[test]
fn copies_of_a_packed_snapshot_have_its_memory() {
    if !may_serve("guest: copies_of_a_packed_snapshot_have_its_memory") {
        return;
    }
    let Some(home) = Home::new() else { return };
    counts(&home, "web", &[]);
    let fill =
        "head -c 8000000 /dev/urandom >/dev/shm/noise; head -c 4000000 /dev/zero >/dev/shm/zeroes";
    exec(&home, "web", fill);
    let hash = exec(&home, "web", HASH);
    home.does(&["snapshot", "create", "web", "one"]);
    home.does(&["rm", "-f", "web"]);

    let said = home.does(&["snapshot", "pack", "one"]);
    assert!(said.contains("packed, of"), "{said}");
    let (packed, plain) = (
        memory_file(&home, "one", "memory.zst"),
        memory_file(&home, "one", "memory"),
    );
    assert!(packed.exists() && !plain.exists());
    assert!(home.does(&["snapshot", "ls"]).contains("MiB, packed"));
    let inspected = home.does(&["snapshot", "inspect", "one"]);
    assert!(inspected.contains(r#""packed": true"#), "{inspected}");
    assert_eq!(home.does(&["snapshot", "verify", "one"]), "one: whole");
    let again = home.does(&["snapshot", "pack", "one"]);
    assert!(again.contains("already"), "{again}");

    home.does(&["restore", "one", "-n", "3", "--name", "copy"]);
    assert_eq!(servers(&home).len(), 3);
    for name in ["copy-1", "copy-2", "copy-3"] {
        assert_eq!(exec(&home, name, HASH), hash, "{name}");
        home.wait_until(60, "ticks", || ticks(&home, name).len() > 3);
        let counted = ticks(&home, name);
        let in_order = counted.windows(2).all(|two| two[1] == two[0] + 1);
        assert!(in_order, "lost or repeated: {counted:?}");
        exec(&home, name, &format!("echo {name} >/dev/shm/zeroes"));
    }
    for name in ["copy-1", "copy-2", "copy-3"] {
        assert_eq!(exec(&home, name, "cat /dev/shm/zeroes"), name);
    }

    // Carried away and back it stays packed; the VMs go on without the snapshot.
    let archive = home.dir.path().join("one.tar");
    home.does(&["snapshot", "export", "one", "-o", path(&archive)]);
    home.does(&["snapshot", "rm", "one"]);
    home.does(&["snapshot", "import", path(&archive), "two"]);
    assert!(memory_file(&home, "two", "memory.zst").exists());
    assert_eq!(home.does(&["fork", "two", "--name", "fork"]), "fork");
    assert_eq!(exec(&home, "fork", HASH), hash);
    exec(&home, "copy-3", "cat /dev/shm/noise >/dev/null");

    // A snapshot of a copy has what the copy has never touched, too.
    home.does(&["snapshot", "create", "fork", "of-fork"]);
    home.does(&["rm", "-f", "fork"]);
    home.does(&["restore", "of-fork", "--name", "second"]);
    assert_eq!(exec(&home, "second", HASH), hash);
    home.does(&["rm", "-f", "second"]);

    // Nobody goes on with zeroes: a VM whose memory is served no more ends.
    let before = servers(&home);
    assert_eq!(before.len(), 3);
    assert!(tool("kill", &["-9", &before[0].to_string()]));
    let names = ["copy-1", "copy-2", "copy-3"];
    let ended = || names.iter().find(|name| home.state(name) != "running");
    home.wait_until(60, "end of one", || ended().is_some());
    let name = ended().unwrap();
    let told = end(&home, name);
    assert!(told.contains("serves guest memory"), "{told}");
    for other in names.iter().filter(|other| *other != name) {
        assert_eq!(exec(&home, other, "echo well"), "well");
    }
    home.does(&["rm", "-f", "copy-1", "copy-2", "copy-3"]);
    home.wait_until(30, "end of those that serve", || servers(&home).is_empty());

    home.does(&["pool", "create", "ready", "two", "-n", "1"]);
    let taken = home.does(&["pool", "take", "ready"]);
    assert_eq!(exec(&home, &taken, HASH), hash);
    home.does(&["pool", "rm", "ready"]);
    home.does(&["rm", "-f", &taken]);

    assert_eq!(home.does(&["snapshot", "unpack", "two"]), "two: unpacked");
    assert_eq!(home.does(&["snapshot", "verify", "two"]), "two: whole");
    home.does(&["restore", "two", "--name", "third"]);
    assert_eq!(exec(&home, "third", HASH), hash);
    assert!(servers(&home).is_empty());
    home.does(&["rm", "-f", "third"]);

    // What is damaged, or another snapshot's, is found before a VM is made of it.
    home.does(&["snapshot", "pack", "two", "of-fork"]);
    let of_two = memory_file(&home, "two", "memory.zst");
    let kept = fs::read(&of_two).unwrap();
    fs::copy(memory_file(&home, "of-fork", "memory.zst"), &of_two).unwrap();
    let said = refused(&home, &["restore", "two"]);
    assert!(said.contains("not the memory that belongs"), "{said}");
    let said = refused(&home, &["snapshot", "verify", "two"]);
    assert!(said.contains("not the memory that belongs"), "{said}");
    fs::write(&of_two, &kept).unwrap();
    assert_eq!(home.does(&["snapshot", "verify", "two"]), "two: whole");
    let file = fs::File::options().write(true).open(&of_two).unwrap();
    let at = kept.len() / 2;
    file.write_all_at(&[kept[at] ^ 0x55], at as u64).unwrap();
    let said = refused(&home, &["snapshot", "verify", "two"]);
    assert!(said.contains("its frame"), "{said}");
    assert_eq!(home.does(&["ps", "-aq"]), "");
}

#[test]
fn who_may_have_no_page_faults_served_is_told_what_to_do() {
    let Some(home) = Home::of_nobody() else {
        return;
    };
    counts(&home, "web", &[]);
    home.does(&["snapshot", "create", "web", "one"]);
    home.does(&["snapshot", "pack", "one"]);
    assert_eq!(home.does(&["snapshot", "verify", "one"]), "one: whole");
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if allowed.unwrap_or_default().trim() == "0" {
        let said = refused(&home, &["restore", "one", "--name", "copy"]);
        assert!(
            said.contains("alveole snapshot unpack one") && said.contains("sysctl"),
            "{said}"
        );
        assert_eq!(home.does(&["ps", "-aq"]).lines().count(), 1);
    }
    home.does(&["snapshot", "unpack", "one"]);
    home.does(&["restore", "one", "--name", "copy"]);
    assert_eq!(exec(&home, "copy", "echo well"), "well");
    home.does(&["rm", "-f", "web", "copy"]);
}
