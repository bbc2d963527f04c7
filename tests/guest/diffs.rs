//! `alveole snapshot create --diff`: snapshots that have what changed since the one before, and stand alone all the same.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::forks::{counts, exec, ticks};
use super::images::Home;
use crate::harness::images::{path, tool};

/// What is written at a time.
const MIB: u64 = 4;

/// Has the guest write something that is nowhere else into memory and on its disk, and gives its sum.
fn writes(home: &Home, vm: &str, name: &str) -> String {
    let script = format!(
        "dd if=/dev/urandom of=/dev/shm/{name} bs=1M count={MIB} 2>/dev/null; echo {name} >/at; sha256sum </dev/shm/{name}"
    );
    exec(home, vm, &script)
}

/// Asserts that the guest is as it was when this was the last that it had written.
#[track_caller]
fn is_of(home: &Home, vm: &str, written: &[(&str, &str)]) {
    let names: Vec<_> = written.iter().map(|(name, _)| *name).collect();
    let said = exec(home, vm, "cat /at; ls /dev/shm | sort");
    let expected = [&[*names.last().unwrap()], &names[..]].concat().join("\n");
    assert_eq!(said, expected, "of {vm}");
    for (name, sum) in written {
        let found = exec(home, vm, &format!("sha256sum </dev/shm/{name}"));
        assert_eq!(found, *sum, "{name} of {vm}");
    }
    // Its process goes on, too.
    let at = ticks(home, vm).last().copied();
    home.wait_until(30, "ticks", || ticks(home, vm).last().copied() > at);
}

/// Restores a snapshot, and asserts that it is as it was.
#[track_caller]
fn restores(home: &Home, snapshot: &str, written: &[(&str, &str)]) {
    home.does(&["restore", snapshot, "--name", "restored", "--rm"]);
    is_of(home, "restored", written);
    home.does(&["rm", "-f", "restored"]);
}

/// Takes a diff, and gives its name and what was said.
#[track_caller]
fn diff(home: &Home, vm: &str, name: Option<&str>) -> (String, String) {
    let words = ["snapshot", "create", "--diff", vm];
    let output = home.output(&[&words[..], name.as_slice()].concat());
    assert!(output.status.success(), "{vm}: {output:?}");
    let text = |bytes| String::from_utf8(bytes).unwrap().trim_end().to_owned();
    (text(output.stdout), text(output.stderr))
}

/// What is known of a snapshot.
fn facts(home: &Home, name: &str) -> Value {
    let said = home.does(&["snapshot", "inspect", name]);
    serde_json::from_str::<Value>(&said).unwrap()[0].clone()
}

fn memory_mib(home: &Home, name: &str) -> f64 {
    facts(home, name)["memory_bytes"].as_f64().unwrap() / 1048576.0
}

fn folder(home: &Home) -> PathBuf {
    home.dir.path().join("home/state/snapshots")
}

#[test]
fn diffs_have_what_changed_and_need_no_other_snapshot() {
    let Some(home) = Home::of_nobody() else {
        return;
    };
    counts(&home, "web", &[]);
    let first = writes(&home, "web", "1st");
    let (name, said) = diff(&home, "web", Some("base"));
    assert_eq!(name, "base");
    assert!(said.contains("all of memory"), "{said}");
    let second = writes(&home, "web", "2nd");
    // What is copied for a moment takes nothing away from the next diff.
    home.does(&["fork", "web", "--name", "forked", "--rm"]);
    is_of(&home, "forked", &[("1st", &first), ("2nd", &second)]);
    home.does(&["rm", "-f", "forked"]);
    let (name, said) = diff(&home, "web", None);
    assert_eq!(name, "web-1");
    assert!(!said.contains("all of memory"), "{said}");
    let third = writes(&home, "web", "3rd");
    assert_eq!(diff(&home, "web", None).0, "web-2");
    writes(&home, "web", "4th");
    let sizes = ["base", "web-1", "web-2"].map(|name| memory_mib(&home, name));
    println!("memory files have {sizes:?} MiB");
    let written = f64::from(u32::try_from(MIB).unwrap());
    assert!(sizes[1] > written && sizes[2] > written, "{sizes:?}");
    assert!(
        sizes[1] < sizes[0] / 2.0 && sizes[2] < sizes[0] / 2.0,
        "{sizes:?}"
    );
    let listed = home.does(&["snapshot", "ls"]);
    for kind in ["KIND", "full", "diff of base", "diff of web-1"] {
        assert!(listed.contains(kind), "{listed}");
    }
    let known = facts(&home, "web-2");
    assert_eq!(
        (&known["kind"], &known["base"], &known["memory_files"]),
        (&"diff".into(), &"web-1".into(), &3.into())
    );
    // What all three have counts once.
    let taken = home.does(&["system", "df", "--format", "json"]);
    let taken: Vec<Value> = serde_json::from_str(&taken).unwrap();
    let taken = taken.iter().find(|k| k["kind"] == "snapshots").unwrap();
    let taken = taken["bytes"].as_f64().unwrap() / 1048576.0;
    assert!(taken < 2.0 * sizes[0], "{taken} MiB");

    // Each of them stands alone.
    let of_two = [("1st", &*first), ("2nd", &*second)];
    let of_three = [of_two[0], of_two[1], ("3rd", &*third)];
    home.does(&["snapshot", "rm", "base"]);
    let listed = home.does(&["snapshot", "ls"]);
    assert!(listed.contains("diff of one removed"), "{listed}");
    restores(&home, "web-1", &of_two);
    home.does(&["snapshot", "rm", "web-1"]);
    assert_eq!(home.does(&["snapshot", "verify", "web-2"]), "web-2: whole");
    restores(&home, "web-2", &of_three);
    let many = home.does(&["fork", "web-2", "-n", "4", "--name", "many", "--rm"]);
    let many: Vec<_> = many.lines().collect();
    assert_eq!(many.len(), 4);
    for copy in &many {
        is_of(&home, copy, &of_three);
    }
    home.does(&["fork", many[0], "--name", "of-one", "--rm"]);
    is_of(&home, "of-one", &of_three);
    home.does(&[&["rm", "-f", "of-one"], &many[..]].concat());
    home.does(&["pool", "create", "ready", "web-2", "-n", "1"]);
    let taken = home.does(&["pool", "take", "ready"]);
    is_of(&home, &taken, &of_three);
    home.does(&["pool", "rm", "ready"]);
    home.does(&["rm", "-f", &taken]);
    // Carried elsewhere, too, with all that it builds upon; what lacks of that is told.
    let archive = home.dir.path().join("two.tar");
    home.does(&["snapshot", "export", "web-2", "-o", path(&archive)]);
    home.does(&["snapshot", "import", path(&archive), "carried"]);
    let carried = home.does(&["snapshot", "verify", "carried"]);
    assert_eq!(carried, "carried: whole");
    let before = fs::read_dir(folder(&home).join("web-2")).unwrap();
    let before = before.map(|e| e.unwrap().file_name().into_string().unwrap());
    let before = before.filter(|name| name.starts_with("memory-")).max();
    let lacks = format!("--exclude={}", before.as_ref().unwrap());
    let of = folder(&home).join("web-2");
    let half = ["-C", path(&of), &lacks, "-Scf", path(&archive), "."];
    assert!(tool("tar", &half));
    let refused = home.output(&["snapshot", "import", path(&archive), "half"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains(&before.unwrap()),
        "{said}"
    );

    // A copy of which changes are noted has its first diff over its snapshot; of others it has all.
    home.does(&["restore", "carried", "--name", "noted", "--track-changes"]);
    home.does(&["restore", "carried", "--name", "plain"]);
    for (copy, kind) in [("noted", "diff"), ("plain", "full")] {
        let own = writes(&home, copy, "zzz");
        let (name, said) = diff(&home, copy, None);
        let all = kind == "full";
        assert_eq!(said.contains("all of memory"), all, "{copy}: {said}");
        assert_eq!(facts(&home, &name)["kind"], kind);
        home.does(&["rm", "-f", copy]);
        let of_copy = [&of_three[..], &[("zzz", &*own)]].concat();
        restores(&home, &name, &of_copy);
    }
    let of_copies = [memory_mib(&home, "noted-1"), memory_mib(&home, "plain-1")];
    println!("those of copies have {of_copies:?} MiB");
    assert!(of_copies[0] < of_copies[1] / 2.0, "{of_copies:?}");

    // One file again.
    assert!(
        home.does(&["snapshot", "flatten", "web-2"])
            .contains("one file now")
    );
    let known = facts(&home, "web-2");
    assert_eq!(
        (&known["kind"], &known["memory_files"]),
        (&"full".into(), &1.into())
    );
    home.does(&["snapshot", "rm", "carried", "noted-1", "plain-1"]);
    let mut files: Vec<_> = fs::read_dir(folder(&home).join("web-2"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("memory"))
        .collect();
    files.sort();
    assert_eq!(files, ["memory"]);
    assert_eq!(home.does(&["snapshot", "verify", "web-2"]), "web-2: whole");
    restores(&home, "web-2", &of_three);
    assert!(
        home.does(&["snapshot", "flatten", "web-2"])
            .contains("already")
    );
    // And what goes on from it may have diffs over it.
    home.does(&["restore", "web-2", "--name", "noted", "--track-changes"]);
    let own = writes(&home, "noted", "zzz");
    let (name, _) = diff(&home, "noted", None);
    assert_eq!(facts(&home, &name)["base"], "web-2");
    home.does(&["rm", "-f", "noted"]);
    restores(&home, &name, &[&of_three[..], &[("zzz", &*own)]].concat());
}

#[test]
fn a_diff_whose_base_is_gone_has_all_memory() {
    let Some(home) = Home::of_nobody() else {
        return;
    };
    counts(&home, "web", &[]);
    let first = writes(&home, "web", "1st");
    diff(&home, "web", Some("base"));
    // One that fails leaves nothing, and the next has what it would have had.
    let second = writes(&home, "web", "2nd");
    let failed = home.output(&["snapshot", "create", "--diff", "web", "base"]);
    let said = String::from_utf8(failed.stderr).unwrap();
    assert!(
        !failed.status.success() && said.contains("already"),
        "{said}"
    );
    let folder = folder(&home);
    let left = || fs::read_dir(&folder).unwrap().count();
    assert_eq!(left(), 1);
    let (name, said) = diff(&home, "web", None);
    assert!(!said.contains("all of memory"), "{said}");
    let written = [("1st", &*first), ("2nd", &*second)];
    restores(&home, &name, &written);
    home.does(&["snapshot", "rm", &name]);
    let third = writes(&home, "web", "3rd");
    let (name, said) = diff(&home, "web", Some("anew"));
    assert!(said.contains("has been removed"), "{said}");
    assert_eq!(facts(&home, &name)["kind"], "full");
    let written = [written[0], written[1], ("3rd", &*third)];
    restores(&home, &name, &written);
    // From there on it goes on, over a full one without the word, too.
    let fourth = writes(&home, "web", "4th");
    assert_eq!(diff(&home, "web", Some("after")).0, "after");
    assert_eq!(facts(&home, "after")["base"], "anew");
    home.does(&["snapshot", "create", "web", "full"]);
    writes(&home, "web", "5th");
    diff(&home, "web", Some("last"));
    assert_eq!(facts(&home, "last")["base"], "full");
    assert_eq!(facts(&home, "full")["kind"], "full");
    let written = [&written[..], &[("4th", &*fourth)]].concat();
    restores(&home, "after", &written);
    assert_eq!(left(), 5);
}
